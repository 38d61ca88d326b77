"""What the examples end with: figures, each with the bound that it must keep."""

import signal
import sys

import numpy as np

if hasattr(signal, "SIGPIPE"):  # `... | head` ends an example quietly
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)

_wrong = []  # what was checked and does not hold


def check(what, error, bound):
    """Print one line: whether `error` is within `bound`."""
    holds = error <= bound  # a NaN does not hold
    print(f"check: {what}: {error:.1e} <= {bound:.0e}  {'ok' if holds else 'WRONG'}")
    if not holds:
        _wrong.append(what)


def finish():
    """The last line of an example: exit code 1 if a check did not hold."""
    if _wrong:
        sys.exit(f"WRONG: {len(_wrong)} of the checks above")


def difference(a, b):
    """The largest difference of two arrays of one shape, relative to the largest entry of b; infinite for others."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        return np.inf
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-300))
