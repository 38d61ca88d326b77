"""Broadcasting: NumPy copies numbers to where they are needed, and the gradient of a copy is a sum.

You will understand

- what the gradient of x + b is when b was a single row and x has many,
- why copying and summing are each other's backward,
- why a gradient always has the shape of the thing whose gradient it is, and how to give it that shape.

Counterpart: `unbroadcast` in npgpt/tensor.py, which every operator of npgpt's Tensor goes through.
Next: 03_linear.py, where a bias is broadcast over all rows of a batch.
Try it: leave the last sum out of `unbroadcast` (return grad as it is), and say first which shapes will notice.

    python examples/02_broadcasting.py
"""

import numpy as np
from checks import check, difference, finish

from npgpt import Tensor
from npgpt.gradcheck import numeric_grad

rng = np.random.default_rng(0)
np.set_printoptions(precision=2, suppress=True)

# --------------------------------------------------------------------------------------------------------------------
# One row added to every row.  y = x + b:
#
#     x (4, 3), b (3,)       y_ni = x_ni + b_i
#
# x_ni takes part in y_ni alone.  b_i takes part in y_0i, y_1i, y_2i and y_3i: it was *copied* to four places.  A
# gradient is the sum of what comes back from each use (01_chain_rule.py), and here the uses are the rows:
#
#     dx_ni = dy_ni          db_i = sum_n dy_ni

x, b = rng.normal(size=(4, 3)), rng.normal(size=3)
y = x + b
dy = rng.normal(size=y.shape)  # the gradient of the loss with respect to y: whatever comes after has found it
dx = dy
db = dy.sum(axis=0)
print("dy, one row for each copy of b:\n", dy, "\ndb, their sum:\n", db, "\n")

# Nudge each entry of b, and see what sum(dy * y) does.  (Tensor(b) is b's own memory, so that x + b sees the nudge.)
check("db and finite differences", difference(db, numeric_grad(lambda: x + b, Tensor(b), dy)), 1e-8)
check("dx and finite differences", difference(dx, numeric_grad(lambda: x + b, Tensor(x), dy)), 1e-8)

# --------------------------------------------------------------------------------------------------------------------
# Why a sum, once more.  Copying is linear: there is a matrix of zeros and ones, S, with S b = all twelve copies in a
# row.  The gradient of y = S b with respect to b is S^T dy (03_linear.py), and S^T has a one wherever S has one: what S
# copies there and back again, S^T collects.

S = np.array([np.broadcast_to(unit, (4, 3)).reshape(-1) for unit in np.eye(3)]).T  # (12, 3), a column for each b_i
print("\nS^T, which collects four of the twelve numbers for each entry of b:\n", S.T.astype(int), "\n")
check("S b is b, broadcast", difference(S @ b, np.broadcast_to(b, (4, 3)).reshape(-1)), 1e-12)
check("S^T dy is db", difference(S.T @ dy.reshape(-1), db), 1e-12)

# The same matrix, transposed, is the op y = x.sum(axis=0); so its backward is S: it copies dy to all rows of x.
dtotal = rng.normal(size=3)
dx = np.broadcast_to(dtotal, x.shape)
check("sum's backward copies", difference(dx, numeric_grad(lambda: x.sum(axis=0), Tensor(x), dtotal)), 1e-8)
dx = np.broadcast_to(dtotal / len(x), x.shape)
check("mean's backward copies 1/n", difference(dx, numeric_grad(lambda: x.mean(axis=0), Tensor(x), dtotal)), 1e-8)

# --------------------------------------------------------------------------------------------------------------------
# All of NumPy's broadcasting.  It lines shapes up at their *last* axis, and copies along an axis that is missing on the
# left, or that has length 1 where the other operand has more.  So the gradient is summed over just these axes.


def unbroadcast(grad, shape):
    """Sum grad, which has the shape of the result, over the axes along which an operand of this shape was copied."""
    added = grad.ndim - len(shape)
    grad = grad.sum(axis=tuple(range(added)))
    stretched = tuple(i for i, n in enumerate(shape) if n == 1)  # (an axis that kept its length 1 has one summand)
    return grad.sum(axis=stretched, keepdims=True)


# Every operator first has the gradient that it would have without broadcasting, and then the sum.  With y = a b:
# da = dy b, summed over the copies of a; with y = a / b: da = dy / b, and db = -dy a / b^2.
OPERATORS = {
    "a + b": (lambda a, b: a + b, lambda dy, a, b: (dy, dy)),
    "a * b": (lambda a, b: a * b, lambda dy, a, b: (dy * b, dy * a)),
    "a / b": (lambda a, b: a / b, lambda dy, a, b: (dy / b, -dy * a / b**2)),
}
print()
for a_shape, b_shape in [((4, 3), (3,)), ((4, 3), (4, 1)), ((2, 1, 3), (4, 1)), ((2, 4, 3), ())]:
    print(f"a {a_shape}, b {b_shape}: result {np.broadcast_shapes(a_shape, b_shape)}")
    from_differences, from_engine = [], []
    for f, backward in OPERATORS.values():
        a, b = (Tensor(rng.uniform(1, 2, shape), requires_grad=True) for shape in (a_shape, b_shape))
        y = f(a, b)
        dy = rng.normal(size=y.shape)
        y.backward(dy)
        for x, grad in zip((a, b), backward(dy, a.data, b.data), strict=True):
            dx = unbroadcast(grad, x.shape)
            measured = numeric_grad(lambda f=f, a=a, b=b: f(a.data, b.data), x, dy)
            from_differences.append(difference(dx, measured))
            from_engine.append(difference(dx, x.grad))
    check("+ * / and finite differences, the worst of all", np.max(from_differences), 1e-8)
    check("+ * / and npgpt's engine, the worst of all", np.max(from_engine), 1e-12)

# --------------------------------------------------------------------------------------------------------------------
# The price.  Predictions (4, 1) minus targets (4,) should be an error message, but they are all 16 differences: all
# predictions meet all targets.  The gradient still has the right shape; only that it pulls every prediction towards the
# *mean* of the targets.  Nothing fails, and the model learns to say 3.

prediction, target = np.zeros((4, 1)), np.array([1.0, 2.0, 3.0, 6.0])
for title, t in (("targets (4, 1)", target.reshape(4, 1)), ("targets (4,)", target)):
    error = prediction - t
    dprediction = unbroadcast(2 * error / error.size, prediction.shape)  # loss = mean(error^2)
    print(f"\n{title}: errors {error.shape}, gradient of the predictions {dprediction[:, 0]}", end="")
print("\n")
check("the mistake pulls to the mean", difference(dprediction, 2 / 4 * (prediction - target.mean())), 1e-12)

finish()
