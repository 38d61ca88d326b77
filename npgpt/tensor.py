"""Tensor: a NumPy array that remembers how it was computed, with the operators that anything can be composed from.

An op computes its output with NumPy or a kernel and records how to go back:

    def __mul__(a, b):
        return record("mul", a.data * b.data, (a, b), lambda dy: (dy * b.data, dy * a.data))

`loss.backward()` walks back through all that is recorded so: npgpt/engine.py.

The operators broadcast as NumPy does.  Anything can be composed from them, the fused ops of npgpt/ops/ included;
tests/test_compositions.py does so and finds the same gradients.  Each is one line forward and one line backward; dy is
the gradient of the output, and a and b are the operands, as in the formulas.

Broadcasting copies a number to several places, so its gradient is the sum over these places: `unbroadcast`.
"""

import copy
import operator

import numpy as np

from npgpt import engine
from npgpt.kernels import sums
from npgpt.kernels.buffers import empty, zeros

_wants_grad = operator.attrgetter("requires_grad")
FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def check_numbers(array, words):
    """Raise TypeError, with these words, if an array does not consist of real numbers."""
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{words}, got dtype {array.dtype}")


def check_dtypes(op, **tensors):
    """Raise TypeError if the Tensors of an op (or None) do not have one dtype."""
    if len({tensor.data.dtype for tensor in tensors.values() if tensor is not None}) > 1:
        dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
        raise TypeError(f"{op}: all must have one dtype, got {', '.join(f'{n} {d}' for n, d in dtypes.items())}")


def plain(values, words):
    """np.asarray(values).  Raises TypeError, with these words, for an array that knows more than its numbers.

    NumPy would forget without a word which entries of a masked array do not count, say.
    """
    if isinstance(values, np.ndarray) and type(values) not in (np.ndarray, np.memmap):
        raise TypeError(f"{words} must be a plain NumPy array, not a {type(values).__name__}; pass np.asarray of it")
    return np.asarray(values)


def _floats(data):
    """What a Tensor is to be made of, as an array of float32 or float64."""
    if isinstance(data, Tensor):
        raise TypeError("Tensor: data is a Tensor already; use it as it is, or its .data")
    data = plain(data, "Tensor: data")
    if data.dtype not in FLOATS:
        check_numbers(data, "Tensor: data must be numbers")
        data = data.astype(np.float64 if data.dtype.kind == "f" and data.itemsize >= 8 else np.float32)
    return data


def record(op, data, parents, backward):
    """A Tensor with this data, computed by an op (its name) from these parents.

    backward(dy) returns the gradients of the parents, in their order, given the gradient dy of the output; None for a
    parent without one, or whose gradient was added to in place.  It must not hold on to the output Tensor itself (its
    array is fine): that would be a reference cycle, and memory would wait for the garbage collector.
    """
    out = Tensor(data)
    state = engine.state
    if state.recording and any(map(_wants_grad, parents)):
        out.requires_grad = True
        out._op, out._parents, out._backward = op, parents, backward
        for parent in parents:
            if parent._backward is None and parent._gradient.place is None:  # no home
                out._read = tuple([parent.data for parent in parents])
                break
    if state.made is not None:
        state.made(op, out, parents, backward)
    return out


def _comparison(compare):
    """A method of a Tensor that compares its numbers with those of a Tensor, an array or a number."""
    return lambda a, b: compare(a.data, b.data if isinstance(b, Tensor) else plain(b, "a Tensor's partner"))


def _reflected(operation):
    """A method of a Tensor for what stands right of a number or an array."""
    return lambda a, b: operation(as_tensor(b, a), a)


def _in_place(operation, sign):
    """A method of a Tensor for the left side of a += b, say; it raises TypeError for a leaf."""

    def operate(a, b):
        if a.requires_grad and a._backward is None:
            raise TypeError(f"a {sign}= b would put a result in the place of a leaf; write a.data {sign}= ... instead")
        return operation(a, b)

    return operate


class Tensor:
    """A float32 or float64 array that can be differentiated through.

    data           the NumPy array
    grad           gradient of what `backward()` was called on with respect to `data`, or None
    requires_grad  whether a gradient is wanted for it, or for something it was computed from

    A Tensor belongs to one thread at a time: two backward() that reach the same leaf at once lose part of its gradient.
    Threads that share weights need Tensors of their own over them, as the workers of DataParallel have.
    """

    __slots__ = ("data", "requires_grad", "_op", "_parents", "_read", "_backward", "_gradient", "__weakref__")

    def __init__(self, data, requires_grad=False):
        if type(data) is not np.ndarray or data.dtype not in FLOATS:
            data = _floats(data)
        self._gradient = engine.Gradient()  # first: a Parameter's data asks it for the place
        self.data = data
        self.requires_grad = requires_grad
        self._op = self._backward = None
        self._parents = ()
        self._read = ()  # the parents' data as the forward saw it, if that of a leaf can be replaced

    shape = property(operator.attrgetter("data.shape"))
    dtype = property(operator.attrgetter("data.dtype"))
    ndim = property(operator.attrgetter("data.ndim"))
    size = property(operator.attrgetter("data.size"))

    def __len__(self):
        return len(self.data)

    def __array__(self, *args, **options):
        raise TypeError("a Tensor is not an array: use its .data")  # NumPy would make a list of lists of it

    def __array_function__(self, function, types, args, options):
        raise TypeError(f"numpy.{function.__name__} takes arrays: use the Tensor's .data")  # some would answer wrongly

    def __repr__(self):
        return f"Tensor({self.data!r}, requires_grad={self.requires_grad})"

    # Python's own answers for any object would be wrong without a word, so these are NumPy's: comparisons give arrays
    # of bools, only a single number is true or false.  As a key of a dict, a Tensor stands for itself, not its numbers.

    __hash__ = object.__hash__

    def __bool__(self):
        return bool(self.data)

    def __float__(self):
        return float(self.data)

    def __int__(self):
        return int(self.data)

    def __format__(self, words):
        return format(self.data.item() if self.data.ndim == 0 else self.data, words) if words else str(self)

    def __contains__(self, value):
        return bool((self == value).any())

    def __iter__(self):
        if self.data.ndim == 0:
            raise TypeError("a Tensor with no dimension has no rows to go through")
        return (self[i] for i in range(len(self.data)))

    def __reduce_ex__(self, protocol):  # for pickle, and for copy.deepcopy, which copies the arrays first
        if self._backward is not None:
            raise TypeError("a Tensor that was computed cannot be copied: its backward would go to the originals")
        return _leaf, (type(self), self.data, self.requires_grad, self.grad)

    def __copy__(self):
        return copy.deepcopy(self)  # two leaves never share an array

    def item(self):
        """The value of a tensor with one element, as a Python float."""
        return float(self.data.item())

    # Its gradient, which npgpt/engine.py keeps

    @property
    def grad(self):
        return self._gradient.value

    @grad.setter
    def grad(self, array):
        self._gradient.value = array

    @property
    def grad_buffer(self):
        """Where a parameter's gradient is to be written, if its owner has chosen a place, else None."""
        return self._gradient.place

    @grad_buffer.setter
    def grad_buffer(self, array):
        self._gradient.place = array

    def retain_grad(self):
        """Ask that `backward()` leaves the gradient of this tensor in `.grad`, although it is not a leaf."""
        self._gradient.kept = True
        return self

    def new_grad(self):
        """An array that an op's backward may fill with this tensor's gradient and must then return.

        An op that makes its gradients with NumPy expressions need not ask: any array may be returned.
        """
        return self._gradient.new(self.data)

    def grad_to_add_to(self):
        """This tensor's gradient so far, or zeros: a backward that touches few rows adds to it, and returns None."""
        if not self.requires_grad:
            return zeros(self.data.shape, self.data.dtype)  # nobody will look at it
        return self._gradient.to_add_to(self.data)

    def backward(self, grad=None):
        """Add the gradient of this tensor with respect to every tensor it was computed from to their `.grad`.

        grad: the gradient of this tensor itself (shape of the tensor); 1 by default, for a single number.
        The graph is used up; a second call raises RuntimeError, and so does a call on what was computed from a part of
        it, before any gradient is added.  Where an op's backward fails, leaves may have got a share of their gradients:
        set them to None before the next backward().
        """
        if not self.requires_grad:
            raise RuntimeError("backward: this tensor does not depend on any tensor with requires_grad=True")
        if grad is None:
            if self.data.size != 1:
                raise ValueError(f"backward: for a tensor of shape {self.shape}, give its gradient: backward(grad)")
            grad = np.ones_like(self.data)
        else:
            grad = plain(grad, "backward: grad").astype(self.data.dtype, copy=False)
            if grad.shape != self.data.shape:
                raise ValueError(f"backward: grad must have shape {self.shape}, got {grad.shape}")
        engine.backward(self, grad)

    # ------------------------------------------------------------------------------------------------------------------
    # The operators

    __array_ufunc__ = None  # so that ndarray + Tensor asks the Tensor, and does not make an array of objects

    def __add__(a, b):
        """The sum of two tensors; in a GPT, where a block's result joins the residual stream.

        Forward:

            y = a + b

        Backward.  Each of them reaches y with slope 1, so the gradient passes on to both as it is:

            da = dy          db = dy          (summed over the axes along which a or b was broadcast)

        So the stream carries the gradient from the loss down to the embedding, whatever the blocks do to it.
        """
        b = as_tensor(b, a)
        if a.shape == b.shape and a.dtype == b.dtype:  # the residual stream: worth a reused buffer
            y = sums.add(empty(a.shape, a.dtype), a.data, b.data)
        else:
            y = a.data + b.data
        return record("add", y, (a, b), lambda dy: (unbroadcast(dy, a), unbroadcast(dy, b)))

    def __sub__(a, b):
        b = as_tensor(b, a)
        return record("sub", a.data - b.data, (a, b), lambda dy: (unbroadcast(dy, a), unbroadcast(-dy, b)))

    def __mul__(a, b):
        b = as_tensor(b, a)
        y = a.data * b.data
        return record("mul", y, (a, b), lambda dy: (unbroadcast(dy * b.data, a), unbroadcast(dy * a.data, b)))

    def __truediv__(a, b):
        b = as_tensor(b, a)
        y = a.data / b.data
        # d(a/b)/db = -a/b^2 = -y/b
        return record("div", y, (a, b), lambda dy: (unbroadcast(dy / b.data, a), unbroadcast(-dy * y / b.data, b)))

    def __neg__(a):
        return record("neg", -a.data, (a,), lambda dy: (-dy,))

    def __pow__(a, exponent):
        """a ** exponent, for an exponent that is a plain number."""
        if isinstance(exponent, (np.generic, np.ndarray)) and exponent.ndim == 0:
            exponent = exponent.item()  # NumPy's would change the dtype
        if not isinstance(exponent, (int, float)):
            raise TypeError("pow: the exponent must be a number; for a Tensor exponent write exp(log(a) * exponent)")

        def backward(dy):
            if exponent == 0:  # the slope is 0, also where a is 0 and a^-1 infinite
                return (np.zeros_like(dy),)
            return (_like(a, dy * exponent * a.data ** (exponent - 1)),)

        return record("pow", _like(a, a.data**exponent), (a,), backward)

    def __rpow__(a, base):
        """base ** a, for a base that is a positive number."""
        if not isinstance(base, (int, float, np.number)) or not base > 0:
            words = "pow: the base must be a positive number; for a Tensor base write exp(exponent * log(base))"
            raise TypeError(words)
        y, slope = _like(a, float(base) ** a.data), np.log(float(base)).item()
        return record("rpow", y, (a,), lambda dy: (_like(a, dy * y * slope),))

    def __matmul__(a, b):
        """a @ b; leading dimensions broadcast.  As in NumPy, a vector a is a row, and a vector b a column."""
        b = as_tensor(b, a)
        if a.ndim == 0 or b.ndim == 0:
            raise ValueError(f"matmul: a single number is no matrix: write *; got shapes {a.shape} and {b.shape}")
        if a.ndim == 1:
            y = a.reshape(1, -1) @ b
            return y.reshape(*y.shape[:-2], *y.shape[-1:]) if b.ndim > 1 else y.reshape(())
        if b.ndim == 1:
            y = a @ b.reshape(-1, 1)
            return y.reshape(y.shape[:-1])

        def backward(dy):
            # y_ij = sum_k a_ik b_kj: whatever multiplied a_ik forward, multiplies dy_ij backward
            da = np.matmul(dy, np.swapaxes(b.data, -1, -2))
            db = np.matmul(np.swapaxes(a.data, -1, -2), dy)
            return unbroadcast(da, a), unbroadcast(db, b)

        return record("matmul", np.matmul(a.data, b.data), (a, b), backward)

    def exp(a):
        y = np.exp(a.data)
        return record("exp", y, (a,), lambda dy: (dy * y,))

    def log(a):
        return record("log", np.log(a.data), (a,), lambda dy: (dy / a.data,))

    def sqrt(a):
        y = np.sqrt(a.data)
        return record("sqrt", y, (a,), lambda dy: (_like(a, dy / (2 * y)),))

    def tanh(a):
        y = np.tanh(a.data)
        return record("tanh", y, (a,), lambda dy: (_like(a, dy * (1 - y * y)),))

    def relu(a):
        return record("relu", _like(a, np.maximum(a.data, 0)), (a,), lambda dy: (dy * (a.data > 0),))

    def sum(a, axis=None, *, keepdims=False):
        def backward(dy):  # every summand gets the whole gradient
            return (np.broadcast_to(_keep_axes(dy, axis, a.shape, keepdims), a.shape),)

        return record("sum", a.data.sum(axis=axis, keepdims=keepdims), (a,), backward)

    def mean(a, axis=None, *, keepdims=False):
        y = a.data.mean(axis=axis, keepdims=keepdims)
        count = a.size // (y.size or 1)

        def backward(dy):
            da = np.broadcast_to(_keep_axes(dy, axis, a.shape, keepdims) / count, a.shape)
            return (da.astype(a.dtype, copy=False),)

        return record("mean", y, (a,), backward)

    def max(a, axis=None, *, keepdims=False):
        y = a.data.max(axis=axis, keepdims=keepdims)

        def backward(dy):  # only the maximum gets a gradient; where several are equal, they share it
            largest = a.data == _keep_axes(y, axis, a.shape, keepdims)
            share = largest / largest.sum(axis=axis, keepdims=True)
            return ((share * _keep_axes(dy, axis, a.shape, keepdims)).astype(a.dtype, copy=False),)

        return record("max", y, (a,), backward)

    def reshape(a, *shape):
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        return record("reshape", a.data.reshape(shape), (a,), lambda dy: (dy.reshape(a.shape),))

    def transpose(a, *axes):
        """The axes in another order, as NumPy's transpose takes them (not as PyTorch's); reversed if none are given."""
        axes = axes[0] if len(axes) == 1 and isinstance(axes[0], (tuple, list)) else axes
        axes = tuple(axes) or tuple(reversed(range(a.ndim)))
        y = a.data.transpose(axes)
        return record("transpose", y, (a,), lambda dy: (dy.transpose(np.argsort([i % a.ndim for i in axes])),))

    T = property(transpose)

    def __getitem__(a, index):
        """a[index] for any NumPy index.  An element that is picked several times gets the sum of the gradients."""

        def backward(dy):
            da = np.zeros_like(a.data)
            np.add.at(da, index, dy)  # not da[index] += dy, which keeps one of several contributions to an element
            return (da,)

        y, index = a.data[index], copy.deepcopy(index)  # the caller may change its arrays before the backward
        return record("getitem", y, (a,), backward)

    __radd__, __rsub__ = _reflected(operator.add), _reflected(operator.sub)
    __rmul__, __rtruediv__ = _reflected(operator.mul), _reflected(operator.truediv)
    __rmatmul__ = _reflected(operator.matmul)

    # Comparisons give arrays of bools, without a gradient

    __eq__, __ne__ = _comparison(operator.eq), _comparison(operator.ne)
    __lt__, __le__ = _comparison(operator.lt), _comparison(operator.le)
    __gt__, __ge__ = _comparison(operator.gt), _comparison(operator.ge)

    # a += b is a + b, but for a leaf: it would be replaced by a result, and be trained no more

    __iadd__, __isub__ = _in_place(operator.add, "+"), _in_place(operator.sub, "-")
    __imul__, __itruediv__ = _in_place(operator.mul, "*"), _in_place(operator.truediv, "/")
    __ipow__, __imatmul__ = _in_place(operator.pow, "**"), _in_place(operator.matmul, "@")


def _leaf(kind, data, requires_grad, grad):
    """A Tensor of this kind that was not computed."""
    tensor = kind.__new__(kind)
    Tensor.__init__(tensor, data, requires_grad)
    tensor.grad = grad
    return tensor


def as_tensor(x, like):
    if isinstance(x, Tensor):
        return x
    x = plain(x, "a Tensor's partner")
    check_numbers(x, "a Tensor's partner must be a number or an array of numbers")
    return Tensor(x.astype(like.dtype))


def _like(a, values):
    """Values in a's dtype: NumPy before version 2 makes float64 of a float32 number and a Python number."""
    return np.asarray(values, a.dtype)


def unbroadcast(grad, x):
    """Sum a gradient over the axes along which x was broadcast: those that were added or stretched."""
    if grad.shape == x.shape:
        return grad if grad.dtype == x.dtype else grad.astype(x.dtype)
    extra = grad.ndim - x.ndim
    stretched = tuple(i + extra for i, n in enumerate(x.shape) if n == 1 and grad.shape[i + extra] != 1)
    grad = grad.sum(axis=tuple(range(extra)) + stretched, keepdims=True)
    return grad.reshape(x.shape).astype(x.dtype, copy=False)


def _keep_axes(array, axis, shape, keepdims):
    """Give a reduced array its reduced axes back, with length 1, so that it broadcasts against `shape`."""
    if axis is None:
        return np.asarray(array).reshape((1,) * len(shape))
    return array if keepdims else np.expand_dims(array, axis)
