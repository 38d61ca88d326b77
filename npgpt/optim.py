"""Flat storage, AdamW, gradient clipping, and the learning rate's schedule.

All parameters of a model lie in one flat array, all gradients in another, AdamW's moments in two more: the update is
one pass over four arrays, which worker threads share slice by slice.
"""

import itertools
import math

import numpy as np

from npgpt.kernels.buffers import zeros
from npgpt.kernels.jit import kernel, replaces
from npgpt.kernels.tiles import fetch_to_write

ALIGN = 16  # parameters start at multiples of this many elements (64 bytes in float32)
CHUNK = 256  # weights that AdamW updates while it has the next ones fetched


class FlatParameters:
    """Moves a model's parameters into one flat array and gives their gradients places in another.

    weights, grads    (size,) arrays; parameter.data and parameter.grad become views of them
    names, shapes     parameter's name -> slice, shape
    n_hidden          the blocks' matrices come first: elements 0 .. n_hidden - 1
    n_decay           then the embeddings; weight decay applies to all matrices: elements 0 .. n_decay - 1
    share             another FlatParameters of an equal model whose weights are used instead of this model's own

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
                words = f"{named[0][0]} is {dtype}, and {name} {parameter.dtype}: all must have one dtype"
                raise ValueError(f"FlatParameters: {words}")
        for (name, one), (other_name, other) in itertools.combinations(named, 2) if share is None else ():
            if np.may_share_memory(one.data, other.data):
                words = f"{name} and {other_name} share memory; use one Parameter in both places"
                raise ValueError(f"FlatParameters: {words}")
        self.weights = zeros((size,), dtype) if share is None else share.weights
        self.grads = zeros((size,), dtype)
        views = zip(self.parameters, self.views(self.weights), self.views(self.grads), strict=True)
        for parameter, (_, data), (_, grad) in views:
            if share is None:
                data[...] = parameter.data
            parameter.move(data, grad)
        self._gradients = [parameter._gradient for parameter in self.parameters]
        self._places = [gradient.place for gradient in self._gradients]

    def __reduce_ex__(self, protocol):  # of its arrays there would be copies, and the parameters would keep theirs
        raise TypeError("FlatParameters, and an optimizer or DataParallel on them, cannot be copied: copy the model")

    def check_home(self):
        """Raise RuntimeError if the parameters are kept elsewhere by now."""
        for gradient, place in zip(self._gradients, self._places, strict=True):
            if gradient.place is not place:
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
        return [name for name, one in zip(self.names, self.parameters, strict=True) if not one.requires_grad]

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
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            grad, place = gradient.value, gradient.place
            if grad is None or not parameter.requires_grad:
                place[...] = 0
            elif grad is not place:  # it was assigned
                if np.shape(grad) != place.shape:
                    raise ValueError(f"a Parameter of shape {place.shape} has a .grad of shape {np.shape(grad)}")
                place[...] = grad
            gradient.value = place

    def zero_grad(self):
        """Before backward: the next gradients replace the old ones."""
        for gradient in self._gradients:
            gradient.value = None


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
    for start in range(0, p.size, CHUNK):
        fetch_to_write(p[start + CHUNK : start + 2 * CHUNK])  # (all workers have read the weights)
        some = slice(start, start + CHUNK)
        p_some, m_some, v_some, g_some = p[some], m[some], v[some], g[some]
        for i in range(len(p_some)):
            gi = g_some[i] * scale
            mi = b1 * m_some[i] + c1 * gi
            vi = b2 * v_some[i] + c2 * gi * gi
            m_some[i] = mi
            v_some[i] = vi
            p_some[i] = p_some[i] * keep - rate * mi / (np.sqrt(vi) * root + eps)


class AdamW:
    """AdamW over FlatParameters.  `step` counts the updates; m and v are the moments, arrays like flat.weights.

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
        self.m, self.v = (zeros(flat.weights.shape, flat.weights.dtype) for _ in range(2))
        self.step = 0

    def update(self, grads, lr, scale=1.0, part=slice(None)):
        """Update the weights in `part` (a slice of the flat arrays) with grads * scale; the caller has counted `step`.

        Raises ValueError if it is still 0, or if there is not one gradient, of the weights' dtype, for each weight.
        """
        if self.step == 0:
            raise ValueError("update: step is 0; count it up before the first part of an update")
        if grads.shape != self.m.shape or grads.dtype != self.m.dtype:
            words = f"must be {self.m.dtype}, of shape {self.m.shape}, got {grads.dtype}, {grads.shape}"
            raise ValueError(f"update: grads {words}; a part of them is chosen by `part`")
        start, stop, _ = part.indices(len(self.m))
        cut = min(max(self.flat.n_decay, start), stop)
        for low, high, weight_decay in ((start, cut, self.weight_decay), (cut, stop, 0.0)):
            for a, b in self.flat.trained(low, high):
                adamw(
                    self.flat.weights[a:b], self.m[a:b], self.v[a:b], grads[a:b],
                    scale, lr, self.beta1, self.beta2, self.eps, weight_decay, self.step,
                )  # fmt: skip


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
