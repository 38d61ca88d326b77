"""What this computer has, as the system tells it."""

from pathlib import Path

import numpy as np
import pytest

from npgpt import machine

needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system has no /proc")


@needs_proc
def test_what_the_process_has_grows_with_what_it_takes():
    before = machine.in_use()
    taken = np.ones(30_000_000, np.uint8)
    assert 25e6 < machine.in_use() - before < 40e6
    del taken


@needs_proc
def test_there_is_memory():
    assert machine.in_use() < machine.available() < 1e15


def test_a_limit_of_the_container_counts(monkeypatch):
    monkeypatch.setattr(machine, "_machine", lambda: 1000)
    monkeypatch.setattr(machine, "_container", lambda: iter([700, 900]))
    assert machine.available() == 700
    monkeypatch.setattr(machine, "_container", lambda: iter([]))
    assert machine.available() == 1000
    monkeypatch.setattr(machine, "_machine", lambda: None)
    assert machine.available() is None


def test_cores_is_a_positive_number():
    assert machine.cores() >= 1
