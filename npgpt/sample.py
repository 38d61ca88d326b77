"""Write text with a trained GPT: python -m npgpt.sample --out-dir FOLDER [--prompt TEXT] ...

Flags may be written with dashes or underscores.  Exit codes are listed in npgpt/errors.py.
"""

import math
import sys

from npgpt.config import SAMPLE
from npgpt.errors import UsageError, run_command
from npgpt.train import Parser

PROG = "python -m npgpt.sample"


def parse(argv):
    parser = Parser(prog=PROG, description="Write text with a trained GPT.")
    parser.add_argument("--out-dir", default="out", help="run folder, or Hugging Face GPT-2 folder (default: out)")
    parser.add_argument("--checkpoint", default="best", help="best, last, or a file (default: best)")
    parser.add_argument("--prompt", "--start", default="\n", help="text to continue (default: a line break)")
    parser.add_argument("--num-samples", type=int, default=1, help="number of texts (default: 1)")
    parser.add_argument("--max-new-tokens", type=int, default=500, help="length of each text (default: 500)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy, 1 as learnt (default: 0.8)")
    parser.add_argument("--top-k", type=int, help="choose among the k likeliest tokens (default: all)")
    parser.add_argument("--seed", type=int, default=1337, help="same seed, same text (default: 1337)")
    args = parser.parse_args(argv)
    for name, holds, words in (
        ("prompt", args.prompt != "", "must have one character at least"),
        ("num-samples", args.num_samples >= 1, "must be at least 1"),
        ("max-new-tokens", args.max_new_tokens >= 1, "must be at least 1"),
        ("temperature", args.temperature >= 0 and math.isfinite(args.temperature), "must be at least 0"),
        ("top-k", args.top_k is None or args.top_k >= 1, "must be at least 1"),
        ("seed", args.seed >= 0, "must be at least 0"),
    ):
        if not holds:
            raise UsageError(f"--{name} {words}")
    return args


def main(argv=None):
    args = parse(sys.argv[1:] if argv is None else argv)
    sys.stdout.reconfigure(errors="replace")  # what a console cannot show must not end the text

    import numpy as np

    from npgpt import folder, hub
    from npgpt.model import GPT

    find = {"best": hub.find, "last": folder.newest}.get(args.checkpoint)
    path = find(args.out_dir) if find else args.checkpoint
    model = GPT.from_pretrained(path)
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UsageError(f"{path} has no tokenizer that npgpt can open, so that it cannot read or write text")
    try:
        idx = tokenizer.encode(args.prompt)
    except UsageError as error:
        raise UsageError(f"--prompt: {error}") from None
    for n in range(args.num_samples):
        if n:
            print("-" * 60)
        print(args.prompt, end="", flush=True)
        rng = np.random.default_rng([args.seed, SAMPLE, n])
        tokens = model.generate(idx, args.max_new_tokens, args.temperature, args.top_k, rng)
        for piece in tokenizer.stream(tokens):
            print(piece, end="", flush=True)
        print()
    return 0


def command():
    """Entry point of the console script npgpt-sample."""
    run_command(PROG, main)


if __name__ == "__main__":
    command()
