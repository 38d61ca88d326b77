"""The log of a run, metrics.jsonl: one JSON object a line, written row by row and read as a whole."""

import contextlib
import json
import math
import os
from pathlib import Path

from npgpt.data.kinds import LOG
from npgpt.errors import CheckpointError, told_as
from npgpt.files import checkpoint

MOST = 1e100  # no number of a log is larger


def read_log(path):
    """The rows of a run's log, as dicts with an integer "iter"; a last line that is cut off does not count.

    Raises CheckpointError if there is no log, or none that can be read.
    """
    path = Path(path) / LOG
    with told_as(CheckpointError, f"cannot read {path}", f"{path.parent} is not a run folder: it has no {LOG}"):
        rows = [_row(line) for line in path.read_bytes().split(b"\n")[:-1]]
    if None in rows:
        raise CheckpointError(f"{path} is damaged: line {rows.index(None) + 1} is not a row of a log")
    return rows


def _row(line):
    """The row that a line of a log holds, or None."""
    try:
        row = json.loads(line)
        whole = type(row["iter"]) is int
        whole &= not any(isinstance(x, (int, float)) and MOST < abs(x) < math.inf for x in row.values())
        return row if whole else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


class Log:
    """A log that is open for writing, after its rows of iterations 0 .. before - 1; later rows are cut off.

    A line between them that is none stays where it is.  Raises CheckpointError.
    """

    def __init__(self, path, before):
        self.path, self._pending, self._good = path, b"", 0  # what the file still lacks, its length so far
        words = f"cannot write to the run folder {path.parent}"
        with told_as(CheckpointError, words), contextlib.ExitStack() as on_error:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            on_error.callback(self.close)
            end = 0
            for line in path.read_bytes().split(b"\n")[:-1]:
                end += len(line) + 1
                if (row := _row(line)) and row["iter"] < before:
                    self._good = end
            os.ftruncate(self._file, self._good)
            on_error.pop_all()

    def close(self):
        os.close(self._file)

    def add(self, row):
        """Add a row.  Raises CheckpointError; the row is not lost, but written with the next."""
        self._pending += json.dumps(row, allow_nan=False).encode("utf-8") + b"\n"
        try:
            os.lseek(self._file, self._good, os.SEEK_SET)
            written = 0
            while written < len(self._pending):
                written += os.write(self._file, self._pending[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._good)  # half a row would be none
            raise CheckpointError(f"cannot write {self.path}: {error.strerror}") from None
        self._good += len(self._pending)
        self._pending = b""

    def flush(self):
        """Have the log on the disk.  Raises CheckpointError."""
        with told_as(CheckpointError, f"cannot write {self.path}"):
            checkpoint.flush(self._file)
