"""One forward and backward of a GPT as a page to look at: python -m npgpt.explain --out-dir FOLDER [--text TEXT] ...

The model reads a few tokens in float64 and guesses each from those before it.  Every op that it calls becomes a box of
the page, with the op's formulas and source, its values and gradients, and a verdict on its backward.  The page is one
file, explain.html with the data put in: it needs no network, and nothing but a browser.

The verdict.  An op's backward turns dy, the gradient of its output y, into the gradients of its inputs.  It is right if
these are the derivatives of the number sum(dy * y), for the dy that it got.  So each op is measured alone, and a wrong
one is not blamed on those before it.  One forward measures one entry of every op at the same time: just before an op
runs, a step is made in one entry of one of its inputs; just after, the step is taken back, and the op's output is put
right, so that the next op knows nothing of it.  Whether the engine adds the gradients up as it should is measured once,
for the whole model: the rate at which the loss changes when all parameters move along a random direction.
"""

import ast
import base64
import collections
import dataclasses
import importlib.resources
import inspect
import itertools
import json
import sys
import textwrap
from pathlib import Path

import numpy as np

from npgpt.command import FileName, Parser, add_model, showing_all
from npgpt.config import SAMPLE
from npgpt.engine import no_grad, observed
from npgpt.errors import UsageError, run_command
from npgpt.files import checkpoint
from npgpt.files.pretrained import open_model
from npgpt.generate.generation import unprompted
from npgpt.gradcheck import BOUND, POINTS, STEP, relative_error, slope
from npgpt.kernels.blas import blas_threads
from npgpt.kernels.jit import PAIRS
from npgpt.model import GPT
from npgpt.ops.attention import attention_weights_ref
from npgpt.ops.cross_entropy import cross_entropy_forward_ref

PROG = "python -m npgpt.explain"
TOKENS = 24  # positions that the model reads at most: as many as can be told apart on a page
CELLS = 48  # rows and columns of a heat map at most
LINE_CELLS = 192  # columns of one that has one row
ENTRIES = 6  # of each input of an op are measured: the one with the largest gradient, and others at random
BEST = 5  # guesses shown for each token

# --------------------------------------------------------------------------------------------------------------------
# Forward, backward, and the verdict


@dataclasses.dataclass
class Node:
    """A call of an op: its output y with the gradient dy, and what it was computed from."""

    y: object  # Tensor
    parents: tuple  # Tensors
    backward: object
    gradients: list = None  # of the parents, as far as they come from this op
    checks: list = None  # for each parent [(flat index, gradient, what was measured, relative error)]

    @property
    def op(self):
        return self.backward.__qualname__.partition(".")[0]


def trace(model, idx, targets):
    """The Nodes of one forward and backward, in the order of the forward; the last one's y is the loss."""
    nodes = []
    model.zero_grad()
    with observed(lambda out, parents, backward: nodes.append(Node(out.retain_grad(), parents, backward))):
        _, loss = model(idx, targets)
    loss.backward()
    for node in nodes:
        node.gradients = _gradients_of_inputs(node)
    return nodes


def _gradients_of_inputs(node):
    """What the node adds to the gradients of its parents: its backward is called again, with the same dy."""
    totals = [parent.grad for parent in node.parents]
    for parent in node.parents:
        parent.grad = None
    gradients = node.backward(node.y.grad)
    # None: the op has added to the parent's own gradient
    found = [parent.grad if dx is None else dx for parent, dx in zip(node.parents, gradients, strict=True)]
    for parent, total in zip(node.parents, totals, strict=True):
        parent.grad = total
    return found


def check(model, idx, targets, nodes, seed=0):
    """Fill in the nodes' checks."""
    rng = np.random.default_rng(seed)
    plans = []  # for each node the steps that are made: (parent's place, flat index, h)
    for node in nodes:
        plan = []
        for j, (x, dx) in enumerate(zip(node.parents, node.gradients, strict=True)):
            chosen = [np.abs(dx).argmax(), *rng.integers(0, x.size, ENTRIES - 1)]
            h = STEP * max(_rms(x.data), 1e-2)  # STEP is for entries of size 1
            plan += [(j, int(i), h) for i in dict.fromkeys(map(int, chosen))]
        plans.append(plan)
        node.checks = [[] for _ in node.parents]
    for steps in itertools.zip_longest(*plans):
        sums = {k: _stepped(model, idx, targets, nodes, steps, k) for k in POINTS}
        for n, (node, step) in enumerate(zip(nodes, steps, strict=True)):
            if step is not None:
                j, i, h = step
                numeric = slope({k: sums[k][n] for k in POINTS}, h)
                node.checks[j].append((i, float(node.gradients[j].flat[i]), numeric))
    for node in nodes:
        for j, checks in enumerate(node.checks):
            _, analytic, numeric = np.array(checks).T
            errors = np.nan_to_num(relative_error(analytic, numeric), nan=np.inf)
            node.checks[j] = [(*row, float(error)) for row, error in zip(checks, errors, strict=True)]


def _stepped(model, idx, targets, nodes, steps, k):
    """One forward, in which every node meets k times its step: how much sum(dy * y) has changed, for each node."""
    made = {}  # id of a y -> the Tensor that takes its place in this forward; parameters stay what they are
    changes = []
    undo = []  # (array, flat index, number) of the step that is made now

    def make_step():
        n = len(changes)
        if n < len(nodes) and steps[n] is not None:
            j, i, h = steps[n]
            parent = nodes[n].parents[j]
            array = made.get(id(parent), parent).data
            undo.append((array, i, array.flat[i]))
            array.flat[i] += k * h

    def observer(out, parents, backward):
        node = nodes[len(changes)]
        while undo:
            array, i, value = undo.pop()
            array.flat[i] = value
        changes.append(float(np.sum(node.y.grad * (out.data - node.y.data))))
        out.data[...] = node.y.data
        made[id(node.y)] = out
        make_step()

    make_step()
    with no_grad(), observed(observer):
        model(idx, targets)
    return changes


def check_whole(model, idx, targets, seed=0):
    """(from the gradients, measured): the loss's rate of change along a random direction of all parameters."""
    rng = np.random.default_rng([seed, 1])
    before = [parameter.data.copy() for parameter in model.parameters()]
    direction = [rng.normal(size=x.shape) * _rms(x) for x in before]
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


def _rms(x):
    return float((x**2).mean() ** 0.5)


# --------------------------------------------------------------------------------------------------------------------
# What the page is told.  Figures are strings, as they are shown: JSON has no word for a NaN.


def figure(x):
    return f"{x:.3g}"


def heat_map(array):
    """An array as cells of 8 bits, and its figures; (1, T, C) and (T, C) are T rows, (C,) is one.

    A cell stands for a block of entries, and shows the largest of them by size, with its sign.  Its code c means
    (c / 127)^2 of the largest of all, with the sign of c: the root leaves something to see of the small ones.
    """
    table = array.reshape(-1, array.shape[-1] if array.ndim else 1)
    finite = np.nan_to_num(table)
    rows, columns = (  # where the blocks begin
        np.arange(min(n, most)) * n // min(n, most)
        for n, most in zip(table.shape, (CELLS, CELLS if len(table) > 1 else LINE_CELLS), strict=True)
    )
    high = np.maximum.reduceat(np.maximum.reduceat(finite, rows, 0), columns, 1)
    low = np.minimum.reduceat(np.minimum.reduceat(finite, rows, 0), columns, 1)
    cells = np.where(high >= -low, high, low)
    largest = np.abs(cells).max() or 1.0
    codes = np.rint(127 * np.sign(cells) * np.sqrt(np.abs(cells) / largest)).astype(np.int8)
    return {
        "shape": list(table.shape),
        "cells": list(codes.shape),
        "codes": base64.b64encode(codes.tobytes()).decode("ascii"),
        "min": figure(table.min()),
        "max": figure(table.max()),
        "rms": figure(_rms(table)),
    }


def describe_op(node):
    """What an op's file tells of it: its formulas, from the docstring, and its sources."""
    module = sys.modules[node.backward.__module__]
    op = getattr(module, node.op)
    doc = next(doc for doc in map(_docstring, (op, module)) if "\nBackward" in doc)
    forward, _, backward = doc.partition("\nBackward")
    sources = []
    for fast, reference in PAIRS.values():
        if reference.__module__ == module.__name__:
            sources += [["reference", *_source(reference)], ["kernel", *_source(getattr(fast, "py_func", fast))]]
    return {
        "title": doc.partition("\n")[0],
        "forward": _paragraphs(forward[forward.index("Forward") :]),
        "backward": _paragraphs("Backward" + backward),
        "sources": [*sorted(sources, reverse=True), ["op", *_source(op)]],
    }


def _docstring(thing):
    """The docstring of a function or module as its source has it: `python -OO` drops what Python would know."""
    tree = ast.parse(inspect.getsource(thing))
    return ast.get_docstring(tree if inspect.ismodule(thing) else tree.body[0]) or ""


def _paragraphs(text):
    """[(whether it is a formula, text)]: in a docstring, formulas are indented."""
    groups = itertools.groupby(text.split("\n"), lambda line: line.startswith(" ") if line else None)
    return [(is_formula, textwrap.dedent("\n".join(lines))) for is_formula, lines in groups if is_formula is not None]


def _source(function):
    """name, file:line, text of a function."""
    lines, number = inspect.getsourcelines(function)
    file = Path(inspect.getsourcefile(function)).relative_to(Path(__file__).parents[1]).as_posix()
    return function.__name__, f"{file}:{number}", "".join(lines)


def describe_boxes(model, nodes):
    """The boxes of the page, one for each node."""
    names = {id(parameter): name.removeprefix("transformer.") for name, parameter in model.named_parameters()}
    places = {id(node.y): n for n, node in enumerate(nodes)}
    uses = collections.Counter(id(parent) for node in nodes for parent in node.parents)
    boxes, group = [], "embedding"
    for node in nodes:
        paths = [names[id(x)].split(".")[:-1] for x in node.parents if id(x) in names]
        same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
        module = [parts[0] for parts in same]  # ["h", "0", "attn", "c_attn"]
        if module[:1] == ["h"]:
            group, label = f"block {module[1]}", ".".join(module[2:])
        elif node.op == "linear":
            label, module = "lm_head", []  # its weight is called wte.weight
        elif module:
            group, label = "output", ".".join(module)
        elif node.op == "add":
            label = f"x + {boxes[places[id(node.parents[1])]]['label']}"
        else:
            label = node.op.removeprefix("causal_")
        arguments = list(inspect.signature(getattr(sys.modules[node.backward.__module__], node.op)).parameters)
        inputs = []
        for j, (x, dx, checks) in enumerate(zip(node.parents, node.gradients, node.checks, strict=True)):
            row = {"shape": list(x.shape), "dx": heat_map(dx), "uses": uses[id(x)]}
            if id(x) in names:
                row["parameter"] = names[id(x)]
                row["name"] = ".".join(names[id(x)].split(".")[len(module) :])
                row["x"], row["total"] = heat_map(x.data), heat_map(x.grad)["rms"]
            else:
                row["name"], row["box"] = arguments[j], places[id(x)]
            inputs.append(row | _verdict(checks, x.shape))
        box = {"label": label, "group": group, "op": node.op, "shape": list(node.y.shape), "inputs": inputs}
        box["y"], box["dy"] = heat_map(node.y.data), heat_map(node.y.grad)
        box["ok"] = all(row["ok"] for row in inputs)
        if node.op == "causal_attention":
            box["heads"] = [heat_map(p) for p in attention_weights_ref(node.parents[0].data, model.config.n_head)[0]]
        boxes.append(box)
    return boxes


def _verdict(checks, shape):
    worst = max(error for *_, error in checks)
    rows = []
    for i, analytic, numeric, error in checks:
        index = ", ".join(map(str, np.unravel_index(i, shape)))
        rows.append([f"[{index}]", f"{analytic:.6g}", f"{numeric:.6g}", f"{error:.1e}"])
    return {"checks": rows, "error": f"{worst:.1e}", "ok": worst <= BOUND}


def describe(model, idx, targets, text_of):
    """All that the page shows: idx, targets (1, T), and what tells the text of a token."""
    with blas_threads(1):  # the products of a few tokens are too small to be shared
        nodes = trace(model, idx, targets)
        check(model, idx, targets, nodes)
        expected, measured = check_whole(model, idx, targets)
    error = float(np.nan_to_num(relative_error(np.array(expected), np.array(measured)), nan=np.inf))
    logits, c = nodes[-1].parents[0].data[0], targets[0]
    loss, lse = cross_entropy_forward_ref(logits, c, -1, len(c))
    logp = logits - lse[:, None]  # (T, V)
    best = np.argsort(-logp, axis=1, kind="stable")[:, :BEST]
    return {
        "config": dataclasses.asdict(model.config),
        "n_params": model.num_params(),
        "texts": [text_of(token) for token in (idx[0, 0], *c)],
        "loss": f"{loss:.4f}",
        "losses": [f"{-row[token]:.3f}" for row, token in zip(logp, c, strict=True)],
        "guesses": [[(text_of(i), f"{np.exp(row[i]):.1%}") for i in few] for row, few in zip(logp, best, strict=True)],
        "bound": f"{BOUND:.0e}",
        "whole": {
            "gradients": f"{expected:.8g}",
            "measured": f"{measured:.8g}",
            "error": f"{error:.1e}",
            "ok": error <= BOUND,
        },
        "boxes": describe_boxes(model, nodes),
        "ops": {node.op: describe_op(node) for node in nodes},
    }


def page(data):
    """The page of what describe returned."""
    template = importlib.resources.files("npgpt").joinpath("explain.html").read_text(encoding="utf-8")
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")  # no </script> in it
    before, after = template.split("DATA")
    return before + text + after


# --------------------------------------------------------------------------------------------------------------------
# The command


def parse(argv):
    parser = Parser(prog=PROG, description="Show one forward and backward of a GPT as an HTML page.")
    add_model(parser)
    parser.add_argument(
        "--text", help=f"text to read, cut after {TOKENS + 1} tokens (default: one that the model writes)"
    )
    parser.add_argument(
        "--out", type=FileName, default="explain.html", metavar="FILE", help="the page to write (default: explain.html)"
    )
    parser.add_argument(
        "--param", metavar="NAME[I,J]", help="print where one number's gradient comes from instead: --param wte[17,3]"
    )
    args = parser.parse_args(argv)
    if not args.out.endswith((".html", ".htm")):
        raise UsageError(f"--out must end in .html, got {args.out}")
    return args


def read_tokens(model, text):
    """The tokens to look at, two at least: those of a text, or, if it is None, of one that the model writes."""
    n = min(TOKENS, model.config.block_size) + 1
    if text is None:
        generation = unprompted(model, model.tokenizer, np.random.default_rng([0, SAMPLE]), n)
        while len(generation.texts[0]) < n:
            generation.step()
        return generation.texts[0]
    try:
        tokens = model.tokenizer.encode(text).tolist()
    except UsageError as error:
        raise UsageError(f"--text: {error}") from None
    if len(tokens) < 2:
        raise UsageError(f"--text must have two tokens at least, one to read and one to guess; it has {len(tokens)}")
    if len(tokens) > n:
        print(f"{PROG}: the text has {len(tokens):,} tokens; these are the first {n}", file=sys.stderr)
    return tokens[:n]


@showing_all()
def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)
    pretrained = open_model(args.model)
    tokenizer = pretrained.tokenizer
    tokens = read_tokens(pretrained, args.text)
    model = GPT(pretrained.config, seed=None, dtype=np.float64).eval()
    model.tokenizer = tokenizer
    for parameter, source in zip(model.parameters(), pretrained.parameters(), strict=True):
        parameter.data[...] = source.data
    idx, targets = np.array([tokens[:-1]]), np.array([tokens[1:]])
    if args.param is not None:
        from npgpt.study.receipt import receipt

        print(receipt(model, idx, targets, args.param))
        return 0

    def text_of(token):  # a model may know more tokens than its tokenizer
        return tokenizer.decode([int(token)]) if token < tokenizer.vocab_size else f"token {token}"

    data = describe(model, idx, targets, text_of)
    checkpoint.replace(args.out, [page(data).encode("utf-8")])
    wrong = [f"{box['group']}: {box['label']}" for box in data["boxes"] if not box["ok"]]
    wrong += [] if data["whole"]["ok"] else ["the whole model"]
    print(f"loss {data['loss']} over {len(tokens) - 1} tokens, {len(data['boxes'])} ops")
    print(f"gradients against finite differences: {'WRONG in ' + ', '.join(wrong) if wrong else 'ok'}")
    print(f"{args.out}: {Path(args.out).stat().st_size:,} bytes, to be opened in a browser")
    return 1 if wrong else 0


if __name__ == "__main__":
    run_command(PROG, main)
