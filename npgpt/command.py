"""What the commands share: how they read flags, what a console can show, and the model that they are asked about."""

import argparse
import contextlib
import difflib
import errno
import re
import sys
from pathlib import Path

from npgpt.errors import UsageError, user_path

# nanoGPT's flags that npgpt has not -> the one value that says what happens here anyway, and what to write instead
NANOGPT = {
    "device": ("cpu", ""),
    "compile": ("False", ""),
    "eval-only": ("False", "python -m npgpt.train --init-from MODEL --max-iters 0 evaluates a model"),
}

PLANTED = "planted.txt"  # in a copy of npgpt that `npgpt.exercise bug` made: which NPGPT_KERNELS its mistake runs with


class FileName(str):
    """The type of a flag that names a file or folder."""


class Parser(argparse.ArgumentParser):
    """Reads flags, and is the one place where what argparse hands over becomes a value.

    - A wrong flag is answered with one line, which names the flag that may have been meant; --a_b=c is --a-b=c.
    - A FileName has the home folder in the place of its ~, and is not empty.  Line ends in a text are \\n.
    - A flag of nanoGPT's that there is not (nanogpt: as NANOGPT) is passed over if its value changes nothing here, and
      otherwise answered with what to write.
    """

    def __init__(self, nanogpt=None, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self._nanogpt = nanogpt or {}
        for name in self._nanogpt:
            self.add_argument(f"--{name}", nargs="?", const="True", dest=f"nanogpt {name}", help=argparse.SUPPRESS)

    def error(self, message):
        raise UsageError(f"{message} (--help lists all flags)")

    def parse_args(self, args=None):
        args = sys.argv[1:] if args is None else args
        end = args.index("--") if "--" in args else len(args)  # behind it there are no flags
        for arg in args[:end]:
            if re.fullmatch("--[^=]+=--", arg):  # what argparse makes of it depends on Python's version
                self.error(f"{arg}: a value cannot be --, which ends the flags; of a file's name write ./--")
        flags = [re.sub("^--[^=]*", lambda name: name[0].replace("_", "-"), arg) for arg in args[:end]]
        parsed, unknown = self.parse_known_args([*flags, *args[end:]])
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
            self.error(f"unknown argument {unknown[0]}" + (f"; did you mean {close[0]}?" if close else ""))
        for name, (only, words) in self._nanogpt.items():
            value = vars(parsed).pop(f"nanogpt {name}")
            if value is not None and value.lower() != only.lower():
                can = f"can only be {only} here, got {value}" if only else "is a flag of nanoGPT's"
                raise UsageError(f"--{name} {can}" + (f"; {words}" if words else ""))
        for action in self._actions:
            if hasattr(parsed, action.dest):
                setattr(parsed, action.dest, _checked(action, getattr(parsed, action.dest)))
        return parsed


def _checked(action, value):
    """What an argument of argparse's stands for.  Raises UsageError."""
    name = (action.option_strings or [action.metavar])[0]
    if isinstance(value, list):
        return [_checked(action, item) for item in value]
    if isinstance(value, FileName):
        if not value and action.nargs != "+":  # (whoever reads several files says which of them has no name)
            raise UsageError(f"{name} names nothing")
        return user_path(value, name)
    return with_newlines(value) if isinstance(value, str) else value


def with_newlines(text):
    """A text whose lines end as those of the data do, in \\n."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


@contextlib.contextmanager
def showing_all():
    """Within this context, what a console cannot show (its encoding may be ASCII) does not end a command."""
    out = sys.stdout
    if not hasattr(out, "reconfigure"):  # a notebook's or a test's, which shows everything; or there is none
        yield
        return
    before = out.errors
    out.reconfigure(errors="replace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):  # it was closed, or its disk is full
            out.reconfigure(errors=before)


def say(text="", end="\n", file=None):
    """print; but neither a full disk, to which a console's text may go, nor a terminal that is gone ends a training."""
    try:
        print(text, end=end, file=file, flush=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise


def say_if_elsewhere(kernels):
    """In a copy of npgpt with a mistake in it, say so if that may not run with these kernels."""
    try:
        meant = Path(__file__).with_name(PLANTED).read_text(encoding="utf-8")
    except OSError:  # not such a copy
        return
    if meant != kernels:
        how = "with" if meant == "numpy" else "without"
        print(f"look for the mistake in this folder {how} NPGPT_KERNELS=numpy: otherwise its code may not run")


def encoded(tokenizer, text, what):
    """The tokens of a text as a list.  Raises UsageError, with `what` the text is."""
    try:
        return tokenizer.encode(text).tolist()
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from None


def add_model(parser):
    """The flag --model, by its other name --out-dir as well."""
    words = "run folder of npgpt.train, checkpoint, or Hugging Face GPT-2 folder (default: out)"
    parser.add_argument("--model", "--out-dir", type=FileName, default="out", metavar="PATH", help=words)
