"""The sum of two large arrays by a kernel: of the residual stream, its gradient, and the gradients of all workers.

NumPy adds as fast.  But it gives Python's lock away without a note, and a worker that waits for it spins in vain
(gil.py).

Numba is not imported before there is something large to add: the engine and the Tensor need it for nothing else.
"""

import functools

import numpy as np

FEW = 4096  # numbers that NumPy adds in less time than a kernel needs to begin


def add(out, a, b):
    """out = a + b, as np.add has it; out may be one of the others."""
    if out is b:
        a, b = b, a
    if out.size < FEW or not (_is_alike(out, a) and _is_alike(out, b)):
        np.add(a, b, out=out)
    elif out is a:
        _kernels().add_to(out, b)
    else:
        _kernels().add_both(out, a, b)
    return out


def _is_alike(out, x):
    return x.shape == out.shape and x.dtype == out.dtype and x.flags.carray and out.flags.carray


@functools.cache
def _kernels():
    from npgpt.kernels import sum_kernels

    return sum_kernels
