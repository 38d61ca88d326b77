"""Run folders as people treat them: checkpoints copied, renamed and linked, files of theirs beside them, odd disks."""

import errno
import json
import math
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import TEXT, metrics, run, variant
from test_resume import RUINED, StopAt, log

from npgpt.config import TrainConfig
from npgpt.data.text import Corpus
from npgpt.errors import BusyError, CheckpointError, DivergedError, StoppedError, UsageError
from npgpt.files import checkpoint, folder
from npgpt.run.divergence import diverged
from npgpt.run.events import Evaluation, Notice, Progress
from npgpt.run.trainer import Trainer
from npgpt.train import describe


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return TrainConfig(
        data=(str(tmp_path / "text.txt"),), out_dir=str(tmp_path / "run"), n_layer=1, n_head=2, n_embd=16, block_size=8,
        batch_size=4, max_iters=8, eval_interval=4, eval_iters=2, log_interval=3, warmup_iters=2, workers=1,
        blas_threads=1, learning_rate=1e-2, keep=100,
    )  # fmt: skip


def names(path, pattern="*"):
    return sorted(p.name for p in Path(path).glob(pattern))


def stopped(trainer, looks=0):
    """A run that is told to stop when it has looked for that so often; its events until then."""
    events = []
    with pytest.raises(StoppedError):
        events.extend(trainer.run(StopAt(looks)))
    return events


def texts(events):
    return [event.text for event in events if isinstance(event, Notice)]


# ---- what is in the folder already


def test_files_that_no_run_has_made_are_kept_whatever_they_are_named(config):
    path = Path(config.out_dir)
    path.mkdir()
    mine = {
        "tokens-mine.bin": b"mine", "iter-mine.safetensors.tmp": b"mine", "tokens-old.tmp": b"mine",
        "metrics.jsonl.bak": b"mine",
    }  # fmt: skip
    for name, content in mine.items():
        (path / name).write_bytes(content)
    run(config)
    run(config, overwrite=True)
    assert {name: (path / name).read_bytes() for name in mine} == mine


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_log_without_a_checkpoint_is_set_aside(config, overwrite):
    path = Path(config.out_dir)
    path.mkdir()
    (path / "metrics.jsonl").write_text('{"mine": 1}\n')
    run(config, overwrite=overwrite)
    assert (path / "metrics.jsonl.set-aside").read_text() == '{"mine": 1}\n' and len(metrics(config)) == 9


def test_a_lock_that_is_no_lock_is_refused_and_left_as_it_is(config):
    path = Path(config.out_dir)
    path.mkdir()
    (path / "lock").write_text("the lock of my bicycle: 1234")
    with pytest.raises(CheckpointError, match=r"lock is not the lock of a training; choose another --out-dir$"):
        run(config)
    assert (path / "lock").read_text() == "the lock of my bicycle: 1234"
    (path / "lock").write_text("")  # that of a process which was killed before it could write
    run(config)
    assert (path / "lock").read_text().startswith("process ") and run(config, overwrite=True)


# ---- checkpoints under other names


@pytest.mark.parametrize("how", ["a copy", "a link", "set aside", "another number"])
def test_what_a_run_goes_on_from_lies_under_its_own_name_before_others_go(config, how):
    run(config)
    path = Path(config.out_dir)
    own, later = path / "iter-00000004.safetensors", path / "iter-00000008.safetensors"
    if how == "a copy":
        named = path / "mine.safetensors"
        shutil.copyfile(own, named)
    elif how == "a link":
        named = path / "latest.safetensors"
        named.symlink_to(own.name)
    elif how == "set aside":
        named = path / "iter-00000004.safetensors.set-aside"
        own.rename(named)
    else:
        named = path / "iter-00000999.safetensors"
        own.rename(named)
    expected, wpe = named.read_bytes(), folder.load(named)[0]["transformer.wpe.weight"].tobytes()
    trainer = Trainer.resume(named)
    trainer.saving.open()  # and is killed right then
    trainer.saving.folder.close()
    assert folder.newest(path) == own
    arrays, state = folder.load(own)
    assert state["iter"] == 4 and wpe == arrays["transformer.wpe.weight"].tobytes()
    assert (path / f"{later.name}.set-aside").exists() and not later.exists()
    if how in ("a link", "a copy"):
        assert named.read_bytes() == expected
    assert Trainer.resume(path).iter == 4


def test_another_checkpoint_of_the_same_iteration_is_set_aside_and_the_one_that_is_named_is_taken(config):
    run(config)
    path = Path(config.out_dir)
    own, mine = path / "iter-00000004.safetensors", path / "mine.safetensors"
    shutil.copyfile(own, mine)
    arrays, state = folder.load(own)
    arrays["transformer.wpe.weight"] += 1
    checkpoint.save(own, arrays, {"npgpt": json.dumps(state)})
    other = own.read_bytes()
    stopped(Trainer.resume(mine))
    assert (path / "iter-00000004.safetensors.set-aside").read_bytes() == other
    found, _ = folder.load(own)
    assert np.array_equal(found["transformer.wpe.weight"] + 1, arrays["transformer.wpe.weight"])


def test_nothing_goes_if_the_checkpoint_cannot_be_written_under_its_own_name(config, monkeypatch):
    run(config)
    path = Path(config.out_dir)
    (path / "iter-00000004.safetensors").rename(path / "mine.safetensors")
    before = {p.name: p.read_bytes() for p in path.iterdir() if p.name != "lock"}

    def full(path, parts, check=None):
        raise CheckpointError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr(checkpoint, "replace", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*iter-00000004.*left on device; nothing was changed$"):
        list(Trainer.resume(path / "mine.safetensors").run())
    assert {p.name: p.read_bytes() for p in path.iterdir() if p.name != "lock"} == before


# ---- what was agreed on


def test_changed_settings_are_on_the_disk_before_the_first_update(config):
    run(config)
    stopped(Trainer.resume(config.out_dir, {"max_iters": 20, "learning_rate": 1e-6}))  # killed before it
    again = Trainer.resume(config.out_dir)
    assert (again.config.max_iters, again.config.learning_rate, again.iter) == (20, 1e-6, 8)
    assert texts(stopped(again)) == []
    changed = [row for row in metrics(config) if "changed" in row]
    assert changed == [{"iter": 8, "changed": {"max_iters": [8, 20], "learning_rate": [1e-2, 1e-6]}}]
    stopped(Trainer.resume(config.out_dir, {"max_iters": 10}))
    list(Trainer.resume(config.out_dir).run())
    rows = metrics(config)
    assert [row for row in rows if "changed" in row] == [
        {"iter": 8, "changed": {"max_iters": [8, 10], "learning_rate": [1e-2, 1e-6]}}
    ]
    assert rows[-1]["iter"] == 10 and rows[-2]["lr"] <= 1e-6
    later = Trainer.resume(config.out_dir, {"max_iters": 12})
    stopped(later)
    assert [row["iter"] for row in metrics(config) if "changed" in row] == [8, 10]


def test_a_checkpoint_that_is_written_anew_keeps_its_loss_and_its_kind(config):
    run(config)
    before = folder.load(folder.newest(config.out_dir))[1]
    stopped(Trainer.resume(config.out_dir, {"max_iters": 20}))
    after = folder.load(folder.newest(config.out_dir))[1]
    kept = ("iter", "val_loss", "by_clock", "best_loss", "best_iter", "elapsed_s", "optimizer_step", "since_best")
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


# ---- which one is the best


def saved_states(path, *losses):
    """A folder of checkpoints with these losses, the first of iteration 0."""
    one = folder.RunFolder(path)
    for n, loss in enumerate(losses):
        one.save(n, {}, {"iter": n, "val_loss": loss, "by_clock": False}, keep=100)
    one.close()
    return path


@pytest.mark.parametrize(
    "losses, best",
    [((4.7, None), 1), ((4.7, 2.0, None), 2), ((4.7, 2.0, 3.0, None), 1), ((4.7, None, 2.0), 2), ((None,), 0)],
)
def test_the_newest_checkpoint_is_the_best_as_long_as_evaluations_got_better(tmp_path, losses, best):
    path = saved_states(tmp_path / "run", *losses)
    assert folder.best(path).name == f"iter-{best:08d}.safetensors"


def test_a_run_that_was_stopped_long_after_its_first_evaluation_is_used_as_it_is(config):
    trainer = Trainer(variant(config, eval_interval=1000))
    for event in (events := trainer.run()):
        if isinstance(event, Progress) and event.iter == 6:
            events.close()
    assert folder.load(folder.best(config.out_dir))[1]["iter"] == 7


def test_the_best_that_a_run_names_is_one_that_is_there(config, tmp_path):
    config = variant(config, max_iters=16, **RUINED)
    trainer, _ = run(config)
    assert trainer.best_iter == 8
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(Path(config.out_dir) / "iter-00000016.safetensors", alone / "any.safetensors")
    for named in (alone / "any.safetensors", alone):
        again = Trainer.resume(named, {"max_iters": 18})
        list(again.run())
        state = folder.load(folder.best(alone))[1]
        assert (again.best_iter, again.best_loss) == (state["iter"], state["val_loss"]) and again.best_iter in (16, 18)


def test_the_best_that_could_not_be_saved_is_not_named_at_the_end(config, monkeypatch):
    config = variant(config, max_iters=16, **RUINED)
    trainer, save = Trainer(config), checkpoint.save

    def full_at_8(path, arrays, metadata):
        if trainer.iter == 8:
            raise CheckpointError(f"cannot write {path}: No space left on device")
        save(path, arrays, metadata)

    monkeypatch.setattr(checkpoint, "save", full_at_8)
    list(trainer.run())
    state = folder.load(folder.best(config.out_dir))[1]
    assert (trainer.best_iter, trainer.best_loss) == (state["iter"], state["val_loss"]) and trainer.best_iter == 4


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
def test_a_checkpoint_that_cannot_be_read_now_is_not_removed(tmp_path, monkeypatch, number):
    path = saved_states(tmp_path / "run", 1.0, 2.0, 3.0)

    def failing(path, mode):
        if path.name == "iter-00000000.safetensors":
            raise OSError(number, os.strerror(number))
        return open(path, mode)

    monkeypatch.setattr(checkpoint, "open", failing, raising=False)
    one = folder.RunFolder(path)
    one.save(3, {}, {"iter": 3, "val_loss": 4.0}, keep=1)
    one.close()
    monkeypatch.undo()
    assert names(path, "iter-*") == [f"iter-{n:08d}.safetensors" for n in (0, 1, 3)]
    assert folder.best(path).name == "iter-00000000.safetensors"


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(config, monkeypatch):
    run(config)
    before = names(config.out_dir)

    def failing(path):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Path, "iterdir", failing)
    with pytest.raises(CheckpointError, match=r"cannot read the folder .*run: Too many open files"):
        Trainer(config)
    monkeypatch.undo()
    assert names(config.out_dir) == before


# ---- patience, divergence


def test_patience_counts_evaluations_whatever_their_interval_was(config):
    config = variant(config, learning_rate=0.0, max_iters=1000, eval_interval=20)
    events = Trainer(config).run()
    while not (isinstance(event := next(events), Evaluation) and event.iter == 40):
        pass
    events.close()
    again = Trainer.resume(config.out_dir, {"eval_interval": 5, "patience": 4})
    found = [event for event in again.run() if isinstance(event, Evaluation)]
    assert [event.iter for event in found] == [40, 45, 50], "two were made before"


def test_a_validation_loss_that_is_not_finite_costs_no_updates(config):
    trainer = Trainer(variant(config, eval_interval=6))
    for event in (events := trainer.run()):
        if isinstance(event, Progress) and event.iter == 3:
            break
    trainer.parallel.loss = lambda *batch: (math.inf, 1)
    with pytest.raises(DivergedError, match=r"the validation loss is inf at iteration 6; the last good.*iter-00000006"):
        list(events)
    _, state = folder.load(folder.newest(config.out_dir))
    assert state["iter"] == 6 and state["val_loss"] is None


@pytest.mark.parametrize(
    "changes, flag",
    [
        ({"muon_learning_rate": 1e12}, "--muon-learning-rate"),
        ({"learning_rate": 1e12}, "--learning-rate"),
        ({"learning_rate": 1e12, "muon_learning_rate": 1e13, "optimizer": "adamw"}, "--learning-rate"),
        ({"min_lr": 1e12}, "--min-lr"),
        ({"weight_decay": 1e9}, "--weight-decay"),
    ],
)
def test_the_hint_of_a_run_that_diverges_names_the_flag_that_matters(config, changes, flag):
    assert str(diverged("the loss is nan", variant(config, **changes), 0)).endswith(f". Try a smaller {flag}")


def test_a_learning_rate_that_is_nearly_none_is_refused(config):
    with pytest.raises(UsageError, match=r"learning_rate must be 0 or at least 1e-30, got 1e-320$"):
        variant(config, learning_rate=1e-320)
    assert variant(config, learning_rate=0.0).learning_rate == 0


# ---- hints


def test_where_there_is_no_checkpoint_the_hint_names_the_one_that_is_near(config, tmp_path):
    run(config)
    cache = tmp_path / "models--gpt2" / "snapshots" / "607a30d"
    cache.mkdir(parents=True)
    (cache / "config.json").write_text("{}")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    for path, near in (
        (tmp_path / "models--gpt2", cache), (tmp_path / "models--gpt2" / "snapshots", cache),
        (tmp_path, tmp_path / "models--gpt2" / "snapshots"), (Path(config.out_dir).parent, None),
    ):  # fmt: skip
        with pytest.raises(CheckpointError) as error:
            folder.newest(path)
        assert "makes one" not in str(error.value)
        if near is not None and path != tmp_path:
            assert str(error.value) == f"there is no checkpoint in {path}; but there is a model in {near}: name that"
    shutil.rmtree(tmp_path / "models--gpt2")
    with pytest.raises(CheckpointError, match=r"; but there is a model in .*run: name that$"):
        folder.newest(tmp_path)
    with pytest.raises(CheckpointError, match=r": it holds neither iter-\*\.safetensors, as a run does, nor config"):
        folder.newest(tmp_path / "texts")
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"; python -m npgpt\.train --out-dir .* makes one$"):
            folder.newest(path)


# ---- odd disks


@pytest.mark.skipif(os.name == "nt", reason="locks are others there")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_that_cannot_lock_is_said_and_the_run_goes_on(config, monkeypatch, number):
    import fcntl

    def cannot(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", cannot)
    _, events = run(config)
    (text,) = texts(events)
    assert "cannot lock a file" in text and "no other training writes there" in text


@pytest.mark.skipif(os.name == "nt", reason="locks are others there")
def test_a_lock_that_cannot_be_had_for_another_reason_is_not_said_to_be_another_process(config, monkeypatch):
    import fcntl

    for number, kind, words in (
        (errno.EIO, CheckpointError, r"cannot lock .*lock: "), (errno.EAGAIN, BusyError, "in use by another process"),
    ):  # fmt: skip

        def broken(*args, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", broken)
        with pytest.raises(kind, match=words):
            folder.RunFolder(config.out_dir)


@pytest.mark.skipif(os.name == "nt", reason="folders cannot be flushed there")
def test_a_file_system_that_cannot_flush_loses_nothing(config, monkeypatch):
    def cannot(file):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", cannot)
    trainer, events = run(variant(config, keep=1))
    assert texts(events) == [] and trainer.saving.unsaved is None
    assert len(folder.checkpoints(config.out_dir)) <= 2


def test_a_file_system_that_cannot_map_files_is_read_instead(config, monkeypatch, tmp_path):
    whole, _ = run(variant(config, out_dir=str(tmp_path / "whole")))

    def cannot(*args, **options):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    class CannotMap(mmap.mmap):
        __new__ = cannot

    monkeypatch.setattr(np, "memmap", cannot)
    monkeypatch.setattr(mmap, "mmap", CannotMap)
    run(variant(config, max_iters=4, lr_decay_iters=8))
    again = Trainer.resume(config.out_dir, {"max_iters": 8})
    list(again.run())
    assert again.parallel.flat.weights.tobytes() == whole.parallel.flat.weights.tobytes()


# ---- files that change while they are mapped

CHANGED = """
import json, sys
from pathlib import Path
import numpy as np
from npgpt.config import TrainConfig
from npgpt.errors import UsageError
from npgpt.run.trainer import Trainer
from npgpt.run.events import Progress

config, name, how = TrainConfig(**json.loads(sys.argv[1])), sys.argv[2], sys.argv[3]
trainer = Trainer(config)
(path,) = Path(name).parent.glob(Path(name).name)
try:
    for event in trainer.run():
        if isinstance(event, Progress) and event.iter == 5:
            if how == "shorter":
                path.open("wb").close()
            elif how == "same":
                path.write_bytes(bytes(path.stat().st_size))
            elif how == "touched":
                path.touch()
            else:
                other = path.with_name("other")
                other.write_bytes(b"12")
                other.replace(path)
    print("to the end")
except UsageError as error:
    print(error)
"""


@pytest.mark.skipif(os.name == "nt", reason="a file that is mapped cannot be changed there")
@pytest.mark.parametrize("kind", ["text", "tokens"])
@pytest.mark.parametrize("how", ["shorter", "same", "touched", "replaced"])
def test_a_file_of_tokens_that_changes_while_it_is_mapped_ends_the_run_with_a_checkpoint(config, tmp_path, kind, how):
    changed = str(Path(config.out_dir) / "tokens-*.bin")
    if kind == "tokens":
        (tmp_path / "tokens").mkdir()
        for name, n in (("train.bin", 5000), ("val.bin", 5000)):
            (np.arange(n) % 250).astype("<u2").tofile(tmp_path / "tokens" / name)
        config = variant(config, data=(str(tmp_path / "tokens"),), tokenizer="byte")
        changed = str(tmp_path / "tokens" / "train.bin")
    config = variant(config, eval_interval=1000, max_iters=12, log_interval=1)
    done = subprocess.run(
        [sys.executable, "-c", CHANGED, json.dumps(vars(config)), changed, how], capture_output=True, text=True,
        env={**os.environ, "NPGPT_KERNELS": "numpy", "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    if how in ("touched", "replaced"):
        assert done.stdout == "to the end\n"
        return
    assert "was changed while the run read it; stopped at iteration 6; the checkpoint is of iteration 6" in done.stdout
    assert done.stdout.startswith("data: ") and done.stdout.count("\n") == 1
    assert folder.load(folder.newest(config.out_dir))[1]["iter"] == 6
    if kind == "text":
        again = Trainer.resume(config.out_dir)  # which encodes the text once more
        list(again.run())
        assert again.iter == 12 and len(log(config).splitlines()) == 13


# ---- what is said before hours are spent


def test_what_to_know_of_the_data_stands_below_the_line_data(config, tmp_path):
    (tmp_path / "a.jsonl").write_text(TEXT)
    (tmp_path / "z.txt").write_text("Быть или не быть.\n" * 10, encoding="utf-8")
    trainer = Trainer(variant(config, data=(str(tmp_path / "a.jsonl"), str(tmp_path / "z.txt"))))
    lines = [line for line in describe(trainer).splitlines() if line.startswith("        | ")]
    assert any(f"{tmp_path / 'a.jsonl'} is JSON lines, and is learnt as it stands" in line for line in lines)
    assert any("of the held-back text are characters that the text before it has hardly or never" in x for x in lines)


def test_a_run_goes_on_with_its_files_in_the_order_in_which_it_was_begun(config, tmp_path):
    (tmp_path / "d").mkdir()
    for n in (2, 10):
        (tmp_path / "d" / f"{n}.txt").write_text(f"{n}\n{TEXT}")
    config = variant(config, data=(str(tmp_path / "d"),))
    run(config)
    arrays, state = folder.load(folder.newest(config.out_dir))
    assert state["numbered"]
    del state["numbered"]  # as earlier versions wrote it
    state["data_sha256"] = Corpus(config.data, numbered=False).fingerprint
    checkpoint.save(folder.newest(config.out_dir), arrays, {"npgpt": json.dumps(state)})
    again = Trainer.resume(config.out_dir, {"max_iters": 10})
    list(again.run())
    assert not folder.load(folder.newest(config.out_dir))[1]["numbered"]
    assert Trainer.resume(config.out_dir).iter == 10
