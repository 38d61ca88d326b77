"""Do the tests notice?  Plants each mistake of npgpt/faults.py, one at a time in a copy of the package, and runs tests.

    python tests/mutation.py [--jobs 2] [--only WORD]

Prints a table of which test noticed which fault.  Exit code 1 if one survived, 2 if the tests fail without any fault.
"""

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from npgpt.faults import FAULTS

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300  # seconds, for one run of the tests

# Which tests have to do with a source file: (files, words of which one is in the test's name; "" for all).
RELEVANT = {
    "npgpt/engine.py": (["test_engine.py"], ""),
    "npgpt/ops/primitives.py": (["test_gradcheck.py", "test_ops.py", "test_engine.py"], "not attention and not gpt"),
    "npgpt/tiles.py": (["test_tiles.py"], ""),
    "npgpt/ops/embedding.py": (["test_ops.py", "test_gradcheck.py", "test_compositions.py"], "embedding or gpt"),
    "npgpt/ops/layernorm.py": (["test_ops.py", "test_gradcheck.py", "test_compositions.py"], "layernorm"),
    "npgpt/ops/linear.py": (["test_ops.py", "test_gradcheck.py", "test_compositions.py"], "linear"),
    "npgpt/ops/attention.py": (["test_ops.py", "test_gradcheck.py", "test_compositions.py"], "attention"),
    "npgpt/ops/mlp.py": (["test_ops.py", "test_gradcheck.py", "test_compositions.py"], "mlp or gelu"),
    "npgpt/ops/cross_entropy.py": (["test_ops.py", "test_gradcheck.py", "test_compositions.py"], "cross or logits"),
    "npgpt/ops/dropout.py": (["test_ops.py", "test_gradcheck.py", "test_compositions.py"], "dropout or mask"),
    "npgpt/model.py": (["test_compositions.py"], ""),
    "npgpt/optim.py": (["test_ops.py", "test_optim.py"], "optim or adamw"),
    "npgpt/parallel.py": (["test_parallel.py"], ""),
    "npgpt/decode.py": (["test_decode.py"], "reference or several or quantize or whole or int8_is or draws"),
    "npgpt/sampling.py": (["test_sampling.py"], ""),
    "npgpt/hub.py": (["test_hub.py"], "shapes or folder_gives or tied or zeros or fit"),
}


@dataclass
class Result:
    verdict: str  # passed, failed, or what else became of it
    test: str
    seconds: float
    output: str


class Copy:
    """A folder with the package and its tests.

    Its path stays the same from fault to fault, and untouched files keep their time stamps: by these Numba knows
    which of its compiled kernels are still good.
    """

    def __init__(self, folder, original):
        self.folder, self.original = folder, original
        shutil.copytree(original, folder)

    def run(self, tests, word, kernels):
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.folder),
            "NPGPT_KERNELS": kernels,
            "NUMBA_CACHE_DIR": str(self.folder / "kernel_cache"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider"]
        command += ["-k", word, *(f"tests/{name}" for name in tests)]
        start = time.perf_counter()
        try:
            done = subprocess.run(
                command, cwd=self.folder, env=environment, timeout=TIMEOUT,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            verdict = {0: "passed", 1: "failed"}.get(done.returncode, f"pytest ended with {done.returncode}")
            output = done.stdout
        except subprocess.TimeoutExpired:
            verdict, output = "failed", f"FAILED (no end after {TIMEOUT} s)"
        test = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.*?)(?: - .*)?$", output, re.MULTILINE)
        return Result(verdict, test.group(1) if test else "", time.perf_counter() - start, output)

    def run_with(self, fault):
        """Plant a fault, run the tests that have to do with its file, and take it out again."""
        file, original = self.folder / fault.file, self.original / fault.file
        source = file.read_text(encoding="utf-8")
        if source.count(fault.before) != 1:
            return Result("cannot be planted", "", 0.0, "")
        file.write_text(source.replace(fault.before, fault.after), encoding="utf-8")
        try:
            return self.run(*RELEVANT[fault.file], fault.kernels)
        finally:
            shutil.copy2(original, file)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--only", default="", metavar="WORD", help="only faults with this in their name or file")
    args = parser.parse_args(argv)
    faults = [fault for fault in FAULTS if args.only.lower() in (fault.name + " " + fault.file).lower()]
    if not faults:
        parser.error(f"no fault with {args.only!r} in its name or file")

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="npgpt-mutation-") as folder:
        folder = Path(folder)
        original = folder / "original"
        for part in ("npgpt", "tests"):
            shutil.copytree(ROOT / part, original / part, ignore=shutil.ignore_patterns("__pycache__"))
        copies = queue.SimpleQueue()
        for i in range(max(1, args.jobs)):
            copies.put(Copy(folder / f"copy{i}", original))

        def with_a_copy(work):
            copy = copies.get()
            try:
                return work(copy)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(max(1, args.jobs)) as pool:
            tests = {}  # kernels -> files of tests that will be run with them
            for fault in faults:
                tests.setdefault(fault.kernels, set()).update(RELEVANT[fault.file][0])
            results = pool.map(
                lambda kernels: with_a_copy(lambda copy: copy.run(sorted(tests[kernels]), "", kernels)), tests
            )
            for kernels, result in zip(tests, results, strict=True):
                print(f"without a fault, NPGPT_KERNELS={kernels}: {result.verdict}  {result.seconds:.1f} s", flush=True)
                if result.verdict != "passed":
                    print(result.output)
                    return 2

            survived = 0
            width = max(len(fault.name) for fault in faults)
            results = pool.map(lambda fault: with_a_copy(lambda copy: copy.run_with(fault)), faults)
            for fault, result in zip(faults, results, strict=True):
                killed = result.verdict == "failed"
                survived += not killed
                what = "killed  " if killed else "SURVIVED" if result.verdict == "passed" else result.verdict.upper()
                print(f"{fault.name:<{width}}  {what}  {result.seconds:5.1f} s  {result.test}", flush=True)

    print(f"{len(faults)} faults, {survived} survived, {time.perf_counter() - start:.0f} s")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
