"""One token after the other, at the speed of memory: GPT.forward(idx, cache=...) in one kernel, which must equal it.

Its rows are tokens.  Each may belong to any stream (one of the texts that are written side by side) and stand at any
position whose predecessors are in the cache or among the rows of the same call: reading a prompt is many rows of one
stream, writing eight texts is one row of each.

What takes the time is to fetch the weights from memory: see decode_kernel.py.  With int8 weights there is a quarter as
much to fetch:

    w[n, k] ~ scale[n] q[n, k]        scale[n] = max_k |w[n, k]| / 127,   q[n, k] = round(w[n, k] / scale[n])

Dettmers et al. 2022 (LLM.int8(), section 2.1) call this row-wise quantisation.
"""

import os

import numpy as np

from npgpt.generate.decode_kernel import BLOCK, MATRICES, claim_kernel, decode_kernel
from npgpt.kernels.crew import Crew
from npgpt.kernels.spin import SLEEPS
from npgpt.machine import cores, processors
from npgpt.model import GPT
from npgpt.ops.layernorm import EPS
from npgpt.ops.mlp import A, K

CHUNK = 32  # rows of a call when a prompt is read
MOST_THREADS = 16  # more would wait for each other, and for the memory
ONE_CORE = 4e5  # bytes of weights, each read for four rows, with which one core is done before another has woken up

AHEAD = 16  # steps of which the kernel draws the tokens in one call, at most

FREE = -(2**62)  # the counter of threads that must not wait any more


def quantize(w):
    """w (N, K) -> q (N, K) int8 and scale (N,), with w ~ scale[:, None] q."""
    scale = np.maximum(w.max(axis=1), -w.min(axis=1)) / w.dtype.type(127)
    scale[scale == 0] = 1  # a row of zeros
    return np.rint(w / scale[:, None]).astype(np.int8), scale


def _addresses(rows):
    """Where arrays lie in memory: a list of lists of them -> int64, 0 for None."""
    return np.array([[0 if array is None else array.ctypes.data for array in row] for row in rows], np.int64)


def rounded(model):
    """A GPT with the numbers that the matrices of another one have as int8."""
    copy = GPT(model.config, seed=None, dtype=model.lm_head.weight.dtype)
    for (name, parameter), ours in zip(model.named_parameters(), copy.parameters(), strict=True):
        ours.data[...] = parameter.data
        if ours.ndim == 2 and "wpe" not in name:
            q, scale = quantize(parameter.data)
            ours.data[...] = scale[:, None] * q
    return copy.eval()


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
        self.length = min(config.block_size, length or config.block_size)
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
        self._place(tokens, streams, positions, n_logits)
        self._size[:] = len(tokens), n_logits, 0, 0
        self._run_job(len(tokens))
        return self._logits[:n_logits]

    def draw(self, tokens, streams, positions, uniforms, temperature, vocab_size):
        """Put rows into the cache, draw the token after each, put that into the cache, and so on -> (steps, R) tokens.

        tokens, streams, positions    (R,) integers: a row of each of some streams
        uniforms                      (steps, R) numbers in [0, 1), for at most AHEAD steps
        temperature, vocab_size       of Controls; only tokens below vocab_size are drawn

        The last ones are not in the cache yet.  A token of -1 stands for logits that are not finite.
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
