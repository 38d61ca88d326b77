"""The small operations, broadcasting as NumPy does: + - * / @ ** exp log sqrt tanh relu sum mean max reshape transpose
getitem concatenate stack where.

Anything can be composed from them, the fused ops of this folder included; tests/test_compositions.py does so and finds
the same gradients.  Each is one line forward and one line backward; in the comments dy is the gradient of the output.

Broadcasting copies a number to several places, so its gradient is the sum over these places: `_unbroadcast` sums over
every axis that was added or stretched.
"""

import copy
import operator

import numpy as np

from npgpt.engine import Tensor, check_numbers, plain, record
from npgpt.kernels.buffers import empty


def _as_tensor(x, like):
    if isinstance(x, Tensor):
        return x
    x = plain(x, "a Tensor's partner")
    check_numbers(x, "a Tensor's partner must be a number or an array of numbers")
    return Tensor(x.astype(like.dtype))


def _pair(a, b):
    """Both operands as Tensors; a number or array takes the dtype of the Tensor beside it."""
    if isinstance(a, Tensor):
        return a, _as_tensor(b, a)
    return _as_tensor(a, b), b


def _like(a, values):
    """Values in a's dtype: NumPy before version 2 makes float64 of a float32 number and a Python number."""
    return np.asarray(values, a.dtype)


def _unbroadcast(grad, x):
    """Sum a gradient over the axes along which x was broadcast, so that it gets x's shape (and dtype)."""
    if grad.shape == x.shape:
        return grad.astype(x.dtype, copy=False)
    extra = grad.ndim - x.ndim
    stretched = tuple(i + extra for i, n in enumerate(x.shape) if n == 1 and grad.shape[i + extra] != 1)
    grad = grad.sum(axis=tuple(range(extra)) + stretched, keepdims=True)
    return grad.reshape(x.shape).astype(x.dtype, copy=False)


def add(a, b):
    """The sum of two tensors; in a GPT, where a block's result joins the residual stream.

    Forward:

        y = a + b

    Backward.  Each of them reaches y with slope 1, so the gradient passes on to both as it is:

        da = dy          db = dy          (summed over the axes along which a or b was broadcast)

    So the stream carries the gradient from the loss down to the embedding, whatever the blocks do to it.
    """
    a, b = _pair(a, b)
    if a.shape == b.shape and a.dtype == b.dtype:  # the residual stream: worth a reused buffer
        y = np.add(a.data, b.data, out=empty(a.shape, a.dtype))
    else:
        y = a.data + b.data
    return record(y, (a, b), lambda dy: (_unbroadcast(dy, a), _unbroadcast(dy, b)))


def sub(a, b):
    a, b = _pair(a, b)
    return record(a.data - b.data, (a, b), lambda dy: (_unbroadcast(dy, a), _unbroadcast(-dy, b)))


def mul(a, b):
    a, b = _pair(a, b)
    return record(a.data * b.data, (a, b), lambda dy: (_unbroadcast(dy * b.data, a), _unbroadcast(dy * a.data, b)))


def div(a, b):
    a, b = _pair(a, b)
    y = a.data / b.data
    # d(a/b)/db = -a/b^2 = -y/b
    return record(y, (a, b), lambda dy: (_unbroadcast(dy / b.data, a), _unbroadcast(-dy * y / b.data, b)))


def neg(a):
    return record(-a.data, (a,), lambda dy: (-dy,))


def pow(a, exponent):
    """a ** exponent, for an exponent that is a plain number."""
    if isinstance(exponent, (np.generic, np.ndarray)) and exponent.ndim == 0:
        exponent = exponent.item()  # NumPy's would change the dtype
    if not isinstance(exponent, (int, float)):
        raise TypeError("pow: the exponent must be a number; for a Tensor exponent write exp(log(a) * exponent)")

    def backward(dy):
        if exponent == 0:  # the slope is 0, also where a is 0 and a^-1 infinite
            return (np.zeros_like(dy),)
        return (_like(a, dy * exponent * a.data ** (exponent - 1)),)

    return record(_like(a, a.data**exponent), (a,), backward)


def rpow(a, base):
    """base ** a, for a base that is a positive number."""
    if not isinstance(base, (int, float, np.number)) or not base > 0:
        raise TypeError("pow: the base must be a positive number; for a Tensor base write exp(exponent * log(base))")
    y, slope = _like(a, float(base) ** a.data), np.log(float(base)).item()
    return record(y, (a,), lambda dy: (_like(a, dy * y * slope),))


def matmul(a, b):
    """a @ b; leading dimensions broadcast.  As in NumPy, a vector a is a row, and a vector b a column."""
    a, b = _pair(a, b)
    if a.ndim == 0 or b.ndim == 0:
        raise ValueError(f"matmul: a single number is no matrix: write *; got shapes {a.shape} and {b.shape}")
    if a.ndim == 1:
        y = reshape(a, 1, -1) @ b
        return reshape(y, *y.shape[:-2], *y.shape[-1:]) if b.ndim > 1 else reshape(y, ())
    if b.ndim == 1:
        y = a @ reshape(b, -1, 1)
        return reshape(y, y.shape[:-1])

    def backward(dy):
        # y_ij = sum_k a_ik b_kj: whatever multiplied a_ik forward, multiplies dy_ij backward
        da = np.matmul(dy, np.swapaxes(b.data, -1, -2))
        db = np.matmul(np.swapaxes(a.data, -1, -2), dy)
        return _unbroadcast(da, a), _unbroadcast(db, b)

    return record(np.matmul(a.data, b.data), (a, b), backward)


def exp(a):
    y = np.exp(a.data)
    return record(y, (a,), lambda dy: (dy * y,))


def log(a):
    return record(np.log(a.data), (a,), lambda dy: (dy / a.data,))


def sqrt(a):
    y = np.sqrt(a.data)
    return record(y, (a,), lambda dy: (_like(a, dy / (2 * y)),))


def tanh(a):
    y = np.tanh(a.data)
    return record(y, (a,), lambda dy: (_like(a, dy * (1 - y * y)),))


def relu(a):
    return record(_like(a, np.maximum(a.data, 0)), (a,), lambda dy: (dy * (a.data > 0),))


def _keep_axes(array, axis, shape, keepdims):
    """Give a reduced array its reduced axes back, with length 1, so that it broadcasts against `shape`."""
    if axis is None:
        return np.asarray(array).reshape((1,) * len(shape))
    return array if keepdims else np.expand_dims(array, axis)


def sum(a, axis=None, *, keepdims=False):
    def backward(dy):  # every summand gets the whole gradient
        return (np.broadcast_to(_keep_axes(dy, axis, a.shape, keepdims), a.shape),)

    return record(a.data.sum(axis=axis, keepdims=keepdims), (a,), backward)


def mean(a, axis=None, *, keepdims=False):
    y = a.data.mean(axis=axis, keepdims=keepdims)
    count = a.size // (y.size or 1)

    def backward(dy):
        return (np.broadcast_to(_keep_axes(dy, axis, a.shape, keepdims) / count, a.shape).astype(a.dtype, copy=False),)

    return record(y, (a,), backward)


def max(a, axis=None, *, keepdims=False):
    y = a.data.max(axis=axis, keepdims=keepdims)

    def backward(dy):  # only the maximum gets a gradient; where several are equal, they share it
        largest = a.data == _keep_axes(y, axis, a.shape, keepdims)
        share = largest / largest.sum(axis=axis, keepdims=True)
        return ((share * _keep_axes(dy, axis, a.shape, keepdims)).astype(a.dtype, copy=False),)

    return record(y, (a,), backward)


def reshape(a, *shape):
    shape = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    return record(a.data.reshape(shape), (a,), lambda dy: (dy.reshape(a.shape),))


def transpose(a, *axes):
    """The axes in another order, as NumPy's transpose takes them (not as PyTorch's); reversed if none are given."""
    axes = axes[0] if len(axes) == 1 and isinstance(axes[0], (tuple, list)) else axes
    axes = tuple(axes) or tuple(reversed(range(a.ndim)))
    return record(a.data.transpose(axes), (a,), lambda dy: (dy.transpose(np.argsort([i % a.ndim for i in axes])),))


def getitem(a, index):
    """a[index] for any NumPy index.  An element that is picked several times gets the sum of the gradients."""

    def backward(dy):
        da = np.zeros_like(a.data)
        np.add.at(da, index, dy)  # not da[index] += dy, which keeps one of several contributions to an element
        return (da,)

    y, index = a.data[index], copy.deepcopy(index)  # the caller may change its arrays before the backward
    return record(y, (a,), backward)


def concatenate(tensors, axis=0):
    """Tensors, of which one is a Tensor at least, one after the other along an axis that they have."""
    tensors = _alike("concatenate", tensors)
    y = np.concatenate([x.data for x in tensors], axis)
    ends = np.cumsum([x.shape[axis] for x in tensors])[:-1]
    return record(y, tensors, lambda dy: tuple(np.split(dy, ends, axis)))


def stack(tensors, axis=0):
    """Tensors of one shape, of which one is a Tensor at least, side by side along a new axis."""
    tensors = _alike("stack", tensors)
    y = np.stack([x.data for x in tensors], axis)
    return record(y, tensors, lambda dy: tuple(np.moveaxis(dy, axis, 0)))


def _alike(name, tensors):
    """A tuple of Tensors of one dtype: that of the first Tensor."""
    tensors = tuple(tensors)
    first = next((x for x in tensors if isinstance(x, Tensor)), None)
    if first is None:
        raise TypeError(f"{name}: at least one of them must be a Tensor")
    tensors = tuple(_as_tensor(x, first) for x in tensors)
    if len({x.dtype for x in tensors}) > 1:
        raise TypeError(f"{name}: all must have one dtype, got {', '.join(str(x.dtype) for x in tensors)}")
    return tensors


def where(condition, a, b):
    """a where the condition (a boolean array) holds, b elsewhere."""
    condition = np.array(plain(condition, "where: the condition"), bool)  # a copy: the caller may change its array
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        raise TypeError("where: at least one of the two values must be a Tensor")
    a, b = _pair(a, b)

    def backward(dy):
        return _unbroadcast(np.where(condition, dy, 0), a), _unbroadcast(np.where(condition, 0, dy), b)

    return record(np.where(condition, a.data, b.data), (a, b), backward)


def _compared(operation):
    """A comparison: NumPy's array of bools, without a gradient."""

    def compare(a, b):
        return operation(a.data, b.data if isinstance(b, Tensor) else plain(b, "a Tensor's partner"))

    return compare


def _in_place(sign, otherwise):
    """What a += b is: a leaf would be replaced by a result, and be trained no more; anything else becomes a + b."""

    def change(a, b):
        if a.requires_grad and a._backward is None:
            raise TypeError(f"a {sign}= b would put a result in the place of a leaf; write a.data {sign}= ... instead")
        return otherwise(a, b)

    return change


for _name, _operator in {
    "__add__": add, "__radd__": lambda a, b: add(b, a), "__sub__": sub, "__rsub__": lambda a, b: sub(b, a),
    "__mul__": mul, "__rmul__": lambda a, b: mul(b, a), "__truediv__": div, "__rtruediv__": lambda a, b: div(b, a),
    "__matmul__": matmul, "__rmatmul__": lambda a, b: matmul(b, a), "__neg__": neg, "__pow__": pow, "__rpow__": rpow,
    "__getitem__": getitem, "exp": exp, "log": log, "sqrt": sqrt, "tanh": tanh, "relu": relu, "sum": sum, "mean": mean,
    "max": max, "reshape": reshape, "transpose": transpose,
    **{f"__{name}__": _compared(getattr(operator, name)) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "__iadd__": _in_place("+", add), "__isub__": _in_place("-", sub), "__imul__": _in_place("*", mul),
    "__itruediv__": _in_place("/", div), "__ipow__": _in_place("**", pow), "__imatmul__": _in_place("@", matmul),
}.items():  # fmt: skip
    setattr(Tensor, _name, _operator)

Tensor.__array_ufunc__ = None  # so that ndarray + Tensor asks the Tensor, and does not make an array of objects
Tensor.T = property(transpose)
