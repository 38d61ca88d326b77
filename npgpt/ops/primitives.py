"""The small operations that are no operators of a Tensor (npgpt/tensor.py), broadcasting as NumPy does: concatenate,
stack, where.  Each is one line forward and one line backward; dy is the gradient of the output.
"""

import numpy as np

from npgpt.tensor import Tensor, as_tensor, plain, record, unbroadcast


def concatenate(tensors, axis=0):
    """Tensors, of which one is a Tensor at least, one after the other along an axis that they have."""
    tensors = _alike("concatenate", tensors)
    y = np.concatenate([x.data for x in tensors], axis)
    ends = np.cumsum([x.shape[axis] for x in tensors])[:-1]
    return record("concatenate", y, tensors, lambda dy: tuple(np.split(dy, ends, axis)))


def stack(tensors, axis=0):
    """Tensors of one shape, of which one is a Tensor at least, side by side along a new axis."""
    tensors = _alike("stack", tensors)
    y = np.stack([x.data for x in tensors], axis)
    return record("stack", y, tensors, lambda dy: tuple(np.moveaxis(dy, axis, 0)))


def _alike(name, tensors):
    """A tuple of Tensors of one dtype: that of the first Tensor."""
    tensors = tuple(tensors)
    first = next((x for x in tensors if isinstance(x, Tensor)), None)
    if first is None:
        raise TypeError(f"{name}: at least one of them must be a Tensor")
    tensors = tuple(as_tensor(x, first) for x in tensors)
    if len({x.dtype for x in tensors}) > 1:
        raise TypeError(f"{name}: all must have one dtype, got {', '.join(str(x.dtype) for x in tensors)}")
    return tensors


def where(condition, a, b):
    """a where the condition (a boolean array) holds, b elsewhere."""
    condition = np.array(plain(condition, "where: the condition"), bool)  # a copy: the caller may change its array
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        raise TypeError("where: at least one of the two values must be a Tensor")
    a, b = (a, as_tensor(b, a)) if isinstance(a, Tensor) else (as_tensor(a, b), b)

    def backward(dy):
        return unbroadcast(np.where(condition, dy, 0), a), unbroadcast(np.where(condition, 0, dy), b)

    return record("where", np.where(condition, a.data, b.data), (a, b), backward)
