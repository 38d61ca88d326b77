"""The MLP: a chain of two layers, with GELU between them."""

from npgpt.study.lesson import Fault, Lesson, instead

GELU_LINE = "return 0.5 * z * (1 + np.tanh(K * (z + A * z**3)))"
FC_LINE = "pre = linear_forward_ref(x, w_fc, b_fc)"
PROJ_LINE = "y = linear_forward_ref(act, w_proj, b_proj)"


def arguments(new, N, C, F, out=None, scale=1):
    """scale: of the weights; at C**-0.5 activations are of about 1, as in training."""
    out = out or C
    x, w_fc, b_fc, w_proj, b_proj = new(N, C), new(F, C), new(F), new(out, F), new(out)
    return {"x": x, "w_fc": w_fc * scale, "b_fc": b_fc, "w_proj": w_proj * scale, "b_proj": b_proj}


FIRST, SECOND, INNER = "0.5 * (1 + t)", "0.5 * pre * (1 - t**2)", "K * (1 + 3 * A * pre**2)"
ERF = "0.5 * (1 + np.vectorize(math.erf)(pre / 2**0.5)) + pre * np.exp(-(pre**2) / 2) / (2 * math.pi) ** 0.5"
SIGMOID = "(1 + (1 + 1.702 * pre) * np.exp(-1.702 * pre)) / (1 + np.exp(-1.702 * pre)) ** 2"
AT = "\nt = np.tanh(K * (pre + A * pre**3))"
MISTAKES = (
    ("dw_proj", "dw_proj = dy.T @ pre", "wrong value: the second layer was given what came out of the GELU", None),
    ("dw_proj", "dw_proj = dy.T @ gelu_slope_ref(pre)", "wrong value: act is what was multiplied, not its slope", None),
    *instead("gelu_slope", GELU_LINE, {
        f"gelu_slope = {FIRST}":
            "missing term: by the product rule GELU's slope has two, and the second is missing",
        f"gelu_slope = {SECOND} * {INNER}":
            "missing term: by the product rule GELU's slope has two, and the first is missing",
        f"gelu_slope = {FIRST} + {SECOND}":
            "missing factor: by the chain rule, the slope of what stands inside of tanh",
        f"gelu_slope = {FIRST} + {SECOND} * K": "missing factor: what stands inside of tanh has a cube in it",
        f"gelu_slope = {FIRST} + {SECOND} * K * (1 + A * pre**2)":
            "missing factor: what stands inside of tanh has a cube in it, whose slope has one more",
        f"gelu_slope = {FIRST} - {SECOND} * {INNER}": "sign: that of the second term of GELU's slope",
        f"gelu_slope = {FIRST} + 0.5 * pre * (1 - t) * {INNER}":
            "wrong power: the slope of tanh is made of its square",
        "gelu_slope = act": "wrong value: GELU itself, where its slope belongs",
        "gelu_slope = (pre > 0) * 1.0": "wrong value: this is the slope of ReLU",
        f"gelu_slope = {ERF}": "wrong value: this is the slope of another GELU, that with erf",
        f"gelu_slope = {SIGMOID}": "wrong value: this is the slope of another GELU, that with a sigmoid",
    }),
    ("t =", "pre = act" + AT, "wrong value: the slope is taken before the activation, at pre, not at act", GELU_LINE),
    ("t =", "pre = dact" + AT, "wrong value: the slope is taken at pre, not at a gradient", GELU_LINE),
    ("dpre", "dpre = dact", "missing line: the gradient has not passed the GELU", GELU_LINE),
)  # fmt: skip


LESSON = Lesson(
    op="mlp", topic="the product rule in GELU's slope, and which value goes where", chapter="examples/07_mlp.py",
    forward=("gelu_ref", "mlp_forward_ref"), backward=("gelu_slope_ref", "mlp_backward_ref"),
    results=("dx", "dw_fc", "db_fc", "dw_proj", "db_proj"),
    imports="from npgpt.ops.linear import linear_backward_ref, linear_forward_ref\nfrom npgpt.ops.mlp import A, K",
    arguments=arguments, sizes={"N": 4, "C": 5, "F": 11, "out": 7}, lengths=("N", "C", "F"),
    lines={"dx": FC_LINE, "dw_fc": FC_LINE, "db_fc": FC_LINE, "dw_proj": PROJ_LINE, "db_proj": PROJ_LINE},
    shared=(("dx", "dw_fc", "db_fc"), GELU_LINE), slopes=(("gelu_slope", "gelu_ref", "pre"),), mistakes=MISTAKES,
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
