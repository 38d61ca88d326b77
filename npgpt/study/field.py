"""Exact numbers with derivatives, for the references to run on: integers modulo a prime, in NumPy's arrays.

A Number is an integer modulo P, where + - * and / are exact.  A Dual is a value and a slope, its derivative along one
direction (forward mode): (a b)' = a' b + a b'.  A DualArray is a NumPy array of Duals.

exp, tanh and the root have no value among these integers.  So a Point invents one, at random, for each new argument.
What stays is how they are differentiated, and the little that references know of them beside that:

    exp    e' = e x'          exp(x + log y) = exp(x) y, and exp(x - m) = exp(x) / exp(m) for a maximum m
    tanh   t' = (1 - t^2) x'
    sqrt   r' = x' / (2 r)    where x is v + eps: the formula for that eps for which r^2 is v + eps
    log    y' / y             it remembers y, for exp
    max    one of the elements; which one, and whether x > 0, is a function of the residues, the same at each call
    -inf   less than all others, and exp(-inf) = 0

An equation between formulas that holds by these rules holds for the functions, which have the same rules.  And one that
does not hold shows: a polynomial that is not 0, of degree d, is 0 at a random point with a probability of d / P at most
(Schwartz 1980, Zippel 1979).  So each Number knows a bound of its degree.
"""

import math
import operator
import random

import numpy as np

from npgpt.context import ThreadState

P = 2**61 - 1  # a prime


class _State(ThreadState):
    point = None


_state = _State()


def at(point):
    """Within this context Duals are taken at this Point, in this thread."""
    return _state.within(point=point)


# --------------------------------------------------------------------------------------------------------------------
# Numbers, and the point at which they are taken


class Number:
    """An integer modulo P: what a quotient of polynomials, in the variables of a Point, is there.

    residue   0 .. P - 1
    degree    a bound k.  Let Q be the product of the divisors.  The quotient times Q^k is a polynomial, whose degree is
              that of Q^k and k more, at most.  So in a sum the larger k counts, and in a product the sum of both
    divisors  which polynomials it was divided by: bits, for their places in Point.divisors
    """

    __slots__ = ("residue", "degree", "divisors")

    def __init__(self, residue, degree=0, divisors=0):
        self.residue, self.degree, self.divisors = residue, degree, divisors

    def __add__(a, b):
        if a is ZERO or b is ZERO:
            return b if a is ZERO else a
        degree = a.degree if a.degree > b.degree else b.degree
        return Number((a.residue + b.residue) % P, degree, a.divisors | b.divisors)

    def __mul__(a, b):
        if a is ZERO or b is ZERO:
            return ZERO
        return Number(a.residue * b.residue % P, a.degree + b.degree, a.divisors | b.divisors)

    def __neg__(a):
        return a if a is ZERO else Number(-a.residue % P, a.degree, a.divisors)

    def inverse(self):
        return _state.point.inverse(self)


ZERO, ONE = Number(0), Number(1)


class Point:
    """A random point: a Number for each variable, and what exp, tanh, sqrt and log are at each argument.

    known     function -> {residue of an argument: the Number that the function is there}
    divisors  bounds of the degrees of what was divided by
    degree    the largest k of an argument
    """

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.known, self.divisors, self.degree = {}, [], 0

    def variable(self):
        """The Number of a new variable."""
        return Number(self.random.randrange(P), 1)

    def variables(self, shape):
        """An array of the Numbers of new variables."""
        return np.array([self.variable() for _ in range(math.prod(shape))], object).reshape(shape)

    def value(self, function, x):
        """What a function is at the Number x: a new variable for each new argument."""
        return self._once(function, x, self.variable)

    def inverse(self, x):
        """1 / x."""

        def new():
            if not x.degree:  # a constant
                return Number(pow(x.residue, -1, P))
            degree = x.degree * sum(n for i, n in enumerate(self.divisors) if x.divisors >> i & 1)  # of Q^k
            self.divisors.append(degree + x.degree)
            return Number(pow(x.residue, -1, P), max(1, degree), 1 << len(self.divisors) - 1)

        return self._once("constant" if not x.degree else "inverse", x, new)

    def _once(self, function, x, new):
        self.degree = max(self.degree, x.degree)
        known = self.known.setdefault(function, {})
        if x.residue not in known:
            known[x.residue] = new()
        return known[x.residue]

    def bound(self, difference):
        """Of a difference, a Number: a bound of its degree, and of the probability that it is 0 here by chance.

        Chance has it too if two arguments of a function are different polynomials, and one number here.
        """
        of_divisors = 1 + sum(self.divisors)
        pairs = sum(len(known) * (len(known) - 1) // 2 for known in self.known.values())
        degree = difference.degree * of_divisors
        return degree, (degree + pairs * self.degree * of_divisors) / P


# --------------------------------------------------------------------------------------------------------------------
# Numbers with a derivative


def _by_place(compare):
    return lambda a, b: compare(a._place(), dual(b)._place())


class Dual:
    """A Number with its slope along a direction.

    parts: (x, y), where it is x + log y, or None.
    """

    __slots__ = ("value", "slope", "parts")

    def __init__(self, value, slope=ZERO, parts=None):
        self.value, self.slope, self.parts = value, slope, parts

    def __add__(a, b):
        b = dual(b)
        if b is None or a is LOWEST or b is LOWEST:
            return NotImplemented if b is None else LOWEST
        parts = None
        if a.parts or b.parts:
            (x, y), (v, w) = a.parts or (a, UNIT), b.parts or (b, UNIT)
            parts = x + v, y * w
        return Dual(a.value + b.value, a.slope + b.slope, parts)

    def __mul__(a, b):
        b = dual(b)
        if b is None:
            return NotImplemented
        return Dual(a.value * b.value, a.slope * b.value + a.value * b.slope)

    def __neg__(a):
        return Dual(-a.value, -a.slope, a.parts and (-a.parts[0], a.parts[1].inverse()))

    def inverse(self):
        value = self.value.inverse()
        return Dual(value, -self.slope * value * value)

    def __sub__(a, b):
        b = dual(b)
        return NotImplemented if b is None else a + -b

    def __truediv__(a, b):
        b = dual(b)
        return NotImplemented if b is None else a * b.inverse()

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(a, b):
        return dual(b) - a

    def __rtruediv__(a, b):
        return dual(b) / a

    def __pow__(a, n):
        """a^n for a whole n, or one and a half, ...: then it is a power of the root."""
        if n % 1:
            return a.sqrt() ** (2 * n)
        power = math.prod([a] * int(abs(n)), start=UNIT)
        return power if n >= 0 else power.inverse()

    def __rpow__(a, base):
        return (a * float(np.log(base))).exp()

    # What NumPy's functions ask of an object

    def conjugate(self):  # for the variance
        return self

    def exp(self):
        if self is LOWEST:
            return dual(0)
        x, y = self.parts or (self, UNIT)
        e = _state.point.value("exp", x.value)
        return Dual(e, e * x.slope) * y

    def tanh(self):
        t = _state.point.value("tanh", self.value)
        return Dual(t, (ONE + -t * t) * self.slope)

    def sqrt(self):
        r = _state.point.value("sqrt", self.value)
        return Dual(r, self.slope * (r + r).inverse())

    def log(self):
        value = _state.point.value("log", self.value)
        return Dual(value, self.slope * self.value.inverse(), (dual(0), self))

    def as_maximum(self):
        """Itself, as a maximum whose share exp takes out of a difference."""
        return self if self is LOWEST else Dual(self.value, self.slope, (dual(0), self.exp()))

    # Order: of the numbers from -P/2 to P/2

    def _place(self):
        if self is LOWEST:
            return -P
        return self.value.residue if self.value.residue <= P // 2 else self.value.residue - P

    __eq__, __lt__, __le__, __gt__, __ge__ = map(
        _by_place, (operator.eq, operator.lt, operator.le, operator.gt, operator.ge)
    )


LOWEST, UNIT = Dual(None), Dual(ONE)  # -inf, and 1


def dual(x):
    """A Dual for it: itself, or a constant for a finite number, which a float is exactly; None for all else."""
    if isinstance(x, Dual):
        return x
    x = x.item() if isinstance(x, np.generic) else x
    if not isinstance(x, (int, float)) or math.isnan(x) or x == math.inf:
        return None
    if x == -math.inf:
        return LOWEST
    above, below = x.as_integer_ratio()
    return Dual(_constant(above) if below == 1 else _constant(above) * _constant(below).inverse())


def _constant(n):
    return Number(n % P) if n % P else ZERO


# --------------------------------------------------------------------------------------------------------------------
# Arrays


class DualArray(np.ndarray):
    """An array of Duals, whatever dtype it is asked for."""

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), dtype=None, **options):
        if ufunc is np.isfinite:
            return np.ones(inputs[0].shape, bool)
        if method == "at":
            return ufunc.at(*map(_plain, inputs))
        if out:
            options["out"] = tuple(map(_plain, out))
        result = getattr(ufunc, method)(*map(_plain, inputs), **options)
        if ufunc is np.maximum and method == "reduce":
            result = np.frompyfunc(Dual.as_maximum, 1, 1)(result)
        return out[0] if out else _array_of(result)

    def __array_function__(self, function, types, args, options):
        return _array_of(super().__array_function__(function, types, args, options))

    def __setitem__(self, index, values):
        self.view(np.ndarray)[index] = dual_array(values).view(np.ndarray)

    def astype(self, dtype, **options):
        return self


def dual_array(values):
    """A DualArray of an array, or of a number."""
    if isinstance(values, DualArray):
        return values
    return _to_duals(values, out=np.empty(np.shape(values), object)).view(DualArray)


def _plain(x):
    """What NumPy computes with as with any objects."""
    return x.view(np.ndarray) if isinstance(x, DualArray) else x


def _array_of(result):
    if isinstance(result, (list, tuple)):
        return type(result)(map(_array_of, result))
    return dual_array(result) if isinstance(result, np.ndarray) and result.dtype == object else result


_to_duals = np.frompyfunc(dual, 1, 1)
