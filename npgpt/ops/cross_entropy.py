"""Softmax and cross-entropy in one: the mean negative log-probability of the targets, in nats.

Forward, for each of N rows of V logits z with target c:

    p_i  = e^z_i / sum_j e^z_j
    loss = -log p_c = lse(z) - z_c          lse(z) = log sum_j e^z_j = m + log sum_j e^(z_j - m),  m = max_j z_j

(subtracting the maximum changes nothing but keeps e^z from overflowing). The op's loss is the mean over the rows whose
target is not ignore_index.

Backward.  d lse / d z_i = e^z_i / sum_j e^z_j = p_i, and z_c is subtracted once, so

    d loss / d z_i = p_i - [i = c]          [i = c] is 1 if i = c, and 0 otherwise

the famous p - y: what the model predicted minus what it should have predicted.  For a mean over `count` rows, and a
gradient dloss of the loss itself,

    dz_i = dloss / count (p_i - [i = c])    and 0 in ignored rows.
"""

import numpy as np

from npgpt.kernels.buffers import as_rows, empty
from npgpt.kernels.jit import kernel, replaces
from npgpt.kernels.maths import exp, in_two, largest
from npgpt.kernels.matmul import shared
from npgpt.ops.embedding import check_indices
from npgpt.tensor import record

# --------------------------------------------------------------------------------------------------------------------
# Reference


def cross_entropy_forward_ref(logits, targets, ignore_index, count):
    """logits (N, V), targets (N,), `count` of them not ignore_index -> loss (), lse (N,) in float64."""
    m = logits.max(axis=1).astype(np.float64)  # what float32 loses of a large lse would be the error of p
    lse = m + np.log(np.exp(logits - m[:, None]).sum(axis=1))
    valid = targets != ignore_index
    rows = np.flatnonzero(valid)
    losses = lse[rows] - logits[rows, targets[rows]]
    return losses.sum() / count, lse


def cross_entropy_backward_ref(dloss, logits, targets, lse, ignore_index, count):
    """dloss a number, and the forward's arrays -> dlogits (N, V)."""
    p = np.exp(logits - lse[:, None])
    valid = targets != ignore_index
    rows = np.flatnonzero(valid)
    p = p.astype(logits.dtype)  # (lse is float64)
    # loss = sum over valid rows of (lse - logits[target]) / count
    dlogits = p
    dlogits[rows, targets[rows]] -= 1
    dlogits[~valid] = 0
    return dlogits * logits.dtype.type(dloss / count)


# --------------------------------------------------------------------------------------------------------------------
# Op


def cross_entropy(logits, targets, ignore_index=-1):
    """Mean over the targets of -log softmax(logits)[target], in nats.

    logits (..., V), targets (...) integers -> a single number.  Targets equal to ignore_index (a negative number) do
    not count.  int64 targets are not copied, and the backward reads them again, without a check: they must not change
    before it.  Raises ValueError for other shapes, for targets outside 0 .. V - 1, and if all are ignored.
    """
    V = logits.shape[-1]
    if np.shape(targets) != logits.shape[:-1]:
        raise ValueError(f"cross_entropy: targets must have shape {logits.shape[:-1]}, got {np.shape(targets)}")
    targets = check_indices("cross_entropy", "targets", targets, V, ignore_index).reshape(-1)  # (N,)
    count = int(np.count_nonzero(targets != ignore_index))
    if count == 0:
        raise ValueError(f"cross_entropy: every target is ignore_index = {ignore_index}: there is nothing to average")
    rows = as_rows(logits.data)  # (N, V)
    loss, lse = empty((), logits.dtype), empty((len(rows),), np.float64)
    cross_entropy_forward(loss, lse, rows, targets, ignore_index, count)

    def backward(dy):
        dlogits = logits.new_grad()
        cross_entropy_backward(dlogits.reshape(rows.shape), dy.item(), rows, targets, lse, ignore_index, count)
        return (dlogits,)

    return record("cross_entropy", loss, (logits,), backward)


# --------------------------------------------------------------------------------------------------------------------
# Kernels


@replaces(cross_entropy_forward_ref)
@kernel
def cross_entropy_forward(loss, lse, logits, targets, ignore_index, count):
    N, V = logits.shape
    losses = 0.0  # in float64: a sum over many rows
    for n in range(N):
        m = largest(logits[n], V)
        total = logits.dtype.type(0)
        for i in range(V):
            total += exp(logits[n, i] - m)
        lse[n] = np.float64(m) + np.log(total)
        if targets[n] != ignore_index:
            row_lse, rest = in_two(lse[n], logits)
            losses += row_lse - logits[n, targets[n]]
            losses += rest
    loss[()] = losses / count


@kernel
def logits_backward(dlogits, dloss, logits, targets, lse, ignore_index, count):
    N, V = logits.shape
    scale = logits.dtype.type(dloss / count)
    for n in range(N):
        if targets[n] == ignore_index:
            dlogits[n, :] = 0
        else:
            # loss = (lse - logits[target]) / count
            row_lse, rest = in_two(lse[n], logits)
            factor = exp(-rest)  # (a second subtraction would be made one with the first)
            for i in range(V):
                dlogits[n, i] = exp(logits[n, i] - row_lse) * factor * scale
            dlogits[n, targets[n]] -= scale


@replaces(cross_entropy_backward_ref)
def cross_entropy_backward(dlogits, dloss, logits, targets, lse, ignore_index, count):
    def share(rows):
        logits_backward(dlogits[rows], dloss, logits[rows], targets[rows], lse[rows], ignore_index, count)

    shared(share, len(logits), logits.size)
