"""The weights that a file holds for a GPT: which there must be, and whether they are those.

Files are looked at as a whole first: nothing large is allocated before names, shapes and dtypes are known to fit.
"""

import dataclasses
import reprlib
from dataclasses import dataclass

import numpy as np

from npgpt.config import GPTConfig
from npgpt.errors import CheckpointError
from npgpt.files import checkpoint

PREFIX = "transformer."  # of a weight's name
CHUNK = 2**18  # elements that are looked at in one go


def parameter_shapes(config):
    """(name, shape) of each parameter that GPT(config) has, which need not be made for it."""
    C = config.n_embd

    def layer(name, *shape):
        yield f"{name}.weight", shape
        if config.bias:
            yield f"{name}.bias", shape[:1]

    yield f"{PREFIX}wte.weight", (config.vocab_size, C)
    yield f"{PREFIX}wpe.weight", (config.block_size, C)
    for n in range(config.n_layer):
        block = f"{PREFIX}h.{n}."
        yield from layer(f"{block}ln_1", C)
        yield from layer(f"{block}attn.c_attn", 3 * C, C)
        yield from layer(f"{block}attn.c_proj", C, C)
        yield from layer(f"{block}ln_2", C)
        yield from layer(f"{block}mlp.c_fc", 4 * C, C)
        yield from layer(f"{block}mlp.c_proj", C, 4 * C)
    yield from layer(f"{PREFIX}ln_f", C)


@dataclass(frozen=True)
class Found:
    """What a path leads to: all that is needed to make a GPT, and the open files from which it is filled."""

    config: GPTConfig
    tokenizer: object  # None where there is none that can be opened
    places: dict  # parameter's name -> (Reader, name in its file, whether it stands there transposed)

    def copy_to(self, model):
        """Fill the parameters of a GPT of this config.  Raises CheckpointError for numbers that are not finite."""
        for name, parameter in model.named_parameters():
            reader, stored, transposed = self.places[name]
            reader.copy_to(stored, parameter.data.T if transposed else parameter.data)
            if not is_finite(parameter.data):
                raise CheckpointError(f"{reader.path}: {stored} has numbers that are not finite")


def fit(path, config, tokenizer):
    """Have a tokenizer keep to the tokens that a model knows.  (It may know more: some are padded.)

    Raises CheckpointError if there are others than added tokens that it does not know.
    """
    try:
        tokenizer.fit(config.vocab_size)
    except ValueError:
        words = f"vocab_size {config.vocab_size}, but its tokenizer has {tokenizer.vocab_size}"
        raise CheckpointError(f"{path}: {words}") from None


def gpt_config(values):
    """GPTConfig(**values) of values that came from a file: ValueError or UsageError if one is not what it must be."""
    if not isinstance(values, dict):
        raise ValueError("the model's settings are no JSON object")
    kinds = {f.name: f.type for f in dataclasses.fields(GPTConfig)}
    for name, value in values.items():
        if name not in kinds:
            raise ValueError(f"{name!r} is no setting of a GPT")
        if type(value) not in ((int, float) if kinds[name] is float else (kinds[name],)):
            raise ValueError(f"{name} must be of the type {kinds[name].__name__}, got {reprlib.repr(value)}")
        if value > 2**40:  # an array of that size there is not, and of far more no words either
            raise ValueError(f"{name} is {reprlib.repr(value)}")
    return GPTConfig(**values)


def at_most(n, config, path):
    """parameter_shapes; if there are only n arrays it refuses more layers at once, which might be without number."""
    if config.n_layer > n:
        raise CheckpointError(f"{path} has {n} arrays, which cannot be n_layer = {config.n_layer} layers")
    return parameter_shapes(config)


def check_entry(reader, name, shape):
    """Raise CheckpointError if a Reader has no floating-point array of this name and shape."""
    entry = reader.entries.get(name)
    if entry is None or entry.shape != shape:
        found = "nothing" if entry is None else entry.shape
        raise CheckpointError(f"{reader.path}: {name} must have shape {shape}, found {found}")
    if entry.dtype not in checkpoint.FLOATS:
        raise CheckpointError(f"{reader.path}: {name} has dtype {entry.dtype}; {', '.join(checkpoint.FLOATS)} are read")


def is_finite(array):
    """Whether all numbers of an array are finite; looks at some of them at a time."""
    flat = array.ravel(order="K")  # of an array that is transposed a view too
    return all(np.isfinite(flat[i : i + CHUNK]).all() for i in range(0, flat.size, CHUNK))
