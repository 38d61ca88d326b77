"""The gradient of an update in a live run against finite differences of the loss, on the batch at hand.

What is audited is what the optimizer is about to get: float32, made by all workers and kernels, summed over all
micro-steps.  What it is compared with knows no backward at all: a shadow of the model, with the same weights and the
same dropout masks in float64, whose loss L is computed on the whole batch at two points for each derivative,

    dL / dw along d = (L(w + h d) - L(w - h d)) / 2h + O(h^2)

Of each tensor these directions d are looked at:

- a few single entries, half of them drawn evenly, half in proportion to the size of the gradient that they have;
- one direction of random signs, +1 or -1 for each entry: a mistake anywhere in the tensor shows in it.  The derivative
  along it is the sum of all entries of the gradient with these signs.

If that looks wrong, the same backward is run in the shadow, too: a mistake in it is there as well, rounding is not.

What cannot be seen so is a mistake that forward and backward share, such as a mask that is one too short in both.

A weight of block l does not change what the blocks before it put out.  That is computed once, so an evaluation starts
at block l; and the tensors are shared out among the threads that the training has anyway.
"""

import contextlib
import time
from dataclasses import dataclass

import numpy as np

from npgpt.config import AUDIT
from npgpt.engine import next_random_key, no_grad, random_stream, reuse_buffers
from npgpt.model import GPT
from npgpt.parallel import DataParallel

# Worst error that passes.  What float32 loses in a right gradient is some 1e-5 in the presets and 3e-4 in a batch of 16
# tokens.  A mistake in the queries or keys may show as little as 2e-3 at first, when attention is nearly even.
BOUND = 1e-3
# But where a learning rate several times too large has made attention's scores huge, float32 loses 4e-3.  An error up
# to this passes too, if the same backward in float64 stays below BOUND.
ROUNDING = 5e-2
STEP = 5e-6  # length of h d as a share of the tensor's own: an entry is moved further alone than with all others
SMALLEST = 1e-2  # typical entry of a tensor whose entries are smaller still: biases start at 0
MASKS = 3  # random masks that a block draws: attention's weights, and what attention and MLP add to the residual stream

clock = time.perf_counter


@dataclass(frozen=True)
class Derivative:
    """One comparison."""

    name: str  # of the tensor
    place: str  # the entry's index, or the direction in words
    live: float  # what the backward says
    expected: float  # what finite differences say
    error: float  # their difference, as a share of what is typical for the tensor

    def __str__(self):
        return (
            f"{self.name} {self.place}: backward gives {self.live:.6g}, finite differences {self.expected:.6g} "
            f"(error {self.error:.1e})"
        )


@dataclass(frozen=True)
class Audit:
    """What an audit found: the worst Derivative of each tensor."""

    worst_of: tuple
    n_derivatives: int
    seconds: float
    rounding: bool = False  # whether an error beyond BOUND is that of float32, and of nothing else

    @property
    def worst(self):
        return max(self.worst_of, key=lambda found: found.error)

    @property
    def passed(self):
        return self.worst.error <= BOUND or self.rounding

    def __str__(self):
        return (
            f"gradient checked at {self.n_derivatives} places: worst error {self.worst.error:.1e} in "
            f"{self.worst.name}{' (float32 is that coarse)' * self.rounding}, {self.seconds:.1f} s"
        )

    @property
    def errors(self):
        """Tensor's name -> its worst error, None if that is not finite."""
        return {found.name: found.error if np.isfinite(found.error) else None for found in self.worst_of}


class Auditor:
    """Audits the gradients of a DataParallel.

    entries  how many single entries of each tensor are looked at
    """

    def __init__(self, parallel, entries):
        self.live, self.entries = parallel.flat, entries
        # its workers share one set of weights; each has a model of its own, in which one tensor at a time is another
        shadow = GPT(parallel.model.config, seed=None, dtype=np.float64)
        self.shadow = DataParallel(shadow, len(parallel.replicas), parallel.blas)

    def audit(self, micro_batches, seed, stop):
        """An Audit of the gradient in live.grads, that of the mean loss over micro-batches; None if it was stopped.

        micro_batches  tuples x, y (B, T) and the seed of the dropout masks
        seed           numbers, from which the directions are drawn
        """
        start = clock()
        self.shadow.flat.weights[...] = self.live.weights
        tensors = [
            Probes(name, gradient, weights, self.entries, np.random.default_rng([*seed, AUDIT, i]))
            for i, ((name, gradient), (_, weights)) in enumerate(
                zip(self.live.views(self.live.grads), self.shadow.flat.views(self.shadow.flat.weights), strict=True)
            )
        ]
        for micro_batch in micro_batches:
            (kept,) = self.shadow.each(lambda _, batch=micro_batch: outputs(self.shadow.model, *batch), 1)

            def work(rank, kept=kept, micro_batch=micro_batch):
                replica = self.shadow.replicas[rank]
                for tensor in tensors[rank :: len(self.shadow.replicas)]:
                    loss = loss_from(replica, tensor.first_block(len(kept)), kept, *micro_batch)
                    parameter = dict(replica.model.named_parameters())[tensor.name]
                    shared = parameter.data
                    parameter.data = shared.copy()  # other workers go on with the weights as they are
                    try:
                        tensor.measure(parameter.data.reshape(-1), loss, stop)
                    finally:
                        parameter.data = shared

            self.shadow.each(work)
            if stop.number is not None:
                return None
        worst_of = self._compare(tensors, self.live, len(micro_batches))
        rounding = False
        if BOUND < max(found.error for found in worst_of) <= ROUNDING:
            self.shadow.zero_grad()
            for micro_batch in micro_batches:
                self.shadow.forward_backward(*micro_batch, weight=1 / len(micro_batches))
            self.shadow.gather_grads()
            again = self._compare(tensors, self.shadow.flat, len(micro_batches))
            rounding = all(found.error <= BOUND for found in again)
        return Audit(worst_of, sum(len(tensor.places) for tensor in tensors), clock() - start, rounding)

    def _compare(self, tensors, flat, n):
        """The worst Derivative of each tensor, with the gradients in a FlatParameters."""
        return tuple(
            tensor.compare(gradient, n) for tensor, (_, gradient) in zip(tensors, flat.views(flat.grads), strict=True)
        )


def outputs(model, x, y, seed):
    """What each block of a model puts out: a list of Tensors (B, T, C)."""
    kept = []

    def keeping(block):
        def forward(x):
            kept.append(block(x))
            return kept[-1]

        return forward

    with _blocks(model, [keeping(block) for block in model.transformer.h]), no_grad(), random_stream(seed):
        model(x, y)
    return kept


def loss_from(replica, first, kept, x, y, seed):
    """What computes the loss of a replica's model, whose blocks before number `first` put out what was kept."""
    model = replica.model

    def known(_):
        for _ in range(MASKS * first if model.config.dropout > 0 else 0):
            next_random_key()
        return kept[first - 1]

    def loss():
        blocks = model.transformer.h[first:]
        with (
            _blocks(model, [known, *blocks] if first else blocks), no_grad(), random_stream(seed),
            reuse_buffers(replica.pool), np.errstate(all="ignore"),
        ):  # fmt: skip
            return model(x, y)[1].item()

    return loss


@contextlib.contextmanager
def _blocks(model, blocks):
    """Within this context a model has other blocks."""
    before, model.transformer.h = model.transformer.h, blocks
    try:
        yield
    finally:
        model.transformer.h = before


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
        self.length = STEP * max(SMALLEST * np.sqrt(gradient.size), float(np.sqrt(np.square(weights).sum())))
        self.measured = np.zeros(len(self.places))

    def first_block(self, n_layer):
        """Number of the first block whose output depends on the tensor."""
        path = self.name.split(".")
        if path[:2] == ["transformer", "h"]:
            return int(path[2])
        return 0 if path[1] in ("wte", "wpe") else n_layer

    def measure(self, weights, loss, stop):
        """Add the derivatives of loss(), a function of the weights (n,), to those measured so far."""
        for k, i in enumerate(self.places):
            h = self.length / np.sqrt(self.signs.size if i is None else 1)
            place, step = (slice(None), h * self.signs) if i is None else (i, h)
            before, losses = weights[place].copy(), []
            for sign in (1, -1):
                if stop.number is not None:
                    return
                weights[place] = before + sign * step
                losses.append(loss())
                weights[place] = before
            self.measured[k] += (losses[0] - losses[1]) / (2 * h)

    def compare(self, gradient, n):
        """The worst Derivative of a gradient, if the loss is the mean of the n that were measured."""
        gradient = gradient.reshape(-1).astype(np.float64)
        live = np.array([self.signs @ gradient if i is None else gradient[i] for i in self.places])
        expected = self.measured / n
        # an entry is measured by the typical one, the sum of all with random signs by the typical sum
        norm = np.sqrt(gradient @ gradient)
        typical = [norm / (1 if i is None else np.sqrt(gradient.size)) for i in self.places]
        scale = np.maximum(np.abs(expected), typical)
        differences = np.abs(live - expected)
        errors = differences / np.where(scale == 0, 1, scale)
        errors = np.where(np.isnan(errors), np.inf, errors)
        worst = int(errors.argmax())
        i = self.places[worst]
        words = "along random signs" if i is None else str([int(j) for j in np.unravel_index(i, self.shape)])
        return Derivative(self.name, words, float(live[worst]), float(expected[worst]), float(errors[worst]))
