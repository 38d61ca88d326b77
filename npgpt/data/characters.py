"""The tokenizers that need no learning: characters, and the bytes of UTF-8.  And what all tokenizers have in common."""

import unicodedata

import numpy as np

from npgpt.errors import UsageError


def name_of(char):
    """A character as an error message shows it: 'é' (U+00E9 LATIN SMALL LETTER E WITH ACUTE)."""
    return f"{char!r} (U+{ord(char):04X} {unicodedata.name(char, 'with no name')})"


class Tokenizer:
    """What all of them have in common."""

    holes = ()

    def encode_pieces(self, pieces):
        return map(self.encode, pieces)

    def fit(self, n):
        """Have it know that its model knows n tokens.  ValueError if it cannot do with so few."""
        if n < self.vocab_size:
            raise ValueError(f"the model knows {n} tokens, but its tokenizer has {self.vocab_size}")

    def decode(self, tokens):
        return b"".join(map(self.bytes_of, tokens)).decode("utf-8", "replace")


class CharTokenizer(Tokenizer):
    """One token per character: its place in the sorted string `chars` of all characters of a corpus."""

    kind = "char"

    def __init__(self, chars):
        if not isinstance(chars, str) or not chars or list(chars) != sorted(set(chars)):
            raise ValueError("CharTokenizer: chars must be different characters in sorted order, at least one")
        self.chars = chars
        codes = [ord(char) for char in chars]
        self._tokens = np.full(codes[-1] + 2, -1, np.int64)  # of each character by its code; the last: of those beyond
        self._tokens[codes] = np.arange(len(codes))

    @classmethod
    def from_text(cls, text):
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self):
        return len(self.chars)

    def encode(self, text):
        """str -> (n,) int64.  Raises UsageError for a character that the corpus did not have."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        tokens = self._tokens[np.minimum(codes, len(self._tokens) - 1)]
        if len(tokens) and tokens.min() < 0:
            at = int(np.argmin(tokens))
            raise UsageError(
                f"character {name_of(text[at])} at position {at} is not among the {self.vocab_size} characters "
                f"that the model was trained on"
            )
        return tokens

    def n_tokens(self, n_characters, n_bytes):
        return n_characters

    def bytes_of(self, token):
        return self.chars[token].encode("utf-8", "surrogatepass")

    def to_dict(self):
        return {"kind": self.kind, "chars": self.chars}


class ByteTokenizer(Tokenizer):
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
            raise UsageError(f"character {name_of(text[error.start])} at position {error.start} is not text") from None

    def n_tokens(self, n_characters, n_bytes):
        return n_bytes

    def bytes_of(self, token):
        return bytes([token])

    def to_dict(self):
        return {"kind": self.kind}
