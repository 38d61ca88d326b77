"""Certificates: the backward of an op is the derivative of its forward, over the integers modulo P (field.py)."""

import contextlib
import sys
import time
from collections import namedtuple
from types import SimpleNamespace

import numpy as np

from npgpt import gradcheck, tensor
from npgpt.config import GPTConfig
from npgpt.engine import no_grad
from npgpt.kernels.buffers import reuse_buffers
from npgpt.kernels.jit import PAIRS, writing
from npgpt.kernels.masks import random_stream
from npgpt.model import GPT
from npgpt.ops import mlp
from npgpt.ops.embedding import embedding
from npgpt.ops.linear import linear
from npgpt.ops.primitives import stack
from npgpt.study.field import ZERO, Dual, DualArray, Point, at, dual_array
from npgpt.tensor import Tensor

# wrong: names of the gradients that differ; degree, probability: as Point.bound has them
Certificate = namedtuple("Certificate", "wrong degree probability seconds")


@contextlib.contextmanager
def on_references():
    """Within this context ops run their references, as these are now, whatever NPGPT_KERNELS says."""
    with contextlib.ExitStack() as stack:
        for name, (_, reference) in PAIRS.items():
            if reference.__module__.startswith("npgpt.ops."):
                module = sys.modules[reference.__module__]
                stack.enter_context(gradcheck.replaced(module, name, writing(getattr(module, reference.__name__))))
        yield


@contextlib.contextmanager
def exact(point):
    """Within this context Tensors hold DualArrays, and the constants of GELU are any numbers.  Not for two threads."""
    pool = SimpleNamespace(empty=lambda shape, dtype: np.empty(shape, object).view(DualArray))  # never written
    with at(point), reuse_buffers(pool), on_references(), contextlib.ExitStack() as stack:
        for owner, name, value in (
            (tensor, "FLOATS", (np.dtype(object),)),
            (tensor, "plain", lambda values, words: dual_array(values)),
            (tensor, "check_numbers", lambda array, words: None),
            (mlp, "K", Dual(point.variable())),
            (mlp, "A", Dual(point.variable())),
        ):
            stack.enter_context(gradcheck.replaced(owner, name, value))
        yield


_data = Tensor.data  # the slot: a Parameter would refuse what is no float
_to_duals = np.frompyfunc(Dual, 2, 1)


def certificate(f, inputs, names, seed=0):
    """The Certificate of f(*inputs), a Tensor.  inputs: leaves, which get other numbers.

    All of them move along a random direction at once.  If the slope is not what their gradients say, each moves alone.
    That is done twice.  The second time gradients have places, as in a training, and those of two walks are added up.
    """
    start, point = time.perf_counter(), Point(seed)

    def forward(slopes):
        for x, value, slope in zip(inputs, values, slopes, strict=True):
            _data.__set__(x, dual_array(_to_duals(value, slope)))
        with random_stream(seed):
            return f(*inputs)

    def difference(directions):
        """Forward mode's slope minus the gradients' one."""
        with no_grad():
            total = np.sum(dy * forward(directions).data).slope
        for gradient, direction in zip(gradients, directions, strict=True):
            if gradient is not None and direction is not ZERO:
                total = total + -np.sum(gradient * _to_duals(direction, ZERO)).value
        return total

    with exact(point):
        values, wrong = [point.variables(x.shape) for x in inputs], []
        dy = dual_array(_to_duals(point.variables(forward(values).shape), ZERO))
        for n_walks in (1, 2):
            places = [dual_array(np.zeros(x.shape)) if n_walks == 2 else None for x in inputs]
            for x, place in zip(inputs, places, strict=True):
                x.grad, x.grad_buffer = None, place
            for _ in range(n_walks):
                forward([ZERO] * len(inputs)).backward(dy)
            gradients = [x.grad for x in inputs] if n_walks == 1 else [place / 2 for place in places]
            directions = [point.variables(x.shape) for x in inputs]
            off = difference(directions)
            if off.residue:
                for i, name in enumerate(names):
                    alone = [direction if i == j else ZERO for j, direction in enumerate(directions)]
                    if name not in wrong and difference(alone).residue:
                        wrong.append(name)
    degree, probability = point.bound(off)
    return Certificate(wrong, degree, probability, time.perf_counter() - start)


# --------------------------------------------------------------------------------------------------------------------
# What the command proves


def cases():
    """(title, f, inputs, names): gradcheck's ops, graphs in which gradients meet, and a GPT that has all there is."""
    # not those with blocks of queries, which kernels take at a time
    yield from (case for case in gradcheck.cases() if not case[0].startswith("GPT") and "blocks" not in case[0])

    def leaves(*shapes):
        return [Tensor(np.zeros(shape), requires_grad=True) for shape in shapes]

    def twice(a):
        x = -a
        return x + x

    def meet(a, b):  # x and y have one array for their gradient, and y gets more
        x, y = -a, -b
        return y * y + (x + y) + x

    def meet_in_a_table(a, b, wpe):  # the same, and an embedding adds to it in place
        x, y = -a, -b
        looked_up = embedding(np.array([[1, 0, 1]]), x, wpe).sum(axis=(0, 1))
        return y * y + looked_up + (x + y)

    yield "max, equal entries", lambda a: stack([a, a]).max(axis=0), leaves((3, 4)), ["a"]
    yield "engine, a tensor used twice", twice, leaves((3, 4)), ["a"]
    yield "engine, where gradients meet", meet, leaves((4, 5), (4, 5)), ["a", "b"]
    yield "engine, in a table", meet_in_a_table, leaves((4, 5), (4, 5), (3, 5)), ["a", "b", "wpe"]
    yield "engine, tied weights", lambda x, w: linear(linear(x, w), w), leaves((2, 3), (3, 3)), ["x", "w"]

    config = GPTConfig(vocab_size=13, block_size=6, n_layer=2, n_head=2, n_embd=12, bias=True, dropout=0.2)
    model, rng = GPT(config, seed=None, dtype=np.float64), np.random.default_rng(0)
    idx, targets = rng.integers(0, config.vocab_size, (2, 2, config.block_size))
    targets[0, 1] = -1
    names, parameters = zip(*model.named_parameters(), strict=True)
    yield "GPT", lambda *_: model(idx, targets)[1], parameters, names
