"""From logits to text: which token comes next, where the context begins, and when a text ends.

The controls act on the logits z (V,) one after the other, in the order of Hugging Face's transformers:

    repetition penalty    z_i -> z_i / r if z_i > 0 else z_i r, for each token i of the text so far (Keskar et al. 2019)
    temperature           z -> z / t;  0 takes the likeliest token
    top-k                 only the k likeliest tokens stay (Fan et al. 2018), and those as likely as the last of them
    top-p                 only the smallest set of likeliest tokens that has p of the probability (Holtzman et al. 2020)
    min-p                 only tokens of at least min_p times the likeliest one's probability (Nguyen et al. 2024)

and the token is drawn from the softmax of what is left.
"""

import codecs
import itertools
import math
from dataclasses import dataclass

import numpy as np

from npgpt.config import Controls
from npgpt.engine import no_dropout, no_grad
from npgpt.errors import CheckpointError
from npgpt.generate.decode import AHEAD, Decoder
from npgpt.kernels.jit import KERNELS

SIDE_BY_SIDE = 8  # texts that grow together; more would take more memory, and be little faster
AT_ONCE = 1e8  # bytes of weights, about, that are read before a text is shown again, when tokens are drawn ahead
NOT_FINITE = "the model's logits are not finite: its weights, or those of a control, are out of range"


def probabilities(logits, texts, controls):
    """What the next tokens are drawn from, (B, V) float64: logits (B, V), the tokens of each text so far, Controls."""
    z = logits.astype(np.float64)
    if controls.repetition_penalty != 1:
        for row, text in zip(z, texts, strict=True):
            seen = np.unique(np.asarray(text, np.int64))
            seen = seen[seen < len(row)]
            r = controls.repetition_penalty
            row[seen] = np.where(row[seen] > 0, row[seen] / r, row[seen] * r)
    best = z.max(axis=1, keepdims=True)
    if not np.isfinite(best).all():
        raise CheckpointError(NOT_FINITE)
    z -= best
    if controls.temperature == 0:
        p = np.zeros_like(z)
        p[np.arange(len(z)), z.argmax(axis=1)] = 1
        return p
    with np.errstate(over="ignore"):
        z /= controls.temperature
    if controls.top_k is not None and controls.top_k < z.shape[1]:
        z[z < np.partition(z, -controls.top_k, axis=1)[:, -controls.top_k, None]] = -np.inf
    p = np.exp(z)
    p /= p.sum(axis=1, keepdims=True)
    if controls.top_p is None and not controls.min_p:
        return p
    if controls.top_p is not None and controls.top_p < 1:
        falling = -np.sort(-p, axis=1)
        n = (np.cumsum(falling, axis=1) < controls.top_p).sum(axis=1)  # that do not have it yet; the next one does
        p[p < falling[np.arange(len(p)), np.minimum(n, p.shape[1] - 1), None]] = 0
    if controls.min_p:
        p[p < controls.min_p * p.max(axis=1, keepdims=True)] = 0
    return p / p.sum(axis=1, keepdims=True)


def choose(p, uniforms):
    """The tokens (a list of B) that uniform numbers in [0, 1), a list of B, pick from probabilities p (B, V)."""
    tokens = []
    for cumulative, uniform in zip(p.cumsum(axis=1), uniforms, strict=True):
        total = float(cumulative[-1])
        point = min(uniform * total, math.nextafter(total, 0))  # the product may be rounded up to the total itself
        tokens.append(int(cumulative.searchsorted(point, side="right")))
    return tokens


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
    """Texts that grow from one prompt, side by side, a token at a time.

    model      a GPT
    idx        the prompt: a list of tokens, at least one; its last block_size tokens are the first context
    rngs       a numpy Generator for each text; one number of it is used for each token, and some may be taken ahead
    controls   Controls
    length     the most tokens that a text will have, prompt and all, if that is known
    logprobs   whether the tokens' log-probabilities are asked for
    cache      False: the whole context goes through the model for every token, as in training, with the same result.
               So it is, too, if the model is not GPT(config) any more, which is all that the cache's kernel knows
    tokenizer  only its tokens are chosen; None: all that the model knows
    int8, threads    of the Decoder
    """

    def __init__(
        self, model, idx, rngs, controls=None, length=None, logprobs=False, cache=True, tokenizer=None, int8=False,
        threads=None,
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
        self.drawn = [[] for _ in rngs]  # tokens of each text that the decoder has drawn ahead
        other = model.difference()
        if int8 and other:
            raise ValueError(f"int8 is for a GPT as its config says; {other}")
        self.decoder = Decoder(model, len(rngs), length, int8, threads) if cache and other is None else None

    def _contexts(self):
        """What the cache does not have yet of each text's context.  To be asked once for each token."""
        n = len(self.texts[self.alive[0]])
        start = context_start(n, self.start, self.block_size)
        if start != self.start:
            self.start, self.cached = start, 0
        return [self.texts[i][start + self.cached :] for i in self.alive]

    def _logits(self, contexts):
        """(texts alive, V): the model's scores of the next tokens."""
        if self.decoder is None:
            return self._forward()
        alive, position, n = self.alive, self.cached, len(contexts[0])
        if n == 1:  # what was chosen last
            tokens = [context[0] for context in contexts]
            logits = self.decoder(tokens, alive, [position] * len(alive), len(alive))
        elif all(context == contexts[0] for context in contexts):  # the prompt
            last = self.decoder.read(contexts[0], alive[0], position)
            self.decoder.copy(alive[0], position + n)
            logits = np.tile(last, (len(alive), 1))
        else:
            pairs = zip(alive, contexts, strict=True)
            logits = np.stack([self.decoder.read(context, i, position).copy() for i, context in pairs])
        self.cached += n  # not before it is true
        return logits

    def _forward(self):
        with no_grad(), no_dropout():
            logits, _ = self.model(np.array([self.texts[i][self.start :] for i in self.alive]))
        return logits.data[:, -1]

    def _steps_ahead(self, contexts):
        """How many tokens of each text the decoder can draw by itself; 0 if it cannot."""
        c = self.controls
        only_temperature = c.top_k is c.top_p is None and not c.min_p and c.repetition_penalty == 1
        if not only_temperature or self.logprobs or self.holes or self.decoder is None or KERNELS == "numpy":
            return 0
        if len(contexts[0]) > 1:
            return 0
        n = len(self.texts[self.alive[0]])
        room = min(self.start + self.block_size + 1, self.length) - n
        return max(1, min(room, AHEAD, int(AT_ONCE / self.decoder.nbytes)))

    def _draw_ahead(self, contexts, steps):
        alive = self.alive
        uniforms = np.array([self.rngs[i].random(steps) for i in alive]).T  # (steps, texts alive)
        tokens = [context[0] for context in contexts]
        drawn = self.decoder.draw(
            tokens, alive, [self.cached] * len(alive), uniforms, self.controls.temperature, self.vocab_size
        )
        if (drawn < 0).any():
            raise CheckpointError(NOT_FINITE)
        for i, tokens in zip(alive, drawn.T.tolist(), strict=True):
            self.drawn[i] = tokens
        self.cached += steps

    @np.errstate(all="ignore")  # the caller's own choice is not for what is meant to happen here
    def step(self):
        """The next token of each text that still grows, and their log-probabilities or None: two lists.

        A log-probability is the model's own, in nats, before any control.
        """
        alive, logprobs = self.alive, None
        if not self.drawn[alive[0]]:
            contexts = self._contexts()
            steps = self._steps_ahead(contexts)
            if steps:
                self._draw_ahead(contexts, steps)
            else:
                logprobs = self._choose(contexts)
        tokens = [self.drawn[i].pop(0) for i in alive]
        for i, token in zip(alive, tokens, strict=True):
            self.texts[i].append(token)
        return tokens, logprobs or [None] * len(tokens)

    def _choose(self, contexts):
        """Draw one token of each text, with all controls -> the log-probabilities, or None."""
        logits = self._logits(contexts)
        possible = logits[:, : self.vocab_size]
        if self.holes:
            possible = possible.copy()
            possible[:, self.holes] = -np.inf
        p = probabilities(possible, [self.texts[i] for i in self.alive], self.controls)
        tokens = choose(p, [self.rngs[i].random() for i in self.alive])
        for i, token in zip(self.alive, tokens, strict=True):
            self.drawn[i] = [token]
        if not self.logprobs:
            return None
        # with the tokens that are never chosen: the model gives them a share all the same
        z = logits - logits.max(axis=1, keepdims=True)
        found = z[np.arange(len(z)), tokens] - np.log(np.exp(z, dtype=np.float64).sum(axis=1))
        return found.tolist()

    def end(self, i):
        """Text number i is complete."""
        self.alive.remove(i)


def first_token(tokenizer):
    """What a text without a prompt begins with: a line break, or token 0 where the tokenizer has none."""
    return int(tokenizer.encode("\n")[0]) if "\n" in getattr(tokenizer, "chars", "\n") else 0


def unprompted(model, tokenizer, rng, length):
    """The Generation of one text that begins with first_token."""
    return Generation(model, [first_token(tokenizer)], [rng], Controls(temperature=0.8), length, tokenizer=tokenizer)


class Writer:
    """Tokens as they come -> text as it may be shown: whole characters, and nothing of a string at which it ends.

    tokenizer  gives the bytes of a token
    stops      the text ends before the first of these strings that is complete; `stopped` tells whether it has
    before     tokens of the text that is gone on with, which may end within a character
    """

    def __init__(self, tokenizer, stops=(), before=()):
        self.tokenizer, self.stops = tokenizer, stops
        self.text, self.stopped = "", False  # what was shown
        self._held = ""  # what may be the beginning of a stop string
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoder.decode(b"".join(map(tokenizer.bytes_of, before)))

    def feed(self, token):
        """The text that can be shown now that this token has come; it may be empty."""
        return self._show(self._decoder.decode(self.tokenizer.bytes_of(token)), last=False)

    def end(self):
        """The text that was held back, when no token will come any more."""
        return self._show(self._decoder.decode(b"", final=True), last=True)

    def _show(self, piece, last):
        if self.stopped:
            return ""
        text = self._held + piece
        # the first one to be complete; of those that end in the same place, the longest
        found = min(((at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            self.stopped, n = True, found[1]
        elif last:
            n = len(text)
        else:
            longest = max(map(len, self.stops), default=1) - 1
            n = next(n for n in range(max(0, len(text) - longest), len(text) + 1) if self._may_stop(text[n:]))
        self._held = text[n:]
        self.text += text[:n]
        return text[:n]

    def _may_stop(self, text):
        return text == "" or any(stop.startswith(text) for stop in self.stops)


@dataclass(frozen=True)
class Piece:
    """What one more token has brought, or the end of a text."""

    text: str  # what can be shown now
    token: int | None  # None at the end
    logprob: float | None  # the model's own, in nats, if asked for
    finish: str | None  # at the end only: "length", or "stop" for a stop string


def write(
    model, tokenizer, idx, rngs, max_new_tokens, controls=None, stops=(), logprobs=False, int8=False, threads=None
):  # fmt: skip
    """Texts that continue a list of tokens: yields, for each of rngs, an iterator of Pieces.

    rngs       iterable of Generators, which are asked for when their texts begin: of many texts, not all are in memory

    They grow side by side and are given one after the other.  What a text says does not depend on the others.
    """
    rngs = iter(rngs)
    while group := list(itertools.islice(rngs, SIDE_BY_SIDE)):
        length = len(idx) + max_new_tokens
        generation = Generation(
            model, idx, group, controls, length, logprobs, tokenizer=tokenizer, int8=int8, threads=threads
        )
        writers = [Writer(tokenizer, stops, idx) for _ in group]
        waiting = [[] for _ in group]  # what has been written, and not been asked for
        for i in range(len(group)):
            yield _pieces(i, generation, length, writers, waiting)


def _pieces(i, generation, length, writers, waiting):
    while waiting[i] or i in generation.alive:
        if not waiting[i]:
            alive = list(generation.alive)
            for j, token, logprob in zip(alive, *generation.step(), strict=True):
                waiting[j].append(Piece(writers[j].feed(token), token, logprob, None))
                if writers[j].stopped or len(generation.texts[j]) == length:
                    finish = "stop" if writers[j].stopped else "length"
                    waiting[j].append(Piece(writers[j].end(), None, None, finish))
                    generation.end(j)
        yield waiting[i].pop(0)
