"""From files to batches."""

import hashlib
import urllib.error

import numpy as np
import pytest

from npgpt import data
from npgpt.data import Blocks, evaluation_blocks, load_text, read_utf8, repeated_lines, split
from npgpt.errors import UsageError


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
    assert read_utf8(tmp_path / "a.txt") == "one\ntwo\nthree\n"


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
    x, y = evaluation_blocks(np.arange(n), T)
    assert x.shape == y.shape and x.shape[1] == T
    assert sorted(y[y >= 0].tolist()) == list(range(1, n))
    assert (y[y >= 0] == x[y >= 0] + 1).all()


def test_a_part_of_the_evaluation_is_spread_evenly():
    x, _ = evaluation_blocks(np.arange(1001), 10, most=5)
    assert x[:, 0].tolist() == [0, 200, 400, 600, 800]
    with pytest.raises(UsageError, match="2 tokens"):
        evaluation_blocks(np.arange(1), 10)


def test_lines_of_the_held_back_text_that_the_training_text_has_too():
    old = [f"line number {i} of the first part, which is long" for i in range(90)]
    new = [f"line number {i} of the other part, which is new" for i in range(10)]

    def share(lines):
        return repeated_lines("\n".join(lines), 0.101)

    assert share(old + new) == 0
    assert share([*old, *old[:10]]) == 1
    assert share(old + new[:5] + old[:5]) == pytest.approx(5 / 9, abs=0.1)
    assert repeated_lines("short\n" * 100, 0.1) is None
    assert repeated_lines("x", 0.1) is None
