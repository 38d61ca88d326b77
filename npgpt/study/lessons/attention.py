"""Attention: the softmax's gradient, between two products."""

import math

from npgpt.study.lesson import Fault, Lesson, instead

SCORES_LINE = "s = q @ k.swapaxes(-1, -2) / math.sqrt(hs)"
SOFTMAX_LINE = "p = e / total"
DROP_LINE = "a = p * _dropout_scale(p, dropout)"


def arguments(new, B, T, n_head, hs, p_drop, batch_offset, key=0xC0FFEE):
    import numpy as np

    from npgpt.kernels.masks import Dropout

    dropout = Dropout(p_drop, np.uint32(key), batch_offset)
    return {"qkv": new(B, T, 3 * n_head * hs), "n_head": n_head, "dropout": dropout}


def factors(qkv, n_head, dropout, **_):
    hs = qkv.shape[2] // 3 // n_head
    kept = {"1 - dropout.p": (1 - dropout.p, DROP_LINE)}
    return {"sqrt(hs)": (math.sqrt(hs), SCORES_LINE), "hs": (hs, SCORES_LINE), **kept}


def parts(values, dqkv):
    from npgpt.ops.attention import split_qkv

    return dict(zip(("dq", "dk", "dv"), split_qkv(dqkv, values["n_head"]), strict=True))


MASK_LINE = "return np.where(future, -np.inf, s).astype(q.dtype)"
FUTURE = "wrong mask: a query does not see positions of the future"
NOT_A = "wrong value: the softmax made p; a came after it"
OTHER = "wrong value: of a product, each factor's gradient has the other factor"
RESHAPED = "right numbers at wrong places: reshape keeps the order in memory, transpose exchanges axes"
SCORES = "q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]) - lse[..., None]"
MISTAKES = (
    *instead("ds", SOFTMAX_LINE, {
        "ds = p * dp": "missing term: the probabilities of a row sum to 1, so one score changes all of them",
        "ds = p * (1 - p) * dp": "missing term: one score changes all probabilities of its row, not its own alone",
        "ds = dp": "missing line: the softmax has not been undone",
    }),
    ("dp", "dp = da", "wrong mask: the weights that dropout dropped did not reach the output", DROP_LINE),
    *instead("ds", SOFTMAX_LINE, {
        "ds = p * drop * (dp - (dp * p).sum(axis=-1, keepdims=True))": NOT_A,
        "ds = p * (dp - (dp * p * drop).sum(axis=-1, keepdims=True))": NOT_A,
        "ds = p * drop * (dp - (dp * p * drop).sum(axis=-1, keepdims=True))": NOT_A,
        "ds = p * drop * (da - (da * p * drop).sum(axis=-1, keepdims=True))": NOT_A,
        "ds = p * (dp - dp.sum(axis=-1, keepdims=True))": "missing factor: in the sum of the softmax's gradient",
        "ds = p * (dp - (dp * p).sum(axis=-2, keepdims=True))": "wrong axis: a softmax goes over the keys of a query",
        "ds = p * (dp - (dp * p).mean(axis=-1, keepdims=True))":
            "mean instead of sum: the probabilities of a row sum to 1, whatever its length",
    }),
    *instead("p =", MASK_LINE, {
        f"p = np.exp({SCORES})": FUTURE, f"p = np.tril(np.exp({SCORES}), 1)": FUTURE,
        f"p = np.tril(np.exp({SCORES}), -1)": "wrong mask: it is off by one, a query sees its own position",
    }),
    ("p =", "p = np.exp(_scores_ref(q, k))", "wrong value: a probability is exp(s - lse)", SOFTMAX_LINE),
    (
        "p =", "p = np.tril(np.exp(q @ k.swapaxes(-1, -2) - lse[..., None]))",
        "missing factor: the scores were scaled before the softmax", SCORES_LINE,
    ),
    (
        "p =", "p = np.exp(_scores_ref(q, k))\np = p / p.sum(axis=-2, keepdims=True)",
        "wrong axis: a softmax goes over the keys of a query", SOFTMAX_LINE,
    ),
    ("q, k, v", "q, k, v = qkv.reshape(3, qkv.shape[0], n_head, qkv.shape[1], -1)", RESHAPED, None),
    ("dy =", "dy = dy.reshape(v.shape)", RESHAPED, None),
    ("dq", "dq = ds @ q / math.sqrt(q.shape[-1])", OTHER, SCORES_LINE),
    *instead("dk", SCORES_LINE, {
        "dk = ds.swapaxes(-1, -2) @ k / math.sqrt(q.shape[-1])": OTHER,
        "dk = ds @ q / math.sqrt(q.shape[-1])":
            "transposed: not a row of the matrix but a column goes into a key's gradient",
    }),
    ("dv", "dv = p * drop @ dy", "transposed: not a row of the matrix but a column goes into a value's gradient", None),
    *instead("dv", DROP_LINE, {
        "dv = p.swapaxes(-1, -2) @ dy": "wrong value: v was multiplied with the weights after dropout",
        "dv = (p * (drop > 0)).swapaxes(-1, -2) @ dy": "missing factor: dropout scales what it keeps",
    }),
    (
        "dv", "dv = (p * (da * drop - (da * drop * p).sum(axis=-1, keepdims=True))).swapaxes(-1, -2) @ dy",
        "wrong value: v was multiplied with the weights a, not with ds", None,
    ),
)  # fmt: skip
TERMS = {"(dp * p).sum(axis=-1, keepdims=True)": ("the sum in the softmax's gradient", SOFTMAX_LINE)}


LESSON = Lesson(
    op="attention", topic="the softmax's gradient, between two products with two factors each",
    chapter="examples/06_attention.py",
    forward=("_scores_ref", "_softmax_ref", "_dropout_scale_ref", "attention_forward_ref"),
    backward=("attention_backward_ref",), results=("dqkv",),
    imports="from npgpt.ops.attention import split_heads, split_qkv\nfrom npgpt.ops.dropout import dropout_mask_ref",
    arguments=arguments, sizes={"B": 2, "T": 4, "n_head": 3, "hs": 5, "p_drop": 0.3, "batch_offset": 1, "key": 9},
    lines={
        "dq": SCORES_LINE, "dk": SCORES_LINE, "dv": "y = a @ v",
        "dqkv": "return y.transpose(0, 2, 1, 3).reshape(B, T, H * hs), lse",
    },
    factors=factors, shared=(("dq", "dk"), SOFTMAX_LINE), parts=parts, mistakes=MISTAKES, terms=TERMS,
    bugs={
        10: Fault(
            "attention: queries without the scale", "npgpt/ops/attention.py",
            "    dq = ds @ k / math.sqrt(q.shape[-1])\n", "    dq = ds @ k\n",
            "The scores were divided by sqrt(hs), and so is their gradient on its way to q.",
        ),
        11: Fault(
            "attention: softmax backward without the sum", "npgpt/ops/attention.py",
            "    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))\n", "    ds = p * dp\n",
            "The probabilities of a row sum to 1: raising one score lowers all other probabilities.",
        ),
        12: Fault(
            "attention: keys transposed, then reshaped", "npgpt/ops/attention.py",
            "    dk = ds.swapaxes(-1, -2) @ q", "    dk = (q.swapaxes(-1, -2) @ ds).reshape(q.shape)",
            "q^T ds is the transpose of what is wanted; reshaping it makes the shapes agree, "
            "and the figures no righter.",
        ),
        15: Fault(
            "attention: backward without the dropout mask", "npgpt/ops/attention.py",
            "    dp = da * drop\n", "    dp = da\n",
            "A weight that was dropped did not reach the output.",
        ),
        22: Fault(
            "attention kernel: later blocks replace the gradient of the keys", "npgpt/kernels/attention.py",
            "product(dk[j0:j1], grad[rows, j0:j1].T, q[t0:end], end < T)",
            "product(dk[j0:j1], grad[rows, j0:j1].T, q[t0:end], False)",
            "A key is seen by the queries of its own block and of all later ones; their contributions add up.",
            kernel=True,
        ),
    },
)  # fmt: skip
