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
    p = softmax(s):  with p_j = e^s_j / sum, d p_i / d s_j = p_i ([i = j] - p_j), so in each row
                     ds_j = sum_i dp_i p_i ([i = j] - p_j) = p_j (dp_j - sum_i dp_i p_i)
                     and 0 at masked places, since p is 0 there  ([i = j] is 1 if i = j, and 0 otherwise)
    s = scale q k^T: dq = scale ds k                dk = scale ds^T q

The forward keeps no (T, T) matrix, only the logarithm of each row's sum, lse_t = log sum_j e^s_tj (Dao et al. 2022):
the backward makes p = e^(s - lse) again.  It is kept in float64: what float32 loses of a large lse would be the error
of p.  And both take a few queries at a time, with just the keys that these may see: this is half of the
multiplications, and memory that grows with T, not with T^2.
While a text is written, the keys and values so far stay as they are, and are kept (the KV cache: `past`).  So a new
token costs one row of each product instead of T.
"""

import math

import numpy as np

from npgpt.engine import state
from npgpt.kernels.attention import QUERY_BLOCK, ROWS, backward_heads, forward_heads, scratch
from npgpt.kernels.buffers import as_rows, empty
from npgpt.kernels.jit import replaces
from npgpt.kernels.masks import Dropout, dropout_mask_ref, next_random_key
from npgpt.kernels.matmul import shared
from npgpt.ops.dropout import check_p
from npgpt.tensor import record

# --------------------------------------------------------------------------------------------------------------------
# Reference


def split_qkv(qkv, n_head):
    """(B, T, 3C) -> q, k, v, each (B, n_head, T, hs): views, nothing is copied."""
    B, T, C3 = qkv.shape
    q, k, v = qkv.reshape(B, T, 3, n_head, C3 // 3 // n_head).transpose(2, 0, 3, 1, 4)
    return q, k, v


def split_heads(x, n_head):
    """(B, T, C) -> its heads (B, n_head, T, hs): a view, nothing is copied."""
    B, T, C = x.shape
    return x.reshape(B, T, n_head, C // n_head).transpose(0, 2, 1, 3)


def _scores_ref(q, k):
    """q (B, n_head, T, hs), the last T of the n positions of k (B, n_head, n, hs) -> s (B, n_head, T, n), masked."""
    (T, hs), n = q.shape[-2:], k.shape[-2]
    s = q @ k.swapaxes(-1, -2) / math.sqrt(hs)  # (B, n_head, T, n)
    future = np.triu(np.ones((T, n), bool), k=1 + n - T)
    return np.where(future, -np.inf, s).astype(q.dtype)


def _softmax_ref(s):
    """s (..., T) -> p = softmax(s), and of each row lse, the logarithm of the sum of e^s (...), float64."""
    m = s.max(axis=-1, keepdims=True)
    e = np.exp(s - m)
    total = e.sum(axis=-1, keepdims=True)
    p = e / total
    return p, (m + np.log(total, dtype=np.float64))[..., 0]


def _dropout_scale_ref(like, dropout):
    """What dropout multiplies p (B, n_head, T, T) with: 0 or 1 / (1 - dropout.p).  dropout: a Dropout."""
    B, H, T, _ = like.shape
    mask = dropout_mask_ref(dropout.key, dropout.batch_offset * H * T, (B * H * T, T), dropout.p)
    return mask.reshape(like.shape) * like.dtype.type(1 / (1 - dropout.p))


def attention_forward_ref(qkv, n_head, dropout):
    """qkv (B, T, 3C) -> y (B, T, C), lse (B, n_head, T) in float64."""
    q, k, v = split_qkv(qkv, n_head)
    s = _scores_ref(q, k)
    p, lse = _softmax_ref(s)
    a = p * _dropout_scale_ref(p, dropout)
    y = a @ v  # (B, n_head, T, hs)
    B, H, T, hs = y.shape
    return y.transpose(0, 2, 1, 3).reshape(B, T, H * hs), lse


def attention_past_ref(qkv, n_head, past):
    """qkv (B, T, 3C) of the positions that follow those of past -> y (B, T, C); past gets their keys and values."""
    q, k, v = split_qkv(qkv, n_head)
    past[:] = [np.concatenate(pair, axis=2) for pair in zip(past or (k[:, :, :0], v[:, :, :0]), (k, v), strict=True)]
    y = _softmax_ref(_scores_ref(q, past[0]))[0] @ past[1]
    return y.transpose(0, 2, 1, 3).reshape(*qkv.shape[:2], qkv.shape[2] // 3)


def attention_weights_ref(qkv, n_head):
    """qkv (B, T, 3C) -> p (B, n_head, T, T): how much each position takes from itself and from those before it."""
    q, k, _ = split_qkv(qkv, n_head)
    return _softmax_ref(_scores_ref(q, k))[0]


def attention_backward_ref(dy, qkv, lse, n_head, dropout):
    """dy (B, T, C), and the forward's arrays -> dqkv (B, T, 3C)."""
    q, k, v = split_qkv(qkv, n_head)
    dy = split_heads(dy, n_head)  # (B, n_head, T, hs)
    p = np.exp(_scores_ref(q, k) - lse[..., None]).astype(q.dtype)
    drop = _dropout_scale_ref(p, dropout)
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
    for place, grad in zip(split_qkv(dqkv, n_head), (dq, dk, dv), strict=True):
        place[...] = grad
    return dqkv


# --------------------------------------------------------------------------------------------------------------------
# Op


def causal_attention(qkv, n_head, p_drop=0.0, scale=None, past=None):
    """Causal multi-head self-attention.

    qkv (B, T, 3C): queries, keys and values side by side, as one linear layer makes them -> y (B, T, C).
    p_drop: probability with which an attention weight is dropped (npgpt.random_stream says which).
    scale: what scores are multiplied with; by default 1 / sqrt(hs).
    past: a list, empty at first, then [keys, values], each (B, n_head, n, hs), of the n positions before those of qkv;
    it gets theirs too.  Without gradient and dropout.  Raises ValueError for other shapes, and unless 0 <= p_drop < 1.
    """
    check_p("causal_attention", p_drop)
    if qkv.ndim != 3 or qkv.shape[2] % (3 * n_head):
        raise ValueError(
            f"causal_attention: qkv must have shape (B, T, 3 * n_head * hs) with n_head = {n_head}, got {qkv.shape}"
        )
    B, T, C3 = qkv.shape
    if scale is not None:  # the kernels know 1 / sqrt(hs): the rest of it goes into the queries
        qkv = qkv * np.repeat([scale * math.sqrt(C3 // 3 // n_head), 1, 1], C3 // 3).astype(qkv.dtype)
    data = as_rows(qkv.data).reshape(B, T, C3)
    if past is not None:
        if p_drop > 0 or (qkv.requires_grad and state.recording):
            raise ValueError("causal_attention: past is without gradient and dropout: see no_grad() and eval()")
        if past and past[0].shape[:2] != (B, n_head):
            raise ValueError(f"causal_attention: expected past of shape ({B}, {n_head}, n, hs), got {past[0].shape}")
        return record("causal_attention", attention_past_ref(data, n_head, past), (qkv,), None)
    dropout = Dropout(p_drop, *next_random_key()) if p_drop > 0 else Dropout()
    y, lse = empty((B, T, C3 // 3), qkv.dtype), empty((B, n_head, T), np.float64)
    attention_forward(y, lse, data, n_head, dropout)

    def backward(dy):
        dqkv = qkv.new_grad()
        attention_backward(dqkv, as_rows(dy).reshape(y.shape), data, lse, n_head, dropout)
        return (dqkv,)

    return record("causal_attention", y, (qkv,), backward)


# --------------------------------------------------------------------------------------------------------------------
# Kernels.  The loops over tiles are in kernels/attention.py


@replaces(attention_forward_ref, flops=lambda y, *_: 2 * y.size * (y.shape[1] + 1))
def attention_forward(y, lse, qkv, n_head, dropout):
    B, T, hs = *qkv.shape[:2], y.shape[2] // n_head
    y, qkv = y.reshape(B, T, 1, n_head, hs), qkv.reshape(B, T, 3, n_head, hs)

    def share(part):
        forward_heads(y, lse, qkv, scratch(hs + ROWS, T, qkv.dtype), *dropout, part.start, part.stop)

    shared(share, B, qkv.size)


@replaces(attention_backward_ref, flops=lambda dqkv, dy, *_: 4 * dy.size * (dy.shape[1] + 1))
def attention_backward(dqkv, dy, qkv, lse, n_head, dropout):
    B, T, hs = *qkv.shape[:2], dy.shape[2] // n_head
    qkv, dqkv = qkv.reshape(B, T, 3, n_head, hs), dqkv.reshape(B, T, 3, n_head, hs)
    dy = dy.reshape(B, T, 1, n_head, hs)

    def share(part):
        rows = scratch(2 * hs + 2 * min(T, QUERY_BLOCK), T, qkv.dtype)
        backward_heads(dqkv, dy, qkv, lse, rows, *dropout, part.start, part.stop)

    shared(share, B, qkv.size)
