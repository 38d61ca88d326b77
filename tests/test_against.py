"""Two trees beside each other: the files of a revision, the rounds, what is read of their benchmarks."""

import contextlib
import json
import math
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for benchmarks, however pytest is started

from benchmarks import against, drafts, engines, sample, step
from benchmarks.against import FEWEST, PRECISION, compare, estimate, report, rounds_needed
from benchmarks.common import ROOT, BenchmarkError, checked_out
from npgpt import train
from npgpt.config import GPTConfig
from npgpt.errors import UsageError
from npgpt.generate import decode
from npgpt.kernels.jit import KERNELS
from npgpt.model import GPT

# --------------------------------------------------------------------------------------------------------------------
# A revision's files


def git(*args):
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout


needs_git = pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None, reason="there is no git, or this is no checkout"
)


@needs_git
def test_a_revision_is_checked_out_as_it_was_committed_and_leaves_nothing():
    names = set(git("ls-tree", "-r", "--name-only", "HEAD").splitlines())
    before = git("worktree", "list"), git("branch", "--all")
    with checked_out("HEAD") as tree:
        assert {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()} == names
        assert (tree / "npgpt" / "errors.py").read_text(encoding="utf-8") == git("show", "HEAD:npgpt/errors.py")
    assert not tree.exists()
    assert (git("worktree", "list"), git("branch", "--all")) == before


@needs_git
@pytest.mark.parametrize("rev", ["no-such-revision", "--output={file}", "HEAD:no-such-file", ""])
def test_what_is_no_revision_is_refused_in_one_line(rev, tmp_path):
    file = tmp_path / "file"
    refused = pytest.raises(UsageError, match=r"^.* cannot be checked out in .*: .*$")
    with refused, checked_out(rev.format(file=file)):
        pass
    assert not file.exists()


def test_without_git_one_line_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match=r"^HEAD cannot be checked out: git is not installed$"), checked_out("HEAD"):
        pass


# --------------------------------------------------------------------------------------------------------------------
# How certain a ratio is


def test_equal_rounds_are_certain_and_a_few_disturbed_ones_change_little():
    assert estimate([1.25] * 6) == pytest.approx((1.25, 0))
    rng = np.random.default_rng(0)
    ratios = np.exp(rng.normal(0, 0.01, 30))
    ratio, uncertainty = estimate(ratios)
    disturbed, uncertainty_then = estimate([*ratios, 3.0, 2.0])
    assert abs(disturbed - ratio) < 0.003 and uncertainty_then < 1.5 * uncertainty


def test_six_rounds_are_as_uncertain_as_they_are_far_apart_and_fewer_say_nothing():
    ratios = [0.97, 0.99, 1.0, 1.01, 1.02, 1.06]
    ratio, uncertainty = estimate(ratios)
    assert 0.99 < ratio < 1.02 and uncertainty == pytest.approx(1.06 - ratio)
    for n in range(1, 6):
        assert estimate(ratios[:n])[1] is None


def test_the_trees_can_change_places():
    ratios = np.exp(np.random.default_rng(1).normal(0.1, 0.05, 11))
    assert estimate(1 / ratios)[0] == pytest.approx(1 / estimate(ratios)[0])


@pytest.mark.parametrize("n", [8, 20])
def test_the_true_ratio_is_within_the_uncertainty_in_95_of_100_measurements(n):
    logs = np.random.default_rng(n).standard_t(3, (1000, n)) * 0.01 + math.log(1.1)
    found = [estimate(row) for row in np.exp(logs)]
    inside = sum(abs(ratio - 1.1) <= uncertainty for ratio, uncertainty in found)
    assert 935 <= inside <= 995


def test_half_the_uncertainty_takes_four_times_the_rounds():
    assert rounds_needed(10, PRECISION) == 10
    assert rounds_needed(10, 2 * PRECISION) == 40
    assert rounds_needed(FEWEST - 1, None) == FEWEST


# --------------------------------------------------------------------------------------------------------------------
# Rounds


def read(output):
    seconds = float(output.splitlines()[-1])
    return {"npgpt": (seconds, seconds * 1e8)}, seconds > 3


@pytest.fixture
def made_up(monkeypatch):
    """set(what REV's processes print, what the tree's do): no process is started."""

    def set(*numbers):
        numbers = dict(zip(("rev", "the tree"), map(iter, numbers), strict=True))

        def run(tree, command):
            return f"machine   {tree.name}'s\nfigures   {tree.name}'s\n{next(numbers[tree.name])}"

        monkeypatch.setattr(against.Tree, "run", run)
        monkeypatch.setattr(against, "checked_out", lambda rev: contextlib.nullcontext(Path("rev")))

    return set


def test_the_first_start_of_each_tree_is_not_measured(made_up, capsys):
    made_up([100, *[2.0] * FEWEST], [200, *[2.2] * FEWEST])
    result = compare("rev", [], read)
    assert (result["rounds"], result["busy"]) == (FEWEST, 0)
    report(result, "ms a step")
    printed = capsys.readouterr().out
    assert printed.startswith("machine   the tree's\nrounds    8 in 0 s\n\n")
    assert re.search(r"^npgpt +ms a step +2000.000 +2200.000 +1.100 \+- 0.000$", printed, re.M)
    assert re.search(r"^ +peak MB +200 +220 +1.100$", printed, re.M)


def test_there_are_as_many_rounds_as_the_ratio_needs(made_up, capsys):
    ratios = [1.0, 1.02] * 50
    made_up([2.0] * 100, [2.0, *[2.0 * ratio for ratio in ratios]])
    result = compare("rev", [], read)
    n = result["rounds"]
    assert n > FEWEST and estimate(ratios[:n])[1] <= PRECISION < estimate(ratios[: n - 2])[1]
    needed = rounds_needed(FEWEST, estimate(ratios[:FEWEST])[1])
    assert f"rounds    8 done; {needed} or more make the ratio certain to 0.5%" in capsys.readouterr().out


def test_when_the_time_is_over_the_report_says_how_many_rounds_it_takes(made_up, monkeypatch, capsys):
    monkeypatch.setattr(against, "SECONDS", 0)
    made_up([2.0] * 9, [2.0, 2.0, 2.4, 4.0, 2.0, 2.4, 4.0, 2.0, 2.4])
    result = compare("rev", [], read)
    needed = rounds_needed(FEWEST, result["sides"]["npgpt"]["uncertainty"])
    assert result["rounds"] == FEWEST < result["rounds_needed"] == needed
    report(result, "ms a step")
    printed = capsys.readouterr().out
    assert f"\nrounds    8 in 0 s; {needed} or more make the ratio certain to 0.5%\n" in printed
    assert "BUSY      other programs were on the cores in 2 of 16 processes" in printed


def test_a_given_number_of_rounds_is_done_and_too_few_are_called_so(made_up, capsys):
    made_up([2.0] * 4, [2.0, 2.2, 2.2, 2.2])
    report(compare("rev", [], read, rounds=3), "ms a step")
    printed = capsys.readouterr().out
    assert "rounds    3 in 0 s; 8 or more" in printed and "1.100 of too few rounds" in printed


# --------------------------------------------------------------------------------------------------------------------
# The processes of two trees

BENCHMARK = """
import json, os
import npgpt

line = [npgpt.NAME, os.getcwd(), os.environ["NUMBA_CACHE_DIR"], sorted(os.environ)]
with open({log!r}, "a") as log:
    print(json.dumps(line), file=log)
print({seconds})
"""


@pytest.fixture
def trees(tmp_path, monkeypatch):
    """make(expression of REV's seconds, of the tree's) -> a function that returns what each process told of itself."""

    def make(*seconds):
        log = tmp_path / "log"
        for name, expression in zip(("rev", "tree"), seconds, strict=True):
            code = BENCHMARK.format(log=str(log), seconds=expression)
            files = {"npgpt/__init__": f"NAME = {name!r}", "benchmarks/__init__": "", "benchmarks/made_up": code}
            for file, content in files.items():
                path = tmp_path / name / f"{file}.py"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content, encoding="utf-8")
        monkeypatch.setattr(against, "checked_out", lambda rev: contextlib.nullcontext(tmp_path / "rev"))
        monkeypatch.setattr(against, "ROOT", tmp_path / "tree")
        return lambda: [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]

    return make


def test_each_tree_runs_its_own_code_in_turn_with_a_cache_of_its_own(trees, monkeypatch):
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # Python does not look into the working folder by itself
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    monkeypatch.setenv("OPENBLAS_L2_SIZE", "512")
    told = trees(2.0, 2.2)
    result = compare("rev", ["benchmarks.made_up"], read, rounds=4)
    assert result["sides"]["npgpt"]["ratio"] == pytest.approx(1.1)
    names, folders, caches, environments = zip(*told(), strict=True)
    assert names == ("rev", "tree", "rev", "tree", "tree", "rev", "rev", "tree", "tree", "rev")
    assert [Path(folder).name for folder in folders] == list(names)
    assert len(set(caches)) == 2 and len(set(zip(names, caches, strict=True))) == 2
    assert not any("OPENBLAS" in name for environment in environments for name in environment)


def test_a_side_that_cannot_run_is_one_line_with_its_last_words(trees):
    trees("2.0", "1 / 0")
    with pytest.raises(BenchmarkError, match=r"^the tree cannot run: ZeroDivisionError: division by zero$"):
        compare("rev", ["benchmarks.made_up"], read)


# --------------------------------------------------------------------------------------------------------------------
# The table of benchmarks.sample, which 508dc90 printed like this

TABLE = """
                tokens/s  ms a token   GB/s  of memory  npgpt is  peak memory
npgpt             16,286       0.061   12.9        40%     1.00x       211 MB   (rounds: 1.00 to 1.00)
npgpt int8            72      13.889    5.6        17%     0.76x     1,151 MB   (rounds: 0.70 to 0.80)
torch                824       1.214                      19.77x       386 MB   (rounds: 19.00 to 20.00)
npgpt int8 is 26.03x torch
"""


def test_the_table_is_read_with_the_digits_it_has():
    figures = {"npgpt": (1 / 16286, 211e6), "npgpt int8": (13.889 / 1000, 1151e6)}
    assert sample.read_table(TABLE, 1) == figures
    assert sample.read_table(TABLE, 8)["npgpt"] == (8 / 16286, 211e6)
    with pytest.raises(BenchmarkError, match="cannot be read"):
        sample.read_table(TABLE.replace("npgpt int8 ", "npgpt_int8 "), 1)


def test_the_table_that_is_printed_is_read(capsys):
    options = Namespace(workload="gpt2", streams=8, rounds=2, peer=["torch"])
    seconds = {"npgpt": [2.0, 2.5], "npgpt int8": [0.005, 0.005], "torch": [4.0, 4.0]}
    memory = {"npgpt": 1.5e9, "npgpt int8": 5e8, "torch": 1e9}
    sample.report(options, 100, seconds, {"npgpt": 10**8, "npgpt int8": 10**7, "torch": None}, 1e10, memory)
    figures = sample.read_table(capsys.readouterr().out, 8)
    assert figures == {"npgpt": (0.0225, 1.5e9), "npgpt int8": (5e-5, 5e8)}


def test_engines_open_one_folder_and_are_asked_for_the_likeliest_tokens(tmp_path, capsys):
    config = GPTConfig(block_size=20, vocab_size=300, n_layer=1, n_head=2, n_embd=16)
    engines.make_folder(tmp_path, config)
    model, prompt = GPT.from_pretrained(tmp_path), [1, 2, 3]
    expected = list(model.generate(prompt, 5, temperature=0))
    tokens, prompt_seconds = engines.npgpt_side(tmp_path, 1)([prompt] * 2, 5)
    assert tokens == [expected] * 2 and prompt_seconds > 0
    assert len(set(engines.names(300))) == 300
    assert engines.missing("npgpt", sys.executable) == []
    engines.report({("npgpt", 8, 16): [(0.1, 0.2, 1.2)] * 3, ("llama", 8, 16): [(math.nan, 0.3, 2.3)]}, 5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "8 texts at once, after 16 tokens"
    assert lines[3].split() == ["npgpt", "100.0", "200.0", "32.0", "1.00x,", "1.00x"]
    assert lines[4].split() == ["llama", "300.0", "16.0", "1.50x,", "2.00x"]


@pytest.mark.skipif(KERNELS == "numpy", reason="the kernel checks drafts")
def test_drafts_are_right_where_a_text_repeats_itself(capsys):
    assert drafts.main("--workload cpu --tokens 96 --rounds 1 --streams 2".split()) == 0
    rows = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()[2:]}
    assert list(rows) == ["new code", "code, 5 % changed", "a prompt, quoted", "noise"]
    proposed = [re.search(r"([\d,]+) of +([\d,]+)", row).groups() for row in rows.values()]
    assert proposed[2][0] == proposed[2][1] and proposed[3] == ("0", "0")


@pytest.mark.skipif(KERNELS == "numpy", reason="the kernel has draft models")
def test_a_trained_model_writes_with_a_draft_model_and_without(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "out"
    words = "--n-layer 1 --n-embd 32 --max-iters 2 --eval-iters 1 --sample-tokens 0 --final-sample-tokens 0"
    data = ROOT / "tests" / "data" / "text.txt"
    assert train.main(["--data", str(data), "--out-dir", str(folder), *words.split()]) == 0
    monkeypatch.setattr(decode, "LARGE", 0)
    capsys.readouterr()
    assert drafts.main(["--model", str(folder), "--tokens", "80", "--rounds", "1", "--dtype", "bfloat16"]) == 0
    rows = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()[2:]}
    assert list(rows) == list(drafts.CONTROLS)
    for row in rows.values():
        right, proposed = (int(number) for number in re.search(r"(\d+) of (\d+)", row).groups())
        assert 0 <= right <= proposed > 0


def test_a_profile_of_a_step_has_no_figures_for_json(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        step.main(["--profile", "--json", str(tmp_path / "figures.json")])
    assert ended.value.code == 2 and "--json" in capsys.readouterr().err
