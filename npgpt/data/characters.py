"""The tokenizers that need no learning: characters, and the bytes of UTF-8.  And what all tokenizers have in common."""

import unicodedata

import numpy as np

from npgpt.errors import UsageError


def name_of(char):
    """A character as an error message shows it: 'é' (U+00E9 LATIN SMALL LETTER E WITH ACUTE)."""
    return f"{char!r} (U+{ord(char):04X} {unicodedata.name(char, 'with no name')})"


def utf8(text):
    """A text's UTF-8.  Raises UsageError for half of a surrogate pair, which it cannot hold."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"character {name_of(text[error.start])} at position {error.start} is not text") from None


class Tokenizer:
    """Text to tokens and back: characters, the bytes of UTF-8, or pieces of words that were learnt from a text.

    Each tokenizer has

        vocab_size                        number of different tokens
        holes                             numbers below vocab_size that are no token
        encode(text)                      str -> (n,) int64
        encode_pieces(pieces)             the same for a text in pieces: iterator of str -> iterator of (n,) int64
        n_tokens(n_characters, n_bytes)   how many tokens a text of this length has; None if its length does not tell
        bytes_of(token)                   its text in UTF-8, maybe a part of a character only
        decode(tokens)                    tokens -> text; bytes that are no character come as U+FFFD
        to_dict()                         what from_dict makes the same tokenizer of; it can be written as JSON
    """

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
        self.chars, self.vocab_size = chars, len(chars)
        codes = [ord(char) for char in chars]
        self._tokens = np.full(codes[-1] + 2, -1, np.int64)  # of each character by its code; the last: of those beyond
        self._tokens[codes] = np.arange(len(codes))

    @classmethod
    def from_text(cls, text):
        return cls("".join(sorted(set(text))))

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

    def encode(self, text):
        """str -> (n,) int64.  Raises UsageError as `utf8` does."""
        return np.frombuffer(utf8(text), np.uint8).astype(np.int64)

    def n_tokens(self, n_characters, n_bytes):
        return n_bytes

    def bytes_of(self, token):
        return bytes([token])

    def to_dict(self):
        return {"kind": self.kind}
