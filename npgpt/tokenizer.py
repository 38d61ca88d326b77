"""Text to tokens and back: characters, or the bytes of UTF-8."""

import unicodedata

import numpy as np

from npgpt.errors import CheckpointError, UsageError


def _name(char):
    """A character as an error message shows it: 'é' (U+00E9 LATIN SMALL LETTER E WITH ACUTE)."""
    return f"{char!r} (U+{ord(char):04X} {unicodedata.name(char, 'with no name')})"


def decode(tokenizer, tokens):
    """Tokens -> text; bytes that are no character come as U+FFFD.  (npgpt.sampling.Writer does it a token at a time.)"""
    return b"".join(map(tokenizer.bytes_of, tokens)).decode("utf-8", "replace")


class CharTokenizer:
    """One token per character: its place in the sorted string `chars` of all characters of a corpus."""

    kind = "char"

    def __init__(self, chars):
        if not isinstance(chars, str) or not chars or list(chars) != sorted(set(chars)):
            raise ValueError("CharTokenizer: chars must be different characters in sorted order, at least one")
        self.chars = chars
        self._codes = np.array([ord(char) for char in chars], np.uint32)

    @classmethod
    def from_text(cls, text):
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self):
        return len(self.chars)

    def encode(self, text):
        """str -> (n,) int64.  Raises UsageError for a character that the corpus did not have."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        tokens = np.searchsorted(self._codes, codes)
        tokens[tokens == len(self._codes)] = 0
        unknown = np.flatnonzero(self._codes[tokens] != codes)
        if len(unknown):
            at = int(unknown[0])
            raise UsageError(
                f"character {_name(text[at])} at position {at} is not among the {self.vocab_size} characters "
                f"that the model was trained on"
            )
        return tokens.astype(np.int64)

    def bytes_of(self, token):
        """A token's text in UTF-8."""
        return self.chars[token].encode("utf-8", "surrogatepass")

    def decode(self, tokens):
        return decode(self, tokens)

    def to_dict(self):
        return {"kind": self.kind, "chars": self.chars}


class ByteTokenizer:
    """One token per byte of the text's UTF-8: 256 tokens, and no text that it cannot write."""

    kind = "byte"
    vocab_size = 256

    @classmethod
    def from_text(cls, text):
        return cls()

    def encode(self, text):
        """str -> (n,) int64.  Raises UsageError for half of a surrogate pair, which UTF-8 cannot hold."""
        try:
            return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int64)
        except UnicodeEncodeError as error:
            raise UsageError(f"character {_name(text[error.start])} at position {error.start} is not text") from None

    def bytes_of(self, token):
        """A token's text in UTF-8; here half a character, maybe."""
        return bytes([token])

    def decode(self, tokens):
        return decode(self, tokens)

    def to_dict(self):
        return {"kind": self.kind}


TOKENIZERS = {cls.kind: cls for cls in (CharTokenizer, ByteTokenizer)}


def from_dict(state):
    """The tokenizer that to_dict described; CheckpointError if it is not one."""
    try:
        if state["kind"] == "char":
            return CharTokenizer(state["chars"])
        if state["kind"] == "byte":
            return ByteTokenizer()
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's tokenizer is damaged: {error}") from None
    raise CheckpointError(f"the checkpoint's tokenizer {state['kind']!r} is not one of {', '.join(TOKENIZERS)}")
