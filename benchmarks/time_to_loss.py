"""How long a training run takes, and which loss it reaches: presets in turn, several seeds.

    python -m benchmarks.time_to_loss --data shakespeare.txt

Seconds are those of a whole run as `npgpt.train` does it, evaluations and checkpoints included; not counted are reading
the text, compiling kernels (a run of two iterations does that first) and writing samples.  The loss, in nats per token,
is that of the whole validation split after the last iteration.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time

from benchmarks.common import machine, machine_line
from npgpt.config import TrainConfig, preset
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
    options = parser.parse_args(argv)

    from npgpt.machine import cores

    print(machine_line(machine(["numpy", "numba"]), cores()), flush=True)
    configs = {}
    for name in options.presets:
        changes = {} if options.max_iters is None else {"max_iters": options.max_iters}
        configs[name] = TrainConfig(**{**preset(name), "data": tuple(options.data), **changes})
        train(dataclasses.replace(configs[name], max_iters=2))
    seconds = {name: [] for name in configs}
    print(f"\n{'preset':<14}{'seed':>6}{'iterations':>12}{'seconds':>9}{'loss':>9}   <= {options.loss}")
    for seed in options.seeds:
        for name, config in configs.items():
            took, loss = train(dataclasses.replace(config, seed=seed))
            seconds[name].append(took)
            reached = "yes" if loss <= options.loss else "no"
            print(f"{name:<14}{seed:>6}{config.max_iters:>12,}{took:>9.1f}{loss:>9.4f}   {reached}", flush=True)
    (first, base), *others = seconds.items()
    print(f"\n{first}: {statistics.median(base):.1f} s, the median of {len(base)} seeds")
    for name, times in others:
        ratios = sorted(b / a for a, b in zip(base, times, strict=True))
        print(
            f"{name}: {statistics.median(times):.1f} s, {statistics.median(ratios):.3f} of {first}'s "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )
    return 0


if __name__ == "__main__":
    run_command("python -m benchmarks.time_to_loss", main)
