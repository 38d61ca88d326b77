"""Flat storage, AdamW, gradient clipping, and the learning rate's schedule.

All parameters of a model lie in one flat array, all gradients in another, AdamW's moments in two more: the update is
one pass over four arrays, which worker threads share slice by slice.
"""

import math

import numpy as np

from npgpt.jit import kernel, replaces

ALIGN = 16  # parameters start at multiples of this many elements (64 bytes in float32)


class FlatParameters:
    """Moves a model's parameters into one flat array and gives their gradients places in another.

    weights, grads    (size,) arrays; parameter.data and parameter.grad become views of them
    names             parameter's name -> slice
    n_decay           the matrices, which weight decay applies to, come first: elements 0 .. n_decay - 1

    share: another FlatParameters of an equal model whose weights are used instead of this model's own.
    """

    def __init__(self, model, share=None):
        named = sorted(model.named_parameters(), key=lambda item: item[1].ndim < 2)  # stable: matrices first
        self.names, self.parameters, self.n_decay, size = {}, [], 0, 0
        for name, parameter in named:
            self.names[name] = slice(size, size + parameter.size)
            self.parameters.append(parameter)
            size += -(-parameter.size // ALIGN) * ALIGN
            if parameter.ndim >= 2:
                self.n_decay = size
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
        for (name, place), parameter in zip(self.names.items(), self.parameters, strict=True):
            yield name, values[place].reshape(parameter.shape)

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
