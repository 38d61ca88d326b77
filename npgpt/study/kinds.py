"""Kinds of mistakes that show in any array: its shape, a factor, a sign, right numbers at wrong places.

Each function takes a Case of hints.py, and returns what it has Found of a result, or None.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from npgpt.gradcheck import BOUND, relative_error
from npgpt.study.mistakes import CLOSE, near


@dataclass
class Found:
    """What has been found of a wrong result: kinds of mistakes, the forward's line, the backward's steps."""

    kinds: tuple = ()
    line: str | None = None
    steps: tuple = ()


def ratio(got, wrong):
    """c with got = c * wrong, or None."""
    if got.shape != wrong.shape or not np.isfinite(got).all() or not wrong.any():
        return None
    c = float((got * wrong).sum() / (wrong * wrong).sum())
    close = np.abs(got - c * wrong).max() <= CLOSE * abs(c) * np.abs(wrong).max()
    return c if c and close else None


RESHAPED = "right numbers at wrong places: reshape keeps the order in memory, transpose exchanges axes"


def plain_mistake(case, name, got):
    """A Found for what can be seen at once, or None."""
    right, so_far = case.right[name], case.so_far.get(name)
    if not np.isfinite(got).all():
        return Found(("not finite: a division by 0, or a logarithm or exponential out of bounds",))
    if so_far is not None:
        if near(got, so_far):
            return Found(("nothing was added: the gradient is what it was before",))
        if ratio(got, right - so_far) is not None:
            words = "overwritten: add to the gradient so far; another op, as the tied output layer, left its share"
            return Found((words,))
        got, right = got - so_far, right - so_far
    if not got.any():
        return Found(("all zeros: nothing has been written into it",))
    if (c := ratio(got, right)) is not None:
        words, line = factor_of(case, c)
        return Found((words,), line)
    for other, array in case.parts.items():
        mine = case.right[name]
        if other != name and near(case.got[name], array) and other in case.got and near(case.got[other], mine):
            return Found((f"wrong place: this is {other}, and what stands there is {name}",))
    if got.size > 1 and np.ptp(got) == 0 and not (got % 1).any():
        return Found(("missing factor: it is the same everywhere, whatever the gradient is that comes in",))
    if not (got % 1).any() and (right % 1).any():
        return Found(("wrong dtype: every entry is a whole number: into an array of which dtype was it written?",))
    is_wrong, is_zero = _wrong_and_zero(got, right)
    if not (is_wrong & ~is_zero).any():
        return Found((f"wrong mask: it must be 0 {case.lesson.zeros}",))
    return None


def places(case, name, got):
    """A Found for right numbers at wrong places and for what is wrong in a regular way, or None."""
    got, right = case._change(name, got), case._change(name, case.right[name])
    for other, array in case.parts.items():
        if other != name and ratio(got, case._change(other, array)) is not None:
            return Found((f"wrong place: this is {other}",))
    if right.ndim > 1 and ratio(got.reshape(right.shape[::-1]).T, right) is not None:
        return Found(("transposed, then reshaped: reshape makes the shape right but does not exchange axes",))
    if right.ndim == 2 and near(got.sum(axis=0), right.sum(axis=0)):
        return Found(("wrong index: the sum of all rows is right, but what belongs to one went to another",))
    if near(np.sort(got, axis=None), np.sort(right, axis=None)):
        return Found((RESHAPED,))
    is_wrong, is_zero = _wrong_and_zero(got, right)
    if not got[is_wrong].any() or not got[~is_zero].any():
        return Found(("wrong mask: it is 0 where it must not be",))
    both = (got != 0) & ~is_zero
    if both.any() and near(got[both], right[both]) and got[is_zero].any() and not got[~is_zero].all():
        return Found(("wrong mask: another one than the forward's, which can be made again from what is given",))
    if right.ndim == 2 and not is_zero.any():
        quotients = got / right
        for axis, per in ((1, "row"), (0, "column")):
            if (np.ptp(quotients, axis=axis) <= CLOSE * np.abs(quotients).max(axis=axis)).all():
                name, power = power_in(case, quotients[:, 0]) if axis else ("", 0)
                if power and not is_near(power, -1):
                    return Found((f"wrong power: {name} has another one",))
                return Found((f"missing factor: it is the same in a whole {per}, and differs from {per} to {per}",))
    return None


def power_in(case, amounts):
    """(name, power) if one number for each row is a power of something that each row has one of, else ("", 0)."""
    for name, value in case.values.items():
        if isinstance(value, np.ndarray) and value.shape == amounts.shape and (value > 0).all():
            (power, _), residuals, *_ = np.polyfit(np.log(value), np.log(np.abs(amounts)), 1, full=True)
            if residuals.size and residuals[0] <= CLOSE * CLOSE and abs(power) > CLOSE:
                return name, float(power)
    return "", 0


def _wrong_and_zero(got, right):
    """Masks: what is wrong, and what is 0 or should be."""
    return relative_error(got, right) > BOUND, np.abs(right) <= CLOSE * CLOSE * np.abs(right).max()


def shape_mistake(case, name, got, right):
    """A Found for a result of another shape."""
    for other, array in case.parts.items():
        if other != name and near(got, array):
            return Found((f"wrong place: this is {other}; mind the order of the results",))

    def besides(array):
        """What is wrong with it even when it has the right shape."""
        return () if near(array, right) else case.found({name: array})[name].kinds

    if got.size == right.size and ratio(got.reshape(right.shape), right) is not None:
        words = "right numbers with another shape: an axis of length 1 too many or too few (keepdims?)"
        return Found((words, *besides(got.reshape(right.shape))))
    if got.shape == right.shape[::-1]:
        sure = "it is what is wanted, transposed" if ratio(got.T, right) is not None else "its shape is"
        words = f"transposed: {sure}; write the product down with indices: which index comes first?"
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


def factor_of(case, c):
    """(words for a result that is c times what it must be, line)."""
    if is_near(c, 1):
        return "rounding: it is nearly right; is something float32 on the way?", None
    if is_near(c, -1):
        return "sign: every entry has the wrong one", None

    def times(sign, factor):  # in as few digits as tell it from 1
        figures = next(text for n in (4, 6, 8, 10) if (text := f"{factor:.{n}g}").strip("-") != "1" or n == 10)
        return f"{sign}constant factor: every entry is {figures} times what it must be"

    ways = ("", c), ("sign, and ", -c)
    for sign, factor in ways:
        for name, n in case.lengths.items():
            if is_near(factor, 1 / n):
                return f"{sign}mean instead of sum: every entry is 1/{n} of what is right, and {name} = {n}", None
            if is_near(factor, n):
                return f"{sign}sum instead of mean: every entry is {n} times too large, and {name} = {n}", None
        for name, (value, line) in case.factors.items():
            for power, called in ((value, name), (1 / value, f"1 / ({name})" if " " in name else f"1 / {name}")):
                if is_near(factor, power):
                    return f"{times(sign, factor)}, which is {called}", line
    return times(*ways[c < 0]), None  # the one whose factor is positive


def is_near(c, value):
    return math.isclose(c, value, rel_tol=CLOSE)
