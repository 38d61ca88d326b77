"""The gradient of an update in a live run against finite differences of the loss, on the batch at hand.

What is audited is what the optimizer is about to get: float32, made by all workers and kernels, summed over all
micro-steps.  What it is compared with knows no backward at all: a shadow of the model, with the same weights and the
same dropout masks in float64, whose loss L is computed on the whole batch at two points for each derivative,

    dL / dw along d = (L(w + h d) - L(w - h d)) / 2h + O(h^2)

Of each tensor these directions d are looked at:

- a few single entries, half of them drawn evenly, half in proportion to the size of the gradient that they have;
- one direction of random signs, +1 or -1 for each entry.  The derivative along it is the sum of all entries of the
  gradient with these signs, so errors show in it as their root of the sum of squares, about: they are seen from some
  thousandths of the length of the tensor's gradient on.  (Half of a tensor's being 1 % too large is; one typical entry
  of a million's missing is just at the edge.)  Two equal errors cancel every other time: the next audit draws anew.

What differs by more than BOUND is looked at again, as it may be rounding: float32 has few digits left of a p - y near
0, or of huge scores; finite differences of a loss of size 3 have none of a derivative of 1e-10.  So the gradient is
computed in the shadow, too, and it is right if both of these hold:

- the shadow's, in float64, agrees with finite differences to BOUND, at one of a few lengths of h d, by five points;
- the live one agrees with the shadow's to ROUNDINGS times what float32 loses, which is measured: by how much gradients
  in float32 differ if the last digits of weights and softmax do.

Of a training in bfloat16 the gradient of the same batch in float32 is audited so.  Its own may differ from that by
ROUNDED of the length, in each tensor.  Where a large batch's gradients cancel each other, and their rounding does not,
it differs by more.  Then it is right if it is as near to one whose operands NumPy has rounded.

What cannot be seen so is a mistake that forward and backward share, such as a mask that is one too short in both; and
one that is smaller than what float32 loses of this gradient.

A weight of block l does not change what the blocks before it put out.  That is computed once, so an evaluation starts
at block l; and the tensors are shared out among the threads that the training has anyway.
"""

import itertools
import time
from dataclasses import dataclass

import numpy as np

from npgpt.config import AUDIT
from npgpt.engine import no_grad
from npgpt.gradcheck import POINTS, slope
from npgpt.kernels.buffers import reuse_buffers
from npgpt.kernels.masks import masks_drawn, random_stream
from npgpt.model import GPT
from npgpt.ops.cross_entropy import cross_entropy
from npgpt.ops.embedding import embedding
from npgpt.optim import FlatParameters
from npgpt.run.parallel import DataParallel

# Worst error that passes at first sight.  What float32 loses in a right gradient is some 1e-5 in the presets and 3e-4
# in a batch of 16 tokens.  A mistake in the queries or keys may show as little as 2e-3 at first, when attention is
# nearly even.
BOUND = 1e-3
STEP = 5e-6  # length of h d as a share of the tensor's own: an entry is moved further alone than with all others
SMALLEST = 1e-2  # typical entry of a tensor whose entries are smaller still: biases start at 0

ROUNDED = 3e-2  # how far a tensor's gradient in bfloat16 may be from that in float32, as a share of its length

# At a second look
LONGER = 1, 10, 100, 1000, 0.03  # lengths of steps, in STEPs: a tiny gradient wants long ones, curvature a short one
COMMON = 100  # which is not yet too long for most
REPEATS = 5  # gradients in float32 that differ by rounding only
ROUNDINGS = 10  # how far off float32 may be, in units of how far these are from each other
EPS32, EPS64 = (float(np.finfo(dtype).eps) for dtype in (np.float32, np.float64))


@dataclass(frozen=True)
class Derivative:
    """One comparison."""

    name: str  # of the tensor
    place: str  # the entry's index, or the direction in words
    live: float  # what the backward says
    expected: float  # what finite differences say
    error: float  # their difference, as a share of what is typical for the tensor

    def __str__(self):
        both = f"backward gives {self.live:.6g}, finite differences {self.expected:.6g}"
        return f"{self.name} {self.place}: {both} (error {self.error:.1e}), bound {BOUND:.0e}"


@dataclass(frozen=True)
class Rounding:
    """How far a tensor's gradient in bfloat16 is from that in float32."""

    name: str  # of the tensor
    error: float  # length of the difference, as a share of the length
    is_rounding: bool  # and nothing else

    def __str__(self):
        return f"{self.name}: bfloat16 differs from float32 by {self.error:.1e} of its length, bound {ROUNDED:.0e}"


@dataclass(frozen=True)
class Audit:
    """What an audit found: the worst Derivative of each tensor."""

    worst_of: tuple
    n_derivatives: int
    seconds: float
    rounding: frozenset = frozenset()  # names of tensors whose error beyond BOUND is rounding, and nothing else
    rounded: tuple = ()  # a Rounding of each tensor, in a training in bfloat16

    @property
    def wrong(self):
        wrong = [found for found in self.worst_of if found.error > BOUND and found.name not in self.rounding]
        return wrong or [found for found in self.rounded if not found.is_rounding]

    @property
    def worst(self):
        return max(self.wrong or self.worst_of, key=lambda found: found.error)

    @property
    def passed(self):
        return not self.wrong

    def __str__(self):
        return (
            f"gradient checked at {self.n_derivatives} places: worst error {self.worst.error:.1e} in "
            f"{self.worst.name}{' (rounding is that coarse)' * (self.worst.name in self.rounding)}, "
            + (f"bfloat16 is off by {max(found.error for found in self.rounded):.1e}, " if self.rounded else "")
            + f"{self.seconds:.1f} s"
        )

    @property
    def errors(self):
        """Tensor's name -> its worst error, None if that is not finite."""
        return {found.name: found.error if np.isfinite(found.error) else None for found in self.worst_of}


class Auditor:
    """Audits the gradients of a DataParallel; entries: how many of each tensor are looked at."""

    def __init__(self, parallel, entries):
        self.live, self.dtype, self.entries = parallel.flat, parallel.dtype, entries
        # its workers share one set of weights; each has a model of its own, in which one tensor at a time is another
        shadow = GPT(parallel.model.config, seed=None, dtype=np.float64)
        self.shadow = DataParallel(shadow, len(parallel.replicas), parallel.blas)

    def audit(self, micro_batches, seed, stop):
        """An Audit of the gradient in live.grads, that of the mean loss over micro-batches; None if it was stopped.

        micro_batches  tuples x, y (B, T) and the seed of the dropout masks
        seed           numbers, from which the directions are drawn

        Raises ValueError for a model that is not GPT(config).
        """
        if other := self.live.model.difference():
            raise ValueError(f"an audit knows GPT(config) only: {other}")
        start, rng = time.perf_counter(), np.random.default_rng([*seed, AUDIT])
        self.shadow.flat.weights[...] = self.live.weights
        is_rounded = self.dtype == "bfloat16"
        in_float32 = self._once_more("float32", micro_batches, stop) if is_rounded else self.live.grads
        gradients, frozen = dict(self.live.views(in_float32)), self.live.frozen
        tensors = [
            Probes(name, gradients[name], weights, self.entries, np.random.default_rng([*seed, AUDIT, i]))
            for i, (name, weights) in enumerate(self.shadow.flat.views(self.shadow.flat.weights))
            if name not in frozen
        ]
        self._measure(tensors, micro_batches, stop)
        worst_of = tuple(tensor.compare(gradients[tensor.name]) for tensor in tensors)
        found = {tensor: worst.error for tensor, worst in zip(tensors, worst_of, strict=True) if worst.error > BOUND}
        suspects = sorted(found, key=found.get, reverse=True)
        rounding = self._look_again(suspects, gradients, micro_batches, rng, stop) if suspects else frozenset()
        rounded = self._rounded(gradients, micro_batches, stop) if is_rounded else ()
        if stop.number is not None:
            return None
        n, seconds = sum(len(tensor.places) for tensor in tensors), time.perf_counter() - start
        return Audit(worst_of, n, seconds, rounding, rounded)

    def _rounded(self, gradients, micro_batches, stop):
        """A Rounding of each tensor, whose gradients in float32 are given."""
        live = {name: grad for name, grad in self.live.views(self.live.grads) if name not in self.live.frozen}
        errors = {name: distance(grad, gradients[name]) for name, grad in live.items()}
        right = {name for name, error in errors.items() if error <= ROUNDED}
        if len(right) < len(errors):
            by_numpy = dict(self.live.views(self._once_more("rounded", micro_batches, stop)))
            right |= {name for name, grad in live.items() if distance(grad, by_numpy[name]) <= ROUNDED}
        return tuple(Rounding(name, error, name in right) for name, error in errors.items())

    def _once_more(self, dtype, micro_batches, stop):
        """What live.grads would be with another dtype, as in `products_of`."""
        model, workers = GPT(self.shadow.model.config, seed=None), len(self.shadow.replicas)
        parallel = DataParallel(model, workers, self.shadow.blas, dtype=dtype)
        parallel.flat.weights[...] = self.live.weights
        parallel.zero_grad()
        for micro_batch in micro_batches:
            if stop.number is None:
                parallel.forward_backward(*micro_batch, weight=1 / len(micro_batches))
        parallel.gather_grads()
        parallel.close()
        return parallel.flat.grads

    def _measure(self, tensors, micro_batches, stop, longer=None):
        """Measure the derivatives of the mean loss along the directions of some Probes; not all if it is stopped."""
        for tensor in tensors:
            tensor.measured[:] = 0
        for micro_batch in micro_batches:
            if stop.number is not None:
                return
            (kept,) = self.shadow.each(lambda _, batch=micro_batch: outputs(self.shadow.model, *batch), 1)

            def work(rank, kept=kept, micro_batch=micro_batch):
                replica = self.shadow.replicas[rank]
                for tensor in tensors[rank :: len(self.shadow.replicas)]:
                    loss = loss_from(replica, tensor.first_block(len(kept)), kept, *micro_batch)
                    parameter = dict(replica.model.named_parameters())[tensor.name]
                    own = parameter.data.copy()  # other workers go on with the weights as they are
                    with parameter.elsewhere(own):
                        tensor.measure(own.reshape(-1), loss, stop, 1 / len(micro_batches), longer)

            self.shadow.each(work)

    def _look_again(self, suspects, live, micro_batches, rng, stop):
        """The names of those Probes whose error is rounding, up to the first that is wrong."""
        weight, loss = 1 / len(micro_batches), 0.0
        self.shadow.zero_grad()
        for micro_batch in micro_batches:
            if stop.number is not None:
                return frozenset()
            loss += weight * self.shadow.forward_backward(*micro_batch, weight=weight)
        self.shadow.gather_grads()
        shadow = dict(self.shadow.flat.views(self.shadow.flat.grads))
        lost = self._rounding(micro_batches, rng, stop)

        def agrees(tensor, longer):
            self._measure([tensor], micro_batches, stop, longer)
            return tensor.compare(shadow[tensor.name], tensor.smallest(loss)).error <= BOUND

        def is_rounding(tensor):
            name = tensor.name
            most = BOUND * max(length(shadow[name]), tensor.smallest(loss)) + ROUNDINGS * lost[name]
            return length(live[name] - shadow[name]) <= most and any(agrees(tensor, longer) for longer in LONGER)

        return frozenset(tensor.name for tensor in itertools.takewhile(is_rounding, suspects))

    def _rounding(self, micro_batches, rng, stop):
        """Tensor's name -> the length of what rounding changes in its gradient in float32."""
        twin = GPT(self.shadow.model.config, seed=None)
        flat = FlatParameters(twin)
        first, lost = None, dict.fromkeys(flat.names, 0.0)

        def forward_backward(x, y, seed):
            with random_stream(seed), np.errstate(all="ignore"):
                logits, loss = twin(x, y)
                (loss + (logits * last_digit(logits.data, y, rng)).sum()).backward(1 / len(micro_batches))

        for _ in range(REPEATS):
            flat.weights[...] = self.live.weights * (1 + EPS32 * rng.integers(-2, 3, len(flat.weights)))
            flat.zero_grad()
            for micro_batch in micro_batches:
                if stop.number is not None:
                    return lost
                self.shadow.each(lambda _, batch=micro_batch: forward_backward(*batch), 1)
            flat.finish_grads()
            first = flat.grads.copy() if first is None else first
            for name, change in flat.views(flat.grads - first):
                lost[name] = max(lost[name], length(change))
        return lost


def length(values):
    """Root of the sum of squares, in float64."""
    return float(np.sqrt(np.square(values, dtype=np.float64).sum()))


def distance(values, others):
    """The length of the difference, as a share of the others'; 0 where neither has any, and infinity for NaN."""
    difference, whole = length(values - others), length(others)
    if difference == 0:
        return 0.0
    return difference / whole if np.isfinite(difference) and whole > 0 else np.inf


def last_digit(logits, targets, rng):
    """What float32 may add to the gradient of the mean cross-entropy: logits (B, T, V) -> (B, T, V).

    p = e^(z - lse) is off by the share by which z - lse is: that is the last digit of lse.  It is the same one wherever
    the text is the same, so there is one random number for each target.
    """
    m = logits.max(axis=-1, keepdims=True)
    lse = m + np.log(np.exp(logits - m).sum(axis=-1, keepdims=True))
    off = EPS32 / 2 * np.clip(np.abs(lse), 1, 16) * rng.normal(size=logits.shape[-1])[targets][..., None]
    return np.exp(logits - lse) * (off / targets.size).astype(logits.dtype)


def outputs(model, x, y, seed):
    """What each block of a model puts out, and how many masks are drawn by then: a list of (Tensor (B, T, C), n)."""
    kept, transformer = [], model.transformer
    with no_grad(), random_stream(seed):
        h = transformer.drop(embedding(x, transformer.wte.weight, transformer.wpe.weight))
        for block in transformer.h:
            h = block(h)
            kept.append((h, masks_drawn()))
    return kept


def loss_from(replica, first, kept, x, y, seed):
    """What computes the loss of a replica's model, whose blocks before number `first` put out what was kept."""
    model = replica.model
    h, drawn = kept[first - 1] if first else (None, 0)

    def loss():
        with no_grad(), random_stream(seed, drawn=drawn), reuse_buffers(replica.pool), np.errstate(all="ignore"):
            return cross_entropy(model.lm_head(model.features(x, h, first)), y).item()

    return loss


class Probes:
    """Directions of one tensor, and the sums of the derivatives along them that were measured.

    gradient, weights  of the tensor: what the backward made (float32), where it is looked at (float64)
    """

    def __init__(self, name, gradient, weights, entries, rng):
        self.name, self.shape = name, gradient.shape
        gradient = gradient.reshape(-1).astype(np.float64)
        even = rng.integers(gradient.size, size=entries - entries // 2)
        upto = np.cumsum(np.abs(gradient))
        large = np.searchsorted(upto, rng.random(entries // 2) * upto[-1])
        self.signs = rng.integers(0, 2, gradient.size, np.int8) * 2 - 1
        self.places = [*even.tolist(), *np.minimum(large, gradient.size - 1).tolist(), None]  # None: the direction
        self.length = STEP * max(SMALLEST * np.sqrt(gradient.size), length(weights))
        self.measured = np.zeros(len(self.places))

    def first_block(self, n_layer):
        """Number of the first block whose output depends on the tensor."""
        path = self.name.split(".")
        if path[:2] == ["transformer", "h"]:
            return int(path[2])
        return 0 if path[1] in ("wte", "wpe") else n_layer

    def smallest(self, loss):
        """A gradient must be longer than this for BOUND of it to be more than the rounding of the loss."""
        return 10 * EPS64 * max(1, loss) / (BOUND * COMMON * self.length / np.sqrt(self.signs.size))

    def measure(self, weights, loss, stop, weight, longer=None):
        """Add the derivatives of weight * loss(), a function of the weights (n,), to those measured so far.

        longer: if given, they are measured by five points, with steps that are so many times longer.
        """
        for k, i in enumerate(self.places):
            h = self.length * (longer or 1) / np.sqrt(self.signs.size if i is None else 1)
            place, step = (slice(None), h * self.signs) if i is None else (i, h)
            before, losses = weights[place].copy(), {}
            for point in POINTS if longer else POINTS[:2]:
                if stop.number is not None:
                    return
                weights[place] = before + point * step
                losses[point] = loss()
                weights[place] = before
            self.measured[k] += weight * (slope(losses, h) if longer else (losses[1] - losses[-1]) / (2 * h))

    def compare(self, gradient, smallest=0.0):
        """The worst Derivative of a gradient; one that is shorter than `smallest` is taken for that long."""
        gradient = gradient.reshape(-1).astype(np.float64)
        live = np.array([self.signs @ gradient if i is None else gradient[i] for i in self.places])
        # an entry is measured by the typical one, the sum of all with random signs by the typical sum
        norm = max(length(gradient), smallest)
        typical = [norm / (1 if i is None else np.sqrt(gradient.size)) for i in self.places]
        scale = np.maximum(np.abs(self.measured), typical)
        errors = np.abs(live - self.measured) / np.where(scale == 0, 1, scale)
        errors = np.where(np.isnan(errors), np.inf, errors)
        worst = int(errors.argmax())
        i = self.places[worst]
        words = "along random signs" if i is None else str([int(j) for j in np.unravel_index(i, self.shape)])
        return Derivative(self.name, words, float(live[worst]), float(self.measured[worst]), float(errors[worst]))
