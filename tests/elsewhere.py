"""Does npgpt compute right on other processors?  Runs the tests of what computes as they run on lesser ones.

    python tests/elsewhere.py            as on one with AVX2 only, then as on one with SSE only
    python tests/elsewhere.py avx2       as on one of them
    python tests/elsewhere.py --short    a choice of these tests, as CI does (90 seconds)
    python tests/elsewhere.py --all      all tests that there are

Numba, OpenBLAS and NumPy are told, in the environment, to use no more than the other processor has.  Before the first
test it is checked that they obey.  A processor that cannot be played here is skipped, with the reason.  Exit code 1 if
a test failed, or if something uses more than it may.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import llvmlite.binding
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent

NAMES = "engine ops tiles bfloat16 decode draft prompt parallel resume sampling torch_parity".split()
TESTS = [f"tests/test_{name}.py" for name in NAMES]
# The width of a vector decides where tiles and dot products end, and in which order numbers are added.  The order
# decides how sums are rounded, and rounding decides the path of a training.  So this choice has tiles and dot products
# with all their edges, each kernel beside its reference, decoding, and trainings: beside PyTorch's, by several workers,
# resumed.  Most of the time is that of compiling, so where there are two types it has float32 alone.
SHORT = [
    *TESTS, "-k",
    "test_tiles or (test_bfloat16 and 1000) or whatever_is_lost or any_number_of_workers or with_the_cache or "
    "float32 and (kernel_agrees or token_by_token or test_torch_parity)",
]  # fmt: skip


@dataclass(frozen=True)
class Processor:
    """One that is to be played."""

    llvm: str  # LLVM's name for it
    openblas: str  # OpenBLAS's name for it
    features: frozenset  # all it has, by LLVM's names
    numpy_features: frozenset  # all it has, by NumPy's names
    vector: int  # bytes of a vector
    rows: int  # of a tile of npgpt/kernels/tiles.py


V2 = frozenset("64bit cmov crc32 cx16 cx8 fxsr mmx popcnt sahf sse sse2 sse3 sse4.1 sse4.2 ssse3".split())
V3 = V2 | frozenset("avx avx2 bmi bmi2 f16c fma lzcnt movbe pclmul xsave xsaveopt".split())
NUMPY_V2 = frozenset("SSE SSE2 SSE3 SSSE3 SSE41 SSE42 POPCNT X86_V2".split())
NUMPY_V3 = NUMPY_V2 | frozenset("AVX AVX2 F16C FMA3 X86_V3".split())
PROCESSORS = {
    "avx2": Processor("haswell", "Haswell", V3, NUMPY_V3, vector=32, rows=4),
    "sse": Processor("nehalem", "Nehalem", V2, NUMPY_V2, vector=16, rows=4),
}
REGISTERS = {"xmm": 16, "ymm": 32, "zmm": 64}  # bytes of a register, by how its name begins

# sitecustomize.py, which every Python runs first.  npgpt asks LLVM, not Numba, what the processor has.  Tests give a
# PYTHONPATH of their own to Pythons that they start: the folder of this file must be in it, lest they do not play.
SITE = """
import os, subprocess

class Popen(subprocess.Popen):
    def __init__(self, *args, env=None, **options):
        env = dict(os.environ if env is None else env)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [os.path.dirname(__file__), env.get("PYTHONPATH")]))
        super().__init__(*args, env=env, **options)

subprocess.Popen = Popen
if os.environ.get("NPGPT_KERNELS") != "numpy":  # with the references nothing may load LLVM: there is a test for it
    import llvmlite.binding as llvm

    features = llvm.FeatureMap((word[1:], word[0] == "+") for word in os.environ["NUMBA_CPU_FEATURES"].split(","))
    llvm.get_host_cpu_features = lambda: features
"""


def numpy_features():
    """What NumPy's loops always use, and what they use besides because this processor has it."""
    umath = (np._core if hasattr(np, "_core") else np.core)._multiarray_umath  # it is np.core in NumPy 1
    optional = {name for name in umath.__cpu_dispatch__ if umath.__cpu_features__[name]}
    return set(umath.__cpu_baseline__), optional


def cannot(processor):
    """Why a processor cannot be played here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"this is no x86-64 processor, but {platform.machine()}"
    host = llvmlite.binding.get_host_cpu_features()
    if missing := sorted(name for name in processor.features if not host.get(name, True)):
        return f"this processor has no {', '.join(missing)}"
    if beyond := sorted(numpy_features()[0] - processor.numpy_features):
        return f"this NumPy cannot do without {', '.join(beyond)}"
    return None


def environment(processor, folder):
    """The variables that have a processor played; sitecustomize.py is in the folder, and kernels will be."""
    host = llvmlite.binding.get_host_cpu_features()
    features = llvmlite.binding.FeatureMap((name, has and name in processor.features) for name, has in host.items())
    return {
        **os.environ,
        "NPGPT_KERNELS": "numba",
        "NUMBA_CPU_NAME": processor.llvm,
        "NUMBA_CPU_FEATURES": features.flatten(),
        "NUMBA_CACHE_DIR": folder,
        "OPENBLAS_CORETYPE": processor.openblas,
        "NPY_DISABLE_CPU_FEATURES": " ".join(sorted(numpy_features()[1] - processor.numpy_features)),
        "PYTHONPATH": os.pathsep.join([folder, str(ROOT)]),
    }


def disobeyed(processor):
    """A line for each part that, in this process, does not use what the processor has."""
    from npgpt.kernels.blas import blas_kernels
    from npgpt.kernels.packed import multiply, scratch_size
    from npgpt.kernels.tiles import ROWS
    from npgpt.kernels.vectors import VECTOR

    if (VECTOR, ROWS) != (processor.vector, processor.rows):
        yield f"npgpt/kernels has VECTOR, ROWS = {VECTOR}, {ROWS}"
    a = np.ones((64, 64), np.float32)
    scratch = np.empty(scratch_size(a.itemsize), a.dtype)
    multiply(np.empty_like(a), a, a, False, False, scratch, 0, len(a), 0, len(a))
    assembly = "".join(multiply.inspect_asm().values())
    widest = max((register for register in REGISTERS if register in assembly), default="no")
    if REGISTERS.get(widest) != processor.vector:
        yield f"the kernel of a product uses {widest} registers"
    if blas_kernels() not in (None, processor.openblas):
        yield f"OpenBLAS uses its kernels for {blas_kernels()}"
    if beyond := sorted(numpy_features()[1] - processor.numpy_features):
        yield f"NumPy uses {', '.join(beyond)}"


def play(name, *tests):
    """Run tests in this process, which has the environment of another processor -> exit code."""
    if lines := list(disobeyed(PROCESSORS[name])):
        print(*(f"{name}: a switch did not take: {line}" for line in lines), sep="\n")
        return 1
    return pytest.main([*tests])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("processors", nargs="*", metavar="PROCESSOR", help=f"of {', '.join(PROCESSORS)} (default: all)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--short", dest="tests", action="store_const", const=SHORT, help="a choice of tests, as in CI")
    which.add_argument("--all", dest="tests", action="store_const", const=["tests"], help="all tests that there are")
    which.add_argument("--play", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # what this file starts itself with
    parser.set_defaults(tests=TESTS)
    args = parser.parse_args(argv)
    if args.play:
        return play(*args.play)
    if unknown := {*args.processors} - {*PROCESSORS}:
        parser.error(f"there is no {' or '.join(sorted(unknown))}, only {', '.join(PROCESSORS)}")
    failed = 0
    for name in args.processors or PROCESSORS:
        if reason := cannot(PROCESSORS[name]):
            print(f"{name}: skipped: {reason}")
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="npgpt-elsewhere-") as folder:
            Path(folder, "sitecustomize.py").write_text(SITE, encoding="utf-8")
            command = [sys.executable, __file__, "--play", name, *args.tests]
            code = subprocess.run(command, cwd=ROOT, env=environment(PROCESSORS[name], folder)).returncode
        print(f"{name}: {'FAILED' if code else 'passed'}, {time.perf_counter() - start:.0f} s", flush=True)
        failed += code != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
