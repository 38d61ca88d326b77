"""Pictures of curves and of attention: what they show is what the log and the model hold."""

import json
import math
import re
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from npgpt import GPT, GPTConfig, plot
from npgpt.data.characters import CharTokenizer
from npgpt.engine import no_grad, watched
from npgpt.errors import CheckpointError, UsageError, one_line, quoted, run_command
from npgpt.files.folder import RunFolder
from npgpt.files.log import read_log
from npgpt.ops.attention import split_heads, split_qkv
from npgpt.study import plots
from npgpt.study.plots import Axis, attention_maps, attention_svg, points_of, segments, smoothed

SVG = "{http://www.w3.org/2000/svg}"


def row(n, loss, val_loss=None, **others):
    validated = {} if val_loss is None else {"val_loss": val_loss}
    return {"iter": n, "train_loss": loss, **validated, "lr": 0.001 * n, "grad_norm": 1.0 + n % 3, **others}


def write_run(path, rows, after=""):
    path.mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) + after
    (path / "metrics.jsonl").write_text(text, encoding="utf-8")
    return str(path)


ROWS = [row(n, 4.0 / (1 + n), 4.1 / (1 + n) if n % 5 == 0 else None) for n in range(20)]
ROWS.append({"iter": 20, "train_loss": None, "val_loss": 0.25, "lr": None, "grad_norm": None, "elapsed_s": 1.0})


def draw(*args):
    """The picture that the command makes, as an XML tree; the last argument is where it is written."""
    assert plot.main([str(arg) for arg in args]) == 0
    return ET.parse(args[-1]).getroot()


def lines(tree, style):
    return [line for line in tree.iter(SVG + "polyline") if style in line.get("class").split()]


def places(line):
    return np.array([[float(number) for number in place.split(",")] for place in line.get("points").split()])


def scale(tree, name):
    """What turns a pixel of the first panel into a number, by the two outermost ticks of an axis."""
    ticks = [(float(text.get(name)), float(text.text)) for text in tree.iter(SVG + "text") if text.get("class") == name]
    if name == "y":  # they begin again, further down, with the next panel; their text stands 4 pixels lower
        ticks = [(at - 4, number) for at, number in ticks if at < 400]
    (first, low), (last, high) = ticks[0], ticks[-1]
    return lambda pixel: low + (pixel - first) / (last - first) * (high - low)


# --------------------------------------------------------------------------------------------------------------------
# Curves


def test_points_are_where_their_numbers_belong(tmp_path, capsys):
    run = write_run(tmp_path / "run", ROWS)
    assert plot.main([run]) == 0
    file = tmp_path / "run" / "loss.svg"
    assert capsys.readouterr().out == f"wrote {file}\n"
    tree = ET.parse(file).getroot()
    to_x, to_y = scale(tree, "x"), scale(tree, "y")
    for line, wanted in (
        (lines(tree, "light")[0], [(n, 4.0 / (1 + n)) for n in range(20)]),
        (lines(tree, "dotted")[0], [(0, 4.1), (5, 4.1 / 6), (10, 4.1 / 11), (15, 4.1 / 16), (20, 0.25)]),
    ):
        found = places(line)
        assert len(found) == len(wanted)
        for (x, y), (n, loss) in zip(found, wanted, strict=True):
            assert abs(to_x(x) - n) < 0.02 and abs(to_y(y) - loss) < 0.02
    first, *_, last = places(lines(tree, "dotted")[0])
    assert first[0] < last[0] and first[1] < last[1]  # from left to right, and a loss that falls goes down
    circles = [c for c in tree.iter(SVG + "circle") if c.get("r") == "2.6"]
    assert [f"{c.get('cx')},{c.get('cy')}" for c in circles] == lines(tree, "dotted")[0].get("points").split()


def test_each_run_has_its_lines_and_its_colour(tmp_path):
    runs = [write_run(tmp_path / name, ROWS) for name in ("one", "two", "three")]
    tree = draw(*runs, "--out", tmp_path / "all.svg")
    assert [len(lines(tree, style)) for style in ("light", "strong", "dotted")] == [6, 6, 3]
    for style in ("light", "strong", "dotted"):
        assert {line.get("class").split()[0] for line in lines(tree, style)} == {"c0", "c1", "c2"}
    words = [text.text for text in tree.iter(SVG + "text")]
    for run in runs:
        assert f"{run}: best validation loss 0.2500 at iteration 20" in words
    assert {"loss", "gradient norm", "learning rate", "iteration"} <= set(words)


def test_names_are_escaped_and_made_visible():
    legend = ['a <b> & "c"', one_line("bell \a, half a character \udc80, é")]
    picture = plots.curves_svg(plots.panels([ROWS, ROWS]), legend)
    assert b"light: training loss; strong: the same, smoothed; dashed with points: validation" in picture
    words = [text.text for text in ET.fromstring(picture).iter(SVG + "text")]
    assert 'a <b> & "c"' in words and "bell \\x07, half a character \\udc80, é" in words


def test_numbers_that_are_not_finite_part_a_line(tmp_path):
    rows = [row(n, None if n == 4 else float(n), skipped=True) for n in range(10)]
    rows[7]["train_loss"] = math.nan
    tree = draw(write_run(tmp_path / "run", rows), "--out", tmp_path / "x.svg")
    loss = [places(line) for line in lines(tree, "light")][:3]
    assert [len(line) for line in loss] == [4, 2, 2]
    assert len(lines(tree, "light")) == 3 + 1  # the gradient norm has no gaps


def test_a_single_point_is_a_circle(tmp_path):
    tree = draw(write_run(tmp_path / "run", [row(3, 2.5)]), "--out", tmp_path / "x.svg")
    assert not list(tree.iter(SVG + "polyline"))
    assert len([c for c in tree.iter(SVG + "circle") if c.get("r") == "2.6"]) == 4  # loss, smoothed, norm, rate


def test_a_flat_line_has_an_axis(tmp_path):
    tree = draw(write_run(tmp_path / "run", [row(n, 2.5, lr=0.0) for n in range(4)]), "--out", tmp_path / "x.svg")
    assert np.isfinite(np.concatenate([places(line) for line in tree.iter(SVG + "polyline")])).all()


def test_rows_of_changed_settings_and_rows_without_a_number_are_left_out():
    changed = {"iter": 1, "changed": {"learning_rate": [0.1, 0.2]}}
    rows = [row(0, 3.0), changed, row(1, 2.0), row(2, "high"), row(3, True)]
    assert points_of(rows, "train_loss") == [(0, 3.0), (1, 2.0)]
    rows = [row(0, 3.0), row(1, None), row(2, 1.0), row(3, None)]
    assert points_of(rows, "train_loss") == [(0, 3.0), (1, None), (2, 1.0)]


def test_smoothing_keeps_a_constant_and_looks_to_both_sides():
    np.testing.assert_allclose(smoothed([(n, 2.0) for n in range(500)]), [(n, 2.0) for n in range(500)])
    line = dict(smoothed([(n, float(n)) for n in range(1000)]))
    assert abs(line[500] - 500) < 1e-6
    bump = dict(smoothed([(n, float(n == 500)) for n in range(1000)]))
    assert bump[500] == max(bump.values()) < 0.1 and math.isclose(bump[490], bump[510]) and bump[490] > 0.01
    assert smoothed([(0, 1.0), (1, None), (2, 3.0)]) == [(0, 1.0), (2, 3.0)]  # short ones stay as they are


def test_a_long_line_keeps_its_extremes():
    points = [(n, math.sin(n)) for n in range(100_000)]
    points[54_321] = (54_321, 9.0)
    points[65_432] = (65_432, -9.0)
    (kept,) = segments(points)
    assert {(54_321, 9.0), (65_432, -9.0)} <= set(kept) <= set(points)
    assert plots.MOST_POINTS / 2 <= len(kept) <= plots.MOST_POINTS and kept == sorted(kept)


@pytest.mark.parametrize(
    "low, high",
    [(0, 20), (0.25, 4.1), (1e-5, 6e-4), (0, 2_000_000), (-3.0, 1e9), (0, 1000), (3.0, 3.0000001), (0.0, 3e-99)],
)
def test_ticks_are_round_and_say_where_they_are(low, high):
    axis = Axis([low, high], 0, 100)
    ticks = list(axis.ticks(6))
    assert 2 <= len(ticks) <= 7 and axis(low) == 0 and axis(high) == 100
    for number, text in ticks:
        assert low <= number <= high + 1e-9 * high and math.isclose(float(text.replace(",", "")), number, abs_tol=1e-12)
        assert len(text) <= 9 or high - low < 1e-6
    assert len({text for _, text in ticks}) == len(ticks)


# --------------------------------------------------------------------------------------------------------------------
# What may be wrong with a log, or with the command


def test_a_last_row_that_is_cut_off_does_not_count(tmp_path):
    run = write_run(tmp_path / "run", ROWS[:3], after='{"iter": 3, "train_lo')
    assert read_log(run) == ROWS[:3]


def test_a_log_is_read_as_a_run_folder_writes_it(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open_log(0)
    for one in ROWS:
        folder.log(one)
    folder.close()
    assert read_log(tmp_path / "run") == ROWS


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "is not a run folder: it has no metrics.jsonl"),
        ("", "there is nothing to draw yet"),
        ('{"iter": 0}\n', "there is nothing to draw yet"),
        ('{"iter": 0, "train_loss": null}\n', "there is nothing to draw yet"),
        ('{"iter": 0}\nhello\n{"iter": 1}\n', "line 2 is not a row"),
        ('{"loss": 0}\n', "line 1 is not a row"),
        ("[" * 100_000 + "\n", "line 1 is not a row"),
        ("7\n", "line 1 is not a row"),
        ('{"iter": 0, "train_loss": 1e308}\n', "line 1 is not a row"),
        ('{"iter": 0, "train_loss": -1' + 400 * "0" + "}\n", "line 1 is not a row"),
        ('{"iter": 1' + 400 * "0" + "}\n", "line 1 is not a row"),
    ],
)
def test_logs_that_cannot_be_drawn(tmp_path, content, words):
    if content is not None:
        write_run(tmp_path / "run", [], after=content)
    with pytest.raises(CheckpointError) as caught:
        plot.main([str(tmp_path / "run"), "--out", str(tmp_path / "x.svg")])
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "x.svg").exists()


def test_numbers_too_small_to_be_told_apart_make_a_flat_line(tmp_path):
    run = write_run(tmp_path / "run", [{"iter": n, "train_loss": x} for n, x in enumerate((5e-324, 0.0, 1e-323))])
    assert plot.main([str(run)]) == 0


@pytest.mark.parametrize(
    "args, words",
    [
        ([], "required"),
        (["--outt=x.svg", "run"], "did you mean --out?"),
        (["run", "--out", "x.pdf"], "--out must end in .svg, got x.pdf; write --out x.svg, which any browser shows"),
        (["run", "--out", "x y.PNG"], f"--out must end in .svg, got x y.PNG; write --out {quoted('x y.svg')}, which"),
        (["run", "--attention", "hi", "--out", "x.png"], "--out must end in .svg, got"),
        (["run", "--attention", ""], "--attention must have one character"),
    ],
)
def test_flags_that_are_refused(args, words):
    with pytest.raises(UsageError) as caught:
        plot.main(args)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path):
    run = write_run(tmp_path / "run", ROWS)
    (tmp_path / "x.svg").mkdir()
    for out in (tmp_path / "nowhere" / "x.svg", tmp_path / "x.svg"):
        with pytest.raises(CheckpointError, match="cannot write"):
            plot.main([run, "--out", str(out)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "x.svg"]


def test_the_command_ends_with_a_line_and_a_code(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plot", "there is none"])
    with pytest.raises(SystemExit) as end:
        run_command(plot.PROG, plot.main)
    assert end.value.code == 3
    assert capsys.readouterr().err == (
        "python -m npgpt.plot: there is none is not a run folder: it has no metrics.jsonl\n"
    )


def test_a_png_ends_with_a_line_and_a_code_before_anything_is_read(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plot", "there is none", "--out", "x.png"])
    with pytest.raises(SystemExit) as end:
        run_command(plot.PROG, plot.main)
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "python -m npgpt.plot: --out must end in .svg, got x.png; write --out x.svg, which any browser shows\n"
    )


# --------------------------------------------------------------------------------------------------------------------
# Attention


def a_model():
    model = GPT(GPTConfig(vocab_size=7, block_size=8, n_layer=2, n_head=3, n_embd=6, dropout=0.1)).eval()
    for n, parameter in enumerate(model.parameters()):
        parameter.data[...] = np.random.default_rng(n).normal(size=parameter.shape)
    model.tokenizer = CharTokenizer(" <abcde")
    return model


def test_attention_maps_are_the_weights_that_the_model_uses():
    model, tokens = a_model(), np.array([1, 3, 0, 6, 2])
    seen = []

    def made(op, out, parents, backward):
        if op == "causal_attention":
            seen.append((out.data, split_qkv(parents[0].data, 3)[2]))

    with no_grad(), watched(made):
        model(tokens[None])
    maps = attention_maps(model, tokens)
    assert len(maps) == len(seen) == 2
    for p, (y, v) in zip(maps, seen, strict=True):
        assert p.shape == (3, 5, 5) and not np.triu(p, 1).any()
        np.testing.assert_allclose(p.sum(axis=-1), 1, rtol=1e-5)
        np.testing.assert_allclose(p @ v[0], split_heads(y, 3)[0], rtol=1e-3, atol=1e-4)


def test_squares_are_as_dark_as_the_roots_of_the_weights():
    maps = attention_maps(a_model(), [1, 3, 0, 6, 2])
    tree = ET.fromstring(attention_svg(maps, ["<", "b", " ", "\n", "a long word"]))
    groups = list(tree.iter(SVG + "g"))
    assert len(groups) == 6
    for group, p in zip(groups, [p for layer in maps for p in layer], strict=True):
        drawn = np.zeros((5, 5))
        for path in group.iter(SVG + "path"):
            for s, t in re.findall(r"M(\d+) (\d+)h1v1h-1z", path.get("d")):
                drawn[int(t), int(s)] = float(path.get("fill-opacity"))
        np.testing.assert_allclose(drawn, np.sqrt(p), atol=1 / 32 + 1e-6)
    words = [text.text for text in tree.iter(SVG + "text")]
    assert {"layer 0, head 0", "layer 1, head 2", "<", "␣", "\\n", "a␣long␣w…"} <= set(words)
    assert words.count("b") == 2 * 6  # beside the rows and above the columns of each


def test_long_texts_have_no_words_and_small_squares():
    tree = ET.fromstring(attention_svg([np.full((1, 100, 100), 0.01)], ["x"] * 100))
    assert "x" not in [text.text for text in tree.iter(SVG + "text")]
    assert float(tree.get("width")) < 600


def test_attention_of_a_runs_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(GPT, "from_pretrained", lambda path: a_model())
    assert plot.main([str(tmp_path), "--attention", "a cab"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'attention.svg'}\n"
    assert len(list(ET.parse(tmp_path / "attention.svg").getroot().iter(SVG + "g"))) == 6
    for text, words in (("xyz", "--attention: character 'x'"), ("a" * 9, "9 tokens; the model looks at 8 at most")):
        with pytest.raises(UsageError, match=words):
            plot.main([str(tmp_path), "--attention", text])


def test_attention_needs_a_model_and_its_tokenizer(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError):
        plot.main([str(tmp_path / "nowhere"), "--attention", "a"])
    model = a_model()
    model.tokenizer = None
    monkeypatch.setattr(GPT, "from_pretrained", lambda path: model)
    with pytest.raises(UsageError, match="no tokenizer that can be opened"):
        plot.main([str(tmp_path), "--attention", "a"])


@pytest.mark.parametrize("text", ['{"iter": 1}\r{"iter": 2}\n', '{"iter": 0}\n{"iter": 1\r{"iter": 2}\n'])
def test_a_row_of_a_log_ends_with_a_line_feed_and_with_nothing_else(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_bytes(text.encode())
    with pytest.raises(CheckpointError, match=r"is damaged: line \d is not a row of a log"):
        read_log(tmp_path)
