"""Dropout: forward and backward are one function."""

from npgpt.study.lesson import Fault, Lesson, instead


def arguments(new, N, C, p, first_row, key=0xC0FFEE):
    import numpy as np

    return {"x": new(N, C), "key": np.uint32(key), "first_row": first_row, "p": p}


def factors(p, **_):
    return {"1 - p": (1 - p, None), "(1 - p)^2": ((1 - p) ** 2, None), "(1 - p) / p": ((1 - p) / p, None)}


def places(dy, key, first_row, p, **_):
    from npgpt.kernels.masks import dropout_mask_ref

    mask = dropout_mask_ref(key, first_row, dy.shape, p)
    return {"dx": {"the entries that the mask kept": mask, "the entries that it dropped": ~mask}}


LINE = "mask = dropout_mask_ref(key, first_row, x.shape, p)"
MISTAKES = (
    ("dx", "dx = dy", "missing mask, and missing factor: what was dropped did not reach the output", LINE),
    ("dx", "dx = mask / (1 - p)", "missing factor: the mask alone, where dy belongs too", None),
    *instead("mask", LINE, {
        "mask = ~dropout_mask_ref(key, first_row, dy.shape, p)":
            "wrong mask: it is turned round, what was dropped gets a gradient",
        "mask = dropout_mask_ref(key, 0, dy.shape, p)": "wrong mask: its rows are numbered from first_row on",
        "mask = dropout_mask_ref(key, first_row + 1, dy.shape, p)": "wrong mask: its first row is first_row",
        "mask = dropout_mask_ref(key, first_row, dy.shape, 1 - p)": "wrong mask: that of another probability",
    }),
)  # fmt: skip


LESSON = Lesson(
    op="dropout", topic="the same mask once more", chapter="examples/06_attention.py",
    forward=("dropout_ref",), backward=("dropout_ref",), results=("dx",),
    imports="from npgpt.ops.dropout import dropout_mask_ref",
    replaces="dropout_rows", exchange=(("dropout_ref", "dropout_backward_ref"), ("x", "dy"), ("y", "dx")),
    arguments=arguments, sizes={"N": 4, "C": 7, "p": 0.4, "first_row": 3, "key": 9}, lengths=("N", "C"),
    lines={"dx": "return np.where(mask, x * x.dtype.type(1 / (1 - p)), x.dtype.type(0))"},
    factors=factors, places=places, zeros="where the mask dropped x: y does not depend on it", mistakes=MISTAKES,
    bugs={
        19: Fault(
            "dropout: another mask in the backward", "npgpt/ops/dropout.py",
            "        dropout_rows(dx.reshape(rows.shape), as_rows(dy), key, first_row, p)\n",
            "        dropout_rows(dx.reshape(rows.shape), as_rows(dy), next_random_key()[0], first_row, p)\n",
            "The gradient goes where the forward's mask let the value pass.",
        ),
    },
)  # fmt: skip
