"""An op's backward as a list of steps, any of which can be changed: what would it return with a mistake in it?

The steps are those of the op's own reference, read from its source: nothing is written twice.  A small interpreter
runs them.  A change maps a node of their syntax trees to another one, so that two mistakes are made at once by uniting
two changes.  Statements are few in references, and so are the kinds of expressions: Python's other ones are not known
here.
"""

import ast
import copy
import operator

import numpy as np

from npgpt.study.lesson import SOURCES

OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow, ast.MatMult: operator.matmul,
    ast.USub: operator.neg, ast.Invert: operator.invert, ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip


class Step:
    """A statement of the backward.  quote: the forward's line that is undone there, or None; reads, writes: names."""

    def __init__(self, node, quote):
        self.node, self.quote, self.text = node, quote, ast.unparse(node).lstrip("(")  # (a, b) = of Python 3.10
        names = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
        self.reads = {name.id for name in names if isinstance(name.ctx, ast.Load)}
        self.writes = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        written = node.value.args[0] if isinstance(node, ast.Expr) else getattr(node, "target", None) or node.targets[0]
        self.in_place = not isinstance(node, ast.Assign) or isinstance(written, ast.Subscript)
        if self.in_place:
            name = next(part.id for part in ast.walk(written) if isinstance(part, ast.Name))
            self.writes, self.reads = {name}, self.reads | {name}
        self.target = min(self.writes)  # what it makes


class Backward:
    """The steps of a lesson's backward, and the numbers that they begin with.

    inputs are the forward's, values the backward's.  When nothing is changed, right is the value of each node, before
    has the names before each step, and values those after the last one.
    """

    def __init__(self, lesson, inputs, values):
        self.steps = []
        module = lesson.module()
        self.names = {"len": len, "float": float, "int": int, "range": range, **vars(module), "np": np, **inputs}
        forward = Run(self.names, {})
        for statement in _function(module, lesson.forward[-1]).body:
            if isinstance(statement, (ast.Assign, ast.AugAssign)):
                forward.run(statement)
        self.names |= values
        renamed = {before: ast.Name(after, ast.Load()) for before, after in lesson.exchange}
        function = _Renamed(renamed).visit(_function(module, lesson.backward[-1]))
        lines = lesson.source().splitlines()
        for statement in function.body:
            above = (lines[n].strip() for n in range(statement.lineno - 2, function.lineno, -1))
            quote = next((line.removeprefix("# ") for line in above if line.startswith("# ")), None)
            if isinstance(statement, ast.Return) and not isinstance(statement.value, (ast.Name, ast.Tuple)):
                statement = _assignment(lesson.results[0], statement.value)
            if isinstance(statement, (ast.Assign, ast.AugAssign, ast.Expr)) and not _is_text(statement):
                self.steps += [Step(node, quote) for node in _expanded(module, statement, lesson)]
        self.right, self.before = {}, []
        self.values = dict(self.names)
        unchanged = Run(self.values, {}, self.right)
        for step in self.steps:
            self.before.append(dict(self.values))
            unchanged.run(step.node)

    def run(self, changes, first=0):
        """{name: value} after all steps, with changes, {node: another one; of a statement, a list}, from a step on."""
        run = Run(dict(self.before[first]), changes)
        with np.errstate(all="ignore"):
            for step in self.steps[first:]:
                run.run(step.node)
        return run.names

    def reached(self, i, results):
        """Which of the results depend on what step i makes."""
        touched = set(self.steps[i].writes)
        for step in self.steps[i + 1 :]:
            if step.reads & touched:
                touched |= step.writes
            else:
                touched -= step.writes
        return {name for name in results if name in touched}


# --------------------------------------------------------------------------------------------------------------------
# From source to steps


def _function(module, name):
    """The syntax tree of a function that a module has, or has imported."""
    file = getattr(module, name).__module__.split(".")[1:]
    text = SOURCES.joinpath(*file[:-1], f"{file[-1]}.py").read_text(encoding="utf-8")
    return next(node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == name)


def _assignment(name, value):
    return ast.Assign([ast.Name(name, ast.Store())], value, lineno=0)


def _is_text(statement):
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


class _Renamed(ast.NodeTransformer):
    """Puts expressions in the place of names, and of calls, which are given by their nodes."""

    def __init__(self, names):
        self.names = names

    def visit_Call(self, node):
        return self.names.get(node) or self.generic_visit(node)

    def visit_Name(self, node):
        new = copy.deepcopy(self.names.get(node.id, node))
        if isinstance(new, ast.Name):
            new.ctx = node.ctx
        return new

    def visit_arg(self, node):
        return ast.arg(self.names[node.arg].id) if node.arg in self.names else node


def _expanded(module, statement, lesson):
    """A statement as several: a backward that it calls is written out, and so is a helper that the student writes."""
    calls = [node for node in ast.walk(statement) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    call = next((c for c in calls if c.func.id.endswith("_backward_ref") or c.func.id in lesson.backward), None)
    if call is None:
        return [statement]
    function = _function(module, call.func.id)
    names = {parameter.arg: value for parameter, value in zip(function.args.args, call.args, strict=True)}
    *body, last = [node for node in function.body if not _is_text(node)]
    if statement.value is call:
        pairs = zip(last.value.elts, statement.targets[0].elts, strict=True)
        names |= {result.id: target for result, target in pairs}
        return [_Renamed(names).visit(node) for node in body]
    value = ast.Name(call.func.id.removesuffix("_ref"), ast.Load())
    body.append(_assignment(value.id, last.value))
    return [*(_Renamed(names).visit(node) for node in body), _Renamed({call: value}).visit(statement)]


# --------------------------------------------------------------------------------------------------------------------
# Running them


class Run:
    """Runs statements, in which names stand for values.

    changes: {node: another one; of a statement, a list}.  record, if it is given, gets the value of each expression.
    There is a method for each type of statement, of its name.
    """

    def __init__(self, names, changes, record=None):
        self.names, self.changes, self.record = names, changes, record

    def run(self, statement):
        for node in self.changes.get(statement, [statement]):
            getattr(self, type(node).__name__)(node)

    def value(self, node):
        node = self.changes.get(node, node)
        value = EXPRESSIONS[type(node)](self, node)
        if self.record is not None:
            self.record[node] = value
        return value

    def values(self, nodes):
        for node in nodes:
            if isinstance(node, ast.Starred):
                yield from self.value(node.value)
            else:
                yield self.value(node)

    # Statements.  What is changed in place is a copy first: others may have the array, too

    def Assign(self, node):
        self._assign(node.targets[0], self.value(node.value))

    def AugAssign(self, node):
        self._assign(node.target, OPERATORS[type(node.op)](self.value(node.target), self.value(node.value)))

    def Expr(self, node):  # np.add.at(array, ...)
        array = node.value.args[0].id
        self.names[array] = self.names[array].copy()
        self.value(node.value)

    def _assign(self, target, value):
        if isinstance(target, ast.Tuple):
            for part, one in zip(target.elts, value, strict=True):
                self._assign(part, one)
        elif isinstance(target, ast.Subscript):
            array = self.names[target.value.id] = self.names[target.value.id].copy()
            array[self.value(target.slice)] = value
        else:
            self.names[target.id] = value

    def called(self, node):
        words = {word.arg: self.value(word.value) for word in node.keywords}
        return self.value(node.func)(*self.values(node.args), **words)


EXPRESSIONS = {  # the value of each type of them, in a Run
    ast.Name: lambda run, node: run.names[node.id],
    ast.Constant: lambda run, node: node.value,
    ast.BinOp: lambda run, node: OPERATORS[type(node.op)](run.value(node.left), run.value(node.right)),
    ast.UnaryOp: lambda run, node: OPERATORS[type(node.op)](run.value(node.operand)),
    ast.Compare: lambda run, node: OPERATORS[type(node.ops[0])](run.value(node.left), run.value(node.comparators[0])),
    ast.Attribute: lambda run, node: getattr(run.value(node.value), node.attr),
    ast.Subscript: lambda run, node: run.value(node.value)[run.value(node.slice)],
    ast.Slice: lambda run, node: slice(*(part and run.value(part) for part in (node.lower, node.upper, node.step))),
    ast.Tuple: lambda run, node: tuple(run.values(node.elts)),
    ast.Call: Run.called,
}
