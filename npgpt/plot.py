"""Draw loss curves, or what a model's attention looks at: python -m npgpt.plot RUN [RUN ...] [--attention TEXT] ...

The pictures are made in npgpt/study/plots.py; exit codes are listed in npgpt/errors.py.
"""

import os
from pathlib import Path

from npgpt.command import FileName, Parser, encoded, showing_all
from npgpt.errors import CheckpointError, UsageError, quoted, run_command

PROG = "python -m npgpt.plot"


def parse(argv):
    parser = Parser(prog=PROG, description="Draw the loss curves of runs, or the attention of a run's model.")
    add = parser.add_argument
    add("runs", nargs="+", type=FileName, metavar="RUN", help="run folder of npgpt.train")
    words = "a .svg (default: loss.svg, loss-RUN-RUN.svg or attention.svg in the first RUN)"
    add("--out", type=FileName, metavar="FILE", help=words)
    add("--attention", metavar="TEXT", help="instead, what each head of the first RUN's model looks at in this text")
    args = parser.parse_args(argv)
    if args.out is None:
        several = [Path(os.path.abspath(run)).name for run in args.runs] if len(args.runs) > 1 else []
        curves = "-".join(["loss", *several]) + ".svg"  # a comparison does not take the place of a run's own picture
        args.out = Path(args.runs[0]) / (curves if args.attention is None else "attention.svg")
    args.out = Path(args.out)
    if args.out.suffix.lower() != ".svg":
        better = quoted(os.path.splitext(args.out)[0] + ".svg")
        raise UsageError(f"--out must end in .svg, got {args.out}; write --out {better}, which any browser shows")
    if args.attention == "":
        raise UsageError("--attention must have one character at least")
    return args


def draw_curves(runs):
    """The picture of the curves of some runs, as bytes.  Raises UsageError and CheckpointError."""
    from npgpt.files.log import read_log
    from npgpt.study.plots import curves_svg, labels, panels

    logs = [read_log(run) for run in runs]
    found = panels(logs)
    if not found:
        raise CheckpointError(f"there is nothing to draw yet: the log of {runs[0]} has no finite number")
    return curves_svg(found, labels(runs, logs))


def draw_attention(run, text):
    """The picture of a run's model that reads a text, as bytes.  Raises UsageError and CheckpointError."""
    from npgpt.files.pretrained import open_model
    from npgpt.study.plots import attention_maps, attention_svg

    model = open_model(run)
    tokenizer = model.tokenizer
    tokens = encoded(tokenizer, text, "--attention")
    most = model.config.block_size
    if len(tokens) > most:
        raise UsageError(f"--attention: the text has {len(tokens)} tokens; the model looks at {most} at most")
    return attention_svg(attention_maps(model, tokens), [tokenizer.decode([token]) for token in tokens])


@showing_all()
def main(argv=None):
    args = parse(argv)
    from npgpt.files import checkpoint

    picture = draw_curves(args.runs) if args.attention is None else draw_attention(args.runs[0], args.attention)
    checkpoint.replace(args.out, [picture])
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    run_command(PROG, main)
