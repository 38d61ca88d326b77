"""Ctrl-C and SIGTERM as a wish to stop: the work at hand is brought to a good end first."""

import contextlib
import os
import signal


class Stop:
    """number: the signal that asked to stop, or None."""

    number = None


@contextlib.contextmanager
def catching_signals():
    """Within this context the first Ctrl-C or SIGTERM is noted in the Stop that it gives; a second one ends the process
    at once.  To be entered in the main thread.
    """
    stop = Stop()

    def note(number, _):
        if stop.number is not None:
            os._exit(128 + number)
        stop.number = number

    names = ("SIGINT", "SIGTERM", "SIGBREAK")  # the last is Windows' for a console that closes
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
