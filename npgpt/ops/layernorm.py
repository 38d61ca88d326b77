"""Layer normalisation (Ba, Kiros and Hinton 2016), over the last axis.

Forward, for each row x of C numbers:

    mean = 1/C sum_i x_i                      var = 1/C sum_i (x_i - mean)^2
    rstd = 1 / sqrt(var + eps)                xhat_i = (x_i - mean) rstd
    y_i  = xhat_i w_i + b_i

Backward.  The weights come first.  y_i is linear in w_i and b_i, and each of the N rows used the same w and b, so the
contributions of the rows add up:

    dw_i = sum_rows dy_i xhat_i               db_i = sum_rows dy_i

Then the input.  Let g_i = dy_i w_i be the gradient of xhat_i.  x_j reaches the loss by every xhat_i of its row:
directly (i = j), through the mean, and through rstd.  With

    d mean / d x_j = 1/C
    d rstd / d x_j = -1/2 (var + eps)^(-3/2) d var / d x_j = -rstd^3 (x_j - mean) / C = -rstd^2 xhat_j / C

(var changes with x_j only by its own term: the shift of the mean cancels, as sum_i (x_i - mean) = 0), we get

    d xhat_i / d x_j = rstd ([i = j] - 1/C) + (x_i - mean) (-rstd^2 xhat_j / C)
                     = rstd ([i = j] - 1/C - xhat_i xhat_j / C)

where [i = j] is 1 if i = j, and 0 otherwise; and, summing g_i d xhat_i / d x_j over i,

    dx_j = rstd (g_j - mean(g) - xhat_j mean(g xhat))

In words: from g, its part along the constant vector and its part along xhat are taken away, since moving x along these
two directions changes only the mean and the scale, which the normalisation removes.
"""

import numpy as np

from npgpt.kernels.buffers import as_rows, empty
from npgpt.kernels.jit import kernel, replaces
from npgpt.tensor import check_dtypes, record

EPS = 1e-5  # as in GPT-2

# --------------------------------------------------------------------------------------------------------------------
# Reference


def layernorm_forward_ref(x, weight, bias, eps):
    """x (N, C), weight (C,), bias (C,) -> y (N, C), mean (N,), rstd (N,)."""
    mean = x.mean(axis=1)  # (N,)
    var = x.var(axis=1)  # (N,) divided by C, not by C - 1
    rstd = 1 / np.sqrt(var + eps)
    mean[~np.isfinite(var)] = np.nan  # of rows whose squares overflow: rstd is 0, which would hide them
    xhat = (x - mean[:, None]) * rstd[:, None]  # (N, C)
    y = xhat * weight + bias
    return y, mean, rstd


def layernorm_backward_ref(dy, x, weight, mean, rstd):
    """dy (N, C), and x, weight, mean, rstd of the forward -> dx (N, C), dweight (C,), dbias (C,)."""
    xhat = (x - mean[:, None]) * rstd[:, None]
    # y = xhat * weight + bias
    dweight = (dy * xhat).sum(axis=0)
    dbias = dy.sum(axis=0)
    g = dy * weight
    # xhat = (x - mean) * rstd, where mean and rstd depend on x
    g_mean = g.mean(axis=1, keepdims=True)
    g_xhat_mean = (g * xhat).mean(axis=1, keepdims=True)
    dx = rstd[:, None] * (g - g_mean - xhat * g_xhat_mean)
    return dx, dweight, dbias


# --------------------------------------------------------------------------------------------------------------------
# Op


def layernorm(x, weight, bias=None, eps=EPS):
    """Normalise the last axis of x to mean 0 and variance 1, then scale by weight and shift by bias.

    x (..., C), weight (C,), bias (C,) or None; all of one dtype -> y (..., C).
    Raises ValueError for other shapes, TypeError for other dtypes.
    """
    check_dtypes("layernorm", x=x, weight=weight, bias=bias)
    C = x.shape[-1]
    if weight.shape != (C,) or (bias is not None and bias.shape != (C,)):
        name, parameter = ("weight", weight) if weight.shape != (C,) else ("bias", bias)
        raise ValueError(
            f"layernorm: {name} must have shape (C,) = ({C},), got {parameter.shape}. "
            f"Was the model built with another n_embd?"
        )
    rows = as_rows(x.data)  # (N, C)
    N = len(rows)
    y = empty((N, C), x.dtype)
    mean, rstd = empty((2, N), x.dtype)
    bias_data = np.zeros(C, x.dtype) if bias is None else bias.data
    layernorm_forward(y, mean, rstd, rows, weight.data, bias_data, eps)

    def backward(dy):
        dx, dweight = x.new_grad(), weight.new_grad()
        dbias = empty((C,), x.dtype) if bias is None else bias.new_grad()
        layernorm_backward(dx.reshape(N, C), dweight, dbias, as_rows(dy), rows, weight.data, mean, rstd)
        return (dx, dweight) if bias is None else (dx, dweight, dbias)

    return record("layernorm", y.reshape(x.shape), (x, weight) if bias is None else (x, weight, bias), backward)


# --------------------------------------------------------------------------------------------------------------------
# Kernels


@replaces(layernorm_forward_ref)
@kernel(inlined=True)
def layernorm_forward(y, mean, rstd, x, weight, bias, eps):
    N, C = x.shape
    one, inv_C, eps = x.dtype.type(1), x.dtype.type(1 / C), x.dtype.type(eps)
    for n in range(N):
        total = x.dtype.type(0)
        for i in range(C):
            total += x[n, i]
        m = total * inv_C
        total = x.dtype.type(0)
        for i in range(C):
            total += (x[n, i] - m) * (x[n, i] - m)
        r = one / np.sqrt(total * inv_C + eps)
        m = m if total < np.inf else x.dtype.type(np.nan)  # (not r, which the compiler has a fast way to make)
        for i in range(C):
            y[n, i] = (x[n, i] - m) * r * weight[i] + bias[i]
        mean[n] = m
        rstd[n] = r


@replaces(layernorm_backward_ref)
@kernel
def layernorm_backward(dx, dweight, dbias, dy, x, weight, mean, rstd):
    N, C = x.shape
    inv_C = x.dtype.type(1 / C)
    dweight[:] = 0
    dbias[:] = 0
    for n in range(N):
        m, r = mean[n], rstd[n]
        g_mean = x.dtype.type(0)
        g_xhat_mean = x.dtype.type(0)
        for i in range(C):
            xhat = (x[n, i] - m) * r
            # y = xhat * weight + bias
            dweight[i] += dy[n, i] * xhat
            dbias[i] += dy[n, i]
            g = dy[n, i] * weight[i]
            g_mean += g
            g_xhat_mean += g * xhat
        g_mean *= inv_C
        g_xhat_mean *= inv_C
        # xhat = (x - mean) * rstd
        for i in range(C):
            xhat = (x[n, i] - m) * r
            dx[n, i] = r * (dy[n, i] * weight[i] - g_mean - xhat * g_xhat_mean)
