"""One forward and backward of a GPT as a page to look at: python -m npgpt.explain --out-dir FOLDER [--text TEXT] ...

The model reads a few tokens in float64 and guesses each from those before it.  This file reads flags and prints: what
is measured is npgpt/study/trace.py, the page npgpt/study/page.py, and where one number's gradient comes from
npgpt/study/receipt.py.  Exit codes are listed in npgpt/errors.py.
"""

import sys
from pathlib import Path

from npgpt.command import FileName, Parser, add_model, encoded, showing_all
from npgpt.config import SAMPLE
from npgpt.errors import UsageError, run_command

PROG = "python -m npgpt.explain"
TOKENS = 24  # positions that the model reads at most: as many as can be told apart on a page


def parse(argv):
    parser = Parser(prog=PROG, description="Show one forward and backward of a GPT as an HTML page.")
    add_model(parser)
    add = parser.add_argument
    add("--text", help=f"text to read, cut after {TOKENS + 1} tokens (default: one that the model writes)")
    words = "the page to write (default: explain.html)"
    add("--out", type=FileName, default="explain.html", metavar="FILE", help=words)
    add("--param", metavar="NAME[I,J]", help="print where one number's gradient comes from instead: --param wte[17,3]")
    args = parser.parse_args(argv)
    if not args.out.endswith((".html", ".htm")):
        raise UsageError(f"--out must end in .html, got {args.out}")
    return args


def read_tokens(model, text):
    """The tokens to look at, two at least: those of a text, or, if it is None, of one that the model writes."""
    import numpy as np

    from npgpt.generate.generation import first_token, unprompted

    n = min(TOKENS, model.config.block_size) + 1
    if text is None:
        written = unprompted(model, n - 1, np.random.default_rng([0, SAMPLE]))
        return [first_token(model.tokenizer), *written]
    tokens = encoded(model.tokenizer, text, "--text")
    if len(tokens) < 2:
        raise UsageError(f"--text must have two tokens at least, one to read and one to guess; it has {len(tokens)}")
    if len(tokens) > n:
        print(f"{PROG}: the text has {len(tokens):,} tokens; these are the first {n}", file=sys.stderr)
    return tokens[:n]


@showing_all()
def main(argv=None):
    args = parse(argv)
    import numpy as np

    from npgpt.files import checkpoint
    from npgpt.files.pretrained import open_model
    from npgpt.study.trace import in_float64

    pretrained = open_model(args.model)
    tokens = read_tokens(pretrained, args.text)
    model, tokenizer = in_float64(pretrained), pretrained.tokenizer
    idx, targets = np.array([tokens[:-1]]), np.array([tokens[1:]])
    if args.param is not None:
        from npgpt.study.receipt import receipt

        print(receipt(model, idx, targets, args.param))
        return 0
    from npgpt.study.page import describe, html

    def text_of(token):  # a model may know more tokens than its tokenizer
        return tokenizer.decode([int(token)]) if token < tokenizer.vocab_size else f"token {token}"

    data = describe(model, idx, targets, text_of)
    checkpoint.replace(args.out, [html(data).encode("utf-8")])
    wrong = [f"{box['group']}: {box['label']}" for box in data["boxes"] if not box["ok"]]
    wrong += [] if data["whole"]["ok"] else ["the whole model"]
    print(f"loss {data['loss']} over {len(tokens) - 1} tokens, {len(data['boxes'])} ops")
    print(f"gradients against finite differences: {'WRONG in ' + ', '.join(wrong) if wrong else 'ok'}")
    print(f"{args.out}: {Path(args.out).stat().st_size:,} bytes, to be opened in a browser")
    return 1 if wrong else 0


if __name__ == "__main__":
    run_command(PROG, main)
