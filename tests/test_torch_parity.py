"""npgpt against PyTorch: the figures in torch_figures.npz, which make_torch_figures.py made in float64."""

import json

import make_torch_figures
import numpy as np
import pytest

from npgpt.config import GPTConfig
from npgpt.model import GPT
from npgpt.optim import AdamW, clip_scale
from npgpt.run.parallel import DataParallel

PRECISIONS = [pytest.param(np.float64, 1e-9, id="float64"), pytest.param(np.float32, 1e-5, id="float32")]


@pytest.fixture(scope="module")
def figures():
    with np.load(make_torch_figures.FILE) as file:
        return dict(file)


def assert_close(name, ours, theirs, bound):
    """The worst difference, as a share of the largest value."""
    assert ours.shape == theirs.shape, name
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert error <= bound, f"{name}: relative error {error:.1e}, bound {bound:.0e}"


def settings(figures):
    return json.loads(str(figures["config"]))


def make_model(figures, dtype):
    """A GPT with the figures' weights."""
    config = {name: settings(figures)[name] for name in make_torch_figures.MODEL}
    model = GPT(GPTConfig(**config), seed=None, dtype=dtype)
    parameters = dict(model.named_parameters())
    assert {f"weights/{name}" for name in parameters} == {name for name in figures if name.startswith("weights/")}
    for name, parameter in parameters.items():
        parameter.data[...] = figures[f"weights/{name}"]
    return model


@pytest.mark.parametrize("dtype, bound", PRECISIONS)
def test_logits_loss_and_every_gradient(figures, dtype, bound):
    model = make_model(figures, dtype)
    logits, loss = model(figures["idx"][0], figures["targets"][0])
    loss.backward()
    assert logits.dtype == loss.dtype == dtype
    assert_close("logits", logits.data, figures["logits"], bound)
    assert_close("loss", loss.data, figures["loss"], bound)
    for name, parameter in model.named_parameters():
        assert_close(name, parameter.grad, figures[f"grads/{name}"], bound)


@pytest.mark.parametrize("workers", [1, 2])  # 2: unequal shares of a batch of 3, one with the target of -1
@pytest.mark.parametrize("dtype, bound", PRECISIONS)
def test_ten_clipped_adamw_steps(figures, dtype, bound, workers):
    s = settings(figures)
    parallel = DataParallel(make_model(figures, dtype), workers)
    optimizer = AdamW(parallel.flat, s["beta1"], s["beta2"], weight_decay=s["weight_decay"])
    losses, norms = [], []
    for idx, targets in zip(figures["idx"], figures["targets"], strict=True):
        parallel.zero_grad()
        losses.append(parallel.forward_backward(idx, targets))
        norms.append(parallel.gather_grads() ** 0.5)
        parallel.update(optimizer, s["learning_rate"], clip_scale(norms[-1], s["grad_clip"]))
    parallel.close()
    assert min(figures["norms"]) > s["grad_clip"]  # every step is clipped
    for step, (ours, theirs) in enumerate(zip(losses, figures["losses"], strict=True)):
        assert_close(f"loss of step {step}", np.array(ours), theirs, bound)
    for step, (ours, theirs) in enumerate(zip(norms, figures["norms"], strict=True)):
        assert_close(f"norm of step {step}", np.array(ours), theirs, bound)


def test_the_committed_figures_are_what_pytorch_says_today(figures):
    pytest.importorskip("torch")
    today = make_torch_figures.make_figures()
    assert today.keys() == figures.keys()
    for name, array in today.items():
        if name == "config":
            assert str(array) == str(figures[name])
        else:
            assert_close(name, array, figures[name], 1e-9)
