"""From tokens as they come to text as it may be shown, and several texts side by side.

    for pieces in write(model, tokenizer, idx, rngs, max_new_tokens):
        for piece in pieces:
            print(piece.text, end="")
"""

import codecs
import itertools
from dataclasses import dataclass

from npgpt.generate.generation import Generation

SIDE_BY_SIDE = 8  # texts that grow together; more would take more memory, and be little faster


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
            places = range(max(0, len(text) - longest), len(text))
            n = next((n for n in places if any(stop.startswith(text[n:]) for stop in self.stops)), len(text))
        self._held = text[n:]
        self.text += text[:n]
        return text[:n]


@dataclass(frozen=True)
class Piece:
    """What one more token has brought, or the end of a text."""

    text: str  # what can be shown now
    token: int | None  # None at the end
    logprob: float | None  # the model's own, in nats, if asked for
    finish: str | None  # at the end only: "length", or "stop" for a stop string


def write(model, tokenizer, idx, rngs, max_new_tokens, controls=None, stops=(), **options):
    """Texts that continue a list of tokens: yields, for each of rngs, an iterator of Pieces.

    rngs       iterable of Generators, which are asked for when their texts begin: of many texts, not all are in memory
    options    of the Generation: logprobs, int8, threads, dtype, draft, stats

    They grow side by side and are given one after the other.  What a text says does not depend on the others.
    """
    rngs = iter(rngs)
    while group := list(itertools.islice(rngs, SIDE_BY_SIDE)):
        length = len(idx) + max_new_tokens
        generation = Generation(model, idx, group, controls, length, tokenizer=tokenizer, **options)
        writers = [Writer(tokenizer, stops, idx) for _ in group]
        waiting = [[] for _ in group]  # what has been written, and not been asked for
        for i in range(len(group)):
            yield _pieces(i, generation, length, writers, waiting)


def _pieces(i, generation, length, writers, waiting):
    while waiting[i] or i in generation.alive:
        if not waiting[i]:
            for j, block in zip(list(generation.alive), generation.step(), strict=True):
                for token, logprob in block:
                    waiting[j].append(Piece(writers[j].feed(token), token, logprob, None))
                    if writers[j].stopped:
                        break
                if writers[j].stopped or len(generation.texts[j]) == length:
                    finish = "stop" if writers[j].stopped else "length"
                    waiting[j].append(Piece(writers[j].end(), None, None, finish))
                    generation.end(j)
        yield waiting[i].pop(0)
