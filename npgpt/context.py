"""What holds in one thread for as long as a `with` lasts: no_grad, reuse_buffers, random_stream are made of it."""

import contextlib
import inspect
import threading


class _Context(type(contextlib.contextmanager(lambda: (yield))())):
    """What contextlib.contextmanager makes, but it refuses to decorate a generator or a coroutine.

    The context would be at an end before the first line of these runs.
    """

    def __call__(self, function):
        code = inspect.isgeneratorfunction(function), inspect.iscoroutinefunction(function)
        if any(code) or inspect.isasyncgenfunction(function):
            raise TypeError(f"{function.__name__} goes on after its call has returned: write `with` within it instead")
        return super().__call__(function)


class ThreadState(threading.local):
    """Values that each thread has for itself; a subclass names them, with those that they have at first."""

    def within(self, **values):
        """A context within which the state of this thread has these values."""
        return _Context(_set_for_a_while, (self, values), {})


def _set_for_a_while(state, values):
    before = {name: getattr(state, name) for name in values}
    try:  # an interrupt may come at any line
        vars(state).update(values)
        yield
    finally:
        vars(state).update(before)
