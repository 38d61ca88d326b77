"""Ctrl-C and other signals as a wish to stop: the work at hand is brought to a good end first."""

import contextlib
import os
import signal
import threading

from npgpt.errors import StoppedError


def _there(*names):
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


# Ctrl-C; what `kill` sends; what Open MPI's mpiexec and Slurm's --signal pass on; Windows' for a console that closes
ASKED = _there("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK")
# A terminal that closes, a limit of processor time, an alarm, a power supply that fails, and what Slurm may be told to
# send.  Nobody insists who sends one of these again: a terminal does so at once, a limit every second.
TOLD = _there("SIGHUP", "SIGXCPU", "SIGALRM", "SIGVTALRM", "SIGPWR", "SIGUSR2")
SIGNALS = [*ASKED, *TOLD]


class Stop:
    """number: the signal that asked to stop, or None.

    warned: what is called when mpiexec may be about to end this process, but not within `held`; None for nothing.
    """

    number = warned = None


NEVER = Stop()  # of whoever is not to be stopped; nobody changes it


class StopNow(Exception):
    """Unwinds to where a checkpoint can be written.  number: the signal that asked to stop."""

    def __init__(self, number):
        self.number = number


class _Held(threading.local):
    depth, waiting = 0, None


_held = _Held()


@contextlib.contextmanager
def held():
    """Within this context of the main thread a warning waits: for its end, or for that of the one around it."""
    _held.depth += 1
    try:
        yield
    finally:
        _held.depth -= 1
        if _held.depth == 0 and _held.waiting is not None:
            warned, _held.waiting = _held.waiting, None
            warned()


@contextlib.contextmanager
def interrupts_noted(stop):
    """Within this context of the main thread Ctrl-C is noted in a Stop, and the second one is a KeyboardInterrupt.

    A handler that is not Python's own stays in its place.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def note(number, frame):
        if stop.number is not None:
            signal.default_int_handler(number, frame)
        stop.number = number

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def until_interrupted(run):
    """Iterates over run(stop), which is told of Ctrl-C by its Stop, and is to end with a StoppedError then.

    That is raised as a KeyboardInterrupt.  Between two of its events Ctrl-C does what it did before.
    """
    stop = Stop()
    with contextlib.closing(run(stop)) as events:
        while True:
            try:
                with interrupts_noted(stop):
                    event = next(events)
            except StopIteration:
                return
            except StoppedError as stopped:
                raise KeyboardInterrupt(str(stopped)) from None
            yield event


def catch_signals():
    """From now on the first of SIGNALS is noted in the Stop that this returns; a second one of ASKED ends the process.

    What was ignored of TOLD stays ignored: nohup does that with SIGHUP.  To be called in the main thread, by a program
    that looks at the Stop until it ends.
    """
    stop = Stop()

    def note(number, _):
        if stop.number is None:
            stop.number = number
        elif number in ASKED:
            os._exit(128 + number)

    def warn(number, _):
        if _held.depth:
            _held.waiting = stop.warned
        elif stop.warned is not None:
            stop.warned()

    for number in SIGNALS:
        if number in ASKED or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note)
    if hasattr(signal, "SIGCONT"):
        # what Open MPI's mpiexec sends first when it is told to end; SIGTERM and SIGKILL follow within half a second
        signal.signal(signal.SIGCONT, warn)
    return stop
