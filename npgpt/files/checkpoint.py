"""Checkpoints: one file each, in the safetensors layout, which holds arrays and text but no code.

    8 bytes      length of the header, little-endian
    header       JSON: {"__metadata__": {text: text},
                        name: {"dtype": "F32", "shape": [...], "data_offsets": [start, stop]}, ...}
    the rest     the arrays' raw bytes, little-endian, C order, one after the other

Any program that reads safetensors reads the weights: https://huggingface.co/docs/safetensors

The metadata's "sha256" is the hash of header and rest, taken with 64 zeros in its own place: a file is either whole, to
the last bit, or it is refused.

Other programs write no hash, list the arrays in any order, and know more dtypes; such files are read too.
"""

import contextlib
import hashlib
import itertools
import json
import math
import mmap
import os
import re
import struct
from collections import namedtuple
from pathlib import Path

import numpy as np

from npgpt.data.kinds import LENGTH, TEMPORARY, kind_of
from npgpt.errors import CANNOT, CheckpointError, told_as

DTYPES = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "I64": np.dtype("<i8")}  # what is written
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# what is read besides; NumPy has no BF16, which is the upper half of an F32, so that its bits are read as an integer
READABLE = DTYPES | {"F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "BOOL": np.dtype("u1")}
READABLE |= {f"{sign}{8 * size}": np.dtype(f"<{sign.lower()}{size}") for sign in "IU" for size in (1, 2, 4, 8)}
FLOATS = ("F32", "F64", "F16", "BF16")
MAX_HEADER = 2**24  # bytes
CHUNK = 2**20  # bytes that are hashed at a time

_HASH = b'"sha256": "%s"'
_ZEROS = b"0" * 64

# --------------------------------------------------------------------------------------------------------------------
# Writing


def save(path, arrays, metadata):
    """Write arrays (name -> array) and metadata (str -> str) to a file, as `replace` does.  Raises CheckpointError."""
    header, offset = {"__metadata__": {**metadata, "sha256": _ZEROS.decode()}}, 0
    for name, array in arrays.items():
        dtype = _NAMES[array.dtype.newbyteorder("<")]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # so that the arrays are aligned in memory when the file is mapped
    digest = hashlib.sha256(text)
    for part in _raw(arrays):
        digest.update(part)
    # the metadata stands first, and what stands in it before the hash is text: its quotation marks are escaped
    text = text.replace(_HASH % _ZEROS, _HASH % digest.hexdigest().encode(), 1)
    replace(path, itertools.chain([struct.pack("<Q", len(text)), text], _raw(arrays)), _check)


def _raw(arrays):
    """The bytes of each array; those of one that is not contiguous are copied, and kept no longer than the next."""
    for array in arrays.values():
        if array.size:
            yield memoryview(np.ascontiguousarray(array, array.dtype.newbyteorder("<"))).cast("B")


def replace(path, parts, check=lambda file: None, final=None):
    """Write a file that consists of parts (bytes), all of it or nothing; what had its name until then is replaced.

    It gets its name when it is on the disk, and check(open file) has looked at it: a ValueError says what is wrong.
    final: function that returns its path, if that is another than `path`, which is known when all parts are.
    Returns its path.  Raises CheckpointError; then what was there stays.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with told_as(CheckpointError, f"cannot write {path}"):
            write(temporary, parts)
            with open(temporary, "rb") as file:
                try:
                    check(file)
                except ValueError as error:
                    words = f"what was read back is not what was written: {error}"
                    raise CheckpointError(f"cannot write {path}: {words}") from None
            target = final() if final else path
            os.replace(temporary, target)
            flush_folder(path.parent)
            return target
    finally:
        with contextlib.suppress(OSError):  # there is none any more if all went well
            os.unlink(temporary)


def write(path, parts):
    """Write a new file of an iterable of bytes, and have it on the disk.  Raises OSError."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
    try:
        for part in parts:
            part = memoryview(part)
            while part:
                part = part[os.write(file, part[:CHUNK]) :]
        flush(file)
    finally:
        os.close(file)


def flush(file):
    """Have an open file on the disk, where the file system can do that.  Raises OSError."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in CANNOT:
            raise


def flush_folder(folder):
    """Have a folder's entries on the disk, where a folder can be opened at all (not on Windows)."""
    if os.name == "nt":
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        flush(file)
    finally:
        os.close(file)


# --------------------------------------------------------------------------------------------------------------------
# Reading


# what the header says about one array: dtype, a name of READABLE; start, its first byte after the header
Entry = namedtuple("Entry", "dtype shape start stop")


class Reader(contextlib.AbstractContextManager):
    """An open file whose header and hash are right, and whose arrays are read one at a time, straight to their places.

    path, metadata    the file's path; its metadata, text -> text
    entries           name -> Entry

    needs_hash: whether a file without "sha256" is refused; other programs write none.

    A context manager that closes the file.  Raises CheckpointError that says what is wrong with the file.
    """

    def __init__(self, path, needs_hash=True):
        self.path = path
        with _reading(path), contextlib.ExitStack() as on_error:
            self._file = on_error.enter_context(open(path, "rb"))
            self.entries, self.metadata, self._start = _check(self._file, needs_hash)
            on_error.pop_all()

    def __exit__(self, *error):
        self._file.close()

    def mapped(self, name):
        """An array as it stands in the file, read-only; BF16 as the integers that its bits are.

        The file's pages are mapped, not copied: the system reads them when they are used, and may drop them.  Where the
        file system cannot map files they are read.
        """
        entry = self.entries[name]
        dtype, n = READABLE[entry.dtype], entry.stop - entry.start
        if n == 0:
            return np.empty(entry.shape, dtype)  # of nothing there is no mapping
        with _reading(self.path):
            first = self._start + entry.start
            before = first % mmap.ALLOCATIONGRANULARITY
            try:
                pages = mmap.mmap(self._file.fileno(), before + n, access=mmap.ACCESS_READ, offset=first - before)
            except OSError as error:
                if error.errno not in CANNOT:
                    raise
                pages, before = _read(self._file, first, n), 0
            return np.ndarray(entry.shape, dtype, pages, before)  # the last array that uses the mapping ends it

    def copy_to(self, name, out):
        """Copy an array into `out`, of the same shape, without a second copy in between.

        Numbers become those of out's dtype; BF16 needs a float32 `out`.
        """
        array = self.mapped(name)
        if self.entries[name].dtype == "BF16":
            np.left_shift(array, 16, out=out.view(np.uint32), dtype=np.uint32)
        else:
            with np.errstate(over="ignore"):  # too large for out: infinite
                np.copyto(out, array, casting="same_kind")

    def arrays(self):
        """name -> array, for all of them; BF16 becomes float32, and BOOL uint8."""
        arrays = {}
        for name, entry in self.entries.items():
            dtype = np.dtype(np.float32) if entry.dtype == "BF16" else READABLE[entry.dtype].newbyteorder("=")
            arrays[name] = np.empty(entry.shape, dtype)
            self.copy_to(name, arrays[name])
        return arrays


def load(path, needs_hash=True):
    """(arrays, metadata) of a checkpoint, all of it.  Raises CheckpointError."""
    with Reader(path, needs_hash) as reader:
        return reader.arrays(), reader.metadata


def load_metadata(path):
    """The metadata alone of a checkpoint whose arrays are not looked at.  Raises CheckpointError."""
    with _reading(path), open(path, "rb") as file:
        return _parse(file)[1]


@contextlib.contextmanager
def _reading(path):
    """Turns what may go wrong with a file while it is read into a CheckpointError that names it."""
    try:
        with told_as(CheckpointError, f"cannot read {path}", missing=f"there is no checkpoint {path}"):
            yield
    except ValueError as error:
        raise CheckpointError(f"{path} is not a good checkpoint: {error}") from None


def _read(file, offset, n):
    file.seek(offset)
    if len(raw := file.read(n)) < n:
        raise ValueError("it ended while it was read")
    return raw


def _check(file, needs_hash=True):
    """(entries, metadata, offset of the arrays) of an open file whose hash is right.  Nothing large is allocated."""
    entries, metadata, start, text = _parse(file)
    if "sha256" not in metadata:
        if needs_hash:
            raise ValueError("it has no sha256")
        return entries, metadata, start
    if (found := re.search(rb'"sha256": "([0-9a-f]{64})"', text)) is None:
        raise ValueError("its sha256 is damaged")
    digest = hashlib.sha256(text[: found.start(1)] + _ZEROS + text[found.end(1) :])
    file.seek(start)
    while part := file.read(CHUNK):
        digest.update(part)
    if digest.hexdigest() != metadata["sha256"]:
        raise ValueError("its content does not fit its sha256")
    return entries, metadata, start


def _parse(file):
    """(entries, metadata, offset of the arrays, header's text): entries are name -> Entry, in the header's order."""
    if (size := os.fstat(file.fileno()).st_size) < 8:
        raise ValueError(f"it has {size} bytes only")
    first = _read(file, 0, min(size, LENGTH))
    (length,) = struct.unpack("<Q", first[:8])
    if not 2 <= length <= min(size - 8, MAX_HEADER):
        is_text = all(0x20 <= byte < 0x7F or byte in b"\t\r\n" for byte in first)
        if kind := kind_of(first) or ("text" if is_text else None):
            raise ValueError(f"it is {kind}, and safetensors is asked for")
        raise ValueError(f"its header should have {length} bytes, but the file has {size}; is it cut off?")
    text = _read(file, 8, length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is damaged ({error})") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not text")
    entries = {}
    for name, entry in header.items():
        try:
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sound = all(type(n) is int and n >= 0 for n in (*shape, start, stop)) and len(shape) <= 32
            sound = sound and stop - start == math.prod(shape) * READABLE[dtype].itemsize
            # even beside a 0 NumPy makes no array of such a shape
            sound = sound and math.prod(max(n, 1) for n in shape) < 2**60
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise ValueError(f"its entry for {name!r} is damaged, or of a dtype that is not read")
        if stop > size - 8 - length:
            raise ValueError(f"{name!r} ends at byte {stop} of {size - 8 - length}; is the file cut off?")
        entries[name] = Entry(dtype, shape, start, stop)
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            words = "shares bytes with another array" if entry.start < end else "comes after bytes of no array"
            raise ValueError(f"its entry for {name!r} is damaged: it {words}")
        end = entry.stop
    if end != size - 8 - length:
        raise ValueError(f"{size - 8 - length - end} bytes at its end belong to nothing")
    return entries, metadata, 8 + length, text


def _unique(pairs):
    """A JSON object as a dict; the same key twice is an error."""
    if len(result := dict(pairs)) != len(pairs):
        raise ValueError("a key stands there twice")
    return result
