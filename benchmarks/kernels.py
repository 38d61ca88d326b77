"""Every fast function beside the NumPy reference that it replaces (npgpt.kernels.jit.PAIRS), on one thread, in float32.

    python -m benchmarks.kernels --workload cpu

Sizes are those of a worker's share of a workload: half of its sequences, half of its parameters.  Both must first
compute the same; then they take turns, and each starts with the other's data in the cache.  GB/s counts every array
once for being read and once for being written, as if nothing were kept from one loop to the next; products are told
in GFLOP/s instead, beside the sgemm peak of one thread.
"""

import argparse
import inspect
import statistics
import time

import numpy as np

from benchmarks.common import BenchmarkError, machine, machine_line, positive
from benchmarks.workloads import WORKLOADS
from npgpt.errors import UsageError, run_command
from npgpt.study.lesson import New
from npgpt.study.lessons import LESSONS, lesson_of

TOLERANCE = 1e-4  # of an output's largest entry: the two sides round differently
P_DROP = 0.1


# --------------------------------------------------------------------------------------------------------------------
# Cases


class Cases:
    """The arguments of each pair's reference: an op's lesson makes them, others have a method here."""

    def __init__(self, workload):
        c = workload.config
        self.new, self.C = New(np.float32), c.n_embd
        B, T, V, C = workload.batch_size // 2, c.block_size, c.vocab_size, c.n_embd
        self.N, self.n_parameters = B * T, (c.n_layer * 12 * C**2 + (V + T) * C) // 2
        self.sizes = dict(  # of what lessons make; linear is the layer that makes q, k and v
            B=B, T=T, V=V, N=B * T, C=C, F=4 * C, I=C, O=3 * C, block_size=T, n_head=c.n_head, hs=C // c.n_head,
            bias=c.bias, scale=C**-0.5, p=P_DROP, p_drop=0.0, batch_offset=0, first_row=0,
        )  # fmt: skip

    def of(self, name, reference):
        lesson = lesson_of(reference)
        if lesson is None:
            return getattr(self, name)()
        wanted = inspect.signature(lesson.arguments).parameters
        sizes = {k: v for k, v in self.sizes.items() if k in wanted}
        return lesson.reference_arguments(reference, self.new, **sizes)

    def matmul(self):
        return self.new(self.N, self.C), self.new(4 * self.C, self.C).T

    def add_both(self):
        return self.new(self.N, self.C), self.new(self.N, self.C)

    add_to = add_both

    def sum_of_squares(self):
        return (self.new(self.n_parameters),)

    def inverse_root(self):
        x = self.new(self.C, self.C)
        return (x @ x.T,)

    def take_step(self):
        return self.new(4 * self.C, self.C), self.new(4 * self.C, self.C), 0.3, 0.9

    def nesterov(self):
        return self.new(self.n_parameters), self.new(self.n_parameters), 0.3, 0.9

    def adamw(self):
        p, m, v, g = (self.new(self.n_parameters) for _ in range(4))
        return p, m, v**2, g, 0.3, 1e-3, 0.9, 0.99, 1e-8, 0.1, 10


# --------------------------------------------------------------------------------------------------------------------
# Measuring


def copies(args):
    """What is updated in place must be each side's own."""
    return [arg.copy() if isinstance(arg, np.ndarray) else arg for arg in args]


def measure(name, fast, reference, args, repeats):
    """(median seconds of fast, of the reference, FLOPs, bytes, relative error).

    Raises BenchmarkError if they disagree.
    """
    from npgpt.kernels.jit import COSTS

    ours, theirs = copies(args), copies(args)
    results = reference(*theirs)
    results = [np.asarray(result) for result in (results if isinstance(results, tuple) else (results,))]
    if len(inspect.signature(fast).parameters) > len(theirs):  # outputs are arguments of their own
        outputs = [np.full(result.shape, np.nan, result.dtype) for result in results]
        ours = outputs + ours
    else:
        outputs = ours[: len(results)]
    fast(*ours)
    errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(outputs, results, strict=True)]
    if not np.less_equal(errors, TOLERANCE).all():  # a NaN fails as well
        raise BenchmarkError(f"{name} and its reference do not compute the same: relative error {np.max(errors):.1e}")
    seconds = [], []
    for _ in range(repeats):
        for side, function, args in zip(seconds, (fast, reference), (ours, theirs), strict=True):
            start = time.perf_counter()
            function(*args)
            side.append(time.perf_counter() - start)
    return *map(statistics.median, seconds), *COSTS[name](*ours), max(errors)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="cpu")
    parser.add_argument("--repeats", type=positive, default=20, help="calls of each, in turn (%(default)s)")
    options = parser.parse_args(argv)

    import npgpt.kernels.sum_kernels
    import npgpt.muon
    import npgpt.optim  # noqa: F401  (for their pairs)
    from npgpt.kernels.blas import blas_threads, sgemm_peak
    from npgpt.kernels.buffers import BufferPool, reuse_buffers
    from npgpt.kernels.jit import KERNELS, PAIRS
    from npgpt.machine import cores

    if KERNELS != "numba":
        raise UsageError("with NPGPT_KERNELS=numpy there is nothing to measure: the references are all that runs")
    workload = WORKLOADS[options.workload]
    cases = Cases(workload)
    for lesson in LESSONS.values():
        lesson.module()  # for its pairs
    missing = [name for name, (_, reference) in PAIRS.items() if not (lesson_of(reference) or hasattr(cases, name))]
    if missing:
        raise BenchmarkError(f"no case for {', '.join(missing)}: write a lesson, or a method of that name in Cases")
    with blas_threads(1), reuse_buffers(BufferPool()):
        print(machine_line(machine(["numpy", "numba"]), cores()))
        print(f"workload  half a batch of {options.workload}: {workload}")
        print(f"sgemm     {sgemm_peak(n=2048)[0] / 1e9:.0f} GFLOP/s, one thread\n")
        print(f"{'':<24}{'us fast':>10}{'us reference':>14}{'ratio':>8}{'speed':>16}{'error':>10}")
        for name, (fast, reference) in PAIRS.items():
            args = cases.of(name, reference)
            ours, theirs, flops, nbytes, error = measure(name, fast, reference, args, options.repeats)
            speed = f"{flops / ours / 1e9:.1f} GFLOP/s" if flops else f"{nbytes / ours / 1e9:.1f} GB/s   "
            row = f"{name:<24}{ours * 1e6:>10,.0f}{theirs * 1e6:>14,.0f}{theirs / ours:>8.1f}{speed:>16}{error:>10.0e}"
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    run_command("python -m benchmarks.kernels", main)
