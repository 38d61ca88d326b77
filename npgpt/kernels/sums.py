"""The sum of two large arrays as a kernel: of the residual stream, its gradient, and the gradients of all workers.

NumPy adds as fast.  But it gives Python's lock away without a note, and a worker that waits for it spins in vain
(gil.py).
"""

import numpy as np

from npgpt.kernels.jit import kernel, replaces

FEW = 4096  # numbers that NumPy adds in less time than a kernel needs to begin


def add(out, a, b):
    """out = a + b, as np.add has it; out may be one of the others."""
    if out is b:
        a, b = b, a
    if out.size < FEW or not (_is_alike(out, a) and _is_alike(out, b)):
        np.add(a, b, out=out)
    elif out is a:
        add_to(out, b)
    else:
        add_both(out, a, b)
    return out


def _is_alike(out, x):
    return x.shape == out.shape and x.dtype == out.dtype and x.flags.carray and out.flags.carray


def add_both_ref(a, b):
    return a + b


@replaces(add_both_ref)
@kernel
def add_both(out, a, b):
    for i in range(out.size):
        out.flat[i] = a.flat[i] + b.flat[i]


def add_to_ref(total, a):
    return total + a


@replaces(add_to_ref)
@kernel
def add_to(total, a):
    for i in range(total.size):
        total.flat[i] += a.flat[i]
