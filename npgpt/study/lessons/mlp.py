"""The MLP: a chain of two layers, with GELU between them."""

from npgpt.study.lesson import Fault, Lesson, one_row

GELU_LINE = "return 0.5 * z * (1 + np.tanh(K * (z + A * z**3)))"
FC_LINE = "pre = linear_forward_ref(x, w_fc, b_fc)"
PROJ_LINE = "y = linear_forward_ref(act, w_proj, b_proj)"


def arguments(new, N, C, F, out=None, scale=1):
    """scale: of the weights; at C**-0.5 activations are of about 1, as in training."""
    out = out or C
    x, w_fc, b_fc, w_proj, b_proj = new(N, C), new(F, C), new(F), new(out, F), new(out)
    return {"x": x, "w_fc": w_fc * scale, "b_fc": b_fc, "w_proj": w_proj * scale, "b_proj": b_proj}


def mistakes(dy, x, w_fc, w_proj, pre):
    import numpy as np

    from npgpt.ops.mlp import A, K, gelu_ref, gelu_slope_ref

    act, t = gelu_ref(pre), np.tanh(K * (pre + A * pre**3))
    yield "dw_proj", "wrong value: the second layer was given what came out of the GELU", dy.T @ pre, None
    yield "dw_proj", "wrong value: act is what was multiplied, not its slope", dy.T @ gelu_slope_ref(pre), None
    first, second = 0.5 * (1 + t), 0.5 * pre * (1 - t**2)
    inner = K * (1 + 3 * A * pre**2)
    for words, slope in (
        ("missing term: by the product rule GELU's slope has two, and the second is missing", first),
        ("missing term: by the product rule GELU's slope has two, and the first is missing", second * inner),
        ("missing factor: by the chain rule, the slope of what stands inside of tanh", first + second),
        ("missing factor: what stands inside of tanh has a cube in it", first + second * K),
        ("sign of the second term of GELU's slope", first - second * inner),
        ("wrong value: the slope is taken before the activation, at pre, not at act", gelu_slope_ref(act)),
        ("wrong value: GELU itself, where its slope belongs", act),
        ("missing line: the gradient has not passed the GELU", np.ones_like(pre)),
    ):
        dpre = dy @ w_proj * slope
        yield "dx", words, dpre @ w_fc, GELU_LINE
        yield "dw_fc", words, dpre.T @ x, GELU_LINE
        yield "db_fc", words, dpre.sum(axis=0), GELU_LINE
    yield from one_row(db_fc=dy @ w_proj * gelu_slope_ref(pre), db_proj=dy)


LESSON = Lesson(
    op="mlp", topic="the product rule in GELU's slope, and which value goes where",
    forward=("gelu_ref", "mlp_forward_ref"), backward=("gelu_slope_ref", "mlp_backward_ref"),
    results=("dx", "dw_fc", "db_fc", "dw_proj", "db_proj"),
    imports="from npgpt.ops.linear import linear_backward_ref, linear_forward_ref\nfrom npgpt.ops.mlp import A, K",
    arguments=arguments, sizes={"N": 4, "C": 5, "F": 11, "out": 7}, lengths=("N", "C", "F"),
    lines={"dx": FC_LINE, "dw_fc": FC_LINE, "db_fc": FC_LINE, "dw_proj": PROJ_LINE, "db_proj": PROJ_LINE},
    shared=(("dx", "dw_fc", "db_fc"), GELU_LINE), mistakes=mistakes,
    bugs={
        8: Fault(
            "mlp: second weight from the value before the activation", "npgpt/ops/mlp.py",
            "linear_backward_ref(dy, act, w_proj)", "linear_backward_ref(dy, pre, w_proj)",
            "The second layer multiplied what came out of the GELU.",
        ),
        9: Fault(
            "mlp: slope at the value after the activation", "npgpt/ops/mlp.py",
            "    dpre = dact * gelu_slope_ref(pre)\n", "    dpre = dact * gelu_slope_ref(act)\n",
            "The slope of the GELU is taken where the GELU was: at its input.",
        ),
        17: Fault(
            "mlp kernel: GELU's slope without the inner derivative", "npgpt/ops/mlp.py",
            " * two_k * (one + a3 * z * z)\n", " * two_k\n",
            "u = k (z + a z^3) has the derivative k (1 + 3 a z^2); near 0 it is nearly k.", kernel=True,
        ),
    },
)  # fmt: skip
