"""Products of bfloat16: every way's bits beside its reference, what is rounded and what is not."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

from npgpt.config import GPTConfig
from npgpt.kernels import bfloat16, jit, matmul
from npgpt.kernels.bfloat16 import GROUP, PAIRS, product_ref, rounded_ref
from npgpt.kernels.blas import blas_threads
from npgpt.kernels.packed import SPAN, multiply, scratch_size
from npgpt.model import GPT
from npgpt.run.parallel import DataParallel

needs_kernels = pytest.mark.skipif(jit.KERNELS == "numpy", reason="the ways are kernels")
SPECIAL = np.array(
    [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-39, 1.1754943e-38, 1.1754944e-38, 3.4e38, -3.4e38], np.float32
)
SPECIAL = np.append(SPECIAL, np.array([0x7FFFFFFF, 0xFF800001, 0x7F800001], np.uint32).view(np.float32))


def as_bits(x):
    return np.ascontiguousarray(x).view(np.uint32)


def same_bits(x, y):
    """Whether two arrays have the same bits, and NaN in the same places."""
    return bool(((np.isnan(x) & np.isnan(y)) | (as_bits(x) == as_bits(y))).all())


def numbers(rng, shape, spread, special):
    """Random numbers from 2^-spread to 2^spread, some of which are SPECIAL."""
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-spread, spread + 1, shape))
    x = x.astype(np.float32)
    chosen = rng.random(shape) < special
    x[chosen] = rng.choice(SPECIAL, int(chosen.sum()))
    return x


def test_rounding_is_to_the_nearest_of_two_equal_ones_to_the_even():
    one, step = np.float32(1), 2.0**-7
    rounds = {1 + step / 2: 1, 1 + 1.5 * step: 1 + 2 * step, 1 + 0.51 * step: 1 + step, -1 - 0.49 * step: -1}
    x = np.array(list(rounds), np.float32)
    np.testing.assert_array_equal(rounded_ref(x), np.array(list(rounds.values()), np.float32))
    assert rounded_ref(one * 3.4e38) == np.inf  # beyond the largest bfloat16
    assert np.isnan(rounded_ref(SPECIAL[np.isnan(SPECIAL)])).all()
    assert as_bits(rounded_ref(np.array([-1e-39, -0.0], np.float32))).tolist() == [0x80000000] * 2


@needs_kernels
@pytest.mark.parametrize("way", PAIRS)
def test_bits_are_those_of_the_reference_in_1000_random_products(way):
    if way != "plain" and not bfloat16.has_instruction():
        pytest.skip(f"this processor has no {way}")
    rng = np.random.default_rng(0)
    scratch = np.empty(scratch_size(4), PAIRS[way])
    for n in range(250):
        M, K, N = rng.integers(1, 70, 3)
        if n % 50 == 49:
            K = rng.integers(SPAN - 1, 2 * SPAN + 3)
        spread, special = (0, 20, 70)[n % 3], (0, 0.01)[n % 2]
        a, b = numbers(rng, (M, K), spread, special), numbers(rng, (K, N), spread, special)
        expected = product_ref(a, b, way, SPAN)
        for turned in range(4):
            left, right = (np.ascontiguousarray(x.T) if turned >> i & 1 else x for i, x in enumerate((a, b)))
            whole = np.full((M + 1, N + 1), 7, np.float32)
            multiply(whole[:M, :N], left, right, bool(turned & 1), bool(turned & 2), scratch, 0, M, 0, N)
            assert same_bits(whole[:M, :N], expected), (M, K, N, turned)
            assert (whole[M] == 7).all() and (whole[:, N] == 7).all()  # nothing beyond the edges


@needs_kernels
def test_the_ways_differ():
    rng = np.random.default_rng(0)
    a, b = numbers(rng, (8, 4 * GROUP), 3, 0), numbers(rng, (4 * GROUP, 8), 3, 0)
    assert not same_bits(product_ref(a, b, "plain", SPAN), product_ref(a, b, "avx512_bf16", SPAN))


@needs_kernels
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
def test_products_have_the_same_bits_for_any_number_of_threads(monkeypatch, turned):
    monkeypatch.setattr(matmul, "TINY", 0)
    rng = np.random.default_rng(0)
    for M, K, N in ((100, 33, 65), (48, 7, 300), (1, 64, 64), (70, 1, 1)):
        a, b = numbers(rng, (M, K), 3, 0), numbers(rng, (K, N), 3, 0)
        a, b = (np.ascontiguousarray(x.T).T if t else x for x, t in zip((a, b), turned, strict=True))
        found = []
        for threads in (1, 2, 5):
            found.append(np.full((M, N), np.nan, np.float32))
            with blas_threads(threads), matmul.products_of("bfloat16"):
                matmul.matmul(found[-1], a, b)
        assert found[0].tobytes() == found[1].tobytes() == found[2].tobytes()
        assert same_bits(found[0], product_ref(a, b, matmul.way(), SPAN))


@needs_kernels
def test_only_products_of_float32_within_the_context_are_rounded():
    x = np.full((3, 5), 1 + 2.0**-9)
    for dtype, within, expected in (
        (np.float32, "bfloat16", 5.0), (np.float32, "float32", 5 * (1 + 2.0**-9) ** 2),
        (np.float64, "bfloat16", 5 * (1 + 2.0**-9) ** 2),
    ):  # fmt: skip
        a, out = x.astype(dtype), np.empty((3, 3), dtype)
        with matmul.products_of(within):
            matmul.matmul(out, a, a.T)
        np.testing.assert_allclose(out, expected, rtol=1e-6)
    out = np.empty((3, 3), np.float32)
    matmul.matmul(out, x.astype(np.float32), x.T.astype(np.float32))
    np.testing.assert_allclose(out, 5 * (1 + 2.0**-9) ** 2, rtol=1e-6)  # the context is over


@needs_kernels
def test_products_that_lie_anyhow_or_of_nothing():
    x = np.ones((6, 10), np.float32)[:, ::2]
    out = np.full((6, 6), np.nan, np.float32)
    with matmul.products_of("bfloat16"):
        matmul.matmul(out, x, x.T)
        assert (out == 5).all()
        matmul.matmul(out, x[:, :0], x[:, :0].T)
        assert (out == 0).all()
        matmul.matmul(out[:0], x[:0], x.T)


@needs_kernels
def test_a_wrong_instruction_is_not_used(monkeypatch):
    if not bfloat16.has_instruction() or bfloat16.WANTED == "plain":
        pytest.skip("this processor has no vdpbf16ps, or the plain way is wanted")
    monkeypatch.setattr(matmul, "product_ref", lambda *args: product_ref(*args) + np.float32(1e-3))
    with pytest.warns(RuntimeWarning, match="other bits"):
        assert matmul.way.__wrapped__() == "plain"


def test_the_way_is_chosen_by_a_variable():
    code = "from npgpt.kernels import matmul; print(matmul.way())"

    def run(wanted):
        environment = {**os.environ, "NPGPT_BFLOAT16": wanted}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    done = run("plain")
    assert "bfloat16 needs kernels" in done.stderr if jit.KERNELS == "numpy" else done.stdout.strip() == "plain"
    assert "must be one of avx512_bf16, plain, got 'amx16'" in run("amx16").stderr


@needs_kernels
def test_gradients_of_a_model_are_near_those_of_float32_and_the_seed_decides_their_bits():
    config = GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=32, bias=True, dropout=0.1)
    idx, targets = np.random.default_rng(0).integers(0, 31, (2, 4, 16))
    found = {}
    for name, dtype, workers in (
        ("float32", "float32", 1), ("first", "bfloat16", 1), ("again", "bfloat16", 1), ("two", "bfloat16", 2),
    ):  # fmt: skip
        parallel = DataParallel(GPT(config, seed=1), workers, 1, dtype=dtype)
        parallel.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss = parallel.forward_backward(idx, targets, seed=3)
        parallel.gather_grads()
        found[name] = loss, parallel.flat.grads.copy()
        parallel.close()
    assert found["first"][1].tobytes() == found["again"][1].tobytes() != found["float32"][1].tobytes()
    exact, rounded = found["float32"][1], found["first"][1]
    assert np.linalg.norm(rounded - exact) <= 0.02 * np.linalg.norm(exact)
    assert np.linalg.norm(found["two"][1] - rounded) <= 0.01 * np.linalg.norm(rounded)
    assert abs(found["first"][0] - found["float32"][0]) <= 1e-3
