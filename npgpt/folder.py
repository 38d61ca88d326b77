"""A run folder: its lock, its checkpoints, its log, its tokens.

    iter-00000500.safetensors     checkpoints, named after the updates that they have behind them; made at evaluations,
                                  when a run is stopped, and by the clock, of which only the newest is kept
    metrics.jsonl                 the log: one JSON object a line
    tokens-01234567-89abcdef.bin  the corpus as tokens, named after hashes of text and tokenizer, and of what is in it
    lock                          held by the training that writes here, as long as its process lives
    *.set-aside                   what was there beyond the checkpoint that a run went on from

The hashes in the names of token files are twice as long.

FORMAT is the number of what a training writes about itself into a checkpoint, its state (Trainer._save), and of the
names of arrays and files beside it.  A file without a number has format 1.  What may change within a format:

- the state gets a new key, which a file may lack: who reads it says what holds then (as a run is not "by_clock");
- a run gets a new setting (npgpt/config.py), whose default does what was done before there was one.

Whatever else changes, such as the meaning of a key or of an array, is a new format.  Every version reads each format
that was ever written, or says in one line which version does; tests/data/ has a run folder of each.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import time
from pathlib import Path

from npgpt import checkpoint
from npgpt.errors import BusyError, CheckpointError, UsageError, quoted

FORMAT = 1
LOCK = "lock"
_NAME = re.compile(r"iter-(\d{8,})\.safetensors")


def checkpoints(path):
    """The paths of a folder's checkpoints, the newest first."""
    try:
        found = [(int(match[1]), p) for p in Path(path).iterdir() if (match := _NAME.fullmatch(p.name))]
    except OSError:
        return []
    return [p for _, p in sorted(found, reverse=True)]


def newest_until(path, iteration):
    """The newest checkpoint with so many updates at most behind it, or None."""
    return next((p for p in checkpoints(path) if int(_NAME.fullmatch(p.name)[1]) <= iteration), None)


def newest(path):
    """The newest checkpoint of a folder.  Raises CheckpointError if there is none."""
    found = checkpoints(path)
    if not found:
        raise CheckpointError(
            f"there is no checkpoint in {path}; python -m npgpt.train --out-dir {quoted(path)} makes one"
        )
    return found[0]


def best(path):
    """The checkpoint with the lowest validation loss, the newer of two with the same; damaged ones do not count.

    Raises CheckpointError if there is none.
    """
    return _best_of(_states(path)) or newest(path)


def _best_of(states):
    """The checkpoint with the lowest validation loss among the states of some, or None if none has one."""
    losses = {found: state.get("val_loss") for found, state in states.items()}
    losses = {found: loss for found, loss in losses.items() if isinstance(loss, float)}
    return min(losses, key=losses.get) if losses else None


def _states(path):
    """What each of a folder's checkpoints says about its training: path -> dict, the newest first, no damaged ones."""
    states = {}
    for found in checkpoints(path):
        with contextlib.suppress(CheckpointError):
            states[found] = read_state(checkpoint.load_metadata(found), found)
    return states


def read_state(metadata, path):
    """What a training wrote about itself into the metadata of a checkpoint, as a dict.  Raises CheckpointError."""
    try:
        state = json.loads(metadata["npgpt"])
    except (KeyError, ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} was not written by npgpt.train")
    if state.get("format", 1) != FORMAT:
        raise CheckpointError(
            f"{path} has format {state['format']}, and this version reads format {FORMAT}; "
            f"{writer_of(state)} wrote it: use that version"
        )
    return state


def writer_of(state):
    """Words for the version that wrote a state."""
    environment = state.get("environment")
    version = environment.get("npgpt") if isinstance(environment, dict) else None
    return f"npgpt {version}" if isinstance(version, str) else "another npgpt"


@contextlib.contextmanager
def opened(path):
    """(Reader, state) of a checkpoint file, which is open as long as the `with` lasts.

    A CheckpointError names the previous good one of its folder.
    """
    with contextlib.ExitStack() as stack:
        try:
            reader = stack.enter_context(checkpoint.Reader(path))
            state = read_state(reader.metadata, path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{_good_before(path)}") from None
        yield reader, state


def _good_before(path):
    """Words that name the newest good checkpoint of a folder that is older than this one, if there is one."""
    name = _NAME.fullmatch(Path(path).name)  # (of another file none comes before it)
    for older in checkpoints(Path(path).parent):
        if name and older.name < name[0]:
            with contextlib.suppress(CheckpointError), checkpoint.Reader(older):
                return f". The one before it is good: {older}"
    return ""


def load(path):
    """(arrays, state) of a checkpoint file, the optimizer's arrays among them.  Raises CheckpointError as `opened`."""
    with opened(path) as (reader, state):
        return reader.arrays(), state


MOST = 1e100  # no number of a log is larger


def read_log(path):
    """The rows of a run's log, as dicts with an integer "iter"; a last line that is cut off does not count.

    Raises CheckpointError if there is no log, or none that can be read.
    """
    path = Path(path) / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path.parent} is not a run folder: it has no metrics.jsonl") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if lines and not lines[-1].endswith(b"\n"):
        del lines[-1]
    rows = []
    for n, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            whole = type(row["iter"]) is int
            whole &= not any(isinstance(x, (int, float)) and MOST < abs(x) < math.inf for x in row.values())
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if not whole:
            raise CheckpointError(f"{path} is damaged: line {n} is not a row of a log")
        rows.append(row)
    return rows


class RunFolder:
    """A folder that this process writes to.

    Raises CheckpointError if it cannot be written to, and BusyError if another process does.
    """

    def __init__(self, path):
        self.path = Path(path)
        self._log, self._pending, self._good = None, b"", 0  # the log's file, what it still lacks, its length so far
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise CheckpointError(f"cannot write to the run folder {self.path}: {error.strerror}") from None
        try:
            _lock(self._lock)
        except OSError:
            holder = os.read(self._lock, 200).decode("utf-8", "replace").strip() or "another process"
            os.close(self._lock)
            raise BusyError(f"the run folder {self.path} is in use by {holder}; choose another --out-dir") from None
        with contextlib.suppress(OSError):  # for whoever finds it locked; a full disk is no reason to stop
            os.ftruncate(self._lock, 0)
            words = f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
            os.write(self._lock, words.encode("utf-8"))
        for name in ("iter-*", "tokens-*"):  # what processes left that were killed
            self._remove(self.path.glob(name + checkpoint.TEMPORARY))

    def close(self):
        """Let the next training in."""
        if self._log is not None:
            os.close(self._log)
            self._log = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # ---- checkpoints

    def clear(self, tokens=None):
        """Remove an earlier run; but not the token file of the name `tokens`, which the new one uses."""
        old_tokens = (path for path in self.path.glob("tokens-*.bin") if path.name != tokens)
        self._remove([*checkpoints(self.path), self.path / "metrics.jsonl", *old_tokens])

    def forget_after(self, iteration, opened):
        """Set aside the checkpoints beyond `iteration`, and the log: a run that is resumed from there makes its own.

        opened: the checkpoint that it goes on from; another one of the same iteration is set aside, too.
        Raises CheckpointError if the log cannot be copied.
        """
        numbers = [(int(_NAME.fullmatch(path.name)[1]), path) for path in checkpoints(self.path)]
        later = [path for n, path in numbers if n > iteration or (n == iteration and path.name != opened.name)]
        log = self.path / "metrics.jsonl"
        if later and log.exists():
            copy = free_name(log)
            try:
                shutil.copyfile(log, copy)
            except OSError as error:
                self._remove([copy])
                raise CheckpointError(f"cannot copy {log} to {copy}: {error.strerror}; nothing was changed") from None
        for path in later:
            with contextlib.suppress(OSError):
                os.replace(path, free_name(path))

    def save(self, iteration, arrays, state, keep):
        """Write a checkpoint; then remove all but the newest `keep` and the best.

        Those whose state has a true "by_clock" do not count: of them only this one stays, if it is one.
        Raises CheckpointError; then nothing was removed, and the file that had this name is as it was.
        """
        path = self.path / f"iter-{iteration:08d}.safetensors"
        self._flush_log()
        checkpoint.save(path, arrays, {"format": "npgpt", "npgpt": json.dumps(state)})
        states = _states(self.path)
        by_clock = {found for found, state in states.items() if state.get("by_clock")}
        counted = [found for found in checkpoints(self.path) if found not in by_clock]
        self._remove({*by_clock, *counted[keep:]} - {_best_of(states), path})

    def write_tokens(self, name, parts):
        """Write a token file, all of it or nothing; parts: iterable of arrays.  Raises CheckpointError.

        Returns its path, which begins with `name`; tokens_file finds it.
        """
        temporary = self.path / f"{name}.bin.{os.getpid()}{checkpoint.TEMPORARY}"
        digest = hashlib.sha256()

        def hashed():
            for part in parts:
                if len(part):
                    digest.update(part)
                    yield memoryview(part).cast("B")

        try:
            checkpoint.write(temporary, hashed())
            path = _tokens_path(self.path, name, digest)
            os.replace(temporary, path)
            checkpoint.flush_folder(self.path)
            return path
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path / name}.bin: {error.strerror}") from None
        finally:
            self._remove([temporary])  # there is one if anything went wrong, be it with the text

    def _remove(self, paths):
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink()

    # ---- log

    def open_log(self, before):
        """Start the log, or go on with it after its rows of iterations 0 .. before - 1; later rows are cut off.

        A line between them that is none stays where it is.  Raises CheckpointError.
        """
        path = self.path / "metrics.jsonl"
        try:
            self._log = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            self._good = end = 0
            for line in path.read_bytes().splitlines(keepends=True):
                end += len(line)
                if line.endswith(b"\n") and _row_before(line, before):
                    self._good = end
            os.ftruncate(self._log, self._good)
        except OSError as error:
            raise CheckpointError(f"cannot write to the run folder {self.path}: {error.strerror}") from None

    def log(self, row):
        """Add a row to the log.  Raises CheckpointError; the row is not lost, but written with the next."""
        self._pending += json.dumps(row, allow_nan=False).encode("utf-8") + b"\n"
        try:
            os.lseek(self._log, self._good, os.SEEK_SET)
            written = 0
            while written < len(self._pending):
                written += os.write(self._log, self._pending[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._log, self._good)  # half a row would be none
            raise CheckpointError(f"cannot write {self.path / 'metrics.jsonl'}: {error.strerror}") from None
        self._good += len(self._pending)
        self._pending = b""

    def _flush_log(self):
        """Have the log on the disk, as a run that goes on from a checkpoint needs the rows before it."""
        if self._log is not None:
            try:
                os.fsync(self._log)
            except OSError as error:
                raise CheckpointError(f"cannot write {self.path / 'metrics.jsonl'}: {error.strerror}") from None


def free_name(path):
    """A name for what is set aside that nothing has yet."""
    names = itertools.chain([".set-aside"], (f".set-aside-{n}" for n in itertools.count(2)))
    return next(aside for name in names if not (aside := path.with_name(path.name + name)).exists())


def _tokens_path(folder, name, digest):
    """What a file of tokens must be named in a folder: after what is in it."""
    return Path(folder) / f"{name}-{digest.hexdigest()[:16]}.bin"


def tokens_file(path, name):
    """The path of a folder's token file that begins with `name`, if it is whole, or None.  Raises CheckpointError."""
    for found in Path(path).glob(f"{name}-*.bin"):
        digest = hashlib.sha256()
        try:
            with open(found, "rb") as tokens:
                while part := tokens.read(checkpoint.CHUNK):
                    digest.update(part)
        except OSError as error:
            raise CheckpointError(f"cannot read {found}: {error.strerror}") from None
        if found == _tokens_path(path, name, digest):
            return found
    return None


def _row_before(line, iteration):
    try:
        return json.loads(line)["iter"] < iteration
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _lock(file):
    """Lock an open file for this process alone, or raise OSError at once.  The system unlocks it when it ends."""
    if os.name == "nt":
        import msvcrt

        os.lseek(file, 2**20, os.SEEK_SET)  # beyond what is written there, so that it can be read
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_run(path):
    """Whether a training has written to a folder."""
    made = checkpoints(path) or (Path(path) / "metrics.jsonl").exists() or any(Path(path).glob("tokens-*.bin"))
    return (Path(path) / LOCK).is_file() and bool(made)


def refuse_earlier_run(path):
    """Raise UsageError if a folder holds checkpoints, or is no folder."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UsageError(f"--out-dir {path} is a file; name a folder")
    if checkpoints(path):
        raise UsageError(
            f"{path} holds an earlier run. Go on with it by --resume, choose another folder with --out-dir, "
            f"or add --overwrite to replace it"
        )
