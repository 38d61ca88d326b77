"""Checkpoints: one file each, in the safetensors layout, which holds arrays and text but no code.

    8 bytes      length of the header, little-endian
    header       JSON: {"__metadata__": {text: text},
                        name: {"dtype": "F32", "shape": [...], "data_offsets": [start, stop]}, ...}
    the rest     the arrays' raw bytes, little-endian, C order, one after the other

Any program that reads safetensors reads the weights: https://huggingface.co/docs/safetensors

The metadata's "sha256" is the hash of header and rest, taken with 64 zeros in its own place: a file is either whole, to
the last bit, or it is refused.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import struct
from pathlib import Path

import numpy as np

from npgpt.errors import CheckpointError

DTYPES = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "I64": np.dtype("<i8")}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 2**24  # bytes
CHUNK = 2**20  # bytes that are hashed at a time
TEMPORARY = ".tmp"  # ending of a file that is being written

_HASH = b'"sha256": "%s"'
_ZEROS = b"0" * 64

# --------------------------------------------------------------------------------------------------------------------
# Writing


def save(path, arrays, metadata):
    """Write arrays (name -> array) and metadata (str -> str) to a file, all of it or nothing.

    The file appears under its name only when it is complete, on the disk, and read back: until then, and if anything
    fails, what was there stays.  Raises CheckpointError.
    """
    path = Path(path)
    header, offset = {"__metadata__": {**metadata, "sha256": _ZEROS.decode()}}, 0
    for name, array in arrays.items():
        dtype = _NAMES[array.dtype.newbyteorder("<")]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # so that the arrays are aligned in memory when the file is mapped
    raw = [memoryview(np.ascontiguousarray(a, a.dtype.newbyteorder("<"))).cast("B") for a in arrays.values() if a.size]
    digest = hashlib.sha256(text)
    for part in raw:
        digest.update(part)
    # the metadata stands first, and what stands in it before the hash is text: its quotation marks are escaped
    text = text.replace(_HASH % _ZEROS, _HASH % digest.hexdigest().encode(), 1)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        try:
            write(temporary, [struct.pack("<Q", len(text)), text, *raw])
            with _open(temporary) as file:
                _check(file)
            os.replace(temporary, path)
            flush_folder(path.parent)
        except ValueError as error:
            raise OSError(0, f"what was read back is not what was written: {error}") from None
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from None


def write(path, parts):
    """Write a new file of an iterable of bytes, and have it on the disk.  Raises OSError."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
    try:
        for part in parts:
            part = memoryview(part)
            while part:
                part = part[os.write(file, part[:CHUNK]) :]
        os.fsync(file)
    finally:
        os.close(file)


def flush_folder(folder):
    """Have a folder's entries on the disk, where a folder can be opened at all (not on Windows)."""
    if os.name == "nt":
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


# --------------------------------------------------------------------------------------------------------------------
# Reading


def load(path, needs_hash=True):
    """(arrays, metadata) of a checkpoint.  Raises CheckpointError that says what is wrong with the file.

    needs_hash: whether a file without "sha256" is refused; other programs write none.
    """
    with _reading(path) as file:
        entries, metadata, start = _check(file, needs_hash)
        arrays = {}
        for name, (dtype, shape, offset, _) in entries.items():
            array = arrays[name] = np.empty(shape, dtype)
            if array.size:
                _read_into(file, start + offset, memoryview(array.reshape(-1)).cast("B"))
            arrays[name] = array.astype(dtype.newbyteorder("="), copy=False)
        return arrays, metadata


def load_metadata(path):
    """The metadata alone of a checkpoint whose arrays are not looked at.  Raises CheckpointError."""
    with _reading(path) as file:
        return _parse(file)[1]


@contextlib.contextmanager
def _reading(path):
    try:
        with _open(path) as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not a good checkpoint: {error}") from None


@contextlib.contextmanager
def _open(path):
    file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        yield file
    finally:
        os.close(file)


def _read_into(file, offset, memory):
    os.lseek(file, offset, os.SEEK_SET)
    while memory:
        part = os.read(file, min(len(memory), CHUNK))
        if not part:
            raise ValueError("it ended while it was read")
        memory[: len(part)] = part
        memory = memory[len(part) :]


def _check(file, needs_hash=True):
    """(entries, metadata, offset of the arrays) of an open file whose hash is right.  Nothing large is allocated."""
    entries, metadata, start, text = _parse(file)
    if "sha256" not in metadata:
        if needs_hash:
            raise ValueError("it has no sha256")
        return entries, metadata, start
    found = re.search(rb'"sha256": "([0-9a-f]{64})"', text)
    if found is None:
        raise ValueError("its sha256 is damaged")
    digest = hashlib.sha256(text[: found.start(1)] + _ZEROS + text[found.end(1) :])
    os.lseek(file, start, os.SEEK_SET)
    while part := os.read(file, CHUNK):
        digest.update(part)
    if digest.hexdigest() != metadata["sha256"]:
        raise ValueError("its content does not fit its sha256")
    return entries, metadata, start


def _parse(file):
    """(entries, metadata, offset of the arrays, header's text): entries are name -> (dtype, shape, start, stop)."""
    size = os.fstat(file).st_size
    if size < 8:
        raise ValueError(f"it has {size} bytes only")
    first = bytearray(8)
    _read_into(file, 0, memoryview(first))
    (length,) = struct.unpack("<Q", first)
    if length > min(size - 8, MAX_HEADER):
        raise ValueError(f"its header should have {length} bytes, but the file has {size}; is it cut off?")
    text = bytearray(length)
    _read_into(file, 8, memoryview(text))
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is damaged ({error})") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not text")
    entries, end = {}, 0
    for name, entry in header.items():
        try:
            dtype, shape, (start, stop) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            sound = all(type(n) is int and n >= 0 for n in (*shape, start, stop)) and len(shape) <= 32
            sound = sound and start == end and stop - start == math.prod(shape) * dtype.itemsize
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise ValueError(f"its entry for {name!r} is damaged")
        if stop > size - 8 - length:
            raise ValueError(f"{name!r} ends at byte {stop} of {size - 8 - length}; is the file cut off?")
        entries[name] = dtype, shape, start, stop
        end = stop
    if end != size - 8 - length:
        raise ValueError(f"{size - 8 - length - end} bytes at its end belong to nothing")
    return entries, metadata, 8 + length, bytes(text)


def _unique(pairs):
    """A JSON object as a dict; the same key twice is an error."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands there twice")
    return result
