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
    file: str  # in npgpt/ops/, without .py
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


def one_row(**summed):
    """Mistakes: a sum over the rows that is only the first row, or the last."""
    for result, rows in summed.items():
        for n, row in ((0, "first"), (-1, "last")):
            yield result, f"one row only: it is that of the {row} row, and all rows used the same number", rows[n], None
