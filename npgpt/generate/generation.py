"""Texts that grow from a prompt, a token at a time: where the context begins, and what the cache already has of it."""

import math

import numpy as np

from npgpt.config import Controls
from npgpt.engine import no_dropout, no_grad
from npgpt.errors import CheckpointError
from npgpt.generate.decode import AHEAD, Decoder
from npgpt.generate.matrices import kind_of, rounded
from npgpt.generate.sampling import NOT_FINITE, choose, probabilities
from npgpt.kernels.jit import KERNELS

AT_ONCE = 1e8  # bytes of weights, about, that are read before a text is shown again, when tokens are drawn ahead


def context_start(n, start, block_size):
    """Where the context of token number n begins, if that of the one before began at `start`.

    Positions are absolute: a window that slid along by one token would change the position, and so the keys and values,
    of every token in it.  So it stays where it is until it is full; then its last half is kept, and computed anew.
    """
    return start if n - start <= block_size else n - max(1, block_size // 2)


def _checked_prompt(idx, vocab_size):
    """A prompt as a list of tokens.  Raises ValueError for what is none."""
    tokens = np.asarray(idx)
    if tokens.ndim != 1 or not tokens.size:
        raise ValueError(f"generate: the prompt must be a list, and have one token at least; got shape {tokens.shape}")
    if tokens.dtype.kind not in "iu":
        raise ValueError(f"generate: the prompt must be integers, got dtype {tokens.dtype}")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(f"generate: tokens must be from 0 to {vocab_size - 1}, got {tokens.min()} to {tokens.max()}")
    return tokens.tolist()


class Generation:
    """Texts that grow from one prompt, side by side, a token or a block of them at a time.

    model      a GPT
    idx        the prompt: a list of tokens, at least one; its last block_size tokens are the first context
    rngs       a numpy Generator for each text; one number of it is used for each token, and some may be taken ahead
    controls   Controls
    length     the most tokens that a text will have, prompt and all, if that is known
    logprobs   whether the tokens' log-probabilities are asked for
    cache      False: the whole context goes through the model for every token, as in training, with the same result.
               So it is, too, if the model is not GPT(config) any more, which is all that the cache's kernel knows
    tokenizer  only its tokens are chosen; None: all that the model knows
    int8, threads, dtype    of the Decoder
    """

    def __init__(
        self, model, idx, rngs, controls=None, length=None, logprobs=False, cache=True, tokenizer=None, int8=False,
        threads=None, dtype=None,
    ):  # fmt: skip
        idx = _checked_prompt(idx, model.config.vocab_size)
        self.model, self.controls, self.rngs = model, controls or Controls(), rngs
        self.logprobs, self.length = logprobs, length or math.inf
        self.block_size = model.config.block_size
        known, V = tokenizer, model.config.vocab_size
        self.vocab_size = V if known is None else min(known.vocab_size, V)  # a model may know more tokens
        self.holes = [] if known is None else [hole for hole in known.holes if hole < self.vocab_size]
        self.texts = [list(idx) for _ in rngs]
        self.alive = list(range(len(rngs)))  # the texts that still grow
        self.start = max(0, len(idx) - self.block_size)
        self.cached = 0  # positions of each text in the cache
        other, kind = model.difference(), kind_of(int8, dtype, model.lm_head.weight.dtype)
        if kind and other:
            raise ValueError(f"{kind} is for a GPT as its config says; {other}")
        cached, self.decoder = cache and other is None, None
        if cached and KERNELS == "numba":
            self.decoder = Decoder(model, len(rngs), length, int8, threads, dtype)
        elif kind:
            self.model = rounded(model, kind)
        self.caches = [{"cache": []} if cached else {} for _ in rngs]  # of each text, if its model writes with one

    def _contexts(self):
        """What the cache does not have yet of each text's context.  To be asked once in a step."""
        n = len(self.texts[self.alive[0]])
        start = context_start(n, self.start, self.block_size)
        if start != self.start:
            self.start, self.cached = start, 0
            self.caches = [{key: [] for key in cache} for cache in self.caches]
        return [self.texts[i][start + self.cached :] for i in self.alive]

    def _logits(self, contexts):
        """(texts alive, V): the model's scores of the next tokens."""
        alive, position, n = self.alive, self.cached, len(contexts[0])
        if self.decoder is None:
            caches = [{name: [list(past) for past in cache] for name, cache in self.caches[i].items()} for i in alive]
            with no_grad(), no_dropout():
                pairs = zip(contexts, caches, strict=True)
                logits = np.stack([self.model(np.array([x]), **cache)[0].data[0, -1] for x, cache in pairs])
            for i, cache in zip(alive, caches, strict=True):  # an interrupt before it leaves all as it was
                self.caches[i] = cache
            self.cached += n if caches[0] else 0
            return logits
        if n == 1:  # what was chosen last
            tokens = [context[0] for context in contexts]
            logits = self.decoder(tokens, alive, [position] * len(alive), len(alive))
        elif all(context == contexts[0] for context in contexts):  # the prompt
            last = self.decoder.read(contexts[0], alive[0], position)
            self.decoder.copy(alive[0], position + n)
            logits = np.tile(last, (len(alive), 1))
        else:
            logits = self.decoder.read_all(contexts, alive, position)
        self.cached += n  # not before it is true
        return logits

    def _steps_ahead(self, contexts):
        """How many tokens of each text the decoder can draw by itself; 0 if it cannot."""
        c = self.controls
        only_temperature = c.top_k is c.top_p is None and not c.min_p and c.repetition_penalty == 1
        if not only_temperature or self.logprobs or self.holes or self.decoder is None or len(contexts[0]) > 1:
            return 0
        n = len(self.texts[self.alive[0]])
        room = min(self.start + self.block_size + 1, self.length) - n
        return max(1, min(room, AHEAD, int(AT_ONCE / self.decoder.nbytes)))

    def _draw_ahead(self, contexts, steps):
        """Have the decoder draw tokens of each text -> their blocks."""
        uniforms = np.array([self.rngs[i].random(steps) for i in self.alive]).T  # (steps, texts alive)
        rows = [context[0] for context in contexts], self.alive, [self.cached] * len(self.alive)
        drawn = self.decoder.draw(*rows, uniforms, self.controls.temperature, self.vocab_size)
        if (drawn < 0).any():
            raise CheckpointError(NOT_FINITE)
        self.cached += steps
        return [[(token, None) for token in tokens] for tokens in drawn.T.tolist()]

    def _choose(self, contexts):
        """Draw one token of each text, with all controls -> their blocks."""
        logits, logprobs = self._logits(contexts), [None] * len(contexts)
        possible = logits[:, : self.vocab_size]
        if self.holes:
            possible = possible.copy()
            possible[:, self.holes] = -np.inf
        p = probabilities(possible, [self.texts[i] for i in self.alive], self.controls)
        tokens = choose(p, [self.rngs[i].random() for i in self.alive])
        if self.logprobs:  # with the tokens that are never chosen: the model gives them a share all the same
            z = logits - logits.max(axis=1, keepdims=True)
            logprobs = (z[np.arange(len(z)), tokens] - np.log(np.exp(z, dtype=np.float64).sum(axis=1))).tolist()
        return [[pair] for pair in zip(tokens, logprobs, strict=True)]

    @np.errstate(all="ignore")  # the caller's own choice is not for what is meant to happen here
    def step(self):
        """The next tokens of each text that still grows: a block for each, all of one length and within `length`.

        A block is a list of (token, log-probability or None).  The latter is the model's own, in nats, before any
        control.
        """
        contexts = self._contexts()
        steps = self._steps_ahead(contexts)
        blocks = self._draw_ahead(contexts, steps) if steps else self._choose(contexts)
        for i, block in zip(self.alive, blocks, strict=True):
            self.texts[i] += [token for token, _ in block]
        return blocks

    def end(self, i):
        """Text number i is complete."""
        self.alive.remove(i)


def first_token(tokenizer):
    """What a text without a prompt begins with: a line break, or token 0 where the tokenizer has none."""
    return int(tokenizer.encode("\n")[0]) if "\n" in getattr(tokenizer, "chars", "\n") else 0


def unprompted(model, tokenizer, rng, length):
    """The Generation of one text that begins with first_token."""
    return Generation(model, [first_token(tokenizer)], [rng], Controls(temperature=0.8), length, tokenizer=tokenizer)
