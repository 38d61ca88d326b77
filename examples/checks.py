"""What the examples end with: a figure and the bound that it must keep."""

import sys

import numpy as np


def check(what, error, bound):
    """Print one line, and end the example with exit code 1 if `error` is not within `bound`."""
    holds = error <= bound  # a NaN does not hold
    print(f"check: {what}: {error:.1e} <= {bound:.0e}  {'ok' if holds else 'WRONG'}")
    if not holds:
        sys.exit(1)


def difference(a, b):
    """The largest difference of two arrays of one shape, relative to the largest entry of b; infinite for others."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        return np.inf
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-300))
