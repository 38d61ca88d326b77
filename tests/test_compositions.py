"""Every fused op, and a whole GPT, composed from Tensor's operators: the same figures and the same gradients.

The composed versions below are the formulas written down; their gradients are made by the engine and the primitives
alone.  The fused ops' gradients were derived by hand.  In float64 the two agree to rounding.
"""

import math

import numpy as np
import pytest

from npgpt import GPT, GPTConfig, Tensor, random_stream
from npgpt.kernels.masks import dropout_mask_ref, next_random_key
from npgpt.ops.attention import causal_attention
from npgpt.ops.cross_entropy import cross_entropy
from npgpt.ops.dropout import dropout
from npgpt.ops.embedding import embedding
from npgpt.ops.layernorm import layernorm
from npgpt.ops.linear import linear
from npgpt.ops.mlp import mlp
from npgpt.ops.primitives import where

# --------------------------------------------------------------------------------------------------------------------
# The formulas


def composed_embedding(idx, wte, wpe):
    return wte[idx] + wpe[: idx.shape[1]]


def composed_layernorm(x, weight, bias=None, eps=1e-5):
    centred = x - x.mean(axis=-1, keepdims=True)
    var = (centred * centred).mean(axis=-1, keepdims=True)
    y = centred / (var + eps) ** 0.5 * weight
    return y if bias is None else y + bias


def composed_linear(x, weight, bias=None):
    y = x @ weight.T
    return y if bias is None else y + bias


def composed_softmax(s):
    e = (s - s.max(axis=-1, keepdims=True)).exp()
    return e / e.sum(axis=-1, keepdims=True)


def composed_attention(qkv, n_head, p_drop=0.0):
    B, T, C3 = qkv.shape
    C = C3 // 3
    q, k, v = (
        qkv[:, :, i * C : (i + 1) * C].reshape(B, T, n_head, C // n_head).transpose(0, 2, 1, 3) for i in range(3)
    )
    s = q @ k.transpose(0, 1, 3, 2) / math.sqrt(C // n_head)
    p = composed_softmax(where(np.tri(T), s, -np.inf))
    if p_drop > 0:
        p = composed_dropout(p, p_drop)
    return (p @ v).transpose(0, 2, 1, 3).reshape(B, T, C)


def composed_gelu(z):
    return 0.5 * z * (1 + ((z + 0.044715 * z**3) * math.sqrt(2 / math.pi)).tanh())


def composed_mlp(x, w_fc, b_fc, w_proj, b_proj):
    return composed_linear(composed_gelu(composed_linear(x, w_fc, b_fc)), w_proj, b_proj)


def composed_cross_entropy(logits, targets):
    V = logits.shape[-1]
    rows = np.flatnonzero(targets != -1)
    p = composed_softmax(logits.reshape(-1, V)[rows])
    return -p[np.arange(len(rows)), targets.reshape(-1)[rows]].log().mean()


def composed_dropout(x, p):
    key, batch_offset = next_random_key()
    shape = (x.size // x.shape[-1], x.shape[-1])
    mask = dropout_mask_ref(key, batch_offset * (shape[0] // x.shape[0]), shape, p)
    return x * mask.reshape(x.shape) / (1 - p)


# --------------------------------------------------------------------------------------------------------------------
# Op by op

idx = np.array([[1, 0, 1, 6], [3, 1, 4, 4]])  # tokens that occur twice, and tokens that do not occur
targets = np.array([[1, 0, -1], [3, -1, 4]])

CASES = {  # title: (fused, composed, shapes of their inputs)
    "embedding": (lambda *a: embedding(idx, *a), lambda *a: composed_embedding(idx, *a), [(7, 5), (6, 5)]),
    "layernorm": (layernorm, composed_layernorm, [(2, 3, 7), (7,), (7,)]),
    "layernorm, no bias": (layernorm, composed_layernorm, [(4, 9), (9,)]),
    "linear": (linear, composed_linear, [(2, 3, 5), (7, 5), (7,)]),
    "linear, no bias": (linear, composed_linear, [(4, 5), (7, 5)]),
    "attention, 1 head": (lambda x: causal_attention(x, 1), lambda x: composed_attention(x, 1), [(2, 5, 12)]),
    "attention, 2 heads": (lambda x: causal_attention(x, 2), lambda x: composed_attention(x, 2), [(3, 5, 2 * 3 * 7)]),
    "attention, 3 heads": (lambda x: causal_attention(x, 3), lambda x: composed_attention(x, 3), [(2, 4, 3 * 3 * 5)]),
    "attention, T = 1": (lambda x: causal_attention(x, 2), lambda x: composed_attention(x, 2), [(3, 1, 18)]),
    "attention, 3 blocks of queries": (
        lambda x: causal_attention(x, 2),
        lambda x: composed_attention(x, 2),
        [(1, 260, 2 * 3 * 3)],
    ),
    "attention, dropout": (
        lambda x: causal_attention(x, 2, 0.3),
        lambda x: composed_attention(x, 2, 0.3),
        [(3, 5, 2 * 3 * 7)],
    ),
    "mlp": (mlp, composed_mlp, [(2, 3, 5), (11, 5), (11,), (5, 11), (5,)]),
    "mlp, no bias": (
        lambda x, w_fc, w_proj: mlp(x, w_fc, None, w_proj, None),
        lambda x, w_fc, w_proj: composed_mlp(x, w_fc, None, w_proj, None),
        [(4, 5), (11, 5), (5, 11)],
    ),
    "cross-entropy": (
        lambda logits: cross_entropy(logits, targets),
        lambda logits: composed_cross_entropy(logits, targets),
        [(2, 3, 5)],
    ),
    "dropout": (lambda x: dropout(x, 0.4), lambda x: composed_dropout(x, 0.4), [(3, 2, 7)]),
}


def output_and_gradients(op, arrays):
    inputs = [Tensor(array.copy(), requires_grad=True) for array in arrays]
    with random_stream(5, batch_offset=2):
        y = op(*inputs)
    y.backward(np.random.default_rng(1).normal(size=y.shape))
    return y.data, [x.grad for x in inputs]


@pytest.mark.parametrize("title", CASES)
def test_the_fused_op_is_the_composed_one(title):
    fused, composed, shapes = CASES[title]
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in shapes]
    y, grads = output_and_gradients(fused, arrays)
    y_composed, grads_composed = output_and_gradients(composed, arrays)
    np.testing.assert_allclose(y, y_composed, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(grads, grads_composed, strict=True):
        assert np.abs(theirs).max() > 1e-3  # there is something to compare
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10 * np.abs(theirs).max())


@pytest.mark.parametrize("title", CASES)
def test_an_input_without_requires_grad_changes_no_other_gradient(title):
    fused, _, shapes = CASES[title]
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in shapes]
    _, expected = output_and_gradients(fused, arrays)
    for frozen in range(len(arrays) if len(arrays) > 1 else 0):
        inputs = [Tensor(array.copy(), requires_grad=i != frozen) for i, array in enumerate(arrays)]
        y = fused(*inputs)
        y.backward(np.random.default_rng(1).normal(size=y.shape))
        for i, x in enumerate(inputs):
            if i == frozen:
                assert x.grad is None
            else:
                np.testing.assert_array_equal(x.grad, expected[i])


# --------------------------------------------------------------------------------------------------------------------
# A whole GPT: two layers, tied embedding


def composed_gpt(config, weights, idx, targets):
    """logits, loss of a GPT whose parameters are given by name."""

    def layer(name):  # weight, and bias if there is one
        return [weights[f"{name}.{part}"] for part in ("weight", "bias") if f"{name}.{part}" in weights]

    def drop(x):
        return composed_dropout(x, config.dropout) if config.dropout else x

    wte = weights["transformer.wte.weight"]
    x = drop(composed_embedding(idx, wte, weights["transformer.wpe.weight"]))
    for i in range(config.n_layer):
        block = f"transformer.h.{i}"
        qkv = composed_linear(composed_layernorm(x, *layer(f"{block}.ln_1")), *layer(f"{block}.attn.c_attn"))
        y = composed_attention(qkv, config.n_head, config.dropout)
        x = x + drop(composed_linear(y, *layer(f"{block}.attn.c_proj")))
        h = composed_gelu(composed_linear(composed_layernorm(x, *layer(f"{block}.ln_2")), *layer(f"{block}.mlp.c_fc")))
        x = x + drop(composed_linear(h, *layer(f"{block}.mlp.c_proj")))
    logits = composed_layernorm(x, *layer("transformer.ln_f")) @ wte.T
    return logits, composed_cross_entropy(logits, targets)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_gpt_of_primitives_has_the_models_loss_and_gradients(bias, dropout):
    config = GPTConfig(vocab_size=11, block_size=7, n_layer=2, n_head=2, n_embd=10, bias=bias, dropout=dropout)
    model = GPT(config, dtype=np.float64)
    rng = np.random.default_rng(0)
    for parameter in model.parameters():
        parameter.data[...] = rng.normal(size=parameter.shape) * (0.5 if parameter.ndim == 2 else 1.0)
    idx, targets = rng.integers(0, 11, (3, 5)), rng.integers(0, 11, (3, 5))
    targets[1, 2] = -1
    weights = {name: Tensor(p.data.copy(), requires_grad=True) for name, p in model.named_parameters()}

    with random_stream(3):
        logits, loss = model(idx, targets)
    with random_stream(3):
        composed_logits, composed_loss = composed_gpt(config, weights, idx, targets)
    np.testing.assert_allclose(logits.data, composed_logits.data, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(loss.item(), composed_loss.item(), rtol=1e-10)

    loss.backward()
    composed_loss.backward()
    assert len(weights) == len(list(model.parameters())) == (28 if bias else 15)
    for name, parameter in model.named_parameters():
        theirs = weights[name].grad
        np.testing.assert_allclose(
            parameter.grad, theirs, rtol=1e-10, atol=1e-10 * np.abs(theirs).max(), err_msg=name
        )  # fmt: skip
