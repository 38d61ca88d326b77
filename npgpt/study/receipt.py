"""A receipt for one weight's gradient: the ways on which it came, and that they add up to the whole.

A weight's gradient is a sum, and each of its terms has come from the loss on a way of its own.  They differ in three
things:

use         wte is used twice: rows of it are looked up, and it is the output layer's matrix; all others are used once
path        on which the gradient came back to where the weight was used
position    of the sequence at which it was used

Paths.  Each sublayer f (a block's attention, or its MLP) adds to the residual stream:

    x' = x + f(ln(x))        so        dx = dx' + J^T dx'        with J the Jacobian of f(ln(x))

The gradient arrives at x by two ways: along the stream as it is, and through f.  Undone from the end on, the stream's
gradient at any place is that of ln_f, which came straight along the stream, plus what came out of each later sublayer.
All backward passes are linear in dy.  So a sublayer that gets these parts of its dy one after the other, instead of
their sum, gives the parts of its weights' gradients.

Positions.  In every op each position adds a product of two numbers: a number of dy there, and what the weight was
multiplied with there.  For a linear layer, dw_oi = sum over b, t of dy_bto x_bti.  The MLP is one op; here it is
taken apart into two linear layers and GELU, as in its reference.
"""

import ast
import difflib
import functools
import inspect
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from npgpt.engine import no_grad, watched
from npgpt.errors import UsageError
from npgpt.gradcheck import numeric_grad
from npgpt.ops.cross_entropy import cross_entropy, cross_entropy_backward_ref
from npgpt.ops.embedding import embedding, embedding_backward_ref
from npgpt.ops.layernorm import EPS, layernorm_backward_ref, layernorm_forward_ref
from npgpt.ops.linear import linear_backward_ref
from npgpt.ops.mlp import gelu_ref, gelu_slope_ref
from npgpt.tensor import Tensor, record

SHOWN = 5  # positions of a path that get a line of their own: the largest


def _short(name):
    """transformer.wte.weight -> wte, transformer.h.0.ln_1.weight -> h.0.ln_1.weight."""
    name = name.removeprefix("transformer.")
    return name.removesuffix(".weight") if name in ("wte.weight", "wpe.weight") else name


def find(model, param):
    """wte[17,3] -> (the parameter's full name, the Parameter, the indices as a tuple).  Raises UsageError."""
    parameters = dict(model.named_parameters())
    match = re.fullmatch(r"\s*([^\[\]]+?)\s*\[\s*(-?\d{1,18}(?:\s*,\s*-?\d{1,18})*)\s*\]\s*", param)
    if match is None:
        raise UsageError(f"param: {param[:60]!r} is not a name with indices, such as wte[17,3] or h.0.mlp.c_fc.bias[3]")
    names = {alias: name for name in parameters for alias in (name, name.removeprefix("transformer."), _short(name))}
    names["lm_head.weight"] = "transformer.wte.weight"  # tied
    asked = match[1]
    if asked not in names:
        close = difflib.get_close_matches(asked, names, 1)
        hint = f"did you mean {_short(close[0])}?" if close else f"there are {', '.join(map(_short, parameters))}"
        raise UsageError(f"param: the model has no parameter {asked[:60]}; {hint}")
    parameter = parameters[names[asked]]
    index = tuple(int(digits) for digits in match[2].split(","))
    if len(index) != parameter.ndim:
        raise UsageError(f"param: {asked} has the shape {parameter.shape}: {param} has not as many indices")
    for i, n in zip(index, parameter.shape, strict=True):
        if not 0 <= i < n:
            raise UsageError(f"param: {param}: {i} is not in 0 .. {n - 1}; {asked} has the shape {parameter.shape}")
    return names[asked], parameter, index


def source_of(function):
    """(text, file, number of its first line) of a function of npgpt; file: from the folder in which npgpt lies."""
    function = inspect.unwrap(function)
    lines, first = inspect.getsourcelines(function)
    file = Path(inspect.getsourcefile(function)).resolve().relative_to(Path(__file__).resolve().parents[2])
    return "".join(lines), file.as_posix(), first


@functools.cache
def made_at(function, name):
    """file:line of the first statement of a function in which a variable `name` stands."""
    text, file, first = source_of(function)
    for statement in ast.parse(text).body[0].body:
        if any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(statement)):
            return f"{file}:{first + statement.lineno - 1}"
    raise LookupError(f"{function.__name__} has no variable {name}")


class Rule(NamedTuple):
    """How an op makes one entry of a parameter's gradient, as a sum over the positions (b, t)."""

    formula: str  # what position (b, t) adds to the entry {0} or {0},{1}
    reference: object  # the function that computes it, under the name with which the formula begins
    factors: object  # (dy, x, *index) -> the two factors of each position's term, (B, T) or numbers

    def made_at(self):
        """file:line of where the reference makes the gradient."""
        return made_at(self.reference, self.formula.partition("[")[0])


def _xhat(x):
    """The normalised x (B, T, C)."""
    one, zero = np.ones(x.shape[-1], x.dtype), np.zeros(x.shape[-1], x.dtype)
    return layernorm_forward_ref(x.reshape(-1, x.shape[-1]), one, zero, EPS)[0].reshape(x.shape)


# (op, the end of the parameter's name) -> Rule; x is the op's input, that of `embedding` the tokens idx (B, T)
RULES = {
    ("embedding", "wte.weight"): Rule(
        "dwte[{0},{1}] += dy[b,t,{1}] if idx[b,t] = {0}", embedding_backward_ref,
        lambda dy, idx, v, i: (dy[..., i], idx == v),
    ),
    ("embedding", "wpe.weight"): Rule(
        "dwpe[{0},{1}] += dy[b,{0},{1}]", embedding_backward_ref,
        lambda dy, idx, t, i: (dy[..., i], np.arange(idx.shape[1]) == t),
    ),
    ("layernorm", "weight"): Rule(
        "dweight[{0}] += dy[b,t,{0}] xhat[b,t,{0}]", layernorm_backward_ref,
        lambda dy, x, i: (dy[..., i], _xhat(x)[..., i]),
    ),
    ("layernorm", "bias"): Rule("dbias[{0}] += dy[b,t,{0}]", layernorm_backward_ref, lambda dy, x, i: (dy[..., i], 1)),
    ("linear", "weight"): Rule(
        "dweight[{0},{1}] += dy[b,t,{0}] x[b,t,{1}]", linear_backward_ref, lambda dy, x, o, i: (dy[..., o], x[..., i])
    ),
    ("linear", "bias"): Rule("dbias[{0}] += dy[b,t,{0}]", linear_backward_ref, lambda dy, x, o: (dy[..., o], 1)),
}  # fmt: skip


class Way(NamedTuple):
    """One use of a parameter, and one way on which dy came there."""

    use: str
    words: str
    formula: str  # where dy was made
    where: str  # file:line of that
    rule: Rule
    dy: np.ndarray  # (B, T, n)
    x: np.ndarray  # (B, T, n), or tokens (B, T)

    def factors(self, index):
        """The two factors (B, T) of what each position adds to the gradient's entry `index`."""
        return tuple(np.broadcast_to(f, self.dy.shape[:2]) for f in self.rule.factors(self.dy, self.x, *index))


def _mlp(module, x):
    """What module(x) computes, but for dropout, op by op."""
    pre = module.c_fc(x)
    act = record("gelu", gelu_ref(pre.data), (pre,), lambda dy: (dy * gelu_slope_ref(pre.data),))
    return module.c_proj(act)


def _sublayers(model):
    """(words, its two modules' names, f) of all that is added to the residual stream, from the first on."""
    for n, block in enumerate(model.transformer.h):
        ln_1, attn, ln_2, mlp = (f"transformer.h.{n}.{part}." for part in ("ln_1", "attn", "ln_2", "mlp"))
        yield f"block {n}'s attention", (ln_1, attn), lambda x, block=block: block.attn(block.ln_1(x))
        yield f"block {n}'s MLP", (ln_2, mlp), lambda x, block=block: _mlp(block.mlp, block.ln_2(x))


def _back(f, x, dy, parameter):
    """f(x) and its backward with dy: (dx, [(op, its dy, its input) for each use of the parameter in f])."""
    x, seen = Tensor(x, requires_grad=True), []

    def made(op, out, parents, backward):
        if any(parent is parameter for parent in parents):
            seen.append((op, out.retain_grad(), parents[0]))

    with watched(made):
        y = f(x)
    y.backward(dy)
    return x.grad, [(op, out.grad, parent.data) for op, out, parent in seen]


def ways(model, idx, targets, name):
    """All uses of a parameter of a GPT in eval mode, and all ways to each of them: a list of Way.

    name: the parameter's full name.  The gradients that the model holds are forgotten.  Raises ValueError for a model
    that is changed, or drops activations.
    """
    other = model.difference()
    if other or (model.training and model.config.dropout):
        raise ValueError(f"a receipt is of a GPT as its config says, in eval mode: {other or 'it is in train mode'}")
    gpt, idx = model.transformer, np.asarray(idx)
    parameter = dict(model.named_parameters())[name]
    found = []

    def add(use, uses, words, formula, where):
        for op, dy, x in uses:
            rule = next(rule for (of, end), rule in RULES.items() if of == op and name.endswith(end))
            found.append(Way(use, words, formula, where, rule, dy, idx if op == "embedding" else x))

    sublayers = list(_sublayers(model))
    with no_grad():
        xs = [embedding(idx, gpt.wte.weight, gpt.wpe.weight).data]  # the residual stream before each sublayer
        for _, _, f in sublayers:
            xs.append(xs[-1] + f(Tensor(xs[-1])).data)

    dx, uses = _back(lambda x: cross_entropy(model.lm_head(gpt.ln_f(x)), targets), xs.pop(), None, parameter)
    if name.startswith("transformer.ln_f."):
        add("ln_f", uses, "from the output layer", "dy = dx of lm_head", made_at(linear_backward_ref, "dx"))
    else:
        where = made_at(cross_entropy_backward_ref, "dlogits")
        add("the output layer (tied)", uses, "from the loss", "dy = dlogits of cross_entropy", where)
    made_here = made_at(layernorm_backward_ref, "dx")
    arrived = [("straight along the residual stream", "dy from dx of ln_f", made_here, dx)]
    for words, modules, f in reversed(sublayers):
        x = xs.pop()
        if name.startswith(modules):
            for *origin, dy in arrived:
                add(_short(name).rpartition(".")[0], _back(f, x, dy, parameter)[1], *origin)
            break  # it is used here only
        dx, _ = _back(f, x, sum(dy for *_, dy in arrived), parameter)
        ln = modules[0].removeprefix("transformer.").rstrip(".")
        arrived.append((f"back through {words}", f"dy from dx of {ln}", made_here, dx))
    if name in ("transformer.wte.weight", "transformer.wpe.weight"):
        for *origin, dy in arrived:
            add(f"the embedding, {_short(name)}", [("embedding", dy, None)], *origin)
    model.zero_grad()
    return found


def gradient(model, idx, targets, parameter):
    """(loss, gradient of it with respect to a parameter), as the engine has them."""
    model.zero_grad()
    _, loss = model(idx, targets)
    loss.backward()
    grad = np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.copy()
    model.zero_grad()
    return loss.item(), grad


def receipt(model, idx, targets, param):
    """The receipt as text.

    model     a GPT of dtype float64 in eval mode; the gradients that it holds are forgotten
    idx       (B, T) tokens, targets (B, T) those that come next
    param     a weight: wte[17,3], h.0.attn.c_attn.weight[7,2], ln_f.bias[0], ...

    Raises UsageError for a weight that is not there.
    """
    name, parameter, index = find(model, param)
    idx = np.asarray(idx)
    loss, grad = gradient(model, idx, targets, parameter)
    grad = float(grad[index])
    entry = f"{_short(name)}[{','.join(map(str, index))}]"
    rows, total, uses = [], 0.0, {}
    for way in ways(model, idx, targets, name):
        uses.setdefault(way.use, []).append(way)
    for use, its_ways in uses.items():
        rule = its_ways[0].rule
        rows.append((f"used in {use}", rule.formula.format(*index), rule.made_at(), None))
        subtotal, before = 0.0, len(rows)
        for way in its_ways:
            dy, x = way.factors(index)
            values = dy * x  # (B, T)
            here = sorted(np.argwhere(values).tolist(), key=lambda place: -abs(values[tuple(place)]))
            if not here:
                continue
            subtotal += float(values.sum())
            rows.append((f"  {way.words}", way.formula, way.where, float(values.sum())))
            shown = len(here) if len(here) == SHOWN + 1 else SHOWN
            for b, t in here[:shown]:
                numbers = f"{dy[b, t]:.4g}" + (f" * {x[b, t]:.4g}" if x.dtype.kind == "f" else "")
                token = f"token {idx[b, t]}" if model.tokenizer is None else repr(model.tokenizer.decode([idx[b, t]]))
                place = f"position {t}, {token}" if len(idx) == 1 else f"sequence {b}, position {t}, {token}"
                rows.append((f"    {place}", numbers, "", float(values[b, t])))
            if here[shown:]:
                rest = float(sum(values[b, t] for b, t in here[shown:]))
                rows.append((f"    the other {len(here) - shown} positions", "", "", rest))
        rows.append(("  subtotal" if len(rows) > before else "  at none of these positions", "", "", subtotal))
        total += subtotal
    view = Tensor(parameter.data[index[:-1]][index[-1] : index[-1] + 1])  # of this one weight
    with no_grad():
        (difference,) = numeric_grad(lambda: model(idx, targets)[1].data, view, 1.0)
    rows += [
        None, ("total", "the sum of the subtotals", "", total), ("the engine's gradient", "loss.backward()", "", grad),
        ("their difference", "rounding", "", total - grad),
        ("by finite differences", "5 points of the loss", "", float(difference)),
    ]  # fmt: skip
    title = f"{entry} = {parameter.data[index]:.6g}{_meaning(model, name, index)}, and the loss is {loss:.6f}"
    return "\n".join([title, *_table(rows, total)])


def _meaning(model, name, index):
    """Words for what a row of c_attn makes, or of which token a row of wte is."""
    if name.endswith("wte.weight") and model.tokenizer is not None and index[0] < model.tokenizer.vocab_size:
        return f" (of {model.tokenizer.decode([index[0]])!r})"
    if ".c_attn." not in name:
        return ""
    hs = model.config.n_embd // model.config.n_head
    whose, i = divmod(index[0], model.config.n_embd)
    return f" (for number {i % hs} of head {i // hs}'s {('queries', 'keys', 'values')[whose]})"


def _table(rows, total):
    """Rows (words, formula, file:line, amount), or None for a rule, as aligned lines with the amounts' shares."""
    rows = [("its gradient, by the ways it came", "formula", "made at", None), None, *rows]
    largest = max(abs(row[3]) for row in rows if row and row[3] is not None)
    has_shares = abs(total) > 1e-9 * largest  # it is not 0 but for rounding
    widths = [max(len(row[i]) for row in rows if row) for i in range(3)]
    for row in rows:
        if row is None:
            yield "-" * (sum(widths) + 4 + 28)
            continue
        line = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=False))
        if row[3] is not None:
            share = f"{round(row[3] / total, 3) + 0.0:>9.1%}" if has_shares else f"{'-':>9}"
            line += f"{row[3]:>16.6e}  {share}"
        yield line.rstrip()
