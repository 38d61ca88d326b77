"""Our matrix product (npgpt/kernels/matmul.py) beside NumPy's BLAS, in all layouts, by one thread and by several.

    python -m benchmarks.products

Each cell is a shape and a layout: the median of alternating runs, as BLAS's seconds over ours.  Cells in which ours is
slower than LOW are measured again, and the second figure counts.  Correctness is checked first.

    python -m benchmarks.products --dtype bfloat16

measures products of bfloat16 beside PyTorch's torch.mm.  Both sides have float32 and give float32, so both convert.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks.common import PAUSE, BenchmarkError, machine, machine_line, positive
from npgpt.config import DTYPES
from npgpt.errors import UsageError, run_command

LOW = 0.95
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}  # of the largest number: PyTorch rounds what it gives to bfloat16, too
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


def peer_of(dtype, threads):
    """What the peer does: a function of (out, a, b)."""
    if dtype == "float32":
        return lambda out, a, b: np.matmul(a, b, out=out)
    import torch

    torch.set_num_threads(threads)

    def multiply(out, a, b):
        a, b = (torch.from_numpy(x).to(torch.bfloat16) for x in (a, b))
        torch.from_numpy(out).copy_(torch.mm(a, b))

    return multiply


def cell(shape, layout, threads, dtype, alternations):
    """(the peer's median seconds, ours) for a product."""
    from npgpt.kernels.matmul import matmul

    (M, K, N), rng = shape, np.random.default_rng(0)
    a, b = operand(rng, M, K, LAYOUTS[layout][0]), operand(rng, K, N, LAYOUTS[layout][1])
    out, expected, times = np.empty((M, N), np.float32), a @ b, max(1, round(LEAST / (M * K * N)))
    sides = peer_of(dtype, threads), matmul
    for side in sides:
        side(out, a, b)
        if not np.abs(out - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max():
            raise BenchmarkError(f"the product of {M} x {K} x {N}, {layout}, is wrong")
    seconds = [], []
    for _ in range(alternations):
        for side, product in enumerate(sides):
            multiply = functools.partial(product, out, a, b)
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
    from npgpt.kernels.matmul import products_of

    cells = []
    for threads in options.threads:
        with blas_threads(threads), products_of(options.dtype):
            for shape in SHAPES:
                for layout in LAYOUTS:
                    how = shape, layout, threads, options.dtype, options.alternations
                    peer, ours = cell(*how)
                    again = peer / ours < LOW
                    if again:
                        peer, ours = cell(*how)
                    cells.append(dict(threads=threads, shape=shape, layout=layout, peer=peer, ours=ours, again=again))
                row = cells[-len(LAYOUTS) :]
                flops = 2e-9 * shape[0] * shape[1] * shape[2]
                figures = (
                    f"{flops / c['peer']:5.0f} {flops / c['ours']:5.0f} {c['peer'] / c['ours']:5.2f}" for c in row
                )
                print(f"{threads} {shape[0]:6d} {shape[1]:6d} {shape[2]:6d}   {'   '.join(figures)}", flush=True)
    return cells


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=positive, nargs="+", help="(1, and as many as there are cores)")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="(%(default)s)")
    parser.add_argument("--alternations", type=positive, default=9, help="of each cell (9)")
    parser.add_argument("--json", metavar="FILE", help="write all figures to a file too")
    options = parser.parse_args(argv)

    from npgpt.kernels.matmul import PRODUCTS
    from npgpt.machine import cores

    if options.dtype == "bfloat16" and importlib.util.find_spec("torch") is None:
        raise UsageError("PyTorch, which is the peer of products of bfloat16, is not installed: pip install torch")
    if options.dtype == "float32" and PRODUCTS != "ours":
        raise UsageError("the products are BLAS's here; NPGPT_PRODUCTS=ours has ours measured")
    options.threads = options.threads or sorted({1, cores()})
    print(machine_line(machine(["numpy", "numba"]), cores()))
    peer = "BLAS" if options.dtype == "float32" else "PyTorch"
    print(f"GFLOP/s of {peer}, of ours, and our speed over {peer}'s, for {', '.join(LAYOUTS)}\nthreads, M, K, N")
    cells = measure(options)
    ratios = sorted(c["peer"] / c["ours"] for c in cells)
    below = sum(ratio < LOW for ratio in ratios)
    print(f"\nof {len(ratios)} cells {below} are under {LOW} ({below / len(ratios):.1%}); ", end="")
    print(f"lowest {ratios[0]:.2f}, mean {statistics.mean(ratios):.3f}, highest {ratios[-1]:.2f}")
    if options.json:
        Path(options.json).write_text(json.dumps(cells, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command("python -m benchmarks.products", main)
