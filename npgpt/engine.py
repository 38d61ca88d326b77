"""Reverse-mode automatic differentiation: the only file that knows the graph.

A `Tensor` wraps a NumPy array.  An op computes its output with NumPy or a kernel and records how to go back:

    def mul(a, b):
        return record(a.data * b.data, (a, b), lambda dy: (dy * b.data, dy * a.data))

`record` gives a new Tensor that remembers its parents (a, b) and the function from the gradient of the output to the
gradients of the parents.  `loss.backward()` sorts the graph so that every tensor comes after all tensors computed
from it, and walks it once: by the time a tensor's turn comes, all contributions to its gradient have been added up.

What the engine promises:

- a gradient is the *sum* over all uses of a tensor: the first contribution is taken over, later ones are added;
- it never changes an array that an op returned, unless the op asked for that array with `tensor.new_grad()`.  In
  y = a + b both gradients *are* the gradient of y; adding to one of them in place would corrupt the other;
- as the walk passes a tensor, its graph is let go, so that memory is free for the next step of the walk.

What it asks in return: between forward and backward nobody changes the `.data` of a tensor, or the tokens of a batch,
since a backward reads what its forward read.
"""

import copy

import numpy as np

from npgpt.context import ThreadState
from npgpt.kernels.buffers import empty, zeros

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


# --------------------------------------------------------------------------------------------------------------------
# State of the current thread: is a graph being recorded, and who looks on


class _State(ThreadState):
    recording = True
    drops = True
    checked = None
    observer = None


_state = _State()


def no_grad():
    """Within this context ops record no graph: for evaluation and sampling."""
    return _state.within(recording=False)


def no_dropout():
    """Within this context modules drop nothing, in this thread, whatever train() has said."""
    return _state.within(drops=False)


def dropout_acts():
    """Whether no_dropout leaves the choice to train() and eval()."""
    return _state.drops


class NotFinite(Exception):
    """What finite_checks found: its text names the op, and the direction."""


def finite_checks(names):
    """Within this context a result of an op, or a gradient that it makes, that is not finite raises NotFinite.

    names: id of a tensor -> what it is called, for the message; those of a model's parameters, say.
    """
    return _state.within(checked=names)


def _check_finite(arrays, direction, backward, parents):
    if all(array is None or np.isfinite(array).all() for array in arrays):
        return
    op = backward.__qualname__.partition(".")[0]
    named = [_state.checked[id(parent)] for parent in parents if id(parent) in _state.checked]
    raise NotFinite(f"the {direction} of {op}" + (f" with {', '.join(named)}" if named else ""))


def observed(observer):
    """Within this context observer(out, parents, backward) is called for each Tensor that an op makes, in their order.

    Those of no_grad count too.  The observer may change out.data in place, to see what comes of it.
    """
    return _state.within(observer=observer)


# --------------------------------------------------------------------------------------------------------------------
# The graph


def check_numbers(array, words):
    """Raise TypeError, with these words, if an array does not consist of real numbers."""
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{words}, got dtype {array.dtype}")


def check_dtypes(op, **tensors):
    """Raise TypeError if the Tensors of an op (or None) do not have one dtype."""
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    if len({*dtypes.values()}) > 1:
        raise TypeError(f"{op}: all must have one dtype, got {', '.join(f'{n} {d}' for n, d in dtypes.items())}")


def plain(values, words):
    """np.asarray(values).  Raises TypeError, with these words, for an array that knows more than its numbers.

    NumPy would forget without a word which entries of a masked array do not count, say.
    """
    if isinstance(values, np.ndarray) and type(values) not in (np.ndarray, np.memmap):
        raise TypeError(f"{words} must be a plain NumPy array, not a {type(values).__name__}; pass np.asarray of it")
    return np.asarray(values)


class Tensor:
    """A float32 or float64 array that can be differentiated through.

    data           the NumPy array
    grad           gradient of what `backward()` was called on with respect to `data`, or None
    requires_grad  whether a gradient is wanted for it, or for something it was computed from

    The operators (+ - * / @ ** [] and the methods exp, log, tanh, relu, sum, mean, max, reshape, transpose) are
    defined in npgpt/ops/primitives.py, which `npgpt.Tensor` brings along.

    A Tensor belongs to one thread at a time: two backward() that reach the same leaf at once lose part of its gradient.
    Threads that share weights need Tensors of their own over them, as the workers of DataParallel have.
    """

    __slots__ = (
        "data", "grad", "requires_grad", "grad_buffer",
        "_parents", "_read", "_backward", "_handed_out", "_grad_is_ours", "_keeps_grad", "__weakref__",
    )  # fmt: skip

    def __init__(self, data, requires_grad=False):
        if isinstance(data, Tensor):
            raise TypeError("Tensor: data is a Tensor already; use it as it is, or its .data")
        data = plain(data, "Tensor: data")
        if data.dtype not in FLOATS:
            check_numbers(data, "Tensor: data must be numbers")
            data = data.astype(np.float64 if data.dtype.kind == "f" and data.itemsize >= 8 else np.float32)
        self.data = data
        self.requires_grad = requires_grad
        self.grad = None
        self.grad_buffer = None  # where a parameter's gradient is to be written, if its owner has chosen a place
        self._parents = ()
        self._read = ()  # the parents' data as the forward saw it, if that of a leaf can be replaced
        self._backward = None
        self._handed_out = None  # the array that new_grad() last gave out
        self._grad_is_ours = False  # whether this walk may change self.grad in place
        self._keeps_grad = False

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)

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

    def retain_grad(self):
        """Ask that `backward()` leaves the gradient of this tensor in `.grad`, although it is not a leaf."""
        self._keeps_grad = True
        return self

    def new_grad(self):
        """An array that an op's backward may fill with this tensor's gradient and must then return.

        It is the place where the gradient is to end up, if that place is still free, else scratch memory: the engine
        adds it in.  Ops that make their gradients with NumPy expressions need not ask: any array may be returned.
        """
        if self.grad is None and self.grad_buffer is not None and self._handed_out is None:
            if self.grad_buffer.shape != self.data.shape:  # a kernel would write beyond it
                raise ValueError(
                    f"backward: the place of this tensor's gradient has shape {self.grad_buffer.shape}, and its data "
                    f"{self.data.shape}: they belong to an optimizer that was made before"
                )
            self._handed_out = self.grad_buffer
        else:
            self._handed_out = empty(self.data.shape, self.data.dtype)
        return self._handed_out

    def grad_to_add_to(self):
        """This tensor's gradient so far (zeros if there is none), for a backward that only touches a few of its rows.

        The op adds to it in place, and returns None for this tensor: there is nothing left to add.
        """
        if not self.requires_grad:
            return zeros(self.data.shape, self.data.dtype)  # nobody will look at it
        if self.grad is None or not self._grad_is_ours:
            so_far, self.grad = self.grad, None
            self.grad = self.new_grad()
            self.grad[...] = 0 if so_far is None else so_far
            self._grad_is_ours, self._handed_out = True, None
        return self.grad

    def _add_grad(self, grad):
        ours = grad is self._handed_out
        self._handed_out = None
        if grad.shape != self.data.shape:
            raise ValueError(f"backward: a gradient of shape {grad.shape} for a tensor of shape {self.data.shape}")
        if self.grad is None:
            is_leaf = self._backward is None
            place = self.grad_buffer
            if is_leaf and not (ours and (place is None or grad is place)):
                # a leaf outlives the walk: its gradient goes to its own place, or at least to memory of its own
                if place is None:
                    place = empty(self.data.shape, self.data.dtype)
                place[...] = grad
                grad, ours = place, True
            self.grad, self._grad_is_ours = grad, ours
        elif self._grad_is_ours:
            self.grad += grad
        else:
            total = grad if ours else empty(self.data.shape, self.data.dtype)
            np.add(self.grad, grad, out=total)
            self.grad, self._grad_is_ours = total, True

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
        order = _topological_order(self)
        for node in order:
            if node._backward is _used_up:
                _used_up(None)
            # forget what a walk that failed has left; what a leaf holds may be the user's array by now
            node._handed_out, node._grad_is_ours = None, node.grad is node.grad_buffer
            if node._backward is not None:
                node.grad = None
        self._add_grad(grad)
        kept = [node for node in order if node._keeps_grad and node._backward is not None]
        while order:
            node = order.pop()  # reversed order: every tensor before the tensors it was computed from
            if node._backward is None:
                continue  # a leaf
            dy = node.grad
            if any(parent.data is not data for parent, data in zip(node._parents, node._read, strict=False)):
                raise RuntimeError("backward: the .data of a tensor was replaced after the forward that has read it")
            grads = node._backward(dy)
            if _state.checked is not None:
                _check_finite(grads, "backward", node._backward, node._parents)
            for parent, parent_grad in zip(node._parents, grads, strict=True):
                if parent_grad is not None and parent.requires_grad:
                    parent._add_grad(parent_grad)
            node._parents, node._read, node._backward = (), (), _used_up
            if not node._keeps_grad:
                node.grad = None
            del node, dy, grads, parent, parent_grad  # nothing here may keep a buffer from being used again
        for n, node in enumerate(kept):  # whose gradients are the user's from now on: none is part of another
            if not node._grad_is_ours or any(np.may_share_memory(node.grad, other.grad) for other in kept[:n]):
                node.grad = node.grad.copy()


def _leaf(kind, data, requires_grad, grad):
    """A Tensor of this kind that was not computed."""
    tensor = kind.__new__(kind)
    Tensor.__init__(tensor, data, requires_grad)
    tensor.grad = grad
    return tensor


def _used_up(dy):
    raise RuntimeError("backward: this part of the graph was used up by an earlier backward(); run the forward again")


def _topological_order(root):
    """Tensors that `root` was computed from and that need a gradient, each one after its parents; `root` is last.

    Depth-first with a stack of our own: a long chain of ops must not meet Python's limit on recursion.
    """
    order, visited, stack = [], {id(root)}, [(root, iter(root._parents))]
    while stack:
        node, parents = stack[-1]
        for parent in parents:
            if parent.requires_grad and id(parent) not in visited:
                visited.add(id(parent))
                stack.append((parent, iter(parent._parents)))
                break
        else:
            order.append(node)
            stack.pop()
    return order


def record(data, parents, backward):
    """A Tensor with this data, computed from these parents.

    backward(dy) returns the gradients of the parents, in their order, given the gradient dy of the output; None for a
    parent without one, or whose gradient was added to in place.  It must not hold on to the output Tensor itself (its
    array is fine): that would be a reference cycle, and memory would wait for the garbage collector.
    """
    if _state.checked is not None:
        _check_finite([data], "forward", backward, parents)
    out = Tensor(data)
    if _state.recording and any(parent.requires_grad for parent in parents):
        out.requires_grad = True
        out._parents = parents
        if any(parent._backward is None and parent.grad_buffer is None for parent in parents):  # no home
            out._read = tuple([parent.data for parent in parents])
        out._backward = backward
    if _state.observer is not None:
        _state.observer(out, parents, backward)
    return out
