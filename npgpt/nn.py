"""Modules: parameters with names.  A module is an object whose attributes are parameters and other modules."""

import contextlib
from types import NoneType

import numpy as np

from npgpt import engine
from npgpt.kernels.buffers import zeros
from npgpt.ops.attention import causal_attention
from npgpt.ops.dropout import dropout
from npgpt.ops.layernorm import EPS, layernorm
from npgpt.ops.linear import linear
from npgpt.ops.mlp import mlp
from npgpt.tensor import FLOATS, Tensor, plain


class Parameter(Tensor):
    """A Tensor that training changes.

    Once an optimizer, workers and checkpoints share its numbers (FlatParameters), it has one home: what is assigned to
    `data` is written there.  ValueError for an array of another shape or dtype, TypeError for one that is no float.
    """

    __slots__ = ()

    def __init__(self, data):
        super().__init__(data, requires_grad=True)

    def _set_data(self, values):
        values = plain(values, "Parameter: data")
        if self.grad_buffer is None:
            if values.dtype not in FLOATS:
                raise TypeError(f"Parameter: data must be float32 or float64, got dtype {values.dtype}")
            _data.__set__(self, values)
        elif values is not (home := self.data):  # as it is after data -= ...
            if values.shape != home.shape or values.dtype != home.dtype:
                raise ValueError(
                    f"Parameter: data of shape {values.shape}, {values.dtype} does not fit its place in an optimizer, "
                    f"of shape {home.shape}, {home.dtype}; change the model before the optimizer is made"
                )
            home[...] = values

    data = property(Tensor.data.__get__, _set_data)

    def move(self, data, grad_buffer):
        """Have its numbers, and its gradient's, in these arrays from now on."""
        _data.__set__(self, data)
        self.grad, self.grad_buffer = None, grad_buffer

    @contextlib.contextmanager
    def elsewhere(self, data):
        """Within this context its numbers are those of another array."""
        before = self.data
        _data.__set__(self, data)
        try:
            yield
        finally:
            _data.__set__(self, before)


_data = Tensor.data  # the slot that Parameter's property stands before


class Module:
    """Base class: finds the parameters in its attributes, in the order in which they were set.

    Attributes may be Parameters, Modules and lists of Modules.  Names are those that PyTorch would give.
    """

    training = True
    drops = property(lambda self: self.training and engine.state.drops)  # whether dropout acts now

    def __setattr__(self, name, value):
        """Refuse a Tensor where training would not see it: named_parameters() finds Parameters only."""
        if isinstance(value, Tensor) and not isinstance(value, Parameter) and value.requires_grad:
            raise TypeError(f"{type(self).__name__}.{name}: a Tensor that is to be trained must be a Parameter")
        if isinstance(vars(self).get(name), Parameter) and not isinstance(value, (Parameter, NoneType)):
            raise TypeError(
                f"{type(self).__name__}.{name} holds a Parameter: assign a Parameter or None, not a "
                f"{type(value).__name__}; new numbers are assigned to {name}.data"
            )
        super().__setattr__(name, value)

    def __call__(self, *args, **options):
        return self.forward(*args, **options)

    def children(self):
        """(name, module) of each direct submodule."""
        for name, value in vars(self).items():
            if isinstance(value, Module):
                yield name, value
            elif isinstance(value, list):
                for i, item in enumerate(value):
                    if isinstance(item, Module):
                        yield f"{name}.{i}", item

    def named_parameters(self):
        """(name, Parameter) of each parameter below; one used in two places comes once, under its first name."""
        seen = set()
        for name, parameter in self._all_parameters(""):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def _all_parameters(self, prefix):
        for name, value in vars(self).items():
            if isinstance(value, Parameter):
                yield prefix + name, value
        for name, child in self.children():
            yield from child._all_parameters(f"{prefix}{name}.")

    def parameters(self):
        """Each Parameter below, once."""
        return (parameter for _, parameter in self.named_parameters())

    def zero_grad(self):
        """Forget all gradients."""
        for parameter in self.parameters():
            parameter.grad = None

    def train(self, mode=True):
        """Switch dropout on (or off) here and below."""
        self.training = mode
        for _, child in self.children():
            child.train(mode)
        return self

    def eval(self):
        """Switch dropout off here and below."""
        return self.train(False)


def structure(module, place="", seen=None):
    """What a module and those below it compute, apart from their parameters' numbers: a dict, place -> what is there.

    Modules and parameters count, and what the layers of this file were told.  seen: id of a Parameter -> first place.
    """
    found, seen = {place: type(module)}, {} if seen is None else seen
    for key, value in vars(module).items():
        at = f"{place}.{key}".lstrip(".")
        if isinstance(value, Parameter):
            first = seen.setdefault(id(value), at)
            found[at] = (value.dtype, value.shape) if first == at else first
        elif isinstance(value, Module):
            found |= structure(value, at, seen)
        elif isinstance(value, list):
            found[at] = f"{len(value)} modules"
            for n, item in enumerate(value):
                found |= structure(item, f"{at}.{n}", seen) if isinstance(item, Module) else {f"{at}.{n}": type(item)}
        elif key in ("n_head", "scale", "p", "p_drop", "eps", "forward"):
            found[at] = value
    return found


class ModuleDict(Module):
    """A module that is nothing but its named submodules."""

    def __init__(self, **modules):
        vars(self).update(modules)


class Embedding(Module):
    """A table of n rows: `weight` (n, n_embd)."""

    def __init__(self, n, n_embd, dtype):
        self.weight = Parameter(zeros((n, n_embd), dtype))


class Linear(Module):
    def __init__(self, n_in, n_out, bias, dtype):
        self.weight = Parameter(zeros((n_out, n_in), dtype))
        self.bias = Parameter(zeros((n_out,), dtype)) if bias else None

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class LayerNorm(Module):
    def __init__(self, n_embd, bias, dtype):
        self.weight = Parameter(np.ones(n_embd, dtype))
        self.bias = Parameter(zeros((n_embd,), dtype)) if bias else None
        self.eps = EPS

    def forward(self, x):
        return layernorm(x, self.weight, self.bias, self.eps)


class Dropout(Module):
    def __init__(self, p):
        self.p = p

    def forward(self, x):
        return dropout(x, self.p) if self.p and self.drops else x


class CausalSelfAttention(Module):
    def __init__(self, n_embd, n_head, dropout, bias, dtype):
        self.n_head, self.scale = n_head, None  # None: 1 / sqrt(hs)
        self.p_drop = dropout
        self.c_attn = Linear(n_embd, 3 * n_embd, bias, dtype)
        self.c_proj = Linear(n_embd, n_embd, bias, dtype)
        self.resid_dropout = Dropout(dropout)

    def forward(self, x, past=None):
        p_drop = self.p_drop if self.drops else 0.0
        y = causal_attention(self.c_attn(x), self.n_head, p_drop, self.scale, past)
        return self.resid_dropout(self.c_proj(y))


class MLP(Module):
    def __init__(self, n_embd, dropout, bias, dtype):
        self.c_fc = Linear(n_embd, 4 * n_embd, bias, dtype)
        self.c_proj = Linear(4 * n_embd, n_embd, bias, dtype)
        self.dropout = Dropout(dropout)

    def forward(self, x):
        return self.dropout(mlp(x, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias))
