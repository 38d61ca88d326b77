"""The matrix products that training is made of: by tiles of our own where these are quicker, else by NumPy's BLAS.

OpenBLAS multiplies as fast as a processor can, if its kernels are for this processor and both matrices are large.  With
the tiles of tiles.py a plain blocked product, `multiply`, is as fast where the processor has AVX-512, and faster for
the small weights of a small model; and it does not depend on what the BLAS at hand makes of the processor.
"""

import threading

import numpy as np

from npgpt.kernels.blas import blas_kernels, told_threads
from npgpt.kernels.buffers import empty
from npgpt.kernels.crew import Crew
from npgpt.kernels.jit import helper, kernel, replaces
from npgpt.kernels.tiles import in_line, product_unchecked, transpose
from npgpt.kernels.vectors import VECTOR
from npgpt.machine import processors

DEPTH = 256  # rows of b that are multiplied at a time: so long a panel of it stays in the nearest cache
HEIGHT = 512  # rows of a that go by it: they stay in the next one
TINY = 2**20  # multiplications that are not worth sharing out among threads


def matmul_ref(a, b):
    """a (M, K), b (K, N) -> a @ b (M, N)."""
    return a @ b


@helper
def copy(panel, b):
    """panel[:K, :N] = b (K, N)."""
    K, N = b.shape
    width = 2 * VECTOR // b.itemsize
    if N == width:  # a number that the compiler knows
        for k in range(K):
            for j in range(width):
                panel[k, j] = b[k, j]
    else:
        for k in range(K):
            for j in range(N):
                panel[k, j] = b[k, j]


@kernel
def multiply(out, a, b, turned, panel, first, last):
    """The columns first:last of out = a @ b, or of a @ b.T where `turned`.  panel (DEPTH, width): scratch.

    After Goto and van de Geijn 2008: a panel of b, two vectors wide, is copied into a row of cache lines and meets all
    rows of a before the next one comes.
    """
    (M, K), width = a.shape, panel.shape[1]
    rows, columns = b.shape[::-1] if turned else b.shape
    if not (
        (out.shape[0] == M and out.shape[1] == columns and rows == K > 0 and 0 <= first <= last <= columns)
        and (panel.shape[0] >= min(K, DEPTH) and width > 0 and in_line(out) and in_line(panel))
    ):
        raise ValueError("multiply: contiguous out (M, N) needs a (M, K) and b (K, N), or (N, K) if turned; 0 < K")
    for i in range(0, a.shape[0], HEIGHT):
        for k in range(0, a.shape[1], DEPTH):
            block = a[i : i + HEIGHT, k : k + DEPTH]
            for j in range(first, last, width):
                end = min(j + width, last)
                if turned:
                    transpose(panel, b[j:end, k : k + DEPTH])
                else:
                    copy(panel, b[k : k + DEPTH, j:end])
                product_unchecked(out[i : i + HEIGHT, j:end], block, panel[: block.shape[1]], k > 0)


def _is_ours(threads):
    """Whether tiles are quicker than BLAS with so many threads, which is None where nobody has set their number."""
    if VECTOR < 64 or threads is None:  # shorter vectors have too few registers for tiles as large as BLAS's
        return False
    # a product is shared out better by BLAS, unless it is one that leaves AVX-512 unused
    return threads == 1 or blas_kernels() not in (None, "SkylakeX", "Cooperlake", "SapphireRapids")


@replaces(matmul_ref, flops=lambda out, a, b: 2 * out.size * a.shape[1])
def matmul(out, a, b):
    """out = a @ b for out (M, N), C-contiguous, a (M, K), b (K, N), all of one dtype."""
    threads = 1 if out.size * a.shape[1] <= TINY else told_threads()
    turned = not b.flags.c_contiguous
    if not _is_ours(threads) or not b.size or (turned and not b.flags.f_contiguous):
        np.matmul(a, b, out=out)
        return
    rows, columns = b.T if turned else b, out.shape[1]
    panels = empty((threads, DEPTH, 2 * VECTOR // out.itemsize), out.dtype)
    if threads == 1:
        multiply(out, a, rows, turned, panels[0], 0, columns)
        return

    def share(i):
        multiply(out, a, rows, turned, panels[i], columns * i // threads, columns * (i + 1) // threads)

    _crew(threads).each(share, threads)


class _Helpers(threading.local):
    """The threads that help this one."""

    wanted, crew = None, None


_helpers = _Helpers()


def _crew(threads):
    if _helpers.wanted != threads:
        _helpers.wanted, _helpers.crew = threads, Crew(min(threads, processors()) - 1, "npgpt-product")
    return _helpers.crew
