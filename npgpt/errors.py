"""The errors a user can act on, and the exit code each one ends a command with.

    0    ok
    1    a check found something wrong, and says what (gradcheck, explain, exercise check);
         or a bug in npgpt (an ordinary traceback)
    2    usage: flags, data or prompt                UsageError
    3    a checkpoint or the disk                    CheckpointError
    4    the training diverged                       DivergedError
    5    another training holds the run folder       BusyError
    6    a gradient of a run is wrong                GradientError
    130  stopped by Ctrl-C                           StoppedError
    143  stopped by SIGTERM; 129 by a terminal that  StoppedError
         closes; others: 128 and the signal's number
    141  whoever read the output stopped reading (as in `... | head`)
"""

import contextlib
import errno
import os
import re
import shlex
import sys

# What a file system answers that cannot do at all what it is asked for: lock, flush or map a file.  That is no "no".
CANNOT = frozenset(
    getattr(errno, name) for name in ("ENOSYS", "ENOTSUP", "EOPNOTSUPP", "ENOLCK", "EINVAL", "ENODEV", "ENOTTY")
)


class NpgptError(Exception):
    """Something the user can mend.  Its text is one line that says what and how."""

    exit_code = 1


class UsageError(NpgptError):
    """A flag, a data file or a prompt that cannot be used."""

    exit_code = 2


class CheckpointError(NpgptError):
    """A checkpoint that cannot be read, or a file that cannot be written."""

    exit_code = 3


class DivergedError(NpgptError):
    """A loss or gradient that is not a finite number."""

    exit_code = 4


class BusyError(NpgptError):
    """A run folder that another training writes to."""

    exit_code = 5


class GradientError(NpgptError):
    """A gradient that an audit found to be wrong: a bug in npgpt, in a change to it, or in the machine."""

    exit_code = 6


class StoppedError(NpgptError):
    """A signal that ended the work; number: the signal's."""

    def __init__(self, number, message):
        super().__init__(message)
        self.exit_code = 128 + number


def quoted(name):
    """A file's name as it stands in a command line, for this system's shell."""
    name = os.path.join(".", name) if str(name).startswith("-") else str(name)  # or it would be a flag
    if os.name == "nt":
        return name if re.fullmatch(r"[\w.:\\/~-]+", name) else f'"{name}"'
    return shlex.quote(name)


def run_command(name, main):
    """Run a command's `main()` and exit with its code: one line instead of a traceback for a user's mistake.

    An error without words is one that another process has told of.
    """
    try:
        sys.exit(main())
    except NpgptError as error:
        if str(error):
            _complain(f"{name}: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _complain(f"\n{name}: stopped")
        sys.exit(130)
    except BrokenPipeError:
        _forget_output()
        sys.exit(141)
    except OSError as error:  # a name that is too long, an output on a full disk
        place = "" if error.filename is None else f": {str(error.filename)[:60]}"
        _complain(f"{name}: {error.strerror or error}{place}")
        _forget_output()
        sys.exit(2 if error.errno == errno.ENAMETOOLONG else 3)


def _complain(text):
    with contextlib.suppress(OSError):  # behind standard error, too, there may be a full disk
        print(text, file=sys.stderr, flush=True)


def _forget_output():
    """What could not be written to standard output is dropped, or Python would complain once more at its exit."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
