"""Attention: the softmax's gradient, between two products."""

import math

from npgpt.study.lesson import Fault, Lesson

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


def mistakes(dy, qkv, lse, n_head, dropout):
    import numpy as np

    from npgpt.ops.attention import _dropout_scale_ref, _scores_ref, split_heads, split_qkv

    q, k, v = split_qkv(qkv, n_head)
    dy = split_heads(dy, n_head)
    scale = 1 / math.sqrt(q.shape[-1])
    p = np.exp(_scores_ref(q, k) - lse[..., None])
    p_all = np.exp(q @ k.swapaxes(-1, -2) * scale - lse[..., None])  # future positions, too
    drop = _dropout_scale_ref(p, dropout)
    a, da = p * drop, dy @ v.swapaxes(-1, -2)
    dp = da * drop

    def softmax(p, dp, weights=None, axis=-1):
        return p * (dp - (dp * (p if weights is None else weights)).sum(axis=axis, keepdims=True))

    mask_line = "return np.where(future, -np.inf, s).astype(q.dtype)"
    for words, ds, line in (
        ("missing term: the probabilities of a row sum to 1, so one score changes all of them", p * dp, SOFTMAX_LINE),
        ("missing line: the softmax has not been undone", dp, SOFTMAX_LINE),
        ("wrong mask: the weights that dropout dropped did not reach the output", softmax(p, da), DROP_LINE),
        ("wrong value: the softmax made p; a came after it", softmax(a, dp), SOFTMAX_LINE),
        ("wrong value: the softmax made p; a came after it", softmax(p, dp, a), SOFTMAX_LINE),
        ("wrong value: the softmax made p; a came after it", softmax(a, dp, p), SOFTMAX_LINE),
        ("wrong value: the sum in the softmax's gradient has another factor", softmax(p, dp, 1.0), SOFTMAX_LINE),
        ("wrong axis: a softmax goes over the keys of a query", softmax(p, dp, axis=-2), SOFTMAX_LINE),
        ("sign of the sum in the softmax's gradient", p * (dp + (dp * p).sum(-1, keepdims=True)), SOFTMAX_LINE),
        ("wrong mask: a query does not see positions of the future", softmax(p_all, dp), mask_line),
    ):
        yield "dq", words, ds @ k * scale, line
        yield "dk", words, ds.swapaxes(-1, -2) @ q * scale, line
    ds = softmax(p, dp) * scale
    turned = "transposed: not a row of the matrix but a column goes into"
    yield "dq", f"{turned} it, or the other way round", ds.swapaxes(-1, -2) @ k, None
    yield "dk", f"{turned} a key's gradient: all queries that looked at it", ds @ q, None
    reshaped = "transposed, then reshaped: reshape makes the shape right but does not exchange axes"
    yield "dk", reshaped, (q.swapaxes(-1, -2) @ ds).reshape(q.shape), None
    yield "dq", "wrong value: of a product, each factor's gradient has the other factor", ds @ q, None
    yield "dk", "wrong value: of a product, each factor's gradient has the other factor", ds.swapaxes(-1, -2) @ k, None
    yield "dv", f"{turned} a value's gradient: all queries that looked at it", a @ dy, None
    yield "dv", "wrong value: v was multiplied with the weights after dropout", p.swapaxes(-1, -2) @ dy, DROP_LINE
    yield "dv", "wrong value: v was multiplied with the weights a, not with ds", ds.swapaxes(-1, -2) @ dy, None
    future = (p_all * drop).swapaxes(-1, -2) @ dy
    yield "dv", "wrong mask: a query does not see positions of the future", future, mask_line
    yield "dv", reshaped, (dy.swapaxes(-1, -2) @ a).reshape(v.shape), None


LESSON = Lesson(
    op="attention", topic="the softmax's gradient, between two products with two factors each",
    forward=("_scores_ref", "_softmax_ref", "_dropout_scale_ref", "attention_forward_ref"),
    backward=("attention_backward_ref",), results=("dqkv",),
    imports="from npgpt.ops.attention import split_heads, split_qkv\nfrom npgpt.ops.dropout import dropout_mask_ref",
    arguments=arguments, sizes={"B": 2, "T": 4, "n_head": 3, "hs": 5, "p_drop": 0.3, "batch_offset": 1, "key": 9},
    lines={
        "dq": SCORES_LINE, "dk": SCORES_LINE, "dv": "y = a @ v",
        "dqkv": "return y.transpose(0, 2, 1, 3).reshape(B, T, H * hs), lse",
    },
    factors=factors, shared=(("dq", "dk"), SOFTMAX_LINE), parts=parts, mistakes=mistakes,
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
