"""What all benchmarks train: the standard workloads, their weights, their batches, and what a step costs."""

from dataclasses import dataclass

import numpy as np

from npgpt.config import GPTConfig


@dataclass(frozen=True)
class Workload:
    """A model's shape and a batch's; `steps` is what fills a second or more on two cores."""

    config: GPTConfig
    batch_size: int
    steps: int

    @property
    def tokens(self):
        """Tokens in a batch."""
        return self.batch_size * self.config.block_size

    def batches(self, n=8, seed=1):
        """n batches (idx, targets), each (B, T) int64, of random tokens."""
        rng = np.random.default_rng(seed)
        shape = (n, 2, self.batch_size, self.config.block_size)
        return [tuple(batch) for batch in rng.integers(0, self.config.vocab_size, shape)]

    def flops(self):
        """FLOPs of one training step."""
        return self.config.training_flops(self.batch_size, self.config.block_size)

    def __str__(self):
        c = self.config
        return (
            f"L{c.n_layer} H{c.n_head} C{c.n_embd} V{c.vocab_size} B{self.batch_size} T{c.block_size}, "
            f"{'biases' if c.bias else 'no biases'}, {self.flops() / 1e9:.1f} GFLOP a step"
        )


def _workload(L, H, C, V, B, T, bias, steps):
    config = GPTConfig(n_layer=L, n_head=H, n_embd=C, vocab_size=V, block_size=T, bias=bias)
    return Workload(config, B, steps)


WORKLOADS = {
    # the CPU recipe in nanoGPT's README
    "cpu": _workload(L=4, H=4, C=128, V=65, B=12, T=64, bias=False, steps=50),
    # nanoGPT's shakespeare_char, at a batch of 16 and without dropout
    "baby": _workload(L=6, H=6, C=384, V=65, B=16, T=256, bias=False, steps=2),
    # the same model with few long sequences
    "long": _workload(L=6, H=6, C=384, V=65, B=4, T=1024, bias=False, steps=2),
    # GPT-2 124M at llm.c's CPU setting, with the vocabulary that it has, not padded
    "gpt2": _workload(L=12, H=12, C=768, V=50257, B=4, T=64, bias=True, steps=2),
}


def initial_weights(shapes, seed=0):
    """Yield (name, float32 array) for a dict name -> shape: the same values for the same names and shapes.

    Both sides of a comparison draw their weights themselves, so that neither holds more in memory than it needs.
    """
    rng = np.random.default_rng(seed)
    for name, shape in sorted(shapes.items()):
        values = rng.standard_normal(shape, np.float32)
        values *= 0.02
        if ".ln_" in name and name.endswith("weight"):
            values += 1
        yield name, values


def initial_model(config):
    """npgpt's GPT with these weights."""
    from npgpt.model import GPT

    model = GPT(config, seed=None)
    parameters = dict(model.named_parameters())
    for name, values in initial_weights({name: p.shape for name, p in parameters.items()}):
        parameters[name].data[...] = values
    return model
