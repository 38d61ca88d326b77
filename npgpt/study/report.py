"""What a class has done: each student's file is checked in a process of its own, with a limit of time and of memory.

A student's file is code, and is run.  What hangs, crashes or takes too much memory ends its own process, and is a row.
"""

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from npgpt.errors import UsageError, one_line
from npgpt.machine import cores

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None

MEMORY = 2 * 2**30  # bytes
WORDS = 120  # characters of what is wrong that a line shows at most
_CHECK = (  # what the process runs
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from npgpt.study import report; report.check_alone(sys.argv[2], sys.argv[3])"
)


@dataclass
class Row:
    """What came of an exercise in a file."""

    op: str = ""  # none where the file does not get so far
    state: str = ""  # right, wrong, unfinished, stopped (by an exception), hangs, crashes, nothing (no exercise in it)
    parts: dict = field(default_factory=dict)  # result -> ok, wrong or blank
    words: str = ""  # the first thing that is wrong, in a line
    file: str = ""


def rows_of(folder, seconds=60):
    """A Row for each exercise in the files FOLDER/NAME.py and FOLDER/NAME/*.py, in order.  Raises UsageError."""
    folder, stop = Path(folder), threading.Event()
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}")
    files = sorted(path for pattern in ("[!.]*.py", "[!.]*/[!.]*.py") for path in folder.glob(pattern))
    if not files:
        raise UsageError(f"{folder} has no files NAME.py or NAME/FILE.py")
    with ThreadPoolExecutor(cores()) as pool:
        try:
            found = [*pool.map(lambda path: _check(path, seconds, stop), files)]
        except BaseException:  # Ctrl-C: nothing goes on
            stop.set()
            raise
    for path, rows in zip(files, found, strict=True):
        for row in rows:
            row.file = path.relative_to(folder).as_posix()
    return [row for rows in found for row in rows]


def _check(path, seconds, stop):
    """What a process of its own finds in a file: [Row]."""
    if stop.is_set():
        return [Row(state="stopped")]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        child = subprocess.Popen(
            [sys.executable, "-c", _CHECK, json.dumps(sys.path), str(path), str(result)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "NPGPT_KERNELS": "numpy", "OPENBLAS_NUM_THREADS": "1"},  # which start fast
        )  # fmt: skip
        end = time.monotonic() + seconds
        try:
            while child.poll() is None and time.monotonic() < end and not stop.wait(0.02):
                pass
            hangs = child.poll() is None
        finally:
            with contextlib.suppress(OSError):
                if os.name == "posix":  # with all that it started; other systems have no such groups
                    os.killpg(child.pid, signal.SIGKILL)
                else:
                    child.kill()
            child.wait()
        if hangs:
            return [Row(state="hangs", words=f"it did not end within {seconds:g} s")]
        try:
            return [Row(**row) for row in json.loads(result.read_text(encoding="utf-8"))]
        except (OSError, ValueError, TypeError):
            code = child.returncode
            how = f"exit code {code}" if code >= 0 else f"signal {-code}"
            how = next((number.name for number in signal.Signals if number == -code), how)
            return [Row(state="crashes", words=f"its process ended before the check did ({how})")]


def check_alone(path, result):
    """In a process of its own: check a file, and write to `result` what came of it."""
    from npgpt.study.check import check_file

    if resource is not None:
        with contextlib.suppress(OSError, ValueError):  # macOS may refuse
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # what crashes leaves no file
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            limit = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        rows = [row_of(outcome) for outcome in check_file(path, lambda line: None)]
    except UsageError as error:
        rows = [Row(state="nothing", words=str(error))]
    Path(result).write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
    os._exit(0)  # whatever a student's threads still do


def row_of(outcome):
    """The Row of an Outcome."""
    states = set(outcome.parts.values())
    if outcome.passed:
        state = "right"
    elif not states:
        state = "stopped"
    else:
        state = "unfinished" if states <= {"ok", "blank"} and "blank" in states else "wrong"
    return Row(outcome.op, state, outcome.parts, outcome.words)


# --------------------------------------------------------------------------------------------------------------------
# What the command prints


def stuck_at(rows):
    """[(how many, where)] of what is not right, the most frequent first."""
    where = collections.Counter()
    for row in rows:
        wrong = [name for name, state in row.parts.items() if state == "wrong"]
        if row.state != "right":
            where.update([f"{row.op} {name}" for name in wrong] or [f"{row.op} {row.state}".strip()])
    return [(n, place) for place, n in where.most_common()]


def as_text(rows):
    """The lines of a report."""
    width = max(len(one_line(row.file)) for row in rows)
    for row in rows:
        blank = ", ".join(name for name, state in row.parts.items() if state == "blank")
        words = one_line(row.words) or (f"blank: {blank}" if blank else "")
        words = words if len(words) <= WORDS else words[: WORDS - 1] + "…"
        yield f"{one_line(row.file):<{width}}  {row.op:<14} {row.state:<10}  {words}".rstrip()
    right = sum(row.state == "right" for row in rows)
    yield f"{right} of {len(rows)} are right" + ("; the others are stuck at" if right < len(rows) else "")
    for n, place in stuck_at(rows):
        yield f"  {n:>3}  {place}"


def as_json(rows):
    stuck = [{"where": place, "how_many": n} for n, place in stuck_at(rows)]
    return json.dumps({"rows": [asdict(row) for row in rows], "stuck_at": stuck}, indent=1)
