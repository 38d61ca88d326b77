"""A process of its own that saves a run, while mpiexec ends the one that trains.

Open MPI's mpiexec, told to end, sends SIGCONT to its processes, then SIGTERM, and SIGKILL half a second later: too soon
for a large model's checkpoint.  So

- npgpt.signals.catch_signals takes SIGCONT for a warning, and calls `Stop.warned` between any two instructions of the
  main thread; but not within `held`, where weights, moments and iteration do not belong together: then it waits;
- while a run of several ranks goes on, `Stop.warned` is Saving.save_aside, which starts the process that is here: a
  fork, which has the memory as it is now, in a session of its own, which mpiexec does not know;
- if the run lives on, whoever saves next waits for that process first: no two write a checkpoint at a time.

Where a process cannot fork (Windows) nothing is started, and the last checkpoint is what a killed run goes on from.
"""

import os
import signal
import warnings

from npgpt.signals import SIGNALS


def start(save):
    """The number of a new process that calls save(), which returns whether there is a checkpoint now; None if none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of threads, which are not there in the new process
            child = os.fork()
    except (AttributeError, OSError):  # Windows knows no forks; or there is no memory for it
        return None
    if child:
        return child
    saved = False
    try:
        os.setsid()  # away from the processes that mpiexec kills
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        saved = save()
    finally:
        os._exit(not saved)
