"""Checkpoint files: what is written is what is read, and a damaged file is an error that says so."""

import errno
import json
import os
import struct

import numpy as np
import pytest

from npgpt.errors import CheckpointError
from npgpt.files.checkpoint import Reader, load, save

ARRAYS = {
    "w": np.arange(12, dtype=np.float32).reshape(3, 4),
    "double": np.array([[0.1], [-np.inf]]),
    "count": np.array([2**40, -1]),
    "scalar": np.array(2.5, np.float32),
    "none": np.zeros((0, 3), np.float32),
}
METADATA = {"format": "npgpt", "text": "café — 日本 \n\"quoted\""}


def test_load_gives_what_was_saved(tmp_path):
    save(tmp_path / "a.safetensors", ARRAYS, METADATA)
    arrays, metadata = load(tmp_path / "a.safetensors")
    assert len(metadata.pop("sha256")) == 64
    assert metadata == METADATA and list(arrays) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype and arrays[name].shape == array.shape
        assert arrays[name].tobytes() == array.tobytes()
        assert arrays[name].flags.writeable
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_view_that_is_not_contiguous_is_saved_by_value(tmp_path):
    save(tmp_path / "a", {"t": ARRAYS["w"].T}, {})
    assert (load(tmp_path / "a")[0]["t"] == ARRAYS["w"].T).all()


def test_other_programs_read_it_and_we_read_theirs(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    save(tmp_path / "ours", ARRAYS, METADATA)
    theirs = safetensors.load_file(tmp_path / "ours")
    assert all(theirs[name].tobytes() == array.tobytes() for name, array in ARRAYS.items())
    safetensors.save_file({"w": ARRAYS["w"], "b": ARRAYS["double"]}, tmp_path / "theirs", metadata={"k": "v"})
    arrays, metadata = load(tmp_path / "theirs", needs_hash=False)
    assert metadata == {"k": "v"} and arrays["b"].tobytes() == ARRAYS["double"].tobytes()


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    save(path, {"w": ARRAYS["w"]}, {"n": "1"})
    for call in ("fsync", "replace"):

        def fail(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(CheckpointError, match="No space left on device"):
                save(path, {"w": ARRAYS["w"]}, {"n": "2"})
        assert load(path)[1]["n"] == "1"
        assert os.listdir(tmp_path) == ["a"]


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "a"
    save(path, ARRAYS, METADATA)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            load(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match="belong to nothing"):
        load(path)


def _file(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        struct.pack("<Q", 2**63) + b"{}",
        _file(b"\xff\xfe"),
        _file(b"[" * 100_000),
        _file([]),
        _file({"__metadata__": {"a": 1}}),
        _file({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        _file({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, bytes(4)),
        _file({"w": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 2**66]}}, bytes(4)),
        _file({"w": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)),
        _file({"w": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, bytes(4)),
        _file({"w": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        _file({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, bytes(4)),
        _file({"w": 3}),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, raw):
    (tmp_path / "bad").write_bytes(raw)
    with pytest.raises(CheckpointError, match="bad is not a good checkpoint") as error:
        load(tmp_path / "bad")
    assert "\n" not in str(error.value)


def test_the_entries_of_a_file_may_stand_in_any_order(tmp_path):
    entries = {
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        "none": {"dtype": "F64", "shape": [0, 5], "data_offsets": [12, 12]},
        "c": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [12, 16]},
        "a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]},
        "nothing": {"dtype": "U8", "shape": [0], "data_offsets": [4, 4]},
    }
    body = np.array([1, -2], "<f2").tobytes() + np.array([3, 4], "<f4").tobytes() + bytes.fromhex("803f 40c0")
    (tmp_path / "f").write_bytes(_file(entries, body))
    arrays, _ = load(tmp_path / "f", needs_hash=False)
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "a": [1, -2], "b": [3, 4], "c": [[1, -3]], "none": [], "nothing": [],
    }  # fmt: skip
    assert arrays["c"].dtype == np.float32 and arrays["none"].shape == (0, 5)
    for name, offsets, words in (
        ("b", [0, 8], "shares bytes with another"),
        ("b", [8, 16], "shares bytes with another|comes after bytes of no array"),
        ("a", [1, 5], "comes after bytes of no array"),
        ("none", [11, 11], "shares bytes with another"),
        ("c", [16, 20], "is the file cut off"),
    ):
        damaged = {**entries, name: {**entries[name], "data_offsets": offsets}}
        (tmp_path / "f").write_bytes(_file(damaged, body))
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path / "f", needs_hash=False)
    damaged = {**entries, "none": {**entries["none"], "shape": [0, 2**40, 2**40]}}
    (tmp_path / "f").write_bytes(_file(damaged, body))
    with pytest.raises(CheckpointError, match="'none' is damaged"):
        load(tmp_path / "f", needs_hash=False)


def test_an_array_is_copied_to_its_place_and_the_file_can_be_replaced_meanwhile(tmp_path):
    path = tmp_path / "a"
    save(path, ARRAYS, METADATA)
    with Reader(path) as reader:
        if os.name != "nt":  # Windows lets nobody replace a file that is open
            save(path, {"w": ARRAYS["w"] + 1}, {})
        out = np.zeros((4, 3), np.float32)
        reader.copy_to("w", out.T)
        assert (out == ARRAYS["w"].T).all()
        assert not reader.mapped("w").flags.writeable
        kept = reader.mapped("double")
    assert kept.tobytes() == ARRAYS["double"].tobytes()  # the pages stay as long as an array is made of them


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load(tmp_path / "missing")
