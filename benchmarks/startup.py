"""How long it takes until something happens: imports, --help, the first training step, the first token.

    python -m benchmarks.startup

Everything is measured in fresh processes, from before one is started to the first line that it prints.  The first step
is that of the preset `default`, the first token that of a model like it, once cold, with no compiled kernel on the
disk, and once warm, with those that the cold run has left there.  All take turns, a few rounds long, after an
unmeasured process that lets Python write its bytecode and makes the model.
"""

import argparse
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import BenchmarkError, machine, machine_line, positive
from npgpt.errors import run_command

IMPORTS = ("numpy", "numba", "npgpt.run.trainer")
CHARACTERS = 1_000_000  # of the text that is trained on, about as many as in Tiny Shakespeare
FIRST_STEP = """
import sys
from npgpt.config import TrainConfig
from npgpt.run.trainer import Trainer
data, out_dir = sys.argv[1:]
Trainer(TrainConfig(data=(data,), out_dir=out_dir)).step()
print("done", flush=True)
"""


def seconds_to_first_line(*arguments, **environment):
    """Start Python with these arguments and further environment variables, and wait for a line."""
    start = time.perf_counter()
    command = [sys.executable, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, **environment}) as process:
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
        process.stdout.read()  # or what prints more would complain
    if process.returncode or not line:
        raise BenchmarkError(f"a process ended with exit code {process.returncode}; its message stands above")
    return seconds


def one_round(data, model):
    """Yield (what, seconds) for everything that is measured."""

    def importing(statement):
        return seconds_to_first_line("-c", f"{statement}; print('done', flush=True)")

    yield "python alone", importing("pass")
    for name in IMPORTS:
        yield f"import {name}", importing(f"import {name}")
    yield "python -m npgpt.train --help", seconds_to_first_line("-m", "npgpt.train", "--help")
    with tempfile.TemporaryDirectory() as folder:
        for state in ("cold", "warm"):
            step = seconds_to_first_line("-c", FIRST_STEP, data, Path(folder, "out"), NUMBA_CACHE_DIR=folder)
            yield f"first training step, {state}", step
    with tempfile.TemporaryDirectory() as folder:
        for state in ("cold", "warm"):
            sample = ("-m", "npgpt.sample", "--model", model, "--prompt", "a", "--max-new-tokens", 1)
            yield f"first token, {state}", seconds_to_first_line(*sample, NUMBA_CACHE_DIR=folder)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=positive, default=5, help="rounds (%(default)s)")
    options = parser.parse_args(argv)

    from npgpt.machine import cores

    print(machine_line(machine(["numpy", "numba"]), cores()), flush=True)
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "text.txt")
        data.write_text("".join(random.Random(0).choices(string.ascii_letters + " .,\n", k=CHARACTERS)))
        model = Path(folder, "model")
        seconds_to_first_line("-m", "npgpt.train", "--data", data, "--out-dir", model, "--max-iters", 0)
        for _ in range(options.repeats):
            for what, seconds in one_round(data, model):
                measured.setdefault(what, []).append(seconds)
    print(f"\n{'seconds':<32}{'median':>8}{'least':>8}{'most':>8}")
    for what, seconds in measured.items():
        print(f"{what:<32}{statistics.median(seconds):>8.2f}{min(seconds):>8.2f}{max(seconds):>8.2f}")
    return 0


if __name__ == "__main__":
    run_command("python -m benchmarks.startup", main)
