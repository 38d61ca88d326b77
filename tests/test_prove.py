"""The prover: it proves all of npgpt's gradients, and refuses what is wrong by less than finite differences see."""

import os
import subprocess
import sys

import numpy as np
import pytest
from faults import FAULTS
from mutation import planted, refused, unproved

from npgpt import Tensor, gradcheck
from npgpt.ops import layernorm as layernorm_file
from npgpt.prove import main
from npgpt.study import field
from npgpt.study.field import Dual, P, Point, at, dual, dual_array
from npgpt.study.lesson import Fault
from npgpt.study.proof import cases, certificate, on_references

# --------------------------------------------------------------------------------------------------------------------
# The numbers


def variables(point, *shape):
    """A DualArray of new variables, which move at random."""
    values, slopes = point.variables(shape), point.variables(shape)
    return dual_array(np.frompyfunc(Dual, 2, 1)(values, slopes))


def same(a, b):
    """Whether values and slopes of two arrays of Duals are the same."""
    pairs = zip(np.ravel(dual_array(a)), np.ravel(dual_array(b)), strict=True)
    return all(x.value.residue == y.value.residue and x.slope.residue == y.slope.residue for x, y in pairs)


@pytest.fixture
def point():
    with at(Point(1)) as _:
        yield field._state.point


def test_numbers_are_exact(point):
    a, b, c = variables(point, 3, 4), variables(point, 4), variables(point, 4, 2)
    assert same((a + b) - b, a) and same(a * b / b, a) and same(-(a - b), b - a) and same(2 / (2 / a), a)
    assert same((a * b) @ c, a @ (c * b[:, None])) and same(a**3, a * a * a) and same(a**-2, 1 / (a * a))
    assert same(0.1 * a, a * 3602879701896397 / 2**55), "a float is the fraction that it is"
    assert same(a.mean(axis=0), a.sum(axis=0) / 3) and same(a.var(axis=0), (a**2).mean(axis=0) - a.mean(axis=0) ** 2)
    assert not same(a * (1 + 2**-52), a)


def test_slopes_are_those_of_calculus(point):
    a, b = variables(point, 5), variables(point, 5)
    ones = np.frompyfunc(lambda x: Dual(x.slope), 1, 1)
    da, db = ones(a), ones(b)
    for y, dy in (
        (a * b, a * db + b * da),
        (a / b, (da * b - a * db) / (b * b)),
        (np.exp(a * b), np.exp(a * b) * (a * db + b * da)),
        (np.tanh(a), (1 - np.tanh(a) ** 2) * da),
        (np.log(a), da / a),
        (np.sqrt(a), da / (2 * np.sqrt(a))),
        (a**2.5, 2.5 * a**1.5 * da),
        (3**a, 3**a * np.log(3.0) * da),
    ):
        slopes = [x.slope.residue for x in y]
        assert slopes == [x.value.residue for x in dual_array(dy)]


def test_softmax_does_not_depend_on_what_is_taken_out(point):
    s = variables(point, 3, 4)
    e = np.exp(s)
    m = s.max(axis=1, keepdims=True)
    assert m.shape == (3, 1) and same(m[:, 0], [max(row) for row in s])
    p = np.exp(s - m) / np.exp(s - m).sum(axis=1, keepdims=True)
    lse = m + np.log(np.exp(s - m).sum(axis=1, keepdims=True), dtype=np.float64)
    assert same(p, e / e.sum(axis=1, keepdims=True)) and same(p, np.exp(s - lse))
    assert same(p, np.exp(s - np.log(e.sum(axis=1, keepdims=True)))) and not same(p, e)


def test_minus_infinity_is_the_least_and_has_no_exponential(point):
    s = np.where([True, False, True], -np.inf, variables(point, 3))
    assert same(np.exp(s)[[0, 2]], [0, 0]) and s.max() == s[1] and dual(-np.inf) < dual(-(10**9))
    assert same(np.exp(s - s.max()), [0, 1, 0])


def test_half_of_all_numbers_are_positive(point):
    positive = (variables(point, 1000) > 0).mean()
    assert 0.4 < positive < 0.6 and dual(-1) < dual(0) < dual(1) and dual(P - 1) == dual(-1)


def test_what_was_never_written_cannot_be_read(point):
    with pytest.raises(TypeError):
        np.empty_like(variables(point, 3)) + 1


@pytest.mark.parametrize("formula, degree", [
    (lambda x, y, z: x * y + z, 2),
    (lambda x, y, z: (x + y) ** 5 * z, 6),
    (lambda x, y, z: 1 / x + 1 / y + 1 / z, 2),
    (lambda x, y, z: x / (y * y * y), 1),
    (lambda x, y, z: 1 / (x + 1 / (y + 1 / z)), 2),
    (lambda x, y, z: x - x, 0),
])  # fmt: skip
def test_the_degree_is_a_bound(point, formula, degree):
    """The numerator's degree; a degree that were too small would promise too much."""
    bound, probability = point.bound(formula(*variables(point, 3)).value)
    assert degree <= bound < 100 and bound / P <= probability < 1e-14


def test_wrong_formulas_pass_as_seldom_as_is_promised(monkeypatch):
    """With a prime so small that it happens: x^3 - x is 0 for 3 of 101 numbers, and x^2 for one."""
    monkeypatch.setattr(field, "P", 101)
    passed = np.zeros(2)
    for seed in range(3000):
        point = Point(seed)
        with at(point):
            x = Dual(point.variable())
            passed += [(x**3 - x).value.residue == 0, (x * x).value.residue == 0]
    assert abs(passed[0] / 3000 - 3 / 101) < 0.01 and abs(passed[1] / 3000 - 1 / 101) < 0.006
    assert point.bound((x**3 - x).value)[1] >= 3 / 101


# --------------------------------------------------------------------------------------------------------------------
# What is proved

CASES = list(cases())


@pytest.mark.parametrize("f, inputs, names", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_gradients_are_proved(f, inputs, names):
    found = certificate(f, inputs, names, seed=1)
    assert found.wrong == [] and 0 < found.probability < 1e-7 and found.degree < 1e6


def test_all_ops_of_gradcheck_are_proved():
    missing = {case[0] for case in gradcheck.cases()} - {case[0] for case in CASES}
    assert missing == {"causal attention, 2 blocks", "GPT, biases", "GPT, no bias, dropout"}


def test_npgpt_is_as_it_was_afterwards():
    f, inputs, names = next(case[1:] for case in CASES if case[0] == "mlp")
    certificate(f, inputs, names)
    with pytest.raises(TypeError):
        Tensor(np.array([object()]))
    x = Tensor(np.ones(2), requires_grad=True)
    (x * 3).backward(np.ones(2))
    assert x.grad.tolist() == [3, 3] and type(x.grad) is np.ndarray


RIGHT = [  # other ways to write what is right: (op, before, after)
    ("mlp", "* K * (1 + 3 * A * z**2)", "* (K + 3 * K * A * z**2)"),
    ("mlp", "    return 0.5 * (1 + t) + 0.5 * z", "    return (1 + t) / 2 + z / 2"),
    ("layernorm", "    xhat = (x - mean[:, None]) * rstd[:, None]\n    # y",
     "    xhat = (x - x.mean(axis=1)[:, None]) / np.sqrt(x.var(axis=1) + EPS)[:, None]\n    # y"),
    ("layernorm", "dx = rstd[:, None] * (g - g_mean - xhat * g_xhat_mean)",
     "dx = rstd[:, None] * (g - (g.sum(axis=1)[:, None] + xhat * (g * xhat).sum(axis=1)[:, None]) / x.shape[1])"),
    ("attention", "p = np.exp(_scores_ref(q, k) - lse[..., None]).astype(q.dtype)\n",
     "p = _softmax_ref(_scores_ref(q, k))[0]\n"),
    ("attention", "    m = s.max(axis=-1, keepdims=True)\n", "    m = s[..., :1]\n"),
    ("attention", "    dq = ds @ k / math.sqrt(q.shape[-1])", "    dq = (ds / math.sqrt(q.shape[-1])) @ k"),
    ("cross_entropy", "    p = np.exp(logits - lse[:, None])\n",
     "    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)\n"),
]  # fmt: skip


@pytest.mark.parametrize("op, before, after", RIGHT, ids=[f"{case[0]}: {case[2].strip()}" for case in RIGHT])
def test_a_right_formula_may_be_written_in_another_way(op, before, after):
    with planted(Fault("none", f"npgpt/ops/{op}.py", before, after, "It is right.")):
        proved = [case for case in CASES if op.replace("_", "-") in case[0]]
        assert proved and all(certificate(*case[1:]).wrong == [] for case in proved)


def test_the_references_are_those_that_stand_in_ops(monkeypatch):
    right = layernorm_file.layernorm_backward_ref

    def wrong(dy, x, weight, mean, rstd):
        dx, dweight, dbias = right(dy, x, weight, mean, rstd)
        return dx, dweight * (1 + 1e-15), dbias

    monkeypatch.setattr(layernorm_file, "layernorm_backward_ref", wrong)
    f, inputs, names = next(case[1:] for case in CASES if case[0] == "layernorm")
    assert certificate(f, inputs, names).wrong == ["weight"]


# --------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if not unproved(fault)], ids=lambda fault: fault.name)
def test_a_planted_fault_is_refused(fault):
    assert refused(fault)


def test_most_faults_of_what_is_proved_are_refused():
    here = [fault for fault in FAULTS if not fault.kernel and fault.file.startswith(("npgpt/ops/", "npgpt/tensor.py"))]
    assert sum(not unproved(fault) for fault in here) >= len(here) - 6
    assert sum(not unproved(fault) for fault in FAULTS) >= 55


SMALL = [  # mistakes that finite differences let pass: (what they are checked with, the fault)
    ("layernorm", "layernorm.py",
     "(g - g_mean - xhat * g_xhat_mean)", "(g - g_mean - xhat * g_xhat_mean * (1 + 1e-9))"),
    ("layernorm", "layernorm.py", "    # y = xhat * weight + bias\n    dweight = ",
     "    rstd = 1 / np.sqrt(x.var(axis=1))\n    xhat = (x - mean[:, None]) * rstd[:, None]\n    dweight = "),
    ("linear", "linear.py", "    dbias = dy.sum(axis=0)\n", "    dbias = dy.sum(axis=0) + 1e-9 * dy[0]\n"),
    ("mlp", "mlp.py", "K * (1 + 3 * A * z**2)", "0.7978845608 * (1 + 3 * A * z**2)"),
    ("mlp", "mlp.py", "    return 0.5 * (1 + t) + 0.5", "    return 0.5 * (1 + t) + 0.4999999999"),
    ("causal attention", "attention.py", "dp - (dp * p).sum(", "dp - (1 + 1e-9) * (dp * p).sum("),
    ("causal attention", "attention.py", "dq = ds @ k / math.sqrt(q.shape[-1])", "dq = ds @ k * 0.57735026919"),
    ("cross-entropy", "cross_entropy.py", "targets[rows]] -= 1\n", "targets[rows]] -= 1 - 1e-9\n"),
    ("cross-entropy", "cross_entropy.py", "type(dloss / count)\n\n\n# -", "type(dloss / (count + 1e-9))\n\n\n# -"),
    ("dropout", "dropout.py", "as_rows(dy), key, first_row, p)", "as_rows(dy), key, first_row, p + 1e-10)"),
    ("embedding", "embedding.py", "    dwpe[:T] += dy.sum(axis=0)\n", "    dwpe[:T] += dy.sum(axis=0) * (1 - 1e-9)\n"),
    ("tanh", "../tensor.py", "dy * (1 - y * y)", "dy * (1.0000000001 - y * y)"),
    ("mean", "../tensor.py", "keepdims) / count, a.shape)", "keepdims) / (count + 1e-9), a.shape)"),
    ("mul, a with itself", "../engine.py",
     "add(self.value, self.value, grad)\n", "add(self.value, self.value, grad * (1 + 1e-9))\n"),
    ("sqrt", "../tensor.py", "dy / (2 * y)", "dy / (2 * y + 1e-10)"),
]  # fmt: skip


@pytest.mark.parametrize("title, file, before, after", SMALL, ids=[f"{case[0]}: {case[3].strip()}" for case in SMALL])
def test_a_mistake_too_small_for_finite_differences_is_refused(title, file, before, after):
    fault = Fault("small", os.path.normpath(f"npgpt/ops/{file}").replace(os.sep, "/"), before, after, "It is small.")
    f, inputs, names = next(case[1:] for case in gradcheck.cases() if case[0] == title)
    inputs[0].data *= 100 if "x.var" in after else 1  # then eps is small beside the variance
    with planted(fault), on_references():
        checked = gradcheck.gradcheck(f, inputs, names)
        assert all(error <= gradcheck.BOUND for _, error in checked)
        assert certificate(f, inputs, names).wrong
    assert certificate(f, inputs, names).wrong == []


# --------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_proves_all(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "p = 2^61 - 1, seed 0" in lines[0] and lines[-1].startswith("proved: ")
    assert sum(line.endswith("  proved") for line in lines) == len(CASES)
    assert any(line.startswith("Not proved: ") for line in lines)


def test_the_command_names_the_gradient_that_differs(capsys, monkeypatch):
    right = layernorm_file.layernorm_backward_ref
    monkeypatch.setattr(
        layernorm_file,
        "layernorm_backward_ref",
        lambda dy, x, weight, mean, rstd: (*right(dy, x, weight, mean, rstd)[:2], dy[0]),
    )
    assert main(["--op", "LAYERNORM", "--seed", "7"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "seed 7" in lines[0] and "layernorm: the gradient of bias is not the derivative of the forward" in lines
    assert [line.split()[-1] for line in lines[2:4]] == ["REFUSED", "proved"] and lines[-1].startswith("REFUSED")
    assert not any(line.startswith("Proved") for line in lines)


@pytest.mark.parametrize("words, code", [("--op nosuchop", 2), ("--seed x", 2), ("--op pow --op log", 0)])
def test_exit_codes_of_the_command(words, code):
    environment = {**os.environ, "NPGPT_KERNELS": "numpy"}
    command = [sys.executable, "-m", "npgpt.prove", *words.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    if code == 0:
        assert "pow, 2 ** a" in done.stdout and "\nlog " in done.stdout and "layernorm  " not in done.stdout
    elif "nosuchop" in words:
        assert "nothing has nosuchop in its name; there are: add, sub" in done.stderr
