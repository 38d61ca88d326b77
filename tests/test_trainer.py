"""The training loop: what it writes, that it repeats itself bit for bit, and that it stops where it must."""

import dataclasses
import inspect
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import TEXT, metrics, run, variant

from npgpt.config import TrainConfig
from npgpt.data.characters import CharTokenizer
from npgpt.errors import BusyError, CheckpointError, DivergedError, StoppedError, UsageError
from npgpt.files import checkpoint, folder
from npgpt.model import GPT
from npgpt.run import memory
from npgpt.run.events import Evaluation, Progress
from npgpt.run.ranks import ALONE
from npgpt.run.trainer import Trainer
from npgpt.signals import Stop


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return TrainConfig(
        data=(str(tmp_path / "text.txt"),), out_dir=str(tmp_path / "run"), n_layer=1, n_head=2, n_embd=16, block_size=8,
        batch_size=4, max_iters=12, eval_interval=5, eval_iters=2, log_interval=3, warmup_iters=2, workers=2,
        blas_threads=1, learning_rate=1e-2,
    )  # fmt: skip


def test_events_and_metrics(config):
    _, events = run(config)
    assert [e.iter for e in events if isinstance(e, Progress)] == [0, 3, 6, 9]
    evaluations = [e for e in events if isinstance(e, Evaluation)]
    assert [e.iter for e in evaluations] == [0, 5, 10, 12]
    assert [e.val_loss_whole is not None for e in evaluations] == [False, False, False, True]
    assert evaluations[0].is_best and evaluations[-1].val_loss < evaluations[0].val_loss

    rows = metrics(config)
    assert [row["iter"] for row in rows] == list(range(13))
    keys = {"iter", "train_loss", "lr", "grad_norm", "tokens_per_second", "elapsed_s"}
    for row in rows:
        extra = {"val_loss"} if row["iter"] in (0, 5, 10, 12) else set()
        assert set(row) == keys | extra | ({"val_loss_whole"} if row["iter"] == 12 else set())
    assert all(math.isfinite(row[key]) for row in rows[:-1] for key in keys)
    assert rows[-1]["train_loss"] is None
    assert rows[0]["lr"] < rows[2]["lr"] > rows[11]["lr"] > 1e-3 and math.isclose(rows[2]["lr"], 1e-2)


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.2}, {"workers": 1}, {"gradient_accumulation_steps": 3}])
def test_the_same_run_twice_gives_the_same_bits(config, changes):
    weights = []
    for _ in range(2):
        trainer, _ = run(variant(config, **changes), overwrite=True)
        weights.append(trainer.parallel.flat.weights.copy())
    assert (weights[0] == weights[1]).all()
    assert (run(variant(config, seed=2, **changes), overwrite=True)[0].parallel.flat.weights != weights[0]).any()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_workers_change_results_by_rounding_only(config, dropout):
    losses = []
    for workers in (1, 2, 3, 4):
        run(variant(config, workers=workers, dropout=dropout), overwrite=True)
        losses.append([row["train_loss"] for row in metrics(config)[:-1]])
    assert np.allclose(losses[1:], losses[0], rtol=1e-4)


def test_accumulating_micro_steps_equals_one_large_batch(config):
    run(variant(config, batch_size=8))
    large = [row["train_loss"] for row in metrics(config)[:-1]]
    run(variant(config, batch_size=4, gradient_accumulation_steps=2), overwrite=True)
    small = [row["train_loss"] for row in metrics(config)[:-1]]
    assert np.allclose(small, large, rtol=1e-4)


def test_the_loop_is_read_in_one_sitting(config):
    """It is short, begins with what a reader came for, has few attributes, and keeps what is its own to itself."""
    path = Path(inspect.getfile(Trainer))
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
    assert [name for name, value in vars(Trainer).items() if inspect.isfunction(value)][:2] == ["run", "step"]
    trainer, _ = run(config)
    assert len(vars(trainer)) <= 15 and Trainer.__mro__ == (Trainer, object)
    own = [name for name in vars(Trainer) if name.startswith("_") and not name.startswith("__")]
    root = Path(__file__).resolve().parents[1]
    for other in {*root.glob("npgpt/**/*.py"), *root.glob("tests/*.py"), *root.glob("benchmarks/*.py")} - {path}:
        source = other.read_text(encoding="utf-8")
        assert not [name for name in own if re.search(rf"(?i:trainer|\bone|\bagain)\.{name}\b", source)], other


def test_epochs_instead_of_iterations(config):
    trainer = Trainer(variant(config, epochs=2.0))
    blocks = (len(trainer.setup.tokens.train) - 8) // 8
    assert trainer.max_iters == math.ceil(2 * blocks / 4)


def test_learning_rate_defaults_follow_the_run(config):
    trainer = Trainer(config)
    assert math.isclose(trainer.setup.learning_rate(2), 1e-2)
    assert math.isclose(trainer.setup.learning_rate(12), 1e-3)
    assert Trainer(variant(config, decay_lr=False)).setup.learning_rate(11) == 1e-2
    assert Trainer(variant(config, min_lr=5e-3, lr_decay_iters=6)).setup.learning_rate(8) == 5e-3


def test_whole_split_loss_is_the_mean_over_all_its_tokens(config):
    trainer, events = run(config)
    tokens = trainer.setup.tokens.val
    total = 0.0
    for start in range(0, len(tokens) - 1, 8):
        block = tokens[start : start + 9]
        _, loss = trainer.model(block[None, :-1], block[None, 1:])
        total += loss.item() * (len(block) - 1)
    assert math.isclose(events[-1].val_loss_whole, total / (len(tokens) - 1), rel_tol=1e-5)


def test_evaluation_is_without_dropout_and_changes_nothing(config):
    trainer = Trainer(variant(config, dropout=0.5))
    before = trainer.parallel.flat.weights.copy()
    assert trainer.evaluate(trainer.val_sample) == trainer.evaluate(trainer.val_sample)
    assert (trainer.parallel.flat.weights == before).all() and trainer.model.training


def test_checkpoints_hold_the_model(config):
    trainer, events = run(config)
    for path in (folder.best(config.out_dir), folder.newest(config.out_dir)):
        model, (_, state) = GPT.from_pretrained(path), folder.load(path)
        assert model.tokenizer.decode(model.tokenizer.encode("lazy fox")) == "lazy fox"
        assert model.config == trainer.model.config
        assert state["iter"] in (0, 5, 10, 12) and math.isfinite(state["val_loss"])
    for (_, ours), (_, theirs) in zip(model.named_parameters(), trainer.model.named_parameters(), strict=True):
        assert (ours.data == theirs.data).all()
    assert state["iter"] == 12
    arrays, _ = checkpoint.load(path)
    assert (arrays["adamw.v.transformer.wte.weight"] > 0).any()
    best = min((e for e in events if isinstance(e, Evaluation)), key=lambda e: e.val_loss)
    assert folder.load(folder.best(config.out_dir))[1]["iter"] == best.iter


def test_an_earlier_run_is_not_lost_by_accident(config):
    run(config)
    with pytest.raises(UsageError, match=r"holds an earlier run.*--resume.*--overwrite"):
        Trainer(config)
    assert len(metrics(config)) == 13
    run(config, overwrite=True)


def test_divergence_stops_the_run_and_keeps_the_weights_finite(config):
    trainer = Trainer(variant(config, learning_rate=1e30, grad_clip=0.0, warmup_iters=0, eval_interval=100))
    with pytest.raises(DivergedError, match=r"at iteration \d+; the last good.*smaller --learning-rate") as error:
        list(trainer.run())
    assert error.value.exit_code == 4
    model = GPT.from_pretrained(folder.newest(config.out_dir))
    assert all(np.isfinite(parameter.data).all() for parameter in model.parameters())


def test_a_folder_that_cannot_be_used(config, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        Trainer(variant(config, out_dir=str(tmp_path / "file")))

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    trainer = Trainer(config)
    monkeypatch.setattr(type(trainer.out_dir), "mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"cannot write to the run folder.*Permission denied"):
        next(trainer.run())


def test_a_checkpoint_that_is_none_of_ours(config):
    trainer, _ = run(config)
    arrays, state = folder.load(folder.newest(config.out_dir))

    def load_changed(arrays=arrays, **changes):
        path = trainer.out_dir / "changed"
        checkpoint.save(path, arrays, {"npgpt": json.dumps({**state, **changes})})
        return GPT.from_pretrained(path)

    load_changed()
    without = {name: array for name, array in arrays.items() if name != "transformer.wpe.weight"}
    for options, words in (
        ({"arrays": without}, r"wpe.weight must have shape \(8, 16\), found nothing"),
        ({"model": {**state["model"], "n_embd": 32}}, r"must have shape \(\d+, 32\), found"),
        ({"model": {**state["model"], "n_head": 3}}, "not written by npgpt.train, or is damaged"),
        ({"model": {**state["model"], "surprise": 3}}, "not written by npgpt.train, or is damaged"),
        ({"tokenizer": {"kind": "byte"}}, "tokenizer has 256"),
    ):
        with pytest.raises(CheckpointError, match=words):
            load_changed(**options)
    checkpoint.save(trainer.out_dir / "foreign", arrays, {})
    with pytest.raises(CheckpointError, match="not written by npgpt"):
        GPT.from_pretrained(trainer.out_dir / "foreign")


# ---- the corpus as tokens


def token_files(config):
    return sorted(path for path in Path(config.out_dir).glob("tokens-*"))


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_tokens_are_mapped_from_a_file_in_the_run_folder(config, kind):
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    trainer, _ = run(variant(config, tokenizer=kind))
    (path,) = token_files(config)
    expected = trainer.tokenizer.encode(TEXT)
    assert np.fromfile(path, "<u2").tolist() == expected.tolist()
    tokens = trainer.setup.tokens
    assert isinstance(tokens.train.base.base, np.memmap) and not tokens.train.flags.writeable
    assert np.concatenate([tokens.train, tokens.val]).tolist() == expected.tolist()
    assert len(tokens) == len(expected)


def test_more_than_65536_tokens_take_four_bytes(config, tmp_path):
    characters = map(chr, [*range(0x0E, 0xD000), 10, *range(0x10000, 0x20000)])
    (tmp_path / "vocabulary.txt").write_text("".join(characters), encoding="utf-8")
    trainer = Trainer(variant(config, tokenizer=str(tmp_path / "vocabulary.txt")))
    (path,) = token_files(config)
    assert trainer.tokenizer.vocab_size > 65536 and trainer.setup.tokens.train.dtype == np.uint32
    assert np.fromfile(path, "<u4").tolist() == trainer.tokenizer.encode(TEXT).tolist()


def test_what_was_encoded_before_is_used_again(config, monkeypatch):
    run(config)
    (path,) = token_files(config)
    before = path.stat().st_mtime_ns

    def refuse(*args):
        raise AssertionError("the text is encoded once more")

    with monkeypatch.context() as patch:
        patch.setattr(CharTokenizer, "encode_pieces", refuse)
        run(config, overwrite=True)
        Trainer.resume(config.out_dir)
    assert token_files(config) == [path] and path.stat().st_mtime_ns == before
    path.write_bytes(path.read_bytes()[:-2])  # but not if it has another length
    trainer = Trainer.resume(config.out_dir)
    assert len(trainer.setup.tokens) == len(TEXT) == path.stat().st_size // 2


def test_bpe_tokens_of_another_length_are_noticed_in_a_resume(config):
    pytest.importorskip("tokenizers")
    trainer, _ = run(variant(config, tokenizer="bpe"))
    (path,) = token_files(config)
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    assert len(Trainer.resume(config.out_dir).setup.tokens) == len(trainer.setup.tokens)
    assert path.read_bytes() == whole


def test_tokens_of_earlier_content_go_with_their_run(config, tmp_path):
    run(config)
    (old,) = token_files(config)
    (tmp_path / "text.txt").write_text(TEXT + TEXT, encoding="utf-8")
    trainer = Trainer(config, overwrite=True)
    assert old in token_files(config) and len(token_files(config)) == 2  # the earlier run stays until this one begins
    list(trainer.run())
    assert len(token_files(config)) == 1 and old not in token_files(config)


def test_a_run_folder_is_not_made_for_a_text_that_is_too_short(config, tmp_path):
    (tmp_path / "text.txt").write_text("the cat " * 3, encoding="utf-8")
    for kind in ("char", "byte", "bpe"):
        if kind == "bpe":
            pytest.importorskip("tokenizers")
        with pytest.raises(UsageError, match="block_size = 800 needs 801"):
            Trainer(variant(config, tokenizer=kind, block_size=800))
        assert not Path(config.out_dir).exists()


class FullDisk:
    """The os module, on a disk that has room for so many bytes."""

    def __init__(self, room):
        self.room = room

    def __getattr__(self, name):
        return getattr(os, name)

    def write(self, file, part):
        if self.room <= 0:
            raise OSError(28, os.strerror(28))
        part = part[: self.room]
        self.room -= len(part)
        return os.write(file, part)


@pytest.mark.parametrize("overwrite", [True, False])
def test_tokens_that_are_damaged_are_made_anew(config, overwrite):
    whole, _ = run(config)
    expected = whole.setup.tokens.train.copy()
    (path,) = token_files(config)
    good = path.read_bytes()
    path.write_bytes(good[::-1])
    again = Trainer(config, overwrite=True) if overwrite else Trainer.resume(config.out_dir)
    assert np.array_equal(again.setup.tokens.train, expected)
    assert token_files(config) == [path] and path.read_bytes() == good


@pytest.mark.parametrize("room", [0, 100])
def test_a_disk_too_small_for_the_tokens(config, monkeypatch, room):
    monkeypatch.setattr(checkpoint, "os", FullDisk(room))
    with pytest.raises(CheckpointError, match=r"cannot write .*tokens-\w+\.bin: No space left on device") as error:
        Trainer(config)
    assert "\n" not in str(error.value) and error.value.exit_code == 3 and token_files(config) == []
    monkeypatch.undo()
    run(config)


def test_tokens_half_written_when_the_process_was_killed_are_cleared_away(config):
    Path(config.out_dir).mkdir()
    (Path(config.out_dir) / "tokens-0123456789abcdef.bin.123.tmp").write_bytes(b"half")
    run(config)
    assert [path.suffix for path in token_files(config)] == [".bin"]


def test_a_text_that_changes_while_it_is_encoded_leaves_no_tokens(config, monkeypatch, tmp_path):
    encode = CharTokenizer.encode_pieces

    def change_first(self, pieces):
        (tmp_path / "text.txt").write_text(TEXT.replace("fox", "dog"), encoding="utf-8")
        return encode(self, pieces)

    monkeypatch.setattr(CharTokenizer, "encode_pieces", change_first)
    with pytest.raises(UsageError, match="changed while it was read"):
        Trainer(config)
    assert token_files(config) == []


def test_nobody_writes_tokens_into_a_folder_that_another_training_holds(config):
    first = folder.RunFolder(config.out_dir)
    with pytest.raises(BusyError, match="in use by process"):
        Trainer(config)
    first.close()
    assert token_files(config) == []
    one, other = Trainer(config), Trainer(config)  # both have prepared, one begins
    list(one.run())
    with pytest.raises(UsageError, match="holds an earlier run"):
        list(other.run())
    assert len(token_files(config)) == 1


def test_who_is_asked_to_stop_while_the_text_is_read_does(config):
    stop = Stop()
    stop.number = 15
    with pytest.raises(StoppedError, match="before anything was trained") as error:
        Trainer(config, stop=stop)
    assert error.value.exit_code == 143 and not Path(config.out_dir).exists()


def test_tokens_do_not_count_when_the_memory_is_too_small(config, monkeypatch):
    trainer, n = Trainer(config), 10**10
    monkeypatch.setattr(memory, "in_use", lambda: 0)
    asked = config, trainer.tokenizer.vocab_size, n, trainer.setup.workers
    parts = memory.parts(*asked)
    needed, mapped = memory.total(parts), parts[memory.MAPPED]
    assert mapped == 2 * n
    monkeypatch.setattr(memory, "available", lambda: needed - mapped)
    memory.check(parts, ALONE)
    monkeypatch.setattr(memory, "available", lambda: needed - mapped - 1)
    with pytest.raises(UsageError, match="GB of memory"):
        memory.check(parts, ALONE)


MEASURED = """
import json, sys
from npgpt.config import TrainConfig
from npgpt.run.trainer import Trainer
peak = lambda: next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
before = peak()
trainer = Trainer(TrainConfig(**json.loads(sys.argv[1])))
for event in trainer.run():
    pass
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc")
@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_memory_grows_with_the_tokens_only(config, tmp_path, kind):
    """Text as a string, its UTF-8 and tokens of 64 bits took 10 bytes of memory for each byte of text, and more."""
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    taken = {}
    for copies in (100, 8000):
        (tmp_path / "text.txt").write_text(TEXT * copies, encoding="utf-8")
        few = variant(config, tokenizer=kind, out_dir=str(tmp_path / str(copies)), max_iters=1, val_fraction=1e-4)
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, json.dumps(dataclasses.asdict(few))], capture_output=True, text=True,
            env={**os.environ, "NPGPT_KERNELS": "numpy", "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        taken[copies] = int(done.stdout)
    assert taken[8000] - taken[100] < 3.5 * len(TEXT) * 7900
