"""tests/against.py compares what it must, and says where two trees differ."""

import os
import subprocess
import sys
from pathlib import Path

import against
import numpy as np
import pytest
from against import ROOT, Tree, compare, numbers_of

from npgpt.errors import UsageError
from npgpt.files import checkpoint

RUN = ROOT / "tests" / "data" / "run-508dc90"


def places(**changes):
    """The numbers of a run, of which some are changed: (place, entry) -> value."""
    found = {name: array.copy() for name, array in numbers_of(RUN).items()}
    for (name, i), value in changes.get("changed", {}).items():
        found[name][i] = value
    return found


def test_all_of_a_run_is_compared():
    arrays, _ = checkpoint.load(RUN / "iter-00000024.safetensors")
    found = numbers_of(RUN)
    assert [*found] == [f"iteration {i}" for i in range(24)] + [*arrays]
    assert all(found[name].tobytes() == array.tobytes() for name, array in arrays.items())
    assert compare(places(), places()) is None


def test_one_bit_is_found_and_its_place_named():
    name = "adamw.v.transformer.wpe.weight"
    bit = np.nextafter(numbers_of(RUN)[name][3], np.float32(1))
    words = compare(places(changed={(name, 3): bit}), places())
    assert words.endswith(f" at most, in {name}; first in {name}")


def test_the_largest_difference_and_the_first_place_are_named():
    changed = {("iteration 7", 1): 1.25, ("transformer.wpe.weight", 0): 40.0}
    words = compare(places(changed=changed), places())
    assert "at most, in transformer.wpe.weight; first in iteration 7" in words
    assert float(words.split()[1]) > 50


def test_nan_is_nan_and_infinity_is_no_number():
    name = "iteration 3"
    assert compare({name: np.array([np.nan])}, {name: np.array([np.nan])}) is None
    assert compare({name: np.array([np.inf])}, {name: np.array([1.0])}).startswith("by inf at most")
    assert compare({name: np.array([0.0])}, {name: np.array([-0.0])}).startswith("by 0.0e+00 at most")


def test_what_one_tree_lacks_is_named():
    there = places()
    del there["iteration 9"]
    assert compare(there, places()) == "iteration 9 is there in one tree only"
    assert compare({"a": np.zeros(3)}, {"a": np.zeros(4)}).startswith("by inf at most")


def test_a_tree_that_cannot_run_is_told_from_one_that_differs(tmp_path):
    done = subprocess.run(
        [sys.executable, against.__file__, "no-such-revision"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout
    with pytest.raises(UsageError, match=r"Python takes npgpt from|No module named 'npgpt'"):
        Tree("an empty tree", tmp_path, tmp_path / "place")
    tree = Tree("this tree", ROOT, tmp_path / "other")
    with pytest.raises(UsageError, match=r"this tree cannot run -m npgpt\.train: exit code 2, .*unknown argument"):
        tree.python("-m", "npgpt.train", "--no-such-flag")


def test_every_setting_of_model_and_schedule_is_a_flag():
    from npgpt.config import TrainConfig

    fixed = {"data", "out_dir", "init_from", "vocab_size", "epochs", "patience", "workers", "save_minutes"}
    audits = {"gradcheck_every", "gradcheck_entries"}
    for settings in against.TRAININGS.values():
        assert {*vars(TrainConfig())} - {*settings} <= fixed | audits
    assert Path(against.__file__).name == "against.py"
