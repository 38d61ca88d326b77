"""What the README shows works as it stands there."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import npgpt

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_python_in_it_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "(3, 4) (4,)" in done.stdout and "transformer.wte.weight (65, 128)" in done.stdout


def test_the_files_it_names_exist():
    root = Path(__file__).resolve().parents[1]
    for name in re.findall(r"`((?:npgpt|tests|benchmarks|examples)/[\w/]+\.py|\.ci/run)", README):
        assert (root / name).is_file(), name


def test_every_public_name_is_a_class_or_function_of_that_name():
    for name in npgpt.__all__:
        value = getattr(npgpt, name)
        assert name == "__version__" or (not inspect.ismodule(value) and value.__name__ == name)
