"""Text to tokens and back."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from npgpt.errors import CheckpointError, StoppedError, UsageError
from npgpt.sampling import Writer
from npgpt.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, cut_at_lines, find_bpe, from_dict

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


@pytest.mark.parametrize("cls", [CharTokenizer, ByteTokenizer])
def test_a_text_in_pieces_has_the_same_tokens(cls):
    tokenizer = cls.from_text(TEXT)
    tokens = np.concatenate(list(tokenizer.encode_pieces([TEXT[:7], "", TEXT[7:]])))
    assert tokens.tolist() == tokenizer.encode(TEXT).tolist()
    assert tokenizer.n_tokens(len(TEXT), len(TEXT.encode())) == len(tokens)


# ---- byte pair encoding

PROSE = (
    "It was the best of times, it was the worst of times; it's 1859 — naïve cafés, 日本語 😀😀.\n\n"
    "    def times(best):\n\treturn best * 2  # the best\n\n\n  the end <|endoftext|>\n"
) * 20


@pytest.fixture(scope="module")
def package():
    return pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def gpt2(package, tmp_path_factory):
    """(a folder with a tokenizer.json, one with vocab.json and merges.txt, the package's tokenizer): GPT-2's format."""
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = package.decoders.ByteLevel()
    tokenizer.post_processor = package.processors.ByteLevel(trim_offsets=False)
    alphabet = package.pre_tokenizers.ByteLevel.alphabet()
    trainer = package.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([PROSE.replace("<|endoftext|>", "")], trainer)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    tokenizer.save(str(one / "tokenizer.json"))
    state = json.loads((one / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = {**state["model"]["vocab"], "<|endoftext|>": tokenizer.token_to_id("<|endoftext|>")}
    (two / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    (two / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return one, two, tokenizer


def test_gpt2s_files_give_the_packages_tokens(gpt2):
    one, two, expected = gpt2
    tokens = expected.encode(PROSE, add_special_tokens=False).ids
    assert expected.token_to_id("<|endoftext|>") == max(tokens) and len(tokens) < len(PROSE.encode()) / 2
    for path in (one, one / "tokenizer.json", two, two / "vocab.json"):
        tokenizer = BPETokenizer.load(find_bpe(path))
        assert tokenizer.vocab_size == expected.get_vocab_size() == max(tokens) + 1
        found = tokenizer.encode(PROSE)
        assert found.dtype == np.int64 and found.tolist() == tokens
        assert tokenizer.decode(found) == PROSE
        assert tokenizer.n_tokens(5, 5) is None and len(tokenizer.encode("")) == 0
        again = from_dict(json.loads(json.dumps(tokenizer.to_dict())))
        assert again.encode(PROSE).tolist() == tokens and again.to_dict() == tokenizer.to_dict()


def test_what_is_saved_is_a_tokenizer_json(gpt2, package, tmp_path):
    one, two, expected = gpt2
    for path in (one, two):
        saved = BPETokenizer.load(find_bpe(path)).save(tmp_path)
        assert saved == tmp_path / "tokenizer.json"
        assert package.Tokenizer.from_file(str(saved)).encode(PROSE).ids == expected.encode(PROSE).ids
    with pytest.raises(CheckpointError, match="cannot write"):
        BPETokenizer.load(find_bpe(one)).save(tmp_path / "missing")


def test_bpe_stream_never_breaks_a_character(gpt2):
    tokenizer = BPETokenizer.load(gpt2[0] / "tokenizer.json")
    text = "a😀é<|endoftext|>日"
    tokens = tokenizer.encode(text)
    writer = Writer(tokenizer)
    pieces = [piece for token in tokens if (piece := writer.feed(token))]
    assert "".join(pieces) == text and "�" not in text and "<|endoftext|>" in pieces
    assert len(tokenizer.encode("🦙")) > 1 and tokenizer.decode(tokenizer.encode("🦙")) == "🦙"
    assert tokenizer.decode(tokenizer.encode("🦙")[:2]) == "�"


def test_bpe_refuses_half_a_surrogate_pair(gpt2):
    with pytest.raises(UsageError, match=r"U\+D800.* at position 1 is not text"):
        BPETokenizer.load(gpt2[0] / "tokenizer.json").encode("a\ud800")


LEARN = """
import sys
from npgpt.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, cut_at_lines, find_bpe, from_dict
text = open(sys.argv[1], encoding="utf-8").read()
print(BPETokenizer.learn([text[i : i + 999] for i in range(0, len(text), 999)], 300).json)
"""


def test_the_same_text_gives_the_same_bpe_in_every_process(package, tmp_path):
    (tmp_path / "text.txt").write_text(PROSE, encoding="utf-8")
    learnt = set()
    for threads in ("1", "2", "3"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads, "PYTHONUTF8": "1"}
        command = [sys.executable, "-c", LEARN, str(tmp_path / "text.txt")]
        learnt.add(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    assert len(learnt) == 1
    state = json.loads(learnt.pop())
    assert len(state["model"]["vocab"]) == 300 and state["added_tokens"] == []


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no timers that signal")
def test_a_signal_is_taken_note_of_while_bpe_is_learnt(package):
    noted = []

    def pieces():
        start = time.monotonic()
        while not noted:  # (it would go on for ever if the signal had to wait for the end)
            assert time.monotonic() < start + 60
            yield PROSE
        raise StoppedError(15, "stopped")

    before = signal.signal(signal.SIGALRM, lambda number, _: noted.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(StoppedError):
            BPETokenizer.learn(pieces(), 300)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_learnt_bpe_can_write_any_text(package):
    tokenizer = BPETokenizer.learn(iter(["the cat the cat "]), 4096)
    assert 256 < tokenizer.vocab_size < 300  # there is no more to be learnt
    assert len(tokenizer.encode("the cat")) < 7
    assert tokenizer.decode(tokenizer.encode(TEXT + PROSE)) == TEXT + PROSE


def test_bpe_in_pieces_has_the_tokens_of_the_whole(package, monkeypatch):
    rng = np.random.default_rng(0)
    tokenizer = BPETokenizer.learn([PROSE], 500)
    for n in range(40):
        words = ["times", " best", ".", "日本", "1859", "it's", "\u200b"]
        parts = [*words, "\n", "\n\n", " ", "\t", "\x0b", "\u2028", "\u00a0"]
        text = "".join(rng.choice(parts, 500)) if n else PROSE
        pieces = [text[i : i + 7] for i in range(0, len(text), 7)]
        cut = list(cut_at_lines(pieces, 20, 10**6))
        assert "".join(cut) == text and (n or len(cut) > 3) and all(len(part) >= 20 for part in cut[:-1])
        found = np.concatenate([tokenizer.encode(part) for part in cut])
        assert found.tolist() == tokenizer.encode(text).tolist()
    monkeypatch.setattr("npgpt.tokenizer.BATCH", 100)
    long = PROSE * 100
    found = np.concatenate(list(tokenizer.encode_pieces([long])))
    assert found.tolist() == tokenizer.encode(long).tolist()


def test_pieces_end_after_a_line_break_between_two_characters_that_are_not_space():
    text = "one\ntwo \nthree\n\nfour\n five\nsix"
    assert list(cut_at_lines([text], 1, 100)) == ["one\n", "two \nthree\n\nfour\n five\n", "six"]
    for size in range(1, len(text)):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert list(cut_at_lines(pieces, 1, 100)) == ["one\n", "two \nthree\n\nfour\n five\n", "six"]
        assert list(cut_at_lines(pieces, 5, 100)) == ["one\ntwo \nthree\n\nfour\n five\n", "six"]
    assert list(cut_at_lines(["x" * 25], 3, 10)) == ["x" * 10, "x" * 10, "x" * 5]
    assert list(cut_at_lines(["x" * 15 + "\nyyyy"], 3, 10)) == ["x" * 10, "xxxxx\n", "yyyy"]
    assert list(cut_at_lines([])) == []


def changed(gpt2, **changes):
    state = json.loads((gpt2[0] / "tokenizer.json").read_text(encoding="utf-8"))
    return json.dumps({**state, **changes})


def test_what_would_change_a_text_is_left_out(gpt2, package):
    tokens = gpt2[2].encode(PROSE).ids
    other = package.Tokenizer.from_file(str(gpt2[0] / "tokenizer.json"))
    other.enable_truncation(5)
    other.enable_padding(length=10**4)
    assert len(other.encode(PROSE).ids) != len(tokens)
    assert BPETokenizer(other.to_str()).encode(PROSE).tolist() == tokens
    state = json.loads((gpt2[0] / "tokenizer.json").read_text(encoding="utf-8"))
    assert BPETokenizer(changed(gpt2, model={**state["model"], "dropout": 0.5})).encode(PROSE).tolist() == tokens
    spaced = changed(gpt2, pre_tokenizer={**state["pre_tokenizer"], "add_prefix_space": True})
    assert BPETokenizer(spaced).decode(BPETokenizer(spaced).encode("It was")) == " It was"  # as the file asks for


def test_files_that_are_no_tokenizer_are_one_line(gpt2, tmp_path):
    state = json.loads((gpt2[0] / "tokenizer.json").read_text(encoding="utf-8"))
    model = state["model"]
    without = {word: token for word, token in model["vocab"].items() if word != "A"}
    for text, words in (
        ("{", "is not JSON"),
        ("\xff", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[3]", "not a byte-level BPE"),
        ("{}", "no tokenizer.json .*merges.txt"),
        (changed(gpt2, decoder=None), "not a byte-level BPE"),
        (changed(gpt2, model={**model, "type": "WordPiece"}), "not a byte-level BPE"),
        (changed(gpt2, model={**model, "vocab": without}), "no token for the byte 0x41"),
        (changed(gpt2, model={**model, "vocab": {**model["vocab"], "x": -1}}), "not numbered"),
        (changed(gpt2, model={**model, "vocab": 3}), "not numbered"),
        (changed(gpt2, added_tokens=[{"id": 3}]), "not numbered"),
        (changed(gpt2, model={**model, "merges": [["日", "本"]]}), "cannot be used"),
        (changed(gpt2, pre_tokenizer={"type": "Surprise"}), "cannot be used"),
        (changed(gpt2, pre_tokenizer=None), "what it decodes is not what it encoded"),
        (changed(gpt2, normalizer={"type": "Lowercase"}), "what it decodes is not what it encoded"),
        (changed(gpt2, model={**model, "continuing_subword_prefix": "x"}), "cannot be used"),
        # what the package panics at, or would
        (changed(gpt2, model={**model, "continuing_subword_prefix": "##"}), "neither continuing_subword_prefix nor"),
        (changed(gpt2, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "nor a Precompiled"),
        (changed(gpt2, pre_tokenizer={"type": "FixedLength", "length": 0}), "cannot be used"),
        (changed(gpt2, pre_tokenizer={"type": "Sequence", "pretokenizers": 5}), "cannot be used"),
    ):
        (tmp_path / "x.json").write_text(text, encoding="latin-1" if text == "\xff" else "utf-8")
        with pytest.raises(UsageError, match=words) as error:
            BPETokenizer.load(tmp_path / "x.json")
        assert "x.json" in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("a b\na b c\n")
    with pytest.raises(UsageError, match=r"merges\.txt is not a list of pairs: line 2 has 3 words"):
        BPETokenizer.load(find_bpe(tmp_path))
    (tmp_path / "merges.txt").write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"cannot read .*merges\.txt"):
        BPETokenizer.load(find_bpe(tmp_path))
    for text in ("{", "{}", changed(gpt2, decoder=None)):
        with pytest.raises(CheckpointError, match="tokenizer is damaged"):
            from_dict({"kind": "bpe", "json": text})


def test_what_is_too_large_for_a_checkpoint_is_refused(gpt2, monkeypatch):
    monkeypatch.setattr("npgpt.tokenizer.MAX_JSON", 1000)
    with pytest.raises(UsageError, match=r"tokenizer\.json cannot be used: its 3.. tokens are too many to keep"):
        BPETokenizer.load(gpt2[0] / "tokenizer.json")


def test_where_a_tokenizer_is_looked_for(tmp_path):
    with pytest.raises(UsageError, match=r"has neither tokenizer\.json nor vocab\.json"):
        find_bpe(tmp_path)
    (tmp_path / "vocab.json").touch()
    assert find_bpe(tmp_path) == tmp_path / "vocab.json"
    (tmp_path / "tokenizer.json").touch()
    assert find_bpe(tmp_path) == tmp_path / "tokenizer.json"
    assert find_bpe(tmp_path / "input.txt") is None
