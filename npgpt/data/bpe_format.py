"""What a tokenizer.json says, as far as npgpt goes by it, and the package tokenizers, which does the rest."""

import contextlib
import json

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


def _letters():
    """GPT-2's letters for bytes: letter -> byte.  Bytes that cannot be seen get the letters from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(unseen)}


_LETTERS = _letters()
_NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that UTF-8 does not have


def bytes_of(word):
    """The bytes that a token's letters stand for."""
    try:
        return bytes(_LETTERS[letter] for letter in word)
    except KeyError:
        return word.encode("utf-8", "replace")


def _byte_level(state):
    """The parts of a pre-tokenizer or decoder that are a ByteLevel."""
    if not isinstance(state, dict):
        return []
    if state.get("type") == "Sequence":
        lists = [state.get("pretokenizers"), state.get("decoders")]
        return [found for parts in lists if isinstance(parts, list) for part in parts for found in _byte_level(part)]
    return [state] if state.get("type") == "ByteLevel" else []


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
    numbers = list(vocab.values()) if isinstance(vocab, dict) else [None]
    if isinstance(added, list) and all(isinstance(one, dict) and isinstance(one.get("content"), str) for one in added):
        numbers += [one.get("id") for one in added]
    else:
        numbers.append(None)
    if not all(type(number) is int and 0 <= number < 2**24 for number in numbers):
        raise ValueError("its tokens are not numbered")
    missing = [byte for letter, byte in _LETTERS.items() if letter not in vocab and byte not in _NEVER]
    if missing:
        raise ValueError(f"it has no token for the byte 0x{min(missing):02x}, so it cannot write every text")
    return state
