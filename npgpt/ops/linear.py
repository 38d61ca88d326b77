"""The linear layer, with PyTorch's shape of the weight: (out_features, in_features).

Forward, for N rows x:

    y = x w^T + b             y_no = sum_i x_ni w_oi + b_o

Backward.  Each y_no is a sum of products, so a factor's gradient is dy_no times the other factor, summed over
everything that the factor took part in.  x_ni took part in y_no for every o; w_oi for every row n; b_o for every n:

    dx_ni = sum_o dy_no w_oi          dx = dy w
    dw_oi = sum_n dy_no x_ni          dw = dy^T x
    db_o  = sum_n dy_no

Where N, O and I differ, the shapes alone leave no other way to write the products: (N, O) (O, I) -> (N, I), and
(O, N) (N, I) -> (O, I).  They are two thirds of a linear layer's multiplications in training, the forward's one third.
"""

from npgpt.kernels.buffers import as_rows, empty
from npgpt.kernels.jit import kernel, replaces
from npgpt.kernels.matmul import matmul
from npgpt.tensor import check_dtypes, record

# --------------------------------------------------------------------------------------------------------------------
# Reference


def linear_forward_ref(x, weight, bias):
    """x (N, I), weight (O, I), bias (O,) or None -> y (N, O)."""
    y = x @ weight.T
    return y if bias is None else y + bias


def linear_backward_ref(dy, x, weight):
    """dy (N, O), and x, weight of the forward -> dx (N, I), dweight (O, I), dbias (O,)."""
    # y = x @ weight.T + bias
    dx = dy @ weight
    dweight = dy.T @ x
    dbias = dy.sum(axis=0)
    return dx, dweight, dbias


# --------------------------------------------------------------------------------------------------------------------
# Op


def check_linear(op, x_size, weight, bias, names=("weight", "bias")):
    """Raise ValueError unless weight is (O, x_size) and bias is (O,) or None."""
    if weight.ndim != 2 or weight.shape[1] != x_size:
        raise ValueError(
            f"{op}: {names[0]} must have shape (out, in) with in = {x_size}, the last axis of its input, "
            f"got {weight.shape}. Is it transposed?"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: {names[1]} must have shape ({weight.shape[0]},), got {bias.shape}")


def linear(x, weight, bias=None):
    """y = x @ weight.T + bias over the last axis.

    x (..., I), weight (O, I), bias (O,) or None; all of one dtype -> y (..., O).
    Raises ValueError for other shapes, TypeError for other dtypes.
    """
    check_dtypes("linear", x=x, weight=weight, bias=bias)
    check_linear("linear", x.shape[-1], weight, bias)
    rows = as_rows(x.data)  # (N, I)
    y = empty((len(rows), weight.shape[0]), x.dtype)
    linear_forward(y, rows, weight.data, None if bias is None else bias.data)

    def backward(dy):
        dx, dweight = x.new_grad(), weight.new_grad()
        dbias = None if bias is None else bias.new_grad()
        linear_backward(dx.reshape(rows.shape), dweight, dbias, as_rows(dy), rows, weight.data)
        return (dx, dweight) if bias is None else (dx, dweight, dbias)

    y = y.reshape(*x.shape[:-1], weight.shape[0])
    return record("linear", y, (x, weight) if bias is None else (x, weight, bias), backward)


# --------------------------------------------------------------------------------------------------------------------
# Kernels.  The products are BLAS calls, or tiles of our own (kernels/matmul.py); what lies between them is compiled.


@kernel
def add_bias(y, bias):
    N, C = y.shape
    for n in range(N):
        for i in range(C):
            y[n, i] += bias[i]


@kernel
def sum_rows(total, x):
    N, C = x.shape
    total[:] = 0
    for n in range(N):
        for i in range(C):
            total[i] += x[n, i]


@replaces(linear_forward_ref, flops=lambda y, x, weight, bias: 2 * x.size * len(weight))
def linear_forward(y, x, weight, bias):
    matmul(y, x, weight.T)
    if bias is not None:
        add_bias(y, bias)


@replaces(linear_backward_ref, flops=lambda dx, dweight, dbias, dy, x, weight: 4 * x.size * len(weight))
def linear_backward(dx, dweight, dbias, dy, x, weight):
    # y = x @ weight.T + bias
    matmul(dx, dy, weight)
    matmul(dweight, dy.T, x)
    if dbias is not None:
        sum_rows(dbias, dy)
