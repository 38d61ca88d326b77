"""npgpt as a library: what a student does to a model works, or is refused in a line; nothing is silently wrong."""

import copy
import dataclasses
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fuzz_library import Relu

from npgpt import GPT, AdamW, DataParallel, GPTConfig, Tensor, TrainConfig, no_grad, random_stream
from npgpt.data.bpe import BPETokenizer
from npgpt.errors import CheckpointError, UsageError
from npgpt.files import folder
from npgpt.generate.decode import Decoder
from npgpt.generate.generation import Generation
from npgpt.gradcheck import GradcheckError, gradcheck
from npgpt.kernels.buffers import BufferPool, reuse_buffers
from npgpt.muon import Muon
from npgpt.nn import Module, Parameter
from npgpt.ops.linear import linear
from npgpt.ops.primitives import concatenate, stack, where
from npgpt.optim import FlatParameters
from npgpt.run.audit import Auditor
from npgpt.run.events import Progress
from npgpt.run.trainer import Trainer
from npgpt.signals import NEVER
from npgpt.study.receipt import ways
from npgpt.tensor import record

TOKENS = np.random.default_rng(0).integers(0, 11, (4, 9))
X, Y = TOKENS[:, :-1], TOKENS[:, 1:]


def gpt(n_layer=1, noise=0.3, **options):
    """A small GPT whose weights are far enough from their start that everything counts."""
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=n_layer, n_head=1, n_embd=16, **options))
    rng = np.random.default_rng(1)
    for p in model.parameters():
        p.data += rng.normal(0, noise, p.shape).astype(np.float32)
    return model


def one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    return str(error.value)


# --------------------------------------------------------------------------------------------------------------------
# Python's own answers

A = np.array([[1.0, 2.0], [3.0, 2.0]])
ROW = np.array([1.0, 2.0])


@pytest.mark.parametrize("sign", ["==", "!=", "<", "<=", ">", ">="])
def test_comparisons_are_numpys(sign):
    values = {"a": A, "row": ROW, "two": 2.0}
    tensors = {"a": Tensor(A), "row": Tensor(ROW), "two": 2.0}
    for left, right in (("a", "a"), ("a", "row"), ("row", "a"), ("a", "two"), ("two", "a")):
        expected = eval(f"{left} {sign} {right}", dict(values))
        for other in ("tensor", "array"):
            names = {left: tensors[left], right: tensors[right] if other == "tensor" else values[right]}
            found = eval(f"{left} {sign} {right}", names)
            assert isinstance(found, np.ndarray) and found.dtype == bool and np.array_equal(found, expected)


@pytest.mark.parametrize(
    "write", [bool, float, int, lambda t: f"{t:.2f}", lambda t: f"{t:8.1e}", lambda t: 2.0 in t, lambda t: [*t], len],
    ids=["bool", "float", "int", "format", "format e", "in", "list", "len"],
)  # fmt: skip
@pytest.mark.parametrize("values", [3.0, 0.0, [0.0], [[2.0]], [1.0, 2.0], [[1.0, 3.0], [0.0, 4.0]], np.zeros((0, 2))])
def test_what_python_asks_is_answered_as_numpy_does(write, values):
    array = np.array(values)
    try:
        expected = write(array)
    except (TypeError, ValueError) as error:
        with pytest.raises((TypeError, ValueError)):
            write(Tensor(array))
        assert error
        return
    found = write(Tensor(array))
    if isinstance(found, list):
        assert all(isinstance(x, Tensor) and np.array_equal(x.data, y) for x, y in zip(found, expected, strict=True))
    else:
        assert type(found) is type(expected) and found == expected


def test_a_tensor_is_a_key_by_itself():
    a, b = Tensor(ROW), Tensor(ROW)
    assert len({a, b}) == 2 and {a: 1}.get(b) is None and {a: 1}[a] == 1


@pytest.mark.parametrize("function", [np.array_equal, np.array_equiv, np.allclose, np.concatenate, np.where, np.sum])
def test_numpys_functions_ask_for_the_data(function):
    t = Tensor(ROW)
    args = {np.concatenate: ([t, t],), np.where: (True, t, t), np.sum: (t,)}.get(function, (t, ROW))
    with pytest.raises(TypeError, match=r"\.data") as error:
        function(*args)
    one_line(error)


@pytest.mark.parametrize("sign", ["+", "-", "*", "/", "**", "@"])
def test_a_leaf_is_not_replaced_by_a_result(sign):
    leaf = Parameter(np.ones((2, 2)))
    for context in (no_grad(), random_stream(1)):
        with context, pytest.raises(TypeError, match=rf"write a\.data \{sign[0]}") as error:
            exec(f"leaf {sign}= 2", {"leaf": leaf})
    one_line(error)
    names = {"total": Tensor(np.eye(2)), "other": 2 if sign == "**" else Tensor(np.full((2, 2), 2.0))}
    exec(f"total {sign}= other", names)  # what is no leaf that is trained becomes the result, as ever
    assert isinstance(names["total"], Tensor)


def test_a_training_by_hand_trains():
    model, losses = gpt(noise=0), []
    for _ in range(20):
        model.zero_grad()
        _, loss = model(X, Y)
        loss.backward()
        losses.append(loss.item())
        for p in model.parameters():
            p.data -= 0.5 * p.grad
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(TypeError, match=r"a\.data -="):
        for p in model.parameters():
            p -= 0.5 * p.grad


def test_keepdims_is_given_by_name():
    t = Tensor(np.zeros((2, 3, 4)))
    for method in (t.sum, t.mean, t.max):
        with pytest.raises(TypeError):
            method(0, 1)
        assert method((0, 1)).shape == (4,) and method(0, keepdims=True).shape == (1, 3, 4)


@pytest.mark.parametrize(
    "use",
    [
        lambda m: Tensor(m), lambda m: Tensor(ROW) * m, lambda m: m + Tensor(ROW), lambda m: Tensor(ROW) @ m,
        lambda m: where(m > 0, Tensor(ROW), 0.0), lambda m: (Tensor(ROW, requires_grad=True) * 1).backward(m),
        lambda m: concatenate([Tensor(ROW), m]), lambda m: stack([Tensor(ROW), m]), lambda m: Tensor(ROW) == m,
    ],
)  # fmt: skip
def test_an_array_that_knows_more_than_its_numbers_is_refused(use):
    with pytest.raises(TypeError, match="plain NumPy array") as error:
        use(np.ma.masked_equal([1.0, 999.0], 999.0))
    one_line(error)


@pytest.mark.parametrize("context", [no_grad, lambda: random_stream(7), lambda: reuse_buffers(BufferPool())])
def test_a_context_decorates_functions_and_nothing_that_goes_on_after_them(context):
    @context()
    def function():
        return (Tensor(ROW, requires_grad=True) * 1).requires_grad

    assert [function(), function()] == [context is not no_grad] * 2

    def generator():
        yield

    async def coroutine():
        pass

    async def both():
        yield

    for wrong in (generator, coroutine, both):
        with pytest.raises(TypeError, match="goes on after its call"):
            context()(wrong)


# --------------------------------------------------------------------------------------------------------------------
# Aliases and copies


def test_gradients_that_are_kept_are_arrays_of_their_own():
    x = Tensor(np.ones(3), requires_grad=True)
    p, q = (x * 2.0).retain_grad(), (x * 3.0).retain_grad()
    total = ((p + q) * 1.0).retain_grad()
    given = np.full(3, 2.0)
    total.backward(given)
    kept = [p.grad, q.grad, total.grad, x.grad]
    for i, grad in enumerate(kept):
        assert grad.flags.writeable and not any(np.shares_memory(grad, other) for other in [*kept[:i], given])
    y = (x * 1.0).retain_grad()
    y.sum().backward()
    y.grad *= 0.5


def test_a_copy_of_what_was_computed_is_refused():
    _, loss = gpt()(X, Y)
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="its backward would go to the originals") as error:
            make(loss)
    one_line(error)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_model_is_copied_whole_also_out_of_an_optimizer(make):
    model = gpt()
    AdamW(FlatParameters(model))
    other = make(model)
    assert other.lm_head.weight is other.transformer.wte.weight
    for (name, p), (other_name, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert name == other_name and type(q) is Parameter and q.grad_buffer is None
        assert np.array_equal(p.data, q.data) and not np.shares_memory(p.data, q.data)
    _, loss = other(X, Y)
    loss.backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_optimizer_is_not_copied_away_from_its_weights(make):
    model = gpt()
    parallel = DataParallel(model)
    optimizer = AdamW(parallel.flat)
    for what in (parallel.flat, (model, parallel.flat, optimizer)) + ((optimizer,) if make is not copy.copy else ()):
        if make is copy.copy and isinstance(what, tuple):
            continue
        with pytest.raises(TypeError, match="copy the model"):
            make(what)


# --------------------------------------------------------------------------------------------------------------------
# One home for a parameter


def test_a_place_of_a_parameter_takes_a_parameter_or_none():
    model = gpt(bias=True)
    proj = model.transformer.h[0].attn.c_proj
    for wrong in (Tensor(np.ones((16, 16), np.float32), requires_grad=True), Tensor(np.ones(16)), np.ones(16), 3.0):
        with pytest.raises(TypeError, match="Parameter") as error:
            proj.weight = wrong
        one_line(error)
    with pytest.raises(TypeError, match=r"a\.data -= "):
        proj.weight -= 0.1
    proj.bias = None
    with pytest.raises(TypeError, match="must be a Parameter"):
        proj.bias = Tensor(np.ones(16, np.float32), requires_grad=True)
    proj.bias = Parameter(np.ones(16, np.float32))
    assert "transformer.h.0.attn.c_proj.bias" in dict(model.named_parameters())


def step(parallel, optimizer, n=1):
    for _ in range(n):
        parallel.zero_grad()
        loss = parallel.forward_backward(X, Y)
        parallel.gather_grads()
        parallel.update(optimizer, 1e-2, 1.0)
    return loss


def test_numbers_that_are_assigned_are_written_where_the_optimizer_has_them():
    model = gpt()
    parallel = DataParallel(model, 2)
    optimizer = AdamW(parallel.flat)
    new = np.full((11, 16), 0.5, np.float32)
    model.transformer.wte.weight.data = new
    assert (dict(parallel.flat.views(parallel.flat.weights))["transformer.wte.weight"] == 0.5).all()
    before = step(parallel, optimizer)
    assert step(parallel, optimizer, 9) < before and (new == 0.5).all()
    for wrong in (new[:1], new.astype(np.float64)):
        with pytest.raises(ValueError, match="does not fit its place"):
            model.transformer.wte.weight.data = wrong


@pytest.mark.parametrize("values", [[1, 2], np.arange(3), np.ones(3, np.float16), np.ma.ones(3), None])
def test_a_parameters_numbers_are_float32_or_float64(values):
    parameter = Parameter(np.zeros(3, np.float32))
    with pytest.raises(TypeError, match="Parameter: data must be") as error:
        parameter.data = values
    one_line(error)
    assert parameter.data.tolist() == [0, 0, 0]
    parameter.data = np.ones(4)
    assert parameter.shape == (4,)


def test_a_model_that_becomes_another_one_is_noticed_by_its_optimizer():
    def crop(model):
        model.crop_block_size(4)

    def second(model):
        DataParallel(model)

    def new_weight(model):
        model.transformer.h[0].attn.c_proj.weight = Parameter(np.ones((16, 16), np.float32))

    def new_block(model):
        model.transformer.h.append(copy.deepcopy(model.transformer.h[0]))

    def no_block(model):
        del model.transformer.h[1]

    def blocks_turned(model):
        model.transformer.h.reverse()

    for change in (crop, second, new_weight, new_block, no_block, blocks_turned):
        model = gpt(2)
        parallel = DataParallel(model, 2)
        optimizer = AdamW(parallel.flat)
        step(parallel, optimizer)
        with pytest.raises((RuntimeError, ValueError)) as error:
            change(model)
            step(parallel, optimizer)
        one_line(error)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_is_frozen_keeps_its_bytes(workers, kind):
    model = gpt(2)
    parallel = DataParallel(model, workers)
    optimizer = AdamW(parallel.flat) if kind == "adamw" else Muon(parallel.flat, 5.0)
    step(parallel, optimizer, 2)  # so that there is momentum
    frozen = [model.transformer.wte.weight, model.transformer.h[0].attn.c_attn.weight, model.transformer.ln_f.weight]
    for p in frozen:
        p.requires_grad = False
    before = {name: p.data.tobytes() for name, p in model.named_parameters()}
    step(parallel, optimizer, 3)
    after = {name: p.data.tobytes() for name, p in model.named_parameters()}
    names = {name for name, p in model.named_parameters() if any(p is q for q in frozen)}
    assert {name for name in before if before[name] == after[name]} == names
    assert all(not p.grad.any() for p in frozen)
    for p in frozen:
        p.requires_grad = True
    step(parallel, optimizer)
    assert all(before[name] != p.data.tobytes() for name, p in model.named_parameters())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_gradient_that_is_assigned_is_used(workers):
    def moved(change):
        model = gpt()
        parallel = DataParallel(model, workers)
        optimizer = AdamW(parallel.flat, weight_decay=0.0)
        parallel.zero_grad()
        parallel.forward_backward(X, Y)
        parallel.gather_grads()
        change(model)
        parallel.update(optimizer, 1e-2, 1.0)
        return {name: p.data.copy() for name, p in model.named_parameters()}, optimizer.m.copy()

    def scaled(model):
        for p in model.parameters():
            p.grad = p.grad * 0.5

    def in_place(model):
        for p in model.parameters():
            p.grad *= 0.5

    def none(model):
        for p in model.parameters():
            p.grad = None

    def wrong(model):
        model.transformer.wte.weight.grad = np.zeros(3)

    (weights, m), (same, same_m) = moved(scaled), moved(in_place)
    assert all(np.array_equal(weights[name], same[name]) for name in weights) and np.array_equal(m, same_m)
    still, no_m = moved(none)
    assert not no_m.any() and all(np.array_equal(p.data, still[name]) for name, p in gpt().named_parameters())
    with pytest.raises(ValueError, match=r"has a \.grad of shape"):
        moved(wrong)


def test_gradients_are_gathered_once_whatever_the_number_of_workers():
    found = []
    for workers in (1, 2):
        model = gpt()
        parallel = DataParallel(model, workers)
        parallel.zero_grad()
        parallel.forward_backward(X, Y, 0)
        norms = [parallel.gather_grads(), parallel.gather_grads()]
        parallel.forward_backward(Y, X, 0)
        norms.append(parallel.gather_grads())
        model.zero_grad()
        parallel.forward_backward(X, Y, 0)
        norms.append(parallel.gather_grads())
        found.append(norms)
    assert np.allclose(*found, rtol=1e-5)
    assert found[0][0] == pytest.approx(found[0][1]) == pytest.approx(found[0][3])


def test_random_models_are_right_or_refused_in_a_line():
    """100 of the 2,000 of tests/fuzz_library.py, which says what they go through."""
    command = [sys.executable, str(Path(__file__).parent / "fuzz_library.py"), "--models", "100"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "100 models, 0 of them wrong, 0 crashes" in done.stdout


def test_an_update_needs_a_gradient_for_each_weight():
    model = gpt()
    parallel = DataParallel(model)
    optimizer = AdamW(parallel.flat)
    step(parallel, optimizer)
    grads, before = parallel.flat.grads, parallel.flat.weights.copy()
    for wrong in (grads[:10], grads[: len(grads) // 2], grads.astype(np.float64), np.zeros((0,), np.float32)):
        with pytest.raises(ValueError, match="grads must be float32, of shape"):
            optimizer.update(wrong, 1e-3)
    assert np.array_equal(parallel.flat.weights, before)


@pytest.mark.parametrize("setting", [{"beta1": 1.0}, {"beta2": 2.0}, {"beta1": -0.5}, {"eps": -1.0},
                                     {"weight_decay": math.inf}, {"beta2": math.nan}])  # fmt: skip
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        AdamW(FlatParameters(gpt()), **setting)


class Net(Module):
    def __init__(self, second):
        self.first, self.second = Parameter(np.ones((2, 2), np.float32)), second


def test_what_flat_storage_cannot_keep_is_refused():
    net = Net(Parameter(np.ones((2, 2))))
    with pytest.raises(ValueError, match="all must have one dtype"):
        FlatParameters(net)
    net = Net(Parameter(np.ones((2, 2), np.float32)))
    net.second.data = net.first.data
    with pytest.raises(ValueError, match="share memory"):
        FlatParameters(net)
    with pytest.raises(ValueError, match="take AdamW"):
        Muon(FlatParameters(Net(Parameter(np.ones(2, np.float32)))), 1.0)


def test_data_that_is_replaced_between_forward_and_backward_is_noticed():
    model = gpt()
    for change in (lambda p: p.data[:1].copy(), lambda p: p.data.copy()):
        _, loss = model(X, Y)
        wte = model.transformer.wte.weight
        before, wte.data = wte.data, change(wte)
        with pytest.raises(RuntimeError, match=r"the \.data of a tensor was replaced"):
            loss.backward()
        wte.data = before
        model.zero_grad()
    w = Tensor(np.ones((3, 4)), requires_grad=True)
    w.grad_buffer = np.ones((2, 4))
    with pytest.raises(ValueError, match="the place of this tensor's gradient has shape"):
        linear(Tensor(np.ones((5, 4))), w, None).sum().backward()


# --------------------------------------------------------------------------------------------------------------------
# A model that was changed, at each entry point


class WithMore(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.scale = Parameter(np.full(1, 2.0, np.float32))

    def forward(self, idx, targets=None):
        logits, loss = super().forward(idx, targets)
        return logits * self.scale, loss if loss is None else loss * self.scale.sum()


def own_mlp(model):
    model.transformer.h[1].mlp = Relu(model.transformer.h[1].mlp)


def one_more_block(model):
    model.transformer.h.append(copy.deepcopy(model.transformer.h[0]))


def one_block_less(model):
    del model.transformer.h[0]


def own_head(model):
    weight = np.random.default_rng(5).normal(size=(11, 16)).astype(np.float32)
    model.lm_head.weight = Parameter(weight)


def own_forward(model):
    forward = model.transformer.h[0].forward
    model.transformer.h[0].forward = lambda x: forward(x) * 2.0


def heads_turned(model):
    model.transformer.h[0].attn.n_head = 2


def shared_block(model):
    model.transformer.h[1] = model.transformer.h[0]


def shared_weight(model):
    model.transformer.h[1].attn.c_proj.weight = model.transformer.h[0].attn.c_proj.weight


def no_change(model):
    pass


CHANGES = [
    no_change, own_mlp, one_more_block, one_block_less, own_head, own_forward, heads_turned, shared_block,
    shared_weight,
]  # fmt: skip


def changed(change):
    if change is WithMore:
        model = WithMore(gpt(2).config)
        own = dict(model.named_parameters())
        for name, p in gpt(2).named_parameters():
            own[name].data[...] = p.data
        return model.eval()
    model = gpt(2)
    change(model)
    return model.eval()


@pytest.mark.parametrize("change", [*CHANGES, WithMore])
def test_generate_writes_what_the_model_says(change):
    model = changed(change)
    tokens = [1]
    for _ in range(6):
        logits, _ = model(np.array([tokens]))
        tokens.append(int(logits.data[0, -1].argmax()))
    for cache in (True, False):
        assert [1, *model.generate([1], 6, cache=cache, temperature=0)] == tokens


def test_a_forward_of_an_object_alone_is_not_shared_by_workers():
    with pytest.raises(ValueError, match=r"workers: model\.transformer\.h\.0\.forward was set on this object alone"):
        DataParallel(changed(own_forward), 2)


@pytest.mark.parametrize("change", [*(change for change in CHANGES if change is not own_forward), WithMore])
def test_workers_compute_what_the_model_does(change):
    model = changed(change)
    _, loss = model(X, Y)
    loss.backward()
    expected = {name: p.grad.copy() for name, p in model.named_parameters()}
    model.zero_grad()
    parallel = DataParallel(model, 2)
    parallel.zero_grad()
    assert parallel.forward_backward(X, Y) == pytest.approx(loss.item(), rel=1e-5)
    parallel.gather_grads()
    for name, p in model.named_parameters():
        assert np.allclose(p.grad, expected[name], atol=1e-5 * np.abs(expected[name]).max()), name
    total, count = parallel.loss(X, Y)
    assert total / count == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("change", [heads_turned, lambda m: m.set_dropout(0.5), lambda m: own_mlp(m)])
def test_workers_follow_a_change_that_comes_later(change):
    model = gpt(2)
    parallel = DataParallel(model, 2)
    parallel.zero_grad()
    change(model)
    single = DataParallel(copy.deepcopy(model), 1)
    for one in (parallel, single):
        one.zero_grad()
    losses = [one.forward_backward(X, Y, 3) for one in (parallel, single)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def audited(model, folder):
    parallel = DataParallel(model, 1)
    parallel.zero_grad()
    parallel.forward_backward(X, Y)
    parallel.gather_grads()
    return Auditor(parallel, 2).audit([(X, Y, 0)], [1], NEVER)


KNOWS_GPT_ONLY = {
    "save_pretrained": lambda model, folder: model.save_pretrained(folder),
    "int8": lambda model, folder: Generation(model, [1], [np.random.default_rng(0)], int8=True),
    "Decoder": lambda model, folder: Decoder(model),
    "audit": audited,
    "receipt": lambda model, folder: ways(model, X, Y, "transformer.wte.weight"),
}


@pytest.mark.parametrize("entrance", KNOWS_GPT_ONLY)
@pytest.mark.parametrize("change", [*CHANGES, WithMore])
def test_what_knows_only_a_gpt_as_its_config_says_refuses_any_other(entrance, change, tmp_path):
    model = changed(change)
    if change is no_change:
        KNOWS_GPT_ONLY[entrance](model, tmp_path / "folder")
        return
    with pytest.raises(ValueError, match="GPT") as error:
        KNOWS_GPT_ONLY[entrance](model, tmp_path / "folder")
    one_line(error)
    assert not (tmp_path / "folder").exists()


def test_weights_of_another_shape_dtype_or_place_never_reach_the_kernel():
    for name, make in (
        ("wpe", lambda w: w[:4].copy()),
        ("wte", lambda w: w[:7].copy()),
        ("wte", lambda w: np.asfortranarray(w)),
        ("ln_f", lambda w: w * np.linspace(1, 2, 16)),
    ):
        model = gpt(2)
        weight = getattr(model.transformer, name).weight
        weight.data = make(weight.data)
        try:
            reference = list(model.generate([1], 5, rng=0, cache=False))
        except (ValueError, TypeError) as error:
            with pytest.raises(type(error)):
                list(model.generate([1], 5, rng=0))
            continue
        assert list(model.generate([1], 5, rng=0)) == reference
    model = gpt()
    with pytest.raises(TypeError):
        model.transformer.ln_f.weight = Tensor(np.ones(16, np.float32))
    del model.transformer.ln_f.weight
    with pytest.raises(AttributeError):
        list(model.generate([1], 5))


def test_weights_that_are_too_large_are_refused_with_and_without_cache():
    model = gpt()
    model.transformer.wte.weight.data *= np.float32(1e30)
    for cache in (True, False):
        with pytest.raises(CheckpointError, match="not finite"):
            list(model.generate([1], 3, cache=cache))


def test_a_vocabulary_may_have_holes():
    tokenizer = BPETokenizer.learn(iter(["abc abc abc"] * 9), 260)
    state = json.loads(tokenizer.json)
    last = max(state["model"]["vocab"], key=state["model"]["vocab"].get)
    n = state["model"]["vocab"][last]
    state["model"]["vocab"][last] = 300
    assert tokenizer.holes == [] and BPETokenizer(json.dumps(state)).holes == [*range(n, 300)]


@pytest.mark.parametrize(
    "prompt, words",
    [
        (np.array([[1, 2, 3]]), r"a list, and have one token at least; got shape \(1, 3\)"),
        (3, "must be a list"),
        ([11], "tokens must be from 0 to 10, got 11 to 11"),
        ([1, -1], "tokens must be from 0 to 10, got -1 to 1"),
    ],
)
@pytest.mark.parametrize("cache", [True, False])
def test_a_prompt_that_is_none_is_refused_in_a_line(prompt, words, cache):
    with pytest.raises(ValueError, match=words) as error:
        list(gpt().generate(prompt, 3, cache=cache))
    one_line(error)


def test_writing_touches_no_mode():
    model = gpt(2, dropout=0.5).train()
    model.transformer.h[0].eval()
    expected = [*model.eval().generate([1], 5, rng=3, cache=False)]
    model.train()
    model.transformer.h[0].eval()
    assert [*model.generate([1], 5, rng=3, cache=False)] == expected
    assert model.training and not model.transformer.h[0].training and model.transformer.h[1].training


# --------------------------------------------------------------------------------------------------------------------
# Random choices


def test_calls_without_a_seed_differ_and_those_with_one_agree():
    model = gpt()
    assert len({tuple(model.generate([1], 20)) for _ in range(5)}) == 5
    assert len({tuple(model.generate([1], 20, rng=seed)) for seed in (0, 0, 0)}) == 1
    assert [*model.generate([1], 9, rng=4)] == [*model.generate([1], 9, rng=np.random.default_rng(4))]
    model = gpt(dropout=0.5)
    for workers in (1, 2):
        first, second = (DataParallel(copy.deepcopy(model), workers) for _ in range(2))
        losses = [first.forward_backward(X, Y) for _ in range(3)]
        assert len(set(losses)) == 3 and losses == [second.forward_backward(X, Y) for _ in range(3)]
        assert first.forward_backward(X, Y, 5) == second.forward_backward(X, Y, 5)


# --------------------------------------------------------------------------------------------------------------------
# A Trainer in a notebook


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 40, encoding="utf-8")
    return TrainConfig(
        data=str(tmp_path / "text.txt"), out_dir=tmp_path / "run", n_layer=1, n_head=2, n_embd=np.int64(16),
        block_size=8, batch_size=4, max_iters=12, eval_interval=4, eval_iters=2, log_interval=1, warmup_iters=2,
        workers=1, blas_threads=1, learning_rate=1e-2, keep=9, dropout=0.1,
    )  # fmt: skip


def files(config):
    names = {path.name: path.read_bytes() for path in Path(config.out_dir).glob("iter-*")}
    rows = [json.loads(row) for row in (Path(config.out_dir) / "metrics.jsonl").read_text().splitlines()]
    return names, [{k: v for k, v in row.items() if k not in ("elapsed_s", "tokens_per_second")} for row in rows]


@pytest.mark.parametrize("resumed", [False, True])
def test_a_loop_that_was_left_goes_on_and_one_that_is_done_is_done(config, tmp_path, resumed):
    whole = Trainer(dataclasses.replace(config, out_dir=str(tmp_path / "whole")))
    list(whole.run())
    trainer = Trainer(config)
    if resumed:
        for event in trainer.run():
            if isinstance(event, Progress) and event.iter == 1:
                break
        trainer = Trainer.resume(config.out_dir)
    for n in (3, 4, 9):
        for event in trainer.run():
            if isinstance(event, Progress) and event.iter == n:
                break
        assert trainer.iter == n + 1
    list(trainer.run())
    assert trainer.parallel.flat.weights.tobytes() == whole.parallel.flat.weights.tobytes()
    (names, rows), (_, expected) = files(config), files(whole.config)
    assert rows == expected and trainer.best_loss == whole.best_loss
    assert list(trainer.run()) == [] and files(config) == (names, rows)
    elapsed = [folder.load(path)[1]["elapsed_s"] for path in reversed(folder.checkpoints(config.out_dir))]
    assert elapsed == sorted(elapsed)


@pytest.mark.parametrize("workers, kind", [(1, "muon"), (2, "adamw")])
def test_what_is_frozen_stays_so_when_a_run_goes_on(config, workers, kind):
    config = dataclasses.replace(
        config, workers=workers, optimizer=kind, learning_rate=1e-3, gradcheck_every=3, gradcheck_entries=4
    )
    trainer = Trainer(config)
    frozen = ["transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight", "transformer.ln_f.weight"]
    for name, p in trainer.model.named_parameters():
        p.requires_grad = name not in frozen
    before = {name: p.data.tobytes() for name, p in trainer.model.named_parameters()}
    for event in trainer.run():
        if isinstance(event, Progress) and event.iter == 5:
            break
    assert sorted(folder.load(folder.newest(config.out_dir))[1]["frozen"]) == sorted(frozen)
    trainer = Trainer.resume(config.out_dir)
    assert any(all(words in notice for words in (*frozen, "requires_grad is False")) for notice in trainer.notices)
    list(trainer.run())
    after = {name: p.data.tobytes() for name, p in trainer.model.named_parameters()}
    assert {name for name in before if before[name] == after[name]} == {*frozen}


def test_a_trainer_writes_no_checkpoint_of_a_model_that_it_could_not_read_again(config):
    trainer = Trainer(dataclasses.replace(config, n_layer=2))
    for event in trainer.run():
        if isinstance(event, Progress) and event.iter == 1:
            break
    before = files(config)
    n_head = trainer.model.transformer.h[0].attn.n_head
    trainer.model.transformer.h[0].attn.n_head = 1
    with pytest.raises(ValueError, match="checkpoints hold GPT") as error:
        list(trainer.run())
    one_line(error)
    assert files(config) == before
    trainer.model.transformer.h[0].attn.n_head = n_head
    list(trainer.run())
    assert trainer.iter == config.max_iters


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent with os.kill")
def test_ctrl_c_in_a_loop_over_a_run_saves_a_whole_update(config, tmp_path):
    whole = Trainer(dataclasses.replace(config, out_dir=str(tmp_path / "whole")))
    list(whole.run())
    trainer = Trainer(config)
    update = trainer.parallel.update

    def interrupted(*args):
        if trainer.iter == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*args)

    trainer.parallel.update = interrupted
    with pytest.raises(KeyboardInterrupt, match="stopped at iteration 7; the checkpoint is of iteration 7"):
        for _ in trainer.run():
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    again = Trainer.resume(config.out_dir)
    list(again.run())
    assert again.parallel.flat.weights.tobytes() == whole.parallel.flat.weights.tobytes()
    assert files(again.config)[1] == files(whole.config)[1]


@pytest.mark.parametrize(
    "setting, words",
    [
        ({"bias": "False"}, "bias must be True or False, got 'False', of type str"),
        ({"decay_lr": 0}, "decay_lr must be True or False, got 0, of type int"),
        ({"eval_interval": 2.5}, "eval_interval must be a whole number, got 2.5, of type float"),
        ({"n_layer": 2.0}, "n_layer must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"max_iters": None}, "max_iters must be a whole number"),
        ({"dropout": "0.1"}, "dropout must be a number"),
        ({"data": 3}, "data must be text, got 3, of type int"),
        ({"out_dir": None}, "out_dir must be text"),
    ],
)
def test_each_setting_has_its_type(setting, words):
    with pytest.raises(UsageError, match="^" + re.escape(words)) as error:
        TrainConfig(**setting)
    one_line(error)


def test_what_is_as_good_as_its_type_is_taken_and_can_be_written(config):
    assert type(config.n_embd) is int and type(config.out_dir) is str and config.data == (config.data[0],)
    assert json.dumps(dataclasses.asdict(config))
    other = dataclasses.replace(config, learning_rate=1, dropout=np.float32(0.5), bias=np.True_, epochs=np.int32(3))
    kinds = [type(getattr(other, name)) for name in ("learning_rate", "dropout", "bias", "epochs")]
    assert kinds == [float, float, bool, float]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_has_threads_of_its_own():
    parallel = DataParallel(gpt(), 2)
    expected = parallel.loss(X, Y)
    child = os.fork()
    if child == 0:
        os._exit(0 if parallel.loss(X, Y) == expected else 1)
    deadline = time.monotonic() + 20
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert done[1] == 0
    assert parallel.loss(X, Y) == expected


# --------------------------------------------------------------------------------------------------------------------
# The checker


@pytest.mark.parametrize("size", [1e-6, 1e-3, 1e-2, 0.02, 1.0, 1e3, 1e6])
@pytest.mark.parametrize(
    "f",
    [lambda a: a.log(), lambda a: 1.0 / a, lambda a: a.sqrt(), lambda a: a**2, lambda a: a**-1.5, lambda a: a * 3.0],
    ids=["log", "1/a", "sqrt", "square", "power", "times"],
)  # fmt: skip
def test_gradcheck_does_not_accuse_the_innocent_and_finds_the_guilty(f, size):
    a = Tensor(size * np.array([0.5, 1.0, 1.7]), requires_grad=True)
    gradcheck(f, [a])

    def wrong(a):
        y = f(a)
        return record("op", y.data, (y,), lambda dy: (dy * (1 + 1e-5),))

    with pytest.raises(GradcheckError):
        gradcheck(wrong, [a])


def test_gradcheck_says_in_a_line_what_it_cannot_check():
    a = Tensor(np.array([1.0, 2.0]), requires_grad=True)
    calls = iter(range(9))
    for f, inputs, kind, words in (
        (lambda a: a.data, [a], TypeError, "must return a Tensor, got ndarray"),
        (lambda a: 3.0, [a], TypeError, "must return a Tensor, got float"),
        (lambda a: (a, a), [a], TypeError, "must return a Tensor, got tuple"),
        (lambda a: a[0:0], [a], ValueError, "nothing to check"),
        (lambda b: b * 2.0, [a * 1.0], ValueError, "is no leaf"),
        (lambda a: a * float(next(calls)), [a], ValueError, "other values at a second call"),
    ):
        with pytest.raises(kind, match=words) as error:
            gradcheck(f, inputs)
        one_line(error)


def test_gradcheck_leaves_all_gradients_as_they_were():
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=1, n_embd=16), dtype=np.float64)
    model(X, Y)[1].backward()
    before = [(p, p.grad, p.grad.copy()) for p in model.parameters()]
    gradcheck(lambda w: model(X, Y)[1], [model.transformer.ln_f.weight])
    assert all(p.grad is grad and np.array_equal(grad, content) for p, grad, content in before)


# --------------------------------------------------------------------------------------------------------------------
# Ops


def test_ops_want_one_dtype():
    model = gpt(bias=True)
    block, x = model.transformer.h[0], Tensor(np.random.default_rng(0).normal(size=(2, 8, 16)))
    for module, op in ((block.attn.c_attn, "linear"), (block.ln_1, "layernorm"), (block.mlp, "mlp")):
        with pytest.raises(TypeError, match=rf"{op}: all must have one dtype, got x float64, w\w+ float32") as error:
            module(x)
        one_line(error)


def test_a_receipt_is_refused_where_it_would_not_add_up():
    for change in (own_head, own_mlp, lambda m: m.set_dropout(0.5) or m.train()):
        model = gpt(2).eval()
        change(model)
        with pytest.raises(ValueError, match="a receipt is of a GPT as its config says, in eval mode") as error:
            ways(model, X, Y, "transformer.wte.weight")
        one_line(error)


def test_numpys_error_state_belongs_to_the_caller():
    with np.errstate(all="raise"):
        for cache in (True, False):
            assert len(list(gpt(2).generate([1], 5, temperature=1e-3, top_p=0.9, cache=cache))) == 5
        assert np.geterr()["under"] == "raise"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "f",
    [
        lambda a: a.relu(), lambda a: a**2.5, lambda a: 2**a, lambda a: a.sqrt(), lambda a: a.tanh(), lambda a: a * 2,
        lambda a: 1 - a, lambda a: a.exp(), lambda a: a.log(), lambda a: where(True, a, 0.0), lambda a: a.mean(),
    ],
)  # fmt: skip
def test_a_single_number_keeps_its_dtype_as_arrays_do(f, dtype):
    for shape in ((), (3,)):
        a = Tensor(np.full(shape, 0.5, dtype), requires_grad=True)
        y = f(a)
        y.backward(np.ones_like(y.data))
        assert y.dtype == a.grad.dtype == dtype and y.shape == (() if y.ndim == 0 else shape)
