"""Long prompts, which are one forward pass into the cache, and the matrices that are rounded for writing."""

import weakref

import numpy as np
import pytest
from test_decode import TOLERANCE, full, model_of, random_model, tokens_of

from npgpt.config import GPTConfig
from npgpt.engine import no_grad
from npgpt.generate import decode, matrices, prompt
from npgpt.generate.decode import CHUNK, Decoder
from npgpt.generate.matrices import checksum, checksum_ref, narrow, quantize, quantize_ref, rounded
from npgpt.kernels import jit, matmul
from npgpt.kernels.bfloat16 import narrowed_ref, widened_ref
from npgpt.model import GPT

decode.ONE_CORE = 0  # models are small here: with more threads than one there shall be as many

pytestmark = pytest.mark.skipif(jit.KERNELS == "numpy", reason="there are no kernels to be tested")

KINDS = {"float32": {}, "int8": {"int8": True}, "bfloat16": {"dtype": "bfloat16"}}
SHAPES = [(2, 3, 39, 50, 130), (1, 2, 64, 65, 260)]  # L, H, C, V, T


def prompts_of(model, n, seed=0):
    """n prompts, of 1 to block_size tokens."""
    rng, T, V = np.random.default_rng(seed), model.config.block_size, model.config.vocab_size
    return [rng.integers(0, V, length) for length in rng.integers(1, T + 1, n)]


@pytest.mark.parametrize("products", ["ours", "blas"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_has_the_same_bits_whatever_is_read_beside_it_and_by_any_number_of_threads(
    monkeypatch, shape, kind, products
):
    for module in (matmul, prompt):
        monkeypatch.setattr(module, "PRODUCTS", products)
    model = model_of(shape, dtype=np.float32)
    prompts = prompts_of(model, 16)
    assert sum(len(tokens) > CHUNK for tokens in prompts) > 8
    alone = Decoder(model, 16, threads=1, **KINDS[kind])
    expected = np.array([alone.read(tokens, i).copy() for i, tokens in enumerate(prompts)])
    for n, threads in ((1, 1), (2, 2), (5, 1), (16, 1), (16, 2)):
        if threads > 1 and products == "blas":  # whose bits depend on the number of threads
            continue
        decoder = Decoder(model, 16, threads=threads, **KINDS[kind])
        for start in range(0, 16, n):
            streams = range(start, min(start + n, 16))
            logits = decoder.read_all([prompts[i] for i in streams], streams)
            assert np.array_equal(logits, expected[start : start + n]), f"{n} prompts, {threads} threads"
        assert np.array_equal(decoder.keys, alone.keys) and np.array_equal(decoder.values, alone.values)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_has_the_logits_of_the_model(kind, dtype):
    if kind == "bfloat16" and dtype == np.float64:
        pytest.skip("bfloat16 is made from float32")
    for seed in range(3):
        model = model_of(SHAPES[seed % 2], bias=seed > 0, dtype=dtype, seed=seed)
        theirs = model if kind == "float32" else rounded(model, kind)
        decoder = Decoder(model, 3, **KINDS[kind])
        for i, tokens in enumerate(prompts_of(model, 3, seed)):
            expected = full(theirs, tokens)[-1]
            bound = 2e-2 if kind == "bfloat16" else 10 * TOLERANCE[dtype]  # (of activations that are rounded, too)
            np.testing.assert_allclose(decoder.read(tokens, i), expected, rtol=0, atol=bound * abs(expected).max())


def test_prompts_of_any_model_go_on_where_a_text_has_come_to():
    """What the kernel has read before and reads afterwards, and what is read in pieces, is one text."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        model = random_model(rng, np.float64, longest=200)
        T, text = model.config.block_size, tokens_of(model, seed=seed)
        with no_grad():
            expected = model(text[None], cache=[])[0].data[0]
        decoder, done = Decoder(model, 2, int8=False, threads=int(rng.integers(1, 3))), 0
        while done < T:
            n = int(rng.integers(1, T - done + 1))
            logits = decoder.read(text[done : done + n], 1, done)
            done += n
            bound = 1e-10 * abs(expected).max()
            np.testing.assert_allclose(logits, expected[done - 1], rtol=0, atol=bound, err_msg=f"seed {seed}")


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_prompt_have_the_bits_of_the_whole(monkeypatch, kind):
    model = model_of(SHAPES[1], dtype=np.float32)
    prompts, (decoder, other) = prompts_of(model, 5), (Decoder(model, 5, **KINDS[kind]) for _ in range(2))
    expected = decoder.read_all(prompts, range(5))
    for rows in (1, 7, 64, 200):
        monkeypatch.setattr(prompt, "AT_ONCE", rows * 4 * (7 * 64 + 256))
        assert np.array_equal(other.read_all(prompts, range(5)), expected)
        assert np.array_equal(other.keys, decoder.keys)
    pieces = list(prompt.pieces_of([(text, i, 0) for i, text in enumerate(prompts)], 64))
    assert {sum(len(part.tokens) for part in piece) for piece in pieces[:-1]} == {64}
    for i, text in enumerate(prompts):
        assert np.array_equal(np.concatenate([p.tokens for piece in pieces for p in piece if p.i == i]), text)


def test_long_prompts_that_are_not_there_are_refused():
    decoder = Decoder(model_of(SHAPES[0]), 2)
    good = [0] * 60
    wrong = ([*good, 50], 0, 0), ([*good, -1], 0, 0), (good, 2, 0), (good, 0, 71), (good, 0, -1)
    for tokens, stream, position in wrong:
        with pytest.raises(ValueError, match=r"from 0 to below \[50, 2, 130\]; got others"):
            decoder.read(tokens, stream, position)
    assert not decoder.keys.any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kernels_that_round_agree_with_their_references(dtype):
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((40, 33)) * np.exp2(rng.integers(-140, 120, (40, 1)))).astype(dtype)
    w[3], w[4, 5], w[5, 6], w[6, 7], w[7] = 0, np.nan, np.inf, -np.inf, -0.0
    w[8, :4], w[9, 0], w[10] = (1e36, -1e36, 1e-40, -1e-44), 1.1e36, 9e-37
    q, scale = np.empty(w.shape, np.int8), np.empty(40, dtype)
    quantize(q, scale, w)
    with np.errstate(all="ignore"):
        expected = quantize_ref(w)
    finite = np.isfinite(w).all(axis=1)
    finite[9] = False
    assert np.array_equal(scale[finite], expected[1][finite])
    difference = q[finite] != expected[0][finite]  # where a number lies half-way between two
    exact = w[finite].astype(np.float64)
    exact *= 127 / abs(exact).max(axis=1, keepdims=True, initial=1e-30)
    assert (abs(abs(exact - np.rint(exact)) - 0.5) < 1e-4)[difference].all()
    assert not np.isfinite(scale[~finite]).any()
    if dtype == np.float32:
        w[12].view(np.uint32)[3] = 0x7F800001  # a NaN, whose upper half is that of infinity
        halves = np.empty(w.shape, np.uint16)
        narrow(halves, w)
        assert np.array_equal(halves, narrowed_ref(w))
        assert np.isnan(widened_ref(halves)).sum() == 2


def test_a_checksum_tells_each_change():
    words = np.random.default_rng(0).integers(0, 2**32, 1000, np.uint32)
    total = np.zeros(1, np.uint64)

    def sum_of(words, first=5):
        checksum(total, words, np.uint32(first))
        assert total[0] == checksum_ref(words, first)
        return int(total[0])

    sums = {sum_of(words), sum_of(words, 6), sum_of(words[::-1].copy()), sum_of(words[:-1])}
    for i in range(1000):
        changed = words.copy()
        changed[i] ^= np.uint32(1 << i % 32)
        sums.add(sum_of(changed))
    assert len(sums) == 1004
    for i in range(1, 16):  # rows of an identity matrix change places
        rows = np.eye(16, dtype=np.float32)
        before = sum_of(rows.view(np.uint32).reshape(-1))
        rows[[0, i]] = rows[[i, 0]]
        assert sum_of(rows.view(np.uint32).reshape(-1)) != before
    parts = sum_of(words[:300]) + sum_of(words[300:], 305)
    assert parts % 2**64 == sum_of(words)


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_matrices_are_rounded_once_and_again_when_one_of_them_has_changed(kind):
    model = model_of(SHAPES[0], dtype=np.float32)

    def numbers():
        weights = Decoder(model, **KINDS[kind])._weights
        return [weights.lm_head.numbers, weights.wte.numbers] + [layer.c_fc.numbers for layer in weights.layers]

    def are_kept(before):
        return all(a is b for a, b in zip(before, numbers(), strict=True))

    first = numbers()
    assert are_kept(first)
    for name, parameter in model.named_parameters():
        before = parameter.data.copy()
        parameter.data[-1] = np.nextafter(parameter.data[-1], np.float32(9))
        is_rounded = parameter.ndim == 2 and "wpe" not in name
        assert are_kept(first) != is_rounded, name
        parameter.data[...] = before
        first = numbers()
    parameter = model.transformer.h[1].mlp.c_fc.weight
    parameter.data *= 3
    tokens = tokens_of(model)
    expected, logits = full(rounded(model, kind), tokens)[-1], Decoder(model, **KINDS[kind]).read(tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-2 * abs(expected).max())
    both = [Decoder(model, **KINDS[kind])._weights.lm_head.numbers for kind in ("int8", "bfloat16") * 2]
    assert both[0] is both[2] and both[1] is both[3]
    gone, both = weakref.ref(both[0]), None
    parameter.data[...] = parameter.data[::-1].copy()
    Decoder(model, dtype="bfloat16")
    assert gone() is None, "weights in int8 outlive those that they were made of"
    assert model in matrices._kept
    gone, model = weakref.ref(model), None
    assert gone() is None, "what is kept keeps the model alive"


def test_what_matrices_cannot_be_rounded_to():
    model = GPT(GPTConfig(8, 5, 1, 1, 4))
    with pytest.raises(ValueError, match=r"int8, bfloat16 or neither; got int8=True, dtype='bfloat16'"):
        next(model.generate([1], 1, int8=True, dtype="bfloat16"))
    with pytest.raises(ValueError, match="got int8=False, dtype='float16'"):
        Decoder(model, dtype="float16")
    with pytest.raises(ValueError, match="made from float32, this model has float64"):
        Decoder(GPT(GPTConfig(8, 5, 1, 1, 4), dtype=np.float64), dtype="bfloat16")
