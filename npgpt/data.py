"""From files to batches.

    text = load_text(["pydoc"])                        one string
    blocks = Blocks(tokens, block_size, seed)          a split of it, cut into training examples
    x, y = blocks.batch(n, batch_size)                 batch number n: (B, T) tokens, and the token after each
"""

import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np

from npgpt.config import ORDER
from npgpt.errors import UsageError
from npgpt.jit import cache_folder

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# --------------------------------------------------------------------------------------------------------------------
# Text


def load_text(sources):
    """The text of all sources, one after the other.

    A source is `pydoc`, `shakespeare`, a text file, or a folder, whose files are read in the order of their names;
    those that start with a dot are left out.  A file or folder that is really named `pydoc` is reached as ./pydoc.
    Raises UsageError with the file and the fault.
    """
    parts = []
    for source in sources:
        if source == "pydoc":
            parts.append(_pydoc())
        elif source == "shakespeare":
            parts.append(_shakespeare())
        else:
            parts.extend(read_utf8(path) for path in _files(Path(source)))
    text = "\n".join(part.removesuffix("\n") for part in parts) + "\n" if len(parts) > 1 else parts[0]
    if not text:
        raise UsageError(f"data: {', '.join(map(str, sources))}: there is no text in it")
    return text


def _files(path):
    if path.is_dir():
        files = sorted(p for p in path.rglob("[!.]*") if p.is_file())
        files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if not files:
            raise UsageError(f"data: the folder {path} has no files")
        return files
    if not path.exists():
        raise UsageError(f"data: there is no file {path}; --data takes pydoc, shakespeare, text files and folders")
    return [path]


def read_utf8(path):
    """The text of a UTF-8 file; a byte order mark is dropped, and line ends become \\n.  Raises UsageError."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"data: cannot read {path}: {error.strerror}") from None
    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        line = raw.count(b"\n", 0, at) + 1
        raise UsageError(
            f"data: {path} is not UTF-8 text: byte 0x{raw[at]:02x} at offset {at}, line {line}. "
            f"If it is text in another encoding, convert it first"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


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


def repeated_lines(text, val_fraction, most=2000):
    """Share of the held-back text's lines that stand in the training text too; None if it has no line to speak of.

    Looked at are `most` lines, evenly spread, of 24 characters or more: shorter ones come twice in any text.
    """
    n = _training_length(len(text), val_fraction)
    held_back = [line for line in map(str.strip, text[n:].splitlines()[1:]) if len(line) >= 24]
    chosen = set(held_back[:: -(-len(held_back) // most) or 1])
    if not chosen:
        return None
    seen, start = set(), 0
    while start < n:  # line by line, without a copy of the whole text
        end = text.find("\n", start, n)
        end = n if end < 0 else end
        line = text[start:end].strip()
        if line in chosen:
            seen.add(line)
        start = end + 1
    return len(seen) / len(chosen)


def _training_length(n, val_fraction):
    return n - max(1, int(n * val_fraction))


def split(tokens, val_fraction):
    """(training tokens, validation tokens): the last val_fraction of a text is held back."""
    n = _training_length(len(tokens), val_fraction)
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
        self._order = (None, None)  # the last epoch asked for, and its blocks' first tokens

    def _starts(self, epoch):
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, ORDER, epoch])
            phase = rng.integers(self._phases)
            self._order = (epoch, phase + self.block_size * rng.permutation(self.per_epoch))
        return self._order[1]

    def batch(self, n, batch_size):
        """Batch number n -> x, y, each (batch_size, block_size) int64."""
        examples = range(n * batch_size, (n + 1) * batch_size)
        starts = np.array([self._starts(i // self.per_epoch)[i % self.per_epoch] for i in examples])
        window = starts[:, None] + np.arange(self.block_size + 1)
        block = self.tokens[window].astype(np.int64)
        return np.ascontiguousarray(block[:, :-1]), np.ascontiguousarray(block[:, 1:])


def evaluation_blocks(tokens, block_size, most=None):
    """A split cut into consecutive blocks -> x, y, each (n, block_size) int64, in which every token but the first is a
    target once.  The last block is filled up with targets of -1, which do not count.

    most: at most so many blocks, evenly spread.  Raises UsageError for a split of fewer than 2 tokens.
    """
    if len(tokens) < 2:
        raise UsageError("data: the validation text needs 2 tokens at least. Use more text or a larger --val-fraction")
    n = -(-(len(tokens) - 1) // block_size)
    chosen = np.arange(n) if most is None or most >= n else np.arange(most) * n // most
    window = chosen[:, None] * block_size + np.arange(block_size + 1)
    inside = window < len(tokens)
    block = tokens[np.minimum(window, len(tokens) - 1)].astype(np.int64)
    x, y = block[:, :-1], np.where(inside, block, -1)[:, 1:]
    return np.ascontiguousarray(x), np.ascontiguousarray(y)
