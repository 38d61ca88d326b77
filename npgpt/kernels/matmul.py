"""The matrix products that training is made of: our own where vectors are long, else NumPy's BLAS.

OpenBLAS multiplies as fast as a processor can, if its kernels are for this processor and both matrices are large.  Our
own product (packed.py) is as fast where the processor has AVX-512, and faster for the small matrices of a small model.
It does not depend on what the BLAS at hand makes of the processor, and has the same bits for any number of threads.
"""

import os
import threading

import numpy as np

from npgpt.errors import UsageError
from npgpt.kernels.blas import told_threads
from npgpt.kernels.buffers import empty
from npgpt.kernels.crew import Crew
from npgpt.kernels.jit import KERNELS, replaces
from npgpt.kernels.packed import PACK, PANEL, multiply, padded, scratch_size, turn
from npgpt.kernels.tiles import share_of
from npgpt.kernels.vectors import VECTOR
from npgpt.machine import processors

TINY = 2**20  # multiplications that are not worth sharing out among threads

PRODUCTS = os.environ.get("NPGPT_PRODUCTS", "ours" if VECTOR == 64 else "blas")
if PRODUCTS not in ("ours", "blas"):
    raise UsageError(f"NPGPT_PRODUCTS must be 'ours' or 'blas', got {PRODUCTS!r}")
if KERNELS == "numpy":
    PRODUCTS = "blas"


def matmul_ref(a, b):
    """a (M, K), b (K, N) -> a @ b (M, N)."""
    return a @ b


@replaces(
    matmul_ref,
    flops=lambda out, a, b: 2 * out.size * a.shape[1],
    row=lambda out, a, b: "product {} x {} x {}".format(len(a), *b.shape),
)
def matmul(out, a, b):
    """out = a @ b for out (M, N), C-contiguous, a (M, K), b (K, N), all of one dtype.

    Threads that `blas_threads` has set share it, or as many as there are processors where nobody has set their number.
    """
    is_packed = PRODUCTS == "ours" and a.shape[1] > 0 and _has_rows(a) and _has_rows(b)
    if not is_packed:
        np.matmul(a, b, out=out)
    elif 1.05 * padded(*out.T.shape, out.itemsize) < padded(*out.shape, out.itemsize):  # of 65 columns 80 are computed
        turned = empty(out.T.shape, out.dtype)
        _multiply(turned, b.T, a.T)
        turn(out, turned)
    else:
        _multiply(out, a, b)


def _has_rows(x):
    """Whether the numbers of a row, or those of a column, lie side by side."""
    return x.flags.c_contiguous or x.flags.f_contiguous


def _multiply(out, a, b):
    a_turned, b_turned = not a.flags.c_contiguous, not b.flags.c_contiguous
    left, right = a.T if a_turned else a, b.T if b_turned else b
    (M, N), threads = out.shape, told_threads() or processors()
    if out.size * a.shape[1] <= TINY:
        threads = 1
    scratch = empty((threads, scratch_size(out.itemsize)), out.dtype)
    if threads == 1:
        multiply(out, left, right, a_turned, b_turned, scratch[0], 0, M, 0, N)
        return

    def share(i):
        """Each thread packs its own part of the longer side, and all of the other."""
        rows = share_of(M, PACK, i, threads) if M >= N else (0, M)
        columns = share_of(N, PANEL // out.itemsize, i, threads) if M < N else (0, N)
        multiply(out, left, right, a_turned, b_turned, scratch[i], *rows, *columns)

    _crew(threads).each(share, threads)


class _Helpers(threading.local):
    """The threads that help this one."""

    wanted, crew = None, None


_helpers = _Helpers()


def _crew(threads):
    if _helpers.wanted != threads:
        _helpers.wanted, _helpers.crew = threads, Crew(min(threads, processors()) - 1, "npgpt-product")
    return _helpers.crew
