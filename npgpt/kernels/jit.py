"""How kernels are compiled by Numba, and swapped for their NumPy references.

An op file in `npgpt/ops/` writes every computation twice: `layernorm_forward_ref`, plain NumPy that returns fresh
arrays, and `layernorm_forward`, which writes the same figures into buffers it is given.  The two are tied together:

    @replaces(layernorm_forward_ref)      # PAIRS knows that these two must agree; tests and benchmarks walk the list
    @kernel                               # compiled by Numba
    def layernorm_forward(y, mean, rstd, x, weight, bias, eps): ...      # outputs first, then the reference's inputs

With the environment variable NPGPT_KERNELS=numpy, Numba is never imported and the name `layernorm_forward` runs the
reference instead: the whole model can then be stepped through with a debugger, and any line of it can print.

What makes the kernels fast (measured in benchmarks/kernels.py):

- they are serial and release the GIL; all parallelism is one thread per share of the batch (npgpt/run/parallel.py), so
  no second pool of threads fights with BLAS over the cores.  (In npgpt/generate/decode.py, where no BLAS is at work,
  threads share a token: spin.py is for them);
- `error_model="numpy"`: a division is a division, without a check that would keep the loop from vectorising;
- `fastmath` lets sums be reassociated, so that they vectorise, but keeps NaN and infinity meaning what they mean;
- `exp` (maths.py) is a polynomial in float32, because the one in the C library is called a number at a time.
"""

import functools
import inspect
import os

import numpy as np

from npgpt.errors import UsageError
from npgpt.kernels.profiler import measured_kernel

KERNELS = os.environ.get("NPGPT_KERNELS", "numba")
if KERNELS not in ("numba", "numpy"):
    raise UsageError(f"NPGPT_KERNELS must be 'numba' or 'numpy', got {KERNELS!r}")
if KERNELS == "numba":
    import numba

    if numba.config.DISABLE_JIT:  # NUMBA_DISABLE_JIT: there are parts of kernels that only Numba can run
        KERNELS = "numpy"

FLAGS = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "arcp", "nsz", "afn"},
    "no_cfunc_wrapper": True,  # nobody calls them from C, and each wrapper has to be compiled
}

# fast function's name -> (fast function, its NumPy reference)
PAIRS = {}
# fast function's name -> what computes, from its arguments, (FLOPs of its matrix products, bytes of its arrays)
COSTS = {}


def replaces(reference, flops=None, nbytes=None, row=None):
    """Tie a function that writes into buffers to the reference that it must equal.

    The fast function takes its outputs first and then exactly the reference's arguments; the reference returns the
    outputs, in that order.  An output that is also an input (updated in place) is named in both.

    flops, nbytes: functions of the fast function's arguments that tell what it costs; by default it does no matrix
    product, and each array is read or written once.

    row: a function of the fast function's arguments: the name of its row in a Profile; by default the fast function's.
    """
    def cost(*args):
        arrays = [arg for arg in args if isinstance(arg, np.ndarray)]
        return flops(*args) if flops else 0, nbytes(*args) if nbytes else sum(array.nbytes for array in arrays)

    def tie(fast):
        name = getattr(fast, "__name__", reference.__name__)
        PAIRS[name], COSTS[name] = (fast, reference), cost
        if KERNELS == "numpy":
            fast = writing(reference)
            fast.__name__ = name
        return measured_kernel(fast, row or name, cost)

    return tie


def writing(reference):
    """A function like the fast one, which writes what the reference returns into the outputs that it is given."""
    n_in = len(inspect.signature(reference).parameters)

    def run_reference(*args):
        results = reference(*args[len(args) - n_in :])
        if not isinstance(results, tuple):
            results = (results,)
        for out, result in zip(args, results, strict=False):  # the outputs come first
            if out is not None and out is not result:
                out[...] = result

    return run_reference


def inside_kernels(function=None, *, float32=None, pairs=None, tiles=None, loops=True):
    """Decorator: a helper that exists inside kernels only.

    float32: the function that takes its place where its first argument is a float32, or an array of them;
    pairs: the one where it is an array of uint32; tiles: of int32, by default the same (bfloat16.py).
    loops: as for `helper`.
    """
    if function is None:
        return functools.partial(inside_kernels, float32=float32, pairs=pairs, tiles=tiles or pairs, loops=loops)

    @functools.wraps(function)
    def call(*args):
        raise TypeError(f"{function.__module__}.{function.__name__} exists inside kernels only")

    def choose(first, *others):
        """Numba tells the types of the arguments, and compiles what this returns for them."""
        dtype = getattr(first, "dtype", first)
        return {numba.float32: float32, numba.uint32: pairs, numba.int32: tiles}.get(dtype) or function

    if KERNELS == "numba":
        overload(call, jit_options=_options_of_helpers(loops), strict=False)(choose)
    return call


def _options_of_helpers(loops):
    return {**FLAGS, "no_cpython_wrapper": True, "pipeline_class": OfHelpers if loops else OfPlainHelpers}


if KERNELS == "numba":
    from numba.extending import intrinsic, overload

    from npgpt.kernels import cache
    from npgpt.kernels.compiler import OfHelpers, OfKernels, OfPlainHelpers

    def kernel(function=None, *, counts=False, inlined=False):
        """Compile a function over arrays.  One specialisation is built per dtype, at its first call.

        counts: whether the users of each array are counted, for a function that makes an array or returns a view, or
        calls one that does.  Each view costs it two atomic additions then, and all that is inlined compiles once more.

        inlined: whether it becomes a part of each kernel that calls it.  One that adds floats up must: otherwise each
        caller has a copy, the order of the sums differs from copy to copy, and all callers run whichever copy the
        process has loaded first.
        """
        if function is None:
            return functools.partial(kernel, counts=counts, inlined=inlined)
        compiled = numba.njit(**FLAGS, _nrt=counts, forceinline=inlined, pipeline_class=OfKernels)(function)
        cache.keep(compiled)
        return compiled

    def helper(function=None, *, counts=False, inlined=False, loops=True):
        """Compile a function into the kernels that call it; Python cannot.

        loops: whether it has any that LLVM should vectorise.  It is optimised by itself then, and once more as a part
        of each kernel.  What has none, or has vectors of its own (vectors.py), only takes longer to compile so.
        """
        if function is None:
            return functools.partial(helper, counts=counts, inlined=inlined, loops=loops)
        return numba.njit(**_options_of_helpers(loops), _nrt=counts, forceinline=inlined)(function)

else:

    def kernel(function=None, **_):
        return function or kernel

    helper, intrinsic = kernel, inside_kernels
