"""Byte pair encoding (Sennrich et al. 2016): pieces of words, which the package tokenizers learns and finds.

And the way back from what a tokenizer of any kind says about itself: from_dict.
"""

import json
from pathlib import Path

import numpy as np

from npgpt.data.bpe_files import BPE_FILES, END, KEPT, SETTINGS, dumped, read_folder, usual_settings
from npgpt.data.bpe_format import batches_of, bytes_of, checked, one_line, places_of, the_package, tokenizer_of
from npgpt.data.characters import ByteTokenizer, CharTokenizer, Tokenizer, utf8
from npgpt.errors import CheckpointError, UsageError, told_as

PROBE = "".join(map(chr, range(0x20, 0x7F))) + "\n\tThe end.\n\n é日本語 😀"  # what a tokenizer has to give back
MAX_JSON = 2**23  # bytes of a tokenizer's JSON within JSON: a checkpoint's header holds it with room to spare


class BPETokenizer(Tokenizer):
    """Byte pair encoding of a text's UTF-8, as GPT-2 has it: a token is a part of a word.

    It needs the package tokenizers; UsageError where that is missing.

    json: a tokenizer in the format of Hugging Face's tokenizer.json.  Raises ValueError if it is no byte-level BPE with
    a token for every byte, so that there is no text that it cannot write.  Special tokens such as <|endoftext|> are
    found in a text, but none are added to it.

    files    what else its Hugging Face folder says about it: name -> text; save() writes it again
    ids      the numbers of special tokens in the folder's config.json: {"eos_token_id": 50256, ...}
    limit    the number of tokens that its model knows, where added tokens go beyond
    end_of_text    GPT-2's token between two texts, <|endoftext|>, or None in a vocabulary without it
    """

    kind = "bpe"

    def __init__(self, json_text, files=None, ids=None, limit=None):
        the_package()
        state = checked(json_text)
        self.json = json.dumps(state, ensure_ascii=False, separators=(",", ":"))
        self.files, self.ids, self.limit = dict(files or {}), dict(ids or {}), None
        if not all(KEPT.fullmatch(name) and isinstance(text, str) for name, text in self.files.items()):
            raise ValueError("its files are none of a tokenizer")
        self._tokenizer = tokenizer_of(state)
        self.end_of_text = self._tokenizer.token_to_id(END)
        self._bytes = {token: bytes_of(word) for word, token in state["model"]["vocab"].items()}
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
        with one_line():
            if self.decode(self.encode(PROBE)) != PROBE:
                raise ValueError("what it decodes is not what it encoded")
        self._places = places_of(state)

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
        from npgpt.data.bpe_learning import learnt  # which begins processes: no other start has to wait for that

        the_package()
        try:
            return cls(learnt(pieces, vocab_size, check))
        except ValueError as error:
            raise UsageError(f"vocab_size = {vocab_size}: {error}") from None

    @classmethod
    def load(cls, path):
        """The tokenizer in a tokenizer.json, or in a vocab.json with its merges.txt beside it, GPT-2's format.

        What the other files of its Hugging Face folder add to it counts as it does in the package transformers.
        Raises UsageError that names file and fault.
        """
        try:
            return cls(*read_folder(Path(path)))
        except ValueError as error:
            raise UsageError(f"tokenizer: {path} cannot be used: {error}") from None

    def save(self, folder):
        """Write tokenizer.json into a folder, and the other files that it needs.  Raises CheckpointError."""
        texts = {SETTINGS: dumped(usual_settings(json.loads(self.json))), **self.files, BPE_FILES[0]: self.json}
        for name, text in texts.items():
            path = Path(folder) / name
            with told_as(CheckpointError, f"cannot write {path}"):
                if path.parent != Path(folder):
                    path.parent.mkdir(exist_ok=True)
                path.write_bytes(text.encode("utf-8"))
        return path

    def encode(self, text):
        """str -> (n,) int64.  Raises UsageError as `utf8` does, and for a token that the model does not know."""
        utf8(text)
        return self._known(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_pieces(self, pieces):
        """Iterator of the pieces of a text -> iterator of its tokens, those that encode() gives for all of it.

        Only where LONGEST characters have no place to cut them at, tokens beside the cut may be others.  Raises
        UsageError for a text of more characters if it is not known where this tokenizer lets it be cut at all.
        """
        for batch in batches_of(pieces, self._places):
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

    def to_dict(self):
        more = {"files": self.files, "ids": self.ids, "limit": self.limit}
        return {"kind": self.kind, "json": self.json, **{name: value for name, value in more.items() if value}}


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
