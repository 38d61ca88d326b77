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

TOLERANCE = 1e-4  # of an output's largest entry: the two sides round differently
P_DROP = 0.1
KEY = np.uint32(0xC0FFEE)  # of the dropout mask


# --------------------------------------------------------------------------------------------------------------------
# Cases


class Cases:
    """A method for each pair, which makes its reference's arguments.  linear is the layer that makes q, k and v."""

    def __init__(self, workload):
        c = workload.config
        self.B, self.T, self.V = workload.batch_size // 2, c.block_size, c.vocab_size
        self.N, self.C, self.H, self.bias = self.B * self.T, c.n_embd, c.n_head, c.bias
        self.n_parameters = (c.n_layer * 12 * self.C**2 + (self.V + self.T) * self.C) // 2
        self.rng = np.random.default_rng(0)

    def new(self, *shape):
        return self.rng.standard_normal(shape, np.float32)

    def tokens(self, *shape):
        return self.rng.integers(0, self.V, shape)

    def matmul(self):
        return self.new(self.N, self.C), self.new(4 * self.C, self.C).T

    def embedding_forward(self):
        idx = self.tokens(self.B, self.T)
        return idx, self.new(self.V, self.C), self.new(self.T, self.C)

    def embedding_backward(self):
        idx, dy = self.tokens(self.B, self.T), self.new(self.B, self.T, self.C)
        return self.new(self.V, self.C), self.new(self.T, self.C), dy, idx

    def layernorm_forward(self):
        return self.new(self.N, self.C), self.new(self.C), self.new(self.C), 1e-5

    def layernorm_backward(self):
        from npgpt.ops.layernorm import layernorm_forward_ref

        x, weight, bias, eps = self.layernorm_forward()
        _, mean, rstd = layernorm_forward_ref(x, weight, bias, eps)
        return self.new(self.N, self.C), x, weight, mean, rstd

    def linear_forward(self):
        bias = self.new(3 * self.C) if self.bias else None
        return self.new(self.N, self.C), self.new(3 * self.C, self.C), bias

    def linear_backward(self):
        x, weight, _ = self.linear_forward()
        return self.new(self.N, 3 * self.C), x, weight

    def mlp_forward(self):
        C, F = self.C, 4 * self.C
        scale = np.float32(C**-0.5)  # activations of about 1, as in training: GELU is not the identity there
        return self.new(self.N, C), self.new(F, C) * scale, self.new(F), self.new(C, F) * scale, self.new(C)

    def mlp_backward(self):
        from npgpt.ops.mlp import mlp_forward_ref

        x, w_fc, b_fc, w_proj, b_proj = self.mlp_forward()
        _, pre = mlp_forward_ref(x, w_fc, b_fc, w_proj, b_proj)
        return self.new(self.N, self.C), x, w_fc, w_proj, pre

    def attention_forward(self):
        return self.new(self.B, self.T, 3 * self.C), self.H, 0.0, KEY, 0

    def attention_backward(self):
        from npgpt.ops.attention import attention_forward_ref

        args = self.attention_forward()
        _, lse = attention_forward_ref(*args)
        dy = self.new(self.B, self.T, self.C)
        return dy, args[0], lse, *args[1:]

    def cross_entropy_forward(self):
        return self.new(self.N, self.V), self.tokens(self.N), -1, self.N

    def cross_entropy_backward(self):
        from npgpt.ops.cross_entropy import cross_entropy_forward_ref

        logits, targets, ignore_index, count = self.cross_entropy_forward()
        _, lse = cross_entropy_forward_ref(logits, targets, ignore_index, count)
        return 1.0, logits, targets, lse, ignore_index, count

    def dropout_rows(self):
        return self.new(self.N, self.C), KEY, 0, P_DROP

    def sum_of_squares(self):
        return (self.new(self.n_parameters),)

    def symmetric_product(self):
        a = self.new(8, self.C, self.C)
        a = (a + a.swapaxes(1, 2)) / np.float32(8 * self.C) ** 0.5
        return a, a @ a

    def newton_schulz(self):
        return self.new(8, self.C, self.C), self.new(8, self.C, self.C)

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

    import npgpt.model
    import npgpt.muon
    import npgpt.optim  # noqa: F401  (all for their pairs)
    from npgpt.kernels.blas import blas_threads, sgemm_peak
    from npgpt.kernels.buffers import BufferPool, reuse_buffers
    from npgpt.kernels.jit import KERNELS, PAIRS
    from npgpt.machine import cores

    if KERNELS != "numba":
        raise UsageError("with NPGPT_KERNELS=numpy there is nothing to measure: the references are all that runs")
    workload = WORKLOADS[options.workload]
    cases = Cases(workload)
    missing = [name for name in PAIRS if not hasattr(cases, name)]
    if missing:
        raise BenchmarkError(f"no case for {', '.join(missing)}: give benchmarks.kernels.Cases a method of that name")
    with blas_threads(1), reuse_buffers(BufferPool()):
        print(machine_line(machine(["numpy", "numba"]), cores()))
        print(f"workload  half a batch of {options.workload}: {workload}")
        print(f"sgemm     {sgemm_peak(n=2048)[0] / 1e9:.0f} GFLOP/s, one thread\n")
        print(f"{'':<24}{'us fast':>10}{'us reference':>14}{'ratio':>8}{'speed':>16}{'error':>10}")
        for name, (fast, reference) in PAIRS.items():
            args = getattr(cases, name)()
            ours, theirs, flops, nbytes, error = measure(name, fast, reference, args, options.repeats)
            speed = f"{flops / ours / 1e9:.1f} GFLOP/s" if flops else f"{nbytes / ours / 1e9:.1f} GB/s   "
            row = f"{name:<24}{ours * 1e6:>10,.0f}{theirs * 1e6:>14,.0f}{theirs / ours:>8.1f}{speed:>16}{error:>10.0e}"
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    run_command("python -m benchmarks.kernels", main)
