"""Causal multi-head self-attention (Vaswani et al. 2017): each position looks at itself and at those before it.

The input qkv (B, T, 3C) holds queries, keys and values side by side, each of n_head heads of size hs = C / n_head.
Forward, for each sequence and head, with q, k, v (T, hs):

    s = scale q k^T                 (T, T)   scale = 1 / sqrt(hs)
    p = softmax(s) over each row, where row t has the columns 0 .. t only (the causal mask); p = 0 elsewhere
    a = dropout(p)                  (the same matrix when p_drop = 0)
    y = a v                         (T, hs)

and y's heads stand side by side again: (B, T, C).

Backward, undoing one line after the other:

    y = a v:         da = dy v^T                    dv = a^T dy
    a = dropout(p):  dp = dropout(da)               (the same mask: see dropout.py)
    p = softmax(s):  with p_j = e^s_j / sum, d p_i / d s_j = p_i (delta_ij - p_j), so in each row
                     ds_j = sum_i dp_i p_i (delta_ij - p_j) = p_j (dp_j - sum_i dp_i p_i)
                     and 0 at masked places, since p is 0 there
    s = scale q k^T: dq = scale ds k                dk = scale ds^T q

The forward keeps no (T, T) matrix, only the logarithm of each row's sum, lse_t = log sum_j e^s_tj (Dao et al. 2022):
the backward makes p = e^(s - lse) again.  And both work on blocks of queries, each with just the keys that it may see:
for long sequences this is half of the multiplications, and memory that grows with T, not with T^2.
"""

import math

import numpy as np

from npgpt.engine import as_rows, empty, next_random_key, record
from npgpt.jit import exp, helper, keeps, kernel, largest, replaces, row_key
from npgpt.ops.dropout import check_p, dropout_mask_ref

QUERY_BLOCK = 128  # queries worked on together
CACHE = 2**19  # bytes that their scores may take: half of a usual second-level cache

# --------------------------------------------------------------------------------------------------------------------
# Reference


def split_heads(qkv, n_head):
    """(B, T, 3C) -> q, k, v, each (B, n_head, T, hs): views, nothing is copied."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.reshape(B, T, 3, n_head, C3 // 3 // n_head).transpose(2, 0, 3, 1, 4)
    return q, k, v


def merged_heads(y, n_head):
    """(B, T, C) -> its heads (B, n_head, T, hs): a view, nothing is copied."""
    B, T, C = y.shape
    return y.reshape(B, T, n_head, C // n_head).transpose(0, 2, 1, 3)


def _scores_ref(q, k):
    T, hs = q.shape[-2:]
    s = q @ k.swapaxes(-1, -2) / math.sqrt(hs)  # (B, n_head, T, T)
    future = np.triu(np.ones((T, T), bool), k=1)
    return np.where(future, -np.inf, s).astype(q.dtype)


def _dropout_scale_ref(like, p_drop, key, batch_offset):
    """What dropout multiplies p (B, n_head, T, T) with: 0 or 1 / (1 - p_drop)."""
    B, H, T, _ = like.shape
    mask = dropout_mask_ref(key, batch_offset * H * T, (B * H * T, T), p_drop)
    return mask.reshape(like.shape) * like.dtype.type(1 / (1 - p_drop))


def attention_forward_ref(qkv, n_head, p_drop, key, batch_offset):
    """qkv (B, T, 3C) -> y (B, T, C), lse (B, n_head, T)."""
    q, k, v = split_heads(qkv, n_head)
    s = _scores_ref(q, k)
    m = s.max(axis=-1, keepdims=True)
    e = np.exp(s - m)
    total = e.sum(axis=-1, keepdims=True)
    p = e / total
    a = p * _dropout_scale_ref(p, p_drop, key, batch_offset)
    y = a @ v  # (B, n_head, T, hs)
    lse = (m + np.log(total))[..., 0]
    B, H, T, hs = y.shape
    return y.transpose(0, 2, 1, 3).reshape(B, T, H * hs), lse


def attention_backward_ref(dy, qkv, lse, n_head, p_drop, key, batch_offset):
    """dy (B, T, C), and the forward's arrays -> dqkv (B, T, 3C)."""
    q, k, v = split_heads(qkv, n_head)
    dy = merged_heads(dy, n_head)  # (B, n_head, T, hs)
    p = np.exp(_scores_ref(q, k) - lse[..., None])
    drop = _dropout_scale_ref(p, p_drop, key, batch_offset)
    # y = a @ v
    da = dy @ v.swapaxes(-1, -2)
    dv = (p * drop).swapaxes(-1, -2) @ dy
    # a = p * drop
    dp = da * drop
    # p = softmax(s)
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))
    # s = q @ k.T / sqrt(hs)
    dq = ds @ k / math.sqrt(q.shape[-1])
    dk = ds.swapaxes(-1, -2) @ q / math.sqrt(q.shape[-1])
    # qkv = q, k, v side by side
    dqkv = np.empty_like(qkv)
    for place, grad in zip(split_heads(dqkv, n_head), (dq, dk, dv), strict=True):
        place[...] = grad
    return dqkv


# --------------------------------------------------------------------------------------------------------------------
# Kernels.  A block holds the queries t0 .. t0 + n - 1 of some sequences, all heads, against the keys 0 .. t0 + n - 1.
# Of a row's columns the first `seen` are those that the causal mask leaves.  Loops run on to `stop`, a multiple of
# LANES, where the columns in between hold what adds nothing: a loop's remainder would go a number at a time.

LANES = 64


@helper
def loop_stop(seen, width):
    return min(width, (seen + LANES - 1) // LANES * LANES)


@kernel
def softmax_forward(s, lse, t0, scale):
    """s (B, n_head, n, t0 + n): q k^T in, p out, in place; lse (B, n_head, T): the rows t0 ... of it are written."""
    B, H, n, width = s.shape
    scale = s.dtype.type(scale)
    for b in range(B):
        for h in range(H):
            for i in range(n):
                row = s[b, h, i]
                seen = t0 + i + 1  # the causal mask: columns 0 .. t0 + i
                stop = loop_stop(seen, width)
                row[seen:stop] = -np.inf
                m = largest(row, stop)
                total = s.dtype.type(0)
                for j in range(stop):
                    e = exp((row[j] - m) * scale)
                    row[j] = e
                    total += e
                inverse = s.dtype.type(1) / total
                for j in range(stop):
                    row[j] *= inverse
                row[seen:] = 0
                lse[b, h, t0 + i] = m * scale + np.log(total)


@kernel
def softmax_again(s, lse, t0, scale):
    """s: q k^T in, p out, in place, with the lse that softmax_forward left."""
    B, H, n, width = s.shape
    scale = s.dtype.type(scale)
    for b in range(B):
        for h in range(H):
            for i in range(n):
                row = s[b, h, i]
                seen = t0 + i + 1
                row_lse = lse[b, h, t0 + i]
                for j in range(loop_stop(seen, width)):
                    row[j] = exp(row[j] * scale - row_lse)
                row[seen:] = 0


@kernel
def softmax_backward(grad, p, t0, scale):
    """grad: dp in, scale * ds out, in place."""
    B, H, n, width = p.shape
    scale = p.dtype.type(scale)
    for b in range(B):
        for h in range(H):
            for i in range(n):
                row_p, row = p[b, h, i], grad[b, h, i]
                seen = t0 + i + 1
                stop = loop_stop(seen, width)
                # p = softmax(s)
                total = p.dtype.type(0)
                for j in range(stop):
                    total += row[j] * row_p[j]
                for j in range(stop):
                    row[j] = row_p[j] * (row[j] - total) * scale
                row[seen:] = 0


@kernel
def block_dropout(a, p, t0, T, p_drop, key, batch_offset):
    """a = dropout(p) for a block; the row of query t is number ((batch_offset + b) n_head + h) T + t of the mask."""
    B, H, n, width = p.shape
    scale = p.dtype.type(1 / (1 - p_drop))
    limit = np.uint32(p_drop * 2**32)
    for b in range(B):
        for h in range(H):
            for i in range(n):
                bits = row_key(key, np.uint64(((batch_offset + b) * H + h) * T + t0 + i))
                for j in range(width):
                    a[b, h, i, j] = p[b, h, i, j] * scale if keeps(bits, np.uint32(j), limit) else p.dtype.type(0)


def _blocks(B, H, T, dtype):
    """Slices (sequences, queries) that cover the batch, small enough for a block's scores to stay in the cache.

    For each group of sequences the last queries come first: their keys are all T, so that the backward can write dk
    and dv there, and add for the blocks that follow.
    """
    n = min(T, QUERY_BLOCK)
    group = max(1, CACHE // (H * n * T * dtype.itemsize))
    for b0 in range(0, B, group):
        for t0 in reversed(range(0, T, n)):
            yield slice(b0, min(b0 + group, B)), slice(t0, min(t0 + n, T))


@replaces(attention_forward_ref)
def attention_forward(y, lse, qkv, n_head, p_drop, key, batch_offset):
    q, k, v = split_heads(qkv, n_head)
    y = merged_heads(y, n_head)
    B, H, T, hs = q.shape
    scale = 1 / math.sqrt(hs)
    for some, queries in _blocks(B, H, T, qkv.dtype):
        t0, t1 = queries.start, queries.stop
        p = empty((some.stop - some.start, H, t1 - t0, t1), qkv.dtype)
        np.matmul(q[some, :, queries], k[some, :, :t1].swapaxes(-1, -2), out=p)
        softmax_forward(p, lse[some], t0, scale)
        if p_drop > 0:
            block_dropout(p, p, t0, T, p_drop, key, batch_offset + some.start)
        np.matmul(p, v[some, :, :t1], out=y[some, :, queries])


@replaces(attention_backward_ref)
def attention_backward(dqkv, dy, qkv, lse, n_head, p_drop, key, batch_offset):
    q, k, v = split_heads(qkv, n_head)
    dq, dk, dv = split_heads(dqkv, n_head)
    dy = merged_heads(dy, n_head)
    B, H, T, hs = q.shape
    scale = 1 / math.sqrt(hs)
    for some, queries in _blocks(B, H, T, qkv.dtype):
        t0, t1 = queries.start, queries.stop
        q_block, dy_block = q[some, :, queries], dy[some, :, queries]
        p = empty((some.stop - some.start, H, t1 - t0, t1), qkv.dtype)
        np.matmul(q_block, k[some, :, :t1].swapaxes(-1, -2), out=p)
        softmax_again(p, lse[some], t0, scale)
        # y = a @ v
        grad = np.matmul(dy_block, v[some, :, :t1].swapaxes(-1, -2), out=empty(p.shape, p.dtype))  # da
        a = p
        if p_drop > 0:
            # a = dropout(p)
            a = empty(p.shape, p.dtype)
            block_dropout(a, p, t0, T, p_drop, key, batch_offset + some.start)
            block_dropout(grad, grad, t0, T, p_drop, key, batch_offset + some.start)  # dp
        _add_product(dv[some], a.swapaxes(-1, -2), dy_block, t1)
        # p = softmax(s), s = scale * q @ k.T
        softmax_backward(grad, p, t0, scale)  # scale * ds
        np.matmul(grad, k[some, :, :t1], out=dq[some, :, queries])
        _add_product(dk[some], grad.swapaxes(-1, -2), q_block, t1)


def _add_product(total, a, b, t1):
    """total[:, :, :t1] += a @ b.  The block with the last queries comes first: it writes instead of adding."""
    if t1 == total.shape[2]:
        np.matmul(a, b, out=total)
    else:
        B, H, _, hs = total.shape
        total[:, :, :t1] += np.matmul(a, b, out=empty((B, H, t1, hs), total.dtype))


# --------------------------------------------------------------------------------------------------------------------
# Op


def causal_attention(qkv, n_head, p_drop=0.0):
    """Causal multi-head self-attention.

    qkv (B, T, 3C): queries, keys and values side by side, as one linear layer makes them -> y (B, T, C).
    p_drop: probability with which an attention weight is dropped (engine.random_stream says which).
    Raises ValueError unless 3 * n_head divides the last axis and 0 <= p_drop < 1.
    """
    check_p("causal_attention", p_drop)
    if qkv.ndim != 3 or qkv.shape[2] % (3 * n_head):
        raise ValueError(
            f"causal_attention: qkv must have shape (B, T, 3 * n_head * hs) with n_head = {n_head}, got {qkv.shape}"
        )
    B, T, C3 = qkv.shape
    key, batch_offset = next_random_key() if p_drop > 0 else (np.uint32(0), 0)
    data = as_rows(qkv.data).reshape(B, T, C3)
    y = empty((B, T, C3 // 3), qkv.dtype)
    lse = empty((B, n_head, T), qkv.dtype)
    attention_forward(y, lse, data, n_head, p_drop, key, batch_offset)

    def backward(dy):
        dqkv = qkv.new_grad()
        attention_backward(dqkv, as_rows(dy).reshape(y.shape), data, lse, n_head, p_drop, key, batch_offset)
        return (dqkv,)

    return record(y, (qkv,), backward)
