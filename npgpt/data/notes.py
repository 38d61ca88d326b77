"""What a person should know of a text before hours are spent on it."""

import sys
from pathlib import Path

from npgpt.data.batches import training_length
from npgpt.data.kinds import markup_of

LONG = 24  # characters of a line that hardly comes twice in a text by chance


def counted(paths):
    """Words for files: the only one's name, or how many, and which is the first."""
    return str(paths[0]) if len(paths) == 1 else f"{len(paths)} files, {paths[0]} the first,"


def markup_notes(names):
    """A line for each kind of file whose text is more than what people would read in it."""
    found = {}
    for name in names:
        kind = markup_of(name) if isinstance(name, Path) and name.is_file() else None
        if kind is not None:
            found.setdefault(kind, []).append(name)
    return [
        f"{counted(files)} {'is' if len(files) == 1 else 'are'} {kind}, and "
        f"{'is learnt as it stands' if len(files) == 1 else 'are learnt as they stand'}, with all that is no text; "
        f"to learn the text alone, write it to a file of its own"
        for kind, files in found.items()
    ]


def repeated_lines(pieces, n_characters, val_fraction, most=2000):
    """Share of the held-back text's lines that stand in the training text too; None if it has no line to speak of.

    pieces          function that returns an iterator of the text, piece by piece
    n_characters    the text's length

    Looked at are `most` lines, evenly spread, of LONG characters or more: shorter ones come twice in any text.
    """
    n = training_length(n_characters, val_fraction)
    count = sum(1 for _ in _held_back(pieces(), n))
    step = -(-count // most) or 1
    if not (chosen := {line for i, line in enumerate(_held_back(pieces(), n)) if i % step == 0}):
        return None
    seen = {line for line in map(str.strip, _lines(between(pieces(), 0, n))) if line in chosen}
    return len(seen) / len(chosen)


def _held_back(pieces, n):
    """The long lines that begin after the first n characters."""
    lines = _lines(between(pieces, n))
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


def between(pieces, start, stop=sys.maxsize):
    """The characters start .. stop - 1 of a text."""
    for piece in pieces:
        if part := piece[start:stop]:
            yield part
        start, stop = max(0, start - len(piece)), stop - len(piece)
        if stop <= 0:
            return
