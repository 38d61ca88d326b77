"""No kernel reads or writes beyond an array: tests of what computes, with Numba's bounds checks.

    python tests/test_bounds.py            all tests of operations, decoding, workers and tiles (2 minutes)
    python tests/test_bounds.py TEST ...   these tests; any arguments of pytest

A plain run of pytest has a short choice of them, in a process of its own (25 seconds).

What is read beyond an array is mostly a number like others, and no test fails.  With NUMBA_BOUNDSCHECK=1 it is an
IndexError.  Kernels that were compiled without this switch stay as they were when they come from Numba's cache, so
those of here have a cache of their own; and before the first test it is checked that they are checked.  What
npgpt/kernels/tiles.py has LLVM read and write is not: each of its entries checks its arguments (tests/test_tiles.py).
"""

import inspect
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from npgpt.kernels import jit, maths

ROOT = Path(__file__).resolve().parent.parent
WHOLE = [f"tests/test_{name}.py" for name in "ops decode draft prompt parallel tiles bfloat16".split()]
# Each kernel beside its reference, decoding with all that its kernel does, and a training by several workers.  Most of
# the time is that of compiling, so this choice has float32 alone, and no int8 but that of a draft model.
SHORT = [
    *WHOLE, "-k",
    "float32 and (kernel_agrees or token_by_token or a_blocked_product_knows) "
    "or whatever_is_computed_beside_it and False or draws_what_is_chosen or any_number_of_workers "
    "or 1000_random_products or float32-float32 or that_round and float32 or a_checksum or 1-bfloat16 "
    "or nothing_in_the_cache",
]  # fmt: skip

pytestmark = pytest.mark.skipif(jit.KERNELS == "numpy", reason="NumPy checks bounds itself")


@jit.helper
def number(x, i):
    return x[i]


@jit.kernel
def read(out, x, i):
    out[0] = x[i]


@jit.kernel
def read_row(out, x, i):
    out[0] = x.reshape(len(x), 1)[i, :].sum()


@jit.kernel
def read_by_helper(out, x, i):
    out[0] = number(x, i)


@jit.kernel
def read_by_overload(out, x, i):
    out[0] = maths.largest(x, i + 1)


@jit.kernel(counts=True)
def read_at_address(out, x, i):
    out[0] = maths.array_at(x.ctypes.data, len(x), x)[i]


@jit.kernel
def write(out, x, i):
    x[i] = out[0]


def unchecked():
    """The names of those of the kernels above that go beyond an array without an IndexError."""
    for kernel in (read, read_row, read_by_helper, read_by_overload, read_at_address, write):
        out, x = np.zeros(1, np.float32), np.zeros(9, np.float32)[:3]  # beyond its end there is room
        kernel(out, x, 2)
        try:
            kernel(out, x, 3)
        except IndexError:
            continue
        yield kernel.__name__


def unreached():
    """The names of npgpt's kernels, and of their helpers, that nothing has compiled in this process."""
    from numba.core.dispatcher import Dispatcher

    def is_compiled(function):
        return isinstance(function, Dispatcher)

    for name, module in sorted(sys.modules.items()):
        for value in vars(module).values() if name.startswith("npgpt.") else ():
            compiled = inspect.unwrap(value, stop=is_compiled) if callable(value) else None
            if is_compiled(compiled) and compiled.__module__ == name and not compiled.signatures:
                yield f"{name}.{compiled.__name__}"


def run_checked(tests, **options):
    """Run tests in another process, with kernels that are compiled with checks.  options: subprocess.run's."""
    with tempfile.TemporaryDirectory(prefix="npgpt-bounds-") as folder:
        switches = {"NPGPT_KERNELS": "numba", "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": folder}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **switches}
        return subprocess.run([sys.executable, __file__, "--here", *tests], cwd=ROOT, env=environment, **options)


def main(args):
    if args[:1] != ["--here"]:
        return run_checked(args or WHOLE).returncode
    if names := list(unchecked()):
        print(f"kernels are not checked: {', '.join(names)}")
        return 1
    code = pytest.main(args[1:])
    if args[1:] in (WHOLE, SHORT) and (names := list(unreached())):
        print(f"no test has run {', '.join(names)}")
        return 1
    return code


def test_no_kernel_reads_or_writes_beyond_an_array():
    done = run_checked(SHORT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(os.environ.get("NUMBA_BOUNDSCHECK", "0") != "0", reason="all kernels are checked here")
def test_kernels_without_checks_are_found_out():
    assert [*unchecked()] == ["read", "read_row", "read_by_helper", "read_by_overload", "read_at_address", "write"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
