"""Text to tokens and back."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from npgpt.data.bpe import BPETokenizer, from_dict
from npgpt.data.bpe_files import find_bpe
from npgpt.data.bpe_format import cut_at_lines
from npgpt.data.characters import ByteTokenizer, CharTokenizer
from npgpt.errors import CheckpointError, StoppedError, UsageError
from npgpt.generate.writer import Writer

TEXT = "naïve café — 日本語 😀\n\ttabs and nothing else"


@pytest.mark.parametrize("tokenizer", [CharTokenizer.from_text(TEXT), ByteTokenizer()])
def test_decode_undoes_encode(tokenizer):
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


@pytest.mark.parametrize("tokenizer", [CharTokenizer.from_text(TEXT), ByteTokenizer()])
def test_a_text_in_pieces_has_the_same_tokens(tokenizer):
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
from npgpt.data.bpe import BPETokenizer
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
    monkeypatch.setattr("npgpt.data.bpe_format.BATCH", 100)
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
        ("[3]", "is not a JSON object"),
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
    monkeypatch.setattr("npgpt.data.bpe.MAX_JSON", 1000)
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


# ---- what stands beside a tokenizer in its folder

SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
CHAT = "It was <|user|>the best<|bot|>"


def folder_of(path, gpt2, words=False, **files):
    """A folder with the tokenizer.json of a fixture without added tokens, or vocab.json and merges.txt; and files."""
    path.mkdir()
    state = json.loads((gpt2[0] / "tokenizer.json").read_text(encoding="utf-8"))
    if words:
        (path / "vocab.json").write_text(json.dumps(state["model"]["vocab"]), encoding="utf-8")
        shutil.copy(gpt2[1] / "merges.txt", path)
    else:
        (path / "tokenizer.json").write_text(json.dumps({**state, "added_tokens": []}), encoding="utf-8")
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return path


def added_in_every_form(V):
    """name of the test -> (words, files): V and V + 1 are the numbers of <|user|> and <|bot|>."""
    numbered = {str(V): {"content": "<|user|>", **SPECIAL}, str(V + 1): {"content": "<|bot|>", **SPECIAL}}
    names, kind = ["<|user|>", "<|bot|>"], {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {
        "added_tokens.json": (True, {"added_tokens": {"<|user|>": V, "<|bot|>": V + 1}}),
        "added_tokens_decoder": (True, {"tokenizer_config": {"added_tokens_decoder": numbered}}),
        "beside tokenizer.json": (False, {"tokenizer_config": {**kind, "added_tokens_decoder": numbered}}),
        "additional": (False, {"tokenizer_config": {**kind, "additional_special_tokens": names}}),
        "extra": (False, {"tokenizer_config": {**kind, "extra_special_tokens": names}}),
        "named": (False, {"tokenizer_config": {**kind, "eos_token": "<|user|>", "bot_token": "<|bot|>"}}),
        "map": (False, {"special_tokens_map": {"eos_token": numbered[str(V)], "pad_token": "<|bot|>"}}),
    }


@pytest.mark.parametrize("form", added_in_every_form(0))
def test_added_tokens_of_every_form_are_one_token_each(gpt2, tmp_path, form):
    plain = BPETokenizer.load(find_bpe(folder_of(tmp_path / "plain", gpt2)))
    V = plain.vocab_size
    words, files = added_in_every_form(V)[form]
    tokenizer = BPETokenizer.load(find_bpe(folder_of(tmp_path / "d", gpt2, words, **files)))
    expected = [*plain.encode("It was "), V, *plain.encode("the best"), V + 1]
    assert tokenizer.encode(CHAT).tolist() == expected and tokenizer.decode(expected) == CHAT
    # vocab.json is read as GPT-2's, whose <|endoftext|> comes after all others where it is not among them
    assert tokenizer.vocab_size == V + 2 + words
    assert tokenizer.encode("<|endoftext|>").tolist() == ([V + 2] if words else plain.encode("<|endoftext|>").tolist())
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    for again in (BPETokenizer.load(tmp_path / "saved" / "tokenizer.json"), from_dict(tokenizer.to_dict())):
        assert again.encode(CHAT).tolist() == expected and again.vocab_size == tokenizer.vocab_size


GPT4_STYLE = {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": r"\p{L}+|\P{L}"}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
]}  # fmt: skip


@pytest.mark.parametrize(
    "words, changes, files, said",
    [
        (0, {}, {"tokenizer_config": {"split_special_tokens": True}}, "config.json says split_special_tokens"),
        (0, {}, {"tokenizer_config": {"fast_tokenizer_files": ["tokenizer.4.0.json"]}}, "says fast_tokenizer_files"),
        (0, {}, {"tokenizer_config": {"bos_token": 3}}, "bos_token is no token"),
        (0, {}, {"tokenizer_config": {"additional_special_tokens": "<|user|>"}}, "special tokens are no list"),
        (0, {}, {"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "<|user|>"}}}}, "not numbered"),
        (0, {}, {"tokenizer_config": [1]}, "tokenizer_config.json is not a JSON object"),
        (0, {}, {"added_tokens": {"<|user|>": 4}}, "give '<|user|>' the number 4, which would be "),
        (0, {"added_tokens": [{"id": 999, "content": "<|user|>", **SPECIAL}]}, {}, "'<|user|>' is number 999, but"),
        (1, {}, {"tokenizer_config": {"tokenizer_class": "RobertaTokenizer"}}, "tokenizer_class is 'RobertaTokenizer'"),
        (0, {"pre_tokenizer": GPT4_STYLE}, {"config": {"model_type": "gpt2"}}, "in another way than GPT2Tokenizer"),
    ],
)
def test_what_would_be_misread_in_a_tokenizers_folder_is_refused(gpt2, tmp_path, words, changes, files, said):
    path = folder_of(tmp_path / "d", gpt2, words, **files)
    if changes:
        state = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
        (path / "tokenizer.json").write_text(json.dumps({**state, **changes}), encoding="utf-8")
    with pytest.raises(UsageError, match=re.escape(said)) as error:
        BPETokenizer.load(find_bpe(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_space_in_front_comes_where_the_files_ask_for_it(gpt2, package, tmp_path):
    text = "It was<|endoftext|>It was\n\nthe best of times\nit was"
    state = json.loads((gpt2[0] / "tokenizer.json").read_text(encoding="utf-8"))
    state["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    expected = package.Tokenizer.from_str(json.dumps(state)).encode(text, add_special_tokens=False).ids
    tokenizer = BPETokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.encode(text).tolist() == expected != gpt2[2].encode(text).ids
    assert tokenizer.encode("It was").tolist() == tokenizer.encode(" It was").tolist()
    assert from_dict(tokenizer.to_dict()).encode(text).tolist() == expected
    (tmp_path / "saved").mkdir()
    saved = tokenizer.save(tmp_path / "saved")
    assert json.loads(saved.read_text(encoding="utf-8")) == state  # as it was
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["add_prefix_space"] is True
    # as transformers' GPT2Tokenizer, which asks its settings and not tokenizer.json
    settings = {"tokenizer_class": "GPT2Tokenizer"}
    for value in (True, False):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "add_prefix_space": value}))
        found = BPETokenizer.load(tmp_path / "tokenizer.json").encode(text).tolist()
        assert found == (expected if value else gpt2[2].encode(text).ids)


CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def words_by(kind):
    """A pre-tokenizer."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": kind == "space", "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    pattern = {"String": " "} if kind == "split" else {"Regex": CL100K}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    parts = [split, {**byte_level, "use_regex": False}] if kind in ("cl100k", "split") else [byte_level]
    return {"type": "Sequence", "pretokenizers": [digits, *parts] if kind == "digits" else parts}


ADDED = [
    ("end\nstart", {}), ("<m>", {"lstrip": True}), ("<r>", {"rstrip": True}), ("w\n", {"single_word": True}),
    (" <s> x", {}), ("<|endoftext|>", {}), ("\ny", {"normalized": True, "special": False}),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "space", "cl100k", "digits", "split"])
def test_whatever_is_added_and_however_it_cuts_words_pieces_have_the_tokens_of_the_whole(gpt2, monkeypatch, kind):
    monkeypatch.setattr("npgpt.data.bpe_format.cut_at_lines", functools.partial(cut_at_lines, size=8))
    state = json.loads((gpt2[0] / "tokenizer.json").read_text(encoding="utf-8"))
    V, rng = len(state["model"]["vocab"]), np.random.default_rng(0)
    added = [{"id": V + i, "content": text, **SPECIAL, **flags} for i, (text, flags) in enumerate(ADDED)]
    changes = {"added_tokens": added, "pre_tokenizer": words_by(kind)}
    if kind == "digits":
        changes |= {"normalizer": {"type": "NFC"}, "added_tokens": [added[5] | {"id": V}]}
    tokenizer, n = BPETokenizer(json.dumps({**state, **changes})), 0
    parts = [text for text, _ in ADDED]
    parts += ["times", " best", ".", "1859", "it's", "\n", "\n\n", " ", "\t", "end", "a\nb"]
    for _ in range(60):
        text = "".join(rng.choice(parts, 200))
        found = list(tokenizer.encode_pieces(text[i : i + 7] for i in range(0, len(text), 7)))
        assert np.concatenate(found).tolist() == tokenizer.encode(text).tolist()
        n += len(found) - 1
    assert (n == 0) == (kind == "split")  # whose words may be of any length, so that nothing is cut


def test_a_long_text_that_may_not_be_cut_is_refused(gpt2, monkeypatch):
    tokenizer = BPETokenizer(changed(gpt2, pre_tokenizer=words_by("split")))
    assert len(list(tokenizer.encode_pieces(["a\nb"] * 50))) == 1
    monkeypatch.setattr("npgpt.data.bpe_format.LONGEST", 100)
    with pytest.raises(UsageError, match="more than 100 characters cannot be encoded in parts"):
        list(tokenizer.encode_pieces(["a\nb"] * 50))


def test_an_added_token_that_the_model_does_not_know_is_refused_where_it_is_used(gpt2, tmp_path):
    tokenizer = BPETokenizer.load(gpt2[0] / "tokenizer.json")
    V = tokenizer.vocab_size
    with pytest.raises(ValueError, match="knows 300 tokens, but"):
        tokenizer.fit(300)
    tokenizer.fit(V + 5)
    assert tokenizer.vocab_size == V and len(tokenizer.encode("a<|endoftext|>")) == 2
    tokenizer.fit(V - 1)
    for again in (tokenizer, from_dict(json.loads(json.dumps(tokenizer.to_dict())))):
        assert again.vocab_size == V - 1 and again.encode("It was").tolist() == gpt2[2].encode("It was").ids
        for encode in (again.encode, lambda text, t=again: list(t.encode_pieces([text]))):
            with pytest.raises(UsageError, match=rf"the token '<\|endoftext\|>', whose number is {V - 1}; the model"):
                encode("a<|endoftext|>")


def test_a_text_without_a_space_is_learnt_from_in_seconds(package):
    text = "".join(np.random.default_rng(0).choice(list("ACGT"), 2**18))
    start = time.monotonic()
    long = BPETokenizer.learn([text], 300)
    assert long.vocab_size == 300 and time.monotonic() - start < 5  # 15 s where each pair takes a word's length squared
    # but lines that are shorter are learnt from as they stand
    lines = "\n".join([text[:1000] + "ab" * 3000, text[1000:3000], "ab" * 3000])
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(package.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([lines], package.trainers.BpeTrainer(
        vocab_size=290, min_frequency=2, show_progress=False, initial_alphabet=alphabet))  # fmt: skip
    expected = json.loads(tokenizer.to_str())["model"]
    assert json.loads(BPETokenizer.learn([lines], 290).json)["model"] == expected


def test_learning_says_how_far_it_is_and_ends_when_it_is_asked_to(package, capsys):
    said, stopped = "", None

    def check():
        nonlocal said, stopped
        said += capsys.readouterr().err
        if said:
            stopped = time.monotonic()
            raise StoppedError(2, "stopped")

    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("ACGT"), 60_000)) + "\n" for _ in range(60)]
    with pytest.raises(StoppedError):
        BPETokenizer.learn(texts, 2000, check)  # which takes a minute
    assert time.monotonic() - stopped < 1
    assert re.fullmatch(r"npgpt: learning 2,000 tokens from [\d,]+ characters, \d+ s so far\n", said)


def test_a_file_of_another_kind_is_named(tmp_path):
    for raw, words in ((b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"), (b"<html>", "of HTML")):
        (tmp_path / "tokenizer.json").write_bytes(raw)
        with pytest.raises(UsageError, match=f"is not JSON \\(it is .*{words}"):
            BPETokenizer.load(tmp_path / "tokenizer.json")
