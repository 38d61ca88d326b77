"""The loss of a run's weights on text that it does not learn from; all ranks have a share of it."""


def mean_loss(setup, blocks, stop):
    """The mean over the targets of EvaluationBlocks, finite or not.  Raises TokensChanged, and StopNow."""
    total = count = 0
    setup.parallel.train(False)
    try:
        B = setup.n_sequences  # the ranks take turns with so many at once
        for i in range(setup.world.rank * B, len(blocks), setup.world.size * B):
            if stop.number is not None or setup.tokens.changed():
                break
            loss, n = setup.parallel.loss(*blocks[i : i + B])
            total, count = total + loss, count + n
    finally:
        setup.parallel.train(True)
    total, count, gone = setup.world.sum(stop, total, count, setup.tokens.changed())
    if gone:
        raise setup.tokens.error()
    return total / count
