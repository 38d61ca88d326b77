"""The gradient checker: it lets right gradients pass and catches wrong ones; and all of npgpt's gradients pass it."""

import os
import subprocess
import sys

import numpy as np
import pytest

from npgpt import Tensor, random_stream
from npgpt.gradcheck import BOUND, GradcheckError, cases, gradcheck, main, numeric_grad, relative_error, where_to_look
from npgpt.kernels import buffers
from npgpt.kernels.buffers import NAN_FILL
from npgpt.ops import layernorm as layernorm_file
from npgpt.ops.dropout import dropout
from npgpt.tensor import record

gradchecking = sys.modules["npgpt.gradcheck"]

# --------------------------------------------------------------------------------------------------------------------
# All of npgpt's gradients


CASES = list(cases())


@pytest.mark.parametrize("f, inputs, names", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_gradients_agree_with_finite_differences(f, inputs, names):
    checked = gradcheck(f, inputs, names)
    assert [name for name, _ in checked] == list(names)
    assert all(error <= BOUND for _, error in checked)


def test_titles_are_unique_and_every_op_of_the_graph_is_among_them():
    titles = [case[0] for case in CASES]
    assert len(set(titles)) == len(titles)
    ops = (
        "add sub mul div neg pow matmul exp log tanh relu sum mean max reshape transpose getitem where",
        "embedding layernorm linear mlp dropout",
    )
    assert set(" ".join(ops).split()) | {"causal attention", "cross-entropy"} <= set(titles)


# --------------------------------------------------------------------------------------------------------------------
# Planted errors.  Each op is x * w, elementwise or as a matrix product, with some backward.


def product(backward):
    """An op x * w with the given backward(dy, x, w)."""
    return lambda x, w: record("op", x.data * w.data, (x, w), lambda dy: backward(dy, x.data, w.data))


def matrix_product(backward):
    return lambda x, w: record("op", x.data @ w.data, (x, w), lambda dy: backward(dy, x.data, w.data))


def except_in_one_entry(array):
    array = array.copy()
    array[17, 5] *= 1.0001
    return array


def except_one_nan(array):
    array = array.copy()
    array[0, 0] = np.nan
    return array


def inputs(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [Tensor(rng.normal(size=shape), requires_grad=True) for shape in shapes]


FAULTS = {
    "wrong sign": product(lambda dy, x, w: (-dy * w, dy * x)),
    "missing factor 2": product(lambda dy, x, w: (dy * w / 2, dy * x)),
    "missing factor w": product(lambda dy, x, w: (dy, dy * x)),
    "off by a hundred-thousandth": product(lambda dy, x, w: (dy * w * 1.00001, dy * x)),
    "one wrong entry of 800": product(lambda dy, x, w: (except_in_one_entry(dy * w), dy * x)),
    "zero gradient": product(lambda dy, x, w: (0 * dy, dy * x)),
    "no gradient": product(lambda dy, x, w: (None, dy * x)),
    "NaN gradient": product(lambda dy, x, w: (dy * w * np.nan, dy * x)),
    "one NaN": product(lambda dy, x, w: (except_one_nan(dy * w), dy * x)),
    "infinite gradient": product(lambda dy, x, w: (dy * w + np.inf, dy * x)),
    "right for dy = 1 only": product(lambda dy, x, w: (w, dy * x)),
    "the mean instead of the sum of dy": product(lambda dy, x, w: (dy.mean() * w, dy * x)),
    "entries in another order": product(lambda dy, x, w: ((dy * w)[::-1], dy * x)),
}


@pytest.mark.filterwarnings("ignore:invalid value")  # inf / inf
@pytest.mark.parametrize("f", FAULTS.values(), ids=FAULTS)
def test_a_planted_error_is_caught_and_located(f):
    with pytest.raises(GradcheckError, match=r"gradcheck: x\[\d+, \d+\]: backward gives .*, finite differences"):
        gradcheck(f, inputs((40, 20), (40, 20)), names=["x", "w"])


def test_the_error_names_the_worst_entry():
    with pytest.raises(GradcheckError, match=r"input 0\[17, 5\]"):
        gradcheck(FAULTS["one wrong entry of 800"], inputs((40, 20), (40, 20)))


def test_an_error_in_the_second_input_is_caught():
    with pytest.raises(GradcheckError, match=r"w\[\d, \d\]"):
        gradcheck(product(lambda dy, x, w: (dy * w, dy)), inputs((3, 4), (3, 4)), names=["x", "w"])


def test_a_transposed_gradient_of_a_square_matrix_is_caught():
    right = matrix_product(lambda dy, x, w: (dy @ w.T, x.T @ dy))
    wrong = matrix_product(lambda dy, x, w: (dy @ w.T, dy.T @ x))
    gradcheck(right, inputs((5, 5), (5, 5)))
    with pytest.raises(GradcheckError, match=r"input 1\["):
        gradcheck(wrong, inputs((5, 5), (5, 5)))


def test_the_upstream_gradient_is_not_one_of_the_inputs_again():
    """Were dy = x, then x.T @ dy would be symmetric, and its transposition would pass."""
    seen = []
    f = matrix_product(lambda dy, x, w: (seen.append(dy) or dy @ w.T, x.T @ dy))
    for seed in (0, 1):
        gradcheck(f, inputs((5, 5), (5, 5), seed=seed), seed=seed)
        assert not np.isclose(seen.pop(), inputs((5, 5), seed=seed)[0].data).any()


def test_a_gradient_where_there_is_none_is_caught():
    def floor(x):
        return record("op", np.floor(x.data), (x,), lambda dy: (dy,))

    with pytest.raises(GradcheckError):
        gradcheck(floor, [Tensor(np.array([0.3, 1.7]), requires_grad=True)])


def test_an_error_that_a_sum_would_hide_is_caught():
    """The rows of a softmax sum to 1: with dy = 1 its gradient is 0, and so is this wrong one."""

    def softmax(x, forgotten_term):
        p = np.exp(x.data)
        p /= p.sum(axis=1, keepdims=True)

        def backward(dy):
            centre = (dy * p).sum(axis=1, keepdims=True) if not forgotten_term else dy.mean(axis=1, keepdims=True)
            return (p * (dy - centre),)

        return record("op", p, (x,), backward)

    (x,) = inputs((3, 4))
    gradcheck(lambda x: softmax(x, False), [x])
    with pytest.raises(GradcheckError):
        gradcheck(lambda x: softmax(x, True), [x])
    x.grad = None
    softmax(x, True).sum().backward()
    np.testing.assert_allclose(x.grad, 0, atol=1e-15)


def test_a_gradient_that_starts_from_what_its_buffer_held_is_caught():
    def double(x):
        def backward(dy):
            dx = x.new_grad()
            dx += 2 * dy
            return (dx,)

        return record("op", x.data * 2, (x,), backward)

    with pytest.raises(GradcheckError, match=r"backward gives nan"):
        gradcheck(double, inputs((3, 4)))
    assert buffers.NAN_FILL == NAN_FILL


def test_an_input_is_as_it_was_when_the_function_fails_at_a_shifted_point():
    calls = []

    def fails_later(x):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("no")
        return x * 2

    x = Tensor(np.array([1.0, 2.0]), requires_grad=True)
    with pytest.raises(OSError):
        gradcheck(fails_later, [x])
    assert x.data.tolist() == [1, 2]


@pytest.mark.parametrize("name", ["dy", "a"])
def test_a_backward_that_changes_what_others_need_is_refused(name):
    def f(a):
        def backward(dy):
            array = {"dy": dy, "a": a.data}[name]
            array *= 2
            return (dy * 2 * a.data / (2 if name == "a" else 1),)

        return record("op", a.data**2, (a,), backward)

    with pytest.raises(GradcheckError, match=f"gradcheck: the backward changes {name} in place"):
        gradcheck(f, inputs((3,)), ["a"])


def test_a_large_number_beside_a_small_one_does_not_swallow_it():
    x = Tensor(np.array([1e6, 1.0]), requires_grad=True)
    gradcheck(lambda a: a * a, [x])


def test_a_tensor_has_its_operators_once_gradcheck_is_there():
    code = "from npgpt.gradcheck import gradcheck; from npgpt.tensor import Tensor; import numpy as np\n"
    code += "gradcheck(lambda a: a * a, [Tensor(np.ones(2), requires_grad=True)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_empty_input_is_named():
    with pytest.raises(ValueError, match=r"^gradcheck: b is empty, of shape \(0, 2\)$"):
        gradcheck(lambda a, b: a.sum() + b.sum(), [*inputs((2,)), *inputs((0, 2))], ["a", "b"])


def test_masks_of_later_rows_are_checked():
    titles = [case[0] for case in cases()]
    assert {"causal attention, later rows", "dropout, later rows"} <= {*titles}


# --------------------------------------------------------------------------------------------------------------------
# Right gradients


def test_right_gradients_pass_whatever_their_size():
    for scale in (1e-6, 1, 1e6):
        f = matrix_product(lambda dy, x, w: (dy @ w.T, x.T @ dy))
        x, w = inputs((3, 4), (4, 5))
        w.data *= scale
        assert max(error for _, error in gradcheck(f, [x, w])) < 1e-8


def test_a_gradient_of_zero_passes_where_there_is_none():
    def half(x):
        return record("op", x.data[:2] * 2, (x,), lambda dy: (np.concatenate([2 * dy, np.zeros(2)]),))

    gradcheck(half, inputs((4,)))
    constant, x = Tensor(np.ones(3)), Tensor(np.ones(3), requires_grad=True)
    gradcheck(lambda x, unused: x * 1, [x, Tensor(np.ones(2), requires_grad=True)])
    assert gradcheck(lambda x, c: x * c, [x, constant], ["x", "c"]) == [("x", pytest.approx(0, abs=1e-9))]


def test_random_masks_are_the_same_at_every_call():
    (x,) = inputs((3, 7))
    gradcheck(lambda x: dropout(dropout(x, 0.3), 0.3), [x])
    with random_stream(99):
        gradcheck(lambda x: dropout(x, 0.3), [x])


def test_inputs_are_left_as_they_were():
    (x,) = inputs((3, 4))
    before = x.data.copy()
    gradcheck(lambda x: x.exp(), [x])
    np.testing.assert_array_equal(x.data, before)


def test_earlier_gradients_do_not_count():
    (x,) = inputs((3, 4))
    x.grad = np.full((3, 4), 7.0)
    gradcheck(lambda x: x * x, [x])
    gradcheck(lambda x: x * x, [x])


def test_float32_is_rejected():
    x = Tensor(np.ones(3, np.float32), requires_grad=True)
    with pytest.raises(TypeError, match="gradcheck: x is float32; finite differences need float64"):
        gradcheck(lambda x: x * x, [x], names=["x"])


def test_finite_differences_of_a_polynomial_of_degree_four_are_exact():
    (x,), dy = inputs((5,)), np.random.default_rng(1).normal(size=5)
    numeric = numeric_grad(lambda: x.data**4, x, dy)
    np.testing.assert_allclose(numeric, 4 * x.data**3 * dy, rtol=1e-9, atol=1e-9)


def test_relative_error_measures_tiny_entries_by_the_largest_one():
    analytic, numeric = np.array([1.0, 2e-9, 0.5, 0]), np.array([1.0, 1e-9, 1.0, 0])
    np.testing.assert_allclose(relative_error(analytic, numeric), [0, 1e-6, 0.5, 0])
    np.testing.assert_array_equal(relative_error(np.zeros(2), np.zeros(2)), 0)
    np.testing.assert_array_equal(relative_error(np.array([0, 1e-9]), np.zeros(2)), [0, 1])


# --------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_passes(capsys):
    assert main(["layernorm", "POW"]) == 0
    output = capsys.readouterr().out
    assert "layernorm, no bias" in output and "pow" in output and "attention" not in output
    assert "passed: worst relative error" in output.splitlines()[-1] and "WRONG" not in output


def test_the_command_fails_for_a_planted_fault(capsys, monkeypatch):
    right = layernorm_file.layernorm_backward

    def wrong(dx, dweight, dbias, *inputs):
        right(dx, dweight, dbias, *inputs)
        dbias *= -1

    monkeypatch.setattr(layernorm_file, "layernorm_backward", wrong)
    assert main(["layernorm"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.endswith("WRONG")] == ["bias"]
    assert any("layernorm: bias[" in line and "backward gives" in line for line in lines)
    assert lines[-1].startswith("FAILED: first wrong: layernorm; worst relative error") and len(lines) <= 21
    (after,) = (line for line in lines if line.startswith("(and "))
    assert after == "(and 0 more are WRONG; 4 of 5 are ok)"


def test_a_check_in_which_all_is_wrong_is_short(capsys, monkeypatch):
    all_wrong = [(f"op {n}", FAULTS["wrong sign"], inputs((2, 3), (2, 3)), ["x", "w"]) for n in range(20)]
    monkeypatch.setattr(gradchecking, "cases", lambda: all_wrong)
    assert main([]) == 1
    *before, verdict = capsys.readouterr().out.splitlines()
    assert verdict.startswith("FAILED: first wrong: op 0;") and len(before) <= 20
    assert before[-1] == "(and 12 more are WRONG; 20 of 40 are ok)"


def test_a_backward_that_changes_what_others_need_is_a_row(capsys, monkeypatch):
    def f(a):
        return record("op", a.data**2, (a,), lambda dy: (np.multiply(dy, 2 * a.data, out=dy),))

    monkeypatch.setattr(gradchecking, "cases", lambda: [("square", f, inputs((3,)), ["a"])])
    assert main([]) == 1
    out = capsys.readouterr().out
    assert "\nsquare: gradcheck: the backward changes dy in place" in out and "\nFAILED: first wrong: square;" in out


def test_a_backward_that_raises_says_of_which_op_it_was(capsys, monkeypatch):
    wrong = product(lambda dy, x, w: 1 / 0)
    monkeypatch.setattr(gradchecking, "cases", lambda: [("product", wrong, inputs((3,), (3,)), ["x", "w"])])
    with pytest.raises(ZeroDivisionError):
        main([])
    assert capsys.readouterr().out.endswith("\nproduct: its check does not come to an end\n")


def verdict_on(right, last_wrong):
    """where_to_look, for so many right ops, and a GPT whose first parameters in the forward are wrong."""
    names = ["wte", "wpe", *(f"h.{n}.{part}" for n in (0, 1) for part in ("ln_1", "attn.c_proj", "ln_2")), "ln_f"]
    rows = [gradchecking.Row("add", "a", 0.0, "")] * right
    names = [f"transformer.{name}.weight" for name in names]
    return where_to_look(rows + [gradchecking.Row("GPT", name, n <= last_wrong, "") for n, name in enumerate(names)])


@pytest.mark.parametrize(
    ("right", "last_wrong", "words"),
    [
        (1, 0, "ops right, GPT wrong in transformer.wte.weight alone: see"),
        (1, 1, "ops right, GPT wrong below block 0: see"),
        (1, 2, "ops right, GPT wrong below block 0's attn.c_proj: see"),
        (1, 4, "ops right, GPT wrong below block 1: see"),
        (1, 6, "ops right, GPT wrong below block 1's ln_2: see"),
        (1, 7, "ops right, GPT wrong below ln_f: see"),
        (1, 8, "ops right, GPT wrong everywhere: see"),
        (0, 4, "GPT wrong below block 1: see"),
    ],
)
def test_the_verdict_names_the_border_between_right_and_wrong(right, last_wrong, words):
    assert verdict_on(right, last_wrong).startswith(words)


@pytest.mark.parametrize("words, code", [(["nosuchop"], 2), (["pow"], 0)])
def test_exit_codes_of_the_command(words, code):
    environment = {**os.environ, "NPGPT_KERNELS": "numpy"}
    command = [sys.executable, "-m", "npgpt.gradcheck", *words]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    if code:
        assert "nothing matches 'nosuchop'; there are: add, sub" in result.stderr
        assert "Traceback" not in result.stderr
