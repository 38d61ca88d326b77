"""Proof: why a gradient that is right for one random choice of whole numbers is right for all numbers.

You will understand

- which mistakes finite differences let pass,
- how to compute without any rounding: with whole numbers modulo a prime,
- why two formulas that agree at one random point are the same formula, but for a tiny chance,
- how that proves softmax's backward, although e^x is no polynomial.

Counterpart: npgpt/study/field.py, which has such numbers in NumPy's arrays, and `python -m npgpt.prove`.
Next: `python -m npgpt.prove`, which proves the backward of every op, and of a whole GPT, in a few seconds.
Try it: let `backward` return dp in the place of ds.  Say first which checks will be WRONG, and which will still pass.

    python examples/16_proof.py
"""

import random

import numpy as np
from checks import check, difference, finish

from npgpt import Tensor
from npgpt.gradcheck import BOUND, numeric_grad

rng = np.random.default_rng(16)
draw = random.Random(16)

# --------------------------------------------------------------------------------------------------------------------
# What finite differences let pass.  Softmax makes p_j = e^(s_j) / sum e^s of a row s.  Its backward is
#
#     ds_j = p_j (dp_j - sum_i dp_i p_i)
#
# as 06_attention.py derives.  Let somebody write a billionth too much of the sum.


def softmax(s):
    e = np.exp(s)
    return e / e.sum()


def backward(dp, p, of_sum=1):
    """ds for a row; of_sum: how much of the sum is taken off, which should be 1."""
    return p * (dp - (dp * p).sum() * of_sum)


s, dp = rng.normal(size=5), rng.normal(size=5)
numeric = numeric_grad(lambda: softmax(s), Tensor(s), dp)
right, wrong = backward(dp, softmax(s)), backward(dp, softmax(s), 1 + 1e-9)
print(f"error of the right formula {difference(right, numeric):.1e}, of the wrong one {difference(wrong, numeric):.1e}")
check("the right formula, by finite differences", difference(right, numeric), BOUND)
check("the wrong formula, by finite differences (it passes!)", difference(wrong, numeric), BOUND)

# Finite differences have an error of their own, and so have floats.  A bound must leave room for both, and a mistake
# that is smaller hides in this room.  So let us compute with numbers that are never rounded.

# --------------------------------------------------------------------------------------------------------------------
# Whole numbers modulo a prime P.  After each step only the remainder of a division by P is kept, 0 .. P - 1.  Sums and
# products are exact.  One can even divide: for each b but 0 there is exactly one number whose product with b is 1.  It
# is b^(P - 2), by Fermat's little theorem, and Python's pow(b, -1, P) finds it.

P = 2**61 - 1  # a prime, so large that a number fits into 64 bits

third = pow(3, -1, P)
print(f"\n1/3 is {third}, as 3 times that is {3 * third % P}")
a, b, c = (draw.randrange(1, P) for _ in range(3))
check("(a + b) / c, and a / c + b / c", ((a + b) * pow(c, -1, P) - a * pow(c, -1, P) - b * pow(c, -1, P)) % P, 0)

# A float is a fraction, too: 1e-9 is a whole number divided by a power of two.  So it is one of these numbers, exactly.


def exactly(x):
    """The number for a float."""
    above, below = float(x).as_integer_ratio()
    return above * pow(below, -1, P) % P


check("1 + 1e-9 that is taken for 1", exactly(1 + 1e-9) == 1, 0)
check("0.5 + 0.25, and 0.75", (exactly(0.5) + exactly(0.25) - exactly(0.75)) % P, 0)

# --------------------------------------------------------------------------------------------------------------------
# Why one random point is enough.  Let f and g be polynomials of degree d.  If they differ, f - g is a polynomial that
# is not 0.  A polynomial of degree d in one variable has d zeros at most, also modulo a prime.  So if a number is drawn
# from all P, f and g agree there with a chance of d / P at most.  For several variables the same holds (Schwartz 1980,
# Zippel 1979).  With the prime 101 one can look at all points:

small = 101


def chance_of_zero(f, n):
    """Of all points of n variables modulo 101, the share where f is 0."""
    points = np.stack(np.meshgrid(*[np.arange(small)] * n), axis=-1).reshape(-1, n)
    return (f(*points.T) % small == 0).mean()


print("\npolynomial      degree  share of zeros   d / 101")
for name, f, n, d in (
    ("x^3 - x", lambda x: x**3 - x, 1, 3),
    ("x y - 1", lambda x, y: x * y - 1, 2, 2),
    ("(x + y)^2 - x^2", lambda x, y: (x + y) ** 2 - x**2, 2, 2),
):
    share = chance_of_zero(f, n)
    print(f"{name:<15} {d:6}  {share:14.4f}  {d / small:8.4f}")
    check(f"{name}: zeros, at most d / 101", share, d / small)

# With P = 2^61 - 1 a degree of a thousand leaves a chance of 4e-16.  Nobody has to look at all points.

print(f"degree 1000 modulo 2^61 - 1: a chance of {1000 / P:.0e}")

# --------------------------------------------------------------------------------------------------------------------
# Derivatives without limits.  A dual number is a value and a slope: how fast the value grows along one direction.  Sums
# add both.  The product rule is (a b)' = a' b + a b', and 1 / b has the slope -b' / b^2.
#
# But what is e^x?  There is no such number here.  All that a backward may use of it is that its slope is e^x x'.  So
# for each new x a random number is drawn, as if e^x were a variable of its own.  A formula that holds for any values
# of these variables holds for the true ones, too.


known = {}  # x -> the number that stands for e^x


class Dual:
    def __init__(self, value, slope=0):
        self.value, self.slope = value % P, slope % P

    def __add__(self, other):
        return Dual(self.value + other.value, self.slope + other.slope)

    def __sub__(self, other):
        return Dual(self.value - other.value, self.slope - other.slope)

    def __mul__(self, other):
        return Dual(self.value * other.value, self.slope * other.value + self.value * other.slope)

    def __truediv__(self, other):
        value = pow(other.value, -1, P)
        return self * Dual(value, -other.slope * value * value)

    def exp(self):
        e = known.setdefault(self.value, draw.randrange(1, P))
        return Dual(e, e * self.slope)


x, y = Dual(3, 1), Dual(5, 0)  # x moves, y does not
check("the slope of x y / (x + y), which is y^2 / (x + y)^2", ((x * y / (x + y)).slope * 64 - 25) % P, 0)
check("e^x is the same number when it is asked for again", x.exp().value - Dual(3).exp().value, 0)

# --------------------------------------------------------------------------------------------------------------------
# The proof.  s and dp are drawn at random, and so is a direction v along which s moves.  There are two ways to the
# slope of L = sum_j dp_j p_j.  Forward mode follows the forward, number by number.  The backward gives ds, and the
# slope is sum_j ds_j v_j.  Both are rational functions of s, dp, v and the numbers e^s.  If they are one and the same
# number here, they are the same function modulo P, but for the chance above.
#
# NumPy adds and multiplies arrays of any objects, and np.exp asks each for its exp().  So `softmax` and `backward` are
# those from above: what is proved is what was written.


def row(numbers, slopes=(0,) * 5):
    return np.array([Dual(*pair) for pair in zip(numbers, slopes, strict=True)])


def two_slopes(of_sum=1):
    """The slope of L by forward mode, and by the backward."""
    s, dp, v = ([draw.randrange(P) for _ in range(5)] for _ in range(3))
    forward_mode = (row(dp) * softmax(row(s, v))).sum().slope
    ds = backward(row(dp), softmax(row(s)), Dual(of_sum))
    return forward_mode, (ds * row(v)).sum().value


print("\nslope of L      by forward mode      by the backward")
amounts = {"right": 1, "1 + 1e-9 of it": exactly(1 + 1e-9), "no sum": 0, "1 + P times it": 1 + P}
found = {name: two_slopes(of_sum) for name, of_sum in amounts.items()}
for name, (forward_mode, by_backward) in found.items():
    print(f"{name:<15} {forward_mode:<20} {by_backward}")
check("the right formula: digits that differ", found["right"][0] != found["right"][1], 0)
check("a billionth too much: taken for right", found["1 + 1e-9 of it"][0] == found["1 + 1e-9 of it"][1], 0)
check("the sum left out: taken for right", found["no sum"][0] == found["no sum"][1], 0)

# And what holds modulo P, does it hold for real numbers?  Clear the denominators: the difference of both slopes is a
# polynomial whose coefficients are whole numbers.  It is 0 modulo P if each of them is a multiple of P.  So a formula
# that takes 1 + P times the sum passes, and is wrong.  Nobody writes 2^61 by accident.

check("1 + P times the sum: it passes", found["1 + P times it"][0] != found["1 + P times it"][1], 0)

# Why a prime?  Modulo 8 the polynomial x^2 - 1 has four zeros, 1, 3, 5 and 7, and one cannot divide by 2.  Why not
# fractions?  They are exact, too, but their digits grow with each step.
#
# A formula may be right and yet not pass: where it needs e^(a + b) = e^a e^b, which this `exp` does not know.
#
# What is the degree?  Multiply both slopes by (sum e^s)^2, which is not 0.  What is left are products of one dp, one v
# and two of the e^s: degree 4.  So a wrong formula like these passes with a chance of some 4 / P, which is 2e-18.
#
# What is proved is the formula, as a function of exact numbers.  It is not proved how floats round: e^1000 overflows,
# and this proof does not see it.  Nor that a compiled kernel computes what the formula says.  npgpt's tests hold each
# kernel to its reference, and finite differences look at the whole.  Nor that this is the forward that you want: the
# backward of another one, without a mask, say, would be proved as well.
#
# `python -m npgpt.prove` runs npgpt's own references, from npgpt/ops/, on such numbers, in one shape each.  It has
# rules for a maximum, a logarithm, a root and tanh as well, and knows that e^(a - log y) is e^a / y.  It bounds the
# degree by itself, for each op and for a GPT of two layers.  Its chance is larger than d / P: it counts, too, that two
# different arguments of e^x may be one number by chance.

finish()
