"""The engine grown: how 01's Node becomes npgpt's Tensor, one failure at a time.

You will understand

- which small case goes wrong without each part of npgpt/engine.py,
- whose array a gradient is: when it may be added to in place, and when a new array is needed,
- why the walk lets go of the graph as it passes, and how one step's memory then serves the next.

Counterpart: npgpt/engine.py and npgpt/tensor.py.  A table near the end says which part here is which part there.
Next: 13_muon.py, the optimizer that trains by default.
Try it: read as far as `shared`, and let it return y + b.  Which gradient will `Hasty` get wrong?  Say it, then run.

    python examples/12_engine.py
"""

import collections
import math
import sys
import tracemalloc
import weakref

import numpy as np
from checks import check, difference, finish

import npgpt  # only for the proof at the end

rng = np.random.default_rng(12)

# --------------------------------------------------------------------------------------------------------------------
# Arrays.  01's Node keeps a slope for each parent, and sends it the slope times its own gradient.  With arrays that
# goes wrong twice.
#
# 1. In y = x + b the slopes are 1, so b would get dy as it is.  But where b was broadcast, dy has another shape.  So
#    what a node sends is summed to the shape of the parent (02_broadcasting.py).
# 2. In y = a @ b each entry of y moves with a whole row of a.  So the slopes for a are a table with four indices:
#    d y_ij / d a_kl is b_lj where i = k, else 0.  The chain rule, a sum over i and j, gives da_kl = sum_j dy_kj b_lj.
#    This is dy @ b.T, which needs no table (03_linear.py).  So a node keeps no slopes but a function: `back`, from its
#    own gradient to those of its parents.

b, dy = np.ones(3), np.ones((4, 3))
print(f"01's rule for x + b: b has shape {b.shape}, and its gradient {(dy * 1.0).shape}")
a, b, dy = rng.normal(size=(2, 3)), rng.normal(size=(3, 4)), rng.normal(size=(2, 4))
table = np.einsum("ik,lj->ijkl", np.eye(2), b)
print(f"01's rule for a @ b: a (2, 3) has {table.size} slopes, and a (1000, 1000) would have {1000**4:,}")
check("dy @ b.T is the sum over the table", difference(dy @ b.T, np.einsum("ij,ijkl->kl", dy, table)), 1e-12)


def unbroadcast(grad, shape):
    if grad.shape == shape:
        return grad  # not even a copy: it is the same array
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape))))
    return grad.sum(axis=tuple(i for i, n in enumerate(shape) if n < grad.shape[i]), keepdims=True)


class Arrays:
    """An array that remembers how it was computed.  Each class below adds a little to the one before."""

    made = 0  # how many arrays `empty` has made, for all nodes together

    def __init__(self, data, parents=(), back=None):
        self.data = np.asarray(data, float)
        self.parents, self.back = parents, back  # a leaf, which was not computed, has neither
        self.grad = None

    def record(self, data, parents, back):
        """The node of an op's result, of the same class as its operand."""
        return type(self)(data, parents, back)

    def __add__(a, b):
        return a.record(a.data + b.data, (a, b), lambda dy: (dy, dy))

    def __mul__(a, b):
        return a.record(a.data * b.data, (a, b), lambda dy: (dy * b.data, dy * a.data))

    def __matmul__(a, b):
        return a.record(a.data @ b.data, (a, b), lambda dy: (dy @ b.data.T, a.data.T @ dy))

    def tanh(a):
        y = np.tanh(a.data)
        return a.record(y, (a,), lambda dy: (dy * (1 - y * y),))

    def backward(self):
        """The loss is the sum of all entries of self.  So the gradient of each entry is 1."""
        order = topological_order(self)
        self.add_grad(np.ones_like(self.data))
        while order:
            order.pop().pass_on()  # the last first; a `for` would keep all nodes to the end of the walk

    def pass_on(self):
        if self.back is not None:
            for parent, grad in zip(self.parents, self.back(self.grad), strict=True):
                parent.add_grad(unbroadcast(grad, parent.data.shape))

    def add_grad(self, grad):  # each sum is a new array
        self.grad = np.add(0.0 if self.grad is None else self.grad, grad, out=self.empty())

    def empty(self):
        """An array like data, to be filled."""
        Arrays.made += 1
        return np.empty_like(self.data)


# --------------------------------------------------------------------------------------------------------------------
# Order.  Each node must be written down after its parents, so 01's `visit` calls itself for the parents first.  The
# calls nest as deep as the chain of ops is long, and Python has a limit.


def visit(node, order):  # 01's, a little shorter: a node that is in `order` was visited
    for parent in node.parents:
        if parent not in order:
            visit(parent, order)
    order.append(node)


# The cure: a list, `stack`, in place of the nested calls.  Each entry is an unfinished visit: a node, and an iterator
# over the parents that it has not looked at yet.  The last entry goes on first.


def topological_order(root):
    order, visited, stack = [], {root}, [(root, iter(root.parents))]
    while stack:
        node, parents = stack[-1]
        parent = next(parents, None)
        if parent is None:  # none is left, so the visit is over
            order.append(node)
            stack.pop()
        elif parent not in visited:
            visited.add(parent)
            stack.append((parent, iter(parent.parents)))
    return order


def chain(x, n):
    """x + x + x + ..., n sums: the gradient of x is n + 1."""
    y = x
    for _ in range(n):
        y = y + x
    return y


def gradients(kind, f, *arrays):
    """The gradients of f's inputs, computed with this class of nodes."""
    inputs = [kind(array) for array in arrays]
    f(*inputs).backward()
    return [node.grad for node in inputs]


one, n = np.ones(1), sys.getrecursionlimit()
try:
    visit(chain(Arrays(one), n), [])
except RecursionError as error:
    print(f"\na chain of {n:,} sums: {error}")
check("with a list: the chain's gradient", difference(gradients(Arrays, lambda x: chain(x, n), one), [[n + 1]]), 0)
added = gradients(Arrays, lambda x, b: x + b, np.ones((4, 3)), np.ones(3))[1]
check("in x (4, 3) + b (3,), b's gradient is a sum over 4 rows", difference(added, np.full(3, 4)), 0)

# --------------------------------------------------------------------------------------------------------------------
# Sums.  So far `add_grad` makes an array for each contribution.  But most nodes get only one, which needs no sum.  So
# `Hasty` keeps the first array as it is, without a copy, and adds the others to it in place.
#
# Take z = y + a, with y = a + b: see `shared` below.  The walk starts with z's [1].  It is sent to y and to a, and both
# keep it: three names for one array.  Now y sends it on to a and to b.  First a adds it in place, and the array becomes
# [2].  Then b keeps this array, and has 2, though its gradient is 1.


class Hasty(Arrays):
    def add_grad(self, grad):
        if self.grad is None:
            self.grad = grad
        else:
            self.grad += grad


# The cure is to know whose array it is.  Other nodes may hold the first contribution too, so it must not change.  The
# second makes a sum, in a new array that is this node's own.  All later ones are added to that in place.  (The node's
# parents may keep its own array, too.  But a node sends it only when the sum is complete, and then it changes no more.)


class Owning(Arrays):
    own = None  # the array that was made for this node, if there is one

    def may_change(self):
        return self.grad is self.own

    def add_grad(self, grad):
        if self.grad is None:
            self.grad = grad
        elif self.may_change():
            self.grad += grad
        else:
            self.grad = self.own = np.add(self.grad, grad, out=self.empty())


def shared(a, b):
    y = a + b
    return y + a


print("\n          gradients of a and b in `shared`   arrays made for a chain of 100 sums")
for kind in (Arrays, Hasty, Owning):
    grads, before = np.ravel(gradients(kind, shared, one, one)), Arrays.made
    gradients(kind, lambda x: chain(x, 100), one)
    made = Arrays.made - before
    print(f"{kind.__name__:<12}{grads[0]:10.0f}{grads[1]:10.0f}{made:25}")
check("`shared`, Owning and Arrays", difference(grads, np.ravel(gradients(Arrays, shared, one, one))), 0)
check("arrays that Owning makes for x's 101 contributions", made, 1)

# --------------------------------------------------------------------------------------------------------------------
# Leaves.  After the walk a leaf's gradient belongs to the user, who may change it or keep it.  With `Owning` neither is
# safe: two leaves may share an array, and a second walk changes an array that the user has kept.  So a leaf copies its
# first contribution to an array of its own.  After its turn it sets `own` to None: the next walk makes a new array.
#
# An optimizer wants all gradients side by side in one long array (flat.grads in 11_train.py).  So a leaf can have a
# `place`, a part of that array.  All contributions are added up there, also in later walks.


class Placed(Owning):
    place = None

    def may_change(self):
        return self.grad is self.own or self.grad is self.place

    def add_grad(self, grad):
        if self.grad is None and self.back is None:  # a leaf's first
            self.grad = self.own = self.empty() if self.place is None else self.place
            self.grad[...] = grad
        else:
            super().add_grad(grad)

    def pass_on(self):
        super().pass_on()
        if self.back is None:
            self.own = None  # it is the user's now


print("\n          b's gradient   c's, 1st walk   in d's place")
for kind in (Owning, Placed):
    a, b, c, d = (kind(one) for _ in range(4))
    (a + b).backward()
    a.grad *= 0.5  # b's should stay 1
    (c + c).backward()
    first = c.grad  # 2, and so it should stay
    (c + c).backward()
    d.place = np.zeros(1)
    (d + d).backward()
    (d + d).backward()  # 4 in the place, after two walks
    found = np.concatenate([b.grad, first, d.place])
    print(f"{kind.__name__:<12}{found[0]:10.1f}{found[1]:15.1f}{found[2]:15.1f}")
check("Placed: they are 1, 2 and 4", difference(found, [1, 2, 4]), 0)

# --------------------------------------------------------------------------------------------------------------------
# Memory.  The graph holds every array of the forward, since the backward needs them.  The gradients come on top.  All
# of it stays while a variable names the loss, so a training loop builds the next graph beside the old one.  But once a
# node has passed on its gradient, the walk needs neither the gradient, nor `back`, nor the arrays that `back` holds.
#
# Letting go has a price.  Take h = w w, and two losses, 3 h and 5 h, each with its own walk.  The second walk would end
# at h, as at a leaf.  For w = 1 the gradient of w would be 6, not 16, and nobody would notice.  So a walk first looks
# for used-up nodes, and raises an error before it adds any gradient.  (The right way: one walk, from 3 h + 5 h.)


def used_up(dy):  # the `back` of a node that a walk has passed
    raise RuntimeError("this part of the graph was used up by an earlier backward()")


class Freeing(Placed):
    kept = False  # whether the node keeps its gradient for the user, though it is no leaf

    def backward(self):
        if any(node.back is used_up for node in topological_order(self)):
            used_up(None)
        super().backward()

    def pass_on(self):
        super().pass_on()
        if self.back is not None:
            self.parents, self.back, self.own = (), used_up, None
            self.grad = self.grad.copy() if self.kept else None  # a copy, since others may hold it


def most_arrays(f, kind):
    """The most memory that f uses at any moment, in arrays of the size of `large`."""
    tracemalloc.start()
    f(kind(large))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / large.nbytes


def tanhs(x):
    for _ in range(50):
        x = x.tanh()
    return x


def two_steps(x):
    for _ in range(2):
        loss = tanhs(x)  # while this is computed, `loss` is still that of the step before
        loss.backward()


large = rng.normal(size=100_000)
before, now = (most_arrays(two_steps, kind) for kind in (Placed, Freeing))
print(f"\n50 tanhs there and back, twice; arrays at once: Placed {before:.0f}, Freeing {now:.0f}")
check("Freeing: hardly more than the 50 of one forward", now, 55)

w, went_through = Freeing(one), 1
h = w * w
h.kept = True
(h * Freeing(3 * one)).backward()
try:
    (h * Freeing(5 * one)).backward()
except RuntimeError as error:
    went_through = 0
    print(f"Freeing, after 3 h and 5 h: w's gradient {w.grad[0]:.0f}, h's {h.grad[0]:.0f}, and an error: {error}")
check("Freeing: h's gradient was kept", difference(h.grad, [3]), 0)
check("Freeing: walks over a used-up graph that went through", went_through, 0)

# --------------------------------------------------------------------------------------------------------------------
# What nobody wants.  Only leaves with `requires_grad` need a gradient, and what is computed from them.  Inputs and
# targets need none.  And whoever generates text, or only measures a loss, never walks back: a graph would hold memory
# for nothing (no_grad in npgpt, `recording` here).  In these cases `record` keeps neither parents nor `back`.
#
# Reuse.  New memory costs time, and every training step needs the same sizes.  So `empty` takes memory from a pool, and
# the memory returns there when the array is no longer used.  The walk lets go of gradients as it passes, so a few
# blocks of memory serve all of them.
#
# When is an array no longer used?  Not as soon as the walk has passed its node.  In `doubled` below both tanhs keep the
# gradient of y: one array, three nodes.  If its memory returned as y is passed, b's gradient would be written into it.
# The other tanh would then read that.  So memory returns when nothing refers to the array any more.  Python knows when:
# it then calls the function that was given to `weakref.finalize`.


class Pool:
    def __init__(self):
        self.free, self.made = collections.defaultdict(list), 0  # blocks of memory, by their size

    def take(self, shape):
        size = 8 * math.prod(shape)
        if not self.free[size]:
            self.made += 1
            self.free[size].append(bytearray(size))
        block = self.free[size].pop()
        array = np.ndarray(shape, float, block)  # the block is its memory; a view of the array keeps the array alive
        weakref.finalize(array, self.free[size].append, block)
        return array


class Tensor(Freeing):
    """The last version: it knows whether it needs a gradient, and takes memory for gradients from a pool."""

    recording, pool = True, Pool()

    def __init__(self, data, parents=(), back=None, requires_grad=False):
        super().__init__(data, parents, back)
        self.requires_grad = requires_grad

    def record(self, data, parents, back):
        if self.recording and any(parent.requires_grad for parent in parents):
            return Tensor(data, parents, back, requires_grad=True)
        return Tensor(data)

    def add_grad(self, grad):
        if self.requires_grad:
            super().add_grad(grad)

    def empty(self):
        return self.pool.take(self.data.shape)


def parameter(array):
    return Tensor(array, requires_grad=True)


Tensor.recording = False
before, now = most_arrays(tanhs, Freeing), most_arrays(tanhs, parameter)
Tensor.recording = True
print(f"\n50 tanhs that nobody walks back, arrays at once: Freeing {before:.0f}, Tensor {now:.0f}")
check("Tensor: a few arrays at once", now, 4)


def doubled(a, b):
    y = a.tanh() + b.tanh()
    return y + y  # so the gradient of y is a sum, 1 + 1, in an array from the pool


da = 2 * (1 - np.tanh(one) ** 2)
grads = gradients(parameter, doubled, one, one)
check("Tensor: a and b of `doubled` get 2 (1 - tanh^2)", difference(grads, [da, da]), 1e-12)

# --------------------------------------------------------------------------------------------------------------------
# The proof: a small network on this Tensor and on npgpt's.  Where each part is there, and what it does besides:
#
#     record, and the operators     tensor.py: one dtype, clear errors; the operators call unbroadcast
#     topological_order             engine.py: leaves out what needs no gradient
#     backward, pass_on, used_up    engine.py, `backward`: notices that .data was replaced since the forward
#     own, place, kept, add_grad    engine.py, `Gradient`, one for each Tensor: an op can ask for the array to write to
#     recording                     engine.py, with no_grad(): for each thread by itself
#     Pool, empty                   kernels/buffers.py, `BufferPool` and `empty`: for results of the forward, too
#
# Two layers with the same weight, on a residual stream as in a GPT: w and b are used twice, and b is broadcast.


def loss_of(x, w, b, minus_target):
    for _ in range(2):
        x = x + (x @ w + b).tanh()
    error = x + minus_target  # (the class has no minus)
    return error * error


x, minus_target = rng.normal(size=(2, 6, 4))
ours = [parameter(rng.normal(size=shape)) for shape in ((4, 4), (4,))]
theirs = [npgpt.Tensor(tensor.data.copy(), requires_grad=True) for tensor in ours]
flat, made = np.zeros(20), []  # made: blocks of memory, step by step
ours[0].place, ours[1].place = flat[:16].reshape(4, 4), flat[16:]

print()
for step in range(3):
    before = Tensor.pool.made
    for tensor in ours + theirs:
        tensor.grad = None
    inputs = Tensor(x), Tensor(minus_target)
    loss_of(inputs[0], *ours, inputs[1]).backward()
    loss_of(npgpt.Tensor(x), *theirs, npgpt.Tensor(minus_target)).sum().backward()
    grads = np.concatenate([tensor.grad.ravel() for tensor in theirs])
    check(f"step {step}: all gradients, in one array, and npgpt's", difference(flat, grads), 1e-12)
    for tensor in ours + theirs:
        tensor.data -= 0.01 * tensor.grad
    made.append(Tensor.pool.made - before)
    print(f"step {step}: the pool had to make {made[-1]} blocks of memory")
check("inputs with a gradient, which they do not need", sum(tensor.grad is not None for tensor in inputs), 0)
check("blocks that the last step has made (and step 0 some)", made[-1] if made[0] else np.inf, 0)

finish()
