"""AdamW, and clipping, by hand.

You will understand

- why Adam divides a gradient by its usual size,
- what goes wrong in the first steps without the bias correction,
- why the decay stands outside of all this (the W in AdamW),
- what clipping saves you from.

Counterpart: npgpt/optim.py, where the same lines run over one flat array.
Next: 11_train.py, where it is used.
Try it: leave the bias correction out of `adamw` (m_hat = m, v_hat = v), and look at the second table again.

    python examples/10_adamw.py
"""

import numpy as np
from checks import check, difference, finish

from npgpt import GPT, AdamW, GPTConfig, Tensor
from npgpt.gradcheck import numeric_grad
from npgpt.optim import FlatParameters, clip_scale

rng = np.random.default_rng(10)

# --------------------------------------------------------------------------------------------------------------------
# The whole of it, for an array p of weights with the gradient g.  m and v are running means of g and g^2, which start
# at 0; t counts the steps from 1.


def adamw(p, g, m, v, t, lr, weight_decay=0.0, beta1=0.9, beta2=0.99, eps=1e-8):
    m = beta1 * m + (1 - beta1) * g  # which way, on average
    v = beta2 * v + (1 - beta2) * g**2  # how large, on average
    m_hat = m / (1 - beta1**t)  # bias correction, see below
    v_hat = v / (1 - beta2**t)
    p = p - lr * weight_decay * p  # decay: all weights by the same share
    p = p - lr * m_hat / (np.sqrt(v_hat) + eps)  # a step of about lr, whatever the size of g
    return p, m, v


# --------------------------------------------------------------------------------------------------------------------
# Why divide by the usual size?  Think of a valley, a million times as steep across as along: loss = 1/2 sum(steep p^2),
# with the gradient steep p.  Plain descent, p <- (1 - lr steep) p, flies out of it if lr > 2 / 1000; with less than
# that it hardly moves along.  Adam's step is the same both ways.

steep, start = np.array([1000.0, 0.001]), np.array([1.0, 1.0])
numeric = numeric_grad(lambda: 0.5 * (steep * start**2).sum(), Tensor(start), 1.0)
check("the valley's gradient, finite differences", difference(steep * start, numeric), 1e-9)

plain, adam, m, v = start, start, np.zeros(2), np.zeros(2)
print("\nstep   plain descent, lr 0.0019   AdamW, lr 0.02")
for t in range(1, 301):
    plain = plain - 0.0019 * steep * plain
    adam, m, v = adamw(adam, steep * adam, m, v, t, lr=0.02)
    if t in (1, 10, 100, 300):
        print("{:4}   {:11.4f} {:11.4f} {:13.4f} {:9.4f}".format(t, *plain, *adam))
check("AdamW, what is left of the way after 300 steps", np.abs(adam).max(), 1e-3)

# --------------------------------------------------------------------------------------------------------------------
# Why correct the bias?  Let the gradient be g at every step.  Starting at 0, the means have then come to
#
#     m = (1 - beta1) (1 + beta1 + ... + beta1^(t-1)) g = (1 - beta1^t) g,        v = (1 - beta2^t) g^2
#
# so both are too small, and not alike.  Divided by these factors they are g and g^2, from the first step on.

print("\nlength of step t in units of lr, for a gradient that stays the same")
print("   t   corrected   not corrected, beta2 = 0.99   the same, beta2 = 0.999")
p, m, v, error = np.zeros(1), np.zeros(1), np.zeros(1), 0.0
for t in range(1, 101):
    before = p
    p, m, v = adamw(p, np.full(1, -0.03), m, v, t, lr=1.0)
    error = max(error, abs((p - before)[0] - 1))
    if t in (1, 2, 5, 10, 30, 100):
        raw = [(1 - 0.9**t) / np.sqrt(1 - beta2**t) for beta2 in (0.99, 0.999)]
        print(f"{t:4} {(p - before)[0]:11.3f} {raw[0]:29.3f} {raw[1]:25.3f}")
check("corrected, each step is one lr long", error, 1e-6)

# --------------------------------------------------------------------------------------------------------------------
# Why is the decay not a part of the gradient, as it is in plain descent?  There it would be divided by sqrt(v) too, and
# weights with large gradients would hardly decay.  To see the decay alone, two runs get the same gradients, nothing but
# noise; one starts at 1 and one at 0.  Their distance is what is left of the 1.

lr, weight_decay, T = 0.01, 0.1, 500
noise = rng.normal(size=(T, 2)) * np.array([10.0, 0.1])  # a weight with large gradients, and one with small ones
left = {}
for kind in ("decoupled", "in the gradient"):
    ends = []
    for p in (np.ones(2), np.zeros(2)):
        m, v = np.zeros(2), np.zeros(2)
        for t in range(1, T + 1):
            if kind == "decoupled":
                p, m, v = adamw(p, noise[t - 1], m, v, t, lr, weight_decay)
            else:
                p, m, v = adamw(p, noise[t - 1] + weight_decay * p, m, v, t, lr)
        ends.append(p)
    left[kind] = ends[0] - ends[1]
print(f"\nleft of the weights after {T} steps of decay    gradients of 10   gradients of 0.1")
for kind, (large, small) in left.items():
    print(f"{kind:<42} {large:19.3f} {small:18.3f}")
check("decoupled, (1 - lr weight_decay)^T of each is left", difference(left["decoupled"], np.full(2, 0.999**T)), 1e-12)

# --------------------------------------------------------------------------------------------------------------------
# Clipping.  Taken together, the gradients of all weights are one long arrow; if it is too long, it is made shorter, and
# keeps its direction.  One bad batch would otherwise stay in v for 1 / (1 - beta2) steps, and stop all learning there.


def clipped(gradients, longest):
    norm = np.sqrt(sum((g**2).sum() for g in gradients))
    return [g * min(1.0, longest / (norm + 1e-6)) for g in gradients]


g = rng.normal(size=(200, 1)) * 0.5
g[50] = 1000.0  # the bad batch
print("\nlengths of steps, in units of lr:  before   the bad one   the 20 after it")
for longest in (np.inf, 1.0):
    p, m, v, path = np.zeros(1), np.zeros(1), np.zeros(1), [0.0]
    for t in range(1, 201):
        p, m, v = adamw(p, *clipped([1 + g[t - 1]], longest), m, v, t, lr=1.0)
        path.append(p[0])
    moves = np.abs(np.diff(path))
    print(f"clipped at {longest:<24} {moves[30:50].mean():6.2f} {moves[50]:13.2f} {moves[71:91].mean():17.2f}")

pair = [rng.normal(size=(3, 4)), rng.normal(size=5)]
short = clipped(pair, 0.1)
scale = clip_scale(np.sqrt(sum((g**2).sum() for g in pair)), 0.1)
check("clipped, the length", abs(np.sqrt(sum((g**2).sum() for g in short)) - 0.1), 1e-6)
check("clipped, npgpt's factor", max(difference(a, scale * b) for a, b in zip(short, pair, strict=True)), 1e-14)

# --------------------------------------------------------------------------------------------------------------------
# npgpt's AdamW, on the weights of a GPT.  It does not ask where gradients come from, so here they are made up.
# Matrices decay; biases and the scales of layer norms do not.

model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8, bias=True), dtype=np.float64)
by_hand = {name: [parameter.data.copy(), 0.0, 0.0] for name, parameter in model.named_parameters()}  # p, m, v
flat = FlatParameters(model)
optimizer = AdamW(flat, weight_decay=0.1)
for t in range(1, 11):
    gradients = dict(flat.views(flat.grads))  # name -> its place in the flat array
    for g in gradients.values():
        g[...] = rng.normal(size=g.shape) * 10.0 ** rng.uniform(-4, 0)
    scale = clip_scale(np.linalg.norm(flat.grads), 1.0)
    for name, g in zip(gradients, clipped(gradients.values(), 1.0), strict=True):
        p, m, v = by_hand[name]
        by_hand[name] = adamw(p, g, m, v, t, lr=0.01, weight_decay=0.1 if p.ndim == 2 else 0.0)
    optimizer.step += 1
    optimizer.update(flat.grads, 0.01, scale)
worst = max(difference(by_hand[name][0], parameter.data) for name, parameter in model.named_parameters())
check("a GPT's weights after ten steps of npgpt's AdamW", worst, 1e-12)

finish()
