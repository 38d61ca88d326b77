"""The two commands, as a user types them: what they print, and that no mistake ends in a traceback."""

import io
import json
import math
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from npgpt import plot, sample, train
from npgpt.config import PRESETS, GPTConfig, TrainConfig
from npgpt.data.characters import ByteTokenizer
from npgpt.errors import NpgptError, UsageError
from npgpt.files.folder import RunFolder
from npgpt.generate import generation, writer
from npgpt.model import GPT

TEXT = "to be, or not to be: that is the question.\n" * 40
SHAPE = "--n-layer 1 --n-head 2 --n-embd 16 --block-size 8 --batch-size 4"
SMALL = f"{SHAPE} --max-iters 4 --eval-interval 2 --log-interval 1".split()


def command(module, *args, **environment):
    """Run a command in a process of its own -> (exit code, standard output, standard error)."""
    done = subprocess.run(
        [sys.executable, "-m", f"npgpt.{module}", *map(str, args)],
        capture_output=True, text=True, encoding="utf-8", errors="replace",
        env={**os.environ, "NPGPT_KERNELS": "numpy", "PYTHONIOENCODING": "utf-8", **environment},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text and a run trained on it."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    code, out, err = command("train", "--data", folder / "text.txt", "--out-dir", folder / "run", *SMALL)
    assert code == 0 and err == ""
    (folder / "out.txt").write_text(out, encoding="utf-8")
    return folder


# ---- train


def test_training_shows_what_it_does(folder):
    out = (folder / "out.txt").read_text(encoding="utf-8")
    for words in (
        "workers x", "BLAS threads", "GFLOP/s", "of sgemm", "1,720 characters", "parameters: n_layer 1",
        "4 iterations of 32 tokens",
        "iter      0 | loss", "tokens/s", "s left", "validation loss", "whole validation split: loss",
        f"python -m npgpt.sample --out-dir {folder / 'run'}", f"python -m npgpt.plot {folder / 'run'}",
    ):  # fmt: skip
        assert words in out
    assert sorted(os.listdir(folder / "run")) == [
        "iter-00000002.safetensors", "iter-00000004.safetensors", "lock", "metrics.jsonl",
        "tokens-378bb2504ab1a8b8-1ee3998017f096b3.bin",
    ]  # fmt: skip
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 5


@pytest.mark.skipif(os.name == "nt", reason="shlex reads as a POSIX shell does")
def test_printed_commands_can_be_pasted(folder):
    run = folder / "a run's folder"
    code, out, _ = command("train", "--data", folder / "text.txt", "--out-dir", run, *SMALL)
    assert code == 0
    (line,) = (line for line in out.splitlines() if line.startswith("  python -m npgpt.sample"))
    assert shlex.split(line) == ["python", "-m", "npgpt.sample", "--out-dir", str(run)]
    empty = folder / "no run"
    empty.mkdir()
    code, _, err = command("sample", "--out-dir", empty)
    assert code == 3 and f"npgpt.train --out-dir '{empty}'" in err


def test_profile_shows_where_the_updates_time_went(folder):
    args = ["--data", folder / "text.txt", "--out-dir", folder / "profiled", *SMALL, "--profile"]
    code, out, err = command("train", *args)
    assert (code, err) == (0, "")
    table = out[out.index("an update, the mean of 3, takes") :].splitlines()
    assert table[1].split() == ["calls", "ms", "GFLOP", "GB", "GFLOP/s", "GB/s", "share"]
    shares = {line[:24].strip(): float(line.split()[-1].rstrip("%")) for line in table[2:]}
    assert {"mlp_forward", "attention_backward", "muon", "graph, Python, waiting"} <= set(shares)
    assert 98 < sum(shares.values()) < 102 and min(shares.values()) >= 0


def parsed(args):
    given, rest = train.parse(args)
    return TrainConfig(**given), rest


def test_flags_with_dashes_underscores_and_equals_signs():
    config, rest = parsed(["--block_size=64", "--n-embd", "96", "--decay_lr=False", "--bias", "--overwrite"])
    assert (config.block_size, config.n_embd, config.decay_lr, config.bias) == (64, 96, False, True)
    assert rest == {"overwrite": True, "profile": False, "force": False, "resume": None}
    assert parsed([])[0] == TrainConfig()
    config, _ = parsed(["--data", "a.txt", "b.txt", "--min-lr", "0"])
    assert config.data == ("a.txt", "b.txt") and config.min_lr == 0


def test_a_pasted_nanogpt_command_means_what_it_says():
    pasted = (
        "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
        "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
        "--lr_decay_iters=2000 --dropout=0.0"
    )
    config, _ = parsed(pasted.split())
    # nanogpt-cpu is that recipe
    assert config == parsed(["--preset", "nanogpt-cpu"])[0]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_complete_and_can_be_changed(name):
    config, _ = parsed(["--preset", name, "--batch-size", "7"])
    assert config.batch_size == 7
    for key, value in PRESETS[name][1].items():
        assert key == "batch_size" or getattr(config, key) == value


def test_help_names_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as done:
        train.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert done.value.code == 0
    for flag in ("--n-layer", "--learning-rate", "--data", "--workers", "(default: pydoc)", *PRESETS):
        assert flag in text


def test_help_needs_neither_numpy_nor_numba():
    code = "import sys; from npgpt import explain, plot, sample, train; assert not {'numpy', 'numba'} & {*sys.modules}"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "args, words",
    [
        ("--preset nanogpt", "unknown preset 'nanogpt'. Did you mean nanogpt-"),
        ("--n-embd 130", "n_embd = 130 must be divisible by n_head = 4"),
        ("--batch-size 0", "batch_size must be at least 1, got 0"),
        ("--batch-size x", "invalid int value: 'x'"),
        ("--learning-rate -1", "learning_rate must be at least 0, got -1.0"),
        ("--learning-rate nan", "learning_rate must be a finite number"),
        ("--learning-rate inf", "learning_rate must be a finite number"),
        ("--dropout 1", "dropout must be less than 1"),
        ("--val-fraction 0", "val_fraction must be greater than 0"),
        ("--tokenizer bye", "one of char, byte, bpe, or a file; there is no file 'bye'. Did you mean byte?"),
        ("--vocab-size 300", "vocab_size is for --tokenizer bpe; with char the tokens are what they are"),
        ("--tokenizer bpe --vocab-size 256", "vocab_size must be at least 257"),
        ("--tokenizer bpe --vocab-size 99999999999999999999999", "vocab_size must be at most 1000000"),
        ("--seed -3", "seed must be at least 0"),
        ("--bach-size 3", "unknown argument --bach-size; did you mean --batch-size?"),
        ("--bias=maybe", "expected True or False"),
        ("--epochs 1 --max-iters 3", "--epochs or --max-iters, not both"),
        ("--device cuda", "--device can only be cpu"),
        ("text.txt", "--data text.txt"),
        ("--data", "expected at least one argument"),
        ("--max-iters 1" + 400 * "0", "max_iters must be at most 1,000,000,000,000,000, got a number of 401 digits"),
        ("--epochs 1e308", "epochs must be at most"),
        ("--resume=", "--resume names nothing"),
        ("--out-dir=", "--out-dir names nothing"),
        ("--init-from=", "--init-from names nothing"),
        ("--preset=", "--preset names nothing"),
    ],
)
def test_wrong_flags_are_one_line(args, words):
    with pytest.raises(UsageError) as error:
        parsed(args.split())
    assert words in str(error.value) and "\n" not in str(error.value)


def test_behind_two_dashes_a_name_stays_as_it_is():
    with pytest.raises(NpgptError, match="--no_such is not a run folder"):
        plot.main(["--", "--no_such"])


@pytest.mark.parametrize(
    "make, exit_code, words",
    [
        (lambda f: ["--data", f / "missing.txt"], 2, "there is no file"),
        (lambda f: ["--data", write(f, "empty.txt", b"")], 2, "no text"),
        (lambda f: ["--data", write(f, "short.txt", b"too short")], 2, "block_size = 64 needs 65"),
        (lambda f: ["--data", write(f, "one.txt", b"a")], 2, "block_size = 64 needs 65"),
        (lambda f: ["--data", write(f, "binary", bytes(range(256)) * 8)], 2, "not UTF-8 text: byte 0x80 at offset 128"),
        (lambda f: ["--data", f / "text.txt", "--out-dir", f / "text.txt"], 2, "is a file"),
        (lambda f: ["--data", f / "text.txt", "--out-dir", f / "text.txt" / "x"], 3, "cannot write to the run folder"),
        (lambda f: ["--data", f / "text.txt", "--out-dir", f / "run"], 2, "holds an earlier run"),
        (lambda f: ["--data", f / "text.txt", "--tokenizer", f / "no.json"], 2, "there is no file"),
        (lambda f: ["--data", f / "text.txt", "--tokenizer", write(f, "bad.json", b"{")], 2, "bad.json is not JSON"),
        (lambda f: ["--data", f / "text.txt", "--tokenizer", f], 2, "has neither tokenizer.json nor vocab.json"),
        (lambda f: ["--data", f / "text.txt", "--tokenizer", write(f, "few.txt", b"ab")], 2, "few.txt does not have"),
        (lambda f: ["--data", f / "text.txt", "--tokenizer", write(f, "none.txt", b"")], 2, "tokenizer: "),
        (lambda f: ["--data", tokens(f, [1, 2])], 2, "holds tokens and no text; pass the vocabulary with --tokenizer"),
        (lambda f: ["--data", tokens(f, [1, 2], "meta.pkl")], 2, "its meta.pkl is pickle, which can run code"),
        (lambda f: ["--data", tokens(f, [256, 2]), "--tokenizer", "byte"], 2, "has token 256 at position 0"),
        (lambda f: ["--data", tokens(f, [1, 2]), "--tokenizer", "byte"], 2, "block_size = 64 needs 65"),
        (lambda f: ["--preset", "no"], 2, "unknown preset"),
        (lambda f: ["--data", ""], 2, "data: a file has no name"),
        (lambda f: ["--data", f / "run"], 2, "has no files outside of run folders, whose files are left out"),
        (lambda f: ["--data", d := write(f / "both", "a", b"text").parent, "--out-dir", d], 2, "is --data as well"),
        (lambda f: ["--data", f / "text.txt", "--out-dir", write(f / "hub", "config.json", b"").parent], 2, "hide"),
    ],
)
def test_training_mistakes_are_one_line_and_an_exit_code(folder, make, exit_code, words):
    code, _, err = command("train", "--out-dir", folder / "unused", *make(folder))
    assert code == exit_code
    assert words in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (folder / "unused").exists()


def tokens(folder, numbers, *others):
    """A folder of token files, with other files beside them."""
    path = folder / f"tokens{len(numbers)}-{numbers[0]}{''.join(others)}"
    path.mkdir(exist_ok=True)
    for name in ("train.bin", "val.bin"):
        np.array(numbers, np.uint16).tofile(path / name)
    for name in others:
        (path / name).touch()
    return path


def test_token_files_are_data(folder):
    raw = TEXT.encode()
    path = tokens(folder, list(raw))
    args = ["--data", path, "--tokenizer", "byte", "--out-dir", folder / "from-tokens", *SMALL]
    code, out, err = command("train", *args)
    assert (code, err) == (0, "") and "different tokens" in out and "UTF-8" not in out and "None" not in out
    assert "1,720 tokens to train on, 1,720 held back" in out
    assert not list((folder / "from-tokens").glob("tokens-*"))
    code, out, err = command("train", "--resume", "--out-dir", folder / "from-tokens", "--max-iters", 6)
    assert code == 0 and "iter      5 | loss" in out
    assert command("sample", "--out-dir", folder / "from-tokens", "--prompt", "to be")[0] == 0
    # nanoGPT's characters: the vocabulary is a text's
    chars = sorted(set(TEXT))
    path = tokens(folder, [chars.index(char) for char in TEXT], "input.txt")
    (path / "input.txt").write_text(TEXT, encoding="utf-8")
    args = ["--data", path, "--tokenizer", path / "input.txt", "--out-dir", folder / "from-chars", *SMALL]
    code, out, err = command("train", *args)
    assert (code, err) == (0, "") and f"| {' '.join([str(path)])}: {len(chars)} different tokens" in out
    args = ["--out-dir", folder / "from-chars", "--max-new-tokens", 20]
    assert set(command("sample", *args, "--prompt", "to be")[1]) <= set(chars)


def test_bpe_is_learnt_trained_with_and_sampled(folder):
    pytest.importorskip("tokenizers")
    args = ["--data", folder / "text.txt", "--tokenizer", "bpe", "--vocab-size", 270, "--out-dir", folder / "bpe"]
    code, out, err = command("train", *args, *SMALL)
    assert (code, err) == (0, "") and "1,720 characters, 270 different tokens" in out
    code, out, err = command("sample", "--out-dir", folder / "bpe", "--prompt", "日本 to be", "--max-new-tokens", 9)
    assert (code, err) == (0, "") and out.startswith("日本 to be")
    code, out, err = command("train", "--resume", "--out-dir", folder / "bpe", "--max-iters", 6)
    assert code == 0 and "iter      5 | loss" in out
    code, _, err = command("train", "--resume", "--out-dir", folder / "bpe", "--vocab-size", 280)
    assert code == 2 and "begun with vocab_size = 270; it cannot go on with 280" in err


def test_bpe_without_its_package_says_what_to_install(folder):
    code = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "from npgpt import train; sys.argv[0] = 'train'; train.command()"
    )
    args = ["--data", folder / "text.txt", "--tokenizer", "bpe", "--out-dir", folder / "unused"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)
    words = "a BPE tokenizer needs the package tokenizers: pip install 'npgpt[hub]'"
    assert (done.returncode, done.stderr) == (2, f"python -m npgpt.train: {words}\n")
    assert not (folder / "unused").exists()


def write(folder, name, raw):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(raw)
    return folder / name


def test_a_run_folder_within_the_corpus_is_no_text(folder, tmp_path):
    write(tmp_path / "more", "a.txt", TEXT.encode())
    args = ["--data", tmp_path, "--out-dir", tmp_path / "more" / "out", *SMALL]
    _, first, _ = command("train", *args)
    (tmp_path / "more" / "out" / "notes.txt").write_text("no part of the corpus", encoding="utf-8")
    code, out, err = command("train", *args, "--resume", "--max-iters", 6)
    assert (code, err.count("\n")) == (0, 1) and "max_iters was 4 and is 6" in err
    assert "1,720 characters" in first and "1,720 characters" in out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_for_what_is_printed_does_not_end_a_training(folder, tmp_path):
    args = [sys.executable, "-m", "npgpt.train", "--data", folder / "text.txt", "--out-dir", tmp_path / "run", *SMALL]
    with open("/dev/full", "w") as full:
        done = subprocess.run(args, stdout=full, stderr=subprocess.PIPE, env={**os.environ, "NPGPT_KERNELS": "numpy"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "run" / "iter-00000004.safetensors").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_for_what_is_complained_of_changes_no_exit_code(folder):
    args = [sys.executable, "-m", "npgpt.train", "--data", folder / "there-is-none.txt"]
    with open("/dev/full", "w") as full:
        assert subprocess.run(args, stdout=full, stderr=full).returncode == 2


def test_resume_goes_on_with_what_was_begun_and_says_what_is_new(folder):
    run = folder / "resumed"
    assert command("train", "--data", folder / "text.txt", "--out-dir", run, *SMALL)[0] == 0
    code, out, err = command("train", "--resume", "--out-dir", run, "--max-iters", 7)
    assert code == 0 and "iter      6 | loss" in out and "iter      3 | loss" not in out
    assert err == "python -m npgpt.train: max_iters was 4 and is 7 from iteration 4 on\n"
    code, out, err = command("train", "--resume", run / "iter-00000006.safetensors", "--n-embd", 32)
    assert (code, out) == (2, "") and "begun with n_embd = 16; it cannot go on with 32" in err
    for args in (["--resume", "--out-dir", folder / "nothing"], ["--resume", folder / "nothing"]):
        code, out, err = command("train", *args)
        assert (code, out) == (3, "") and "there is no checkpoint" in err and err.count("\n") == 1


def test_a_folder_in_use_is_exit_code_5(folder):
    with_lock = RunFolder(folder / "busy")
    code, _, err = command("train", "--data", folder / "text.txt", "--out-dir", folder / "busy", *SMALL)
    with_lock.close()
    assert code == 5 and f"in use by process {os.getpid()}" in err and err.count("\n") == 1


def test_too_little_memory_is_said_before_anything_is_allocated(folder):
    huge = ["--n-embd", "65536", "--n-layer", "1000", "--n-head", "1"]
    code, _, err = command("train", "--data", folder / "text.txt", "--out-dir", folder / "huge", *huge)
    assert code == 2 and "GB of memory, and there are" in err and "Lower --batch-size" in err and err.count("\n") == 1
    assert not (folder / "huge").exists()


def test_what_is_to_be_known_of_the_data_is_said_at_the_start(folder):
    out = (folder / "out.txt").read_text(encoding="utf-8")
    for words in ("1,720 bytes of UTF-8", "tokens per parameter", "100.0% of the held-back lines", "MB of memory"):
        assert words in out
    args = ["--data", folder / "text.txt", "--out-dir", folder / "many", *SMALL, "--epochs", 6]
    args = [arg for i, arg in enumerate(args) if "--max-iters" not in (arg, args[i - 1])]
    assert "overfitting is to be expected" in command("train", *args)[1]


def test_a_text_of_one_character_repeated_trains(folder):
    path = write(folder, "aaa.txt", b"a" * 500)
    code, out, err = command("train", "--data", path, "--out-dir", folder / "aaa", *SMALL)
    assert (code, err) == (0, "") and "loss 0.0000" in out


def test_an_ascii_console_does_not_end_a_run(folder):
    path = write(folder, "accents.txt", "é日本語\n".encode() * 80)
    code, _, err = command("train", "--data", path, "--out-dir", folder / "accents", *SMALL, PYTHONIOENCODING="ascii")
    assert (code, err) == (0, "")
    code, _, err = command("sample", "--out-dir", folder / "accents", "--prompt", "é", PYTHONIOENCODING="ascii")
    assert (code, err) == (0, "")


@pytest.mark.parametrize("module, flag", [("train", "--data"), ("sample", "--prompt-file"), ("gradcheck", None)])
def test_kernels_that_there_are_not_are_one_line(folder, module, flag):
    code, _, err = command(module, *([flag, folder / "text.txt"] if flag else []), NPGPT_KERNELS="foo")
    assert (code, err) == (2, f"python -m npgpt.{module}: NPGPT_KERNELS must be 'numba' or 'numpy', got 'foo'\n")


# ---- sample


def test_sampling_writes_the_prompt_and_continues_it(folder):
    args = ("--out-dir", folder / "run", "--prompt", "to be", "--max-new-tokens", 30, "--num-samples", 2)
    code, out, err = command("sample", *args)
    assert code == 0 and err == ""
    texts = out.split("-" * 60 + "\n")
    assert len(texts) == 2 and all(text.startswith("to be") and len(text) == 5 + 30 + 1 for text in texts)
    assert command("sample", *args) == (0, out, "")
    assert command("sample", *args, "--seed", 3)[1] != out
    assert command("sample", *args, "--checkpoint", "last")[0] == 0


@pytest.mark.parametrize(
    "args, words",
    [
        ("--prompt 日本", "character '日' (U+65E5 CJK UNIFIED IDEOGRAPH-65E5) at position 0"),
        ("--prompt=", "--prompt must have one character at least"),
        ("--num-samples 0", "--num-samples must be at least 1"),
        ("--temperature -1", "--temperature must be at least 0"),
        ("--temperature nan", "--temperature must be a finite number"),
        ("--top-k 0", "--top-k must be at least 1"),
        ("--max-new-tokens 0", "--max-new-tokens must be at least 1"),
        ("--seed -1", "--seed must be at least 0"),
        ("--top_kk 3", "did you mean --top-k?"),
        ("--top-p 0", "--top-p must be greater than 0, got 0.0"),
        ("--top-p 1.5", "--top-p must be at most 1"),
        ("--min-p -0.1", "--min-p must be at least 0"),
        ("--min-p nan", "--min-p must be a finite number"),
        ("--repetition-penalty 0", "--repetition-penalty must be greater than 0"),
        ("--threads 0", "--threads must be at least 1"),
        ("--stop=", "--stop must have one character at least"),
        ("--prompt to --prompt-file text.txt", "--prompt-file and --prompt: give one of them"),
        ("--interactive --json", "--interactive asks for prompts, and answers in text"),
        ("--interactive --prompt-file text.txt", "--interactive asks for prompts"),
        ("--prompt-file nowhere.txt", "--prompt-file: cannot read nowhere.txt: No such file"),
    ],
)
def test_sampling_mistakes_are_one_line(folder, args, words):
    with pytest.raises(UsageError) as error:
        sample.main(["--out-dir", str(folder / "run"), *args.split()])
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "stream, flags, words",
    [
        ("stdin", "--prompt-file -", "--prompt-file - needs standard input, which is closed"),
        ("stdin", "--interactive", "--interactive needs standard input"),
        ("stdout", "--interactive", "--interactive needs standard input, output"),
        ("stderr", "--interactive", "--interactive needs standard input, output and error"),
    ],
)
def test_a_closed_stream_is_one_line(folder, monkeypatch, stream, flags, words):
    monkeypatch.setattr(sys, stream, None)
    with pytest.raises(UsageError, match=words):
        sample.main(["--out-dir", str(folder / "run"), *flags.split()])


def test_a_wrong_control_is_exit_code_2(folder):
    code, out, err = command("sample", "--out-dir", folder / "run", "--top-p", 7)
    assert (code, out, err) == (2, "", "python -m npgpt.sample: --top-p must be at most 1, got 7.0\n")


@pytest.fixture
def sampled(folder, capsys):
    """A function: arguments -> what npgpt.sample prints for the folder's run, in this process."""

    def sampled(*args):
        assert sample.main(["--out-dir", str(folder / "run"), "--max-new-tokens", "20", *map(str, args)]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return sampled


def test_the_prompt_may_be_a_file(folder, sampled):
    expected = sampled("--prompt", "to be\nor")
    # as editors on Windows write it: a byte order mark, and two characters at the end of a line
    for name, raw in (("plain.txt", b"to be\nor"), ("windows.txt", b"\xef\xbb\xbfto be\r\nor")):
        assert sampled("--prompt-file", write(folder, name, raw)) == expected
    for name, raw, words in (
        ("empty.txt", b"", "empty.txt is empty"),
        ("latin1.txt", b"to b\xe9", "latin1.txt is not UTF-8 text: byte 4 is wrong"),
        ("unknown.txt", "to 日".encode(), "the prompt: "),
    ):
        with pytest.raises(UsageError) as error:
            sampled("--prompt-file", write(folder, name, raw))
        assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UsageError, match="--prompt-file: cannot read"):
        sampled("--prompt-file", folder)


@pytest.mark.parametrize(
    "raw, exit_code, words",
    [(b"to be", 0, b""), (b"", 2, b"standard input is empty"), (b"\xff", 2, b"standard input is not UTF-8 text")],
)
def test_the_prompt_may_be_standard_input(folder, sampled, raw, exit_code, words):
    args = [sys.executable, "-m", "npgpt.sample", "--out-dir", str(folder / "run"), "--max-new-tokens", "20"]
    environment = {**os.environ, "NPGPT_KERNELS": "numpy", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([*args, "--prompt-file", "-"], input=raw, capture_output=True, env=environment)
    assert done.returncode == exit_code and words in done.stderr and done.stderr.count(b"\n") == (exit_code != 0)
    assert done.stdout.startswith(raw if exit_code == 0 else b"")
    assert bool(done.stdout) == (exit_code == 0)


@pytest.mark.parametrize("flags", [[], ["--num-samples", 2, "--json"], ["--temperature", 0]])
def test_stats_and_drafts_change_nothing_but_what_is_noted(folder, sampled, capsys, flags):
    expected = sampled("--prompt", "to be", *flags)
    args = ["--out-dir", folder / "run", "--max-new-tokens", 20, "--prompt", "to be", "--stats", "--draft", 4, *flags]
    assert sample.main(list(map(str, args))) == 0
    out, err = capsys.readouterr()
    assert out == expected
    assert re.fullmatch(
        r"python -m npgpt.sample: 5 tokens of the prompt in [\d.,]+ ms, the first one written after [\d.,]+ ms, "
        r"then [\d.,]+ tokens a second(; \d+ of \d+ drafted tokens were right)?\n", err
    )  # fmt: skip


def test_json_is_an_object_a_line_and_says_what_was_written(folder, sampled):
    tokenizer = GPT.from_pretrained(folder / "run").tokenizer
    args = ("--prompt", "to be", "--num-samples", 3, "--seed", 5, "--json")
    plain = sampled(*args[:-1]).split("-" * 60 + "\n")
    rows = [json.loads(line) for line in sampled(*args, "--logprobs").splitlines()]
    assert len(rows) == len(plain) == 3 and len({row["text"] for row in rows}) == 3
    for n, row in enumerate(rows):
        assert set(row) == {"sample", "seed", "prompt", "text", "finish", "tokens", "logprobs"}
        assert (row["sample"], row["seed"], row["prompt"], row["finish"]) == (n, 5, "to be", "length")
        assert plain[n] == row["prompt"] + row["text"] + "\n"
        assert len(row["tokens"]) == len(row["logprobs"]) == 20 and tokenizer.decode(row["tokens"]) == row["text"]
        assert all(math.isfinite(logprob) and logprob <= 0 for logprob in row["logprobs"])
    # without being asked for there are none, and all else is the same
    assert [json.loads(line) for line in sampled(*args).splitlines()] == [
        {key: value for key, value in row.items() if key != "logprobs"} for row in rows
    ]


def test_json_of_a_text_that_ends_at_a_stop_string(sampled):
    whole = json.loads(sampled("--json"))
    stop = whole["text"][7:9]
    row = json.loads(sampled("--json", "--stop", stop, "--stop", "nowhere in it", "--logprobs"))
    assert row["text"] == whole["text"].split(stop)[0] and row["finish"] == "stop"
    # the tokens are those that were drawn, with those of the stop string
    assert row["tokens"] == whole["tokens"][: len(row["text"]) + 2] and len(row["logprobs"]) == len(row["tokens"])
    assert sampled("--stop", stop) == "\n" + row["text"] + "\n"


def test_log_probabilities_stand_below_the_text(sampled):
    text, rest = sampled("--prompt", "to be"), sampled("--prompt", "to be", "--logprobs")
    assert rest.startswith(text)
    rows = [line.split(maxsplit=1) for line in rest[len(text) :].splitlines()]
    assert len(rows) == 20 and all(float(logprob) <= 0 for logprob, _ in rows)
    # each character as Python would write it
    assert [token for _, token in rows] == [repr(char) for char in text.removeprefix("to be").removesuffix("\n")]
    logprobs = json.loads(sampled("--prompt", "to be", "--logprobs", "--json"))["logprobs"]
    assert [float(logprob) for logprob, _ in rows] == pytest.approx(logprobs, abs=6e-5)


def test_controls_act_on_the_text_and_threads_do_not(sampled):
    text = sampled("--prompt", "to be")
    assert sampled("--prompt", "to be", "--threads", 2) == text
    assert sampled("--prompt", "to be", "--top-p", 1, "--min-p", 0, "--repetition-penalty", 1) == text
    for control in ("--top-p 0.2", "--min-p 0.9", "--repetition-penalty 5", "--temperature 3", "--top-k 2"):
        assert sampled("--prompt", "to be", *control.split()) != text
    assert len(sampled("--prompt", "to be", "--int8")) == len(text)
    assert len(sampled("--prompt", "to be", "--dtype", "bfloat16")) == len(text)
    # each of these leaves the likeliest token alone
    assert len({sampled(*args.split()) for args in ("--temperature 0", "--top-k 1", "--top-p 1e-9", "--min-p 1")}) == 1


def asked(folder, monkeypatch, capsys, lines, *args):
    """What npgpt.sample --interactive prints when it reads these lines: (standard output, standard error)."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    args = ["--out-dir", str(folder / "run"), "--max-new-tokens", "9", "--interactive", *args]
    assert sample.main(args) == 0
    return capsys.readouterr()


def test_prompts_one_after_the_other(folder, sampled, monkeypatch, capsys):
    def continued(prompt):
        return sampled("--prompt", prompt, "--max-new-tokens", 9)

    first, second = continued("to be"), continued("that")
    longer = continued(second.removesuffix("\n"))
    # an empty line before there is any text asks again; what the model does not know is a message and not the end
    out, err = asked(folder, monkeypatch, capsys, "\nto be\n日本\nthat\n\n")
    assert out == f"> > {first}> > {second}> {longer}> \n"
    lines = err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("type a text to continue")
    assert lines[1].startswith("python -m npgpt.sample: the prompt: ") and "'日'" in lines[1]
    assert asked(folder, monkeypatch, capsys, "")[0] == "> \n"


def test_an_empty_line_goes_on_with_the_tokens_of_the_last_text(monkeypatch, capsys):
    tokenizer, model = ByteTokenizer(), GPT(GPTConfig(vocab_size=256, block_size=8, n_layer=1, n_head=1, n_embd=4))
    given, answers = [], [b"\xc3", b"\xa9!", b"?"]

    def write(idx):
        answer = answers[len(given)]
        given.append(bytes(idx))
        chosen = iter(answer)
        monkeypatch.setattr(generation, "choose", lambda *_: [next(chosen)])
        return writer.write(model, tokenizer, idx, [np.random.default_rng(0)], len(answer))

    monkeypatch.setattr(generation.Generation, "_kernel_draws", lambda _: False)  # all tokens are chosen by choose()
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n\n\n"))
    sample.interact(write, tokenizer)
    assert given == [b"a", b"a\xc3", b"a\xc3\xa9!"]
    assert capsys.readouterr().out == "> a\ufffd\n> aé!\n> aé!?\n> \n"


def test_prompts_through_a_pipe(folder):
    done = subprocess.run(
        [sys.executable, "-m", "npgpt.sample", "--out-dir", str(folder / "run"), "--interactive",
         "--max-new-tokens", "9"],
        input="to be\n\nQQ\nthat\n", capture_output=True, text=True,
        env={**os.environ, "NPGPT_KERNELS": "numpy", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr and done.stderr.count("\n") == 2
    assert done.stdout.startswith("> to be") and "> that" in done.stdout and done.stdout.endswith("> \n")


def test_a_model_may_be_a_run_a_checkpoint_or_a_hugging_face_folder(folder, tmp_path, capsys):
    GPT.from_pretrained(folder / "run").save_pretrained(tmp_path / "exported")
    best = GPT.from_pretrained(folder / "run").transformer.wte.weight.data
    (file,) = (
        path
        for path in (folder / "run").glob("iter-*.safetensors")
        if np.array_equal(GPT.from_pretrained(path).transformer.wte.weight.data, best)
    )
    texts = set()
    for path in (folder / "run", file, tmp_path / "exported"):
        assert sample.main(["--model", str(path), "--prompt", "to be", "--max-new-tokens", "40"]) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1


def test_a_checkpoint_is_looked_for_in_the_run_folder_first(folder, sampled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "iter-00000002.safetensors"
    text = sampled("--checkpoint", name)
    assert sampled("--checkpoint", folder / "run" / name) == text
    with pytest.raises(NpgptError, match="there is no iter-00000003"):
        sampled("--checkpoint", "iter-00000003.safetensors")
    write(tmp_path, name, b"")
    assert sampled("--checkpoint", name) == text
    assert sample.main(["--checkpoint", str(folder / "run" / name)]) == 0  # without a run folder


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl"])
def test_another_file_of_a_run_is_no_checkpoint_that_others_come_before(folder, name):
    with pytest.raises(NpgptError, match="not a good checkpoint") as error:
        sample.main(["--model", str(folder / "run" / name)])
    assert "The one before it" not in str(error.value)


def test_no_checkpoint_or_a_damaged_one(folder):
    for name, words in (("nowhere", "there is no"), ("text.txt", "not a good checkpoint")):
        code, out, err = command("sample", "--out-dir", folder / name)
        assert (code, out) == (3, "") and words in err and err.count("\n") == 1
    (folder / "damaged").mkdir(exist_ok=True)
    whole = (folder / "run" / "iter-00000004.safetensors").read_bytes()
    write(folder / "damaged", "iter-00000004.safetensors", whole[: len(whole) // 2])
    with pytest.raises(NpgptError, match="cut off") as error:
        sample.main(["--out-dir", str(folder / "damaged")])
    assert error.value.exit_code == 3


@pytest.mark.parametrize("more", [[], ["--json", "--num-samples", "500"]])
def test_a_reader_that_leaves_is_no_traceback(folder, more):
    args = [sys.executable, "-m", "npgpt.sample", "--out-dir", str(folder / "run"), "--max-new-tokens", "3000", *more]
    with subprocess.Popen(
        args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "NPGPT_KERNELS": "numpy"}
    ) as process:
        process.stdout.read(5)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
