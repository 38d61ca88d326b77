"""Settings that belong together follow each other, and where they contradict a line says which one wins."""

import math

import pytest
from runs import TEXT, run, variant
from test_init_from import OTHER, config_of

from npgpt import sample, train
from npgpt.config import FINE_TUNING, PRESETS, TrainConfig, composed, contradictions
from npgpt.files import folder
from npgpt.model import GPT
from npgpt.optim import cosine_lr
from npgpt.run.events import Notice
from npgpt.run.trainer import Trainer


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "default"])
def test_settings_of_a_preset_follow_what_is_given_beside_it(name):
    plain = TrainConfig(**composed(name, {}))
    assert plain == TrainConfig(**PRESETS[name][1])
    for n in (100, 1000, 10**6):
        config = TrainConfig(**composed(name, {"max_iters": n}))
        assert config.lr_decay_iters is None and config.warmup_iters <= min(plain.warmup_iters, n / 10)
        assert list(contradictions(config, n)) == []
        # the rate reaches its peak, and its least value at the end only
        rates = [cosine_lr(i, config.learning_rate, config.min_lr, config.warmup_iters, n) for i in (n // 10, n - 1)]
        assert rates[0] > 0.9 * config.learning_rate and rates[1] > config.min_lr
    assert composed(name, {"epochs": 2.0}).get("lr_decay_iters") is None
    slower = TrainConfig(**composed(name, {"learning_rate": plain.learning_rate / 100}))
    assert math.isclose(slower.min_lr / slower.learning_rate, plain.min_lr / plain.learning_rate)


def test_what_is_given_is_not_derived():
    given = {"max_iters": 50, "warmup_iters": 40, "lr_decay_iters": 45, "learning_rate": 1e-3, "min_lr": 1e-5}
    settings = composed("gpt2", given)
    assert {name: settings[name] for name in given} == given
    assert composed(None, {"max_iters": 5}) == {"max_iters": 5}


@pytest.mark.parametrize(
    "settings, max_iters, words",
    [
        ({"warmup_iters": 2000, "learning_rate": 6e-4}, 1000, "the learning rate reaches 0.0003 of 0.0006"),
        ({"warmup_iters": 100, "lr_decay_iters": 50}, 1000, "lr_decay_iters = 50 is not beyond warmup_iters = 100"),
        ({"min_lr": 0.1}, 1000, "min_lr = 0.1 is above learning_rate = 0.004: the rate rises to it"),
        ({"min_lr": 0.1, "decay_lr": False}, 1000, None), ({"warmup_iters": 20}, 4, None), ({}, 2400, None),
        ({"init_from": "big", "optimizer": "adamw"}, 100, "learning_rate = 0.004 is 133 times 3e-05"),
        ({"init_from": "big", **FINE_TUNING}, 100, None),
        ({"init_from": "big", **FINE_TUNING, "optimizer": "muon", "muon_learning_rate": 0.03}, 100, "150 times 0.0002"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_get_a_line(settings, max_iters, words):
    found = list(contradictions(TrainConfig(**settings), max_iters))
    assert len(found) == (words is not None) and all(words in line for line in found)


def test_the_line_comes_with_the_run_and_with_a_resume_that_changes_it(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    config = config_of(tmp_path, data=(str(tmp_path / "text.txt"),), max_iters=2)
    quiet, loud = Trainer(config), Trainer(variant(config, min_lr=1.0))
    assert not quiet.notices and "rises" in loud.notices[0]
    list(quiet.run())
    assert any("rises" in text for text in Trainer.resume(config.out_dir, {"min_lr": 1.0}).notices)


# ---- a run that begins with a model


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A folder with a run in `run` that has learnt its text."""
    path = tmp_path_factory.mktemp("learnt")
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    (path / "other.txt").write_text(OTHER, encoding="utf-8")
    run(config_of(path, data=(str(path / "text.txt"),), max_iters=60, learning_rate=1e-2, eval_interval=60))
    return path


def test_by_default_a_model_is_not_ruined_by_the_run_that_begins_with_it(learnt, tmp_path, monkeypatch, capsys):
    given, _ = train.parse(["--init-from", str(learnt / "run"), "--warmup-iters", "1"])
    assert {name: given[name] for name in FINE_TUNING} == FINE_TUNING
    given, _ = train.parse(["--init-from", "x", "--learning-rate", "1", "--optimizer", "muon"])
    assert (given["learning_rate"], given["optimizer"]) == (1.0, "muon")
    assert FINE_TUNING.items() <= train.parse(["--init-from", "x", "--max-iters", "3"])[0].items()
    assert train.parse(["--init-from", "x", "--preset", "speedrun"])[0]["learning_rate"] == 5e-3
    assert train.parse(["--resume", "--init-from", "x"])[0] == {"init_from": "x"}
    begun = dict(init_from=str(learnt / "run"), out_dir=str(tmp_path / "second"), data=(str(learnt / "text.txt"),))
    settings = composed(None, {**begun, "max_iters": 20, "eval_interval": 5})
    trainer = Trainer(config_of(learnt, **settings))
    losses = [event.val_loss for event in trainer.run() if hasattr(event, "val_loss")]
    assert losses == sorted(losses, reverse=True)


def test_a_beginning_that_is_worse_than_knowing_nothing_is_said(learnt, tmp_path):
    model = GPT.from_pretrained(learnt / "run")
    model.transformer.wte.weight.data[...] = model.transformer.wte.weight.data[::-1].copy()
    model.save_pretrained(tmp_path / "other")
    notices = {}
    for name, path in (("good", learnt / "run"), ("other", tmp_path / "other")):
        config = config_of(learnt, init_from=str(path), out_dir=str(tmp_path / name / "run"), max_iters=0)
        notices[name] = [e.text for e in Trainer(config).run() if isinstance(e, Notice) and "knows nothing" in e.text]
    assert notices["good"] == [] and "has the validation loss" in notices["other"][0]


def test_the_checkpoint_that_is_taken_is_named_if_it_is_not_what_one_would_think(tmp_path, capsys):
    path = tmp_path / "run"
    one = folder.RunFolder(path)

    def save(n, loss):
        one.save(n, {}, {"iter": n, "val_loss": loss}, keep=9)
        return folder.choice(path)

    assert folder.choice(tmp_path) is None
    assert save(0, 2.0) == f"the best checkpoint in {path} is of iteration 0, as the run began: it is taken"
    assert save(400, 1.0) is None
    words = f"the best checkpoint in {path} is of iteration 400, and the newest is of iteration 1,400: it is taken"
    assert save(1400, 3.0) == words
    one.close()


def test_commands_and_runs_name_the_checkpoint_that_they_take(learnt, tmp_path, capsys):
    ruined = config_of(
        learnt, init_from=str(learnt / "run"), out_dir=str(tmp_path / "ft"), data=(str(learnt / "text.txt"),),
        learning_rate=1.0, max_iters=4, warmup_iters=0, eval_interval=4,
    )  # fmt: skip
    run(ruined)
    begin = f"the best checkpoint in {tmp_path / 'ft'} is of iteration 0"
    words = f"{begin}, as the run began, and the newest is of iteration 4"
    capsys.readouterr()
    assert sample.main(["--model", str(tmp_path / "ft"), "--max-new-tokens", "1", "--prompt", "the"]) == 0
    assert capsys.readouterr().err == f"{words}: it is taken\n"
    args = ["--model", str(tmp_path / "ft"), "--max-new-tokens", "1", "--prompt", "the"]
    assert sample.main([*args, "--checkpoint", "last"]) == 0
    assert capsys.readouterr().err == ""
    third = config_of(
        learnt, init_from=str(tmp_path / "ft"), out_dir=str(tmp_path / "third"), max_iters=0, **FINE_TUNING
    )
    assert f"init_from: {words}: it is taken" in Trainer(third).notices
