"""Muon: the matrices of the blocks take steps that are made orthogonal."""

import math

import numpy as np

from npgpt.kernels.buffers import BufferPool, empty, reuse_buffers
from npgpt.kernels.jit import helper, kernel, replaces
from npgpt.kernels.matmul import matmul
from npgpt.kernels.profiler import measuring
from npgpt.kernels.tiles import product, transpose
from npgpt.optim import AdamW

NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # a, b, c of Jordan et al. 2024
STEPS = 5
EPS = 1e-7  # added to a norm, which may be 0
N_PRODUCTS = 4 * STEPS - 3  # the first step multiplies no q, and the last one makes no new g


def inverse_root_ref(gram):
    """gram (m, m), x x^T of a matrix x (m, n) -> q (m, m): q x has nearly orthonormal rows.

    With the singular value decomposition x = U S V^T, the matrix with orthonormal rows that is closest to x is U V^T =
    (x x^T)^(-1/2) x.  Newton-Schulz iteration finds it with products alone: x <- (a I + b g + c g^2) x with g = x x^T
    acts on each singular value as s <- a s + b s^3 + c s^5, and this polynomial drives those from 0.002 to 1 to
    somewhere between 0.68 and 1.2 in 5 steps (it multiplies smaller ones with a^5 = 485 at most).  Here the factors are
    multiplied with each other, and x is left to the end: as all of them are polynomials of the first g, g <- (a I + b g
    + c g^2)^2 g, and every product is symmetric.  x is divided by its norm first: then no s is larger than 1.
    """
    a, b, c = NEWTON_SCHULZ
    norm = np.sqrt(np.trace(gram)) + gram.dtype.type(EPS)
    gram = gram / norm**2
    q = identity = np.eye(len(gram), dtype=gram.dtype)
    for _ in range(STEPS):
        poly = a * identity + b * gram + c * (gram @ gram)
        q, gram = poly @ q, poly @ gram @ poly
    return q / norm


@replaces(inverse_root_ref, flops=lambda q, gram: N_PRODUCTS * q.size * (len(q) + 1))
def inverse_root(q, gram):
    """Of each product half is computed; matrices of 128 rows stay in the second cache for the whole iteration."""
    _inverse_root(q, gram, empty((3, *gram.shape), gram.dtype))


@kernel
def _inverse_root(q, gram, scratch):
    g, poly, spare, one = scratch[0], scratch[1], scratch[2], gram.dtype.type(1)
    trace = gram.dtype.type(0)
    for i in range(len(gram)):
        trace += gram[i, i]
    norm = np.sqrt(trace) + gram.dtype.type(EPS)
    _scale(g, gram, one / (norm * norm))
    for step in range(STEPS):
        factor = poly if step > 0 else q
        _symmetric_product(factor, g, g)
        _newton_schulz(factor, g)
        if step > 0:
            _symmetric_product(spare, factor, q)
            _scale(q, spare, one if step < STEPS - 1 else one / norm)
        if step < STEPS - 1:
            _symmetric_product(spare, factor, g)
            _symmetric_product(g, spare, factor)


@helper
def _symmetric_product(out, a, b):
    """out = a @ b for symmetric matrices a, b (m, m) that commute: then the product is symmetric, too."""
    m = len(out)
    for i in range(0, m, 32):
        end = min(i + 32, m)
        product(out[i:end, :end], a[i:end], b, False)
    # the rest is a mirror image, to the last bit: the iteration would make a difference larger
    for i in range(0, m, 16):
        end = min(i + 16, m)
        if i > 0:
            transpose(out[:i, i:end], out[i:end, :i])
        for row in range(i, end):
            for column in range(row + 1, end):
                out[row, column] = out[column, row]


@helper
def _newton_schulz(square, gram):
    """square = gram @ gram (m, m) becomes a I + b gram + c square."""
    a, b, c = NEWTON_SCHULZ
    a, b, c = gram.dtype.type(a), gram.dtype.type(b), gram.dtype.type(c)
    for i in range(len(gram)):
        for j in range(len(gram)):
            square[i, j] = b * gram[i, j] + c * square[i, j]
        square[i, i] += a


@helper
def _scale(out, x, factor):
    for i in range(len(x)):
        for j in range(x.shape[1]):
            out[i, j] = x[i, j] * factor


def take_step_ref(weights, step, rate, keep):
    """weights (rows, columns) are multiplied by keep, and step (rows, columns) is taken by this rate."""
    weights[...] = weights * weights.dtype.type(keep) - step * weights.dtype.type(rate)
    return weights


@replaces(take_step_ref)
@kernel
def take_step(weights, step, rate, keep):
    rate, keep = weights.dtype.type(rate), weights.dtype.type(keep)
    for i in range(len(weights)):
        for j in range(weights.shape[1]):
            weights[i, j] = weights[i, j] * keep - step[i, j] * rate


def nesterov_ref(momentum, g, scale, mu):
    """The mean of gradients, and Nesterov's look one step ahead of it, which takes the gradient's place.

    momentum, g (n,) change in place; scale: what g is multiplied by first.
    """
    new = g * g.dtype.type(scale * (1 - mu))
    momentum[...] = momentum * g.dtype.type(mu) + new
    g[...] = momentum * g.dtype.type(mu) + new
    return momentum, g


@replaces(nesterov_ref)
@kernel
def nesterov(momentum, g, scale, mu):
    real = g.dtype.type
    share, mu = real(scale * (1 - mu)), real(mu)
    for i in range(g.size):
        new = g[i] * share
        m = momentum[i] * mu + new
        momentum[i] = m
        g[i] = m * mu + new


def _muon_cost(matrices):
    """(FLOPs, bytes) of Muon's update of these matrices: one product before inverse_root, and one after it."""
    flops = sum(N_PRODUCTS * m**2 * (m + 1) + 4 * m * x.size for _, _, x in matrices for m in [min(x.shape)])
    return flops, 3 * sum(x.nbytes for _, _, x in matrices)


class Muon(AdamW):
    """Muon (Jordan et al. 2024) for the matrices of the transformer blocks, AdamW for everything else.

    Muon's step is the momentum of the gradient, made orthogonal: all directions of a matrix are changed alike, also
    those that few examples speak of.  q, k and v are three matrices; a matrix of another shape than square gets a step
    that is larger by sqrt(rows / columns), if it has more rows.

    rate: learning rate of these matrices, as a multiple of the one that update() is given, which is AdamW's.
    """

    def __init__(self, flat, rate, momentum=0.95, **options):
        super().__init__(flat, **options)
        if flat.n_hidden == 0:
            raise ValueError("Muon: no matrix has a name with .h. in it, as those of a GPT's blocks have: take AdamW")
        self.rate, self.momentum = rate, momentum
        self.pools = {}  # first element of a part -> BufferPool of the thread that updates it

    def update(self, grads, lr, scale=1.0, part=slice(None)):
        """As AdamW.update, but uses up the gradients of its matrices.  A matrix belongs to the part of its middle."""
        start, stop, _ = part.indices(len(self.m))
        super().update(grads, lr, scale, slice(max(start, self.flat.n_hidden), max(stop, self.flat.n_hidden)))
        matrices = []  # (weights, momentum, gradient) of each
        frozen = self.flat.frozen
        for name, place in self.flat.names.items():
            is_here = place.start < self.flat.n_hidden and start <= (place.start + place.stop) // 2 < stop
            if is_here and name not in frozen:
                rows, columns = self.flat.shapes[name]
                n = 3 if name.endswith("c_attn.weight") else 1
                views = [array[place].reshape(n, rows // n, columns) for array in (self.flat.weights, self.m, grads)]
                matrices.extend(zip(*views, strict=True))
        with reuse_buffers(self.pools.setdefault(start, BufferPool())), measuring("muon", _muon_cost, matrices):
            for matrix in matrices:
                self._update_matrix(*matrix, lr, scale)

    def _update_matrix(self, weights, momentum, x, lr, scale):
        """weights, momentum, x (rows, columns); x: the gradient, which is used up."""
        rows, columns = x.shape
        nesterov(momentum.reshape(-1), x.reshape(-1), scale, self.momentum)
        gram, q = (empty((min(x.shape),) * 2, x.dtype) for _ in range(2))
        np.matmul(*((x, x.T) if rows <= columns else (x.T, x)), out=gram)  # of the rows or the columns: the fewer ones
        inverse_root(q, gram)
        step = empty(x.shape, x.dtype)
        matmul(step, *((q, x) if rows <= columns else (x, q)))
        take_step(weights, step, lr * self.rate * math.sqrt(max(1, rows / columns)), 1 - lr * self.weight_decay)
