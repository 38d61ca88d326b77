"""Saves by the clock: a run is saved between its evaluations as well, and what goes on from there has the same bits."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
from runs import TEXT, variant
from test_resume import StopAt, outcome

from npgpt.config import TrainConfig
from npgpt.errors import CheckpointError, StoppedError
from npgpt.files import checkpoint, folder
from npgpt.run import state
from npgpt.run.events import Notice, Progress
from npgpt.run.trainer import Trainer
from npgpt.signals import NEVER, Stop

SECONDS = 0.5  # that an update takes, as the made-up clock shows it; it is looked at just before an update is made


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return TrainConfig(
        data=(str(tmp_path / "text.txt"),), out_dir=str(tmp_path / "run"), n_layer=1, n_head=2, n_embd=16, block_size=8,
        batch_size=4, max_iters=23, eval_interval=10, eval_iters=2, log_interval=1, warmup_iters=2, workers=2,
        blas_threads=1, learning_rate=1e-2, dropout=0.1, keep=1, save_minutes=3 * SECONDS / 60,
    )  # fmt: skip


@pytest.fixture
def made_up_clock(monkeypatch):
    """Iterates over a run's events, on a clock that shows SECONDS for each update, and `extra` for each save."""

    def run(one, extra=0.0, stop=NEVER):
        late, save = [0.0], checkpoint.save

        def slow_save(*args):
            late[0] += extra
            save(*args)

        monkeypatch.setattr(state, "clock", lambda: one.iter * SECONDS + late[0])
        monkeypatch.setattr(checkpoint, "save", slow_save)
        yield from one.run(stop)

    return run


def saved(path):
    """The iterations of a folder's checkpoints: those that count, and those made by the clock."""
    kinds = {False: [], True: []}
    for found in reversed(folder.checkpoints(path)):
        _, state = folder.load(found)
        kinds[state["by_clock"]].append(state["iter"])
    return kinds[False], kinds[True]


def test_what_was_killed_anywhere_goes_on_from_the_clocks_save_to_the_same_bytes(config, made_up_clock, tmp_path):
    plain = Trainer(variant(config, out_dir=str(tmp_path / "plain"), save_minutes=0.0))
    list(made_up_clock(plain))
    whole, copies = Trainer(config), {}
    for event in made_up_clock(whole):
        if isinstance(event, Progress):  # what a kill would leave now
            copies[whole.iter] = tmp_path / f"copy-{whole.iter}"
            shutil.copytree(config.out_dir, copies[whole.iter])
    assert outcome(whole) == outcome(plain), "a save changes nothing"
    assert len(copies) == config.max_iters
    lost = []
    for iteration, copy in copies.items():
        again = Trainer.resume(copy)
        lost.append(iteration - again.iter)
        list(made_up_clock(again))
        assert outcome(again) == outcome(whole)
        assert (again.best_loss, again.best_iter) == (whole.best_loss, whole.best_iter)
    assert max(lost) == 4, "the updates of three times SECONDS, and the one after which the save comes"


def test_the_clock_replaces_its_own_save_and_no_other(config, made_up_clock):
    one, seen = Trainer(config), []
    for event in made_up_clock(one):
        if isinstance(event, Progress):
            seen.append((event.iter, saved(config.out_dir)))
    # an event comes before the save of its update; evaluations are at 0, 10, 20; --keep 1 keeps the newest and the best
    by_clock = {iteration: kinds[1] for iteration, kinds in seen}
    expected = [[]] * 4 + [[4]] * 4 + [[8]] * 2 + [[]] * 4 + [[14]] * 4 + [[18]] * 2 + [[]] * 3
    assert by_clock == dict(enumerate(expected))
    counted = [kinds[0] for _, kinds in seen]
    assert counted[:10] == [[0]] * 10
    best = {one.best_iter}
    assert set(counted[10]) == {10} | best & {0} and set(counted[20]) == {20} | best & {0, 10}
    assert set(saved(config.out_dir)[0]) == {23} | best and saved(config.out_dir)[1] == []


def test_without_minutes_the_clock_saves_nothing(config, made_up_clock):
    one = Trainer(variant(config, save_minutes=0.0))
    for event in made_up_clock(one):
        if isinstance(event, Progress):
            assert saved(config.out_dir)[1] == []
    assert one.saving.next_save == math.inf


def test_a_save_that_takes_long_comes_less_often_and_it_is_said_once(config, made_up_clock):
    config = variant(config, max_iters=60, eval_interval=1000)
    saves, texts = [], []
    one = Trainer(config)
    for event in made_up_clock(one, extra=1 / 16):
        if isinstance(event, Notice):
            texts.append(event.text)
        elif isinstance(event, Progress):
            saves += [i for i in saved(config.out_dir)[1] if i not in saves]
    assert saves == [14, 28, 42, 56], "a sixteenth of a second is 1 % of 12.5 updates"
    assert texts == [
        "a save takes 0.0625 s: between evaluations one comes every 0.104 minutes, not every 0.025, so that saves take "
        "no more than 1% of the time"
    ]


def test_a_save_that_fails_is_tried_again_and_costs_nothing(config, made_up_clock, monkeypatch):
    one, replace, texts, failing = Trainer(config), checkpoint.replace, [], [8]

    def broken(path, *args):
        if one.iter in failing:
            raise CheckpointError(f"cannot write {path}: No space left on device")
        replace(path, *args)

    monkeypatch.setattr(checkpoint, "replace", broken)
    for event in made_up_clock(one):
        if isinstance(event, Notice):
            texts.append(event.text)
            assert saved(config.out_dir) == ([0], [4]), "what was there stays"
        elif isinstance(event, Progress) and event.iter == 16:
            assert saved(config.out_dir)[1] == [14]
    assert len(texts) == 1 and texts[0].endswith("; the training goes on, and tries again at the next save")
    assert one.saving.unsaved is None


def test_a_clocks_save_is_what_a_run_that_is_stopped_there_goes_on_from(config, made_up_clock):
    one, stop = Trainer(config), Stop()
    with pytest.raises(StoppedError, match="stopped at iteration 4"):
        for event in made_up_clock(one, stop=stop):
            if isinstance(event, Progress) and event.iter == 3:
                stop.number = 15
    assert saved(config.out_dir) == ([0], [4]), "there was a save already where it was stopped"
    again = Trainer.resume(config.out_dir)
    with pytest.raises(StoppedError):
        list(made_up_clock(again, stop=StopAt(0)))
    assert again.iter == 4


def test_the_log_is_on_the_disk_before_the_checkpoint_that_needs_its_rows(config, made_up_clock, monkeypatch):
    one, rows = Trainer(config), []

    def fsync(file):
        if os.path.samestat(os.fstat(file), os.stat(Path(config.out_dir) / "metrics.jsonl")):
            rows.append(len((Path(config.out_dir) / "metrics.jsonl").read_bytes().splitlines()))
        else:
            rows.append("another")

    monkeypatch.setattr(os, "fsync", fsync)
    list(made_up_clock(one))
    assert [n for n in rows if n != "another"] == [0, 4, 8, 10, 14, 18, 20, 23]
    assert all(rows[i + 1] == "another" for i, n in enumerate(rows) if n != "another")


def test_a_log_that_cannot_be_written_through_fails_the_save_and_nothing_is_removed(tmp_path, monkeypatch):
    run = folder.RunFolder(tmp_path)
    run.open_log(0)
    states = [{"iter": n, "val_loss": 1.0, "by_clock": n == 2} for n in range(3)]
    for n in (1, 2):
        run.save(n, {}, states[n], keep=1)

    def broken(file):
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(CheckpointError, match=r"cannot write .*metrics\.jsonl: "):
        run.save(3, {}, states[1], keep=1)
    run.close()
    assert [path.name for path in folder.checkpoints(tmp_path)] == [f"iter-{n:08d}.safetensors" for n in (2, 1)]


def test_the_clocks_save_is_never_the_best(tmp_path):
    run = folder.RunFolder(tmp_path)
    for n, said in enumerate([{"val_loss": 2.0}, {"val_loss": 3.0}, {"val_loss": None, "by_clock": True}]):
        run.save(n, {}, said, keep=1)
    run.close()
    assert folder.best(tmp_path).name == "iter-00000000.safetensors"
    assert folder.newest(tmp_path).name == "iter-00000002.safetensors"
    assert len(folder.checkpoints(tmp_path)) == 3


def test_a_checkpoint_that_does_not_say_was_not_made_by_the_clock(config, made_up_clock):
    """So it is with those of earlier versions."""
    list(made_up_clock(Trainer(config)))
    path = folder.newest(config.out_dir)
    arrays, state = folder.load(path)
    del state["by_clock"]
    del state["train"]["save_minutes"]
    checkpoint.save(path, arrays, {"npgpt": json.dumps(state)})
    again = Trainer.resume(config.out_dir, {"max_iters": 27})
    assert again.config.save_minutes == TrainConfig.save_minutes
    list(made_up_clock(again))
    assert set(saved(config.out_dir)[0]) == {27, again.best_iter}
