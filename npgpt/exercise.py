"""Backwards to write yourself, and mistakes in them to find: python -m npgpt.exercise list|show|check|bug|answer|train

    python -m npgpt.exercise show layernorm --out layernorm.py      the forward is given, the backward is blank
    python -m npgpt.exercise check layernorm.py                     finite differences, hints, and a GPT trained with it
    python -m npgpt.exercise bug 3                                  a copy of npgpt with a mistake in it: find it
    python -m npgpt.exercise answer 3                               where it was, and why it was wrong

An exercise is made from the op's own source: its solution is the op, and nothing is written twice.  `check` runs the
file that it is given, which is your own code.
"""

import ast
import contextlib
import difflib
import importlib.machinery
import importlib.resources
import importlib.util
import inspect
import os
import re
import shutil
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from npgpt.command import FileName, Parser, showing_all
from npgpt.errors import CheckpointError, UsageError, quoted, run_command
from npgpt.study.bugs import BUGS

PROG = "python -m npgpt.exercise"
PACKAGE = Path(__file__).resolve().parent
SOURCES = importlib.resources.files("npgpt")  # the same, be it a folder or in a zip

LEVELS = {
    1: "the backward's lines are there, but for what stands right of the =",
    2: "the forward's lines are quoted, in the order in which they are undone",
    3: "a signature, and what to return",
}


@dataclass(frozen=True)
class Exercise:
    """What of an op's file goes into an exercise; names are those of functions in it."""

    file: str  # in npgpt/ops/
    forward: tuple  # given
    backward: tuple  # blank; the last one is what is checked
    results: tuple
    topic: str
    imports: str = ""
    replaces: str = ""  # what the op calls on its way back, if not the backward's name
    exchange: tuple = ()  # ((name, name in the backward)), where forward and backward are one function

    def function(self):
        """The name of the function that a student writes."""
        return dict(self.exchange).get(self.backward[-1], self.backward[-1]).removesuffix("_ref")


EXERCISES = {
    "linear": Exercise(
        "linear", ("linear_forward_ref",), ("linear_backward_ref",), ("dx", "dweight", "dbias"),
        "two matrix products, and a sum over a broadcast axis",
    ),
    "dropout": Exercise(
        "dropout", ("dropout_ref",), ("dropout_ref",), ("dx",),
        "the same mask once more",
        "from npgpt.ops.dropout import dropout_mask_ref",
        "dropout_rows",
        (("dropout_ref", "dropout_backward_ref"), ("x", "dy"), ("y", "dx")),
    ),
    "embedding": Exercise(
        "embedding", ("embedding_forward_ref",), ("embedding_backward_ref",), ("dwte", "dwpe"),
        "a row that is looked up several times, and adding in place",
    ),
    "cross-entropy": Exercise(
        "cross_entropy", ("cross_entropy_forward_ref",), ("cross_entropy_backward_ref",), ("dlogits",),
        "softmax and logarithm in one, and rows that do not count",
    ),
    "mlp": Exercise(
        "mlp", ("gelu_ref", "mlp_forward_ref"), ("gelu_slope_ref", "mlp_backward_ref"),
        ("dx", "dw_fc", "db_fc", "dw_proj", "db_proj"),
        "the product rule in GELU's slope, and which value goes where",
        "from npgpt.ops.linear import linear_backward_ref, linear_forward_ref\nfrom npgpt.ops.mlp import A, K",
    ),
    "layernorm": Exercise(
        "layernorm", ("layernorm_forward_ref",), ("layernorm_backward_ref",), ("dx", "dweight", "dbias"),
        "one number reaches the output by three ways",
    ),
    "attention": Exercise(
        "attention", ("_scores_ref", "_softmax_ref", "_dropout_scale_ref", "attention_forward_ref"),
        ("attention_backward_ref",), ("dqkv",),
        "the softmax's gradient, between two products with two factors each",
        "from npgpt.ops.attention import merged_heads, split_heads\nfrom npgpt.ops.dropout import dropout_mask_ref",
    ),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Files with a blank backward


def exercise_text(op, level, name):
    """The file for an op; level 0 is the solution.  name: where the file will be.

    A name becomes part of the file's docstring if there is nothing in it that could end the docstring or mean something
    else there, as a backslash does.
    """
    base = Path(name).name
    name = base if re.fullmatch(r"\w[\w.-]*", base) else "FILE"
    exercise = EXERCISES[op]
    source = SOURCES.joinpath("ops", f"{exercise.file}.py").read_text(encoding="utf-8")
    nodes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    forward = ["\n".join(_lines(source, nodes[name])) for name in exercise.forward]
    backward = ["\n".join(_blank(_lines(source, nodes[name]), level)) for name in exercise.backward]
    if exercise.exchange:  # one function is both
        forward[-1] = forward[-1].replace(exercise.forward[-1], f"{exercise.file}_forward")
    for before, after in exercise.exchange:
        backward = [re.sub(rf"\b{before}\b", after, text) for text in backward]
    functions = "\n\n\n".join((*forward, *backward))
    for name_here in re.findall(r"^def (\w+)_ref\(", functions, re.MULTILINE):
        functions = re.sub(rf"\b{name_here}_ref\b", name_here, functions)
    blanks = " and ".join((*(helper.removesuffix("_ref") for helper in exercise.backward[:-1]), exercise.function()))
    imports = "import math\n\n" * ("math." in functions) + "import numpy as np\n"
    imports += f"\n{exercise.imports}\n" if exercise.imports else ""
    return f'''"""Exercise: the backward of {op}, level {level} of {len(LEVELS)}.

The forward is given.  Put code in the place of each `...` in {blanks}; it may be
more lines than there are blanks, and others.  Then

    {PROG} check {name}

compares what it returns with finite differences, says what kind of mistake a wrong result looks
like, and trains a small GPT with it.  The solution is npgpt/ops/{exercise.file}.py, with its derivation.
"""

{imports}

{functions}
'''


def _lines(source, node):
    return source.splitlines()[node.lineno - 1 : node.end_lineno]


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
    lines = list(lines)
    for statement in reversed(body):
        value = getattr(statement, "value", None)
        names_only = isinstance(statement, ast.Return) and isinstance(value, (ast.Name, ast.Tuple))
        is_memory = isinstance(value, ast.Call) and ast.unparse(value.func) == "np.empty_like"
        if value is None or names_only or is_memory or (comments and statement.lineno <= comments[0]):
            continue
        first, last = value.lineno - 1, value.end_lineno - 1
        lines[first : last + 1] = [lines[first][: value.col_offset] + "..." + lines[last][value.end_col_offset :]]
    return lines


def blank_lines(tree):
    """Numbers of the lines of a file in which there is still a `...` where code belongs.

    In dx = dweight = dbias = ... results have got a value for the time being; that line may stay.
    """
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    values = [getattr(node, "value", None) for node in statements if len(getattr(node, "targets", ())) < 2]
    return sorted({value.lineno for value in values if isinstance(value, ast.Constant) and value.value is ...})


# --------------------------------------------------------------------------------------------------------------------
# Checking


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
        self.blank = blank_lines(tree)
        self.line = {node.name: node.lineno for node in tree.body if hasattr(node, "name")}  # of a function, a class
        loader = importlib.machinery.SourceFileLoader("exercise_file", str(self.path))
        loader.get_code = lambda _: code  # not a cached one: Python knows a change by its second only
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
        sys.modules[loader.name] = module  # as of any module that is imported: dataclasses look there
        with self.running():
            loader.exec_module(module)
        found = {op: getattr(module, exercise.function(), None) for op, exercise in EXERCISES.items()}
        self.functions = {op: function for op, function in found.items() if callable(function)}
        if not self.functions:
            names = ", ".join(exercise.function() for exercise in EXERCISES.values())
            raise UsageError(f"{path} has none of the functions {names}")

    @contextlib.contextmanager
    def running(self):
        """Within this context, in which student's code runs, an exception becomes Wrong, with the line it came from."""
        try:
            yield
        except (KeyboardInterrupt, Wrong):
            raise
        except BaseException as error:  # SystemExit, and a student's own
            from npgpt.study.hints import of_exception

            frames = traceback.extract_tb(error.__traceback__)
            places = [frame.lineno for frame in frames if frame.filename == str(self.path)]
            try:
                text = str(error)
            except Exception:  # made by the student's own class
                text = "(its text cannot be made)"
            hint = of_exception(error, text)
            words = f"{type(error).__name__}: {text}" + (f" (hint: {hint})" if hint else "")
            raise Wrong(self._at(places[-1] if places else None, words) + self.still_blank("; still blank: ")) from None

    def results(self, op, arguments):
        """{name: array} of what the backward returns; None where a result is blank."""
        with self.running():
            return written(self.functions[op], EXERCISES[op], arguments)

    def check_signature(self, op, parameters):
        """Raise Wrong if the function cannot be called with these."""
        try:
            takes = inspect.signature(self.functions[op])
        except (TypeError, ValueError):  # it is not Python's, and does not tell
            return
        try:
            takes.bind(*parameters)
        except TypeError:
            name = EXERCISES[op].function()
            words = f"{name} takes {takes}, it is called with ({', '.join(parameters)})"
            raise Wrong(self._at(self.line.get(name), words)) from None

    def still_blank(self, words):
        """words, with the lines that are blank; nothing if none is."""
        return f"{words}line{'s' * (len(self.blank) > 1)} {', '.join(map(str, self.blank))}" if self.blank else ""

    def _at(self, line, words):
        return f"{self.path.name}{'' if line is None else f' line {line}'}: {' '.join(str(words).split())}"


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


def written(backward, exercise, arguments):
    """{name: array} of what a student's backward returns; None where a result is blank."""
    import numpy as np

    results = backward(*arguments)
    if results is None or results is ...:
        return dict.fromkeys(exercise.results)
    results = tuple(results) if isinstance(results, (tuple, list)) else (results,)
    if len(results) != len(exercise.results):
        raise Wrong(
            f"{exercise.function()} returns {len(results)} result{'s' * (len(results) != 1)}, "
            f"it must return {len(exercise.results)}: {', '.join(exercise.results)}"
        )
    arrays = {}
    for name, result in zip(exercise.results, results, strict=True):
        if result is None or result is ...:
            arrays[name] = None
            continue
        try:
            array = np.asarray(result)
            arrays[name] = array if np.iscomplexobj(array) else np.asarray(array, np.float64)
        except (TypeError, ValueError):
            raise Wrong(f"{exercise.function()}: {name} is a {type(result).__name__}, not an array") from None
    return arrays


def check(op, answer):
    """Print what a student's backward is worth; True if all of it is right."""
    from npgpt.study.hints import Case

    exercise = EXERCISES[op]
    _, forward, parameters = shipped(exercise)
    answer.check_signature(op, parameters)
    print(f"{op}: {exercise.function()} against finite differences")
    case = Case(op, forward, parameters, exercise.results)
    arguments = case.arguments()
    results = answer.results(op, arguments)
    right = True
    verdicts = case.compare({name: array for name, array in results.items() if array is not None})
    for name in results:
        if name not in verdicts:
            print(f"  {name:<8} blank  {answer.still_blank('see ') or 'it is None'}")
            right = False
            continue
        for verdict in verdicts[name]:
            words = f"WRONG  {verdict.wrong}" if verdict.wrong else f"ok     {verdict.error:.0e}"
            print(f"  {verdict.name:<8} {words}" + (f"\n           hint: {verdict.hint}" if verdict.hint else ""))
            right = right and not verdict.wrong
    if not right:
        if answer.blank:
            print(answer.still_blank("  still blank: "))
        return False
    changed = case.changed(arguments)
    if changed:
        print(f"  WRONG  it changes {' and '.join(changed)} in place, which others still need: work on a copy")
        return False
    from npgpt.study import training

    ours = training.train()
    theirs = training.train(in_place_of(op, answer))
    for whose, losses in (("yours", theirs), ("npgpt's", ours)):
        print(f"  a GPT after {training.STEPS} steps, with {whose + ':':<8} loss {losses[0]:.6f} -> {losses[-1]:.6f}")
    if not all(abs(a - b) <= 1e-6 * abs(b) for a, b in zip(theirs, ours, strict=True)):
        print("  WRONG  in a GPT it makes another gradient: does it hold for other shapes, and for other numbers, too?")
        return False
    print(f"passed: {op}")
    return True


def shipped(exercise):
    """(the module of an op, its forward, the names of the parameters of its backward)."""
    module = importlib.import_module(f"npgpt.ops.{exercise.file}")
    code = getattr(module, exercise.backward[-1]).__code__
    names = dict(exercise.exchange)
    parameters = [names.get(name, name) for name in code.co_varnames[: code.co_argcount]]
    return module, getattr(module, exercise.forward[-1]), parameters


# --------------------------------------------------------------------------------------------------------------------
# A GPT that goes back by what a student wrote


def in_place_of(op, answer):
    """A context in which the op goes back by the student's function, called as the op calls its own."""
    import numpy as np

    from npgpt.gradcheck import replaced

    exercise = EXERCISES[op]
    module, _, parameters = shipped(exercise)

    def adapter(*arguments):  # the outputs come first; those that are added to in place are inputs as well
        results = answer.results(op, arguments[len(arguments) - len(parameters) :])
        for out, (name, result) in zip(arguments, results.items(), strict=False):
            where = f"{exercise.function()}: in a GPT"
            if result is None:
                raise Wrong(f"{where} it returns None for {name}")
            if out is None:  # the gradient of a bias where there is none
                continue
            if result.shape != out.shape:
                raise Wrong(f"{where} {name} has shape {result.shape}, not {out.shape}")
            if np.iscomplexobj(result):
                raise Wrong(f"{where} {name} is complex, and a gradient is real")
            out[...] = result

    return lambda: replaced(module, exercise.replaces or exercise.function(), adapter)


# --------------------------------------------------------------------------------------------------------------------
# Bugs to find


def bug(number):
    """The Fault of this number."""
    if not 1 <= number <= len(BUGS):
        raise UsageError(f"bug: there are bugs 1 to {len(BUGS)}, got {number}")
    return BUGS[number - 1]


def right_source(fault):
    """The text of the file into which a fault is planted, where it has not been."""
    text = SOURCES.joinpath(*fault.file.split("/")[1:]).read_text(encoding="utf-8")
    if text.count(fault.before) != 1:
        raise UsageError("this npgpt is a copy with a mistake in it, or has been changed; ask in another folder")
    return text


def plant(fault, folder):
    """Copy the package's sources into folder/npgpt, with the fault in them: all of it or nothing."""
    for number in range(1, len(BUGS) + 1):
        right_source(bug(number))  # two mistakes at a time are one too many
    sources = dict(_contents(SOURCES, "npgpt"))
    sources[fault.file] = right_source(fault).replace(fault.before, fault.after).encode("utf-8")
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UsageError(f"{folder} exists; remove it, or choose another folder with --dir") from None
    except OSError as error:
        raise CheckpointError(f"cannot make {folder}: {error.strerror}") from None
    try:
        for name, text in sources.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"cannot write {path}: {error.strerror}") from None
        raise


def _contents(place, name):
    """(name, content) of all sources in a folder of the package, which is called `name`."""
    for part in place.iterdir():
        if part.is_dir():
            yield from _contents(part, f"{name}/{part.name}")
        elif part.name.endswith((".py", ".html")):
            yield f"{name}/{part.name}", part.read_bytes()


def with_kernels(kernels, command):
    """A command line under an NPGPT_KERNELS, for this system's shell."""
    if kernels == "numba":
        return command
    return f"set NPGPT_KERNELS={kernels}&& {command}" if os.name == "nt" else f"NPGPT_KERNELS={kernels} {command}"


# --------------------------------------------------------------------------------------------------------------------
# Command line


def run_list(args):
    print(f"{'op':<14} {'solution':<28} what is in it")
    for op, exercise in EXERCISES.items():
        print(f"{op:<14} {f'npgpt/ops/{exercise.file}.py':<28} {exercise.topic}")
    print("\nlevels:")
    for level, words in LEVELS.items():
        print(f"  {level}  {words}")
    print(f"\n{PROG} show OP [--level N] --out FILE, then check FILE; and {len(BUGS)} bugs to find: bug N")
    return 0


def run_show(args):
    op = args.op.lower().replace("_", "-")
    if op not in EXERCISES:
        close = difflib.get_close_matches(op, EXERCISES, 1)
        raise UsageError(
            f"show: there is no exercise {args.op!r}" + (f"; did you mean {close[0]}?" if close else "")
            + f" (there are {', '.join(EXERCISES)})"
        )  # fmt: skip
    if args.level not in LEVELS:
        raise UsageError(f"--level must be 1, 2 or 3, got {args.level}")
    text = exercise_text(op, args.level, args.out or f"{EXERCISES[op].file}.py")
    if args.out is None:
        print(text, end="")
        return 0
    try:
        open(args.out, "x").close()  # from now on the name is ours
    except FileExistsError:
        raise UsageError(f"--out: {args.out} exists, and may hold your work; choose another name") from None
    except OSError as error:
        raise UsageError(f"--out: cannot write {args.out}: {error.strerror}") from None
    from npgpt.files.checkpoint import replace

    try:
        replace(args.out, [text.encode("utf-8")])
    except BaseException:
        os.unlink(args.out)
        raise
    print(f"{args.out}: {op}, level {args.level}; when the blanks are filled:  {PROG} check {quoted(args.out)}")
    return 0


def run_check(args):
    try:
        with imports_beside(args.file):
            answer = Answer(Path(args.file))
            right = [check(op, answer) for op in answer.functions]
        return 0 if all(right) else 1
    except Wrong as error:
        print(error)
        return 1


def run_bug(args):
    if args.number is None:
        print(f"there are {len(BUGS)} bugs, from easy to hard:  {PROG} bug 1  plants the first one")
        return 0
    fault, folder = bug(args.number), Path(args.dir or f"bug-{args.number}")
    plant(fault, folder)
    command = with_kernels(fault.kernels, "python -m npgpt.gradcheck")
    print(f"{folder / 'npgpt'} is a copy of npgpt with a mistake in how gradients are made.  Find it:\n")
    print(f"  cd {quoted(folder)}")
    print(f"  {command}\n")
    print("That compares each gradient with finite differences; a word after it, such as linear, checks one op alone.")
    print("Which op is wrong, which of its inputs, which entries?  And what does the mistake do to training?")
    print("Compare the losses in that folder with those in the one you are in; often they are nearly the same.  (And")
    print("just the same if that training never comes to what is wrong: it has no targets of -1, for one.)\n")
    print(f"  {with_kernels(fault.kernels, 'python -m npgpt.exercise train')}\n")
    print("Its first line says whose npgpt runs: in that folder, the copy.")
    if fault.kernel:
        print("The mistake is in a compiled kernel: with NPGPT_KERNELS=numpy, where kernels do not run, it is gone.")
    else:
        print("With NPGPT_KERNELS=numpy all of it is plain NumPy: a debugger stops in it, and any line can print.")
    print(f"\nTo see where it was, go back to this folder:  {PROG} answer {args.number}")
    return 0


def run_answer(args):
    fault = bug(args.number)
    right = right_source(fault)
    wrong = right.replace(fault.before, fault.after)
    print(f"bug {args.number} is in {fault.file}; - is the mistake, + is how it must be:\n")
    for line in list(difflib.unified_diff(wrong.splitlines(), right.splitlines(), lineterm="", n=2))[2:]:
        print(line)
    print(f"\n{fault.why}")
    return 0


def run_train(args):
    from npgpt.study.training import train

    losses = train()
    print(f"{PACKAGE}: a small GPT's loss, step by step")
    print(" ".join(f"{loss:.4f}" for loss in losses))
    return 0


def parse(argv):
    parser = Parser(prog=PROG, description="Write backwards yourself, and find mistakes in them.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name, run, text):
        part = commands.add_parser(name, help=text, description=text)
        part.set_defaults(run=run)
        return part

    command("list", run_list, "the exercises and their levels")
    show = command("show", run_show, "an exercise: a file with the forward given and the backward blank")
    show.add_argument("op", metavar="OP", help=", ".join(EXERCISES))
    show.add_argument("--level", type=int, default=2, metavar="N", help="1, the easiest, to 3 (default: 2)")
    show.add_argument("--out", type=FileName, metavar="FILE", help="write it there; without it, it is printed")
    check = command("check", run_check, "run a filled in exercise against finite differences, and train a GPT with it")
    check.add_argument("file", type=FileName, metavar="FILE", help="your file; its code is run")
    bug = command("bug", run_bug, "plant a mistake in a copy of npgpt, for you to find")
    bug.add_argument("number", metavar="N", nargs="?", type=int, help=f"1, the easiest, to {len(BUGS)}")
    bug.add_argument("--dir", type=FileName, metavar="FOLDER", help="where to put the copy (default: bug-N)")
    answer = command("answer", run_answer, "where the mistake was, and why it is one")
    answer.add_argument("number", metavar="N", type=int, help="the bug's number")
    command("train", run_train, "the losses of a small GPT: to see what a bug does to training")
    if argv and argv[0] in commands.choices:  # which knows its own flags, and what was meant by a wrong one
        return commands.choices[argv[0]].parse_args(argv[1:])
    if argv and not argv[0].startswith("-"):
        close = difflib.get_close_matches(argv[0], commands.choices, 1)
        parser.error(f"there is no command {argv[0]!r}" + (f"; did you mean {close[0]}?" if close else ""))
    return parser.parse_args(argv)


@showing_all()
def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)
    return args.run(args)


if __name__ == "__main__":
    run_command(PROG, main)
