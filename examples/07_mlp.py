"""GELU, and the MLP that is made with it.

You will understand

- what a smooth switch does to a gradient,
- how three lines of forward become three lines of backward, the last one first,
- which values each of them needs, and why the most frequent mistake here goes unnoticed: the loss falls all the same.

Counterpart: npgpt/ops/mlp.py, the same lines as reference and as kernels.
Next: 08_embedding.py, where an array is used in several places.
Try it: leave GELU out of the MLP (act = pre).  Which line of the backward must change with it, so that all checks but
the last two hold?

    python examples/07_mlp.py
"""

import math

import numpy as np
from checks import check, difference, finish

from npgpt import Tensor
from npgpt.gradcheck import numeric_grad
from npgpt.ops.mlp import mlp

rng = np.random.default_rng(7)

# --------------------------------------------------------------------------------------------------------------------
# GELU lets z pass in the measure in which z is large: gelu(z) = z P(Z < z), for Z from the normal distribution.  GPT-2
# takes a formula with tanh that comes close:
#
#     gelu(z) = z/2 (1 + tanh(u)),        u = k (z + a z^3),        k = sqrt(2/pi),        a = 0.044715

k, a = math.sqrt(2 / math.pi), 0.044715


def gelu(z):
    return 0.5 * z * (1 + np.tanh(k * (z + a * z**3)))


# Its slope is that of a product: the slope of the first factor times the second, and the other way round.  With
# tanh'(u) = 1 - tanh(u)^2 and, by the chain rule, du/dz = k (1 + 3 a z^2):


def gelu_slope(z):
    t = np.tanh(k * (z + a * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * k * (1 + 3 * a * z**2)


exact = np.vectorize(lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2))))

print("    z   gelu(z)  its slope   relu(z)  its slope")
for z in (-4.0, -2.0, -0.75, 0.0, 0.75, 1.5, 4.0):
    print(f"{z:5.2f} {gelu(z):9.4f} {gelu_slope(z):10.4f} {max(z, 0.0):9.4f} {float(z > 0):10.4f}")
z = np.linspace(-6, 6, 1201)
slope, lowest = gelu_slope(z), z[gelu(z).argmin()]
print(f"gelu falls left of z = {lowest:.2f}: its slope goes from {slope.min():.3f} to {slope.max():.3f}")
check("tanh instead of the normal distribution", np.abs(gelu(z) - exact(z)).max(), 1e-3)

# Each number of an array goes its own way, so the gradient of gelu's input is dy times the slope, number by number.

z, dy = rng.normal(size=(5, 4)) * 2, rng.normal(size=(5, 4))
numeric = numeric_grad(lambda: gelu(z), Tensor(z), dy)  # (5, 4), z's entries changed one by one
check("the slope of gelu, finite differences", difference(dy * gelu_slope(z), numeric), 1e-8)

# --------------------------------------------------------------------------------------------------------------------
# The MLP: up to four times the width, GELU, and down again.  Without GELU the two matrices would be one: w_proj w_fc.

N, C = 6, 5
F = 4 * C
x, dy = rng.normal(size=(N, C)), rng.normal(size=(N, C))
w_fc, b_fc = rng.normal(size=(F, C)), rng.normal(size=F)
w_proj, b_proj = rng.normal(size=(C, F)), rng.normal(size=C)


def forward():
    pre = x @ w_fc.T + b_fc  # (N, F)
    act = gelu(pre)  # (N, F)
    y = act @ w_proj.T + b_proj  # (N, C)
    return y, act, pre


# Backward: the same three lines from the last to the first.  Those of a linear layer are 03's: the gradient of the one
# factor is dy times the other.

y, act, pre = forward()
# y = act @ w_proj.T + b_proj
dact = dy @ w_proj  # (N, F)
dw_proj = dy.T @ act  # (C, F)
db_proj = dy.sum(axis=0)  # (C,)
# act = gelu(pre)
dpre = dact * gelu_slope(pre)  # (N, F)
# pre = x @ w_fc.T + b_fc
dx = dpre @ w_fc  # (N, C)
dw_fc = dpre.T @ x  # (F, C)
db_fc = dpre.sum(axis=0)  # (F,)

# Two values from the middle are needed: act, after GELU, for dw_proj, and pre, before it, for the slope.  Only pre has
# to be kept, as act = gelu(pre) can be made again.  The other way round would not do: gelu falls, and then it rises, so
# two different z have the same gelu(z).
#
# The most frequent mistake is pre for act in dw_proj.  The shapes fit, and the direction is not so wrong:

wrong = dy.T @ pre  # (C, F)
cosine = min(1.0, (wrong * dw_proj).sum() / (np.linalg.norm(wrong) * np.linalg.norm(dw_proj)))
angle = math.degrees(math.acos(cosine))
print(f"\ndw_proj made with pre instead of act points {angle:.0f} degrees away from the true one.")
print("Below 90 degrees it is downhill all the same: a model may train with it, only worse.  Finite differences tell:")

inputs = {"x": x, "w_fc": w_fc, "b_fc": b_fc, "w_proj": w_proj, "b_proj": b_proj}
by_hand = {"x": dx, "w_fc": dw_fc, "b_fc": db_fc, "w_proj": dw_proj, "b_proj": db_proj}
for name, grad in by_hand.items():
    numeric = numeric_grad(lambda: forward()[0], Tensor(inputs[name]), dy)
    check(f"d{name}, finite differences", difference(grad, numeric), 1e-8)

# --------------------------------------------------------------------------------------------------------------------
# npgpt's op: the same arithmetic, compiled, and act made again in the backward

tensors = [Tensor(value, requires_grad=True) for value in inputs.values()]
out = mlp(*tensors)
out.backward(dy)
check("y, npgpt's op", difference(y, out.data), 1e-12)
check("all five gradients, npgpt's op", max(map(difference, by_hand.values(), (t.grad for t in tensors))), 1e-12)

finish()
