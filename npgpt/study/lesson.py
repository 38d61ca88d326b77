"""What a lesson on an op is made of, and the exercise that is made of it: a file with the op's backward blank.

The lessons themselves are in lessons/, one file for each op.  An exercise is made of the op's own source, which is its
solution: nothing is written twice.

Nothing here, nor at the top of a lesson, imports NumPy or an op: to list the exercises must not take a second.
"""

import ast
import importlib
import importlib.resources
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PROG = "python -m npgpt.exercise"
SOURCES = importlib.resources.files("npgpt")  # the package, be it a folder or in a zip

LEVELS = {
    1: "the backward's lines are there, but for what stands right of the =",
    2: "the forward's lines are quoted, in the order in which they are undone",
    3: "a signature, and what to return",
}


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    before: str  # stands exactly once in the file ...
    after: str  # ... and this is what the mistake makes of it
    why: str  # what is wrong, in a sentence
    kernel: bool = False  # in code that runs with Numba only, not with NPGPT_KERNELS=numpy

    @property
    def kernels(self):
        """A value of NPGPT_KERNELS under which the faulty line runs; of both, the one that starts faster."""
        return "numba" if self.kernel else "numpy"


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """An op to learn from.  Names are those of functions, arguments and results in its file."""

    op: str  # what it is called on the command line
    topic: str  # what there is to be learnt
    chapter: str  # of the course, that derives it

    # What a student's file holds
    forward: tuple[str, ...]  # given
    backward: tuple[str, ...]  # blank; the last one is what is checked
    results: tuple[str, ...]  # of it
    imports: str = ""  # of the file, beside NumPy
    replaces: str = ""  # what the op calls on its way back, if not the backward's name
    exchange: tuple[tuple[str, str], ...] = ()  # ((name, name in the backward)), where both are one function

    # Numbers for the references
    arguments: Callable  # arguments(new, **sizes) -> {name: value} for the forward, in its order
    sizes: dict[str, object]  # those that hints are found with: all axes of different length

    # What a wrong result is compared with
    lengths: tuple[str, ...] = ()  # sizes that are easily forgotten as a factor: of axes over which the op sums
    factors: Callable = lambda **_: {}  # factors(**values) -> {another such number: (its value, the line that has it)}
    lines: dict[str, str]  # result -> the line of the forward that is undone there
    shared: tuple = ((), None)  # (results that come through one intermediate gradient, the line that it undoes)
    zeros: str = "there"  # where a gradient must be 0
    parts: Callable | None = None  # parts(values, the only result) -> {name: array}, if it is looked at in parts
    places: Callable = lambda **_: {}  # places(**values) -> {result: {words for some entries: a mask of them}}
    mistakes: tuple  # (how the steps of the backward begin that are replaced, by what, words, line); see mistakes.py
    terms: dict[str, tuple] = field(default_factory=dict)  # a term of the backward -> (words for it, line or None)
    slopes: tuple = ()  # (a helper that is blank, the forward's function whose slope it is, the value it is taken at)

    bugs: dict[int, Fault]  # for students to find, by number; each fails gradcheck

    @property
    def file(self):
        """The name of the op's file in npgpt/ops/, without .py."""
        return self.op.replace("-", "_")

    def function(self):
        """The name of the function that a student writes."""
        return dict(self.exchange).get(self.backward[-1], self.backward[-1]).removesuffix("_ref")

    def source(self):
        """The text of the op's file."""
        return SOURCES.joinpath("ops", f"{self.file}.py").read_text(encoding="utf-8")

    def module(self):
        return importlib.import_module(f"npgpt.ops.{self.file}")

    def references(self):
        """(the op's forward, its backward, the names of the backward's parameters), in plain NumPy."""
        forward, backward = (getattr(self.module(), names[-1]) for names in (self.forward, self.backward))
        names, code = dict(self.exchange), backward.__code__
        return forward, backward, [names.get(name, name) for name in code.co_varnames[: code.co_argcount]]

    def outputs(self, inputs):
        """What the forward makes of `inputs`, {name: value}: the result, and what it keeps for the backward."""
        forward, _, _ = self.references()
        made = forward(*inputs.values())
        return made if isinstance(made, tuple) else (made,)

    def backward_arguments(self, inputs, new):
        """{name: value} for the backward, in its order.

        What the backward adds to in place, as embedding's, has got numbers already.
        """
        _, _, parameters = self.references()
        y, *kept = self.outputs(inputs)
        dy = new(*y.shape)
        values = {**inputs, **{name: new(*inputs[name[1:]].shape) for name in self.results if name in parameters}}
        values["dloss" if "dloss" in parameters else "dy"] = dy if dy.ndim else float(dy)
        values.update(zip([name for name in parameters if name not in values], kept, strict=True))
        return {name: values[name] for name in parameters}

    def reference_arguments(self, reference, new, *sizes, **named):
        """Arguments for the forward or the backward, whichever `reference` is, of sizes that `arguments` takes."""
        inputs = self.arguments(new, *sizes, **named)
        forward, _, _ = self.references()
        return list((inputs if reference is forward else self.backward_arguments(inputs, new)).values())


def instead(begin, line, written):
    """Mistakes in the step that begins so, which undoes that line of the forward: {what is written there: words}."""
    return [(begin, after, words, line) for after, words in written.items()]


class New:
    """new(3, 4): normal random numbers, an array of the dtype."""

    def __init__(self, dtype="float64", seed=0):
        import numpy as np

        self.rng, self.dtype = np.random.default_rng(seed), np.dtype(dtype)

    def __call__(self, *shape):
        return self.rng.normal(size=shape).astype(self.dtype)

    def integers(self, high, *shape):
        return self.rng.integers(0, high, shape)


def exercise_text(lesson, level, name):
    """The file for an op's exercise; level 0 is the solution.

    name: where the file will be.  FILE stands for one that might end the file's docstring, or mean something in it.
    """
    name = name if re.fullmatch(r"\w[\w.-]*", name := Path(name).name) else "FILE"
    source = lesson.source()
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    lines = {node.name: source.splitlines()[node.lineno - 1 : node.end_lineno] for node in nodes}
    forward = ["\n".join(lines[name]) for name in lesson.forward]
    backward = ["\n".join(_blank(lines[name], level)) for name in lesson.backward]
    if lesson.exchange:  # one function is both
        forward[-1] = forward[-1].replace(lesson.forward[-1], f"{lesson.file}_forward")
    for before, after in lesson.exchange:
        backward = [re.sub(rf"\b{before}\b", after, text) for text in backward]
    functions = "\n\n\n".join((*forward, *backward))
    for name_here in re.findall(r"^def (\w+)_ref\(", functions, re.MULTILINE):
        functions = re.sub(rf"\b{name_here}_ref\b", name_here, functions)
    blanks = " and ".join((*(helper.removesuffix("_ref") for helper in lesson.backward[:-1]), lesson.function()))
    imports = "import math\n\n" * ("math." in functions) + "import numpy as np\n"
    imports += f"\n{lesson.imports}\n" if lesson.imports else ""
    return f'''"""Exercise: the backward of {lesson.op}, level {level} of {len(LEVELS)}.

The forward is given.  Put code in the place of each `...` in {blanks}; it may be
more lines than there are blanks, and others.  Then

    {PROG} check {name}

compares what it returns with finite differences, says where to look (with --more, which line; given
twice, which kind of mistake), and trains a small GPT with it.  {lesson.chapter} derives it;
the solution is npgpt/ops/{lesson.file}.py.
"""

{imports}

{functions}
'''


def _blank(lines, level):
    """The lines of a function with blanks in it."""
    (node,) = ast.parse("\n".join(lines)).body
    first = node.body[0]
    documented = ast.get_docstring(node) is not None
    body, head = (node.body[1:], lines[: first.end_lineno]) if documented else (node.body, lines[: first.lineno - 1])
    comments = [i for i, line in enumerate(lines) if line.startswith("    #")]
    if level == 0:
        return lines
    if level == 3:
        return [*head, "    ..."]
    if level == 2:
        quoted = [line for i in comments for line in (lines[i], "    ...")]
        returned = list(ast.walk(body[-1].value))
        if not all(isinstance(part, (ast.Name, ast.Tuple, ast.Load)) for part in returned):
            return [*head, *quoted, "    return ..."]
        arguments = {argument.arg for argument in node.args.args}
        new = [part.id for part in returned if isinstance(part, ast.Name) and part.id not in arguments]
        return [*head, *(["    " + " = ".join([*new, "..."])] if new else []), *quoted, lines[-1]]
    # Before the first quotation, values of the forward are made again; memory for a result is no secret.
    for statement in reversed(body):
        value = getattr(statement, "value", None)
        names_only = isinstance(statement, ast.Return) and isinstance(value, (ast.Name, ast.Tuple))
        is_memory = isinstance(value, ast.Call) and ast.unparse(value.func) == "np.empty_like"
        if value is None or names_only or is_memory or (comments and statement.lineno <= comments[0]):
            continue
        first, last = value.lineno - 1, value.end_lineno - 1
        lines[first : last + 1] = [lines[first][: value.col_offset] + "..." + lines[last][value.end_col_offset :]]
    return lines
