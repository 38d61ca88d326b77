"""The training loop: what it writes, that it repeats itself bit for bit, and that it stops where it must."""

import dataclasses
import json
import math
import os

import numpy as np
import pytest

from npgpt import checkpoint, folder
from npgpt.config import TrainConfig
from npgpt.errors import CheckpointError, DivergedError, UsageError
from npgpt.model import GPT
from npgpt.trainer import Evaluation, Progress, Trainer

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return TrainConfig(
        data=(str(tmp_path / "text.txt"),), out_dir=str(tmp_path / "run"), n_layer=1, n_head=2, n_embd=16, block_size=8,
        batch_size=4, max_iters=12, eval_interval=5, eval_iters=2, log_interval=3, warmup_iters=2, workers=2,
        blas_threads=1, learning_rate=1e-2,
    )  # fmt: skip


def variant(config, **changes):
    return dataclasses.replace(config, **changes)


def run(config, **options):
    trainer = Trainer(config, **options)
    return trainer, list(trainer.run())


def metrics(config):
    with open(os.path.join(config.out_dir, "metrics.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


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


def test_epochs_instead_of_iterations(config):
    trainer = Trainer(variant(config, epochs=2.0))
    blocks = (len(trainer.train_tokens) - 8) // 8
    assert trainer.max_iters == math.ceil(2 * blocks / 4)


def test_learning_rate_defaults_follow_the_run(config):
    trainer = Trainer(config)
    assert math.isclose(trainer.learning_rate(2), 1e-2)
    assert math.isclose(trainer.learning_rate(12), 1e-3)
    assert Trainer(variant(config, decay_lr=False)).learning_rate(11) == 1e-2
    assert Trainer(variant(config, min_lr=5e-3, lr_decay_iters=6)).learning_rate(8) == 5e-3


def test_whole_split_loss_is_the_mean_over_all_its_tokens(config):
    trainer, events = run(config)
    tokens = trainer.val_tokens
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
