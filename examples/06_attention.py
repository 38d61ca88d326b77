"""Causal attention: each position asks those before it, and the gradient goes back the way the answers came.

You will understand

- every array of a multi-head attention, and its shape, there and back,
- the causal mask: what it does to the scores, and why its gradient needs no extra line,
- the backward of a softmax that stands alone, without its table,
- how the backward makes p again from lse, and what dropout of the weights changes in it.

Counterpart: npgpt/ops/attention.py.  Its kernels keep no (T, T) matrix, but the reference in it is what you see here.
Next: 07_mlp.py, the other half of a transformer's block.
Try it: take the line with the mask out of `forward`.  Which check notices?  Would finite differences have?

    python examples/06_attention.py
"""

import numpy as np
from checks import check, difference, finish

from npgpt import Tensor
from npgpt.gradcheck import numeric_grad
from npgpt.kernels.masks import Dropout
from npgpt.ops import attention
from npgpt.ops.attention import causal_attention
from npgpt.ops.primitives import where

rng = np.random.default_rng(0)
np.set_printoptions(precision=2, suppress=True)

B, T, n_head, hs = 2, 5, 3, 4  # sequences, positions, heads, numbers in a head; C = n_head hs = 12
scale = hs**-0.5  # q . k of independent numbers of size 1 has a variance of hs: this brings the scores back to size 1


def show(name, array, what=""):
    print(f"{name:<4} {array.shape!s:<16}{what}")


# --------------------------------------------------------------------------------------------------------------------
# Forward.  A position t has a query (what am I looking for), and each position j a key (what have I got) and a value
# (what I say).  How much t listens to j is p_tj, a softmax over the scores q_t . k_j:
#
#     s = scale q k^T          p = softmax(s) over j = 0 .. t          y = p v
#
# The mask: position t is trained to predict what comes at t + 1, so it must not see it.  A score of minus infinity
# becomes a weight of e^-inf = 0.

mask = np.tri(T, dtype=bool)  # (T, T) True where query t (a row) may look at key j (a column)


def split_heads(x):
    """(B, T, C) -> (B, n_head, T, hs): C numbers are n_head heads of hs each, and a head is a matrix (T, hs)."""
    return x.reshape(B, T, n_head, hs).transpose(0, 2, 1, 3)


def merge_heads(x):
    """(B, n_head, T, hs) -> (B, T, C), the way back."""
    return x.transpose(0, 2, 1, 3).reshape(B, T, n_head * hs)


def forward(qkv):
    """qkv (B, T, 3C), queries, keys and values side by side -> y (B, T, C), and what the backward will want to know."""
    q, k, v = (split_heads(part) for part in np.split(qkv, 3, axis=-1))
    s = scale * q @ k.swapaxes(-1, -2)
    s = np.where(mask, s, -np.inf)
    e = np.exp(s - s.max(axis=-1, keepdims=True))  # (05_cross_entropy.py: the largest score changes no p)
    p = e / e.sum(axis=-1, keepdims=True)
    y = p @ v
    return merge_heads(y), q, k, v, p


qkv = rng.normal(size=(B, T, 3 * n_head * hs))
y, q, k, v, p = forward(qkv)
print("forward")
show("qkv", qkv, "(B, T, 3C)")
show("q", q, "(B, n_head, T, hs), and so are k and v")
show("p", p, "softmax of scale q k^T: (B, n_head, T, hs) (B, n_head, hs, T)")
show("y", y, "p v, heads side by side: (B, T, C)")
print("\nmask\n", mask.astype(int), "\np of the first sequence, first head: who listens to whom\n", p[0, 0], "\n")

later = qkv.copy()
later[:, 3:] += 1  # another future must not change what has been said
check("each row of p sums to 1", np.abs(p.sum(axis=-1) - 1).max(), 1e-12)
check("y before position 3 knows nothing of what follows", difference(forward(later)[0][:, :3], y[:, :3]), 1e-12)

# --------------------------------------------------------------------------------------------------------------------
# Backward, the last line first.  y = p v is a product, for each head, so ask as in 03_linear.py: in which products is
# each factor used?  With d for one of the hs numbers of a head, y_td = sum_j p_tj v_jd, so
#
#     p_tj  in y_td, for every d:      dp_tj = sum_d dy_td v_jd        (T, hs) (hs, T) -> (T, T)      dp = dy v^T
#     v_jd  in y_td, for every t:      dv_jd = sum_t p_tj dy_td        (T, T) (T, hs) -> (T, hs)      dv = p^T dy
#
# and in the same way for s_tj = scale sum_d q_td k_jd, whose scale stays as a factor:
#
#     q_td  in s_tj, for every j:      dq_td = scale sum_j ds_tj k_jd                                 dq = scale ds k
#     k_jd  in s_tj, for every t:      dk_jd = scale sum_t ds_tj q_td                                 dk = scale ds^T q
#
# Between them stands the softmax.  For one row, d p_i / d s_j = p_i ([i = j] - p_j) (05_cross_entropy.py), so
#
#     ds_j = sum_i dp_i p_i ([i = j] - p_j) = p_j dp_j - p_j sum_i dp_i p_i = p_j (dp_j - sum_i dp_i p_i)
#
# In words: a score's gradient is positive, and going downhill lowers the score, if its dp is above the average that the
# row has under p.  No (T, T) table per row, just that average.  And where the mask made p = 0, ds is 0 too, whatever dp
# is: nothing else is to be done for it.


def backward(dy, q, k, v, p):
    dy = split_heads(dy)  # the heads were only put in another place, so their gradients are put back
    # y = p @ v
    dp = dy @ v.swapaxes(-1, -2)
    dv = p.swapaxes(-1, -2) @ dy
    # p = softmax(s)
    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))
    # s = scale * q @ k.T
    dq = scale * ds @ k
    dk = scale * ds.swapaxes(-1, -2) @ q
    return dq, dk, dv, dp, ds


dy = rng.normal(size=y.shape)
dq, dk, dv, dp, ds = backward(dy, q, k, v, p)
dqkv = np.concatenate([merge_heads(grad) for grad in (dq, dk, dv)], axis=-1)
print("\nbackward")
show("dy", dy, "(B, T, C), to be split into heads")
show("dp", dp, "dy v^T: (B, n_head, T, hs) (B, n_head, hs, T)")
show("dv", dv, "p^T dy: (B, n_head, T, T) (B, n_head, T, hs)")
show("ds", ds, "like p, and 0 where p is 0")
show("dq", dq, "scale ds k: (B, n_head, T, T) (B, n_head, T, hs)")
show("dk", dk, "scale ds^T q: the same")
show("dqkv", dqkv, "(B, T, 3C), dq, dk and dv side by side")

# Who learns when position 2 is told something?  Its own query, and the keys and values that it saw: the mask again.
# (Position 0 alone can look at nothing but itself: its p is 1 whatever its score, and its query never learns.)
only_2 = np.zeros_like(dy)
only_2[:, 2] = dy[:, 2]
print("\nlargest gradient at positions    0    1    2    3    4   if dy is that of position 2 alone")
reach = [np.abs(grad).max(axis=(0, 1, 3)) for grad in backward(only_2, q, k, v, p)[:3]]
for name, row in zip(("dq", "dk", "dv"), reach, strict=True):
    print(f"{name:<28}", *(f"{value:4.2f}" for value in row))
print()
check("nothing reaches what position 2 did not see", np.max([row[3:] for row in reach]), 0)
check("each row of ds sums to 0", np.abs(ds.sum(axis=-1)).max(), 1e-12)

# --------------------------------------------------------------------------------------------------------------------
# Two things more, which npgpt's op has, and so the exercise.
#
# lse.  The backward needs p, which is T numbers for each query.  The forward keeps one in their place, the log-sum-exp
# of the query's scores: lse_t = log sum_j e^s_tj.  The backward makes the scores again, and p of both, as in
# 05_cross_entropy.py: p_tj = e^(s_tj - lse_t).
#
# Dropout.  While training, each weight is set to 0 with probability p_drop, at random, and those that are kept are
# divided by 1 - p_drop, so that their mean stays what it was.  So p is multiplied by `drop`, whose entries are 0 or
# 1 / (1 - p_drop), and which depends on no input.  The backward uses the same `drop`:
#
#     y = a v          da = dy v^T          dv = a^T dy
#     a = p drop       dp = da drop
#
# From dp on nothing changes: the softmax made p, and knows nothing of a.


def forward_dropped(qkv, drop):
    q, k, v = (split_heads(part) for part in np.split(qkv, 3, axis=-1))
    s = np.where(mask, scale * q @ k.swapaxes(-1, -2), -np.inf)
    m = s.max(axis=-1)
    lse = m + np.log(np.exp(s - m[..., None]).sum(axis=-1))  # (B, n_head, T)
    p = np.exp(s - lse[..., None])
    a = p * drop
    return merge_heads(a @ v), lse, p


def backward_dropped(dy, qkv, lse, drop):
    q, k, v = (split_heads(part) for part in np.split(qkv, 3, axis=-1))
    s = np.where(mask, scale * q @ k.swapaxes(-1, -2), -np.inf)
    p = np.exp(s - lse[..., None])
    dy = split_heads(dy)
    # y = a @ v
    da = dy @ v.swapaxes(-1, -2)
    dv = (p * drop).swapaxes(-1, -2) @ dy
    # a = p * drop
    dp = da * drop
    # p = softmax(s), and so on
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True))
    return np.concatenate([merge_heads(x) for x in (scale * ds @ k, scale * ds.swapaxes(-1, -2) @ q, dv)], axis=-1)


p_drop = 0.4
drop = (rng.random(p.shape) >= p_drop) / (1 - p_drop)
_, lse, p_again = forward_dropped(qkv, drop)
check("lse and npgpt's", difference(lse, attention.attention_forward_ref(qkv, n_head, Dropout())[1]), 1e-12)
check("p made again from lse", difference(p_again, p), 1e-12)
measured = numeric_grad(lambda: forward_dropped(qkv, drop)[0], Tensor(qkv), dy)
check("dqkv with dropout and finite differences", difference(backward_dropped(dy, qkv, lse, drop), measured), 1e-8)
check("split_heads and npgpt's", difference(split_heads(dy), attention.split_heads(dy, n_head)), 0)

# --------------------------------------------------------------------------------------------------------------------
# The proof


def composed(qkv):
    """`forward` in npgpt's operators, whose backward the engine finds by itself."""
    C = n_head * hs
    q, k, v = (split_heads(qkv[:, :, i * C : (i + 1) * C]) for i in range(3))
    e = where(mask, scale * q @ k.transpose(0, 1, 3, 2), -np.inf).exp()
    return merge_heads(e / e.sum(axis=-1, keepdims=True) @ v)


measured = numeric_grad(lambda: forward(qkv)[0], Tensor(qkv), dy)
for name, grad, truth in zip(("dq", "dk", "dv"), (dq, dk, dv), np.split(measured, 3, axis=-1), strict=True):
    check(f"{name} and finite differences", difference(merge_heads(grad), truth), 1e-8)
for title, f in (("composed", composed), ("npgpt's attention", lambda qkv: causal_attention(qkv, n_head))):
    x = Tensor(qkv, requires_grad=True)
    out = f(x)
    out.backward(dy)
    check(f"y and {title}", difference(y, out.data), 1e-12)
    check(f"dqkv and {title}", difference(dqkv, x.grad), 1e-12)

finish()
