"""Numbers of bfloat16: how float32 is rounded to them, and how products of them are added up in float32.

A bfloat16 is the upper half of a float32: its sign, its 8 bits of exponent and the first 7 of its fraction (Kalamkar et
al. 2019).  Processors that have the format multiply them two by two.  A *pair* is two neighbours along k, in 32 bits.
It meets another pair, and both products are added to one float32.  So packed.py packs pairs in the place of numbers.

There are several ways to add them up, and each has its own bits:

    amx          tiles of 16 pairs along k (Intel Xeon since 2023; amx.py): the sum of the even products and that of the
                 odd ones, then these two, then the total and that
    avx512_bf16  vdpbf16ps (AMD since Zen 4, Intel since Cooper Lake): the product of the odd numbers is added to the
                 sum, then the product of the even ones
    plain        for any processor, with the bits of amx

Each sum is that of an exact product and a float32, rounded once to nearest even.  Numbers below the smallest normal one
count as zero before, and become zero after; NaN stays NaN.  `product_ref` says all that in NumPy; tests compare bits.
"""

import functools
import os

import numpy as np

from npgpt.errors import UsageError
from npgpt.kernels.jit import KERNELS, inside_kernels
from npgpt.kernels.permission import amx_is_permitted
from npgpt.kernels.vectors import FEATURES, NARROW, VECTOR, are_fit, below, constant, load_wide, pick, splat, vector_of

if KERNELS == "numba":
    import llvmlite.binding
    from llvmlite import ir
    from numba import config, types
    from numba.core import cgutils

TINY = np.finfo(np.float32).tiny  # the smallest normal number
GROUP = 16  # rows of a tile, and pairs along k

# the dtype of the pairs says which way they are multiplied: Numba compiles a kernel for each dtype of its arrays
PAIRS = {"amx": np.dtype(np.int32), "avx512_bf16": np.dtype(np.uint32), "plain": np.dtype(np.int32)}
WANTED = os.environ.get("NPGPT_BFLOAT16", "")
if WANTED not in ("", *PAIRS):
    raise UsageError(f"NPGPT_BFLOAT16 must be one of {', '.join(PAIRS)}, got {WANTED!r}")

# the way that pairs of int32 are compiled for in this process
NEEDED = ("amx-tile", "amx-bf16", "avx512bf16")  # the last one rounds
HAS_AMX = VECTOR == 64 and all(map(FEATURES.get, NEEDED))
if KERNELS == "numba" and config.CPU_FEATURES:  # for which Numba compiles instead
    HAS_AMX = HAS_AMX and all(f"+{name}" in config.CPU_FEATURES for name in NEEDED)
MAY_USE_AMX = HAS_AMX and amx_is_permitted()
TILES = "amx" if WANTED == "amx" or (MAY_USE_AMX and not WANTED) else "plain"


# --------------------------------------------------------------------------------------------------------------------
# References


def rounded_ref(x):
    """x, float32, rounded to the nearest bfloat16, of two that are as near to the even one; as float32."""
    bits = np.ascontiguousarray(_flushed(x)).view(np.uint32)
    up = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    up = np.where(np.isnan(x), bits | np.uint32(0x400000), up)
    return (up & np.uint32(0xFFFF0000)).view(np.float32)


def narrowed_ref(x):
    """x, float32, rounded to bfloat16: the upper halves of rounded_ref, uint16."""
    return (rounded_ref(x).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def widened_ref(x):
    """The numbers of x as floats, of which uint16 are bfloat16; int8 become float32, and floats stay as they are."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return x.astype(np.float32) if x.dtype == np.int8 else x


def _flushed(x):
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def _add_product_ref(total, x, y):
    """total + x y in float32, rounded once; x and y are bfloat16."""
    total, product = total.astype(np.float64), x.astype(np.float64) * y  # the product is exact
    exact = total + product
    # what float64 has lost of the sum (Knuth's two-sum) is told by its last bit, so that the second rounding is right
    back = exact - total
    lost = (total - (exact - back)) + (product - back)
    bits = exact.view(np.int64)
    is_even = (bits & 1 == 0) & np.isfinite(lost) & (lost != 0)
    bits = np.where(is_even, bits + np.where((lost > 0) == (exact > 0), 1, -1), bits)
    return _flushed(bits.view(np.float64).astype(np.float32))


def product_ref(a, b, way, depth):
    """a (M, K), b (K, N), float32 -> the product of their bfloat16, with the bits of a way, in float32.

    depth: how many of K vdpbf16ps sums up before what they give is added to the output.
    """
    a, b = rounded_ref(a), rounded_ref(b)
    with np.errstate(all="ignore"):
        if way != "avx512_bf16":
            return _sum_in_groups_ref(a, b)
        parts = (slice(k, k + depth) for k in range(0, len(b), depth))
        return functools.reduce(np.add, (_sum_ref(a[:, part], b[part]) for part in parts))


def _sum_ref(a, b):
    total = np.zeros((len(a), b.shape[1]), np.float32)
    for k in range(0, len(b), 2):
        for i in (k + 1, k):
            if i < len(b):
                total = _add_product_ref(total, a[:, i, None], b[i])
            else:  # the last number of an odd many has a zero beside it
                total = _flushed(total + np.float32(0))
    return total


def _sum_in_groups_ref(a, b):
    total = np.zeros((len(a), b.shape[1]), np.float32)
    for start in range(0, len(b), 2 * GROUP):
        sums = [np.zeros_like(total), np.zeros_like(total)]
        for k in range(start, start + 2 * GROUP):
            if k < len(b):
                sums[k % 2] = _add_product_ref(sums[k % 2], a[:, k, None], b[k])
            else:  # zeros fill the last group, which make -0 a 0
                sums[k % 2] = _flushed(sums[k % 2] + np.float32(0))
        total = _flushed(total + _flushed(sums[0] + sums[1]))
    return total


# --------------------------------------------------------------------------------------------------------------------
# In LLVM's words, for packed.py and tiles.py.  `kind` is the Numba type of the pairs


def numbers_in(kind):
    """How many numbers along k an element of a packed array has: 2 in a pair, else 1."""
    return 2 if isinstance(kind, types.Integer) else 1


def can_pack(panel, x):
    """Whether x's numbers, or their pairs, can be packed into a panel, for arrays of these kinds."""
    if numbers_in(panel.dtype) == 1:
        return are_fit(panel) if x.dtype in NARROW else are_fit(panel, x)
    is_number = x.dtype == types.float32 or x.dtype in NARROW
    return panel.mutable and panel.dtype in (types.uint32, types.int32) and is_number


def vector_for(context, panel, x):
    """vector_of x's numbers when they are loaded, to be packed into a panel; for arrays of these kinds."""
    itemsize, lanes, vector = vector_of(context, panel if x.dtype in NARROW else x)
    return itemsize, lanes, ir.VectorType(ir.FloatType(), lanes) if numbers_in(panel.dtype) == 2 else vector


@inside_kernels(
    pairs=lambda packed, n: (n + 1) // 2,
    tiles=lambda packed, n: (n + 2 * GROUP - 1) // (2 * GROUP) * GROUP,
)
def steps_of(packed, n):
    """How many elements of a packed array n numbers along k take, with the zeros that fill the last tile."""
    return n


def _rounds_by_instruction(kind):
    """Whether vcvtne2ps2bf16 rounds: only `plain` is for processors without it, and shows how."""
    return kind == types.uint32 or TILES == "amx"


def _integers(like):
    """The kind of a vector of as many integers."""
    return ir.VectorType(ir.IntType(32), like.type.count)


def _all(like, number):
    return ir.Constant(_integers(like), [number] * like.type.count)


def _assembly(builder, result, words, *args, reads_result=False):
    """One instruction in assembly, as LLVM's names for it differ from version to version.

    reads_result: whether the first argument is what the result's register holds before.
    """
    llvmlite.binding.initialize_native_asmparser()  # LLVM wants to read it
    registers = ["=v", *["v"] * len(args)]
    if reads_result:
        registers[1] = "0"
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(ir.InlineAsm(kind, words, ",".join(registers)), args)


def _rounded(builder, x):
    """A vector of float32 -> integers whose upper halves are its bfloat16."""
    bits = builder.bitcast(flushed(builder, x), _integers(x))
    is_odd = builder.and_(builder.lshr(bits, _all(x, 16)), _all(x, 1))
    up = builder.add(builder.add(bits, _all(x, 0x7FFF)), is_odd)
    is_nan = builder.fcmp_unordered("uno", x, x)
    return builder.select(is_nan, builder.or_(bits, _all(x, 0x400000)), up)


def _paired(builder, first, second):
    """Pairs of what _rounded has made."""
    return builder.or_(builder.lshr(first, _all(first, 16)), builder.and_(second, _all(second, 0xFFFF0000)))


def _pairs_along(builder, kind, numbers, more):
    """Two vectors that follow each other in a row -> a vector of its pairs."""
    if _rounds_by_instruction(kind):
        return _assembly(builder, _integers(numbers), "vcvtne2ps2bf16 $2, $1, $0", more, numbers)
    numbers, more = _rounded(builder, numbers), _rounded(builder, more)
    even, odd = (pick(builder, numbers, more, lambda lane, odd=odd: 2 * lane + odd) for odd in (0, 1))
    return _paired(builder, even, odd)


def _pairs_across(builder, kind, numbers, others):
    """The same columns of two rows, one below the other -> a vector of their pairs."""
    if not _rounds_by_instruction(kind):
        return _paired(builder, _rounded(builder, numbers), _rounded(builder, others))
    lanes, pairs = numbers.type.count, _integers(numbers)
    rounded = _assembly(builder, pairs, "vcvtne2ps2bf16 $2, $1, $0", others, numbers)
    rounded = builder.bitcast(rounded, ir.VectorType(ir.IntType(16), 2 * lanes))
    return builder.bitcast(pick(builder, rounded, rounded, lambda lane: lane // 2 + lanes * (lane % 2)), pairs)


def load_along(builder, kind, array, row, column, vector, width=None):
    """Of array[row] the vector of numbers, or of pairs, from a column on; zeros where column numbers reach `width`."""
    found = []
    for v in range(numbers_in(kind)):
        start = builder.add(column, constant(v * vector.count))
        mask = None if width is None else below(builder, start, width, vector.count)
        found.append(load_wide(builder, array, row, start, vector, mask))
    return found[0] if len(found) == 1 else _pairs_along(builder, kind, *found)


def load_across(builder, kind, array, step, column, vector, mask=None):
    """Of array[step] the vector from a column on, or of the rows 2 step and 2 step + 1 that of their pairs.

    Where rows are pairs, there are zeros below the last one.
    """
    n = numbers_in(kind)
    (rows, _), first = cgutils.unpack_tuple(builder, array.shape), builder.mul(step, constant(n))
    found = []
    for r in range(n):
        row = builder.add(first, constant(r))
        if n > 1:
            is_row = splat(builder, builder.icmp_signed("<", row, rows), vector.count)
            mask = is_row if mask is None else builder.and_(mask, is_row)
        found.append(load_wide(builder, array, row, column, vector, mask))
    return found[0] if n == 1 else _pairs_across(builder, kind, *found)


class Totals:
    """Vectors to which products are added while k runs: of numbers of the arrays' own dtype, or of pairs."""

    def __init__(self, builder, kind, vectors):
        self.builder, self.kind = builder, kind
        self.places = [cgutils.alloca_once_value(builder, ir.Constant(one, [0.0] * one.count)) for one in vectors]

    def add(self, i, x, y):
        """total i += x y."""
        builder, total = self.builder, self.builder.load(self.places[i])
        if numbers_in(self.kind) == 2:
            total = _assembly(builder, total.type, "vdpbf16ps $3, $2, $0", total, x, y, reads_result=True)
        else:
            total = builder.fadd(total, builder.fmul(x, y, flags=("contract",)), flags=("contract",))
        builder.store(total, self.places[i])


def halves(builder, pairs):
    """The first number of each pair, and the second one of each, as float32."""
    low, high = builder.shl(pairs, _all(pairs, 16)), builder.and_(pairs, _all(pairs, 0xFFFF0000))
    return [builder.bitcast(bits, ir.VectorType(ir.FloatType(), pairs.type.count)) for bits in (low, high)]


def add_product(builder, total, x, y):
    """total + x y, rounded once."""
    kind = ir.FunctionType(total.type, [total.type] * 3)
    fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{total.type.count}f32")
    return flushed(builder, builder.call(fma, [x, y, total]))


def flushed(builder, x):
    """x, with zeros for numbers below the smallest normal one."""
    bits = builder.bitcast(x, _integers(x))
    is_small = builder.icmp_unsigned("<", builder.and_(bits, _all(x, 0x7FFFFFFF)), _all(x, 0x00800000))
    zero = builder.bitcast(builder.and_(bits, _all(x, 0x80000000)), x.type)
    return builder.select(is_small, zero, x)
