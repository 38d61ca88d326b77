"""Gradients against finite differences: the proof that a backward is right.

The derivative of a function g in the direction of one entry x_i is measured with five points (the central one drops
out), whose error falls with the fourth power of the step h:

    g'(x_i) = (8 (g(x_i + h) - g(x_i - h)) - (g(x_i + 2h) - g(x_i - 2h))) / 12h + O(h^4)

A tensor-valued f is turned into a number by g = sum(dy * f) with a random dy.  A plain sum would not do: softmax, for
one, has a gradient of 0 with respect to its sum, whatever its backward says.

    python -m npgpt.gradcheck        every op, and every parameter of a two-layer GPT; exit code 1 if one is wrong
"""

import contextlib
import dataclasses
import sys

import numpy as np

from npgpt.command import Parser, say_if_elsewhere, showing_all
from npgpt.engine import no_grad, topological_order
from npgpt.errors import NpgptError, UsageError, run_command
from npgpt.kernels import buffers
from npgpt.tensor import Tensor

PROG = "python -m npgpt.gradcheck"
BOUND = 1e-6  # worst relative error that passes
STEP = 5e-4  # h, for entries of size 1
NEAR = 1e-9  # the size below which a step that goes with an entry's size gets no smaller
POINTS = 1, -1, 2, -2  # where a function is measured, in steps
MOST_SHOWN = 8  # ops of which a check that failed shows a wrong input
FLOOR = 1e-3  # entries below this share of the tensor's largest gradient are compared with that instead of themselves


class GradcheckError(NpgptError, AssertionError):
    """A gradient that differs from finite differences."""


@contextlib.contextmanager
def replaced(owner, name, value):
    """Within this context an attribute of an object or a module has another value: to see what comes of it."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def slope(values, h):
    """The derivative at 0 of a function whose value at k h is values[k], for k in POINTS."""
    return (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * h)


def numeric_grad(f, x, dy, least=1.0):
    """Gradient of sum(dy * f()) with respect to the Tensor x, by finite differences: float64 array of x's shape.

    The step goes with an entry's size, but not below `least`.
    """
    grad, at_x = np.zeros(x.shape), np.array(f())  # a copy: it may be a view of x
    for i in np.ndindex(*x.shape):
        value = x.data[i]
        h = STEP * max(least, abs(value))
        sums = {}
        try:
            for k in POINTS:
                x.data[i] = value + k * h
                sums[k] = float((dy * (f() - at_x)).sum())  # of large numbers little would be left
        finally:
            x.data[i] = value
        grad[i] = slope(sums, h)
    return grad


def relative_error(analytic, numeric):
    """|a - n| / max(|a|, |n|) of each entry; tiny entries, drowned in rounding, are measured by the largest one."""
    largest = np.abs(numeric).max(initial=0.0)
    scale = np.maximum(np.maximum(np.abs(analytic), np.abs(numeric)), FLOOR * largest)
    with np.errstate(invalid="ignore"):
        errors = np.abs(analytic - numeric) / np.where(scale == 0, 1.0, scale)
    return np.where(np.isnan(errors), np.inf, errors)  # what is not finite is wrong


def gradcheck(f, inputs, names=None, bound=BOUND, seed=0):
    """Check the gradient of f at the given inputs, entry by entry; right for entries from 1e-6 to 1e6 in size.

    No gradient that was there before is changed.

    f       takes the inputs and returns a Tensor; random masks in it are the same at every call
    inputs  Tensors of dtype float64; all with requires_grad=True are checked
    names   what to call them in the report; by default input 0, input 1, ...
    bound   the worst relative error that passes

    Returns [(name, worst relative error)].  Raises GradcheckError with the worst entry, its analytic and its numeric
    value; TypeError for inputs that are not float64, in which differences would drown, and for an f that returns no
    Tensor; ValueError for what is empty, an input that is no leaf, and an f with other values at a second call.
    """
    results = []
    for name, error, index, analytic, numeric in _compare(f, inputs, names, seed):
        if not error <= bound:  # a NaN fails as well
            raise GradcheckError(
                f"gradcheck: {name}{list(index)}: backward gives {analytic:.10g}, finite differences {numeric:.10g} "
                f"(relative error {error:.2g}, bound {bound:.0e})"
            )
        results.append((name, error))
    return results


def _compare(f, inputs, names, seed):
    """(name, worst relative error, its index, analytic, numeric) for each input that requires a gradient."""
    from npgpt.kernels.masks import random_stream  # it may refuse what NPGPT_KERNELS says: in one line, by the command

    names = names or [f"input {i}" for i in range(len(inputs))]
    for name, x in zip(names, inputs, strict=True):
        if x.dtype != np.float64:
            raise TypeError(f"gradcheck: {name} is {x.dtype}; finite differences need float64")
        if x.data.size == 0:
            raise ValueError(f"gradcheck: {name} is empty, of shape {x.shape}")
        if x._backward is not None:
            raise ValueError(f"gradcheck: {name} is no leaf: it was computed from others; let f compute it from them")

    def forward():
        # new memory often happens to be 0, as sums must begin with; NaN shows what is read and was never written
        with random_stream(seed), replaced(buffers, "NAN_FILL", True):
            return f(*inputs)

    y = forward()
    if not isinstance(y, Tensor):
        raise TypeError(f"gradcheck: f must return a Tensor, got {type(y).__name__}")
    if y.size == 0:
        raise ValueError(f"gradcheck: f returns an empty Tensor, of shape {y.shape}: there is nothing to check")
    if not np.array_equal(y.data, forward().data, equal_nan=True):
        raise ValueError("gradcheck: f gives other values at a second call; what is random in it must repeat itself")
    dy = np.random.default_rng([seed, 1]).normal(size=y.shape)  # not what default_rng(seed) made the inputs from
    given, before = dy.copy(), [x.data.copy() for x in inputs]
    leaves = [tensor for tensor in topological_order(y) if tensor._backward is None]
    kept = [(leaf, leaf.grad, None if leaf.grad is None else leaf.grad.copy()) for leaf in [*leaves, *inputs]]
    for leaf, _, _ in kept:
        leaf.grad = None
    try:
        with replaced(buffers, "NAN_FILL", True):
            y.backward(given)
        gradients = [None if x.grad is None else x.grad.copy() for x in inputs]
    finally:
        for leaf, grad, content in kept:
            leaf.grad = grad
            if grad is not None:
                grad[...] = content
    for name, now, then in zip(["dy", *names], [given, *(x.data for x in inputs)], [dy, *before], strict=True):
        if not np.array_equal(now, then, equal_nan=True):
            raise GradcheckError(f"gradcheck: the backward changes {name} in place, which others still need")

    def value():
        with no_grad(), np.errstate(invalid="ignore", divide="ignore"):
            return forward().data

    for name, x, analytic in zip(names, inputs, gradients, strict=True):
        if not x.requires_grad:
            continue
        analytic = np.zeros(x.shape) if analytic is None else analytic
        numeric = numeric_grad(value, x, dy)
        errors = relative_error(analytic, numeric)
        if not (errors <= BOUND).all():
            # a step that suits entries around 1 is too long for small ones where f bends sharply, as log does; of two
            # measurements the closer one counts, as a wrong gradient fits neither
            near = numeric_grad(value, x, dy, NEAR)
            fits = abs(numeric - analytic) <= abs(near - analytic)  # not where the long step has left f's domain: NaN
            numeric = np.where(fits, numeric, near)
            errors = relative_error(analytic, numeric)
        index = np.unravel_index(errors.argmax(), errors.shape)
        yield name, float(errors[index]), tuple(map(int, index)), float(analytic[index]), float(numeric[index])


# --------------------------------------------------------------------------------------------------------------------
# What the command checks.  Weights are of size 1, all axes of different length, no width a multiple of 8.


def cases(seed=0):
    """(title, f, inputs, names) for every op and for a whole GPT."""
    from npgpt.kernels.masks import random_stream
    from npgpt.ops.attention import causal_attention
    from npgpt.ops.cross_entropy import cross_entropy
    from npgpt.ops.dropout import dropout
    from npgpt.ops.embedding import embedding
    from npgpt.ops.layernorm import layernorm
    from npgpt.ops.linear import linear
    from npgpt.ops.mlp import mlp
    from npgpt.ops.primitives import concatenate, stack, where

    rng = np.random.default_rng(seed)
    later_rows = random_stream(1, batch_offset=5)  # as for a worker whose sequences come after five others of the batch

    def new(*shape):
        return Tensor(rng.normal(size=shape), requires_grad=True)

    def positive(*shape):
        return Tensor(rng.uniform(0.5, 2.0, size=shape), requires_grad=True)

    def apart(*shape):  # all entries at least 0.1 apart from each other and from 0, where relu and max have kinks
        n = int(np.prod(shape))
        return Tensor(rng.permutation(np.arange(n) - n / 2 + 0.5).reshape(shape) * 0.1, requires_grad=True)

    yield "add", lambda a, b: a + b, [new(3, 1, 4), new(2, 1)], ["a", "b"]
    yield "sub", lambda a, b: a - b, [new(4), new(3, 4)], ["a", "b"]
    yield "mul", lambda a, b: a * b, [new(3, 1), new(3, 4)], ["a", "b"]
    yield "mul, a with itself", lambda a: a * a, [new(3, 4)], ["a"]
    yield "div", lambda a, b: a / b, [new(3, 4), positive(4)], ["a", "b"]
    yield "neg", lambda a: -a, [new(3)], ["a"]
    yield "pow", lambda a: a**2.5, [positive(3, 4)], ["a"]
    yield "pow, 2 ** a", lambda a: 2**a, [new(3, 4)], ["a"]
    yield "matmul", lambda a, b: a @ b, [new(2, 3, 4), new(4, 5)], ["a", "b"]
    yield "matmul, a row", lambda a, b: a @ b, [new(4), new(2, 4, 5)], ["a", "b"]
    yield "matmul, a column", lambda a, b: a @ b, [new(2, 3, 4), new(4)], ["a", "b"]
    yield "matmul, two vectors", lambda a, b: a @ b, [new(4), new(4)], ["a", "b"]
    for name, numbers in {"exp": new, "log": positive, "sqrt": positive, "tanh": new, "relu": apart}.items():
        yield name, getattr(Tensor, name), [numbers(3, 4)], ["a"]
    yield "sum", lambda a: a.sum(axis=(0, 2)), [new(2, 3, 4)], ["a"]
    yield "mean", lambda a: a.mean(axis=-1, keepdims=True), [new(3, 4)], ["a"]
    yield "max", lambda a: a.max(axis=1), [apart(3, 4)], ["a"]
    yield "reshape", lambda a: a.reshape(4, 3) @ np.ones((3, 2)), [new(2, 6)], ["a"]
    yield "transpose", lambda a: a.transpose(2, 0, 1), [new(2, 3, 4)], ["a"]
    yield "getitem", lambda a: a[[2, 0, 2], 1:], [new(3, 4)], ["a"]
    yield "concatenate", lambda a, b: concatenate([a, b, a], axis=1), [new(3, 2, 4), new(3, 1, 4)], ["a", "b"]
    yield "stack", lambda a, b: stack([a, b, a], axis=-2), [new(3, 4), new(3, 4)], ["a", "b"]
    yield "where", lambda a, b: where(np.arange(4) % 2 == 0, a, b), [new(3, 4), new(4)], ["a", "b"]

    idx = np.array([[1, 0, 1], [3, 1, 4]])  # 1 occurs three times, 2 never
    yield "embedding", lambda wte, wpe: embedding(idx, wte, wpe), [new(5, 7), new(4, 7)], ["wte", "wpe"]
    yield "layernorm", layernorm, [new(2, 3, 7), new(7), new(7)], ["x", "weight", "bias"]
    yield "layernorm, no bias", layernorm, [new(1, 5), new(5)], ["x", "weight"]
    yield "linear", linear, [new(2, 3, 5), new(7, 5), new(7)], ["x", "weight", "bias"]
    yield "linear, no bias", linear, [new(1, 5), new(7, 5)], ["x", "weight"]
    yield "causal attention", lambda qkv: causal_attention(qkv, 2), [new(2, 5, 18)], ["qkv"]
    yield "causal attention, T = 1", lambda qkv: causal_attention(qkv, 3), [new(2, 1, 9)], ["qkv"]
    yield "causal attention, dropout", lambda qkv: causal_attention(qkv, 3, 0.3), [new(2, 5, 9)], ["qkv"]
    yield "causal attention, scale", lambda qkv: causal_attention(qkv, 3, scale=0.7), [new(2, 5, 9)], ["qkv"]
    yield "causal attention, later rows", later_rows(lambda qkv: causal_attention(qkv, 3, 0.3)), [new(2, 5, 9)], ["qkv"]
    yield "causal attention, 2 blocks", lambda qkv: causal_attention(qkv, 1), [new(1, 130, 3)], ["qkv"]
    names = ["x", "c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias"]
    yield "mlp", mlp, [new(2, 3, 5), new(11, 5), new(11), new(5, 11), new(5)], names
    inputs, names = [new(1, 5), new(6, 5), new(5, 6)], ["x", "c_fc.weight", "c_proj.weight"]
    yield "mlp, no bias", lambda x, w_fc, w_proj: mlp(x, w_fc, None, w_proj, None), inputs, names
    targets = np.array([[1, 0, -1], [3, -1, 4]])
    yield "cross-entropy", lambda logits: cross_entropy(logits, targets), [new(2, 3, 5)], ["logits"]
    others = np.array([[1, 0, -3], [3, -3, 4]])
    yield "cross-entropy, ignoring -3", lambda logits: cross_entropy(logits, others, -3), [new(2, 3, 5)], ["logits"]
    yield "dropout", lambda x: dropout(x, 0.4), [new(2, 3, 7)], ["x"]
    yield "dropout, later rows", later_rows(lambda x: dropout(x, 0.4)), [new(2, 3, 7)], ["x"]
    yield "GPT, biases", *gpt_case(rng, bias=True)
    yield "GPT, no bias, dropout", *gpt_case(rng, bias=False, dropout=0.2)


def gpt_case(rng, **options):
    """(f, inputs, names): the loss of a two-layer GPT, and all of its parameters, at random values of size 1."""
    from npgpt.config import GPTConfig
    from npgpt.model import GPT

    config = GPTConfig(vocab_size=7, block_size=6, n_layer=2, n_head=2, n_embd=6, **options)
    model = GPT(config, dtype=np.float64)
    for _, parameter in model.named_parameters():
        parameter.data[...] = rng.normal(size=parameter.shape) * (0.7 if parameter.ndim == 2 else 1.0)
    idx, targets = rng.integers(0, 7, (2, 3, 5))
    targets[0, 1] = -1
    names, parameters = zip(*model.named_parameters(), strict=True)
    return (lambda *_: model(idx, targets)[1]), list(parameters), list(names)


@showing_all()
def main(argv=None):
    words = "Check every op, and every parameter of a two-layer GPT, against finite differences in float64."
    parser = Parser(prog=PROG, description=words)
    parser.add_argument("only", nargs="*", help="check only titles that contain one of these words")
    only = parser.parse_args(argv).only
    from npgpt.kernels.jit import KERNELS

    chosen = [case for case in cases() if not only or any(word.lower() in case[0].lower() for word in only)]
    if not chosen:
        titles = ", ".join(dict.fromkeys(case[0] for case in cases()))
        raise UsageError(f"nothing matches {' '.join(only)!r}; there are: {titles}")
    what = "Numba kernels" if KERNELS == "numba" else "NumPy references (NPGPT_KERNELS=numpy)"
    print(f"The gradients of the {what} against finite differences:", flush=True)
    rows = []
    for title, *case in chosen:
        if sys.stdout.isatty():
            print(f"\r{title:<40}", end="\r", flush=True)
        rows += _rows(title, *case)
    wrong, worst = [row for row in rows if not row.ok], max(row.error for row in rows)
    print(*(_condensed(rows, wrong) if wrong else _table(rows)), sep="\n")
    if wrong:
        print(f"FAILED: {where_to_look(rows)}; worst relative error {worst:.1e}, bound {BOUND:.0e}")
        return 1
    print(f"passed: worst relative error {worst:.1e}, bound {BOUND:.0e}")
    say_if_elsewhere(KERNELS)
    return 0


@dataclasses.dataclass
class Row:
    """What came of an input of a case."""

    title: str  # of the case
    name: str  # of the input
    error: float  # the worst relative one
    words: str  # its entry, and both gradients there

    @property
    def ok(self):
        return self.error <= BOUND  # a NaN is not


def _rows(title, f, inputs, names):
    try:
        for name, error, index, analytic, numeric in _compare(f, inputs, names, seed=0):
            words = f"{name}{list(index)}: backward gives {analytic:.6g}, differences {numeric:.6g}"
            yield Row(title, name, error, words)
    except GradcheckError as error:  # it changes what others need
        yield Row(title, "", np.inf, str(error))
    except Exception:
        print(f"{title}: its check does not come to an end")
        raise


def _table(rows):
    yield f"{'op':<28} {'input':<42} {'worst relative error':>20}  verdict"
    for row in rows:
        yield f"{row.title:<28} {row.name:<42} {row.error:>20.1e}  {'ok' if row.ok else 'WRONG'}"


def _condensed(rows, wrong):
    """Lines, fewer than 20, that show one wrong input for each op that has one."""
    shown = list({row.title: row for row in reversed(wrong)}.values())[::-1][:MOST_SHOWN]
    yield from _table(shown)
    for row in shown:
        yield f"{row.title}: {row.words}"
    yield f"(and {len(wrong) - len(shown)} more are WRONG; {len(rows) - len(wrong)} of {len(rows)} are ok)"


def where_to_look(rows):
    """Words for the reader of a check that failed: which op is wrong, or where in the GPT gradients begin to be."""
    gpts = {row.title for row in rows if row.title.startswith("GPT")}
    wrong = [row for row in rows if not row.ok]
    if wrong[0].title not in gpts:
        return f"first wrong: {wrong[0].title}"
    whole = [row for row in rows if row.title == wrong[0].title]  # in the order of the forward
    last = max(n for n, row in enumerate(whole) if not row.ok)
    if last == 0:
        where = f"in {whole[0].name} alone"
    else:
        where = f"below {_place(whole[last].name, whole[last + 1].name)}" if last + 1 < len(whole) else "everywhere"
    ops = "ops right, " if len(gpts) < len({row.title for row in rows}) else ""
    if gpts - {row.title for row in wrong} and "dropout" in wrong[0].title:
        return f"{ops}GPT wrong with dropout only, {where}: see its mask, there and back (npgpt/ops/dropout.py)"
    return f"{ops}GPT wrong {where}: see where gradients meet (npgpt/engine.py)"


def _place(last, above):
    """The end of the GPT's right part, whose first parameter is `above` and not `last`: block 1, or block 1's ln_2."""
    last, above = (name.removeprefix("transformer.").split(".") for name in (last, above))
    if above[0] != "h":
        return above[0]
    return f"block {above[1]}" + (f"'s {'.'.join(above[2:-1])}" if last[:2] == above[:2] else "")


if __name__ == "__main__":
    run_command(PROG, main)
