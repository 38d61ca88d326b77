"""What kind of mistake is it?  A wrong gradient is compared with what the usual mistakes would have made of it.

`Case` holds numbers for an op: what its backward is given, and by finite differences of its forward what it must
return.  `check` compares, and finds for what is wrong

- the kinds of mistakes that can be seen in any array: a shape that is transposed or not summed, a constant factor (and
  which length it is), a sign, right numbers at wrong places, entries that should be 0;
- those of MISTAKES, which know the op: a term that is missing, a value that was taken for another.  Each is the wrong
  result itself, computed; who has the same figures has made that mistake.

A hint leads to the line of the forward that was undone wrongly; what to write is left to the reader.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from npgpt.gradcheck import BOUND, numeric_grad, relative_error
from npgpt.kernels.masks import dropout_mask_ref
from npgpt.ops.attention import _dropout_scale_ref, _scores_ref, merged_heads, split_heads
from npgpt.ops.dropout import dropout_ref
from npgpt.ops.mlp import A, K, gelu_ref, gelu_slope_ref
from npgpt.tensor import Tensor

CLOSE = 1e-6  # two arrays are the same if they differ by less than this share of the larger one's largest entry

# --------------------------------------------------------------------------------------------------------------------
# Numbers to try a backward on: entries of size 1, all axes of different length


# op -> the forward's arguments
INPUTS = {
    "embedding": lambda new: {
        "idx": np.array([[1, 0, 1, 6], [3, 1, 4, 4], [6, 3, 1, 0]]),  # some tokens often, 2, 5 and 7 never
        "wte": new(8, 5),
        "wpe": new(6, 5),
    },
    "layernorm": lambda new: {"x": new(4, 7), "weight": new(7), "bias": new(7), "eps": 1e-5},
    "linear": lambda new: {"x": new(4, 5), "weight": new(7, 5), "bias": new(7)},
    "attention": lambda new: {
        "qkv": new(2, 4, 3 * 3 * 5), "n_head": 3, "p_drop": 0.3, "key": np.uint32(9), "batch_offset": 1,
    },
    "mlp": lambda new: {
        "x": new(4, 5), "w_fc": new(11, 5), "b_fc": new(11), "w_proj": new(7, 11), "b_proj": new(7),
    },
    "cross-entropy": lambda new: {
        "logits": new(7, 6), "targets": np.array([1, 0, -3, 3, -3, 4, 3]), "ignore_index": -3, "count": 5,
    },
    "dropout": lambda new: {"x": new(4, 7), "key": np.uint32(9), "first_row": 3, "p": 0.4},
}  # fmt: skip

# lines of forwards that are undone in several places
SCORES_LINE = "s = q @ k.swapaxes(-1, -2) / math.sqrt(hs)"
SOFTMAX_LINE = "p = e / total"
DROP_LINE = "a = p * _dropout_scale(p, p_drop, key, batch_offset)"
GELU_LINE = "return 0.5 * z * (1 + np.tanh(K * (z + A * z**3)))"

# op -> numbers that are easily forgotten as a factor, or taken for one: lengths of axes over which the op sums, and
# others, with the line of the forward that has them if it is another than the one that LINES has for the result
LENGTHS = {
    "embedding": lambda idx, wte, **_: dict(zip("BTVC", (*idx.shape, *wte.shape), strict=True)),
    "layernorm": lambda x, **_: dict(zip("NC", x.shape, strict=True)),
    "linear": lambda x, weight, **_: dict(zip("NIO", (*x.shape, len(weight)), strict=True)),
    "attention": lambda **_: {},
    "mlp": lambda x, w_fc, **_: dict(zip("NCF", (*x.shape, len(w_fc)), strict=True)),
    "cross-entropy": lambda logits, **_: dict(zip("NV", logits.shape, strict=True)),
    "dropout": lambda x, **_: dict(zip("NC", x.shape, strict=True)),
}
FACTORS = {
    "attention": lambda qkv, n_head, p_drop, **_: {
        "sqrt(hs)": (math.sqrt(qkv.shape[2] // 3 // n_head), SCORES_LINE),
        "hs": (qkv.shape[2] // 3 // n_head, SCORES_LINE),
        "1 - p_drop": (1 - p_drop, DROP_LINE),
    },
    "cross-entropy": lambda logits, count, dloss, **_: {
        "count": (count, None),
        "dloss": (dloss, None),
        "count / dloss": (count / dloss, None),
        "count / N": (count / len(logits), None),
    },
    "dropout": lambda p, **_: {
        "1 - p": (1 - p, None), "(1 - p)^2": ((1 - p) ** 2, None), "(1 - p) / p": ((1 - p) / p, None),
    },
}  # fmt: skip

# op -> result -> the line of the forward that is undone there
LINES = {
    "embedding": {"dwte": "return wte[idx] + wpe[:T]", "dwpe": "return wte[idx] + wpe[:T]"},
    "layernorm": {
        "dx": "xhat = (x - mean[:, None]) * rstd[:, None]",
        "dweight": "y = xhat * weight + bias",
        "dbias": "y = xhat * weight + bias",
    },
    "linear": {
        "dx": "y = x @ weight.T",
        "dweight": "y = x @ weight.T",
        "dbias": "return y if bias is None else y + bias",
    },
    "attention": {
        "dqkv": "return y.transpose(0, 2, 1, 3).reshape(B, T, H * hs), lse",
        "dq": SCORES_LINE,
        "dk": SCORES_LINE,
        "dv": "y = a @ v",
    },
    "mlp": {
        "dx": "pre = linear_forward_ref(x, w_fc, b_fc)",
        "dw_fc": "pre = linear_forward_ref(x, w_fc, b_fc)",
        "db_fc": "pre = linear_forward_ref(x, w_fc, b_fc)",
        "dw_proj": "y = linear_forward_ref(act, w_proj, b_proj)",
        "db_proj": "y = linear_forward_ref(act, w_proj, b_proj)",
    },
    "cross-entropy": {"dlogits": "return losses.sum() / count, lse"},
    "dropout": {"dx": "return np.where(mask, x * x.dtype.type(1 / (1 - p)), x.dtype.type(0))"},
}

# op -> (results that come through one and the same intermediate gradient, the line of the forward that it undoes)
SHARED = {
    "attention": (("dq", "dk"), SOFTMAX_LINE),
    "mlp": (("dx", "dw_fc", "db_fc"), GELU_LINE),
}

# op -> where a gradient must be 0
ZEROS = {
    "embedding": "in the rows of what does not occur in the batch",
    "cross-entropy": "in the rows whose target is ignored: the loss does not depend on them",
    "dropout": "where the mask dropped x: y does not depend on it",
}


class Case:
    """Numbers for an op.

    values   what the backward is given, by name
    so_far   result -> what stood in it before, for a backward that adds in place
    right    result -> what it must be; attention's dqkv is taken apart into dq, dk and dv
    """

    def __init__(self, op, forward, parameters, results):
        """forward: the op's; parameters and results: the names of the backward's."""
        rng = np.random.default_rng(3)
        self.op, self.parameters, self.results = op, parameters, results
        inputs = INPUTS[op](lambda *shape: rng.normal(size=shape))

        def outputs():
            made = forward(*inputs.values())
            return made if isinstance(made, tuple) else (made,)

        y, *kept = outputs()
        upstream = "dloss" if "dloss" in parameters else "dy"
        dy = np.asarray(rng.normal(size=y.shape))
        self.so_far = {name: rng.normal(size=inputs[name[1:]].shape) for name in results if name in parameters}
        self.values = {**inputs, **self.so_far, upstream: dy if dy.ndim else float(dy)}
        self.values.update(zip([name for name in parameters if name not in self.values], kept, strict=True))
        self.many = dy.shape[:-1]  # the axes along which a bias, say, is used many times
        self.right = {}
        for name in results:
            inputs[name[1:]] = (x := Tensor(inputs[name[1:]])).data
            self.right[name] = numeric_grad(lambda: outputs()[0], x, dy) + self.so_far.get(name, 0)
        self.parts = {part: array for name in results for part, array in self._parts(name, self.right[name])}
        self.lengths = LENGTHS[op](**self.values)
        self.factors = FACTORS[op](**self.values) if op in FACTORS else {}

    def arguments(self):
        """Arguments for the backward, copies that it may keep."""
        values = (self.values[name] for name in self.parameters)
        return [value.copy() if isinstance(value, np.ndarray) else value for value in values]

    def changed(self, arguments):
        """Names of the arguments that a backward changed, and must not have."""
        pairs = zip(self.parameters, arguments, strict=True)
        return [name for name, value in pairs if name not in self.so_far and not _same(value, self.values[name])]

    def _parts(self, name, array):
        if self.op != "attention" or array.shape != self.right[name].shape:
            return [(name, array)]
        return list(zip(("dq", "dk", "dv"), split_heads(array, self.values["n_head"]), strict=True))

    def compare(self, results):
        """{name: a Verdict for each part of the result} of what a backward returns, {name: array}."""
        verdicts = {name: [] for name in results}
        self.got = {}
        for name, array in results.items():
            if np.iscomplexobj(array):
                verdicts[name].append(Verdict(name, math.inf, "it is complex, and a gradient is real"))
                continue
            parts = dict(self._parts(name, array))
            self.got.update(parts)
            verdicts[name] += [Verdict(part, *self._fault(part, name, got)) for part, got in parts.items()]
        by_part = {verdict.name: verdict for verdicts_of in verdicts.values() for verdict in verdicts_of}
        for part in self.got:
            verdict, right = by_part[part], self.parts.get(part, self.right.get(part))
            if verdict.wrong:
                verdict.kind, verdict.line = _mistake(self, part, self.got[part], right)
        names, line = SHARED.get(self.op, ((), None))
        through = [by_part.get(part) for part in names]
        if all(through) and len({(verdict.kind, verdict.line) for verdict in through}) == 1 and not through[0].line:
            for verdict in through:
                verdict.line = line
        for verdict in by_part.values():
            if verdict.kind and not verdict.line:
                verdict.line = LINES[self.op][verdict.name]
        return verdicts

    def _fault(self, part, name, got):
        """(the worst relative error, what is wrong if something is) of a part of the result `name`."""
        right = self.parts.get(part, self.right[name])
        if got.shape != right.shape:
            return math.inf, f"its shape is {got.shape}, it must be {right.shape}"
        errors = relative_error(got, right)
        errors = np.where(np.isnan(errors), np.inf, errors)
        worst = np.unravel_index(errors.argmax(), errors.shape)
        error, index = float(errors[worst]), list(map(int, worst))
        if error <= BOUND:
            return error, ""
        where = f"worst at {index}: yours {got[worst]:.6g}, finite differences {right[worst]:.6g}"
        return error, f"{where}; {(errors > BOUND).sum()} of {right.size} entries are wrong"


@dataclass
class Verdict:
    name: str  # of a result, or of a part of it
    error: float  # the worst relative one
    wrong: str = ""  # what is wrong, if something is
    kind: str = ""  # what kind of mistake that is
    line: str | None = None  # the line of the forward that it has to do with

    @property
    def hint(self):
        if not self.kind:
            return ""
        return f"{self.kind}{'' if self.kind.endswith('?') else '.'} Look at the forward's line:  {self.line}"


def _same(a, b):
    return np.array_equal(a, b) if isinstance(b, np.ndarray) else a == b


# --------------------------------------------------------------------------------------------------------------------
# Kinds of mistakes that show in any array


def ratio(got, wrong):
    """c with got = c * wrong, or None."""
    if got.shape != wrong.shape or not np.isfinite(got).all() or not wrong.any():
        return None
    c = float((got * wrong).sum() / (wrong * wrong).sum())
    close = np.abs(got - c * wrong).max() <= CLOSE * abs(c) * np.abs(wrong).max()
    return c if c and close else None


def _mistake(case, name, got, right):
    """(what kind of mistake it is, the line of the forward that has to do with it, or None)."""
    if got.shape != right.shape:
        return _shape_mistake(case, name, got, right)
    if not np.isfinite(got).all():
        return "not finite: a division by 0, or a logarithm or exponential out of bounds", None
    so_far = case.so_far.get(name)
    if so_far is not None:
        if _near(got, so_far):
            return "nothing was added: the gradient is what it was before", None
        if ratio(got, right - so_far) is not None:
            return "overwritten: add to the gradient so far; another op, as the tied output layer, left its share", None
        got, right = got - so_far, right - so_far
    if not got.any():
        return "all zeros: nothing has been written into it", None
    c = ratio(got, right)
    if c is not None:
        return _factor(case, c)
    for other, array in case.parts.items():
        mine = case.parts.get(name, right)
        if other != name and _near(case.got[name], array) and other in case.got and _near(case.got[other], mine):
            return f"wrong place: this is {other}, and what stands there is {name}", None
    wrong, zero = _wrong_and_zero(got, right)
    if not (wrong & ~zero).any():
        return f"wrong mask: it must be 0 {ZEROS.get(case.op, 'there')}", None
    for result, words, wrong, line in MISTAKES[case.op](*(case.values[name] for name in case.parameters)):
        c = ratio(got, wrong) if result == name else None
        if c is not None:
            return words + ("" if _is(c, 1) else f"; besides, a {_factor(case, c)[0]}"), line
    for other, array in case.parts.items():
        if other != name and ratio(got, array - case.so_far.get(other, 0)) is not None:
            return f"wrong place: this is {other}", None
    if right.ndim > 1 and ratio(got.reshape(right.shape[::-1]).T, right) is not None:
        return "transposed, then reshaped: reshape makes the shape right but does not exchange axes", None
    if _near(np.sort(got, axis=None), np.sort(right, axis=None)):
        return "right numbers at wrong places: reshape keeps the order in memory, transpose exchanges axes", None
    return _where(got, right)


def _shape_mistake(case, name, got, right):
    for other, array in case.parts.items():
        if other != name and _near(got, array):
            return f"wrong place: this is {other}; mind the order of the results", None
    if got.size == right.size and ratio(got.reshape(right.shape), right) is not None:
        return "right numbers with another shape: an axis of length 1 too many or too few (keepdims?)", None
    if got.shape == right.shape[::-1]:
        sure = "it is what is wanted, transposed" if ratio(got.T, right) is not None else "the shape is the transpose's"
        return f"transposed: {sure}. Write the product down with indices: which index comes first?", None
    if got.ndim > right.ndim:
        for axes in _axes_left_over(got.shape, right.shape):
            total = got.sum(axis=axes)
            many = right.ndim == 1 and all(got.shape[axis] in case.many for axis in axes)
            if ratio(total, right) is not None or many:
                names = " and ".join(f"{axis} (length {got.shape[axis]})" for axis in axes)
                words = f"missing sum over the broadcast axis {names}: the forward used one number many times"
                if not _near(total, right):
                    words += f"; and summed, it is still wrong: {_mistake(case, name, total, right)[0]}"
                return words, None
    if got.ndim < right.ndim:
        return "a sum too many: fewer axes than what it is the gradient of", None
    names = [n for n, length in case.lengths.items() if got.shape == (length,)]
    if names and right.ndim == 1:
        return f"summed over the wrong axis: what is left is the axis {names[0]}", None
    return "a gradient has the shape of what it is the gradient of", None


def _axes_left_over(shape, wanted):
    """Which axes of `shape` to sum over for the shape `wanted`."""
    for axes in itertools.combinations(range(len(shape)), len(shape) - len(wanted)):
        if tuple(n for axis, n in enumerate(shape) if axis not in axes) == wanted:
            yield axes


def _factor(case, c):
    """(words for a result that is c times what it must be, line)."""
    if _is(c, 1):
        return "rounding: it is nearly right; is something float32 on the way?", None
    if _is(c, -1):
        return "sign: every entry has the wrong one", None

    def times(sign, factor):
        return f"{sign}constant factor: every entry is {_digits(factor)} times what it must be"

    ways = ("", c), ("sign, and ", -c)
    for sign, factor in ways:
        for name, n in case.lengths.items():
            if _is(factor, 1 / n):
                return f"{sign}mean instead of sum: every entry is 1/{n} of what is right, and {name} = {n}", None
            if _is(factor, n):
                return f"{sign}sum instead of mean: every entry is {n} times too large, and {name} = {n}", None
        for name, (value, line) in case.factors.items():
            for power, called in ((value, name), (1 / value, f"1 / ({name})" if " " in name else f"1 / {name}")):
                if _is(factor, power):
                    return f"{times(sign, factor)}, which is {called}", line
    return times(*ways[c < 0]), None  # the one whose factor is positive


def _digits(c):
    """A number in as few digits as tell it from 1."""
    return next(text for digits in (4, 6, 8, 10) if (text := f"{c:.{digits}g}").strip("-") != "1" or digits == 10)


def _is(c, value):
    return math.isclose(c, value, rel_tol=CLOSE)


def _near(a, b):
    return a.shape == b.shape and np.abs(a - b).max(initial=0) <= CLOSE * np.abs(b).max(initial=0)


def _wrong_and_zero(got, right):
    """Where got is wrong, by the rule of gradcheck, and where it should be 0."""
    return relative_error(got, right) > BOUND, np.abs(right) <= CLOSE * CLOSE * np.abs(right).max()


def _where(got, right):
    """Words that tell no more than where the wrong entries are."""
    wrong, zero = _wrong_and_zero(got, right)
    if not got[wrong].any() or not got[~zero].any():
        return "wrong mask: it is 0 where it must not be", None
    if right.ndim == 2:
        if not zero.any():
            quotients = got / right
            for axis, per in ((1, "row"), (0, "column")):
                if (np.ptp(quotients, axis=axis) <= CLOSE * np.abs(quotients).max(axis=axis)).all():
                    return f"missing factor: it is the same in a whole {per}, and differs from {per} to {per}", None
        for axis, per in ((1, "row"), (0, "column")):
            places = np.flatnonzero(wrong.any(axis=axis))
            if 2 * len(places) <= wrong.shape[1 - axis]:
                return f"wrong in the {per}s {', '.join(map(str, places))} only: what is special there?", None
    return "none of the usual mistakes: undo the forward line by line, from its last line back to this one", None


# --------------------------------------------------------------------------------------------------------------------
# Mistakes that know their op: (result, words, what the mistake makes of the result, line of the forward or None).
# They take the backward's arguments.


def embedding_mistakes(dwte, dwpe, dy, idx):
    T = idx.shape[1]
    once, first, last = np.zeros_like(dwte), np.zeros_like(dwpe), np.zeros_like(dwpe)
    once[idx] += dy
    first[:T], last[:T] = dy[0], dy[-1]
    yield "dwte", "repeated index: of a token that occurs more than once only one gradient counts", once, None
    tokens = np.zeros_like(dwte)
    np.add.at(tokens, idx[0], dy[0])
    yield "dwte", "one sequence only: the others of the batch looked up rows, too", tokens, None
    for array in (first, last):
        yield "dwpe", "one row only: every sequence of the batch used the same positions", array, None


def layernorm_mistakes(dy, x, weight, mean, rstd):
    r = rstd[:, None]
    xhat = (x - mean[:, None]) * r
    var_line, mean_line, y_line = "var = x.var(axis=1)", "mean = x.mean(axis=1)", "y = xhat * weight + bias"

    def dx(g, mean_term, xhat_term):
        return r * (g - mean_term - xhat_term)

    def terms(g, axis=1):
        return g.mean(axis=axis, keepdims=True), xhat * (g * xhat).mean(axis=axis, keepdims=True)

    g = dy * weight
    of_mean, of_var = terms(g)
    through = "missing term: x reaches the output by one more way, through the"
    yield "dx", f"{through} mean", dx(g, 0, of_var), mean_line
    yield "dx", f"{through} variance", dx(g, of_mean, 0), var_line
    yield "dx", "missing terms: mean and rstd depend on x, too", dx(g, 0, 0), mean_line
    for words, of_mean_wrong, of_var_wrong in (
        ("sign of the term that comes through the mean", -of_mean, of_var),
        ("sign of the term that comes through the variance", of_mean, -of_var),
    ):
        yield "dx", words, dx(g, of_mean_wrong, of_var_wrong), None
    yield "dx", "missing factor: dy is the gradient of y, not of xhat", dx(dy, *terms(dy)), y_line
    for one, other in ((x, x), (x, xhat), (xhat, x)):
        wrong = dx(g, of_mean, one * (g * other).mean(axis=1, keepdims=True))
        yield "dx", "wrong value: x where the normalised xhat belongs", wrong, var_line
    yield "dx", "wrong axis: a row is normalised by itself, without the other rows", dx(g, *terms(g, axis=0)), mean_line
    n = x.shape[1]
    yield "dx", "sum instead of mean, in the terms through mean and variance", dx(g, n * of_mean, n * of_var), mean_line
    yield "dweight", "wrong value: x where the normalised xhat belongs", (dy * x).sum(axis=0), None
    yield "dweight", "missing factor: x - mean is not yet what was multiplied", (dy * xhat / r).sum(axis=0), None
    yield "dweight", "missing factor: the weight was multiplied with something", dy.sum(axis=0), None
    yield "dbias", "a factor too many: the bias was added, not multiplied", (dy * xhat).sum(axis=0), None
    yield "dbias", "a factor too many: the weight has no say in it", g.sum(axis=0), None
    yield from _one_row(dweight=dy * xhat, dbias=dy)


def linear_mistakes(dy, x, weight):
    yield from _one_row(dbias=dy)
    yield "dbias", "a factor too many: the bias was added, not multiplied", (dy * (x @ weight.T)).sum(axis=0), None
    yield "dx", "wrong value: y where its gradient belongs", x @ weight.T @ weight, None
    yield "dweight", "wrong value: y where its gradient belongs", (x @ weight.T).T @ x, None
    for n, row in ((0, "first"), (-1, "last")):
        yield "dweight", f"one row only: it is that of the {row} row", np.outer(dy[n], x[n]), None


def _one_row(**summed):
    """A sum over the rows that is only the first row, or the last."""
    for result, rows in summed.items():
        for n, row in ((0, "first"), (-1, "last")):
            yield result, f"one row only: it is that of the {row} row, and all rows used the same number", rows[n], None


def attention_mistakes(dy, qkv, lse, n_head, p_drop, key, batch_offset):
    q, k, v = split_heads(qkv, n_head)
    dy = merged_heads(dy, n_head)
    scale = 1 / math.sqrt(q.shape[-1])
    p = np.exp(_scores_ref(q, k) - lse[..., None])
    p_all = np.exp(q @ k.swapaxes(-1, -2) * scale - lse[..., None])  # future positions, too
    drop = _dropout_scale_ref(p, p_drop, key, batch_offset)
    a, da = p * drop, dy @ v.swapaxes(-1, -2)
    dp = da * drop

    def softmax(p, dp, weights=None, axis=-1):
        return p * (dp - (dp * (p if weights is None else weights)).sum(axis=axis, keepdims=True))

    mask_line = "return np.where(future, -np.inf, s).astype(q.dtype)"
    for words, ds, line in (
        ("missing term: the probabilities of a row sum to 1, so one score changes all of them", p * dp, SOFTMAX_LINE),
        ("missing line: the softmax has not been undone", dp, SOFTMAX_LINE),
        ("wrong mask: the weights that dropout dropped did not reach the output", softmax(p, da), DROP_LINE),
        ("wrong value: the softmax made p; a came after it", softmax(a, dp), SOFTMAX_LINE),
        ("wrong value: the softmax made p; a came after it", softmax(p, dp, a), SOFTMAX_LINE),
        ("wrong value: the softmax made p; a came after it", softmax(a, dp, p), SOFTMAX_LINE),
        ("wrong value: the sum in the softmax's gradient has another factor", softmax(p, dp, 1.0), SOFTMAX_LINE),
        ("wrong axis: a softmax goes over the keys of a query", softmax(p, dp, axis=-2), SOFTMAX_LINE),
        ("sign of the sum in the softmax's gradient", p * (dp + (dp * p).sum(-1, keepdims=True)), SOFTMAX_LINE),
        ("wrong mask: a query does not see positions of the future", softmax(p_all, dp), mask_line),
    ):
        yield "dq", words, ds @ k * scale, line
        yield "dk", words, ds.swapaxes(-1, -2) @ q * scale, line
    ds = softmax(p, dp) * scale
    turned = "transposed: not a row of the matrix but a column goes into"
    yield "dq", f"{turned} it, or the other way round", ds.swapaxes(-1, -2) @ k, None
    yield "dk", f"{turned} a key's gradient: all queries that looked at it", ds @ q, None
    reshaped = "transposed, then reshaped: reshape makes the shape right but does not exchange axes"
    yield "dk", reshaped, (q.swapaxes(-1, -2) @ ds).reshape(q.shape), None
    yield "dq", "wrong value: of a product, each factor's gradient has the other factor", ds @ q, None
    yield "dk", "wrong value: of a product, each factor's gradient has the other factor", ds.swapaxes(-1, -2) @ k, None
    yield "dv", f"{turned} a value's gradient: all queries that looked at it", a @ dy, None
    yield "dv", "wrong value: v was multiplied with the weights after dropout", p.swapaxes(-1, -2) @ dy, DROP_LINE
    yield "dv", "wrong value: v was multiplied with the weights a, not with ds", ds.swapaxes(-1, -2) @ dy, None
    future = (p_all * drop).swapaxes(-1, -2) @ dy
    yield "dv", "wrong mask: a query does not see positions of the future", future, mask_line
    yield "dv", reshaped, (dy.swapaxes(-1, -2) @ a).reshape(v.shape), None


def mlp_mistakes(dy, x, w_fc, w_proj, pre):
    act, t = gelu_ref(pre), np.tanh(K * (pre + A * pre**3))
    yield "dw_proj", "wrong value: the second layer was given what came out of the GELU", dy.T @ pre, None
    yield "dw_proj", "wrong value: act is what was multiplied, not its slope", dy.T @ gelu_slope_ref(pre), None
    first, second = 0.5 * (1 + t), 0.5 * pre * (1 - t**2)
    inner = K * (1 + 3 * A * pre**2)
    for words, slope in (
        ("missing term: by the product rule GELU's slope has two, and the second is missing", first),
        ("missing term: by the product rule GELU's slope has two, and the first is missing", second * inner),
        ("missing factor: by the chain rule, the slope of what stands inside of tanh", first + second),
        ("missing factor: what stands inside of tanh has a cube in it", first + second * K),
        ("sign of the second term of GELU's slope", first - second * inner),
        ("wrong value: the slope is taken before the activation, at pre, not at act", gelu_slope_ref(act)),
        ("wrong value: GELU itself, where its slope belongs", act),
        ("missing line: the gradient has not passed the GELU", np.ones_like(pre)),
    ):
        dpre = dy @ w_proj * slope
        yield "dx", words, dpre @ w_fc, GELU_LINE
        yield "dw_fc", words, dpre.T @ x, GELU_LINE
        yield "db_fc", words, dpre.sum(axis=0), GELU_LINE
    yield from _one_row(db_fc=dy @ w_proj * gelu_slope_ref(pre), db_proj=dy)


def cross_entropy_mistakes(dloss, logits, targets, lse, ignore_index, count):
    p = np.exp(logits - lse[:, None])
    valid = (targets != ignore_index)[:, None]
    y = (targets[:, None] == np.arange(logits.shape[1])).astype(float)
    scale, z_line = dloss / count, "losses = lse[rows] - logits[rows, targets[rows]]"
    ignored = "wrong mask: it must be 0 " + ZEROS["cross-entropy"]
    yield "dlogits", "missing term: the loss has the target's own logit in it, too", valid * p * scale, z_line
    yield "dlogits", "missing term: the loss has lse in it, too", valid * -y * scale, z_line
    yield "dlogits", "sign of the target's term", valid * (p + y) * scale, z_line
    yield "dlogits", "missing factor: both terms are divided by count", valid * (p * scale - y), None
    yield "dlogits", "wrong value: logits where probabilities belong", valid * (logits - y) * scale, z_line
    last = y.copy()
    last[~valid[:, 0], ignore_index] = 1
    lse_line = "lse = m + np.log(np.exp(logits - m[:, None]).sum(axis=1))"
    yield "dlogits", "wrong value: a probability is exp(logit - lse)", valid * (np.exp(logits) - y) * scale, lse_line
    for taken in (y, last):
        yield "dlogits", ignored, (p - taken) * scale, "rows = np.flatnonzero(valid)"
    yield "dlogits", f"missing term (the target's), and {ignored}", p * scale, z_line


def dropout_mistakes(dy, key, first_row, p):
    mask, scale = dropout_mask_ref(key, first_row, dy.shape, p), 1 / (1 - p)
    line = "mask = dropout_mask_ref(key, first_row, x.shape, p)"
    yield "dx", "missing mask, and missing factor: what was dropped did not reach the output", dy, line
    yield "dx", "wrong mask: it is turned round, what was dropped gets a gradient", dy * ~mask * scale, line
    for first, words in ((0, "its rows are numbered from first_row on"), (first_row + 1, "its first row is first_row")):
        yield "dx", f"wrong mask: {words}", dropout_ref(dy, key, first, p), line
    other = dropout_mask_ref(key, first_row, dy.shape, 1 - p)
    yield "dx", "wrong mask: that of another probability", dy * other * scale, line
    yield "dx", "missing factor: the mask alone, where dy belongs too", mask * scale, None


MISTAKES = {
    "embedding": embedding_mistakes,
    "layernorm": layernorm_mistakes,
    "linear": linear_mistakes,
    "attention": attention_mistakes,
    "mlp": mlp_mistakes,
    "cross-entropy": cross_entropy_mistakes,
    "dropout": dropout_mistakes,
}


def of_exception(error, text):
    """A hint for the usual exceptions of arrays that do not fit, or an empty string.  text: the exception's."""
    if isinstance(error, ValueError) and "matmul" in text:
        return "transpose: the inner axes of a matrix product must be the same; write it down with indices"
    if isinstance(error, ValueError) and "broadcast" in text:
        return (
            "missing sum, or missing axis: over what the forward broadcast, the backward sums; and what has one number "
            "for each row needs an axis of length 1 beside the rows: keepdims=True, or [:, None]"
        )
    return ""
