"""What a file is: by its first bytes, as people name one file for another; by its name, in a run folder."""

import contextlib
import json
import re
from pathlib import Path

from npgpt.errors import told_as

LFS = b"version https://git-lfs"  # the text that Git leaves in place of a file that it has elsewhere
# how a file begins -> what it is
BEGINNINGS = {
    LFS: "a Git LFS pointer; the file itself was not downloaded (git lfs pull)",
    b"PK\x03\x04": "a zip archive, as .docx, .epub and PyTorch's .pt are (of these the last can hold code)",
    b"PK\x05\x06": "an empty zip archive",
    b"\x80": "a pickle, which can hold code, as PyTorch's .pt and .bin are",
    b"\x93NUMPY": "an array of NumPy's (.npy)",
    b"GGUF": "a model of llama.cpp (GGUF)",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "compressed with gzip",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"7z\xbc\xaf": "compressed with 7-Zip",
    b"Rar!": "compressed with RAR",
    b"PAR1": "a table in Parquet",
    b"SQLite format 3": "an SQLite database",
    b"\xd0\xcf\x11\xe0": "a document of Microsoft Word",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
    b"<": "a page of HTML or XML",
}
LENGTH = 64  # bytes that are enough for all of this
MAX_JSON = 2**26  # bytes of a file of JSON that are read at most
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# what files of text with something around it begin with, in small letters, and how their names end
MARKUP = {
    "JSON lines": ((), (".jsonl", ".ndjson")),
    "a notebook": ((), (".ipynb",)),
    "JSON": ((), (".json",)),
    "a table": ((), (".csv", ".tsv")),
    "RTF": ((b"{\\rtf",), (".rtf",)),
    "PDF": ((b"%pdf-",), (".pdf",)),
    "HTML": ((b"<!doctype html", b"<html"), (".html", ".htm", ".xhtml")),
    "XML": ((b"<?xml",), (".xml",)),
}


def kind_of(raw):
    """What the file is that begins with these bytes, in words, or None where they do not tell."""
    first = raw[:LENGTH].removeprefix(BYTE_ORDER_MARK).lstrip(b" \t\r\n")
    for begin, words in BEGINNINGS.items():
        if first.startswith(begin):
            return words
    return "nothing but zeros" if raw and not raw.strip(b"\0") else None


def read_json(path, error, before=""):
    """The JSON object in a file, as a dict; an error of the kind `error` has the words `before` in front."""
    with told_as(error, f"{before}cannot read {path}", f"{before}there is no {path}"), open(path, "rb") as file:
        raw = file.read(MAX_JSON + 1)
    try:
        if len(raw) > MAX_JSON:
            raise ValueError(f"more than {MAX_JSON} bytes")
        found = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as fault:
        kind = kind_of(raw)
        raise error(f"{before}{path} is not JSON ({f'it is {kind}' if kind else fault})") from None
    if not isinstance(found, dict):
        raise error(f"{before}{path} is not a JSON object")
    return found


def markup_of(path):
    """The name of MARKUP for a file, or None."""
    with contextlib.suppress(OSError), open(path, "rb") as file:  # whoever reads it all says what is wrong
        head = file.read(64).removeprefix(BYTE_ORDER_MARK).lstrip().lower()
        for kind, (beginnings, endings) in MARKUP.items():
            if path.suffix.lower() in endings or head.startswith(beginnings or b"\0"):
                return kind
    return None


# --------------------------------------------------------------------------------------------------------------------
# The files of a run folder (npgpt/files/folder.py)

LOCK, LOG = "lock", "metrics.jsonl"
TEMPORARY = ".tmp"  # how the name of a file ends that is being written
NAME = re.compile(r"iter-(\d{8,})\.safetensors")
TOKENS = re.compile(r"tokens-[0-9a-f]{16}-[0-9a-f]{16}\.bin")
HALF = re.compile(r"(iter-\d{8,}\.safetensors|tokens-[0-9a-f]{16}\.bin)\.\d+" + re.escape(TEMPORARY))
ASIDE = re.compile(r"(iter-\d{8,}\.safetensors|metrics\.jsonl)\.set-aside(-\d+)?")
HOLDER = re.compile(r"process \d+ on .*")  # what a lock says


def is_run(path):
    """Whether a training has written to a folder, or has begun to."""
    try:
        with open(Path(path) / LOCK, encoding="utf-8", errors="replace") as lock:
            holder = lock.read(200).strip()
        return bool(HOLDER.fullmatch(holder)) or (not holder and any(is_made(p.name) for p in Path(path).iterdir()))
    except OSError:
        return False


def is_made(name):
    """Whether a file of this name in a run folder is the run's: but for the lock, whose name others use as well."""
    return name == LOG or any(pattern.fullmatch(name) for pattern in (NAME, TOKENS, HALF, ASIDE))
