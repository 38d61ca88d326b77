"""How long a whole training step takes, beside PyTorch: forward, backward, gradient clipping, AdamW.

    python -m benchmarks.step --workload cpu --peer torch

The peer is PyTorch's best on this machine: as written ("eager") and compiled, in float32 and with bfloat16 by autocast,
each with its best number of threads.  All are printed; what cannot run here is named.

Each side lives in a process of its own, so that its memory is its own and its threads disturb nobody: while one side
runs a round of steps, the other is blocked in a read from its pipe.  Before anything is timed, both must find the same
losses from the same weights and batches, over a few whole updates; if they do not, the exit code is 1.

    python -m benchmarks.step --workload cpu --against 508dc90

compares the working tree with a revision of npgpt: see benchmarks/against.py.

    python -m benchmarks.step --workload cpu --profile

says where the time of npgpt's own step goes: see npgpt/kernels/profiler.py.

    python -m benchmarks.step --workload baby --dtype bfloat16

has npgpt step in bfloat16, too, beside its own float32.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import math
import signal
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import against
from benchmarks.common import PAUSE, BenchmarkError, Process, machine, machine_line, peak_memory, positive
from benchmarks.workloads import WORKLOADS, initial_model, initial_weights
from npgpt.config import DTYPES
from npgpt.errors import UsageError, run_command
from npgpt.run.ranks import ALONE, share
from npgpt.signals import NEVER

LEARNING_RATE, BETAS, WEIGHT_DECAY, GRAD_CLIP = 1e-3, (0.9, 0.99), 0.1, 1.0
CHECKED = 3  # steps whose losses must agree
TOLERANCE = 1e-4  # how far, relative: the two sides round differently
BFLOAT16_TOLERANCE = 1e-2  # a number of bfloat16 has 8 bits
ROUNDS = 5
PEERS = ("torch", "torch-compile", "torch-bf16", "torch-compile-bf16")


# --------------------------------------------------------------------------------------------------------------------
# The two sides.  Each is a context that gives
#     step(idx, targets) -> loss     one whole update
#     settle(timed) -> words         choose the number of threads; timed(n) runs n steps and returns the seconds of each
# Only here are npgpt's kernels and torch imported, each in the process that needs it.


@contextlib.contextmanager
def npgpt_step(workload, workers, blas, world=ALONE, dtype="float32"):
    """(a DataParallel, its step); each rank of a World works on its share of the batch."""
    from npgpt.optim import AdamW, clip_scale
    from npgpt.run.parallel import DataParallel

    _, mine = share(world.rank, world.size, 1, workload.batch_size)
    parallel = DataParallel(initial_model(workload.config), workers, blas, world, dtype)
    optimizer = AdamW(parallel.flat, *BETAS, weight_decay=WEIGHT_DECAY)

    def step(idx, targets):
        parallel.zero_grad()
        loss = parallel.forward_backward(idx[mine], targets[mine], weight=1 / world.size, last=True) / world.size
        loss, squares = world.sum(NEVER, loss, parallel.gather_grads())
        parallel.update(optimizer, LEARNING_RATE, clip_scale(math.sqrt(squares), GRAD_CLIP))
        return loss

    yield parallel, step
    parallel.close()


@contextlib.contextmanager
def npgpt_side(workload, options, name="npgpt"):
    """npgpt in float32, or by another name in bfloat16."""
    from npgpt.run.parallel import choose_threads

    threads = options.workers, options.blas_threads
    workers, blas = choose_threads(workload.batch_size, workload.config.block_size, *threads)
    with npgpt_step(workload, workers, blas, dtype="float32" if name == "npgpt" else "bfloat16") as (_, step):
        yield step, lambda timed: f"workers: {workers}, BLAS threads of each: {blas}"


@contextlib.contextmanager
def torch_side(workload, options, name):
    """PyTorch in one of the ways of PEERS."""
    from benchmarks.torch_gpt import TorchGPT, copy_weights, make_adamw, torch, train_step

    model = TorchGPT(workload.config)
    copy_weights(model, initial_weights({name: tuple(p.shape) for name, p in model.named_parameters()}))
    optimizer = make_adamw(model, LEARNING_RATE, BETAS, WEIGHT_DECAY, fused=True)
    compiled = torch.compile(model) if "compile" in name else model

    def forward(idx, targets):
        with torch.autocast("cpu", torch.bfloat16, enabled=name.endswith("bf16")):
            return compiled(idx, targets)

    def step(idx, targets):
        return train_step(model, optimizer, torch.from_numpy(idx), torch.from_numpy(targets), GRAD_CLIP, forward)[0]

    def settle(timed):
        seconds = {}
        for n in sorted({1, options.cores}):
            torch.set_num_threads(n)
            timed(2)  # torch.compile compiles anew for each number of threads
            seconds[n] = statistics.median(timed(3))
        best = min(seconds, key=seconds.get)
        torch.set_num_threads(best)
        return f"{best} threads, the best of " + ", ".join(f"{n}: {s * 1e3:.1f} ms" for n, s in seconds.items())

    yield step, settle


def serve(pipe, side, options, *name):
    """A side's process.  Sends (losses, words about threads), or (None, why not) if a compiled model cannot run here;
    then, for each number n received, the seconds of n steps in a row; and when n is 0 its peak memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; this process ends with it
    workload = WORKLOADS[options.workload]
    batches = itertools.cycle(workload.batches())

    with side(workload, options, *name) as (step, settle):

        def timed(n):
            seconds = []
            for _ in range(n):
                start = time.perf_counter()
                step(*next(batches))
                seconds.append(time.perf_counter() - start)
            return seconds

        try:
            losses = [step(*next(batches)) for _ in range(CHECKED)]
        except Exception as error:  # torch.compile needs a C++ compiler, and raises what it likes
            if "compile" not in "".join(name):
                raise
            pipe.send((None, str(error).strip().splitlines()[0]))
            return
        pipe.send((losses, settle(timed)))
        while n := pipe.recv():  # blocks, and does not spin
            timed(1)  # wakes the threads and fills the caches
            pipe.send(timed(n))
        pipe.send(peak_memory())


class Stepper(Process):
    """A side, and the seconds of its steps."""

    def __init__(self, name, side, options, *args):
        super().__init__(name, serve, side, options, *args)
        self.seconds = []  # a list for each round
        self.losses, self.threads = self.receive()

    def run_round(self, steps):
        time.sleep(PAUSE)  # the threads that worked last go to sleep
        self.seconds.append(self.ask(steps))

    @property
    def median(self):
        return statistics.median(itertools.chain(*self.seconds))


# --------------------------------------------------------------------------------------------------------------------
# The parent


def check_losses(sides, tolerance=TOLERANCE):
    """The worst relative difference between the losses of all sides and those of the first."""
    first, worst = np.array(sides[0].losses), 0.0
    for side in sides:
        difference = np.abs(np.array(side.losses) / first - 1).max()
        if not difference <= (BFLOAT16_TOLERANCE if side.name.endswith("bf16") else tolerance):  # a NaN fails as well
            losses = "; ".join(f"{side.name} {', '.join(f'{loss:.6f}' for loss in side.losses)}" for side in sides)
            raise BenchmarkError(f"the sides do not compute the same: losses of the first steps are {losses}")
        worst = max(worst, difference)
    return float(worst)


def measure(options):
    """Run the benchmark; returns everything that is printed, as a dict for JSON.

    compare() reads the figures of other revisions: what it takes from this dict must stay in it.
    """
    from npgpt.kernels.blas import blas_threads, sgemm_peak

    workload = WORKLOADS[options.workload]
    sides, missing = [Stepper("npgpt", npgpt_side, options)], {}
    if options.dtype == "bfloat16":
        sides.append(Stepper("npgpt-bf16", npgpt_side, options, "npgpt-bf16"))
    for name in PEERS if options.peer == "torch" else ():
        side = Stepper(name, torch_side, options, name)
        if side.losses is None:
            missing[name] = side.threads
        else:
            sides.append(side)
    difference = check_losses(sides)
    peaks = []
    for _ in range(options.rounds):
        for side in sides:
            side.run_round(options.steps or workload.steps)
        time.sleep(PAUSE)
        with blas_threads(options.cores):
            peaks.append(sgemm_peak(n=2048))
    peak, _ = max(peaks)
    result = {
        "workload": options.workload,
        "shape": str(workload),
        **machine(["numpy", "numba"] + ["torch"] * (options.peer == "torch")),
        "cores": options.cores,
        "sgemm_flops_per_second": peak,
        "sgemm_cores": [cores for _, cores in peaks],
        "loss_difference": difference,
        "missing": missing,
        "sides": {
            side.name: {
                "threads": side.threads,
                "seconds": side.median,
                "tokens_per_second": workload.tokens / side.median,
                "share_of_sgemm": workload.flops() / side.median / peak,
                "peak_memory": side.ask(0),
                "rounds": side.seconds,
            }
            for side in sides
        },
    }
    ours = [side for side in sides if side.name.startswith("npgpt")]
    peers = [side for side in sides if side not in ours]
    floats = [side for side in peers if not side.name.endswith("bf16")]
    pairs = [(side, among) for side in ours for among in (floats, peers)] + [(side, ours[:1]) for side in ours[1:]]
    result["ratios"] = [best(side, among) for side, among in pairs if among]
    return result


def best(ours, peers):
    """The quickest of the peers: its name, how many times our seconds it takes, and that in each round."""
    peer = min(peers, key=lambda side: side.median)
    medians = [[statistics.median(seconds) for seconds in side.seconds] for side in (ours, peer)]
    rounds = sorted(b / a for a, b in zip(*medians, strict=True))
    return {"ours": ours.name, "peer": peer.name, "ratio": peer.median / ours.median, "ratio_of_rounds": rounds}


def rounds_while_busy(result):
    """How many rounds had cores that another program was on: sgemm did not get all of them right after it."""
    return sum(cores < 0.85 * result["cores"] for cores in result["sgemm_cores"])


def report(result):
    print(machine_line(result, result["cores"]))
    print(f"workload  {result['workload']}: {result['shape']}")
    print(f"sgemm     {result['sgemm_flops_per_second'] / 1e9:.0f} GFLOP/s, the best of this run")
    busy = rounds_while_busy(result)
    if busy:
        print(f"BUSY      other programs were on the cores after {busy} of {len(result['sgemm_cores'])} rounds")
    for name, side in result["sides"].items():
        print(f"threads   {name}: {side['threads']}")
    for name, reason in result["missing"].items():
        print(f"missing   {name} cannot run here: {reason}")
    if len(result["sides"]) > 1:
        print(f"losses    of the first {CHECKED} steps agree within {result['loss_difference']:.0e}")
    print(f"\n{'':<20} {'ms a step':>10} {'tokens/s':>10} {'of sgemm':>9} {'peak memory':>12}")
    for name, side in result["sides"].items():
        print(
            f"{name:<20} {side['seconds'] * 1e3:>10.1f} {side['tokens_per_second']:>10,.0f} "
            f"{side['share_of_sgemm']:>9.0%} {side['peak_memory'] / 1e6:>9,.0f} MB"
        )
    print()
    for found in result["ratios"]:
        rounds = found["ratio_of_rounds"]
        print(f"{found['peer']} / {found['ours']} = {found['ratio']:.2f} (rounds: {rounds[0]:.2f} to {rounds[-1]:.2f})")


def profile(options):
    """Print where the time of npgpt's step goes."""
    from npgpt.kernels.profiler import Profile, profiling, table
    from npgpt.run.parallel import choose_threads

    workload, found = WORKLOADS[options.workload], Profile()
    threads = choose_threads(workload.batch_size, workload.config.block_size, options.workers, options.blas_threads)
    batches = itertools.cycle(workload.batches())
    with npgpt_step(workload, *threads, dtype=options.dtype) as (_, step):
        for n in range(CHECKED + (options.rounds or ROUNDS) * (options.steps or workload.steps)):
            with profiling(None if n < CHECKED else found):
                step(*next(batches))
    print(machine_line(machine(["numpy", "numba"]), options.cores))
    print(f"workload  {options.workload}: {workload}")
    print(table(found, threads[0]))


def compare(options):
    """The working tree beside another revision.  508dc90 knows these flags and writes these figures already."""
    command = f"benchmarks.step --workload {options.workload} --peer none --rounds 1".split()
    for flag in ("steps", "workers", "blas_threads"):
        if value := getattr(options, flag):
            command += [f"--{flag.replace('_', '-')}", str(value)]
    with tempfile.TemporaryDirectory(prefix="npgpt-") as folder:
        file = Path(folder, "figures.json")

        def read(_):
            found = json.loads(file.read_text())
            side = found["sides"]["npgpt"]
            return {"npgpt": (side["seconds"], side["peak_memory"])}, rounds_while_busy(found) > 0

        return against.compare(options.against, [*command, "--json", str(file)], read, options.rounds)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="cpu")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--peer", choices=("torch", "none"), default="torch")
    other.add_argument("--profile", action="store_true", help="say where the time of npgpt's step goes")
    other.add_argument("--against", metavar="REV", help="compare npgpt with itself at this git revision")
    rounds = f"rounds of each side, in turn ({ROUNDS}; with --against as many as are needed)"
    parser.add_argument("--rounds", type=positive, help=rounds)
    parser.add_argument("--steps", type=positive, help="steps in a round (default: a second's or more)")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of npgpt's products (%(default)s)")
    parser.add_argument("--workers", type=positive, help="npgpt's worker threads (default: chosen)")
    parser.add_argument("--blas-threads", type=positive, help="BLAS threads of each (default: chosen)")
    parser.add_argument("--json", metavar="FILE", help="write all figures to a file too")
    options = parser.parse_args(argv)
    if options.profile and options.json:
        parser.error("--json has nothing to write of --profile")
    needs_peer = options.peer != "none" and not options.against and not options.profile
    if needs_peer and importlib.util.find_spec("torch") is None:
        raise UsageError("PyTorch is not installed: pip install torch, or measure npgpt alone with --peer none")

    from npgpt.machine import cores

    options.cores = cores()
    if options.profile:
        profile(options)
        return 0
    if options.against:
        result = compare(options)
        against.report(result, "ms a step")
    else:
        options.rounds = options.rounds or ROUNDS
        result = measure(options)
        report(result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_command("python -m benchmarks.step", main)
