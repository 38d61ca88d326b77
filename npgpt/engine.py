"""Reverse-mode automatic differentiation: the walk back through a graph, and where a gradient lives.

A node of the graph is any object with

    data, requires_grad   its array, and whether a gradient is wanted for it, or for something it was computed from
    _gradient             its Gradient
    _op, _parents         the name of the op that computed it, and the nodes it was computed from
    _backward             the function from the gradient of data to the gradients of the parents
    _read                 the parents' data as the forward saw it, if that of a leaf can be replaced; else ()

A leaf was not computed: it has no parents, and None for _backward.  The nodes of npgpt are Tensors (npgpt/tensor.py).

`backward` sorts the graph so that every node comes after all nodes computed from it, and walks it once: by the time a
node's turn comes, all contributions to its gradient have been added up.

What the engine promises:

- a gradient is the *sum* over all uses of a node: the first contribution is taken over, later ones are added;
- it never changes an array that an op returned, unless the op asked for that array with `tensor.new_grad()`.  In
  y = a + b both gradients *are* the gradient of y; adding to one of them in place would corrupt the other;
- as the walk passes a node, its graph is let go, so that memory is free for the next step of the walk.

What it asks in return: between forward and backward nobody changes the `.data` of a tensor, or the tokens of a batch,
since a backward reads what its forward read.
"""

import numpy as np

from npgpt.context import ThreadState
from npgpt.kernels import sums
from npgpt.kernels.buffers import empty

# --------------------------------------------------------------------------------------------------------------------
# State of the current thread: is a graph being recorded, and who looks on


class _State(ThreadState):
    recording = True
    drops = True
    made = None
    passed = None


state = _State()


def no_grad():
    """Within this context ops record no graph: for evaluation and sampling."""
    return state.within(recording=False)


def no_dropout():
    """Within this context modules drop nothing, in this thread, whatever train() has said."""
    return state.within(drops=False)


def watched(made=None, passed=None):
    """Within this context these functions are told of all that ops do in this thread; None is told of nothing.

    made(op, out, parents, backward)   of each Tensor that an op makes, in their order, those of no_grad too.  It may
                                       change out.data in place, to see what comes of it
    passed(op, parents, grads)         of each op whose backward has run: the gradients it made, None for those that it
                                       has added itself.  Those of the ops before it are added up by then, its own not
    """
    return state.within(made=made, passed=passed)


# --------------------------------------------------------------------------------------------------------------------
# Where a gradient lives


class Gradient:
    """Where the gradient of one node lives: a sum, and whose array that is.

    value   the sum of the contributions so far, or None
    own     the array that the engine made for this node last, or lent to an op to fill: nobody else has it.  The value
            may be changed in place if it is this array, or the place; any other may be part of another gradient
    place   the array where the value is to end up, if the node's owner has chosen one (FlatParameters), else None
    kept    whether the value of a node that was computed stays after the walk
    """

    __slots__ = ("value", "own", "place", "kept")

    def __init__(self):
        self.value = self.own = self.place = None
        self.kept = False

    def _may_change(self):
        return self.value is self.own or self.value is self.place

    def new(self, data):
        """An array for an op to fill with a contribution: the place, if that is still free, else scratch memory.

        data: the node's array, whose shape and dtype it has.
        """
        if self.value is None and self.own is None and self.place is not None:
            if self.place.shape != data.shape:  # a kernel would write beyond it
                raise ValueError(
                    f"backward: the place of this tensor's gradient has shape {self.place.shape}, and its data "
                    f"{data.shape}: they belong to an optimizer that was made before"
                )
            self.own = self.place
        else:
            self.own = empty(data.shape, data.dtype)
        return self.own

    def to_add_to(self, data):
        """The value (zeros at first), for an op to add its contribution to in place."""
        if self.value is None or not self._may_change():
            so_far, self.value = self.value, None
            self.value = self.new(data)
            self.value[...] = 0 if so_far is None else so_far
        return self.value

    def add(self, grad, data, is_leaf):
        """Add a contribution."""
        if grad.shape != data.shape:
            raise ValueError(f"backward: a gradient of shape {grad.shape} for a tensor of shape {data.shape}")
        ours = grad is self.own
        if self.value is None:
            place = self.place
            if is_leaf and not (ours and (place is None or grad is place)):
                # a leaf outlives the walk: its gradient goes to its own place, or at least to memory of its own
                if place is None:
                    place = empty(data.shape, data.dtype)
                place[...] = grad
                grad, ours = place, True
            self.value, self.own = grad, grad if ours else None
        elif self._may_change():
            sums.add(self.value, self.value, grad)
            self.own = self.value
        else:
            total = grad if ours else empty(data.shape, data.dtype)
            sums.add(total, self.value, grad)
            self.value = self.own = total


# --------------------------------------------------------------------------------------------------------------------
# The walk


def backward(root, grad):
    """Tensor.backward: `root` is the node, grad its gradient, of its shape."""
    order = topological_order(root)
    for node in order:
        if node._backward is _used_up:
            _used_up(None)
        node._gradient.own = None  # forget what a walk that failed has left
        if node._backward is not None:
            node._gradient.value = None
    root._gradient.add(grad, root.data, root._backward is None)
    kept = [node._gradient for node in order if node._gradient.kept and node._backward is not None]
    passed = state.passed
    while order:
        node = order.pop()  # reversed order: every node before the nodes it was computed from
        gradient = node._gradient
        if node._backward is None:  # a leaf, whose gradient is complete; what it holds may be the user's from now on
            gradient.own = None
            continue
        dy = gradient.value
        if node._read and any(parent.data is not data for parent, data in zip(node._parents, node._read, strict=True)):
            raise RuntimeError("backward: the .data of a tensor was replaced after the forward that has read it")
        grads = node._backward(dy)
        if passed is not None:
            passed(node._op, node._parents, grads)
        for parent, parent_grad in zip(node._parents, grads, strict=True):
            if parent_grad is not None and parent.requires_grad:
                parent._gradient.add(parent_grad, parent.data, parent._backward is None)
        node._parents, node._read, node._backward = (), (), _used_up
        if not gradient.kept:
            gradient.value = gradient.own = None
        del node, gradient, dy, grads, parent, parent_grad  # nothing here may keep a buffer from being used again
    for n, gradient in enumerate(kept):  # these are the user's from now on: none is part of another
        is_shared = any(np.may_share_memory(gradient.value, other.value) for other in kept[:n])
        if gradient.value is not gradient.own or is_shared:
            gradient.value = gradient.value.copy()
        gradient.own = None


def _used_up(dy):
    raise RuntimeError("backward: this part of the graph was used up by an earlier backward(); run the forward again")


def topological_order(root):
    """Nodes that `root` was computed from and that need a gradient, each one after its parents; `root` is last.

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
