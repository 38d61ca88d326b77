"""Threads that can be called off: whatever moment an interrupt chooses, none works on behind the caller's back."""

import _thread
import subprocess
import sys
import threading
import time

import pytest

from npgpt.kernels.crew import Crew


@pytest.fixture
def crew():
    crew = Crew(2, "crew")
    yield crew
    crew.close()


def begins_late(monkeypatch):
    """From now on threads begin late, and Ctrl-C comes when they have been asked to.

    Returns a list, in which they will be.
    """
    late = []

    def interrupted(begin, args):
        pool, name = args
        late.append(threading.Thread(target=lambda: (time.sleep(0.05), pool.serve()), name=name))
        late[-1].start()
        raise KeyboardInterrupt

    monkeypatch.setattr(_thread, "start_new_thread", interrupted)
    return late


class Busy:
    """Work for a number of threads: the first two calls of each wait until all of them have come.

    most  how many were busy at a time; met: the thread of each call
    """

    def __init__(self, threads):
        self.all_here, self.lock = threading.Barrier(threads, timeout=10), threading.Lock()
        self.busy, self.most, self.met = 0, 0, []

    def __call__(self, number):
        me = threading.current_thread()
        with self.lock:
            self.busy += 1
            self.most = max(self.most, self.busy)
            self.met.append(me)
        if self.met.count(me) <= 2:
            self.all_here.wait()
        time.sleep(0.001)
        with self.lock:
            self.busy -= 1
        return number


def test_work_is_done_in_threads_and_its_results_come_back(crew):
    jobs = [crew.submit(lambda a, b: (a + b, threading.current_thread()), i, 1) for i in range(3)]
    assert [job.result()[0] for job in jobs] == [1, 2, 3]
    assert threading.current_thread() not in [job.result()[1] for job in jobs]
    crew.close()
    assert not any(job.result()[1].is_alive() for job in jobs)


def test_each_number_has_a_thread_of_its_own_if_there_are_as_many(crew):
    barrier = threading.Barrier(3, timeout=5)

    def work(number):
        barrier.wait()
        return number, threading.current_thread()

    numbers, threads = zip(*crew.each(work, 3), strict=True)
    assert numbers == (0, 1, 2) and threads[0] is threading.current_thread() and len(set(threads)) == 3


def test_this_thread_leaves_the_others_to_as_many_threads_even_if_these_begin_late(crew, monkeypatch):
    run = Crew._run

    def belated(*args):
        time.sleep(0.02)
        return run(*args)

    monkeypatch.setattr(Crew, "_run", belated)
    threads = crew.each(lambda number: threading.current_thread(), 3)
    assert threads.count(threading.current_thread()) == 1


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_more_numbers_than_threads_are_taken_by_all_of_them_in_turn(threads):
    crew, work = Crew(threads, "few"), Busy(threads + 1)
    assert crew.each(work, 9) == list(range(9))
    assert len(work.met) == 9 and len(set(work.met)) == work.most == threads + 1
    assert threading.current_thread() in work.met
    crew.close()


@pytest.mark.parametrize("threads", [0, 1, 2, 9])
def test_of_several_errors_the_lowest_numbers_is_raised_when_all_had_their_turn(threads):
    crew, called = Crew(threads, "failing"), []

    def work(number):
        called.append(number)
        time.sleep(0.001)
        if number in (3, 6, 8):
            raise ValueError(f"number {number}")

    for _ in range(20):
        called.clear()
        with pytest.raises(ValueError, match="number 3"):
            crew.each(work, 9)
        assert sorted(called) == list(range(9))
    assert crew.each(lambda number: number, 9) == list(range(9))
    crew.close()


@pytest.mark.parametrize("turns", [1, 2])  # in number 0, and in one that this thread took over
def test_after_an_interrupt_no_other_number_begins(crew, turns):
    begun, ended, here = [], [], []

    def work(number):
        begun.append(number)
        if threading.current_thread() is threading.main_thread():
            here.append(number)
            if len(here) == turns:
                raise KeyboardInterrupt
        else:
            time.sleep(0.05)
        ended.append(number)

    with pytest.raises(KeyboardInterrupt):
        crew.each(work, 9)
    assert here[0] == 0 and len(here) == turns
    assert sorted(begun) == sorted([*ended, here[-1]]) and len(begun) <= turns + 2
    time.sleep(0.1)
    assert len(begun) <= turns + 2
    assert crew.each(lambda number: number, 9) == list(range(9))


def test_what_has_begun_is_waited_for_and_the_rest_never_begins(crew):
    begun, done = threading.Semaphore(0), []

    def work(i):
        begun.release()
        time.sleep(0.05)
        done.append(i)

    for i in range(4):
        crew.submit(work, i)
    begun.acquire(), begun.acquire()
    crew.call_off()
    assert sorted(done) == [0, 1]
    assert crew.submit(lambda: "new").result() == "new"
    time.sleep(0.1)
    assert sorted(done) == [0, 1]


def test_a_thread_that_begins_after_the_job_was_called_off_does_nothing(crew, monkeypatch):
    done = []
    with monkeypatch.context() as patch:
        late = begins_late(patch)
        with pytest.raises(KeyboardInterrupt):
            crew.submit(done.append, "late")
        crew.call_off()
    assert crew.submit(lambda: "new").result() == "new"
    late[0].join(5)
    assert done == []


INTERRUPTED = """
import gc, sys
from npgpt.kernels.crew import Crew
gc.disable()  # it would come at any step as well, and end the threads of another crew

def interrupted(k):
    \"\"\"Whether an interrupt came before the k-th step that Python makes in this thread while a crew works.\"\"\"
    left, crew = k, Crew(2, "crew")
    def trace(frame, event, arg):
        nonlocal left
        frame.f_trace_opcodes = True
        left -= 1
        if left < 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace
    work = lambda number: number
    try:
        sys.settrace(trace)
        results = crew.each(work, 3)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    assert not crew._at_work and crew.each(work, 3) == [0, 1, 2]
    return left < 0

k = 0
while interrupted(k):
    k += 1
print(k)
"""


def test_an_interrupt_at_any_step_leaves_a_crew_that_works_and_a_process_that_ends():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "" and int(done.stdout) > 100
