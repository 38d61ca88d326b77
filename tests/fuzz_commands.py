"""Random command lines: whatever is typed, a command ends with a documented exit code and a line, and loses nothing.

    python tests/fuzz_commands.py [--short] [--seed 1]      500 lines, or 60; exit code 1 if there is a finding

Each line runs in a process of its own, forked from this one (so on Linux only), in a copy of a small folder, with 20 s
and 2 GB at most.
Flags and their kinds are those of the parsers; values are good ones for the flag, or from a list of nasty ones.  What
would train makes one update.  Left out is what downloads, and --force.

A finding is: a traceback, a signal, a warning of Python's; an exit code that npgpt/errors.py does not have; 1 from what
checks nothing; an error in other than one line; a file that has changed or is new, but is not what the line names.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["NPGPT_KERNELS"] = "numpy"  # nothing is compiled, so a line takes a fraction of a second

from npgpt import GPT, exercise, explain, gradcheck, plot, sample, train  # noqa: E402
from npgpt.command import Parser  # noqa: E402
from npgpt.errors import run_command  # noqa: E402
from npgpt.study.lesson import exercise_text  # noqa: E402
from npgpt.study.lessons import LESSONS  # noqa: E402

SECONDS, BYTES = 20, 2 * 10**9
ALL = {"train": train, "sample": sample, "explain": explain, "plot": plot, "exercise": exercise, "gradcheck": gradcheck}
# what commands load when they need it
LATER = "run.trainer generate.sampling files.hub files.pretrained study.page study.plots study.receipt study.hints"
CHECKS = {"gradcheck", "explain", "exercise"}  # may end with 1
CODES = {0, 2, 3, 4, 5, 6}
PARTS = ["list", "show", "check", "next", "bug", "answer"]  # of exercise; report runs what is in a folder, even in /
WRITES = {  # by default
    "train": {"out"}, "explain": {"explain.html"}, "exercise": {"progress.json", *(f"bug-{n}" for n in range(100))},
}  # fmt: skip
TEXT = "to be, or not to be: that is the question.\n" * 40
TINY = (
    "--data text.txt --n-layer 1 --n-head 2 --n-embd 16 --block-size 8 --batch-size 4 --eval-iters 1 --sample-tokens 2 "
    "--final-sample-tokens 2 --eval-interval 4"
).split()
ONE_UPDATE = ["--max-iters", "1"]

NASTY = (
    "", "--", "-", "~", "~/new", "~nobody/x", "NaN", "inf", "1e400", "-1", "0", "1e-320", "None", "True", "9" * 400,
    "x" * 10_000, "a\0b", "日本語", "ﷺ\u202e", "１２", "\udc80", "run", "hub", "text.txt", "text.txt/below", "run/lock",
    "an 'odd\" $name", "two\nlines", "empty", "empty.txt", "/", "/dev/null", "/nowhere/at/all", ".", "..", "-x", "*",
    "%s", "{0}", "a\r\nb", "run/iter-00000002.safetensors", "utf16.txt", "binary",
)  # fmt: skip
GOOD = {
    "--data": ["text.txt", "utf16.txt", "text.txt run", "."], "--tokenizer": ["char", "byte", "text.txt", "hub"],
    "--out-dir": ["run", "new", "an 'odd\" $name/new", "~/new"], "--model": ["run", "hub"], "--init-from": ["run"],
    "--resume": ["", "run", "run/iter-00000002.safetensors"], "--preset": ["default"], "--vocab-size": ["300"],
    "--checkpoint": ["best", "last", "iter-00000002.safetensors"], "--prompt": ["to be", "日"], "--text": ["to be"],
    "--prompt-file": ["text.txt", "-"], "--start": ["to be", "FILE:text.txt"], "--stop": ["\n", "e"], "--level": "123",
    "--max-new-tokens": ["1", "9"], "--num-samples": ["1", "3"], "--threads": ["1", "3"], "--workers": ["1", "2"],
    "--out": ["new.svg", "new.html", "new.py", "run/new.svg", "two\nlines/new.svg"], "--attention": ["to be"],
    "--param": ["wte[1,2]", "wte[1]", "h.0.ln_1.weight[3]", "x[1,2]"], "--optimizer": ["adamw", "muon"],
    "--dir": ["new"], "--draft": ["0", "4"], "--n-head": ["1", "2"],
}  # fmt: skip
NUMBERS = ["0", "1", "2", "0.5", "3", "1e-3", "8"]
NEVER = {"--force", "--max-iters", "--epochs", "--help", "-h", "--version"}
LONG = {"--max-new-tokens", "--num-samples", "--sample-tokens", "--final-sample-tokens", "--seed"}  # not nasty
ARGUMENTS = {
    "plot": ["run", "hub", "run run", "two\nlines"], "gradcheck": ["neg", "add", "nothing such", "sqrt log"],
    "list": [""], "show": ["mlp", "linear", "mpl", "cross_entropy"], "check": ["linear.py", "blank.py", "text.txt"],
    "bug": ["1", "22", "23", ""], "answer": ["1", "0"], "next": [".", "run"],
    "train": ["config/train_gpt2.py", "text.txt"],
}  # fmt: skip


class Captured(Exception):
    pass


def parser_of(module, argv):
    """The Parser with which a command reads its flags."""

    def capture(self, args=None):
        raise Captured(self)

    original, Parser.parse_args = Parser.parse_args, capture
    try:
        (module.parse if hasattr(module, "parse") else module.main)(argv)
    except Captured as found:
        return found.args[0]
    finally:
        Parser.parse_args = original


def a_line(rng, parsers):
    """(command, arguments) at random."""
    name = rng.choice([*ALL, "sample", "train"])
    argv = list(TINY) if name == "train" else []
    part = rng.choice(PARTS) if name == "exercise" else name
    actions = [
        action for action in parsers[part]._actions
        if action.option_strings and not NEVER & set(action.option_strings)
    ]  # fmt: skip
    for action in rng.sample(actions, min(len(actions), rng.choice([0, 1, 1, 2, 2, 3, 5]))):
        flag = rng.choice(action.option_strings)
        if action.nargs == 0:
            argv.append(flag)
            continue
        good = GOOD.get(action.option_strings[0]) or NUMBERS
        value = rng.choice(good) if action.option_strings[0] in LONG or rng.random() < 0.6 else rng.choice(NASTY)
        argv += [f"{flag}={value}"] if rng.random() < 0.7 else [flag, value]
        if rng.random() < 0.1:
            argv[-1] = argv[-1].replace("-", "_")
    if part in ARGUMENTS and (part != "train" or rng.random() < 0.1):
        value = rng.choice(ARGUMENTS[part]) if rng.random() < 0.7 else rng.choice(NASTY)
        argv += value.split(" ") if value in ARGUMENTS[part] else [value]
    if name == "train":
        argv += ONE_UPDATE
    if rng.random() < 0.03:
        argv.insert(rng.randrange(len(argv) + 1), rng.choice(NASTY))
        argv += ONE_UPDATE if name == "train" else []
    if name == "exercise":
        argv.insert(0, part if rng.random() < 0.95 else rng.choice(NASTY))
    return name, argv


def make(folder):
    """The folder that each line gets a copy of."""
    for name in ("an 'odd\" $name", "two\nlines", "empty", "home"):
        (folder / name).mkdir()
    for name, raw in (
        ("text.txt", TEXT.encode()), ("utf16.txt", TEXT.encode("utf-16")), ("empty.txt", b""),
        ("binary", bytes(range(256)) * 4), ("two\nlines/text.txt", TEXT.encode()),
        ("linear.py", exercise_text(LESSONS["linear"], 0, "linear.py").encode()),
        ("blank.py", exercise_text(LESSONS["linear"], 2, "blank.py").encode()),
    ):  # fmt: skip
        (folder / name).write_bytes(raw)
    with contextlib.redirect_stdout(io.StringIO()):
        tiny = [part.replace("text.txt", str(folder / "text.txt")) for part in TINY]
        train.main([*tiny, "--max-iters", "2", "--out-dir", str(folder / "run")])
    GPT.from_pretrained(folder / "run").save_pretrained(folder / "hub")


def state(folder):
    """path -> hash of the content of all files, None for folders."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).digest() if path.is_file() else None
        for path in folder.rglob("*")
    }


def run(name, argv, folder):
    """(exit status, standard output, standard error, seconds) of a command line in a folder."""
    began = time.monotonic()
    child = os.fork()
    if not child:
        code = 99
        try:
            os.chdir(folder)
            os.environ["HOME"] = str(folder / "home")
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
            for number, path in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder.parent / path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
            sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            module = ALL[name]
            try:
                run_command(f"python -m npgpt.{name}", lambda: module.main(argv))
            except SystemExit as done:
                code = done.code or 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
        finally:
            os._exit(code)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - began > SECONDS:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    out, err = ((folder.parent / path).read_text(encoding="utf-8", errors="replace") for path in ("out", "err"))
    return os.waitstatus_to_exitcode(status), out, err, time.monotonic() - began


def findings(name, argv, code, out, err, changed):
    """Words for all that must not be."""
    if code < 0:
        yield f"signal {-code}"
    if "Traceback" in err or "Traceback" in out or code == 99:
        yield "a traceback"
    elif code not in CODES and not (code == 1 and name in CHECKS and (out or err)):
        yield f"exit code {code}"
    if re.search(r"\w*Warning:", err):
        yield "a warning"
    lines = err.splitlines()
    said = [line.startswith(f"python -m npgpt.{name}: ") for line in lines]
    if (not all(said) and "--interactive" not in argv) or (code in CODES - {0} and not lines):
        yield "an error that is not one line"
    if code == 2 and len(lines) > 3:
        yield f"{len(lines)} lines"
    parts = [part.replace("~", "home") for arg in argv for part in (arg, arg.partition("=")[2]) if part]
    named = set(map(os.path.normpath, parts))
    for path in sorted(changed):
        top = Path(path).parts[0]
        ours = name == "plot" and path.endswith(".svg")
        ours |= any(path == one or path.startswith(f"{one}/") or one.startswith(f"{path}/") for one in named)
        ours |= name == "plot" and os.path.dirname(path) in named
        if not (ours or top in WRITES.get(name, ())) or name in ("sample", "gradcheck") or code == 2:
            yield f"{path!r} has changed or is new"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_const", dest="count", const=60, default=500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng, counts, bad = random.Random(args.seed), {}, 0
    for module in LATER.split():
        importlib.import_module(f"npgpt.{module}")
    parsers = {name: parser_of(module, []) for name, module in ALL.items() if name != "exercise"}
    parsers |= {part: parser_of(exercise, [part]) for part in PARTS}
    with tempfile.TemporaryDirectory() as work:
        source = Path(work, "source")
        source.mkdir()
        make(source)
        before = state(source)
        for n in range(args.count):
            name, argv = a_line(rng, parsers)
            folder = Path(work, f"{n}", "here")
            shutil.copytree(source, folder)
            code, out, err, seconds = run(name, argv, folder)
            after = state(folder)
            changed = {path for path in before.keys() | after.keys() if before.get(path, 0) != after.get(path, 0)}
            counts[code] = counts.get(code, 0) + 1
            for words in findings(name, argv, code, out, err, changed):
                bad += 1
                print(f"{n}: {words}: npgpt.{name} {shlex.join(argv)[:600]!r} (exit {code}, {seconds:.1f} s)")
                print("    " + "\n    ".join(err[-1500:].splitlines()), flush=True)
            shutil.rmtree(folder.parent)
    print(f"{args.count} command lines, seed {args.seed}: {bad} findings; exit codes {dict(sorted(counts.items()))}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
