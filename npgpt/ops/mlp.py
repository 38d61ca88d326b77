"""The transformer's MLP: a linear layer to four times the width, GELU, and a linear layer back.

Forward, for N rows x:

    pre = x w_fc^T + b_fc               (N, 4C)
    act = gelu(pre)
    y   = act w_proj^T + b_proj         (N, C)

GELU (Hendrycks and Gimpel 2016) in the form with tanh that GPT-2 uses:

    gelu(z) = z/2 (1 + tanh(u)),        u = k (z + a z^3),   k = sqrt(2/pi),   a = 0.044715

which, with 1/2 (1 + tanh(u)) = 1 / (1 + e^-2u) = s, is simply  gelu(z) = z s.

Backward, from the output to the input, each line undoing one line of the forward:

    dact    = dy w_proj                 dw_proj = dy^T act          db_proj = sum_rows dy
    dpre    = dact gelu'(pre)           (element by element)
    dx      = dpre w_fc                 dw_fc   = dpre^T x          db_fc   = sum_rows dpre

gelu' by the product rule, with s' = 2 s (1 - s) du/dz and du/dz = k (1 + 3 a z^2):

    gelu'(z) = s + z 2 s (1 - s) k (1 + 3 a z^2)

Mind which value goes where: dw_proj needs the value *after* the activation, gelu' the one *before* it.  Only the latter
is kept from the forward; the former is made again from it, which is quicker than to fetch it from far memory.
"""

import math

import numpy as np

from npgpt.kernels.buffers import as_rows, empty
from npgpt.kernels.jit import helper, kernel, replaces
from npgpt.kernels.maths import exp
from npgpt.kernels.matmul import matmul, shared
from npgpt.ops.linear import add_bias, check_linear, linear_backward_ref, linear_forward_ref, sum_rows
from npgpt.tensor import check_dtypes, record

K = math.sqrt(2 / math.pi)
A = 0.044715

# --------------------------------------------------------------------------------------------------------------------
# Reference


def gelu_ref(z):
    return 0.5 * z * (1 + np.tanh(K * (z + A * z**3)))


def gelu_slope_ref(z):
    t = np.tanh(K * (z + A * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * K * (1 + 3 * A * z**2)


def mlp_forward_ref(x, w_fc, b_fc, w_proj, b_proj):
    """x (N, C), w_fc (F, C), b_fc (F,), w_proj (C, F), b_proj (C,) -> y (N, C), pre (N, F)."""
    pre = linear_forward_ref(x, w_fc, b_fc)
    act = gelu_ref(pre)
    y = linear_forward_ref(act, w_proj, b_proj)
    return y, pre


def mlp_backward_ref(dy, x, w_fc, w_proj, pre):
    """dy (N, C), and x, weights, pre of the forward -> dx, dw_fc, db_fc, dw_proj, db_proj."""
    # y = act @ w_proj.T + b_proj
    act = gelu_ref(pre)
    dact, dw_proj, db_proj = linear_backward_ref(dy, act, w_proj)
    # act = gelu(pre)
    dpre = dact * gelu_slope_ref(pre)
    # pre = x @ w_fc.T + b_fc
    dx, dw_fc, db_fc = linear_backward_ref(dpre, x, w_fc)
    return dx, dw_fc, db_fc, dw_proj, db_proj


# --------------------------------------------------------------------------------------------------------------------
# Op


def mlp(x, w_fc, b_fc, w_proj, b_proj):
    """y = gelu(x @ w_fc.T + b_fc) @ w_proj.T + b_proj over the last axis.

    x (..., C), w_fc (F, C), b_fc (F,) or None, w_proj (C, F), b_proj (C,) or None; all of one dtype -> y (..., C).
    Raises ValueError for other shapes, TypeError for other dtypes.
    """
    check_dtypes("mlp", x=x, w_fc=w_fc, b_fc=b_fc, w_proj=w_proj, b_proj=b_proj)
    if (b_fc is None) != (b_proj is None):
        raise ValueError("mlp: give both biases or neither")
    check_linear("mlp", x.shape[-1], w_fc, b_fc, ("c_fc.weight", "c_fc.bias"))
    check_linear("mlp", w_fc.shape[0], w_proj, b_proj, ("c_proj.weight", "c_proj.bias"))
    rows = as_rows(x.data)  # (N, C)
    N, F, C_out = len(rows), w_fc.shape[0], w_proj.shape[0]
    b_fc_data = np.zeros(F, x.dtype) if b_fc is None else b_fc.data
    b_proj_data = None if b_fc is None else b_proj.data
    y, pre = empty((N, C_out), x.dtype), empty((N, F), x.dtype)
    mlp_forward(y, pre, rows, w_fc.data, b_fc_data, w_proj.data, b_proj_data)
    parents = (x, w_fc, w_proj) if b_fc is None else (x, w_fc, b_fc, w_proj, b_proj)

    def backward(dy):
        dx, dw_fc, dw_proj = x.new_grad(), w_fc.new_grad(), w_proj.new_grad()
        db_fc = empty((F,), x.dtype) if b_fc is None else b_fc.new_grad()
        db_proj = None if b_fc is None else b_proj.new_grad()
        mlp_backward(
            dx.reshape(rows.shape), dw_fc, db_fc, dw_proj, db_proj,
            as_rows(dy), rows, w_fc.data, w_proj.data, pre,
        )  # fmt: skip
        return (dx, dw_fc, dw_proj) if b_fc is None else (dx, dw_fc, db_fc, dw_proj, db_proj)

    return record("mlp", y.reshape(*x.shape[:-1], C_out), parents, backward)


# --------------------------------------------------------------------------------------------------------------------
# Kernels


@helper
def gelu_numbers(like):
    """What `gelu` needs, in the dtype of an array: 1, a and -2k."""
    return like.dtype.type(1), like.dtype.type(A), like.dtype.type(-2 * K)


@helper
def gelu(z, one, a, minus_2k):
    return z / (one + exp(minus_2k * (z + a * z * z * z)))


@kernel
def bias_gelu_forward(act, pre, bias):
    """pre += bias, in place; act = gelu(pre)."""
    N, F = pre.shape
    one, a, minus_2k = gelu_numbers(pre)
    for n in range(N):
        for i in range(F):
            z = pre[n, i] + bias[i]
            pre[n, i] = z
            act[n, i] = gelu(z, one, a, minus_2k)


@kernel
def gelu_backward(grad, act, dbias, pre, first, last):
    """In columns first:last grad, that of act, becomes that of pre, in place; dbias = its row sum; act = gelu(pre)."""
    one, a, minus_2k = gelu_numbers(pre)
    two_k, a3 = pre.dtype.type(2 * K), pre.dtype.type(3 * A)
    total = dbias[first:last]
    total[:] = 0
    for n in range(len(pre)):
        z_row, grad_row, act_row = pre[n][first:last], grad[n][first:last], act[n][first:last]
        for i in range(len(total)):
            z = z_row[i]
            # act = z s
            s = one / (one + exp(minus_2k * (z + a * z * z * z)))
            act_row[i] = z * s
            slope = s + z * s * (one - s) * two_k * (one + a3 * z * z)
            dz = grad_row[i] * slope
            grad_row[i] = dz
            total[i] += dz


@replaces(mlp_forward_ref, flops=lambda y, pre, x, *_: 2 * pre.size * (x.shape[1] + y.shape[1]))
def mlp_forward(y, pre, x, w_fc, b_fc, w_proj, b_proj):
    act = empty(pre.shape, pre.dtype)
    matmul(pre, x, w_fc.T)
    shared(lambda rows: bias_gelu_forward(act[rows], pre[rows], b_fc), len(pre), pre.size)
    matmul(y, act, w_proj.T)
    if b_proj is not None:
        add_bias(y, b_proj)


@replaces(mlp_backward_ref, flops=lambda dx, dw_fc, db_fc, dw_proj, *_: 4 * len(dx) * (dw_fc.size + dw_proj.size))
def mlp_backward(dx, dw_fc, db_fc, dw_proj, db_proj, dy, x, w_fc, w_proj, pre):
    grad, act = empty((2, *pre.shape), pre.dtype)  # each (N, F)
    # y = act @ w_proj.T + b_proj
    matmul(grad, dy, w_proj)  # dact
    if db_proj is not None:
        sum_rows(db_proj, dy)
    # act = gelu(pre)
    columns = pre.shape[1]
    shared(lambda part: gelu_backward(grad, act, db_fc, pre, part.start, part.stop), columns, pre.size)  # grad: dpre
    matmul(dw_proj, dy.T, act)
    # pre = x @ w_fc.T + b_fc
    matmul(dx, grad, w_fc)
    matmul(dw_fc, grad.T, x)
