"""Flat storage, AdamW, Muon, gradient clipping, and the learning rate's schedule.

All parameters of a model lie in one flat array, all gradients in another, AdamW's moments in two more: the update is
one pass over four arrays, which worker threads share slice by slice.
"""

import math

import numpy as np

from npgpt.engine import BufferPool, empty, reuse_buffers
from npgpt.jit import kernel, replaces

ALIGN = 16  # parameters start at multiples of this many elements (64 bytes in float32)


class FlatParameters:
    """Moves a model's parameters into one flat array and gives their gradients places in another.

    weights, grads    (size,) arrays; parameter.data and parameter.grad become views of them
    names, shapes     parameter's name -> slice, shape
    n_hidden          the blocks' matrices come first: elements 0 .. n_hidden - 1
    n_decay           then the embeddings; weight decay applies to all matrices: elements 0 .. n_decay - 1

    share: another FlatParameters of an equal model whose weights are used instead of this model's own.
    """

    def __init__(self, model, share=None):
        named = sorted(model.named_parameters(), key=lambda item: (item[1].ndim < 2, ".h." not in item[0]))
        self.shapes = {name: parameter.shape for name, parameter in named}
        self.names, self.parameters, self.n_hidden, self.n_decay, size = {}, [], 0, 0, 0
        for name, parameter in named:
            self.names[name] = slice(size, size + parameter.size)
            self.parameters.append(parameter)
            size += -(-parameter.size // ALIGN) * ALIGN
            if parameter.ndim >= 2:
                self.n_decay = size
                if ".h." in name:
                    self.n_hidden = size
        dtype = named[0][1].dtype
        self.weights = np.zeros(size, dtype) if share is None else share.weights
        self.grads = np.zeros(size, dtype)
        for parameter, (_, data), (_, grad) in zip(
            self.parameters, self.views(self.weights), self.views(self.grads), strict=True
        ):
            if share is None:
                data[...] = parameter.data
            parameter.data, parameter.grad, parameter.grad_buffer = data, None, grad

    def views(self, values):
        """(name, its part of a flat array, in the parameter's shape) for each parameter."""
        for name, place in self.names.items():
            yield name, values[place].reshape(self.shapes[name])

    def finish_grads(self):
        """After backward: parameters that the loss did not depend on get a gradient of 0."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad_buffer[...] = 0

    def zero_grad(self):
        """Before backward: the next gradients replace the old ones."""
        for parameter in self.parameters:
            parameter.grad = None


# --------------------------------------------------------------------------------------------------------------------
# Gradient norm and AdamW


def sum_of_squares_ref(g):
    """g (n,) -> the sum of its squares, in float64."""
    return np.square(g.astype(np.float64)).sum()


@replaces(sum_of_squares_ref)
@kernel
def sum_of_squares(total, g):
    n = 0.0
    for i in range(g.size):
        n += np.float64(g[i]) * np.float64(g[i])
    total[()] = n


def adamw_ref(p, m, v, g, scale, lr, beta1, beta2, eps, weight_decay, step):
    """One AdamW update (Loshchilov and Hutter 2019, algorithm 2, with the decay multiplied by lr as PyTorch does).

    p, m, v, g (n,): weights, mean of gradients, mean of squared gradients, gradients; the first three change in place.
    scale: what gradients are multiplied by first (clipping).  step counts from 1.
    """
    g = g * scale
    m[...] = beta1 * m + (1 - beta1) * g
    v[...] = beta2 * v + (1 - beta2) * g * g
    m_hat = m / (1 - beta1**step)  # the means started at 0: undo the bias towards it
    v_hat = v / (1 - beta2**step)
    p[...] = p * (1 - lr * weight_decay) - lr * m_hat / (np.sqrt(v_hat) + eps)
    return p, m, v


@replaces(adamw_ref)
@kernel
def adamw(p, m, v, g, scale, lr, beta1, beta2, eps, weight_decay, step):
    real = p.dtype.type
    keep = real(1 - lr * weight_decay)
    b1, c1, b2, c2 = real(beta1), real(1 - beta1), real(beta2), real(1 - beta2)
    rate = real(lr / (1 - beta1**step))
    root = real(1 / math.sqrt(1 - beta2**step))
    scale, eps = real(scale), real(eps)
    for i in range(p.size):
        gi = g[i] * scale
        mi = b1 * m[i] + c1 * gi
        vi = b2 * v[i] + c2 * gi * gi
        m[i] = mi
        v[i] = vi
        p[i] = p[i] * keep - rate * mi / (np.sqrt(vi) * root + eps)


class AdamW:
    """AdamW over flat storage.

    flat: FlatParameters.  `step` counts the updates; m and v are the moments, arrays like flat.weights.
    """

    def __init__(self, flat, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1):
        self.flat, self.beta1, self.beta2, self.eps, self.weight_decay = flat, beta1, beta2, eps, weight_decay
        self.m = np.zeros_like(flat.weights)
        self.v = np.zeros_like(flat.weights)
        self.step = 0

    def update(self, grads, lr, scale=1.0, part=slice(None)):
        """Update the weights in `part` (a slice of the flat arrays) with grads * scale.

        The caller counts `step` up before the first part of an update.
        """
        start, stop, _ = part.indices(len(self.m))
        cut = min(max(self.flat.n_decay, start), stop)
        for a, b, weight_decay in ((start, cut, self.weight_decay), (cut, stop, 0.0)):
            if a < b:
                adamw(
                    self.flat.weights[a:b], self.m[a:b], self.v[a:b], grads[a:b],
                    scale, lr, self.beta1, self.beta2, self.eps, weight_decay, self.step,
                )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Muon


def orthogonalize(x, steps=5):
    """Replace each matrix of x (k, m, n), m <= n, by nearly the closest one with orthonormal rows, in place.

    With the singular value decomposition U S V^T of a matrix, this is U V^T.  Newton-Schulz iteration finds it with
    products alone: x <- a x + b (x x^T) x + c (x x^T)^2 x acts on each singular value as s <- a s + b s^3 + c s^5, and
    this polynomial's coefficients (Jordan et al. 2024) drive all of (0, 1] to somewhere between 0.7 and 1.2 in 5 steps.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    k, m, _ = x.shape
    norm = np.sqrt(np.einsum("kmn,kmn->k", x, x))
    x /= norm[:, None, None] + x.dtype.type(1e-7)  # then no singular value is larger than 1
    gram, poly, product = empty((k, m, m), x.dtype), empty((k, m, m), x.dtype), empty(x.shape, x.dtype)
    for _ in range(steps):
        np.matmul(x, x.swapaxes(1, 2), out=gram)
        np.matmul(gram, gram, out=poly)
        poly *= c
        gram *= b
        poly += gram  # b (x x^T) + c (x x^T)^2
        np.matmul(poly, x, out=product)
        x *= a
        x += product
    return x


class Muon(AdamW):
    """Muon (Jordan et al. 2024) for the matrices of the transformer blocks, AdamW for everything else.

    Muon's step is the momentum of the gradient, made orthogonal: all directions of a matrix are changed alike, also
    those that few examples speak of.  q, k and v are three matrices; a matrix of another shape than square gets a step
    that is larger by sqrt(rows / columns), if it has more rows.

    rate: learning rate of these matrices, as a multiple of the one that update() is given, which is AdamW's.
    """

    def __init__(self, flat, rate, momentum=0.95, **options):
        super().__init__(flat, **options)
        self.rate, self.momentum = rate, momentum
        self.pools = {}  # first element of a part -> BufferPool of the thread that updates it

    def update(self, grads, lr, scale=1.0, part=slice(None)):
        """As AdamW.update; a matrix belongs to the part that its middle lies in."""
        start, stop, _ = part.indices(len(self.m))
        super().update(grads, lr, scale, slice(max(start, self.flat.n_hidden), max(stop, self.flat.n_hidden)))
        groups = {}  # shape with m <= n -> [(weights, momentum, gradient)], views of that shape
        for name, place in self.flat.names.items():
            if place.start < self.flat.n_hidden and start <= (place.start + place.stop) // 2 < stop:
                for matrices in self._matrices(name, place, grads):
                    groups.setdefault(matrices[0].shape, []).append(matrices)
        with reuse_buffers(self.pools.setdefault(start, BufferPool())):
            for (m, n), members in groups.items():
                x = empty((len(members), m, n), self.m.dtype)
                for direction, (_, momentum, grad) in zip(x, members, strict=True):
                    # m = mu m + (1 - mu) g, and Nesterov's step along mu m + (1 - mu) g; its length does not matter
                    np.multiply(grad, scale * (1 - self.momentum), out=direction)
                    momentum *= self.momentum
                    momentum += direction
                    direction /= self.momentum
                    direction += momentum
                orthogonalize(x)
                for direction, (weights, _, _) in zip(x, members, strict=True):
                    tall = weights.strides[0] < weights.strides[1]  # a transposed view: more rows than columns
                    weights *= 1 - lr * self.weight_decay
                    direction *= lr * self.rate * (math.sqrt(n / m) if tall else 1.0)
                    weights -= direction

    def _matrices(self, name, place, grads):
        """The (weights, momentum, gradient) of a parameter's matrices, transposed where they have more rows."""
        rows, columns = self.flat.shapes[name]
        n = 3 if name.endswith("c_attn.weight") else 1
        views = [array[place].reshape(n, rows // n, columns) for array in (self.flat.weights, self.m, grads)]
        for matrices in zip(*views, strict=True):
            yield tuple(z.T if len(z) > columns else z for z in matrices)


# --------------------------------------------------------------------------------------------------------------------
# Clipping and schedule


def clip_scale(norm, grad_clip):
    """What to multiply gradients with so that their norm becomes at most grad_clip (0: whatever it is)."""
    return min(1.0, grad_clip / (norm + 1e-6)) if grad_clip > 0 else 1.0


def cosine_lr(iteration, learning_rate, min_lr, warmup_iters, lr_decay_iters):
    """nanoGPT's schedule: up linearly for warmup_iters, down along a cosine to min_lr at lr_decay_iters."""
    if iteration < warmup_iters:
        return learning_rate * (iteration + 1) / (warmup_iters + 1)
    if iteration >= lr_decay_iters:
        return min_lr
    done = (iteration - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (learning_rate - min_lr)
