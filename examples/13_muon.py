"""Muon, by hand: the step of a matrix, with all its directions made equally long.

You will understand

- which step of a matrix lowers a loss most,
- how a few products of matrices give that step (Newton-Schulz),
- what Nesterov's momentum looks ahead to,
- why only matrices get such a step, and how long it is.

Counterpart: npgpt/muon.py, where the same runs for the matrices of a GPT's blocks.  Training takes it by default.
Next: 14_tokens.py, where a text becomes numbers.
Try it: let Q be np.eye(8), so that the valley lies straight.  Who is better off now, Adam or Muon, and why?
(The check below that table then says WRONG, as it should.)

    python examples/13_muon.py
"""

import numpy as np
from checks import check, difference, finish

from npgpt import GPT, GPTConfig
from npgpt.muon import Muon
from npgpt.optim import FlatParameters

rng = np.random.default_rng(13)
np.set_printoptions(precision=3, suppress=True)

# --------------------------------------------------------------------------------------------------------------------
# What a matrix does.  W (m, n) turns an input x (n,) into an output W x (m,).  Every matrix G of that shape is a sum
#
#     G = s_1 u_1 v_1^T + s_2 u_2 v_2^T + ...       s_1 >= s_2 >= ... >= 0
#
# of min(m, n) matrices np.outer(u_i, v_i), each with a factor.  The v_i have length 1 and stand at right angles to each
# other, and so do the u_i.  So an input along v_i comes out along u_i, and s_i times as long; no input grows more than
# s_1 times.  The s_i are the singular values of G.  With the u_i as columns of U, the v_i as columns of V, and the s_i
# on the diagonal of S, the sum is G = U S V^T, the singular value decomposition.  (A theorem says that there is one.)
#
# Let G be the gradient for W.  Usually a few of its s_i are far larger than the rest.  So a step along G changes what W
# does to v_1, and hardly what it does to the others.  Muon goes along U V^T: the same directions, but each s_i is 1.


def orthogonal(G):
    """U V^T, by NumPy's decomposition."""
    U, _, Vt = np.linalg.svd(G, full_matrices=False)  # Vt is V^T
    return U @ Vt


def singular_values(G):
    return np.linalg.svd(G, compute_uv=False)


G = rng.normal(size=(4, 4)) * [10, 3, 1, 0.3] @ rng.normal(size=(4, 6))  # some directions large, some small
print("singular values of G", singular_values(G), "  of U V^T", singular_values(orthogonal(G)), "\n")

# Why is that a good step?  In a step to W - lr D, each W_ij moves by -lr D_ij, and with it the loss by -lr G_ij D_ij.
# So for small lr the loss falls by lr <G, D>, where <G, D> is the sum of all G_ij D_ij.  A larger D gains more, so its
# size needs a limit.  What matters is how far a step moves the outputs.  So let D be any matrix that makes no input
# longer: |D x| <= |x|, so no singular value is above 1.  As <u v^T, D>, the sum of all u_j v_k D_jk, is u^T D v,
#
#     <G, D> = sum_i s_i <u_i v_i^T, D> = sum_i s_i u_i^T D v_i <= sum_i s_i
#
# for u_i^T (D v_i) is at most the product of two lengths, |u_i| = 1 and |D v_i| <= 1.  D = U V^T reaches this bound: it
# takes v_i to u_i, and u_i^T u_i = 1.  No other D gains more.  (If the limit is |D_ij| <= 1 for each number, the best D
# is sign(G); Adam's step is about that, see 10_adamw.py.  That Muon's limit trains better is experience, not proved.)

gains = {}
for title, D in {"G": G, "sign(G)": np.sign(G), "noise": rng.normal(size=G.shape), "U V^T": orthogonal(G)}.items():
    gains[title] = (G * D).sum() / singular_values(D).max()  # divided by its largest, D makes no input longer
    print(f"D = {title:<8} as large as it may be: <G, D> = {gains[title]:7.2f}")
best = gains.pop("U V^T")
check("U V^T gains the sum of all s_i", difference(best, singular_values(G).sum()), 1e-12)
check("the most that another one gains, as a share of it", max(gains.values()) / best, 1)

# --------------------------------------------------------------------------------------------------------------------
# Newton-Schulz.  To decompose every matrix at every step is slow.  But a few products are enough.  Let X = U S V^T.
# Length 1 and right angles mean U^T U = I and V^T V = I, so the inner factors vanish:
#
#     X X^T X = U S V^T  V S U^T  U S V^T = U S^3 V^T                  X X^T X X^T X = U S^5 V^T
#
# So a X + b X X^T X + c X X^T X X^T X is U p(S) V^T: each singular value s becomes p(s) = a s + b s^3 + c s^5.  We want
# a p that brings every s > 0 to 1 when it is repeated.  Newton's method for f(s) = s^-2 - 1 = 0 is one:
#
#     s <- s - f(s) / f'(s) = s + (s^-2 - 1) s^3 / 2 = 1.5 s - 0.5 s^3
#
# (For s^2 - 1 = 0 it would divide by s, which products cannot do.)  It arrives at 1 exactly, but a small s grows only
# 1.5 times in a step.  Muon's a, b, c were searched for by computer: a small s grows 3.4445 times, and none gets far
# above 1.  In return, s never settles: once near 1, it stays between 0.68 and 1.21.

a, b, c = 3.4445, -4.7750, 2.0315


def quintic(s):
    return a * s + b * s**3 + c * s**5


for title, p in (("1.5 s - 0.5 s^3", lambda s: 1.5 * s - 0.5 * s**3), ("a s + b s^3 + c s^5", quintic)):
    s = np.array([0.0001, 0.002, 0.01, 0.1, 0.5, 1, 1.3])
    print(f"\n{title:<20}" + "".join(f"{value:10}" for value in s))
    for step in range(1, 6):
        s = p(s)
        print(f"after step {step}        " + "".join(f"{value:10.3g}" for value in s))

s = np.linspace(0.002, 1, 100_000)
for _ in range(5):
    s = quintic(s)
check("after 5 steps, the distance of s from 1, for all s from 0.002 to 1 before", np.abs(s - 1).max(), 0.4)

# The last column warns: an s above 1.26 runs away.  So X is first divided by its norm, the root of the sum of all
# X_ij^2.  No s_i is larger than that, for it is also the root of the sum of all s_i^2: the diagonal of X X^T adds up to
# the sum of all X_ij^2, but X X^T is a sum of s_i^2 u_i u_i^T as well, whose diagonals add up to s_i^2.


def newton_schulz(X, steps=5):
    """X (m, n) -> nearly U V^T: its singular values are about 1, except those that were tiny beside the others."""
    X = X / (np.sqrt((X**2).sum()) + 1e-7)  # (the 1e-7 is for a gradient of 0)
    for _ in range(steps):
        A = X @ X.T  # (m, m)
        X = a * X + (b * A + c * A @ A) @ X  # A X is X X^T X
    return X


U, s, Vt = np.linalg.svd(G, full_matrices=False)
s = s / (np.sqrt((s**2).sum()) + 1e-7)
print("\nsingular values of G / norm", s, end="")
for _ in range(5):
    s = quintic(s)
print("  and after five steps", s)
check("newton_schulz(G) and U p(p(p(p(p(S))))) V^T", difference(newton_schulz(G), (U * s) @ Vt), 1e-9)

# If m > n, X^T X (n, n) is cheaper than X X^T (m, m).  And X^T = V S U^T leads to V U^T, which is (U V^T)^T.  So npgpt
# transposes X before and after.  Nor does it need X in each step: with F = a I + b A + c A A, X becomes F X, and A
# becomes F A F.  So npgpt multiplies the five F with each other, and X only with their product.

tall = rng.normal(size=(9, 4))
check("a tall matrix, and by its transpose", difference(newton_schulz(tall.T).T, newton_schulz(tall)), 1e-12)

# --------------------------------------------------------------------------------------------------------------------
# Momentum.  The gradient of one batch is noisy, and U V^T makes faint noise as long as all else.  So Muon takes the
# running mean m of the gradients (10_adamw.py).  But a mean is late: it tells where the slope was.  Nesterov looks one
# step ahead: to what m would become if the same gradient came once more.  (Adam has to correct a young mean, which is
# too small.  Here its length does not matter: newton_schulz divides by the norm.)


def nesterov(m, g, mu):
    m = mu * m + (1 - mu) * g
    return m, mu * m + (1 - mu) * g  # the mean, and the look ahead


# In m, the gradient of k steps ago has the weight (1 - mu) mu^k: it came with 1 - mu, and was multiplied by mu k times.
# The look ahead multiplies all of these by mu once more, and adds 1 - mu to the newest: almost twice its weight.

mu, n = 0.95, 40
m = np.zeros(n)
for g in np.eye(n):  # gradient t is 1 at place t and 0 elsewhere: so m lists the weights, the newest last
    m, ahead = nesterov(m, g, mu)
weights = (1 - mu) * mu ** np.arange(n)[::-1]
print("\nweights of the last five gradients: in the mean", m[-5:], "  in the look ahead", ahead[-5:])
check("weights in the mean", difference(m, weights), 1e-12)
check("weights in the look ahead", difference(ahead, mu * weights + (1 - mu) * g), 1e-12)  # g is still the newest

# What it is good for: take loss = 1/2 p^2, with the gradient p.  With the mean, p swings past 0; with the look ahead,
# less so.

print("\np after step  ", *(f"{t:6}" for t in range(0, 121, 15)))
for title, looks_ahead in (("the mean", False), ("the look ahead", True)):
    p, m, path = 1.0, 0.0, [1.0]
    for _ in range(120):
        m, ahead = nesterov(m, p, mu)
        p = p - 0.5 * (ahead if looks_ahead else m)
        path.append(p)
    print(f"{title:<14} ", *(f"{value:6.2f}" for value in path[::15]))

# --------------------------------------------------------------------------------------------------------------------
# The whole of it, for a matrix W with the gradient g.  The root in it is explained below; for a square W it is 1.


def muon(W, g, m, lr, mu=0.95):
    m, ahead = nesterov(m, g, mu)
    rows, columns = W.shape
    return W - lr * np.sqrt(max(1, rows / columns)) * newton_schulz(ahead), m


# The valley of 10_adamw.py was much steeper across than along.  Here is one that lies askew.  W (8, 8) should become 0.
# The loss is 1/2 <W, W H> with a symmetric H, so its gradient is W H.  H multiplies 8 directions, the columns of Q, by
# 1 .. 0.0001: the steep and the flat ones.  Each number of W is a mix of all of these, and Adam, which looks at each
# number alone, cannot tell them apart.  Muon sees directions, and steps as far along the flat ones as along the steep
# ones.  (Nesterov is the look ahead alone.  Each has the best of four learning rates, and lets it fall to 0 in the
# end.)

Q = np.linalg.qr(rng.normal(size=(8, 8)))[0]  # columns of length 1 at right angles
H = Q * np.logspace(0, -4, 8) @ Q.T
start = rng.normal(size=(8, 8))


def valley(method, lr, steps=300):
    W, m, v = start, np.zeros((8, 8)), np.zeros((8, 8))
    for t in range(1, steps + 1):
        g, rate = W @ H, lr * (1 - t / steps)
        if method == "Muon":
            W, m = muon(W, g, m, rate)
        elif method == "Adam":  # 10_adamw.py
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
            W = W - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
        else:
            m, ahead = nesterov(m, g, mu)
            W = W - rate * ahead
    return np.linalg.norm(W @ Q, axis=0) / np.linalg.norm(start @ Q, axis=0)


left = {}
print("\nwhat is left of W after 300 steps in each direction, from the steepest to the flattest")
for method, rates in {"Nesterov": (5, 10, 20, 30), "Adam": (0.1, 0.3, 1, 2), "Muon": (0.05, 0.1, 0.2, 0.4)}.items():
    left[method] = min((valley(method, lr) for lr in rates), key=max)
    print(f"{method:<10}", *(f"{share:8.4f}" for share in left[method]))
check("the most that Muon leaves, as a share of Adam's", left["Muon"].max() / left["Adam"].max(), 0.1)

# --------------------------------------------------------------------------------------------------------------------
# Why matrices only?  A bias has one column, so one direction: its U V^T is g / |g|.  There is nothing to level.
# An embedding is a matrix, but it multiplies nothing: a token looks up one row.  So what matters is how far each row
# moves.  In U V^T that depends on the other rows: those whose gradients are alike share one direction of length 1.

g = np.zeros((64, 4))
g[:61, 0], g[61:, 1:] = 1, np.eye(3)  # 61 tokens have the same gradient, and 3 have one of their own
moves = np.linalg.norm(orthogonal(g), axis=1)
print(f"\nan embedding's step U V^T: the 61 rows that are alike move by {moves[0]:.3f}, the others by {moves[-1]:.3f}")
check("alike rows share a length of 1", np.abs(moves - [*[61**-0.5] * 61, 1, 1, 1]).max(), 1e-12)

# Nothing in an embedding asks for that.  So embeddings, the output layer (GPT-2 has one matrix for both), biases and
# the scales of layer norms get AdamW.  Muon is for the matrices of the blocks.

# --------------------------------------------------------------------------------------------------------------------
# How long is the step?  Let the size of some numbers be the root of the mean of their squares.  An input x (n,) of size
# 1 has the length sqrt(n).  If m > n, U V^T keeps this length and spreads it over m outputs, of size sqrt(n / m).  The
# factor sqrt(m / n) in `muon` brings that to 1.  If m < n, U V^T keeps only m of the n directions of x.  In these, a
# random x has the length sqrt(m), so the m outputs are of size 1 without a factor.  So one learning rate suits matrices
# of all shapes.  It is larger than AdamW's: the step of AdamW has entries of size 1 (times lr), and U V^T smaller ones.

print("\n   m     n   size of its entries   of the outputs   with the factor")
sizes = []
for rows, columns in ((128, 128), (512, 128), (128, 512)):
    D = orthogonal(rng.normal(size=(rows, columns)))
    outputs = D @ rng.normal(size=(columns, 1000))
    entry, size = np.sqrt((D**2).mean()), np.sqrt((outputs**2).mean())
    sizes.append(size * np.sqrt(max(1, rows / columns)))
    print(f"{rows:4} {columns:5} {entry:21.3f} {size:16.3f} {sizes[-1]:17.3f}")
check("size of the outputs with the factor", difference(sizes, np.ones(3)), 0.02)

# --------------------------------------------------------------------------------------------------------------------
# The proof: npgpt's Muon, on the weights of a GPT, with gradients that are made up.  Two things were not said yet.  The
# weights for q, k and v stand in one matrix, c_attn, one below the other, but each of the three gets a step of its own.
# And all weights decay by the same share, as in 10_adamw.py: lr weight_decay, with AdamW's lr, not Muon's.

model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=8, bias=True), dtype=np.float64)
hidden = {name: W for name, W in model.named_parameters() if ".h." in name and W.ndim == 2}
by_hand = {}  # name -> a pair of W and m for each of its matrices
for name, W in hidden.items():
    by_hand[name] = [(part.copy(), 0.0) for part in np.split(W.data, 3 if "c_attn" in name else 1)]
flat, lr = FlatParameters(model), 0.01
optimizer = Muon(flat, rate=5.0, weight_decay=0.1)  # Muon's learning rate is 5 times AdamW's
for _ in range(10):
    flat.grads[...] = rng.normal(size=flat.grads.shape)
    gradients = dict(flat.views(flat.grads))
    for name, pairs in by_hand.items():
        parts = np.split(gradients[name], len(pairs))
        by_hand[name] = [muon(W * (1 - lr * 0.1), g, m, 5.0 * lr) for (W, m), g in zip(pairs, parts, strict=True)]
    optimizer.step += 1
    optimizer.update(flat.grads, lr)
worst = max(difference(np.concatenate([W for W, _ in by_hand[name]]), W.data) for name, W in hidden.items())
check("a GPT's matrices after ten steps of npgpt's Muon", worst, 1e-9)

finish()
