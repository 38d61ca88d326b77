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
- as the walk passes a tensor, its graph is let go, so that memory is free for the next step of the walk;
- inside `reuse_buffers(pool)`, arrays from `empty` come from memory that earlier arrays no longer use.

What it asks in return: between forward and backward nobody changes the `.data` of a tensor, or the tokens of a batch,
since a backward reads what its forward read.
"""

import contextlib
import copy
import ctypes
import inspect
import math
import os
import threading
import weakref

import numpy as np

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))

# With NPGPT_NAN_FILL=1 every array from `empty` starts as NaN, so that reading what was never written fails loudly.
NAN_FILL = os.environ.get("NPGPT_NAN_FILL", "0") not in ("", "0")


# --------------------------------------------------------------------------------------------------------------------
# State of the current thread: is a graph being recorded, where do buffers come from, which random bits come next


class _ThreadState(threading.local):
    recording = True
    drops = True
    checked = None
    observer = None
    pool = None
    random_seed = 0
    random_calls = 0
    batch_offset = 0


_state = _ThreadState()


class _Context(type(contextlib.contextmanager(lambda: (yield))())):
    """What contextlib.contextmanager makes, but it refuses to decorate a generator or a coroutine.

    The context would be at an end before the first line of these runs.
    """

    def __call__(self, function):
        code = inspect.isgeneratorfunction(function), inspect.iscoroutinefunction(function)
        if any(code) or inspect.isasyncgenfunction(function):
            raise TypeError(f"{function.__name__} goes on after its call has returned: write `with` within it instead")
        return super().__call__(function)


def _within(**values):
    """A context within which the state of this thread has these values."""
    return _Context(_set_for_a_while, (values,), {})


def _set_for_a_while(values):
    before = {name: getattr(_state, name) for name in values}
    vars(_state).update(values)
    try:
        yield
    finally:
        vars(_state).update(before)


def no_grad():
    """Within this context ops record no graph: for evaluation and sampling."""
    return _within(recording=False)


def no_dropout():
    """Within this context modules drop nothing, in this thread, whatever train() has said."""
    return _within(drops=False)


def dropout_acts():
    """Whether no_dropout leaves the choice to train() and eval()."""
    return _state.drops


class NotFinite(Exception):
    """What finite_checks found: its text names the op, and the direction."""


def finite_checks(names):
    """Within this context a result of an op, or a gradient that it makes, that is not finite raises NotFinite.

    names: id of a tensor -> what it is called, for the message; those of a model's parameters, say.
    """
    return _within(checked=names)


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
    return _within(observer=observer)


def random_stream(seed, batch_offset=0):
    """Within this context dropout draws its masks from `seed` (a uint32), one mask after the other.

    batch_offset: index of the first sequence of this batch in a larger batch that is split over workers, so that a
    sequence gets the same mask however the batch is split.
    """
    return _within(random_seed=int(seed), random_calls=0, batch_offset=int(batch_offset))


def next_random_key():
    """(key, batch_offset) for the next random mask: key is a uint32 made of the stream's seed and a running number."""
    _state.random_calls += 1
    key = (_state.random_seed * 0x9E3779B1 + _state.random_calls * 0x85EBCA77) & 0xFFFFFFFF
    return np.uint32(key), _state.batch_offset


# --------------------------------------------------------------------------------------------------------------------
# Buffers


class BufferPool:
    """Memory that is used again.

    An array handed out by `empty` stands on a block of memory; when the last reference to the array (or to a view of
    it) is gone, the block goes back to the pool.  So a block is never given out while anybody can still see it, and
    the second training step finds every block that the first one needed.  One pool serves one thread at a time.
    """

    SMALL = 2048  # bytes; below this the memory allocator is as fast

    def __init__(self):
        self.free = {}  # size in bytes -> blocks not in use
        self._loans = {}  # id of a weak reference -> that reference, with the block it will bring back
        self.nbytes = 0  # memory owned, in use or not

    def empty(self, shape, dtype):
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < self.SMALL:
            return np.empty(shape, dtype)
        blocks = self.free.get(nbytes)
        if blocks is None:
            blocks = self.free[nbytes] = []
        if blocks:
            block = blocks.pop()
        else:
            block = _aligned_block(nbytes)
            self.nbytes += nbytes
        array = np.ndarray(shape, dtype, block)
        loan = _Loan(array, self._bring_back)
        loan.block, loan.blocks = block, blocks
        self._loans[id(loan)] = loan
        return array

    def _bring_back(self, loan):
        del self._loans[id(loan)]
        loan.blocks.append(loan.block)


class _Loan(weakref.ref):
    __slots__ = ("block", "blocks")


def _aligned_block(nbytes, align=64):
    # NumPy allocates (it asks for huge pages where they pay), and ctypes holds: an array made on a ctypes object keeps
    # itself, not the memory beneath, as the base of its views, so a view keeps the loan alive.
    memory = np.empty(nbytes + align, np.uint8)
    return (ctypes.c_char * nbytes).from_buffer(memory, -memory.ctypes.data % align)


def reuse_buffers(pool):
    """Within this context `empty` takes its memory from `pool`, a BufferPool kept from step to step."""
    return _within(pool=pool)


def empty(shape, dtype):
    """An uninitialised array, C-contiguous, from the current pool if there is one."""
    pool = _state.pool
    array = np.empty(shape, dtype) if pool is None else pool.empty(shape, np.dtype(dtype))
    if NAN_FILL and array.dtype.kind == "f":
        array.fill(np.nan)
    return array


def zeros(shape, dtype):
    """Like `empty`, filled with zeros."""
    array = empty(shape, dtype)
    array.fill(0)
    return array


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


def as_rows(array):
    """An (..., C) array as C-contiguous, writeable (N, C) rows, which is what kernels take.  Copies only if it must."""
    if not (array.flags.c_contiguous and array.flags.writeable):
        array = array.copy()
    return array.reshape(-1, array.shape[-1])
