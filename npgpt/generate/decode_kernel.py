"""The kernel of npgpt/generate/decode.py: the forward pass for the newest tokens, and the draw of what follows them.

It is the one copy of the model, fused for speed; tests/test_decode.py holds it to GPT.forward(idx, cache=...).

A product of one row with a matrix uses each weight once, for two operations: what takes the time is to fetch it from
memory.  So the kernel takes all blocks in one call, reads each weight where the model has it, once for all rows, and
shares the work with all cores where there is enough to read.

A small model needs less time for a token than Python needs to choose it.  Where no more than the temperature is asked
for, the kernel draws the tokens itself, and goes on with them for some steps.
"""

from typing import NamedTuple

import numpy as np

from npgpt.generate.matrices import NOTHING, TOO_MUCH
from npgpt.kernels.jit import helper, inside_kernels, kernel
from npgpt.kernels.maths import array_at, exp, largest, matrix_at
from npgpt.kernels.spin import claim, count_up, meet, next_job
from npgpt.kernels.tiles import dots_unchecked as dots  # (Decoder allocates or checks all that it is given, once)
from npgpt.kernels.tiles import share_of
from npgpt.ops.layernorm import layernorm_forward
from npgpt.ops.mlp import gelu, gelu_numbers

INT8, BFLOAT16 = 1, 2  # bytes of a number in a matrix, unless it is of the model's dtype
GELU = 0  # activations

# What the kernel is told of a model: where its arrays lie, 0 for none
MATRIX = np.dtype([(name, np.int64) for name in ("address", "scale", "bias", "n_out", "n_in")])
NORM = np.dtype([("weight", np.int64), ("bias", np.int64), ("eps", np.float64)])
BLOCK = np.dtype(
    [
        ("ln_1", NORM), ("c_attn", MATRIX), ("scale", np.float64), ("attn_proj", MATRIX),
        ("ln_2", NORM), ("c_fc", MATRIX), ("activation", np.int64), ("mlp_proj", MATRIX),
    ]
)  # fmt: skip
ENDS = np.dtype(
    [("wte", MATRIX), ("wpe", MATRIX), ("ln_f", NORM), ("lm_head", MATRIX), ("shortlist", MATRIX)]
)  # the last one is the draft model's lm_head, if there is one


class Job(NamedTuple):
    """What the threads are to do, and by what they wait for each other."""

    size: np.ndarray  # (5,) rows, logits; to draw tokens: steps, below which one, whether the draft model does it
    rows: np.ndarray  # (3, rows) tokens, streams, positions; like all that follows, with room for more than there are
    logits: np.ndarray  # (rows, V); used up where tokens are drawn
    temperature: np.ndarray  # (1,)
    uniforms: np.ndarray  # (AHEAD, rows) what tokens are drawn with
    drawn: np.ndarray  # (AHEAD, rows)
    counter: np.ndarray
    jobs: np.ndarray


class Shared(NamedTuple):
    """What the threads work on together."""

    x: np.ndarray  # (rows, C)
    qkv: np.ndarray  # (rows, 3C)
    y: np.ndarray  # (rows, C)
    hidden: np.ndarray  # (rows * the MLP's width,)
    like: np.ndarray  # (1,) of the dtype that the numbers of all matrices but wpe have; so one kind is compiled
    narrow: np.ndarray  # (1,) int8, as a draft model; or float32 where there never is one: so none is compiled
    lows: np.ndarray  # (threads, rows) what the highest logit is at least, of those that a thread computes


class Own(NamedTuple):
    """What one thread has for itself."""

    h: np.ndarray  # (rows, C)
    moments: np.ndarray  # (2, rows) of a layer norm
    p: np.ndarray  # (1, T)
    state: np.ndarray


_share_of = helper(share_of)  # of the rows of a matrix: those that a thread computes
GROUP = 16  # elements that are never split between threads, nor computed in two ways: bits must not depend on the split


@helper(counts=True, loops=False)
def _times(out, x, like, w, first, last, add):
    """out[:, first:last] = those columns of x w^T + bias, or out += that, for the MATRIX w of numbers like these."""
    scale, bias = array_at(w.scale, w.n_out, x), array_at(w.bias, w.n_out, x)
    dots(out, x, matrix_at(w.address, w.n_out, w.n_in, like), scale, bias, first, last, add)


@helper(counts=True)
def _add_row(x, like, w, n, first, last):
    """x[first:last] += those columns of row n of the MATRIX w, of numbers like these."""
    numbers = array_at(w.address + n * w.n_in * like.itemsize, w.n_in, like)
    if like.itemsize == INT8:
        scale = array_at(w.scale, w.n_out, x)[n]
        for i in range(first, last):
            x[i] += x.dtype.type(numbers[i]) * scale
    elif like.itemsize == BFLOAT16:
        for i in range(first, last):
            x[i] += np.uint32(np.uint32(numbers[i]) << np.uint32(16)).view(np.float32)
    else:
        for i in range(first, last):
            x[i] += numbers[i]


@helper(counts=True, inlined=True)
def _norm(h, moments, x, norm):
    """h = layer norm of x (R, C)."""
    weight, bias = array_at(norm.weight, x.shape[1], x), array_at(norm.bias, x.shape[1], x)
    layernorm_forward(h, moments[0], moments[1], x, weight, bias, norm.eps)


@helper(inlined=True)
def _attend(y, q, keys, values, scale, p):
    """y (hs,) = softmax(scale q keys^T) values: q (1, hs), keys and values (n, hs), scale > 0, p room for (1, n)."""
    n, hs = keys.shape
    real = y.dtype.type
    scale, total = real(scale), real(0)
    dots(p, q, keys, p[0, :0], p[0, :0], n - n, n, n < 0)  # (0 and False: constants would be a dots of their own)
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


@inside_kernels(float32=lambda narrow, *others: None)
def _times_of_few(narrow, z, h, shared, ends, counter, rank, ranks, first, last, replace):
    """z[:, first:last] = the logits that may be the highest, as `_times` has them for lm_head, and -inf for all others.

    A row of lm_head is scale (q + e) with q of int8 and |e| <= 1/2.  So its logit is at most scale / 2 sum |h| from
    scale q h, for which a quarter of the bytes is read.  Who is further than that below the best one cannot be the
    likeliest.  Both sums of K products may be off, too, and scale and q: `_off` allows for that where errors are shares
    of the numbers.  So nobody is left out whose sum may be too large to be finite, or among the smallest numbers.
    """
    real, scale = h.dtype.type, array_at(ends.shortlist.scale, ends.shortlist.n_out, h)
    _times(z, h, narrow, ends.shortlist, first, last, replace)
    for r in range(len(z)):
        low, off = real(-np.inf), _off(h[r])
        for n in range(first, last):
            if NOTHING < off * scale[n] < TOO_MUCH:
                low = max(low, z[r, n] - off * scale[n])
        shared.lows[rank, r] = low
    meet(counter, ranks)
    for r in range(len(z)):
        low, off = real(-np.inf), _off(h[r])
        for other in range(ranks):
            low = max(low, shared.lows[other, r])
        for n in range(first, last):
            if not NOTHING < off * scale[n] < TOO_MUCH:
                z[r, n] = 0
            elif z[r, n] + off * scale[n] < low:
                z[r, n] = -np.inf
        for n in range(first, last):
            if z[r, n] != -np.inf:
                _times(z[r : r + 1], h[r : r + 1], shared.like, ends.lm_head, n, n + 1, replace)


@helper(inlined=True)
def _off(h):
    """How far the logit of a row of int8 with a scale of 1 may be off, for h (K,); infinite if nobody can tell.

    float32: of sum |h| at most 2^-16 K for the sums of products with numbers up to 127, and 2^-14 for scale and q; here
    is room for twice that, and more.
    """
    size = h.dtype.type(0)
    for k in range(len(h)):
        size += abs(h[k])
    share = h.dtype.type(0.5 + (len(h) + 8) / 2**15)
    return size * share if NOTHING < size < TOO_MUCH else h.dtype.type(np.inf)


@helper(inlined=True)
def _activate(z, activation):
    """z = activation(z), in place."""
    if activation == GELU:
        (one, a, minus_2k), whole = gelu_numbers(z), len(z) // GROUP * GROUP
        for start in range(0, whole, GROUP):
            for i in range(start, start + GROUP):
                z[i] = gelu(z[i], one, a, minus_2k)
        for i in range(whole, len(z)):
            z[i] = gelu(z[i], one, a, minus_2k)


@helper(counts=True, inlined=True, loops=False)
def _decode(like, ends, blocks, keys, values, job, shared, own, rank, ranks, R, n_logits):
    """What GPT.forward does with a cache, as number `rank` of `ranks` threads that share the rows of all matrices."""
    counter, tokens, streams, positions, moments = job.counter, job.rows[0], job.rows[1], job.rows[2], own.moments
    x, qkv, y, h, p = shared.x[:R], shared.qkv[:R], shared.y[:R], own.h[:R], own.p
    C, n_head, hs = x.shape[1], keys.shape[2], keys.shape[4]
    head0, head1 = n_head * rank // ranks, n_head * (rank + 1) // ranks
    out0, out1 = _share_of(C, GROUP, rank, ranks)
    for r in range(R):
        x[r, out0:out1] = 0
        _add_row(x[r], like, ends.wte, tokens[r], out0, out1)
        _add_row(x[r], moments[0], ends.wpe, positions[r], out0, out1)
    replace, add = R < 0, R >= 0  # False and True, but no constants: for each Numba would compile a _times of its own
    for layer in range(len(keys)):
        block = blocks[layer]
        meet(counter, ranks)
        # q, k, v = c_attn(ln_1(x)), of this thread's heads
        _norm(h, moments, x, block.ln_1)
        for part in range(3):
            _times(qkv, h, like, block.c_attn, part * C + head0 * hs, part * C + head1 * hs, replace)
        for r in range(R):
            stream, position = streams[r], positions[r]
            for head in range(head0, head1):
                at = head * hs
                for i in range(hs):  # (whole rows at a time would take a second to compile)
                    keys[layer, stream, head, position, i] = qkv[r, C + at + i]
                    values[layer, stream, head, position, i] = qkv[r, 2 * C + at + i]
        for head in range(head0, head1):  # whose keys and values stay near for all rows of a text
            at = head * hs
            for r in range(R):
                stream, n = streams[r], positions[r] + 1
                _attend(
                    y[r, at : at + hs], qkv[r, at : at + hs].reshape(1, hs), keys[layer, stream, head, :n],
                    values[layer, stream, head, :n], block.scale, p,
                )  # fmt: skip
        meet(counter, ranks)
        if layer == len(keys) - 1:  # of the last layer's output no more rows are needed than get logits
            x, y, h, R = x[R - n_logits :], y[R - n_logits :], h[:n_logits], n_logits
        # x += attn_proj(y)
        _times(x, y, like, block.attn_proj, out0, out1, add)
        meet(counter, ranks)
        # hidden = activation(c_fc(ln_2(x)))
        _norm(h, moments, x, block.ln_2)
        F = block.c_fc.n_out
        hidden = shared.hidden[: R * F].reshape(R, F)
        first, last = _share_of(F, GROUP, rank, ranks)
        _times(hidden, h, like, block.c_fc, first, last, replace)
        for r in range(R):
            _activate(hidden[r, first:last], block.activation)
        meet(counter, ranks)
        # x += mlp_proj(hidden)
        _times(x, hidden, like, block.mlp_proj, out0, out1, add)
    if n_logits:
        meet(counter, ranks)
        _norm(h, moments, x, ends.ln_f)
        _, _, steps, vocab_size, _ = job.size
        if steps and job.temperature[0] == 0 and ends.shortlist.address:
            first, last = _share_of(vocab_size, GROUP, rank, ranks)
            _times_of_few(
                shared.narrow, job.logits[:n_logits], h, shared, ends, counter, rank, ranks, first, last, replace
            )  # fmt: skip
        else:
            first, last = _share_of(ends.lm_head.n_out, GROUP, rank, ranks)
            _times(job.logits[:n_logits], h, like, ends.lm_head, first, last, replace)


@inside_kernels(float32=lambda narrow, *others: None)
def _decode_narrow(narrow, *others):
    """`_decode` of a draft model's weights."""
    _decode(narrow, *others)


@helper(inlined=True)
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


@kernel(counts=True)
def decode_kernel(ends, blocks, keys, values, job, shared, own, rank, ranks, seen):
    """_decode, once for rank 0; the others do it for each job that rank 0 begins, until there is none for a while.

    To wake a thread takes as long as a token of a small model.  So the others stay awake from token to token.

    ends (2,) ENDS, blocks (2, L) BLOCK, of the model and of the draft model; keys, values (L, B, n_head, T, hs); a Job,
    Shared and Own as plain tuples, since Numba takes microseconds to tell the type of others.
    """
    job, shared, own = Job(*job), Shared(*shared), Own(*own)
    if rank == 0 and ranks > 1:
        count_up(job.jobs)
    while rank == 0 or next_job(job.jobs, seen, own.state):
        seen += 1
        R, n_logits, steps, vocab_size, by_draft_model = job.size
        for step in range(max(1, steps)):
            if by_draft_model:
                _decode_narrow(
                    shared.narrow, ends[1], blocks[1], keys, values, job, shared, own, rank, ranks, R, n_logits
                )  # fmt: skip
            else:
                _decode(shared.like, ends[0], blocks[0], keys, values, job, shared, own, rank, ranks, R, n_logits)
            meet(job.counter, ranks)
            if steps:
                for r in range(rank, R, ranks):
                    token = _draw(job.logits[r, :vocab_size], job.uniforms[step, r], job.temperature[0])
                    job.drawn[step, r] = token
                    job.rows[0, r] = max(0, token)
                    job.rows[2, r] += 1
                meet(job.counter, ranks)
        if rank == 0:
            return


@kernel
def claim_kernel(states):
    return claim(states)
