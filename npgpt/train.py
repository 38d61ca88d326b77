"""Train a GPT on text: python -m npgpt.train [--preset NAME] [--data FILE ...] [--out-dir FOLDER] ...

This file reads flags and prints; the work is done in npgpt/run/trainer.py.  Flags carry nanoGPT's names, with dashes or
underscores.  Exit codes are listed in npgpt/errors.py.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import sys
import typing

from npgpt import __version__
from npgpt.command import NANOGPT, FileName, Parser, say, showing_all
from npgpt.config import PRESETS, TrainConfig, check_tokenizer, composed
from npgpt.errors import StoppedError, UsageError, quoted, run_command
from npgpt.run.ranks import joined
from npgpt.signals import NEVER, StopNow, catch_signals

PROG = "python -m npgpt.train"

# nanoGPT's flags that there are not, so that a pasted command runs, or says what to write (see npgpt.command.Parser)
NANOGPT_TRAIN = {
    **NANOGPT,
    "wandb-log": ("False", "the log is metrics.jsonl in --out-dir"),
    "wandb-project": ("", "the log is metrics.jsonl in --out-dir; python -m npgpt.plot draws it"),
    "wandb-run-name": ("", "write --out-dir FOLDER, which names a run"),
    "always-save-checkpoint": ("", "write --keep N for the number of checkpoints that stay"),
    "dataset": ("", "write --data data/NAME for a folder with train.bin and val.bin, or --data shakespeare"),
    "backend": ("", "more processes are started by mpiexec"),
}
NANOGPT_FILES = {"train_shakespeare_char.py": "nanogpt-gpu"}


def _boolean(text):
    if text.lower() not in ("true", "yes", "1", "on", "false", "no", "0", "off"):
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return text.lower() in ("true", "yes", "1", "on")


def build_parser():
    lines = "\n".join(f"  {name:<14}{text}" for name, (text, _) in PRESETS.items())
    parser = Parser(NANOGPT_TRAIN, prog=PROG, description="Train a GPT on text.", epilog=f"presets:\n{lines}")
    parser.add_argument("nanogpt_file", nargs="?", metavar="CONFIG", help=argparse.SUPPRESS)
    parser.add_argument("--preset", help="settings to start from; see below (default: default)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in --out-dir")
    words = "go on with the run in --out-dir from its newest checkpoint, or from the one named here; "
    words += "other flags change the settings that may change"
    parser.add_argument("--resume", nargs="?", const=True, type=FileName, metavar="FILE", help=words)
    parser.add_argument("--force", action="store_true", help="begin even if the memory seems too small")
    parser.add_argument("--profile", action="store_true", help="at the end, print where the updates' time went")
    parser.add_argument("--version", action="version", version=f"npgpt {__version__}")
    hints = typing.get_type_hints(TrainConfig)
    for setting in dataclasses.fields(TrainConfig):
        options = {"dest": setting.name, "default": argparse.SUPPRESS, "help": setting.metadata["help"]}
        kind = next((t for t in typing.get_args(hints[setting.name]) if t is not type(None)), hints[setting.name])
        if kind is tuple:
            options |= {"nargs": "+", "type": FileName, "metavar": "SOURCE"}
        elif kind is bool:
            options |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "BOOL"}
        else:
            its_type = FileName if setting.metadata["is_path"] else kind
            options |= {"type": its_type, "metavar": {int: "N", float: "X", str: "TEXT"}[kind]}
        if setting.default is not None:
            shown = " ".join(setting.default) if kind is tuple else setting.default
            options["help"] += f" (default: {shown})".replace("%", "%%")
        parser.add_argument("--" + setting.name.replace("_", "-"), **options)
    return parser


def parse(argv):
    """Flags -> (settings that were given, flags that are no settings).  Raises UsageError."""
    given = vars(build_parser().parse_args(argv))
    name, nanogpt_file = given.pop("preset"), given.pop("nanogpt_file")
    rest = {flag: given.pop(flag) for flag in ("overwrite", "resume", "force", "profile")}
    if nanogpt_file is not None:
        name = NANOGPT_FILES.get(os.path.basename(nanogpt_file))
        if name is None:
            hint = f"a text file is passed with --data {quoted(nanogpt_file)}"
            if nanogpt_file.endswith(".py"):
                hint = "a program is not run: write its settings as flags, or a --preset"
            raise UsageError(f"unknown argument {nanogpt_file}; {hint}")
    if given.get("init_from") == "scratch" and not os.path.exists("scratch"):  # nanoGPT's word for a new model
        del given["init_from"]
    if given.get("init_from") == "resume" and not os.path.exists("resume"):
        raise UsageError("--init-from resume is nanoGPT's; write --resume")
    if "epochs" in given and "max_iters" in given:
        raise UsageError("give --epochs or --max-iters, not both")
    if "data" in given:
        given["data"] = tuple(given["data"])
    if name == "":
        raise UsageError("--preset names nothing")
    if rest["resume"] and rest["overwrite"]:
        raise UsageError("give --resume or --overwrite, not both")
    settings = composed(name, given, new=not rest["resume"])
    if not rest["resume"] and settings.get("init_from") is None:  # (whose tokenizer is not known yet)
        check_tokenizer(TrainConfig(**settings))
    return settings, rest


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def describe(trainer):
    """What will be trained, on what, with what: a few lines for the start of a run."""
    import numpy as np

    from npgpt import machine
    from npgpt.kernels import jit
    from npgpt.kernels.blas import blas_kernels
    from npgpt.kernels.matmul import way

    setup, config, model, world = trainer.setup, trainer.config, trainer.model.config, trainer.setup.world
    length = ""
    if setup.n_characters is not None:
        length = f"{setup.n_bytes:,} bytes of UTF-8, {setup.n_characters:,} characters, "
    kernels = f"numba {jit.numba.__version__}" if jit.KERNELS == "numba" else "NumPy references instead of kernels"
    blas = blas_kernels()
    lines = [
        f"npgpt   | version {__version__}, numpy {np.__version__}, {kernels}",
        f"device  | {machine.cpu_name()}, {machine.cores()} cores: {setup.workers} workers x {setup.blas_threads} BLAS "
        f"threads, sgemm {setup.sgemm_peak / 1e9:,.0f} GFLOP/s{f' by kernels for {blas}' if blas else ''}",
    ]
    if setup.dtype == "bfloat16":
        slow = ", which is slow" if way() == "plain" else ""
        lines.append(f"dtype   | products of bfloat16, by {way()}{slow}; all else is float32")
    if world.size > 1:
        whose = f"{world.local_size} of them on this machine; workers and memory are each one's"
        lines.append(f"ranks   | {world.size}, {whose}")
    lines += [
        f"data    | {' '.join(config.data)}: {length}{setup.tokenizer.vocab_size:,} different tokens",
        *(f"        | {line}" for line in examine(setup)),
        f"model   | {setup.model.num_params():,} parameters: n_layer {model.n_layer}, n_head {model.n_head}, "
        f"n_embd {model.n_embd}, block_size {model.block_size}, dropout {model.dropout}",
        f"run     | {setup.max_iters:,} iterations of {setup.tokens_per_iter:,} tokens, "
        f"about {setup.memory_needed / 1e6:,.0f} MB of memory; files go to {setup.out_dir}{os.sep}",
    ]
    return "\n".join(lines)


def examine(setup):
    """What to know of the data before hours are spent on it, a line each."""
    n, epochs = len(setup.tokens.train), setup.max_iters / setup.iters_per_epoch
    per_parameter = n / setup.model.num_params()
    yield (
        f"{n:,} tokens to train on, {len(setup.tokens.val):,} held back; {per_parameter:.2g} tokens per parameter, "
        f"{epochs:.1f} epochs of {setup.iters_per_epoch:,.0f} iterations"
    )
    if setup.tokens.repeated_lines is not None:
        words = f"{setup.tokens.repeated_lines:.1%} of the held-back lines stand in the training text too"
        if setup.tokens.repeated_lines > 0.1:
            words += ": the validation loss will look better than it is"
        yield words
    yield from setup.tokens.notes
    if epochs > 5 and per_parameter < 5:
        yield "overfitting is to be expected: try --dropout 0.2, --patience 3, more text, or a smaller model"


def _print_sample(trainer, n_tokens, stop):
    if n_tokens:
        for piece in trainer.sample(n_tokens):
            say(piece, end="")
            if stop.number is not None:
                break
        say()
    say("-" * 60)


@showing_all()
def main(argv=None, stop=NEVER):
    with joined() as world:
        return train(argv, stop, world)


def train(argv, stop, world):
    """Train as the flags say; what is shown to a person is shown by rank 0 of the world."""
    with contextlib.redirect_stdout(io.StringIO() if world.rank else sys.stdout):  # --help is one text for all ranks
        given, flags = world.agree(lambda: parse(argv))
    if given.get("init_from") is not None and not flags["resume"]:
        from npgpt.run.beginning import settings_of

        given = {**world.first(lambda: settings_of(given["init_from"])), **given}
        if "tokenizer" not in given:
            raise UsageError(f"init_from: {given['init_from']} has no tokenizer; say what a token is with --tokenizer")
    if not flags["resume"]:  # (whose other settings are not known yet)
        config = TrainConfig(**given)  # before NumPy and Numba take their time to load: a mistake shows at once

    from npgpt.kernels.profiler import Profile, table
    from npgpt.run.events import Audited, Evaluation, Notice, Progress
    from npgpt.run.trainer import Trainer

    profile = Profile() if flags["profile"] else None
    if flags["resume"]:
        source = given.get("out_dir", TrainConfig.out_dir) if flags["resume"] is True else flags["resume"]
        trainer = Trainer.resume(source, given, profile, flags["force"], stop, world)
    else:
        trainer = Trainer(config, flags["overwrite"], profile, flags["force"], stop, world)
    try:
        world.sum(stop)
    except StopNow as stopped:
        raise StoppedError(stopped.number, "stopped before anything was trained") from None
    if world.rank == 0:
        say(describe(trainer))
    for event in trainer.run(stop):
        if world.rank:
            continue
        if isinstance(event, Notice):
            say(f"{PROG}: {event.text}", file=sys.stderr)
        elif isinstance(event, Progress):
            share = trainer.setup.share_of_peak(event.tokens_per_second)
            say(
                f"iter {event.iter:>6,} | loss {event.train_loss:.4f} | lr {event.lr:.2e} | "
                f"{event.tokens_per_second:>8,.0f} tokens/s, {share:3.0%} of sgemm"
                + (f" | {_duration(event.seconds_left)} left" if event.seconds_left is not None else "")
            )
        elif isinstance(event, Audited):
            say(f"iter {event.iter:>6,} | {event.audit}")
        elif isinstance(event, Evaluation):
            say(f"iter {event.iter:>6,} | validation loss {event.val_loss:.4f}{' (best so far)' * event.is_best}")
            if event.val_loss_whole is None:
                _print_sample(trainer, trainer.config.sample_tokens, stop)
                continue
            say(f"whole validation split: loss {event.val_loss_whole:.4f}")
            _print_sample(trainer, trainer.config.final_sample_tokens, stop)
            say(f"best validation loss {trainer.best_loss:.4f} at iteration {trainer.best_iter:,}; sample from it:")
            say(f"  python -m npgpt.sample --out-dir {quoted(trainer.out_dir)}")
            say(f"its loss curve:\n  python -m npgpt.plot {quoted(trainer.out_dir)}")
    if profile is not None and profile.entries and world.rank == 0:
        say(table(profile, trainer.setup.workers))
    return 0


def command():
    """Entry point of the console script npgpt-train."""
    run_command(PROG, lambda: main(stop=catch_signals()))  # which gives back what signals did before


if __name__ == "__main__":
    command()
