"""What kernels call for the numbers that they work on: `exp`, the largest of a row, an array at an address."""

import numpy as np

from npgpt.kernels.jit import KERNELS, helper, inside_kernels, intrinsic

if KERNELS == "numba":
    from numba import carray, types


def _exp32(x):
    # e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln(2)/2, and e^r by its Taylor polynomial of degree 7.
    # 2^n is made by writing n into the exponent bits.  A NaN stays a NaN: both comparisons are false for it.
    x = np.float32(-88) if x < np.float32(-88) else x  # n = -127 makes the exponent bits 0, and the result 0
    x = np.float32(88.37626) if x > np.float32(88.37626) else x
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375)  # ln 2 in two parts, so that n * ln 2 loses nothing
    r = r + n * np.float32(2.12194440e-4)
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1)
    p = p * r + np.float32(1)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@inside_kernels(float32=_exp32)
def exp(x):
    """e**x of a float32 or float64 number, inside a kernel only.

    float32: within 1e-7 relative of the exact value; below -87.7 it is 0, above 88.3 it stays at 2.4e38.  So GELU's
    slope, made with it in npgpt/ops/mlp.py, is within 1e-6 of its reference down to z = -1e11, and far off from -1e12.
    """
    return np.exp(x)


def _largest32(row, n):
    # A maximum of floats does not vectorise as long as NaN means something; one of integers does.  The bits of a float,
    # read as an integer, are in the floats' order but for the negative ones, whose order is reversed: flip them.
    best = np.int32(-(2**31))
    for j in range(n):
        bits = np.float32(row[j]).view(np.int32)
        best = max(best, np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))))
    best = np.int32(best ^ ((best >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return np.int32(best).view(np.float32)


@inside_kernels(float32=_largest32)
def largest(row, n):
    """The largest of the first n numbers of a row, inside a kernel only.

    float32: NaN if there is one, unless its sign bit is set: such a NaN counts as less than -inf.
    """
    m = row[0]
    for j in range(1, n):
        m = max(m, row[j])
    return m


def _largest_magnitude32(row):
    # as in _largest32, but without the sign bits nothing is reversed, and a NaN is above infinity
    best = np.int32(0)
    for j in range(len(row)):
        best = max(best, np.int32(np.float32(row[j]).view(np.int32) & np.int32(0x7FFFFFFF)))
    return np.int32(best).view(np.float32)


@inside_kernels(float32=_largest_magnitude32)
def largest_magnitude(row):
    """The largest absolute value in a row, or NaN if there is one, inside a kernel only."""
    largest = abs(row[0])
    for j in range(len(row)):
        size = abs(row[j])
        largest = size if size > largest or size != size else largest
    return largest


@helper
def in_two(lse, like):
    """A float64 as the sum of two numbers of the dtype of `like`: the nearest one, and what that leaves over.

    For the logarithm of a sum of e^s: what float32 leaves over of it is the relative error of each e^(s - lse).  Of one
    below 16 that is less than the error of `exp`, and 0 here.
    """
    high = like.dtype.type(lse)
    return high, like.dtype.type(lse - high) if abs(lse) > 16 else like.dtype.type(0)


@intrinsic
def _pointer(typingctx, address, like):
    """The address as a pointer to numbers like those of an array."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), codegen


@inside_kernels
def array_at(address, n, like):
    """The n numbers that lie at an address, as an array of the dtype of `like`, inside a kernel only.

    So a kernel can be told of any number of arrays by a table of their addresses.  0 is no array: it has no numbers.
    """
    return carray(_pointer(address, like), n if address else 0)


@inside_kernels
def matrix_at(address, n, k, like):
    """The (n, k) numbers that lie at an address, not 0, as `array_at` has them; reshape would take its time."""
    return carray(_pointer(address, like), (n, k))
