"""The memory that there is, as the system tells it; the estimate itself is measured by tests/endurance.py."""

from pathlib import Path

import numpy as np
import pytest

from npgpt import memory
from npgpt.config import TrainConfig

needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system has no /proc")


@needs_proc
def test_what_the_process_has_grows_with_what_it_takes():
    before = memory.in_use()
    taken = np.ones(30_000_000, np.uint8)
    assert 25e6 < memory.in_use() - before < 40e6
    del taken


@needs_proc
def test_there_is_memory():
    assert memory.in_use() < memory.available() < 1e15


def test_every_part_grows_with_what_it_depends_on():
    def parts(vocab_size=100, n_tokens=1000, workers=2, **changes):
        return memory.parts(TrainConfig(**changes), vocab_size, n_tokens, workers)

    base = parts()
    assert all(size > 0 for size in base.values())
    for bigger, grown in (
        (parts(n_layer=8), {"weights", "gradients", "optimizer", "activations"}),
        (parts(vocab_size=10_000), {"weights", "gradients", "optimizer", "activations"}),
        (parts(workers=3), {"gradients", "optimizer", "activations"}),
        (parts(batch_size=24), {"activations"}),
        (parts(dropout=0.1), {"activations"}),
        (parts(n_tokens=10**6), {"text"}),
    ):
        for words, size in bigger.items():
            expected = any(word in words for word in grown)
            assert (size > base[words]) == expected, words


def test_a_token_takes_as_many_bytes_as_its_vocabulary_asks_for():
    for vocab_size, size in ((100, 2), (2**16, 2), (2**16 + 1, 4)):
        assert memory.parts(TrainConfig(), vocab_size, 1000, 1)[memory.MAPPED] == size * 1000


def test_a_limit_of_the_container_counts(monkeypatch):
    monkeypatch.setattr(memory, "_machine", lambda: 1000)
    monkeypatch.setattr(memory, "_container", lambda: iter([700, 900]))
    assert memory.available() == 700
    monkeypatch.setattr(memory, "_container", lambda: iter([]))
    assert memory.available() == 1000
    monkeypatch.setattr(memory, "_machine", lambda: None)
    assert memory.available() is None
