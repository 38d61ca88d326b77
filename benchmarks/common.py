"""What the benchmarks share: processes, the machine's name, a process's peak memory, the files of a git revision."""

import contextlib
import io
import multiprocessing
import platform
import subprocess
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

from npgpt.errors import NpgptError, UsageError

ROOT = Path(__file__).resolve().parent.parent
PAUSE = 0.1  # seconds; a BLAS or OpenMP thread spins for some 30 ms before it sleeps


class BenchmarkError(NpgptError):
    """What was measured is wrong, or the process that measured it has died."""


class Process:
    """One side of a comparison in a process of its own: target(pipe, *args) runs there, and blocks until asked."""

    def __init__(self, name, target, *args):
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()  # so that receive() sees the end if the process dies

    def receive(self):
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            raise BenchmarkError(f"the {self.name} process died; its message stands above") from None

    def ask(self, question):
        with contextlib.suppress(ConnectionError):  # of a process that died; receive() says so
            self.pipe.send(question)
        return self.receive()

    def close(self):
        """No more questions; returns when the process has ended, which it must do when it sees that."""
        self.pipe.close()
        self.process.join()


def peak_memory():
    """The most memory that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: getrusage would count what the parent had when it started this process
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def machine(packages):
    """The processor's name, what it is to NumPy's BLAS, and the versions of what ran on it."""
    from npgpt.kernels.blas import blas_kernels
    from npgpt.machine import cpu_name

    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return {"cpu": cpu_name(), "blas_kernels": blas_kernels(), "versions": versions}


def machine_line(found, cores):
    """The first line of a report; found: what machine() returned."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    blas = f", BLAS kernels for {found['blas_kernels']}" if found["blas_kernels"] else ""
    return f"machine   {found['cpu']}, {cores} cores{blas}; {versions}"


@contextlib.contextmanager
def checked_out(rev):
    """A temporary folder with the files of a git revision of this checkout, in which nothing is changed."""
    command = ["git", "archive", "--format=zip", "--", rev]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True)
    except FileNotFoundError:
        raise UsageError(f"{rev} cannot be checked out: git is not installed") from None
    if done.returncode:
        reason = done.stderr.decode(errors="replace").splitlines()[:1] or ["git failed"]
        raise UsageError(f"{rev} cannot be checked out in {ROOT}: {reason[0]}")
    with tempfile.TemporaryDirectory(prefix="npgpt-") as folder:
        zipfile.ZipFile(io.BytesIO(done.stdout)).extractall(folder)
        yield Path(folder)


def positive(text):
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def write_all(generation):
    """Have all texts of a Generation grow to their length."""
    while generation.alive:
        generation.step()
        for i in list(generation.alive):
            if len(generation.texts[i]) == generation.length:
                generation.end(i)
