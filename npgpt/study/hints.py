"""What kind of mistake is it?  A wrong gradient is compared with what mistakes would have made of it.

`Case.compare` finds, of what is wrong,

- the kinds of mistakes that can be seen in any array: a shape that is transposed or not summed, a constant factor (and
  which length it is), a sign, right numbers at wrong places, entries that should be 0;
- those of mistakes.py: who has the same figures has made that mistake, or those two;
- how much there is of each term of the right formula.

A Hint is a ladder of three rungs: which results and which entries; which line of the forward is undone wrongly; what
kind of mistake that is.  What to write is left to the reader.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np

from npgpt.gradcheck import BOUND, numeric_grad, relative_error
from npgpt.study.backward import Backward
from npgpt.study.kinds import RESHAPED, Found, factor_of, is_near, places, plain_mistake, power_in, shape_mistake
from npgpt.study.lesson import New
from npgpt.study.mistakes import CLOSE, USUAL, Mistakes, near
from npgpt.tensor import Tensor

NONE = "none of the usual mistakes: undo the forward line by line, from its last line back to this one"
FARTHEST = 5  # the cost of the least likely explanation that is given
AXES = {1: ("entry",), 2: ("row", "column"), 4: ("sequence", "head", "position", "column")}  # what an index is of


class Case:
    """Numbers for an op; what its backward must return is measured by finite differences of its forward.

    values   what the backward is given, by name
    so_far   result -> what stood in it before, for a backward that adds in place
    right    result, part of a result that the lesson looks at in parts, or slope of a helper -> what it must be
    parts    the same, without a result that is taken apart
    """

    def __init__(self, lesson):
        self.lesson, new = lesson, New(seed=3)
        inputs = lesson.arguments(new, **lesson.sizes)
        self.values = lesson.backward_arguments(inputs, new)
        self.so_far = {name: self.values[name] for name in lesson.results if name in self.values}
        dy = np.asarray(self.values.get("dy", self.values.get("dloss")))
        self.many = dy.shape[:-1]  # the axes along which a bias, say, is used many times
        self.right, self.parts, self.slopes = {}, {}, {}
        for helper, forward, at in lesson.slopes:
            z, function = self.values[at], getattr(lesson.module(), forward)
            self.slopes[helper] = numeric_grad(lambda z=z, function=function: function(z), Tensor(z), np.ones_like(z))
        for name in lesson.results:
            change = numeric_grad(lambda: lesson.outputs(inputs)[0], Tensor(inputs[name[1:]]), dy)
            self.right[name] = change + self.so_far.get(name, 0)
            self.parts |= self._parts(name, self.right[name])
        self.right |= self.parts | self.slopes
        self.lengths = {name: lesson.sizes[name] for name in lesson.lengths}
        self.factors = lesson.factors(**self.values)
        self._inputs = inputs

    @functools.cached_property
    def backward(self):
        return Backward(self.lesson, self._inputs, self.values)

    @functools.cached_property
    def mistakes(self):
        return Mistakes(self.lesson, self.backward, self.parts | self.slopes, self.so_far)

    def arguments(self):
        """Arguments for the backward, copies that it may keep."""
        return [value.copy() if isinstance(value, np.ndarray) else value for value in self.values.values()]

    def changed(self, arguments):
        """Names of the arguments that a backward changed, and must not have."""
        given = zip(self.values, arguments, strict=True)
        return [n for n, value in given if n not in self.so_far and not np.array_equal(value, self.values[n])]

    def _parts(self, name, array):
        if self.lesson.parts is None or name not in self.lesson.results or array.shape != self.right[name].shape:
            return {name: array}
        return self.lesson.parts(self.values, array)

    def compare(self, results):
        """{part: its Verdict} of what a backward and its helpers return, {name: array}; None for what is None."""
        verdicts, self.got = {}, {}
        for name, array in results.items():
            if array is None:
                verdicts[name] = None
            elif np.iscomplexobj(array):
                verdicts[name] = Verdict(math.inf, "it is complex, and a gradient is real")
            else:
                self.got |= (parts := self._parts(name, array))
                verdicts |= {part: self.verdict(part, array) for part, array in parts.items()}
        wrong = {part: self.got[part] for part in self.got if verdicts[part].wrong}
        self.fine = [part for part in self.got if part not in wrong]
        for part, found in self.found(wrong).items():
            verdicts[part].found = found
        names, line = self.lesson.shared
        through = [verdicts[part].found for part in names if part in wrong]
        if len(through) == len(names) and len({(found.kinds, found.line) for found in through}) == 1:
            for found in through:
                found.line = found.line or line
        for part in wrong:
            found = verdicts[part].found
            quotes = [step.quote for step in found.steps if step.quote]
            found.line = found.line or (quotes[0] if quotes else self.lesson.lines.get(part))
        return verdicts

    def verdict(self, part, got):
        """The Verdict on an array, before anything is found of it."""
        right = self.right[part]
        if got.shape != right.shape:
            return Verdict(math.inf, f"its shape is {got.shape}, it must be {right.shape}")
        errors = relative_error(got, right)
        worst = np.unravel_index(errors.argmax(), errors.shape)
        error, index = float(errors[worst]), list(map(int, worst))
        if error <= BOUND:
            return Verdict(error)
        wrong = f"worst at {index}: yours {got[worst]:.6g}, finite differences {right[worst]:.6g}"
        wrong += f"; {(errors > BOUND).sum()} of {right.size} entries are wrong"
        return Verdict(error, wrong)

    # What is found of wrong results: each step takes those that the steps before it have left

    def found(self, wrong):
        """{part: Found} for {part: wrong array}."""
        found = {}
        fits = {part: got for part, got in wrong.items() if got.shape == self.right[part].shape}
        looks = (
            (self._each, plain_mistake), (self._best, "singles", USUAL + 1), (self._whole,), (self._of_terms,),
            (self._best, "singles", FARTHEST), (self._each, places), (self._best, "pairs", FARTHEST),
        )  # fmt: skip
        for look, *how in looks:
            while (left := {part: fits[part] for part in fits if part not in found}) and (more := look(left, *how)):
                found |= more
        return {
            part: found.get(part) or (Found() if part in fits else shape_mistake(self, part, got, self.right[part]))
            for part, got in wrong.items()
        }

    def _change(self, part, array):
        return array - self.so_far.get(part, 0)

    def _whole(self, fits):
        """Parts of one result that have each other's numbers, which may have been wrong before."""
        if self.lesson.parts is None or len(fits) < len(self.parts):
            return {}
        got = np.sort(np.concatenate([fits[part].ravel() for part in self.parts]))
        swapped = any(near(fits[part], self.right[other]) for part in fits for other in fits)
        rows = np.sort(np.concatenate([self.mistakes.singles.rows[part] for part in self.parts], axis=1), axis=1)
        right = np.sort(np.concatenate([self.right[part].ravel() for part in self.parts]))
        for mistakes, row in (((), right), *zip(self.mistakes.singles.mistakes, rows, strict=True)):
            if near(got, row) and not swapped:
                return dict.fromkeys(fits, Found((RESHAPED, *(mistake.words for mistake in mistakes))))
        return {}

    def _each(self, wrong, of_one):
        """What a function of kinds.py finds of each part by itself."""
        return {part: found for part in wrong if (found := of_one(self, part, wrong[part])) is not None}

    def _best(self, wrong, several, most):
        """{part: Found} by what explains the most parts of those that are wrong, and is the likeliest.

        several, most: of mistakes.py's mistakes the "singles" or the "pairs", which cost so much at most.
        """
        space = getattr(self.mistakes, several)
        ratios = {part: space.ratios(part, self._change(part, got)) for part, got in wrong.items()}
        cost = np.array([sum(mistake.cost for mistake in mistakes) for mistakes in space.mistakes], float)
        factors = [[0 if np.isnan(one) else self._cost(float(one)) for one in c] for c in ratios.values()]
        cost += np.max(factors, axis=0)  # a factor besides is one more mistake
        for part in self.fine:  # it would have made others wrong, too
            cost += np.where(space.same(part), 0, 1)
        explained = sum(np.isfinite(c).astype(int) for c in ratios.values()) * (cost <= most)
        if not explained.any():
            return {}
        i = int(np.lexsort((cost, -explained))[0])
        found = {}
        for part, c in ratios.items():
            if np.isfinite(c[i]):
                mistakes = [one for one in space.mistakes[i] if part in self.backward.reached(one.step, self.right)]
                kinds = tuple(dict.fromkeys(mistake.words for mistake in mistakes))
                kinds += () if is_near(c[i], 1) else (factor_of(self, float(c[i]))[0],)
                line = next((mistake.line for mistake in mistakes if mistake.line), None)
                found[part] = Found(kinds, line, tuple(self.backward.steps[mistake.step] for mistake in mistakes))
        return found

    def _cost(self, c):
        """How unlikely a factor is."""
        if is_near(c, 1):
            return 0
        known = [1.0, *self.lengths.values(), *(value for value, _ in self.factors.values())]
        if any(is_near(abs(c), power) for value in known for power in (value, 1 / value)):
            return 1
        return 1.5 if any(is_near(abs(c), power) for n in (2, 3, 4) for power in (n, 1 / n)) else 3

    def _of_terms(self, wrong):
        """How much there is of each of the terms of a step."""
        found = {}
        for part, got in wrong.items():
            rest = got - self.right[part]
            linear = [term for term in self.mistakes.terms if term.contribution and term.contribution[part].any()]
            for i in dict.fromkeys(term.step for term in linear):
                terms = [term for term in linear if term.step == i]
                kinds, line = self._amounts(terms, part, rest)
                if kinds:
                    found[part] = Found(kinds, line, (self.backward.steps[i],))
                    break
        return found

    def _amounts(self, terms, part, rest):
        """(kinds of mistakes, a line of the forward) if what is too much of a result is made of terms of it."""
        for some in (some for n in (1, 2, 3) for some in itertools.combinations(terms, n)):
            columns = np.array([term.contribution[part].ravel() for term in some]).T
            amounts, _, rank, _ = np.linalg.lstsq(columns, rest.ravel(), rcond=None)
            if len(some) == rank < rest.size and near(columns @ amounts, rest.ravel()):
                kinds = tuple(self._amount(term, 1 + float(amount)) for term, amount in zip(some, amounts, strict=True))
                return kinds, next((term.line for term in some if term.line), None)
        for term in terms:
            if kind := self._row_by_row(term.contribution[part], rest):
                return (f"{kind} {term.words}",), term.line
        return (), None

    def _row_by_row(self, contribution, rest):
        """Words for how much there is of a term, if that is one number for each row; else nothing."""
        if contribution.ndim != 2 or not contribution.all():
            return ""
        amounts = 1 + rest / contribution
        if np.ptp(amounts, axis=1).max() > CLOSE * np.abs(amounts).max():
            return ""
        name, power = power_in(self, amounts[:, 0])
        if power:
            return f"wrong power: {name} has another one in"
        return "a factor that differs from row to row is wrong: that of"

    def _amount(self, term, amount):
        """What kind of mistake it is that there is so much of a term."""
        if abs(amount) <= CLOSE:
            return f"missing term: without {term.words}"
        words = factor_of(self, amount)[0]
        return f"{words}: of {term.words}" if words.startswith("sign:") else f"{words} (of {term.words} alone)"

    # The ladder

    def hints(self, verdicts):
        """What is wrong, as Hints: results of which the same is found have one."""
        groups = {}
        for part, verdict in verdicts.items():
            if verdict is not None and verdict.found is not None:
                groups.setdefault((verdict.found.kinds, verdict.found.steps), []).append(part)
        return [self._hint(parts, verdicts[parts[0]].found) for parts in groups.values()]

    def _hint(self, parts, found):
        made = list(dict.fromkeys(step.target for step in found.steps))
        where = f"  (where {_listed(made)} {_are(made)} made)" if made else ""
        kinds = "; and ".join(found.kinds or (NONE,))
        line, kind = f"the forward's  {found.line}{where}", kinds + "." * (kinds[-1] != "?")
        return Hint(found.kinds, (f"{self._where(parts)}.", line, kind))

    def _where(self, parts):
        """Which results are wrong, what they alone come from, and which entries."""
        words = f"{_listed(parts)} {_are(parts)} wrong"
        if self.fine:
            words = f"{_listed(self.fine)} {_are(self.fine)} right, {words}"
        if helpers := [name for name in parts if name in self.slopes]:
            return f"{words}: begin with {_listed(helpers)}, which was measured by itself"
        suspects = {}
        for i, step in enumerate(self.backward.steps):
            reached = self.backward.reached(i, self.right) - (self.slopes.keys() - set(self.fine))
            made = self.backward.values[step.target]
            if reached >= set(parts) and not reached & set(self.fine) and np.ndim(made) and len(step.writes) == 1:
                suspects[step.target] = None
        if suspects := [name for name in suspects if name not in parts]:
            it, own = ("it", "its own line") if len(parts) == 1 else ("these", "their own lines")
            words += f"; what leads to {it} alone is {_listed([*suspects, own])}"
        entries = {self._entries(part) for part in parts if self.got[part].shape == self.right[part].shape}
        if len(entries) == 1 and (only := entries.pop()):
            words += f"; {only}"
        return words

    def _entries(self, part):
        """Words for which entries of a result are wrong; nothing where that says nothing."""
        wrong = relative_error(self.got[part], self.right[part]) > BOUND
        masks = self.lesson.places(**self.values).get(part, {})
        for words, mask in masks.items():
            if np.array_equal(wrong, mask):
                return f"wrong are {words}, and no others"
        for axis, per in enumerate(AXES.get(wrong.ndim, ())):
            others = tuple(other for other in range(wrong.ndim) if other != axis)
            bad = wrong.any(axis=others)
            fewer, verdict = (bad, "wrong") if 2 * bad.sum() <= bad.size else (~bad, "right")
            if fewer.any():
                places = [str(place) for place in np.flatnonzero(fewer)]
                return f"only the {per}{'s' * (len(places) > 1)} {_listed(places)} {_are(places)} {verdict}"
        some = (words for words, mask in masks.items() if not (wrong & ~mask).any())
        return next((f"wrong are only some of {words}" for words in some), "")


def _listed(names):
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _are(things):
    return "is" if len(things) == 1 else "are"


@dataclass
class Verdict:
    error: float  # the worst relative one
    wrong: str = ""  # what is wrong, if something is
    found: Found | None = None

    @property
    def kind(self):
        """What kinds of mistakes that is, in words; nothing if that is not known."""
        return "; and ".join(self.found.kinds) if self.found else ""


@dataclass(frozen=True)
class Hint:
    kinds: tuple  # each a mistake
    rungs: tuple  # of the ladder: three lines


def ladder(hints, more):
    """The lines of hints, each up to its rung 1 + more."""
    for hint in hints:
        for head, rung in zip(("hint: ", "line: ", "kind: ")[: 1 + more], hint.rungs, strict=False):
            yield f"  {head}{rung}"
    if hints and more < 2:
        next_rung = ("which line it is", "which kind of mistake it is")[more]
        yield f"  ({next_rung}: the same command with {' '.join(['--more'] * (more + 1))})"
