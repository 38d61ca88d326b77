"""What kind of mistake is it?  A wrong gradient is compared with what the usual mistakes would have made of it.

For what is wrong, `Case.compare` finds

- the kinds of mistakes that can be seen in any array: a shape that is transposed or not summed, a constant factor (and
  which length it is), a sign, right numbers at wrong places, entries that should be 0;
- the lesson's, which know the op: a term that is missing, a value that was taken for another.  Each is the wrong
  result itself, computed; who has the same figures has made that mistake.

A hint leads to the line of the forward that was undone wrongly; what to write is left to the reader.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from npgpt.gradcheck import BOUND, numeric_grad, relative_error
from npgpt.study.lesson import New
from npgpt.tensor import Tensor

CLOSE = 1e-6  # two arrays are the same if they differ by less than this share of the larger one's largest entry


class Case:
    """Numbers for an op; what its backward must return is measured by finite differences of its forward.

    values   what the backward is given, by name
    so_far   result -> what stood in it before, for a backward that adds in place
    right    result, or part of a result that the lesson looks at in parts -> what it must be
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
        for name in lesson.results:
            change = numeric_grad(lambda: lesson.outputs(inputs)[0], Tensor(inputs[name[1:]]), dy)
            self.right[name] = change + self.so_far.get(name, 0)
            self.parts |= self._parts(name, self.right[name])
        self.right |= self.parts
        self.lengths = {name: lesson.sizes[name] for name in lesson.lengths}
        self.factors = lesson.factors(**self.values)

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
        """{part: its Verdict} of what a backward returns, {name: array}; None for what is None."""
        verdicts, self.got = {}, {}
        for name, array in results.items():
            if array is None:
                verdicts[name] = None
            elif np.iscomplexobj(array):
                verdicts[name] = Verdict(math.inf, "it is complex, and a gradient is real")
            else:
                self.got |= (parts := self._parts(name, array))
                verdicts |= dict.fromkeys(parts)
        for part in self.got:
            verdicts[part] = self._verdict(part)
        names, line = self.lesson.shared
        through = [verdicts.get(part) for part in names]
        if all(through) and len({(verdict.kind, verdict.line) for verdict in through}) == 1:
            for verdict in through:
                verdict.line = verdict.line or line
        for part in self.got:
            verdicts[part].line = verdicts[part].line or self.lesson.lines[part]
        return verdicts

    def _verdict(self, part):
        got, right = self.got[part], self.right[part]
        if got.shape != right.shape:
            error, wrong = math.inf, f"its shape is {got.shape}, it must be {right.shape}"
        else:
            errors = relative_error(got, right)
            worst = np.unravel_index(errors.argmax(), errors.shape)
            error, index = float(errors[worst]), list(map(int, worst))
            if error <= BOUND:
                return Verdict(error)
            wrong = f"worst at {index}: yours {got[worst]:.6g}, finite differences {right[worst]:.6g}"
            wrong += f"; {(errors > BOUND).sum()} of {right.size} entries are wrong"
        return Verdict(error, wrong, *_mistake(self, part, got, right))


@dataclass
class Verdict:
    error: float  # the worst relative one
    wrong: str = ""  # what is wrong, if something is
    kind: str = ""  # what kind of mistake that is
    line: str | None = None  # the line of the forward that it has to do with

    @property
    def hint(self):
        stop = "" if self.kind.endswith("?") else "."
        return f"{self.kind}{stop} Look at the forward's line:  {self.line}" if self.kind else ""


# --------------------------------------------------------------------------------------------------------------------
# Kinds of mistakes that show in any array


def ratio(got, wrong):
    """c with got = c * wrong, or None."""
    if got.shape != wrong.shape or not np.isfinite(got).all() or not wrong.any():
        return None
    c = float((got * wrong).sum() / (wrong * wrong).sum())
    close = np.abs(got - c * wrong).max() <= CLOSE * abs(c) * np.abs(wrong).max()
    return c if c and close else None


def _mistake(case, name, got, right):
    """(what kind of mistake it is, the line of the forward that has to do with it, or None)."""
    if got.shape != right.shape:
        return _shape_mistake(case, name, got, right)
    if not np.isfinite(got).all():
        return "not finite: a division by 0, or a logarithm or exponential out of bounds", None
    so_far = case.so_far.get(name)
    if so_far is not None:
        if _near(got, so_far):
            return "nothing was added: the gradient is what it was before", None
        if ratio(got, right - so_far) is not None:
            return "overwritten: add to the gradient so far; another op, as the tied output layer, left its share", None
        got, right = got - so_far, right - so_far
    if not got.any():
        return "all zeros: nothing has been written into it", None
    c = ratio(got, right)
    if c is not None:
        return _factor(case, c)
    for other, array in case.parts.items():
        mine = case.right[name]
        if other != name and _near(case.got[name], array) and other in case.got and _near(case.got[other], mine):
            return f"wrong place: this is {other}, and what stands there is {name}", None
    is_wrong = relative_error(got, right) > BOUND
    is_zero = np.abs(right) <= CLOSE * CLOSE * np.abs(right).max()  # or should be
    if not (is_wrong & ~is_zero).any():
        return f"wrong mask: it must be 0 {case.lesson.zeros}", None
    for result, words, wrong, line in case.lesson.mistakes(*case.values.values()):
        c = ratio(got, wrong) if result == name else None
        if c is not None:
            return words + ("" if _is(c, 1) else f"; besides, a {_factor(case, c)[0]}"), line
    for other, array in case.parts.items():
        if other != name and ratio(got, array - case.so_far.get(other, 0)) is not None:
            return f"wrong place: this is {other}", None
    if right.ndim > 1 and ratio(got.reshape(right.shape[::-1]).T, right) is not None:
        return "transposed, then reshaped: reshape makes the shape right but does not exchange axes", None
    if _near(np.sort(got, axis=None), np.sort(right, axis=None)):
        return "right numbers at wrong places: reshape keeps the order in memory, transpose exchanges axes", None
    return _where(got, right, is_wrong, is_zero)


def _shape_mistake(case, name, got, right):
    for other, array in case.parts.items():
        if other != name and _near(got, array):
            return f"wrong place: this is {other}; mind the order of the results", None
    if got.size == right.size and ratio(got.reshape(right.shape), right) is not None:
        return "right numbers with another shape: an axis of length 1 too many or too few (keepdims?)", None
    if got.shape == right.shape[::-1]:
        sure = "it is what is wanted, transposed" if ratio(got.T, right) is not None else "the shape is the transpose's"
        return f"transposed: {sure}. Write the product down with indices: which index comes first?", None
    if got.ndim > right.ndim:
        for axes in itertools.combinations(range(got.ndim), got.ndim - right.ndim):
            if tuple(n for axis, n in enumerate(got.shape) if axis not in axes) != right.shape:
                continue
            total = got.sum(axis=axes)
            many = right.ndim == 1 and all(got.shape[axis] in case.many for axis in axes)
            if ratio(total, right) is not None or many:
                names = " and ".join(f"{axis} (length {got.shape[axis]})" for axis in axes)
                words = f"missing sum over the broadcast axis {names}: the forward used one number many times"
                if not _near(total, right):
                    words += f"; and summed, it is still wrong: {_mistake(case, name, total, right)[0]}"
                return words, None
    if got.ndim < right.ndim:
        return "a sum too many: fewer axes than what it is the gradient of", None
    names = [n for n, length in case.lengths.items() if got.shape == (length,)]
    if names and right.ndim == 1:
        return f"summed over the wrong axis: what is left is the axis {names[0]}", None
    return "a gradient has the shape of what it is the gradient of", None


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


def _where(got, right, is_wrong, is_zero):
    """Words that tell no more than where the wrong entries are."""
    if not got[is_wrong].any() or not got[~is_zero].any():
        return "wrong mask: it is 0 where it must not be", None
    if right.ndim == 2:
        if not is_zero.any():
            quotients = got / right
            for axis, per in ((1, "row"), (0, "column")):
                if (np.ptp(quotients, axis=axis) <= CLOSE * np.abs(quotients).max(axis=axis)).all():
                    return f"missing factor: it is the same in a whole {per}, and differs from {per} to {per}", None
        for axis, per in ((1, "row"), (0, "column")):
            places = np.flatnonzero(is_wrong.any(axis=axis))
            if 2 * len(places) <= right.shape[1 - axis]:
                return f"wrong in the {per}s {', '.join(map(str, places))} only: what is special there?", None
    return "none of the usual mistakes: undo the forward line by line, from its last line back to this one", None


def of_exception(error, text):
    """A hint for the usual exceptions of arrays that do not fit, or an empty string.  text: the exception's."""
    if isinstance(error, ValueError) and "matmul" in text:
        return "transpose: the inner axes of a matrix product must be the same; write it down with indices"
    if isinstance(error, ValueError) and "broadcast" in text:
        return (
            "missing sum, or missing axis: over what the forward broadcast, the backward sums; and what has one number "
            "for each row needs an axis of length 1 beside the rows: keepdims=True, or [:, None]"
        )
    return ""
