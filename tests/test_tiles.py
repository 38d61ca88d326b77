"""Products in registers: every edge of a tile, beside NumPy's product."""

import numpy as np
import pytest

from npgpt import jit
from npgpt.tiles import ROWS, product

pytestmark = pytest.mark.skipif(jit.KERNELS == "numpy", reason="tiles exist inside kernels only")

SIZES = [1, 3, 8, 9, 31, 32, 33, 65]  # on both sides of ROWS and of one and two vectors


@jit.kernel
def run_product(out, a, b, add):
    product(out, a, b, add)


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
