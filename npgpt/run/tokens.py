"""The tokens of a run: in a file that its folder holds, or in --data; all ranks map them, and see when they change."""

import contextlib
import hashlib
import json
import time
from pathlib import Path

import numpy as np

from npgpt.data.batches import Blocks, EvaluationBlocks, split
from npgpt.data.notes import repeated_lines
from npgpt.data.tokens import PIECE, SPLITS, TokenFiles, Watch, map_tokens
from npgpt.errors import UsageError
from npgpt.files import folder

SEEN_WITHIN = 20  # seconds in which a file that one machine has written shows on the others that share the folder


class TokensChanged(UsageError):
    """A file of tokens is not what it was when the run began."""


class Tokens:
    """The two splits of a run's tokens.

    train, val        (n,) tokens, mapped from files
    file              the name of their file in the run folder; None for a folder of token files
    repeated_lines    of a text, on rank 0: see npgpt.data.notes.repeated_lines
    notes             what else to know of the text, a line each
    gone              the file that has changed, if one has
    """

    def __init__(self, config, fingerprint, splits, file, repeated_lines=None, notes=()):
        self.train, self.val = splits
        self.file, self.repeated_lines, self.notes, self.gone = file, repeated_lines, notes, None
        if file is not None:
            path = Path(config.out_dir) / file
            self._watch = Watch({path: self.train}, lambda: folder.is_whole(path))
        else:
            path = Path(config.data[0])
            files = {path / name: tokens for name, tokens in zip(SPLITS, splits, strict=True)}
            self._watch = Watch(files, lambda: TokenFiles(path, force=True).fingerprint == fingerprint)

    def __len__(self):
        return len(self.train) + len(self.val)

    def changed(self):
        """Whether the tokens are not what they were any more: then nobody may look at them."""
        self.gone = self.gone or self._watch.changed()
        return self.gone is not None


def prepare_tokens(config, world, data, tokenizer, fingerprint):
    """The Tokens of a run; data: what open_data gives, on rank 0.

    Raises UsageError for a text that is too short, CheckpointError if the file cannot be written, and BusyError.
    """

    def read():
        if isinstance(data, TokenFiles):
            data.check(tokenizer.vocab_size)
            tokens = Tokens(config, fingerprint, (data.train, data.val), None)
        else:
            file, encoded = _encoded(config, data, tokenizer)
            repeated = repeated_lines(data.pieces, data.n_characters, config.val_fraction)
            notes = [*data.notes, *data.held_back_notes(config.val_fraction)]
            tokens = Tokens(config, fingerprint, split(encoded, config.val_fraction), file, repeated, notes)
        return tokens, (len(tokens), tokens.file)

    mine, (n, file) = world.first_keeps(read)
    return world.agree(lambda: mine or Tokens(config, fingerprint, seen_from_here(config, tokenizer, n, file), file))


def blocks_of(config, train, val):
    """The two splits as Blocks and EvaluationBlocks.  Raises UsageError if one is too short."""
    return Blocks(train, config.block_size, config.seed), EvaluationBlocks(val, config.block_size)


def _dtype(tokenizer):
    """Of the tokens in a file that a run has written."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def _encoded(config, corpus, tokenizer):
    """(name, (n,) tokens) of the file that holds a Corpus in the run folder; it is written if it is not there yet."""
    words = json.dumps(tokenizer.to_dict(), sort_keys=True)
    name = f"tokens-{hashlib.sha256((corpus.fingerprint + words).encode()).hexdigest()[:16]}"
    n = tokenizer.n_tokens(corpus.n_characters, corpus.n_bytes)
    if n is None and corpus.n_bytes <= PIECE:  # a short text is encoded twice, lest a folder be made for nothing
        n = sum(map(len, tokenizer.encode_pieces(corpus.pieces())))
    if n is not None:
        blocks_of(config, *split(range(n), config.val_fraction))  # they look at the length only
    path = folder.tokens_file(config.out_dir, name)
    if path is None:  # there are none, or they are damaged
        with contextlib.closing(folder.RunFolder(config.out_dir)) as run:
            parts = tokenizer.encode_pieces(corpus.pieces())
            path = run.write_tokens(name, (part.astype(_dtype(tokenizer)) for part in parts))
    return path.name, map_tokens(path, _dtype(tokenizer))


def seen_from_here(config, tokenizer, n, file):
    """The two splits of n tokens that rank 0 has found or written.  Raises UsageError if they are not to be seen."""
    if file is None:
        path = Path(config.data[0]) / SPLITS[0]
        found = [map_tokens(path.with_name(name), TokenFiles.dtype) for name in SPLITS]
    else:
        path, found = Path(config.out_dir) / file, [None]
        for _ in range(SEEN_WITHIN):
            if (tokens := map_tokens(path, _dtype(tokenizer), n)) is not None:
                found = split(tokens, config.val_fraction)
                break
            time.sleep(1)
    if any(tokens is None for tokens in found) or sum(map(len, found)) != n:
        words = "all ranks must see the same files: let --out-dir and --data name folders that their machines share"
        raise UsageError(f"{path} is not here as rank 0 sees it; {words}")
    return found
