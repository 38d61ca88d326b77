"""The GPT as a whole: its names, its initial weights, what it can learn, and how it generates."""

import dataclasses
import math

import numpy as np
import pytest

from npgpt.config import GPTConfig
from npgpt.engine import no_grad
from npgpt.errors import UsageError
from npgpt.model import GPT
from npgpt.optim import AdamW
from npgpt.run.parallel import DataParallel

CONFIG = GPTConfig(vocab_size=11, block_size=9, n_layer=2, n_head=2, n_embd=24)


def random_batch(vocab_size, B, T, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, vocab_size, (B, T)), rng.integers(0, vocab_size, (B, T))


def test_names_and_shapes_are_nanogpts():
    config = GPTConfig(vocab_size=11, block_size=9, n_layer=1, n_head=2, n_embd=24, bias=True)
    assert {name: parameter.shape for name, parameter in GPT(config).named_parameters()} == {
        "transformer.wte.weight": (11, 24),
        "transformer.wpe.weight": (9, 24),
        "transformer.h.0.ln_1.weight": (24,),
        "transformer.h.0.ln_1.bias": (24,),
        "transformer.h.0.attn.c_attn.weight": (72, 24),
        "transformer.h.0.attn.c_attn.bias": (72,),
        "transformer.h.0.attn.c_proj.weight": (24, 24),
        "transformer.h.0.attn.c_proj.bias": (24,),
        "transformer.h.0.ln_2.weight": (24,),
        "transformer.h.0.ln_2.bias": (24,),
        "transformer.h.0.mlp.c_fc.weight": (96, 24),
        "transformer.h.0.mlp.c_fc.bias": (96,),
        "transformer.h.0.mlp.c_proj.weight": (24, 96),
        "transformer.h.0.mlp.c_proj.bias": (24,),
        "transformer.ln_f.weight": (24,),
        "transformer.ln_f.bias": (24,),
    }
    assert not any(name.endswith("bias") for name, _ in GPT(CONFIG).named_parameters())


def test_number_of_parameters():
    # nanoGPT prints 0.80M for its CPU recipe, and 124.44M - 0.79M of positions for GPT-2
    assert GPT(GPTConfig(vocab_size=65), seed=None).num_params() == 795_904
    gpt2 = GPTConfig(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768, bias=True)
    model = GPT(gpt2, seed=None)
    assert model.num_params(non_embedding=False) == 124_439_808
    assert model.num_params() == 124_439_808 - 1024 * 768


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-13)])
def test_with_a_cache_the_logits_are_those_of_the_whole_context(dtype, tolerance):
    model = GPT(CONFIG, dtype=dtype)
    for n, parameter in enumerate(model.parameters()):
        parameter.data[...] = np.random.default_rng(n).normal(0, 0.5, parameter.shape)
    idx, _ = random_batch(11, 3, 9)
    for scale in (None, 0.7):
        model.transformer.h[1].attn.scale, cache = scale, []
        with no_grad():
            parts = [model(idx[:, a:b], cache=cache)[0].data for a, b in ((0, 4), (4, 5), (5, 6), (6, 9))]
            expected = model(idx)[0].data
        np.testing.assert_allclose(np.concatenate(parts, 1), expected, rtol=0, atol=tolerance * abs(expected).max())
        assert [part.shape for past in cache for part in past] == [(3, 2, 9, 12)] * 4


def test_what_a_cache_cannot_do_is_refused_and_changes_nothing():
    model, idx, cache = GPT(dataclasses.replace(CONFIG, dropout=0.1)), np.zeros((2, 9), int), []
    with no_grad(), pytest.raises(ValueError, match="past is without gradient and dropout"):
        model(idx, cache=cache)
    model.eval()
    with pytest.raises(ValueError, match="past is without gradient and dropout"):
        model(idx, cache=cache)
    with no_grad():
        model(idx[:, :7], cache=cache)
        with pytest.raises(ValueError, match="a sequence of 10 tokens is longer than block_size = 9"):
            model(idx[:, :3], cache=cache)
        with pytest.raises(ValueError, match=r"expected past of shape \(1, 2, n, hs\), got \(2, 2, 7, 12\)"):
            model(idx[:1, :1], cache=cache)
    assert [part.shape for past in cache for part in past] == [(2, 2, 7, 12)] * 4


def test_output_layer_is_the_token_embedding():
    model = GPT(CONFIG)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_initial_weights_have_gpt2s_spread():
    config = GPTConfig(vocab_size=300, block_size=200, n_layer=8, n_head=2, n_embd=96, bias=True)
    for name, parameter in GPT(config, seed=1).named_parameters():
        if parameter.ndim == 1:
            assert (parameter.data == (0 if name.endswith("bias") else 1)).all()
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert abs(parameter.data.std() / std - 1) < 0.05 and abs(parameter.data.mean()) < 0.1 * std, name


def test_same_seed_same_weights_other_seed_others():
    weights = [next(GPT(CONFIG, seed=seed).parameters()).data for seed in (1, 1, 2)]
    assert (weights[0] == weights[1]).all() and (weights[0] != weights[2]).any()


@pytest.mark.parametrize("vocab_size, n_layer, n_embd", [(103, 4, 128), (257, 2, 128), (65, 3, 64), (2000, 1, 48)])
def test_initial_loss_is_that_of_guessing(vocab_size, n_layer, n_embd):
    config = GPTConfig(vocab_size=vocab_size, block_size=32, n_layer=n_layer, n_embd=n_embd)
    _, loss = GPT(config)(*random_batch(vocab_size, 12, 32))
    assert abs(loss.item() - math.log(vocab_size)) < 0.05


def test_tied_weights_favour_the_input_token_at_the_start():
    # Why the bound above would not hold for a wide model of few tokens: the residual stream starts as wte[token] + wpe,
    # so the tied output layer gives the input token itself a head start of up to C 0.02^2 / (0.02 sqrt(2))
    V, C = 65, 128
    idx, _ = random_batch(V, 12, 32)
    logits = GPT(GPTConfig(vocab_size=V, block_size=32, n_layer=1, n_embd=C))(idx)[0].data
    own = np.take_along_axis(logits, idx[..., None], axis=2).mean()
    assert abs(logits.mean()) < 0.1 and 0.5 < own < C * 0.02 / math.sqrt(2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logits_shape_and_dtype(dtype):
    idx, targets = random_batch(11, 3, 5)
    logits, loss = GPT(CONFIG, dtype=dtype)(idx, targets)
    assert logits.shape == (3, 5, 11) and logits.dtype == dtype and loss.dtype == dtype
    assert GPT(CONFIG)(idx)[1] is None


def test_a_token_cannot_see_those_after_it():
    model = GPT(CONFIG, seed=3)
    for parameter in model.parameters():
        parameter.data[...] = np.random.default_rng(1).normal(size=parameter.shape)
    idx, _ = random_batch(11, 2, 9)
    before = model(idx)[0].data
    for t in range(1, 9):
        changed = idx.copy()
        changed[:, t:] = (changed[:, t:] + 1) % 11
        after = model(changed)[0].data
        assert (after[:, :t] == before[:, :t]).all()
        assert (after[:, t:] != before[:, t:]).any(axis=(0, 2)).all()


def test_one_batch_is_learnt_by_heart():
    parallel = DataParallel(GPT(GPTConfig(vocab_size=11, block_size=9, n_layer=2, n_head=2, n_embd=32)))
    optimizer = AdamW(parallel.flat, weight_decay=0.0)
    idx, targets = random_batch(11, 4, 9)
    for _ in range(200):
        parallel.zero_grad()
        loss = parallel.forward_backward(idx, targets)
        parallel.gather_grads()
        parallel.update(optimizer, 3e-3, 1.0)
    assert loss < 0.05


def test_wrong_configurations_are_refused():
    for wrong, words in (
        (dict(n_embd=10, n_head=4), "n_embd = 10 must be divisible by n_head = 4"),
        (dict(n_layer=0), "n_layer must be at least 1"),
        (dict(dropout=1.0), "dropout must be less than 1"),
        (dict(dropout=math.nan), "dropout must be a finite number"),
    ):
        with pytest.raises(UsageError, match=words):
            GPTConfig(**wrong)


def test_a_context_can_be_shortened_only():
    model = GPT(CONFIG)
    for block_size, error in ((10, ValueError), (0, UsageError)):
        with pytest.raises(error, match="block_size"):
            model.crop_block_size(block_size)
        assert model.config == CONFIG and model.transformer.wpe.weight.shape == (9, 24)
    model.crop_block_size(9)
    model.crop_block_size(4)
    assert model.config.block_size == 4 == len(model.transformer.wpe.weight.data)


def test_wrong_inputs_are_refused():
    model = GPT(CONFIG)
    for idx, words in (
        ([[1, 11]], r"0 \.\. 10"),
        ([[1, -1]], r"0 \.\. 10"),
        ([[0] * 10], "block_size = 9"),
        ([1, 2], r"shape \(B, T\)"),
        ([[0.5]], "integers"),
    ):
        with pytest.raises(ValueError, match=words):
            model(np.array(idx))
