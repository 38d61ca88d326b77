"""Our matrix product (npgpt/kernels/matmul.py) beside NumPy's BLAS, in all layouts, by one thread and by several.

    python -m benchmarks.products

Each cell is a shape and a layout: the median of alternating runs, as BLAS's seconds over ours.  Cells in which ours is
slower than LOW are measured again, and the second figure counts.  Correctness is checked first.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks.common import PAUSE, BenchmarkError, machine, machine_line, positive
from npgpt.errors import UsageError, run_command

LOW = 0.95
WAKE = 0.06  # seconds in which a side's threads wake up, and the system finds a core for each
LEAST = 2e7  # multiplications and additions in what is timed: a small product is made several times
LAYOUTS = {"a b": (False, False), "aT b": (True, False), "a bT": (False, True), "aT bT": (True, True)}
# (M, K, N) of linear layers and MLPs, forward and backward, of C = 128, 384, 768; of heads; squares; and odd ones
SHAPES = [
    *((384, 128, N) for N in (128, 384, 512)), (384, 512, 128), (384, 384, 128),
    *((128, 384, N) for N in (384, 512)), (512, 384, 128),
    *((2048, 384, N) for N in (384, 1152, 1536)), (2048, 1536, 384), (2048, 1152, 384),
    *((384, 2048, N) for N in (384, 1152, 1536)), (1536, 2048, 384), (1152, 2048, 384),
    *((256, 768, N) for N in (768, 2304, 3072)), (256, 3072, 768), (256, 2304, 768),
    *((768, 256, N) for N in (768, 2304, 3072)), (3072, 256, 768), (2304, 256, 768),
    (256, 768, 50257), (50257, 256, 768), (256, 50257, 768),
    (2048, 384, 65), (65, 2048, 384), (2048, 65, 384), (768, 768, 256),
    (256, 256, 256), (512, 512, 512), (1024, 1024, 1024), (1000, 333, 777), (97, 1031, 211),
]  # fmt: skip


def operand(rng, rows, columns, turned):
    x = rng.standard_normal((columns, rows) if turned else (rows, columns), np.float32)
    return x.T if turned else x


def cell(shape, layout, threads, alternations):
    """(BLAS's median seconds, ours) for a product."""
    from npgpt.kernels.matmul import matmul

    (M, K, N), rng = shape, np.random.default_rng(0)
    a, b = operand(rng, M, K, LAYOUTS[layout][0]), operand(rng, K, N, LAYOUTS[layout][1])
    out, expected, times = np.empty((M, N), np.float32), a @ b, max(1, round(LEAST / (M * K * N)))
    matmul(out, a, b)
    if not np.abs(out - expected).max() <= 1e-5 * np.abs(expected).max():
        raise BenchmarkError(f"the product of {M} x {K} x {N}, {layout}, is wrong")
    seconds = [], []
    for _ in range(alternations):
        for side, multiply in enumerate((lambda: np.matmul(a, b, out=out), lambda: matmul(out, a, b))):
            if threads > 1:
                time.sleep(PAUSE)  # the other side's threads spin before they sleep
                start = time.perf_counter()
                while time.perf_counter() < start + WAKE:  # as in a step, where products come one after the other
                    multiply()
            start = time.perf_counter()
            for _ in range(times):
                multiply()
            seconds[side].append((time.perf_counter() - start) / times)
    return tuple(map(statistics.median, seconds))


def measure(options):
    from npgpt.kernels.blas import blas_threads

    cells = []
    for threads in options.threads:
        with blas_threads(threads):
            for shape in SHAPES:
                for layout in LAYOUTS:
                    blas, ours = cell(shape, layout, threads, options.alternations)
                    again = blas / ours < LOW
                    if again:
                        blas, ours = cell(shape, layout, threads, options.alternations)
                    cells.append(dict(threads=threads, shape=shape, layout=layout, blas=blas, ours=ours, again=again))
                row = cells[-len(LAYOUTS) :]
                flops = 2e-9 * shape[0] * shape[1] * shape[2]
                figures = (
                    f"{flops / c['blas']:5.0f} {flops / c['ours']:5.0f} {c['blas'] / c['ours']:5.2f}" for c in row
                )
                print(f"{threads} {shape[0]:6d} {shape[1]:6d} {shape[2]:6d}   {'   '.join(figures)}", flush=True)
    return cells


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=positive, nargs="+", help="(1, and as many as there are cores)")
    parser.add_argument("--alternations", type=positive, default=9, help="of each cell (9)")
    parser.add_argument("--json", metavar="FILE", help="write all figures to a file too")
    options = parser.parse_args(argv)

    from npgpt.kernels.matmul import PRODUCTS
    from npgpt.machine import cores

    if PRODUCTS != "ours":
        raise UsageError("the products are BLAS's here; NPGPT_PRODUCTS=ours has ours measured")
    options.threads = options.threads or sorted({1, cores()})
    print(machine_line(machine(["numpy", "numba"]), cores()))
    print(f"GFLOP/s of BLAS, of ours, and our speed over BLAS's, for {', '.join(LAYOUTS)}\nthreads, M, K, N")
    cells = measure(options)
    ratios = sorted(c["blas"] / c["ours"] for c in cells)
    below = sum(ratio < LOW for ratio in ratios)
    print(f"\nof {len(ratios)} cells {below} are under {LOW} ({below / len(ratios):.1%}); ", end="")
    print(f"lowest {ratios[0]:.2f}, mean {statistics.mean(ratios):.3f}, highest {ratios[-1]:.2f}")
    if options.json:
        Path(options.json).write_text(json.dumps(cells, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command("python -m benchmarks.products", main)
