"""A student's file: it is run, and what its backwards return is compared, alone and in a GPT."""

import ast
import contextlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import traceback
from dataclasses import dataclass, field
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

STILL_BLANK = "; still blank: "


class Wrong(Exception):
    """What is wrong with a student's file, in a line."""


class Answer:
    """A student's file: its functions by the names of their ops, and the numbers of the lines that are still blank."""

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
        self.tree, self.blank = tree, sorted({node.value.lineno for node in ast.walk(tree) if is_blank(node)})
        self.line = {node.name: node.lineno for node in tree.body if hasattr(node, "name")}  # of a function, a class
        loader = importlib.machinery.SourceFileLoader("exercise_file", str(self.path))
        loader.get_code = lambda _: code  # not a cached one: Python knows a change by its second only
        self.module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
        sys.modules[loader.name] = self.module  # as of any module that is imported: dataclasses look there
        with self.running():
            loader.exec_module(self.module)
        found = {op: getattr(self.module, lesson.function(), None) for op, lesson in LESSONS.items()}
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
            walk, file = traceback.walk_tb(error.__traceback__), str(self.path)
            frame, line = ([step for step in walk if step[0].f_code.co_filename == file] or [(None, None)])[-1]
            try:
                text = str(error)
            except Exception:  # made by the student's own class
                text = "(its text cannot be made)"
            if self.blank and (words := self._needs_a_blank(error, text, frame, line)):
                raise Wrong(self._at(line, words)) from None
            hint = of_exception(error, self.tree, file)
            words = f"{type(error).__name__}: {text}" + (f" (hint: {hint})" if hint else "")
            raise Wrong(self._at(line, words) + in_lines(STILL_BLANK, self.blank)) from None

    def results(self, lesson, arguments):
        """{name: array} of what the backward returns; None where a result is blank."""
        with self.running():
            results = self.functions[lesson.op](*arguments)
            if results is None or results is ...:
                return dict.fromkeys(lesson.results)
            results = tuple(results) if isinstance(results, (tuple, list)) else (results,)
            if len(results) != len(lesson.results):
                words = f"{lesson.function()} returns {len(results)} result{'s' * (len(results) != 1)}"
                raise Wrong(f"{words}, it must return {len(lesson.results)}: {', '.join(lesson.results)}")
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

    def helpers(self, case):
        """{name: array} of the helpers that the file has and that are not blank, at the values where the op is."""
        made = {}
        for name, _, at in case.lesson.slopes:
            function = getattr(self.module, name, None)
            with contextlib.suppress(Wrong), self.running():
                result = function(case.values[at].copy()) if callable(function) else None
                if isinstance(result, np.ndarray):
                    made[name] = result
        return made

    def results_so_far(self, case, arguments):
        """({name: array, or None where it is blank}, what stopped it or "") of a function that is not finished.

        What is not returned may stand in the function's variable of that name: dv does, before there is a dqkv.
        """
        lesson, stop = case.lesson, ""
        with last_variables(self.functions[lesson.op]) as variables:
            try:
                results = self.results(lesson, arguments)
            except Wrong as error:
                results = dict.fromkeys(lesson.results)
                stop = str(error).removesuffix(in_lines(STILL_BLANK, self.blank))
        if any(array is None for array in results.values()):
            results = {name: self._variable(case, name, variables) for name in case.parts}
        for name, before in case.so_far.items():
            if np.array_equal(results[name], before):
                results[name] = None
        return results, stop

    def _variable(self, case, name, variables):
        """A result as it stands in a variable; None if nothing does, or if it is wrong and a line of it blank."""
        value = variables.get(name)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu":
            return None
        return None if self.blanks_of(name, case.lesson) and case.verdict(name, value).wrong else value

    def blanks_of(self, name, lesson):
        """Numbers of the blank lines that make this result: those that assign to it; if there are none, a return."""
        body = [node for node in self.tree.body if getattr(node, "name", "") == lesson.function()]
        blanks = [node for function in body for node in ast.walk(function) if is_blank(node)]
        own = [node for node in blanks if any(getattr(part, "id", "") == name for part in ast.walk(node))]
        return sorted(node.lineno for node in own or blanks if own or isinstance(node, ast.Return))

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

    def _needs_a_blank(self, error, text, frame, line):
        """Words for an exception that comes from what is still blank; nothing for another one."""
        if line in self.blank:
            return "it stops here, which is blank"
        here = [node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name) and node.lineno == line]
        names = [name for name in dict.fromkeys(here) if frame.f_locals.get(name) is ...]
        if "ellipsis" in text or (names and isinstance(error, (TypeError, ValueError))):
            needed = " and ".join(names) or "what it needs"
            return f"it stops here, as {needed} {'are' if names[1:] else 'is'} still blank"
        return ""

    def _at(self, line, words):
        return f"{self.path.name}{'' if line is None else f' line {line}'}: {' '.join(str(words).split())}"


def in_lines(words, numbers):
    """words, with the numbers of lines; nothing if there are none."""
    return f"{words}line{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}" if numbers else ""


def is_blank(node):
    """Whether a node of a file's tree is a statement with a `...` where code belongs.

    In dx = dweight = dbias = ... results have got a value for the time being; that line may stay.
    """
    value = getattr(node, "value", None)
    is_statement = isinstance(node, ast.stmt) and len(getattr(node, "targets", ())) < 2
    return is_statement and isinstance(value, ast.Constant) and value.value is ...


@contextlib.contextmanager
def last_variables(function):
    """Within this context: a dict, which gets what the variables of a function are whenever it ends."""
    variables, code, before = {}, getattr(function, "__code__", None), sys.getprofile()

    def look(frame, event, _):
        if event == "return" and frame.f_code is code:  # which comes with an exception, too
            variables.clear()
            variables.update(frame.f_locals)

    sys.setprofile(look)
    try:
        yield variables
    finally:
        sys.setprofile(before)


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


@dataclass
class Outcome:
    """What came of an exercise."""

    op: str = ""  # none if the file could not be run
    passed: bool = False
    parts: dict = field(default_factory=dict)  # result -> "ok", "wrong" or "blank"
    words: str = ""  # the first thing that is wrong, in a line


def check_file(path, say, more=0):
    """Say, in lines, what each exercise in a student's file is worth, with 1 + more rungs of a hint -> [Outcome].

    Raises UsageError if there is no file, or no exercise in it.
    """
    outcomes = []
    with imports_beside(path):
        try:
            answer = Answer(Path(path))
        except Wrong as error:
            say(str(error))
            return [Outcome(words=str(error))]
        for op in answer.functions:
            try:
                outcomes.append(check(LESSONS[op], answer, say, more))
            except Wrong as error:
                say(str(error))
                outcomes.append(Outcome(op, words=str(error)))
    return outcomes


def check(lesson, answer, say, more):
    """Say, in lines, what a student's backward is worth, with 1 + more rungs of a hint -> Outcome."""
    answer.check_signature(lesson)
    say(f"{lesson.op}: {lesson.function()} against finite differences")
    outcome, case = Outcome(lesson.op), Case(lesson)

    def wrong(words):
        say(f"  WRONG  {words}")
        outcome.words = words
        return outcome

    arguments = case.arguments()
    given = dict(zip(case.values, arguments, strict=True))
    results, stop = answer.results_so_far(case, arguments) if answer.blank else (answer.results(lesson, arguments), "")
    added = {name: given[name] for name in case.so_far}  # what must be added to in place, and returned
    unreturned = [name for name in added if results[name] is None and not answer.blank]
    results |= {name: added[name] for name in unreturned}
    verdicts = case.compare(results)
    if lesson.slopes and not all(verdict and not verdict.wrong for verdict in verdicts.values()):
        verdicts = case.compare(answer.helpers(case) | results)
    width = max(8, *map(len, verdicts))
    for name, verdict in verdicts.items():
        outcome.parts[name] = "blank" if verdict is None else "wrong" if verdict.wrong else "ok"
        if verdict is None:
            lines = answer.blanks_of(name, lesson)
            where = "not reached: see below" if stop and not lines else in_lines("see ", lines or answer.blank)
            say(f"  {name:<{width}} blank  {where or 'it is None'}")
        else:
            say(f"  {name:<{width}} " + (f"WRONG  {verdict.wrong}" if verdict.wrong else f"ok     {verdict.error:.0e}"))
            if verdict.wrong and not outcome.words:
                outcome.words = f"{name}: {verdict.kind or verdict.wrong}"
    for line in ladder(case.hints(verdicts), more):
        say(line)
    if stop:
        say(f"  {stop}")
        outcome.words = outcome.words or stop
    if stop or {*outcome.parts.values()} != {"ok"}:
        if answer.blank:
            say(in_lines("  still blank: ", answer.blank))
        return outcome
    if unreturned:
        return wrong(f"it adds in place, and must return it, too: return {', '.join(lesson.results)}")
    if copies := [name for name in added if not np.array_equal(results[name], added[name])]:
        return wrong(f"{' and '.join(copies)}: a copy, and what was given did not get it: add to that, in place")
    if changed := case.changed(arguments):
        return wrong(f"it changes {' and '.join(changed)} in place, which others still need: work on a copy")
    ours, theirs = train(), train(in_place_of(lesson, answer))
    for whose, losses in (("yours", theirs), ("npgpt's", ours)):
        say(f"  a GPT after {STEPS} steps, with {whose + ':':<8} loss {losses[0]:.6f} -> {losses[-1]:.6f}")
    if not all(abs(a - b) <= 1e-6 * abs(b) for a, b in zip(theirs, ours, strict=True)):
        return wrong("in a GPT it makes another gradient: does it hold for other shapes, and for other numbers, too?")
    say(f"passed: {lesson.op}")
    outcome.passed = True
    return outcome


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
