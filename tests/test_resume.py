"""A run that was interrupted and resumed ends as if nobody had disturbed it, to the last bit of weights and log."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from runs import TEXT, variant

from npgpt.config import TrainConfig
from npgpt.data.bpe import BPETokenizer
from npgpt.errors import BusyError, CheckpointError, DivergedError, StoppedError, UsageError
from npgpt.files import checkpoint, folder
from npgpt.run import setup, state
from npgpt.run.events import Evaluation, Notice, Progress
from npgpt.run.trainer import Trainer
from npgpt.signals import NEVER, Stop

END, INTERVAL = 17, 4
# The model learns until iteration 8.  Then the rate leaps to 3, which ruins it, on every processor.
RUINED = dict(optimizer="adamw", learning_rate=0.02, warmup_iters=8, lr_decay_iters=8, min_lr=3.0)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return TrainConfig(
        data=(str(tmp_path / "text.txt"),), out_dir=str(tmp_path / "run"), n_layer=1, n_head=2, n_embd=16, block_size=8,
        batch_size=4, max_iters=END, eval_interval=INTERVAL, eval_iters=2, log_interval=3, warmup_iters=2, workers=2,
        blas_threads=1, learning_rate=1e-2, keep=100,
    )  # fmt: skip


@pytest.fixture
def made_up_clock(monkeypatch):
    """A clock that shows half a second for each update: then the log's times repeat themselves as well."""
    running = []
    monkeypatch.setattr(state, "clock", lambda: running[-1].iter * 0.5 if running else 0.0)

    def run(one, stop=NEVER):
        running.append(one)
        return list(one.run(stop))

    return run


def log(config):
    return (Path(config.out_dir) / "metrics.jsonl").read_bytes()


def outcome(one):
    return one.parallel.flat.weights.tobytes(), one.optimizer.m.tobytes(), one.optimizer.v.tobytes(), log(one.config)


class StopAt:
    """Asks to stop when the trainer has looked at it n times."""

    def __init__(self, n):
        self.n, self.looks = n, 0

    @property
    def number(self):
        self.looks += 1
        return 15 if self.looks > self.n else None


VARIANTS = [
    {}, {"dropout": 0.1}, {"gradient_accumulation_steps": 4}, {"dropout": 0.1, "gradient_accumulation_steps": 4},
    {"optimizer": "adamw", "dropout": 0.1},
]  # fmt: skip


@pytest.mark.parametrize("changes", VARIANTS)
def test_stopped_anywhere_and_resumed_it_ends_with_the_same_bytes(config, made_up_clock, tmp_path, changes):
    whole = Trainer(variant(config, **changes, out_dir=str(tmp_path / "whole")))
    watcher = StopAt(10**9)
    made_up_clock(whole, watcher)
    expected = outcome(whole)
    looks = watcher.looks
    stopped_at = set()
    points = sorted({round(i * (looks - 1) / 19) for i in range(20)})  # first and last look among them
    for n in points:
        one = Trainer(variant(config, **changes), overwrite=True)
        with pytest.raises(StoppedError) as error:
            made_up_clock(one, StopAt(n))
        assert error.value.exit_code == 143 and "--resume" in str(error.value)
        stopped_at.add(one.iter)
        again = Trainer.resume(config.out_dir)
        events = made_up_clock(again)
        assert again.resumed_from == one.iter and not any(isinstance(event, Notice) for event in events)
        assert outcome(again) == expected, f"stopped at iteration {one.iter}"
        assert (again.best_loss, again.best_iter) == (whole.best_loss, whole.best_iter)
    assert len(points) == 20 and {0, END} <= stopped_at and stopped_at & {4, 8, 12, 16}


def bpe(config, tmp_path):
    pytest.importorskip("tokenizers")
    return variant(config, tokenizer="bpe", vocab_size=270)


def bpe_file(config, tmp_path):
    pytest.importorskip("tokenizers")
    path = BPETokenizer.learn([TEXT], 265).save(tmp_path)
    return variant(config, tokenizer=str(path))


def char_file(config, tmp_path):
    (tmp_path / "characters.txt").write_text(TEXT + "0123456789", encoding="utf-8")
    return variant(config, tokenizer=str(tmp_path / "characters.txt"))


def token_folder(config, tmp_path):
    (tmp_path / "tokens").mkdir()
    tokens = np.frombuffer(TEXT.encode(), np.uint8).astype(np.uint16)
    tokens[:1500].tofile(tmp_path / "tokens" / "train.bin")
    tokens[1500:].tofile(tmp_path / "tokens" / "val.bin")
    return variant(config, data=(str(tmp_path / "tokens"),), tokenizer="byte")


@pytest.mark.parametrize("kind", [bpe, bpe_file, char_file, token_folder])
def test_whatever_the_tokens_are_a_resumed_run_ends_with_the_same_bytes(config, made_up_clock, tmp_path, kind):
    config = kind(config, tmp_path)
    whole = Trainer(variant(config, out_dir=str(tmp_path / "whole")))
    made_up_clock(whole)
    for n in (0, 9, 21):
        one = Trainer(config, overwrite=True)
        with pytest.raises(StoppedError):
            made_up_clock(one, StopAt(n))
        for path in (*Path(config.out_dir).glob("tokens-*.bin"), Path(config.tokenizer)):
            if n == 9 and path.is_file():  # neither the encoded text nor the tokenizer's file is needed
                path.rename(path.with_suffix(".moved"))
        again = Trainer.resume(config.out_dir)
        made_up_clock(again)
        assert outcome(again) == outcome(whole)
        assert again.tokenizer.to_dict() == whole.tokenizer.to_dict()
        for path in tmp_path.glob("*.moved"):
            path.rename(config.tokenizer)


def test_token_files_that_are_others_are_refused(config, tmp_path):
    config = token_folder(config, tmp_path)
    with pytest.raises(StoppedError):
        list(Trainer(config).run(StopAt(9)))
    raw = bytearray((tmp_path / "tokens" / "val.bin").read_bytes())
    raw[0] ^= 1
    (tmp_path / "tokens" / "val.bin").write_bytes(raw)
    for change in ({}, {"data": (str(tmp_path / "text.txt"),)}):
        with pytest.raises(UsageError, match=r"is not the text that the run in .* was begun with: \(sha256"):
            Trainer.resume(config.out_dir, change)


def test_resumed_from_every_checkpoint_and_twice(config, made_up_clock, tmp_path):
    whole = Trainer(variant(config, out_dir=str(tmp_path / "whole")))
    made_up_clock(whole)
    one = Trainer(config)
    made_up_clock(one)
    paths = folder.checkpoints(config.out_dir)
    assert [int(p.name[5:13]) for p in paths] == [17, 16, 12, 8, 4, 0]
    for path in paths:  # the newer ones are set aside
        again = Trainer.resume(path)
        with pytest.raises(StoppedError):
            made_up_clock(again, StopAt(3))
        again = Trainer.resume(config.out_dir)
        made_up_clock(again)
        assert outcome(again) == outcome(whole)


# what is lost -> how the checkpoint looks then; nothing may be without consequence
LOSSES = {
    "weights": lambda arrays, state: [arrays[n].fill(0) for n in arrays if not n.startswith("adamw")],
    "first moments": lambda arrays, state: [arrays[n].fill(0) for n in arrays if n.startswith("adamw.m.")],
    "second moments": lambda arrays, state: [arrays[n].fill(0) for n in arrays if n.startswith("adamw.v.")],
    "iter": lambda arrays, state: state.update(iter=0),
    "optimizer_step": lambda arrays, state: state.update(optimizer_step=0),
    "best_loss": lambda arrays, state: state.update(best_loss=None),
    "best_iter": lambda arrays, state: state.update(best_iter=0),
    "elapsed_s": lambda arrays, state: state.update(elapsed_s=0.0),
    **{
        f"no {name}": lambda arrays, state, name=name: state.pop(name)
        for name in ("iter", "optimizer_step", "skipped", "best_loss", "best_iter", "elapsed_s", "train", "tokenizer",
                     "data_sha256", "environment")
    },
    "an array": lambda arrays, state: arrays.pop("adamw.v.transformer.wpe.weight"),
}  # fmt: skip


@pytest.mark.parametrize("lost", LOSSES)
def test_whatever_is_lost_of_the_saved_state_is_noticed(config, made_up_clock, tmp_path, lost):
    config = variant(config, **RUINED, patience=2)
    whole = Trainer(variant(config, out_dir=str(tmp_path / "whole")))
    made_up_clock(whole)
    with pytest.raises(StoppedError):
        made_up_clock(Trainer(config), StopAt(30))
    path = folder.newest(config.out_dir)
    arrays, state = folder.load(path)
    assert state["best_iter"] == 8 < state["iter"] < 12 and whole.iter == 16
    LOSSES[lost](arrays, state)
    checkpoint.save(path, arrays, {"npgpt": json.dumps(state)})
    try:
        again = Trainer.resume(path)
    except (CheckpointError, UsageError):
        return
    made_up_clock(again)
    best = again.best_loss, again.best_iter
    assert (outcome(again), best) != (outcome(whole), (whole.best_loss, whole.best_iter))


def test_skipped_updates_in_a_row_are_counted_across_a_resume(config, monkeypatch):
    diverging = variant(config, learning_rate=1e30, grad_clip=0.0, warmup_iters=0, eval_interval=100, optimizer="adamw")
    one = Trainer(diverging)
    events = []
    with pytest.raises(StoppedError):
        for event in one.run(stop := Stop()):
            events.append(event)
            if one.skipped == 2:
                stop.number = 2
    assert [event.skipped for event in events if isinstance(event, Progress)].count(True) <= 2
    again = Trainer.resume(config.out_dir)
    assert again.skipped == 2 and again.optimizer.step == again.iter - 2
    with pytest.raises(DivergedError):
        list(again.run())
    assert again.skipped == 5


# ---- what may change and what may not


@pytest.fixture
def interrupted(config):
    with pytest.raises(StoppedError):
        list(Trainer(config).run(StopAt(20)))
    return config


def test_what_may_change_is_said_and_logged(interrupted):
    again = Trainer.resume(interrupted.out_dir, {"max_iters": 9, "learning_rate": 5e-3, "eval_iters": 2})
    events = list(again.run())
    texts = [event.text for event in events if isinstance(event, Notice)]
    assert len(texts) == 2 and any(text.startswith("max_iters was 17 and is 9 from iteration") for text in texts)
    rows = [json.loads(line) for line in log(interrupted).splitlines()]
    (changed,) = [row for row in rows if "changed" in row]
    assert changed == {"iter": again.resumed_from, "changed": {"max_iters": [17, 9], "learning_rate": [1e-2, 5e-3]}}
    assert rows[-1]["iter"] == 9


def test_other_surroundings_are_said(interrupted, monkeypatch):
    was = setup.blas_kernels()
    monkeypatch.setattr(setup, "blas_kernels", lambda: "Other")
    products = setup.PRODUCTS
    monkeypatch.setattr(setup, "PRODUCTS", "others")
    again = Trainer.resume(interrupted.out_dir, {"workers": 1})
    texts = [event.text for event in again.run() if isinstance(event, Notice)]
    changes = ("workers", 2, 1), ("blas_kernels", was, "Other"), ("products", products, "others")
    for name, before, now in changes:
        assert f"{name} was {before} and is {now}: the run goes on, but not with the same bits" in texts


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n_embd": 32}, "begun with n_embd = 16; it cannot go on with 32"),
        ({"block_size": 4}, "block_size = 8"),
        ({"tokenizer": "byte"}, "tokenizer = char"),
        ({"batch_size": 8}, "batch_size = 4"),
        ({"seed": 3}, "seed = 1337"),
    ],
)
def test_what_may_not_change_is_refused(interrupted, changes, words):
    with pytest.raises(UsageError, match=words):
        Trainer.resume(interrupted.out_dir, changes)


def test_another_text_is_refused(interrupted, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT + "!", encoding="utf-8")
    with pytest.raises(UsageError, match=r"not the text .* had 1,800 characters, now there are 1,801"):
        Trainer.resume(interrupted.out_dir)
    (tmp_path / "text.txt").rename(tmp_path / "moved.txt")
    (tmp_path / "moved.txt").write_text(TEXT, encoding="utf-8")
    Trainer.resume(interrupted.out_dir, {"data": (str(tmp_path / "moved.txt"),)})


def test_nothing_to_resume_and_a_damaged_newest(interrupted, tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        Trainer.resume(tmp_path / "nowhere")
    newest, before, *_ = folder.checkpoints(interrupted.out_dir)
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"cut off.*The one before it is good: .*{before.name}"):
        Trainer.resume(interrupted.out_dir)
    Trainer.resume(before)


def test_a_checkpoint_that_is_named_is_of_the_folder_that_is_named(interrupted, tmp_path):
    newest = folder.newest(interrupted.out_dir)
    with pytest.raises(UsageError, match=r"goes on with the run in .*run, and --out-dir names .*other"):
        Trainer.resume(newest, {"out_dir": str(tmp_path / "other")})
    Trainer.resume(newest, {"out_dir": os.path.relpath(interrupted.out_dir)})
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*iter-00000099\.safetensors$"):
        Trainer.resume(newest.with_name("iter-00000099.safetensors"))


def test_one_shape_flag_that_is_the_runs_own_may_be_given(interrupted):
    again = Trainer.resume(interrupted.out_dir, {"n_head": 2, "n_embd": 16})
    assert again.config == interrupted
    with pytest.raises(UsageError, match="n_embd = 16 must be divisible by n_head = 3"):
        Trainer.resume(interrupted.out_dir, {"n_head": 3})


def test_what_a_run_leaves_behind_is_set_aside_each_time(config):
    list(Trainer(config).run())
    run, logs = Path(config.out_dir), []
    for end in (12, 8):
        logs.append(log(config))
        list(Trainer.resume(run / "iter-00000004.safetensors", {"max_iters": end}).run())
    for name, iterations in ((".set-aside", [8, 12, 16, 17]), (".set-aside-2", [8, 12])):
        assert sorted(p.name for p in run.glob(f"iter-*{name}")) == [
            f"iter-{i:08d}.safetensors{name}" for i in iterations
        ]
    assert [(run / f"metrics.jsonl{name}").read_bytes() for name in (".set-aside", ".set-aside-2")] == logs


def contents(config):
    """What is in the files of a run folder; its lock says who came last."""
    return {path.name: path.read_bytes() for path in Path(config.out_dir).iterdir() if path.name != folder.LOCK}


def test_a_checkpoint_that_came_before_the_lock_is_not_set_aside(config):
    list(Trainer(config).run())
    first, second = (Trainer.resume(config.out_dir, {"max_iters": END + n}) for n in (3, 5))
    list(first.run())
    before = contents(config)
    with pytest.raises(BusyError, match="another training has just saved a checkpoint"):
        list(second.run())
    assert contents(config) == before
    list(Trainer.resume(config.out_dir, {"max_iters": END + 5}).run())


def test_a_log_that_cannot_be_set_aside_is_not_cut(config, monkeypatch):
    list(Trainer(config).run())
    run = Path(config.out_dir)
    before = contents(config)

    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder.shutil, "copyfile", full)
    with pytest.raises(CheckpointError, match=r"cannot copy .*: No space left on device; nothing was changed"):
        list(Trainer.resume(run / "iter-00000004.safetensors").run())
    assert contents(config) == before


def test_another_branchs_checkpoint_of_the_same_iteration_is_set_aside(config):
    list(Trainer(config).run())
    run = Path(config.out_dir)
    list(Trainer.resume(run / "iter-00000004.safetensors", {"learning_rate": 0.05}).run())
    branch = (run / "iter-00000008.safetensors").read_bytes()
    list(Trainer.resume(run / "iter-00000008.safetensors.set-aside").run())
    assert (run / "iter-00000008.safetensors.set-aside-2").read_bytes() == branch


@pytest.mark.parametrize("garbage", [b"garbage\n", 10**5 * b"[" + b"\n"], ids=["garbage", "deep"])
def test_a_damaged_row_of_the_log_costs_no_other(interrupted, garbage):
    path = Path(interrupted.out_dir) / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], garbage, *lines[2:]]) + b'{"iter": 1, "tr')
    again = Trainer.resume(interrupted.out_dir)
    list(again.run())
    after = path.read_bytes().splitlines(keepends=True)
    assert after[: len(lines)] == [lines[0], garbage, *lines[2:]] and len(after) > len(lines)
    assert json.loads(after[-1])["iter"] == END


# ---- the folder


def test_old_checkpoints_go_but_not_the_best_and_the_newest(config):
    one = Trainer(variant(config, **RUINED, keep=1))
    evaluations = [event for event in one.run() if isinstance(event, Evaluation)]
    losses = {event.iter: event.val_loss for event in evaluations}
    best = min(losses, key=losses.get)
    assert best == 8
    assert sorted(p.name for p in folder.checkpoints(config.out_dir)) == [
        f"iter-{i:08d}.safetensors" for i in sorted({best, END})
    ]
    assert folder.best(config.out_dir).name == f"iter-{best:08d}.safetensors"


def test_a_folder_is_for_one_training_at_a_time(config):
    first = folder.RunFolder(config.out_dir)
    with pytest.raises(BusyError, match=rf"in use by process {os.getpid()} on .*--out-dir") as error:
        list(Trainer(config).run())
    assert error.value.exit_code == 5
    first.close()
    list(Trainer(config).run())


def test_a_run_whose_folder_was_anothers_begins_when_it_is_asked_again(config):
    one, other = Trainer(config), folder.RunFolder(config.out_dir)
    with pytest.raises(BusyError):
        list(one.run())
    other.close()
    list(one.run())
    assert one.iter == END and folder.newest(config.out_dir).name == f"iter-{END:08d}.safetensors"


def test_patience_ends_a_run_that_no_longer_gets_better(config):
    one = Trainer(variant(config, patience=2, learning_rate=0.0, max_iters=1000))
    events = list(one.run())
    assert isinstance(events[-1], Notice) and "no new best in 2 evaluations" in events[-1].text
    assert one.iter == 2 * INTERVAL and events[-2].val_loss_whole is not None


def test_when_nobody_asks_for_more_the_run_is_saved(config):
    events = Trainer(config).run()
    while not (isinstance(event := next(events), Progress) and event.iter == 6):
        pass
    events.close()
    assert Trainer.resume(config.out_dir).iter == 7


# ---- the disk


class FullDisk:
    """The os module, on a disk that is full as long as `full` says so."""

    full = True

    def __getattr__(self, name):
        def write(file, part):
            raise OSError(28, os.strerror(28))

        return write if name == "write" and self.full else getattr(os, name)


def test_a_full_disk_is_said_and_tried_again(config, monkeypatch):
    one, disk = Trainer(variant(config, keep=1)), FullDisk()
    texts, saved = [], []
    for event in one.run():
        if isinstance(event, Notice):
            texts.append(event.text)
        if isinstance(event, Evaluation):
            saved.append([p.name for p in folder.checkpoints(config.out_dir)])
            monkeypatch.setattr(checkpoint, "os", disk if event.iter < 12 else os)
            monkeypatch.setattr(folder, "os", disk if event.iter < 12 else os)
    assert saved[2] == ["iter-00000000.safetensors"]  # at iteration 8: those of 4 and 8 could not be written
    assert saved[-1][0] == "iter-00000017.safetensors"
    assert any("No space left on device; the training goes on" in text for text in texts)
    rows = [json.loads(line) for line in log(config).splitlines()]
    assert [row["iter"] for row in rows] == list(range(END + 1))  # no row is lost


def test_a_disk_that_stays_full_ends_with_an_error_at_the_end(config, monkeypatch):
    one = Trainer(config)
    with pytest.raises(CheckpointError, match="No space left on device"):
        for event in one.run():
            if isinstance(event, Evaluation) and event.iter == 4:
                monkeypatch.setattr(checkpoint, "os", FullDisk())
    assert one.iter == END and folder.newest(config.out_dir).name == "iter-00000004.safetensors"


# ---- divergence


def test_five_updates_that_are_not_finite_end_the_run_and_the_first_op_is_named(config):
    one = Trainer(variant(config, grad_clip=0.0, eval_interval=100))
    events = one.run()
    while not (isinstance(event := next(events), Progress) and event.iter == 3):
        pass
    one.model.transformer.h[0].mlp.c_fc.weight.data[...] = 1e38
    before = one.parallel.flat.weights.copy(), one.optimizer.m.copy()
    words = r"first in the forward of mlp with transformer\.h\.0\.mlp\.c_fc.*iter-0"
    with pytest.raises(DivergedError, match=words) as error:
        list(events)
    assert error.value.exit_code == 4 and f"iteration {one.iter}" in str(error.value)
    assert (one.parallel.flat.weights == before[0]).all() and (one.optimizer.m == before[1]).all()
    rows = [json.loads(line) for line in log(config).splitlines()]
    assert [row.get("skipped", False) for row in rows[-4:]] == [True] * 4 and rows[-1]["train_loss"] is None


def test_weights_that_are_not_finite_are_never_saved(config):
    one = Trainer(config)
    events = one.run()
    while not (isinstance(event := next(events), Progress) and event.iter == 3):
        pass
    one.parallel.flat.weights[5] = math.inf
    with pytest.raises(DivergedError):
        list(events)
    for path in folder.checkpoints(config.out_dir):
        arrays, _ = folder.load(path)
        assert all(np.isfinite(array).all() for array in arrays.values())
