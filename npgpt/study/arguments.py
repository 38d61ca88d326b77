"""Numbers for an op's references, of any sizes and any float dtype: for hints, tests and benchmarks."""

import numpy as np

from npgpt.study.lessons import LESSONS


class New:
    """new(3, 4): normal random numbers, an array of the dtype."""

    def __init__(self, dtype=np.float64, seed=0):
        self.rng, self.dtype = np.random.default_rng(seed), dtype

    def __call__(self, *shape):
        return np.asarray(self.rng.normal(size=shape)).astype(self.dtype)

    def integers(self, high, *shape):
        return self.rng.integers(0, high, shape)


def outputs(lesson, inputs):
    """What the forward makes of its arguments, {name: value}: the result, and what it keeps for the backward."""
    forward, _, _ = lesson.references()
    made = forward(*inputs.values())
    return made if isinstance(made, tuple) else (made,)


def backward_values(lesson, inputs, new, dy=None):
    """{name: value}: the forward's arguments, and what the backward is given beside them.

    What the backward adds to in place, as embedding's, has got numbers already.  dy: the gradient of the result.
    """
    _, _, parameters = lesson.references()
    y, *kept = outputs(lesson, inputs)
    dy = new(*y.shape) if dy is None else np.asarray(dy)
    values = {**inputs, **{name: new(*inputs[name[1:]].shape) for name in lesson.results if name in parameters}}
    values["dloss" if "dloss" in parameters else "dy"] = dy if dy.ndim else float(dy)
    values.update(zip([name for name in parameters if name not in values], kept, strict=True))
    return values


def lesson_of(reference):
    """The lesson whose forward or backward a function is, or None."""
    return next((lesson for lesson in LESSONS.values() if reference in lesson.references()[:2]), None)


def reference_arguments(reference, new, *sizes, dy=None, **named):
    """Arguments for a reference that a lesson knows, of these sizes: see the lesson's `arguments`."""
    lesson = lesson_of(reference)
    forward, _, parameters = lesson.references()
    inputs = lesson.arguments(new, *sizes, **named)
    if reference is forward:
        return list(inputs.values())
    values = backward_values(lesson, inputs, new, dy)
    return [values[name] for name in parameters]
