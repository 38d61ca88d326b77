"""Cross-entropy: p - y, and rows that do not count."""

from npgpt.study.lesson import Fault, Lesson

TARGETS = (1, 0, -3, 3, -3, 4, 3)  # -3 is ignored
ZEROS = "in the rows whose target is ignored: the loss does not depend on them"


def arguments(new, N, V, n_ignored=0, ignore_index=-1, targets=None):
    import numpy as np

    if targets is None:
        targets = new.integers(V, N)
        targets[:n_ignored] = ignore_index
    return {"logits": new(N, V), "targets": np.array(targets), "ignore_index": ignore_index, "count": N - n_ignored}


def factors(logits, count, dloss, **_):
    values = {"count": count, "dloss": dloss, "count / dloss": count / dloss, "count / N": count / len(logits)}
    return {name: (value, None) for name, value in values.items()}


def mistakes(dloss, logits, targets, lse, ignore_index, count):
    import numpy as np

    p = np.exp(logits - lse[:, None])
    valid = (targets != ignore_index)[:, None]
    y = (targets[:, None] == np.arange(logits.shape[1])).astype(float)
    scale, z_line = dloss / count, "losses = lse[rows] - logits[rows, targets[rows]]"
    ignored = "wrong mask: it must be 0 " + ZEROS
    yield "dlogits", "missing term: the loss has the target's own logit in it, too", valid * p * scale, z_line
    yield "dlogits", "missing term: the loss has lse in it, too", valid * -y * scale, z_line
    yield "dlogits", "sign of the target's term", valid * (p + y) * scale, z_line
    yield "dlogits", "missing factor: both terms are divided by count", valid * (p * scale - y), None
    yield "dlogits", "wrong value: logits where probabilities belong", valid * (logits - y) * scale, z_line
    last = y.copy()
    last[~valid[:, 0], ignore_index] = 1
    lse_line = "lse = m + np.log(np.exp(logits - m[:, None]).sum(axis=1))"
    yield "dlogits", "wrong value: a probability is exp(logit - lse)", valid * (np.exp(logits) - y) * scale, lse_line
    for taken in (y, last):
        yield "dlogits", ignored, (p - taken) * scale, "rows = np.flatnonzero(valid)"
    yield "dlogits", f"missing term (the target's), and {ignored}", p * scale, z_line


LESSON = Lesson(
    op="cross-entropy", topic="softmax and logarithm in one, and rows that do not count",
    forward=("cross_entropy_forward_ref",), backward=("cross_entropy_backward_ref",), results=("dlogits",),
    arguments=arguments, sizes={"N": 7, "V": 6, "n_ignored": 2, "ignore_index": -3, "targets": TARGETS},
    lengths=("N", "V"), lines={"dlogits": "return losses.sum() / count, lse"},
    factors=factors, zeros=ZEROS, mistakes=mistakes,
    bugs={
        5: Fault(
            "cross-entropy: ignored rows get a gradient", "npgpt/ops/cross_entropy.py",
            "    dlogits[~valid] = 0\n", "",
            "The loss does not depend on rows whose target is ignored.",
        ),
    },
)  # fmt: skip
