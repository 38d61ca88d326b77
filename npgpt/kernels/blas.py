"""NumPy's BLAS: which one it is, for which processor its kernels are, how many threads it uses, and how fast it is."""

import contextlib
import ctypes
import functools
import os
import sys
import time
from pathlib import Path

import numpy as np

from npgpt.machine import processors

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


_told = None  # how many threads a product shall use, if blas_threads has been told


def told_threads():
    """How many threads a product shall use, by `blas_threads`, or None where that has not been told."""
    return _told


def get_blas_threads():
    """Threads that a matrix product uses, or None where that is not known."""
    functions = _blas_functions()
    return None if functions is None else int(functions[1]())


def blas_kernels():
    """The processor whose kernels OpenBLAS uses on this one, by its name for it, or None for another BLAS.

    It picks them when NumPy is loaded, unless the user names some in OPENBLAS_CORETYPE.  Those of "Haswell" use AVX2,
    those of "SkylakeX" AVX-512, which can be twice as fast.
    """
    if (functions := _blas_functions()) is None or functions[2] is None:
        return None
    return functions[2]().decode("ascii", "replace")


@contextlib.contextmanager
def blas_threads(n):
    """Within this context a matrix product uses n threads, at most one for each processor.

    A BLAS that we cannot tell so goes on as it did.
    """
    global _told
    functions = _blas_functions()
    before, told = get_blas_threads(), _told
    try:
        _told = n
        if functions is not None:
            functions[0](min(n, processors()) if n > 1 else n)
        yield
    finally:
        _told = told
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
