"""What to say of a run whose numbers are not finite any more."""

import numpy as np

from npgpt.config import TrainConfig
from npgpt.engine import watched
from npgpt.errors import DivergedError
from npgpt.files import folder
from npgpt.kernels.masks import random_stream


def diverged(what, config, iteration):
    """The DivergedError of a run; what: which number is not finite."""
    factors = {  # how far settings that make a run diverge are above their defaults
        "learning_rate": config.learning_rate / TrainConfig.learning_rate,
        "min_lr": (config.min_lr or 0) / TrainConfig.learning_rate if config.decay_lr else 0,
        "muon_learning_rate": config.muon_learning_rate / TrainConfig.muon_learning_rate * (config.optimizer == "muon"),
        "weight_decay": config.weight_decay * config.learning_rate,  # from 1 on, weights change their sign
    }
    flag = max(factors, key=factors.get).replace("_", "-")
    good = folder.checkpoints(config.out_dir)
    hint = f"; the last good checkpoint is {good[0]}" if good else ""
    return DivergedError(f"{what} at iteration {iteration}{hint}. Try a smaller --{flag}")


class _NotFinite(Exception):
    """Its text names the op whose result, or gradient, is not finite, and the direction."""


def first_not_finite(model, micro_batches):
    """Words for the first op of an update whose result was not finite; found by doing the update once more."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def check(arrays, direction, op, parents):
        if not all(array is None or np.isfinite(array).all() for array in arrays):
            named = ", ".join(names[id(parent)] for parent in parents if id(parent) in names)
            raise _NotFinite(f", first in the {direction} of {op}" + (f" with {named}" if named else ""))

    checks = watched(
        made=lambda op, out, parents, backward: check([out.data], "forward", op, parents),
        passed=lambda op, parents, grads: check(grads, "backward", op, parents),
    )
    try:
        with checks, np.errstate(all="ignore"):
            for x, y, seed in micro_batches:
                with random_stream(seed):
                    model(x, y)[1].backward()
    except _NotFinite as error:
        return str(error)
    return ""
