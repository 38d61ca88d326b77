"""What --data names: text files, folders of them, texts that are known by a name, or a folder of tokens.

A text comes in pieces, and is never in memory as a whole, so that a corpus may be larger than the memory.
"""

import codecs
import contextlib
import functools
import hashlib
import io
import itertools
import os
import re
import tempfile
import urllib.request
from pathlib import Path

import numpy as np

from npgpt.data.batches import training_length
from npgpt.data.kinds import BYTE_ORDER_MARK, LENGTH, LFS, LOCK, is_made, is_run, kind_of
from npgpt.data.notes import between, counted, markup_notes
from npgpt.data.tokens import PIECE, SPLITS, TokenFiles, check_stop
from npgpt.errors import UsageError, told_as
from npgpt.machine import cache_folder

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

CODES = 0x110000  # of Unicode
NEWLINE = b"\n"
# Held-back text is of another kind if this share of it, and so many characters at least, are characters that are so
# many times rarer before it.  In a text of one kind there are none; in a licence at the end of a book there are 0.4 %.
FOREIGN, FEWEST, RARER = 0.001, 10, 20


def open_data(sources, stop=None, force=False, numbered=True):
    """What --data names: TokenFiles for a folder with train.bin and val.bin, else a Corpus.  Raises UsageError.

    stop, force, numbered: see Corpus and TokenFiles.
    """
    folders = [source for source in sources if source not in NAMES and (Path(source) / "train.bin").is_file()]
    if not folders:
        return Corpus(sources, stop, numbered=numbered)
    if len(sources) > 1:
        raise UsageError(f"data: {folders[0]} holds tokens (train.bin), which other data cannot be added to")
    return TokenFiles(folders[0], stop, force)


class Corpus:
    """The text of all sources, one after the other.

    A source is `pydoc`, `shakespeare`, a text file, or a folder, whose files are read in the order of their names, with
    the numbers in them in theirs: 2.txt before 10.txt.  Links are followed.  Left out are files that start with a dot,
    and those of run folders.  A file or folder that is really named `pydoc` is reached as ./pydoc.  Files are UTF-8; a
    byte order mark is dropped, and line ends become \\n.

    pieces()              iterator of the text, some PIECE bytes at a time; each call reads it anew
    n_characters, n_bytes its length, the latter in UTF-8
    characters            all characters that are in it, as a sorted string
    fingerprint           sha256 of its UTF-8
    notes                 lines that a person should read before hours are spent on this text

    what      a word for error messages: what the sources were named as
    stop      a Stop; when it has a number, reading ends with a StoppedError
    numbered  False for the order of earlier versions: 10.txt before 2.txt
    Raises UsageError with the file and the fault, pieces() too.
    """

    def __init__(self, sources, stop=None, what="data", numbered=True):
        self._stop, self._what, self._sources = stop, what, " ".join(map(str, sources))
        self.notes = []
        self._parts = list(_parts(sources, what, numbered, self.notes))
        self.notes += markup_notes([name for name, _ in self._parts])
        digest, counts = hashlib.sha256(), np.zeros(CODES, np.int64)
        self.n_bytes, lengths = 0, [0] * len(self._parts)
        for number, piece in self._read():
            raw = piece.encode("utf-8")
            digest.update(raw)
            _count(piece, counts)
            lengths[number] += len(piece)
            self.n_bytes += len(raw)
        self._begins = [0, *itertools.accumulate(lengths)]  # the place of each part's first character, and the end
        self.n_characters = self._begins[-1]
        if not self.n_characters:
            raise UsageError(f"{what}: {', '.join(map(str, sources))}: there is no text in it")
        codes = np.flatnonzero(counts)
        self.characters = "".join(map(chr, codes))
        self._counts = counts[codes]
        self.fingerprint = digest.hexdigest()

    def held_back_notes(self, val_fraction):
        """What to know of the text that is held back: a line if it is of another kind than the text before it."""
        n, counts = training_length(self.n_characters, val_fraction), np.zeros(CODES, np.int64)
        for piece in between(self.pieces(), n):
            _count(piece, counts)
        held_back = counts[[ord(character) for character in self.characters]]
        before = (self._counts - held_back + 0.5) / n  # (what never came may come)
        foreign = held_back / held_back.sum() > RARER * before
        if held_back[foreign].sum() < max(FEWEST, FOREIGN * held_back.sum()):
            return []
        most = self.characters[np.argmax(np.where(foreign, held_back, 0))]
        names = [
            str(name) if begin >= n else f"the end of {name}"
            for (name, _), begin, end in zip(self._parts, self._begins, self._begins[1:], strict=False)
            if end > n
        ]
        files = " and ".join(names) if len(names) < 3 else f"{names[0]} to {names[-1]}"
        share = held_back[foreign].sum() / held_back.sum()
        return [
            f"{share:.1%} of the held-back text are characters that the text before it has hardly or never, {most!r} "
            f"above all: it is {files}. What was not learnt cannot be foretold: mix the texts, or name the files in "
            f"another order"
        ]

    def pieces(self):
        digest = hashlib.sha256()
        for _, piece in self._read():
            digest.update(piece.encode("utf-8"))
            yield piece
        if digest.hexdigest() != self.fingerprint:
            raise UsageError(f"{self._what}: {self._sources} changed while it was read; try again")

    def _read(self):
        """(number of the part, a piece of it), for all of the text."""
        for number, (_, part) in enumerate(self._parts):
            last = ""
            for piece in part():
                check_stop(self._stop)
                if piece:
                    yield number, piece
                    last = piece[-1]
            if last != "\n" and len(self._parts) > 1:  # the next part begins on a line of its own
                yield number, "\n"


def _count(piece, counts):
    """Add how often each character is in a text."""
    here = np.bincount(np.frombuffer(piece.encode("utf-32-le"), "<u4"))
    counts[: len(here)] += here


def load_text(sources):
    """The text of all sources as one string; see Corpus."""
    return "".join(Corpus(sources).pieces())


def _parts(sources, what, numbered, notes):
    """For each text of the sources its name, and a function that returns an iterator of its pieces."""
    for source in sources:
        if not str(source):
            raise UsageError(f"{what}: a file has no name")
        if source in NAMES:
            yield source, functools.partial(iter, (NAMES[source](),))
            continue
        for path in _files(Path(source), what, numbered, notes):
            read = functools.partial(_decoded, path, what)
            # a pipe can be read but once
            yield path, read if path.is_file() else functools.partial(iter, ("".join(read()),))


def _files(path, what, numbered, notes):
    """The files that a source names; what is left out of a folder that a person may have meant gets a line in notes."""
    if path.is_dir():
        above = {_identity(folder) for folder in path.resolve().parents}
        files = sorted(_walk(path, what, {_identity(path)}, above))
        if numbered:
            files.sort(key=lambda file: [_numbers_in(part) for part in file.parts])
        runs = {p.parent for p in files if p.name == LOCK and is_run(p.parent)}
        if not (texts := [p for p in files if runs.isdisjoint(p.parents)]):
            where = " outside of run folders, whose files are left out; name the text itself" * bool(runs)
            raise UsageError(f"{what}: the folder {path} has no files{where}")
        its_own = {p for p in files if p.parent in runs and (p.name == LOCK or is_made(p.name))}
        if beside := [p for p in files if p not in its_own and not runs.isdisjoint(p.parents)]:
            notes.append(
                f"{counted(beside)} in run folders: left out, as all that is there; name the text itself to learn it"
            )
        return texts
    if not path.exists():
        raise UsageError(f"{what}: there is no file {path}; --data takes pydoc, shakespeare, text files and folders")
    return [path]


def _walk(path, what, seen, above):
    """The files in a folder and in those below it; each folder is read once, by whatever links it is reached.

    seen, above    identities of the folders that were read, and of those that all of it lies in
    """
    with told_as(UsageError, f"{what}: cannot read the folder {path}"):
        for p in sorted(p for p in path.iterdir() if not p.name.startswith(".")):
            if p.is_file():
                yield p
            elif not p.is_dir():
                words = "is a link to nothing" if p.is_symlink() else "is neither a file nor a folder"
                raise UsageError(f"{what}: {p} {words}; remove it, or name what is to be read")
            elif (identity := _identity(p)) in above:
                raise UsageError(f"{what}: {p} is a link to a folder in which {path} lies; remove it")
            elif identity not in seen:
                seen.add(identity)
                yield from _walk(p, what, seen, above)


def _identity(path):
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _numbers_in(name):
    """What sorts names as people number them: texts and numbers in turns, then the name itself."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))], name


def check_is_text(path, what, raw, is_first):
    """Raise UsageError for a piece of a file that is UTF-8 by chance, as numbers and UTF-16 may be."""
    if is_first and raw.startswith(LFS):
        raise UsageError(f"{what}: {path} is {kind_of(raw)}")
    if (n := raw.count(0)) > max(1, len(raw) / 100):  # (a stray one may stay)
        hint = _format_hint(raw) if is_first else ""
        if path.name in SPLITS:
            hint = "It holds tokens: name its folder"
        raise UsageError(
            f"{what}: {path} is no text: {n:,} of {len(raw):,} bytes are NUL. "
            f"{hint or 'If it is UTF-16, convert it to UTF-8 first; tokens are named by their folder'}"
        )


def _format_hint(head):
    """What to do with a file that begins like this and is no UTF-8 text; empty if nobody knows."""
    kind = kind_of(head)
    return f"It is {kind}: convert it to UTF-8 text first" if kind else ""


def _decoded(path, what):
    """The text of a UTF-8 file, piece by piece; a byte order mark is dropped, and line ends become \\n."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)  # knows a \r\n that two pieces share
    at, line, raw, head = 0, 1, None, b""  # what comes next: offset in the file, line; the last bytes read, the first
    with told_as(UsageError, f"{what}: cannot read {path}"), open(path, "rb") as file:
        while raw != b"":
            raw = file.read(PIECE)
            head = head or raw[:LENGTH]
            check_is_text(path, what, raw, at == 0)
            part = raw.removeprefix(BYTE_ORDER_MARK) if at == 0 else raw
            at += len(raw) - len(part)
            waiting = len(decoder.getstate()[0])  # bytes of a character that the last piece began
            try:
                text = decoder.decode(part, final=raw == b"")
            except UnicodeDecodeError as error:
                fault, before = error.object[error.start], error.object[: error.start]
                raise UsageError(
                    f"{what}: {path} is not UTF-8 text: byte 0x{fault:02x} at offset {at - waiting + len(before)}, "
                    f"line {line + before.count(NEWLINE)}. "
                    f"{_format_hint(head) or 'If it is text in another encoding, convert it first'}"
                ) from None
            at, line = at + len(part), line + part.count(NEWLINE)
            yield newlines.decode(text, final=raw == b"")


def _pydoc():
    """The language reference that comes with Python: what `help('topics')` shows."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some systems cut Python's library into several packages
        raise UsageError("data: this Python has no pydoc_data.topics; name a text file with --data FILE") from None
    return "\n".join(topics[name] for name in sorted(topics))


def _shakespeare():
    path = cache_folder() / "tinyshakespeare.txt"
    with contextlib.suppress(OSError):  # not downloaded yet
        raw = path.read_bytes()
        if hashlib.sha256(raw).hexdigest() == SHAKESPEARE_SHA256:
            return raw.decode("utf-8")
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=20) as response:
            raw = response.read(2**24)
    except OSError as error:
        raise UsageError(
            f"data: cannot download shakespeare ({getattr(error, 'reason', error)}). "
            f"Fetch {SHAKESPEARE_URL} by other means and pass the file: --data FILE"
        ) from None
    if hashlib.sha256(raw).hexdigest() != SHAKESPEARE_SHA256:
        raise UsageError(f"data: {SHAKESPEARE_URL} did not give the tinyshakespeare file; pass one with --data FILE")
    with contextlib.suppress(OSError):  # it will be downloaded again
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(raw)
        os.replace(file.name, path)
    return raw.decode("utf-8")


NAMES = {"pydoc": _pydoc, "shakespeare": _shakespeare}
