"""What `--against REV` of a benchmark does: it measures the working tree beside another revision of npgpt.

    python -m benchmarks.step --against 508dc90
    python -m benchmarks.sample --workload gpt2 --against HEAD

Each tree is measured by its own benchmarks/, as a command in its own folder, with a kernel cache of its own.  So only
that command's flags and what is read of its figures must stay: the modules of npgpt may move.

Two processes with the same code differ: each has its memory elsewhere.  So a round is a fresh process of each tree, one
right after the other, and gives one ratio; the next round starts with the other tree.  Rounds are made until the ratio
is certain to PRECISION, or until there is no time for more of them: then the report says how many it takes.
"""

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import combinations_with_replacement
from pathlib import Path

from benchmarks.common import ROOT, BenchmarkError, checked_out

PRECISION = 0.005  # how certain a ratio shall be
FEWEST = 8  # rounds, before anything is said about more
SECONDS = 300  # that the rounds may take, if these few do not take longer
UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # they slow a current NumPy
HEADS = ("machine ", "workload ", "writing ")  # lines of a benchmark's report that are true for both trees


def estimate(ratios):
    """(ratio, uncertainty) of the ratios of some rounds; the uncertainty is None for fewer than six.

    The ratio is Hodges and Lehmann's estimate, the median of the means of any two rounds, or of one with itself: a few
    disturbed rounds hardly move it.  The uncertainty is the longer side of Wilcoxon's interval of 95 %, which wants no
    normal distribution.  Both are made of logarithms: so the trees could change places.
    """
    n = len(ratios)
    means = sorted((a + b) / 2 for a, b in combinations_with_replacement(map(math.log, ratios), 2))
    ratio = math.exp(statistics.median(means))
    end = int(n * (n + 1) / 4 - 1.96 * math.sqrt(n * (n + 1) * (2 * n + 1) / 24))
    if end < 1:
        return ratio, None
    low, high = math.exp(means[end - 1]), math.exp(means[-end])
    return ratio, max(ratio - low, high - ratio)


def rounds_needed(n, uncertainty):
    """How many rounds make a ratio certain to PRECISION, after n that leave this uncertainty: it falls as 1 / √n."""
    return FEWEST if n < FEWEST else math.ceil(n * (uncertainty / PRECISION) ** 2)


class Tree:
    """A side: a folder with npgpt and its benchmarks/, and a kernel cache."""

    def __init__(self, name, folder, cache):
        self.name, self.folder = name, folder
        path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])  # comes before an installed npgpt
        kept = {name: value for name, value in os.environ.items() if name not in UNSET}
        self.environment = {**kept, "PYTHONPATH": path, "NUMBA_CACHE_DIR": str(cache)}

    def run(self, command):
        """What `python -m COMMAND` prints there."""
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=self.folder, env=self.environment,
            capture_output=True, text=True, errors="replace",
        )  # fmt: skip
        if done.returncode:
            words = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
            raise BenchmarkError(f"{self.name} cannot run: {words.splitlines()[-1]}")
        return done.stdout


def compare(rev, command, read, rounds=None):
    """Measure the working tree beside a revision; returns what report() prints, as a dict for JSON.

    read(output) takes ({what: (seconds, bytes of memory)}, whether the cores were busy) from what the command printed.
    rounds: how many to do, instead of as many as are needed.
    """
    with checked_out(rev) as folder, tempfile.TemporaryDirectory(prefix="npgpt-caches-") as caches:
        trees = Tree(rev, folder, Path(caches, "rev")), Tree("the tree", ROOT, Path(caches, "tree"))
        heads = [tree.run(command) for tree in trees][-1].splitlines()  # compiles the kernels
        print("\n".join(line for line in heads if line.startswith(HEADS)), flush=True)
        figures, n, busy = ([], []), 0, 0  # figures: of each of REV's processes, and of the tree's
        start = time.perf_counter()
        while True:
            for side in (0, 1) if n % 2 == 0 else (1, 0):
                found, is_busy = read(trees[side].run(command))
                figures[side].append(found)
                busy += is_busy
            n += 1
            sides = {what: beside(*([process[what] for process in side] for side in figures)) for what in found}
            needed = max(rounds_needed(n, side["uncertainty"]) for side in sides.values())
            seconds = time.perf_counter() - start
            if rounds:
                if n == rounds:
                    break
            elif n >= FEWEST and n % 2 == 0:  # each tree was the first one as often as the other
                if n >= needed or seconds * (n + 2) / n > SECONDS:
                    break
                if n == FEWEST:
                    print(f"rounds    {n} done; {wish(needed)}", flush=True)
    return {"against": rev, "rounds": n, "rounds_needed": needed, "seconds": seconds, "busy": busy, "sides": sides}


def wish(needed):
    return f"{needed} or more make the ratio certain to {PRECISION:.1%}"


def beside(base, tree):
    """Compare the (seconds, bytes of memory) of a revision's processes with those of the working tree's."""
    base_seconds, base_memory = zip(*base, strict=True)
    seconds, memory = zip(*tree, strict=True)
    ratios = [ours / theirs for ours, theirs in zip(seconds, base_seconds, strict=True)]
    ratio, uncertainty = estimate(ratios)
    base_peak, peak = statistics.median(base_memory), statistics.median(memory)
    return {
        "seconds": [statistics.median(base_seconds), statistics.median(seconds)],
        "ratio": ratio,
        "uncertainty": uncertainty,
        "ratio_of_rounds": ratios,
        "peak_memory": [base_peak, peak],
        "ratio_of_memory": peak / base_peak,
    }


def report(result, unit):
    """Print what compare() found; unit: what takes the seconds."""
    rev, n, needed = result["against"], result["rounds"], result["rounds_needed"]
    if result["busy"]:
        print(f"BUSY      other programs were on the cores in {result['busy']} of {2 * n} processes")
    print(f"rounds    {n} in {result['seconds']:.0f} s" + (f"; {wish(needed)}" if needed > n else "") + "\n")
    width = max(12, len(rev))
    print(f"{'':<24} {rev:>{width}} {'the tree':>12}   the tree / {rev}")
    for what, side in result["sides"].items():
        base, tree = (seconds * 1e3 for seconds in side["seconds"])
        certain = "of too few rounds" if side["uncertainty"] is None else f"+- {side['uncertainty']:.3f}"
        print(f"{what:<10} {unit:>13} {base:>{width}.3f} {tree:>12.3f}   {side['ratio']:.3f} {certain}")
        base, tree = (memory / 1e6 for memory in side["peak_memory"])
        print(f"{'':<10} {'peak MB':>13} {base:>{width},.0f} {tree:>12,.0f}   {side['ratio_of_memory']:.3f}")
    print(f"\n1.03: the tree takes 3 % more than {rev}")
