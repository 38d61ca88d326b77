"""The matrix products that training is made of: by tiles of our own where these are quicker, else by NumPy's BLAS.

OpenBLAS multiplies as fast as a processor can, if its kernels are for this processor and both matrices are large.  With
the tiles of tiles.py a plain blocked product, `multiply`, is as fast where the processor has AVX-512, and faster for
the small weights of a small model; and it does not depend on what the BLAS at hand makes of the processor.
"""

import contextlib
import ctypes
import functools
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np

from npgpt.kernels.buffers import empty
from npgpt.kernels.crew import Crew
from npgpt.kernels.jit import helper, kernel, replaces
from npgpt.kernels.tiles import in_line, product_unchecked, transpose
from npgpt.kernels.vectors import VECTOR
from npgpt.machine import processors

# --------------------------------------------------------------------------------------------------------------------
# NumPy's BLAS

# what the libraries that NumPy is built with call what sets their number of threads, and tells it, and their kernels
_NAMES = (
    ("scipy_openblas_set_num_threads64_", "scipy_openblas_get_num_threads64_", "scipy_openblas_get_corename64_"),
    ("scipy_openblas_set_num_threads", "scipy_openblas_get_num_threads", "scipy_openblas_get_corename"),
    ("openblas_set_num_threads64_", "openblas_get_num_threads64_", "openblas_get_corename64_"),
    ("openblas_set_num_threads", "openblas_get_num_threads", "openblas_get_corename"),
    ("MKL_Set_Num_Threads", "MKL_Get_Max_Threads", None),
)


def _blas_libraries():
    """Paths of the BLAS libraries that this process has loaded, or may have loaded, for NumPy."""
    numpy_folder = Path(np.__file__).parent
    for folder in (numpy_folder.parent / "numpy.libs", numpy_folder / ".dylibs"):
        if folder.is_dir():
            yield from sorted(str(path) for path in folder.iterdir() if "openblas" in path.name)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            mapped = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
            yield from sorted(p for p in mapped if "blas" in os.path.basename(p) or "mkl_rt" in os.path.basename(p))


@functools.cache
def _blas_functions():
    """The functions of NumPy's BLAS that _NAMES lists, or None where it is not one we know."""
    for path in _blas_libraries():
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(path)
            for setter, getter, kernels in _NAMES:
                if hasattr(library, setter):
                    named = kernels and getattr(library, kernels, None)
                    if named is not None:
                        named.restype = ctypes.c_char_p
                    return getattr(library, setter), getattr(library, getter), named
    return None


def get_blas_threads():
    """Threads that a matrix product uses, or None where that is not known."""
    functions = _blas_functions()
    return None if functions is None else int(functions[1]())


def blas_kernels():
    """The processor whose kernels OpenBLAS uses on this one, by its name for it, or None for another BLAS.

    It picks them when NumPy is loaded, unless the user names some in OPENBLAS_CORETYPE.  Those of "Haswell" use AVX2,
    those of "SkylakeX" AVX-512, which can be twice as fast.
    """
    functions = _blas_functions()
    if functions is None or functions[2] is None:
        return None
    return functions[2]().decode("ascii", "replace")


@contextlib.contextmanager
def blas_threads(n):
    """Within this context a matrix product uses n threads, at most one for each processor.

    A BLAS that we cannot tell so goes on as it did.
    """
    global _threads
    functions = _blas_functions()
    before, told = get_blas_threads(), _threads
    try:
        _threads = n
        if functions is not None:
            functions[0](min(n, processors()))
        yield
    finally:
        _threads = told
        if functions is not None:
            functions[0](before)


def sgemm_peak(seconds=0.25, n=1536):
    """(FLOP/s, cores busy with it) of products of two (n, n) float32 matrices: the best of those done in `seconds`.

    By BLAS, with the threads that are set.  It is the roof over a training step, in which there is next to nothing but
    matrix products; where BLAS leaves AVX-512 unused, and `matmul` does not, a step goes through it.
    """
    a = np.ones((n, n), np.float32)
    out = np.empty_like(a)
    runs, end = [], time.perf_counter() + seconds
    np.matmul(a[:128], a, out=out[:128])  # wakes the threads
    while not runs or time.perf_counter() < end:
        start, start_cpu = time.perf_counter(), time.process_time()
        np.matmul(a, a, out=out)
        took = time.perf_counter() - start
        runs.append((2 * n**3 / took, (time.process_time() - start_cpu) / took))
    return max(runs)


# --------------------------------------------------------------------------------------------------------------------
# Products

DEPTH = 256  # rows of b that are multiplied at a time: so long a panel of it stays in the nearest cache
HEIGHT = 512  # rows of a that go by it: they stay in the next one
TINY = 2**20  # multiplications that are not worth sharing out among threads
_threads = None  # how many there are, if blas_threads has been told


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
    threads = 1 if out.size * a.shape[1] <= TINY else _threads
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
