"""Token and position embedding: each token of a (B, T) batch becomes its row of wte plus its position's row of wpe.

Forward:

    y_bt = wte[idx_bt] + wpe[t]

Backward.  Looking up a row is a product with a one-hot vector, so its gradient goes to the row that was looked up, and
to no other.  A token that occurs several times in the batch used the same row several times; its gradients add up:

    dwte[v] = sum over all (b, t) with idx_bt = v of dy_bt
    dwpe[t] = sum_b dy_bt

In GPT-2 wte is used a second time, as the weight of the output layer (tied weights), so dwte must be *added* to what
the output layer left there; and it touches few of the V rows.  Hence this op adds in place.
"""

import numpy as np

from npgpt.kernels.buffers import as_rows, empty
from npgpt.kernels.jit import kernel, replaces
from npgpt.tensor import record

# --------------------------------------------------------------------------------------------------------------------
# Reference


def embedding_forward_ref(idx, wte, wpe):
    """idx (B, T) integers, wte (V, C), wpe (block_size, C) -> y (B, T, C)."""
    T = idx.shape[1]
    return wte[idx] + wpe[:T]


def embedding_backward_ref(dwte, dwpe, dy, idx):
    """Gradients so far dwte (V, C) and dwpe (block_size, C), dy (B, T, C) -> dwte, dwpe with dy added, in place."""
    T = idx.shape[1]
    # y = wte[idx] + wpe[:T]
    np.add.at(dwte, idx, dy)  # not dwte[idx] += dy: a token that occurs twice would count once
    dwpe[:T] += dy.sum(axis=0)
    return dwte, dwpe


# --------------------------------------------------------------------------------------------------------------------
# Op


def check_indices(op, name, indices, size, ignore_index=None):
    """Integer indices as a C-contiguous int64 array.

    Raises ValueError if one lies outside 0 .. size - 1 and is not ignore_index, a negative number.
    """
    indices = np.asarray(indices)
    if indices.dtype.kind not in "iu":
        raise ValueError(f"{op}: {name} must be integers, got dtype {indices.dtype}")
    indices = np.ascontiguousarray(indices, np.int64)
    may_be_wrong = np.count_nonzero(indices.view(np.uint64) >= size) > 0  # also where one is negative
    if may_be_wrong and (((indices < 0) & (indices != ignore_index)).any() or (indices >= size).any()):
        raise ValueError(
            f"{op}: {name} must lie in 0 .. {size - 1}, got values from {indices.min()} to {indices.max()}. "
            f"Was the text encoded with another tokenizer?"
        )
    return indices


def embedding(idx, wte, wpe, first=0):
    """Embed a batch of token sequences.

    idx (B, T) integers, wte (V, C), wpe (block_size, C), of one dtype -> (B, T, C).  int64 idx are not copied, and the
    backward reads them again, without a check: they must not change before it.  first: the first token's position.
    Raises ValueError for T > block_size and for tokens outside 0 .. V - 1.
    """
    idx = check_indices("embedding", "idx", idx, wte.shape[0])
    if idx.ndim != 2:
        raise ValueError(f"embedding: idx must have shape (B, T), got {idx.shape}")
    B, T = idx.shape
    if first + T > wpe.shape[0]:
        raise ValueError(f"embedding: a sequence of {first + T} tokens is longer than block_size = {wpe.shape[0]}")
    C = wte.shape[1]
    if wpe.shape[1] != C:
        raise ValueError(f"embedding: wpe must have shape (block_size, {C}), got {wpe.shape}")
    y = empty((B, T, C), wte.dtype)
    embedding_forward(y, idx, wte.data, wpe.data[first:])

    def backward(dy):
        dwte, dwpe = wte.grad_to_add_to(), wpe.grad_to_add_to()
        embedding_backward(dwte, dwpe[first:], as_rows(dy).reshape(B, T, C), idx)
        return None, None  # both are added already

    return record("embedding", y, (wte, wpe), backward)


# --------------------------------------------------------------------------------------------------------------------
# Kernels


@replaces(embedding_forward_ref, nbytes=lambda y, idx, wte, wpe: 2 * y.nbytes + idx.nbytes + wpe.nbytes)
@kernel
def embedding_forward(y, idx, wte, wpe):
    B, T, C = y.shape
    for b in range(B):
        for t in range(T):
            v = idx[b, t]
            for i in range(C):
                y[b, t, i] = wte[v, i] + wpe[t, i]


@replaces(embedding_backward_ref, nbytes=lambda dwte, dwpe, dy, idx: 3 * dy.nbytes + idx.nbytes + dwpe.nbytes)
@kernel
def embedding_backward(dwte, dwpe, dy, idx):
    B, T, C = dy.shape
    for b in range(B):
        for t in range(T):
            v = idx[b, t]
            # y = wte[v] + wpe[t]
            for i in range(C):
                dwte[v, i] += dy[b, t, i]
                dwpe[t, i] += dy[b, t, i]
