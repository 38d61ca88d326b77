"""From files to batches."""

import functools
import hashlib
import os
import threading
import urllib.error

import numpy as np
import pytest

from npgpt import data
from npgpt.data import Blocks, Corpus, EvaluationBlocks, load_text, map_tokens, open_data, repeated_lines, split
from npgpt.errors import StoppedError, UsageError
from npgpt.stop import Stop


def test_pydoc_needs_no_download_and_is_prose_and_code():
    text = load_text(["pydoc"])
    assert len(text) > 200_000 and "def " in text and "statement" in text


def test_files_and_folders_are_joined_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("bee\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("ay", encoding="utf-8")
    (tmp_path / "sub" / "c.txt").write_text("sea", encoding="utf-8")
    (tmp_path / ".hidden").write_text("no", encoding="utf-8")
    assert load_text([str(tmp_path)]) == "ay\nbee\nsea\n"
    assert load_text([str(tmp_path / "b.txt"), str(tmp_path / "a.txt")]) == "bee\nay\n"
    assert load_text([str(tmp_path / "a.txt")]) == "ay"


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert load_text([tmp_path / "a.txt"]) == "one\ntwo\nthree\n"


@pytest.mark.parametrize(
    "raw, words",
    [
        (b"one\ntwo \xff three", "byte 0xff at offset 8, line 2"),
        (b"\xef\xbb\xbfab\xc3", "byte 0xc3 at offset 5, line 1"),
        ("é".encode("utf-16"), "byte 0xff at offset 0, line 1"),
    ],
)
def test_a_fault_in_utf8_is_located(tmp_path, raw, words):
    (tmp_path / "bad.txt").write_bytes(raw)
    with pytest.raises(UsageError, match=words) as error:
        load_text([str(tmp_path / "bad.txt")])
    assert "bad.txt" in str(error.value)


def test_nothing_to_read(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    for name, words in (("empty.txt", "no text"), ("folder", "no files"), ("missing.txt", "no file")):
        with pytest.raises(UsageError, match=words):
            load_text([str(tmp_path / name)])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
def test_where_the_pieces_end_makes_no_difference(tmp_path, monkeypatch, size):
    rng = np.random.default_rng(size)
    monkeypatch.setattr(data, "PIECE", max(size, 3))  # (a byte order mark is looked for in the first piece)
    for n in range(30):
        texts = ["".join(rng.choice(list("ab\r\n\r\né日😀"), rng.integers(0, 30))) for _ in range(3)]
        for i, text in enumerate(texts):
            (tmp_path / f"{i}.txt").write_bytes(b"\xef\xbb\xbf" * (n % 2) + text.encode())
        plain = [text.replace("\r\n", "\n").replace("\r", "\n") for text in texts]
        expected = "\n".join(text.removesuffix("\n") for text in plain) + "\n"
        corpus = Corpus([str(tmp_path)])
        assert "".join(corpus.pieces()) == expected == "".join(corpus.pieces())
        assert corpus.fingerprint == hashlib.sha256(expected.encode()).hexdigest()
        assert corpus.characters == "".join(sorted(set(expected)))
        assert (corpus.n_characters, corpus.n_bytes) == (len(expected), len(expected.encode()))


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 5, 100])
def test_a_fault_in_utf8_is_located_in_whatever_piece_it_is(tmp_path, monkeypatch, at):
    raw = "é\n日".encode() * 20 + b"x"
    at = min(at, 40)
    raw = raw[: 6 * at] + b"\xe6\x97" + raw[6 * at :]
    (tmp_path / "bad.txt").write_bytes(raw)
    monkeypatch.setattr(data, "PIECE", 4)
    with pytest.raises(UsageError) as error:
        load_text([tmp_path / "bad.txt"])
    with pytest.raises(UnicodeDecodeError) as found:
        raw.decode()
    line = raw.count(b"\n", 0, found.value.start) + 1
    assert f"byte 0xe6 at offset {found.value.start}, line {line}" in str(error.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(b"one\r\ntwo"))
    writer.start()
    corpus = Corpus([tmp_path / "pipe"])
    writer.join()
    assert list(corpus.pieces()) == list(corpus.pieces()) == ["one\ntwo"]


def test_a_text_that_changes_while_it_is_read_is_noticed(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    corpus = Corpus([tmp_path / "a.txt"])
    (tmp_path / "a.txt").write_text("two")
    with pytest.raises(UsageError, match=r"a\.txt changed while it was read"):
        list(corpus.pieces())


def test_reading_ends_when_it_is_asked_to(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    stop = Stop()
    corpus = Corpus([tmp_path / "a.txt"], stop)
    stop.number = 15
    with pytest.raises(StoppedError) as error:
        list(corpus.pieces())
    assert error.value.exit_code == 143


# ---- token files


def token_folder(path, train, val):
    path.mkdir(exist_ok=True)
    for name, tokens in (("train.bin", train), ("val.bin", val)):
        (path / name).write_bytes(tokens if isinstance(tokens, bytes) else np.array(tokens, np.uint16).tobytes())
    return str(path)


def test_token_files_are_the_two_splits(tmp_path):
    found = open_data([token_folder(tmp_path / "t", range(100), [3, 2, 65535])])
    assert found.train.tolist() == list(range(100)) and found.val.tolist() == [3, 2, 65535]
    assert found.train.dtype == np.uint16 and found.n_characters is None
    assert isinstance(found.train.base, np.memmap)
    other = open_data([token_folder(tmp_path / "t", range(99), [99, 3, 2, 65535])])
    assert found.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    "train, val, words",
    [
        (b"abc", [1, 2], r"train\.bin has 3 bytes, which is odd"),
        (b"", [1, 2], r"train\.bin has 0 tokens; it needs 2"),
        ([1, 2], [1], r"val\.bin has 1 tokens; it needs 2"),
    ],
)
def test_token_files_that_cannot_be_used(tmp_path, train, val, words):
    with pytest.raises(UsageError, match=words):
        open_data([token_folder(tmp_path / "t", train, val)])


def test_token_files_are_two_and_stand_alone(tmp_path):
    path = token_folder(tmp_path / "t", [1, 2], [3, 4])
    with pytest.raises(UsageError, match="other data cannot be added to"):
        open_data(["pydoc", path])
    (tmp_path / "t" / "val.bin").unlink()
    with pytest.raises(UsageError, match=r"cannot read .*val\.bin: No such file"):
        open_data([path])


def test_a_token_that_the_vocabulary_does_not_have_is_located(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 16)
    tokens = np.arange(100) % 50
    tokens[77] = 60
    found = open_data([token_folder(tmp_path / "t", range(50), tokens)])
    found.check(61)
    with pytest.raises(UsageError, match=r"val\.bin has token 60 at position 77, but the vocabulary has 60 tokens"):
        found.check(60)


def test_mapped_tokens_have_the_right_length(tmp_path):
    path = tmp_path / "tokens.bin"
    assert map_tokens(path, np.dtype("<u2")) is None
    path.write_bytes(bytes(range(12)))
    assert map_tokens(path, np.dtype("<u2"), 6).tolist() == [256 * (2 * i + 1) + 2 * i for i in range(6)]
    assert len(map_tokens(path, np.dtype("<u4"))) == 3
    assert map_tokens(path, np.dtype("<u2"), 5) is None
    path.write_bytes(b"abc")
    assert map_tokens(path, np.dtype("<u2")) is None


# ---- shakespeare


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_shakespeare_offline_says_what_to_do(cache, monkeypatch):
    def refuse(*args, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(data.urllib.request, "urlopen", refuse)
    with pytest.raises(UsageError, match=r"no route to host.*https://raw\.github.*--data FILE") as error:
        load_text(["shakespeare"])
    assert "\n" not in str(error.value)


def test_shakespeare_is_checked_and_downloaded_once(cache, monkeypatch):
    downloads = []

    class Response:
        def __init__(self, url, timeout):
            downloads.append(url)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def read(self, most):
            return b"First Citizen:\n"

    monkeypatch.setattr(data.urllib.request, "urlopen", Response)
    with pytest.raises(UsageError, match="did not give the tinyshakespeare file"):
        load_text(["shakespeare"])
    assert not cache.exists()
    monkeypatch.setattr(data, "SHAKESPEARE_SHA256", hashlib.sha256(b"First Citizen:\n").hexdigest())
    assert load_text(["shakespeare"]) == load_text(["shakespeare"]) == "First Citizen:\n"
    assert len(downloads) == 2  # the refused one and the good one
    (cache / "tinyshakespeare.txt").write_bytes(b"damaged")
    assert load_text(["shakespeare"]) == "First Citizen:\n"
    assert len(downloads) == 3


# ---- batches


def test_split_holds_back_the_end():
    train, val = split(np.arange(100), 0.1)
    assert train.tolist() == list(range(90)) and val.tolist() == list(range(90, 100))
    assert len(split(np.arange(3), 0.1)[1]) == 1


@pytest.mark.parametrize("n, T", [(1000, 7), (71, 7), (14, 7), (13, 7), (8, 7), (2, 1)])
def test_an_epoch_visits_each_block_once(n, T):
    blocks = Blocks(np.arange(n), T, seed=3)
    for epoch in range(3):
        firsts = []
        for i in range(epoch * blocks.per_epoch, (epoch + 1) * blocks.per_epoch):
            x, y = blocks.batch(i, 1)
            assert x.shape == y.shape == (1, T) and x.dtype == np.int64
            assert (y == x + 1).all() and y.max() < n
            firsts.append(int(x[0, 0]))
        phase = min(firsts)
        assert sorted(firsts) == [phase + T * k for k in range(blocks.per_epoch)]
        assert n - 1 - blocks.per_epoch * T < 2 * T  # at most two blocks' worth of tokens is left out


def test_phase_and_order_change_from_epoch_to_epoch():
    blocks = Blocks(np.arange(1000), 50, seed=3)
    n = blocks.per_epoch
    epochs = [[int(blocks.batch(e * n + i, 1)[0][0, 0]) for i in range(n)] for e in range(8)]
    assert len({min(firsts) for firsts in epochs}) > 3
    assert len({tuple(np.argsort(firsts)) for firsts in epochs}) == 8


def test_a_batch_depends_on_seed_and_number_only():
    tokens = np.arange(500)
    one, other = Blocks(tokens, 8, seed=1), Blocks(tokens, 8, seed=1)
    late_first = [one.batch(n, 5)[0] for n in (40, 3, 12, 0)]
    in_order = {n: other.batch(n, 5)[0] for n in range(41)}
    for n, x in zip((40, 3, 12, 0), late_first, strict=True):
        assert (x == in_order[n]).all()
    assert (Blocks(tokens, 8, seed=2).batch(0, 5)[0] != in_order[0]).any()
    # how the examples are grouped into batches does not change their order
    assert (np.concatenate([one.batch(n, 2)[0] for n in range(5)]) == np.concatenate([in_order[0], in_order[1]])).all()


def test_too_short_a_text_is_refused_with_the_numbers():
    with pytest.raises(UsageError, match=r"7 tokens.*block_size = 7 needs 8"):
        Blocks(np.arange(7), 7, seed=0)


@pytest.mark.parametrize("n, T", [(100, 7), (99, 7), (2, 5), (8, 7), (9, 7)])
def test_evaluation_counts_every_token_but_the_first_once(n, T):
    x, y = EvaluationBlocks(np.arange(n), T)[:]
    assert x.shape == y.shape and x.shape[1] == T
    assert sorted(y[y >= 0].tolist()) == list(range(1, n))
    assert (y[y >= 0] == x[y >= 0] + 1).all()


def test_a_part_of_the_evaluation_is_spread_evenly():
    x, _ = EvaluationBlocks(np.arange(1001), 10, most=5)[:]
    assert x[:, 0].tolist() == [0, 200, 400, 600, 800]
    with pytest.raises(UsageError, match="2 tokens"):
        EvaluationBlocks(np.arange(1), 10)


def test_evaluation_blocks_come_a_slice_at_a_time_whatever_the_tokens_are_stored_as():
    for most in (None, 7, 1000):
        whole, stored = (EvaluationBlocks(np.arange(1003).astype(t), 10, most) for t in (np.int64, np.uint16))
        assert len(whole) == len(whole[:][0]) == min(most or 101, 101)
        parts = [stored[i : i + 4] for i in range(0, len(stored), 4)]
        for k in range(2):
            assert (np.concatenate([part[k] for part in parts]) == whole[:][k]).all()
            assert all(part[k].dtype == np.int64 and part[k].flags.c_contiguous for part in parts)


def test_lines_of_the_held_back_text_that_the_training_text_has_too():
    old = [f"line number {i} of the first part, which is long" for i in range(90)]
    new = [f"line number {i} of the other part, which is new" for i in range(10)]

    def of_text(text, val_fraction):
        def in_pieces(size):
            return (text[i : i + size] for i in range(0, len(text), size))

        shares = {
            repeated_lines(functools.partial(in_pieces, size), len(text), val_fraction) for size in (1, 50, 10**6)
        }
        assert len(shares) == 1  # it does not matter where the pieces end
        return shares.pop()

    def share(lines):
        return of_text("\n".join(lines), 0.101)

    assert share(old + new) == 0
    assert share([*old, *old[:10]]) == 1
    assert share(old + new[:5] + old[:5]) == pytest.approx(5 / 9, abs=0.1)
    assert of_text("short\n" * 100, 0.1) is None
    assert of_text("x", 0.1) is None


def test_a_text_without_line_breaks_is_not_kept_for_its_line():
    pieces = [str(i % 10) * 50_000 for i in range(40)]
    assert max(map(len, data._lines(pieces))) <= 2**16 + 50_000
    assert "".join(data._lines(pieces)) == "".join(pieces)
