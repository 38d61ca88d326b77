"""One token after the other: the forward pass of a GPT for the newest tokens only, at the speed of memory.

A token's keys and values depend on the tokens up to it alone, so they are computed once and kept (the KV cache): the
next token needs one row of every matrix product instead of T rows.

    for each block l and each row, which is one token at one position of one stream:
        q, k, v = c_attn(ln_1(x))
        keys[l, stream, :, position], values[l, stream, :, position] = k, v
        x += c_proj(softmax(q keys[l, stream, :, :position+1]^T / sqrt(hs)) values[l, stream, :, :position+1])
        x += mlp(ln_2(x))
    logits = ln_f(x) wte^T

This is the model of npgpt/model.py without what only its gradients need.  A row may belong to any stream (one of the
texts that are written side by side) and stand at any position whose predecessors are in the cache or among the rows of
the same call: reading a prompt is many rows of one stream, writing eight texts is one row of each.

A product of one row with a matrix uses each weight once, for two operations: what takes the time is to fetch it from
memory.  So the kernel takes all blocks in one call, reads each weight where the model has it, once for all rows, and
shares the work with all cores where there is enough to read.  With int8 weights there is a quarter as much of it:

    w[n, k] ~ scale[n] q[n, k]        scale[n] = max_k |w[n, k]| / 127,   q[n, k] = round(w[n, k] / scale[n])

Dettmers et al. 2022 (LLM.int8(), section 2.1) call this row-wise quantisation.

A small model needs less time for a token than Python needs to choose it.  Where no more than the temperature is asked
for, the kernel draws the tokens itself, and goes on with them for some steps.
"""

import math
import os

import numpy as np

from npgpt.kernels.crew import Crew
from npgpt.kernels.jit import KERNELS, helper, kernel
from npgpt.kernels.maths import array_at, exp, largest
from npgpt.kernels.spin import SLEEPS, claim, count_up, meet, next_job
from npgpt.kernels.tiles import dots_unchecked as dots  # (Decoder allocates or checks all that it is given, once)
from npgpt.machine import cores, processors
from npgpt.ops.layernorm import EPS, layernorm_forward_ref
from npgpt.ops.linear import linear_forward_ref
from npgpt.ops.mlp import A, K, gelu_ref

# the parameters of a block in the order in which the kernel is told where they lie
BLOCK = (
    "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias",
    "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
)  # fmt: skip
MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
CHUNK = 32  # rows of a call when a prompt is read
MOST_THREADS = 16  # more would wait for each other, and for the memory
ONE_CORE = 4e5  # bytes of weights, each read for four rows, with which one core is done before another has woken up

AHEAD = 16  # steps of which the kernel draws the tokens in one call, at most

FREE = -(2**62)  # the counter of threads that must not wait any more

# --------------------------------------------------------------------------------------------------------------------
# Reference


def decode_ref(keys, values, tokens, streams, positions, n_logits, parameters, n_head):
    """Put rows into the cache, and return the logits (n_logits, V) of the last ones.

    keys, values                  (L, B, n_head, T, hs): the cache, changed in place
    tokens, streams, positions    (R,) integers; a row's predecessors are in the cache or among the rows
    parameters                    the model's parameters, name -> array
    """
    wte, wpe = parameters["transformer.wte.weight"], parameters["transformer.wpe.weight"]
    zeros = np.zeros(4 * wte.shape[1], wte.dtype)

    def norm(x, name):
        weight = parameters[f"{name}.weight"]
        return layernorm_forward_ref(x, weight, parameters.get(f"{name}.bias", zeros[: len(weight)]), EPS)[0]

    def linear(x, name):
        weight = parameters[f"{name}.weight"]
        return linear_forward_ref(x, weight, parameters.get(f"{name}.bias", zeros[: len(weight)]))

    x = wte[tokens] + wpe[positions]  # (R, C)
    R, C = x.shape
    hs = C // n_head
    for layer in range(len(keys)):
        block = f"transformer.h.{layer}"
        qkv = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")
        q, k, v = qkv.reshape(R, 3, n_head, hs).transpose(1, 0, 2, 3)
        keys[layer, streams, :, positions] = k  # (R, n_head, hs)
        values[layer, streams, :, positions] = v
        y = np.empty_like(q)
        for row, (stream, position) in enumerate(zip(streams, positions, strict=True)):
            past = layer, stream, slice(None), slice(0, position + 1)
            scores = (keys[past] @ q[row][:, :, None])[:, :, 0] / math.sqrt(hs)  # (n_head, position + 1)
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            y[row] = (p[:, None] @ values[past])[:, 0]
        x = x + linear(y.reshape(R, C), f"{block}.attn.c_proj")
        x = x + linear(gelu_ref(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    return norm(x[R - n_logits :], "transformer.ln_f") @ wte.T


# --------------------------------------------------------------------------------------------------------------------
# Kernel


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
    """What decode_ref does, as number `rank` of `ranks` threads that share the rows of all matrices.

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


# --------------------------------------------------------------------------------------------------------------------
# The cache, and what runs on it


def quantize(w):
    """w (N, K) -> q (N, K) int8 and scale (N,), with w ~ scale[:, None] q."""
    scale = np.maximum(w.max(axis=1), -w.min(axis=1)) / w.dtype.type(127)
    scale[scale == 0] = 1  # a row of zeros
    return np.rint(w / scale[:, None]).astype(np.int8), scale


def _addresses(rows):
    """Where arrays lie in memory: a list of lists of them -> int64, 0 for None."""
    return np.array([[0 if array is None else array.ctypes.data for array in row] for row in rows], np.int64)


class Decoder:
    """The keys and values of some texts, and the logits of what may follow them.

    model      a GPT, whose weights are read where they are, if they are contiguous; dropout does not act
    n_streams  texts side by side
    length     the most positions of a text that will be needed, at most the model's block_size
    int8       whether the matrices are rounded to 8 bits, in a copy; biases, layer norms and wpe stay as they are
    threads    how many share the work where there is enough of it; by default one for each core.  They spin while they
               wait for each other, so there is at most one for each processor, and 16 in all

    The logits of a row are the same bits whatever is computed beside it, and with any number of threads.  Only one
    thread at a time may call it.  Raises ValueError for a model that is not GPT(config): see GPT.difference().
    """

    def __init__(self, model, n_streams=1, length=None, int8=False, threads=None):
        if other := model.difference():  # the kernel would read beyond an array, or leave something out
            raise ValueError(f"Decoder: the model is not GPT(config): {other}")
        config = model.config
        L, H, C, V = config.n_layer, config.n_head, config.n_embd, config.vocab_size
        self.n_head, self.length = H, min(config.block_size, length or config.block_size)
        self.parameters = {name: np.ascontiguousarray(p.data) for name, p in model.named_parameters()}
        dtype = self.parameters["transformer.wte.weight"].dtype
        self.keys, self.values = np.zeros((2, L, n_streams, H, self.length, C // H), dtype)
        scales = {}  # of the matrices that are int8: name -> (N,)
        if int8:
            for name, w in self.parameters.items():
                if w.ndim == 2 and "wpe" not in name:
                    self.parameters[name], scales[name] = quantize(w)
        self.nbytes = sum(w.nbytes for name, w in self.parameters.items() if "wpe" not in name)  # read for each call
        self.limits = np.array([[V], [n_streams], [self.length]], np.uint64)
        self.rows = max(CHUNK, n_streams)
        self._rows = np.empty((3, self.rows), np.int64)  # tokens, streams, positions
        self._disturbed = False  # whether an interrupt may have left another thread at work
        if KERNELS == "numpy":
            for name, scale in scales.items():
                self.parameters[name] = self.parameters[name] * scale[:, None]
            return
        self.threads = max(1, min(threads or cores(), processors(), MOST_THREADS))
        blocks = [f"transformer.h.{layer}." for layer in range(L)]
        self._scales = scales  # as the kernel knows only where they lie, they must be kept here
        self._weights = (
            self.parameters["transformer.wte.weight"],
            scales.get("transformer.wte.weight", np.zeros(0, dtype)),
            self.parameters["transformer.wpe.weight"],
            _addresses([[self.parameters.get(block + name) for name in BLOCK] for block in blocks]),
            _addresses([[scales.get(block + name) for name in BLOCK if name in MATRICES] for block in blocks]),
            _addresses([[self.parameters.get(f"transformer.ln_f.{name}") for name in ("weight", "bias")]]),
            np.array([EPS, A, K]),
        )
        n, T = self.rows, self.length
        self._logits = np.empty((n, V), dtype)
        self._size, self._temperature = np.zeros(4, np.int64), np.zeros(1)
        self._uniforms, self._drawn = np.zeros((AHEAD, n)), np.zeros((AHEAD, n), np.int64)
        draws = self._temperature, self._uniforms, self._drawn
        shared = [np.empty((n, width), dtype) for width in (C, 3 * C, C, 4 * C)]
        self._args = self._size, *draws, self._logits, self.keys, self.values, self._rows, *self._weights, *shared
        self._own = [(np.empty((n, C), dtype), np.empty((1, T), dtype)) for _ in range(self.threads)]
        self._counter, self._jobs = np.zeros(8, np.int64), np.zeros(8, np.int64)  # (lines of memory of their own)
        self._states = np.empty((self.threads, 8), np.int64)
        self._start_over()

    def __call__(self, tokens, streams, positions, n_logits):
        """Put rows into the cache, and return the logits (n_logits, V) of the last ones, until the next call.

        tokens, streams, positions    (R,) integers, at most `rows` of them; what stands before a row in its stream must
                                      be in the cache, or among the rows
        """
        rows = self._place(tokens, streams, positions, n_logits)
        if KERNELS == "numpy":
            return decode_ref(self.keys, self.values, *rows, n_logits, self.parameters, self.n_head)
        self._size[:] = len(tokens), n_logits, 0, 0
        self._run_job(len(tokens))
        return self._logits[:n_logits]

    def draw(self, tokens, streams, positions, uniforms, temperature, vocab_size):
        """Put rows into the cache, draw the token after each, put that into the cache, and so on -> (steps, R) tokens.

        tokens, streams, positions    (R,) integers: a row of each of some streams
        uniforms                      (steps, R) numbers in [0, 1), for at most AHEAD steps
        temperature, vocab_size       of Controls; only tokens below vocab_size are drawn

        The last ones are not in the cache yet.  A token of -1 stands for logits that are not finite.  This is for
        kernels only: with NPGPT_KERNELS=numpy, npgpt/generate/sampling.py chooses all tokens.
        """
        R, steps = len(tokens), len(uniforms)
        rows = self._place(tokens, streams, positions, R)
        if steps > AHEAD or (rows[2] + steps > self.length).any():
            raise ValueError(f"Decoder: {steps} steps are too many from positions {rows[2].tolist()} on")
        self._size[:] = R, R, steps, vocab_size
        self._temperature[0], self._uniforms[:steps, :R] = temperature, uniforms
        self._run_job(R)
        return self._drawn[:steps, :R]

    def _place(self, tokens, streams, positions, n_logits):
        """The rows (3, R) where the kernel finds them, which are checked."""
        if self._disturbed:
            self._calm()
        R = len(tokens)
        rows = self._rows[:, : min(R, self.rows)]
        if R <= self.rows:
            rows[0], rows[1], rows[2] = tokens, streams, positions
        # (as unsigned numbers, those below 0 are huge)
        if R > self.rows or not 0 <= n_logits <= R or (rows.view(np.uint64) >= self.limits).any():
            raise ValueError(
                f"Decoder: expected at most {self.rows} rows, logits of no more than these, and tokens, streams, "
                f"positions from 0 to below {self.limits[:, 0].tolist()}; got {R} rows and {n_logits} logits"
            )
        return rows

    def _run_job(self, R):
        if self.threads > 1 and self.nbytes * (R + 3) // 4 > ONE_CORE:
            self._run_together()
        else:
            self._run(0, 1, 0)

    def _run(self, rank, ranks, seen):
        h, p = self._own[rank]
        decode_kernel(*self._args, h, p, rank, ranks, self._counter, self._jobs, seen, self._states[rank])

    def _help(self, rank, seen):
        try:
            self._run(rank, self.threads, seen)
        except BaseException:
            self._counter[0] = FREE  # nobody must wait for this thread
            raise

    def _run_together(self):
        if self._process != os.getpid():  # a fork has no threads but the one that made it
            self._start_over()
        self._disturbed, others = True, []  # until all is done
        try:
            seen, asleep = int(self._jobs[0]), claim_kernel(self._states[1:])
            for rank in range(1, self.threads):
                if asleep >> (rank - 1) & 1:
                    others.append(self._crew.submit(self._help, rank, seen))
            self._run(0, self.threads, seen)
            if self._counter[0] < 0:
                for other in others:
                    other.result()
            self._disturbed = False
        except BaseException:  # Ctrl-C, say, before the kernel was reached or when it had done its work
            self._calm()
            raise

    def _calm(self):
        """Have all other threads sleep, whatever they wait for.  If an interrupt ends this, the next call does it."""
        if self._process != os.getpid():
            return self._start_over()
        self._size[:] = 0  # should one of them take what follows for a job, there is nothing to do in it
        self._counter[0] = FREE
        self._jobs[0] += 1
        self._crew.call_off()
        self._all_sleep()

    def _start_over(self):
        self._process, self._crew = os.getpid(), Crew(self.threads - 1, "npgpt-decoder")
        self._all_sleep()

    def _all_sleep(self):
        """All other threads sleep, or there are none yet."""
        self._counter[0], self._states[:], self._disturbed = 0, SLEEPS, False

    def read(self, tokens, stream=0, position=0):
        """Put n tokens into a stream from a position on -> the logits (V,) after the last, until the next call."""
        for start in range(0, len(tokens), self.rows):
            part = tokens[start : start + self.rows]
            n = len(part)
            at = np.arange(position + start, position + start + n)
            logits = self(part, np.full(n, stream), at, int(start + n == len(tokens)))
        return logits[0]

    def copy(self, stream, length):
        """Give all streams the first `length` positions of this one."""
        for cache in (self.keys, self.values):
            cache[:, :, :, :length] = cache[:, stream : stream + 1, :, :length]
