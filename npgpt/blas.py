"""The products of matrices that training is made of: NumPy's BLAS, and small ones by tiles of our own.

What a BLAS does best is multiply large matrices.  Before it multiplies, it copies both into the order in which it will
read them, which pays if they are large; the weights of a small model are not.  `matmul` makes those products in a
kernel, from the tiles of npgpt/tiles.py, where the processor has AVX-512.  A step of nanoGPT's CPU recipe so takes 8 %
less time than with OpenBLAS alone, and 39 % less where that does not use AVX-512.
"""

import contextlib
import ctypes
import functools
import os
import sys
import time
from pathlib import Path

import numpy as np

from npgpt.engine import empty
from npgpt.jit import kernel, replaces
from npgpt.tiles import VECTOR, product, transpose

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
    """Within this context a matrix product uses n threads.  A BLAS that cannot be told so goes on with its own."""
    global _threads
    functions = _blas_functions()
    before, told = get_blas_threads(), _threads
    try:
        _threads = n
        if functions is not None:
            functions[0](n)
        yield
    finally:
        _threads = told
        if functions is not None:
            functions[0](before)


def sgemm_peak(seconds=0.25, n=1536):
    """(FLOP/s, cores busy with it) of products of two (n, n) float32 matrices: the best of those done in `seconds`.

    With the BLAS threads that are set.  It is the roof over a training step, in which there is next to nothing but
    matrix products.  (Where BLAS leaves AVX-512 unused and `matmul` does not, a small model goes through it.)
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

DEPTH = 256  # rows of b that are multiplied at a time: as many as a tile finds in the nearest cache, row after row
SMALL = 2**18  # bytes of the weights, or of their gradient, up to which a copy does not pay
TINY = 2**20  # multiplications that BLAS does not share out among its threads
_threads = None  # how many those are, if blas_threads has been told


def matmul_ref(a, b):
    """a (M, K), b (K, N) -> a @ b (M, N)."""
    return a @ b


@kernel
def multiply(out, a, b, turned):
    """out = a @ b; or a @ b.T, where there is room for b.T in `turned`."""
    if turned.size:
        transpose(turned, b)
        b = turned
    for k in range(0, a.shape[1], DEPTH):
        product(out, a[:, k : k + DEPTH], b[k : k + DEPTH], k > 0)


def _is_ours(out, a, b):
    """Whether tiles are quicker than BLAS.  They have one thread, and need the many registers of long vectors."""
    if VECTOR < 64 or not 0 < min(out.nbytes, b.nbytes) <= SMALL:
        return False
    return _threads == 1 or out.size * a.shape[1] <= TINY


@replaces(matmul_ref, flops=lambda out, a, b: 2 * out.size * a.shape[1])
def matmul(out, a, b):
    """out = a @ b for out (M, N), C-contiguous, a (M, K), b (K, N), all of one dtype."""
    ours = _is_ours(out, a, b)
    if ours and b.flags.c_contiguous:
        multiply(out, a, b, b[:0, :0])
    elif ours and b.flags.f_contiguous:
        multiply(out, a, b.T, empty(b.shape, b.dtype))
    else:
        np.matmul(a, b, out=out)
