"""The matrix products that training is made of: our own where vectors are long, else NumPy's BLAS.

OpenBLAS multiplies as fast as a processor can, if its kernels are for this processor and both matrices are large.  Our
own product (packed.py) is as fast where the processor has AVX-512, and faster for the small matrices of a small model.
It does not depend on what the BLAS at hand makes of the processor, and has the same bits for any number of threads.

Within `products_of("bfloat16")` operands of float32 are rounded to bfloat16 where they are packed, and the sums stay
float32: mixed precision (Micikevicius et al. 2018).
"""

import contextlib
import functools
import os
import threading
import warnings

import numpy as np

from npgpt.context import ThreadState
from npgpt.errors import UsageError
from npgpt.kernels.bfloat16 import HAS_AMX, MAY_USE_AMX, PAIRS, TILES, WANTED, product_ref, rounded_ref, widened_ref
from npgpt.kernels.blas import told_threads
from npgpt.kernels.buffers import NAN_FILL, BufferPool, empty, reuse_buffers
from npgpt.kernels.crew import Crew
from npgpt.kernels.gil import spin
from npgpt.kernels.jit import KERNELS, replaces
from npgpt.kernels.packed import PACK, PANEL, SPAN, multiply, scratch_size
from npgpt.kernels.tiles import share_of
from npgpt.kernels.vectors import FEATURES, IS_AMD, VECTOR
from npgpt.machine import processors

WIDE = 32  # columns from which on products of bfloat16 are quicker, where there is a quick instruction for them
HAS_INSTRUCTION = bool(FEATURES.get("avx512bf16"))  # vdpbf16ps: AMD's takes as long as one FMA, Intel's as three
TINY = 2**20  # multiplications that are not worth sharing out among threads
LEAD = 2**19  # that the first thread makes more of than the others, since it begins before them
FEW = 2**18  # numbers, of which each takes a nanosecond or so, that are not

PRODUCTS = os.environ.get("NPGPT_PRODUCTS", "ours" if VECTOR == 64 else "blas")
if PRODUCTS not in ("ours", "blas"):
    raise UsageError(f"NPGPT_PRODUCTS must be 'ours' or 'blas', got {PRODUCTS!r}")
if KERNELS == "numpy":
    PRODUCTS = "blas"


class _State(ThreadState):
    dtype = "float32"


_state = _State()


def products_of(dtype):
    """Within this context products of float32 have operands of dtype, "float32" or "bfloat16", in this thread.

    If it is "rounded", NumPy rounds them to bfloat16, and they are multiplied in float32: to check "bfloat16" by.
    """
    if dtype not in ("float32", "bfloat16", "rounded"):
        raise ValueError(f"products of float32, bfloat16 or rounded, not of {dtype!r}")
    return _state.within(dtype=dtype)


def matmul_ref(a, b):
    """a (M, K), b (K, N) -> a @ b (M, N)."""
    return a @ b


@replaces(
    matmul_ref,
    flops=lambda out, a, b: 2 * out.size * a.shape[1],
    row=lambda out, a, b: "product {} x {} x {}".format(len(a), *b.shape),
)
def matmul(out, a, b):
    """out = a @ b for out (M, N), C-contiguous, a (M, K), b (K, N), of one dtype; b may be int8 or bfloat16 (uint16).

    Threads that `blas_threads` has set share it, or as many as there are processors where nobody has set their number.
    """
    is_rounded = False
    if _state.dtype != "float32" and out.dtype == np.float32:
        is_rounded = _state.dtype == "bfloat16" and b.dtype != np.int8 and out.size > 0
        if is_rounded:
            a, b = (x if x.flags.forc else x.copy() for x in (a, b))
        if _state.dtype == "rounded":
            a, b = rounded_ref(a), rounded_ref(widened_ref(b))
    # tiles need matrices of which the numbers of a row, or those of a column, lie side by side
    if (is_rounded or PRODUCTS == "ours") and a.flags.forc and b.flags.forc and a.shape[1] > 0:
        _multiply(out, a, b, is_rounded)
    else:
        np.matmul(a, widened_ref(b), out=out)


def _multiply(out, a, b, is_rounded):
    a_turned, b_turned = not a.flags.c_contiguous, not b.flags.c_contiguous
    left, right = a.T if a_turned else a, b.T if b_turned else b
    (M, N), threads = out.shape, told_threads() or processors()
    if out.size * a.shape[1] <= TINY:
        threads = 1
    kind = PAIRS[way()] if is_rounded else out.dtype
    scratch = _helpers.scratch.get((threads, kind)) or _new_scratch(threads, kind)
    if NAN_FILL and not is_rounded:
        for room in scratch:
            room.fill(np.nan)
    if threads == 1:
        multiply(out, left, right, a_turned, b_turned, scratch[0], 0, M, 0, N)
        return

    length, unit = (M, PACK) if M >= N else (N, PANEL // out.itemsize)
    lead = min(LEAD * length // (out.size * a.shape[1]) // unit * unit, length)  # what the first thread has more of

    def share(i):
        """Each thread packs its own part of the longer side, and all of the other."""
        start, end = share_of(length - lead, unit, i, threads)
        part = start + lead if i else 0, end + lead
        rows, columns = (part, (0, N)) if M >= N else ((0, M), part)
        multiply(out, left, right, a_turned, b_turned, scratch[i], *rows, *columns)

    _crew(threads).each(share, threads)


def let_threads_spin():
    """To be called before the first kernel is loaded, as gil.py says.  Products must be kernels, too."""
    if PRODUCTS == "ours":
        spin()


def _new_scratch(threads, kind):
    """Room for what each of some threads packs in a product: it is kept for this thread's next one."""
    let_threads_spin()
    with reuse_buffers(None):  # it stays with the thread, whatever pool is used next
        scratch = _helpers.scratch[threads, kind] = list(empty((threads, scratch_size(np.dtype(kind).itemsize)), kind))
    return scratch


@functools.cache
def way():
    """How products of bfloat16 are made here: the first of PAIRS that can be had here and has the right bits.

    It is tried when it is first asked for.  Raises UsageError if there is none, or not the one that is wanted.
    """
    if KERNELS == "numpy":
        raise UsageError("bfloat16 needs kernels: NPGPT_KERNELS=numpy runs the references, which multiply in float32")
    possible = {"amx": MAY_USE_AMX, "avx512_bf16": HAS_INSTRUCTION, "plain": TILES == "plain"}
    if HAS_AMX and not MAY_USE_AMX:
        warnings.warn("bfloat16: Linux does not let this process use AMX", RuntimeWarning, stacklevel=2)
    for name in [WANTED] if WANTED else PAIRS:
        if possible[name] and (name == "plain" or _is_right(name)):
            return name
        if WANTED:
            why_not = "its products have other bits here than they should" if possible[name] else "it is not there"
            raise UsageError(f"NPGPT_BFLOAT16={WANTED}: {why_not}")
        if possible[name]:
            words = f"bfloat16: products by {name} have other bits here than they should"
            warnings.warn(words, RuntimeWarning, stacklevel=2)
    raise UsageError("bfloat16: this processor multiplies it wrongly; NPGPT_BFLOAT16=plain does it right, slowly")


def quicker_dtype(width):
    """ "bfloat16" or "float32": what products of a model so wide are quicker with here (README.md has figures)."""
    if width < WIDE or KERNELS == "numpy":
        return "float32"
    try:
        return "bfloat16" if way() == "amx" or (way() == "avx512_bf16" and IS_AMD) else "float32"
    except UsageError:
        if WANTED:
            raise
        return "float32"


def _is_right(name):
    """Whether a way has its reference's bits for one pair of matrices, all kinds of numbers among them."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 64, 64), np.float32) * np.exp2(rng.integers(-3, 4, (2, 64, 64))).astype(np.float32)
    a[5, 7], a[9, 1], a[13, 2], b[4, 60], b[8, 61] = np.nan, np.inf, 1e-45, -np.inf, -0.0
    out = np.empty((64, 64), np.float32)
    multiply(out, a, b, False, False, np.empty(scratch_size(4), PAIRS[name]), 0, 64, 0, 64)
    expected = product_ref(a, b, name, SPAN)
    both = np.isnan(out) & np.isnan(expected)
    return bool((both | (out.view(np.int32) == expected.view(np.int32))).all())


class _Helpers(threading.local):
    """The threads that help this one, and memory for what they make and pack."""

    wanted, crew, pools = None, None, ()

    def __init__(self):
        self.scratch = {}


_helpers = _Helpers()


def shared(work, n, numbers):
    """Have work(slice) done for all of n, by the threads that share a product; by this one if it is about few numbers.

    To be called with what has the same bits wherever n is cut.
    """
    threads = told_threads() or processors()
    if threads == 1 or numbers < FEW:
        work(slice(0, n))
    else:
        share_out(work, n, threads)


def share_out(work, n, threads, unit=1):
    """Have each of some threads do its part of n, in whole units: work(slice)."""
    crew, pools = _crew(threads), _helpers.pools

    def share(i):
        with reuse_buffers(pools[i]) if i > 0 else contextlib.nullcontext():  # (number 0 runs in this thread)
            work(slice(*share_of(n, unit, i, threads)))

    crew.each(share, threads)


def _crew(threads):
    """The threads that help this one: so many with it, if there are as many processors."""
    if _helpers.wanted != threads:
        _helpers.wanted, _helpers.crew = threads, Crew(min(threads, processors()) - 1, "npgpt-product")
        _helpers.pools = [BufferPool() for _ in range(threads)]
    return _helpers.crew
