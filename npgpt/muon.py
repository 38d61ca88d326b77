"""Muon: the matrices of the blocks take steps that are made orthogonal."""

import math

import numpy as np

from npgpt.kernels.buffers import BufferPool, empty, reuse_buffers
from npgpt.kernels.jit import kernel, replaces
from npgpt.kernels.matmul import matmul
from npgpt.kernels.profiler import measuring
from npgpt.kernels.tiles import product, transpose
from npgpt.optim import AdamW

NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # a, b, c of Jordan et al. 2024


def inverse_root(gram, steps=5):
    """gram (k, m, m), each x x^T of a matrix x (m, n) of norm 1 -> q (k, m, m): q x has nearly orthonormal rows.

    With the singular value decomposition x = U S V^T, the matrix with orthonormal rows that is closest to x is U V^T =
    (x x^T)^(-1/2) x.  Newton-Schulz iteration finds it with products alone: x <- (a I + b g + c g^2) x with g = x x^T
    acts on each singular value as s <- a s + b s^3 + c s^5, and this polynomial drives those from 0.002 to 1 to
    somewhere between 0.68 and 1.2 in 5 steps (it multiplies smaller ones with a^5 = 485 at most).  Here the factors are
    multiplied with each other, and x is left to the end: as all of them are polynomials of the first g, g <- (a I + b g
    + c g^2)^2 g, and every product is symmetric: half of it is computed.  Changes gram.
    """
    poly, spare, q = (empty(gram.shape, gram.dtype) for _ in range(3))
    for step in range(steps):
        symmetric_product(poly, gram, gram)
        newton_schulz(poly, gram)
        if step == 0:
            q[...] = poly
        else:
            symmetric_product(spare, poly, q)
            q, spare = spare, q
        if step < steps - 1:
            symmetric_product(spare, poly, gram)
            symmetric_product(gram, spare, poly)
    return q


def symmetric_product_ref(a, b):
    """a @ b for symmetric matrices a, b (k, m, m) that commute: then the product is symmetric, too."""
    return a @ b


@replaces(symmetric_product_ref, flops=lambda out, a, b: out.size * (out.shape[1] + 1))
@kernel
def symmetric_product(out, a, b):
    k, m, _ = out.shape
    for n in range(k):
        for i in range(0, m, 32):
            end = min(i + 32, m)
            product(out[n, i:end, :end], a[n, i:end], b[n], False)
        # the rest is a mirror image, to the last bit: the iteration would make a difference larger
        for i in range(0, m, 16):
            end = min(i + 16, m)
            if i > 0:
                transpose(out[n, :i, i:end], out[n, i:end, :i])
            for row in range(i, end):
                for column in range(row + 1, end):
                    out[n, row, column] = out[n, column, row]


def newton_schulz_ref(square, gram):
    """square = gram @ gram (k, m, m), gram (k, m, m) -> a I + b gram + c square, in square's place."""
    a, b, c = NEWTON_SCHULZ
    square[...] = a * np.eye(len(gram[0]), dtype=gram.dtype) + b * gram + c * square
    return square


@replaces(newton_schulz_ref)
@kernel
def newton_schulz(square, gram):
    a, b, c = NEWTON_SCHULZ
    a, b, c = gram.dtype.type(a), gram.dtype.type(b), gram.dtype.type(c)
    for i in range(len(gram)):
        for j in range(gram.shape[1]):
            for k in range(gram.shape[2]):
                square[i, j, k] = b * gram[i, j, k] + c * square[i, j, k]
            square[i, j, j] += a


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


def _muon_cost(muon, m, members):
    """(FLOPs, bytes) of Muon._update_group: 17 products in inverse_root, one before and one after it."""
    sizes = sum(weights.size for weights, _, _ in members)
    return 17 * m**2 * (m + 1) * len(members) + 4 * m * sizes, 3 * sizes * muon.m.itemsize


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
        groups = {}  # length of the shorter side -> [(weights, momentum, gradient)]
        frozen = self.flat.frozen
        for name, place in self.flat.names.items():
            is_here = place.start < self.flat.n_hidden and start <= (place.start + place.stop) // 2 < stop
            if is_here and name not in frozen:
                rows, columns = self.flat.shapes[name]
                n = 3 if name.endswith("c_attn.weight") else 1
                views = [array[place].reshape(n, rows // n, columns) for array in (self.flat.weights, self.m, grads)]
                groups.setdefault(min(rows // n, columns), []).extend(zip(*views, strict=True))
        with reuse_buffers(self.pools.setdefault(start, BufferPool())):
            for m, members in groups.items():
                with measuring("muon", _muon_cost, self, m, members):
                    self._update_group(m, members, lr, scale)

    def _update_group(self, m, members, lr, scale):
        gram, norms = empty((len(members), m, m), self.m.dtype), []
        for g, (_, momentum, x) in zip(gram, members, strict=True):
            nesterov(momentum.reshape(-1), x.reshape(-1), scale, self.momentum)
            np.matmul(*((x, x.T) if len(x) == m else (x.T, x)), out=g)  # of the rows or the columns: the fewer ones
            norms.append(math.sqrt(np.trace(g)) + 1e-7)
            g /= norms[-1] ** 2  # as if x had been divided by its norm: then no singular value is larger than 1
        for q, norm, (weights, _, x) in zip(inverse_root(gram), norms, members, strict=True):
            rows, columns = x.shape
            step = empty(x.shape, x.dtype)
            matmul(step, *((q, x) if rows == m else (x, q)))
            step *= lr * self.rate * math.sqrt(max(1, rows / columns)) / norm
            if self.weight_decay:
                weights *= 1 - lr * self.weight_decay
            weights -= step
