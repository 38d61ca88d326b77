"""What an earlier version wrote lies in tests/data/: this one resumes, samples, plots and exports it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from npgpt import GPT, plot, sample, train
from npgpt.errors import CheckpointError
from npgpt.files import checkpoint, folder
from npgpt.run.trainer import Trainer

DATA = Path(__file__).resolve().parent / "data"
VERSIONS = [path.name.removeprefix("run-") for path in sorted(DATA.glob("run-*"))]


@pytest.fixture(params=VERSIONS)
def version(request, tmp_path, monkeypatch):
    """A version's name; its files lie in the current folder, as they lay when they were made."""
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return request.param


def expected(version):
    return json.loads(Path(f"expected-{version}.json").read_text(encoding="utf-8"))


def rows_of(run):
    return [json.loads(row) for row in Path(run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def close(value, other):
    """Whether two numbers are the same but for rounding, which differs from processor to processor."""
    return value is None if other is None else value == pytest.approx(other, rel=2e-3)


def test_there_is_a_run():
    assert "508dc90" in VERSIONS


def test_a_run_is_resumed_and_goes_on_as_it_would_have_gone_on_then(version):
    run = f"run-{version}"
    assert Trainer.resume(run).setup.dtype == "float32"
    before = rows_of(run)
    assert train.main(["--resume", "--out-dir", run]) == 0
    rows, wanted = rows_of(run), expected(version)["rows"]
    assert rows[: len(before)] == before
    assert [row["iter"] for row in rows] == [*range(wanted[-1]["iter"] + 1)]
    for row, then in zip(rows[len(before) :], wanted, strict=True):
        for name, value in then.items():
            assert close(row[name], value), (row["iter"], name)


@pytest.mark.parametrize("kind", ["run", "huggingface"])
def test_a_model_has_the_logits_that_it_had_then(version, kind):
    model, then = GPT.from_pretrained(f"{kind}-{version}"), expected(version)
    logits, _ = model(np.array([model.tokenizer.encode(then["context"])]))
    assert np.allclose(logits.data[0, -1], then["logits"], atol=2e-5)


@pytest.mark.parametrize("kind", ["run", "huggingface"])
def test_a_model_is_sampled(version, kind, capsys):
    assert sample.main(["--model", f"{kind}-{version}", "--max-new-tokens", "30", "--seed", "7"]) == 0
    assert len(capsys.readouterr().out) >= 30


def test_a_run_is_plotted(version):
    assert plot.main([f"run-{version}"]) == 0
    assert "</svg>" in Path(f"run-{version}", "loss.svg").read_text(encoding="utf-8")


def test_a_model_is_exported_as_it_was_then(version):
    GPT.from_pretrained(f"run-{version}").save_pretrained("exported")
    then, _ = checkpoint.load(f"huggingface-{version}/model.safetensors", needs_hash=False)
    now, _ = checkpoint.load("exported/model.safetensors", needs_hash=False)
    assert {name: array.tobytes() for name, array in now.items()} == {n: a.tobytes() for n, a in then.items()}
    configs = [json.loads(Path(path, "config.json").read_text()) for path in ("exported", f"huggingface-{version}")]
    assert configs[0].items() >= configs[1].items()


def test_what_a_later_version_wrote_is_refused_in_one_line_that_names_it(tmp_path, monkeypatch):
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    path = folder.newest("run-508dc90")
    arrays, state = folder.load(path)

    def changed(**changes):
        checkpoint.save(path, arrays, {"npgpt": json.dumps({**state, **changes})})

    environment = {**state["environment"], "npgpt": "9.8.7"}
    changed(format=folder.FORMAT + 1, environment=environment)
    words = rf"has format {folder.FORMAT + 1}, and this version reads format {folder.FORMAT}; npgpt 9\.8\.7 wrote it"
    for read in (Trainer.resume, GPT.from_pretrained):
        with pytest.raises(CheckpointError, match=words):
            read("run-508dc90")
    changed(train={**state["train"], "magic": 3}, environment=environment)
    with pytest.raises(CheckpointError, match=r"the setting magic, which npgpt .* does not know; npgpt 9\.8\.7 wrote"):
        Trainer.resume("run-508dc90")


def test_what_is_written_now_says_its_format(tmp_path, monkeypatch):
    shutil.copytree(DATA, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert train.main(["--resume", "--out-dir", "run-508dc90"]) == 0
    _, state = folder.load(folder.newest("run-508dc90"))
    assert state["format"] == folder.FORMAT
    assert re.search(r"^FORMAT is the number", folder.__doc__, re.MULTILINE)
