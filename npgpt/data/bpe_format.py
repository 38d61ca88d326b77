"""What a tokenizer.json says, as far as npgpt goes by it, and the package tokenizers, which does the rest.

Also where a text may be cut, so that its parts have the tokens of the whole.
"""

import contextlib
import json
import re

from npgpt.errors import UsageError


def the_package():
    """The package tokenizers.  Raises UsageError where it is missing."""
    try:
        import tokenizers
    except ImportError:
        raise UsageError("a BPE tokenizer needs the package tokenizers: pip install 'npgpt[hub]'") from None
    return tokenizers


@contextlib.contextmanager
def one_line():
    """What the package raises as a ValueError; its panics are not even an Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(" ".join(str(error).split())) from None


def tokenizer_of(state):
    """The package's tokenizer, without what would cut a text off, add to it, or encode it in another way each time."""
    package, model = the_package(), {**state["model"], "dropout": None}
    with one_line():
        return package.Tokenizer.from_str(json.dumps({**state, "truncation": None, "padding": None, "model": model}))


# GPT-2's letters for bytes: letter -> byte; bytes that cannot be seen get the letters from U+0100 on
_SEEN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_LETTERS = {chr(byte): byte for byte in _SEEN}
_LETTERS |= {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)}.difference(_SEEN)))}
_NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that UTF-8 does not have


def bytes_of(word):
    """The bytes that a token's letters stand for."""
    try:
        return bytes(_LETTERS[letter] for letter in word)
    except KeyError:
        return word.encode("utf-8", "replace")


def _parts(state):
    """The parts of a pre-tokenizer or decoder, in their order."""
    if not isinstance(state, dict):
        return []
    if state.get("type") == "Sequence":
        lists = [state.get("pretokenizers"), state.get("decoders")]
        return [found for parts in lists if isinstance(parts, list) for part in parts for found in _parts(part)]
    return [state]


def _byte_level(state):
    """The parts of a pre-tokenizer or decoder that are a ByteLevel."""
    return [part for part in _parts(state) if part.get("type") == "ByteLevel"]


def has_prefix_space(state):
    """Whether a text gets a space in front, and what follows a special token in it too."""
    return any(part.get("add_prefix_space", True) for part in _byte_level(state.get("pre_tokenizer")))


def checked(text):
    """The content of a tokenizer.json; ValueError if it is not one of a byte-level BPE."""
    try:
        state = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    model = state.get("model") if isinstance(state, dict) else None
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or not _byte_level(state.get("decoder")):
        raise ValueError("it is not a byte-level BPE, such as GPT-2's")
    # of other families; where one of them is damaged, the package writes a Rust backtrace to standard error
    if model.get("continuing_subword_prefix") or "Precompiled" in json.dumps(state.get("normalizer")):
        raise ValueError("a byte-level BPE has neither continuing_subword_prefix nor a Precompiled normalizer")
    vocab, added = model.get("vocab"), state.setdefault("added_tokens", [])
    is_sound = isinstance(vocab, dict) and isinstance(added, list)
    is_sound = is_sound and all(isinstance(one, dict) and isinstance(one.get("content"), str) for one in added)
    numbers = [*vocab.values(), *(one.get("id") for one in added)] if is_sound else [None]
    if not all(type(number) is int and 0 <= number < 2**24 for number in numbers):
        raise ValueError("its tokens are not numbered")
    if missing := [byte for letter, byte in _LETTERS.items() if letter not in vocab and byte not in _NEVER]:
        raise ValueError(f"it has no token for the byte 0x{min(missing):02x}, so it cannot write every text")
    return state


# --------------------------------------------------------------------------------------------------------------------
# Where a text may be cut

# Where a text is cut, no tokenizer that cuts it into words in a way known here has a word on both sides: after a line
# break between two characters that are not space.
_AT_LINES = r"(?<=\S\n)(?=\S)"
_AT_SPACES = r"(?<=\S)(?= \S)"  # where each piece that does not begin with a space would get one
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


def cut_at_lines(pieces, size=SIZE, longest=LONGEST, places=re.compile(_AT_LINES), ahead=1):
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


def batches_of(pieces, places):
    """Lists of parts of a text that are BATCH characters together, or little more; places: as places_of tells them."""
    batch, size = [], 0
    for piece in whole(pieces) if places is None else cut_at_lines(pieces, **places):
        batch.append(piece)
        size += len(piece)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


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
