"""Small trainings for tests, and trainings on several ranks."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from npgpt.run.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40


def variant(config, **changes):
    return dataclasses.replace(config, **changes)


def run(config, **options):
    """A Trainer that has run to the end, and its events."""
    trainer = Trainer(config, **options)
    return trainer, list(trainer.run())


def metrics(config):
    rows = (Path(config.out_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(row) for row in rows]


# what starts ranks, beside this Python or elsewhere; None where there is none, or no mpi4py for them
PATHS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
MPIEXEC = importlib.util.find_spec("mpi4py") and shutil.which("mpiexec", path=PATHS)


def mpiexec(n, *args, **options):
    """Start `python -m mpi4py ARGS` on n ranks, also where there are fewer cores.  options: subprocess.Popen's."""
    allowed = dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
    environment = {**os.environ, **allowed, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    version = subprocess.run([MPIEXEC, "--version"], capture_output=True, text=True, env=environment).stdout
    flags = ["--oversubscribe", "--bind-to", "none"] if "Open MPI" in version else []
    command = [MPIEXEC, *flags, "-n", str(n), sys.executable, "-m", "mpi4py", *map(str, args)]
    return subprocess.Popen(command, env=environment, cwd=ROOT, **options)
