"""One token after the other, at the speed of memory: GPT.forward(idx, cache=...) in one kernel, which must equal it.

Its rows are tokens.  Each may belong to any stream (one of the texts that are written side by side) and stand at any
position whose predecessors are in the cache or among the rows of the same call: reading a prompt is many rows of one
stream, writing eight texts is one row of each.

What takes the time is to fetch the weights from memory: see decode_kernel.py.  Rounded weights are fewer bytes: see
matrices.py.  A prompt of many tokens takes another way: see prompt.py.  A large model has a draft model beside it:
itself in int8.  That one guesses tokens (draft.py), and tells how little of lm_head need be read to find the likeliest
one (`_times_of_few` in decode_kernel.py).
"""

import os

import numpy as np

from npgpt.generate import decode_kernel as kernel
from npgpt.generate.matrices import Matrix, kind_of, rounded_weights, weights_of
from npgpt.generate.prompt import read_prompts
from npgpt.kernels.buffers import empty, zeros
from npgpt.kernels.crew import Crew
from npgpt.kernels.matmul import let_threads_spin
from npgpt.kernels.spin import SLEEPS
from npgpt.machine import cores, processors

CHUNK = 32  # tokens of the longest prompt that the kernel reads, in one call
MOST_THREADS = 16  # more would wait for each other, and for the memory
ONE_CORE = 4e5  # bytes of weights, each read for four rows, with which one core is done before another has woken up
LARGE = 2**26  # bytes of weights, from which on a draft model saves time
FEW = 32  # tokens for which it is not worth its making
AHEAD = 16  # steps of which the kernel draws the tokens in one call, at most
FREE = -(2**62)  # the counter of threads that must not wait any more


def _records(weights):
    """ENDS and (L,) BLOCK of Weights, and how many bytes of these are read for each token."""
    arrays = []

    def matrix(w):
        arrays.extend(array for array in w if array is not None)
        return *(0 if array is None else array.ctypes.data for array in w), *w.numbers.shape

    def norm(layer):
        arrays.extend((layer.weight, layer.bias))
        return layer.weight.ctypes.data, layer.bias.ctypes.data, layer.eps

    ln_f, head = norm(weights.ln_f), matrix(weights.lm_head)
    blocks = [
        (
            norm(layer.ln_1), matrix(layer.c_attn), layer.scale, matrix(layer.attn_proj),
            norm(layer.ln_2), matrix(layer.c_fc), kernel.GELU, matrix(layer.mlp_proj),
        )
        for layer in weights.layers
    ]  # fmt: skip
    nbytes = sum(array.nbytes for array in arrays)
    wte, wpe = matrix(weights.wte), matrix(Matrix(weights.wpe, None, None))
    return np.array((wte, wpe, ln_f, head, (0,) * len(wte)), kernel.ENDS), np.array(blocks, kernel.BLOCK), nbytes


class Decoder:
    """The keys and values of some texts, and the logits of what may follow them.

    model      a GPT, whose weights are read where they are, if they are contiguous; dropout does not act
    n_streams  texts side by side
    length     the most positions of a text that will be needed, at most the model's block_size
    int8       whether the matrices are rounded to 8 bits, in a copy; biases, layer norms and wpe stay as they are
    dtype      "bfloat16" if they are rounded to that
    threads    how many share the work where there is enough of it; by default one for each core.  They spin while they
               wait for each other, so there is at most one for each processor, and 16 in all
    is_gpt     whether the caller knows that the model has no difference()

    The logits of a row are the same bits whatever is computed beside it, and with any number of threads.  Only one
    thread at a time may call it.  Raises ValueError for a model that is not GPT(config): see GPT.difference().
    """

    def __init__(self, model, n_streams=1, length=None, int8=False, threads=None, dtype=None, is_gpt=False):
        # of another model the kernel would read beyond an array, or leave something out
        if not is_gpt and (other := model.difference()):
            raise ValueError(f"Decoder: the model is not GPT(config): {other}")
        self.threads = max(1, min(threads or cores(), processors(), MOST_THREADS))
        if self.threads > 1:
            let_threads_spin()  # before any kernel is loaded, those that round the weights among them
        config = model.config
        L, H, C, V = config.n_layer, config.n_head, config.n_embd, config.vocab_size
        self.length = min(config.block_size, length or config.block_size)
        kind, dtype = kind_of(int8, dtype, model.lm_head.weight.dtype), model.lm_head.weight.dtype
        self.keys, self.values = zeros((2, L, n_streams, H, self.length, C // H), dtype)
        plain = weights_of(model)
        self._model, self._weights = model, rounded_weights(model, kind, plain)  # (the kernel has but their addresses)
        ends, blocks = np.zeros(2, kernel.ENDS), np.zeros((2, L), kernel.BLOCK)
        ends[0], blocks[0], self.nbytes = _records(self._weights)
        self._may_draft = kind != "int8" and self.nbytes >= LARGE
        self._plain = plain if self._may_draft else None
        self._draft_model, self.draft_share = None, 0.0  # Weights in int8; of the bytes for a token, how many they are
        self.limits = np.array([[V], [n_streams], [self.length]], np.uint64)
        self.rows = n = max(CHUNK, n_streams)
        self._counter, self._jobs = np.zeros((2, 8), np.int64)  # (each has a line of memory for itself)
        self._states = np.empty((self.threads, 8), np.int64)
        self._job = kernel.Job(
            np.zeros(5, np.int64), np.empty((3, n), np.int64), np.empty((n, V), dtype), np.zeros(1),
            np.zeros((AHEAD, n)), np.zeros((AHEAD, n), np.int64), self._counter, self._jobs,
        )  # fmt: skip
        sizes = (n, C), (n, 3 * C), (n, C), (n * blocks["c_fc"]["n_out"].max(),)
        like = np.zeros(1, self._weights.lm_head.numbers.dtype)
        narrow = np.zeros(1, np.int8 if self._may_draft else np.float32)
        shared = *(empty(size, dtype) for size in sizes), like, narrow, np.empty((self.threads, n), dtype)  # a Shared
        self._args = ends, blocks, self.keys, self.values, tuple(self._job), shared
        self._own = [
            (empty((n, C), dtype), empty((2, n), dtype), empty((1, self.length), dtype), state)  # an Own
            for state in self._states
        ]
        self._start_over()

    def __call__(self, tokens, streams, positions, n_logits, by_draft_model=False):
        """Put rows into the cache, and return the logits (n_logits, V) of the last ones, until the next call.

        tokens, streams, positions    (R,) integers, at most `rows` of them; what stands before a row in its stream must
                                      be in the cache, or among the rows
        by_draft_model                whether the draft model does it.  Both have one cache: the model must overwrite
                                      what is put there before anything else looks at it
        """
        self._place(tokens, streams, positions, n_logits, by_draft_model)
        self._run_job(len(tokens), n_logits, 0, 0, by_draft_model)
        return self._job.logits[:n_logits]

    def has_draft_model(self, n):
        """Whether there is a draft model; it is made, if the model is large, and is to write many tokens: n.

        From then on the weights must stay as they are, as long as this Decoder is used.
        """
        if self._draft_model is None and self._may_draft and n > FEW:
            try:
                weights, (ends, blocks, *_) = rounded_weights(self._model, "int8", self._plain), self._args
                ends[1], blocks[1], nbytes = _records(weights)
                self._draft_model, self.draft_share = weights, nbytes / self.nbytes  # once the kernel knows where it is
                if self._weights is self._plain:  # else it is not lm_head that int8 rounds
                    ends[0]["shortlist"] = ends[1]["lm_head"]
            except MemoryError:  # it can be done without
                self._may_draft = False
        return self._draft_model is not None

    def draw(self, tokens, streams, positions, uniforms, temperature, vocab_size, by_draft_model=False):
        """Put rows into the cache, draw the token after each, put that into the cache, and so on -> (steps, R) tokens.

        tokens, streams, positions    (R,) integers: a row of each of some streams
        uniforms                      (steps, R) numbers in [0, 1), for at most AHEAD steps
        temperature, vocab_size       of Controls; only tokens below vocab_size are drawn
        by_draft_model                as for a call

        The last ones are not in the cache yet.  A token of -1 stands for logits that are not finite.
        """
        R, steps, V = len(tokens), len(uniforms), int(self.limits[0, 0])
        rows = self._place(tokens, streams, positions, R, by_draft_model)
        if steps > AHEAD or (rows[2] + steps > self.length).any():
            raise ValueError(f"Decoder: {steps} steps are too many from positions {rows[2].tolist()} on")
        if not 0 < vocab_size <= V:
            raise ValueError(f"Decoder: of {V} tokens none can be drawn below {vocab_size}")
        job = self._job
        job.temperature[0], job.uniforms[:steps, :R] = temperature, uniforms
        self._run_job(R, R, steps, vocab_size, by_draft_model)
        return job.drawn[:steps, :R]

    def _place(self, tokens, streams, positions, n_logits, by_draft_model):
        """The rows (3, R) where the kernel finds them, which are checked."""
        if by_draft_model and self._draft_model is None:
            raise ValueError("Decoder: there is no draft model")
        if self._disturbed:
            self._calm()
        R = len(tokens)
        rows = self._job.rows[:, : min(R, self.rows)]
        if R > self.rows or not 0 <= n_logits <= R:
            words = f"expected at most {self.rows} rows, and logits of no more than these"
            raise ValueError(f"Decoder: {words}; got {R} rows and {n_logits} logits")
        rows[0], rows[1], rows[2] = tokens, streams, positions
        self._check(rows)
        return rows

    def _check(self, rows):
        """Raise ValueError unless tokens, streams, positions (3, R) are in this model and cache."""
        if (np.asarray(rows, np.int64).view(np.uint64) >= self.limits).any():  # (so those below 0 are huge)
            below = self.limits[:, 0].tolist()
            raise ValueError(f"Decoder: tokens, streams, positions must be from 0 to below {below}; got others")

    def _run_job(self, R, *others):
        self._job.size[:] = R, *others
        if self._threads_for(R) > 1:
            self._run_together()
        else:
            self._run(0, 1, 0)

    def _threads_for(self, R):
        return self.threads if self.nbytes * (R + 3) // 4 > ONE_CORE else 1

    def _run(self, rank, ranks, seen):
        kernel.decode_kernel(*self._args, self._own[rank], rank, ranks, seen)

    def _help(self, rank, seen):
        try:
            self._run(rank, self.threads, seen)
        except BaseException:
            self._counter[0] = FREE  # nobody must wait for this thread
            raise

    def _run_together(self):
        if self._process != os.getpid():  # a fork has no threads but the one that made it
            self._start_over()
        self._disturbed = True  # until all is done
        try:
            seen, asleep = int(self._jobs[0]), kernel.claim_kernel(self._states[1:])
            sleepers = [rank for rank in range(1, self.threads) if asleep >> (rank - 1) & 1]
            others = [self._crew.submit(self._help, rank, seen) for rank in sleepers]
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
        self._job.size[:] = 0  # should one of them take what follows for a job, there is nothing to do in it
        self._counter[0] = FREE
        self._jobs[0] += 1
        self._crew.call_off()
        self._all_sleep()

    def _start_over(self):
        self._process, self._crew = os.getpid(), Crew(self.threads - 1, "npgpt-decoder")
        self._all_sleep()

    def _all_sleep(self):
        """All other threads sleep, or there are none yet: no interrupt has left one at work, which _disturbed says."""
        self._counter[0], self._states[:], self._disturbed = 0, SLEEPS, False

    def read(self, tokens, stream=0, position=0):
        """Put n tokens into a stream from a position on -> the logits (V,) after the last."""
        return self.read_all([tokens], [stream], [position])[0]

    def read_all(self, prompts, streams, positions=None):
        """Put n tokens into each of some streams, from its position on -> the logits (P, V) after the last of each.

        How a prompt is read depends on its own length only, and so do the bits: long ones are read together.
        """
        logits = np.empty((len(prompts), self._job.logits.shape[1]), self._job.logits.dtype)
        long = {}
        places = positions or [0] * len(prompts)
        for i, (tokens, stream, position) in enumerate(zip(prompts, streams, places, strict=True)):
            rows = tokens, [stream] * len(tokens), range(position, position + len(tokens))
            if len(tokens) > CHUNK:
                self._check(rows)
                long[i] = tokens, stream, position
            else:
                logits[i] = self(*rows, 1)[0]
        if long:
            threads = self._threads_for(sum(len(tokens) for tokens, _, _ in long.values()))
            logits[list(long)] = read_prompts(self._weights, self.keys, self.values, list(long.values()), threads)
        return logits

    def copy(self, stream, length):
        """Give all streams the first `length` positions of this one."""
        for cache in (self.keys, self.values):
            cache[:, :, :, :length] = cache[:, stream : stream + 1, :, :length]
