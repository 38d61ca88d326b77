"""npgpt: a GPT in NumPy and Numba, with its own reverse-mode autograd.

    from npgpt import GPT, GPTConfig, Tensor
    from npgpt.gradcheck import gradcheck

Names are loaded when they are first used, so that a command line's `--help` need not wait for Numba.
"""

import importlib

__version__ = "0.1.0"

# public name -> module that defines it
_WHERE = {
    "Tensor": "npgpt.tensor",
    "no_grad": "npgpt.engine",
    "random_stream": "npgpt.kernels.masks",
    "GPT": "npgpt.model",
    "GPTConfig": "npgpt.config",
    "TrainConfig": "npgpt.config",
    "AdamW": "npgpt.optim",
    "DataParallel": "npgpt.run.parallel",
    "Trainer": "npgpt.run.trainer",
}

__all__ = [*_WHERE, "__version__"]


def __getattr__(name):
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'npgpt' has no attribute {name!r}")
