"""Tokens in files, which are mapped: they are read where they are looked at, and never in memory as a whole."""

import hashlib
import mmap
import os
from pathlib import Path

import numpy as np

from npgpt.errors import CANNOT, CheckpointError, NpgptError, StoppedError, UsageError, told_as

PIECE = 2**20  # bytes that are read at a time
SPLITS = "train.bin", "val.bin"  # the files of a folder of tokens


def check_stop(stop):
    """Raise StoppedError if somebody has asked to stop; stop: a Stop, or None."""
    if stop is not None and stop.number is not None:
        raise StoppedError(stop.number, "stopped before anything was trained")


class TokenFiles:
    """A folder with train.bin and val.bin, the two splits as tokens of 16 bits, as nanoGPT's prepare.py writes them.

    train, val              the splits, (n,) uint16, mapped from their files
    fingerprint             sha256 over both files
    n_characters, n_bytes   None: there is no text

    force    whether they are read even if they look like numbers of another width
    Raises UsageError.
    """

    dtype = np.dtype("<u2")
    n_characters = n_bytes = None

    def __init__(self, path, stop=None, force=False):
        self.path, self._stop = Path(path), stop
        digest, self._largest = hashlib.sha256(), {}
        for name in SPLITS:
            file = self.path / name
            with told_as(UsageError, f"data: cannot read {file}"):
                size = file.stat().st_size
            if size % 2:
                raise UsageError(f"data: {file} has {size:,} bytes, which is odd: it does not hold tokens of 16 bits")
            if size < 4:
                raise UsageError(f"data: {file} has {size // 2} tokens; it needs 2 at least")
            digest.update(f"{name} {size} ".encode())
            self._largest[name] = 0
            for i, part in enumerate(self._parts(name)):
                if i == 0 and not force:
                    self._check_width(file, size, part)
                digest.update(part)
                self._largest[name] = max(self._largest[name], int(part.max()))
        self.fingerprint = digest.hexdigest()
        self.train, self.val = (map_tokens(self.path / name, self.dtype) for name in SPLITS)

    @staticmethod
    def _check_width(file, size, part):
        """Raise UsageError for a file that begins like one of numbers that have more than 16 bits."""
        if part.tobytes().startswith(b"\x93NUMPY"):
            raise UsageError(f"data: {file} is an array of NumPy's with its header; write it by array.tofile(file)")
        for n, bits in ((4, 64), (2, 32)):
            numbers = part[: min(len(part), 4096) // n * n].reshape(-1, n)
            low, high = numbers[:, :1], numbers[:, 1:]
            # no vocabulary is larger than 4 x 65,536 tokens
            fits = len(numbers) >= 8 and size % (2 * n) == 0 and low.any() and not high[:, 1:].any()
            if fits and (not high.any() or (high.max() < 4 and low.max() >= 256)):
                raise UsageError(
                    f"data: {file} looks like numbers of {bits} bits, and tokens have 16: write it by "
                    f"array.astype('uint16').tofile(file); --force reads it as it is"
                )

    def _parts(self, name):
        path = self.path / name
        with told_as(UsageError, f"data: cannot read {path}"), open(path, "rb") as file:
            while raw := file.read(PIECE):
                check_stop(self._stop)
                yield np.frombuffer(raw, self.dtype)

    def check(self, vocab_size):
        """Raise UsageError for the first token that a vocabulary of this size does not have."""
        for name, largest in self._largest.items():
            at = 0
            for part in self._parts(name) if largest >= vocab_size else ():
                if len(wrong := np.flatnonzero(part >= vocab_size)):
                    raise UsageError(
                        f"data: {self.path / name} has token {part[wrong[0]]} at position {at + wrong[0]:,}, but the "
                        f"vocabulary has {vocab_size:,} tokens; was it made with another --tokenizer?"
                    )
                at += len(part)


def map_tokens(path, dtype, n=None):
    """(n,) tokens of a file, read where they are looked at; None if there is no such file, or its length is another.

    Where the file system cannot map files they are read.  Raises CheckpointError if it cannot be read.
    """
    try:
        size = os.path.getsize(path)
        if not size or size % dtype.itemsize or (n is not None and size != n * dtype.itemsize):
            return None
        try:
            return np.asarray(np.memmap(path, dtype, "r"))
        except OSError as error:
            if error.errno not in CANNOT:
                raise
            return np.fromfile(path, dtype)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


class Watch:
    """Files whose tokens are mapped for as long as a run lasts: whether they are what they were.

    Whoever looks at a mapping behind the end of a file that has shrunk is ended by the system, without a word.

    files    path -> its tokens, as map_tokens gives them
    same     function that reads the files once more: whether what is in them is what was in them
    """

    def __init__(self, files, same):
        self._files = {path: found for path, tokens in files.items() if (found := _mapping_of(tokens)) is not None}
        self._seen = {path: _seen(path) for path in self._files}
        self._same = same

    def changed(self):
        """The path of a file that has changed, or None.  To be asked just before tokens are looked at."""
        for path, mapping in self._files.items():
            if mapping.size() < len(mapping):
                return path
            now, before = _seen(path), self._seen[path]
            # another file of this name, or none: what is mapped stays what it is
            if now is not None and before is not None and now[:2] == before[:2] and now != before:
                try:
                    same = self._same()
                except NpgptError:
                    same = False
                if not same:
                    return path
                self._seen[path] = now
        return None


def _mapping_of(tokens):
    """The mmap that an array is a view of, or None."""
    while tokens is not None and not isinstance(tokens, mmap.mmap):
        tokens = getattr(tokens, "base", None)
    return tokens


def _seen(path):
    """(device, number, size, time of the last change) of a file, or None if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
