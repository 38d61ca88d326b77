"""Threads that take shares of a job, and can be called off at any moment.

An interrupt may come while Python waits for a new thread to begin.  ThreadPoolExecutor then forgets that thread, which
begins later all the same and takes its share of a job that nobody waits for.  So a thread of a Crew says that it is at
work before it looks whether its job still stands.
"""

import contextlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from npgpt.stop import held


class Crew:
    """As many threads, for one caller.  They begin when they are first needed."""

    def __init__(self, threads, name):
        self.threads = threads
        self._new_pool = lambda: ThreadPoolExecutor(max(1, threads), name)
        self._start()

    def _start(self):
        self._process, self._pool, self._at_work = os.getpid(), self._new_pool(), set()

    def submit(self, work, *args):
        """Have a thread call work(*args); returns a Future."""
        if self._process != os.getpid():  # a fork has none of the threads
            self._start()
        with held():  # a process that is forked in the pool's `submit` waits for ever for a lock that this thread holds
            return self._pool.submit(self._run, self._pool, work, args)

    def _run(self, pool, work, args):
        me = threading.get_ident()
        self._at_work.add(me)
        try:
            if pool is self._pool:  # else the job was called off before this thread began
                return work(*args)
        finally:
            self._at_work.remove(me)

    def each(self, work, n):
        """[work(0), ..., work(n - 1)]: number 0 runs in this thread, the others in the crew's, if it has as many.

        If it has not, each thread, this one too, takes another number when it is done: so they must not wait for each
        other.  Where one raises an exception the others run all the same, and that of the lowest number is raised then.

        When this returns, or raises what one of them or an interrupt has raised, none of them runs any more.
        """
        results, errors, left = [None] * n, {}, list(range(n - 1, 0, -1))
        try:
            futures = [self.submit(_take_turns, left, work, results, errors) for _ in range(min(self.threads, n - 1))]
            _take_turns([0], work, results, errors)
            if n - 1 > self.threads:  # else number 0 is all that npgpt/profiler.py sees of the work, every time
                _take_turns(left, work, results, errors)
            for future in futures:
                future.result()
        except BaseException:  # an interrupt may have come before all futures were known, or awaited
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
        pool, self._pool = self._pool, self._new_pool()
        pool.shutdown(wait=False)
        while self._at_work:
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(1e-4)

    def close(self):
        """End the threads, when they are done with what was submitted."""
        self._pool.shutdown()


def _take_turns(left, work, results, errors):
    """Take a number from the end of a list, which other threads do too, and call work with it, until none is left."""
    while True:
        try:
            number = left.pop()
        except IndexError:
            return
        try:
            results[number] = work(number)
        except Exception as error:
            errors[number] = error
