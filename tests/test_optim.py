"""Flat storage, AdamW, clipping and the learning rate's schedule."""

import math

import numpy as np
import pytest

from npgpt import GPT, AdamW, GPTConfig, Tensor
from npgpt.kernels.jit import KERNELS
from npgpt.muon import Muon, inverse_root
from npgpt.nn import Linear, Module
from npgpt.optim import ALIGN, FlatParameters, clip_scale, cosine_lr, sum_of_squares


def small_gpt(seed=1, dtype=np.float64):
    config = GPTConfig(vocab_size=11, block_size=7, n_layer=2, n_head=3, n_embd=9, bias=True)
    return GPT(config, seed=seed, dtype=dtype)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 11, (3, 5)), rng.integers(0, 11, (3, 5))


# --------------------------------------------------------------------------------------------------------------------
# Flat storage


def test_weights_keep_their_values_and_become_views_of_one_array():
    model = small_gpt()
    before = {name: parameter.data.copy() for name, parameter in model.named_parameters()}
    flat = FlatParameters(model)
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(parameter.data, before[name])
        np.testing.assert_array_equal(flat.weights[flat.names[name]].reshape(parameter.shape), before[name])
        assert np.shares_memory(parameter.data, flat.weights)
    flat.weights[...] = 3
    assert all((parameter.data == 3).all() for parameter in model.parameters())
    assert model.lm_head.weight is model.transformer.wte.weight  # still tied


def test_parameters_are_aligned_do_not_overlap_and_leave_zeros_between_them():
    model = small_gpt()
    flat = FlatParameters(model)
    places = sorted(flat.names.values(), key=lambda place: place.start)
    assert len(places) == len(list(model.parameters()))
    assert all(place.start % ALIGN == 0 for place in places)
    assert all(a.stop <= b.start < a.stop + ALIGN for a, b in zip(places, places[1:], strict=False))
    assert len(flat.weights) == len(flat.grads) and len(flat.weights) % ALIGN == 0
    assert 0 <= len(flat.weights) - places[-1].stop < ALIGN
    model(*batch())[1].backward()
    padding = np.ones(len(flat.weights), bool)
    for place in places:
        padding[place] = False
    assert padding.any() and not flat.weights[padding].any() and not flat.grads[padding].any()


def test_matrices_come_first():
    model = small_gpt()
    flat = FlatParameters(model)
    for name, parameter in model.named_parameters():
        place = flat.names[name]
        assert place.stop <= flat.n_decay if parameter.ndim == 2 else place.start >= flat.n_decay
    assert 0 < flat.n_decay < len(flat.weights)


def test_gradients_are_written_into_the_flat_array():
    model, plain = small_gpt(), small_gpt()
    flat = FlatParameters(model)
    flat.grads[...] = np.nan  # whatever was there
    for times in (1, 2):  # the second backward adds
        model(*batch())[1].backward()
        plain(*batch())[1].backward()
        for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert np.shares_memory(parameter.grad, flat.grads)
            np.testing.assert_array_equal(flat.grads[flat.names[name]], other.grad.reshape(-1), f"{name} {times}")
    twice = flat.grads.copy()
    flat.zero_grad()
    model(*batch())[1].backward()  # replaces
    places = np.concatenate([np.arange(len(twice))[place] for place in flat.names.values()])
    np.testing.assert_allclose(flat.grads[places], twice[places] / 2)


def test_parameters_that_the_loss_does_not_depend_on_get_a_gradient_of_zero():
    class TwoLayers(Module):
        def __init__(self):
            self.used, self.unused = Linear(3, 2, True, np.float64), Linear(3, 2, True, np.float64)

    model = TwoLayers()
    flat = FlatParameters(model)
    flat.grads[...] = np.nan  # whatever was there
    model.used(Tensor(np.ones((4, 3)))).backward(np.ones((4, 2)))
    flat.finish_grads()
    np.testing.assert_array_equal(flat.grads[flat.names["unused.weight"]], 0)
    np.testing.assert_array_equal(flat.grads[flat.names["unused.bias"]], 0)
    np.testing.assert_array_equal(flat.grads[flat.names["used.weight"]], 4)
    np.testing.assert_array_equal(flat.grads[flat.names["used.bias"]], 4)


def test_a_twin_shares_the_weights_and_owns_its_gradients():
    model, twin = small_gpt(seed=1), small_gpt(seed=2)
    flat = FlatParameters(model)
    before = flat.weights.copy()
    twin_flat = FlatParameters(twin, share=flat)
    assert twin_flat.weights is flat.weights and not np.shares_memory(twin_flat.grads, flat.grads)
    np.testing.assert_array_equal(flat.weights, before)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert np.shares_memory(ours.data, theirs.data)
    assert model(*batch())[1].item() == twin(*batch())[1].item()


# --------------------------------------------------------------------------------------------------------------------
# AdamW


def textbook_adamw(weights, gradients, lr, beta1, beta2, eps, weight_decay, scale):
    """Loshchilov and Hutter's algorithm 2, number by number, for the weights of one parameter."""
    weights, m, v = list(weights), [0.0] * len(weights), [0.0] * len(weights)
    for t, gradient in enumerate(gradients, start=1):
        for i, g in enumerate(gradient):
            g *= scale
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            m_hat = m[i] / (1 - beta1**t)
            v_hat = v[i] / (1 - beta2**t)
            weights[i] -= lr * (m_hat / (math.sqrt(v_hat) + eps) + weight_decay * weights[i])
    return weights


@pytest.mark.parametrize("cuts", [[], [48], [16, 480, 496]], ids=["whole", "two parts", "four parts"])
def test_adamw_is_the_textbooks_loop_with_decay_on_matrices_only(cuts):
    model = small_gpt()
    flat = FlatParameters(model)
    rng = np.random.default_rng(0)
    flat.weights[...] = rng.normal(size=flat.weights.shape)
    before = flat.weights.copy()
    gradients = rng.normal(size=(5, len(before))) * 10.0 ** rng.integers(-4, 2, len(before))
    optimizer = AdamW(flat, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.3)
    ends = [0, *cuts, len(before)]
    for gradient in gradients:
        optimizer.step += 1
        for start, stop in zip(ends, ends[1:], strict=False):
            optimizer.update(gradient, lr=0.02, scale=0.7, part=slice(start, stop))

    for name, parameter in model.named_parameters():
        place = flat.names[name]
        decay = 0.3 if parameter.ndim == 2 else 0.0
        expected = textbook_adamw(before[place], gradients[:, place], 0.02, 0.8, 0.95, 1e-6, decay, scale=0.7)
        np.testing.assert_allclose(flat.weights[place], expected, rtol=1e-12, atol=1e-12, err_msg=name)


def test_the_first_step_has_the_length_of_the_learning_rate_whatever_the_gradients_size():
    """That is what the correction of the bias is for: m_hat / sqrt(v_hat) = g / |g|."""
    flat = FlatParameters(small_gpt())
    before = flat.weights.copy()
    optimizer = AdamW(flat, weight_decay=0.0)
    optimizer.step = 1
    gradients = np.random.default_rng(0).normal(size=len(before)) * 100
    optimizer.update(gradients, lr=0.01)
    np.testing.assert_allclose(flat.weights, before - 0.01 * np.sign(gradients), rtol=0, atol=1e-6)


@pytest.mark.parametrize("make_optimizer", [AdamW, lambda flat: Muon(flat, rate=5.0)], ids=["AdamW", "Muon"])
def test_an_update_whose_step_was_not_counted_changes_nothing(make_optimizer):
    flat = FlatParameters(small_gpt())
    before = flat.weights.copy()
    with pytest.raises(ValueError, match="step is 0; count it up"):
        make_optimizer(flat).update(np.ones_like(flat.weights), 1e-3)
    np.testing.assert_array_equal(flat.weights, before)


def test_a_weight_without_gradient_only_decays():
    flat = FlatParameters(small_gpt())
    flat.weights[...] = 1
    optimizer = AdamW(flat, weight_decay=0.5)
    for _ in range(3):
        optimizer.step += 1
        optimizer.update(np.zeros_like(flat.weights), lr=0.1)
    np.testing.assert_allclose(flat.weights[: flat.n_decay], (1 - 0.1 * 0.5) ** 3)
    np.testing.assert_array_equal(flat.weights[flat.n_decay :], 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sum_of_squares_adds_up_in_float64(dtype):
    value = 1 + 2.0**-12  # all digits of the squares' sum fit into float64, in any order; float32 rounds even a square
    total = np.zeros(())
    sum_of_squares(total, np.full(1_000_000, value, dtype))
    assert total == 1e6 * value**2


# --------------------------------------------------------------------------------------------------------------------
# Clipping and schedule


def test_gradients_longer_than_the_limit_are_cut_to_it_and_shorter_ones_are_left():
    assert clip_scale(0.5, 1.0) == 1.0
    assert clip_scale(0.0, 1.0) == 1.0
    assert clip_scale(4.0, 1.0) == pytest.approx(0.25)
    assert clip_scale(4.0, 2.0) == pytest.approx(0.5)
    assert clip_scale(4.0, 8.0) == 1.0
    assert clip_scale(1e30, 1.0) * 1e30 == pytest.approx(1.0)


def test_no_clipping_with_a_limit_of_zero():
    assert clip_scale(1e9, 0) == clip_scale(1e9, 0.0) == 1.0


@pytest.mark.parametrize(
    "iteration, lr",
    [
        (0, 1.0 * 1 / 11),  # never 0: the first update would be lost
        (4, 1.0 * 5 / 11),
        (9, 1.0 * 10 / 11),
        (10, 1.0),  # the end of the warmup is the peak
        (60, 0.55),  # half way: between learning_rate and min_lr
        (35, 0.1 + 0.9 * (0.5 + math.sqrt(0.125))),  # a quarter: cos(pi / 4)
        (109, 0.1 + 0.45 * (1 + math.cos(math.pi * 0.99))),
        (110, 0.1),
        (1000, 0.1),
    ],
)
def test_schedule(iteration, lr):
    assert cosine_lr(iteration, 1.0, 0.1, warmup_iters=10, lr_decay_iters=110) == pytest.approx(lr)


def test_schedule_without_warmup_starts_at_the_peak():
    assert cosine_lr(0, 1.0, 0.1, warmup_iters=0, lr_decay_iters=100) == 1.0
    assert cosine_lr(50, 1.0, 0.1, warmup_iters=0, lr_decay_iters=100) == pytest.approx(0.55)
    assert cosine_lr(100, 1.0, 0.1, warmup_iters=0, lr_decay_iters=100) == 0.1


@pytest.mark.parametrize("lr_decay_iters", [0, 5, 10])
def test_schedule_whose_decay_ends_before_its_warmup(lr_decay_iters):
    rates = [cosine_lr(i, 1.0, 0.1, warmup_iters=10, lr_decay_iters=lr_decay_iters) for i in (0, 9, 10, 11, 99)]
    assert rates == pytest.approx([1 / 11, 10 / 11, 0.1, 0.1, 0.1])


def test_schedule_never_rises_after_its_warmup():
    rates = [cosine_lr(i, 1.0, 0.1, warmup_iters=10, lr_decay_iters=110) for i in range(200)]
    assert all(a < b for a, b in zip(rates[:10], rates[1:11], strict=True))
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert min(rates) == pytest.approx(1 / 11) and max(rates) == 1.0


# --------------------------------------------------------------------------------------------------------------------
# Muon


def muon_gpt(dtype=np.float64):
    model = GPT(GPTConfig(vocab_size=11, block_size=5, n_layer=2, n_head=2, n_embd=12, bias=True), seed=3, dtype=dtype)
    flat = FlatParameters(model)
    flat.weights += np.random.default_rng(0).normal(size=flat.weights.shape).astype(dtype)
    return flat


def orthogonalize(x):
    """Muon's step for matrices x (k, m, n), m <= n."""
    return np.stack([root_of(matrix @ matrix.T) @ matrix for matrix in x])


def root_of(gram):
    q = np.empty_like(gram)
    inverse_root(q, gram)
    return q


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 7), (2, 5, 23), (4, 64, 64)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_orthogonalize_keeps_the_directions_and_levels_their_lengths(shape, dtype):
    x = np.random.default_rng(0).normal(size=shape)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    y = orthogonalize(x.astype(dtype))
    lengths = np.einsum("kim,kij,knj->kmn", u, y, vt)  # in x's own singular vectors: diagonal
    diagonal = np.diagonal(lengths, axis1=1, axis2=2)
    assert np.abs(lengths - diagonal[:, :, None] * np.eye(shape[1])).max() < 1e-3
    well = s > 0.05 * np.linalg.norm(x, axis=(1, 2))[:, None]
    assert (diagonal[well] > 0.65).all() and (diagonal < 1.25).all() and (diagonal > 0).all()


@pytest.mark.skipif(KERNELS != "numba", reason="the reference computes both halves")
@pytest.mark.parametrize("m", [1, 16, 33, 70])
def test_the_inverse_root_is_symmetric_to_the_last_bit(m):
    x = np.random.default_rng(m).normal(size=(m, m)).astype(np.float32)
    gram = x @ x.T
    q = root_of(gram + gram.T)
    np.testing.assert_array_equal(q, q.T)


def test_muon_takes_orthogonal_steps_on_hidden_matrices_and_adamws_on_the_rest():
    flat, reference = muon_gpt(), muon_gpt()
    options = dict(beta1=0.8, beta2=0.9, weight_decay=0.3)
    muon, adamw = Muon(flat, rate=5.0, momentum=0.7, **options), AdamW(reference, **options)
    momenta = {name: np.zeros(shape) for name, shape in flat.shapes.items()}
    for step in range(3):
        grads = np.random.default_rng([step]).normal(size=flat.weights.shape)
        before = flat.weights.copy()
        for optimizer in (muon, adamw):
            optimizer.step += 1
            optimizer.update(grads.copy(), lr=0.02, scale=0.6)
        n = flat.n_hidden
        assert (flat.weights[n:] == reference.weights[n:]).all() and n < flat.n_decay < len(flat.weights)
        for name, place in flat.names.items():
            if place.start >= n:
                continue
            shape = flat.shapes[name]
            assert ".h." in name and len(shape) == 2
            g = 0.6 * grads[place].reshape(shape)
            momenta[name] = 0.7 * momenta[name] + 0.3 * g
            direction = 0.7 * momenta[name] + 0.3 * g
            parts = 3 if "c_attn" in name else 1
            expected = before[place].reshape(shape) * (1 - 0.02 * 0.3)
            for part, matrix in zip(np.split(expected, parts), np.split(direction, parts), strict=True):
                tall = len(matrix) > matrix.shape[1]
                x = (matrix.T if tall else matrix)[None]
                u = orthogonalize(x)[0]
                part -= 0.02 * 5.0 * np.sqrt(max(1, matrix.shape[0] / matrix.shape[1])) * (u.T if tall else u)
            np.testing.assert_allclose(flat.weights[place].reshape(shape), expected, rtol=1e-6, atol=1e-7, err_msg=name)


def test_muon_in_parts_is_muon_at_once():
    whole, cut = muon_gpt(np.float32), muon_gpt(np.float32)
    one, many = Muon(whole, 5.0), Muon(cut, 5.0)
    ends = [0, 16, 700, cut.n_hidden // 16 * 16, cut.n_hidden + 32, len(cut.weights)]
    for step in range(3):
        grads = np.random.default_rng([step]).normal(size=whole.weights.shape).astype(np.float32)
        one.step += 1
        many.step += 1
        one.update(grads.copy(), lr=0.01)
        for start, stop in zip(ends, ends[1:], strict=False):
            many.update(grads, lr=0.01, part=slice(start, stop))
    assert (whole.weights == cut.weights).all() and (one.m == many.m).all()
