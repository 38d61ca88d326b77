"""How long a training run takes, and which loss it reaches: presets in turn, several seeds.

    python -m benchmarks.time_to_loss --data shakespeare.txt

Seconds are those of a whole run as `npgpt.train` does it, evaluations and checkpoints included; not counted are reading
the text, compiling kernels (a run of two iterations does that first) and writing samples.  The loss, in nats per token,
is that of the whole validation split after the last iteration.

    python -m benchmarks.time_to_loss --presets speedrun --dtypes float32 bfloat16 --rows rows.jsonl

Runs that the file has are not made again, so a study of many runs can be stopped and gone on with.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.common import machine, machine_line
from npgpt.config import DTYPES, TrainConfig, preset
from npgpt.errors import run_command


def train(config):
    """(seconds, whole validation loss) of a run."""
    from npgpt.run.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(dataclasses.replace(config, out_dir=folder))
        start = time.perf_counter()
        for event in trainer.run():
            last = event
        seconds = time.perf_counter() - start
        trainer.parallel.close()
    return seconds, last.val_loss_whole


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.time_to_loss", description=__doc__.split("\n")[0])
    parser.add_argument("--data", nargs="+", default=["shakespeare"], help="text to train on (%(default)s)")
    parser.add_argument("--presets", nargs="+", default=["nanogpt-cpu", "speedrun"], help="(%(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337, 1, 2], help="(%(default)s)")
    parser.add_argument("--loss", type=float, default=1.88, help="the loss that is wanted (%(default)s)")
    parser.add_argument("--max-iters", type=int, help="instead of the presets' own, to try this out")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES[:1], help="of products (%(default)s)")
    parser.add_argument("--rows", metavar="FILE", type=Path, help="append each run to this file, as a line of JSON")
    options = parser.parse_args(argv)

    from npgpt.machine import cores

    print(machine_line(machine(["numpy", "numba"]), cores()), flush=True)
    configs = {}
    for name in options.presets:
        for dtype in options.dtypes:
            changes = {} if options.max_iters is None else {"max_iters": options.max_iters}
            settings = {**preset(name), "data": tuple(options.data), "dtype": dtype, **changes}
            configs[name if dtype == DTYPES[0] else f"{name} {dtype}"] = TrainConfig(**settings)
    rows = []
    if options.rows and options.rows.exists():
        rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
    found, warm = {(row["run"], row["seed"]): row for row in rows}, set()
    print(f"\n{'run':<22}{'seed':>6}{'iterations':>12}{'seconds':>9}{'loss':>9}   <= {options.loss}")
    for seed in options.seeds:
        for name, config in configs.items():
            if (name, seed) not in found:
                if name not in warm:
                    train(dataclasses.replace(config, max_iters=2))
                    warm.add(name)
                took, loss = train(dataclasses.replace(config, seed=seed))
                row = {"run": name, "seed": seed, "iterations": config.max_iters, "seconds": took, "loss": loss}
                found[name, seed] = row
                if options.rows:
                    with options.rows.open("a", encoding="utf-8", newline="\n") as file:
                        file.write(json.dumps(row) + "\n")
            row = found[name, seed]
            reached = "yes" if row["loss"] <= options.loss else "no"
            words = f"{name:<22}{seed:>6}{row['iterations']:>12,}{row['seconds']:>9.1f}{row['loss']:>9.4f}   {reached}"
            print(words, flush=True)
    print()
    for name in configs:
        base = name.removesuffix(f" {DTYPES[1]}")  # the same preset in float32, or else the first run
        base = base if base != name and base in configs else next(iter(configs))
        ours, firsts = ([found[run, seed] for seed in options.seeds] for run in (name, base))
        losses = [row["loss"] for row in ours]
        print(
            f"{name}: {statistics.median(row['seconds'] for row in ours):.1f} s, the median of {len(ours)} seeds; "
            f"loss {statistics.mean(losses):.4f}, the mean, {max(losses):.4f} the worst"
        )
        if name != base:
            ratios = sorted(b["seconds"] / a["seconds"] for a, b in zip(firsts, ours, strict=True))
            more = statistics.mean(b["loss"] - a["loss"] for a, b in zip(firsts, ours, strict=True))
            words = f"{statistics.median(ratios):.3f} of the time ({ratios[0]:.3f} to {ratios[-1]:.3f})"
            print(f"    beside {base}: {words}, loss {more:+.4f} in the mean")
    return 0


if __name__ == "__main__":
    run_command("python -m benchmarks.time_to_loss", main)
