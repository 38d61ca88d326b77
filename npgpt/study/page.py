"""The page that npgpt.explain writes: one forward and backward of a GPT, to look at.

Every op that the model calls becomes a box of the page, with the op's formulas and source, its values and gradients,
and the verdict on its backward (trace.py).  The page is one file, explain.html with the data put in: it needs no
network, and nothing but a browser.
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

import numpy as np

from npgpt.gradcheck import BOUND, relative_error
from npgpt.kernels.blas import blas_threads
from npgpt.kernels.jit import PAIRS
from npgpt.ops.attention import attention_weights_ref
from npgpt.ops.cross_entropy import cross_entropy_forward_ref
from npgpt.study.receipt import source_of
from npgpt.study.trace import check, check_whole, rms, trace
from npgpt.tensor import Tensor

CELLS = 48  # rows and columns of a heat map at most
LINE_CELLS = 192  # columns of one that has one row
BEST = 5  # guesses shown for each token


def heat_map(array):
    """An array as cells of 8 bits, and its figures; (1, T, C) and (T, C) are T rows, (C,) is one.

    A cell stands for a block of entries, and shows the largest of them by size, with its sign.  Its code c means
    (c / 127)^2 of the largest of all, with the sign of c: the root leaves something to see of the small ones.  Figures
    are text: JSON has no word for a NaN.
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
    text = base64.b64encode(codes.tobytes()).decode("ascii")
    figures = {"min": f"{table.min():.3g}", "max": f"{table.max():.3g}", "rms": f"{rms(table):.3g}"}
    return {"shape": list(table.shape), "cells": list(codes.shape), "codes": text, **figures}


def describe_op(node):
    """What an op's file tells of it: its formulas, from the docstring, and its sources."""
    op = _function(node)
    module = sys.modules[op.__module__]
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


def _function(node):
    """What the node is a call of: the function of that name in its module, or the operator of Tensor."""
    return getattr(sys.modules[node.backward.__module__], node.op, None) or getattr(Tensor, f"__{node.op}__")


def _docstring(thing):
    """The docstring of a function or module as its source has it: `python -OO` drops what Python would know."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    return ast.get_docstring(tree if inspect.ismodule(thing) else tree.body[0]) or ""


def _paragraphs(text):
    """[(whether it is a formula, text)]: in a docstring, formulas are indented."""
    groups = itertools.groupby(text.split("\n"), lambda line: line.startswith(" ") if line else None)
    return [(is_formula, textwrap.dedent("\n".join(lines))) for is_formula, lines in groups if is_formula is not None]


def _source(function):
    """name, file:line, text of a function."""
    text, file, number = source_of(function)
    return function.__name__, f"{file}:{number}", text


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
        arguments = list(inspect.signature(_function(node)).parameters)
        inputs = []
        for j, (x, dx, checks) in enumerate(zip(node.parents, node.gradients, node.checks, strict=True)):
            row = {"shape": list(x.shape), "dx": heat_map(dx), "uses": uses[id(x)]}
            if id(x) in names:
                row["parameter"] = names[id(x)]
                row["name"] = ".".join(names[id(x)].split(".")[len(module) :])
                row["x"], row["total"] = heat_map(x.data), heat_map(x.grad)["rms"]
            else:
                row["name"], row["box"] = arguments[j], places[id(x)]
            _, analytic, numeric = np.array(checks).T
            errors = relative_error(analytic, numeric)
            row["checks"] = [
                [str([int(n) for n in np.unravel_index(i, x.shape)]), f"{a:.6g}", f"{b:.6g}", f"{error:.1e}"]
                for (i, a, b), error in zip(checks, errors, strict=True)
            ]
            row["error"], row["ok"] = f"{errors.max():.1e}", bool(errors.max() <= BOUND)
            inputs.append(row)
        box = {"label": label, "group": group, "op": node.op, "shape": list(node.y.shape), "inputs": inputs}
        box["y"], box["dy"] = heat_map(node.y.data), heat_map(node.y.grad)
        box["ok"] = all(row["ok"] for row in inputs)
        if node.op == "causal_attention":
            box["heads"] = [heat_map(p) for p in attention_weights_ref(node.parents[0].data, model.config.n_head)[0]]
        boxes.append(box)
    return boxes


def describe(model, idx, targets, text_of):
    """All that the page shows: idx, targets (1, T), and what tells the text of a token."""
    with blas_threads(1):  # the products of a few tokens are too small to be shared
        nodes = trace(model, idx, targets)
        check(model, idx, targets, nodes)
        expected, measured = check_whole(model, idx, targets)
    error = float(relative_error(np.array(expected), np.array(measured)))
    whole = {"gradients": f"{expected:.8g}", "measured": f"{measured:.8g}"}
    whole["error"], whole["ok"] = f"{error:.1e}", error <= BOUND
    logits, c = nodes[-1].parents[0].data[0], targets[0]
    loss, lse = cross_entropy_forward_ref(logits, c, -1, len(c))
    logp = logits - lse[:, None]  # (T, V)
    best = np.argsort(-logp, axis=1, kind="stable")[:, :BEST]
    return {
        "config": dataclasses.asdict(model.config), "n_params": model.num_params(),
        "texts": [text_of(token) for token in (idx[0, 0], *c)],
        "loss": f"{loss:.4f}", "losses": [f"{-row[token]:.3f}" for row, token in zip(logp, c, strict=True)],
        "guesses": [[(text_of(i), f"{np.exp(row[i]):.1%}") for i in few] for row, few in zip(logp, best, strict=True)],
        "bound": f"{BOUND:.0e}",
        "whole": whole,
        "boxes": describe_boxes(model, nodes),
        "ops": {node.op: describe_op(node) for node in nodes},
    }  # fmt: skip


def html(data):
    """The page of what describe returned, as text."""
    template = importlib.resources.files("npgpt.study").joinpath("explain.html").read_text(encoding="utf-8")
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")  # no </script> in it
    return text.join(template.split("DATA"))
