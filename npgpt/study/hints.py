"""What kind of mistake is it?  A wrong gradient is compared with what mistakes would have made of it.

`Case.compare` finds, of what is wrong,

- the kinds of mistakes that can be seen in any array: a shape that is transposed or not summed, a constant factor (and
  which length it is), a sign, right numbers at wrong places, entries that should be 0;
- those of mistakes.py: who has the same figures has made that mistake, or those two;
- how much there is of each term of the right formula.

A Hint is a ladder of three rungs: which results and which entries; which line of the forward is undone wrongly; what
kind of mistake that is.  What to write is left to the reader.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from npgpt.gradcheck import BOUND, numeric_grad, relative_error
from npgpt.study.backward import Backward
from npgpt.study.lesson import New
from npgpt.study.mistakes import CLOSE, Mistakes
from npgpt.tensor import Tensor

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
        self.right, self.parts = {}, {}
        for helper, forward, at in lesson.slopes:
            z, function = self.values[at], getattr(lesson.module(), forward)
            self.parts[helper] = numeric_grad(lambda z=z, function=function: function(z), Tensor(z), np.ones_like(z))
        for name in lesson.results:
            change = numeric_grad(lambda: lesson.outputs(inputs)[0], Tensor(inputs[name[1:]]), dy)
            self.right[name] = change + self.so_far.get(name, 0)
            self.parts |= self._parts(name, self.right[name])
        self.right |= self.parts
        self.lengths = {name: lesson.sizes[name] for name in lesson.lengths}
        self.factors = lesson.factors(**self.values)
        self.backward = Backward(lesson, inputs, self.values)
        self.mistakes = Mistakes(lesson, self.backward, self.parts, self.so_far)

    def arguments(self):
        """Arguments for the backward, copies that it may keep."""
        return [value.copy() if isinstance(value, np.ndarray) else value for value in self.values.values()]

    def changed(self, arguments):
        """Names of the arguments that a backward changed, and must not have."""
        given = zip(self.values, arguments, strict=True)
        return [n for n, value in given if n not in self.so_far and not np.array_equal(value, self.values[n])]

    def _parts(self, name, array):
        if self.lesson.parts is None or array.shape != self.right[name].shape:
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
                verdicts |= {part: self._verdict(part) for part in parts}
        wrong = {part: self.got[part] for part in self.got if verdicts[part].wrong}
        self.fine = [part for part in self.got if part not in wrong]
        for part, found in self._found(wrong).items():
            verdicts[part].found = found
        names, line = self.lesson.shared
        through = [verdicts[part].found for part in names if part in wrong]
        if len(through) == len(names) and len({(found.kinds, found.line) for found in through}) == 1:
            for found in through:
                found.line = found.line or line
        for part in wrong:
            found = verdicts[part].found
            found.line = found.line or self.lesson.lines.get(part)
        return verdicts

    def _verdict(self, part):
        got, right = self.got[part], self.right[part]
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

    def _found(self, wrong):
        """{part: Found} for {part: wrong array}."""
        found = {}
        fits = {part: got for part, got in wrong.items() if got.shape == self.right[part].shape}
        whole = self._whole(fits)
        for look in (self._seen, self._made_by(0), self._of_terms, self._rearranged, self._made_by(1)):
            left = {part: got for part, got in fits.items() if part not in found}
            found |= whole if left and whole else look(left)
        for part, got in wrong.items():
            if part not in fits:
                found[part] = _shape_mistake(self, part, got, self.right[part])
            elif part not in found:
                found[part] = Found()
        return found

    def _change(self, part, array):
        return array - self.so_far.get(part, 0)

    def _whole(self, fits):
        """Parts of one result that have each other's numbers."""
        if self.lesson.parts is None or len(fits) < 2:
            return {}
        got, right = (np.sort(np.concatenate([arrays[part].ravel() for part in fits])) for arrays in (fits, self.right))
        swapped = any(_near(fits[part], self.right[other]) for part in fits for other in fits)
        return dict.fromkeys(fits, Found((RESHAPED,))) if _near(got, right) and not swapped else {}

    def _seen(self, wrong):
        """What can be seen in any array."""
        return {part: found for part in wrong if (found := _plain_mistake(self, part, wrong[part])) is not None}

    def _made_by(self, more):
        """A look for the mistakes of mistakes.py, one at a time, or two."""

        def look(wrong):
            wrong, found = dict(wrong), {}
            while wrong:
                space = self.mistakes.pairs if more else self.mistakes.singles
                best = self._best(space, wrong)
                if best is None:
                    break
                for part, one in best.items():
                    found[part] = one
                    del wrong[part]
            return found

        return look

    def _best(self, space, wrong):
        """{part: Found} by what explains the most parts of those that are wrong, and is the likeliest; or None."""
        if not space.mistakes:
            return None
        ratios = {part: space.ratios(part, self._change(part, got)) for part, got in wrong.items()}
        explained = sum(np.isfinite(c).astype(int) for c in ratios.values())
        if not explained.max():
            return None
        cost = np.array([sum(mistake.cost for mistake in mistakes) for mistakes in space.mistakes], float)
        for c in ratios.values():  # a factor besides is one more mistake
            cost += np.where(np.isfinite(c) & (np.abs(c - 1) > CLOSE), 1.5, 0)
        for part in self.fine:  # it would have made others wrong, too
            cost += np.where(space.same(part), 0, 1)
        i = int(np.lexsort((cost, -explained))[0])
        line = next((mistake.line for mistake in space.mistakes[i] if mistake.line), None)
        steps = tuple(self.backward.steps[mistake.step] for mistake in space.mistakes[i])
        found = {}
        for part, c in ratios.items():
            if np.isfinite(c[i]):
                kinds = tuple(dict.fromkeys(mistake.words for mistake in space.mistakes[i]))
                kinds += () if _is(c[i], 1) else (_factor(self, float(c[i]))[0],)
                found[part] = Found(kinds, line, steps)
        return found

    def _of_terms(self, wrong):
        """How much there is of each of the terms of a step."""
        found = {}
        for part, got in wrong.items():
            right = self._change(part, self.right[part])
            for step in dict.fromkeys(term.step for term in self.mistakes.terms):
                terms = [term for term in self.mistakes.terms if term.step == step and term.contribution[part].any()]
                for some in (some for n in (1, 2, 3) for some in itertools.combinations(terms, n)):
                    columns = np.array([term.contribution[part].ravel() for term in some]).T
                    rest = (self._change(part, got) - right).ravel()
                    amounts, _, rank, _ = np.linalg.lstsq(columns, rest, rcond=None)
                    if part in found or rank < len(some) or len(some) >= got.size:
                        continue
                    if np.abs(columns @ amounts - rest).max() <= CLOSE * np.abs(rest).max():
                        kinds = tuple(self._amount(term, 1 + float(amount)) for term, amount in zip(some, amounts, strict=True))
                        line = next((term.line for term in some if term.line), None)
                        found[part] = Found(kinds, line, (self.backward.steps[step],))
        return found

    def _amount(self, term, amount):
        """What kind of mistake it is that there is so much of a term."""
        if abs(amount) <= CLOSE:
            return f"missing term: without {term.words}"
        words = _factor(self, amount)[0]
        return f"{words}: of {term.words}" if words.startswith("sign:") else f"{words} (of {term.words} alone)"

    def _rearranged(self, wrong):
        return {part: found for part in wrong if (found := _places(self, part, wrong[part])) is not None}

    # The ladder

    def hints(self, verdicts):
        """What is wrong, as Hints: results of which the same is found have one."""
        groups = {}
        for part, verdict in verdicts.items():
            if verdict is not None and verdict.found is not None:
                found = verdict.found
                groups.setdefault((found.kinds, found.line) if found.kinds else None, []).append(part)
        return [self._hint(parts, verdicts) for parts in groups.values()]

    def _hint(self, parts, verdicts):
        found = verdicts[parts[0]].found
        steps = [step.target for step in dict.fromkeys(found.steps)]
        line = found.line
        where = f"in what makes {' and '.join(dict.fromkeys(steps))}" if steps else ""
        return Hint(tuple(parts), self._where(parts), line, where, found.kinds)

    def _where(self, parts):
        """Which results are wrong, which steps are therefore suspect, and which entries."""
        names = " and ".join(parts)
        words = f"{names} {'is' if len(parts) == 1 else 'are'} wrong"
        if self.fine:
            words = f"{' and '.join(self.fine)} {'is' if len(self.fine) == 1 else 'are'} right, {words}"
        helpers = {helper for helper, _, _ in self.lesson.slopes}
        if helpers & set(parts):
            return f"{words}: begin with {' and '.join(helpers & set(parts))}, which was measured by itself"
        suspects = {}
        for i, step in enumerate(self.backward.steps):
            reached = self.backward.reached(i, self.right) - helpers
            if reached >= set(parts) and not reached & set(self.fine):
                suspects[step.target] = None
        suspects = [name for name in suspects if name not in parts]
        if suspects:
            *before, last = suspects
            words += f": it is in {last}" + (f", or before it in {' or '.join(before[::-1])}" if before else "")
            words += "" if len(parts) > 1 else ", or in the line itself"
        entries = {self._entries(part) for part in parts if self.got[part].shape == self.right[part].shape}
        if len(entries) == 1 and (only := entries.pop()):
            words += f"; {only}"
        return words

    def _entries(self, part):
        """Words for which entries of a result are wrong; nothing where that says nothing."""
        wrong = relative_error(self.got[part], self.right[part]) > BOUND
        for words, mask in self.lesson.places(**self.values).get(part, {}).items():
            if np.array_equal(wrong, mask):
                return f"wrong are {words}, and no others"
            if not (wrong & ~mask).any():
                return f"wrong are only some of {words}"
        for axis, per in enumerate(AXES.get(wrong.ndim, ())):
            others = tuple(other for other in range(wrong.ndim) if other != axis)
            places = np.flatnonzero(wrong.any(axis=others))
            if 2 * len(places) <= wrong.shape[axis]:
                return f"wrong is only {per} {', '.join(map(str, places))}"
            fine = np.flatnonzero(~wrong.any(axis=others))
            if 0 < len(fine):
                return f"{per} {', '.join(map(str, fine))} is right"
        return ""


@dataclass
class Found:
    """What has been found of a wrong result: kinds of mistakes, the forward's line, the backward's steps."""

    kinds: tuple = ()
    line: str | None = None
    steps: tuple = ()


@dataclass
class Verdict:
    error: float  # the worst relative one
    wrong: str = ""  # what is wrong, if something is
    found: Found | None = None


@dataclass(frozen=True)
class Hint:
    """A ladder."""

    results: tuple
    where: str  # which results, and which entries
    line: str | None  # of the forward
    step: str  # of the backward, in words
    kinds: tuple  # each a mistake

    def rungs(self):
        yield self.where + "."
        yield f"Look at the forward's line:  {self.line}" + (f"  ({self.step})" if self.step else "")
        if self.kinds:
            yield "; and ".join(self.kinds) + "."


def ladder(hints, more):
    """The lines of hints, each up to its rung 1 + more."""
    for hint in hints:
        rungs = list(hint.rungs())
        yield from (f"  {'hint: ' if n == 0 else '      '}{rung}" for n, rung in enumerate(rungs[: 1 + more]))
    if any(more + 1 < len(list(hint.rungs())) for hint in hints):
        yield f"  to be told more:  check ... {' '.join(['--more'] * (more + 1))}"


# --------------------------------------------------------------------------------------------------------------------
# Kinds of mistakes that show in any array


def ratio(got, wrong):
    """c with got = c * wrong, or None."""
    if got.shape != wrong.shape or not np.isfinite(got).all() or not wrong.any():
        return None
    c = float((got * wrong).sum() / (wrong * wrong).sum())
    close = np.abs(got - c * wrong).max() <= CLOSE * abs(c) * np.abs(wrong).max()
    return c if c and close else None


RESHAPED = "right numbers at wrong places: reshape keeps the order in memory, transpose exchanges axes"


def _plain_mistake(case, name, got):
    """A Found for what can be seen at once, or None."""
    right, so_far = case.right[name], case.so_far.get(name)
    if not np.isfinite(got).all():
        return Found(("not finite: a division by 0, or a logarithm or exponential out of bounds",))
    if so_far is not None:
        if _near(got, so_far):
            return Found(("nothing was added: the gradient is what it was before",))
        if ratio(got, right - so_far) is not None:
            words = "overwritten: add to the gradient so far; another op, as the tied output layer, left its share"
            return Found((words,))
        got, right = got - so_far, right - so_far
    if not got.any():
        return Found(("all zeros: nothing has been written into it",))
    c = ratio(got, right)
    if c is not None:
        words, line = _factor(case, c)
        return Found((words,), line)
    for other, array in case.parts.items():
        mine = case.right[name]
        if other != name and _near(case.got[name], array) and other in case.got and _near(case.got[other], mine):
            return Found((f"wrong place: this is {other}, and what stands there is {name}",))
    is_wrong, is_zero = _wrong_and_zero(got, right)
    if not (is_wrong & ~is_zero).any():
        return Found((f"wrong mask: it must be 0 {case.lesson.zeros}",))
    return None


def _places(case, name, got):
    """A Found for right numbers at wrong places and for what is wrong in a regular way, or None."""
    got, right = case._change(name, got), case._change(name, case.right[name])
    for other, array in case.parts.items():
        if other != name and ratio(got, case._change(other, array)) is not None:
            return Found((f"wrong place: this is {other}",))
    if right.ndim > 1 and ratio(got.reshape(right.shape[::-1]).T, right) is not None:
        return Found(("transposed, then reshaped: reshape makes the shape right but does not exchange axes",))
    if _near(np.sort(got, axis=None), np.sort(right, axis=None)):
        return Found((RESHAPED,))
    is_wrong, is_zero = _wrong_and_zero(got, right)
    if not got[is_wrong].any() or not got[~is_zero].any():
        return Found(("wrong mask: it is 0 where it must not be",))
    if right.ndim == 2 and not is_zero.any():
        quotients = got / right
        for axis, per in ((1, "row"), (0, "column")):
            if (np.ptp(quotients, axis=axis) <= CLOSE * np.abs(quotients).max(axis=axis)).all():
                return Found((f"missing factor: it is the same in a whole {per}, and differs from {per} to {per}",))
    return None


def _wrong_and_zero(got, right):
    """Masks: what is wrong, and what is 0 or should be."""
    return relative_error(got, right) > BOUND, np.abs(right) <= CLOSE * CLOSE * np.abs(right).max()


def _shape_mistake(case, name, got, right):
    """A Found for a result of another shape."""
    for other, array in case.parts.items():
        if other != name and _near(got, array):
            return Found((f"wrong place: this is {other}; mind the order of the results",))

    def besides(array):
        """What is wrong with it even when it has the right shape."""
        return () if _near(array, right) else case._found({name: array})[name].kinds

    if got.size == right.size and ratio(got.reshape(right.shape), right) is not None:
        words = "right numbers with another shape: an axis of length 1 too many or too few (keepdims?)"
        return Found((words, *besides(got.reshape(right.shape))))
    if got.shape == right.shape[::-1]:
        words = "transposed: write the product down with indices: which index comes first?"
        return Found((words, *besides(got.T)))
    if got.ndim > right.ndim:
        for axes in itertools.combinations(range(got.ndim), got.ndim - right.ndim):
            if tuple(n for axis, n in enumerate(got.shape) if axis not in axes) != right.shape:
                continue
            total = got.sum(axis=axes)
            many = right.ndim == 1 and all(got.shape[axis] in case.many for axis in axes)
            if ratio(total, right) is not None or many:
                names = " and ".join(f"{axis} (length {got.shape[axis]})" for axis in axes)
                words = f"missing sum over the broadcast axis {names}: the forward used one number many times"
                return Found((words, *besides(total)))
    if got.ndim < right.ndim:
        return Found(("a sum too many: fewer axes than what it is the gradient of",))
    names = [n for n, length in case.lengths.items() if got.shape == (length,)]
    if names and right.ndim == 1:
        return Found((f"wrong axis: it was summed over, and what is left is the axis {names[0]}",))
    return Found(("wrong shape: a gradient has the shape of what it is the gradient of",))


def _factor(case, c):
    """(words for a result that is c times what it must be, line)."""
    if _is(c, 1):
        return "rounding: it is nearly right; is something float32 on the way?", None
    if _is(c, -1):
        return "sign: every entry has the wrong one", None

    def times(sign, factor):  # in as few digits as tell it from 1
        figures = next(text for n in (4, 6, 8, 10) if (text := f"{factor:.{n}g}").strip("-") != "1" or n == 10)
        return f"{sign}constant factor: every entry is {figures} times what it must be"

    ways = ("", c), ("sign, and ", -c)
    for sign, factor in ways:
        for name, n in case.lengths.items():
            if _is(factor, 1 / n):
                return f"{sign}mean instead of sum: every entry is 1/{n} of what is right, and {name} = {n}", None
            if _is(factor, n):
                return f"{sign}sum instead of mean: every entry is {n} times too large, and {name} = {n}", None
        for name, (value, line) in case.factors.items():
            for power, called in ((value, name), (1 / value, f"1 / ({name})" if " " in name else f"1 / {name}")):
                if _is(factor, power):
                    return f"{times(sign, factor)}, which is {called}", line
    return times(*ways[c < 0]), None  # the one whose factor is positive


def _is(c, value):
    return math.isclose(c, value, rel_tol=CLOSE)


def _near(a, b):
    return a.shape == b.shape and np.abs(a - b).max(initial=0) <= CLOSE * np.abs(b).max(initial=0)
