"""Threads that wait for each other inside kernels: they count, spin, and take their jobs from one that has more.

A thread that sleeps needs tens of microseconds to wake up; one that spins needs a fraction of one, and a core.  So the
threads that share a token (npgpt/generate/decode.py) spin, and sleep only if a job is long in coming.  So do those of
a crew (crew.py), for half a millisecond.
"""

import os

from npgpt.kernels.jit import KERNELS, helper, inside_kernels, intrinsic, kernel
from npgpt.kernels.vectors import pause, written

if KERNELS == "numba":
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils

WAITS, CLAIMED, SLEEPS = 0, 1, 2  # the states of a thread that works for another one: see `next_job`
PATIENCE = 2000  # looks that a waiting thread takes, most of them some tenths of a microsecond long


@helper
def _check_counter(counter):
    if len(counter) == 0:
        raise ValueError("a counter, or a thread's state, needs a number: this array has none")


def _at_counter(signature, write):
    """What an intrinsic of a counter and numbers is made of: write(builder, pointer to counter[0], *numbers).

    A counter is the first number of an array of int64, which threads look at and change in one indivisible step.
    None for what is none.
    """
    kind = signature.args[0]
    if not (isinstance(kind, types.Array) and kind.dtype == types.int64 and kind.ndim == 1 and kind.mutable):
        return None
    return written(signature, lambda _, builder, arrays, numbers: write(builder, arrays[0].data, *numbers))


@intrinsic
def _look(typingctx, counter):
    """counter[0] as it is in memory now."""
    return _at_counter(types.int64(counter), lambda builder, at: builder.load_atomic(at, "seq_cst", 8))


def _atomic(operation):
    """The intrinsic that does an operation of LLVM's atomicrmw on counter[0] and n; it returns what stood there."""

    @intrinsic
    def atomic(typingctx, counter, n):
        signature = types.int64(counter, types.int64)
        return _at_counter(signature, lambda builder, at, n: builder.atomic_rmw(operation, at, n, "seq_cst"))

    return atomic


_add_atomically, _swap_atomically = _atomic("add"), _atomic("xchg")


@intrinsic
def _change_atomically(typingctx, counter, old, new):
    """Whether counter[0] was `old`; then it is `new` now.  One indivisible step."""

    def write(builder, at, old, new):
        return builder.extract_value(builder.cmpxchg(at, old, new, "seq_cst", "seq_cst"), 1)

    return _at_counter(types.boolean(counter, types.int64, types.int64), write)


@intrinsic
def _let_others_run(typingctx):
    """Tell the system that this thread has nothing to do; where it knows of no such call, nothing happens."""

    def write(context, builder, arrays, others):
        if os.name == "posix":
            call = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, call, "sched_yield"), [])

    return written(types.void(), write)


@intrinsic
def _pause(typingctx):
    return written(types.void(), lambda context, builder, arrays, others: pause(builder))


@kernel
def look(counter, seen, times):
    """Look so many times, or until counter[0] is no longer `seen`, counter (1,) int64: to be called from Python."""
    _check_counter(counter)
    for _ in range(times):
        if _look(counter) != seen:
            break
        _pause()


@inside_kernels
def count_up(counter):
    """counter[0] += 1, inside a kernel only; what this thread wrote before is seen by whoever sees the new number."""
    _check_counter(counter)
    _add_atomically(counter, 1)


@inside_kernels
def meet(counter, n):
    """Wait until n threads have come here as often as this one, inside a kernel only.

    counter (1,) int64, 0 at first, is shared by the threads.  Who makes it negative sets all of them free, here and at
    every later meeting.
    """
    if n == 1:
        return
    _check_counter(counter)
    arrived = _add_atomically(counter, 1) + 1
    all_here = (arrived + n - 1) // n * n
    turns = 0
    while 0 <= _look(counter) < all_here:
        turns += 1
        if turns > 1000:  # the thread that we wait for may be waiting for this core
            _let_others_run()


@inside_kernels
def next_job(jobs, seen, state):
    """Wait, as a thread that works for another one, until jobs[0] is no longer `seen`, inside a kernel only.

    Returns False if that takes long: then the thread should go to sleep, and somebody must wake it up for its next job.
    state (1,) tells what is the case, and changes from one to the next in one indivisible step: WAITS; CLAIMED by
    somebody who will count jobs[0] up (see `claim`), for whom the thread waits as long as it takes; or SLEEPS.
    """
    _check_counter(jobs)
    _check_counter(state)
    turns = 0
    while _look(jobs) == seen:
        turns += 1
        if turns > 1000:
            _let_others_run()
        if turns == PATIENCE and _change_atomically(state, WAITS, SLEEPS):
            return False
    _swap_atomically(state, WAITS)
    return True


@inside_kernels
def claim(states):
    """Make sure that no thread goes to sleep any more before its next job, inside a kernel only.

    states (n, any): a row for each thread, whose first number is its state.  Returns the threads that sleep already, as
    the bits of a number.
    """
    asleep = 0
    for thread in range(len(states)):
        _check_counter(states[thread])
        if _swap_atomically(states[thread], CLAIMED) == SLEEPS:
            asleep |= 1 << thread
    return asleep
