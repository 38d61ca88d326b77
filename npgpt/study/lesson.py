"""What a lesson on an op is made of; the lessons themselves are in lessons/, one file for each op.

Nothing here, nor at the top of a lesson, imports NumPy or an op: to list the exercises must not take a second.
"""

import importlib
import importlib.resources
from collections.abc import Callable
from dataclasses import dataclass

SOURCES = importlib.resources.files("npgpt")  # the package, be it a folder or in a zip


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
    mistakes: Callable  # mistakes(*the backward's arguments) yields (result, words, what it is then, line or None)

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


class New:
    """new(3, 4): normal random numbers, an array of the dtype."""

    def __init__(self, dtype="float64", seed=0):
        import numpy as np

        self.rng, self.dtype = np.random.default_rng(seed), np.dtype(dtype)

    def __call__(self, *shape):
        return self.rng.normal(size=shape).astype(self.dtype)

    def integers(self, high, *shape):
        return self.rng.integers(0, high, shape)


def one_row(**summed):
    """Mistakes: a sum over the rows that is only the first row, or the last."""
    for result, rows in summed.items():
        for n, row in ((0, "first"), (-1, "last")):
            yield result, f"one row only: it is that of the {row} row, and all rows used the same number", rows[n], None
