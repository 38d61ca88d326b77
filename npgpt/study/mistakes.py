"""All the backwards that are wrong by a mistake that people make: which of them returned what a student's did?

A mistake is a change of the reference's steps (backward.py), with words that begin with its kind.  Some are a lesson's
own, with words that know the op.  The others are made for every node of the steps: a factor, a term or a mask is
missing, a sum goes over another axis, another value stands there.  Any two can be made at once.
"""

import ast
import copy
import dataclasses
import functools
import itertools
from dataclasses import dataclass

import numpy as np

CLOSE = 1e-6  # two arrays are the same if they differ by less than this share of the larger one's largest entry
USUAL = 2  # what two mistakes that are made at once may cost together


@dataclass(frozen=True)
class Mistake:
    words: str  # what it is: its kind, a colon, and more
    step: int  # the first that is changed
    changes: dict
    line: str | None = None  # of the forward, that has to do with it
    cost: int = 1  # the likelier it is, the smaller
    group: str = ""  # mistakes of one group may be made all at once


class Mistakes:
    """The mistakes in a lesson's backward, and what each makes of the results.

    results: the names of what is compared, so_far: what stood there before, for a backward that adds in place.
    """

    def __init__(self, lesson, backward, results, so_far):
        self.lesson, self.backward, self.results, self.so_far = lesson, backward, list(results), so_far
        self.right = self._changes(backward.values)
        self.terms = [*self._terms()]
        every = [*self._own(), *(made for i in range(len(backward.steps)) for made in self._of_step(i))]
        groups = {}
        for mistake in every:
            groups.setdefault(mistake.group, []).append(mistake)
        groups.pop("", None)
        twins = [
            _united(some) for fewer in (0, 1) for members in groups.values()  # all at once, or all but one
            for some in itertools.combinations(members, len(members) - fewer) if len(some) > 1
        ]  # fmt: skip
        self.singles = Space(self.right)
        self.effective = []  # all that change something, in the words of the first that makes the same of it
        for mistake in sorted([*every, *twins], key=lambda mistake: mistake.cost):
            if same := self._add(self.singles, (mistake,)):
                (first,) = same
                self.effective.append(dataclasses.replace(mistake, words=first.words, line=first.line))

    @functools.cached_property
    def pairs(self):
        """Those made of two mistakes, the usual ones first."""
        space = Space(self.right)
        for a, b in sorted(itertools.combinations(self.effective, 2), key=lambda pair: pair[0].cost + pair[1].cost):
            if a.cost + b.cost <= USUAL and not a.changes.keys() & b.changes.keys():
                self._add(space, (a, b))
        return space

    def _changes(self, values):
        """{result: by how much it is changed} of what the steps end with."""
        return {name: values[name] - self.so_far.get(name, 0) for name in self.results}

    def _add(self, space, mistakes):
        """Add mistakes that are made at once to a Space; those with the same results, or None if nothing changed."""
        changes = {node: new for mistake in mistakes for node, new in mistake.changes.items()}
        try:
            made = self._changes(self.backward.run(changes, min(mistake.step for mistake in mistakes)))
        except (ValueError, TypeError, IndexError, KeyError, AttributeError, ZeroDivisionError):
            return None  # it raises an exception: nobody need guess it
        return space.add(mistakes, made)

    # What the lesson knows

    def _own(self):
        """The lesson's; that a text of it cannot run is a mistake in the lesson."""
        for begin, after, words, line in self.lesson.mistakes:
            nodes = {i: step.node for i, step in enumerate(self.backward.steps) if step.text.startswith(begin)}
            first = min(nodes)
            changes = {node: ast.parse(after).body if i == first else [] for i, node in nodes.items()}
            yield Mistake(words, first, changes, line, 0)

    # What holds for every op

    def _is_array(self, node):
        value = self.backward.right.get(node)
        return isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.ndim > 0

    def _terms(self):
        """All Terms."""
        for i, step in enumerate(self.backward.steps):
            sums = [node for node in ast.walk(step.node) if _is_sum(node) and self._is_array(node)]
            for term in (term for node in sums for term in (node.left, node.right) if not _is_sum(term)):
                changes = ({term: _binary(ast.Constant(factor), ast.Mult(), term)} for factor in (0.0, 2.0))
                without, twice = (self._changes(self.backward.run(change, i)) for change in changes)
                contribution = {name: right - without[name] for name, right in self.right.items()}
                linear = all(near(twice[name] - right, contribution[name]) for name, right in self.right.items())
                words, line = self.lesson.terms.get(ast.unparse(term), (f"a term of {step.target}", None))
                yield Term(i, term, words, line, contribution if linear else None)

    def _of_step(self, i):
        """Mistakes in a step."""
        step = self.backward.steps[i]
        for term in self.terms:
            if term.step == i:
                kinds = (("missing term: without", 0.0, ""), ("sign: of", -1.0, f"signs of {step.target}"))
                for kind, factor, group in kinds:
                    changes = {term.node: _binary(ast.Constant(factor), ast.Mult(), term.node)}
                    yield Mistake(f"{kind} {term.words}", i, changes, term.line, 1, group)
        for node in ast.walk(step.node):
            for words, new, cost, group in self._of_node(node, step):
                yield Mistake(words, i, {node: new}, None, cost, group)
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and self._is_array(node.right):
                yield from self._too_late(i, node)
        for words, after, cost in _of_statement(step):
            yield Mistake(words, i, {step.node: after}, None, cost)
        value = getattr(step.node, "value", None)
        if self._is_array(value) and not step.in_place:
            for words, new, cost in self._of_whole(value, i, step.target):
                yield Mistake(words, i, {value: new}, None, cost)

    def _of_whole(self, value, i, target):
        """(words, another node, cost) for all that stands on the right of a step's =."""
        right = self.backward.right[value]
        for name, array in self._arrays(i):
            for text in (name, f"1 - {name}", f"{name} * (1 - {name})") if array.dtype.kind == "f" else (name,):
                yield f"a factor too many: {text}, in {target}", _binary(value, ast.Mult(), _expression(text)), 3
        yield from self._with_a_term(value, target)
        if right.ndim > 1 and right.shape[-1] == right.shape[-2]:  # entries count that must not, or the other way round
            for call in ("tril(0, -1)", "triu(0)", "triu(0, 1)"):
                masked = _with(_expression(f"np.{call}"), copy.copy(value))
                yield f"wrong mask: entries of {target} are 0 that count", masked, 1
        for name, array in self._arrays(i):
            if array.shape == right.shape and array.dtype.kind == "f":
                positive = _expression(f"{name} > 0")
                yield f"wrong mask: that of {name} > 0, in {target}", _binary(value, ast.Mult(), positive), 2

    def _too_late(self, i, product):
        """Mistakes in which a factor comes in at a later step."""
        for later in self.backward.steps[i + 1 :]:
            value = getattr(later.node, "value", None)
            if self._is_array(value) and self.backward.steps[i].writes & later.reads and not later.in_place:
                words = f"wrong order: a factor comes in before {later.target} is made, not after it"
                changes = {product: product.left, value: _binary(value, ast.Mult(), product.right)}
                yield Mistake(words, i, changes, None, 1)

    def _arrays(self, i):
        """(name, array) of what a student has when step i begins, and of the forward's values."""
        seen = set()
        for name, value in self.backward.before[i].items():
            if isinstance(value, np.ndarray) and value.ndim and value.dtype.kind in "fb" and id(value) not in seen:
                seen.add(id(value))
                yield name, value

    def _of_node(self, node, step):
        """(words, another node, cost, group) for a node of a step."""
        target = step.target
        if isinstance(node, ast.BinOp) and self._is_array(node):
            yield from self._of_product(node, step)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and self._is_array(node.func.value):
            yield from self._of_sum(node, step)
        elif isinstance(node, ast.Call) and len(node.args) == 1 and self._is_array(node.args[0]):
            yield f"missing line: {ast.unparse(node.func)}, in {target}", node.args[0], 1, ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "np.where":
            mask, kept, _ = node.args
            yield f"wrong mask: it is turned round, in {target}", _with(node, ast.UnaryOp(ast.Invert(), mask)), 1, ""
            yield f"missing mask: what was masked counts, in {target}", kept, 1, ""
            for name, array in self._arrays(self.backward.steps.index(step)):
                if array.shape == self.backward.right[mask].shape and array.dtype.kind == "f":
                    yield f"wrong mask: that of {name} > 0, in {target}", _with(node, _expression(f"{name} > 0")), 2, ""
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
            yield f"wrong mask: it is turned round, in {target}", node.operand, 1, ""
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and self._is_array(node):
            yield from self._of_value(node, step)
        elif isinstance(node, ast.Name) and getattr(self.backward.right.get(node), "dtype", np.dtype("f")).kind == "i":
            for op in (ast.Add(), ast.Sub()):
                yield f"wrong index: {node.id} is off by one, in {target}", _binary(node, op, ast.Constant(1)), 1, ""
        elif isinstance(node, ast.Slice) and node.upper is not None and node.lower is None:
            one, end = ast.Constant(1), node.upper
            words = f"wrong index: other rows of {target} than those that the forward used"
            yield words, ast.Slice(one, ast.BinOp(end, ast.Add(), one), None), 1, ""
            yield words, ast.Slice(ast.UnaryOp(ast.USub(), end), None, None), 1, ""

    def _of_value(self, node, step):
        """Mistakes in the use of an array."""
        right, target = self.backward.right[node], step.target
        for name, array in self._arrays(self.backward.steps.index(step)):
            if array.shape == right.shape and name != node.id and not np.array_equal(array, right):
                words = f"wrong value: {name} stands where another value belongs, in {target}"
                yield words, ast.Name(name, ast.Load()), 2, f"{name} for {node.id}"
        for words, new, cost in self._with_a_term(node, target):
            yield words, new, cost, f"{node.id} {type(new.op).__name__} {words.partition(', in ')[0]}"
        for axis in range(right.ndim):
            mean = _expression(f"{node.id}.mean(axis={axis}, keepdims=True)")
            words = f"a term too many: a mean, in {target}"
            yield words, _binary(node, ast.Sub(), mean), 3, f"{node.id} - its mean {axis}"
        square = _binary(node, ast.Pow(), ast.Constant(2))
        yield f"wrong power: {node.id} is squared, in {target}", square, 2, f"{node.id} squared"

    def _with_a_term(self, node, target):
        """(words, node + a term, or - a term, cost) for all arrays, also for those that are made later."""
        for name, array in self.backward.values.items():
            fits = isinstance(array, np.ndarray) and 0 < array.ndim <= self.backward.right[node].ndim
            if fits and array.dtype.kind == "f":
                for op in (ast.Add(), ast.Sub()):
                    yield f"a term too many: {name}, in {target}", _binary(node, op, ast.Constant(array)), 3

    def _of_product(self, node, step):
        """Mistakes in a product, quotient or power."""
        left, right, target = node.left, node.right, step.target
        lacks = f"missing factor: {target} lacks one of its factors"
        if isinstance(node.op, ast.Mult):
            for factor, rest in ((left, right), (right, left)):
                yield lacks, rest, 1, f"no {ast.unparse(factor)}"
                words = f"upside down: in {target} is divided by what must be multiplied with"
                yield words, _binary(rest, ast.Div(), factor), 1, ""
                if _is_sum(rest):
                    words = f"missing factor: in {target} not every term has it; parentheses?"
                    yield from ((words, new, 1, "") for new in _distributed(factor, rest))
        elif isinstance(node.op, ast.Div):
            yield lacks, left, 1, f"no / {ast.unparse(right)}"
            words = f"upside down: in {target} is multiplied with what must be divided by"
            yield words, _binary(left, ast.Mult(), right), 1, f"* {ast.unparse(right)}"
        elif isinstance(node.op, ast.MatMult):
            words = f"transposed: in the product that makes {target}, a row stands where a column belongs"
            turned = _turned(left), _turned(right)
            for a, b in ((turned[0], right), (left, turned[1]), turned, (right, left), turned[::-1]):
                yield words, _binary(a, ast.MatMult(), b), 1, ""
            for row, called in ((slice(1), "first"), (slice(-1, None), "last")):
                a, b = _part(left, (..., row)), _part(right, (..., row, slice(None)))
                words = f"one row only: {target} is that of the {called}, and all of them count"
                yield words, _binary(a, ast.MatMult(), b), 1, ""
            words = f"transposed, then reshaped: reshape makes the shape of {target} right but does not exchange axes"
            shape = ast.Constant(self.backward.right[node].shape)
            for new in (_binary(turned[1], ast.MatMult(), turned[0]), _turned(node)):
                yield words, ast.Call(ast.Attribute(new, "reshape", ast.Load()), [shape], []), 1, ""
        elif isinstance(node.op, ast.Pow) and isinstance(right, ast.Constant):
            for power in sorted({1, 2, 3} - {right.value}):
                yield f"wrong power: in {target}", _binary(left, ast.Pow(), ast.Constant(power)), 1, ""

    def _of_sum(self, node, step):
        """Mistakes in a sum or mean over an axis."""
        kind, array, target = node.func.attr, self.backward.right[node.func.value], step.target
        given = {word.arg: self.backward.right[word.value] for word in node.keywords}
        if kind not in ("sum", "mean") or "axis" not in given:
            return
        axis = given["axis"] % array.ndim
        n = array.shape[axis]

        def reduced(kind, what, keywords):
            return ast.Call(ast.Attribute(what, kind, ast.Load()), node.args, keywords)

        other = reduced("mean" if kind == "sum" else "sum", node.func.value, node.keywords)
        called = "mean instead of sum" if kind == "sum" else "sum instead of mean"
        yield f"{called}: in {target}", other, 1, called
        if kind == "mean":
            for length in sorted({n - 1, *(m for m in array.shape if m != n)}):
                called = f"constant factor: the mean in {target} is not divided by how many numbers it is of"
                yield called, _binary(other, ast.Div(), ast.Constant(length)), 1, f"mean of {length}"
        if isinstance(node.func.value, ast.BinOp) and isinstance(node.func.value.op, ast.Mult):
            a, b = (reduced(kind, factor, node.keywords) for factor in (node.func.value.left, node.func.value.right))
            words = f"wrong order: in {target}, a {kind} of products is not the product of the {kind}s"
            yield words, _binary(a, ast.Mult(), b), 1, ""
        for axes in (axes for n in range(1, array.ndim + 1) for axes in itertools.combinations(range(array.ndim), n)):
            if axes != (axis,):
                words = f"{'a sum too many' if axis in axes else 'wrong axis'}: {target} is a {kind} over other axes"
                keywords = [word for word in node.keywords if word.arg != "axis"]
                keywords.append(ast.keyword("axis", ast.Constant(axes)))
                yield words, reduced(kind, node.func.value, keywords), 1, f"axes {axes}"
        if not given.get("keepdims"):
            for row, called in ((0, "first"), (-1, "last")):
                part = _part(node.func.value, (*[slice(None)] * axis, row))
                yield f"one row only: {target} is that of the {called}, and all used the same number", part, 1, ""
        else:
            words = f"missing sum: in {target}, one number reaches many, and their gradients add up"
            yield words, node.func.value, 1, ""


@dataclass(frozen=True)
class Term:
    step: int
    node: ast.expr
    words: str
    line: str | None
    contribution: dict | None  # {result: what of it is this term}, if all results are linear in it


class Space:
    """Mistakes, and what the results are with them, in a matrix for each result: one row for each."""

    def __init__(self, right):
        self.right, self.mistakes, self.made = right, [], []
        random = np.random.default_rng(0)
        self.probes = {name: random.normal(size=array.shape) for name, array in right.items()}
        self.seen = {self._key(right): None}

    def add(self, mistakes, made):
        """Those that make the same of the results, which may be these; None if nothing is changed."""
        arrays = {}
        for name, right in self.right.items():
            array = np.asarray(made[name], np.float64)
            if array.ndim < right.ndim and array.shape == right.shape[right.ndim - array.ndim :]:
                array = np.broadcast_to(array, right.shape)  # as when it is written into memory
            arrays[name] = array if array.shape == right.shape else np.full(right.shape, np.nan)
        key = self._key(arrays)
        if key not in self.seen:
            self.seen[key] = mistakes
            self.mistakes.append(mistakes)
            self.made.append(arrays)
        return self.seen[key]

    def _key(self, arrays):
        """The same for results that are the same but for rounding."""
        return tuple(f"{float(np.vdot(self.probes[name], array)):.9g}" for name, array in arrays.items())

    @functools.cached_property
    def rows(self):
        """{result: what it is, a row for each of the mistakes}; nothing is added after that."""
        return {name: np.array([made[name].ravel() for made in self.made]) for name in self.right}

    def ratios(self, name, got):
        """c for each of the mistakes, where got = c times what it makes of this result; NaN elsewhere."""
        rows, got = self.rows[name], got.ravel()
        with np.errstate(all="ignore"):
            c = (rows @ got) / (rows * rows).sum(axis=1)
            error = np.abs(got - c[:, None] * rows).max(axis=1)
            return np.where(error <= CLOSE * np.abs(c) * np.abs(rows).max(axis=1), c, np.nan)

    def same(self, name):
        """Whether each of the mistakes leaves this result as it is."""
        with np.errstate(all="ignore"):
            return np.abs(self.ratios(name, self.right[name]) - 1) <= CLOSE


def near(a, b):
    return a.shape == b.shape and np.abs(a - b).max(initial=0) <= CLOSE * np.abs(b).max(initial=0)


def _united(mistakes):
    """Several mistakes of a group as one."""
    first = min(mistakes, key=lambda mistake: mistake.step)
    changes = {node: new for mistake in mistakes for node, new in mistake.changes.items()}
    kind, _, rest = first.words.partition(": ")
    where = dict.fromkeys(mistake.words.partition(": ")[2] for mistake in mistakes)
    words = f"{kind}: {' and '.join(where)}" if rest.startswith(("in ", "of ")) else first.words
    return Mistake(words, first.step, changes, first.line, first.cost)


# --------------------------------------------------------------------------------------------------------------------
# Nodes


def _is_sum(node):
    return isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub))


def _expression(text):
    return ast.parse(text, mode="eval").body


def _binary(left, op, right):
    return ast.BinOp(copy.copy(left), op, copy.copy(right))  # a copy: it may be the node that is replaced


def _part(node, index):
    return ast.Subscript(copy.copy(node), ast.Constant(index), ast.Load())


def _with(call, first):
    """A call with another first argument."""
    return ast.Call(call.func, [first, *call.args[1:]], call.keywords)


def _turned(node):
    """A node with its last two axes exchanged."""
    if isinstance(node, ast.Attribute) and node.attr == "T":
        return node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "swapaxes":
        return node.func.value
    axes = [ast.Constant(-1), ast.Constant(-2)]
    return ast.Call(ast.Attribute(copy.copy(node), "swapaxes", ast.Load()), axes, [])


def _distributed(factor, terms):
    """factor * (terms) with the factor at the first term only, and at all but one."""
    yield _binary(_binary(factor, ast.Mult(), terms.left), terms.op, terms.right)
    yield _binary(terms.left, terms.op, _binary(factor, ast.Mult(), terms.right))
    if _is_sum(terms.left):
        for left in _distributed(factor, terms.left):
            yield _binary(left, terms.op, terms.right)


def _of_statement(step):
    """(words, other statements, cost) for the whole of a step."""
    if isinstance(step.node, ast.AugAssign):
        value = step.node.value
        value = ast.UnaryOp(ast.USub(), value) if isinstance(step.node.op, ast.Sub) else value
        new = ast.Assign([step.node.target], value, lineno=0)
        yield f"overwritten: {step.target} is replaced, where something must be added to it", [new], 1
    if step.in_place:
        yield f"missing line: nothing is done for {step.text.partition(' ')[0]}", [], 2
