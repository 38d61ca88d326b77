"""The first op of a forward or backward whose result is not finite."""

import numpy as np

from npgpt.engine import watched


class NotFinite(Exception):
    """What finite_checks found: its text names the op, and the direction."""


def finite_checks(names):
    """Within this context a result of an op, or a gradient that it makes, that is not finite raises NotFinite.

    names: id of a tensor -> what it is called, for the message; those of a model's parameters, say.
    """

    def check(arrays, direction, op, parents):
        if all(array is None or np.isfinite(array).all() for array in arrays):
            return
        named = [names[id(parent)] for parent in parents if id(parent) in names]
        raise NotFinite(f"the {direction} of {op}" + (f" with {', '.join(named)}" if named else ""))

    return watched(
        made=lambda op, out, parents, backward: check([out.data], "forward", op, parents),
        passed=lambda op, parents, grads: check(grads, "backward", op, parents),
    )
