"""One forward and backward of a GPT, op by op, and a verdict on each op's backward.

An op's backward turns dy, the gradient of its output y, into the gradients of its inputs.  It is right if these are the
derivatives of the number sum(dy * y), for the dy that it got.  So each op is measured alone, and a wrong one is not
blamed on those before it.  One forward measures one entry of every op at the same time: just before an op runs, a step
is made in one entry of one of its inputs; just after, the step is taken back, and the op's output is put right, so that
the next op knows nothing of it.  Whether the engine adds the gradients up as it should is measured once, for the whole
model: the rate at which the loss changes when all parameters move along a random direction.
"""

import dataclasses
import itertools

import numpy as np

from npgpt.engine import no_grad, watched
from npgpt.gradcheck import POINTS, STEP, slope
from npgpt.model import GPT

ENTRIES = 6  # of each input of an op are measured: the one with the largest gradient, and others at random


def in_float64(model):
    """A copy of a GPT in eval mode whose numbers are float64, in which finite differences do not drown."""
    copy = GPT(model.config, seed=None, dtype=np.float64).eval()
    copy.tokenizer = model.tokenizer
    for parameter, source in zip(copy.parameters(), model.parameters(), strict=True):
        parameter.data[...] = source.data
    return copy


@dataclasses.dataclass
class Node:
    """A call of an op: its output y with the gradient dy, and what it was computed from."""

    op: str  # its name
    y: object  # Tensor
    parents: tuple  # Tensors
    backward: object
    gradients: list = None  # of the parents, as far as they come from this op
    checks: list = None  # for each parent [(flat index, gradient, what was measured)]


def trace(model, idx, targets):
    """The Nodes of one forward and backward, in the order of the forward; the last one's y is the loss."""
    nodes = []
    model.zero_grad()
    with watched(lambda op, out, *rest: nodes.append(Node(op, out.retain_grad(), *rest))):
        _, loss = model(idx, targets)
    loss.backward()
    for node in nodes:  # whose backward is called again, with the same dy, where its inputs have no gradient yet
        totals = [parent.grad for parent in node.parents]
        for parent in node.parents:
            parent.grad = None
        found = zip(node.parents, node.backward(node.y.grad), strict=True)
        node.gradients = [parent.grad if dx is None else dx for parent, dx in found]  # None: it is added to in place
        for parent, total in zip(node.parents, totals, strict=True):
            parent.grad = total
    return nodes


def check(model, idx, targets, nodes):
    """Fill in the nodes' checks."""
    rng = np.random.default_rng(0)
    plans = []  # for each node the steps that are made: (parent's place, flat index, h)
    for node in nodes:
        plan = []
        for j, (x, dx) in enumerate(zip(node.parents, node.gradients, strict=True)):
            chosen = [np.abs(dx).argmax(), *rng.integers(0, x.size, ENTRIES - 1)]
            h = STEP * max(rms(x.data), 1e-2)  # STEP is for entries of size 1
            plan += [(j, i, h) for i in dict.fromkeys(map(int, chosen))]
        plans.append(plan)
        node.checks = [[] for _ in node.parents]
    for steps in itertools.zip_longest(*plans):
        sums = {k: _stepped(model, idx, targets, nodes, steps, k) for k in POINTS}
        for n, (node, step) in enumerate(zip(nodes, steps, strict=True)):
            if step is not None:
                j, i, h = step
                numeric = slope({k: sums[k][n] for k in POINTS}, h)
                node.checks[j].append((i, float(node.gradients[j].flat[i]), numeric))


def _stepped(model, idx, targets, nodes, steps, k):
    """One forward, in which every node meets k times its step: how much sum(dy * y) has changed, for each node."""
    stand_ins = {}  # id of a y -> the Tensor that takes its place in this forward; parameters stay what they are
    changes = []
    undo = []  # (array, flat index, number) of the step that is made now

    def make_step():
        n = len(changes)
        if n < len(nodes) and steps[n] is not None:
            j, i, h = steps[n]
            parent = nodes[n].parents[j]
            array = stand_ins.get(id(parent), parent).data
            undo.append((array, i, array.flat[i]))
            array.flat[i] += k * h

    def made(op, out, parents, backward):
        node = nodes[len(changes)]
        while undo:
            array, i, value = undo.pop()
            array.flat[i] = value
        changes.append(float(np.sum(node.y.grad * (out.data - node.y.data))))
        out.data[...] = node.y.data
        stand_ins[id(node.y)] = out
        make_step()

    make_step()
    with no_grad(), watched(made):
        model(idx, targets)
    return changes


def check_whole(model, idx, targets):
    """(from the gradients, measured): the loss's rate of change along a random direction of all parameters."""
    rng = np.random.default_rng([0, 1])
    before = [parameter.data.copy() for parameter in model.parameters()]
    direction = [rng.normal(size=x.shape) * rms(x) for x in before]
    expected = sum(float(np.sum(p.grad * v)) for p, v in zip(model.parameters(), direction, strict=True))
    losses = {}
    for k in POINTS:
        for parameter, x, v in zip(model.parameters(), before, direction, strict=True):
            parameter.data[...] = x + k * STEP * v
        with no_grad():
            losses[k] = model(idx, targets)[1].item()
    for parameter, x in zip(model.parameters(), before, strict=True):
        parameter.data[...] = x
    return expected, slope(losses, STEP)


def rms(x):
    """The root of the mean square."""
    return float((x**2).mean() ** 0.5)
