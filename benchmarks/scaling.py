"""How the time of a training step and its memory grow: with T, C, L, B, and the number of workers.

    python -m benchmarks.scaling --only T

One of them is varied at a time, and the others stay at L6 H6 C384 B4 T256 (heads are 64 wide).  Every configuration is
measured in a fresh process, whose peak memory is therefore its own; what Python, NumPy, Numba and the loaded kernels
take before there is a model to speak of is told first.  Shares are of the best sgemm among the rows of a table, on all
cores; a row is marked BUSY if sgemm did not get all of these, right after the steps.
"""

import argparse
import functools
import itertools
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from benchmarks.common import BenchmarkError, machine, machine_line, peak_memory
from benchmarks.step import npgpt_side
from benchmarks.workloads import Workload
from npgpt.config import GPTConfig
from npgpt.errors import run_command

BASE = dict(L=6, C=384, B=4, T=256, workers=None)
TABLES = {"T": (256, 512, 1024, 2048), "C": (192, 384, 768), "L": (3, 6, 12), "B": (2, 4, 8, 16), "workers": (1, 2)}
TINY = dict(L=1, C=64, B=2, T=16, workers=None)
QUICK = {"T": (16, 32), "C": (64, 128), "L": (1, 2), "B": (2, 4), "workers": (1, 2)}
SECONDS, STEPS = 2, 3  # a configuration is timed for so many of each, at least


def run(workload, threads, quick):
    """In the process that is measured: (median seconds of a step, peak bytes of memory, sgemm FLOP/s, busy)."""
    from npgpt.kernels.blas import blas_threads, sgemm_peak
    from npgpt.machine import cores

    batches, seconds = itertools.cycle(workload.batches()), []
    with npgpt_side(workload, threads) as (step, _):
        step(*next(batches))  # loads the kernels and finds the buffers
        while len(seconds) < STEPS or (sum(seconds) < SECONDS and not quick):
            start = time.perf_counter()
            step(*next(batches))
            seconds.append(time.perf_counter() - start)
    memory = peak_memory()  # before sgemm takes some more
    with blas_threads(cores()):
        peak, busy_with_it = sgemm_peak(n=256 if quick else 2048)
    return statistics.median(seconds), memory, peak, busy_with_it < 0.85 * cores()


@functools.cache
def measure(workload, workers, quick):
    """run() in a fresh process.  For a given number of workers each has one BLAS thread; else both are chosen."""
    threads = argparse.Namespace(workers=workers, blas_threads=workers and 1)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(run, workload, threads, quick).result()
        except BrokenProcessPool:
            raise BenchmarkError(f"the process that measured {workload} died") from None


def make_workload(L, C, B, T):
    config = GPTConfig(n_layer=L, n_head=C // 64, n_embd=C, vocab_size=65, block_size=T)
    return Workload(config, B, STEPS)


def table(name, values, base, quick):
    """Measure and print one table; the last column is a row's memory divided by that of the row above."""
    rows = []
    for value in values:
        shape = {**base, name: value}
        workers = shape.pop("workers")
        workload = make_workload(**shape)
        rows.append((value, workload, *measure(workload, workers, quick)))
    best = max(peak for *_, peak, _ in rows)
    fixed = " ".join(f"{key}{value}" for key, value in base.items() if key not in (name, "workers"))
    print(f"\n{name} varies, {fixed}; sgemm {best / 1e9:.0f} GFLOP/s")
    print(f"{name:<8}{'ms a step':>12}{'tokens/s':>12}{'of sgemm':>10}{'peak memory':>14}{'to above':>10}")
    above = None
    for value, workload, seconds, memory, _, busy in rows:
        print(
            f"{value:<8}{seconds * 1e3:>12,.1f}{workload.tokens / seconds:>12,.0f}"
            f"{workload.flops() / seconds / best:>10.0%}{memory / 1e6:>11,.0f} MB"
            + (f"{memory / above:>10.2f}" if above else " " * 10)
            + ("  BUSY" if busy else ""),
            flush=True,
        )
        above = memory


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=TABLES, nargs="+", default=list(TABLES), help="the tables to make")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that this runs")
    options = parser.parse_args(argv)

    from npgpt.machine import cores

    print(machine_line(machine(["numpy", "numba"]), cores()))
    tiny = make_workload(**{key: TINY[key] for key in "LCBT"})
    for _ in range(2):  # the first may compile the kernels, which takes memory
        _, memory, _, _ = measure.__wrapped__(tiny, 1, quick=True)
    print(f"memory    {memory / 1e6:,.0f} MB with a model of next to nothing")
    for name in options.only:
        if options.quick:
            table(name, QUICK[name], TINY, True)
        else:
            table(name, TABLES[name], BASE, False)
    return 0


if __name__ == "__main__":
    run_command("python -m benchmarks.scaling", main)
