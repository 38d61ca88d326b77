"""Products in registers: every edge of a tile, beside NumPy's product."""

import numpy as np
import pytest

from npgpt import jit
from npgpt.tiles import ROWS, dots, fetch, product, transpose

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
