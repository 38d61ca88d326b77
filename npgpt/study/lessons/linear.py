"""Linear: two products whose shapes leave one way to write them."""

from npgpt.study.lesson import Fault, Lesson

Y_LINE = "y = x @ weight.T"


def arguments(new, N, I, O, bias=True):  # noqa: E741  (as ops/linear.py calls them)
    return {"x": new(N, I), "weight": new(O, I), "bias": new(O) if bias else None}


MISTAKES = (
    (
        "dbias", "dbias = (dy * (x @ weight.T)).sum(axis=0)",
        "a factor too many: the bias was added, not multiplied", None,
    ),
    ("dx", "dx = x @ weight.T @ weight", "wrong value: y where its gradient belongs", None),
    ("dweight", "dweight = (x @ weight.T).T @ x", "wrong value: y where its gradient belongs", None),
    ("dweight", "dweight = np.outer(dy[0], x[0])", "one row only: it is that of the first row", None),
    ("dweight", "dweight = np.outer(dy[-1], x[-1])", "one row only: it is that of the last row", None),
)  # fmt: skip


LESSON = Lesson(
    op="linear", topic="two matrix products, and a sum over a broadcast axis", chapter="examples/03_linear.py",
    forward=("linear_forward_ref",), backward=("linear_backward_ref",), results=("dx", "dweight", "dbias"),
    arguments=arguments, sizes={"N": 4, "I": 5, "O": 7}, lengths=("N", "I", "O"),
    lines={"dx": Y_LINE, "dweight": Y_LINE, "dbias": "return y if bias is None else y + bias"},
    mistakes=MISTAKES,
    bugs={
        1: Fault(
            "linear: the bias gets the mean", "npgpt/ops/linear.py",
            "    dbias = dy.sum(axis=0)\n", "    dbias = dy.mean(axis=0)\n",
            "Every row used the bias; the gradients of the rows add up.",
        ),
    },
)  # fmt: skip
