"""Flat storage, AdamW, Muon, gradient clipping, and the learning rate's schedule.

All parameters of a model lie in one flat array, all gradients in another, AdamW's moments in two more: the update is
one pass over four arrays, which worker threads share slice by slice.
"""

import itertools
import math

import numpy as np

from npgpt.kernels.buffers import BufferPool, empty, reuse_buffers
from npgpt.kernels.jit import kernel, replaces
from npgpt.kernels.matmul import matmul
from npgpt.kernels.profiler import measuring
from npgpt.kernels.tiles import product, transpose

ALIGN = 16  # parameters start at multiples of this many elements (64 bytes in float32)


class FlatParameters:
    """Moves a model's parameters into one flat array and gives their gradients places in another.

    weights, grads    (size,) arrays; parameter.data and parameter.grad become views of them
    names, shapes     parameter's name -> slice, shape
    n_hidden          the blocks' matrices come first: elements 0 .. n_hidden - 1
    n_decay           then the embeddings; weight decay applies to all matrices: elements 0 .. n_decay - 1

    share: another FlatParameters of an equal model whose weights are used instead of this model's own.

    A parameter with requires_grad = False keeps its place, and its gradient is 0.  Raises ValueError for parameters of
    several dtypes, or that share memory.  Neither it nor what holds it can be copied or pickled: copy the model.
    """

    def __init__(self, model, share=None):
        self.model = model
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
        for name, parameter in named:
            if parameter.dtype != dtype:
                raise ValueError(
                    f"FlatParameters: {named[0][0]} is {dtype}, and {name} {parameter.dtype}: all must have one dtype"
                )
        for (name, one), (other_name, other) in itertools.combinations(named, 2) if share is None else ():
            if np.may_share_memory(one.data, other.data):
                raise ValueError(
                    f"FlatParameters: {name} and {other_name} share memory; use one Parameter in both places"
                )
        self.weights = np.zeros(size, dtype) if share is None else share.weights
        self.grads = np.zeros(size, dtype)
        for parameter, (_, data), (_, grad) in zip(
            self.parameters, self.views(self.weights), self.views(self.grads), strict=True
        ):
            if share is None:
                data[...] = parameter.data
            parameter.move(data, grad)
        self.places = [parameter.grad_buffer for parameter in self.parameters]

    def __reduce_ex__(self, protocol):  # of its arrays there would be copies, and the parameters would keep theirs
        raise TypeError("FlatParameters, and an optimizer or DataParallel on them, cannot be copied: copy the model")

    def check_home(self):
        """Raise RuntimeError if the parameters are kept elsewhere by now."""
        for parameter, place in zip(self.parameters, self.places, strict=True):
            if parameter.grad_buffer is not place:
                raise RuntimeError(
                    "the model's parameters have moved to a later FlatParameters (of a second DataParallel, say): this "
                    "one would train nothing any more"
                )

    def check(self):
        """Raise RuntimeError if the model's parameters are others than those that are kept here, or kept elsewhere."""
        self.check_home()
        before, now = dict(zip(self.names, self.parameters, strict=True)), dict(self.model.named_parameters())
        for name in (*now, *before):
            if now.get(name) is not before.get(name):
                what = "is gone" if name not in now else "is another Parameter" if name in before else "is new"
                raise RuntimeError(
                    f"{name} {what}: the model was changed after its FlatParameters were made; make them anew"
                )

    @property
    def frozen(self):
        """Names of the parameters that stay as they are: those with requires_grad = False."""
        pairs = zip(self.names, self.parameters, strict=True)
        return [name for name, parameter in pairs if not parameter.requires_grad]

    def trained(self, start, stop):
        """(start, stop) of each part of an interval of the flat arrays that holds no frozen parameter."""
        for place in map(self.names.get, self.frozen):
            if start < place.stop and place.start < stop:
                if start < place.start:
                    yield start, place.start
                start = place.stop
        if start < stop:
            yield start, stop

    def views(self, values):
        """(name, its part of a flat array, in the parameter's shape) for each parameter."""
        for name, place in self.names.items():
            yield name, values[place].reshape(self.shapes[name])

    def finish_grads(self):
        """After backward: `grads` is what the parameters' .grad say; it is 0 where there is none, or none is wanted."""
        for parameter in self.parameters:
            grad, place = parameter.grad, parameter.grad_buffer
            if grad is None or not parameter.requires_grad:
                place[...] = 0
            elif grad is not place:  # it was assigned
                if np.shape(grad) != place.shape:
                    raise ValueError(f"a Parameter of shape {place.shape} has a .grad of shape {np.shape(grad)}")
                place[...] = grad
            parameter.grad = place

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

    Frozen parameters (requires_grad = False), and their moments, stay as they are.  Raises ValueError for settings that
    are out of their range.
    """

    def __init__(self, flat, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1):
        for name, value, holds in (
            ("beta1", beta1, 0 <= beta1 < 1),
            ("beta2", beta2, 0 <= beta2 < 1),
            ("eps", eps, eps > 0),
            ("weight_decay", weight_decay, 0 <= weight_decay < math.inf),
        ):
            if not holds:
                raise ValueError(f"AdamW: {name} = {value} is out of its range")
        self.flat, self.beta1, self.beta2, self.eps, self.weight_decay = flat, beta1, beta2, eps, weight_decay
        self.m = np.zeros_like(flat.weights)
        self.v = np.zeros_like(flat.weights)
        self.step = 0

    def update(self, grads, lr, scale=1.0, part=slice(None)):
        """Update the weights in `part` (a slice of the flat arrays) with grads * scale.

        The caller counts `step` up before the first part of an update.  Raises ValueError if it is still 0, or if there
        is not one gradient, of the weights' dtype, for each of the flat weights.
        """
        if self.step == 0:
            raise ValueError("update: step is 0; count it up before the first part of an update")
        if grads.shape != self.m.shape or grads.dtype != self.m.dtype:
            raise ValueError(
                f"update: grads must be {self.m.dtype}, of shape {self.m.shape}, got {grads.dtype}, {grads.shape}; a "
                f"part of them is chosen by `part`"
            )
        start, stop, _ = part.indices(len(self.m))
        cut = min(max(self.flat.n_decay, start), stop)
        for low, high, weight_decay in ((start, cut, self.weight_decay), (cut, stop, 0.0)):
            for a, b in self.flat.trained(low, high):
                adamw(
                    self.flat.weights[a:b], self.m[a:b], self.v[a:b], grads[a:b],
                    scale, lr, self.beta1, self.beta2, self.eps, weight_decay, self.step,
                )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# Muon


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
    poly, spare = empty(gram.shape, gram.dtype), empty(gram.shape, gram.dtype)
    q = empty(gram.shape, gram.dtype)
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
                for matrices in self._matrices(name, place, grads):
                    groups.setdefault(min(matrices[0].shape), []).append(matrices)
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

    def _matrices(self, name, place, grads):
        """The (weights, momentum, gradient) of a parameter's matrices."""
        rows, columns = self.flat.shapes[name]
        n = 3 if name.endswith("c_attn.weight") else 1
        views = [array[place].reshape(n, rows // n, columns) for array in (self.flat.weights, self.m, grads)]
        yield from zip(*views, strict=True)


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
