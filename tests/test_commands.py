"""The two commands, as a user types them: what they print, and that no mistake ends in a traceback."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from npgpt import sample, train
from npgpt.config import PRESETS, TrainConfig
from npgpt.errors import NpgptError, UsageError
from npgpt.folder import RunFolder

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
        f"python -m npgpt.sample --out-dir {folder / 'run'}",
    ):  # fmt: skip
        assert words in out
    assert sorted(os.listdir(folder / "run")) == [
        "iter-00000002.safetensors", "iter-00000004.safetensors", "lock", "metrics.jsonl",
        "tokens-378bb2504ab1a8b8.bin",
    ]  # fmt: skip
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 5


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
    code = "import sys; from npgpt import train, sample; assert not {'numpy', 'numba'} & set(sys.modules), sys.modules"
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
        ("--seed -3", "seed must be at least 0"),
        ("--bach-size 3", "unknown argument --bach-size; did you mean --batch-size?"),
        ("--bias=maybe", "expected True or False"),
        ("--epochs 1 --max-iters 3", "--epochs or --max-iters, not both"),
        ("--device cuda", "--device can only be cpu"),
        ("text.txt", "--data text.txt"),
        ("--data", "expected at least one argument"),
    ],
)
def test_wrong_flags_are_one_line(args, words):
    with pytest.raises(UsageError) as error:
        parsed(args.split())
    assert words in str(error.value) and "\n" not in str(error.value)


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
    (folder / name).write_bytes(raw)
    return folder / name


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
    ],
)
def test_sampling_mistakes_are_one_line(folder, args, words):
    with pytest.raises(UsageError) as error:
        sample.main(["--out-dir", str(folder / "run"), *args.split()])
    assert words in str(error.value) and "\n" not in str(error.value)


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


def test_a_reader_that_leaves_is_no_traceback(folder):
    args = [sys.executable, "-m", "npgpt.sample", "--out-dir", str(folder / "run"), "--max-new-tokens", "3000"]
    with subprocess.Popen(
        args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "NPGPT_KERNELS": "numpy"}
    ) as process:
        process.stdout.read(5)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
