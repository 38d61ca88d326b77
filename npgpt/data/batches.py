"""From tokens to batches: what is learnt from and what is held back, and the examples that both are cut into."""

import numpy as np

from npgpt.config import ORDER
from npgpt.errors import UsageError


def training_length(n, val_fraction):
    return n - max(1, int(n * val_fraction))


def split(tokens, val_fraction):
    """(training tokens, validation tokens): the last val_fraction of a text is held back."""
    n = training_length(len(tokens), val_fraction)
    return tokens[:n], tokens[n:]


class Blocks:
    """A split of the corpus as training examples: block_size tokens, each with the token after it as its target.

    An epoch visits each block of the split once, in shuffled order.  Where the cuts between blocks fall (the phase) is
    random for each epoch, so that a token is seen at every position in time.  What an epoch looks like depends on the
    seed and the epoch's number only, and so each batch on the seed and the batch's number.

    Raises UsageError for a split of fewer than block_size + 1 tokens.
    """

    def __init__(self, tokens, block_size, seed):
        if len(tokens) < block_size + 1:
            raise UsageError(
                f"data: the training text has {len(tokens)} tokens, but a block of block_size = {block_size} needs "
                f"{block_size + 1}. Use more text or a smaller --block-size"
            )
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        self.per_epoch = max(1, (len(tokens) - block_size) // block_size)
        self._phases = min(block_size, len(tokens) - self.per_epoch * block_size)
        self._order = (None, None, None)  # the last epoch asked for, its phase, and the order of its blocks

    def _start(self, i):
        """Place of the first token of example number i."""
        epoch, place = divmod(i, self.per_epoch)
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, ORDER, epoch])
            self._order = None, None, None  # so that there are never two
            self._order = epoch, rng.integers(self._phases), rng.permutation(self.per_epoch)
        _, phase, order = self._order
        return phase + self.block_size * order[place]

    def batch(self, n, batch_size):
        """Batch number n -> x, y, each (batch_size, block_size) int64."""
        starts = np.array([self._start(i) for i in range(n * batch_size, (n + 1) * batch_size)])
        window = starts[:, None] + np.arange(self.block_size + 1)
        block = self.tokens[window].astype(np.int64)
        return np.ascontiguousarray(block[:, :-1]), np.ascontiguousarray(block[:, 1:])


class EvaluationBlocks:
    """A split cut into consecutive blocks, in which every token but the first is a target once.

    blocks[i:j] are x, y, each (j - i, block_size) int64.  The last block of the split is filled up with targets of -1,
    which do not count.

    most: at most so many blocks, evenly spread.  Raises UsageError for a split of fewer than 2 tokens.
    """

    def __init__(self, tokens, block_size, most=None):
        if len(tokens) < 2:
            raise UsageError(
                "data: the validation text needs 2 tokens at least. Use more text or a larger --val-fraction"
            )
        self.tokens, self.block_size = tokens, block_size
        self._whole = -(-(len(tokens) - 1) // block_size)  # blocks of the whole split
        self._n = self._whole if most is None else min(most, self._whole)

    def __len__(self):
        return self._n

    def __getitem__(self, part):
        chosen = np.arange(*part.indices(self._n)) * self._whole // self._n
        window = chosen[:, None] * self.block_size + np.arange(self.block_size + 1)
        inside = window < len(self.tokens)
        block = self.tokens[np.minimum(window, len(self.tokens) - 1)].astype(np.int64)
        x, y = block[:, :-1], np.where(inside, block, -1)[:, 1:]
        return np.ascontiguousarray(x), np.ascontiguousarray(y)
