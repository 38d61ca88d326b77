"""The errors a user can act on, and the exit code each one ends a command with.

    0    ok
    1    a check found something wrong, and says what (gradcheck, explain, exercise check and report);
         or a bug in npgpt (an ordinary traceback)
    2-6  an error below
    128  and a signal's number: stopped by it (130: Ctrl-C, 143: SIGTERM, 129: a terminal that closes)
    141  whoever read the output stopped reading (as in `... | head`)
"""

import atexit
import contextlib
import errno
import os
import re
import shlex
import signal
import sys
import threading

# What a file system answers that cannot do at all what it is asked for: lock, flush or map a file.  That is no "no".
CANNOT = frozenset(getattr(errno, name) for name in "ENOSYS ENOTSUP EOPNOTSUPP ENOLCK EINVAL ENODEV ENOTTY".split())


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


@contextlib.contextmanager
def told_as(kind, words, missing=None):
    """Within this context an OSError becomes an NpgptError of this kind: these words, and what the system says.

    missing: the words for a file that is not there, if others are wanted.
    """
    try:
        yield
    except OSError as error:
        is_missing = missing and isinstance(error, (FileNotFoundError, NotADirectoryError))
        raise kind(missing if is_missing else f"{words}: {error.strerror}") from None


def user_path(path, what="path"):
    """The file or folder that a user names, as text: with the home folder in the place of a leading ~.

    A shell does that, but not behind a =, nor in a program.  What is really named ~ is reached as ./~.
    Raises UsageError.
    """
    path = os.path.expanduser(str(os.fsdecode(path)))
    if "\0" in path:
        raise UsageError(f"{what}: a null character is in no file's name")
    return os.path.abspath(path) if os.path.normpath(path).startswith("~") else path  # for Path("./~") is Path("~")


def quoted(name):
    """A file's name as it stands in a command line, for this system's shell."""
    name = str(name)
    if name.startswith(("-", "~")):  # or it would be a flag, or the home folder
        name = os.path.join(".", name)
    if os.name == "nt":
        return name if re.fullmatch(r"[\w.:\\/~-]+", name) else f'"{name}"'
    return shlex.quote(name)


def run_command(name, main):
    """Run a command's `main()` and exit with its code: one line instead of a traceback for a user's mistake.

    An error without words is one that another process has told of.  A process that goes on, as a notebook's does, is
    left as it was found.
    """
    with _signals_given_back():
        try:
            code = main()
        except NpgptError as error:
            code = error.exit_code
            if str(error):
                _complain(f"{name}: {error}")
        except KeyboardInterrupt:
            code = 130
            _complain(f"{name}: stopped", before="\n")
        except BrokenPipeError:
            code = 141
            atexit.register(_forget_output)
        except OSError as error:  # a name that is too long, an output on a full disk
            code = 2 if error.errno == errno.ENAMETOOLONG else 3
            place = "" if error.filename is None else f": {str(error.filename)[:60]}"
            _complain(f"{name}: {error.strerror or error}{place}")
            atexit.register(_forget_output)
    sys.exit(code)


def one_line(text):
    """A text that may hold a file's name or what a file holds, without what would break its line."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _complain(text, before=""):
    with contextlib.suppress(OSError):  # behind standard error, too, there may be a full disk
        print(before + one_line(text), file=sys.stderr, flush=True)


def _forget_output():
    """At a process's end: what cannot be written to standard output is dropped, or Python would complain of it."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _signals_given_back():
    """After this context signals have the handlers that they had before.

    At the process's end they have the context's own once more: Python's would print a traceback while it clears up.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone can change them
        yield
        return
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            own = signal.getsignal(number)
            if own != handler and handler is not None:  # None: it is not Python's
                signal.signal(number, handler)
                atexit.register(signal.signal, number, own)
