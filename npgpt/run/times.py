"""Time, as a run tells it."""

import math
import time

clock = time.perf_counter  # whoever asks for the time calls times.clock(), so that tests can set it


class Pace:
    """How fast a run is, and how much time is left.

    iteration   the one that it begins at
    tokens      of an update
    most        iterations that there will be

    since       when the speed began to be measured; to be put off by what was not spent on training
    """

    def __init__(self, iteration, tokens, most):
        self.tokens, self.most = tokens, most
        self.steady = None  # (time, iteration) after the first update: from there on all take about the same time
        self.restart(iteration)

    def restart(self, iteration):
        """Measure the speed from now on."""
        self.since, self.since_iter = clock(), iteration

    def measure(self, iteration, restart):
        """(tokens per second, seconds left or None) after an update; restart: whether to measure from here on."""
        now, left = clock(), None
        speed = (iteration - self.since_iter) * self.tokens / (now - self.since) if now > self.since else math.inf
        if self.steady is None:
            self.steady = now, iteration
        else:
            left = (now - self.steady[0]) / (iteration - self.steady[1]) * (self.most - iteration)
        if restart:
            self.since, self.since_iter = now, iteration
        return speed, left
