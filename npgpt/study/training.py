"""A small GPT that is trained for some steps on a fixed text: to see what a backward does to training."""

import contextlib

import numpy as np

from npgpt.config import GPTConfig
from npgpt.kernels.masks import random_stream
from npgpt.model import GPT
from npgpt.optim import AdamW, FlatParameters

STEPS = 12

# Shakespeare, sonnets 18 and 116
TEXT = """\
Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date;
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance or nature's changing course untrimm'd;
But thy eternal summer shall not fade,
Nor lose possession of that fair thou ow'st;
Nor shall Death brag thou wander'st in his shade,
When in eternal lines to time thou grow'st:
So long as men can breathe, or eyes can see,
So long lives this, and this gives life to thee.

Let me not to the marriage of true minds
Admit impediments. Love is not love
Which alters when it alteration finds,
Or bends with the remover to remove:
O no; it is an ever-fixed mark,
That looks on tempests, and is never shaken;
It is the star to every wandering bark,
Whose worth's unknown, although his height be taken.
Love's not Time's fool, though rosy lips and cheeks
Within his bending sickle's compass come;
Love alters not with his brief hours and weeks,
But bears it out even to the edge of doom.
If this be error and upon me proved,
I never writ, nor no man ever loved.
"""


def train(backward_context=contextlib.nullcontext):
    """The losses of the GPT's first steps; each backward runs inside of backward_context()."""
    characters = sorted(set(TEXT))
    tokens = np.array([characters.index(c) for c in TEXT])
    config = GPTConfig(vocab_size=len(characters), block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.1)
    model, rng = GPT(config, dtype=np.float64), np.random.default_rng(0)
    flat = FlatParameters(model)
    optimizer = AdamW(flat)
    losses = []
    for step in range(STEPS):
        starts = rng.integers(0, len(tokens) - config.block_size, 4)
        rows = starts[:, None] + np.arange(config.block_size)
        flat.zero_grad()
        with random_stream(step):
            _, loss = model(tokens[rows], tokens[rows + 1])
            with backward_context():
                loss.backward()
        flat.finish_grads()
        optimizer.step += 1
        optimizer.update(flat.grads, lr=1e-2)
        losses.append(loss.item())
    return losses
