"""Where the time of a training step goes.

    profile = Profile()
    with profiling(profile):
        trainer.step()
    profile.rows["mlp_forward"]        # Row(calls=4, seconds=0.0054, flops=403..., nbytes=...)

Only what the thread does that entered `profiling` is measured: with several workers, that is the first one's share of
the batch, and the seconds of all rows and what lies between them add up to the time that went by.  What a measured
function calls belongs to it; but a matrix product has a row of its own for its shape, and the rest is its caller's.

Kernels are wrapped only while a Profile is made: otherwise, a debugger's stack has no frame of this file.
"""

import contextlib
import functools
import sys
import threading
import time
from dataclasses import dataclass


@dataclass
class Row:
    """One function's calls: their time, the FLOPs of their matrix products, the bytes of the arrays they were given."""

    calls: int = 0
    seconds: float = 0.0
    flops: int = 0
    nbytes: int = 0


class Profile:
    """rows: name of a measured function -> Row; seconds: time spent within `profiling`; entries: how often that was."""

    def __init__(self):
        self.rows, self.seconds, self.entries = {}, 0.0, 0


_profile, _thread = None, None
_taken = 0.0, 0  # of the function that runs now: seconds and FLOPs of those within it that have rows of their own
_kernels = {}  # id of a kernel -> (the kernel, what takes its place while a Profile is made)


@contextlib.contextmanager
def profiling(profile):
    """Within this context the current thread's calls of measured functions are added to a Profile (None: to none)."""
    global _profile, _thread
    if profile is None:
        yield
        return
    before = _profile, _thread  # of a Profile that is made around this one
    places = [  # in which a module of npgpt has a kernel: in its own one, and wherever it is imported
        (vars(module), name, value)
        for full_name, module in list(sys.modules.items())
        if full_name.partition(".")[0] == "npgpt"
        for name, value in vars(module).items()
        if id(value) in _kernels
    ]
    for names, name, kernel in places:
        names[name] = _kernels[id(kernel)][1]
    _profile, _thread = profile, threading.get_ident()
    start = time.perf_counter()
    try:
        yield
    finally:
        profile.seconds += time.perf_counter() - start
        profile.entries += 1
        _profile, _thread = before
        for names, name, kernel in places:
            names[name] = kernel


@contextlib.contextmanager
def measuring(name, cost, *args, whole=True):
    """Within this context what goes on is measured while a Profile is made.  cost(*args) -> (FLOPs, bytes).

    whole: all that is measured within it belongs to it; otherwise only what has no row of its own.
    """
    global _profile, _taken
    profile = _profile
    if profile is None or _thread != threading.get_ident():
        yield
        return
    before, _taken = _taken, (0.0, 0)
    if whole:
        _profile = None
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds, within = time.perf_counter() - start, _taken
        _profile, _taken = profile, (before[0] + seconds, before[1])  # at once: arguments that are wrong have no cost
        flops, nbytes = cost(*args)
        row = profile.rows.setdefault(name, Row())
        row.calls, row.seconds = row.calls + 1, row.seconds + seconds - within[0]
        row.flops, row.nbytes = row.flops + flops - within[1], row.nbytes + nbytes
        _taken = _taken[0], _taken[1] + flops


def measured(name, cost, whole=True):
    """Decorator: calls are measured while a Profile is made.

    name: of the row, or a function of the arguments that tells it; cost, whole: see `measuring`.
    """

    def decorate(function):
        @functools.wraps(function)
        def call(*args):
            with measuring(name(*args) if callable(name) else name, cost, *args, whole=whole):
                return function(*args)

        return call

    return decorate


def measured_kernel(kernel, name, cost):
    """Returns the kernel, which stays what it is: while a Profile is made, `measured` takes its place."""
    _kernels[id(kernel)] = kernel, measured(name, cost, whole=False)(kernel)
    return kernel


def table(profile, workers):
    """Where the time of an update went, as text: a line for each op's forward and backward."""
    n, total = profile.entries, profile.seconds
    whose = f", of which the first of {workers} workers does this share" if workers > 1 else ""
    lines = [
        "-" * 60,
        f"an update, the mean of {n:,}, takes {total / n * 1e3:,.2f} ms{whose}:",
        f"{'':<26}{'calls':>7}{'ms':>10}{'GFLOP':>9}{'GB':>8}{'GFLOP/s':>9}{'GB/s':>7}{'share':>7}",
    ]
    rest = total
    for name, row in sorted(profile.rows.items(), key=lambda item: -item[1].seconds):
        rest -= row.seconds
        rate = f"{row.flops / row.seconds / 1e9:.0f}" if row.flops else ""
        lines.append(
            f"{name:<26}{row.calls / n:>7.0f}{row.seconds / n * 1e3:>10.3f}{row.flops / n / 1e9:>9.3f}"
            f"{row.nbytes / n / 1e9:>8.4f}{rate:>9}{row.nbytes / row.seconds / 1e9:>7.0f}{row.seconds / total:>7.1%}"
        )
    lines.append(f"{'graph, Python, waiting':<26}{'':>7}{rest / n * 1e3:>10.3f}{'':>33}{rest / total:>7.1%}")
    return "\n".join(lines)
