"""Texts that grow from a prompt, a token at a time: where the context begins, and what the cache already has of it."""

import math
import time

import numpy as np

from npgpt.config import Controls
from npgpt.engine import no_dropout, no_grad
from npgpt.errors import CheckpointError
from npgpt.generate.decode import AHEAD, Decoder
from npgpt.generate.draft import MOST_TEXTS, Drafts, ModelDrafts
from npgpt.generate.matrices import kind_of, rounded
from npgpt.generate.sampling import NOT_FINITE, choose, likeliest, probabilities
from npgpt.generate.stats import Stats
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
    draft      the most tokens of a text that are guessed ahead and checked together, as in draft.py; the cache's kernel
               does it, and the text is the same
    stats      Stats, which are told of each step
    """

    def __init__(
        self, model, idx, rngs, controls=None, length=None, logprobs=False, cache=True, tokenizer=None, int8=False,
        threads=None, dtype=None, draft=0, stats=None,
    ):  # fmt: skip
        self.stats = stats or Stats()
        idx = _checked_prompt(idx, model.config.vocab_size)
        self.model, self.controls, self.rngs = model, controls or Controls(), rngs
        self.logprobs, self.length = logprobs, length or math.inf
        self.block_size = model.config.block_size
        known, V = tokenizer, model.config.vocab_size
        self.vocab_size = V if known is None else min(known.vocab_size, V)  # a model may know more tokens
        self.holes = [] if known is None else [hole for hole in known.holes if hole < self.vocab_size]
        self.texts, self.n_prompt = [list(idx) for _ in rngs], len(idx)
        self.alive = list(range(len(rngs)))  # the texts that still grow
        self.numbers = [[] for _ in rngs]  # random ones, of the tokens that are written, and some of those to come
        self.starts = [max(0, len(idx) - self.block_size)] * len(rngs)  # where the context of each text begins
        self.cached = [0] * len(rngs)  # positions of each text in the cache
        other, kind = model.difference(), kind_of(int8, dtype, model.lm_head.weight.dtype)
        if kind and other:
            raise ValueError(f"{kind} is for a GPT as its config says; {other}")
        cached, self.decoder = cache and other is None, None
        if cached and KERNELS == "numba":
            self.decoder = Decoder(model, len(rngs), length, int8, threads, dtype, is_gpt=True)
        elif kind:
            self.model = rounded(model, kind)
        self.steps = 0
        self.choosing = self.guessing = 0.0  # seconds of the last one that went into the choice of tokens, of guesses
        self.drafts = Drafts(self.texts, draft, self.decoder.rows) if draft and self.decoder else None
        self.model_drafts = ModelDrafts()
        self.caches = [{"cache": []} if cached else {} for _ in rngs]  # of each text, if its model writes with one

    def _contexts(self):
        """What the cache does not have yet of each text's context.  To be asked once in a step."""
        for i in self.alive:
            start = context_start(len(self.texts[i]), self.starts[i], self.block_size)
            if start != self.starts[i]:
                self.cached[i], self.starts[i] = 0, start  # (in this order, for an interrupt may come between them)
        return [self.texts[i][self.starts[i] + self.cached[i] :] for i in self.alive]

    def _room(self, i):
        """How many tokens a text can get before its context is full, or it is complete."""
        return min(self.starts[i] + self.block_size + 1, self.length) - len(self.texts[i])

    def _uniforms(self, i, n):
        """The next n random numbers of a text: each of its tokens has its own, however often it is drawn."""
        numbers, first = self.numbers[i], len(self.texts[i]) - self.n_prompt
        if (more := first + n - len(numbers)) > 0:
            numbers += self.rngs[i].random(more).tolist()
        return numbers[first : first + n]

    def _uniforms_of_all(self, n):
        """A list of n steps: the next random number of each text that still grows."""
        return list(zip(*[self._uniforms(i, n) for i in self.alive], strict=True))

    def _logits(self, contexts):
        """(texts alive, V): the model's scores of the next tokens."""
        alive, positions = self.alive, [self.cached[i] for i in self.alive]
        if self.decoder is None:
            logits = np.stack([self._logits_of_model(i, context) for i, context in zip(alive, contexts, strict=True)])
        elif all(len(context) == 1 for context in contexts):  # what was chosen last
            logits = self.decoder([token for (token,) in contexts], alive, positions, len(alive))
        elif not any(positions) and all(context == contexts[0] for context in contexts):  # the prompt
            last = self.decoder.read(contexts[0], alive[0])
            self.decoder.copy(alive[0], len(contexts[0]))
            logits = np.tile(last, (len(alive), 1))
        else:  # of some texts, what was chosen last; of others, a context that has moved
            logits, rows = {}, list(zip(contexts, alive, positions, strict=True))
            if newest := [(context[0], i, position) for context, i, position in rows if len(context) == 1]:
                tokens, streams, places = zip(*newest, strict=True)
                logits.update(zip(streams, self.decoder(tokens, streams, places, len(tokens)).copy(), strict=True))
            prompts, streams, places = zip(*[row for row in rows if len(row[0]) > 1], strict=True)
            logits.update(zip(streams, self.decoder.read_all(prompts, streams, places), strict=True))
            logits = np.stack([logits[i] for i in alive])
        return logits

    def _logits_of_model(self, i, context):
        """(V,): the scores of a text's next token, by the model itself."""
        n, caches = self.cached[i], self.caches[i].items()  # a cache may have more, after an interrupt
        cache = {name: [[half[:, :, :n] for half in past] for past in layers] for name, layers in caches}
        with no_grad(), no_dropout():
            logits = self.model(np.array([context]), **cache)[0].data[0, -1]
        self.caches[i] = cache
        return logits

    def _kernel_draws(self):
        """Whether the decoder can draw tokens by itself."""
        c = self.controls
        only_temperature = c.top_k is c.top_p is None and not c.min_p and c.repetition_penalty == 1
        return only_temperature and not self.logprobs and not self.holes

    def _draw(self, rows, uniforms, by_draft_model=False):
        """Have the decoder draw tokens after rows: tokens, streams, positions -> (steps, rows)."""
        return self.decoder.draw(*rows, np.array(uniforms), self.controls.temperature, self.vocab_size, by_draft_model)

    def _newest(self, contexts):
        """The rows of what was chosen last: tokens, streams, positions."""
        return [token for (token,) in contexts], self.alive, [self.cached[i] for i in self.alive]

    def _draw_ahead(self, contexts):
        """Have the decoder draw as many tokens of each text as it can -> their blocks."""
        room = min(self._room(i) for i in self.alive)
        steps = max(1, min(room, AHEAD, int(AT_ONCE / self.decoder.nbytes)))
        drawn = self._draw(self._newest(contexts), self._uniforms_of_all(steps))
        wrong = (drawn < 0).any(axis=1)
        if wrong[0]:
            raise CheckpointError(NOT_FINITE)
        if wrong.any():  # it is an error when it is the next one
            drawn = drawn[: int(wrong.argmax())]
        return [[(token, None) for token in tokens] for tokens in drawn.T.tolist()]

    def _tokens(self, logits, texts, uniforms):
        """Draw a token after each text with all controls, by its logits and a random number -> a list of them."""
        possible = logits[:, : self.vocab_size]
        if self.holes:
            possible = possible.copy()
            possible[:, self.holes] = -np.inf
        if self.controls.temperature == 0 and self.controls.repetition_penalty == 1:
            return likeliest(possible)
        return choose(probabilities(possible, texts, self.controls), uniforms)

    def _choose(self, logits, texts, uniforms):
        """The tokens drawn after these texts -> pairs as in step()."""
        began, logprobs = time.perf_counter(), [None] * len(texts)
        tokens = self._tokens(logits, texts, uniforms)
        if self.logprobs:  # with the tokens that are never chosen: the model gives them a share all the same
            z = logits - logits.max(axis=1, keepdims=True)
            logprobs = (z[np.arange(len(z)), tokens] - np.log(np.exp(z, dtype=np.float64).sum(axis=1))).tolist()
        self.choosing += time.perf_counter() - began
        return list(zip(tokens, logprobs, strict=True))

    def _drafts_of_model(self, contexts):
        """The next tokens of each text as the draft model has them: a list for each, or no lists."""
        room = min(self._room(i) for i in self.alive) - 1  # (one more token will be written)
        are_few = len(self.alive) <= MOST_TEXTS
        has_shortlist = self.controls.temperature == 0 and self._kernel_draws()
        if not ((are_few or has_shortlist) and self.decoder.has_draft_model(room)):
            return []
        n = self.model_drafts.wanted(room, len(self.alive)) if are_few else 0
        return self._guesses(contexts, n) if n else []

    def _guesses(self, contexts, n):
        """The next n tokens of each text by the draft model, with the random numbers and controls of those to come."""
        uniforms = self._uniforms_of_all(n)
        if self._kernel_draws():
            drawn = self._draw(self._newest(contexts), uniforms, by_draft_model=True)
            return drawn.T.clip(0).tolist()  # (-1 where int8 has no finite logits)
        (tokens, streams, positions), texts = self._newest(contexts), [list(self.texts[i]) for i in self.alive]
        for step in range(n):
            places = [position + step for position in positions]
            logits = self.decoder(tokens, streams, places, len(tokens), by_draft_model=True)
            began = time.perf_counter()
            try:
                tokens = self._tokens(logits, texts, uniforms[step])
            except CheckpointError:  # int8 has no finite logits
                tokens = [0] * len(tokens)
            for text, token in zip(texts, tokens, strict=True):
                text.append(token)
            self.guessing += time.perf_counter() - began
        return [text[-n:] for text in texts]

    def _check(self, contexts, drafts):
        """Have the model read drafts -> their blocks: a draft as far as it is what is written, and a token more."""
        texts = [(i, [*context, *draft]) for i, context, draft in zip(self.alive, contexts, drafts, strict=True)]
        rows = [(token, i, self.cached[i] + n) for i, tokens in texts for n, token in enumerate(tokens)]
        rows = list(zip(*rows, strict=True))  # tokens, streams, positions
        uniforms = [uniform for i, tokens in texts for uniform in self._uniforms(i, len(tokens))]
        if kernel_draws := self._kernel_draws():
            drawn = self._draw(rows, [uniforms])[0].tolist()
        else:
            logits = self.decoder(*rows, len(uniforms))
        blocks, row = [], 0
        for i, draft in zip(self.alive, drafts, strict=True):
            block, text = [], [] if kernel_draws else list(self.texts[i])
            for at, guess in enumerate([*draft, None], row):
                if kernel_draws:
                    pair = drawn[at], None
                else:
                    try:
                        (pair,) = self._choose(logits[at : at + 1], [text], uniforms[at : at + 1])
                    except CheckpointError:  # as the kernel says it
                        pair = -1, None
                block.append(pair)
                text.append(pair[0])
                if pair[0] != guess:  # the rows to come follow what is not written
                    break
            row += len(draft) + 1
            if len(block) > 1 and block[-1][0] < 0:  # it is an error when it is the next one
                block.pop()
            blocks.append(block)
        if any(token < 0 for block in blocks for token, _ in block):
            raise CheckpointError(NOT_FINITE)
        for draft, block in zip(drafts, blocks, strict=True):
            self.stats.proposed += len(draft)
            self.stats.accepted += sum(token == guess for guess, (token, _) in zip(draft, block, strict=False))
        return blocks

    @np.errstate(all="ignore")  # the caller's own choice is not for what is meant to happen here
    def step(self):
        """The next tokens of each text that still grows: a block for each, within `length`, where a text must end.

        A block is a list of (token, log-probability or None).  The latter is the model's own, in nats, before any
        control.  All blocks are of one length, unless there are drafts.
        """
        began, drafts, by_model = time.perf_counter(), [], []
        self.choosing = self.guessing = 0.0
        contexts = self._contexts()
        newest_only = self.decoder is not None and all(len(context) == 1 for context in contexts)
        if newest_only and self.drafts:
            drafts = self.drafts.propose(self.alive, lambda i: self._room(i) - 1)
        if newest_only and not drafts:
            by_model = self._drafts_of_model(contexts)
        if drafts or by_model:
            blocks = self._check(contexts, drafts or by_model)
        elif newest_only and self._kernel_draws():
            blocks = self._draw_ahead(contexts)
        else:
            texts, uniforms = [self.texts[i] for i in self.alive], [self._uniforms(i, 1)[0] for i in self.alive]
            blocks = [[pair] for pair in self._choose(self._logits(contexts), texts, uniforms)]
        for i, context, block in zip(self.alive, contexts, blocks, strict=True):  # an interrupt may come at any line
            self.texts[i] += [token for token, _ in block]
            if self.decoder or self.caches[i]:  # the last token is not cached yet; what was refused is written over
                self.cached[i] += len(context) + len(block) - 1
        now = time.perf_counter()
        seconds, each = now - began, sum(map(len, blocks)) / len(blocks)
        if by_model:
            both = seconds - self.choosing - self.guessing
            self.model_drafts.took(each - 1, len(by_model[0]), self.decoder.draft_share, both, self.guessing)
        if newest_only and self.drafts:
            steps, rows = (1, sum(map(len, contexts + drafts))) if drafts else (each, 0)
            self.drafts.took(seconds - self.choosing, steps, rows)
        if self.steps:
            self.stats.wrote(sum(map(len, blocks)), seconds)
        else:
            self.stats.read(len(contexts[0]), seconds - self.choosing, now)
        self.steps += 1
        return blocks

    def end(self, i):
        """Text number i is complete."""
        self.alive.remove(i)


def first_token(tokenizer):
    """What a text without a prompt begins with: a line break, or token 0 where the tokenizer has none."""
    return int(tokenizer.encode("\n")[0]) if "\n" in getattr(tokenizer, "chars", "\n") else 0


def unprompted(model, n, rng):
    """The n tokens that a model writes after first_token, as they come."""
    return model.generate([first_token(model.tokenizer)], n, rng, temperature=0.8)
