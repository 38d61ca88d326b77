"""Text to tokens and back."""

import numpy as np
import pytest

from npgpt.errors import CheckpointError, UsageError
from npgpt.tokenizer import ByteTokenizer, CharTokenizer, from_dict

TEXT = "naïve café — 日本語 😀\n\ttabs and nothing else"


@pytest.mark.parametrize("cls", [CharTokenizer, ByteTokenizer])
def test_decode_undoes_encode(cls):
    tokenizer = cls.from_text(TEXT)
    tokens = tokenizer.encode(TEXT)
    assert tokens.dtype == np.int64 and tokens.min() >= 0 and tokens.max() < tokenizer.vocab_size
    assert tokenizer.decode(tokens) == TEXT
    assert from_dict(tokenizer.to_dict()).decode(tokens) == TEXT


def test_char_tokens_are_places_in_the_sorted_characters():
    tokenizer = CharTokenizer.from_text("banana")
    assert tokenizer.chars == "abn"
    assert tokenizer.encode("nab").tolist() == [2, 0, 1]
    assert tokenizer.encode("").tolist() == []


@pytest.mark.parametrize("text, name", [("aé", "U+00E9 LATIN SMALL LETTER E WITH ACUTE"), ("a\ud800", "U+D800")])
def test_an_unknown_character_is_named_with_its_position(text, name):
    with pytest.raises(UsageError, match=r"position 1 is not among the 3 characters") as error:
        CharTokenizer.from_text("banana").encode(text)
    assert name in str(error.value)


def test_byte_tokens_are_the_bytes_of_utf8():
    assert ByteTokenizer().encode("é!").tolist() == [0xC3, 0xA9, 0x21]


def test_decode_replaces_what_is_not_utf8():
    assert ByteTokenizer().decode([0x61, 0xFF, 0x62, 0xC3]) == "a\ufffdb\ufffd"


def test_byte_tokenizer_refuses_half_a_surrogate_pair():
    with pytest.raises(UsageError, match=r"U\+DC80"):
        ByteTokenizer().encode("a\udc80")


@pytest.mark.parametrize(
    "state", [{}, {"kind": "bpe"}, {"kind": "char"}, {"kind": "char", "chars": "ba"}, {"kind": "char", "chars": 3}]
)
def test_a_damaged_description_is_a_checkpoint_error(state):
    with pytest.raises(CheckpointError, match="tokenizer"):
        from_dict(state)
