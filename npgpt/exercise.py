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
import importlib.util
import os
import re
import shutil
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from npgpt.errors import UsageError, run_command
from npgpt.faults import BUGS, FAULTS
from npgpt.train import Parser, show_all

PROG = "python -m npgpt.exercise"
PACKAGE = Path(__file__).resolve().parent

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
        "attention", ("_scores_ref", "_dropout_scale_ref", "attention_forward_ref"), ("attention_backward_ref",),
        ("dqkv",),
        "the softmax's gradient, between two products with two factors each",
        "from npgpt.ops.attention import merged_heads, split_heads\nfrom npgpt.ops.dropout import dropout_mask_ref",
    ),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Files with a blank backward


def exercise_text(op, level, name):
    """The file for an op; level 0 is the solution.  name: what the file will be called."""
    exercise = EXERCISES[op]
    source = (PACKAGE / "ops" / f"{exercise.file}.py").read_text(encoding="utf-8")
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
            self.blank = blank_lines(ast.parse(path.read_bytes()))
        except (SyntaxError, ValueError) as error:  # ValueError: bytes that no source has
            raise Wrong(self._at(getattr(error, "lineno", None), getattr(error, "msg", error))) from None
        loader = importlib.machinery.SourceFileLoader("exercise_file", str(self.path))
        module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
        before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # Python knows a change by its second only
        try:
            with self.running():
                loader.exec_module(module)
        finally:
            sys.dont_write_bytecode = before
        found = {op: getattr(module, exercise.function(), None) for op, exercise in EXERCISES.items()}
        self.functions = {op: function for op, function in found.items() if callable(function)}
        if not self.functions:
            names = ", ".join(exercise.function() for exercise in EXERCISES.values())
            raise UsageError(f"{path} has none of the functions {names}")

    @contextlib.contextmanager
    def running(self):
        """Within this context an exception in the student's code becomes Wrong, with the line that it came from."""
        try:
            yield
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)
            places = [frame.lineno for frame in frames if frame.filename == str(self.path)]
            if isinstance(error, Wrong) or not places:
                raise  # it is not the student's
            from npgpt.hints import of_exception

            hint = of_exception(error)
            words = f"{type(error).__name__}: {error}" + (f" (hint: {hint})" if hint else "")
            raise Wrong(self._at(places[-1], words) + self.still_blank("; still blank: ")) from None

    def still_blank(self, words):
        """words, with the lines that are blank; nothing if none is."""
        return f"{words}line{'s' * (len(self.blank) > 1)} {', '.join(map(str, self.blank))}" if self.blank else ""

    def _at(self, line, words):
        return f"{self.path.name}{'' if line is None else f' line {line}'}: {' '.join(str(words).split())}"


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
            arrays[name] = np.asarray(result, np.float64)
        except (TypeError, ValueError):
            raise Wrong(f"{exercise.function()}: {name} is a {type(result).__name__}, not an array") from None
    return arrays


def check(op, answer):
    """Print what a student's backward is worth; True if all of it is right."""
    from npgpt.hints import Case

    exercise, backward = EXERCISES[op], answer.functions[op]
    _, forward, parameters = shipped(exercise)
    print(f"{op}: {exercise.function()} against finite differences")
    case = Case(op, forward, parameters, exercise.results)
    arguments = case.arguments()
    with answer.running():
        results = written(backward, exercise, arguments)
    right = True
    for name, array in results.items():
        if array is None:
            print(f"  {name:<8} blank  {answer.still_blank('see ') or 'it is None'}")
            right = False
            continue
        for verdict in case.compare(name, array):
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
    ours = train()
    with answer.running():
        theirs = train(in_place_of(exercise, backward))
    for whose, losses in (("yours", theirs), ("npgpt's", ours)):
        print(f"  a GPT after {STEPS} steps, with {whose + ':':<8} loss {losses[0]:.6f} -> {losses[-1]:.6f}")
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
# A GPT that is trained for some steps, on the source of this file

STEPS = 12


@contextlib.contextmanager
def _replaced(module, name, function):
    before = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, before)


def in_place_of(exercise, backward):
    """A context in which the op goes back by the student's function, called as the op calls its own."""
    import numpy as np

    module, _, parameters = shipped(exercise)

    def adapter(*arguments):  # the outputs come first; those that are added to in place are inputs as well
        results = written(backward, exercise, arguments[len(arguments) - len(parameters) :])
        for out, (name, result) in zip(arguments, results.items(), strict=False):
            if np.shape(result) != out.shape:
                raise Wrong(f"{exercise.function()}: in a GPT {name} has shape {np.shape(result)}, not {out.shape}")
            out[...] = result

    return lambda: _replaced(module, exercise.replaces or exercise.function(), adapter)


def train(backward_context=contextlib.nullcontext):
    """The losses of a small GPT's first steps; each backward runs inside of backward_context()."""
    import numpy as np

    from npgpt.config import GPTConfig
    from npgpt.engine import random_stream
    from npgpt.model import GPT
    from npgpt.optim import AdamW, FlatParameters

    text = Path(__file__).read_text(encoding="utf-8")
    characters = sorted(set(text))
    tokens = np.array([characters.index(c) for c in text])
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


# --------------------------------------------------------------------------------------------------------------------
# Bugs to find


def bug(number):
    """The Fault of this number."""
    if not 1 <= number <= len(BUGS):
        raise UsageError(f"bug: there are bugs 1 to {len(BUGS)}, got {number}")
    (fault,) = (fault for fault in FAULTS if fault.name == BUGS[number - 1])
    return fault


def plant(fault, folder):
    """Copy the package's sources into folder/npgpt, with the fault in them."""
    if folder.exists():
        raise UsageError(f"{folder} exists; remove it, or choose another folder with --dir")
    shutil.copytree(PACKAGE, folder / "npgpt", ignore=lambda _, names: {n for n in names if not _is_source(n)})
    file = folder / fault.file
    file.write_text(file.read_text(encoding="utf-8").replace(fault.before, fault.after), encoding="utf-8")


def _is_source(name):
    return name.endswith((".py", ".html")) or ("." not in name and name != "__pycache__")


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
        with open(args.out, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"--out: {args.out} exists, and may hold your work; choose another name") from None
    except OSError as error:
        raise UsageError(f"--out: cannot write {args.out}: {error.strerror}") from None
    print(f"{args.out}: {op}, level {args.level}; when the blanks are filled:  {PROG} check {args.out}")
    return 0


def run_check(args):
    try:
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
    print(f"  cd {folder}")
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
    right = (PACKAGE.parent / fault.file).read_text(encoding="utf-8")
    if right.count(fault.before) != 1:
        raise UsageError("answer: this npgpt is the copy with the mistake; ask in another folder")
    wrong = right.replace(fault.before, fault.after)
    print(f"bug {args.number} is in {fault.file}; - is the mistake, + is how it must be:\n")
    for line in list(difflib.unified_diff(wrong.splitlines(), right.splitlines(), lineterm="", n=2))[2:]:
        print(line)
    print(f"\n{fault.why}")
    return 0


def run_train(args):
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
    show.add_argument("--out", metavar="FILE", help="write it there; without it, it is printed")
    check = command("check", run_check, "run a filled in exercise against finite differences, and train a GPT with it")
    check.add_argument("file", metavar="FILE", help="your file; its code is run")
    bug = command("bug", run_bug, "plant a mistake in a copy of npgpt, for you to find")
    bug.add_argument("number", metavar="N", nargs="?", type=int, help=f"1, the easiest, to {len(BUGS)}")
    bug.add_argument("--dir", metavar="FOLDER", help="where to put the copy (default: bug-N)")
    answer = command("answer", run_answer, "where the mistake was, and why it is one")
    answer.add_argument("number", metavar="N", type=int, help="the bug's number")
    command("train", run_train, "the losses of a small GPT: to see what a bug does to training")
    if argv and argv[0] in commands.choices:  # which knows its own flags, and what was meant by a wrong one
        return commands.choices[argv[0]].parse_args(argv[1:])
    if argv and not argv[0].startswith("-"):
        close = difflib.get_close_matches(argv[0], commands.choices, 1)
        parser.error(f"there is no command {argv[0]!r}" + (f"; did you mean {close[0]}?" if close else ""))
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)
    show_all()
    return args.run(args)


if __name__ == "__main__":
    run_command(PROG, main)
