"""Checkpoints: one file each, in the safetensors layout, which holds arrays and text but no code.

    8 bytes      length of the header, little-endian
    header       JSON: {"__metadata__": {text: text},
                        name: {"dtype": "F32", "shape": [...], "data_offsets": [start, stop]}, ...}
    the rest     the arrays' raw bytes, little-endian, C order, one after the other

Any program that reads safetensors reads the weights: https://huggingface.co/docs/safetensors
"""

import contextlib
import json
import math
import os
import struct
from pathlib import Path

import numpy as np

from npgpt.errors import CheckpointError

DTYPES = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "I64": np.dtype("<i8")}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100 * 2**20


def save(path, arrays, metadata):
    """Write arrays (name -> array) and metadata (str -> str) to a file, all of it or nothing.

    The file appears under its name only when it is complete and on the disk: until then, and if anything fails, the
    file that was there stays.  Raises CheckpointError.
    """
    path = Path(path)
    header, offset = {"__metadata__": metadata}, 0
    for name, array in arrays.items():
        dtype = _NAMES[array.dtype.newbyteorder("<")]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header, ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # so that the arrays are aligned in memory when the file is mapped
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for array in arrays.values():
                file.write(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise CheckpointError(f"cannot write {path}: {error.strerror}") from None


def load(path):
    """(arrays, metadata) of a checkpoint.  Raises CheckpointError that says what is wrong with the file."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    try:
        return _parse(raw)
    except ValueError as error:
        raise CheckpointError(f"{path} is not a good checkpoint: {error}") from None


def _parse(raw):
    if len(raw) < 8:
        raise ValueError(f"it has {len(raw)} bytes only")
    (length,) = struct.unpack("<Q", raw[:8])
    if length > min(len(raw) - 8, MAX_HEADER):
        raise ValueError(f"its header should have {length} bytes, but the file has {len(raw)}; is it cut off?")
    try:
        header = json.loads(raw[8 : 8 + length].decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"its header is damaged ({error})") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not text")
    body, arrays, end = memoryview(raw)[8 + length :], {}, 0
    for name, entry in header.items():
        try:
            dtype, shape, (start, stop) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            sound = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
            sound = sound and start == end and stop - start == math.prod(shape) * dtype.itemsize
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise ValueError(f"its entry for {name!r} is damaged")
        if stop > len(body):
            raise ValueError(f"{name!r} ends at byte {stop} of {len(body)}; is the file cut off?")
        arrays[name] = np.frombuffer(body[start:stop], dtype).reshape(shape).astype(dtype.newbyteorder("="))
        end = stop
    if end != len(body):
        raise ValueError(f"{len(body) - end} bytes at its end belong to nothing")
    return arrays, metadata
