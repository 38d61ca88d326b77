"""Backwards to write yourself, and mistakes in them to find: python -m npgpt.exercise list|show|check|next|...

    python -m npgpt.exercise show layernorm --out layernorm.py      the forward is given, the backward is blank
    python -m npgpt.exercise check layernorm.py [--more]            finite differences, hints, and a GPT trained with it
    python -m npgpt.exercise next                                   what to do next: what was missed first
    python -m npgpt.exercise report class/                          for teachers: who is stuck where
    python -m npgpt.exercise bug 3                                  a copy of npgpt with a mistake in it: find it
    python -m npgpt.exercise answer 3                               where it was, and why it was wrong

`check` runs the file that it is given, which is your own code, and `report` runs those of a class, each in a process of
its own.  What is behind this is in study/.
"""

import difflib
import os
import sys
from pathlib import Path

from npgpt.command import FileName, Parser, say_if_elsewhere, showing_all
from npgpt.errors import NpgptError, UsageError, quoted, run_command, told_as
from npgpt.study.bugs import BUGS, bug, plant, right_source
from npgpt.study.lesson import LEVELS, PROG, exercise_text
from npgpt.study.lessons import LESSONS

PACKAGE = Path(__file__).resolve().parent


def with_kernels(kernels, command):
    """A command line under an NPGPT_KERNELS, for this system's shell."""
    if kernels == "numba":
        return command
    return f"set NPGPT_KERNELS={kernels}&& {command}" if os.name == "nt" else f"NPGPT_KERNELS={kernels} {command}"


def run_list(args):
    print(f"{'op':<14} {'derived in':<29} what is in it")
    for op, lesson in LESSONS.items():
        print(f"{op:<14} {lesson.chapter:<29} {lesson.topic}")
    print("\nlevels:")
    for level, words in LEVELS.items():
        print(f"  {level}  {words}")
    print(f"\n{PROG} show OP [--level N] --out FILE, then check FILE; and {len(BUGS)} bugs to find: bug N")


def run_show(args):
    op = args.op.lower().replace("_", "-")
    if op not in LESSONS:
        close = difflib.get_close_matches(op, LESSONS, 1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise UsageError(f"show: there is no exercise {args.op!r}{meant} (there are {', '.join(LESSONS)})")
    if args.level not in LEVELS:
        raise UsageError(f"--level must be 1, 2 or 3, got {args.level}")
    text = exercise_text(LESSONS[op], args.level, args.out or f"{LESSONS[op].file}.py")
    if args.out is None:
        print(text, end="")
        return
    with told_as(UsageError, f"--out: cannot write {args.out}"):
        try:
            open(args.out, "x").close()  # from now on the name is ours
        except FileExistsError:
            raise UsageError(f"--out: {args.out} exists, and may hold your work; choose another name") from None
    from npgpt.files.checkpoint import replace

    try:
        replace(args.out, [text.encode("utf-8")])
    except BaseException:
        os.unlink(args.out)
        raise
    print(f"{args.out}: {op}, level {args.level}; when the blanks are filled:  {PROG} check {quoted(args.out)}")


def run_check(args):
    from npgpt.study import progress
    from npgpt.study.check import check_file

    outcomes = check_file(args.file, print, args.more)
    try:
        progress.record(args.file, [outcome for outcome in outcomes if outcome.op])
    except NpgptError as error:  # what was checked is said all the same
        print(f"(not kept: {error})")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def run_next(args):
    from npgpt.study.progress import next_step

    if not os.path.isdir(args.folder):
        raise UsageError(f"there is no folder {args.folder}")
    print(*next_step(args.folder), sep="\n")


def run_report(args):
    from npgpt.study import report

    if not 0 < args.seconds < 1e6:
        raise UsageError(f"--seconds must be above 0, got {args.seconds:g}")
    rows = report.rows_of(args.folder, args.seconds)
    print(report.as_json(rows) if args.json else "\n".join(report.as_text(rows)))
    return 0 if all(row.state == "right" for row in rows) else 1


def run_bug(args):
    if args.number is None:
        print(f"there are {len(BUGS)} bugs, from easy to hard:  {PROG} bug 1  plants the first one")
        return
    fault, folder = bug(args.number), Path(args.dir or f"bug-{args.number}")
    plant(fault, folder)
    print(f"{folder / 'npgpt'} is a copy of npgpt with a mistake in how gradients are made.  Find it:\n")
    print(f"  cd {quoted(folder)}\n  {with_kernels(fault.kernels, 'python -m npgpt.gradcheck')}\n")
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


def run_answer(args):
    fault = bug(args.number)
    right = right_source(fault)
    wrong = right.replace(fault.before, fault.after)
    print(f"bug {args.number} is in {fault.file}; - is the mistake, + is how it must be:\n")
    lines = [*difflib.unified_diff(wrong.splitlines(), right.splitlines(), lineterm="", n=2)][2:]
    print(*lines, f"\n{fault.why}", sep="\n")


def run_train(args):
    from npgpt.kernels.jit import KERNELS
    from npgpt.study.check import train

    losses = train()
    print(f"{PACKAGE}: a small GPT's loss, step by step")
    print(" ".join(f"{loss:.4f}" for loss in losses))
    say_if_elsewhere(KERNELS)


def parse(argv):
    parser = Parser(prog=PROG, description="Write backwards yourself, and find mistakes in them.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name, run, text):
        part = commands.add_parser(name, help=text, description=text)
        part.set_defaults(run=run)
        return part

    command("list", run_list, "the exercises and their levels")
    show = command("show", run_show, "an exercise: a file with the forward given and the backward blank")
    show.add_argument("op", metavar="OP", help=", ".join(LESSONS))
    show.add_argument("--level", type=int, default=2, metavar="N", help="1, the easiest, to 3 (default: 2)")
    show.add_argument("--out", type=FileName, metavar="FILE", help="write it there; without it, it is printed")
    check = command("check", run_check, "run a filled in exercise against finite differences, and train a GPT with it")
    check.add_argument("file", type=FileName, metavar="FILE", help="your file; its code is run")
    words = "one more rung of the hints: which line; given twice, which kind of mistake, too"
    check.add_argument("--more", action="count", default=0, help=words)
    following = command("next", run_next, "what to do next: what was missed first, then what was not tried")
    following.add_argument("folder", metavar="FOLDER", nargs="?", type=FileName, default=".", help="yours (default: .)")
    report = command(
        "report", run_report,
        "for teachers: who is stuck where. It RUNS the code of all files FOLDER/NAME.py and FOLDER/NAME/*.py, each in "
        "a process of its own, with 2 GB of memory where the system can limit that; exit code 1 if one is not right",
    )  # fmt: skip
    report.add_argument("folder", metavar="FOLDER", type=FileName, help="your students' files")
    report.add_argument("--json", action="store_true", help="print it as JSON")
    report.add_argument("--seconds", type=float, default=60, metavar="N", help="for each file (default: 60)")
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
    return args.run(args) or 0  # 0, too, if a command has nothing to find wrong


if __name__ == "__main__":
    run_command(PROG, main)
