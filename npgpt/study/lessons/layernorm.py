"""Layer norm: one number reaches the output by three ways."""

from npgpt.study.lesson import Fault, Lesson, one_row

Y_LINE = "y = xhat * weight + bias"


def arguments(new, N, C):
    return {"x": new(N, C), "weight": new(C), "bias": new(C), "eps": 1e-5}


def mistakes(dy, x, weight, mean, rstd):
    r = rstd[:, None]
    xhat = (x - mean[:, None]) * r
    var_line, mean_line = "var = x.var(axis=1)", "mean = x.mean(axis=1)"

    def dx(g, mean_term, xhat_term):
        return r * (g - mean_term - xhat_term)

    def terms(g, axis=1):
        return g.mean(axis=axis, keepdims=True), xhat * (g * xhat).mean(axis=axis, keepdims=True)

    g = dy * weight
    of_mean, of_var = terms(g)
    through = "missing term: x reaches the output by one more way, through the"
    yield "dx", f"{through} mean", dx(g, 0, of_var), mean_line
    yield "dx", f"{through} variance", dx(g, of_mean, 0), var_line
    yield "dx", "missing terms: mean and rstd depend on x, too", dx(g, 0, 0), mean_line
    yield "dx", "sign of the term that comes through the mean", dx(g, -of_mean, of_var), None
    yield "dx", "sign of the term that comes through the variance", dx(g, of_mean, -of_var), None
    yield "dx", "missing factor: dy is the gradient of y, not of xhat", dx(dy, *terms(dy)), Y_LINE
    for one, other in ((x, x), (x, xhat), (xhat, x)):
        wrong = dx(g, of_mean, one * (g * other).mean(axis=1, keepdims=True))
        yield "dx", "wrong value: x where the normalised xhat belongs", wrong, var_line
    yield "dx", "wrong axis: a row is normalised by itself, without the other rows", dx(g, *terms(g, axis=0)), mean_line
    n = x.shape[1]
    yield "dx", "sum instead of mean, in the terms through mean and variance", dx(g, n * of_mean, n * of_var), mean_line
    yield "dweight", "wrong value: x where the normalised xhat belongs", (dy * x).sum(axis=0), None
    yield "dweight", "missing factor: x - mean is not yet what was multiplied", (dy * xhat / r).sum(axis=0), None
    yield "dweight", "missing factor: the weight was multiplied with something", dy.sum(axis=0), None
    yield "dbias", "a factor too many: the bias was added, not multiplied", (dy * xhat).sum(axis=0), None
    yield "dbias", "a factor too many: the weight has no say in it", g.sum(axis=0), None
    yield from one_row(dweight=dy * xhat, dbias=dy)


LESSON = Lesson(
    op="layernorm", topic="one number reaches the output by three ways",
    forward=("layernorm_forward_ref",), backward=("layernorm_backward_ref",), results=("dx", "dweight", "dbias"),
    arguments=arguments, sizes={"N": 4, "C": 7}, lengths=("N", "C"),
    lines={"dx": "xhat = (x - mean[:, None]) * rstd[:, None]", "dweight": Y_LINE, "dbias": Y_LINE},
    mistakes=mistakes,
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
