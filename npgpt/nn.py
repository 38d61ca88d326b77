"""Modules: parameters with names.  A module is an object whose attributes are parameters and other modules."""

import numpy as np

from npgpt.engine import Tensor
from npgpt.ops.attention import causal_attention
from npgpt.ops.dropout import dropout
from npgpt.ops.layernorm import layernorm
from npgpt.ops.linear import linear
from npgpt.ops.mlp import mlp


class Parameter(Tensor):
    """A Tensor that training changes."""

    __slots__ = ()

    def __init__(self, data):
        super().__init__(data, requires_grad=True)


class Module:
    """Base class: finds the parameters in its attributes, in the order in which they were set.

    Attributes may be Parameters, Modules and lists of Modules.  Names are those that PyTorch would give.
    """

    training = True

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
        for _, parameter in self.named_parameters():
            yield parameter

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


class ModuleDict(Module):
    """A module that is nothing but its named submodules."""

    def __init__(self, **modules):
        vars(self).update(modules)


class Embedding(Module):
    """A table of n rows: `weight` (n, n_embd)."""

    def __init__(self, n, n_embd, dtype):
        self.weight = Parameter(np.zeros((n, n_embd), dtype))


class Linear(Module):
    def __init__(self, n_in, n_out, bias, dtype):
        self.weight = Parameter(np.zeros((n_out, n_in), dtype))
        self.bias = Parameter(np.zeros(n_out, dtype)) if bias else None

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class LayerNorm(Module):
    def __init__(self, n_embd, bias, dtype):
        self.weight = Parameter(np.ones(n_embd, dtype))
        self.bias = Parameter(np.zeros(n_embd, dtype)) if bias else None

    def forward(self, x):
        return layernorm(x, self.weight, self.bias)


class Dropout(Module):
    def __init__(self, p):
        self.p = p

    def forward(self, x):
        return dropout(x, self.p) if self.training else x


class CausalSelfAttention(Module):
    def __init__(self, n_embd, n_head, dropout, bias, dtype):
        self.n_head = n_head
        self.p_drop = dropout
        self.c_attn = Linear(n_embd, 3 * n_embd, bias, dtype)
        self.c_proj = Linear(n_embd, n_embd, bias, dtype)
        self.resid_dropout = Dropout(dropout)

    def forward(self, x):
        y = causal_attention(self.c_attn(x), self.n_head, self.p_drop if self.training else 0.0)
        return self.resid_dropout(self.c_proj(y))


class MLP(Module):
    def __init__(self, n_embd, dropout, bias, dtype):
        self.c_fc = Linear(n_embd, 4 * n_embd, bias, dtype)
        self.c_proj = Linear(4 * n_embd, n_embd, bias, dtype)
        self.dropout = Dropout(dropout)

    def forward(self, x):
        return self.dropout(mlp(x, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias))
