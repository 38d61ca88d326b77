"""The graph: sums of gradients, whose memory a gradient lies in, and what backward() lets go."""

import contextlib
import gc
import itertools
import os
import re
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest

from npgpt import GPT, GPTConfig, Tensor, engine, no_grad, random_stream
from npgpt.engine import watched
from npgpt.generate.matrices import rounded_weights, weights_of
from npgpt.kernels import buffers
from npgpt.kernels.buffers import BufferPool, as_rows, empty, reuse_buffers, side_by_side, zeros
from npgpt.kernels.masks import next_random_key
from npgpt.ops import primitives
from npgpt.ops.embedding import embedding
from npgpt.ops.layernorm import layernorm
from npgpt.ops.linear import linear
from npgpt.optim import AdamW, FlatParameters
from npgpt.tensor import record


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def leaf(rng, *shape, dtype=np.float64):
    return Tensor(rng.normal(size=shape).astype(dtype), requires_grad=True)


def small_gpt(dropout=0.0, dtype=np.float32):
    config = GPTConfig(vocab_size=31, block_size=24, n_layer=2, n_head=2, n_embd=24, dropout=dropout, bias=True)
    model = GPT(config, dtype=dtype)
    rng = np.random.default_rng(1)
    return model, rng.integers(0, 31, (5, 23)), rng.integers(0, 31, (5, 23))


# --------------------------------------------------------------------------------------------------------------------
# Gradients are sums


def test_the_example_of_micrograds_readme():
    a, b = Tensor(-4.0, requires_grad=True), Tensor(2.0, requires_grad=True)
    c = a + b
    d = a * b + b**3
    c += c + 1
    c += 1 + c + (-a)
    d += d * 2 + (b + a).relu()
    d += 3 * d + (b - a).relu()
    e = c - d
    f = e**2
    g = f / 2.0
    g += 10.0 / f
    g.backward()
    assert f"{g.item():.4f} {a.grad:.4f} {b.grad:.4f}" == "24.7041 138.8338 645.5773"


def test_a_tensor_used_twice_by_one_op_gets_both_gradients(rng):
    x, dy = leaf(rng, 3, 4), rng.normal(size=(3, 4))
    (x * x).backward(dy)
    np.testing.assert_allclose(x.grad, 2 * x.data * dy)

    x.grad = None
    (x + x).backward(dy)
    np.testing.assert_allclose(x.grad, 2 * dy)

    x.grad = None
    a = x * 3  # not a leaf
    (a + a).backward(dy)
    np.testing.assert_allclose(x.grad, 6 * dy)

    x.grad = None
    (x - x).backward(dy)
    np.testing.assert_array_equal(x.grad, 0)


@pytest.mark.parametrize("with_buffer", [False, True])
def test_a_tensor_used_twice_by_one_op_that_fills_new_grads(rng, with_buffer):
    """x is input, weight and bias at once; each use asks for a place for its gradient."""
    C = 1
    x, dy = leaf(rng, C, C), rng.normal(size=(C, C))
    if with_buffer:
        x.grad_buffer = np.full((C, C), np.nan)
    linear(x, x).backward(dy)  # x^2
    np.testing.assert_allclose(x.grad, 2 * x.data * dy)

    w = leaf(rng, 5)
    if with_buffer:
        w.grad_buffer = np.full(5, np.nan)
    x, dy = rng.normal(size=(3, 5)), rng.normal(size=(3, 5))
    layernorm(Tensor(x), w, w).backward(dy)
    xhat = layernorm(Tensor(x), Tensor(np.ones(5))).data
    np.testing.assert_allclose(w.grad, (dy * xhat + dy).sum(axis=0))


def test_diamond(rng):
    x, dy = leaf(rng, 3, 4), rng.normal(size=(3, 4))
    a = x * 2
    b, c = a.exp(), a.tanh()
    (b * c + a).backward(dy)
    z = 2 * x.data
    expected = 2 * dy * (np.exp(z) * np.tanh(z) + np.exp(z) * (1 - np.tanh(z) ** 2) + 1)
    np.testing.assert_allclose(x.grad, expected)


def test_a_tower_of_diamonds_is_walked_once_per_node():
    """2^60 paths: a walk along paths would never end."""
    x = Tensor(np.array(1.0), requires_grad=True)
    y = x
    for _ in range(60):
        y = y + y
    y.backward()
    assert x.grad == 2.0**60


def test_every_use_of_a_tensor_is_counted_before_its_own_backward_runs(rng):
    """A long and a short way from x to y: the short way must wait for the long one."""
    x, dy = leaf(rng, 4), rng.normal(size=4)
    calls = []
    a = record("op", x.data * 1, (x,), lambda da: (calls.append(1), (da,))[1])
    long = a
    for _ in range(5):
        long = long * 2
    (a + long).backward(dy)
    assert len(calls) == 1
    np.testing.assert_allclose(x.grad, 33 * dy)


@pytest.mark.parametrize("order", ["sum first", "sum last"])
def test_adding_to_one_sides_gradient_of_a_sum_leaves_the_other_sides_alone(rng, order):
    """In s = a + b both gradients *are* the gradient of s; a's later contributions must not reach b or s."""
    x, w, v, dy = leaf(rng, 3), rng.normal(size=3), rng.normal(size=3), rng.normal(size=3)
    a, b = x * 3, x * 5
    s = a + b
    for tensor in (a, b, s):
        tensor.retain_grad()
    y = s * w + a * v if order == "sum first" else a * v + s * w
    y.backward(dy)
    np.testing.assert_allclose(s.grad, dy * w)
    np.testing.assert_allclose(b.grad, dy * w)
    np.testing.assert_allclose(a.grad, dy * w + dy * v)
    np.testing.assert_allclose(x.grad, 3 * a.grad + 5 * b.grad)


def test_a_third_contribution_is_added_too(rng):
    x, dy = leaf(rng, 3), rng.normal(size=3)
    a = x * 1
    (a + a * 2 + a * 4 + a * 8).backward(dy)
    np.testing.assert_allclose(x.grad, 15 * dy)


def test_residual_stream_does_not_add_to_a_gradient_that_others_see(rng):
    """y = x + f(x), where f's backward fills an array of the engine: the engine may add to that one only."""
    x, w, dy = leaf(rng, 3, 5), leaf(rng, 5), rng.normal(size=(3, 5))
    given = dy.copy()
    h = x * 1
    y = (h + layernorm(h, w)).retain_grad()
    h.retain_grad()
    y.backward(dy)
    np.testing.assert_array_equal(dy, given)
    np.testing.assert_array_equal(y.grad, given)

    h2 = Tensor(x.data, requires_grad=True)
    layernorm(h2, Tensor(w.data)).backward(dy)
    np.testing.assert_allclose(h.grad, given + h2.grad)


def test_a_backward_may_return_an_array_of_its_own_and_keep_it(rng):
    kept = []

    def identity(x):
        def backward(dy):
            kept.append(dy.copy())
            return (kept[-1],)

        return record("op", x.data.copy(), (x,), backward)

    x, dy = leaf(rng, 3), rng.normal(size=3)
    a = x * 1
    (identity(a) + identity(a) + identity(a)).backward(dy)
    np.testing.assert_allclose(x.grad, 3 * dy)
    for array in kept:
        np.testing.assert_array_equal(array, dy)


def test_an_array_that_an_op_asked_for_is_taken_over_without_a_copy(rng):
    def identity(x, handed_out):
        def backward(dy):
            handed_out.append(x.new_grad())
            handed_out[-1][...] = dy
            return (handed_out[-1],)

        return record("op", x.data.copy(), (x,), backward)

    x, buffered, dy, arrays = leaf(rng, 3), leaf(rng, 3), rng.normal(size=3), []
    buffered.grad_buffer = np.full(3, np.nan)
    inner = (leaf(rng, 3) * 1).retain_grad()
    for tensor in (x, buffered, inner):
        identity(tensor, arrays).backward(dy)
        assert tensor.grad is arrays.pop()
        np.testing.assert_array_equal(tensor.grad, dy)
    assert buffered.grad is buffered.grad_buffer

    inner = (leaf(rng, 3) * 1).retain_grad()
    (identity(inner, arrays) + inner).backward(dy)  # inner's first gradient is the sum's, the second one identity's
    assert inner.grad is arrays.pop()
    np.testing.assert_array_equal(inner.grad, 2 * dy)


def test_a_backward_that_failed_does_not_disturb_the_next_one(rng):
    def broken(x):
        def backward(dy):
            x.new_grad()
            raise ZeroDivisionError

        return record("op", x.data.copy(), (x,), backward)

    w, dy = leaf(rng, 2, 3), rng.normal(size=(4, 2))
    w.grad_buffer = np.full((2, 3), np.nan)
    with pytest.raises(ZeroDivisionError):
        broken(w).backward(np.ones((2, 3)))
    for _ in range(2):
        w.grad = None
        linear(Tensor(np.ones((4, 3))), w).backward(dy)
        assert w.grad is w.grad_buffer
        np.testing.assert_allclose(w.grad, dy.T @ np.ones((4, 3)))
    w.grad = None
    assert w.new_grad() is w.grad_buffer  # the next gradient is made where it is to lie


def failing(x, times=1):
    """y = 2 x, whose backward runs out of memory `times` times."""
    failures = iter(range(times))

    def backward(dy):
        for _ in failures:
            x.new_grad()
            raise MemoryError
        return (dy * 2,)

    return record("op", x.data * 2, (x,), backward)


def test_a_backward_that_failed_can_be_made_again(rng):
    x = leaf(rng, 2)
    y = failing(x)
    with pytest.raises(MemoryError):
        y.backward(np.ones(2))
    y.backward(np.ones(2))
    np.testing.assert_array_equal(x.grad, [2, 2])


def test_a_backward_that_failed_leaves_nothing_in_what_it_did_not_pass(rng):
    x = leaf(rng, 2)
    h = x * 3
    with pytest.raises(MemoryError):
        (failing(h) + h).backward(np.ones(2))
    x.grad = None
    (h * 1).backward(np.ones(2))
    np.testing.assert_array_equal(x.grad, [3, 3])


@pytest.mark.parametrize("frozen", [False, True])
def test_a_place_that_was_handed_out_in_vain_is_still_the_gradients(rng, frozen):
    """The op that asked for it failed, or nobody wanted the gradient: the next op adds in place."""
    wte, wpe = leaf(rng, 3, 4), Tensor(np.zeros((2, 4)))
    wte.grad_buffer = np.full((3, 4), np.nan)
    if frozen:
        wte.requires_grad = False
        linear(leaf(rng, 2, 4), wte).backward(np.ones((2, 3)))
        wte.requires_grad = True
    else:
        with pytest.raises(MemoryError):
            failing(wte).backward(np.ones((3, 4)))
    embedding(np.array([[1, 1]]), wte, wpe).backward(np.ones((1, 2, 4)))
    assert wte.grad is wte.grad_buffer
    np.testing.assert_array_equal(wte.grad[:, 0], [0, 2, 0])


def test_none_is_no_gradient_and_tensors_without_requires_grad_get_none(rng):
    x, c = leaf(rng, 3), Tensor(rng.normal(size=3))
    y = record("op", x.data * c.data, (x, c), lambda dy: (None, dy * x.data))
    assert y.requires_grad
    y.backward(np.ones(3))
    assert x.grad is None and c.grad is None


@pytest.mark.parametrize("frozen", ["wte", "wpe"])
def test_a_frozen_embedding_table_gets_no_gradient(rng, frozen):
    tables = {"wte": leaf(rng, 5, 4), "wpe": leaf(rng, 3, 4)}
    tables[frozen].requires_grad = False
    embedding(np.array([[1, 2]]), **tables).backward(rng.normal(size=(1, 2, 4)))
    assert [name for name, table in tables.items() if table.grad is None] == [frozen]


# --------------------------------------------------------------------------------------------------------------------
# Leaves own their gradients


def test_leaf_gradients_are_copies(rng):
    x, y, dy = leaf(rng, 3), leaf(rng, 3), rng.normal(size=3)
    given = dy.copy()
    (x + y).backward(dy)
    x.grad += 1
    np.testing.assert_array_equal(dy, given)
    np.testing.assert_array_equal(y.grad, given)


def test_leaf_gradients_are_writeable_and_contiguous_even_from_a_broadcast_view(rng):
    x = leaf(rng, 3, 4)
    (x * 1).transpose().sum().backward()
    assert x.grad.flags.c_contiguous and x.grad.flags.writeable
    y = leaf(rng, 3, 4)
    y.sum().backward()  # the op returns np.broadcast_to(...)
    assert y.grad.flags.c_contiguous and y.grad.flags.writeable


def test_backward_on_a_leaf_gives_it_a_copy_of_the_gradient(rng):
    x, dy = leaf(rng, 3), rng.normal(size=3)
    x.backward(dy)
    x.backward(dy)
    np.testing.assert_allclose(x.grad, 2 * dy)
    assert not np.shares_memory(x.grad, dy)


def test_gradients_of_two_graphs_add_up_in_a_leaf(rng):
    x, first, second = leaf(rng, 3), rng.normal(size=3), rng.normal(size=3)
    (x * 2).backward(first)
    (x + 1).backward(second)
    np.testing.assert_allclose(x.grad, 2 * first + second)


def test_a_gradient_that_the_user_put_there_is_added_to(rng):
    x, given, dy = leaf(rng, 3), rng.normal(size=3), rng.normal(size=3)
    x.grad = given.copy()
    (x * 2).backward(dy)
    np.testing.assert_allclose(x.grad, given + 2 * dy)


@pytest.mark.parametrize("with_buffer", [False, True])
def test_an_array_that_the_user_put_there_is_not_changed(rng, with_buffer):
    """Nor after a backward, whose gradient was the engine's own and could be added to in place."""
    x, given = leaf(rng, 3), np.full(3, 10.0)
    if with_buffer:
        x.grad_buffer = np.full(3, np.nan)
    (x * 1).backward(np.ones(3))
    x.grad = given
    (x * 2).backward(np.ones(3))
    np.testing.assert_array_equal(given, 10)
    np.testing.assert_array_equal(x.grad, 12)


OPS = {  # op's name -> how its gradient is made, in the engine's terms
    "linear: fills new_grad": lambda w: linear(Tensor(np.ones((2, 4))), w),
    "layernorm: fills new_grad as the input": lambda w: layernorm(w, Tensor(np.arange(1.0, 5.0))),
    "mul: an array of its own": lambda w: w * np.arange(12.0).reshape(3, 4),
    "add: the output's gradient itself": lambda w: w + 1,
    "sum: a read-only broadcast view": lambda w: w.sum(axis=0),
    "transpose: a strided view": lambda w: w.transpose(),
    "getitem: an array of its own": lambda w: w[[0, 0, 2]],
    "embedding: adds in place": lambda w: embedding(np.array([[0, 2, 0]]), w, Tensor(np.zeros((3, 4)))),
    "embedding: adds in place, as wpe": lambda w: embedding(np.array([[0, 2]]), Tensor(np.zeros((3, 4))), w),
}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_parameters_gradient_lands_in_its_buffer_whatever_the_op_returned(rng, op):
    plain = leaf(rng, 3, 4)
    parameter = Tensor(plain.data, requires_grad=True)
    parameter.grad_buffer = np.full((3, 4), np.nan)
    y = op(plain)
    dy = rng.normal(size=y.shape)
    y.backward(dy)

    op(parameter).backward(dy)  # written, not added: the buffer held NaN
    assert parameter.grad is parameter.grad_buffer
    np.testing.assert_allclose(parameter.grad, plain.grad)

    op(parameter).backward(dy)  # added
    assert parameter.grad is parameter.grad_buffer
    np.testing.assert_allclose(parameter.grad, 2 * plain.grad)

    parameter.grad = None
    (op(parameter) + op(parameter) * 2).backward(dy)  # written, then added
    assert parameter.grad is parameter.grad_buffer
    np.testing.assert_allclose(parameter.grad, 3 * plain.grad)


@pytest.mark.parametrize("with_buffer", [False, True])
def test_tied_weights_get_both_shares(rng, with_buffer):
    """GPT-2's wte is looked up at the bottom and is the output layer's weight at the top."""
    wte, wpe = leaf(rng, 5, 4), leaf(rng, 6, 4)
    if with_buffer:
        wte.grad_buffer, wpe.grad_buffer = np.full((5, 4), np.nan), np.full((6, 4), np.nan)
    idx, dy = np.array([[1, 3, 1], [0, 1, 4]]), rng.normal(size=(2, 3, 5))
    linear(embedding(idx, wte, wpe), wte).backward(dy)

    x = wte.data[idx] + wpe.data[:3]
    expected = np.einsum("bto,bti->oi", dy, x)
    np.add.at(expected, idx, dy @ wte.data)
    np.testing.assert_allclose(wte.grad, expected)
    np.testing.assert_allclose(wpe.grad, np.vstack([(dy @ wte.data).sum(axis=0), np.zeros((3, 4))]))


@pytest.mark.parametrize("order", ["looked up first", "looked up last"])
def test_tied_weights_that_were_computed_get_both_shares(rng, order):
    """Here wte is not a leaf, and one of its gradients belongs to somebody else: it must not be added to in place."""
    base, other, wpe = leaf(rng, 5, 4), leaf(rng, 5, 4), Tensor(np.zeros((3, 4)))
    idx, dy = np.array([[1, 3, 1]]), rng.normal(size=(5, 4))
    wte, twin = base * 2, (other * 1).retain_grad()
    looked_up = embedding(idx, wte, wpe).reshape(3, 4)
    y = wte + twin  # the gradient of y is that of wte and of twin as well
    a, b = looked_up.sum(), (y * dy).sum()
    (a + b if order == "looked up last" else b + a).backward()
    expected = dy.copy()
    np.add.at(expected, idx, np.ones((1, 3, 4)))
    np.testing.assert_allclose(base.grad, 2 * expected)
    np.testing.assert_allclose(twin.grad, dy)


@pytest.mark.parametrize("idx", [[[0, 0, 0]], [[2, 1, 2]]])
def test_one_table_for_tokens_and_positions(rng, idx):
    table, dy = leaf(rng, 3, 4), rng.normal(size=(1, 3, 4))
    embedding(np.array(idx), table, table).backward(dy)
    expected = dy[0].copy()
    np.add.at(expected, idx[0], dy[0])
    np.testing.assert_allclose(table.grad, expected)


# --------------------------------------------------------------------------------------------------------------------
# The walk


def test_a_chain_of_50000_ops_needs_no_recursion():
    x = Tensor(np.ones(1), requires_grad=True)
    y = x
    for _ in range(50_000):
        y = y + x
    y.backward()
    assert x.grad[0] == 50_001


def test_a_long_chain_that_is_never_walked_can_be_thrown_away():
    x = Tensor(np.ones(1), requires_grad=True)
    y = x
    for _ in range(50_000):
        y = y * 1.0
    del y


def test_the_graph_is_used_up(rng):
    x = leaf(rng, 3)
    y = (x * 2).sum()
    y.backward()
    with pytest.raises(RuntimeError, match=r"used up by an earlier backward.*run the forward again"):
        y.backward()


def test_a_shared_part_of_the_graph_is_used_up_too(rng):
    x = leaf(rng, 3)
    a = x * 2
    first, second = a.sum(), (a * 3).sum()
    first.backward()
    with pytest.raises(RuntimeError, match="used up"):
        second.backward()


def test_a_graph_with_a_used_up_part_adds_no_gradient_at_all(rng):
    x = leaf(rng, 3)
    a = x * 2
    (a * 3).sum().backward()
    x.grad = None
    with pytest.raises(RuntimeError, match="used up"):
        (a * 5 + x).sum().backward()
    assert x.grad is None and a.grad is None


def test_intermediate_gradients_are_let_go_unless_retained(rng):
    x = leaf(rng, 3)
    a, b = x * 2, (x * 3).retain_grad()
    (a + b).sum().backward()
    assert a.grad is None
    np.testing.assert_array_equal(b.grad, 1)


def test_retain_grad_after_more_ops_gives_the_sum_of_all_uses(rng):
    x, dy = leaf(rng, 3), rng.normal(size=3)
    a = (x * 2).retain_grad()
    (a.exp() + a * 5).backward(dy)
    np.testing.assert_allclose(a.grad, dy * (np.exp(2 * x.data) + 5))


CHOICES = {  # what is computed from x (2, 3) and an array or list, which is then filled with 0
    "getitem": (lambda x, i: x[i], np.array([1, 1])),
    "getitem, within a tuple": (lambda x, i: x[:, i], np.array([0, 2])),
    "getitem, a list": (lambda x, i: x[i], [1, 1]),
    "where": (lambda x, i: primitives.where(i, x, 0.0), np.array([True, False, True])),
    "transpose": (lambda x, i: x.transpose(i), [1, 0]),
}


@pytest.mark.parametrize("op, choice", CHOICES.values(), ids=CHOICES)
def test_indices_and_conditions_may_change_before_the_backward(rng, op, choice):
    x, grads = leaf(rng, 2, 3), []
    for change in (False, True):
        y = op(x, choice)
        if change:
            choice[:] = [0] * len(choice)
        y.backward(np.arange(1.0, y.size + 1).reshape(y.shape))
        grads.append(x.grad)
        x.grad = None
    np.testing.assert_array_equal(*grads)


def test_backward_lets_go_of_every_array_of_the_graph(rng):
    x = leaf(rng, 3)
    a = x * 2
    inner = weakref.ref(a.data)
    y = a.exp().sum()
    del a
    assert inner() is not None
    y.backward()
    assert inner() is None


def test_a_graph_has_no_reference_cycles():
    """Memory must not wait for Python's garbage collector: an evaluation or a failed step would pile up buffers."""
    model, idx, targets = small_gpt(dropout=0.2)
    gc.collect()
    gc.disable()
    try:
        logits, loss = model(idx, targets)
        alive = weakref.ref(logits.data), weakref.ref(loss)
        del logits, loss
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


# --------------------------------------------------------------------------------------------------------------------
# no_grad


def test_no_grad_records_nothing(rng):
    x = leaf(rng, 3)
    with no_grad():
        y = x.exp() * 2
    assert not y.requires_grad and y._parents == () and y._backward is None
    with pytest.raises(RuntimeError, match="does not depend on any tensor with requires_grad=True"):
        y.sum().backward()
    assert (x * 2).requires_grad


def test_no_grad_ends_with_its_block_also_after_an_error_and_when_nested(rng):
    x = leaf(rng, 3)
    with pytest.raises(ZeroDivisionError), no_grad():
        raise ZeroDivisionError
    assert (x * 2).requires_grad
    with no_grad():
        with no_grad():
            pass
        assert not (x * 2).requires_grad


def test_no_grad_is_a_matter_of_one_thread(rng):
    x, seen = leaf(rng, 3), []
    with no_grad():
        thread = threading.Thread(target=lambda: seen.append((x * 2).requires_grad))
        thread.start()
        thread.join()
    assert seen == [True]


def test_an_op_without_differentiable_inputs_records_nothing():
    y = Tensor([1.0, 2.0]) * 3
    assert not y.requires_grad and y._parents == ()


# --------------------------------------------------------------------------------------------------------------------
# Buffers

VIEWS = {
    "the array": lambda a: a,
    "a slice": lambda a: a[1:3],
    "a single row": lambda a: a[2],
    "a reshape": lambda a: a.reshape(-1),
    "a transpose": lambda a: a.T,
    "a view of a view": lambda a: a.reshape(8, 10, 40)[2:].swapaxes(0, 1),
    "another dtype": lambda a: a.view(np.uint32),
    "a broadcast": lambda a: np.broadcast_to(a, (3, *a.shape)),
    "a memoryview": memoryview,
    "np.asarray": np.asarray,
    "a strided window": lambda a: np.lib.stride_tricks.sliding_window_view(a, 3, axis=1),
}
SHAPE, FLOAT32 = (80, 40), np.dtype(np.float32)  # 12,800 bytes


@pytest.mark.parametrize("view_of", VIEWS.values(), ids=VIEWS)
def test_a_block_is_not_given_out_while_a_view_of_it_is_alive(view_of):
    pool = BufferPool()
    array = pool.empty(SHAPE, FLOAT32)
    array.fill(1)
    view = view_of(array)
    seen = np.array(view)
    del array
    others = [pool.empty(SHAPE, FLOAT32) for _ in range(3)]
    for other in others:
        other.fill(2)
    np.testing.assert_array_equal(view, seen)
    assert pool.nbytes == 4 * 12_800

    del view, other, others
    again = [pool.empty(SHAPE, FLOAT32) for _ in range(4)]
    assert pool.nbytes == 4 * 12_800
    assert not any(np.shares_memory(a, b) for i, a in enumerate(again) for b in again[:i])


def test_a_block_is_free_for_any_array_of_the_same_size():
    pool = BufferPool()
    block = pool.empty(SHAPE, FLOAT32).ctypes.data  # the array is gone after this line
    array = pool.empty((1600,), np.dtype(np.float64))
    assert array.ctypes.data == block and array.shape == (1600,) and array.dtype == np.float64
    assert pool.nbytes == 12_800


def test_a_block_outlives_its_pool():
    pool = BufferPool()
    array = pool.empty(SHAPE, FLOAT32)
    array.fill(3)
    del pool
    gc.collect()
    assert (array == 3).all()


@pytest.mark.parametrize("shape", [(80, 40), (1, 1025), (33, 7, 11), (4097,)])
def test_blocks_are_aligned_contiguous_and_writeable(shape):
    pool = BufferPool()
    for dtype in (np.float32, np.float64):
        array = pool.empty(shape, np.dtype(dtype))
        assert array.shape == shape and array.dtype == dtype
        assert array.ctypes.data % 64 == 0 and array.flags.c_contiguous and array.flags.writeable


@pytest.mark.parametrize("kind", [None, "int8", "bfloat16"])
def test_what_kernels_read_again_and_again_is_aligned(kind):
    config = GPTConfig(n_layer=2, n_head=3, n_embd=33, vocab_size=35, block_size=20)
    model = GPT(config)
    arrays = [p.data for p in model.parameters()]
    layers = rounded_weights(model, kind, weights_of(model)).layers
    arrays += [matrix.numbers for layer in layers for matrix in (layer.c_fc, layer.mlp_proj)]
    flat = FlatParameters(model)
    optimizer = AdamW(flat)
    for everything in (flat.weights, flat.grads, optimizer.m, optimizer.v):
        arrays += [view for _, view in flat.views(everything)]
    assert all(array.ctypes.data % 64 == 0 for array in arrays if array.nbytes >= 2048)


def test_arrays_side_by_side_are_neighbours_and_have_no_number_in_common():
    sizes = [1000, 3, 601, 5000, 77, 2048, 514, 30_000, 700]  # few fill their last line of the cache
    with side_by_side():
        arrays = [make((n,), dtype) for n in sizes for make in (zeros, empty) for dtype in (np.float32, np.float64)]
    large = [array for array in arrays if array.nbytes >= 2048]
    for n, array in enumerate(arrays):
        array[...] = n
    assert all((array == n).all() for n, array in enumerate(arrays))
    assert all(array.ctypes.data % 64 == 0 and array.flags.c_contiguous for array in large)
    places = sorted((array.ctypes.data, array.nbytes) for array in large)
    neighbours = [after - (at + nbytes) < 64 for (at, nbytes), (after, _) in itertools.pairwise(places)]
    assert sum(neighbours) >= len(large) // 2
    assert not np.shares_memory(zeros((1000,), np.float32), arrays[0])


def test_the_weights_of_a_model_lie_side_by_side():
    """So that the system may map them by large pages: a model writes faster."""
    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=64, vocab_size=65, block_size=32))
    parts = {id(p.data.base) for p in model.parameters() if p.data.nbytes >= 2048}
    assert len(parts) < 8 < len(list(model.parameters()))


def test_small_arrays_are_not_pooled():
    pool = BufferPool()
    pool.empty((10,), FLOAT32)
    pool.empty((0, 5), FLOAT32)
    pool.empty((), FLOAT32)
    assert pool.nbytes == 0


def test_empty_asks_the_pool_of_its_context_only():
    outer, inner = BufferPool(), BufferPool()
    empty(SHAPE, np.float32)
    with reuse_buffers(outer):
        empty(SHAPE, np.float32)
        with contextlib.suppress(ZeroDivisionError), reuse_buffers(inner):
            empty(SHAPE, np.float64)
            raise ZeroDivisionError
        a = empty(SHAPE, np.float32)
        b = zeros(SHAPE, np.float32)
    c = empty(SHAPE, np.float32)
    assert (outer.nbytes, inner.nbytes) == (2 * 12_800, 25_600)
    assert (b == 0).all() and not np.shares_memory(a, c)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_training_steps_find_their_buffers_again_and_give_the_same_bits(dropout):
    """The second step needs no memory that the first one did not; and reused memory changes no figure."""
    model, idx, targets = small_gpt(dropout)

    def step():
        model.zero_grad()
        with random_stream(7):
            _, loss = model(idx, targets)
        loss.backward()
        return [loss.data.copy()] + [p.grad.copy() for p in model.parameters()]

    expected = step()
    pool, sizes = BufferPool(), []
    for _ in range(4):
        with reuse_buffers(pool):
            for ours, theirs in zip(step(), expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)
        sizes.append(pool.nbytes)
    assert sizes[0] > 0
    assert sizes[1:] == [sizes[1]] * 3  # the first step leaves its parameters' gradients behind, the second one's go


def test_a_forward_without_backward_gives_its_buffers_back():
    model, idx, targets = small_gpt()
    pool = BufferPool()
    sizes = []
    for _ in range(3):
        with reuse_buffers(pool), no_grad():
            model(idx, targets)
        with reuse_buffers(pool):
            model(idx, targets)  # a graph that is thrown away
        sizes.append(pool.nbytes)
    assert sizes == [sizes[0]] * 3
    assert sum(len(loans) * size for size, loans in pool.free.items()) == pool.nbytes  # nothing is on loan
    assert len(pool._loans) == sum(map(len, pool.free.values()))


def test_nan_fill_makes_unwritten_memory_loud(monkeypatch):
    monkeypatch.setattr(buffers, "NAN_FILL", True)
    for pool in (None, BufferPool()):
        with reuse_buffers(pool):
            for shape in ((3,), SHAPE):
                empty(shape, np.float32).fill(1)
                assert np.isnan(empty(shape, np.float32)).all() and np.isnan(empty(shape, np.float64)).all()
                assert (zeros(shape, np.float32) == 0).all()
                empty(shape, np.int64)  # integers have no NaN


def test_without_the_switch_nothing_is_written(monkeypatch):
    monkeypatch.setattr(buffers, "NAN_FILL", False)
    with reuse_buffers(BufferPool()):
        empty(SHAPE, np.float32).fill(7)
        assert (empty(SHAPE, np.float32) == 7).all()


def test_no_op_reads_what_was_never_written(monkeypatch):
    model, idx, targets = small_gpt(dropout=0.2)
    results = []
    for fill in (False, True):
        monkeypatch.setattr(buffers, "NAN_FILL", fill)
        model.zero_grad()
        with reuse_buffers(BufferPool()), random_stream(3):
            _, loss = model(idx, targets)
            loss.backward()
        results.append([loss.data] + [p.grad for p in model.parameters()])
    for plain, filled in zip(*results, strict=True):
        np.testing.assert_array_equal(plain, filled)


@pytest.mark.parametrize("value, on", [("", False), ("0", False), ("1", True)])
def test_nan_fill_is_switched_on_by_the_environment(value, on):
    code = "from npgpt.engine import empty; import numpy; print(numpy.isnan(empty((1000,), numpy.float32)).all())"
    environment = {**os.environ, "NPGPT_NAN_FILL": value}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "True" or not on


def test_as_rows_copies_only_if_it_must():
    array = np.arange(24.0).reshape(2, 3, 4)
    assert np.shares_memory(as_rows(array), array) and as_rows(array).shape == (6, 4)
    read_only = array.view()
    read_only.flags.writeable = False
    for other in (array.transpose(1, 0, 2), np.broadcast_to(array[:1], (2, 3, 4)), array[0, :, ::2], read_only):
        rows = as_rows(other)
        assert not np.shares_memory(rows, array)
        assert rows.flags.c_contiguous and rows.flags.writeable
        np.testing.assert_array_equal(rows, np.asarray(other).reshape(-1, other.shape[-1]))


# --------------------------------------------------------------------------------------------------------------------
# Random streams


def keys(n=5):
    return [next_random_key() for _ in range(n)]


def test_a_random_stream_starts_again_with_its_seed():
    with random_stream(11):
        first = keys()
    with random_stream(11):
        again = keys()
    with random_stream(12):
        other = keys()
    assert first == again
    assert len({int(key) for key, _ in first + other}) == 10
    assert all(key.dtype == np.uint32 and offset == 0 for key, offset in first)


def test_a_random_stream_within_another_does_not_disturb_it():
    with random_stream(11):
        undisturbed = keys(4)
    with random_stream(11):
        before = keys(2)
        with random_stream(5, batch_offset=3):
            assert [offset for _, offset in keys()] == [3] * 5
        assert before + keys(2) == undisturbed


def test_keys_stay_what_they_are():
    """A run that is resumed with a later version must drop what it would have dropped."""
    with random_stream(1337):
        assert [hex(key) for key, _ in keys(2)] == ["0xd5a657e0", "0x5b922257"]


def test_the_largest_seed_works():
    with random_stream(2**32 - 1):
        assert len({int(key) for key, _ in keys(100)}) == 100


# --------------------------------------------------------------------------------------------------------------------
# Data types and error messages


@pytest.mark.parametrize(
    "data, dtype",
    [
        (np.ones(2, np.float32), np.float32),
        (np.ones(2, np.float64), np.float64),
        ([1.0, 2.0], np.float64),
        (1.5, np.float64),
        ([1, 2], np.float32),
        (np.ones(2, np.uint8), np.float32),
        ([True, False], np.float32),
        (np.ones(2, np.float16), np.float32),
        (np.ones(2, ">f4"), np.float32),
        (np.ones(2, ">f8"), np.float64),
        (np.ones(2, np.longdouble), np.float64),
    ],
)
def test_a_tensor_is_float32_unless_it_is_float64(data, dtype):
    assert Tensor(data).dtype == dtype


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("other", [2, 2.0, np.float64(2), np.float32(2), np.full(3, 2.0), [2, 2, 2]])
def test_numbers_and_arrays_take_the_dtype_of_the_tensor_beside_them(dtype, other):
    x = Tensor(np.ones(3, dtype), requires_grad=True)
    for y in (x + other, other - x, x * other, other / x, x - other, other * x, other + x, x / other):
        assert y.dtype == dtype
        y.backward(np.ones(3))
    assert x.grad.dtype == dtype
    np.testing.assert_allclose(x.grad, 1 - 1 + 2 - 2 + 1 + 2 + 1 + 0.5)


def test_gradients_have_the_dtype_of_their_tensor():
    x = Tensor(np.ones(3, np.float32), requires_grad=True)
    y = Tensor(np.ones(3, np.float64), requires_grad=True)
    for mixed in (x * y, x + y, y + x, x - y, y / x):
        assert mixed.dtype == np.float64
        mixed.sum().backward()
        assert x.grad.dtype == np.float32 and y.grad.dtype == np.float64


def test_a_tensor_shares_the_memory_of_its_array():
    array = np.ones(3)
    assert Tensor(array).data is array


def test_a_tensor_looks_like_its_array():
    x = Tensor(np.arange(6.0).reshape(2, 3), requires_grad=True)
    assert (x.shape, x.ndim, x.size, len(x)) == ((2, 3), 2, 6, 2)
    assert "requires_grad=True" in repr(x) and "5." in repr(x)
    assert isinstance(x[1, 2].item(), float) and x[1, 2].item() == 5.0
    assert [row.shape for row in x] == [(3,), (3,)]


def broken(grads):
    """A graph whose backward returns `grads` for one parent of shape (3,)."""
    return record("op", np.ones(3), (Tensor(np.ones(3), requires_grad=True),), lambda dy: grads)


MISTAKES = [
    (lambda: Tensor(Tensor(1.0)), TypeError, "Tensor: data is a Tensor already"),
    (lambda: Tensor(["a"]), TypeError, "Tensor: data must be numbers, got dtype <U1"),
    (lambda: Tensor([1j]), TypeError, "Tensor: data must be numbers, got dtype complex128"),
    (lambda: Tensor([Tensor(1.0)]), TypeError, "a Tensor is not an array"),
    (
        lambda: Tensor([1.0], requires_grad=True).backward(Tensor([1.0])),
        TypeError,
        r"a Tensor is not an array: use its \.data",
    ),
    (lambda: primitives.where(Tensor([1.0]), Tensor([1.0]), 0.0), TypeError, r"not an array: use its \.data"),
    (lambda: embedding(Tensor([[1]]), Tensor([[1.0]]), Tensor([[1.0]])), TypeError, r"an array: use its \.data"),
    (lambda: Tensor([1.0])[Tensor([0])], TypeError, r"array: use its \.data"),
    (lambda: Tensor([1.0]).backward(), RuntimeError, "does not depend on any tensor with requires_grad=True"),
    (
        lambda: Tensor([1.0, 2.0], requires_grad=True).backward(),
        ValueError,
        r"of shape \(2,\), give its gradient: backward\(grad\)",
    ),
    (
        lambda: Tensor([1.0, 2.0], requires_grad=True).backward(np.ones(3)),
        ValueError,
        r"grad must have shape \(2,\), got \(3,\)",
    ),
    (
        lambda: Tensor([1.0, 2.0], requires_grad=True).backward(1.0),
        ValueError,
        r"grad must have shape \(2,\), got \(\)",
    ),
    (
        lambda: broken((np.ones(4),)).backward(np.ones(3)),
        ValueError,
        r"a gradient of shape \(4,\) for a tensor of shape \(3,\)",
    ),
    (lambda: broken((np.ones(3), np.ones(3))).backward(np.ones(3)), ValueError, "longer|shorter"),
    (lambda: broken(()).backward(np.ones(3)), ValueError, "longer|shorter"),
]


@pytest.mark.parametrize("action, error, text", MISTAKES, ids=[re.sub(r"\W+", " ", mistake[2]) for mistake in MISTAKES])
def test_mistakes_are_named(action, error, text):
    with pytest.raises(error, match=text):
        action()


def test_a_single_number_in_any_shape_needs_no_gradient():
    for shape in ((), (1,), (1, 1)):
        x = Tensor(np.full(shape, 3.0), requires_grad=True)
        (x * x).backward()
        np.testing.assert_array_equal(x.grad, np.full(shape, 6.0))


def test_operators_of_arrays_leave_it_to_the_tensor(rng):
    """ndarray + Tensor must not become an array of objects."""
    x, array = leaf(rng, 3), rng.normal(size=(2, 3))
    for y in (array + x, array - x, array * x, array / x):
        assert isinstance(y, Tensor) and y.shape == (2, 3)
    assert isinstance(array @ leaf(rng, 3, 4), Tensor)


def test_primitives_of_the_module_are_the_methods_of_tensor(rng):
    x = leaf(rng, 2, 3)
    np.testing.assert_array_equal(Tensor.exp(x).data, x.exp().data)
    np.testing.assert_array_equal(x.T.data, x.data.T)


# --------------------------------------------------------------------------------------------------------------------
# What is seen of a graph as it is made


def test_an_observer_sees_every_tensor_with_its_parents_and_may_change_it(rng):
    a, b = Tensor(rng.normal(size=3), requires_grad=True), Tensor(rng.normal(size=3))
    seen = []
    with watched(lambda op, out, parents, backward: seen.append((out, parents, op))):
        c = a * b
        with no_grad():
            d = c.exp()
    _ = a + b  # no longer
    assert [name for _, _, name in seen] == ["mul", "exp"]
    assert seen[0][0] is c and seen[0][1] == (a, b) and seen[1][0] is d and seen[1][1] == (c,)

    def nudge(op, out, parents, backward):
        out.data[0] += 1

    with watched(nudge):
        np.testing.assert_allclose((a * b).data - c.data, [1, 0, 0], atol=1e-15)


def test_who_watches_is_told_of_each_backward_before_its_gradients_are_added(rng):
    x, w, seen = leaf(rng, 3), leaf(rng, 3), []

    def passed(op, parents, grads):
        seen.append((op, parents, [grad.copy() for grad in grads], x.grad is None))

    with watched(passed=passed):
        (x * w).tanh().sum().backward()
    (x * 1).sum().backward()  # no longer
    assert [op for op, *_ in seen] == ["sum", "tanh", "mul"]
    _, parents, grads, first = seen[-1]
    assert parents == (x, w) and first
    np.testing.assert_array_equal(grads[1], w.grad)


class Number:
    """A node of a graph that is no Tensor."""

    def __init__(self, data, op=None, parents=(), backward=None):
        self.data, self.requires_grad, self._gradient = np.array(data), True, engine.Gradient()
        self._op, self._parents, self._backward, self._read = op, parents, backward, ()

    def __mul__(self, other):
        return Number(self.data * other.data, "mul", (self, other), lambda dy: (dy * other.data, dy * self.data))


def test_the_walk_takes_any_node():
    a, b = Number(3.0), Number(4.0)
    c = a * b * a
    engine.backward(c, np.array(1.0))
    assert (a._gradient.value, b._gradient.value, c._gradient.value) == (24.0, 9.0, None)
    with pytest.raises(RuntimeError, match="used up"):
        engine.backward(c, np.array(1.0))


@pytest.mark.parametrize("partner", [None, "2", [None, 1], np.array([1 + 2j, 3])])
def test_what_is_no_number_is_no_partner_of_a_tensor(rng, partner):
    with pytest.raises(TypeError, match="a Tensor's partner must be a number or an array of numbers, got dtype"):
        leaf(rng, 2) + partner
