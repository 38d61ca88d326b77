"""Ctrl-C and SIGTERM as a wish to stop: the work at hand is brought to a good end first."""

import os
import signal


class Stop:
    """number: the signal that asked to stop, or None."""

    number = None


def catch_signals():
    """From now on the first Ctrl-C or SIGTERM is noted in the Stop that this returns; a second one ends the process.

    To be called in the main thread, by a program that looks at the Stop until it ends.
    """
    stop = Stop()

    def note(number, _):
        if stop.number is not None:
            os._exit(128 + number)
        stop.number = number

    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):  # the last is Windows' for a console that closes
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), note)
    return stop
