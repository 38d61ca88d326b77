"""From logits to a token: which one comes next.

The controls act on the logits z (V,) one after the other, in the order of Hugging Face's transformers:

    repetition penalty    z_i -> z_i / r if z_i > 0 else z_i r, for each token i of the text so far (Keskar et al. 2019)
    temperature           z -> z / t;  0 takes the likeliest token
    top-k                 only the k likeliest tokens stay (Fan et al. 2018), and those as likely as the last of them
    top-p                 only the smallest set of likeliest tokens that has p of the probability (Holtzman et al. 2020)
    min-p                 only tokens of at least min_p times the likeliest one's probability (Nguyen et al. 2024)

and the token is drawn from the softmax of what is left.
"""

import math

import numpy as np

from npgpt.errors import CheckpointError

NOT_FINITE = "the model's logits are not finite: its weights, or those of a control, are out of range"


def probabilities(logits, texts, controls):
    """What the next tokens are drawn from, (B, V) float64: logits (B, V), the tokens of each text so far, Controls."""
    z = logits.astype(np.float64)
    if (r := controls.repetition_penalty) != 1:
        for row, text in zip(z, texts, strict=True):
            seen = np.unique(np.asarray(text, np.int64))
            seen = seen[seen < len(row)]
            row[seen] = np.where(row[seen] > 0, row[seen] / r, row[seen] * r)
    rows, best = np.arange(len(z)), likeliest(z)
    if controls.temperature == 0:
        p = np.zeros_like(z)
        p[rows, best] = 1
        return p
    z -= z[rows, best, None]
    with np.errstate(over="ignore"):
        z /= controls.temperature
    if controls.top_k is not None and controls.top_k < z.shape[1]:
        z[z < np.partition(z, -controls.top_k, axis=1)[:, -controls.top_k, None]] = -np.inf
    p = np.exp(z)
    p /= p.sum(axis=1, keepdims=True)
    if controls.top_p is None and not controls.min_p:
        return p
    if controls.top_p is not None and controls.top_p < 1:
        falling = -np.sort(-p, axis=1)
        n = (np.cumsum(falling, axis=1) < controls.top_p).sum(axis=1)  # that do not have it yet; the next one does
        p[p < falling[np.arange(len(p)), np.minimum(n, p.shape[1] - 1), None]] = 0
    if controls.min_p:
        p[p < controls.min_p * p.max(axis=1, keepdims=True)] = 0
    return p / p.sum(axis=1, keepdims=True)


def likeliest(logits):
    """The tokens (a list of B) of the highest logits (B, V), the first of equal ones: without probabilities, sooner."""
    tokens = logits.argmax(axis=1)  # (of a row with NaN, that one)
    if not np.isfinite(logits[np.arange(len(tokens)), tokens]).all():
        raise CheckpointError(NOT_FINITE)
    return tokens.tolist()


def choose(p, uniforms):
    """The tokens (a list of B) that uniform numbers in [0, 1), a list of B, pick from probabilities p (B, V)."""
    tokens = []
    for cumulative, uniform in zip(p.cumsum(axis=1), uniforms, strict=True):
        total = float(cumulative[-1])
        point = min(uniform * total, math.nextafter(total, 0))  # the product may be rounded up to the total itself
        tokens.append(int(cumulative.searchsorted(point, side="right")))
    return tokens
