"""Which bits a change has changed: an earlier revision beside this tree, on this machine.

    python tests/against.py REV

REV is checked out into a temporary folder.  Both trees train, resume, write and run an example, with the same flags, on
the text in tests/data/.  A line for each says whether all numbers have the same bits; if not, by how much they differ
at most, and the first place where they do.  It takes four minutes at most.

Exit codes: 0 all bits are the same, 1 some are not, 2 a tree cannot run.

The trees are driven by their commands alone, so that it does not matter where in them anything stands.  All settings
are given as flags: what a preset is made of may change.
"""

import argparse
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import checked_out  # noqa: E402
from npgpt.errors import UsageError, run_command  # noqa: E402

STEPS, MIDDLE = 50, 25  # updates of a training, and where its resume begins
TOKENS = 200  # that are written

MODEL = dict(
    n_layer=4, n_head=4, n_embd=128, block_size=64, bias=False, dropout=0.0, tokenizer="char", val_fraction=0.1,
    batch_size=12, gradient_accumulation_steps=1, max_iters=STEPS, decay_lr=True, beta1=0.9, beta2=0.99, grad_clip=1.0,
    muon_learning_rate=0.03, muon_momentum=0.95, weight_decay=0.1, seed=1337, blas_threads=1, keep=9,
    eval_interval=MIDDLE, eval_iters=2, log_interval=10, sample_tokens=0, final_sample_tokens=0, dtype="float32",
)  # fmt: skip
DEFAULT = MODEL | dict(optimizer="muon", learning_rate=4e-3, min_lr=4e-4, warmup_iters=20, lr_decay_iters=2400)
NANOGPT_CPU = MODEL | dict(optimizer="adamw", learning_rate=1e-3, min_lr=1e-4, warmup_iters=100, lr_decay_iters=2000)
SPEEDRUN = MODEL | dict(
    optimizer="muon", learning_rate=5e-3, min_lr=4e-4, warmup_iters=10, lr_decay_iters=440, muon_learning_rate=0.04,
    muon_momentum=0.85, weight_decay=0.0,
)  # fmt: skip
TRAININGS = {
    **{
        f"{name}, {workers} worker{'s' * (workers > 1)}": settings | {"workers": workers}
        for name, settings in (("default", DEFAULT), ("nanogpt-cpu", NANOGPT_CPU), ("speedrun", SPEEDRUN))
        for workers in (1, 2)
    },
    "default, 2 workers, biases, dropout and accumulation": DEFAULT
    | dict(workers=2, bias=True, dropout=0.1, gradient_accumulation_steps=2),
}
LAST = [*TRAININGS][-1]  # the one that is resumed, and that writes


class Tree:
    """A tree of npgpt, and a folder of its own for what it writes, its compiled kernels among it."""

    def __init__(self, name, path, place):
        self.name, self.path, self.place = name, Path(path), Path(place)
        self.place.mkdir()
        found = Path(self.python("-c", "import npgpt; print(npgpt.__file__)").strip())
        if not found.is_relative_to(self.path.resolve()):
            raise UsageError(f"{name}: Python takes npgpt from {found}, not from {self.path}")

    def python(self, *args):
        """What Python prints that runs in this tree.  Raises UsageError if it fails."""
        environment = {
            **os.environ, "PYTHONPATH": str(self.path), "PYTHONIOENCODING": "utf-8",
            "NUMBA_CACHE_DIR": str(self.place / "kernels"),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, *map(str, args)], cwd=self.path, env=environment, capture_output=True, encoding="utf-8"
        )
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "without a word").splitlines()[-1]
            command = " ".join(map(str, args[:2]))
            raise UsageError(f"{self.name} cannot run {command}: exit code {done.returncode}, {last}")
        return done.stdout

    # Each of these gives the numbers that it leads to, in the order in which they come about: place -> array

    def train(self, name):
        run = self.place / name
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in TRAININGS[name].items()]
        self.python("-m", "npgpt.train", "--data", ROOT / "tests" / "data" / "text.txt", "--out-dir", run, *flags)
        return numbers_of(run)

    def resume(self, run, copy):
        """Go on with a copy of a run folder, which may be another tree's, from its middle."""
        shutil.copytree(run, self.place / copy)
        self.python("-m", "npgpt.train", "--resume", self.place / copy / f"iter-{MIDDLE:08d}.safetensors")
        return numbers_of(self.place / copy)

    def write(self, run, *flags):
        """Sampled tokens with their log-probabilities, which all logits go into."""
        line = self.python(
            "-m", "npgpt.sample", "--model", run, "--checkpoint", "last", "--prompt", "The gradient of", "--seed", 7,
            "--max-new-tokens", TOKENS, "--temperature", 1, "--json", "--logprobs", *flags,
        )  # fmt: skip
        row = json.loads(line)
        pairs = zip(row["tokens"], row["logprobs"], strict=True)
        return {f"token {i}": np.array(pair) for i, pair in enumerate(pairs)}

    def example(self):
        """The numbers that the example of a whole GPT prints; rounding errors, to the last bit, are among them."""
        (path,) = self.path.glob("examples/09_*.py")
        lines = self.python(path).splitlines()
        numbers = (re.findall(r"-?\d+\.\d+(?:e[+-]\d+)?", line) for line in lines)
        return {f"line {i}": np.array(found, float) for i, found in enumerate(numbers, 1) if found}


def numbers_of(run):
    """Losses and gradient norms of a run folder's log, and the arrays of its newest checkpoint."""
    places = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        values = [row.get(key) for key in ("train_loss", "grad_norm", "lr", "val_loss", "val_loss_whole")]
        places[f"iteration {row['iter']}"] = np.array([math.nan if x is None else x for x in values])
    raw = max(run.glob("iter-*.safetensors")).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            places[name] = np.frombuffer(raw[8 + length + start : 8 + length + stop], "<f4")
    return places


def compare(ours, theirs):
    """Words for how the numbers of two trees differ; None if all have the same bits."""
    missing = [*(ours.keys() ^ theirs.keys())]
    if missing:
        return f"{missing[0]} is there in one tree only"
    apart = [name for name in theirs if ours[name].tobytes() != theirs[name].tobytes()]
    if not apart:
        return None
    largest, where = max((difference(ours[name], theirs[name]), name) for name in apart)
    return f"by {largest:.1e} at most, in {where}; first in {apart[0]}"


def difference(a, b):
    """The largest difference of two arrays, relative to the largest entry; infinite for other shapes or finiteness."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    if a.shape != b.shape or not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return math.inf
    a, b = a[np.isfinite(a)], b[np.isfinite(b)]
    return float(np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-300))


def cases(ours, theirs):
    """(name, numbers of this tree, numbers of the revision), one after the other."""
    for name in TRAININGS:
        whole = theirs.train(name)
        yield name, ours.train(name), whole
    run = theirs.place / LAST
    yield "a resume", ours.resume(ours.place / LAST, "resumed"), theirs.resume(run, "resumed")
    yield "the revision's checkpoint, resumed by this tree", ours.resume(run, "taken over"), whole
    yield f"{TOKENS} tokens", ours.write(run), theirs.write(run)
    yield f"{TOKENS} tokens with --int8", ours.write(run, "--int8"), theirs.write(run, "--int8")
    yield "examples/09", ours.example(), theirs.example()


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python tests/against.py", description=__doc__.split("\n")[0])
    parser.add_argument("rev", metavar="REV", help="a revision that git knows")
    rev, start, n_apart = parser.parse_args(argv).rev, time.perf_counter(), 0
    with checked_out(rev) as path, tempfile.TemporaryDirectory(prefix="npgpt-against-") as place:
        ours, theirs = Tree("this tree", ROOT, Path(place, "tree")), Tree(rev, path, Path(place, "rev"))
        for name, mine, other in cases(ours, theirs):
            words = compare(mine, other)
            n_apart += words is not None
            print(f"same bits  {name}" if words is None else f"DIFFERENT  {name}: {words}", flush=True)
    print(f"{n_apart} of {len(TRAININGS) + 5} differ from {rev}  ({time.perf_counter() - start:.0f} s)")
    return 1 if n_apart else 0


if __name__ == "__main__":
    run_command("python tests/against.py", main)
