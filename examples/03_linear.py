"""A linear layer and its three matrix products, where nearly all of the time goes that it takes to train a GPT.

You will understand

- where dx = dy w and dw = dy^T x come from, without a rule to remember,
- why the backward costs twice as much as the forward,
- what a gradient of a weight looks like: one outer product for each row of the batch.

Counterpart: npgpt/ops/linear.py.  As there and in PyTorch, w has a row for each output: (O, I).
Next: 04_layernorm.py, where the entries of a row depend on each other.
Try it: write dy @ w.T for dx in `backward`.  Who stops you?  And who, if w has the shape (3, 3)?

    python examples/03_linear.py
"""

import numpy as np
from checks import check, difference, finish

from npgpt import Tensor
from npgpt.gradcheck import numeric_grad
from npgpt.ops.linear import linear

rng = np.random.default_rng(0)
np.set_printoptions(precision=2, suppress=True)

# --------------------------------------------------------------------------------------------------------------------
# Forward.  N rows of I numbers each become N rows of O numbers, each row on its own:
#
#     y_no = sum_i x_ni w_oi + b_o            x (N, I), w (O, I), b (O,) -> y (N, O)


def forward(x, w, b):
    return x @ w.T + b  # (N, I) (I, O) -> (N, O), and b is broadcast over the rows


# --------------------------------------------------------------------------------------------------------------------
# Backward.  y is a sum of products x w.  In a product, the gradient of one factor is the other factor, times what comes
# back from above, dy; and a factor that is used in several products gets their sum.  So ask of each factor: in which
# products is it used?
#
#     x_ni  in y_no, for every o:      dx_ni = sum_o dy_no w_oi        (N, O) (O, I) -> (N, I)      dx = dy w
#     w_oi  in y_no, for every n:      dw_oi = sum_n dy_no x_ni        (O, N) (N, I) -> (O, I)      dw = dy^T x
#     b_o   in y_no, for every n:      db_o  = sum_n dy_no
#
# Three products of the same three letters: forward sums over i, dx over o, dw over n.  Each takes N O I multiplications
# and as many additions, so a forward is 2 N O I FLOPs, a backward 4 N O I, and a step of training 6 for each weight and
# row.


def backward(dy, x, w):
    dx = dy @ w
    dw = dy.T @ x
    db = dy.sum(axis=0)
    return dx, dw, db


x, w, b = rng.normal(size=(2, 3)), rng.normal(size=(4, 3)), rng.normal(size=4)  # N = 2, I = 3, O = 4
y = forward(x, w, b)
dy = rng.normal(size=y.shape)  # the gradient of the loss with respect to y
dx, dw, db = backward(dy, x, w)
print(f"forward     x  {x.shape} @ w.T {w.T.shape} -> y  {y.shape}")
print(f"backward   dy  {dy.shape} @ w   {w.shape} -> dx {dx.shape}")
print(f"           dy.T {dy.T.shape} @ x  {x.shape} -> dw {dw.shape}    each 2 N O I = {2 * x.size * len(w)} FLOPs\n")

# The three sums exactly as they stand above, letter by letter.
check("y is the sum over i", difference(y, np.einsum("ni,oi->no", x, w) + b), 1e-12)
check("dx is the sum over o", difference(dx, np.einsum("no,oi->ni", dy, w)), 1e-12)
check("dw is the sum over n", difference(dw, np.einsum("no,ni->oi", dy, x)), 1e-12)

# --------------------------------------------------------------------------------------------------------------------
# What dw looks like.  Its sum over n is one outer product per row, (O, 1) times (1, I): "these outputs should move this
# way" times "these inputs were there to move them".  Weights of an input that was 0 do not move.

parts = [np.outer(dy_n, x_n) for dy_n, x_n in zip(dy, x, strict=True)]
print("\ndw is the sum of", *parts, f"of rank {np.linalg.matrix_rank(dw)}: one for each row of the batch\n", sep="\n")
check("dw is a sum of outer products", difference(dw, sum(parts)), 1e-12)

# --------------------------------------------------------------------------------------------------------------------
# The proof: nudge each entry, and see what sum(dy * y) does.  (Tensor(x) is x's own memory: `forward` sees the nudge.)

for name, array, ours in (("dx", x, dx), ("dw", w, dw), ("db", b, db)):
    measured = numeric_grad(lambda: forward(x, w, b), Tensor(array), dy)
    check(f"{name} and finite differences", difference(ours, measured), 1e-8)

# npgpt's op, and `forward` itself with npgpt's Tensors: @, .T and + know their own backward.
for title, f in (("npgpt's linear", linear), ("npgpt's engine", forward)):
    tensors = [Tensor(array, requires_grad=True) for array in (x, w, b)]
    out = f(*tensors)
    out.backward(dy)
    pairs = zip((y, dx, dw, db), (out.data, *(tensor.grad for tensor in tensors)), strict=True)
    check(f"y, dx, dw, db and {title}", np.max([difference(*pair) for pair in pairs]), 1e-12)

# --------------------------------------------------------------------------------------------------------------------
# What shapes cannot see.  They leave just one way to write the products, as long as N, O and I differ.  With a square w
# there are two, and the wrong one runs without a word; that is why the tests of npgpt give each axis its own length.

square = rng.normal(size=(3, 3))
dy = rng.normal(size=(2, 3))
right, wrong = dy @ square, dy @ square.T
print(f"\nsquare w: dy @ w and dy @ w.T both have shape {wrong.shape}, but differ by {difference(wrong, right):.0%}\n")
measured = numeric_grad(lambda: x @ square.T, Tensor(x), dy)
check("square w: dx and finite differences", difference(right, measured), 1e-8)

finish()
