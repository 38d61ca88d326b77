"""From files to batches.

    corpus = open_data(["my_book.txt"])                a Corpus, whose text comes in pieces; or TokenFiles
    tokens = map_tokens(path, dtype)                   its tokens, in a file that the run folder holds
    blocks = Blocks(tokens, block_size, seed)          a split of them, cut into training examples
    x, y = blocks.batch(n, batch_size)                 batch number n: (B, T) tokens, and the token after each

Neither text nor tokens are ever in memory as a whole, so that a corpus may be larger than the memory.
"""

import codecs
import contextlib
import functools
import hashlib
import io
import mmap
import os
import re
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np

from npgpt.config import ORDER
from npgpt.data.kinds import LENGTH, LFS, LOCK, is_made, is_run, kind_of
from npgpt.errors import CANNOT, CheckpointError, NpgptError, StoppedError, UsageError
from npgpt.machine import cache_folder

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

PIECE = 2**20  # bytes that are read at a time
LONG = 24  # characters of a line that hardly comes twice in a text by chance
BYTE_ORDER_MARK, NEWLINE = b"\xef\xbb\xbf", b"\n"
SPLITS = "train.bin", "val.bin"  # the files of a folder of tokens
CODES = 0x110000  # of Unicode
# Held-back text is of another kind if this share of it, and so many characters at least, are characters that are so
# many times rarer before it.  In a text of one kind there are none; in a licence at the end of a book there are 0.4 %.
FOREIGN, FEWEST, RARER = 0.001, 10, 20

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


def open_data(sources, stop=None, force=False, numbered=True):
    """What --data names: TokenFiles for a folder with train.bin and val.bin, else a Corpus.  Raises UsageError.

    stop      a Stop; when it has a number, reading ends with a StoppedError
    force     whether token files are read even if they look like numbers of another width
    numbered  see Corpus
    """
    folders = [source for source in sources if source not in NAMES and (Path(source) / "train.bin").is_file()]
    if not folders:
        return Corpus(sources, stop, numbered=numbered)
    if len(sources) > 1:
        raise UsageError(f"data: {folders[0]} holds tokens (train.bin), which other data cannot be added to")
    return TokenFiles(folders[0], stop, force)


def _check_stop(stop):
    if stop is not None and stop.number is not None:
        raise StoppedError(stop.number, "stopped before anything was trained")


# --------------------------------------------------------------------------------------------------------------------
# Text


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
        self.notes += _markup_notes([name for name, _ in self._parts])
        digest, counts = hashlib.sha256(), np.zeros(CODES, np.int64)
        self._begins = []  # the place of each part's first character, and the end
        self.n_characters = self.n_bytes = 0
        for number, piece in self._read():
            raw = piece.encode("utf-8")
            digest.update(raw)
            self._begins += [self.n_characters] * (number + 1 - len(self._begins))
            _count(piece, counts)
            self.n_characters += len(piece)
            self.n_bytes += len(raw)
        self._begins += [self.n_characters] * (len(self._parts) + 1 - len(self._begins))
        if not self.n_characters:
            raise UsageError(f"{what}: {', '.join(map(str, sources))}: there is no text in it")
        codes = np.flatnonzero(counts)
        self.characters = "".join(map(chr, codes))
        self._counts = counts[codes]
        self.fingerprint = digest.hexdigest()

    def held_back_notes(self, val_fraction):
        """What to know of the text that is held back: a line if it is of another kind than the text before it."""
        n, counts = training_length(self.n_characters, val_fraction), np.zeros(CODES, np.int64)
        for piece in _from(self.pieces(), n):
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
                _check_stop(self._stop)
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
        texts = [p for p in files if runs.isdisjoint(p.parents)]
        if not texts:
            where = " outside of run folders, whose files are left out; name the text itself" * bool(runs)
            raise UsageError(f"{what}: the folder {path} has no files{where}")
        its_own = {p for p in files if p.parent in runs and (p.name == LOCK or is_made(p.name))}
        beside = [p for p in files if p not in its_own and not runs.isdisjoint(p.parents)]
        if beside:
            notes.append(
                f"{_counted(beside)} in run folders: left out, as all that is there; name the text itself to learn it"
            )
        return texts
    if not path.exists():
        raise UsageError(f"{what}: there is no file {path}; --data takes pydoc, shakespeare, text files and folders")
    return [path]


def _walk(path, what, seen, above):
    """The files in a folder and in those below it; each folder is read once, by whatever links it is reached.

    seen, above    identities of the folders that were read, and of those that all of it lies in
    """
    try:
        inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        for p in inside:
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
    except OSError as error:
        raise UsageError(f"{what}: cannot read the folder {path}: {error.strerror}") from None


def _identity(path):
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _numbers_in(name):
    """What sorts names as people number them: texts and numbers in turns, then the name itself."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))], name


def _counted(paths):
    """Words for files: the only one's name, or how many, and which is the first."""
    return str(paths[0]) if len(paths) == 1 else f"{len(paths)} files, {paths[0]} the first,"


def _markup_notes(names):
    """A line for each kind of file whose text is more than what people would read in it."""
    found = {}
    for name in names:
        kind = _markup_of(name) if isinstance(name, Path) and name.is_file() else None
        if kind is not None:
            found.setdefault(kind, []).append(name)
    return [
        f"{_counted(files)} {'is' if len(files) == 1 else 'are'} {kind}, and "
        f"{'is learnt as it stands' if len(files) == 1 else 'are learnt as they stand'}, with all that is no text; "
        f"to learn the text alone, write it to a file of its own"
        for kind, files in found.items()
    ]


def _markup_of(path):
    """The name of MARKUP for a file, or None."""
    with contextlib.suppress(OSError), open(path, "rb") as file:  # whoever reads it all says what is wrong
        head = file.read(64).removeprefix(BYTE_ORDER_MARK).lstrip().lower()
        for kind, (beginnings, endings) in MARKUP.items():
            if path.suffix.lower() in endings or head.startswith(beginnings or b"\0"):
                return kind
    return None


def check_is_text(path, what, raw, is_first):
    """Raise UsageError for a piece of a file that is UTF-8 by chance, as numbers and UTF-16 may be."""
    if is_first and raw.startswith(LFS):
        raise UsageError(f"{what}: {path} is {kind_of(raw)}")
    n = raw.count(0)
    if n > max(1, len(raw) / 100):  # (a stray one may stay)
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
    try:
        with open(path, "rb") as file:
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
    except OSError as error:
        raise UsageError(f"{what}: cannot read {path}: {error.strerror}") from None


def _pydoc():
    """The language reference that comes with Python: what `help('topics')` shows."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some systems cut Python's library into several packages
        raise UsageError("data: this Python has no pydoc_data.topics; name a text file with --data FILE") from None
    return "\n".join(topics[name] for name in sorted(topics))


def _shakespeare():
    path = cache_folder() / "tinyshakespeare.txt"
    try:
        raw = path.read_bytes()
        if hashlib.sha256(raw).hexdigest() == SHAKESPEARE_SHA256:
            return raw.decode("utf-8")
    except OSError:
        pass  # not downloaded yet
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=20) as response:
            raw = response.read(2**24)
    except (OSError, urllib.error.URLError) as error:
        raise UsageError(
            f"data: cannot download shakespeare ({getattr(error, 'reason', error)}). "
            f"Fetch {SHAKESPEARE_URL} by other means and pass the file: --data FILE"
        ) from None
    if hashlib.sha256(raw).hexdigest() != SHAKESPEARE_SHA256:
        raise UsageError(f"data: {SHAKESPEARE_URL} did not give the tinyshakespeare file; pass one with --data FILE")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(raw)
        os.replace(file.name, path)
    except OSError:
        pass  # it will be downloaded again
    return raw.decode("utf-8")


NAMES = {"pydoc": _pydoc, "shakespeare": _shakespeare}


def repeated_lines(pieces, n_characters, val_fraction, most=2000):
    """Share of the held-back text's lines that stand in the training text too; None if it has no line to speak of.

    pieces          function that returns an iterator of the text, piece by piece
    n_characters    the text's length

    Looked at are `most` lines, evenly spread, of LONG characters or more: shorter ones come twice in any text.
    """
    n = training_length(n_characters, val_fraction)
    count = sum(1 for _ in _held_back(pieces(), n))
    step = -(-count // most) or 1
    chosen = {line for i, line in enumerate(_held_back(pieces(), n)) if i % step == 0}
    if not chosen:
        return None
    seen = {line for line in map(str.strip, _lines(_until(pieces(), n))) if line in chosen}
    return len(seen) / len(chosen)


def _held_back(pieces, n):
    """The long lines that begin after the first n characters."""
    lines = _lines(_from(pieces, n))
    next(lines, None)  # it may have begun before
    return (line for line in map(str.strip, lines) if len(line) >= LONG)


def _lines(pieces, longest=2**16):
    """The lines of a text; those that are longer than anyone writes come in parts."""
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        yield from lines
        if len(rest) > longest:
            yield rest
            rest = ""
    yield rest


def _until(pieces, n):
    """The first n characters of a text."""
    for piece in pieces:
        yield piece[:n]
        n -= len(piece)
        if n <= 0:
            return


def _from(pieces, n):
    """A text without its first n characters."""
    for piece in pieces:
        if n < len(piece):
            yield piece[n:]
        n = max(0, n - len(piece))


# --------------------------------------------------------------------------------------------------------------------
# Tokens


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
            try:
                size = file.stat().st_size
            except OSError as error:
                raise UsageError(f"data: cannot read {file}: {error.strerror}") from None
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
            numbers = part[: 4096 - 4096 % n]
            numbers = numbers[: len(numbers) - len(numbers) % n].reshape(-1, n)
            low, high = numbers[:, :1], numbers[:, 1:]
            # no vocabulary is larger than 4 x 65,536 tokens
            fits = len(numbers) >= 8 and size % (2 * n) == 0 and low.any() and not high[:, 1:].any()
            if fits and (not high.any() or (high.max() < 4 and low.max() >= 256)):
                raise UsageError(
                    f"data: {file} looks like numbers of {bits} bits, and tokens have 16: write it by "
                    f"array.astype('uint16').tofile(file); --force reads it as it is"
                )

    def _parts(self, name):
        try:
            with open(self.path / name, "rb") as file:
                while raw := file.read(PIECE):
                    _check_stop(self._stop)
                    yield np.frombuffer(raw, self.dtype)
        except OSError as error:
            raise UsageError(f"data: cannot read {self.path / name}: {error.strerror}") from None

    def check(self, vocab_size):
        """Raise UsageError for the first token that a vocabulary of this size does not have."""
        for name, largest in self._largest.items():
            at = 0
            for part in self._parts(name) if largest >= vocab_size else ():
                wrong = np.flatnonzero(part >= vocab_size)
                if len(wrong):
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
        mappings = {path: _mapping_of(tokens) for path, tokens in files.items()}
        self._files = {path: mapping for path, mapping in mappings.items() if mapping is not None}
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


def training_length(n, val_fraction):
    return n - max(1, int(n * val_fraction))


def split(tokens, val_fraction):
    """(training tokens, validation tokens): the last val_fraction of a text is held back."""
    n = training_length(len(tokens), val_fraction)
    return tokens[:n], tokens[n:]


# --------------------------------------------------------------------------------------------------------------------
# Batches


class Blocks:
    """A split of the corpus as training examples: block_size tokens, each with the token after it as its target.

    An epoch visits each block of the split once, in shuffled order.  Where the cuts between blocks fall (the phase) is
    random for each epoch, so that a token is seen at every position in time.  What an epoch looks like depends on the
    seed and the epoch's number only, and so each batch on the seed and the batch's number.

    Raises UsageError for a split of fewer than block_size + 1 tokens.
    """

    def __init__(self, tokens, block_size, seed):
        if len(tokens) < block_size + 1:
            raise UsageError(
                f"data: the training text has {len(tokens)} tokens, but a block of block_size = {block_size} needs "
                f"{block_size + 1}. Use more text or a smaller --block-size"
            )
        self.tokens, self.block_size, self.seed = tokens, block_size, seed
        self.per_epoch = max(1, (len(tokens) - block_size) // block_size)
        self._phases = min(block_size, len(tokens) - self.per_epoch * block_size)
        self._order = (None, None, None)  # the last epoch asked for, its phase, and the order of its blocks

    def _start(self, i):
        """Place of the first token of example number i."""
        epoch, place = divmod(i, self.per_epoch)
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, ORDER, epoch])
            self._order = None, None, None  # so that there are never two
            self._order = epoch, rng.integers(self._phases), rng.permutation(self.per_epoch)
        _, phase, order = self._order
        return phase + self.block_size * order[place]

    def batch(self, n, batch_size):
        """Batch number n -> x, y, each (batch_size, block_size) int64."""
        examples = range(n * batch_size, (n + 1) * batch_size)
        starts = np.array([self._start(i) for i in examples])
        window = starts[:, None] + np.arange(self.block_size + 1)
        block = self.tokens[window].astype(np.int64)
        return np.ascontiguousarray(block[:, :-1]), np.ascontiguousarray(block[:, 1:])


class EvaluationBlocks:
    """A split cut into consecutive blocks, in which every token but the first is a target once.

    blocks[i:j] are x, y, each (j - i, block_size) int64.  The last block of the split is filled up with targets of -1,
    which do not count.

    most: at most so many blocks, evenly spread.  Raises UsageError for a split of fewer than 2 tokens.
    """

    def __init__(self, tokens, block_size, most=None):
        if len(tokens) < 2:
            raise UsageError(
                "data: the validation text needs 2 tokens at least. Use more text or a larger --val-fraction"
            )
        self.tokens, self.block_size = tokens, block_size
        self._whole = -(-(len(tokens) - 1) // block_size)  # blocks of the whole split
        self._n = self._whole if most is None else min(most, self._whole)

    def __len__(self):
        return self._n

    def __getitem__(self, part):
        chosen = np.arange(*part.indices(self._n)) * self._whole // self._n
        window = chosen[:, None] * self.block_size + np.arange(self.block_size + 1)
        inside = window < len(self.tokens)
        block = self.tokens[np.minimum(window, len(self.tokens) - 1)].astype(np.int64)
        x, y = block[:, :-1], np.where(inside, block, -1)[:, 1:]
        return np.ascontiguousarray(x), np.ascontiguousarray(y)
