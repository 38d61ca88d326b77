"""Softmax and cross-entropy: from scores to probabilities to a loss, and back by p - y.

You will understand

- how the gradient of a softmax comes to be p_i ([i = j] - p_j), and what that table looks like,
- why nearly all of it cancels when a logarithm follows, and p - y remains,
- why the two are computed together, with the largest score subtracted,
- how p is made again from one number for each row, lse, and what a row gets that does not count.

Counterpart: npgpt/ops/cross_entropy.py, the last op of a GPT and the first of its backward.
Next: 06_attention.py, where a softmax stands alone, and nothing cancels.
Try it: set all logits to 0.  What is the loss?  (A GPT starts near there: see iter 0 of any training.)

    python examples/05_cross_entropy.py
"""

import numpy as np
from checks import check, difference, finish

from npgpt import Tensor
from npgpt.gradcheck import numeric_grad
from npgpt.ops.cross_entropy import cross_entropy

rng = np.random.default_rng(0)
np.set_printoptions(precision=3, suppress=True)

# --------------------------------------------------------------------------------------------------------------------
# Forward.  A row of V scores, the logits z, one for each token of the vocabulary, becomes probabilities p, and the loss
# is how surprised they are by the token that really came, the target c:
#
#     p_i = e^z_i / sum_j e^z_j          loss = -log p_c          (averaged over the N rows)


def softmax(z):
    e = np.exp(z)
    return e / e.sum(axis=-1, keepdims=True)


z, targets = rng.normal(size=(3, 4)), np.array([2, 0, 3])  # N = 3 rows, V = 4 tokens
N, V = z.shape
rows = np.arange(N)
p = softmax(z)
loss = -np.log(p[rows, targets]).mean()
print("p, whose rows sum to 1\n", p, f"\nloss {loss:.4f};  with all p equal it would be log V = {np.log(V):.4f}\n")

# --------------------------------------------------------------------------------------------------------------------
# The long way back, for one row.  First -log p_c: only p_c matters, dp_c = -1 / p_c, and the other dp are 0.
#
# Then the softmax.  With total = sum_j e^z_j, p_i = e^z_i / total depends on z_j in two ways: through its own e^z_i, if
# j = i, and through the total.  By the quotient rule, and with [i = j] for the number that is 1 if i = j, and 0 if not
# (many books write delta_ij for it),
#
#     d p_i / d z_j = ([i = j] e^z_i total - e^z_i e^z_j) / total^2 = p_i ([i = j] - p_j)
#
# which makes a (V, V) table: diag(p) minus p p^T.  Raising one score raises its own p and lowers all the others, and
# each column sums to 0, as the probabilities go on summing to 1; so does each row, as one and the same number added to
# all scores changes no probability.

c, p_row = targets[0], p[0]
table = np.diag(p_row) - np.outer(p_row, p_row)  # [i, j] is d p_i / d z_j
dp = np.zeros(V)
dp[c] = -1 / p_row[c]
dz_long = dp @ table  # dz_j = sum_i dp_i d p_i / d z_j
print("d p_i / d z_j in row 0\n", table, "\ndp", dp, "\ndz", dz_long, "\n")

# --------------------------------------------------------------------------------------------------------------------
# The short way.  Only i = c is left of that sum, and p_c cancels:
#
#     dz_j = -1 / p_c  p_c ([c = j] - p_j) = p_j - [c = j]
#
# What was predicted minus what should have been: y is 1 for the target and 0 elsewhere.  Each wrong token is pushed
# down by the probability that it was given, the target is pushed up by all that it lacks, and that adds up to 0.


def backward(p, targets):
    """The gradient of the mean loss of N rows: each of them counts 1 / N."""
    y = np.eye(p.shape[1])[targets]
    return (p - y) / len(p)


dz = backward(p, targets)
print("(p - y) / N\n", dz, "\n")
check("row 0, the long way and the short way", difference(dz_long / N, dz[0]), 1e-12)
check("each row of p - y sums to 0", np.abs(dz.sum(axis=1)).max(), 1e-12)

# --------------------------------------------------------------------------------------------------------------------
# Why the two are one op.  e^z overflows soon, and the logarithm of a p that was rounded to 0 is minus infinity.  But
# the logarithm can be taken before anything is rounded, as log(a / b) = log a - log b:
#
#     log p_i = log(e^z_i / sum_j e^z_j) = z_i - lse           lse = log sum_j e^z_j, the log-sum-exp of the row
#
# So the loss is -log p_c = lse - z_c, and p_i = e^(z_i - lse): whoever has the scores and this one number for each row
# needs no other array to make p again, and a backward does so.  And e^z does not overflow if the largest score m is
# first taken from all of them.  Each e^z_j is e^m e^(z_j - m), so e^m can stand before the sum, and
#
#     lse = m + log sum_j e^(z_j - m)


def forward(z, targets):
    """The mean loss, and p."""
    m = z.max(axis=1, keepdims=True)
    lse = m + np.log(np.exp(z - m).sum(axis=1, keepdims=True))  # (N, 1)
    return (lse[:, 0] - z[rows, targets]).mean(), np.exp(z - lse)


far = 1000.0 * np.eye(N, V)  # quite sure of token n in row n, and wrong each time
with np.errstate(all="ignore"):
    print(f"\nscores of 1000: loss {-np.log(softmax(far)[rows, targets]).mean()} as written above,", end=" ")
far_loss, far_p = forward(far, targets)
print(f"{far_loss} by lse\n")
check("loss by lse and as written above", difference(forward(z, targets)[0], loss), 1e-12)
check("p by lse and as written above", difference(forward(z, targets)[1], p), 1e-12)
check("scores of 1000: loss, and it is finite", difference(far_loss, 1000), 1e-12)
check("scores of 1000: p, and it is finite", difference(far_p, np.eye(N, V)), 1e-12)

# --------------------------------------------------------------------------------------------------------------------
# Rows that do not count.  Some places of a batch have no target: the end of a text that is shorter than the others,
# say.  There the target is a number that is no token, the ignore_index (-1 in npgpt).  The loss is the mean over the
# other rows, `count` of them, and does not depend on the scores of an ignored row: its gradient is 0.
#
#     loss = 1 / count  sum over counted rows of (lse - z_c)       dz_j = (p_j - [c = j]) / count, and 0 in ignored rows
#
# Mind that -1 is an index, too: a target of -1 that nobody takes out picks the last token.  (npgpt's backward also has
# a factor dloss, the gradient of the loss itself.  It is 1 where the loss is the end, as here.)


def forward_ignoring(z, targets, ignore_index):
    counted = targets != ignore_index
    lse = np.log(np.exp(z).sum(axis=1))  # (N,); without m, to be short
    return (lse - z[rows, targets])[counted].sum() / counted.sum(), lse


def backward_ignoring(z, targets, lse, ignore_index):
    p = np.exp(z - lse[:, None])  # made again
    counted = targets != ignore_index
    y = np.eye(p.shape[1])[targets]
    return np.where(counted[:, None], p - y, 0) / counted.sum()


holed = np.array([2, -1, 3])  # the row in the middle does not count
holed_loss, lse = forward_ignoring(z, holed, -1)
dz_holed = backward_ignoring(z, holed, lse, -1)
print("\ndz where the second row does not count\n", dz_holed, "\n")
measured = numeric_grad(lambda: forward_ignoring(z, holed, -1)[0], Tensor(z), 1.0)
check("dz with an ignored row and finite differences", difference(dz_holed, measured), 1e-8)
check("the loss with an ignored row and npgpt's", difference(holed_loss, cross_entropy(Tensor(z), holed).data), 1e-12)

# --------------------------------------------------------------------------------------------------------------------
# What p - y teaches.  Let eight rows have the same three scores, but not the same target: the tokens 0, 1, 1, 2, 2, 2,
# 2 and 2 came.  Shared scores are broadcast, so their gradient is the sum over the rows (02_broadcasting.py).  That is
# p minus how often each token came, and is 0 only where p is just that.  A language model learns frequencies, and the
# loss that remains is their entropy.

answers = np.array([0, 1, 1, 2, 2, 2, 2, 2])
often = np.bincount(answers) / len(answers)
scores = np.zeros(3)
for _ in range(500):
    p_all = softmax(np.broadcast_to(scores, (8, 3)))
    scores -= backward(p_all, answers).sum(axis=0)
print("\nfrequencies", often, "  p after 500 steps", p_all[0], "\n")
check("p becomes the frequencies", difference(p_all[0], often), 1e-8)

# --------------------------------------------------------------------------------------------------------------------
# The proof


def composed(z, targets):
    """The first formula of this file in npgpt's operators, whose backward the engine finds by itself."""
    e = z.exp()
    return -(e / e.sum(axis=1, keepdims=True))[rows, targets].log().mean()


measured = numeric_grad(lambda: forward(z, targets)[0], Tensor(z), 1.0)
check("p - y and finite differences", difference(dz, measured), 1e-8)
for title, f in (("composed from npgpt's operators", composed), ("npgpt's cross_entropy", cross_entropy)):
    logits = Tensor(z, requires_grad=True)
    out = f(logits, targets)
    out.backward()
    check(f"loss and {title}", difference(loss, out.data), 1e-12)
    check(f"p - y and {title}", difference(dz, logits.grad), 1e-12)

finish()
