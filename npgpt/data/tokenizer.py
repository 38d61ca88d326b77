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

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path
from threading import Thread

import numpy as np

from npgpt.data.kinds import kind_of
from npgpt.errors import CheckpointError, UsageError


def name_of(char):
    """A character as an error message shows it: 'é' (U+00E9 LATIN SMALL LETTER E WITH ACUTE)."""
    return f"{char!r} (U+{ord(char):04X} {unicodedata.name(char, 'with no name')})"


class _Tokenizer:
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
WORD = 2**10  # characters of a word at most where a text without a space is learnt from
PROBE = "".join(map(chr, range(0x20, 0x7F))) + "\n\tThe end.\n\n é日本語 😀"  # what a tokenizer has to give back
BPE_FILES = "tokenizer.json", "vocab.json"  # the latter with merges.txt beside it
SETTINGS, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
TEMPLATES = "additional_chat_templates/*.jinja"
# what else may say in a Hugging Face folder which tokens there are, or what is to be done with them
OTHER_FILES = (
    "merges.txt", "added_tokens.json", "special_tokens_map.json", SETTINGS, TEMPLATE, "generation_config.json",
)  # fmt: skip
# those of them that are kept, to be written again; the others are in tokenizer.json and SETTINGS then
_KEPT = re.compile(
    r"tokenizer_config\.json|generation_config\.json|chat_template\.jinja|additional_chat_templates/\w[\w.-]*\.jinja",
    re.ASCII,
)
MAX_JSON = 2**23  # bytes of a tokenizer's JSON within JSON: a checkpoint's header holds it with room to spare
END = "<|endoftext|>"  # GPT-2's token between two texts
NAMED = "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"
FLAGS = "single_word", "lstrip", "rstrip", "normalized", "special"  # of an added token
_GPT2 = "GPT2Tokenizer", "GPT2TokenizerFast"


class BPETokenizer(_Tokenizer):
    """Byte pair encoding of a text's UTF-8, as GPT-2 has it: a token is a part of a word.

    It needs the package tokenizers; UsageError where that is missing.

    json: a tokenizer in the format of Hugging Face's tokenizer.json.  Raises ValueError if it is no byte-level BPE with
    a token for every byte, so that there is no text that it cannot write.  Special tokens such as <|endoftext|> are
    found in a text, but none are added to it.

    files    what else its Hugging Face folder says about it: name -> text; save() writes it again
    ids      the numbers of special tokens in the folder's config.json: {"eos_token_id": 50256, ...}
    limit    the number of tokens that its model knows, where added tokens go beyond
    """

    kind = "bpe"

    def __init__(self, json_text, files=None, ids=None, limit=None):
        _package()
        state = _checked(json_text)
        self.json = json.dumps(state, ensure_ascii=False, separators=(",", ":"))
        self.files, self.ids, self.limit = dict(files or {}), dict(ids or {}), None
        if not all(_KEPT.fullmatch(name) and isinstance(text, str) for name, text in self.files.items()):
            raise ValueError("its files are none of a tokenizer")
        self._tokenizer = _tokenizer_of(state)
        self._bytes = {token: _bytes_of(word) for word, token in state["model"]["vocab"].items()}
        # the package numbers added tokens itself, whatever a file says; load() refuses one that says something else
        added = self._tokenizer.get_added_tokens_decoder()
        more = {number: token.content.encode("utf-8") for number, token in added.items()}
        self._n_words = max(self._bytes.keys() - more.keys()) + 1
        self._bytes.update(more)
        self.vocab_size = max(self._bytes) + 1
        self.holes = sorted(set(range(self.vocab_size)) - set(self._bytes))
        if len(json.dumps([self.json, self.files])) > MAX_JSON:
            raise ValueError(f"its {self.vocab_size:,} tokens are too many to keep in a checkpoint")
        if limit is not None:
            self.fit(limit)
        with _one_line():
            if self.decode(self._encode(PROBE)) != PROBE:
                raise ValueError("what it decodes is not what it encoded")
        self._places = _places(state)

    def fit(self, n):
        if type(n) is not int or n < self._n_words:
            raise ValueError(f"the model knows {n} tokens, but its tokenizer has {self._n_words} without those added")
        if n < self.vocab_size:
            self.limit = self.vocab_size = n

    @classmethod
    def learn(cls, pieces, vocab_size, check=lambda: None):
        """The tokenizer of at most vocab_size tokens that a text asks for: all bytes, and what comes often in it.

        pieces: iterator of the text, all of it: what is held back for validation is known only when there are tokens.
        check: is called now and then while they are learnt; what it raises ends that.
        The same text gives the same tokenizer.  Raises UsageError without the package tokenizers.
        """
        _package()
        try:
            return cls(_learnt(pieces, vocab_size, check))
        except ValueError as error:
            raise UsageError(f"vocab_size = {vocab_size}: {error}") from None

    @classmethod
    def load(cls, path):
        """The tokenizer in a tokenizer.json, or in a vocab.json with its merges.txt beside it, GPT-2's format.

        What the other files of its Hugging Face folder add to it counts as it does in the package transformers.
        Raises UsageError that names file and fault.
        """
        path = Path(path)
        try:
            if path.name in BPE_FILES:
                return cls(*_read_folder(path))
            state = _checked(json.dumps(_read_state(path)[0]))
            _add_tokens(state, {}, [], {})
            return cls(json.dumps(state))
        except ValueError as error:
            raise UsageError(f"tokenizer: {path} cannot be used: {error}") from None

    def save(self, folder):
        """Write tokenizer.json into a folder, and the other files that it needs.  Raises CheckpointError."""
        texts = {SETTINGS: _dumped(_usual_settings(json.loads(self.json))), **self.files, BPE_FILES[0]: self.json}
        for name, text in texts.items():
            path = Path(folder) / name
            try:
                if path.parent != Path(folder):
                    path.parent.mkdir(exist_ok=True)
                path.write_bytes(text.encode("utf-8"))
            except OSError as error:
                raise CheckpointError(f"cannot write {path}: {error.strerror}") from None
        return path

    def encode(self, text):
        """str -> (n,) int64.

        Raises UsageError for half of a surrogate pair, which UTF-8 cannot hold, and a token that the model does not
        know.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(f"character {name_of(text[error.start])} at position {error.start} is not text") from None
        return self._encode(text)

    def _encode(self, text):
        return self._known(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_pieces(self, pieces):
        """Iterator of the pieces of a text -> iterator of its tokens, those that encode() gives for all of it.

        Only where LONGEST characters have no place to cut them at, tokens beside the cut may be others.  Raises
        UsageError for a text of more characters if it is not known where this tokenizer lets it be cut at all.
        """
        pieces = _whole(pieces) if self._places is None else cut_at_lines(pieces, **self._places)
        for batch in _batches(pieces):
            for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                yield self._known(encoding.ids)

    def _known(self, tokens):
        """Tokens as an array.  Raises UsageError if the model does not know one of them."""
        tokens = np.array(tokens, np.int64)
        if self.limit is not None and len(tokens) and tokens.max() >= self.limit:
            token = int(tokens[tokens >= self.limit][0])
            raise UsageError(
                f"the text has the token {self.bytes_of(token).decode()!r}, whose number is {token}; the model knows "
                f"those below {self.limit} only"
            )
        return tokens

    def n_tokens(self, n_characters, n_bytes):
        return None

    def bytes_of(self, token):
        return self._bytes.get(int(token), b"")

    @property
    def end_of_text(self):
        """GPT-2's token between two texts, <|endoftext|>, or None in a vocabulary without it."""
        return self._tokenizer.token_to_id(END)

    def to_dict(self):
        more = {"files": self.files, "ids": self.ids, "limit": self.limit}
        return {"kind": self.kind, "json": self.json, **{name: value for name, value in more.items() if value}}


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


# what a process of its own runs to learn a tokenizer: that is one call of the package, which only its end interrupts
_LEARN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from npgpt.data import tokenizer; tokenizer.learn_alone()"
)


def _learnt(pieces, vocab_size, check):
    """The JSON of the tokenizer that a process of its own learns, which ends when this one does.

    Raises ValueError if it fails, and what pieces and check raise.
    """
    command = [sys.executable, "-c", _LEARN, json.dumps(sys.path), str(vocab_size)]
    start, said, n = time.monotonic(), 2, 0
    with tempfile.TemporaryFile() as out, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=out,
        start_new_session=True, creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # no Ctrl-C is for it
    ) as child:  # fmt: skip

        def look():
            nonlocal said
            check()
            if (seconds := time.monotonic() - start) > said:
                said = 2 * seconds
                text = f"npgpt: learning {vocab_size:,} tokens from {n:,} characters, {seconds:.0f} s so far"
                with contextlib.suppress(OSError):
                    print(text, file=sys.stderr, flush=True)

        try:
            for piece in cut_at_lines(pieces, SIZE, 2 * SIZE):
                n += len(piece)
                for part in _short_words(piece):
                    _send(child, part)
                look()
            _send(child, "")
            while child.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(0.1)
                look()
        except BaseException:
            child.kill()
            raise
        finally:
            with contextlib.suppress(OSError):  # what it did not read
                child.stdin.close()
        if child.returncode:
            raise ValueError(f"the package tokenizers failed with exit code {child.returncode}")
        out.seek(0)
        return out.read().decode("utf-8")


def _send(child, text):
    raw = text.encode("utf-8")
    with contextlib.suppress(OSError):  # it has failed, which its exit code will tell
        child.stdin.write(len(raw).to_bytes(8, "little") + raw)
        child.stdin.flush()


def learn_alone():
    """What the process does: pieces of a text, each after its length, come in, and the tokenizer's JSON goes out."""
    stdin, package = sys.stdin.buffer, _package()

    def pieces():
        while length := int.from_bytes(stdin.read(8), "little"):
            yield stdin.read(length).decode("utf-8")
        Thread(target=end_with_parent, daemon=True).start()

    def end_with_parent():
        stdin.read()
        os._exit(1)

    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=int(sys.argv[2]), min_frequency=2, show_progress=False, special_tokens=[],
        initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    # (the package keeps some hundred pieces: they are short, and a word that is cut in two does no harm here)
    tokenizer.train_from_iterator(pieces(), trainer)
    sys.stdout.buffer.write(tokenizer.to_str().encode("utf-8"))
    sys.stdout.buffer.flush()
    os._exit(0)


def _short_words(piece):
    """A piece in parts: where one of its lines is longer than SIZE, no word is longer than WORD.

    For each pair that is learnt, the package takes time that grows with the square of a word's length.
    """
    start = 0
    if max(map(len, piece.split("\n"))) > SIZE:
        for word in re.finditer(r"\S+|\s+", piece):
            for end in range(word.start() + WORD, word.end(), WORD):
                yield piece[start:end]
                start = end
    yield piece[start:]


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


def _whole(pieces):
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


@contextlib.contextmanager
def _one_line():
    """What the package raises as a ValueError; its panics are not even an Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(" ".join(str(error).split())) from None


def _tokenizer_of(state):
    """The package's tokenizer, without what would cut a text off, add to it, or encode it in another way each time."""
    package, model = _package(), {**state["model"], "dropout": None}
    with _one_line():
        return package.Tokenizer.from_str(json.dumps({**state, "truncation": None, "padding": None, "model": model}))


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


def _prefix_space(state):
    """Whether a text gets a space in front, and what follows a special token in it too."""
    return any(part.get("add_prefix_space", True) for part in _byte_level(state.get("pre_tokenizer")))


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


def _places(state):
    """Where the texts of a tokenizer may be cut, as cut_at_lines is told; None where that is not known."""
    normalizer, prefix = state.get("normalizer"), _prefix_space(state)
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
        raw = path.read_bytes()
        return json.loads(raw.decode("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"tokenizer: cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        kind = kind_of(raw)
        raise UsageError(f"tokenizer: {path} is not JSON: {f'it is {kind}' if kind else error}") from None


def _read_state(path):
    """(content of a tokenizer.json, False), or (what it would be, True) of a vocab.json with a merges.txt."""
    state = _read_json(path)
    if not isinstance(state, dict) or isinstance(state.get("model"), dict):
        return state, False
    merges = path.with_name("merges.txt")  # for these are words and their numbers
    if not merges.is_file():
        raise UsageError(
            f"tokenizer: {path} is no tokenizer.json (it has no model), nor is there a merges.txt beside it"
        )
    return _gpt2_state(state, _read_merges(merges)), True


# --------------------------------------------------------------------------------------------------------------------
# A tokenizer's folder, read as transformers reads it


def _read_folder(path):
    """(json, files) of the BPETokenizer in a folder with a tokenizer.json, or a vocab.json with its merges.txt.

    Raises ValueError for what npgpt's cannot be, and UsageError for a file that cannot be read.
    """
    folder = path.parent
    state, from_words = _read_state(path)
    settings, config, more, numbers = (
        _read_object(folder / name)
        for name in (SETTINGS, "config.json", "special_tokens_map.json", "added_tokens.json")
    )
    kind = settings.get("tokenizer_class") or config.get("tokenizer_class")
    is_gpt2 = kind in _GPT2 if kind else from_words or config.get("model_type") == "gpt2"
    if settings.get("split_special_tokens"):
        raise ValueError(f"{SETTINGS} says split_special_tokens; npgpt finds special tokens in a text")
    if settings.get("fast_tokenizer_files") not in (None, [BPE_FILES[0]]):
        raise ValueError(f"{SETTINGS} says fast_tokenizer_files; npgpt reads tokenizer.json only")
    if from_words and not is_gpt2:
        raise ValueError(f"tokenizer_class is {kind!r}; without a tokenizer.json npgpt reads GPT2Tokenizer only")
    state = _checked(json.dumps(state))
    _tokenizer_of(state)  # a damaged one is named as such first
    if is_gpt2:
        _make_gpt2(state, settings.get("add_prefix_space", False))
    named, others, numbered = _special_tokens(settings, more, numbers, is_gpt2)
    _add_tokens(state, named, others, numbered)
    kept = [folder / "generation_config.json", folder / TEMPLATE, *folder.glob(TEMPLATES)]
    files = {file.relative_to(folder).as_posix(): _read_text(file) for file in sorted(kept) if file.is_file()}
    settings.pop("added_tokens_decoder", None)  # they are in tokenizer.json now
    settings |= {name: token.content for name, token in named.items()}
    if others and not settings.get("extra_special_tokens"):
        settings["additional_special_tokens"] = [token.content for token in others]
    usual = _usual_settings(state)
    if settings and settings != usual:
        settings = {"tokenizer_class": usual["tokenizer_class"], **settings}
        files[SETTINGS] = _dumped({**settings, "add_prefix_space": usual["add_prefix_space"]})
    return json.dumps(state), files


def _usual_settings(state):
    """What tokenizer_config.json must say, so that transformers takes tokenizer.json as it stands, and adds nothing."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": _prefix_space(state),
        "clean_up_tokenization_spaces": False,
    }


def _dumped(settings):
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"


def _read_object(path):
    """The JSON object in a file, {} if there is none."""
    found = _read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise UsageError(f"tokenizer: {path} is not a JSON object")
    return found


def _read_text(path):
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"tokenizer: cannot read {path}: {error}") from None


def _make_gpt2(state, prefix_space):
    """Have a tokenizer.json's content cut texts as transformers' GPT2Tokenizer does.

    That takes no more than vocabulary and merges from the file.  Raises ValueError if it says that more is different
    than a space in front.
    """
    model, before = state["model"], state.get("pre_tokenizer") or {}
    same = before.get("type") == "ByteLevel" and before.get("use_regex", True) and state.get("normalizer") is None
    if not same or model.get("end_of_word_suffix") or model.get("ignore_merges"):
        raise ValueError(
            "it cuts texts in another way than GPT2Tokenizer, which transformers takes for this folder; if the file is "
            f'right, say so in {SETTINGS} beside it: "tokenizer_class": "PreTrainedTokenizerFast"'
        )
    if not isinstance(prefix_space, bool):
        raise ValueError(f"{SETTINGS} says add_prefix_space {prefix_space!r}, which is neither true nor false")
    before["add_prefix_space"] = prefix_space


def _special_tokens(settings, more, numbers, is_gpt2):
    """(named, others, numbered): the added tokens that the files beside a tokenizer.json name, as transformers does.

    named     "eos_token" ... -> AddedToken
    others    AddedTokens that are special too
    numbered  number -> AddedToken
    settings, more, numbers    contents of tokenizer_config.json, special_tokens_map.json and added_tokens.json

    Raises ValueError for what is none.
    """
    listed = settings.get("added_tokens_decoder")
    found = {name: token for name, token in settings.items() if name.endswith("_token")}
    others = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if listed is None:  # else transformers reads no other file
        found |= {name: token for name, token in more.items() if name.endswith("_token")}
        others = others or more.get("extra_special_tokens") or more.get("additional_special_tokens") or []
    if is_gpt2:
        found = {**dict.fromkeys(("bos_token", "eos_token", "unk_token"), END), **found}
    if isinstance(others, dict):
        found, others = {**found, **others}, []
    if not isinstance(others, list) or not (listed is None or isinstance(listed, dict)):
        raise ValueError(f"{SETTINGS}: its special tokens are no list")
    names = [*(name for name in NAMED if name in found), *(name for name in found if name not in NAMED)]
    named = {
        name: _added_token(found[name], name, special=True)
        for name in names
        if isinstance(found[name], (str, dict)) or (name in NAMED and found[name] is not None)
    }
    for token in named.values():
        token.special = True
    others = [_added_token(token, "additional_special_tokens", special=True) for token in others]
    special = {token.content for token in [*named.values(), *others]}
    if listed is not None:
        numbered = {number: _added_token(token, "added_tokens_decoder") for number, token in listed.items()}
        for token in numbered.values():
            token.special = token.special or token.content in {token.content for token in named.values()}
    else:
        numbered = {}
        for content, number in numbers.items():
            if type(number) is not int:
                raise ValueError(f"added_tokens.json: {content!r} has no number")
            flags = {"special": content in special, "normalized": content not in special}
            numbered[number] = _added_token(content, "added_tokens.json", **flags)
    try:
        return named, others, {int(number): token for number, token in numbered.items()}
    except (TypeError, ValueError):
        raise ValueError("its added tokens are not numbered") from None


def _added_token(token, name, **flags):
    """An AddedToken of the package, of a text with these flags or of a JSON object with its own.

    Raises ValueError with the name of what has it.
    """
    if isinstance(token, dict):
        flags = {flag: token[flag] for flag in FLAGS if flag in token}
        token = token.get("content")
    if not isinstance(token, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError(f"{name} is no token")
    return _package().AddedToken(token, **flags)


def _add_tokens(state, named, others, numbered):
    """Add tokens to the content of a tokenizer.json.  ValueError for one that cannot have its number."""
    tokenizer = _tokenizer_of(state)
    with _one_line():
        tokenizer.add_tokens([numbered[number] for number in sorted(numbered)])
        for token in [*named.values(), *others]:
            if token.content not in {added.content for added in tokenizer.get_added_tokens_decoder().values()}:
                tokenizer.add_tokens([token])
        for number, token in numbered.items():
            if tokenizer.token_to_id(token.content) != number:
                raise ValueError(
                    f"the files beside it give {token.content!r} the number {number}, "
                    f"which would be {tokenizer.token_to_id(token.content)}"
                )
        before = {added["id"]: added for added in state["added_tokens"]}
        state["added_tokens"] = [
            {"id": number, "content": token.content, **{flag: getattr(token, flag) for flag in FLAGS}}
            for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
        ]
        for number, added in before.items():
            if tokenizer.token_to_id(added["content"]) != number:
                raise ValueError(
                    f"its added token {added['content']!r} is number {number}, "
                    f"but takes number {tokenizer.token_to_id(added['content'])} (they have no gaps)"
                )


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
            return BPETokenizer(state["json"], state.get("files"), state.get("ids"), state.get("limit"))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's tokenizer is damaged: {error}") from None
    raise CheckpointError(f"the checkpoint's tokenizer {state['kind']!r} is none that this npgpt knows")
