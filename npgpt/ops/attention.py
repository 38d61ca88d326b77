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
the backward makes p = e^(s - lse) again.  It is kept in float64: what float32 loses of a large lse would be the error
of p.  And both take a few queries at a time, with just the keys that these may see:
this is half of the multiplications, and memory that grows with T, not with T^2.
"""

import math

import numpy as np

from npgpt.kernels.buffers import as_rows, empty
from npgpt.kernels.jit import helper, kernel, replaces
from npgpt.kernels.masks import dropout_mask_ref, keeps, next_random_key, row_key
from npgpt.kernels.maths import exp, in_two, largest
from npgpt.kernels.tiles import ROWS, fetch, product, transpose
from npgpt.ops.dropout import check_p
from npgpt.tensor import record

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
    """q, k (B, n_head, T, hs) -> s (B, n_head, T, T), -inf where the mask is."""
    T, hs = q.shape[-2:]
    s = q @ k.swapaxes(-1, -2) / math.sqrt(hs)  # (B, n_head, T, T)
    future = np.triu(np.ones((T, T), bool), k=1)
    return np.where(future, -np.inf, s).astype(q.dtype)


def _softmax_ref(s):
    """s (..., T) -> p = softmax(s), and of each row lse, the logarithm of the sum of e^s (...), float64."""
    m = s.max(axis=-1, keepdims=True)
    e = np.exp(s - m)
    total = e.sum(axis=-1, keepdims=True)
    p = e / total
    lse = (m + np.log(total, dtype=np.float64))[..., 0]
    return p, lse


def _dropout_scale_ref(like, p_drop, key, batch_offset):
    """What dropout multiplies p (B, n_head, T, T) with: 0 or 1 / (1 - p_drop)."""
    B, H, T, _ = like.shape
    mask = dropout_mask_ref(key, batch_offset * H * T, (B * H * T, T), p_drop)
    return mask.reshape(like.shape) * like.dtype.type(1 / (1 - p_drop))


def attention_forward_ref(qkv, n_head, p_drop, key, batch_offset):
    """qkv (B, T, 3C) -> y (B, T, C), lse (B, n_head, T) in float64."""
    q, k, v = split_heads(qkv, n_head)
    s = _scores_ref(q, k)
    p, lse = _softmax_ref(s)
    a = p * _dropout_scale_ref(p, p_drop, key, batch_offset)
    y = a @ v  # (B, n_head, T, hs)
    B, H, T, hs = y.shape
    return y.transpose(0, 2, 1, 3).reshape(B, T, H * hs), lse


def attention_weights_ref(qkv, n_head):
    """qkv (B, T, 3C) -> p (B, n_head, T, T): how much each position takes from itself and from those before it."""
    q, k, _ = split_heads(qkv, n_head)
    p, _ = _softmax_ref(_scores_ref(q, k))
    return p


def attention_backward_ref(dy, qkv, lse, n_head, p_drop, key, batch_offset):
    """dy (B, T, C), and the forward's arrays -> dqkv (B, T, 3C)."""
    q, k, v = split_heads(qkv, n_head)
    dy = merged_heads(dy, n_head)  # (B, n_head, T, hs)
    p = np.exp(_scores_ref(q, k) - lse[..., None]).astype(q.dtype)
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
    lse = empty((B, n_head, T), np.float64)
    attention_forward(y, lse, data, n_head, p_drop, key, batch_offset)

    def backward(dy):
        dqkv = qkv.new_grad()
        attention_backward(dqkv, as_rows(dy).reshape(y.shape), data, lse, n_head, p_drop, key, batch_offset)
        return (dqkv,)

    return record("causal_attention", y, (qkv,), backward)


# --------------------------------------------------------------------------------------------------------------------
# Kernels.  ROWS queries at a time meet the keys up to the last of them; query t sees the keys 0 .. t (the causal mask).
# Loops over a query's scores run on to a multiple of LANES, where the numbers in between are made such that they add
# nothing: the rest of a loop that is not a multiple would go a number at a time.

QUERY_BLOCK = 128  # queries whose scores the backward holds together
LANES = 32
PAD = 16  # without it, rows of scores would lie a power of two apart, and fall onto the same few lines of the cache


@helper
def round_up(n, step):
    return (n + step - 1) // step * step


@helper
def scaled_transpose(k_t, k, scale):
    """k_t[:, :T] = scale * k.T, for k (T, hs).

    The keys are scaled, not the scores: forward and backward then agree on s to the last bit, and e^(s - lse) is 1 for
    a score that is alone, however large it is.
    """
    transpose(k_t, k)
    T, hs = k.shape
    for i in range(hs):
        for t in range(T):
            k_t[i, t] *= scale


@helper
def fetch_head(x, n, t0, t1):
    """Have the rows t0:t1 of head n of x (B, T, parts, n_head, hs) fetched: n runs over all heads of all sequences."""
    b, h = n // x.shape[3], n % x.shape[3]
    if b < x.shape[0]:
        for part in range(x.shape[2]):
            fetch(x[b, t0:t1, part, h])


@helper
def drop(row, n, p_drop, key, number):
    """Dropout for the first n weights of a row; `number` is that of the row in the mask."""
    bits = row_key(key, np.uint64(number))
    scale = row.dtype.type(1 / (1 - p_drop))
    limit = np.uint32(p_drop * 2**32)
    for j in range(n):
        row[j] = row[j] * scale if keeps(bits, np.uint32(j), limit) else row.dtype.type(0)


@kernel
def forward_heads(y, lse, qkv, k_t, s, p_drop, key, batch_offset):
    """y (B, T, 1, n_head, hs), lse (B, n_head, T), qkv (B, T, 3, n_head, hs).

    Scratch: k_t (hs, width), s (ROWS, width + PAD), with T rounded up to LANES as width.
    """
    B, T, _, H, hs = qkv.shape
    scale = s.dtype.type(1 / math.sqrt(hs))
    for b in range(B):
        for h in range(H):
            q, k, v, y_head = qkv[b, :, 0, h], qkv[b, :, 1, h], qkv[b, :, 2, h], y[b, :, 0, h]
            scaled_transpose(k_t, k, scale)
            for t0 in range(0, T, ROWS):
                t1 = min(t0 + ROWS, T)
                fetch_head(qkv, b * H + h + 1, t0, t1)  # while this head is computed, the next one comes
                fetch_head(y, b * H + h, t0, t1)
                # s = q @ (scale * k).T
                product(s[: t1 - t0, : round_up(t1, LANES)], q[t0:t1], k_t, False)
                # p = softmax(s), for all of these queries line by line: nothing then waits for the line before it
                for t in range(t0, t1):
                    row, stop = s[t - t0], round_up(t + 1, LANES)
                    row[t + 1 : stop] = -np.inf
                    lse[b, h, t] = largest(row, stop)
                for t in range(t0, t1):
                    row, m, stop = s[t - t0], s.dtype.type(lse[b, h, t]), round_up(t + 1, LANES)
                    total = s.dtype.type(0)
                    for j in range(stop):
                        e = exp(row[j] - m)
                        row[j] = e
                        total += e
                    inverse = s.dtype.type(1) / total
                    for j in range(stop):
                        row[j] *= inverse
                    lse[b, h, t] = np.float64(m) + np.log(total)
                    # a = dropout(p)
                    if p_drop > 0:
                        drop(row, t + 1, p_drop, key, ((batch_offset + b) * H + h) * T + t)
                # y = a @ v
                product(y_head[t0:t1], s[: t1 - t0, :t1], v[:t1], False)


@kernel
def backward_heads(dqkv, dy, qkv, lse, k_t, v_t, a, grad, p_drop, key, batch_offset):
    """dqkv, qkv (B, T, 3, n_head, hs), dy (B, T, 1, n_head, hs), lse (B, n_head, T).

    Scratch: k_t, v_t (hs, width); a, grad (QUERY_BLOCK or T, width + PAD); with T rounded up to LANES as width.
    """
    B, T, _, H, hs = qkv.shape
    scale, zero = a.dtype.type(1 / math.sqrt(hs)), a.dtype.type(0)
    for b in range(B):
        for h in range(H):
            q, k, v, dy_head = qkv[b, :, 0, h], qkv[b, :, 1, h], qkv[b, :, 2, h], dy[b, :, 0, h]
            dq, dk, dv = dqkv[b, :, 0, h], dqkv[b, :, 1, h], dqkv[b, :, 2, h]
            scaled_transpose(k_t, k, scale)
            transpose(v_t, v)
            # the last block of queries comes first: it sees all keys, so it writes dk and dv, and the others add
            for start in range((T - 1) // QUERY_BLOCK * QUERY_BLOCK, -1, -QUERY_BLOCK):
                end = min(start + QUERY_BLOCK, T)
                for t0 in range(start, end, ROWS):
                    t1 = min(t0 + ROWS, end)
                    rows, columns = slice(t0 - start, t1 - start), round_up(t1, LANES)
                    fetch_head(qkv, b * H + h + 1, t0, t1)  # while this head is computed, the next one comes
                    fetch_head(dy, b * H + h + 1, t0, t1)
                    fetch_head(dqkv, b * H + h, t0, t1)
                    product(a[rows, :columns], q[t0:t1], k_t, False)
                    for t in range(t0, t1):
                        row, stop = a[t - start], round_up(t + 1, LANES)
                        row_lse, rest = in_two(lse[b, h, t], row)
                        factor = exp(-rest)  # (a second subtraction would be made one with the first)
                        for j in range(stop):
                            row[j] = exp(row[j] - row_lse) * factor if j <= t else zero  # p again
                    # y = a @ v
                    product(grad[rows, :columns], dy_head[t0:t1], v_t, False)  # da
                    for t in range(t0, t1):
                        row, row_grad, stop = a[t - start], grad[t - start], round_up(t + 1, LANES)
                        # a = dropout(p)
                        number = ((batch_offset + b) * H + h) * T + t
                        if p_drop > 0:
                            drop(row_grad, t + 1, p_drop, key, number)  # dp
                        # p = softmax(s)
                        total = zero
                        for j in range(stop):
                            total += row_grad[j] * row[j] if j <= t else zero
                        for j in range(stop):
                            row_grad[j] = row[j] * (row_grad[j] - total) * scale if j <= t else zero  # scale * ds
                        if p_drop > 0:
                            drop(row, t + 1, p_drop, key, number)  # a again
                    # s = scale * q @ k.T
                    product(dq[t0:t1], grad[rows, :t1], k[:t1], False)
                for j0 in range(0, end, ROWS):
                    j1 = min(j0 + ROWS, end)
                    t0 = max(start, j0)  # no query before j0 sees these keys
                    rows = slice(t0 - start, end - start)
                    product(dv[j0:j1], a[rows, j0:j1].T, dy_head[t0:end], end < T)
                    product(dk[j0:j1], grad[rows, j0:j1].T, q[t0:end], end < T)


@replaces(attention_forward_ref, flops=lambda y, *_: 2 * y.size * (y.shape[1] + 1))
def attention_forward(y, lse, qkv, n_head, p_drop, key, batch_offset):
    B, T, C3 = qkv.shape
    hs = C3 // 3 // n_head
    (k_t,), s = _scratch(1, ROWS, T, hs, qkv.dtype)
    y, qkv = y.reshape(B, T, 1, n_head, hs), qkv.reshape(B, T, 3, n_head, hs)
    forward_heads(y, lse, qkv, k_t, s, p_drop, key, batch_offset)


@replaces(attention_backward_ref, flops=lambda dqkv, dy, *_: 4 * dy.size * (dy.shape[1] + 1))
def attention_backward(dqkv, dy, qkv, lse, n_head, p_drop, key, batch_offset):
    B, T, C3 = qkv.shape
    hs = C3 // 3 // n_head
    n = min(T, QUERY_BLOCK)
    (k_t, v_t), scores = _scratch(2, 2 * n, T, hs, qkv.dtype)
    qkv, dqkv = qkv.reshape(B, T, 3, n_head, hs), dqkv.reshape(B, T, 3, n_head, hs)
    dy = dy.reshape(B, T, 1, n_head, hs)
    backward_heads(dqkv, dy, qkv, lse, k_t, v_t, scores[:n], scores[n:], p_drop, key, batch_offset)


def _scratch(n_heads, n_rows, T, hs, dtype):
    """The scratch arrays of the two kernels: transposed heads, rows of scores."""
    width = -(-T // LANES) * LANES
    return empty((n_heads, hs, width), dtype), empty((n_rows, width + PAD), dtype)
