"""bfloat16: half of a float32, what it does to products and gradients, and what must not be rounded.

You will understand

- what a bfloat16 is, and how a number is rounded to one by adding to its bits,
- why the operands of a product may be rounded, but its sums may not,
- how a gradient in bfloat16 is checked, where finite differences are too coarse,
- why weights and the moments of an optimizer stay float32.

Counterpart: npgpt/kernels/bfloat16.py, whose `rounded_ref` and `product_ref` say the same in a few lines.
Next: `python -m npgpt.train --dtype bfloat16`, on a processor that multiplies in this format.
Try it: let lr be 0.1 in `train`.  Say first whether weights in bfloat16 stall at the same loss as now, and why.

    python examples/15_bfloat16.py
"""

import numpy as np
from checks import check, difference, finish

from npgpt import Tensor
from npgpt.gradcheck import numeric_grad
from npgpt.kernels.bfloat16 import product_ref, rounded_ref

rng = np.random.default_rng(15)

# --------------------------------------------------------------------------------------------------------------------
# What it is.  A float32 has 32 bits: one for the sign, 8 for an exponent e, 23 for a fraction f.  It stands for
#
#     +- 1.f 2^(e - 127)          with 1.f written in base 2
#
# for e from 1 to 254.  (0 and the tiniest numbers have e = 0; on 255, see below.)  A bfloat16 is the upper half of a
# float32: the sign, all 8 bits of the exponent, and the first 7 bits of the fraction.  It has the range of a
# float32, but it has 8 digits in base 2, where a float32 has 24.  (The 1 before the point is a digit, too, and needs no
# bit.)  The spacing is the distance from a number to the next one.  For bfloat16 it is 2^-7 from 1 to 2, and twice that
# from 2 to 4.  So it doubles with each power of two, and is 2 from 256 to 512.


def bits_of(x):
    """float32 -> its 32 bits, as uint32."""
    return np.asarray(x, np.float32).view(np.uint32)


print("          sign exponent fraction: upper half, lower half")
for value in (1.0, 256.0, 257.0, 0.1):
    bits = f"{int(bits_of(value)):032b}"
    print(f"{value:8}     {bits[0]} {bits[1:9]} {bits[9:16]} {bits[16:]}")

# --------------------------------------------------------------------------------------------------------------------
# Rounding.  Take the lower half as a whole number, from 0 to 0xFFFF.  Its middle is 0x8000.  Below the middle, the
# nearest bfloat16 is the upper half as it stands.  Above, it is the upper half plus 1.  At 0x8000 both are as near, and
# the rule is to take the even one, whose last bit is 0.  (If all of these went up, sums of rounded numbers would
# drift.)
#
# One addition does all that.  Add 0x7FFF: a lower half above 0x8000 carries a 1 into the upper half, and 0x8000 itself
# just does not.  If the upper half is odd, add 1 more: now 0x8000 carries, and the upper half becomes even.  A carry
# may run through a fraction of ones into the exponent.  That is right: after 1.1111111 comes 10.000000, in base 2,
# which is 2.

UPPER = np.uint32(0xFFFF0000)


def nearest(bits):
    """The bits of float32 -> those of the nearest bfloat16, with a lower half of 0.  Not for NaN."""
    is_odd = (bits >> np.uint32(16)) & np.uint32(1)
    return (bits + np.uint32(0x7FFF) + is_odd) & UPPER


# The exponent e = 255 is kept for two things: with the fraction 0 it is infinity, with any other fraction it is NaN.
# Infinity stays infinity, and numbers half a spacing or more beyond the largest bfloat16 become infinity.  But a NaN
# can get lost.  If the ones of its fraction are all in the lower half of the float32, they are cut off, and infinity is
# left.  If its fraction is all ones, the carry runs on through the exponent into the sign, and 0x7FFFFFFF becomes -0.
# So a NaN is not rounded.  Its lower half is cut off, and the first bit of its fraction is set, so that the fraction is
# not 0.

nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFFC00000], np.uint32)


def rounded(x):
    """x, cast to float32 -> the nearest bfloat16, of two that are as near the even one, as float32."""
    bits = bits_of(x)
    return np.where(np.isnan(x), (bits & UPPER) | np.uint32(0x400000), nearest(bits)).view(np.float32)


print("\nNaN             ", *(f"{bits:#010x}" for bits in nans))
print("as a number     ", *(f"{bits:#010x}" for bits in nearest(nans)), "  which are", nearest(nans).view(np.float32))
print("as it should be ", *(f"{bits:#010x}" for bits in bits_of(rounded(nans.view(np.float32)))))
check("NaNs that were lost", (~np.isnan(rounded(nans.view(np.float32)))).sum(), 0)
check("infinities that were lost", (rounded([np.inf, -np.inf]) != [np.inf, -np.inf]).sum(), 0)

# Now the same without bits.  Write |x| as m 2^k with m from 1/2 to 1.  Then 256 m has 8 digits before the point, and
# np.rint gives the nearest whole number, of two the even one.  Below, half of 4000 numbers lie midway between two
# bfloat16.

bits = bits_of(rng.normal(size=4000))
bits[2000:] = (bits[2000:] & UPPER) | np.uint32(0x8000)
x32 = bits.view(np.float32)
m, k = np.frexp(x32.astype(np.float64))
check("rounded by bits, and by arithmetic", difference(rounded(x32), np.ldexp(np.rint(256 * m), k - 8)), 0)

# What becomes of 257?  It lies midway between 256 and 258.  The last bit of the fraction is 0 for 256, and 1 for 258.

some = np.array([255, 256, 257, 258, 259, 260.9])
print("\nx      ", *(f"{value:6}" for value in some), "\nrounded", *(f"{value:6}" for value in rounded(some)))
check("257, 259: to the even one", np.abs(rounded(some)[[2, 4]] - [256, 260]).max(), 0)

# --------------------------------------------------------------------------------------------------------------------
# Why not float16?  It has 5 bits of exponent and 10 of fraction.  So it is finer, but it ends at 65504, and numbers
# below 3e-8 become 0.  Many gradients are that small (Micikevicius et al. 2018, Mixed Precision Training).  So float16
# needs loss scaling: the loss is multiplied by a large number, and so all gradients are.  They are divided by that
# number before they are used.  bfloat16 has the range of float32, and needs no such thing (Kalamkar et al. 2019, A
# Study of BFLOAT16 for Deep Learning Training).

largest, smallest = np.array([0x7F7F0000, 0x00800000], np.uint32).view(np.float32)  # of those written as 1.f
with np.errstate(over="ignore"):
    in_float16 = np.array([1e-9, 1e9]).astype(np.float16)
print(f"\nbfloat16: from {smallest:.1e} to {largest:.1e}")
print("1e-9 and 1e9 in float16:", *in_float16, "  in bfloat16:", *rounded([1e-9, 1e9]))
check("largest bfloat16, and float32", difference(largest, np.finfo(np.float32).max), 2**-8)
check("smallest bfloat16, and float32", difference(smallest, np.finfo(np.float32).tiny), 0)
check("1e-9 and 1e9 as bfloat16", np.abs(rounded([1e-9, 1e9]) / [1e-9, 1e9] - 1).max(), 2**-8)

# --------------------------------------------------------------------------------------------------------------------
# What it does to a product.  Two numbers of 8 digits have a product of at most 16 digits.  A float32 has 24, so the
# product is exact (unless it is beyond the range).  So let a matrix product round its operands to bfloat16, and add up
# in float32.  What it loses is what the operands lose, and hardly more.

one_to_two = (np.uint32(0x3F800000) + (np.arange(128, dtype=np.uint32) << np.uint32(16))).view(np.float32)  # all 128
products, right = np.multiply.outer(one_to_two, one_to_two), np.multiply.outer(one_to_two, one_to_two.astype(float))
check("128 x 128 products of bfloat16 in float32", difference(products, right), 0)


def product(a, b):
    """a (M, K), b (K, N) -> the matrix product of what they are rounded to, with sums in float32."""
    return rounded(a) @ rounded(b)


# How much is that?  Rounding moves a number by half a spacing at most.  That is at most 2^-8 of the number, and
# typically a little less than 2^-9 of it.  The product of two is off by sqrt(2) times as much, as their errors are
# independent.  Now let a dot product have K independent terms, of both signs alike.  Its error is a sum of K random
# numbers, so it grows with sqrt(K).  But so does the dot product itself.  As a share of it, the error is the same for
# every K.
#
# And if the sum is rounded, too, after each term?  Then each of K additions loses about 2^-9 of the sum so far.  As a
# share of the sum, these losses together grow with sqrt(K).  (For small K the rounding of the operands counts as well.)
# With terms of one sign it is worse.  Add 1 again and again: from 256 on nothing changes, as 257 is rounded to 256.
# The sum stagnates.


def length(a):
    return np.sqrt(np.square(a, dtype=np.float64).sum())


def off(a, exact):
    """How far `a` is from what is exact: the length of the difference, as a share of the length."""
    return length(a - exact) / length(exact)


def summed_in_bfloat16(terms):
    """terms (K, ...) -> their sum over K, rounded after each addition."""
    total = np.zeros_like(terms[0])
    for term in terms:
        total = rounded(total + term)
    return total


errors = []  # of 1000 dot products at a time
print("\n     K   error with sums in float32   in bfloat16      sum of K ones in float32   in bfloat16")
for K in (16, 256, 4096):
    a, b = rng.normal(size=(2, K, 1000)).astype(np.float32)
    exact, terms = (a.astype(np.float64) * b).sum(axis=0), rounded(a) * rounded(b)
    errors.append((off(terms.sum(axis=0), exact), off(summed_in_bfloat16(terms), exact)))
    ones = np.ones((K, 1), np.float32)
    stagnated = summed_in_bfloat16(ones)[0]
    print(f"{K:6}{errors[-1][0]:29.1e}{errors[-1][1]:14.1e}{ones.sum():30.0f}{stagnated:14.0f}")
in_float32, in_bfloat16 = np.transpose(errors)
check("sums in float32: error for each K, beside sqrt(2) 2^-9", np.abs(in_float32 / (2**0.5 * 2**-9) - 1).max(), 0.3)
check("sums in bfloat16: growth for 256 times K, beside 16", abs(in_bfloat16[2] / in_bfloat16[0] / 16 - 1), 0.3)
check("sum of 4096 ones in bfloat16, beside 256", abs(stagnated - 256), 0)

# --------------------------------------------------------------------------------------------------------------------
# What it does to a gradient.  Take two linear layers with tanh between them.  The loss is half the squared distance
# from a target, averaged over the rows.  Forward and backward (03_linear.py) have five matrix products: two forward,
# three backward, as dx is not needed.  `multiply` says how they are made.  All else, as tanh, is computed as before.


def forward(w1, w2, multiply):
    """w1 (H, I), w2 (O, H) -> loss, and what the backward needs; for x (N, I) and target (N, O)."""
    act = np.tanh(multiply(x, w1.T))  # (N, H)
    error = multiply(act, w2.T) - target  # (N, O)
    return 0.5 * np.square(error, dtype=np.float64).sum() / len(x), act, error


def gradients(w1, w2, multiply):
    """-> dw1, dw2."""
    _, act, error = forward(w1, w2, multiply)
    dy = error / len(x)
    dw2 = multiply(dy.T, act)
    dpre = multiply(dy, w2) * (1 - act**2)  # of what tanh was applied to
    dw1 = multiply(dpre.T, x)
    return dw1, dw2


def new_weights():
    """w1 (16, 12), w2 (4, 16), in float64."""
    return rng.normal(size=(16, 12)) / np.sqrt(12), rng.normal(size=(4, 16)) / np.sqrt(16)


w1, w2 = new_weights()
w1_32, w2_32 = w1.astype(np.float32), w2.astype(np.float32)
x, (t1, t2) = rng.normal(size=(128, 12)).astype(np.float32), new_weights()
target = np.tanh(x @ t1.T) @ t2.T + 0.1 * rng.normal(size=(128, 4))  # what other weights give, and some noise
target = target.astype(np.float32)  # x and target are float32; NumPy computes in float64 where the weights are

# Finite differences are a good judge in float64, but not in bfloat16.  The derivative along one weight w is about
#
#     (loss(w + h) - loss(w - h)) / 2h
#
# If h is small, w + h and w - h are mostly rounded to the same number, so the difference is 0.  If not, they are a
# whole spacing apart.  That is far more than 2h, so the quotient is far too large.  The same happens to the activations
# between the two products: they are rounded, too, and so the loss moves in jumps.  And if h is large, the loss between
# w - h and w + h is no longer a parabola.  That is an error in any format, and it grows with h^2.


def finite_differences(w1, w2, multiply, h):
    """The gradient for w1, measured."""
    measured = np.zeros(w1.shape)
    for i in np.ndindex(w1.shape):
        step = np.zeros_like(w1)
        step[i] = h
        measured[i] = forward(w1 + step, w2, multiply)[0] - forward(w1 - step, w2, multiply)[0]
    return measured / (2 * h)


exact = gradients(w1, w2, np.matmul)
rough = gradients(w1_32, w2_32, product)
judged = []
print("\nerror of finite differences    float64   float32  bfloat16")
for h in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
    ways = ((w1, w2, np.matmul), (w1_32, w2_32, np.matmul), (w1_32, w2_32, product))
    judged.append([off(finite_differences(*way, h), exact[0]) for way in ways])
    print(f"{f'with h = {h:.0e}':<28}", *(f"{error:9.1e}" for error in judged[-1]))
print(f"error of the backward in bfloat16: {off(rough[0], exact[0]):.1e} in dw1, {off(rough[1], exact[1]):.1e} in dw2")

# At their best, finite differences in bfloat16 are further off than the gradient that they should judge.  (With h = 0.1
# they look best, but there even float64 is off by nearly as much.)  So it is checked in two steps:
#
#     1. the gradient without rounding, by finite differences in float64: this finds mistakes in a formula;
#     2. the gradient in bfloat16, beside that one: this finds products that are wrong, or rounded too coarsely.
#
# A rounding that is missing makes the difference smaller, so only the bits at the end can show it.
#
# The second step has two measures.  One is the length of the difference, as a share of the length.  The other is the
# cosine of the angle between the two gradients, which is 1 if they point the same way.  npgpt/run/audit.py checks a
# running training in these two steps.  It allows a larger share, for a GPT has more layers, and each adds some error.
# As errors go, a few thousandths are little: the gradient of another batch differs by far more (here by a third).

for i, (name, array) in enumerate((("dw1", w1), ("dw2", w2))):
    measured = numeric_grad(lambda: forward(w1, w2, np.matmul)[0], Tensor(array), 1.0)
    cosine = (rough[i] * exact[i]).sum() / (length(rough[i]) * length(exact[i]))
    check(f"{name} without rounding, and finite differences", difference(exact[i], measured), 1e-8)
    check(f"{name} in bfloat16, and without rounding", off(rough[i], exact[i]), 1e-2)
    check(f"{name} in bfloat16: 1 - cosine", 1 - cosine, 1e-4)
best = min(row[2] for row in judged)
check("error of dw1 in bfloat16, as a share of that of the best finite differences", off(rough[0], exact[0]) / best, 1)

# --------------------------------------------------------------------------------------------------------------------
# What must stay float32.  Training moves a weight by small steps.  If the weight is a bfloat16, a step of less than
# half a spacing is lost: the sum is rounded back to where it was.  The next step is lost, too, and so on.  It does not
# help that all of them together would be a long way.  (Larger steps are rounded to a whole number of spacings.  And
# just below a power of two the spacing is half as large.)


def spacing(w):
    """The distance from a bfloat16 to the next one further from 0."""
    return np.ldexp(1.0, np.frexp(np.abs(w))[1] - 8)


weights = rounded([0.02, 0.1, 0.5, 2.0])
print("\nweight    spacing   a step of 3e-4 moves it by")
for w, moved in zip(weights, rounded(weights + 3e-4) - weights, strict=True):
    print(f"{w:6.3f}{spacing(w):11.1e}{moved:12.1e}")
weights = rounded(np.abs(rng.normal(size=1000)))
check("steps of 0.49 spacings that are not lost", (rounded(weights + 0.49 * spacing(weights)) != weights).sum(), 0)
check("steps of 0.51 spacings that are lost", (rounded(weights + 0.51 * spacing(weights)) == weights).sum(), 0)

# So the optimizer keeps the weights in float32.  These are called master weights.  Each product rounds them anew, for
# itself.  A step may be too small for the next product to see it.  But the master weight keeps it, and when
# enough such steps have come, the rounded weight moves.
#
# Below, two layers are trained in three ways.  At first the gradients are large, and every way learns.  Then they
# become smaller.  If the weights are bfloat16, more and more of their steps are lost, until the loss stands still.


def train(multiply, keep, lr=0.01, steps=2000):
    """-> the loss before each step of plain descent.  keep: what becomes of the weights after a step."""
    a, b, losses = keep(w1_32), keep(w2_32), []
    for _ in range(steps):
        losses.append(forward(a, b, multiply)[0])
        da, db = gradients(a, b, multiply)
        a, b = keep(a - np.float32(lr) * da), keep(b - np.float32(lr) * db)
    return losses


losses = {
    "float32": train(np.matmul, keep=np.copy),
    "products of bfloat16, weights in bfloat16": train(product, keep=rounded),
    "products of bfloat16, master weights": train(product, keep=np.copy),
}
print("\nloss after so many steps" + " " * 18, *(f"{step:7}" for step in (0, 100, 300, 1000, 1999)))
for title, path in losses.items():
    print(f"{title:<42}", *(f"{path[step]:7.4f}" for step in (0, 100, 300, 1000, 1999)))
in_float32, stalled, master = (path[-1] for path in losses.values())
check("the last loss, with master weights and in float32", difference(master, in_float32), 1e-2)
check("the last loss in float32, as a share of that with weights in bfloat16", in_float32 / stalled, 0.7)

# The same can happen to v in 10_adamw.py, if beta2 is near 1.  Let v be 1, and let all further gradients be so small
# that they hardly count.  With beta2 = 0.999, v should lose a thousandth of itself in each step.  But just below 1,
# half a spacing is two thousandths, so in bfloat16 v stays 1.  Adam divides by its root, and so its steps for the small
# gradients stay far too small.  (With 0.99, the default there, v does fall.)

v32, v16 = np.ones(1, np.float32), np.ones(1, np.float32)
for _ in range(1000):
    v32, v16 = np.float32(0.999) * v32, rounded(np.float32(0.999) * v16)
print(f"\nv after 1000 gradients of 0: {v32[0]:.3f} in float32, {v16[0]:.3f} in bfloat16")
check("v in float32", difference(v32, [0.999**1000]), 1e-4)
check("v in bfloat16, beside 1", abs(v16[0] - 1), 0)

# --------------------------------------------------------------------------------------------------------------------
# The proof: npgpt's rounding, which gives the same bits, and its products.  Instructions add up in different orders, of
# which npgpt knows two: `plain` has that of AMX.  vdpbf16ps here adds up 32 terms at a time (`depth`).  (Numbers below
# 1.2e-38, the smallest written as 1.f, npgpt takes for 0, as the instructions do.)

special = np.concatenate([nans.view(np.float32), np.array([np.inf, -np.inf, 0, -0.0, 3.4e38], np.float32), x32])
check("bits that npgpt rounds otherwise", (bits_of(rounded(special)) != bits_of(rounded_ref(special))).sum(), 0)
a, b = rng.normal(size=(5, 40)).astype(np.float32), rng.normal(size=(40, 3)).astype(np.float32)
for way in ("avx512_bf16", "plain"):
    check(f"a product, and npgpt's by {way}", difference(product(a, b), product_ref(a, b, way, depth=32)), 1e-6)

# In npgpt all this is `python -m npgpt.train --dtype bfloat16`.  (The default, `auto`, takes it where it is quicker.)
# Linear layers, those of the MLP and the output layer among them, round what they multiply when it is packed, that is,
# copied to the order in which the processor reads it (npgpt/kernels/packed.py).  Weights, moments, gradients,
# attention, LayerNorm, softmax and the loss are float32.

finish()
