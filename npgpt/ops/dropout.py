"""Dropout (Srivastava et al. 2014), inverted: what is kept is scaled up, so that nothing changes when sampling.

Forward, with a random mask of zeros and ones:

    y = x mask / (1 - p)          mask is 0 with probability p

Backward: the mask does not depend on x, so y is linear in x and the gradient takes the same way back:

    dx = dy mask / (1 - p)

The mask is not stored.  It is a pure function of (key, row, column) (kernels/masks.py), so forward and backward are the
same function, and the backward makes the mask again.
"""

import numpy as np

from npgpt.kernels.buffers import as_rows, empty
from npgpt.kernels.jit import kernel, replaces
from npgpt.kernels.masks import dropout_mask_ref, keeps, next_random_key, row_key
from npgpt.tensor import record

# --------------------------------------------------------------------------------------------------------------------
# Reference


def dropout_ref(x, key, first_row, p):
    """x (N, C), uint32 key, number of the first row in the whole batch, probability p -> y (N, C)."""
    mask = dropout_mask_ref(key, first_row, x.shape, p)
    return np.where(mask, x * x.dtype.type(1 / (1 - p)), x.dtype.type(0))


# --------------------------------------------------------------------------------------------------------------------
# Op


def check_p(op, p):
    if not 0 <= p < 1:
        raise ValueError(f"{op}: the dropout probability must lie in [0, 1), got {p}")


def dropout(x, p):
    """Set each element to zero with probability p and scale the others by 1 / (1 - p).

    x (B, ..., C), first axis the batch -> y of the same shape.  The mask comes from the thread's random stream
    (npgpt.random_stream).  Raises ValueError unless 0 <= p < 1.
    """
    check_p("dropout", p)
    if p == 0:
        return x
    key, batch_offset = next_random_key()
    rows = as_rows(x.data)  # (N, C)
    first_row = batch_offset * (len(rows) // max(1, x.shape[0]))
    y = empty(rows.shape, x.dtype)
    dropout_rows(y, rows, key, first_row, p)

    def backward(dy):
        dx = x.new_grad()
        # y = x * mask / (1 - p)
        dropout_rows(dx.reshape(rows.shape), as_rows(dy), key, first_row, p)
        return (dx,)

    return record("dropout", y.reshape(x.shape), (x,), backward)


# --------------------------------------------------------------------------------------------------------------------
# Kernel


@replaces(dropout_ref)
@kernel
def dropout_rows(y, x, key, first_row, p):
    N, C = x.shape
    scale = x.dtype.type(1 / (1 - p))
    limit = np.uint32(p * 2**32)
    for n in range(N):
        bits = row_key(key, np.uint64(first_row + n))
        for i in range(C):
            y[n, i] = x[n, i] * scale if keeps(bits, np.uint32(i), limit) else x.dtype.type(0)
