"""A run folder: its lock, its checkpoints, its log, its tokens.

    iter-00000500.safetensors     checkpoints, named after the updates that they have behind them; made at evaluations,
                                  when a run is stopped, and by the clock, of which only the newest is kept
    metrics.jsonl                 the log: one JSON object a line
    tokens-01234567-89abcdef.bin  the corpus as tokens, named after hashes of text and tokenizer, and of what is in it
    lock                          held by the training that writes here, as long as its process lives; says whose it is
    *.set-aside                   what was there beyond the checkpoint that a run went on from

The hashes in the names of token files are twice as long.  What has another name than these is not a run's: it is never
removed.

FORMAT is the number of what a training writes about itself into a checkpoint, its state (npgpt/run/state.py), and of
the names of arrays and files beside it.  A file without a number has format 1.  What may change within a format:

- the state gets a new key, which a file may lack: who reads it says what holds then (as a run is not "by_clock");
- a run gets a new setting (npgpt/config.py), whose default does what was done before there was one.

Whatever else changes, such as the meaning of a key or of an array, is a new format.  Every version reads each format
that was ever written, or says in one line which version does; tests/data/ has a run folder of each.
"""

import contextlib
import errno
import filecmp
import hashlib
import itertools
import json
import os
import platform
import shutil
import time
from pathlib import Path

from npgpt.data import kinds
from npgpt.data.kinds import LOCK, LOG
from npgpt.errors import CANNOT, BusyError, CheckpointError, UsageError, quoted, told_as
from npgpt.files import checkpoint
from npgpt.files.log import Log

FORMAT = 1
MOST_NEAR = 1000  # entries of a folder that are looked at for a model


def _name_of(iteration):
    return f"iter-{iteration:08d}.safetensors"


def checkpoints(path):
    """The paths of a folder's checkpoints, the newest first; none if there is no folder.

    Raises CheckpointError for a folder that cannot be read: nobody knows what is in it.
    """
    return sorted(_files(path, kinds.NAME), key=lambda found: (_number_of(found), found), reverse=True)


def _number_of(path):
    """The number in a checkpoint's name."""
    return int(kinds.NAME.fullmatch(path.name)[1])


def _files(path, pattern):
    """The paths in a folder whose names fit a pattern.  Raises CheckpointError."""
    try:
        return [found for found in Path(path).iterdir() if pattern.fullmatch(found.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"cannot read the folder {path}: {error.strerror}") from None


def newest_until(path, iteration):
    """The newest checkpoint with so many updates at most behind it, or None."""
    return next((found for found in checkpoints(path) if _number_of(found) <= iteration), None)


def newest(path):
    """The newest checkpoint of a folder.  Raises CheckpointError if there is none."""
    if not (found := checkpoints(path)):
        raise CheckpointError(f"there is no checkpoint in {path}{_instead_of(Path(path))}")
    return found[0]


def _instead_of(path):
    """Words for what helps whoever looked for a checkpoint in a folder that has none."""
    if not (inside := sorted(path.glob("*"))):
        return f"; python -m npgpt.train --out-dir {quoted(path)} makes one"
    below = (p for near in inside if near.is_dir() for p in (near, *sorted(near.glob("*"))))
    for near in itertools.islice(below, MOST_NEAR):
        with contextlib.suppress(OSError, CheckpointError):  # it cannot be read
            if near.is_dir() and (checkpoints(near) or (near / "config.json").is_file()):
                return f"; but there is a model in {near}: name that"
    return ": it holds neither iter-*.safetensors, as a run does, nor config.json, as a Hugging Face folder does"


def best(path):
    """The checkpoint with the lowest validation loss, the newer of two with the same; damaged ones do not count.

    The newest one of all may have no loss: it was written between two evaluations.  It is taken if the last evaluation
    was the best one, for then the run was still getting better.

    Raises CheckpointError if there is none.
    """
    states = _states(path)
    if (found := _best_of(states)) is None:
        return newest(path)
    return next(iter(states)) if found == next(iter(_losses(states))) else found


def choice(path):
    """Words on the checkpoint that `best` takes, if it is not the newest or has learnt nothing; None otherwise."""
    if not (found := checkpoints(path)):
        return None
    taken, last = _number_of(best(path)), _number_of(found[0])
    if taken == last != 0:
        return None
    newest = f", and the newest is of iteration {last:,}" if taken != last else ""
    words = ", as the run began" if taken == 0 else ""
    return f"the best checkpoint in {path} is of iteration {taken:,}{words}{newest}: it is taken"


def best_there(path, iteration, loss, best_iter):
    """(loss, iteration) of a run's best checkpoint: those that are given, unless it is not in the run's folder.

    Then those of the best that is there and has `iteration` updates at most; (None, iteration) if there is none.
    """
    if best_iter == iteration or (type(best_iter) is int and (Path(path) / _name_of(best_iter)).exists()):
        return loss, best_iter
    states = {p: s for p, s in _states(path).items() if type(s.get("iter")) is int and s["iter"] <= iteration}
    found = _best_of(states)
    return (None, iteration) if found is None else (states[found]["val_loss"], states[found]["iter"])


def _best_of(states):
    """The checkpoint with the lowest validation loss among the states of some, or None if none has one."""
    losses = _losses(states)
    return min(losses, key=losses.get, default=None)


def _losses(states):
    return {path: state["val_loss"] for path, state in states.items() if isinstance(state.get("val_loss"), float)}


def _states(path):
    """What each of a folder's checkpoints says about its training: path -> dict, the newest first.

    Those that are damaged, or cannot be read now, are left out.
    """
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
    name = kinds.NAME.fullmatch(Path(path).name)  # (of another file none comes before it)
    for older in checkpoints(Path(path).parent):
        if name and older.name < name[0]:
            with contextlib.suppress(CheckpointError), checkpoint.Reader(older):
                return f". The one before it is good: {older}"
    return ""


def load(path):
    """(arrays, state) of a checkpoint file, the optimizer's arrays among them.  Raises CheckpointError as `opened`."""
    with opened(path) as (reader, state):
        return reader.arrays(), state


class RunFolder:
    """A folder that this process writes to.

    Raises CheckpointError if it cannot be written to, and BusyError if another process does.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.notices = []  # lines for a person
        self._log = None  # a Log, while it is open
        with told_as(CheckpointError, f"cannot write to the run folder {self.path}"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        with contextlib.ExitStack() as on_error:
            on_error.callback(os.close, self._lock)
            self._take_lock()
            self._opened = on_error.pop_all()  # what is to be closed: the lock, and the log before it
        with contextlib.suppress(OSError):  # for whoever finds it locked; a full disk is no reason to stop
            os.lseek(self._lock, 0, os.SEEK_SET)
            os.ftruncate(self._lock, 0)
            words = f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
            os.write(self._lock, words.encode("utf-8"))
        with contextlib.suppress(CheckpointError):
            self._remove(_files(self.path, kinds.HALF))  # what processes left that were killed

    def _take_lock(self):
        """Lock the folder.  Raises BusyError, and CheckpointError."""
        try:
            holder = os.read(self._lock, 200).decode("utf-8", "replace").strip()
            if holder and not kinds.HOLDER.fullmatch(holder):
                raise CheckpointError(f"{self.path / LOCK} is not the lock of a training; choose another --out-dir")
            _lock(self._lock)
        except OSError as error:
            if error.errno in _HELD:
                holder = holder or "another process"
                raise BusyError(f"the run folder {self.path} is in use by {holder}; choose another --out-dir") from None
            if error.errno not in CANNOT:
                raise CheckpointError(f"cannot lock {self.path / LOCK}: {error.strerror}") from None
            self.notices.append(
                f"the file system of {self.path} cannot lock a file ({error.strerror}): see to it that no other "
                f"training writes there"
            )

    def close(self):
        """Let the next training in."""
        self._log = None
        self._opened.close()

    # ---- checkpoints

    def clear(self, tokens=None):
        """Remove an earlier run; but not the token file of the name `tokens`, which the new one uses.

        A log without any checkpoint may be nobody's run: it is set aside.
        """
        old, log = checkpoints(self.path), self.path / LOG
        with told_as(CheckpointError, f"nothing was removed: cannot rename {log}"):
            if not old and log.exists() and log.stat().st_size:
                os.replace(log, free_name(log))
        self._remove([*old, log, *(path for path in _files(self.path, kinds.TOKENS) if path.name != tokens)])

    def go_on_from(self, iteration, opened, arrays, state, changed):
        """Set aside what a run leaves behind that goes on from a checkpoint: later checkpoints, and the log as it is.

        opened          the checkpoint, whatever it is named and wherever it lies
        arrays, state   what is in it, but for settings that have changed
        changed         whether some have

        Before anything goes, what the run goes on from lies under its own name: so does who is killed right then.
        Raises CheckpointError; then nothing was changed.
        """
        own, log, made = self.path / _name_of(iteration), self.path / LOG, []
        later = [path for path in reversed(checkpoints(self.path)) if _number_of(path) > iteration]
        is_own = own.exists() and _same(own, opened)
        try:
            for path, goes in ((log, later or not is_own), (own, not is_own)):
                if goes and path.exists():
                    made.append(free_name(path))
                    with told_as(CheckpointError, f"cannot copy {path} to {made[-1]}"):
                        shutil.copyfile(path, made[-1])
            if changed or not is_own:
                self._write(own, arrays, state)
        except CheckpointError as error:
            self._remove(made)
            raise CheckpointError(f"{error}; nothing was changed") from None
        for path in later:
            with contextlib.suppress(OSError):
                os.replace(path, free_name(path))

    def _write(self, path, arrays, state):
        checkpoint.save(path, arrays, {"format": "npgpt", "npgpt": json.dumps(state)})

    def save(self, iteration, arrays, state, keep):
        """Write a checkpoint; then remove all but the newest `keep` and the best.

        Those whose state has a true "by_clock" do not count: of them only this one stays, if it is one.  What cannot be
        read is not removed.
        Raises CheckpointError; then nothing was removed, and the file that had this name is as it was.
        """
        path = self.path / _name_of(iteration)
        if self._log is not None:
            self._log.flush()  # a run that goes on from a checkpoint needs the rows before it
        self._write(path, arrays, state)
        with contextlib.suppress(CheckpointError):  # the folder cannot be read now: the next save removes them
            states = _states(self.path)
            by_clock = {found for found, state in states.items() if state.get("by_clock")}
            counted = [found for found in checkpoints(self.path) if found not in by_clock]
            # what cannot be read now may be the best
            self._remove(({*by_clock, *counted[keep:]} & states.keys()) - {_best_of(states), path})

    def write_tokens(self, name, parts):
        """Write a token file, all of it or nothing; parts: iterable of arrays.  Raises CheckpointError.

        Returns its path, which begins with `name`; tokens_file finds it.
        """
        digest = hashlib.sha256()

        def hashed():
            for part in parts:
                if len(part):
                    digest.update(part)
                    yield memoryview(part).cast("B")

        path = self.path / f"{name}.bin"
        return checkpoint.replace(path, hashed(), final=lambda: _tokens_path(self.path, name, digest))

    def _remove(self, paths):
        for path in paths:
            with contextlib.suppress(OSError):
                path.unlink()

    # ---- log

    def open_log(self, before):
        """Start the log, or go on with it after its rows of iterations 0 .. before - 1.  Raises CheckpointError."""
        self._log = Log(self.path / LOG, before)
        self._opened.callback(self._log.close)

    def log(self, row):
        """Add a row to the log.  Raises CheckpointError; the row is not lost, but written with the next."""
        self._log.add(row)


def _same(path, other):
    """Whether two files have the same content."""
    try:
        return os.path.samefile(path, other) or filecmp.cmp(path, other, shallow=False)
    except OSError:
        return False


def free_name(path):
    """A name for what is set aside that nothing has yet."""
    names = itertools.chain([".set-aside"], (f".set-aside-{n}" for n in itertools.count(2)))
    return next(aside for name in names if not (aside := path.with_name(path.name + name)).exists())


def _tokens_path(folder, name, digest):
    """What a file of tokens must be named in a folder: after what is in it."""
    return Path(folder) / f"{name}-{digest.hexdigest()[:16]}.bin"


def tokens_file(path, name):
    """The path of a folder's token file that begins with `name`, if it is whole, or None.  Raises CheckpointError."""
    return next((found for found in Path(path).glob(f"{name}-*.bin") if is_whole(found)), None)


def is_whole(path):
    """Whether a token file holds what it is named after.  Raises CheckpointError if it cannot be read."""
    digest = hashlib.sha256()
    with told_as(CheckpointError, f"cannot read {path}"), open(path, "rb") as tokens:
        while part := tokens.read(checkpoint.CHUNK):
            digest.update(part)
    return path == _tokens_path(path.parent, path.name.rpartition("-")[0], digest)


# what a lock that another process has is answered with; on Windows the last ones
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)


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
