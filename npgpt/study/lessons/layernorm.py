"""Layer norm: one number reaches the output by three ways."""

from npgpt.study.lesson import Fault, Lesson

Y_LINE = "y = xhat * weight + bias"


def arguments(new, N, C):
    return {"x": new(N, C), "weight": new(C), "bias": new(C), "eps": 1e-5}


VAR_LINE, MEAN_LINE = "var = x.var(axis=1)", "mean = x.mean(axis=1)"
THROUGH = "missing term: x reaches the output by one more way, through the"
NOT_X = "wrong value: x where the normalised xhat belongs"
NOT_YET = "missing factor: x - mean is not yet what was multiplied"
DX = "dx = rstd[:, None] * "
MISTAKES = (
    ("dx", DX + "(g - xhat * g_xhat_mean)", f"{THROUGH} mean", MEAN_LINE),
    ("dx", DX + "(g - g_mean)", f"{THROUGH} variance", VAR_LINE),
    ("dx", DX + "g", "missing terms: mean and rstd depend on x, too", MEAN_LINE),
    ("g =", "g = dy", "missing factor: dy is the gradient of y, not of xhat", Y_LINE),
    ("dx", DX + "(g - g_mean - x * g_xhat_mean)", NOT_X, VAR_LINE),
    ("g_xhat_mean", "g_xhat_mean = (g * x).mean(axis=1, keepdims=True)", NOT_X, VAR_LINE),
    ("xhat", "xhat = x", NOT_X, None),
    ("xhat", "xhat = x - mean[:, None]", NOT_YET, None),
    (
        "dx", "dx = g - g_mean - xhat * g_xhat_mean",
        "missing factor: it is the same in a whole row, and differs from row to row", None,
    ),
    ("dx", DX + "(g - g_mean - g_xhat_mean)", "missing factor: a term comes to x by way of the variance", VAR_LINE),
    ("dweight", "dweight = (dy * x).sum(axis=0)", NOT_X, None),
    ("dweight", "dweight = (dy * (x - mean[:, None])).sum(axis=0)", NOT_YET, None),
    ("dweight", "dweight = dy.sum(axis=0)", "missing factor: the weight was multiplied with something", None),
    ("dbias", "dbias = (dy * xhat).sum(axis=0)", "a factor too many: the bias was added, not multiplied", None),
    ("dbias", "dbias = (dy * weight).sum(axis=0)", "a factor too many: the weight has no say in it", None),
    (
        "dweight", "dweight = (dy * weight * xhat).sum(axis=0)",
        "a factor too many: the weight has no say in its own gradient", None,
    ),
)  # fmt: skip
TERMS = {
    "g": ("the term that goes straight to xhat", None),
    "g_mean": ("the term that comes through the mean", MEAN_LINE),
    "xhat * g_xhat_mean": ("the term that comes through the variance", VAR_LINE),
}


LESSON = Lesson(
    op="layernorm", topic="one number reaches the output by three ways", chapter="examples/04_layernorm.py",
    forward=("layernorm_forward_ref",), backward=("layernorm_backward_ref",), results=("dx", "dweight", "dbias"),
    arguments=arguments, sizes={"N": 4, "C": 7}, lengths=("N", "C"),
    lines={"dx": "xhat = (x - mean[:, None]) * rstd[:, None]", "dweight": Y_LINE, "dbias": Y_LINE},
    mistakes=MISTAKES, terms=TERMS,
    bugs={
        6: Fault(
            "layernorm: weight's gradient from x instead of xhat", "npgpt/ops/layernorm.py",
            "    dweight = (dy * xhat).sum(axis=0)\n", "    dweight = (dy * x).sum(axis=0)\n",
            "The weight multiplied the normalised value.",
        ),
        7: Fault(
            "layernorm: without the mean's term", "npgpt/ops/layernorm.py",
            "    dx = rstd[:, None] * (g - g_mean - xhat * g_xhat_mean)\n",
            "    dx = rstd[:, None] * (g - xhat * g_xhat_mean)\n",
            "x reaches the output through the mean, too.",
        ),
        16: Fault(
            "layernorm kernel: without the variance's term", "npgpt/ops/layernorm.py",
            "r * (dy[n, i] * weight[i] - g_mean - xhat * g_xhat_mean)", "r * (dy[n, i] * weight[i] - g_mean)",
            "x reaches the output through the variance, too.", kernel=True,
        ),
    },
)  # fmt: skip
