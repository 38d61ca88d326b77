"""Cross-entropy: p - y, and rows that do not count."""

from npgpt.study.lesson import Fault, Lesson, instead

TARGETS = (1, 0, -3, 3, -3, 4, 3)  # -3 is ignored
ZEROS = "in the rows whose target is ignored: the loss does not depend on them"


def arguments(new, N, V, n_ignored=0, ignore_index=-1, targets=None):
    import numpy as np

    if targets is None:
        targets = new.integers(V, N)
        targets[:n_ignored] = ignore_index
    return {"logits": new(N, V), "targets": np.array(targets), "ignore_index": ignore_index, "count": N - n_ignored}


def factors(logits, count, dloss, **_):
    values = {"count": count, "dloss": dloss, "count / dloss": count / dloss, "count / N": count / len(logits)}
    return {name: (value, None) for name, value in values.items()}


def places(logits, targets, ignore_index, **_):
    import numpy as np

    rows = np.broadcast_to((targets != ignore_index)[:, None], logits.shape)
    hot = targets[:, None] == np.arange(logits.shape[1])
    return {
        "dlogits": {
            "the entries of the targets": hot, "all entries but those of the targets": rows & ~hot,
            "the rows whose target is ignored": ~rows, "the rows whose target counts": rows,
        }
    }  # fmt: skip


Z_LINE = "losses = lse[rows] - logits[rows, targets[rows]]"
LSE_LINE = "lse = m + np.log(np.exp(logits - m[:, None]).sum(axis=1))"
VALID_LINE = "rows = np.flatnonzero(valid)"
IGNORED = "wrong mask: it must be 0 " + ZEROS
HOT = "(targets[:, None] == np.arange(logits.shape[1]))"  # where the targets are
MISTAKES = (
    ("dlogits[rows", "", "missing term: the loss has the target's own logit in it, too", Z_LINE),
    ("dlogits = p", "dlogits = 0 * p", "missing term: the loss has lse in it, too", Z_LINE),
    *instead("dlogits = p", LSE_LINE, {
        f"dlogits = p * {HOT}": "missing term: every logit of a row is in lse, not the target's alone",
    }),
    ("dlogits[rows", "dlogits[rows, targets[rows]] += 1", "sign: that of the target's term", Z_LINE),
    (
        "dlogits", f"dlogits = valid[:, None] * (p * dloss / count - {HOT})",
        "missing factor: both terms are divided by count", None,
    ),
    ("p = np.exp", "p = logits", "wrong value: logits where probabilities belong", Z_LINE),
    *instead("p = np.exp", LSE_LINE, {
        "p = np.exp(logits)": "wrong value: a probability is exp(logit - lse)",
        "p = np.exp(logits) / np.exp(logits).sum(axis=0)": "wrong axis: a softmax goes over the logits of a row",
    }),
    ("dlogits[~valid]", "", IGNORED, VALID_LINE),
    ("valid", "valid = targets != -1", IGNORED, VALID_LINE),
    ("dlogits[", "dlogits[np.arange(len(targets)), targets] -= 1", IGNORED, VALID_LINE),
    *instead("dlogits[rows", Z_LINE, {
        "dlogits[:, targets[rows]] -= 1":
            "wrong index: a row has one target, and that is its own, not those of the others",
        "dlogits -= targets[:, None]": "wrong value: a target is the place of a logit, not a number",
        "dlogits[rows, targets[rows]] -= p[rows, targets[rows]]":
            "wrong value: it is not p that is subtracted at the target's place",
        "dlogits[rows] -= logits[rows]": "wrong value: logits where probabilities belong",
    }),
    (
        "dlogits = dlogits", "dlogits = p * (dlogits - (dlogits * p).sum(axis=1, keepdims=True)) * dloss / count",
        "a line too many: p - y has already come through the softmax", LSE_LINE,
    ),
    (
        "dlogits", f"dlogits = {HOT} / -p * dloss / count",
        "missing line: the gradient has come to the target's p, and the softmax has not been undone", LSE_LINE,
    ),
)  # fmt: skip


LESSON = Lesson(
    op="cross-entropy", topic="softmax and logarithm in one, and rows that do not count",
    chapter="examples/05_cross_entropy.py",
    forward=("cross_entropy_forward_ref",), backward=("cross_entropy_backward_ref",), results=("dlogits",),
    arguments=arguments, sizes={"N": 7, "V": 6, "n_ignored": 2, "ignore_index": -3, "targets": TARGETS},
    lengths=("N", "V"), lines={"dlogits": "return losses.sum() / count, lse"},
    factors=factors, zeros=ZEROS, places=places, mistakes=MISTAKES,
    bugs={
        5: Fault(
            "cross-entropy: ignored rows get a gradient", "npgpt/ops/cross_entropy.py",
            "    dlogits[~valid] = 0\n", "",
            "The loss does not depend on rows whose target is ignored.",
        ),
    },
)  # fmt: skip
