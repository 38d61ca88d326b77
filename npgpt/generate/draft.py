"""Drafts: the next tokens of a text, guessed from what it says already, so that one pass of the model checks several.

A pass for one token fetches all weights from memory; for four it takes hardly longer.  So whoever can guess the next
tokens may let the model read them in one go:

    text      ... the cat sat on the mat, and the cat
    draft     sat on the               what followed `the cat` when it came last
    the pass  sat on the bed           what the model writes after `cat`, `sat`, `on`, `the`
    gained    sat on the bed           all that it writes up to the first token that the draft has otherwise, and this

Each token is chosen from the logits after tokens that are written, with the random number and the controls that it
would have alone, and these logits have the bits that they have alone.  So the text is the same, only sooner.

For a large model a draft model guesses: the same model with its weights in int8.  It reads a quarter of the bytes, and
its probabilities are nearly the same.  So the random number that will choose a token nearly always has it choose the
same one, if the model has learnt what to expect.

Leviathan et al. 2023 and Chen et al. 2023 have a small model draft, and keep the distribution of the text; to look up
the prompt instead is Saxena's (prompt lookup decoding, 2023).  Zhang et al. 2023 (Draft & Verify) have a part of the
model draft for the whole, with one cache for both.
"""

import copy
import time

TOGETHER = 4  # rows for which the kernel fetches a weight once
LONGEST = 8  # matches of so many tokens, and longer ones, are alike
REMEMBERED = 16  # a chance is about that of so many tokens
LEAST = 0.1  # a token with less of a chance is not worth a thought
GAIN = 1.2  # drafts must be expected to write so many times faster: texts that get out of step cost something, too
MORE = 0.3  # what a pass is taken to cost more for TOGETHER rows more, until it is measured
ANEW = 256  # steps after which all times are measured anew
PATIENCE = 100  # after a search that comes to nothing, the next one waits until so many times its seconds have gone by
AT_MOST = 64  # but no more than so many steps, about: to take note of what they wrote takes time, too
MOST_TEXTS = 2  # texts that a draft model guesses for, at most: of more it is arithmetic, not memory, that takes time
GUESSES, MOST_GUESSES = 5, 2 * TOGETHER - 1  # tokens of the draft model that are checked together
SAVED = 1.0  # tokens' times that its drafts are taken to save before it is known
CHECK = 0.12  # of a token's time, about, that one token more takes to check
MEMORY = 8  # drafts, about, that count in the mean of what they save
REST, LONGEST_REST = 32, 256  # passes without drafts, when they come to nothing: once, and again and again


class ModelDrafts:
    """How many tokens the draft model shall guess: none for a while, if it was not right often enough.

    guesses  of the next draft of a single text: a few more than were right in the last one
    saved    tokens' times that a draft saves, the mean of the last ones
    """

    def __init__(self):
        self.guesses = GUESSES
        self.saved, self.drafts = SAVED, 2  # that count in this mean
        self.rest, self.next_rest = 0, REST  # passes until the next draft, and when drafts come to nothing again

    def wanted(self, room, texts=1):
        """The tokens of the next draft, for so many texts that have so much room."""
        if room < 1:
            return 0
        self.rest -= 1
        most = self.guesses if texts == 1 else GUESSES
        return min(most, room) if self.rest < 0 else 0

    def took(self, right, guesses, share, seconds=1.0, guessing=0.0):
        """So many tokens of a draft were right, as a mean of all texts; one for which there was no room says little.

        share     of the time that the model takes for a token, what the draft model takes
        seconds   that both took for the pass, beside those in which Python chose tokens: `guessing`, for the draft

        A draft must save as many tokens' times as it costs.
        """
        if guesses < GUESSES:
            return
        cost = guesses * (share + CHECK)
        saved, self.drafts = right - cost - guessing * (1 + cost) / seconds, min(self.drafts + 1, MEMORY)
        self.saved += (saved - self.saved) / self.drafts
        self.guesses = min(max(GUESSES, int(right) + 2), MOST_GUESSES)
        if self.saved < 0:
            # one good draft will be enough to go on
            self.saved, self.rest, self.next_rest = 0.0, self.next_rest, min(2 * self.next_rest, LONGEST_REST)
        elif saved >= 0:
            self.next_rest = REST


class Lookup:
    """What a text said after the tokens with which it ends, when it had them last.

    An index has where each three tokens came last, and each one, which is asked for if these three are new.  A match
    that has been found is followed as long as it is right, and so becomes longer.

    text  a list of tokens, which grows
    """

    def __init__(self, text):
        self.text = text
        self.seen = 0  # tokens of the text that are in the index
        self.threes, self.ones = {}, {}  # tokens -> the place that came after them last
        self.at = 0  # the place in the text that would be repeated next; 0 if there is none
        self.length = 0  # tokens of this match, at most LONGEST
        self.chances = [0.0] * (LONGEST + 1)  # that the token after a match of a length is right: how often it was
        self.weights = [2] * (LONGEST + 1)  # what comes next is one of so many of which that is the mean

    def look(self):
        """Take note of the tokens that have come."""
        text, threes, ones, at, length = self.text, self.threes, self.ones, self.at, self.length
        chances, weights = self.chances, self.weights
        first, second = [None, None, *text[max(0, self.seen - 2) : self.seen]][-2:]
        for n, token in enumerate(text[self.seen :], self.seen + 1):
            if at:
                hit = text[at] == token
                chances[length] += (hit - chances[length]) / weights[length]
                if weights[length] < REMEMBERED:
                    weights[length] += 1
                at = at + 1 if hit else 0
                length = min(length + 1, LONGEST)
            three = first, second, token
            if not at:
                at, length = threes.get(three, 0), 3
                if not at:
                    at, length = ones.get(token, 0), 1
            threes[three] = ones[token] = n
            first, second = second, token
        self.seen, self.at, self.length = len(text), at, length

    def copy(self, text):
        """The same for another text, which is equal so far."""
        other = copy.copy(self)
        other.text, other.threes, other.ones = text, dict(self.threes), dict(self.ones)
        other.chances, other.weights = list(self.chances), list(self.weights)
        return other

    def odds(self, most):
        """The chances that the first token of a draft is right, the first two, ...: at most so many."""
        odds, chance = [], 1.0
        for n in range(self.length, self.length + most if self.at else 0):
            chance *= self.chances[min(n, LONGEST)]
            if chance < LEAST:
                break
            odds.append(chance)
        return odds

    def draft(self, n):
        """The next n tokens, if the text goes on to repeat itself."""
        tokens, period = self.text[self.at : self.at + n], len(self.text) - self.at
        while len(tokens) < n:  # the text repeats what it has just said
            tokens.append(tokens[-period])
        return tokens


class Drafts:
    """The drafts of texts that grow side by side: as many tokens as are worth to be checked, and none if none is.

    What they are worth follows from the chances of the tokens, which are known without a check, and from how long a
    pass takes with so many rows, which is measured as it goes.

    texts  lists of tokens, equal at first, which grow
    most   tokens of a draft
    rows   of a pass, of all texts
    """

    def __init__(self, texts, most, rows):
        self.most, self.rows = most, rows
        lookup = Lookup(list(texts[0]))
        lookup.look()
        self.lookups = [lookup.copy(text) for text in texts]
        self.alive = []  # the texts that the times are of
        self.seconds = {}  # so many times TOGETHER rows more -> seconds of a pass; 0: of a step without drafts
        self.steps = 0  # since these are measured
        self.wait = 0.0  # seconds until the next search

    def propose(self, alive, room):
        """The drafts of these texts, none longer than the room(i) that it has: a list for each text, or no lists."""
        if self.alive != alive or self.steps == ANEW:
            self.alive, self.seconds, self.steps = list(alive), {}, 0
        if self.wait > 0 or not self.seconds:
            return []
        began, odds = time.perf_counter(), []
        for i in alive:
            self.lookups[i].look()
            odds += [(chance, i) for chance in self.lookups[i].odds(min(self.most, room(i)))]
        odds = sorted(odds, reverse=True)[: self.rows - len(alive)]
        checked = [i for _, i in odds[: self._worth_it(odds)]]
        if not checked:
            self.wait = min(PATIENCE * (time.perf_counter() - began), AT_MOST * self.seconds[0])
            return []
        return [self.lookups[i].draft(checked.count(i)) for i in alive]

    def _worth_it(self, odds):
        """How many of these tokens shall be checked.  odds: pairs (chance, text), falling."""
        n, best = len(self.alive), 0
        tokens, rate = n, GAIN * n / self.seconds[0]
        for more, (chance, _) in enumerate(odds, 1):
            tokens += chance
            if (n + more) % TOGETHER == 0 or more == len(odds):
                seconds = self._expected(self._times(n + more))
                if tokens / seconds > rate:
                    best, rate = more, tokens / seconds
        return best

    def _times(self, rows):
        return -(-rows // TOGETHER) - len(self.alive) // TOGETHER

    def _expected(self, times):
        """The seconds of a pass: as measured, or in line with what was."""
        if times in self.seconds:
            return self.seconds[times]
        plain, known = self.seconds[0], max(n for n in self.seconds if n < times)
        return plain + times * ((self.seconds[known] - plain) / known if known else MORE * plain)

    def took(self, seconds, steps=1, rows=0):
        """A pass with drafts has taken so long, with so many rows of all texts; or some steps without drafts."""
        times = self._times(rows) if rows else 0
        each = seconds / steps
        self.seconds[times] = min(each, 1.05 * self.seconds.get(times, each))  # one that was held up counts little
        self.steps += 1
        self.wait -= seconds
