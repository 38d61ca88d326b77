"""A long prompt is one forward pass into the cache: the layers of npgpt/model.py, by the products of training.

The kernel of decode_kernel.py reads each weight once for all of its rows, and is made for few rows.  Of a hundred rows
the products themselves take the time: kernels/matmul.py has them at the processor's peak.

Rows of several prompts go through the matrices together, and meet only those of their own text in attention.  A row has
the same bits whatever is beside it: our product adds along k in one order for any number of rows.  NumPy's BLAS does
not; so where it serves, prompts are read one by one.
"""

import numpy as np

from npgpt.kernels.attention import ROWS, heads_of_past, scratch
from npgpt.kernels.bfloat16 import widened_ref
from npgpt.kernels.blas import blas_threads
from npgpt.kernels.buffers import empty
from npgpt.kernels.jit import kernel
from npgpt.kernels.matmul import PRODUCTS, matmul, products_of, quicker_dtype, share_out, shared
from npgpt.kernels.tiles import dots
from npgpt.ops.layernorm import layernorm_forward
from npgpt.ops.mlp import gelu, gelu_numbers

QUICK = 4  # numbers of a layer norm, a sum, or a matrix read for few rows, which take as long as one of GELU
AT_ONCE = 2**25  # bytes of activations, about, of the rows that are read together


class Part:
    """Some tokens of prompt number i, which follow each other in a stream; they are the rows first:last of a piece."""

    def __init__(self, i, tokens, stream, position, first):
        self.i, self.tokens, self.stream, self.position = i, np.asarray(tokens), stream, position
        self.rows = slice(first, first + len(tokens))


def pieces_of(prompts, most):
    """Lists of Parts with so many rows at most, in order; prompts: (tokens, stream, position) of each."""
    piece, n = [], 0
    for i, (tokens, stream, position) in enumerate(prompts):
        start = 0
        while start < len(tokens):
            part = Part(i, tokens[start : start + most - n], stream, position + start, n)
            piece.append(part)
            start, n = start + len(part.tokens), part.rows.stop
            if n == most:
                yield piece
                piece, n = [], 0
    if piece:
        yield piece


def read_prompts(weights, keys, values, prompts, threads):
    """Put prompts into the cache -> the logits (P, V) after each one's last token.

    weights         Weights of a model
    keys, values    (n_layer, streams, n_head, T, hs)
    prompts         (tokens, stream, position) of each of P prompts, which begins there
    """
    C, dtype = weights.wpe.shape[1], keys.dtype
    width = max(len(layer.c_fc.numbers) for layer in weights.layers)
    most = max(1, AT_ONCE // ((7 * C + width) * dtype.itemsize))
    each = [prompts] if PRODUCTS == "ours" else [[prompt] for prompt in prompts]
    x = np.empty((len(prompts), C), dtype)  # after the last layer, each prompt's last row
    is_quick = weights.wte.numbers.dtype == np.uint16 and quicker_dtype(C) == "bfloat16"
    with blas_threads(threads), products_of("bfloat16" if is_quick else "float32"):
        for n, together in enumerate(each):
            for piece in pieces_of(together, most):
                rows = _forward(weights, keys, values, piece, width, threads)
                for part, row in zip(piece, rows, strict=True):
                    x[n + part.i] = row  # of its last part, in the end
        _norm(h := np.empty_like(x), x, weights.ln_f)
        return _times(h, weights.lm_head)


def _forward(weights, keys, values, piece, width, threads):
    """The last layer's output (parts, C) for the last row of each part of a piece; width: the most of an MLP.

    That layer has no use for what the other rows put out: of these it needs the keys and values only.
    """
    tokens = np.concatenate([part.tokens for part in piece])
    positions = np.concatenate([np.arange(part.position, part.position + len(part.tokens)) for part in piece])
    x, scale = widened_ref(weights.wte.numbers[tokens]).astype(keys.dtype), weights.wte.scale
    x = (x if scale is None else x * scale[tokens, None]) + weights.wpe[positions]
    (R, C), n_head = x.shape, keys.shape[2]
    h, added, qkv, room = (empty(shape, x.dtype) for shape in ((R, C), (R, C), (R, 3 * C), (R * width,)))
    qkv = qkv.reshape(R, 3, n_head, C // n_head)
    last_rows = [part.rows.stop - 1 for part in piece]
    for layer, place in zip(weights.layers, zip(keys, values, strict=True), strict=True):
        is_last = layer is weights.layers[-1]
        # x += attn(ln_1(x))
        _norm(h, x, layer.ln_1)
        _product(qkv.reshape(R, 3 * C), h, layer.c_attn)
        _attend(h.reshape(R, 1, n_head, C // n_head), qkv, *place, piece, layer.scale, is_last, threads)
        if is_last:
            break
        _product(added, h, layer.attn_proj, x)
        # x += mlp(ln_2(x))
        _norm(h, x, layer.ln_2)
        F = len(layer.c_fc.numbers)
        hidden = room[: R * F].reshape(R, F)
        _product(hidden, h, layer.c_fc, activate=True)
        _product(added, hidden, layer.mlp_proj, x)
    x, h = x[last_rows], h[last_rows]
    x += _times(h, layer.attn_proj)
    _norm(h, x, layer.ln_2)
    hidden = _times(h, layer.c_fc)
    none = np.empty(0, x.dtype)
    _finish(hidden, none, none, activate=True)
    x += _times(hidden, layer.mlp_proj)
    return x


def _norm(h, x, norm):
    mean, rstd = np.empty((2, len(x)), x.dtype)
    shared(lambda rows: layernorm_forward(h[rows], mean[rows], rstd[rows], x[rows], *norm), len(x), x.size // QUICK)


def _product(out, x, matrix, total=None, activate=False):
    """out = x w^T + bias for a Matrix, or gelu of it; or else that is added to `total`, and out is used up."""
    matmul(out, x, matrix.numbers.T)
    _finish(out, *_scale_and_bias(matrix, out.dtype), total, activate)


def _finish(out, scale, bias, total=None, activate=False):
    add, total = total is not None, out if total is None else total
    numbers = out.size if activate else out.size // QUICK
    shared(lambda rows: finish_kernel(total[rows], out[rows], scale, bias, add, activate), len(out), numbers)


def _times(x, matrix):
    """x w^T + bias of few rows, for a Matrix: each weight is fetched once, for all of them."""
    out, w = empty((len(x), len(matrix.numbers)), x.dtype), matrix.numbers
    factors = _scale_and_bias(matrix, x.dtype)
    shared(lambda part: times_kernel(out, x, w, *factors, part.start, part.stop, False), len(w), w.size // QUICK)
    return out


def _scale_and_bias(matrix, dtype):
    """What kernels are given of a Matrix beside its numbers: arrays, which have no length if there is none."""
    return [np.empty(0, dtype) if array is None else array for array in (matrix.scale, matrix.bias)]


def _attend(y, qkv, keys, values, piece, scale, only_last, threads):
    """y (R, 1, n_head, hs) = attention of each row to its own text, whose keys and values get those of qkv.

    only_last: whether y is asked for in the last row of each part only.
    """
    _, _, n_head, hs = qkv.shape

    def share(heads):
        for part in piece:
            T = len(part.tokens)
            rows = scratch(hs + ROWS, part.position + T, y.dtype)
            heads_of_past(
                y[part.rows], qkv[part.rows], keys[part.stream], values[part.stream], part.position,
                T - 1 if only_last else 0, scale, rows, np.empty(ROWS), heads.start, heads.stop,
            )  # fmt: skip

    share_out(share, n_head, threads)


@kernel
def times_kernel(out, x, w, scale, bias, first, last, add):
    """`dots`."""
    dots(out, x, w, scale, bias, first, last, add)


@kernel
def finish_kernel(total, out, scale, bias, add, activate):
    """out (R, N) = out * scale + bias, or gelu of it; total += out if `add`; scale and bias (N,) or of no length."""
    one, a, minus_2k = gelu_numbers(out)
    R, N = out.shape
    for r in range(R):  # (a row stays in the cache, and each loop over it is one that vectorises)
        if len(scale):
            for i in range(N):
                out[r, i] *= scale[i]
        if len(bias):
            for i in range(N):
                out[r, i] += bias[i]
        if activate:
            for i in range(N):
                out[r, i] = gelu(out[r, i], one, a, minus_2k)
        if add:
            for i in range(N):
                total[r, i] += out[r, i]
