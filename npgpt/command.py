"""What the commands share: how they read flags, what a console can show, and the model that they are asked about."""

import argparse
import difflib
import errno
import sys

from npgpt.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Answers a wrong flag with one line, which names the flag that may have been meant."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise UsageError(f"{message} (--help lists all flags)")

    def parse_args(self, args=None):
        end = args.index("--") if "--" in args else len(args)  # behind it there are no flags
        parsed, unknown = self.parse_known_args([*map(_with_dashes, args[:end]), *args[end:]])
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown[0].split("=")[0], flags, 1)
            self.error(f"unknown argument {unknown[0]}" + (f"; did you mean {close[0]}?" if close else ""))
        return parsed


def _with_dashes(arg):
    """--block_size=64 -> --block-size=64; what is not a flag stays as it is."""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value


def show_all():
    """What a console cannot show (its encoding may be ASCII) must not end a command."""
    if sys.stdout is not None:  # it was closed
        sys.stdout.reconfigure(errors="replace")


def say(text="", end="\n", file=None):
    """print; but neither a full disk, to which a console's text may go, nor a terminal that is gone ends a training."""
    try:
        print(text, end=end, file=file, flush=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise


def add_model(parser):
    """The flag --model, by its other name --out-dir as well."""
    parser.add_argument(
        "--model", "--out-dir", default="out", metavar="PATH",
        help="run folder of npgpt.train, checkpoint, or Hugging Face GPT-2 folder (default: out)",
    )  # fmt: skip


def open_model(path):
    """GPT.from_pretrained(path), with a tokenizer.  Raises UsageError if it has none, and CheckpointError."""
    from npgpt import folder
    from npgpt.model import GPT

    model = GPT.from_pretrained(path)
    if words := folder.choice(path):
        say(words, file=sys.stderr)
    if model.tokenizer is None:
        raise UsageError(f"{path} has no tokenizer that can be opened (a tokenizer.json needs the package tokenizers)")
    return model
