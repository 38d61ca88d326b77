"""Attention's loops over tiles, for npgpt/ops/attention.py, which has the formulas, the reference and the op.

ROWS queries at a time meet the keys up to the last of them; query t sees the keys 0 .. t (the causal mask).  Loops over
a query's scores run on to a multiple of LANES, where the numbers in between are made such that they add nothing: the
rest of a loop that is not a multiple would go a number at a time.
"""

import math

import numpy as np

from npgpt.kernels.buffers import empty
from npgpt.kernels.jit import helper, kernel
from npgpt.kernels.masks import keeps, row_key
from npgpt.kernels.maths import exp, in_two, largest
from npgpt.kernels.tiles import ROWS, fetch, product, transpose

QUERY_BLOCK = 128  # queries whose scores the backward holds together
LANES = 32
PAD = 16  # without it, rows of scratch would lie a power of two apart, and fall onto the same few lines of the cache


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


@helper(inlined=True)
def softmax(s, lse, n):
    """Of row r of s the first n + r numbers become their softmax, those up to a multiple of LANES 0; its lse[r].

    All rows go line by line: nothing then waits for the line before it.
    """
    for r in range(len(s)):
        row, stop = s[r], round_up(n + r, LANES)
        row[n + r : stop] = -np.inf
        lse[r] = largest(row, stop)
    for r in range(len(s)):
        row, m, stop = s[r], s.dtype.type(lse[r]), round_up(n + r, LANES)
        total = s.dtype.type(0)
        for j in range(stop):
            e = exp(row[j] - m)
            row[j] = e
            total += e
        inverse = s.dtype.type(1) / total
        for j in range(stop):
            row[j] *= inverse
        lse[r] = np.float64(m) + np.log(total)


@kernel
def forward_heads(y, lse, qkv, scratch, p_drop, key, batch_offset, first, last):
    """Sequences first:last of y (B, T, 1, n_head, hs), lse (B, n_head, T), qkv (B, T, 3, n_head, hs).

    scratch (hs + ROWS, width), where width is T rounded up to LANES, or more.
    """
    _, T, _, H, hs = qkv.shape
    k_t, s = scratch[:hs], scratch[hs:]
    scale = s.dtype.type(1 / math.sqrt(hs))
    for b in range(first, last):
        for h in range(H):
            q, k, v, y_head = qkv[b, :, 0, h], qkv[b, :, 1, h], qkv[b, :, 2, h], y[b, :, 0, h]
            scaled_transpose(k_t, k, scale)
            for t0 in range(0, T, ROWS):
                t1 = min(t0 + ROWS, T)
                fetch_head(qkv, b * H + h + 1, t0, t1)  # while this head is computed, the next one comes
                fetch_head(y, b * H + h, t0, t1)
                # s = q @ (scale * k).T
                product(s[: t1 - t0, : round_up(t1, LANES)], q[t0:t1], k_t, False)
                # p = softmax(s)
                softmax(s[: t1 - t0], lse[b, h, t0:t1], t0 + 1)
                # a = dropout(p)
                if p_drop > 0:
                    for t in range(t0, t1):
                        drop(s[t - t0], t + 1, p_drop, key, ((batch_offset + b) * H + h) * T + t)
                # y = a @ v
                product(y_head[t0:t1], s[: t1 - t0, :t1], v[:t1], False)


@kernel
def heads_of_past(y, qkv, keys, values, position, asked, scale, scratch, lse, first, last):
    """Heads first:last of T rows, which stand at `position` and after it in a text: their keys and values are cached.

    Of y only the rows from number `asked` on are computed.
    y (T, 1, n_head, hs), qkv (T, 3, n_head, hs); keys, values (n_head, room, hs) of the text; scale > 0.
    scratch (hs + ROWS, width), where width is position + T rounded up to LANES, or more; lse (ROWS,).
    """
    T, n, hs = len(qkv), position + len(qkv), qkv.shape[3]
    k_t, s = scratch[:hs], scratch[hs:]
    for h in range(first, last):
        k, v = keys[h, :n], values[h, :n]
        for t in range(T):
            for i in range(hs):
                k[position + t, i] = qkv[t, 1, h, i]
                v[position + t, i] = qkv[t, 2, h, i]
        scaled_transpose(k_t, k, s.dtype.type(scale))
        # where a tile begins is a multiple of ROWS in the text: its rows' keys then end at one multiple of LANES
        for start in range((position + asked) // ROWS * ROWS - position, T, ROWS):
            t0, t1 = max(start, asked), min(start + ROWS, T)
            scores, seen = s[: t1 - t0], position + t1
            # s = q @ (scale * k).T
            product(scores[:, : round_up(seen, LANES)], qkv[t0:t1, 0, h], k_t, False)
            # p = softmax(s)
            softmax(scores, lse, position + t0 + 1)
            # y = p @ v
            product(y[t0:t1, 0, h], scores[:, :seen], v[:seen], False)


@kernel
def backward_heads(dqkv, dy, qkv, lse, scratch, p_drop, key, batch_offset, first, last):
    """Sequences first:last of dqkv, qkv (B, T, 3, n_head, hs), dy (B, T, 1, n_head, hs), lse (B, n_head, T).

    scratch (2 * hs + 2 * min(T, QUERY_BLOCK), width), where width is T rounded up to LANES, or more.
    """
    _, T, _, H, hs = qkv.shape
    k_t, v_t, s = scratch[:hs], scratch[hs : 2 * hs], scratch[2 * hs :]
    a, grad = s[: len(s) // 2], s[len(s) // 2 :]
    scale, zero = a.dtype.type(1 / math.sqrt(hs)), a.dtype.type(0)
    for b in range(first, last):
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


def scratch(n_rows, T, dtype):
    """Rows for the kernels' transposed heads and scores, (n_rows, width)."""
    return empty((n_rows, -(-T // LANES) * LANES + PAD), dtype)
