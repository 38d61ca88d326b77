"""LayerNorm: an op whose backward looks like a riddle, until it is walked back line by line.

You will understand

- how to derive the backward of any formula: undo one line after the other, last line first,
- how the eight lines that this takes fold into one,
- what the two terms that LayerNorm subtracts from a gradient are there for.

Counterpart: npgpt/ops/layernorm.py, which derives the same formula another way, from d xhat_i / d x_j.
Next: 05_cross_entropy.py, where the whole backward folds into p - y.
Try it: strike the mean out of the forward (that is RMSNorm).  Which term of the formula goes with it?

    python examples/04_layernorm.py
"""

import numpy as np
from checks import check, difference, finish

from npgpt import Tensor
from npgpt.gradcheck import numeric_grad
from npgpt.ops.layernorm import EPS, layernorm

rng = np.random.default_rng(0)
np.set_printoptions(precision=3, suppress=True)

# --------------------------------------------------------------------------------------------------------------------
# Forward.  Each row gets mean 0 and variance 1, then a scale and a shift of its own for each of the C columns.


def forward(x, w, b):
    """x (N, C), w (C,), b (C,) -> y (N, C), and what the backward will want to know."""
    mean = x.mean(axis=1, keepdims=True)  # (N, 1)
    centred = x - mean
    var = (centred**2).mean(axis=1, keepdims=True)  # (N, 1)
    rstd = (var + EPS) ** -0.5  # (N, 1), one over the standard deviation
    xhat = centred * rstd  # (N, C)
    y = xhat * w + b
    return y, centred, rstd, xhat


x, w, b = rng.normal(3, 2, size=(2, 5)), rng.normal(size=5), rng.normal(size=5)
y, centred, rstd, xhat = forward(x, w, b)
print("x\n", x, "\nxhat\n", xhat, "\nmean", xhat.mean(axis=1), "and variance", xhat.var(axis=1), "of its rows\n")

# --------------------------------------------------------------------------------------------------------------------
# Backward, line by line.  Each block undoes the line of the forward that it quotes.  Three rules are enough:
#     a product: a factor's gradient is the other factor times dy (01_chain_rule.py),
#     what was copied to a whole row gets a sum over the row (02_broadcasting.py), and a mean sends 1/C to each,
#     what was used twice gets both contributions, so the second one comes with += .


def backward_by_lines(dy, w, centred, rstd, xhat):
    C = w.size
    # y = xhat * w + b            w and b were copied to all rows
    dxhat = dy * w
    dw = (dy * xhat).sum(axis=0)
    db = dy.sum(axis=0)
    # xhat = centred * rstd       rstd was copied along its row
    dcentred = dxhat * rstd
    drstd = (dxhat * centred).sum(axis=1, keepdims=True)
    # rstd = (var + EPS) ** -0.5  has the derivative -1/2 (var + EPS)^(-3/2) = -1/2 rstd^3
    dvar = drstd * -0.5 * rstd**3
    # var = mean(centred**2)      centred, for the second time
    dcentred += dvar * 2 * centred / C
    # centred = x - mean          mean was copied along its row
    dx = dcentred.copy()
    dmean = -dcentred.sum(axis=1, keepdims=True)
    # mean = x.mean()             x, for the second time
    dx += dmean / C
    return dx, dw, db


# --------------------------------------------------------------------------------------------------------------------
# Backward, folded.  Write g for dxhat, and <.> for the mean over a row.  The lines above, put into each other:
#
#     drstd    = C <g centred>         = C <g xhat> / rstd                     (as centred = xhat / rstd)
#     dvar     = -1/2 rstd^3 drstd     = -C/2 rstd^2 <g xhat>
#     dcentred = g rstd + 2/C dvar centred
#              = g rstd - rstd^2 <g xhat> centred = rstd (g - xhat <g xhat>)
#     dx       = dcentred - <dcentred> = rstd (g - <g> - xhat <g xhat>)        (as <xhat> = 0)


def backward(dy, w, rstd, xhat):
    g = dy * w
    g_mean = g.mean(axis=1, keepdims=True)
    g_xhat_mean = (g * xhat).mean(axis=1, keepdims=True)
    dx = rstd * (g - g_mean - xhat * g_xhat_mean)
    return dx, (dy * xhat).sum(axis=0), dy.sum(axis=0)


dy = rng.normal(size=y.shape)
by_lines = backward_by_lines(dy, w, centred, rstd, xhat)
ours = dx, dw, db = backward(dy, w, rstd, xhat)
measured = [numeric_grad(lambda: forward(x, w, b)[0], Tensor(array), dy) for array in (x, w, b)]

# --------------------------------------------------------------------------------------------------------------------
# What the two terms are for.  There are two ways to move a row of x that leave y as it is, since the normalisation
# takes them out again.  One adds a constant: a step along (1, .., 1).  The other stretches the row about its mean, by a
# factor 1 + h: that adds h (x - mean) = h xhat / rstd, so it is a step along xhat.  Neither may change the loss, so dx
# must have no part along them.  g has: the term <g> takes away its part along (1, .., 1), and xhat <g xhat> that along
# xhat.  (All but a trace of it: EPS stands beside the variance, and does not stretch with it.)

moved, *_ = forward(3 * x + 7, w, b)
g = dy * w
grad = np.zeros_like(x)
print("largest part along       (1, .., 1)      xhat   off finite differences by")
for title, part in {
    "rstd g": rstd * g,
    "  - rstd <g>": -rstd * g.mean(axis=1, keepdims=True),
    "  - rstd xhat <g xhat>": -rstd * xhat * (g * xhat).mean(axis=1, keepdims=True),
}.items():
    grad += part
    along = np.abs([grad.mean(axis=1), (grad * xhat).mean(axis=1)]).max(axis=1)
    print(f"{title:<24}{along[0]:10.6f}{along[1]:10.6f}   {difference(grad, measured[0]):6.1%}")
print()
check("forward(3 x + 7) and forward(x), but for EPS", difference(moved, y), 1e-4)
check("what remains is dx", difference(grad, dx), 1e-12)
check("it has no part along (1, .., 1)", along[0], 1e-12)
check("it has no part along xhat, but for EPS", along[1], 1e-4)

# --------------------------------------------------------------------------------------------------------------------
# The proof: finite differences; the same `forward` on npgpt's Tensors, whose operators each know their own backward, so
# that the engine finds the way back by itself; and npgpt's op, where it is written by hand

for i, name in enumerate(("dx", "dw", "db")):
    check(f"{name} folded and finite differences", difference(ours[i], measured[i]), 1e-8)
    check(f"{name} folded and line by line", difference(ours[i], by_lines[i]), 1e-12)
for title, f in (("composed from npgpt's operators", lambda *xwb: forward(*xwb)[0]), ("npgpt's layernorm", layernorm)):
    tensors = [Tensor(array, requires_grad=True) for array in (x, w, b)]
    out = f(*tensors)
    out.backward(dy)
    pairs = zip((y, *ours), (out.data, *(tensor.grad for tensor in tensors)), strict=True)
    check(f"y, dx, dw, db and {title}", np.max([difference(*pair) for pair in pairs]), 1e-12)

finish()
