"""Write text with a trained GPT: python -m npgpt.sample --out-dir FOLDER [--prompt TEXT] ...

Flags may be written with dashes or underscores.  Exit codes are listed in npgpt/errors.py.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from pathlib import Path

from npgpt.command import NANOGPT, FileName, Parser, add_model, encoded, showing_all, with_newlines
from npgpt.config import SAMPLE, Controls
from npgpt.errors import UsageError, quoted, run_command, told_as, user_path

PROG = "python -m npgpt.sample"
DEFAULTS = {"temperature": 0.8}  # other than those of Controls
NANOGPT_SAMPLE = {**NANOGPT, "init-from": ("resume", "write --model PATH")}  # as in npgpt/train.py
FROM_FILE = "FILE:"  # how a prompt of nanoGPT's begins that is the name of a file


def parse(argv):
    parser = Parser(NANOGPT_SAMPLE, prog=PROG, description="Write text with a trained GPT.")
    add_model(parser)
    add = parser.add_argument
    add("nanogpt_file", nargs="?", metavar="CONFIG", help=argparse.SUPPRESS)
    add("--checkpoint", type=FileName, default="best", help="of a run folder: best, last, or a file (default: best)")
    add("--prompt", help="text to continue (default: a line break, if the model knows one)")
    add("--start", metavar="TEXT", help="the same as nanoGPT has it: FILE:NAME is --prompt-file NAME")
    add("--prompt-file", type=FileName, metavar="FILE", help="file with the text to continue; - is standard input")
    add("--interactive", action="store_true", help="ask for prompts, one after the other")
    add("--num-samples", type=int, default=1, metavar="N", help="number of texts (default: 1)")
    add("--max-new-tokens", type=int, default=500, metavar="N", help="length of each (default: 500)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this, as <|endoftext|>; may come again")
    add("--seed", type=int, default=1337, metavar="N", help="same seed, same text (default: 1337)")
    controls = parser.add_argument_group("how the next token is chosen, in this order")
    for setting in dataclasses.fields(Controls):
        kind, default = (int if setting.name == "top_k" else float), DEFAULTS.get(setting.name, setting.default)
        text = setting.metadata["help"] + (" (default: all)" if default is None else f" (default: {default})")
        flag = "--" + setting.name.replace("_", "-")
        controls.add_argument(flag, type=kind, default=default, metavar="N" if kind is int else "X", help=text)
    output = parser.add_argument_group("output and speed")
    output.add_argument("--json", action="store_true", help="one JSON object a line for each text")
    output.add_argument("--logprobs", action="store_true", help="show each token with its log-probability, in nats")
    output.add_argument("--int8", action="store_true", help="weights of 8 bits: faster where the model is large")
    words = "bfloat16: weights of 16 bits, nearer to the model's own than --int8; faster, too (default: float32)"
    output.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help=words)
    words = "up to N tokens are guessed ahead where a text repeats itself: the same text, sooner (default: 0)"
    output.add_argument("--draft", type=int, default=0, metavar="N", help=words)
    output.add_argument("--stats", action="store_true", help="say how long the prompt and the tokens have taken")
    output.add_argument("--threads", type=int, metavar="N", help="threads (default: one per core, for a large model)")
    args = parser.parse_args(argv)
    if args.nanogpt_file is not None:
        raise UsageError(f"unknown argument {args.nanogpt_file}; a model is named with --model PATH")
    if args.start is not None:
        if args.prompt is not None or args.prompt_file is not None:
            raise UsageError("--start is --prompt or --prompt-file: give one of them")
        if args.start.startswith(FROM_FILE):
            args.prompt_file = user_path(args.start.removeprefix(FROM_FILE), "--start")
        else:
            args.prompt = args.start
    alone = args.prompt is None and args.prompt_file is None and not args.json
    all_open = None not in (sys.stdin, sys.stdout, sys.stderr)
    for name, holds, words in (
        ("prompt", args.prompt != "", "must have one character at least"),
        ("prompt-file", args.prompt_file is None or args.prompt is None, "and --prompt: give one of them"),
        ("prompt-file", args.prompt_file != "-" or sys.stdin is not None, "- needs standard input, which is closed"),
        ("interactive", not args.interactive or alone, "asks for prompts, and answers in text"),
        ("interactive", not args.interactive or all_open, "needs standard input, output and error: one is closed"),
        ("num-samples", args.num_samples >= 1, "must be at least 1"),
        ("max-new-tokens", args.max_new_tokens >= 1, "must be at least 1"),
        ("stop", all(args.stop), "must have one character at least"),
        ("seed", args.seed >= 0, "must be at least 0"),
        ("draft", args.draft >= 0, "must be at least 0"),
        ("threads", args.threads is None or args.threads >= 1, "must be at least 1"),
        ("int8", not args.int8 or args.dtype == "float32", "and --dtype bfloat16: give one of them"),
    ):
        if not holds:
            raise UsageError(f"--{name} {words}")
    try:
        args.controls = Controls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Controls)})
    except UsageError as error:
        name, words = str(error).split(" ", 1)
        raise UsageError(f"--{name.replace('_', '-')} {words}") from None
    return args


def read_prompt(args):
    """The text to continue, or None if none was given."""
    if args.prompt_file is None:
        return args.prompt
    from npgpt.data.text import check_is_text

    where = "standard input" if args.prompt_file == "-" else args.prompt_file
    with told_as(UsageError, f"--prompt-file: cannot read {where}"):
        if args.prompt_file != "-":
            raw = Path(args.prompt_file).read_bytes()
        elif getattr(sys.stdin, "buffer", None):
            raw = sys.stdin.buffer.read()
        else:  # a notebook's, or a test's, may have none but text
            raw = sys.stdin.read().encode("utf-8", "surrogatepass")
    check_is_text(Path(where), "--prompt-file", raw, True)
    try:
        text = with_newlines(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompt-file: {where} is not UTF-8 text: byte {error.start} is wrong") from None
    if not text:
        raise UsageError(f"--prompt-file: {where} is empty")
    return text


def print_text(n, pieces, tokenizer, prompt):
    """Show the n-th text as it grows, and each token's log-probability if there is one.  Returns its Pieces."""
    if n:
        print("-" * 60)  # between it and the one before
    print(prompt, end="", flush=True)
    shown = []
    for piece in pieces:
        print(piece.text, end="", flush=True)
        shown.append(piece)
    print()
    for piece in shown:
        if piece.logprob is not None:
            print(f"{piece.logprob:10.4f}  {tokenizer.decode([piece.token])!r}")
    return shown


def print_json(n, pieces, seed, prompt):
    """Show the n-th text as one JSON object in a line.  Returns its Pieces."""
    pieces = list(pieces)
    row = {"sample": n, "seed": seed, "prompt": prompt, "text": "".join(piece.text for piece in pieces)}
    row |= {"finish": pieces[-1].finish, "tokens": [piece.token for piece in pieces[:-1]]}
    if pieces[0].logprob is not None:
        row["logprobs"] = [piece.logprob for piece in pieces[:-1]]
    print(json.dumps(row), flush=True)
    return pieces


def interact(write, tokenizer):
    """Ask for prompts until the input ends; an empty line goes on with the last text."""
    from npgpt.generate.writer import Writer

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its history and its arrow keys, where there is one)
    print("type a text to continue; an empty line goes on with the last one, Ctrl-D ends", file=sys.stderr)
    text, tokens = "", []  # the last text, and what it is made of if that is known
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except UnicodeDecodeError:
            print(f"{PROG}: that was not {sys.stdin.encoding}", file=sys.stderr)
            continue
        prompt = line or text
        if not prompt:
            continue
        try:
            idx = encoded(tokenizer, prompt, "the prompt") if line or not tokens else tokens
        except UsageError as error:
            print(f"{PROG}: {error}", file=sys.stderr)
            continue
        for n, pieces in enumerate(write(idx)):
            written = print_text(n, pieces, tokenizer, prompt)
        if written[-1].finish == "stop":  # the tokens have the stop string, which the text does not
            text, tokens = prompt + "".join(piece.text for piece in written), []
        else:
            tokens = idx + [piece.token for piece in written[:-1]]
            text = "".join(map(Writer(tokenizer).feed, tokens))  # but for a character whose end is to come


@showing_all()
def main(argv=None):
    args = parse(argv)
    prompt = None if args.interactive else read_prompt(args)
    import numpy as np

    from npgpt.files.pretrained import open_model
    from npgpt.generate import generation, writer
    from npgpt.generate.stats import Stats

    model = open_model(args.model, args.checkpoint)
    tokenizer = model.tokenizer

    def write(idx):
        rngs = (np.random.default_rng([args.seed, SAMPLE, n]) for n in range(args.num_samples))
        stats = Stats()
        yield from writer.write(
            model, tokenizer, idx, rngs, args.max_new_tokens, args.controls, args.stop, logprobs=args.logprobs,
            int8=args.int8, threads=args.threads, dtype=args.dtype, draft=args.draft, stats=stats,
        )  # fmt: skip
        if args.stats:
            print(f"{PROG}: {stats}", file=sys.stderr)

    if args.interactive:
        interact(write, tokenizer)
        return 0
    if prompt is None:
        idx = [generation.first_token(tokenizer)]
        prompt = tokenizer.decode(idx)
    else:
        idx = encoded(tokenizer, prompt, "the prompt")
    end, goes_on = getattr(tokenizer, "end_of_text", None), False
    for n, pieces in enumerate(write(idx)):
        shown = print_json(n, pieces, args.seed, prompt) if args.json else print_text(n, pieces, tokenizer, prompt)
        tokens = [piece.token for piece in shown if piece.token is not None]
        goes_on |= end is not None and end in tokens[:-1]
    if goes_on:
        end = quoted(tokenizer.decode([end]))
        print(f"{PROG}: the text goes on after {end}; --stop {end} ends it there", file=sys.stderr)
    return 0


def command():
    """Entry point of the console script npgpt-sample."""
    run_command(PROG, main)


if __name__ == "__main__":
    command()
