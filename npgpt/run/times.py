"""Time, as a run tells it."""

import math
import time

clock = time.perf_counter  # whoever asks for the time calls times.clock(), so that tests can set it


class Pace:
    """How fast a run is, and how much time is left.

    iteration   the one that it begins at
    tokens      of an update
    most        iterations that there will be
    """

    def __init__(self, iteration, tokens, most):
        self.tokens, self.most = tokens, most
        self.steady = None  # (time, iteration) after the first update: from there on all take about the same time
        self.restart(iteration)

    def restart(self, iteration):
        """Measure the speed from now on."""
        self.since, self.since_iter = clock(), iteration

    def leave_out(self, seconds):
        """Have time not count that was not spent on training."""
        self.since += seconds

    def measure(self, iteration, left_out=0.0):
        """(tokens per second, seconds left or None) after an update; left_out: seconds that do not count."""
        now = clock()
        self.leave_out(left_out)
        speed = (iteration - self.since_iter) * self.tokens / (now - self.since) if now > self.since else math.inf
        left = None
        if self.steady is None:
            self.steady = now, iteration
        else:
            left = (now - self.steady[0]) / (iteration - self.steady[1]) * (self.most - iteration)
        self.measured = now, iteration
        return speed, left

    def restart_as_measured(self):
        """Measure the speed from the last measurement on."""
        self.since, self.since_iter = self.measured
