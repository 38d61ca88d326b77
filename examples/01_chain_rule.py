"""The chain rule on single numbers: all of backpropagation, in one line of code and one rule about order.

You will understand

- why a gradient is *added* (`+=`) to what is there already,
- why a node must wait until everything computed from it has had its turn,
- why one walk over the graph is enough, however many ways lead through it.

Counterpart: npgpt/engine.py does the same with arrays.  Node below is the Tensor of npgpt/tensor.py.
Next: 02_broadcasting.py, where the numbers become arrays.
Try it: let `small` return d * d, work out the gradient of a in your head, and only then run it.

    python examples/01_chain_rule.py
"""

import math

import numpy as np
from checks import check, difference, finish

from npgpt import Tensor

# --------------------------------------------------------------------------------------------------------------------
# A number that remembers how it was computed: from which parents, and how fast it moves when one of them moves


class Node:
    def __init__(self, value, parents=(), slopes=()):
        self.value = value
        self.parents = parents
        self.slopes = slopes  # d self / d parent for each parent, the others held still
        self.grad = 0.0  # d loss / d self, to be filled in

    def __add__(self, other):
        # y = a + b:  dy/da = 1,  dy/db = 1
        return Node(self.value + other.value, (self, other), (1.0, 1.0))

    def __mul__(self, other):
        # y = a b:  dy/da = b,  dy/db = a
        return Node(self.value * other.value, (self, other), (other.value, self.value))

    def tanh(self):
        # y = tanh a:  dy/da = 1 - y^2
        y = math.tanh(self.value)
        return Node(y, (self,), (1 - y * y,))


# --------------------------------------------------------------------------------------------------------------------
# The chain rule.  Say that u and v are computed from x, and the loss from both.  When x moves by a little, u moves by
# du/dx times that and v by dv/dx times that, and the loss feels both:
#
#     d loss / dx  =  d loss / du  du/dx  +  d loss / dv  dv/dx         a product for each use of x, and their *sum*
#
# So each node sends to each parent its own gradient times the slope, and what arrives there is added up.


def backward(loss, order):
    loss.grad = 1.0  # d loss / d loss
    for node in order:
        for parent, slope in zip(node.parents, node.slopes, strict=True):
            parent.grad += node.grad * slope


# What a node sends must be its whole gradient, so everything computed from it must have had its turn before.  For that,
# write each node down after its parents (the inputs come first, the loss last), and read the list from its end.


def topological_order(loss):
    order, visited = [], set()

    def visit(node):
        if node not in visited:
            visited.add(node)
            for parent in node.parents:
                visit(parent)
            order.append(node)

    visit(loss)
    return order[::-1]


# Two mistakes.  The first takes the nodes nearest to the loss first, each once, as one would search a maze; the second
# forgets that a gradient is a sum.


def nearest_first(loss):
    order = [loss]
    for node in order:
        for parent in node.parents:
            if parent not in order:
                order.append(parent)
    return order


def backward_without_sum(loss, order):
    loss.grad = 1.0
    for node in order:
        for parent, slope in zip(node.parents, node.slopes, strict=True):
            parent.grad = node.grad * slope


# --------------------------------------------------------------------------------------------------------------------
# A graph that is small enough for your head.  d is used twice, by e and by the loss.  With a = 2, b = -3, c = 10:
#
#     d = a b = -6           last:   da = dd b = 6,  db = dd a = -4
#     e = d + c = 4          then:   dc = de = -6,   and d gets de = -6 as well: dd = 4 - 6 = -2
#     loss = d e = -24       first:  de = d = -6,    and d gets e = 4


def small(a, b, c):
    d = a * b
    e = d + c
    return d * e


def gradient(f, inputs, order_of=topological_order, walk=backward):
    nodes = [Node(x) for x in inputs]
    loss = f(*nodes)
    walk(loss, order_of(loss))
    return [node.grad for node in nodes]


def by_differences(f, inputs, h=1e-5):
    """No calculus: nudge one input up and down by h, and see how far the loss moves."""

    def loss(i, nudge):
        return f(*(Node(x + nudge * (i == j)) for j, x in enumerate(inputs))).value

    return [(loss(i, h) - loss(i, -h)) / (2 * h) for i in range(len(inputs))]


abc = [2.0, -3.0, 10.0]
print("d = a * b,  e = d + c,  loss = d * e           da      db      dc")
for title, grads in {
    "finite differences": by_differences(small, abc),
    "chain rule": gradient(small, abc),
    "wrong: nearest to the loss first": gradient(small, abc, order_of=nearest_first),
    "wrong: = in place of +=": gradient(small, abc, walk=backward_without_sum),
}.items():
    print(f"{title:<42}" + "".join(f"{grad:8.2f}" for grad in grads))

# --------------------------------------------------------------------------------------------------------------------
# Why it is fast.  Here p and q are used twice in each layer, so the ways from the loss to an input double with each.
# The chain rule wants the sum over all of them; but those that meet in a node are added up there, and go on as one.

n_layer = 30


def deep(p, q):
    for _ in range(n_layer):
        p, q = (p + q).tanh(), p * q
    return p + q


pq = [0.6, -0.4]
nodes = len(topological_order(deep(*(Node(x) for x in pq))))
print(f"\n{n_layer} layers: {2**n_layer:,} ways from the loss to an input, but only {nodes} nodes, each visited once")
print("gradient:", *(f"{grad:.6f}" for grad in gradient(deep, pq)), "\n")

# --------------------------------------------------------------------------------------------------------------------
# The proof; and the same two functions, on npgpt's Tensors

for title, f, inputs in (("small", small, abc), ("deep", deep, pq)):
    tensors = [Tensor(np.array(x), requires_grad=True) for x in inputs]
    f(*tensors).backward()
    theirs = [0.0 if x.grad is None else x.grad for x in tensors]  # None: the loss was not computed from it
    ours = gradient(f, inputs)
    check(f"{title}, chain rule and finite differences", difference(ours, by_differences(f, inputs)), 1e-8)
    check(f"{title}, chain rule and npgpt's engine", difference(ours, theirs), 1e-12)

finish()
