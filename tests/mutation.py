"""Do the tests notice?  Plants each mistake of faults.py, one at a time in a copy of the package, and runs tests.

    python tests/mutation.py [--jobs 2] [--only WORD]
    python tests/mutation.py --audit       does a training with --gradcheck-every notice, instead of the tests?
    python tests/mutation.py --prove       does npgpt.prove refuse them, instead of the tests?
    python tests/mutation.py --short       a choice, as in CI: not what that has run before (the tests without a fault,
                                           faults that tests/test_prove.py plants), and every third fault of kernels

Prints a table of which test noticed which fault.  Exit code 1 if one survived, 2 if the tests fail without any fault.
"""

import argparse
import contextlib
import importlib
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from faults import FAULTS

from npgpt.errors import GradientError

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT, TOO_LONG = 600, "timeout"  # seconds, for one run of the tests

# Which tests have to do with a source file: (files, words of which one is in the test's name; "" for all).  An op that
# is not named has OF_OPS, with its own name for the word.
OF_OPS = ["test_ops.py", "test_gradcheck.py", "test_compositions.py"]
RELEVANT = {
    "npgpt/engine.py": (["test_engine.py"], ""),
    "npgpt/kernels/buffers.py": (["test_engine.py"], ""),
    "npgpt/kernels/sums.py": (["test_ops.py"], "sums or shapes"),
    "npgpt/kernels/masks.py": (["test_engine.py"], ""),
    "npgpt/ops/primitives.py": (["test_gradcheck.py", "test_ops.py", "test_engine.py"], "not attention and not gpt"),
    "npgpt/tensor.py": (["test_gradcheck.py", "test_ops.py", "test_engine.py"], "not attention and not gpt"),
    "npgpt/kernels/vectors.py": (["test_tiles.py", "test_prompt.py"], "test_tiles"),
    "npgpt/kernels/attention.py": (
        [*OF_OPS, "test_prompt.py", "test_kernel_cache.py", "test_parallel.py"], "attention",
    ),
    "npgpt/kernels/packed.py": (["test_tiles.py", "test_bfloat16.py"], "packed or bits_are"),
    "npgpt/kernels/bfloat16.py": (["test_bfloat16.py"], "bits_are"),
    "npgpt/kernels/amx.py": (["test_bfloat16.py"], "bits_are"),
    "npgpt/kernels/matmul.py": (["test_bfloat16.py"], ""),
    "npgpt/kernels/gil.py": (["test_gil.py"], ""),
    "npgpt/kernels/maths.py": (["test_prompt.py"], "that_round"),
    "npgpt/run/audit.py": (["test_bfloat16.py"], "audit"),
    "npgpt/run/setup.py": (["test_bfloat16.py"], "another_way"),
    "npgpt/run/state.py": (["test_bfloat16.py"], "names_no_dtype"),
    "npgpt/kernels/cache.py": (["test_bfloat16.py"], "kept_for"),
    "npgpt/kernels/compiler.py": (["test_kernel_cache.py"], "garbage"),
    "npgpt/kernels/tiles.py": (["test_tiles.py", "test_bfloat16.py"], "test_tiles or bits_are"),
    "npgpt/ops/embedding.py": (OF_OPS, "embedding or gpt"),
    "npgpt/ops/mlp.py": (OF_OPS, "mlp or gelu"),
    "npgpt/ops/cross_entropy.py": (OF_OPS, "cross or logits"),
    "npgpt/ops/dropout.py": (OF_OPS, "dropout or mask"),
    "npgpt/ops/attention.py": ([*OF_OPS, "test_model.py", "test_parallel.py"], "attention or cache"),
    "npgpt/model.py": (["test_compositions.py", "test_model.py"], ""),
    "npgpt/optim.py": (["test_ops.py", "test_optim.py"], "optim or adamw"),
    "npgpt/muon.py": (["test_ops.py", "test_optim.py"], "optim or adamw"),
    "npgpt/run/parallel.py": (["test_ranks.py", "test_parallel.py", "test_bfloat16.py"], "not mpiexec and not 1000"),
    "npgpt/run/ranks.py": (["test_ranks.py"], "not mpiexec"),
    "npgpt/run/trainer.py": (["test_ranks.py"], "not mpiexec"),
    "npgpt/generate/decode.py": (
        ["test_decode.py", "test_gil.py"], "several or forward_pass or copied or int8_is or draws or can_spin",
    ),
    "npgpt/generate/prompt.py": (["test_prompt.py"], "logits_of or go_on or pieces"),
    "npgpt/generate/matrices.py": (["test_prompt.py"], "logits_of or round or checksum"),
    "npgpt/generate/decode_kernel.py": (
        ["test_decode.py", "test_prompt.py"], "several or forward_pass or int8_is or draws",
    ),
    "npgpt/generate/sampling.py": (["test_sampling.py"], ""),
    "npgpt/generate/generation.py": (["test_sampling.py", "test_draft.py"], ""),
    "npgpt/generate/draft.py": (["test_draft.py"], ""),
    "npgpt/generate/writer.py": (["test_sampling.py"], ""),
    "npgpt/files/weights.py": (["test_hub.py"], "shapes or folder_gives or tied or zeros or fit"),
    "npgpt/files/hub.py": (["test_hub.py"], "shapes or folder_gives or tied or zeros or fit"),
}

# Faults that would wait long for the test which can see them: how the name begins -> words that are in that test's.
SOONER = {
    "kernel cache: softmax": "whatever_order",
    "attention: every thread drops": "what_threads_share",
    "past: ": "go_on",
    "vectors: int8": "logits_of_the_model",
    "decode: bfloat16 are": "logits_of_the_model",
    "matrices: what has changed": "rounded_once",
    "matrices: a checksum": "checksum",
    "matrices: ": "that_round",
    "prompt: the scale": "logits_of_the_model",
    "prompt: its pieces": "pieces",
    "prompt: positions": "go_on",
    "prompt: the last rows": "pieces",
    "prompt: ": "go_on or logits_of_the_model",
    "parallel: a step forgets its dtype": "gradients_of_a_model",
    "parallel: other workers": "an_error_in_any_worker",
    "parallel: an evaluation forgets": "an_evaluation_is_in",
    "transpose: pairs": "bits_are",
    "decode: every token has the first one's scale": "int8_is",
    "decode: the first rows' logits are shown": "several",
    "decode: all tokens of a call are drawn": "draws",
    "decode: one random number for all tokens": "draws",
    "decode: the temperature is upside down": "draws",
    "decode: kernels are loaded": "can_spin",
    "decode: rounded weights": "not_sought",
    "decode: a shortlist": "a_shortlist_draws",
    "decode: a draft model": "a_draft_model_draws",
    "decode: the logits of a shortlist": "a_shortlist_draws",
    "decode: the biases of matrices": "shape0-True",
    "decode: layer norm without its bias": "logits_of_the_model",
    "draft: an interrupt": "an_interrupt_at",
    "draft: what comes before": "what_comes_before",
    "draft: a draft model draws": "random_numbers",
    "draft: all tokens that a draft model": "random_numbers",
    "draft: a draft model that is wrong": "rests_when",
    "draft: a draft costs": "must_save",
    "draft: a loop": "a_draft_goes_on",
    "draft: many texts": "who_use_it",
    "draft: more is guessed": "more_is_guessed",
    "draft: a match": "a_lookup",
    "draft: a text that": "a_search",
    "draft: ": "test_draft",
    "ranks: only who was told": "numbers_are_summed",
    "ranks: what was not sent": "in_the_middle",
}

# A training in which a wrong gradient has nowhere to hide: biases, dropout, unequal shares of workers, two micro-steps,
# more positions than attention's blocks of queries, heads no multiple of a vector.  It is audited twice.
AUDITED = (
    "--data tests/data/text.txt --n-layer 2 --n-head 2 --n-embd 20 --block-size 150 --batch-size 3 --workers 2 "
    "--bias --dropout 0.1 --gradient-accumulation-steps 2 --warmup-iters 0 --max-iters 11 --gradcheck-every 10 "
    "--eval-iters 1 --sample-tokens 0 --final-sample-tokens 0"
).split()

# What it cannot show, and why: a fault's file, or how its name begins -> the reason.
AGREE, NO_IGNORED = "forward and backward agree", "a training ignores no target"
TIED = "the output layer has put its share of the tied gradient in its own place"
UNSEEN = {
    "bfloat16: ": "the training is in float32",
    "amx: ": "the training is in float32",
    "matmul: what the first thread": "its products are too small to be shared",
    "matmul: ": "the training is in float32",
    "parallel: a": "the training is in float32",
    "audit: ": "the training is in float32",
    "packed: a row's pairs": "the training is in float32",
    "transpose: pairs": "the training is in float32",
    "kernel cache: softmax": "the gradient is right in whatever order sums are made",
    "kernel cache: ": "the training is in float32",
    "setup: ": "the training is in float32",
    "state: ": "the training goes on from no checkpoint",
    "npgpt/ops/primitives.py": "the model uses none of these primitives",
    "npgpt/optim.py": "what is done with a right gradient",
    "npgpt/muon.py": "what is done with a right gradient",
    "tiles: a thread's share": "not used in a training whose workers have one thread each",
    "past: ": "not used in training",
    "npgpt/generate/decode.py": "not used in training",
    "npgpt/generate/prompt.py": "not used in training",
    "npgpt/generate/matrices.py": "not used in training",
    "maths: the largest magnitude": "not used in training",
    "vectors: int8": "not used in training",
    "npgpt/generate/decode_kernel.py": "not used in training",
    "npgpt/generate/sampling.py": "not used in training",
    "npgpt/generate/generation.py": "not used in training",
    "npgpt/generate/draft.py": "not used in training",
    "npgpt/generate/writer.py": "not used in training",
    "npgpt/files/weights.py": "not used in training",
    "npgpt/files/hub.py": "not used in training",
    "cache: ": "not used in training",
    "npgpt/kernels/gil.py": "it changes what a training takes, and no number",
    "npgpt/kernels/compiler.py": "it changes what a training takes, and no number",
    "dots: ": "not used in training",
    "ranks: ": "there is one process only",
    "engine: the two halves of a + a": "the model adds no tensor to itself",
    "engine: adds in place to an array": "the gradient of the other tensor has been used by then, in this model",
    "engine: a leaf keeps the array": "in a training every parameter has a place for its gradient",
    "engine: embedding adds to an array": TIED,
    "engine: what the output layer left": TIED,
    "engine: a place that a failed walk": "no walk fails in a training",
    "engine: the place is taken for": "the optimizer fetches a gradient from where it lies instead",
    "engine: records within no_grad": "memory is lost, and no gradient",
    "engine: one mask for all dropouts": AGREE,
    "attention: sees one position": AGREE,
    "attention kernel: sees one position": "the loss is not finite, and the run ends before its first audit",
    "tiles: the last column": "the loss is not finite, and the run ends before its first audit",
    "tiles: rows beyond the edge": "memory is overwritten, and the process ends before its first audit",
    "cross-entropy: ignored rows": NO_IGNORED,
    "cross-entropy: mean over the ignored": NO_IGNORED,
    "cross-entropy: count of all": NO_IGNORED,
    "cross-entropy kernel: ignored rows": NO_IGNORED,
    "dropout kernel: without the scale": AGREE,
    "model: ": AGREE,
    "npgpt/tensor.py": "the model uses none of these primitives",
}

# What npgpt.prove cannot show, and why: how a fault's file, or its name, begins -> the reason.
NO_GRADIENT = "not on the way of a gradient"
UNPROVED = {
    "npgpt/optim.py": UNSEEN["npgpt/optim.py"],
    "npgpt/muon.py": UNSEEN["npgpt/muon.py"],
    "npgpt/run/": NO_GRADIENT,
    "npgpt/generate/": NO_GRADIENT,
    "npgpt/files/": NO_GRADIENT,
    "cache: ": NO_GRADIENT,
    "npgpt/kernels/gil.py": NO_GRADIENT,
    "engine: a leaf keeps the array": "two gradients are one array, and right until somebody changes it",
    "engine: a place that a failed walk": "no walk fails",
    "engine: records within no_grad": "memory is lost, and no gradient",
    "engine: a block is given out": "the numbers are objects, which have no blocks",
    "engine: arrays side by side": "the numbers are objects, which lie anywhere",
    "engine: one mask for all dropouts": AGREE,
    "attention: sees one position": AGREE,
    "cross-entropy: count of all": AGREE,
    "dropout: the same mask in every worker": AGREE,
    "model: ": AGREE,
}


def relevant(fault):
    """The tests that have to do with a fault's file, as in RELEVANT."""
    if fault.file not in RELEVANT and fault.file.startswith("npgpt/ops/"):
        return OF_OPS, Path(fault.file).stem
    return RELEVANT[fault.file]


def unseen(fault):
    """Why an audit cannot show a fault, or None."""
    return next((why for word, why in UNSEEN.items() if fault.file == word or fault.name.startswith(word)), None)


def unproved(fault):
    """Why npgpt.prove cannot show a fault, or None."""
    if fault.kernel:
        return "a kernel, which references never run"
    begins = (why for word, why in UNPROVED.items() if fault.file.startswith(word) or fault.name.startswith(word))
    return next(begins, None)


def functions_of(module):
    """Name -> function, of those of a module and the methods of its classes."""
    found = {}
    for name, value in vars(module).items():
        if getattr(value, "__module__", None) == module.__name__:
            members = vars(value) if isinstance(value, type) else {}
            found |= {f"{name}.{member}": function for member, function in members.items()} | {name: value}
    return {name: function for name, function in found.items() if isinstance(function, types.FunctionType)}


def codes_of(code, prefix=""):
    """Name -> code of what functions_of finds, in the code of a module."""
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield prefix + inner.co_name, inner
            yield from codes_of(inner, f"{prefix}{inner.co_name}.")


@contextlib.contextmanager
def planted(fault):
    """Within this context a fault is in the functions of this process, in what Python runs of them."""
    source = (ROOT / fault.file).read_text(encoding="utf-8")
    assert source.count(fault.before) == 1
    module = importlib.import_module(fault.file.removesuffix(".py").replace("/", "."))
    codes = dict(codes_of(compile(source.replace(fault.before, fault.after), module.__file__, "exec")))
    functions = functions_of(module)
    before = {name: function.__code__ for name, function in functions.items() if name in codes}
    try:
        for name in before:
            functions[name].__code__ = codes[name]
        yield
    finally:
        for name, code in before.items():
            functions[name].__code__ = code


def refused(fault):
    """Which gradient npgpt.prove refuses first, of that of which op, if a fault is planted; None for none."""
    from npgpt.study.proof import cases, certificate

    with planted(fault):
        for title, f, inputs, names in cases():
            try:
                wrong = certificate(f, inputs, names).wrong
            except ValueError as error:  # a gradient of another shape
                wrong = [str(error)]
            if wrong:
                return f"{title}: {wrong[0]}"
    return None


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
        """Tests of some files, those with a word in their name."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider"]
        command += ["-k", word, *(f"tests/{name}" for name in tests)]
        verdicts = {0: "passed", 1: "failed", TOO_LONG: "failed"}
        return self._result(command, kernels, verdicts, r"^(?:FAILED|ERROR) (?:tests/)?(.*?)(?: - .*)?$")

    def train(self, kernels):
        """A training whose gradient is audited."""
        command = [sys.executable, "-m", "npgpt.train", "--overwrite", "--out-dir", str(self.folder / "run"), *AUDITED]
        verdicts = {0: "passed", GradientError.exit_code: "failed"}
        return self._result(command, kernels, verdicts, r"(at iteration \d+) is wrong: (.*?):.* \((error .*?)\)")

    def _result(self, command, kernels, verdicts, noticed):
        """What a command makes of the copy; verdicts: of its exit codes; noticed: pattern of what noticed the fault."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.folder),
            "NPGPT_KERNELS": kernels,
            "NUMBA_CACHE_DIR": str(self.folder / "kernel_cache"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "NUMBA_OPT": "1",  # most of the time goes into compiling; a fault is one whatever LLVM makes of it
        }
        start = time.perf_counter()
        try:
            done = subprocess.run(
                command, cwd=self.folder, env=environment, timeout=TIMEOUT,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            code, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired:
            code, output = TOO_LONG, f"FAILED (no end after {TIMEOUT} s)"
        test = re.search(noticed, output, re.MULTILINE)
        verdict = verdicts.get(code, f"ended with {code}")
        return Result(verdict, " ".join(test.groups()) if test else "", time.perf_counter() - start, output)

    def run_with(self, fault, check):
        """Plant a fault, see what check() makes of it, and take it out again."""
        file, original = self.folder / fault.file, self.original / fault.file
        source = file.read_text(encoding="utf-8")
        if source.count(fault.before) != 1:
            return Result("cannot be planted", "", 0.0, "")
        file.write_text(source.replace(fault.before, fault.after), encoding="utf-8")
        try:
            return check()
        finally:
            shutil.copy2(original, file)


def prove(faults, width):
    """Print which faults npgpt.prove refuses, and why not the others; 1 if one survived."""
    start, count = time.perf_counter(), Counter()
    for fault in faults:
        why = unproved(fault)
        gradient = None if why else refused(fault)
        verdict = "not shown" if why else "refused" if gradient else "SURVIVED"
        count[verdict] += 1
        print(f"{fault.name:<{width}}  {verdict:<9}  {why or gradient or ''}", flush=True)
    print(", ".join(f"{n} {verdict}" for verdict, n in count.items()) + f", {time.perf_counter() - start:.0f} s")
    return 1 if count["SURVIVED"] else 0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--only", default="", metavar="WORD", help="only faults with this in their name or file")
    parser.add_argument("--audit", action="store_true", help="run an audited training instead of the tests")
    parser.add_argument("--prove", action="store_true", help="run npgpt.prove instead of the tests")
    parser.add_argument("--short", action="store_true", help="a choice of faults, as in CI")
    args = parser.parse_args(argv)
    faults = [fault for fault in FAULTS if args.only.lower() in (fault.name + " " + fault.file).lower()]
    if not faults:
        parser.error(f"no fault with {args.only!r} in its name or file")
    width = max(len(fault.name) for fault in faults)
    if args.prove:
        return prove(faults, width)
    if args.short:
        faults = [fault for n, fault in enumerate(faults) if unproved(fault) and not (fault.kernel and n % 3)]
    if args.audit:
        for fault in faults:
            if unseen(fault):
                print(f"{fault.name:<{width}}  not shown by a training: {unseen(fault)}")
        faults = [fault for fault in faults if not unseen(fault)]

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
            for fault in () if args.short else faults:
                tests.setdefault(fault.kernels, set()).update(relevant(fault)[0])

            def without_a_fault(copy, kernels):
                return copy.train(kernels) if args.audit else copy.run(sorted(tests[kernels]), "not mpiexec", kernels)

            def with_a_fault(copy, fault):
                def check():
                    if args.audit:
                        return copy.train(fault.kernels)
                    files, words = relevant(fault)
                    words = next((SOONER[name] for name in SOONER if fault.name.startswith(name)), words)
                    return copy.run(files, words, fault.kernels)

                return copy.run_with(fault, check)

            sound = pool.map(lambda kernels: with_a_copy(lambda copy: without_a_fault(copy, kernels)), tests)
            results = pool.map(lambda fault: with_a_copy(lambda copy: with_a_fault(copy, fault)), faults)
            for kernels, result in zip(tests, sound, strict=True):
                print(f"without a fault, NPGPT_KERNELS={kernels}: {result.verdict}  {result.seconds:.1f} s", flush=True)
                if result.verdict != "passed":
                    print(result.output)
                    pool.shutdown(cancel_futures=True)
                    return 2

            survived = 0
            for fault, result in zip(faults, results, strict=True):
                killed = result.verdict == "failed"
                survived += not killed
                what = "killed  " if killed else "SURVIVED" if result.verdict == "passed" else result.verdict.upper()
                print(f"{fault.name:<{width}}  {what}  {result.seconds:5.1f} s  {result.test}", flush=True)

    print(f"{len(faults)} faults, {survived} survived, {time.perf_counter() - start:.0f} s")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
