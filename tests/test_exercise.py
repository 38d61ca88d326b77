"""Exercises: the ops solve them, wrong answers get the hint that they need, and every bug can be found."""

import ast
import errno
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import students

from npgpt import errors, exercise
from npgpt.command import PLANTED
from npgpt.errors import CheckpointError, UsageError
from npgpt.exercise import PACKAGE, main, with_kernels
from npgpt.kernels import jit
from npgpt.study import check as checking
from npgpt.study import hints, kinds
from npgpt.study.bugs import BUGS, NUMBERED, plant
from npgpt.study.lesson import LEVELS, exercise_text
from npgpt.study.lessons import LESSONS


@pytest.fixture
def check(tmp_path, capsys):
    """check(text, ...) -> (exit code, what is printed) for a file with this text; more: flags."""

    def check(text, *more):
        path = tmp_path / "mine.py"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        code = main(["check", str(path), *more])
        out = capsys.readouterr().out
        assert "Traceback" not in out
        return code, out

    return check


def solution(op):
    return exercise_text(LESSONS[op], 0, "mine.py")


def with_mistake(op, before, after):
    text = solution(op)
    assert text.count(before) == 1, before
    return text.replace(before, after)


# --------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("op", LESSONS)
def test_the_op_itself_solves_its_exercise_and_trains_a_gpt(op, check, monkeypatch):
    losses = []
    train = checking.train
    monkeypatch.setattr(checking, "train", lambda *args: losses.append(train(*args)) or losses[-1])
    code, out = check(solution(op))
    assert code == 0 and f"passed: {op}" in out and "WRONG" not in out
    shown = ["dq", "dk", "dv"] if op == "attention" else LESSONS[op].results
    assert re.findall(r"^  (\w+) +ok ", out, re.MULTILINE) == list(shown)
    assert losses[0] == pytest.approx(losses[1]) and losses[0][-1] < losses[0][0] - 0.5


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("op", LESSONS)
def test_a_level_is_the_solution_with_blanks_in_the_backward_only(op, level, check):
    text, solved = exercise_text(LESSONS[op], level, "mine.py"), solution(op)
    blank = LESSONS[op].backward
    for name in (LESSONS[op].function(), *(name.removesuffix("_ref") for name in blank[:-1])):
        function = re.compile(rf"^def {name}\(.*?(?=\n\n\n|\n*\Z)", re.MULTILINE | re.DOTALL)
        (ours,), (theirs,) = function.findall(text), function.findall(solved)
        assert "..." in ours and ours != theirs
        assert ours.splitlines()[0] == theirs.splitlines()[0]
        text = text.replace(ours, theirs)
    head = re.compile(r'^""".*?"""', re.DOTALL)
    assert head.sub("", text) == head.sub("", solved)
    code, out = check(exercise_text(LESSONS[op], level, "mine.py"))
    assert code == 1 and ("blank" in out and "line" in out) and "passed:" not in out


@pytest.mark.parametrize("op", LESSONS)
def test_what_commands_read_in_an_ops_file_is_there(op):
    """npgpt/ops/__init__.py says what is data in these files."""
    lesson = LESSONS[op]
    source, file = lesson.source(), f"npgpt/ops/{lesson.file}.py"
    nodes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    for name in lesson.backward:
        lines = source.splitlines()[nodes[name].lineno - 1 : nodes[name].end_lineno]
        for line in (line.strip() for line in lines):
            words = "a comment on a line of its own quotes what is undone, '# result = formula': exercises show it"
            assert not line.startswith("#") or re.match(r"# \w+ = \S", line), f"{file}, {name}: {words}; got {line!r}"
    docs = [ast.get_docstring(node) or "" for node in (ast.parse(source), *nodes.values())]
    words = 'no docstring has a line "Forward..." and after it a line "Backward...": the page of explain shows both'
    assert any(re.search(r"^Forward.*^Backward", doc, re.S | re.M) for doc in docs), f"{file}: {words}"



@pytest.mark.parametrize("op", LESSONS)
def test_levels_give_less_and_less_away_and_hints_quote_the_forward(op):
    trees = [ast.parse(exercise_text(LESSONS[op], level, "mine.py")) for level in (0, *LEVELS)]
    names = [sum(isinstance(node, ast.Name) for node in ast.walk(tree)) for tree in trees]
    assert names[0] > names[1] >= names[2] >= names[3]
    text = exercise_text(LESSONS[op], 3, "mine.py")
    assert text.endswith('"""\n    ...\n')
    assert "_ref(" not in "".join(line for line in text.splitlines() if line.startswith("def "))
    lesson = LESSONS[op]
    case = hints.Case(lesson)
    lines = {*lesson.lines.values(), *(line for *_, line in lesson.mistakes if line), *filter(None, lesson.shared[1:])}
    lines |= {line for _, line in lesson.terms.values() if line}
    lines |= {line for _, line in case.factors.values() if line}
    assert all(line in text for line in lines), lines
    assert {*lesson.lines} >= {*case.parts, *lesson.results} - {helper for helper, _, _ in lesson.slopes}
    found = [mistake for (mistake,) in case.mistakes.singles.mistakes if mistake.cost == 0]
    assert {mistake.words for mistake in found} == {words for _, _, words, _ in lesson.mistakes}  # each is one
    assert {ast.unparse(term.node) for term in case.mistakes.terms} >= lesson.terms.keys()


# --------------------------------------------------------------------------------------------------------------------
# Wrong answers: op, what the solution has, what a student wrote, and words of which some line with a hint has all

SUM = "missing sum over the broadcast axis"
WRONG = [
    ("linear", "dx = dy @ weight", "dx = (dy @ weight).T", "dx transposed"),
    ("linear", "dweight = dy.T @ x", "dweight = x.T @ dy", "dweight transposed: it is what is wanted"),
    ("linear", "dweight = dy.T @ x", "dweight = (x.T @ dy).reshape(weight.shape)", "dweight transposed, reshaped"),
    ("linear", "dweight = dy.T @ x", "dweight = dy[:, :, None] * x[:, None, :]", f"dweight {SUM} 0"),
    ("linear", "dweight = dy.T @ x", "dweight = dy.T @ x / len(x)", "dweight mean instead of sum N = 4"),
    ("linear", "dbias = dy.sum(axis=0)", "dbias = dy.mean(axis=0)", "dbias mean instead of sum N = 4"),
    ("linear", "dbias = dy.sum(axis=0)", "dbias = dy", f"dbias {SUM} 0 (length 4) y + bias"),
    ("linear", "dbias = dy.sum(axis=0)", "dbias = dy.sum(axis=0, keepdims=True)", "dbias keepdims"),
    ("linear", "dbias = dy.sum(axis=0)", "dbias = dy.sum(axis=1)", "dbias wrong axis N"),
    ("linear", "return dx, dweight, dbias", "return dx, dbias, dweight", "dbias wrong place: this is dweight;"),
    ("linear", "dx = dy @ weight", "dx = dy @ weight * 1.00001", "dx every entry is 1.00001 times"),
    ("linear", "dbias = dy.sum(axis=0)", "dbias = dy[-1]", "dbias one row only last"),
    ("linear", "dbias = dy.sum(axis=0)", "dbias = -dy.sum(axis=0)", "dbias sign"),
    ("linear", "dx = dy @ weight", "dx = dy @ weight * np.nan", "dx not finite"),
    ("linear", "dx = dy @ weight", "dx = np.zeros_like(x)", "dx all zeros"),
    ("linear", "dx = dy @ weight", "dx = dy @ weight; dx[2] = 1", "dx only row 2 is wrong"),
    ("linear", "dx = dy @ weight", "dx = dy @ weight.T", "ValueError transpose"),
    ("dropout", "np.where(mask, dy * ", "np.where(True, dy * ", "dx wrong mask dropped"),
    ("dropout", "dy.dtype.type(1 / (1 - p))", "1", "dx constant factor 1 - p"),
    ("dropout", "np.where(mask, dy", "np.where(~mask, dy", "dx wrong mask turned round"),
    ("dropout", "np.where(mask, dy * dy.dtype.type(1 / (1 - p)), ", "np.where(~mask, dy, ", "turned constant 1 - p"),
    ("dropout", "(key, first_row, dy.shape", "(key, 0, dy.shape", "dx wrong mask first_row"),
    ("dropout", "    mask = dropout_mask_ref(key, first_row, dy.", "    return dy; (dy.", "dx missing mask factor"),
    ("dropout", "dy.dtype.type(1 / (1 - p))", "1 / p", "dx constant factor (1 - p) / p"),
    ("embedding", "np.add.at(dwte, idx, dy)", "dwte[idx] += dy", "dwte repeated index"),
    ("embedding", "dwpe[:T] += dy.sum(axis=0)", "dwpe[:T] += dy[0]", "dwpe one row only"),
    ("embedding", "dwpe[:T] += dy.sum(axis=0)", "dwpe[:T] += dy.mean(axis=0)", "dwpe mean instead of sum B = 3"),
    ("embedding", "dwpe[:T] += dy.sum(axis=0)", "dwpe[:T] += dy", "ValueError missing sum"),
    ("embedding", "    np.add.at", "    dwte = dwte * 0\n    np.add.at", "dwte overwritten tied"),
    ("embedding", "np.add.at(dwte, idx, dy)", "dwte = dwte.copy()", "dwte nothing was added"),
    ("embedding", "np.add.at(dwte, idx, dy)", "np.add.at(dwte, idx, dy); dwte[2] = 1", "dwte wrong mask occur"),
    ("cross-entropy", "    dlogits[rows, targets[rows]] -= 1\n", "", "dlogits missing term"),
    ("cross-entropy", "    dlogits[~valid] = 0\n", "", "dlogits wrong mask ignored"),
    ("cross-entropy", "np.exp(logits - lse[:, None])", "np.exp(logits)", "dlogits wrong value lse = m + np.log"),
    (
        "cross-entropy", "lse[:, None])\n    valid = targets != ignore_index",
        "lse[:, None])\n    valid = targets != -1", "dlogits wrong mask ignored",
    ),
    ("cross-entropy", "dloss / count", "dloss / len(logits)", "dlogits constant factor count / N"),
    ("cross-entropy", "dloss / count", "dloss", "dlogits constant factor count"),
    ("cross-entropy", "dloss / count", "1 / count", "dlogits constant factor 1 / dloss"),
    ("cross-entropy", "dloss / count", "-dloss / count", "dlogits sign"),
    ("cross-entropy", "dloss / count", "1 / count", "hint: constant factor: every entry is -2.248 times 1 / dloss."),
    ("cross-entropy", "dlogits = p\n", "dlogits = logits.copy()\n", "dlogits wrong value logits"),
    ("cross-entropy", "    dlogits[~valid] = 0", "    dlogits[valid] = 0", "dlogits wrong mask turned round"),
    (
        "cross-entropy", "    dlogits[~valid] = 0\n    return dlogits * logits.dtype.type(dloss / count)",
        "    return dlogits * dloss", "dlogits wrong mask ignored constant factor count",
    ),
    ("linear", "dx = dy @ weight", "dx = dy @ weight * (1 + 5e-6); dx[0] += 1e-9", "dx constant factor"),
    ("mlp", "dy, act, w_proj", "dy, pre, w_proj", "dw_proj wrong value act"),
    ("mlp", "dact * gelu_slope(pre)", "dact * gelu_slope(act)", "dx wrong value before the activation"),
    ("mlp", "dact * gelu_slope(pre)", "dact", "dw_fc missing line GELU"),
    ("mlp", "+ 0.5 * z * (1 - t**2) * K * (1 + 3 * A * z**2)", "", "db_fc missing term second"),
    ("mlp", " * K * (1 + 3 * A * z**2)", "", "dx missing factor inside of tanh"),
    ("mlp", "(1 + 3 * A * z**2)", "1", "dx missing factor cube"),
    ("mlp", "dact * gelu_slope(pre)", "-dact * gelu_slope(pre)", "dx sign np.tanh(K"),
    ("mlp", "dact * gelu_slope(pre)", "dact * gelu_slope(pre) * pre**2", "dw_fc none of the usual np.tanh(K"),
    ("mlp", "return dx, dw_fc, db_fc,", "return dx, -dw_fc, db_fc,", "dw_fc sign pre = linear_forward"),
    ("mlp", "return dx, dw_fc, db_fc,", "return dx, dw_fc.T, db_fc,", "dw_fc transposed"),
    ("mlp", "return dx, dw_fc, db_fc,", "return dx, dw_fc, dpre,", f"db_fc {SUM} 0 (length 4)"),
    ("layernorm", "(g - g_mean - xhat", "(g - xhat", "dx missing term mean = x.mean"),
    ("layernorm", " - xhat * g_xhat_mean)", ")", "dx missing term var = x.var"),
    ("layernorm", "rstd[:, None] * (g - g_mean - xhat * g_xhat_mean)", "g * rstd[:, None]", "dx missing terms"),
    ("layernorm", "g = dy * weight", "g = dy", "dx missing factor dy is the gradient of y"),
    ("layernorm", "dx = rstd[:, None] * (", "dx = (", "dx missing factor differs from row to row"),
    ("layernorm", "g_mean - xhat * g", "g_mean - x * g", "dx wrong value xhat"),
    ("layernorm", "g.mean(axis=1, keepdims=True)", "g.mean(axis=0, keepdims=True)", "dx wrong axis g_mean"),
    ("layernorm", "(dy * xhat).sum(axis=0)", "(dy * x).sum(axis=0)", "dweight wrong value xhat"),
    ("layernorm", "(dy * xhat).sum(axis=0)", "dy * xhat", f"dweight {SUM} 0 (length 4) xhat * weight"),
    ("layernorm", "(dy * xhat).sum(axis=0)", "(dy * x)", f"dweight {SUM} 0 wrong value"),
    ("layernorm", "(dy * xhat).sum(axis=0)", "(dy * xhat).mean(axis=0)", "dweight mean instead of sum"),
    ("layernorm", "(dy * xhat).sum(axis=0)", "(dy * xhat).sum(axis=1)", "dweight wrong axis N"),
    ("layernorm", "dbias = dy.sum(axis=0)", "dbias = (dy * xhat).sum(axis=0)", "dbias a factor too many"),
    ("layernorm", "(dy * xhat).sum(axis=0)", "dy.sum(axis=0)", "dweight missing factor"),
    ("layernorm", "return dx, dweight, dbias", "return dx, dbias, dweight", "dweight wrong place: this is dbias"),
    ("layernorm", "g.mean(axis=1, keepdims=True)", "g.mean(axis=1)", "ValueError keepdims=True [:, None]"),
    ("attention", "dp - (dp * p).sum(axis=-1, keepdims=True)", "dp", "dq missing term probabilities"),
    ("attention", "ds = p * (dp", "ds = -p * (dp", "dq sign p = e / total"),
    ("attention", "ds = p * (dp", "ds = 2 * p * (dp", "dk factor: every entry is 2 times what it must be."),
    ("attention", "dq = ds @ k / math.sqrt(q.shape[-1])", "dq = ds @ k", "dq constant factor sqrt(hs)"),
    ("attention", "dq = ds @ k / math.sqrt(q.shape[-1])", "dq = ds @ k / q.shape[-1]", "dq factor 1 / sqrt(hs)"),
    ("attention", "ds = p * (dp", "ds = p * math.sqrt(q.shape[-1]) * (dp", "dq factor which is sqrt(hs). s = q @ k"),
    ("attention", "dk = ds.swapaxes(-1, -2) @ q / math.sqrt(q.shape[-1])", "dk = ds @ q", "dk transposed sqrt(hs)"),
    ("attention", "dp = da * drop", "dp = da", "dk wrong mask dropout"),
    ("attention", "dp = da * drop", "dp = da * (drop > 0)", "dk constant factor 1 - dropout.p"),
    ("attention", "dv = (p * drop)", "dv = p", "dv wrong value after dropout"),
    ("attention", "dv = (p * drop).swapaxes(-1, -2) @ dy", "dv = (p * drop) @ dy", "dv transposed column"),
    ("attention", "dk = ds.swapaxes(-1, -2) @ q", "dk = ds @ q", "dk transposed column"),
    (
        "attention", "dk = ds.swapaxes(-1, -2) @ q", "dk = (q.swapaxes(-1, -2) @ ds).reshape(q.shape)",
        "dk transposed, then reshaped",
    ),
    ("attention", "(dq, dk, dv)", "(dk, dq, dv)", "dq wrong place: this is dk"),
    ("attention", "np.exp(_scores(q, k) -", "np.exp(q @ k.swapaxes(-1, -2) / math.sqrt(5) -", "dv wrong mask future"),
    ("attention", "(dp * p).sum(axis=-1,", "(dp * p).sum(axis=-2,", "dq wrong axis keys"),
    ("attention", "    return dqkv", "    return dqkv.transpose(2, 1, 0)", "dqkv transposed"),
    ("attention", "zip(split_qkv(dqkv, n_head),", "zip(dqkv.reshape(3, *q.shape),", "dv right numbers wrong places"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "before", "after", "words"), WRONG, ids=lambda text: text if text in LESSONS else "")
def test_a_wrong_answer_gets_the_right_hint(op, before, after, words, check):
    code, out = check(with_mistake(op, before, after), "--more", "--more")
    assert code == 1 and "passed:" not in out
    shown = re.sub(r"\n  (line|kind): ", r" \1: ", out).splitlines()  # the rungs of a hint in one line
    assert any(all(word in line for word in words.split()) for line in shown if "hint:" in line), out


def test_a_hint_is_a_ladder_and_no_rung_has_the_answer(check):
    """Which results are wrong, and what leads to them; which line; which kind; a hint of two results once."""
    text = with_mistake("attention", "dp - (dp * p).sum(axis=-1, keepdims=True)", "dp")
    out = [check(text, *["--more"] * n)[1] for n in range(4)]
    where = "  hint: dv is right, dq and dk are wrong; what leads to these alone is da, dp, ds and their own lines.\n"
    line = "  line: the forward's  p = e / total  (where ds is made)\n"
    assert [(where in shown, line in shown, "  kind: missing term" in shown) for shown in out] == [
        (True, False, False), (True, True, False), (True, True, True), (True, True, True),
    ]  # fmt: skip
    assert "command with --more)" in out[0] and "command with --more --more)" in out[1] and "command" not in out[2]
    assert out[2].count("hint:") == 1 and out[2] == out[3] and "sum(" not in out[3]


def test_a_helper_is_measured_by_itself(check):
    slope = " * K * (1 + 3 * A * z**2)"
    code, out = check(with_mistake("mlp", slope, ""))
    assert code == 1 and "  gelu_slope WRONG " in out and "begin with gelu_slope, which was measured by itself" in out
    code, out = check(with_mistake("mlp", "dact * gelu_slope(pre)", "dact * gelu_slope(act)"))
    assert code == 1 and "  gelu_slope ok " in out and "alone is dact, dpre and their own lines." in out
    code, out = check(solution("mlp").replace("gelu_slope(pre)", "right(pre)") + "\n\n" + """\
right = gelu_slope


def gelu_slope(z):
    return z
""")
    assert code == 0 and "gelu_slope" not in out  # nothing needs it


def test_where_nothing_else_is_found_a_hint_says_which_entries(check):
    for op, before, after, words in (
        ("embedding", "np.add.at(dwte, idx, dy)", "np.add.at(dwte, idx, dy); dwte[1] **= 2", "only the row 1 is wrong"),
        (
            "embedding", "np.add.at(dwte, idx, dy)", "np.add.at(dwte, idx, dy); dwte[[0, 1, 3, 4, 6]] **= 2",
            "wrong are the rows of tokens that occur more than once, and no others",  # each does
        ),
        (
            "cross-entropy", "    dlogits[~valid] = 0\n",
            "    dlogits[~valid] = 0\n    dlogits[rows, targets[rows]] **= 2\n", "wrong are the entries of the targets",
        ),
        ("attention", "dk = ds", "dk = np.cos(np.arange(5)); dk = dk * ds", ""),
    ):  # fmt: skip
        code, out = check(with_mistake(op, before, after), "--more", "--more")
        assert code == 1 and words in out and (not words or "none of the usual" in out), out


def test_half_of_a_term_is_seen_also_where_the_result_is_transposed(check):
    for after in ("(g - 0.5 * g_mean - xhat * g_xhat_mean)", "(g - 0.5 * g_mean - xhat * g_xhat_mean); dx = dx.T"):
        _, out = check(with_mistake("layernorm", "(g - g_mean - xhat * g_xhat_mean)", after), "--more", "--more")
        assert "0.5 times what it must be (of the term that comes through the mean alone)" in out
        assert ("kind: transposed: its shape is" in out) is ("dx.T" in after)


@pytest.mark.parametrize("op", LESSONS)
def test_the_steps_of_a_backward_make_its_results_and_a_change_changes_them(op):
    case = hints.Case(LESSONS[op])
    backward, (_, reference, _) = case.backward, LESSONS[op].references()
    results = reference(*case.arguments())
    results = dict(zip(LESSONS[op].results, results if isinstance(results, tuple) else (results,), strict=True))
    parts = {name: part for result, array in results.items() for name, part in case._parts(result, array).items()}
    for name, part in parts.items():
        assert np.array_equal(backward.run({})[name], part) and np.array_equal(backward.values[name], part)
    for i, step in enumerate(backward.steps):
        reached = backward.reached(i, parts)
        names = backward.run({step.node: []}, i) if step.in_place else None
        changed = {name for name in parts if names and not np.array_equal(names[name], parts[name])}
        assert changed <= reached, step.text
    assert {name for i in range(len(backward.steps)) for name in backward.reached(i, parts)} == {*parts}


@pytest.mark.parametrize(
    ("op", "before", "after", "words"),
    [
        ("mlp", "dact * gelu_slope", "dact @ gelu_slope", "(4, 11) and (4, 11) do not fit; wrong product"),
        ("embedding", "dwpe[:T] += ", "dwpe += ", "(6, 5) and (4, 5) do not fit; wrong index"),
        ("embedding", "dwpe[:T] += dy.sum(axis=0)", "dwpe[:T] = dy.sum(axis=1)", "wrong axis"),
        ("embedding", "dwpe[:T] += dy.sum(axis=0)", "dwpe[:T] = dy", "(4, 5) and (3, 4, 5) do not fit; missing sum"),
        ("linear", "dx = dy @ weight", "dx = dy @ weight + x.T", "(4, 5) and (5, 4) do not fit; transposed"),
        ("linear", "dx = dy @ weight", "dx = dy @ weight + dy", "wrong value"),
        ("linear", "dx = dy @ weight", "raise ValueError('broadcast')", ""),
        ("linear", "dx = dy @ weight", "dx = (lambda: dy @ x)()", "transposed"),
    ],
)
def test_what_numpy_refuses_is_said_in_shapes(op, before, after, words, check):
    code, out = check(with_mistake(op, before, after))
    assert code == 1 and words in out and ("hint:" in out) is bool(words), out


# --------------------------------------------------------------------------------------------------------------------
# What the hints are worth


def test_hints_see_what_was_meant():
    """In four of five answers at least, also of readers who had not seen them; misleading in one of twenty."""
    rows = students.measured()
    fresh = [row for row in rows if row[0].endswith("reader")]
    assert len(fresh) >= 30 and len(rows) >= 149
    for some in (rows, fresh):
        rates = students.rates(some)
        assert rates["right"] >= 0.8 and rates["wrong"] < 0.05
    assert students.TABLE.read_text(encoding="utf-8") == students.table(rows), "python tests/students.py --write"


def test_there_are_typical_wrong_answers_for_every_op():
    assert all(sum(wrong[0] == op for wrong in WRONG) >= 3 for op in LESSONS)


def test_what_is_right_stays_right_beside_what_is_wrong(check):
    code, out = check(with_mistake("linear", "dbias = dy.sum(axis=0)", "dbias = dy.mean(axis=0)"))
    assert code == 1 and out.count(" ok ") == 2 and out.count("WRONG") == 1


def test_blank_results_are_named_and_the_others_are_checked(check):
    text = with_mistake("linear", "dweight = dy.T @ x", "dweight = ...")
    line = text.splitlines().index("    dweight = ...") + 1
    code, out = check(text)
    assert code == 1 and f"dweight  blank  see line {line}\n" in out and out.count(" ok ") == 2
    begun = "    dbias = dy.sum(axis=0)\n    dx = dy.mean()\n"
    text = exercise_text(LESSONS["linear"], 2, "mine.py").replace("    ...\n", begun)
    code, out = check(text)
    assert code == 1 and re.findall(r"^  (\w+) +(\w+)", out, re.M) == [
        ("dx", "WRONG"), ("dweight", "blank"), ("dbias", "ok"),
    ]  # fmt: skip
    code, out = check(with_mistake("linear", "dweight = dy.T @ x", "dweight = None"))
    assert code == 1 and "dweight  blank  it is None" in out


DA = "da = dy @ v.swapaxes(-1, -2)"
DV = "dv = (p * drop).swapaxes(-1, -2) @ dy"
DV_ALONE = f"""\
q, k, v = split_qkv(qkv, n_head)
    p = np.exp(_scores(q, k) - lse[..., None])
    drop = _dropout_scale(p, dropout)
    dy = split_heads(dy, n_head)
    {DV}"""
UNFINISHED = [  # op, level, (what is blank there, what a student wrote), the table, words of the line on where it stops
    ("attention", 1, [], "dq blank dk blank dv blank", "as grad is still blank"),
    ("attention", 1, [("da = ...", DA), ("dv = ...", DV)], "dq blank dk blank dv ok", "as grad is still blank"),
    ("attention", 1, [("da = ...", DA), ("dv = ...", "dv = p * da")], "dq blank dk blank dv WRONG", "as grad is"),
    ("attention", 1, [("dv = ...", DV.replace(" * drop", ""))], "dq blank dk blank dv WRONG", "as grad is"),
    ("attention", 1, [("dv = ...", DV), ("dp = ...", "dp = da * drop")], "dq blank dk blank dv ok", "as da is"),
    ("attention", 2, [("a @ v\n    ...", f"a @ v\n    {DV}")], "dq blank dk blank dv blank", "NameError: name 'p' is"),
    ("attention", 2, [("a @ v\n    ...", f"a @ v\n    {DV_ALONE}")], "dq blank dk blank dv ok", ""),
    ("embedding", 1, [], "dwte blank dwpe blank", "stops here, which is blank"),
    ("embedding", 1, [("    ...  #", "    np.add.at(dwte, idx, dy)  #")], "dwte ok dwpe blank", "which is blank"),
    ("embedding", 1, [("dwpe[:T] += ...", "dwpe[:T] += dy.sum(axis=0)")], "dwte blank dwpe ok", ""),
    ("cross-entropy", 1, [], "dlogits blank", "stops here, which is blank"),
    ("cross-entropy", 1, [("dlogits = ...", "dlogits = p")], "dlogits blank", "which is blank"),
    ("cross-entropy", 1, [("dlogits = ...", "dlogits = p"), ("-= ...", "-= 1")], "dlogits blank", "which is"),
    ("mlp", 1, [], "dx blank dw_fc blank db_fc blank dw_proj blank db_proj blank", "which is blank"),
    (
        "mlp", 1, [("act = ...", "act = gelu(pre)"), ("_proj = ...", "_proj = linear_backward_ref(dy, act, w_proj)")],
        "dx blank dw_fc blank db_fc blank dw_proj ok db_proj ok", "which is blank",
    ),
    (
        "mlp", 1, [("act = ...", "act = gelu(pre)"), ("_proj = ...", "_proj = linear_backward_ref(dy, act, w_proj)"),
        ("dpre = ...", "dpre = dact * gelu_slope(pre)")],
        "dx blank dw_fc blank db_fc blank dw_proj ok db_proj ok", "as what it needs is still blank",
    ),
    (
        "mlp", 1, [("return ...", "return 0.5 * (1 + t)")],
        "dx blank dw_fc blank db_fc blank dw_proj blank db_proj blank", "which is blank",
    ),
    ("layernorm", 1, [("dbias = ...", "dbias = dy.sum(axis=0)")], "dx blank dweight blank dbias ok", ""),
    (
        "layernorm", 1, [("dbias = ...", "dbias = dy.sum(axis=0)"), ("dx = ...", "dx = g - g_mean")],
        "dx blank dweight blank dbias ok", "as g and g_mean are still blank",
    ),
    (
        "layernorm", 1, [("dbias = ...", "dbias = dy.sum(axis=0)"), ("dx = ...", "dx = gg - g_mean")],
        "dx blank dweight blank dbias ok", "NameError: name 'gg' is not defined",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("op", "level", "filled", "table", "stop"), UNFINISHED)
def test_an_unfinished_file_shows_what_is_right_so_far(op, level, filled, table, stop, check):
    text = exercise_text(LESSONS[op], level, "mine.py")
    for blank, code in filled:
        assert text.count(blank) == 1, blank
        text = text.replace(blank, code)
    code, out = check(text)
    rows = re.findall(r"^  (\w+) +(ok|blank|WRONG) ", out, re.MULTILINE)
    assert code == 1 and " ".join(map(" ".join, rows)) == table
    *_, before, last = out.splitlines()
    assert last.startswith("  still blank: line") and out.count("still blank: ") == 1
    assert (before.startswith("  mine.py line ") and stop in before) if stop else "mine.py" not in out


@pytest.mark.parametrize("op", LESSONS)
def test_level_1_is_done_step_by_step_and_what_is_right_stays_right(op, check):
    lines, solved = (exercise_text(LESSONS[op], level, "mine.py").splitlines() for level in (1, 0))
    assert len(lines) == len(solved)
    blanks = [n for n, line in enumerate(lines) if n > 1 and line != solved[n]]
    names, before = list(LESSONS[op].results) if op != "attention" else ["dq", "dk", "dv"], set()
    helpers = {helper for helper, _, _ in LESSONS[op].slopes}  # measured as soon as they are filled
    for step in [None, *blanks[:-1]]:
        if step is not None:
            lines[step] = solved[step]
        code, out = check("\n".join(lines))
        rows = dict(re.findall(r"^  (\w+) +(ok|blank) ", out, re.MULTILINE))
        right = {name for name, state in rows.items() if state == "ok"}
        results = [name for name in rows if name not in helpers]
        assert code == 1 and results == names and before <= right and "WRONG" not in out, out
        before = right
    assert op in ("dropout", "cross-entropy") or before  # whose only result is made by the last line


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("    return dwte, dwpe", "", "it adds in place, and must return it, too: return dwte, dwpe"),
        ("    np.add.at", "    dwte = dwte.copy()\n    np.add.at", "WRONG  dwte: a copy"),
        ("dwpe[:T] += dy.sum(axis=0)", "dwpe = dwpe + np.pad(dy.sum(axis=0), ((0, 2), (0, 0)))", "WRONG  dwpe: a copy"),
        ("    return dwte, dwpe", "    return dwte[:], dwpe.copy()", "passed"),
    ],
)
def test_what_must_be_added_in_place_is_and_is_returned(before, after, words, check):
    code, out = check(with_mistake("embedding", before, after))
    assert words in out and out.count(" ok ") == 2 and code == ("passed" not in words)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("dx = dy @ weight", "dx = dy @ wieght", "mine.py line {}: NameError: name 'wieght' is not defined"),
        ("dx = dy @ weight", "dx = dy @ weight +", "mine.py line {}: invalid syntax"),
        ("dx = dy @ weight", "raise SystemExit(0)", "mine.py line {}: SystemExit: 0"),
        ("return dx, dweight, dbias", "return dx, dweight", "returns 2 results, it must return 3: dx, dweight, dbias"),
        ("return dx, dweight, dbias", "return dx, 'a', dbias", "dweight is a str, not an array"),
        ("return dx, dweight, dbias", "dy *= 2; return dx, dweight, dbias", "changes dy in place"),
        ("    dx = dy @ weight", "    dx = dy @ weight[:, :5][:7]", "dweight of shape"),
        ("dx = dy @ weight", "dx = dy @ weight * (1 + 1e-3 * (len(x) > 4))", "in a GPT it makes another gradient"),
    ],
)
def test_what_else_can_be_wrong_is_said_in_a_line(before, after, words, check):
    if words == "dweight of shape":
        before, after, words = "dweight = dy.T @ x", "dweight = (dy.T @ x)[:7, :5]", "in a GPT dweight has shape (7, 5)"
    text = with_mistake("linear", before, after)
    line = next(n for n, line in enumerate(text.splitlines(), 1) if after in line)
    code, out = check(text)
    assert code == 1 and words.format(line) in out and "passed:" not in out


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("    return dx, dweight, dbias", "return dx, dweight, dbias", "line {}: 'return' outside function"),
        ("    return dx, dweight, dbias", "    break", "line {}: 'break' outside loop"),
        ("def linear_backward(dy, x, weight)", "def linear_backward(dy, x, x)", "line {}: duplicate argument 'x'"),
        ("import numpy as np", "import numpy as np\nfrom __future__ import division", "line {}: from __future__"),
        (
            "def linear_backward(dy, x, weight)", "def linear_backward(dy, x)",
            "line {}: linear_backward takes (dy, x), it is called with (dy, x, weight)\n",
        ),
        ("dx = dy @ weight", "dx = " + "-" * 50_000 + "1", "mine.py: Python cannot read it: an expression in it is"),
        ("dx = dy @ weight", "dx = 1" + "+1" * 50_000, "mine.py: Python cannot read it: an expression in it is"),
        ("dx = dy @ weight", "class E(BaseException): pass\n    raise E('a\\nb')", "mine.py line {}: E: a b\n"),
        (
            "dx = dy @ weight", "class E(ValueError):\n        def __str__(self): return 1 / 0\n    raise E",
            "mine.py line {}: E: (its text cannot be made)\n",
        ),
    ],
    ids=["return", "break", "twice", "future", "signature", "deep", "long", "own BaseException", "no text"],
)  # fmt: skip
def test_what_python_itself_refuses_is_a_line(before, after, words, check):
    text = with_mistake("linear", before, after)
    line = len(text[: text.index(after) + len(after)].splitlines())
    code, out = check(text)
    assert code == 1 and words.format(line) in out and "passed:" not in out
    assert len(out.splitlines()) <= 2  # the line, and before it which op it is


def test_what_cannot_be_called_is_named_and_what_has_no_signature_is_called(check):
    code, out = check("class linear_backward:\n    pass\n")
    assert code == 1 and "mine.py line 1: linear_backward takes (), it is called with (dy, x, weight)\n" in out
    code, out = check("import numpy as np\nlinear_backward = np.dot\n")
    assert code == 1 and "\nmine.py: ValueError: shapes " in out


def test_a_mistake_of_npgpt_is_not_taken_for_the_students(check, monkeypatch):
    monkeypatch.setattr(checking, "train", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        check(solution("linear"))


@pytest.mark.filterwarnings("error")
def test_complex_gradients_are_wrong_even_if_their_imaginary_part_is_0(check):
    for factor in ("(1 + 1j)", "(1 + 0j)"):
        code, out = check(with_mistake("linear", "dx = dy @ weight", f"dx = dy @ weight * {factor}"))
        assert code == 1 and "  dx       WRONG  it is complex" in out and out.count(" ok ") == 2
    code, out = check(with_mistake("linear", "dx = dy @ weight", "dx = dy @ weight * (1 if len(x) < 5 else 1 + 0j)"))
    assert code == 1 and "linear_backward: in a GPT dx is complex" in out


@pytest.mark.filterwarnings("error")
def test_what_is_infinite_is_a_wrong_answer_without_a_warning(check):
    code, out = check(with_mistake("linear", "dx = dy @ weight", "dx = np.full(x.shape, np.inf)"), "--more", "--more")
    assert code == 1 and "kind: not finite" in out and out.count(" ok ") == 2


def test_none_in_a_gpt_only_is_called_none(check):
    code, out = check(with_mistake("linear", "    return dx,", "    if len(x) > 4:\n        return\n    return dx,"))
    assert code == 1 and "linear_backward: in a GPT it returns None for dx\n" in out


def test_a_result_of_many_axes_is_wrong_at_once(check, monkeypatch):
    sets = []
    combinations = kinds.itertools.combinations
    counted = SimpleNamespace(combinations=lambda *args: sets.extend(combinations(*args)) or sets)
    monkeypatch.setattr(kinds, "itertools", counted)
    code, out = check(with_mistake("linear", "dx = dy @ weight", "dx = np.zeros((1,) * 32)"))
    assert code == 1 and "its shape is (1, 1, 1," in out and len(sets) == 32 * 31 / 2


def test_a_file_runs_as_python_runs_it_and_nothing_of_it_stays(check, tmp_path):
    annotated = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    annotated += "import helper\n@dataclass\nclass Sizes:\n    n: int = 0\n"
    before = list(sys.path), set(sys.modules), sys.dont_write_bytecode
    for factor, right in (("1", True), ("2", False)):  # the second time another helper, of the same size
        (tmp_path / "helper.py").write_text(f"FACTOR = {factor}\n", encoding="utf-8")
        text = with_mistake("linear", "dx = dy @ weight", "dx = dy @ weight * helper.FACTOR")
        code, out = check(annotated + text[text.index("import numpy") :])
        assert (code == 0) is right and ("passed: linear" in out) is right
        assert not {"helper", "exercise_file"} & set(sys.modules)
    assert (sys.path, sys.dont_write_bytecode) == (before[0], before[2]) and before[1] <= set(sys.modules)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["helper.py", "mine.py", "progress.json"]


def test_the_op_is_put_back_after_training(check):
    from npgpt.ops import linear

    before = linear.linear_backward
    assert check(solution("linear"))[0] == 0 and linear.linear_backward is before
    text = with_mistake("linear", "dx = dy @ weight", "dx = dy @ weight if len(x) < 5 else 1 / 0 * dy")
    code, out = check(text)
    assert code == 1 and "ZeroDivisionError" in out and linear.linear_backward is before


def test_a_file_may_hold_several_exercises_and_what_was_changed_is_read_anew(check):
    code, out = check(solution("linear") + solution("dropout"))
    assert code == 0 and "passed: linear" in out and "passed: dropout" in out
    wrong = with_mistake("linear", "dbias = dy.sum(axis=0)", "dbias = dy.sum(axis=1)")
    assert len(wrong) == len(solution("linear"))
    assert check(wrong)[0] == 1


# --------------------------------------------------------------------------------------------------------------------
# The command line


def command(*args, cwd=None, **environment):
    """Run a module in a process of its own -> (exit code, standard output, standard error)."""
    environment = {"NPGPT_KERNELS": "numpy", "OPENBLAS_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", **environment}
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, args)], cwd=cwd, env=environment,
        capture_output=True, encoding="utf-8", timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["shwo", "linear"], "did you mean show?"),
        (["show", "layernrom"], "did you mean layernorm?"),
        (["show", "linear", "--level", "4"], "--level must be 1, 2 or 3, got 4"),
        (["show", "linear", "--levle", "2"], "did you mean --level?"),
        (["show", "linear", "--out", "no/such/folder/linear.py"], "cannot write"),
        (["check", "nothing.py"], "there is no file nothing.py"),
        (["check", "."], "there is no file"),
        (["bug", "0"], "there are bugs 1 to"),
        (["bug", str(len(BUGS) + 1)], "there are bugs 1 to"),
        (["bug", "x"], "invalid int"),
        (["answer"], "required"),
        ([], "required"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(args, words):
    with pytest.raises(UsageError, match=re.escape(words)) as caught:
        main(args)
    assert "\n" not in str(caught.value)


def test_the_command_ends_with_its_code_and_one_line(tmp_path):
    code, out, err = command("npgpt.exercise", "check", "mine.py", cwd=tmp_path)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("python -m npgpt.exercise: ")


@pytest.mark.parametrize("text", [b"x = 1\n", b"", b"def linear_backward_of_mine(): pass\n"])
def test_a_file_without_an_exercise_is_refused(text, tmp_path):
    (tmp_path / "mine.py").write_bytes(text)
    with pytest.raises(UsageError, match="has none of the functions"):
        main(["check", str(tmp_path / "mine.py")])


@pytest.mark.parametrize("text", [b"\x00\x01", b"\xff\xfe\xfa", b"def f(:\n", b"1 / 0\n", b"import no_such_module\n"])
def test_garbage_is_said_in_a_line(text, check):
    code, out = check(text)
    assert code == 1 and out.startswith("mine.py") and out.count("\n") == 1


def test_show_prints_or_writes_and_never_overwrites(tmp_path, capsys):
    assert main(["show", "cross_entropy", "--level", "1"]) == 0
    printed = capsys.readouterr().out
    path = tmp_path / "cross_entropy.py"
    assert main(["show", "cross-entropy", "--level", "1", "--out", str(path)]) == 0
    assert path.read_text(encoding="utf-8").replace(str(path), "cross_entropy.py") == printed
    assert f"check {path}" in capsys.readouterr().out
    path.write_text("my work", encoding="utf-8")
    with pytest.raises(UsageError, match="may hold your work"):
        main(["show", "cross-entropy", "--out", str(path)])
    assert path.read_text(encoding="utf-8") == "my work"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("linear.py", "linear.py"),
        ("folder/mine-2.py", "mine-2.py"),
        ("C:\\Users\\new.py", None),
        ('a"""b.py', "FILE"),
        ("a b.py", "FILE"),
        ("-x.py", "FILE"),
        ("a\\", None),
    ],
)
def test_a_name_never_gets_into_the_code_of_an_exercise(name, shown):
    text = exercise_text(LESSONS["linear"], 2, name)
    if shown is None:  # a backslash is part of a name here, and parts folders on Windows
        shown = "FILE" if os.name == "posix" else Path(name).name
    assert ast.get_docstring(ast.parse(text)).count(f"exercise check {shown}\n") == 1
    assert text.replace(f"check {shown}\n", "check mine.py\n") == exercise_text(LESSONS["linear"], 2, "mine.py")


@pytest.mark.parametrize(
    ("system", "name", "words"),
    [
        ("posix", "bug-1", "bug-1"),
        ("posix", "a b; c", "'a b; c'"),
        ("posix", "-x.py", "./-x.py"),
        ("nt", r"C:\Users\me~1\bug-1", r"C:\Users\me~1\bug-1"),
        ("nt", r"C:\a b&c", r'"C:\a b&c"'),
    ],
)
def test_a_name_is_quoted_for_the_shell(system, name, words, monkeypatch):
    monkeypatch.setattr(errors, "os", SimpleNamespace(name=system, path=posixpath))
    assert errors.quoted(name) == words


def test_printed_commands_are_quoted(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["show", "linear", "--out", "a b.py"]) == 0
    assert f"check {exercise.quoted('a b.py')}\n" in capsys.readouterr().out
    assert main(["bug", "1", "--dir", "a b; c"]) == 0
    assert f"\n  cd {exercise.quoted('a b; c')}\n" in capsys.readouterr().out
    assert exercise.quoted("a b; c") != "a b; c"


def test_a_full_disk_leaves_no_half_of_anything(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(file, part, write=os.write):
        if len(part) < 100:
            raise full
        return write(file, part[:100])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(CheckpointError) as caught:
            main(["show", "linear", "--out", str(tmp_path / "linear.py")])
    assert str(caught.value) == f"cannot write {tmp_path / 'linear.py'}: {full.strerror}"
    assert not list(tmp_path.iterdir())

    def write_bytes(path, text, write_bytes=Path.write_bytes):
        if path.name == "model.py":
            raise full
        return write_bytes(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_bytes)
        with pytest.raises(CheckpointError) as caught:
            main(["bug", "1", "--dir", str(tmp_path / "bug")])
    assert str(caught.value) == f"cannot write {tmp_path / 'bug' / 'npgpt' / 'model.py'}: {full.strerror}"
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot make"):
        main(["bug", "1", "--dir", str(tmp_path / "file" / "bug")])


def test_list_names_every_exercise(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for op, one in LESSONS.items():
        assert op in out and one.chapter in out and (PACKAGE.parent / one.chapter).is_file()
        solution = f"npgpt/ops/{one.file}.py"
        assert solution in exercise_text(one, 1, "one.py") and (PACKAGE / "ops" / f"{one.file}.py").is_file()


def test_what_only_reads_lessons_needs_neither_numpy_nor_numba():
    code = "import sys; from npgpt import exercise; assert not {'numpy', 'numba'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0


# --------------------------------------------------------------------------------------------------------------------
# Bugs

# Runs gradcheck in each of some folders, one after the other, and prints what came of it, and whose npgpt it was.
GRADCHECK = """
import sys
for line in sys.argv[1:]:
    folder, word = line.split("|")
    for name in [name for name in sys.modules if name.split(".")[0] == "npgpt"]:
        del sys.modules[name]
    sys.path[0] = folder
    import npgpt
    import numpy as np
    from npgpt import gradcheck
    if word == "GPT":
        f, inputs, names = gradcheck.gpt_case(np.random.default_rng(0), bias=False, dropout=0.2)
        case = f, inputs[:1], names[:1]  # its embedding alone
    else:
        (case,) = [case for title, *case in gradcheck.cases() if title == word]
    try:
        gradcheck.gradcheck(*case)
        found = "nothing"
    except gradcheck.GradcheckError:
        found = "a wrong gradient"
    print(f"{folder}|{found}|{npgpt.__file__}")
"""
WORDS = {
    "embedding: the tied output layer's share is lost": "GPT",
    "dropout: another mask in the backward": "GPT",  # alone, it happens to be the same one
    "unbroadcast: stretched axes are not summed": "add",
    "attention: backward without the dropout mask": "causal attention, dropout",
}


def word_of(fault):
    """The title of a case of gradcheck that finds the fault quickly."""
    stem = Path(fault.file).stem
    by_file = {"engine": "GPT", "attention": "causal attention", "cross_entropy": "cross-entropy"}
    word = fault.name.split(":")[0] if stem in ("tensor", "primitives") else stem
    return WORDS.get(fault.name) or by_file.get(stem) or word


def fault_of(number):
    return BUGS[number - 1]


def gradchecks(lines, kernels):
    environment = {**os.environ, "NPGPT_KERNELS": kernels, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", GRADCHECK, *lines], env=environment, capture_output=True, encoding="utf-8", timeout=200
    )
    assert done.returncode == 0, done.stderr
    return [line.split("|") for line in done.stdout.splitlines()]


def test_gradcheck_finds_every_bug_in_its_copy(tmp_path, capsys):
    numbers = [n for n in range(1, len(BUGS) + 1) if not fault_of(n).kernel]
    assert len(numbers) >= 14
    for n in numbers:
        assert main(["bug", str(n), "--dir", str(tmp_path / str(n))]) == 0
        out = capsys.readouterr().out
        assert with_kernels("numpy", "python -m npgpt.gradcheck") in out
        assert fault_of(n).name not in out and fault_of(n).why not in out
    words = {n: word_of(fault_of(n)) for n in numbers}
    results = gradchecks([f"{tmp_path / str(n)}|{words[n]}" for n in numbers], "numpy")
    for n, (folder, found, file) in zip(numbers, results, strict=True):
        assert found == "a wrong gradient", fault_of(n).name
        assert Path(file) == Path(folder) / "npgpt" / "__init__.py"


@pytest.mark.skipif(jit.KERNELS != "numba", reason="compiles kernels")
def test_gradcheck_finds_a_bug_in_a_compiled_kernel_of_the_copy(tmp_path, capsys):
    (n,) = (n for n in range(1, len(BUGS) + 1) if BUGS[n - 1].name.startswith("layernorm kernel"))
    assert main(["bug", str(n), "--dir", str(tmp_path / "bug")]) == 0
    out = capsys.readouterr().out
    assert "\n  python -m npgpt.gradcheck\n" in out and "compiled kernel" in out
    said = "look for the mistake in this folder without NPGPT_KERNELS=numpy: otherwise its code may not run\n"
    code, out, _ = command("npgpt.gradcheck", "relu", cwd=tmp_path / "bug")
    assert code == 0 and out.endswith(said)
    assert [found for _, found, _ in gradchecks([f"{tmp_path / 'bug'}|layernorm"], "numba")] == ["a wrong gradient"]


# Runs the command in each of some folders, for a few cases, and of a GPT for a few parameters.
VERDICT = """
import sys
for line in sys.argv[1:]:
    folder, *titles = line.split("|")
    for name in [name for name in sys.modules if name.split(".")[0] == "npgpt"]:
        del sys.modules[name]
    sys.path[0] = folder
    from npgpt import gradcheck
    chosen = [case for case in gradcheck.cases() if case[0] in titles]
    for n, (title, f, inputs, names) in enumerate(chosen):
        if title.startswith("GPT"):
            few = [i for i, name in enumerate(names) if name.split(".", 1)[1] in ("wte.weight", "ln_f.weight")
                   or name.split(".")[-2:] in (["ln_1", "weight"], ["ln_2", "weight"])]
            chosen[n] = title, f, [inputs[i] for i in few], [names[i] for i in few]
    gradcheck.cases = lambda: chosen
    assert gradcheck.main([]) == 1
    print("|")
"""
GPT, DROPPED = "GPT, biases", "GPT, no bias, dropout"
VERDICTS = [  # the beginning of a bug's name, cases, what the verdict says
    ("log:", ["exp", "log"], "first wrong: log;"),
    ("cross-entropy:", ["linear", "cross-entropy", "cross-entropy, ignoring -3"], "first wrong: cross-entropy;"),
    ("engine: the second", ["add", GPT], "ops right, GPT wrong below block 1's ln_2: see where gradients meet"),
    ("embedding: the tied", ["embedding", GPT], "ops right, GPT wrong in transformer.wte.weight alone: see"),
    ("dropout:", ["dropout", GPT, DROPPED], "ops right, GPT wrong with dropout only, "),
]


@pytest.mark.skipif(jit.KERNELS != "numba", reason="once is enough")
def test_the_verdict_on_a_planted_bug_says_where_to_look(tmp_path):
    lines = []
    for n, (name, titles, _) in enumerate(VERDICTS):
        (fault,) = (fault for fault in BUGS if fault.name.startswith(name))
        plant(fault, tmp_path / str(n))
        lines.append("|".join([str(tmp_path / str(n)), *titles]))
    environment = {**os.environ, "NPGPT_KERNELS": "numpy", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", VERDICT, *lines], env=environment, capture_output=True, encoding="utf-8", timeout=200
    )
    assert done.returncode == 0, done.stderr
    *outputs, _ = done.stdout.split("|\n")
    for output, (*_, words) in zip(outputs, VERDICTS, strict=True):
        *before, verdict = output.splitlines()
        assert verdict.startswith(f"FAILED: {words}") and len(before) <= 20, output


def test_a_copy_is_untouched_but_for_one_file_and_its_own_commands_run_it(tmp_path):
    folder = tmp_path / "bug"
    assert main(["bug", "1", "--dir", str(folder)]) == 0
    sources = {path.relative_to(PACKAGE) for ending in ("*.py", "*.html") for path in PACKAGE.rglob(ending)}
    copied = {path.relative_to(folder / "npgpt") for path in folder.rglob("*") if path.is_file()}
    assert copied == sources | {Path(PLANTED)}
    different = {
        path for path in sources if (PACKAGE / path).read_bytes() != (folder / "npgpt" / path).read_bytes()
    }  # fmt: skip
    assert different == {Path("ops/linear.py")}
    # PYTHONPATH has the original: the folder in which a module is started comes before it
    code, out, _ = command("npgpt.gradcheck", "linear", cwd=folder)
    assert code == 1 and "bias" in out and "FAILED" in out
    code, out, _ = command("npgpt.gradcheck", "relu", cwd=folder)
    assert code == 0 and "look for" not in out
    code, out, _ = command("npgpt.gradcheck", "relu", cwd=folder, NPGPT_KERNELS="numba")
    said = "look for the mistake in this folder with NPGPT_KERNELS=numpy: otherwise its code may not run\n"
    assert code == 0 and out.endswith(said)
    code, out, _ = command("npgpt.exercise", "train", cwd=folder)
    assert code == 0 and out.startswith(f"{(folder / 'npgpt').resolve()}: ")
    with pytest.raises(UsageError, match="exists"):
        main(["bug", "1", "--dir", str(folder)])
    code, _, err = command("npgpt.exercise", "answer", "1", cwd=folder)
    assert code == 2 and "ask in another folder" in err
    assert command("npgpt.exercise", "bug", "1", cwd=folder) == (code, "", err)
    other = next(n for n in range(2, len(BUGS) + 1) if fault_of(n).file != fault_of(1).file)
    assert command("npgpt.exercise", "bug", other, cwd=folder) == (code, "", err)  # one mistake at a time
    assert [path.name for path in folder.iterdir()] == ["npgpt"]


def test_a_bug_changes_training(tmp_path):
    (n,) = (n for n in range(1, len(BUGS) + 1) if BUGS[n - 1].name.startswith("embedding: the tied"))
    assert main(["bug", str(n), "--dir", str(tmp_path / "bug")]) == 0
    losses = {}
    for folder in (tmp_path / "bug", PACKAGE.parent):
        code, out, _ = command("npgpt.exercise", "train", cwd=folder)
        losses[folder] = [float(number) for number in out.splitlines()[1].split()]
        assert code == 0 and len(losses[folder]) == checking.STEPS
    bad, good = losses.values()
    assert bad[0] == good[0] and bad[-1] > good[-1] + 0.1


@pytest.mark.parametrize("n", range(1, len(BUGS) + 1))
def test_an_answer_shows_the_line_and_why(n, capsys):
    fault = fault_of(n)
    assert main(["answer", str(n)]) == 0
    out = capsys.readouterr().out
    assert f"bug {n} is in {fault.file}" in out and fault.why in out
    shown = {line[1:] for line in out.splitlines() if line[:1] in ("+", "-")}
    source = (PACKAGE.parent / fault.file).read_text(encoding="utf-8")
    wrong = source.replace(fault.before, fault.after)
    assert shown == set(source.splitlines()) ^ set(wrong.splitlines()) | (shown & set(source.splitlines()))
    assert shown & (set(source.splitlines()) ^ set(wrong.splitlines()))


def test_the_readme_gives_the_commands_that_a_bug_prints_and_they_show_something(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exercise.os, "name", "posix")  # the README says beside them how Windows has them
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    (number, commands), *_ = re.findall(r"`python -m npgpt\.exercise bug (\d+)`.*?```\n(.*?)```", readme, re.DOTALL)
    assert main(["bug", number]) == 0
    printed = re.findall(r"^  (\w.*)$", capsys.readouterr().out, re.MULTILINE)
    assert printed[:3] == commands.splitlines() and commands.count("NPGPT_KERNELS=numpy ") == 2
    folder = tmp_path / f"bug-{number}"
    assert command("npgpt.gradcheck", "mlp", cwd=folder)[0] == 1
    lines = [command("npgpt.exercise", "train", cwd=cwd)[1].splitlines()[1] for cwd in (folder, PACKAGE.parent)]
    assert lines[0] != lines[1]


def test_bug_without_a_number_says_how_many_there_are(capsys):
    assert main(["bug"]) == 0
    assert f"there are {len(BUGS)} bugs" in capsys.readouterr().out
    assert len(set(BUGS)) == len(BUGS) >= 14
    assert sorted(number for number, _ in NUMBERED) == list(range(1, len(BUGS) + 1))
