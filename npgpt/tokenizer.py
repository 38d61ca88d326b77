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

import json
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from npgpt.errors import CheckpointError, UsageError


def name_of(char):
    """A character as an error message shows it: 'é' (U+00E9 LATIN SMALL LETTER E WITH ACUTE)."""
    return f"{char!r} (U+{ord(char):04X} {unicodedata.name(char, 'with no name')})"


class _Tokenizer:
    """What all of them have in common."""

    holes = ()

    def encode_pieces(self, pieces):
        return map(self.encode, pieces)

    def decode(self, tokens):
        return b"".join(map(self.bytes_of, tokens)).decode("utf-8", "replace")


class CharTokenizer(_Tokenizer):
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


class ByteTokenizer(_Tokenizer):
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


# --------------------------------------------------------------------------------------------------------------------
# Byte pair encoding

# A text is cut where no tokenizer of this kind has a token on both sides: after a line break between two characters
# that are not space.
_CUT = re.compile(r"(?<=\S\n)(?=\S)")
SIZE = 2**16  # characters of a piece at least
LONGEST = 2**21  # and at most: one that has no such place is cut all the same, so that memory is enough for any text
BATCH = 2**20  # characters that are encoded at a time
PROBE = "".join(map(chr, range(0x20, 0x7F))) + "\n\tThe end.\n\n é日本語 😀"  # what a tokenizer has to give back
BPE_FILES = "tokenizer.json", "vocab.json"  # the latter with merges.txt beside it
MAX_JSON = 2**23  # bytes of a tokenizer's JSON within JSON: a checkpoint's header holds it with room to spare


class BPETokenizer(_Tokenizer):
    """Byte pair encoding of a text's UTF-8, as GPT-2 has it: a token is a part of a word.

    It needs the package tokenizers; UsageError where that is missing.

    json: a tokenizer in the format of Hugging Face's tokenizer.json.  Raises ValueError if it is no byte-level BPE with
    a token for every byte, so that there is no text that it cannot write.  Special tokens such as <|endoftext|> are
    found in a text, but none are added to it.
    """

    kind = "bpe"

    def __init__(self, json_text):
        package = _package()
        state = _checked(json_text)
        # what would cut a text off, add to it, or encode it in another way each time
        state["truncation"] = state["padding"] = state["model"]["dropout"] = None
        for part in _byte_level(state.get("pre_tokenizer")):
            part["add_prefix_space"] = False
        self.json = json.dumps(state, ensure_ascii=False, separators=(",", ":"))
        self._bytes = {token: _bytes_of(word) for word, token in state["model"]["vocab"].items()}
        self._bytes.update((added["id"], added["content"].encode("utf-8")) for added in state["added_tokens"])
        self.vocab_size = max(self._bytes) + 1
        self.holes = sorted(set(range(self.vocab_size)) - set(self._bytes))
        try:
            self._tokenizer = package.Tokenizer.from_str(self.json)
            gives_back = self.decode(self.encode(PROBE)) == PROBE
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the package raises nothing more special; its panics are not even an Exception
            raise ValueError(" ".join(str(error).split())) from None
        if len(json.dumps(self.json)) > MAX_JSON:
            raise ValueError(f"its {self.vocab_size:,} tokens are too many to keep in a checkpoint")
        if not gives_back:
            raise ValueError("what it decodes is not what it encoded")

    @classmethod
    def learn(cls, pieces, vocab_size):
        """The tokenizer of at most vocab_size tokens that a text asks for: all bytes, and what comes often in it.

        pieces: iterator of the text, all of it: what is held back for validation is known only when there are tokens.
        The same text gives the same tokenizer.  Raises UsageError without the package tokenizers.
        """
        package = _package()
        tokenizer = package.Tokenizer(package.models.BPE())
        tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = package.decoders.ByteLevel()
        trainer = package.trainers.BpeTrainer(
            vocab_size=vocab_size, min_frequency=2, show_progress=False, special_tokens=[],
            initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
        )  # fmt: skip
        # (the package keeps some hundred pieces: they are short, and a word that is cut in two does no harm here)
        short = cut_at_lines(pieces, SIZE, 2 * SIZE)
        # in a thread of its own, while this one takes note of a Ctrl-C, at which the pieces may come to an end
        with ThreadPoolExecutor(1) as thread:
            thread.submit(tokenizer.train_from_iterator, short, trainer).result()
        try:
            return cls(tokenizer.to_str())
        except ValueError as error:
            raise UsageError(f"vocab_size = {vocab_size}: {error}") from None

    @classmethod
    def load(cls, path):
        """The tokenizer in a tokenizer.json, or in a vocab.json with its merges.txt beside it, GPT-2's format.

        Raises UsageError that names file and fault.
        """
        path = Path(path)
        state = _read_json(path)
        if isinstance(state, dict) and not isinstance(state.get("model"), dict):  # words and their numbers
            merges = path.with_name("merges.txt")
            if not merges.is_file():
                raise UsageError(
                    f"tokenizer: {path} is no tokenizer.json (it has no model), nor is there a merges.txt beside it"
                )
            state = _gpt2_state(state, _read_merges(merges))
        try:
            return cls(json.dumps(state))
        except ValueError as error:
            raise UsageError(f"tokenizer: {path} cannot be used: {error}") from None

    def save(self, folder):
        """Write tokenizer.json into a folder; returns its path.  Raises CheckpointError."""
        path = Path(folder) / "tokenizer.json"
        try:
            path.write_text(self.json, encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror}") from None
        return path

    def encode(self, text):
        """str -> (n,) int64.  Raises UsageError for half of a surrogate pair, which UTF-8 cannot hold."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(f"character {name_of(text[error.start])} at position {error.start} is not text") from None
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def encode_pieces(self, pieces):
        """Iterator of the pieces of a text -> iterator of its tokens, those that encode() gives for all of it.

        Only where LONGEST characters have no place to cut them at, tokens beside the cut may be others.
        """
        for batch in _batches(cut_at_lines(pieces)):
            for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                yield np.array(encoding.ids, np.int64)

    def n_tokens(self, n_characters, n_bytes):
        return None

    def bytes_of(self, token):
        return self._bytes.get(int(token), b"")

    @property
    def end_of_text(self):
        """GPT-2's token between two texts, <|endoftext|>, or None in a vocabulary without it."""
        return self._tokenizer.token_to_id("<|endoftext|>")

    def to_dict(self):
        return {"kind": self.kind, "json": self.json}


def find_bpe(path):
    """The file that BPETokenizer.load reads for --tokenizer PATH; None if the path is another file.

    Raises UsageError for a folder that has none.
    """
    path = Path(path)
    if not path.is_dir():
        return path if path.suffix == ".json" else None
    for name in BPE_FILES:
        if (path / name).is_file():
            return path / name
    raise UsageError(f"tokenizer: the folder {path} has neither tokenizer.json nor vocab.json with merges.txt")


def cut_at_lines(pieces, size=SIZE, longest=LONGEST):
    """The same text in other pieces, of `size` characters and more, that end where a tokenizer may be interrupted."""
    text, searched = "", 0  # what waits to be cut, and how much of it is known to have no such place
    for piece in pieces:
        text, begin = text + piece, 0
        while True:
            cut = _CUT.search(text, max(searched, begin + size))
            end = len(text) if cut is None else cut.start()
            if end - begin > longest:
                end = begin + longest
            elif cut is None:
                break
            yield text[begin:end]
            begin = end
        text = text[begin:]
        searched = len(text)
    if text:
        yield text


def _batches(pieces):
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


def _package():
    try:
        import tokenizers
    except ImportError:
        raise UsageError("a BPE tokenizer needs the package tokenizers: pip install 'npgpt[hub]'") from None
    return tokenizers


def _letters():
    """GPT-2's letters for bytes: letter -> byte.  Bytes that cannot be seen get the letters from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(unseen)}


_LETTERS = _letters()
_NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that UTF-8 does not have


def _bytes_of(word):
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


def _checked(text):
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


def _read_json(path):
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"tokenizer: cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"tokenizer: {path} is not JSON: {error}") from None


def _read_merges(path):
    """merges.txt: a line for each pair, the most frequent first."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"tokenizer: cannot read {path}: {error}") from None
    merges = []
    for n, line in enumerate(lines, 1):
        if line and not (n == 1 and line.startswith("#version")):
            pair = line.split(" ")
            if len(pair) != 2:
                raise UsageError(f"tokenizer: {path} is not a list of pairs: line {n} has {len(pair)} words")
            merges.append(pair)
    return merges


def _gpt2_state(vocab, merges):
    """What would stand in a tokenizer.json with this vocabulary and these merges, all else as in GPT-2's."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = "<|endoftext|>"
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": vocab[end], "content": end, **special}] if end in vocab else [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": [" ".join(pair) for pair in merges]},
    }


# --------------------------------------------------------------------------------------------------------------------


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
            return BPETokenizer(state["json"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's tokenizer is damaged: {error}") from None
    raise CheckpointError(f"the checkpoint's tokenizer {state['kind']!r} is none that this npgpt knows")
