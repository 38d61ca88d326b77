"""A student's file: it is run, and what its backwards return is compared, alone and in a GPT."""

import ast
import contextlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import traceback
from pathlib import Path

import numpy as np

from npgpt.config import GPTConfig
from npgpt.errors import UsageError
from npgpt.gradcheck import replaced
from npgpt.kernels.masks import random_stream
from npgpt.model import GPT
from npgpt.optim import AdamW, FlatParameters
from npgpt.study.hints import Case, ladder
from npgpt.study.lesson import PROG
from npgpt.study.lessons import LESSONS
from npgpt.study.refused import of_exception


class Wrong(Exception):
    """What is wrong with a student's file, in a line."""


class Answer:
    """A student's file: its functions by the names of their ops, and the lines that are still blank."""

    def __init__(self, path):
        if not path.is_file():
            raise UsageError(f"there is no file {path}; {PROG} show OP --out FILE writes one")
        self.path = path.resolve()
        try:
            tree = ast.parse(path.read_bytes(), str(self.path))
            code = compile(tree, str(self.path), "exec", dont_inherit=True)  # finds a return outside of a function, too
        except (SyntaxError, ValueError) as error:  # ValueError: bytes that no source has
            raise Wrong(self._at(getattr(error, "lineno", None), getattr(error, "msg", error))) from None
        except (RecursionError, MemoryError):
            raise Wrong(self._at(None, "Python cannot read it: an expression in it is too long or too deep")) from None
        self.tree, self.blank = tree, blank_lines(tree)
        self.line = {node.name: node.lineno for node in tree.body if hasattr(node, "name")}  # of a function, a class
        loader = importlib.machinery.SourceFileLoader("exercise_file", str(self.path))
        loader.get_code = lambda _: code  # not a cached one: Python knows a change by its second only
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
        sys.modules[loader.name] = module  # as of any module that is imported: dataclasses look there
        with self.running():
            loader.exec_module(module)
        self.module = module
        found = {op: getattr(module, lesson.function(), None) for op, lesson in LESSONS.items()}
        self.functions = {op: function for op, function in found.items() if callable(function)}
        if not self.functions:
            names = ", ".join(lesson.function() for lesson in LESSONS.values())
            raise UsageError(f"{path} has none of the functions {names}")

    @contextlib.contextmanager
    def running(self):
        """Within this context, in which student's code runs, an exception becomes Wrong, with the line it came from."""
        try:
            yield
        except (KeyboardInterrupt, Wrong):
            raise
        except BaseException as error:  # SystemExit, and a student's own
            frames = traceback.extract_tb(error.__traceback__)
            places = [frame.lineno for frame in frames if frame.filename == str(self.path)]
            try:
                text = str(error)
            except Exception:  # made by the student's own class
                text = "(its text cannot be made)"
            hint = of_exception(error, self.tree, str(self.path))
            words = f"{type(error).__name__}: {text}" + (f" (hint: {hint})" if hint else "")
            raise Wrong(self._at(places[-1] if places else None, words) + self.still_blank("; still blank: ")) from None

    def results(self, lesson, arguments):
        """{name: array} of what the backward returns; None where a result is blank."""
        with self.running():
            results = self.functions[lesson.op](*arguments)
            if results is None or results is ...:
                return dict.fromkeys(lesson.results)
            results = tuple(results) if isinstance(results, (tuple, list)) else (results,)
            if len(results) != len(lesson.results):
                raise Wrong(
                    f"{lesson.function()} returns {len(results)} result{'s' * (len(results) != 1)}, "
                    f"it must return {len(lesson.results)}: {', '.join(lesson.results)}"
                )
            arrays = dict.fromkeys(lesson.results)
            for name, result in zip(lesson.results, results, strict=True):
                if result is not None and result is not ...:
                    try:
                        array = np.asarray(result)
                        arrays[name] = array if np.iscomplexobj(array) else np.asarray(array, np.float64)
                    except (TypeError, ValueError):
                        words = f"{lesson.function()}: {name} is a {type(result).__name__}, not an array"
                        raise Wrong(words) from None
            return arrays

    def helpers(self, lesson, case):
        """{name: array} of the helpers that the file has, at the values where the op needs them."""
        made = {}
        with self.running():
            for name, _, at in lesson.slopes:
                function = getattr(self.module, name, None)
                result = function(case.values[at].copy()) if callable(function) else None
                if isinstance(result, np.ndarray):
                    made[name] = result
        return made

    def check_signature(self, lesson):
        """Raise Wrong if the function cannot be called as the op's own."""
        _, _, parameters = lesson.references()
        try:
            takes = inspect.signature(self.functions[lesson.op])
        except (TypeError, ValueError):  # it is not Python's, and does not tell
            return
        try:
            takes.bind(*parameters)
        except TypeError:
            words = f"{lesson.function()} takes {takes}, it is called with ({', '.join(parameters)})"
            raise Wrong(self._at(self.line.get(lesson.function()), words)) from None

    def still_blank(self, words):
        """words, with the lines that are blank; nothing if none is."""
        return f"{words}line{'s' * (len(self.blank) > 1)} {', '.join(map(str, self.blank))}" if self.blank else ""

    def _at(self, line, words):
        return f"{self.path.name}{'' if line is None else f' line {line}'}: {' '.join(str(words).split())}"


def blank_lines(tree):
    """Numbers of the lines of a file in which there is still a `...` where code belongs.

    In dx = dweight = dbias = ... results have got a value for the time being; that line may stay.
    """
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    values = [getattr(node, "value", None) for node in statements if len(getattr(node, "targets", ())) < 2]
    return sorted({value.lineno for value in values if isinstance(value, ast.Constant) and value.value is ...})


@contextlib.contextmanager
def imports_beside(path):
    """Within this context imports find what is beside a file, as in `python FILE`; afterwards it is forgotten."""
    folder = Path(os.path.realpath(path)).parent
    before, modules, no_bytecode = list(sys.path), set(sys.modules), sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True  # of a file that is being worked on: Python knows a change by its second only
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = before, no_bytecode
        files = {name: getattr(sys.modules[name], "__file__", None) for name in set(sys.modules) - modules}
        beside = {name for name, file in files.items() if "." not in name and folder in Path(str(file)).parents[:2]}
        for name in files:
            if name.partition(".")[0] in beside:
                del sys.modules[name]


# --------------------------------------------------------------------------------------------------------------------
# Comparing: with finite differences, and in a GPT


def check(lesson, answer, say, more=0):
    """Say, in lines, what a student's backward is worth, with 1 + more rungs of a hint; True if all of it is right."""
    answer.check_signature(lesson)
    say(f"{lesson.op}: {lesson.function()} against finite differences")
    case = Case(lesson)
    arguments = case.arguments()
    results, right = answer.results(lesson, arguments), True
    verdicts = case.compare(results)
    if lesson.slopes and any(verdict and verdict.wrong for verdict in verdicts.values()):
        verdicts = case.compare(answer.helpers(lesson, case) | results)
    width = max(8, *map(len, verdicts))
    for name, verdict in verdicts.items():
        if verdict is None:
            say(f"  {name:<{width}} blank  {answer.still_blank('see ') or 'it is None'}")
        else:
            say(f"  {name:<{width}} " + (f"WRONG  {verdict.wrong}" if verdict.wrong else f"ok     {verdict.error:.0e}"))
        right = right and verdict is not None and not verdict.wrong
    for line in ladder(case.hints(verdicts), more):
        say(line)
    if not right:
        if answer.blank:
            say(answer.still_blank("  still blank: "))
        return False
    changed = case.changed(arguments)
    if changed:
        say(f"  WRONG  it changes {' and '.join(changed)} in place, which others still need: work on a copy")
        return False
    ours, theirs = train(), train(in_place_of(lesson, answer))
    for whose, losses in (("yours", theirs), ("npgpt's", ours)):
        say(f"  a GPT after {STEPS} steps, with {whose + ':':<8} loss {losses[0]:.6f} -> {losses[-1]:.6f}")
    if not all(abs(a - b) <= 1e-6 * abs(b) for a, b in zip(theirs, ours, strict=True)):
        say("  WRONG  in a GPT it makes another gradient: does it hold for other shapes, and for other numbers, too?")
        return False
    say(f"passed: {lesson.op}")
    return True


def in_place_of(lesson, answer):
    """A context in which the op goes back by the student's function, called as the op calls its own."""
    _, _, parameters = lesson.references()

    def adapter(*arguments):  # the outputs come first; those that are added to in place are inputs as well
        results = answer.results(lesson, arguments[len(arguments) - len(parameters) :])
        for out, (name, result) in zip(arguments, results.items(), strict=False):
            where = f"{lesson.function()}: in a GPT"
            if result is None:
                raise Wrong(f"{where} it returns None for {name}")
            if out is None:  # the gradient of a bias where there is none
                continue
            if result.shape != out.shape:
                raise Wrong(f"{where} {name} has shape {result.shape}, not {out.shape}")
            if np.iscomplexobj(result):
                raise Wrong(f"{where} {name} is complex, and a gradient is real")
            out[...] = result

    return lambda: replaced(lesson.module(), lesson.replaces or lesson.function(), adapter)


STEPS = 12
# Shakespeare, sonnets 18 and 116
TEXT = """\
Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date;
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance or nature's changing course untrimm'd;
But thy eternal summer shall not fade,
Nor lose possession of that fair thou ow'st;
Nor shall Death brag thou wander'st in his shade,
When in eternal lines to time thou grow'st:
So long as men can breathe, or eyes can see,
So long lives this, and this gives life to thee.

Let me not to the marriage of true minds
Admit impediments. Love is not love
Which alters when it alteration finds,
Or bends with the remover to remove:
O no; it is an ever-fixed mark,
That looks on tempests, and is never shaken;
It is the star to every wandering bark,
Whose worth's unknown, although his height be taken.
Love's not Time's fool, though rosy lips and cheeks
Within his bending sickle's compass come;
Love alters not with his brief hours and weeks,
But bears it out even to the edge of doom.
If this be error and upon me proved,
I never writ, nor no man ever loved.
"""


def train(backward_context=contextlib.nullcontext):
    """The losses of a small GPT's first steps on TEXT; each backward runs inside of backward_context()."""
    characters = sorted(set(TEXT))
    tokens = np.array([characters.index(c) for c in TEXT])
    config = GPTConfig(vocab_size=len(characters), block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.1)
    model, rng = GPT(config, dtype=np.float64), np.random.default_rng(0)
    flat = FlatParameters(model)
    optimizer = AdamW(flat)
    losses = []
    for step in range(STEPS):
        starts = rng.integers(0, len(tokens) - config.block_size, 4)
        rows = starts[:, None] + np.arange(config.block_size)
        flat.zero_grad()
        with random_stream(step):
            _, loss = model(tokens[rows], tokens[rows + 1])
            with backward_context():
                loss.backward()
        flat.finish_grads()
        optimizer.step += 1
        optimizer.update(flat.grads, lr=1e-2)
        losses.append(loss.item())
    return losses
