"""From files to batches."""

import bz2
import functools
import gzip
import hashlib
import lzma
import os
import threading
import urllib.error
from pathlib import Path

import numpy as np
import pytest

from npgpt import sample
from npgpt.data import notes
from npgpt.data import text as data
from npgpt.data.batches import Blocks, EvaluationBlocks, split
from npgpt.data.notes import repeated_lines
from npgpt.data.text import Corpus, load_text, open_data
from npgpt.data.tokens import map_tokens
from npgpt.errors import StoppedError, UsageError
from npgpt.files import folder
from npgpt.signals import Stop


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


# ---- what a folder holds


def test_files_are_read_in_the_order_of_the_numbers_in_their_names(tmp_path):
    names = ["1.txt", "2.txt", "10.txt", "11.txt", "part 2/1.txt", "part 10/1.txt", "part 10/1b.txt", "zz.txt"]
    for name in reversed(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n")
    assert load_text([tmp_path]).splitlines() == names
    as_before = "".join(Corpus([tmp_path], numbered=False).pieces()).splitlines()
    assert as_before == sorted(names, key=lambda name: (tmp_path / name).parts)


def test_links_are_followed_and_each_folder_is_read_once(tmp_path):
    (tmp_path / "big" / "deep").mkdir(parents=True)
    (tmp_path / "big" / "b.txt").write_text("bee\n")
    (tmp_path / "big" / "deep" / "c.txt").write_text("sea\n")
    data_folder = tmp_path / "h"
    data_folder.mkdir()
    (data_folder / "a.txt").write_text("ay\n")
    (data_folder / "linked").symlink_to(tmp_path / "big")
    (data_folder / "linked again").symlink_to(tmp_path / "big")
    (tmp_path / "big" / "round").symlink_to(data_folder)
    assert load_text([data_folder]) == "ay\nbee\nsea\n"


def test_what_cannot_be_read_in_a_folder_is_named(tmp_path, monkeypatch):
    inside = tmp_path / "h"
    inside.mkdir()
    (inside / "a.txt").write_text("ay\n")

    def refused(words):
        with pytest.raises(UsageError, match=words) as error:
            load_text([inside])
        assert "\n" not in str(error.value)

    (inside / "gone.txt").symlink_to(tmp_path / "nowhere")
    refused(r"gone\.txt is a link to nothing")
    (inside / "gone.txt").unlink()
    (inside / "up").symlink_to("..")
    refused(r"up is a link to a folder in which .* lies")
    (inside / "up").unlink()
    if hasattr(os, "mkfifo"):
        os.mkfifo(inside / "pipe")
        refused("pipe is neither a file nor a folder")
        (inside / "pipe").unlink()
    (inside / "private").mkdir()
    listed = Path.iterdir

    def guarded(path):
        if path.name == "private":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", guarded)
    refused("cannot read the folder .*private: Permission denied")


def test_files_beside_a_run_are_left_out_with_a_line_and_what_the_run_made_without(tmp_path):
    (tmp_path / "a.txt").write_text("ay\n")
    old = tmp_path / "old"
    run = folder.RunFolder(old)
    run.save(1, {}, {"iter": 1}, keep=1)
    run.close()
    assert Corpus([tmp_path]).notes == []
    (old / "x.txt").write_text("learn me\n")
    corpus = Corpus([tmp_path])
    assert list(corpus.pieces()) == ["ay\n"]
    assert corpus.notes == [
        f"{old / 'x.txt'} in run folders: left out, as all that is there; name the text itself to learn it"
    ]


def test_a_lock_of_a_run_that_has_just_begun_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("ay\n")
    run = folder.RunFolder(tmp_path / "out")
    corpus = Corpus([tmp_path])
    run.close()
    folder.RunFolder(tmp_path / "out").close()  # another process, and another time
    assert list(corpus.pieces()) == ["ay\n"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "lock").write_text("of hair\n")  # this one is text
    assert load_text([tmp_path]) == "ay\nof hair\n"


# ---- what is no text


@pytest.mark.parametrize("what", ["data", "tokenizer"])
def test_what_is_utf8_by_chance_is_refused(tmp_path, what):
    english, russian = "To be, or not to be.\n" * 20, "Быть или не быть, вот в чём вопрос.\n" * 20
    (tmp_path / "a.txt").write_bytes(english.encode("utf-16-le"))
    (tmp_path / "b.txt").write_bytes(russian.encode("utf-16-be"))
    (tmp_path / "c.txt").write_bytes(english.encode("utf-32-le"))
    np.arange(1000, dtype=np.uint16).clip(0, 99).tofile(tmp_path / "train.bin")
    for name in ("a.txt", "b.txt", "c.txt"):
        with pytest.raises(UsageError, match=rf"^{what}: .*{name} is no text: .* bytes are NUL\. If it is UTF-16"):
            Corpus([tmp_path / name], what=what)
    with pytest.raises(UsageError, match=r"train\.bin is no text: .* It holds tokens: name its folder$"):
        Corpus([tmp_path / "train.bin"], what=what)
    (tmp_path / "d.txt").write_text("a stray\0one may stay", newline="")
    assert "\0" in Corpus([tmp_path / "d.txt"]).characters


def test_a_prompt_that_is_utf8_by_chance_is_refused(tmp_path):
    (tmp_path / "p.txt").write_bytes("To be, or not".encode("utf-16-le"))
    with pytest.raises(UsageError, match=r"^--prompt-file: .*p\.txt is no text: 13 of 26 bytes are NUL"):
        sample.read_prompt(sample.parse(["--prompt-file", str(tmp_path / "p.txt")]))


@pytest.mark.parametrize(
    "pack, words",
    [
        (gzip.compress, "It is compressed with gzip"), (bz2.compress, "It is compressed with bzip2"),
        (lzma.compress, "It is compressed with xz"),
        (lambda raw: b"PK\x03\x04\x14\0\0\0" + bytes(300) + raw, "It is a zip archive, as .docx"),
        (lambda raw: b"PAR1\x15\x04\x15" + bytes(range(128, 200)), "It is a table in Parquet"),
        (lambda raw: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "It is a PDF"),
        (lambda raw: raw.decode().encode("utf-16"), "It is text in UTF-16"),
        (lambda raw: "café".encode("latin-1"), "If it is text in another encoding, convert it first"),
        (lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS.*git lfs pull"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_text_is_named_for_what_it_is(tmp_path, pack, words):
    (tmp_path / "a.txt").write_bytes(pack(b"To be, or not to be.\n" * 50))
    with pytest.raises(UsageError, match=words) as error:
        load_text([tmp_path / "a.txt"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, text, kind",
    [
        ("posts.jsonl", '{"text": "To be"}\n', "JSON lines"), ("a.csv", "to,be\n", "a table"),
        ("b.JSON", "{}", "JSON"), ("c.ipynb", "{}", "a notebook"), ("page", "<!DOCTYPE html><p>To be", "HTML"),
        ("d.rtf", "{\\rtf1 To be}", "RTF"), ("paper", "%PDF-1.4\nTo be", "PDF"),
        ("e.txt", "To be { or } <not> to be\n", None), ("f.py", "x = {}", None),
    ],
)  # fmt: skip
def test_text_with_markup_is_learnt_as_it_stands_and_it_is_said(tmp_path, name, text, kind):
    (tmp_path / name).write_text(text)
    corpus = Corpus([tmp_path / name])
    assert "".join(corpus.pieces()) == text
    begins = [f"{tmp_path / name} is {kind}, and is learnt as it stands"] if kind else []
    assert [note[: len(begins[0])] for note in corpus.notes] == begins


def test_files_of_one_kind_share_a_line(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.jsonl").write_text("{}\n")
    (note,) = Corpus([tmp_path]).notes
    assert note.startswith(f"3 files, {tmp_path / '0.jsonl'} the first, are JSON lines, and are learnt as they stand")


def test_held_back_text_with_characters_of_its_own_is_said_with_its_file(tmp_path):
    english, russian = "The quick brown fox jumps over the lazy dog.\n" * 200, "Быть или не быть.\n" * 60
    (tmp_path / "a.txt").write_text(english, encoding="utf-8")
    (tmp_path / "z.txt").write_text(russian, encoding="utf-8")
    (note,) = Corpus([tmp_path]).held_back_notes(0.1)  # a few lines of z.txt are before it
    assert note.startswith("72.2% of the held-back text are characters that the text before it has hardly or never, ")
    assert f" above all: it is the end of {tmp_path / 'z.txt'}. " in note
    (note,) = Corpus([tmp_path]).held_back_notes(0.15)
    assert f": it is the end of {tmp_path / 'a.txt'} and {tmp_path / 'z.txt'}. " in note
    (note,) = Corpus([tmp_path / "z.txt", tmp_path / "z.txt", tmp_path / "a.txt"]).held_back_notes(0.81)
    assert f": it is the end of {tmp_path / 'z.txt'} and {tmp_path / 'a.txt'}. " in note
    (tmp_path / "m.txt").write_text(english[:4500] + russian[:10] + english[4500:], encoding="utf-8")
    for name in ("a.txt", "m.txt"):
        assert Corpus([tmp_path / name]).held_back_notes(0.5) == []
    assert Corpus(["pydoc"]).held_back_notes(0.1) == []


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
    monkeypatch.setattr("npgpt.data.tokens.PIECE", 16)
    tokens = np.arange(100) % 50
    tokens[77] = 60
    found = open_data([token_folder(tmp_path / "t", range(50), tokens)])
    found.check(61)
    with pytest.raises(UsageError, match=r"val\.bin has token 60 at position 77, but the vocabulary has 60 tokens"):
        found.check(60)


@pytest.mark.parametrize(
    "dtype, top, words",
    [
        ("<i8", 10, "64 bits"), ("<u4", 10, "32 bits"), ("<i4", 50_000, "32 bits"), ("<u4", 128_000, "32 bits"),
        ("<u8", 128_000, "64 bits"), ("<u2", 10, None), ("<u2", 2, None), ("<u2", 65_536, None),
    ],
)  # fmt: skip
def test_tokens_of_another_width_are_refused_unless_they_are_forced(tmp_path, dtype, top, words):
    tokens = np.random.default_rng(0).integers(0, top, 1800)
    path = token_folder(tmp_path / "t", tokens.astype(dtype).tobytes(), tokens.astype(dtype).tobytes())
    assert len(open_data([path], force=True).train) == 900 * np.dtype(dtype).itemsize
    if words is None:
        assert open_data([path]).train.tolist() == tokens.tolist()
        return
    with pytest.raises(UsageError, match=rf"train\.bin looks like numbers of {words}, and tokens have 16: .*--force"):
        open_data([path])


def test_an_array_with_its_header_is_no_file_of_tokens(tmp_path):
    np.save(tmp_path / "train.npy", np.arange(100, dtype=np.uint16))
    path = token_folder(tmp_path / "t", (tmp_path / "train.npy").read_bytes(), [1, 2])
    with pytest.raises(UsageError, match=r"train\.bin is an array of NumPy's with its header"):
        open_data([path])


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
    assert max(map(len, notes._lines(pieces))) <= 2**16 + 50_000
    assert "".join(notes._lines(pieces)) == "".join(pieces)
