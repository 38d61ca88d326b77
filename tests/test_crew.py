"""Threads that can be called off: whatever moment an interrupt chooses, none works on behind the caller's back."""

import threading
import time

import pytest

from npgpt.crew import Crew


@pytest.fixture
def crew():
    crew = Crew(2, "crew")
    yield crew
    crew.close()


def begins_late(monkeypatch):
    """From now on threads begin late, and Ctrl-C comes while Python waits for them: the pool forgets of them.

    Returns a list, in which they will be.
    """
    start, run, late = threading.Thread.start, Crew._run, []

    def interrupted(thread):
        late.append(thread)
        start(thread)
        raise KeyboardInterrupt

    def belated(*args):
        time.sleep(0.05)
        return run(*args)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    monkeypatch.setattr(Crew, "_run", belated)
    return late


def test_work_is_done_in_threads_and_its_results_come_back(crew):
    futures = [crew.submit(lambda a, b: (a + b, threading.current_thread()), i, 1) for i in range(3)]
    assert [future.result()[0] for future in futures] == [1, 2, 3]
    assert threading.current_thread() not in [future.result()[1] for future in futures]
    crew.close()
    assert not any(future.result()[1].is_alive() for future in futures)


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
