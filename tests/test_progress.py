"""Progress: what was checked is kept, `next` picks what was missed, and `report` says where a class is stuck."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from npgpt.errors import UsageError
from npgpt.exercise import PACKAGE, main
from npgpt.study import progress, report
from npgpt.study.check import Outcome
from npgpt.study.lesson import LEVELS, exercise_text
from npgpt.study.lessons import LESSONS


def linear(level=1, **written):
    """The exercise on linear at a level, with some of its blanks filled: dx="dy @ weight"."""
    text = exercise_text(LESSONS["linear"], level, "linear.py")
    for name, code in written.items():
        assert text.count(f"{name} = ...") == 1
        text = text.replace(f"{name} = ...", f"{name} = {code}")
    return text


RIGHT = linear(dx="dy @ weight", dweight="dy.T @ x", dbias="dy.sum(axis=0)")


def says(capsys, *args, code=0):
    assert main([*map(str, args)]) == code
    return capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------------
# What a student has done


def test_a_check_is_kept_beside_the_file_for_anybody_to_read(tmp_path, capsys):
    path = tmp_path / "linear.py"
    path.write_text(linear(dx="dy @ weight", dbias="dy.mean(axis=0)"), encoding="utf-8")
    says(capsys, "check", path, code=1)
    (entry,) = json.loads((tmp_path / "progress.json").read_text(encoding="utf-8")).values()
    assert entry.pop("words").startswith("dbias: mean instead of sum")
    assert entry == {
        "right": False, "tries": 1, "passed": 0, "level": 1, "file": "linear.py",
        "parts": {"dx": "ok", "dweight": "blank", "dbias": "wrong"},
    }  # fmt: skip
    path.write_text(RIGHT, encoding="utf-8")
    says(capsys, "check", path)
    entry = progress.read(tmp_path)["linear"]
    assert entry["parts"] == {"dx": "ok", "dweight": "ok", "dbias": "ok"} and entry["words"] == ""
    assert (entry["right"], entry["tries"], entry["passed"]) == (True, 2, 1)
    path.write_text("def linear_backward(dy, x, weight):\n    return 1 / 0\n", encoding="utf-8")
    says(capsys, "check", path, code=1)
    entry = progress.read(tmp_path)["linear"]
    assert (entry["right"], entry["tries"], entry["passed"], entry["parts"]) == (False, 3, 1, {})
    assert entry["words"] == "linear.py line 2: ZeroDivisionError: division by zero"
    path.write_text("1 +\n", encoding="utf-8")  # no exercise can be told in it
    says(capsys, "check", path, code=1)
    assert progress.read(tmp_path)["linear"] == entry


def keep(folder, op, tries=1, passed=0, level=1, right=False, **more):
    entries = progress.read(folder)
    entries[op] = {
        "right": right, "tries": tries, "passed": passed, "level": level, "file": f"{op}.py", "parts": {}, "words": "",
        **more,
    }  # fmt: skip
    (folder / "progress.json").write_text(json.dumps(entries), encoding="utf-8")


def test_next_picks_what_was_missed_then_what_was_not_tried_then_a_higher_level(tmp_path, capsys):
    assert "show linear --level 1 --out" in says(capsys, "next", tmp_path)
    keep(tmp_path, "linear", right=True, passed=2, level=2)
    (tmp_path / "dropout.py").touch()
    out = says(capsys, "next", tmp_path)
    assert out.startswith("dropout: ") and "show dropout --level 2 --out" in out and "dropout_2.py" in out
    keep(tmp_path, "mlp", tries=2, parts={"dx": "wrong", "db_fc": "ok"}, words="dx: missing term")
    keep(tmp_path, "attention", tries=1)
    out = says(capsys, "next", tmp_path)
    assert out.startswith("mlp, level 1, not right after 2 tries: dx wrong, db_fc ok\n  dx: missing term\n")
    assert f"check {tmp_path / 'mlp.py'}" in out and "missed: mlp (level 1), attention (level 1)\n" in out
    keep(tmp_path, "attention", tries=3)
    assert says(capsys, "next", tmp_path).startswith("attention, level 1, not right after 3 tries\n")
    for op in LESSONS:
        keep(tmp_path, op, right=True, passed=3, level=3)
    keep(tmp_path, "layernorm", right=True, passed=1, tries=4)
    keep(tmp_path, "linear", right=True, passed=1, tries=2)
    assert says(capsys, "next", tmp_path).startswith("layernorm once more, at level 2: ")
    for op in ("layernorm", "linear"):
        keep(tmp_path, op, right=True, passed=3)
    assert "bug 1" in says(capsys, "next", tmp_path)


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff", b"{\"linear\": {}}", b"{\"no-op\": {}}", b"[" * 100_000, b"1"])
def test_progress_that_cannot_be_read_is_said_and_hides_no_result(text, tmp_path, capsys):
    (tmp_path / "progress.json").write_bytes(text)
    with pytest.raises(UsageError, match=r"progress\.json is not what `check` writes"):
        main(["next", str(tmp_path)])
    (tmp_path / "linear.py").write_text(linear(), encoding="utf-8")
    out = says(capsys, "check", tmp_path / "linear.py", code=1)
    assert "dbias    blank" in out and "\n(not kept: " in out
    assert (tmp_path / "progress.json").read_bytes() == text


def test_next_in_no_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no folder"):
        main(["next", str(tmp_path / "none")])


def test_the_level_is_that_of_the_exercise(tmp_path):
    for level in LEVELS:
        (tmp_path / "a.py").write_text(linear(level), encoding="utf-8")
        assert progress.level_of(tmp_path / "a.py") == level
    (tmp_path / "a.py").write_text("x = 1\n", encoding="utf-8")
    assert progress.level_of(tmp_path / "a.py") == 1
    progress.record(tmp_path / "a.py", [Outcome("mlp", passed=True)])
    assert progress.read(tmp_path)["mlp"]["passed"] == 1


# --------------------------------------------------------------------------------------------------------------------
# A class


def answer(op, before="", after=""):
    text = exercise_text(LESSONS[op], 0, "mine.py")
    assert not before or text.count(before) == 1
    return text.replace(before, after) if before else text


BODY = "def linear_backward(dy, x, weight):\n    "
CLASS = {  # file -> (its text, exercise, state, parts, words)
    "ada.py": (RIGHT, "linear", "right", "dx ok, dweight ok, dbias ok", ""),
    "bo.py": (answer("attention"), "attention", "right", "dq ok, dk ok, dv ok", ""),
    "cy/embedding.py": (answer("embedding"), "embedding", "right", "dwte ok, dwpe ok", ""),
    "dee.py": (
        linear(dx="dy @ weight", dweight="dy.T @ x", dbias="dy.mean(axis=0)"), "linear", "wrong",
        "dx ok, dweight ok, dbias wrong", "dbias: mean instead of sum",
    ),
    "eli.py": (
        linear(dx="(dy @ weight).T", dweight="x.T @ dy", dbias="dy.sum(axis=0)"), "linear", "wrong",
        "dx wrong, dweight wrong, dbias ok", "dx: transposed",
    ),
    "fay.py": (
        answer("layernorm", "(g - g_mean - xhat", "(g - xhat"), "layernorm", "wrong", "dx wrong, dweight ok, dbias ok",
        "dx: missing term",
    ),
    "gus.py": (
        answer("cross-entropy", "    dlogits[~valid] = 0\n", ""), "cross-entropy", "wrong", "dlogits wrong",
        "dlogits: wrong mask",
    ),
    "hal.py": (answer("linear", "    return dx", "    dy *= 2; return dx"), "linear", "wrong", "", "it changes dy in"),
    "ida.py": (linear(), "linear", "unfinished", "dx blank, dweight blank, dbias blank", ""),
    "jo/linear.py": (linear(dbias="dy.sum(axis=0)"), "linear", "unfinished", "dx blank, dweight blank, dbias ok", ""),
    "kim.py": (BODY + "while True: pass\n", "", "hangs", "", "it did not end within"),
    "lea.py": ("import time\ntime.sleep(1000)\n", "", "hangs", "", "it did not end within"),
    "max.py": (BODY + "import os; os._exit(7)\n", "", "crashes", "", "exit code 7"),
    "nat.py": (BODY + "import ctypes; ctypes.string_at(0)\n", "", "crashes", "", "SIGSEGV"),
    "oz.py": (BODY + "return dy @ wieght\n", "linear", "stopped", "", "oz.py line 2: NameError"),
    "pia.py": (BODY + "return np.ones(5)\n" + "import sys; sys.exit(0)\n", "", "stopped", "", "SystemExit"),
    "quin.py": ("Dear teacher,\nthe dog ate my homework.\n", "", "stopped", "", "quin.py line 1: invalid syntax"),
    "roy.py": (b"\x89PNG\r\n\x1a\n\x00", "", "stopped", "", "roy.py"),
    "sue.py": ("", "", "nothing", "", "has none of the functions"),
    "ted.py": (
        "import numpy as np\n" + BODY + "return np.ones((50_000, 50_000))\n", "linear", "stopped", "",
        "ted.py line 3: MemoryError",
    ),
}  # fmt: skip
if report.resource is None or sys.platform == "darwin":  # no limit of memory there
    del CLASS["ted.py"]
if os.name != "posix":  # there it is an exception
    del CLASS["nat.py"]


@pytest.fixture(scope="module")
def class_of_20(tmp_path_factory):
    folder = tmp_path_factory.mktemp("class")
    for name, (text, *_) in CLASS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    (folder / "notes.txt").touch()
    return folder


def test_a_class_is_reported_rightly(class_of_20, capsys):
    start = time.monotonic()
    out = says(capsys, "report", class_of_20, "--seconds", "4", "--json", code=1)
    assert time.monotonic() - start < 100
    found = json.loads(out)
    rows = {row["file"]: row for row in found["rows"]}
    assert list(rows) == sorted(CLASS, key=lambda name: class_of_20 / name) and len(rows) == len(found["rows"])
    for name, (_, op, state, parts, words) in CLASS.items():
        row = rows[name]
        assert (row["op"], row["state"]) == (op, state), row
        if parts:
            assert ", ".join(f"{key} {value}" for key, value in row["parts"].items()) == parts
        assert words in row["words"] and (words or not row["words"]), row
    where = {one["where"]: one["how_many"] for one in found["stuck_at"]}
    assert where["hangs"] == where["linear unfinished"] == 2
    assert where["crashes"] == sum(state == "crashes" for _, _, state, *_ in CLASS.values())
    assert where["linear dx"] == where["linear dbias"] == where["layernorm dx"] == where["cross-entropy dlogits"] == 1
    assert not [path for path in class_of_20.rglob("*") if path.name in ("progress.json", "__pycache__")]


def test_a_report_as_text_and_its_exit_code(tmp_path, capsys):
    (tmp_path / "ada.py").write_text(RIGHT, encoding="utf-8")
    out = says(capsys, "report", tmp_path)
    assert out == "ada.py  linear         right\n1 of 1 are right\n"
    (tmp_path / "bob.py").write_text(linear(dx="dy @ weight", dbias="dy.mean(axis=0)"), encoding="utf-8")
    (tmp_path / "c.py").write_text(linear(dx="dy @ weight"), encoding="utf-8")
    lines = says(capsys, "report", tmp_path, code=1).splitlines()
    assert lines[1].startswith("bob.py  linear         wrong       dbias: mean instead of sum: every entry is 1/4 ")
    assert lines[2:] == [
        "c.py    linear         unfinished  blank: dweight, dbias",
        "1 of 3 are right; the others are stuck at", "    1  linear dbias", "    1  linear unfinished",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["report"], "required"),
        (["report", "none"], "there is no folder none"),
        (["report", "."], "has no files NAME.py or NAME/FILE.py"),
        (["report", ".", "--seconds", "0"], "--seconds must be above 0"),
        (["report", ".", "--seconds", "nan"], "--seconds must be above 0"),
    ],
)
def test_what_a_report_cannot_do_is_usage(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words) as caught:
        main(args)
    assert caught.value.exit_code == 2


def test_the_help_says_that_a_report_runs_code(capsys):
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    assert "RUNS the code" in capsys.readouterr().out


@pytest.mark.skipif(os.name != "posix", reason="no process groups")
def test_what_a_file_started_ends_with_it(tmp_path):
    code = "import subprocess, sys\nsleep = [sys.executable, '-c', 'import time; time.sleep(99)']\n"
    code += "with open(__file__[:-2] + 'pid', 'w') as file:\n    file.write(str(subprocess.Popen(sleep).pid))\n"
    (tmp_path / "a.py").write_text(code + RIGHT, encoding="utf-8")
    assert [row.state for row in report.rows_of(tmp_path)] == ["right"]
    pid = int((tmp_path / "a.pid").read_text())
    for _ in range(100):  # until it is gone, or a zombie that init has not met yet
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").exists() and " Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.05)
    raise AssertionError("it goes on")


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_ends_a_report_at_once(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.py").write_text("while True: pass\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    child = subprocess.Popen(
        [sys.executable, "-m", "npgpt.exercise", "report", str(tmp_path)], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    threading.Timer(1, child.send_signal, [signal.SIGINT]).start()
    start = time.monotonic()
    assert child.wait(timeout=30) == 130 and time.monotonic() - start < 15
