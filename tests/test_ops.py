"""The hand-written ops: kernel against reference, edges of shape and value, error messages, dropout masks, exp."""

import contextlib
import functools
import importlib
import inspect
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import npgpt.kernels.sum_kernels
import npgpt.muon
import npgpt.optim  # noqa: F401  (their pairs, too, are to be found in jit.PAIRS)
from npgpt import GPT, GPTConfig, Tensor, random_stream
from npgpt.kernels import jit, maths, matmul
from npgpt.kernels.attention import QUERY_BLOCK
from npgpt.kernels.blas import blas_threads
from npgpt.kernels.masks import dropout_mask_ref, mix32_ref
from npgpt.kernels.packed import DEPTH, PACK, PANEL, WIDTH
from npgpt.kernels.sums import add
from npgpt.kernels.vectors import VECTOR
from npgpt.ops import primitives
from npgpt.ops.attention import causal_attention
from npgpt.ops.cross_entropy import cross_entropy
from npgpt.ops.dropout import dropout
from npgpt.ops.embedding import embedding
from npgpt.ops.layernorm import layernorm, layernorm_forward_ref
from npgpt.ops.linear import linear
from npgpt.ops.mlp import gelu_ref, mlp
from npgpt.study.lesson import New
from npgpt.study.lessons import lesson_of

KEY = np.uint32(0xC0FFEE)
DTYPES = [np.float32, np.float64]
BOUND = {np.float32: 1e-5, np.float64: 1e-12}  # of the largest entry

# --------------------------------------------------------------------------------------------------------------------
# Kernel against reference.  A case makes the arguments of a reference: `new(*shape)` gives normal random numbers.


def of_lesson(name):
    """The case that the op's lesson makes for a pair."""
    _, reference = jit.PAIRS[name]
    return functools.partial(lesson_of(reference).reference_arguments, reference)


def embedding_backward_case(new, B, T, C, V, block_size):
    return new(V, C), new(block_size, C), new(B, T, C), new.integers(V, B, T)


def linear_backward_case(new, N, n_in, n_out):
    return new(N, n_out), new(N, n_in), new(n_out, n_in)


def add_case(new, *shape):
    return new(*shape), new(*shape)


def sum_of_squares_case(new, n):
    return (new(n),)


def inverse_root_case(new, m):
    x = new(m, 2 * m)
    gram = x @ x.T
    return (gram + gram.T,)


def nesterov_case(new, n, mu):
    return new(n), new(n), 0.3, mu


def matmul_case(new, M, K, N, a_lies, b_lies):
    return as_it_lies(new(M, K), a_lies), as_it_lies(new(K, N), b_lies)


def as_it_lies(x, how):
    """The same numbers with rows in a row, with columns in a row ("F"), or with gaps in between."""
    return np.repeat(x, 2, axis=1)[:, ::2] if how == "gaps" else np.array(x, order=how)


def take_step_case(new, rows, columns):
    return new(rows, columns), new(rows, columns), 0.3, 0.9


def adamw_case(new, n, weight_decay, step):
    p, m, v, g = new(n), new(n), new(n) ** 2, new(n)
    return p, m, v, g, 0.3, 1e-2, 0.9, 0.95, 1e-8, weight_decay, step


EMBEDDINGS = [(1, 1, 1, 1, 1), (1, 3, 7, 5, 3), (3, 1, 9, 2, 4), (2, 5, 8, 3, 6), (4, 7, 13, 11, 7)]
LAYERNORMS = [(1, 1), (1, 7), (5, 1), (3, 8), (7, 33), (2, 129)]
LINEARS = [(1, 1, 1), (1, 3, 5), (7, 9, 2), (5, 1, 4), (6, 4, 1), (33, 17, 19)]
MLPS = [(1, 1, 1), (1, 3, 12), (7, 5, 11), (9, 8, 33)]
LOGITS = [(1, 1, 0), (1, 5, 0), (4, 1, 1), (6, 13, 2), (3, 65, 0), (5, 130, 4)]
ATTENTIONS = [  # B, T, n_head, hs, p_drop, batch_offset
    (1, 1, 1, 1, 0.0, 0),
    (2, 1, 3, 5, 0.0, 0),
    (3, 5, 2, 7, 0.0, 0),
    (3, 5, 2, 7, 0.4, 11),
    (1, 7, 4, 1, 0.2, 0),
    (2, QUERY_BLOCK - 1, 1, 3, 0.0, 0),
    (2, QUERY_BLOCK, 1, 3, 0.0, 0),
    (2, QUERY_BLOCK + 1, 1, 3, 0.3, 5),
    (2, 2 * QUERY_BLOCK + 7, 2, 33, 0.0, 0),
    (1, 300, 2, 5, 0.0, 0),
    (1, 300, 2, 5, 0.3, 2),
]
DROPOUTS = [(1, 1, 0.5, 0), (1, 7, 0.1, 3), (5, 1, 0.9, 0), (6, 33, 0.25, 2**32 - 3), (4, 8, 0.5, 2**40 + 1)]

MATMULS = [
    (1, 1, 1, "C", "C"),
    (9, 5, 33, "C", "C"),
    (7, DEPTH // 4 + 3, 31, "C", "F"),
    (33, DEPTH // 2 + 1, 49, "F", "C"),
    (8, 40, 64, "F", "F"),
    (5, 40, 20, "gaps", "gaps"),
    (6 * PACK + 9, 33, 50, "C", "F"),
    (200, 3, 33, "F", "C"),
    (4 * PACK + 1, DEPTH // 4 + 1, WIDTH // 4 + 70, "F", "F"),  # no longer tiny
]

CASES = {
    "matmul": (matmul_case, MATMULS),
    "embedding_forward": (of_lesson("embedding_forward"), EMBEDDINGS),
    "embedding_backward": (embedding_backward_case, EMBEDDINGS),
    "layernorm_forward": (of_lesson("layernorm_forward"), LAYERNORMS),
    "layernorm_backward": (of_lesson("layernorm_backward"), LAYERNORMS),
    "linear_forward": (of_lesson("linear_forward"), [(*sizes, bias) for sizes in LINEARS for bias in (True, False)]),
    "linear_backward": (linear_backward_case, LINEARS),
    "mlp_forward": (of_lesson("mlp_forward"), MLPS),
    "mlp_backward": (of_lesson("mlp_backward"), MLPS),
    "attention_forward": (of_lesson("attention_forward"), ATTENTIONS),
    "attention_backward": (of_lesson("attention_backward"), ATTENTIONS),
    "cross_entropy_forward": (of_lesson("cross_entropy_forward"), LOGITS),
    "cross_entropy_backward": (of_lesson("cross_entropy_backward"), LOGITS),
    "dropout_rows": (of_lesson("dropout_rows"), DROPOUTS),
    "add_both": (add_case, [(1,), (7,), (3, 5, 33)]),
    "add_to": (add_case, [(1,), (7,), (3, 5, 33)]),
    "take_step": (take_step_case, [(1, 1), (2, 5), (3, 33)]),
    "inverse_root": (inverse_root_case, [(1,), (5,), (33,), (70,)]),
    "nesterov": (nesterov_case, [(1, 0.9), (67, 0.85)]),
    "sum_of_squares": (sum_of_squares_case, [(1,), (7,), (1000,)]),
    "adamw": (adamw_case, [(1, 0.1, 1), (7, 0.0, 2), (67, 0.5, 100), (600, 0.1, 3)]),
}


def copies(args):
    return [arg.copy(order="K") if isinstance(arg, np.ndarray) else arg for arg in args]


def run_reference(name, args):
    _, reference = jit.PAIRS[name]
    results = reference(*copies(args))
    return [np.asarray(result) for result in (results if isinstance(results, tuple) else (results,))]


def run_fast(name, args):
    """What the function that the ops call writes into its outputs; these hold NaN before, so nothing may be left out.

    Outputs that the reference takes too (in-place updates) hold their input, of course.
    """
    tied, reference = jit.PAIRS[name]
    fast = getattr(importlib.import_module(reference.__module__), name)  # with NPGPT_KERNELS=numpy: the reference
    args = copies(args)
    n_new = len(inspect.signature(tied).parameters) - len(inspect.signature(reference).parameters)
    expected = run_reference(name, args)
    outputs = [np.full(result.shape, np.nan, result.dtype) for result in expected] if n_new else []
    fast(*outputs, *args)
    return outputs if n_new else args[: len(expected)]


def assert_pair_agrees(name, args, bound):
    largest_input = max(np.abs(arg).max() for arg in args if isinstance(arg, np.ndarray))
    for i, (ours, expected) in enumerate(zip(run_fast(name, args), run_reference(name, args), strict=True)):
        assert ours.dtype == expected.dtype
        error = np.abs(ours - expected).max()
        largest = np.abs(expected).max() or largest_input  # all 0: what cancelled were numbers like the inputs
        assert error <= bound * largest, f"{name}: output {i} is off by {error:.1e}, its largest entry is {largest:.1e}"


@pytest.mark.skipif(jit.KERNELS == "numpy", reason="our product is a kernel")
def test_products_that_are_ours(monkeypatch):
    made = []
    monkeypatch.setattr(matmul, "multiply", lambda out, *args: made.append((args[-4:-2], args[-2:])))
    monkeypatch.setattr(matmul, "processors", lambda: 1)

    def ours(M, K, N, threads, how="C"):
        made.clear()
        with contextlib.nullcontext() if threads is None else blas_threads(threads):
            matmul.matmul(np.zeros((M, N)), np.zeros((M, K)), as_it_lies(np.zeros((K, N)), how))
        return sorted(made)

    monkeypatch.setattr(matmul, "PRODUCTS", "ours")
    assert ours(384, 128, 256, 1) == ours(384, 128, 256, 1, "F") == [((0, 384), (0, 256))]
    assert ours(16, 32, 128, 2) == ours(16, 32, 128, None) == [((0, 16), (0, 128))]  # too small to be shared
    assert ours(256, 128, 384, None) == [((0, 256), (0, 384))]
    assert not ours(9, 5, 33, 1, "gaps")  # BLAS takes what lies anyhow
    assert ours(384, 128, 128, 2) == [((0, 208), (0, 128)), ((208, 384), (0, 128))]  # the first thread begins sooner
    assert ours(384, 128, 256, 3) == [((n, n + 128), (0, 256)) for n in (0, 128, 256)]
    columns = [columns for rows, columns in ours(128, 384, 289, 3)]
    assert [columns[0][0], columns[-1][1]] == [0, 289] and columns[0][1] == columns[1][0] != columns[1][1]
    assert columns[0][1] % (PANEL // 8) == 0
    monkeypatch.setattr(matmul, "PRODUCTS", "blas")
    assert not ours(384, 128, 256, 1)


@pytest.mark.skipif(jit.KERNELS == "numpy", reason="our product is a kernel")
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_have_the_same_bits_for_any_number_of_threads(monkeypatch, dtype):
    monkeypatch.setattr(matmul, "PRODUCTS", "ours")
    monkeypatch.setattr(matmul, "TINY", 0)
    usual = matmul.LEAD
    for sizes in MATMULS:
        a, b = matmul_case(New(dtype), *sizes)
        found = []
        for threads, lead in ((1, 0), (2, 0), (5, 0), (2, a.size * b.shape[1] // 3), (3, usual)):
            monkeypatch.setattr(matmul, "LEAD", lead)
            found.append(np.full((len(a), b.shape[1]), np.nan, dtype))
            with blas_threads(threads):
                matmul.matmul(found[-1], a, b)
        np.testing.assert_allclose(found[0], a @ b, rtol=0, atol=BOUND[dtype] * np.abs(a @ b).max())
        if sizes[-1] != "gaps":
            assert len({x.tobytes() for x in found}) == 1


def test_products_are_chosen_by_a_variable():
    code = "from npgpt.kernels import jit, matmul; print(matmul.PRODUCTS)"
    default = "blas" if jit.KERNELS == "numpy" or VECTOR < 64 else "ours"
    for wanted, expected in (("ours", "blas" if jit.KERNELS == "numpy" else "ours"), ("blas", "blas"), ("", default)):
        environment = {name: value for name, value in os.environ.items() if name != "NPGPT_PRODUCTS"}
        environment |= {"NPGPT_PRODUCTS": wanted} if wanted else {}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
    done = subprocess.run(
        [sys.executable, "-m", "npgpt.train", "--max-iters", "1"],
        env={**os.environ, "NPGPT_PRODUCTS": "mkl"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "NPGPT_PRODUCTS must be 'ours' or 'blas', got 'mkl'\n" in done.stderr


def test_a_product_of_nothing_is_zero():
    out = np.full((3, 4), np.nan)
    matmul.matmul(out, np.ones((3, 0)), np.ones((0, 4)))
    assert (out == 0).all()


def test_every_pair_has_a_case():
    assert set(jit.PAIRS) == set(CASES), "a kernel without a case here, or a case without a kernel"


PAIRS_AND_SIZES = [
    pytest.param(name, sizes, id=f"{name} {' '.join(map(str, sizes))}")
    for name, (_, many) in CASES.items()
    for sizes in many
]


@pytest.mark.parametrize("name, sizes", PAIRS_AND_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_agrees_with_its_reference(name, sizes, dtype):
    make, _ = CASES[name]
    assert_pair_agrees(name, make(New(dtype), *sizes), BOUND[dtype])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_gives_nan_out_in_the_same_places(name, dtype):
    make, many = CASES[name]
    args = copies(make(New(dtype), *many[3 if len(many) > 3 else 1]))
    poisoned = next(arg for arg in args if isinstance(arg, np.ndarray) and arg.dtype == dtype)
    poisoned[(-1,) * poisoned.ndim] = np.nan
    if name == "dropout_rows":  # what is dropped is gone, NaN or not; the last element of this mask is kept
        x, key, first_row, p = args
        assert dropout_mask_ref(key, first_row, x.shape, p)[-1, -1]
    for ours, expected in zip(run_fast(name, args), run_reference(name, args), strict=True):
        if name == "attention_forward":  # to the reference 0 times the last value is NaN: it stands in the past, too
            assert not (np.isnan(ours) & ~np.isnan(expected)).any()
            ours, expected = ours[:, -1], expected[:, -1]
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(expected))
    assert any(np.isnan(expected).any() for expected in run_reference(name, args))


@pytest.mark.parametrize("kind", ["a kernel's", "few numbers", "of columns", "stretched", "of two dtypes", "read-only"])
def test_sums_of_any_arrays_are_numpys(kind):
    new = New(np.float32)
    a, b = (new(5, 7) if kind == "few numbers" else new(80, 90) for _ in range(2))
    if kind == "of columns":
        b = np.asfortranarray(b)
    elif kind == "stretched":
        b = b[:1]
    elif kind == "of two dtypes":
        b = b.astype(np.float64)
    b.flags.writeable = kind != "read-only"
    for out, x, y in ((np.empty_like(a), a, b), (mine := a.copy(), mine, b), (yours := a.copy(), b, yours)):
        expected = (x + y).astype(np.float32)
        np.testing.assert_array_equal(add(out, x, y), expected)
        np.testing.assert_array_equal(out, expected)


def test_arrays_of_other_shapes_have_no_sum():
    new = New(np.float32)
    with pytest.raises(ValueError, match="broadcast"):
        add(np.empty((80, 90), np.float32), new(80, 90), new(90, 80))


def test_embedding_backward_adds_to_what_is_there():
    args = embedding_backward_case(New(np.float64), 2, 5, 8, 3, 6)
    dwte, dwpe = run_fast("embedding_backward", args)
    added = embedding_backward_case(New(np.float64), 2, 5, 8, 3, 6)
    added[0][...], added[1][...] = 0, 0
    plain_dwte, plain_dwpe = run_fast("embedding_backward", added)
    np.testing.assert_allclose(dwte, args[0] + plain_dwte)
    np.testing.assert_allclose(dwpe, args[1] + plain_dwpe)
    np.testing.assert_array_equal(dwpe[5:], args[1][5:])  # T = 5 of block_size = 6


# --------------------------------------------------------------------------------------------------------------------
# Extreme values


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_10000(dtype):
    logits = np.array([[1e4, 0, -1e4], [1e4, 1e4, -1e4], [-1e4, -1e4, -1e4], [0, 0, 1e4]], dtype)
    targets = np.array([0, 1, 2, 1])
    x = Tensor(logits, requires_grad=True)
    loss = cross_entropy(x, targets)
    loss.backward(4.0)  # 4 rows: dlogits = p - y
    np.testing.assert_allclose(loss.item(), (0 + np.log(2) + np.log(3) + 1e4) / 4, rtol=1e-6)
    expected = [[0, 0, 0], [0.5, -0.5, 0], [1 / 3, 1 / 3, -2 / 3], [0, -1, 1]]
    np.testing.assert_allclose(x.grad, expected, atol=1e-3 if dtype == np.float32 else 1e-10)


@pytest.mark.parametrize("size", [1, 30, 1e3, 1e5])
def test_attention_and_cross_entropy_of_large_numbers_are_as_exact_as_of_small_ones(size):
    """What float32 loses of a large logarithm must not be lost of every e^(s - lse)."""
    new = New(np.float64)
    qkv, dy = new(2, 40, 96), new(2, 40, 32)
    qkv[..., :64] *= np.sqrt(size / 32**0.5)
    logits, targets = size * new(50, 30), new.integers(30, 50)

    def gradients(dtype):
        x, z = (Tensor(values.astype(np.float32).astype(dtype), requires_grad=True) for values in (qkv, logits))
        causal_attention(x, 2).backward(dy.astype(np.float32).astype(dtype))
        loss = cross_entropy(z, targets)
        loss.backward()
        return x.grad, z.grad, loss.data

    for ours, exact, bound in zip(gradients(np.float32), gradients(np.float64), (3e-5, 1e-6, 1e-6), strict=True):
        assert np.abs(ours - exact).max() <= bound * np.abs(exact).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_scores_of_10000_pick_one_value(dtype):
    T, hs = 5, 3
    new = New(dtype)
    q, k, v = new(T, hs), new(T, hs), new(T, hs)
    q *= 70
    k *= 70
    qkv = Tensor(np.hstack([q, k, v])[None], requires_grad=True)
    y = causal_attention(qkv, 1)
    scores = np.where(np.tri(T) > 0, q @ k.T, -np.inf)
    assert scores.max() > 1e4 and np.diff(np.sort(scores[1:], axis=1)[:, -2:]).min() > 50  # there is a clear winner
    winners = scores.argmax(axis=1)
    np.testing.assert_allclose(y.data[0], v[winners], rtol=1e-5)
    dy = new(1, T, hs)
    y.backward(dy)
    dq, dk, dv = np.split(qkv.grad[0], 3, axis=1)
    expected = np.zeros((T, hs))
    np.add.at(expected, winners, dy[0])
    rounding = 4 * np.finfo(dtype).eps  # not that of the scores: e^(score - lse) is 1 for the winner, to the last bit
    np.testing.assert_allclose(dv, expected, rtol=rounding, atol=rounding)
    np.testing.assert_allclose(np.hstack([dq, dk]), 0, atol=rounding * np.abs(q).max() * np.abs(dy).max())


def test_layernorm_of_rows_whose_squares_overflow_is_not_a_number():
    new = New(np.float32)
    x, weight, bias = 1e30 * new(3, 7), new(7), new(7)
    x[1] = new(7)
    with np.errstate(over="ignore"):
        ours = layernorm(Tensor(x), Tensor(weight), Tensor(bias)).data
        reference, _, _ = layernorm_forward_ref(x, weight, bias, 1e-5)
    for y in (ours, reference):
        assert np.isnan(y).all(axis=1).tolist() == [True, False, True] and np.isfinite(y[1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 3.3, -1e4])
def test_layernorm_of_constant_rows_is_the_bias(value, dtype):
    new = New(dtype)
    x, weight, bias, dy = np.full((2, 7), value, dtype), new(7), new(7), new(2, 7)
    tensor = Tensor(x, requires_grad=True)
    y = layernorm(tensor, Tensor(weight), Tensor(bias))
    rounding = 10 * np.finfo(dtype).eps * abs(value) / np.sqrt(1e-5)  # of x - mean, times rstd = 1 / sqrt(eps)
    np.testing.assert_allclose(y.data, [bias, bias], atol=rounding + 1e-12)
    y.backward(dy)
    g = dy * weight
    expected = (g - g.mean(axis=1, keepdims=True)) / np.sqrt(1e-5)
    np.testing.assert_allclose(tensor.grad, expected, rtol=1e-3, atol=1e-3 + 1e3 * rounding)


def test_layernorm_of_small_differences_on_a_large_mean():
    """The variance from E x^2 - (E x)^2 would be lost in rounding here."""
    new = New(np.float64)
    x = new(3, 33)
    far = Tensor((x + 1000).astype(np.float32))
    y = layernorm(far, Tensor(np.ones(33, np.float32)))
    expected, _, _ = layernorm_forward_ref(far.data.astype(np.float64), 1.0, 0.0, 1e-5)
    np.testing.assert_allclose(y.data, expected, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_far_from_zero(dtype):
    z = np.array([-1e4, -50, -12, -1, 0, 1, 12, 50, 1e4], dtype)
    expected = np.array([0, 0, 0, gelu_ref(-1.0), 0, gelu_ref(1.0), 12, 50, 1e4])
    slope = np.array([0, 0, 0, -0.08296408, 0.5, 1.08296408, 1, 1, 1])
    x = Tensor(z[:, None], requires_grad=True)
    one, zero = Tensor(np.ones((1, 1), dtype)), Tensor(np.zeros(1, dtype))
    y = mlp(x, one, zero, one, zero)
    y.backward(np.ones((9, 1)))
    np.testing.assert_allclose(y.data[:, 0], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(x.grad[:, 0], slope, rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------------
# Causality and shapes


@pytest.mark.parametrize("T", [5, QUERY_BLOCK + 3])
def test_attention_sees_the_past_and_itself_but_not_the_future(T):
    new = New(np.float64)
    n_head, hs = 2, 3
    qkv = new(1, T, 3 * n_head * hs)
    y = causal_attention(Tensor(qkv), n_head).data
    for t in (0, T // 2, T - 1):
        changed = qkv.copy()
        changed[0, t] += new(3 * n_head * hs)
        difference = np.abs(causal_attention(Tensor(changed), n_head).data - y).max(axis=(0, 2))
        np.testing.assert_array_equal(difference[:t], 0)
        assert (difference[t:] > 0).all()


@pytest.mark.parametrize("T", [5, QUERY_BLOCK + 3])
def test_attention_gradient_reaches_the_past_and_itself_but_not_the_future(T):
    new = New(np.float64)
    n_head, hs = 2, 3
    for t in (1, T // 2, T - 1):
        qkv = Tensor(new(1, T, 3 * n_head * hs), requires_grad=True)
        dy = np.zeros((1, T, n_head * hs))
        dy[0, t] = new(n_head * hs)
        causal_attention(qkv, n_head).backward(dy)
        dq, dk, dv = np.split(np.abs(qkv.grad[0]), 3, axis=1)
        assert (dq[t] > 0).all() and (dk[: t + 1] > 0).all() and (dv[: t + 1] > 0).all()
        assert dq[:t].max() == dq[t + 1 :].max(initial=0) == 0
        assert dk[t + 1 :].max(initial=0) == dv[t + 1 :].max(initial=0) == 0


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 1, 3, 5)])
def test_ops_over_the_last_axis_take_any_number_of_axes(shape):
    new = New(np.float64)
    rows = int(np.prod(shape[:-1]))
    weight, w_fc, w_proj = Tensor(new(5)), Tensor(new(7, 5)), Tensor(new(5, 7))
    for op in (
        lambda x: layernorm(x, weight),
        lambda x: linear(x, w_fc),
        lambda x: mlp(x, w_fc, None, w_proj, None),
    ):
        x = new(*shape)
        tensor, flat = Tensor(x, requires_grad=True), Tensor(x.reshape(rows, 5), requires_grad=True)
        y, y_flat = op(tensor), op(flat)
        assert y.shape == (*shape[:-1], y_flat.shape[-1])
        np.testing.assert_allclose(y.data.reshape(y_flat.shape), y_flat.data)
        dy = new(*y.shape)
        y.backward(dy)
        y_flat.backward(dy.reshape(y_flat.shape))
        np.testing.assert_allclose(tensor.grad.reshape(rows, 5), flat.grad)


@pytest.mark.parametrize("p_drop", [0.0, 0.5])
def test_an_empty_batch_has_logits_of_no_sequence_and_gradients_of_zero(p_drop):
    model = GPT(GPTConfig(vocab_size=5, block_size=4, n_layer=1, n_head=2, n_embd=4, dropout=p_drop))
    logits, _ = model(np.zeros((0, 3), int))
    assert logits.shape == (0, 3, 5)
    logits.backward(np.zeros((0, 3, 5)))
    assert not any(parameter.grad.any() for parameter in model.parameters())


def test_ops_take_inputs_and_gradients_that_are_not_contiguous():
    """Both reach the kernels as rows: a transposed input, a broadcast (read-only) and a transposed gradient."""
    new = New(np.float64)
    wpe, targets = Tensor(new(3, 6)), np.array([[1, 2], [0, 5], [3, 3]])
    ops = {
        "layernorm": lambda x: layernorm(x, Tensor(np.arange(6.0))),
        "linear": lambda x: linear(x, Tensor(np.arange(12.0).reshape(2, 6))),
        "mlp": lambda x: mlp(x, Tensor(np.eye(6)), None, Tensor(np.eye(6) + 1), None),
        "attention": lambda x: causal_attention(x, 2),
        "cross_entropy": lambda x: cross_entropy(x, targets),
        "dropout": lambda x: dropout(x, 0.4),
        "embedding": lambda x: embedding(np.array([[0, 3], [1, 1], [2, 2]]), x.reshape(6, 6), wpe),
    }
    for name, op in ops.items():
        x = new(6, 2, 3).T
        strided, straight = Tensor(x, requires_grad=True), Tensor(x.copy(), requires_grad=True)
        assert not strided.data.flags.c_contiguous
        shape = op(straight).shape
        for dy in (np.broadcast_to(new(), shape), new(*shape[::-1]).T):
            results = []
            for tensor, gradient in ((strided, dy), (straight, dy.copy())):
                tensor.grad = None
                with random_stream(1):  # (for dropout)
                    op(tensor).backward(gradient)
                results.append(tensor.grad)
            np.testing.assert_allclose(*results, err_msg=name)


SHAPES = [(), (1,), (4,), (1, 1), (1, 4), (3, 1), (3, 4), (1, 1, 1), (1, 3, 1), (2, 1, 4), (2, 3, 4)]


@pytest.mark.parametrize("a_shape", SHAPES, ids=str)
def test_the_gradient_of_a_broadcast_is_the_sum_over_its_copies(a_shape):
    new = New(np.float64)
    for b_shape in SHAPES:
        a, b = (Tensor(new(*shape), requires_grad=True) for shape in (a_shape, b_shape))
        y = a * b
        dy = new(*y.shape)
        y.backward(dy)
        for x, other in ((a, b), (b, a)):
            entries = np.broadcast_to(np.arange(x.size).reshape(x.shape), y.shape)  # which entry of x each copy is of
            expected = np.bincount(entries.ravel(), weights=(dy * other.data).ravel(), minlength=x.size)
            np.testing.assert_allclose(x.grad, expected.reshape(x.shape), err_msg=f"{a_shape} * {b_shape}")


def test_the_slope_of_relu_at_zero_is_zero():
    x = Tensor(np.array([-1.0, -0.0, 0.0, 2.0]), requires_grad=True)
    x.relu().backward(np.full(4, 3.0))
    np.testing.assert_array_equal(x.grad, [0, 0, 0, 3])


@pytest.mark.parametrize("exponent, slopes", [(0, [0, 0]), (0.0, [0, 0]), (1, [1, 1]), (2, [0, 4]), (-1, [-1, -0.25])])
def test_the_slope_of_a_power(exponent, slopes):
    x = Tensor(np.array([0.0 if exponent >= 0 else 1.0, 2.0]), requires_grad=True)
    (x**exponent).sum().backward()
    np.testing.assert_array_equal(x.grad, slopes)


@pytest.mark.parametrize("exponent", [2, 2.0, np.float64(2), np.array(2.0), np.int8(2)])
def test_an_exponent_leaves_the_dtype_alone(exponent):
    x = Tensor(np.ones(3, np.float32), requires_grad=True)
    y = x**exponent
    y.sum().backward()
    assert y.dtype == x.grad.dtype == np.float32


def test_equal_maxima_share_the_gradient():
    x = Tensor(np.array([[3.0, 1, 3, 3], [2, 5, 4, 5]]), requires_grad=True)
    x.max(axis=1).backward(np.array([6.0, 4.0]))
    np.testing.assert_array_equal(x.grad, [[2, 0, 2, 2], [0, 2, 0, 2]])
    x.grad = None
    x.max().backward(8.0)
    np.testing.assert_array_equal(x.grad, [[0, 0, 0, 0], [0, 4, 0, 4]])


# --------------------------------------------------------------------------------------------------------------------
# Error messages


def tensor(*shape):
    return Tensor(np.zeros(shape))


MISTAKES = [
    (
        lambda: layernorm(tensor(2, 8), tensor(4)),
        ValueError,
        r"layernorm: weight must have shape \(C,\) = \(8,\), got \(4,\)\. Was the model built with another n_embd\?",
    ),
    (
        lambda: layernorm(tensor(2, 8), tensor(8), tensor(1, 8)),
        ValueError,
        r"layernorm: bias must have shape \(C,\) = \(8,\), got \(1, 8\)",
    ),
    (
        lambda: linear(tensor(2, 8), tensor(8, 3)),
        ValueError,
        r"linear: weight must have shape \(out, in\) with in = 8, .* got \(8, 3\)\. Is it transposed\?",
    ),
    (lambda: linear(tensor(2, 8), tensor(8)), ValueError, r"linear: weight must have shape .* got \(8,\)"),
    (
        lambda: linear(tensor(2, 8), tensor(3, 8), tensor(8)),
        ValueError,
        r"linear: bias must have shape \(3,\), got \(8,\)",
    ),
    (
        lambda: mlp(tensor(2, 8), tensor(8, 32), None, tensor(8, 32), None),
        ValueError,
        r"mlp: c_fc\.weight must have shape \(out, in\) with in = 8, .* got \(8, 32\)\. Is it transposed\?",
    ),
    (
        lambda: mlp(tensor(2, 8), tensor(32, 8), None, tensor(32, 8), None),
        ValueError,
        r"mlp: c_proj\.weight must have shape \(out, in\) with in = 32, .* got \(32, 8\)",
    ),
    (
        lambda: mlp(tensor(2, 8), tensor(32, 8), tensor(8), tensor(8, 32), tensor(8)),
        ValueError,
        r"mlp: c_fc\.bias must have shape \(32,\), got \(8,\)",
    ),
    (
        lambda: mlp(tensor(2, 8), tensor(32, 8), tensor(32), tensor(8, 32), tensor(32)),
        ValueError,
        r"mlp: c_proj\.bias must have shape \(8,\), got \(32,\)",
    ),
    (
        lambda: mlp(tensor(2, 8), tensor(32, 8), tensor(32), tensor(8, 32), None),
        ValueError,
        "mlp: give both biases or neither",
    ),
    (
        lambda: causal_attention(tensor(2, 5, 12), 5),
        ValueError,
        r"causal_attention: qkv must have shape \(B, T, 3 \* n_head \* hs\) with n_head = 5, got \(2, 5, 12\)",
    ),
    (lambda: causal_attention(tensor(5, 12), 2), ValueError, r"causal_attention: qkv must .* got \(5, 12\)"),
    (
        lambda: causal_attention(tensor(2, 5, 12), 2, 1.0),
        ValueError,
        r"causal_attention: the dropout probability must lie in \[0, 1\), got 1\.0",
    ),
    (
        lambda: dropout(tensor(2, 3), -0.1),
        ValueError,
        r"dropout: the dropout probability must lie in \[0, 1\), got -0\.1",
    ),
    (lambda: dropout(tensor(2, 3), float("nan")), ValueError, "probability must lie in .* got nan"),
    (
        lambda: embedding(np.array([[0, 5]]), tensor(5, 4), tensor(2, 4)),
        ValueError,
        r"embedding: idx must lie in 0 \.\. 4, got values from 0 to 5\. Was the text encoded with another tokenizer\?",
    ),
    (
        lambda: embedding(np.array([[0, -1]]), tensor(5, 4), tensor(2, 4)),
        ValueError,
        r"embedding: idx must lie in 0 \.\. 4, got values from -1 to 0",
    ),
    (
        lambda: embedding(np.array([[0.0]]), tensor(5, 4), tensor(2, 4)),
        ValueError,
        "embedding: idx must be integers, got dtype float64",
    ),
    (
        lambda: embedding(np.array([0, 1]), tensor(5, 4), tensor(2, 4)),
        ValueError,
        r"embedding: idx must have shape \(B, T\), got \(2,\)",
    ),
    (
        lambda: embedding(np.array([[0, 1, 2]]), tensor(5, 4), tensor(2, 4)),
        ValueError,
        "embedding: a sequence of 3 tokens is longer than block_size = 2",
    ),
    (
        lambda: embedding(np.array([[0, 1]]), tensor(5, 4), tensor(2, 3)),
        ValueError,
        r"embedding: wpe must have shape \(block_size, 4\), got \(2, 3\)",
    ),
    (
        lambda: cross_entropy(tensor(2, 3, 5), np.zeros((2, 4), int)),
        ValueError,
        r"cross_entropy: targets must have shape \(2, 3\), got \(2, 4\)",
    ),
    (
        lambda: cross_entropy(tensor(3, 5), np.array([0, 5, 1])),
        ValueError,
        r"cross_entropy: targets must lie in 0 \.\. 4, got values from 0 to 5",
    ),
    (
        lambda: cross_entropy(tensor(3, 5), np.array([0, -2, 1])),
        ValueError,
        r"cross_entropy: targets must lie in 0 \.\. 4, got values from -2 to 1",
    ),
    (
        lambda: cross_entropy(tensor(3, 5), np.array([0, -1, 1]), ignore_index=-100),
        ValueError,
        r"cross_entropy: targets must lie in 0 \.\. 4, got values from -1 to 1",
    ),
    (
        lambda: cross_entropy(tensor(3, 5), np.zeros(3)),
        ValueError,
        "cross_entropy: targets must be integers, got dtype float64",
    ),
    (
        lambda: cross_entropy(tensor(2, 5), np.array([-1, -1])),
        ValueError,
        "cross_entropy: every target is ignore_index = -1: there is nothing to average",
    ),
    (lambda: tensor() @ tensor(3, 4), ValueError, r"a single number is no matrix: write \*; got shapes \(\) and"),
    (lambda: tensor(3, 4) @ tensor(), ValueError, r"is no matrix: write \*; got shapes \(3, 4\) and \(\)"),
    (lambda: (-2) ** tensor(3), TypeError, "pow: the base must be a positive number"),
    (lambda: primitives.concatenate([np.ones(3)]), TypeError, "concatenate: at least one of them must be a Tensor"),
    (lambda: primitives.stack([tensor(3), Tensor(np.float32(1))]), TypeError, "stack: all must have one dtype"),
    (lambda: tensor(3) ** tensor(3), TypeError, "pow: the exponent must be a number"),
    (lambda: tensor(2) ** np.ones((2, 2)), TypeError, "pow: the exponent must be a number"),
    (lambda: tensor(2) ** [1, 2], TypeError, "pow: the exponent must be a number"),
    (lambda: primitives.where([True], 1.0, 2.0), TypeError, "where: at least one of the two values must be a Tensor"),
]


@pytest.mark.parametrize("call, error, text", MISTAKES, ids=[re.sub(r"\W+", " ", mistake[2]) for mistake in MISTAKES])
def test_what_an_op_cannot_do_it_says(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_an_ignore_index_below_minus_one():
    logits, targets = New(np.float64)(4, 5), np.array([2, -100, 0, 4])
    ours = cross_entropy(Tensor(logits), targets, ignore_index=-100).item()
    np.testing.assert_allclose(ours, cross_entropy(Tensor(logits[[0, 2, 3]]), targets[[0, 2, 3]]).item())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_any_integers_do_as_tokens(dtype):
    idx = np.array([[1, 0], [2, 2]], dtype)
    y = embedding(idx, Tensor(np.arange(6.0).reshape(3, 2)), tensor(2, 2))
    np.testing.assert_array_equal(y.data[..., 0], [[2, 0], [4, 4]])
    assert cross_entropy(tensor(2, 2, 3), idx).item() == pytest.approx(np.log(3))
    as_list = embedding(idx.tolist(), Tensor(np.arange(6.0).reshape(3, 2)), tensor(2, 2))
    np.testing.assert_array_equal(as_list.data, y.data)
    assert cross_entropy(tensor(2, 2, 3), idx.tolist()).item() == pytest.approx(np.log(3))


# --------------------------------------------------------------------------------------------------------------------
# Dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_the_kept_share_is_one_minus_p_in_rows_and_in_columns(p):
    N, C = 1000, 400
    mask = dropout_mask_ref(KEY, 0, (N, C), p)
    sigma = np.sqrt(p * (1 - p))
    assert abs(mask.mean() - (1 - p)) < 5 * sigma / np.sqrt(N * C)
    assert np.abs(mask.mean(axis=0) - (1 - p)).max() < 5 * sigma / np.sqrt(N)
    assert np.abs(mask.mean(axis=1) - (1 - p)).max() < 5 * sigma / np.sqrt(C)


def test_neighbours_are_dropped_independently_of_each_other():
    N, C = 1000, 400
    mask = dropout_mask_ref(KEY, 0, (N, C), 0.5).astype(float) - 0.5
    other = dropout_mask_ref(np.uint32(KEY + 1), 0, (N, C), 0.5) - 0.5
    for a, b in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1]), (mask, other)):
        assert abs((a * b).mean() / 0.25) < 5 / np.sqrt(a.size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("first_row", [0, 17, 2**32 - 3])
def test_the_kernels_mask_is_the_references_bit_for_bit(p, first_row, dtype):
    args = np.ones((7, 33), dtype), KEY, first_row, p
    (y,) = run_fast("dropout_rows", args)
    mask = dropout_mask_ref(KEY, first_row, (7, 33), p)
    np.testing.assert_array_equal(y, np.where(mask, dtype(1 / (1 - p)), dtype(0)))


def test_row_numbers_use_all_64_bits():
    masks = [dropout_mask_ref(KEY, first_row, (1, 200), 0.5) for first_row in (5, 5 + 2**32, 5 + 2**33)]
    assert not any(np.array_equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_mix32_is_murmurhash3s_finaliser():
    figures = mix32_ref(np.array([0, 1, 2, 0xFFFFFFFF], np.uint32))
    assert [hex(figure) for figure in figures] == ["0x0", "0x514e28b7", "0x30f4c306", "0x81f16f39"]


def test_masks_stay_what_they_are():
    """A run that is resumed with a later version must drop what it would have dropped."""
    mask = dropout_mask_ref(np.uint32(1337), 2**33 + 5, (3, 24), 0.5)
    rows = ["".join(map(str, row.astype(int))) for row in mask]
    assert rows == ["001111110011100011011010", "100100111100111001101001", "111001110110111010110100"]


def attention_weights(batch, T, n_head, p_drop):
    """What values are averaged with, after dropout: with the unit matrix for v, y is just that."""
    new = New(np.float64)
    qkv = new(batch, T, 3 * n_head * T)
    qkv[:, :, 2 * n_head * T :] = np.tile(np.eye(T), n_head)
    return lambda part: causal_attention(Tensor(qkv[part]), n_head, p_drop).data


@pytest.mark.parametrize("cut", [1, 3, 4])
def test_masks_do_not_depend_on_how_the_batch_is_split(cut):
    x = np.ones((5, 3, 7))
    weights = attention_weights(5, 4, 2, 0.4)
    with random_stream(9):
        whole = dropout(Tensor(x), 0.3).data, weights(slice(None))
    parts = []
    for part, offset in ((slice(0, cut), 0), (slice(cut, 5), cut)):
        with random_stream(9, batch_offset=offset):
            parts.append((dropout(Tensor(x[part]), 0.3).data, weights(part)))
    np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), whole[0])
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), whole[1], atol=1e-12)


def test_every_call_every_seed_and_every_sequence_has_a_mask_of_its_own():
    x = Tensor(np.ones((4, 3, 20)))
    masks = []
    for seed in (0, 1):
        with random_stream(seed):
            masks += [sequence for _ in range(2) for sequence in dropout(x, 0.5).data]
    assert len({mask.tobytes() for mask in masks}) == 16
    heads = attention_weights(2, 8, 3, 0.5)(slice(None)).reshape(2, 8, 3, 8).transpose(0, 2, 1, 3)
    assert len({(head > 0).tobytes() for sequence in heads for head in sequence}) == 6


def test_dropout_keeps_the_expected_value():
    x = New(np.float64)(1, 200)
    y = dropout(Tensor(np.broadcast_to(x, (4000, 200))), 0.3).data
    np.testing.assert_allclose(y.mean(axis=0), x[0], atol=5 * np.abs(x).max() * np.sqrt(0.3 / 0.7 / 4000))
    kept = y != 0
    np.testing.assert_allclose(y[kept], (np.broadcast_to(x, y.shape) / 0.7)[kept])


def test_attention_dropout_keeps_the_expected_value():
    draws = np.stack([attention_weights(3, 6, 2, 0.3)(slice(None)) for _ in range(400)])
    np.testing.assert_allclose(draws.mean(axis=0), attention_weights(3, 6, 2, 0.0)(slice(None)), atol=0.17)


def test_the_gradient_of_dropout_takes_the_forwards_mask():
    x, dy = Tensor(np.ones((3, 5, 7)), requires_grad=True), New(np.float64)(3, 5, 7)
    y = dropout(x, 0.4)
    dropout(x, 0.4)  # another mask in between changes nothing
    y.backward(dy)
    np.testing.assert_allclose(x.grad, dy * y.data)


def test_no_dropout_with_probability_zero():
    x = tensor(2, 3)
    assert dropout(x, 0) is x


# --------------------------------------------------------------------------------------------------------------------
# exp


@jit.kernel
def exp_of_each(y, x):
    for i in range(x.size):
        y[i] = maths.exp(x[i])


needs_kernels = pytest.mark.skipif(jit.KERNELS == "numpy", reason="maths.exp exists inside kernels only")


@needs_kernels
def test_exp_is_exact_to_1e7_over_the_whole_range_of_float32():
    x = np.concatenate([np.linspace(-87.33, 88.37, 2_000_003), np.linspace(-1, 1, 1_000_003), [0.0, -0.0, 1e-45]])
    x = x.astype(np.float32)
    y = np.empty_like(x)
    exp_of_each(y, x)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(y / exact - 1).max() < 1e-7
    assert (y[-3:] == 1).all()


@needs_kernels
def test_exp_beyond_float32_stays_finite_and_nan_stays_nan():
    x = np.array([-np.inf, -1e30, -104, 89, 1e30, np.inf, np.nan], np.float32)
    y = np.empty_like(x)
    exp_of_each(y, x)
    assert (y[:3] == 0).all()
    assert (y[3:6] > 2e38).all() and np.isfinite(y[3:6]).all()
    assert np.isnan(y[6])


@needs_kernels
def test_exp_of_float64_is_numpys():
    x = np.array([-800.0, -1.5, 0.0, 1e-9, 2.5, 700.0, 800.0, np.nan])
    y = np.empty_like(x)
    exp_of_each(y, x)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(y, np.exp(x), rtol=1e-15)


def test_exp_outside_a_kernel_says_so():
    with pytest.raises(TypeError, match="inside kernels only"):
        maths.exp(1.0)
