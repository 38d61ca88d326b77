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

from npgpt.data.bpe import BPETokenizer
from npgpt.data.characters import ByteTokenizer, CharTokenizer
from npgpt.errors import CheckpointError


def from_dict(state):
    """The tokenizer that to_dict described; CheckpointError if it is not one.

    Raises UsageError if it needs the package tokenizers, and that is missing.
    """
    try:
        if state["kind"] == "char":
            return CharTokenizer(state["chars"])
        if state["kind"] == "byte":
            return ByteTokenizer()
        if state["kind"] == "bpe":
            return BPETokenizer(state["json"], state.get("files"), state.get("ids"), state.get("limit"))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's tokenizer is damaged: {error}") from None
    raise CheckpointError(f"the checkpoint's tokenizer {state['kind']!r} is none that this npgpt knows")
