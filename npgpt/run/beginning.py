"""What a new run begins with: its tokenizer, and with --init-from a model that has learnt something before."""

import dataclasses
import math
from pathlib import Path

from npgpt.config import BPE_VOCAB_SIZE, TOKENIZERS
from npgpt.data.bpe import BPETokenizer
from npgpt.data.bpe_files import BPE_FILES, find_bpe
from npgpt.data.characters import ByteTokenizer, CharTokenizer, name_of
from npgpt.data.text import Corpus
from npgpt.data.tokens import check_stop
from npgpt.errors import UsageError
from npgpt.files import pretrained
from npgpt.model import GPT


def settings_of(path):
    """The settings that a run has which begins with the model at a path (see GPT.from_pretrained), as a dict.

    Raises CheckpointError.
    """
    with pretrained.opened(path) as found:
        settings = dataclasses.asdict(found.config)
        if found.tokenizer is not None:
            settings["tokenizer"] = found.tokenizer.kind
        elif any((Path(path) / name).exists() for name in BPE_FILES):
            settings["tokenizer"] = "bpe"  # its package is missing, which will be said: no other fits the weights
    return {name: value for name, value in settings.items() if name not in ("vocab_size", "dropout")}


def beginning(config, data, stop):
    """(model to begin with or None, tokenizer) of a new run.  Raises UsageError, and CheckpointError for init_from."""
    if config.init_from is None:
        return None, _make_tokenizer(config, data, stop)
    model = GPT.from_pretrained(config.init_from).train()
    for name in ("n_layer", "n_head", "n_embd", "bias", "block_size"):
        has, asked = getattr(model.config, name), getattr(config, name)
        if has != asked and not (name == "block_size" and asked < has):
            raise UsageError(f"init_from: the model in {config.init_from} has {name} = {has}, not {asked}")
    tokenizer, place = model.tokenizer, config.init_from
    if tokenizer is None:
        tokenizer = _make_tokenizer(config, data, stop)
    elif config.tokenizer != tokenizer.kind:
        tokenizer = _same_tokenizer(config, data, stop, tokenizer)
    elif config.vocab_size not in (None, tokenizer.vocab_size):
        has, asked = tokenizer.vocab_size, config.vocab_size
        raise UsageError(f"init_from: the tokenizer in {place} has {has} tokens, not vocab_size = {asked}")
    else:
        _check_characters(tokenizer, data, place)
    if tokenizer.vocab_size > model.config.vocab_size:
        words = f"but the tokenizer {config.tokenizer} has {tokenizer.vocab_size}"
        raise UsageError(f"init_from: the model in {place} knows {model.config.vocab_size} tokens, {words}")
    model.crop_block_size(config.block_size)
    model.set_dropout(config.dropout)
    return model, tokenizer


def doubt_of(config, model, loss):
    """Words for a model to begin with whose validation loss is worse than that of one that knows nothing, or None."""
    ignorance = math.log(model.config.vocab_size)
    if config.init_from is None or loss <= ignorance + 0.1:
        return None
    both = f"the validation loss {loss:.2f}, and one that knows nothing {ignorance:.2f} (ln vocab_size)"
    return f"the model that this run begins with has {both}: did it learn other tokens, or another kind of text?"


def _same_tokenizer(config, data, stop, before):
    """The tokenizer that --tokenizer names, if its tokens mean what they mean to the model that the run begins with.

    Raises UsageError if they do not: the weights would be of no use, and nothing but the loss would tell.
    """
    lead = f"init_from: the model in {config.init_from} was trained with other tokens than {config.tokenizer}:"
    if config.tokenizer in TOKENIZERS:
        raise UsageError(f"{lead} its tokenizer is {before.kind}; leave out --tokenizer, or --init-from")
    after = _make_tokenizer(config, data, stop)
    for token in range(before.vocab_size):
        was, is_now = (t.bytes_of(token) if token < t.vocab_size else b"" for t in (before, after))
        if was != is_now:
            was, is_now = (repr(text.decode("utf-8", "replace")) if text else "none" for text in (was, is_now))
            raise UsageError(f"{lead} token {token} was {was} and is {is_now}; leave out --tokenizer, or --init-from")
    return after


def _make_tokenizer(config, data, stop):
    """The tokenizer of a new run.  Raises UsageError."""
    if config.tokenizer in ("char", "bpe") and not isinstance(data, Corpus):
        has_pickle = (data.path / "meta.pkl").exists()
        but = "; its meta.pkl is pickle, which can run code, and is not read" if has_pickle else " and no text"
        lead = f"data: {data.path} holds tokens{but};"
        raise UsageError(
            f"{lead} pass the vocabulary with --tokenizer input.txt (the text whose characters it is) or tokenizer.json"
        )
    if config.tokenizer == "char":
        return CharTokenizer(data.characters)
    if config.tokenizer == "byte":
        return ByteTokenizer()
    if config.tokenizer == "bpe":
        return BPETokenizer.learn(data.pieces(), config.vocab_size or BPE_VOCAB_SIZE, lambda: check_stop(stop))
    file = find_bpe(config.tokenizer)
    if file is not None:
        return BPETokenizer.load(file)
    tokenizer = CharTokenizer(Corpus([Path(config.tokenizer)], stop, "tokenizer").characters)
    _check_characters(tokenizer, data, config.tokenizer)
    return tokenizer


def _check_characters(tokenizer, data, source):
    """Raise UsageError if a text has characters that a tokenizer of characters does not know."""
    knows_some = isinstance(data, Corpus) and isinstance(tokenizer, CharTokenizer)
    if knows_some and (unknown := sorted(set(data.characters) - set(tokenizer.chars))):
        raise UsageError(
            f"data: the text has {len(unknown)} characters that {source} does not have, such as {name_of(unknown[0])}"
        )
