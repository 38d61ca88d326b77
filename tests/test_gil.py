"""How threads that come out of kernels wait for Python's lock, and a crew's threads for jobs."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import npgpt.kernels.crew
from npgpt.kernels import gil
from npgpt.kernels.crew import Crew
from npgpt.kernels.jit import KERNELS

if KERNELS == "numba":
    gil.spin()  # before any kernel is loaded
pytestmark = pytest.mark.skipif(KERNELS != "numba", reason="only compiled kernels give the lock away")


class Kernels(threading.Thread):
    """A thread that runs kernels of half a millisecond each, and a little Python in between."""

    def __init__(self, n):
        super().__init__(daemon=True)
        self.n, self.done, self.counter = n, 0, np.zeros(1, np.int64)
        self.start()

    def run(self):
        from npgpt.kernels.spin import look

        for _ in range(self.n):
            look(self.counter, 0, 10_000)
            self.done += 1


def test_the_note_tells_whether_a_thread_is_between_two_kernels():
    from npgpt.kernels.spin import look

    look(np.zeros(1, np.int64), 0, 1)
    assert gil.note.value == 1
    gil.rest()
    assert gil.note.value == 0
    thread, seen = Kernels(30), set()
    while thread.done == 0:
        time.sleep(1e-4)
    while thread.is_alive():
        seen.add(gil.note.value)
    assert seen == {0, 1}


def test_a_thread_looks_for_half_a_millisecond():
    from npgpt.kernels.spin import look

    counter, each = np.zeros(1, np.int64), []
    for _ in range(20):
        start = time.perf_counter()
        look(counter, 0, gil.looks.value)
        each.append(time.perf_counter() - start)
    assert 1e-4 < min(each) < 2e-3


def test_a_note_that_nobody_takes_back_holds_up_nobody_for_long():
    thread = Kernels(20)
    until = time.monotonic() + 20
    while thread.is_alive() and time.monotonic() < until:
        gil.note.value = 1
        time.sleep(1e-4)
    assert thread.done == 20
    gil.rest()


def test_threads_take_turns():
    threads = [Kernels(20) for _ in range(4)]
    for thread in threads:
        gil.rest()
        thread.join(60)
    assert [thread.done for thread in threads] == [20] * 4


def test_without_a_lock_nothing_spins_for_it(monkeypatch):
    monkeypatch.setattr(sys, "_is_gil_enabled", lambda: False, raising=False)
    assert gil.spin.__wrapped__() is None


LOADED = """
from npgpt import GPT, GPTConfig
from npgpt.generate import decode
from npgpt.kernels import cache, gil

decode.cores = decode.processors = lambda: 2
can_spin, load = [], cache._KernelCache.load_overload

def loaded(*args):
    can_spin.append(gil.spin.cache_info().currsize == 1)
    return load(*args)

cache._KernelCache.load_overload = loaded
model = GPT(GPTConfig(vocab_size=5, block_size=64, n_layer=1, n_head=1, n_embd=16))
list(model.generate([0] * 40, 2, **{options}))
assert can_spin and all(can_spin), can_spin
"""


@pytest.mark.parametrize("options", [{}, {"int8": True}, {"dtype": "bfloat16"}])
def test_threads_can_spin_before_a_generation_loads_a_kernel(options):
    # a kernel that is loaded before leaves the turn to nobody, and whoever waits for it looks in vain
    environment = {**os.environ, "NPGPT_PRODUCTS": "ours"}
    subprocess.run([sys.executable, "-c", LOADED.format(options=options)], env=environment, check=True)


@pytest.mark.parametrize("pause", [0, 0.003])
def test_jobs_that_come_at_once_and_jobs_that_come_late_are_done(pause):
    crew = Crew(1, "crew")
    for n in range(20):
        time.sleep(pause)
        assert crew.each(lambda i, n=n: (n, i), 2) == [(n, 0), (n, 1)]
    crew.close()


def test_a_crew_that_cannot_look_for_jobs_sleeps_for_them(monkeypatch):
    def fail(*_):
        raise MemoryError("no room for a kernel")

    monkeypatch.setattr(npgpt.kernels.crew, "look", fail)
    crew = Crew(1, "crew")
    for n in range(5):
        assert crew.each(lambda i, n=n: (n, i), 2) == [(n, 0), (n, 1)]
    crew.close()


def test_where_llvm_fails_nothing_spins_and_it_is_said(monkeypatch):
    def fail():
        raise RuntimeError("LLVM cannot do it")

    monkeypatch.setattr(gil, "_functions", fail)
    with pytest.warns(RuntimeWarning, match="LLVM cannot do it"):
        assert gil.spin.__wrapped__() is None
