"""Products in registers: every edge of a tile, beside NumPy's product, and nothing beyond an edge."""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from npgpt.kernels import jit, packed
from npgpt.kernels.tiles import ROWS, dots, fetch, product, share_of, transpose
from npgpt.kernels.vectors import VECTOR

pytestmark = pytest.mark.skipif(jit.KERNELS == "numpy", reason="tiles exist inside kernels only")

SIZES = [1, 3, 8, 9, 31, 32, 33, 65]  # on both sides of ROWS and of one and two vectors


@jit.kernel
def run_product(out, a, b, add):
    product(out, a, b, add)


@jit.kernel
def run_transpose(out, x):
    transpose(out, x)


@jit.kernel
def run_fetch(x):
    fetch(x)


@jit.kernel
def run_dots(out, x, w, scale, bias, first, last, add):
    dots(out, x, w, scale, bias, first, last, add)


def inside(shape, dtype):
    """(an array of this shape, the larger array that it is a part of), both filled with 7.

    The margin is wider than a tile, so that a fault at an edge shows here as a wrong number, never as a crash.
    """
    margin = max(ROWS, 80)
    whole = np.full((shape[0] + 2 * margin, shape[1] + 2 * margin), 7, dtype)
    return whole[margin:-margin, margin:-margin], whole


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-13)])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_product_is_numpys_and_touches_nothing_else(dtype, tolerance, add, transposed):
    rng = np.random.default_rng(0)
    for M in SIZES:
        for N in SIZES:
            for K in (0, 1, 5, 40):
                a = inside((K, M), dtype)[0].T if transposed else inside((M, K), dtype)[0]
                a[...] = rng.standard_normal((M, K))
                b, _ = inside((K, N), dtype)
                b[...] = rng.standard_normal((K, N))
                out, whole = inside((M, N), dtype)
                expected = a.astype(np.float64) @ b + (7 if add else 0)
                run_product(out, a, b, add)
                np.testing.assert_allclose(out, expected, rtol=0, atol=tolerance * (K + 7))
                out[...] = 7
                assert (whole == 7).all(), (M, N, K)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_product_passes_nan_on_and_does_not_read_beyond_the_edge(dtype):
    a, around_a = inside((9, 4), dtype)
    b, around_b = inside((4, 33), dtype)
    around_a[...], around_b[...] = np.nan, np.nan
    a[...], b[...] = 1, 2
    out = np.zeros((9, 33), dtype)
    run_product(out, a, b, False)
    assert (out == 8).all()
    b[2, 32] = np.nan
    run_product(out, a, b, False)
    assert np.isnan(out[:, 32]).all() and (out[:, :32] == 8).all()


def test_arrays_of_different_types_are_refused():
    with pytest.raises(Exception, match=r"No implementation|Failed in nopython"):
        run_product(np.zeros((1, 1), np.float32), np.zeros((1, 1)), np.zeros((1, 1)), False)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int8])  # of the weights
@pytest.mark.parametrize("add", [False, True])
def test_dots_are_numpys_and_touch_nothing_else(kind, add):
    rng = np.random.default_rng(0)
    dtype = np.float32 if kind == np.int8 else kind
    tolerance = 1e-13 if kind == np.float64 else 1e-5
    for M in (1, 2, 3, 4, 5, 9):
        for K in (1, 5, 16, 37):
            for first, last in ((0, 1), (0, 20), (3, 8), (16, 20), (7, 7)):
                x, _ = inside((M, K), dtype)
                x[...] = rng.standard_normal((M, K))
                w, _ = inside((20, K), kind)
                w[...] = rng.integers(-127, 128, w.shape) if kind == np.int8 else rng.standard_normal(w.shape)
                scale = rng.uniform(1, 2, 20).astype(dtype) / (127 if kind == np.int8 else 1)
                bias = rng.standard_normal(20).astype(dtype)
                for with_scale, with_bias in ((True, True), (False, True), (kind == np.int8, False)):
                    out, whole = inside((M, 20), dtype)
                    expected = x.astype(np.float64) @ w[first:last].T.astype(np.float64)
                    expected = expected * (scale[first:last] if with_scale else 1) + (7 if add else 0)
                    expected += bias[first:last] if with_bias else 0
                    run_dots(out, x, w, scale[: 20 * with_scale], bias[: 20 * with_bias], first, last, add)
                    room = tolerance * (K + 7) * (1 if with_scale or kind != np.int8 else 127)
                    np.testing.assert_allclose(out[:, first:last], expected, rtol=0, atol=room)
                    out[:, first:last] = 7
                    assert (whole == 7).all(), (M, K, first, last)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fetch_changes_nothing(dtype):
    x = np.random.default_rng(0).normal(size=(5, 3, 70)).astype(dtype)
    before = x.copy()
    for part in (x[0], x[:, 1], x[:, 1, 3:5], x[:0, 0], x[:, 0, :0], np.zeros((0, 0), dtype)):
        run_fetch(part)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_transpose_is_numpys_and_touches_nothing_else(dtype):
    rng = np.random.default_rng(0)
    for M in SIZES:
        for N in SIZES:
            for more in (0, 1, 40):
                out, whole = inside((N, M + more), dtype)
                x, x_whole = inside((M, N), dtype)
                x_whole[...] = np.nan  # what lies beyond the edges shows if it is read
                x[...] = rng.normal(size=x.shape)
                run_transpose(out, x)
                np.testing.assert_array_equal(out[:, :M], x.T)
                assert ((out[:, M:] == 7) | (out[:, M:] == x.T[:, -1:])).all()
                out[...] = 7
                assert (whole == 7).all()


def test_shares_are_whole_units_and_together_all():
    for n in (0, 1, 15, 16, 17, 65, 768):
        for unit in (1, 16, 48):
            for parts in (1, 2, 3, 7):
                shares = [share_of(n, unit, i, parts) for i in range(parts)]
                edges = [0, *(stop for _, stop in shares)]
                assert shares == list(zip(edges, edges[1:], strict=False)) and edges[-1] == n
                assert all(edge % unit == 0 or edge == n for edge in edges)
                assert max(stop - start for start, stop in shares) <= -(-n // unit // parts) * unit + unit


# ---- What lies around the arrays: no result knows of it, and it stays as it is.  All remainders of a tile.

MARGINS = 20, 36  # wider than a tile
DTYPES = [np.float32, np.float64]
RANDOM = np.random.default_rng(0).standard_normal((80, 80))
ROW_STEPS = [(1, 1), (2, 1), (-1, 1)]  # from row to row, from column to column: of these each case takes the next one


class Guarded:
    """An array of these values, in a larger one that is full of NaN, each with bits of its own.

    steps: from row to row and from column to column, where 1 is the next one; what lies in between is NaN, too.
    turned: whether it is the transpose of such an array.
    """

    def __init__(self, values, dtype, steps=(1, 1), turned=False):
        values = values.T if turned else values
        room = [n * abs(step) for n, step in zip(values.shape, steps, strict=True)]
        self.whole = np.empty([n + 2 * margin for n, margin in zip(room, MARGINS, strict=True)], dtype)
        bits = self.whole.view(f"u{self.whole.itemsize}").reshape(-1)
        bits[:] = 127  # of int8, which has no NaN
        if dtype != np.int8:
            bits[:] = np.array(np.nan, dtype).view(bits.dtype) + np.arange(1, bits.size + 1, dtype=bits.dtype)
        middle = tuple(slice(margin, margin + n) for n, margin in zip(room, MARGINS, strict=True))
        array = self.whole[middle][:: steps[0], :: steps[1]]
        array[...] = values
        self.array, self.values = (array.T, values.T) if turned else (array, values)
        self.before = self.whole.tobytes()

    def assert_unchanged(self, *but):
        """Nothing was written, but what is at array[but]; that is forgotten."""
        if but:
            self.array[but] = self.values[but]
        assert self.whole.tobytes() == self.before, "something else was written"


def assert_close(out, expected):
    assert not np.isnan(out).any(), "what lies around an array was read"
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4 if out.dtype == np.float32 else 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
def test_product_knows_nothing_of_what_lies_around(dtype, add):
    layouts = [((1, 1), (1, 1), False, (1, 1)), ((2, 1), (1, 1), True, (2, 1)), ((-1, 1), (2, -3), False, (-1, 1))]
    width = 2 * VECTOR // np.dtype(dtype).itemsize
    for M in range(1, 2 * ROWS + 2):
        for N in range(1, 2 * width + 2, 1 if M in (1, ROWS + 1) else 4):
            K = 1 + (M + N) % 5
            out_steps, a_steps, turned, b_steps = layouts[(M + N) % 3]
            a = Guarded(RANDOM[:M, :K], dtype, a_steps, turned)
            b = Guarded(RANDOM[:K, :N], dtype, b_steps)
            out = Guarded(np.full((M, N), 7), dtype, out_steps)
            run_product(out.array, a.array, b.array, add)
            assert_close(out.array, a.values @ b.values + (7 if add else 0))
            out.assert_unchanged(...)
            a.assert_unchanged()
            b.assert_unchanged()


@pytest.mark.parametrize("dtype", DTYPES)
def test_transpose_knows_nothing_of_what_lies_around(dtype):
    n = VECTOR // np.dtype(dtype).itemsize
    for M in range(1, 2 * n + 2):
        for N in range(1, 2 * n + 2):
            more = (M + N) % 4
            x = Guarded(RANDOM[:M, :N], dtype, ROW_STEPS[M % 3])
            out = Guarded(np.full((N + more, M + more), 7), dtype, ROW_STEPS[N % 3])
            run_transpose(out.array, x.array)
            np.testing.assert_array_equal(out.array[:N, :M], x.array.T)
            assert not np.isnan(out.array).any(), "what lies around an array was read"
            out.assert_unchanged(slice(N))
            x.assert_unchanged()


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int8])  # of the weights
@pytest.mark.parametrize("add", [False, True])
def test_dots_know_nothing_of_what_lies_around(kind, add):
    dtype = np.float32 if kind == np.int8 else kind
    lanes = VECTOR // np.dtype(dtype).itemsize
    for M in range(1, 10):
        for K in range(1, 2 * lanes + 2, 1 if M in (1, 5) else 7):
            for n in range(18):  # columns
                first, last = K % 4, K % 4 + n
                x = Guarded(RANDOM[:M, :K], dtype, ROW_STEPS[M % 3])
                w = Guarded(np.rint(9 * RANDOM[:last, :K]), kind, ROW_STEPS[K % 3])
                scale, bias = (Guarded(RANDOM[row : row + 1, :last], dtype) for row in (40, 41))
                out = Guarded(np.full((M, last), 7), dtype, ROW_STEPS[n % 3])
                run_dots(out.array, x.array, w.array, scale.array[0], bias.array[0], first, last, add)
                expected = x.values @ w.values.T * scale.values + bias.values + (7 if add else 0)
                assert_close(out.array[:, first:], expected[:, first:])
                out.assert_unchanged(slice(None), slice(first, last))
                for guarded in (x, w, scale, bias):
                    guarded.assert_unchanged()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps, turned", [((1, 1), False), ((2, 3), True), ((-1, -1), False)])
def test_fetch_knows_nothing_of_what_lies_around(dtype, steps, turned):
    for shape in ((1, 1), (3, 70), (5, 0), (0, 5)):
        x = Guarded(np.full(shape, 3), dtype, steps, turned)
        run_fetch(x.array)
        x.assert_unchanged()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("a_turned", [False, True])
@pytest.mark.parametrize("b_turned", [False, True])
def test_a_packed_product_knows_nothing_of_what_lies_around(dtype, a_turned, b_turned):
    itemsize = np.dtype(dtype).itemsize
    lanes, depth, width = VECTOR // itemsize, packed.DEPTH // itemsize, packed.WIDTH // itemsize
    far = packed.NEAR // itemsize + 1  # rows of a transposed a that are packed
    shapes = [(M, N, 5) for M in (1, ROWS, 17, 33) for N in (1, *(n * lanes + m for n in range(1, 7) for m in (0, 1)))]
    # the most rows, and columns, for which smaller tiles serve at the edges; and one more
    low, narrow = (ROWS // 2, 17 + ROWS // 2), (lanes // 2, lanes // 2 + 1)
    shapes += [(M, n * lanes + more, 5) for M in low for n in range(1, 6) for more in narrow]
    shapes += (far, 3, 7), (3, 7, depth), (19, 5, depth + 1), (2, width + 1, 3), (1, 2 * width, depth + 2)
    shapes += (far, width + 5, depth + 2), (packed.ROOM * packed.PACK + 3, width + 5, 9)  # strips that stay, or do not
    for M, N, K in shapes:
        left, right = np.resize(RANDOM, (M, K)), np.resize(RANDOM, (K, N))
        a = Guarded(left.T if a_turned else left, dtype, ROW_STEPS[M % 3])
        b = Guarded(right.T if b_turned else right, dtype, ROW_STEPS[N % 3])
        scratch = np.full(packed.scratch_size(itemsize), np.nan, dtype)
        for rows, columns in (((0, M), (0, N)), ((M // 3, M - M // 4), (N // 3, N - N // 4))):
            out = Guarded(np.full((M, N), 7), dtype)
            packed.multiply(out.array, a.array, b.array, a_turned, b_turned, scratch, *rows, *columns)
            part = slice(*rows), slice(*columns)
            assert_close(out.array[part] / K, (left @ right / K)[part])
            out.assert_unchanged(*part)
        a.assert_unchanged()
        b.assert_unchanged()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_of_a_packed_product_has_the_bits_of_the_whole(dtype):
    M, K, N = 45, packed.DEPTH // np.dtype(dtype).itemsize + 9, 99
    a, b = (np.resize(RANDOM, shape).astype(dtype) for shape in ((M, K), (K, N)))
    whole, parts = np.empty((M, N), dtype), np.empty((M, N), dtype)
    scratch = np.empty(packed.scratch_size(whole.itemsize), dtype)
    packed.multiply(whole, a, b, False, False, scratch, 0, M, 0, N)
    for rows in ((0, 1), (1, 20), (20, 45)):
        for columns in ((0, 70), (70, 99)):
            packed.multiply(parts, a.T.copy(), b.T.copy(), True, True, scratch, *rows, *columns)
    np.testing.assert_array_equal(parts, whole)


# ---- NaN shows what goes into a result.  What is read and then not used shows where it may not be read at all.


def at_a_border(shape, dtype, keep):
    """An array of zeros whose last number is the last before memory that nobody may read or write.

    keep: a list of what must live as long as the array.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = np.frombuffer(memory, np.uint8)
    border = start.ctypes.data + pages * mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(border), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    keep.append(memory)
    return start[pages * mmap.PAGESIZE - size : pages * mmap.PAGESIZE].view(dtype).reshape(shape)


def walk_along_borders():
    """Run all entries on arrays that end at a border: whoever reads or writes beyond one ends the process."""
    keep = []
    for dtype in DTYPES:
        for M, N, K in ((1, 1, 1), (3, 5, 7), (9, 17, 33), (ROWS, VECTOR // 2, VECTOR // 4), (13, 43, 19)):
            new = [at_a_border(shape, dtype, keep) for shape in ((M, N), (M, K), (K, N), (K, M), (N, K), (N,))]
            out, a, b, a_turned, w, scale = new
            run_product(out, a, b, False)
            run_product(out, a_turned.T, b, True)
            run_transpose(a_turned, a)
            run_fetch(a)
            run_dots(out, a, w, scale, scale, 0, N, True)
            if dtype == np.float32:
                run_dots(out, a, at_a_border((N, K), np.int8, keep), scale, scale, 0, N, False)
            scratch = at_a_border((packed.scratch_size(a.itemsize),), dtype, keep)
            for turned in (False, True):
                operands = (a_turned, w) if turned else (a, b)
                packed.multiply(out, *operands, turned, turned, scratch, 0, M, 0, N)
    print("all borders stand", flush=True)
    if "cross" in sys.argv:
        ctypes.string_at(a[-1].ctypes.data, a[-1].nbytes + 1)
    os._exit(0)  # without Python's farewell to memory that it may not touch


@pytest.mark.skipif(os.name != "posix", reason="the system has no mprotect")
@pytest.mark.parametrize("how", ["stay", "cross"])
def test_nothing_is_read_beyond_an_array_even_if_it_is_not_used(how):
    command = [sys.executable, "-c", "import test_tiles; test_tiles.walk_along_borders()", how]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert "all borders stand" in done.stdout, done.stderr
    assert (done.returncode == 0) == (how == "stay"), "a step across the border must end the process"


# ---- What does not fit is refused, and nothing is written


def zeros(*shape, dtype=np.float32):
    """A part of a larger array, so that few types are compiled."""
    return np.zeros([n + 1 for n in shape], dtype)[(slice(1, None),) * len(shape)]


def assert_refused(entry, out, *args):
    out[...] = 7
    with pytest.raises(ValueError, match=f"^{entry.__name__.removeprefix('run_')}: .* needs "):
        entry(out, *args)
    assert (out == 7).all()


@pytest.mark.parametrize(
    "out, a, b",
    [
        (zeros(3, 4), zeros(2, 5), zeros(5, 4)),
        (zeros(3, 4), zeros(4, 5), zeros(5, 4)),
        (zeros(3, 4), zeros(3, 5), zeros(4, 4)),
        (zeros(3, 4), zeros(3, 5), zeros(6, 4)),
        (zeros(3, 4), zeros(3, 5), zeros(5, 3)),
        (zeros(3, 4), zeros(3, 5), zeros(5, 0)),
        (zeros(0, 4), zeros(3, 5), zeros(5, 4)),
        (zeros(4, 3).T, zeros(3, 5), zeros(5, 4)),
        (zeros(3, 8)[:, ::2], zeros(3, 5), zeros(5, 4)),
        (zeros(3, 4), zeros(3, 5), zeros(4, 5).T),
        (zeros(3, 4), zeros(3, 5), zeros(5, 4)[:, ::-1]),
    ],
)
def test_product_refuses_what_does_not_fit(out, a, b):
    assert_refused(run_product, out, a, b, False)
    assert_refused(run_product, out, a, b, True)


@pytest.mark.parametrize(
    "out, x",
    [
        (zeros(4, 5), zeros(5, 5)),
        (zeros(5, 4), zeros(5, 5)),
        (zeros(0, 5), zeros(5, 5)),
        (zeros(5, 5).T, zeros(5, 5)),
        (zeros(5, 5), zeros(5, 5).T),
        (zeros(5, 5), zeros(5, 10)[:, ::2]),
    ],
)
def test_transpose_refuses_what_does_not_fit(out, x):
    assert_refused(run_transpose, out, x)


DOTS = dict(out=zeros(3, 6), x=zeros(3, 5), w=zeros(6, 5), scale=zeros(6), bias=zeros(6), first=0, last=6, add=False)


@pytest.mark.parametrize(
    "change",
    [
        dict(out=zeros(2, 6)), dict(out=zeros(4, 6)), dict(out=zeros(3, 5)), dict(out=zeros(6, 3).T),
        dict(x=zeros(1, 5)), dict(x=zeros(3, 4)), dict(x=zeros(5, 3).T),
        dict(w=zeros(5, 5)), dict(w=zeros(6, 6)), dict(w=zeros(5, 6).T), dict(w=zeros(5, 5, dtype=np.int8)),
        dict(scale=zeros(5)), dict(scale=zeros(12)[::2]), dict(bias=zeros(1)), dict(bias=zeros(6)[::-1]),
        dict(first=-1), dict(first=7), dict(first=4, last=3), dict(last=7),
        dict(x=zeros(3, 0), w=zeros(6, 0)),  # the length of a row is divided by
    ],
)  # fmt: skip
def test_dots_refuse_what_does_not_fit(change):
    assert_refused(run_dots, *(DOTS | change).values())
    one_row = {name: (DOTS | change)[name][:1] for name in ("out", "x")}
    if not {*change} & {*one_row}:
        assert_refused(run_dots, *(DOTS | change | one_row).values())


MULTIPLY = dict(
    out=zeros(3, 6), a=zeros(3, 5), b=zeros(5, 6), a_turned=False, b_turned=False,
    scratch=np.zeros(packed.scratch_size(4), np.float32), top=0, bottom=3, left=0, right=6,
)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        dict(out=zeros(2, 6)), dict(out=zeros(4, 6)), dict(out=zeros(3, 5)), dict(out=zeros(6, 3).T),
        dict(a=zeros(2, 5)), dict(a=zeros(3, 4)), dict(b=zeros(4, 6)), dict(b=zeros(5, 7)), dict(a_turned=True),
        dict(b_turned=True), dict(b=zeros(5, 6).T, b_turned=True), dict(a=zeros(5, 3).T, a_turned=False),
        dict(scratch=MULTIPLY["scratch"][:-1]), dict(top=-1), dict(top=2, bottom=1), dict(bottom=4),
        dict(left=-1), dict(left=5, right=4), dict(right=7), dict(a=zeros(3, 0), b=zeros(0, 6)),
    ],
)  # fmt: skip
def test_a_packed_product_refuses_what_does_not_fit(change):
    args = MULTIPLY | change
    args["out"][...] = 7
    with pytest.raises(ValueError, match=r"^multiply: .* needs "):
        packed.multiply(*args.values())
    assert (args["out"] == 7).all()


def test_no_rows_and_no_columns_fit():
    for M, N in ((0, 4), (3, 0), (0, 0)):
        out = zeros(M, N)
        run_product(out, zeros(M, 5), zeros(5, N), False)
        run_transpose(zeros(N, M), out)
        run_dots(out, zeros(M, 5), zeros(N, 5), zeros(0), zeros(0), 0, N, True)


@pytest.mark.parametrize("entry", ["product", "transpose", "dots"])
@pytest.mark.parametrize("what", ["read-only", "of integers"])
def test_arrays_that_vectors_cannot_be_stored_to_are_refused_by_their_type(entry, what):
    out, x = np.zeros((2, 3, 3), np.int32 if what == "of integers" else np.float32)
    out.flags.writeable = what != "read-only"
    run, args = {
        "product": (run_product, (x, x, False)),
        "transpose": (run_transpose, (x,)),
        "dots": (run_dots, (x, x, x[0], x[0], 0, 3, False)),
    }[entry]
    with pytest.raises(Exception, match=r"No implementation|Failed in nopython"):
        run(out, *args)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64, np.float64])
def test_dots_refuse_weights_of_a_type_that_they_do_not_know(kind):
    with pytest.raises(Exception, match=r"No implementation|Failed in nopython"):
        run_dots(*(DOTS | dict(w=np.zeros((6, 5), kind))).values())
