"""Every example runs, and its checks would notice wrong mathematics."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NAMES = [path.name for path in sorted(EXAMPLES.glob("[0-9]*.py"))]

# example -> mistakes (what stands there once, what the mistake makes of it)
WRONG = {}


def run(path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)])}
    return subprocess.run(
        [sys.executable, str(path)], cwd=path.parent, env=environment, capture_output=True, encoding="utf-8", timeout=60
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_in_seconds_and_its_checks_hold(name):
    start = time.perf_counter()
    done = run(EXAMPLES / name)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "check: " in done.stdout and "WRONG" not in done.stdout
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(("name", "i"), [(name, i) for name in NAMES for i in range(len(WRONG.get(name, [None])))])
def test_an_example_notices_a_mistake(tmp_path, name, i):
    before, after = WRONG[name][i]
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    assert source.count(before) == 1
    (tmp_path / name).write_text(source.replace(before, after), encoding="utf-8")
    done = run(tmp_path / name)
    assert done.returncode == 1 and "WRONG" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
