"""Where a text may be cut, so that its parts have the tokens of the whole."""

import re

from npgpt.data.bpe_format import has_prefix_space
from npgpt.errors import UsageError

# Where a text is cut, no tokenizer that cuts it into words in a way known here has a word on both sides: after a line
# break between two characters that are not space.
_AT_LINES = r"(?<=\S\n)(?=\S)"
_AT_SPACES = r"(?<=\S)(?= \S)"  # where each piece that does not begin with a space would get one
_CUT = re.compile(_AT_LINES)
# the patterns by which GPT-2, and GPT-4, Llama 3 and Qwen 2, cut a text into words
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", _GPT4 % "{1,3}", _GPT4 % "",
)  # fmt: skip
SIZE = 2**16  # characters of a piece at least
LONGEST = 2**21  # and at most: one that has no such place is cut all the same, so that memory is enough for any text
BATCH = 2**20  # characters that are encoded at a time


def cut_at_lines(pieces, size=SIZE, longest=LONGEST, places=_CUT, ahead=1):
    """The same text in other pieces, of `size` characters and more, that end where a tokenizer may be interrupted.

    places: a pattern that finds where that is, and which looks at so many characters ahead.
    """
    text, searched = "", 0  # what waits to be cut, and how much of it is known to have no such place
    for piece in pieces:
        text, begin = text + piece, 0
        while True:
            cut = places.search(text, max(searched, begin + size))
            end = len(text) if cut is None else cut.start()
            if end - begin > longest:
                end = begin + longest
            elif cut is None or end + ahead > len(text):
                break
            yield text[begin:end]
            begin = end
        text = text[begin:]
        searched = max(0, len(text) + 1 - ahead)
    if text:
        yield text


def whole(pieces):
    """The text of all pieces as one.  Raises UsageError if it is too long for that."""
    parts, size = [], 0
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size > LONGEST:
            raise UsageError(
                f"tokenizer: it cuts texts into words in a way of its own, so that one of more than {LONGEST:,} "
                f"characters cannot be encoded in parts; encode it with another program (train.bin, val.bin)"
            )
    if size:
        yield "".join(parts)


def batches_of(pieces):
    """Lists of pieces that are BATCH characters together, or little more."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _parts(state):
    """The parts of a pre-tokenizer, in their order."""
    if state.get("type") == "Sequence":
        return [part for parts in state["pretokenizers"] for part in _parts(parts)]
    return [state]


def _cuts_known_words(state):
    """Whether a pre-tokenizer is known to cut a text into words at all places that _AT_LINES and _AT_SPACES find."""
    for part in _parts(state):
        if part.get("type") == "ByteLevel":  # what comes after it no longer sees the text
            return part.get("use_regex", True)
        if part.get("type") == "Split":
            how = part["behavior"], part["invert"]
            return part["pattern"].get("Regex") in _WORDS and how in (("Isolated", False), ("Removed", True))
        if part.get("type") != "Digits":
            return False
    return False


def places_of(state):
    """Where the texts of a tokenizer may be cut, as cut_at_lines is told; None where that is not known."""
    normalizer, prefix = state.get("normalizer"), has_prefix_space(state)
    if (normalizer or {"type": "NFC"}).get("type") != "NFC" or not _cuts_known_words(state["pre_tokenizer"]):
        return None
    unless = ""  # added tokens, which are found before there are words
    for added in state["added_tokens"]:
        content = added["content"]
        cuts = [n for n in range(1, len(content)) if (content[n] == " " if prefix else content[n - 1] == "\n")]
        parts = [(re.escape(content[:n]), re.escape(content[n:])) for n in cuts]
        unless += "".join(f"(?!(?<={left}){right})" for left, right in parts)
        if content and (added["single_word"] or added["lstrip"] or added["rstrip"]):
            unless += f"(?!{re.escape(content)})(?<!{re.escape(content)})"
    if unless and normalizer:  # which may change the text before they are looked for
        return None
    ahead = max([2, *(len(added["content"]) for added in state["added_tokens"])])
    return {"places": re.compile((_AT_SPACES if prefix else _AT_LINES) + unless), "ahead": ahead}
