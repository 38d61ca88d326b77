"""The kernel of npgpt/generate/decode.py: the forward pass for the newest tokens, and the draw of what follows them.

A product of one row with a matrix uses each weight once, for two operations: what takes the time is to fetch it from
memory.  So the kernel takes all blocks in one call, reads each weight where the model has it, once for all rows, and
shares the work with all cores where there is enough to read.

A small model needs less time for a token than Python needs to choose it.  Where no more than the temperature is asked
for, the kernel draws the tokens itself, and goes on with them for some steps.
"""

import numpy as np

from npgpt.kernels.jit import helper, kernel
from npgpt.kernels.maths import array_at, exp, largest
from npgpt.kernels.spin import claim, count_up, meet, next_job
from npgpt.kernels.tiles import dots_unchecked as dots  # (Decoder allocates or checks all that it is given, once)

# the parameters of a block in the order in which the kernel is told where they lie
BLOCK = (
    "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias",
    "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
)  # fmt: skip
MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@helper
def _norm(y, x, weight, bias, eps):
    """y = layer norm of the rows of x (R, C); the same lines as in npgpt/ops/layernorm.py."""
    R, C = x.shape
    one, inv_C, eps = x.dtype.type(1), x.dtype.type(1 / C), x.dtype.type(eps)
    for r in range(R):
        total = x.dtype.type(0)
        for i in range(C):
            total += x[r, i]
        m = total * inv_C
        total = x.dtype.type(0)
        for i in range(C):
            total += (x[r, i] - m) * (x[r, i] - m)
        rstd = one / np.sqrt(total * inv_C + eps)
        m = m if total < np.inf else x.dtype.type(np.nan)
        for i in range(C):
            y[r, i] = (x[r, i] - m) * rstd * weight[i]
        if len(bias):
            for i in range(C):
                y[r, i] += bias[i]


@helper
def _attend(y, q, keys, values, p):
    """y (hs,) = softmax(q keys^T / sqrt(hs)) values: q (1, hs), keys and values (n, hs), p room for (1, n) numbers."""
    n, hs = keys.shape
    real = y.dtype.type
    scale, total = real(1 / np.sqrt(hs)), real(0)
    dots(p, q, keys, p[0, :0], p[0, :0], 0, n, False)
    p = p[0]
    m = largest(p, n)
    for t in range(n):
        p[t] = exp((p[t] - m) * scale)
        total += p[t]
    inverse = real(1) / total
    for t in range(n):
        p[t] *= inverse
    for i in range(hs):
        y[i] = 0
    for t in range(0, n - 3, 4):  # y is loaded and stored once for four of them
        for i in range(hs):
            y[i] += p[t] * values[t, i] + p[t + 1] * values[t + 1, i] + (
                p[t + 2] * values[t + 2, i] + p[t + 3] * values[t + 3, i]
            )
    for t in range(n // 4 * 4, n):
        for i in range(hs):
            y[i] += p[t] * values[t, i]


GROUP = 16  # elements that are never split between threads, nor computed in two ways: bits must not depend on the split


@helper
def _gelu(z, a, k):
    """z = gelu(z) in place, as in npgpt/ops/mlp.py."""
    one, a, minus_2k = z.dtype.type(1), z.dtype.type(a), z.dtype.type(-2 * k)
    whole = len(z) // GROUP * GROUP
    for start in range(0, whole, GROUP):
        for i in range(start, start + GROUP):
            z[i] = z[i] / (one + exp(minus_2k * (z[i] + a * z[i] * z[i] * z[i])))
    for i in range(whole, len(z)):
        z[i] = z[i] / (one + exp(minus_2k * (z[i] + a * z[i] * z[i] * z[i])))


@helper
def _part(n, rank, ranks):
    """(first, last): the share of n rows of weights that a thread computes."""
    groups = (n + GROUP - 1) // GROUP
    return min(n, groups * rank // ranks * GROUP), min(n, groups * (rank + 1) // ranks * GROUP)


@helper
def _decode(
    logits, keys, values, tokens, streams, positions, wte, wte_scale, wpe, places, scale_places, final,
    constants, x, qkv, y, hidden, h, p, rank, ranks, counter,
):  # fmt: skip
    """What GPT.forward does with a cache, as number `rank` of `ranks` threads that share the rows of all matrices.

    places              (L, 12) addresses of the parameters in BLOCK, 0 for none
    scale_places        (L, 4) those of the scales of int8 matrices
    final               (1, 2) those of ln_f's weight and bias
    constants           layer norm's eps, GELU's a and k (Numba would not notice that they change in other files)
    x, qkv, y, hidden   (R, C), (R, 3C), (R, C), (R, 4C): what the threads work on together
    h, p                (R, C), (1, T): this one's own
    """
    R, C = x.shape
    n_head, hs = keys.shape[2], keys.shape[4]
    real = x.dtype.type
    head0, head1 = n_head * rank // ranks, n_head * (rank + 1) // ranks
    out0, out1 = _part(C, rank, ranks)
    for r in range(R):
        token, position = tokens[r], positions[r]
        for i in range(out0, out1):
            e = real(wte[token, i])
            if len(wte_scale):
                e *= wte_scale[token]
            x[r, i] = e + wpe[position, i]
    for layer in range(len(keys)):
        place, scales = places[layer], scale_places[layer]
        meet(counter, ranks)
        # q, k, v = c_attn(ln_1(x)), of this thread's heads
        _norm(h, x, array_at(place[0], C, x), array_at(place[1], C, x), constants[0])
        w = array_at(place[2], 3 * C * C, wte).reshape(3 * C, C)
        scale, bias = array_at(scales[0], 3 * C, x), array_at(place[3], 3 * C, x)
        for part in range(3):
            dots(qkv, h, w, scale, bias, part * C + head0 * hs, part * C + head1 * hs, False)
        for r in range(R):
            stream, position = streams[r], positions[r]
            for head in range(head0, head1):
                at = head * hs
                for i in range(hs):  # (whole rows at a time would take a second to compile)
                    keys[layer, stream, head, position, i] = qkv[r, C + at + i]
                    values[layer, stream, head, position, i] = qkv[r, 2 * C + at + i]
        for r in range(R):
            stream, n = streams[r], positions[r] + 1
            for head in range(head0, head1):
                at = head * hs
                _attend(
                    y[r, at : at + hs], qkv[r, at : at + hs].reshape(1, hs), keys[layer, stream, head, :n],
                    values[layer, stream, head, :n], p,
                )  # fmt: skip
        meet(counter, ranks)
        # x += c_proj(y)
        w = array_at(place[4], C * C, wte).reshape(C, C)
        dots(x, y, w, array_at(scales[1], C, x), array_at(place[5], C, x), out0, out1, True)
        meet(counter, ranks)
        # hidden = gelu(c_fc(ln_2(x)))
        _norm(h, x, array_at(place[6], C, x), array_at(place[7], C, x), constants[0])
        w = array_at(place[8], 4 * C * C, wte).reshape(4 * C, C)
        first, last = _part(4 * C, rank, ranks)
        dots(hidden, h, w, array_at(scales[2], 4 * C, x), array_at(place[9], 4 * C, x), first, last, False)
        for r in range(R):
            _gelu(hidden[r, first:last], constants[1], constants[2])
        meet(counter, ranks)
        # x += c_proj(hidden)
        w = array_at(place[10], 4 * C * C, wte).reshape(C, 4 * C)
        dots(x, hidden, w, array_at(scales[3], C, x), array_at(place[11], C, x), out0, out1, True)
    if len(logits):
        meet(counter, ranks)
        _norm(h, x, array_at(final[0, 0], C, x), array_at(final[0, 1], C, x), constants[0])
        first, last = _part(len(wte), rank, ranks)
        dots(logits, h[R - len(logits) :], wte, wte_scale, array_at(0, 0, x), first, last, False)


@helper
def _draw(z, uniform, temperature):
    """The token that a number in [0, 1) picks from softmax(z / temperature), the likeliest one for a temperature of 0.

    What choose(probabilities(z)) in npgpt/generate/sampling.py does.  z (V,) is used up; -1 if it is not finite.
    """
    m, total = largest(z, len(z)), 0.0
    for i in range(len(z)):
        total += z[i]
    if np.isnan(total) or not np.isfinite(m):
        return -1
    total = 0.0
    if temperature > 0:
        temperature = max(temperature, 1e-300)  # what is compiled multiplies by 1 / temperature, which must be finite
    for i in range(len(z)):
        if temperature > 0:
            z[i] = exp(z.dtype.type((z[i] - m) / temperature))
            total += z[i]
        elif z[i] == m:
            return i
    point, token = uniform * total, -1
    total = 0.0
    for i in range(len(z)):
        total += z[i]
        if z[i] > 0:
            token = i
            if total > point:
                break
    return token


@kernel
def decode_kernel(
    size, temperature, uniforms, drawn, logits, keys, values, rows, wte, wte_scale, wpe, places, scale_places, final,
    constants, x, qkv, y, hidden, h, p, rank, ranks, counter, jobs, seen, state,
):  # fmt: skip
    """_decode, once for rank 0; the others do it for each job that rank 0 begins, until there is none for a while.

    To wake a thread takes as long as a token of a small model.  So the others stay awake from token to token.

    size (4,)               how many rows and logits there are in this job (the arrays of rows have room for more); if
                            tokens are to be drawn, for how many steps, and the first how many tokens may be
    uniforms, drawn         (AHEAD, rows) what they are drawn with, and the tokens
    """
    if rank == 0 and ranks > 1:
        count_up(jobs)
    while rank == 0 or next_job(jobs, seen, state):
        seen += 1
        R, n, steps, vocab_size = size
        for step in range(max(1, steps)):
            _decode(
                logits[:n], keys, values, rows[0, :R], rows[1, :R], rows[2, :R], wte, wte_scale, wpe, places,
                scale_places, final, constants, x[:R], qkv[:R], y[:R], hidden[:R], h[:R], p, rank, ranks, counter,
            )  # fmt: skip
            meet(counter, ranks)
            if steps:
                for r in range(rank, R, ranks):
                    token = _draw(logits[r, :vocab_size], uniforms[step, r], temperature[0])
                    drawn[step, r] = token
                    rows[0, r] = max(0, token)
                    rows[2, r] += 1
                meet(counter, ranks)
        if rank == 0:
            return


@kernel
def claim_kernel(states):
    return claim(states)
