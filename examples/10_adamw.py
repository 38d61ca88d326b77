"""10: AdamW, and clipping, by hand.

You will understand why Adam divides a gradient by its usual size, what goes wrong in the first steps without the bias
correction, why the decay stands outside of all this (the W in AdamW), and what clipping saves you from.

The counterpart is npgpt/optim.py, where the same lines run over one flat array.  Next: 11_train.py.
Try: give `adamw` another beta2, 0.999 say, and look at the table of first steps.
"""

import numpy as np
from checks import check, difference

from npgpt import GPT, AdamW, GPTConfig, Tensor
from npgpt.gradcheck import numeric_grad
from npgpt.optim import FlatParameters, clip_scale

rng = np.random.default_rng(10)

# --------------------------------------------------------------------------------------------------------------------
# The whole of it, for one array p of weights with the gradient g.  m and v are running means of g and of g^2, and start at
# 0; t counts the steps from 1.


def adamw(p, g, m, v, t, lr, weight_decay=0.0, beta1=0.9, beta2=0.99, eps=1e-8):
    m = beta1 * m + (1 - beta1) * g  # which way, on average
    v = beta2 * v + (1 - beta2) * g**2  # how large, on average
    m_hat = m / (1 - beta1**t)  # bias correction, see below
    v_hat = v / (1 - beta2**t)
    p = p - lr * weight_decay * p  # decay: towards 0, by the same share for every weight
    p = p - lr * m_hat / (np.sqrt(v_hat) + eps)  # a step of about lr, whatever the size of g
    return p, m, v


# --------------------------------------------------------------------------------------------------------------------
# Why divide by the usual size?  A valley that is a million times as steep across as along: loss = 1/2 sum(steep p^2), so
# the gradient is steep p.  Plain descent must make its steps short enough for the steep direction, p <- (1 - lr steep) p,
# or it is thrown out of the valley: lr < 2 / 1000.  At that rate it takes 1/lr steps and more to get along.

steep = np.array([1000.0, 0.001])


def loss(p):
    return 0.5 * (steep * p**2).sum()


start = np.array([1.0, 1.0])
check("the gradient of the valley, finite differences", difference(steep * start, numeric_grad(lambda: loss(start), Tensor(start), 1.0)), 1e-9)
plain, adam, m, v = start, start, np.zeros(2), np.zeros(2)
print("\nstep   plain descent          AdamW")
for t in range(1, 301):
    plain = plain - 0.0019 * steep * plain
    adam, m, v = adamw(adam, steep * adam, m, v, t, lr=0.02)
    if t in (1, 10, 100, 300):
        print(f"{t:4}   {plain.round(4)!s:<20}   {adam.round(4)}")
check("the flat direction after 300 steps, AdamW's way to go", abs(adam[1]), 0.05)

# --------------------------------------------------------------------------------------------------------------------
# Why correct the bias?  Let the gradient be g at each step.  From m = 0 the mean has come up to
#
#     m = (1 - beta1) (1 + beta1 + ... + beta1^(t-1)) g = (1 - beta1^t) g,        and v = (1 - beta2^t) g^2,
#
# too small, both of them, and not by the same factor.  Divided by these factors, they are g and g^2.

print("\nsteps of a gradient that stays the same, in units of lr")
print("   t   corrected   not corrected: beta2 = 0.99   beta2 = 0.999")
p, m, v = np.zeros(1), np.zeros(1), np.zeros(1)
steps = []
for t in range(1, 101):
    new, m, v = adamw(p, np.full(1, -0.03), m, v, t, lr=1.0)
    steps.append((new - p)[0])
    p = new
    raw = [(1 - 0.9**t) / np.sqrt(1 - beta2**t) for beta2 in (0.99, 0.999)]
    if t in (1, 2, 5, 10, 30, 100):
        print(f"{t:4} {steps[-1]:11.6f} {raw[0]:30.2f} {raw[1]:15.2f}")
check("corrected, each step is lr", np.abs(np.array(steps) - 1).max(), 1e-6)
