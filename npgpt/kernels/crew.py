"""Threads that take shares of a job, and can be called off at any moment.

An interrupt (Ctrl-C) may come between any two calls of the main thread.  Python's ThreadPoolExecutor and Thread.start
are Python code that takes locks.  One that is interrupted there stays locked, and the process never ends.  So a caller
waits only in C, for a SimpleQueue or a plain lock; and another thread, which no interrupt reaches, begins the new one.

A thread that sleeps needs 40 to 90 us to wake up.  So a crew's threads look for the next job, in a kernel, for half a
millisecond before they sleep, and so does who waits for a job's end, if there is a processor for each of them.

A thread may begin when its job has been called off.  So it says that it is at work before it looks whether its job
still stands.
"""

import _thread
import contextlib
import functools
import os
import threading
import time
from queue import SimpleQueue

import numpy as np

from npgpt.kernels import gil
from npgpt.kernels.jit import KERNELS
from npgpt.kernels.spin import look
from npgpt.machine import processors

_whatever_happens = contextlib.suppress(Exception)


class Job:
    """What a thread of a Crew calls: work(*args).  spins: whether who waits for it spins before it sleeps."""

    def __init__(self, work, args, spins):
        self._work, self._args, self._value, self._error, self._spins = work, args, None, None, spins
        self.running, self.ended = _thread.allocate_lock(), np.zeros(1, np.int64)
        self.running.acquire()

    def run(self):
        try:
            self._value = self._work(*self._args)
        except BaseException as error:
            self._error = error

    def result(self):
        """What work returned; raises what work raised."""
        _look(self.ended, 0, self._spins)
        with self.running:  # taken until then
            pass
        if self._error is not None:
            raise self._error
        return self._value


class _Pool:
    """What the threads know: they must not keep the Crew alive, which tells them to leave when nobody has it any more.

    unfinished  jobs that were submitted and have not ended: one thread is begun for each of them at most
    """

    def __init__(self, spins):
        self.process, self.jobs, self.n_jobs, self.spins = os.getpid(), SimpleQueue(), np.zeros(1, np.int64), spins
        self.unfinished, self.begun, self.threads = set(), 0, []

    def serve(self):
        self.threads.append(threading.current_thread())
        while (job := self._next()) is not None:
            job()
            job = None  # it knows the Crew
        self.submit(None)  # for the next one

    def submit(self, job):
        """Have a thread call job(); None has one of them end."""
        self.jobs.put(job)
        self.n_jobs[0] += 1

    def _next(self):
        """The next job, for which a thread spins before it sleeps."""
        seen = int(self.n_jobs[0])
        if self.jobs.empty():
            _look(self.n_jobs, seen, self.spins)
        return self.jobs.get()


def _look(counter, seen, spins):
    """To be called before a thread sleeps until a counter is no longer `seen`; it looks for a while if it `spins`."""
    if spins:
        with _whatever_happens:  # it only saves time
            look(counter, seen, gil.looks.value)
    if counter[0] == seen:
        gil.rest()


def _begin(pool, name):
    """Have a thread begin; to be called in one that no interrupt reaches."""
    threading.Thread(target=pool.serve, name=name, daemon=True).start()


class Crew:
    """As many threads, for one caller.  They begin when they are first needed."""

    def __init__(self, threads, name):
        self.threads, self.name, self._spins = threads, name, KERNELS == "numba" and threads < processors()
        self._pool, self._at_work = self._new_pool(), set()

    def _new_pool(self):
        return _Pool(self._spins)

    def __del__(self):
        self._pool.submit(None)

    def submit(self, work, *args):
        """Have a thread call work(*args); returns a Job."""
        if self._pool.process != os.getpid():  # a fork has none of the threads
            self._pool, self._at_work = self._new_pool(), set()
        pool, job = self._pool, Job(work, args, self._spins)
        pool.unfinished.add(job)
        pool.submit(functools.partial(self._run, pool, job))
        if pool.begun < min(self.threads, len(pool.unfinished)):
            pool.begun += 1
            _thread.start_new_thread(_begin, (pool, self.name))
        return job

    def _run(self, pool, job):
        me = _thread.get_ident()
        self._at_work.add(me)
        try:
            if pool is self._pool:  # else the job was called off before this thread began
                job.run()
        finally:
            job.ended[0] = 1  # who waits for it may wake up
            pool.unfinished.discard(job)
            self._at_work.remove(me)
            job.running.release()

    def each(self, work, n):
        """[work(0), ..., work(n - 1)]: number 0 runs in this thread, the others in the crew's, if it has as many.

        If it has not, each thread, this one too, takes another number when it is done: so they must not wait for each
        other.  Where one raises an exception the others run all the same, and that of the lowest number is raised then.

        When this returns, or raises what one of them or an interrupt has raised, none of them runs any more.
        """
        if n == 1:
            return [work(0)]
        results, errors, left = [None] * n, {}, list(range(n - 1, 0, -1))
        try:
            jobs = [self.submit(_take_turns, left, work, results, errors) for _ in range(min(self.threads, n - 1))]
            _take_turns([0], work, results, errors)
            if n - 1 > self.threads:  # else number 0 is all that npgpt/kernels/profiler.py sees of the work, every time
                _take_turns(left, work, results, errors)
            for job in jobs:
                job.result()
        except BaseException:  # an interrupt may have come before all jobs were known, or awaited
            left.clear()
            self.call_off()
            raise
        if errors:
            raise errors[min(errors)]
        return results

    def call_off(self):
        """When this returns, nothing of what was submitted runs, or ever will; what has begun is waited for.

        To be called for one interrupt, it is not ended by the next.
        """
        while True:
            try:
                self._pool.submit(None)
                self._pool = self._new_pool()
                while self._at_work:
                    time.sleep(1e-4)
                return
            except KeyboardInterrupt:
                continue

    def close(self):
        """End the threads, when they are done with what was submitted."""
        pool, self._pool = self._pool, self._new_pool()
        pool.submit(None)
        for thread in pool.threads:
            thread.join()


def _take_turns(left, work, results, errors):
    """Take a number from the end of a list, which other threads do too, and call work with it, until none is left."""
    while left:
        try:
            number = left.pop()
        except IndexError:  # another thread was quicker
            return
        try:
            results[number] = work(number)
        except Exception as error:
            errors[number] = error
