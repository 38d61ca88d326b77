"""Numba, kept in one place: how kernels are compiled, cached, and swapped for their NumPy references.

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
  threads share a token: `meet` and what follows it is for them);
- `error_model="numpy"`: a division is a division, without a check that would keep the loop from vectorising;
- `fastmath` lets sums be reassociated, so that they vectorise, but keeps NaN and infinity meaning what they mean;
- `exp` is a polynomial in float32, because the one in the C library is called a number at a time.
"""

import inspect
import os

import numpy as np

from npgpt.errors import UsageError
from npgpt.kernels.profiler import measured

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
}

# fast function's name -> (fast function, its NumPy reference)
PAIRS = {}
# fast function's name -> what computes, from its arguments, (FLOPs of its matrix products, bytes of its arrays)
COSTS = {}


def replaces(reference, flops=None, nbytes=None):
    """Tie a function that writes into buffers to the reference that it must equal.

    The fast function takes its outputs first and then exactly the reference's arguments; the reference returns the
    outputs, in that order.  An output that is also an input (updated in place) is named in both.

    flops, nbytes: functions of the fast function's arguments that tell what it costs; by default it does no matrix
    product, and each array is read or written once.
    """
    n_in = len(inspect.signature(reference).parameters)

    def cost(*args):
        return (
            flops(*args) if flops else 0,
            nbytes(*args) if nbytes else sum(arg.nbytes for arg in args if isinstance(arg, np.ndarray)),
        )

    def tie(fast):
        name = getattr(fast, "__name__", reference.__name__)
        PAIRS[name], COSTS[name] = (fast, reference), cost
        if KERNELS == "numba":
            return measured(name, cost)(fast)

        @measured(name, cost)
        def run_reference(*args):
            results = reference(*args[len(args) - n_in:])
            if not isinstance(results, tuple):
                results = (results,)
            for out, result in zip(args, results, strict=False):  # the outputs come first
                if out is not None and out is not result:
                    out[...] = result

        run_reference.__name__ = name
        return run_reference

    return tie


def exp(x):
    """e**x of a float32 or float64 number, inside a kernel only.

    float32: within 1e-7 relative of the exact value; below -87.7 it is 0, above 88.3 it stays at 2.4e38.  So GELU's
    slope, made with it in npgpt/ops/mlp.py, is within 1e-6 of its reference down to z = -1e11, and far off from -1e12.
    """
    raise TypeError("npgpt.kernels.jit.exp exists inside kernels only")


def largest(row, n):
    """The largest of the first n numbers of a row, inside a kernel only.

    float32: NaN if there is one, unless its sign bit is set: such a NaN counts as less than -inf.
    """
    raise TypeError("npgpt.kernels.jit.largest exists inside kernels only")


def array_at(address, n, like):
    """The n numbers that lie at an address, as an array of the dtype of `like`, inside a kernel only.

    So a kernel can be told of any number of arrays by a table of their addresses.  0 is no array: it has no numbers.
    """
    raise TypeError("npgpt.kernels.jit.array_at exists inside kernels only")


def count_up(counter):
    """counter[0] += 1, inside a kernel only; what this thread wrote before is seen by whoever sees the new number."""
    raise TypeError("npgpt.kernels.jit.count_up exists inside kernels only")


def meet(counter, n):
    """Wait until n threads have come here as often as this one, inside a kernel only.

    counter (1,) int64, 0 at first, is shared by the threads.  They spin: a wait takes a fraction of a microsecond, not
    the tens of it that a sleeping thread needs to wake up, but each of them needs a core.  Who makes the counter
    negative sets all of them free, here and at every later meeting.
    """
    raise TypeError("npgpt.kernels.jit.meet exists inside kernels only")


def next_job(jobs, seen, state):
    """Wait, as a thread that works for another one, until jobs[0] is no longer `seen`, inside a kernel only.

    Returns False if that takes long: then the thread should go to sleep, and somebody must wake it up for its next job.
    state (1,) tells what is the case, and changes from one to the next in one indivisible step: WAITS; CLAIMED by
    somebody who will count jobs[0] up (see `claim`), for whom the thread waits as long as it takes; or SLEEPS.
    """
    raise TypeError("npgpt.kernels.jit.next_job exists inside kernels only")


def claim(states):
    """Make sure that no thread goes to sleep any more before its next job, inside a kernel only.

    states (n, any): a row for each thread, whose first number is its state.  Returns the threads that sleep already, as
    the bits of a number.
    """
    raise TypeError("npgpt.kernels.jit.claim exists inside kernels only")


WAITS, CLAIMED, SLEEPS = 0, 1, 2
PATIENCE = 2000  # looks that a waiting thread takes, most of them some tenths of a microsecond long

if KERNELS == "numba":
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic, overload

    from npgpt.kernels import cache

    def kernel(function):
        """Compile a function over arrays.  One specialisation is built per dtype, at its first call."""
        compiled = numba.njit(**FLAGS)(function)
        cache.keep(compiled)
        return compiled

    helper = numba.njit(**FLAGS)  # for scalar functions that are compiled into the kernels that call them

    @intrinsic
    def _pointer(typingctx, address, like):
        """The address as a pointer to numbers like those of an array."""

        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(like.dtype)(address, like), codegen

    @overload(array_at, jit_options=FLAGS)
    def _array_at(address, n, like):
        def array_at(address, n, like):
            return numba.carray(_pointer(address, like), n if address else 0)

        return array_at

    def _is_counter(kind):
        """Whether an array of this kind has what the following intrinsics take for int64, and change, at its start."""
        return isinstance(kind, types.Array) and kind.dtype == types.int64 and kind.ndim == 1 and kind.mutable

    @helper
    def _check_counter(counter):
        if len(counter) == 0:
            raise ValueError("a counter, or a thread's state, needs a number: this array has none")

    @overload(count_up, jit_options=FLAGS)
    def _count_up(counter):
        def count_up(counter):
            _check_counter(counter)
            _add_atomically(counter, 1)

        return count_up

    def _atomic(operation):
        """The intrinsic that does an operation of LLVM's atomicrmw on counter[0] and n; it returns what stood there."""

        @intrinsic
        def atomic(typingctx, counter, n):
            if not _is_counter(counter):
                return None

            def codegen(context, builder, signature, args):
                array = cgutils.create_struct_proxy(signature.args[0])(context, builder, value=args[0])
                return builder.atomic_rmw(operation, array.data, args[1], "seq_cst")

            return types.int64(counter, types.int64), codegen

        return atomic

    _add_atomically, _swap_atomically = _atomic("add"), _atomic("xchg")

    @intrinsic
    def _look(typingctx, counter):
        """counter[0] as it is in memory now."""
        if not _is_counter(counter):
            return None

        def codegen(context, builder, signature, args):
            array = cgutils.create_struct_proxy(signature.args[0])(context, builder, value=args[0])
            return builder.load_atomic(array.data, "seq_cst", 8)

        return types.int64(counter), codegen

    @intrinsic
    def _let_others_run(typingctx):
        """Tell the system that this thread has nothing to do; where it knows of no such call, nothing happens."""

        def codegen(context, builder, signature, args):
            if os.name == "posix":
                call = ir.FunctionType(ir.IntType(32), [])
                builder.call(cgutils.get_or_insert_function(builder.module, call, "sched_yield"), [])
            return context.get_dummy_value()

        return types.void(), codegen

    @intrinsic
    def _change_atomically(typingctx, counter, old, new):
        """Whether counter[0] was `old`; then it is `new` now.  One indivisible step."""
        if not _is_counter(counter):
            return None

        def codegen(context, builder, signature, args):
            array = cgutils.create_struct_proxy(signature.args[0])(context, builder, value=args[0])
            pair = builder.cmpxchg(array.data, args[1], args[2], "seq_cst", "seq_cst")
            return builder.extract_value(pair, 1)

        return types.boolean(counter, types.int64, types.int64), codegen

    @overload(next_job, jit_options=FLAGS)
    def _next_job(jobs, seen, state):
        def next_job(jobs, seen, state):
            _check_counter(jobs)
            _check_counter(state)
            turns = 0
            while _look(jobs) == seen:
                turns += 1
                if turns > 1000:
                    _let_others_run()
                if turns == PATIENCE and _change_atomically(state, WAITS, SLEEPS):
                    return False
            _swap_atomically(state, WAITS)
            return True

        return next_job

    @overload(claim, jit_options=FLAGS)
    def _claim(states):
        def claim(states):
            asleep = 0
            for thread in range(len(states)):
                _check_counter(states[thread])
                if _swap_atomically(states[thread], CLAIMED) == SLEEPS:
                    asleep |= 1 << thread
            return asleep

        return claim

    @overload(meet, jit_options=FLAGS)
    def _meet(counter, n):
        def meet(counter, n):
            if n == 1:
                return
            _check_counter(counter)
            arrived = _add_atomically(counter, 1) + 1
            all_here = (arrived + n - 1) // n * n
            turns = 0
            while 0 <= _look(counter) < all_here:
                turns += 1
                if turns > 1000:  # the thread that we wait for may be waiting for this core
                    _let_others_run()

        return meet

    @overload(exp, jit_options=FLAGS)
    def _exp(x):
        if x == numba.float32:
            return _exp32
        return lambda x: np.exp(x)

    @overload(largest, jit_options=FLAGS)
    def _largest(row, n):
        return _largest32 if row.dtype == numba.float32 else _largest64

else:

    def kernel(function):
        return function

    helper = kernel


def _exp32(x):
    # e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln(2)/2, and e^r by its Taylor polynomial of degree 7.
    # 2^n is made by writing n into the exponent bits.  A NaN stays a NaN: both comparisons are false for it.
    x = np.float32(-88) if x < np.float32(-88) else x  # n = -127 makes the exponent bits 0, and the result 0
    x = np.float32(88.37626) if x > np.float32(88.37626) else x
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375)  # ln 2 in two parts, so that n * ln 2 loses nothing
    r = r + n * np.float32(2.12194440e-4)
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1)
    p = p * r + np.float32(1)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


def _largest32(row, n):
    # A maximum of floats does not vectorise as long as NaN means something; one of integers does.  The bits of a float,
    # read as an integer, are in the floats' order but for the negative ones, whose order is reversed: flip them.
    best = np.int32(-(2**31))
    for j in range(n):
        bits = np.float32(row[j]).view(np.int32)
        best = max(best, np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))))
    best = np.int32(best ^ ((best >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return np.int32(best).view(np.float32)


def _largest64(row, n):
    m = row[0]
    for j in range(1, n):
        m = max(m, row[j])
    return m


@helper
def in_two(lse, like):
    """A float64 as the sum of two numbers of the dtype of `like`: the nearest one, and what that leaves over.

    For the logarithm of a sum of e^s: what float32 leaves over of it is the relative error of each e^(s - lse).  Of one
    below 16 that is less than the error of `exp`, and 0 here.
    """
    high = like.dtype.type(lse)
    return high, like.dtype.type(lse - high) if abs(lse) > 16 else like.dtype.type(0)
