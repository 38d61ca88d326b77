"""Signals that mean "end": a run is saved, whatever sends them, however often, and those that are ignored stay so."""

import contextlib
import errno
import os
import signal
import subprocess
import sys

import pytest
from runs import ROOT, TEXT

from npgpt.command import say
from npgpt.files import folder
from npgpt.signals import ASKED, SIGNALS, TOLD, catch_signals

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs signals")


@contextlib.contextmanager
def handlers_kept():
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGCONT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", TOLD, ids=lambda number: number.name)
def test_whatever_means_end_is_noted_and_comes_again_without_harm(number):
    with handlers_kept():
        signal.signal(number, signal.SIG_DFL)
        stop = catch_signals()
        for _ in range(3):
            signal.raise_signal(number)
        assert stop.number == number


def test_a_terminal_that_closes_after_the_run_was_told_to_end_does_not_end_it_at_once():
    with handlers_kept():
        stop = catch_signals()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        assert stop.number == signal.SIGTERM


def test_what_was_ignored_stays_ignored_but_not_what_a_person_asks_for():
    with handlers_kept():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        stop = catch_signals()
        for number in TOLD:
            signal.raise_signal(number)
        assert stop.number is None
        for number in ASKED:
            assert signal.getsignal(number) not in (signal.SIG_IGN, signal.SIG_DFL)


@pytest.mark.parametrize("ignored", [False, True], ids=["", "nohup"])
def test_a_run_is_saved_when_its_terminal_closes_and_goes_on_under_nohup(tmp_path, ignored):
    (tmp_path / "text.txt").write_text(TEXT)
    args = (
        "--n-layer 1 --n-head 1 --n-embd 16 --block-size 16 --batch-size 4 --max-iters 100000 --eval-interval 100000 "
        "--eval-iters 1 --sample-tokens 0 --final-sample-tokens 0 --workers 1 --log-interval 1 --warmup-iters 0"
    ).split()
    process = subprocess.Popen(
        [sys.executable, "-m", "npgpt.train", "--data", tmp_path / "text.txt", "--out-dir", tmp_path / "run", *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL),
        env={**os.environ, "PYTHONPATH": str(ROOT), "NPGPT_KERNELS": "numpy", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    while "| loss" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    if ignored:
        for _ in range(20):
            assert "| loss" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == (143 if ignored else 129)
    assert "stopped at iteration" in err and err.count("\n") == 1
    assert folder.load(folder.newest(tmp_path / "run"))[1]["iter"] >= (20 if ignored else 1)


def test_a_terminal_that_is_gone_does_not_end_a_training():
    class Gone:
        def write(self, text):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        flush = None

    say("iter 1", file=Gone())
