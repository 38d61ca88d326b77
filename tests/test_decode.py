"""The KV cache and its kernel, beside the model's own forward pass."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from test_crew import begins_late

from npgpt.config import Controls, GPTConfig
from npgpt.engine import no_grad
from npgpt.generate import decode
from npgpt.generate.decode import AHEAD, CHUNK, Decoder
from npgpt.generate.matrices import quantize_ref, rounded
from npgpt.generate.sampling import choose, probabilities
from npgpt.kernels import jit, maths, spin
from npgpt.model import GPT
from npgpt.nn import Linear, Parameter

decode.ONE_CORE = 0  # models are small here: with more threads than one there shall be as many

pytestmark = pytest.mark.skipif(jit.KERNELS == "numpy", reason="there are no kernels to be tested")


@pytest.fixture(autouse=True)
def many_processors(monkeypatch):
    """As many threads as are asked for begin, also where there are few processors."""
    monkeypatch.setattr(decode, "processors", lambda: 64)


SHAPES = [  # L, H, C, V, T: heads of odd sizes, one head, one position, sizes beside those of a tile
    (2, 3, 24, 50, 20),
    (1, 1, 5, 3, 1),
    (3, 2, 34, 17, 40),
    (2, 4, 64, 65, 70),
]


def model_of(shape, bias=True, dtype=np.float64, seed=0):
    """A GPT whose every parameter matters: all are of the order of 1."""
    L, H, C, V, T = shape
    model = GPT(GPTConfig(T, V, L, H, C, bias=bias), dtype=dtype)
    rng = np.random.default_rng(seed)
    for _, parameter in model.named_parameters():
        std = 1 if parameter.ndim == 1 else 1 / np.sqrt(parameter.shape[1])
        parameter.data[...] = rng.normal(0, std, parameter.shape)
    return model


def tokens_of(model, n=None, seed=1):
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, n or model.config.block_size)


def full(model, tokens):
    """The logits (T, V) of the model's own forward pass."""
    return model(tokens[None])[0].data[0].copy()


TOLERANCE = {np.float32: 3e-5, np.float64: 1e-12}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_token_by_token_the_logits_are_those_of_the_whole_forward_pass(shape, bias, dtype):
    model = model_of(shape, bias, dtype)
    tokens = tokens_of(model)
    expected = full(model, tokens)
    for threads in (1, 2, 3):
        decoder = Decoder(model, n_streams=2, threads=threads)
        for t, token in enumerate(tokens):  # the second stream: the first stays empty
            logits = decoder([token], [1], [t], 1)
            np.testing.assert_allclose(logits[0], expected[t], rtol=0, atol=TOLERANCE[dtype] * abs(expected).max())


def random_model(rng, dtype, longest=40):
    """A GPT of any shape, with more that may differ from layer to layer than a GPTConfig can say."""
    L, H, T, V = (int(n) for n in rng.integers(1, [4, 5, longest, 70]))
    C, bias = H * int(rng.integers(1, 20)), bool(rng.integers(2))
    model = GPT(GPTConfig(T, V, L, H, C, bias=bias), seed=None, dtype=dtype)
    for block in model.transformer.h:
        width = int(rng.integers(1, 5 * C))
        block.mlp.c_fc, block.mlp.c_proj = Linear(C, width, bias, dtype), Linear(width, C, bias, dtype)
        block.attn.scale = rng.choice([None, rng.uniform(0.01, 1)])
        block.ln_1.eps, block.ln_2.eps = 10 ** rng.uniform(-6, 0, 2)
    model.transformer.ln_f.eps = 10 ** rng.uniform(-6, 0)
    if rng.integers(2):
        model.lm_head.weight = Parameter(np.zeros((V, C), dtype))
    for parameter in model.parameters():
        mean, std = (0.5, 0.5) if parameter.ndim == 1 else (0, 1 / np.sqrt(parameter.shape[1]))
        parameter.data[...] = rng.normal(mean, std, parameter.shape)
    model.difference = lambda: None  # the kernel knows all of this
    return model


def in_pieces(n, rng):
    """Cut range(n) into some slices."""
    ends = [0, *sorted(rng.integers(0, n + 1, 3).tolist()), n]
    return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False) if a < b]


@pytest.mark.parametrize("int8, seeds", [(False, range(200)), (True, range(200, 260))])
def test_rows_of_any_streams_through_a_model_of_any_shape_have_the_logits_of_its_forward_with_a_cache(int8, seeds):
    for seed in seeds:
        rng = np.random.default_rng(seed)
        model = random_model(rng, rng.choice([np.float32, np.float64]))
        T, V = model.config.block_size, model.config.vocab_size
        n_streams = int(rng.integers(1, 5))
        decoder = Decoder(model, n_streams, int8=int8, threads=int(rng.integers(1, 4)))
        if int8:
            for layer in (model.lm_head, model.transformer.wte, *(part for h in model.transformer.h for part in (
                h.attn.c_attn, h.attn.c_proj, h.mlp.c_fc, h.mlp.c_proj,
            ))):  # fmt: skip
                q, scale = quantize_ref(layer.weight.data)
                layer.weight.data[...] = scale[:, None] * q
        texts = [rng.integers(0, V, rng.integers(1, T + 1)) for _ in range(n_streams)]
        expected = []
        for text in texts:
            with no_grad():
                cache = []
                parts = [model(text[None, piece], cache=cache)[0].data[0] for piece in in_pieces(len(text), rng)]
            expected.append(np.concatenate(parts))
        largest = max(abs(logits).max() for logits in expected)
        done = [0] * n_streams
        while any(n < len(text) for n, text in zip(done, texts, strict=True)):
            until = [min(len(text), n + int(rng.integers(0, 9))) for n, text in zip(done, texts, strict=True)]
            rows = [(stream, t) for stream in range(n_streams) for t in range(done[stream], until[stream])]
            rows = [rows[i] for i in rng.permutation(len(rows))]
            if rows:
                n = int(rng.integers(1, len(rows) + 1))
                logits = decoder([texts[s][t] for s, t in rows], *zip(*rows, strict=True), n)
                wanted = [expected[s][t] for s, t in rows[len(rows) - n :]]
                np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5 * largest, err_msg=f"seed {seed}")
            done = until


def test_rows_of_several_streams_in_any_order():
    model = model_of(SHAPES[0])
    texts = [tokens_of(model, seed=seed) for seed in range(3)]
    expected = [full(model, text) for text in texts]
    decoder = Decoder(model, n_streams=3)
    rows = [(stream, t) for stream, n in enumerate((4, 7, 2)) for t in range(n)]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    streams, positions = np.array(rows).T
    logits = decoder([texts[s][t] for s, t in rows], streams, positions, len(rows))
    for row, (stream, t) in enumerate(rows):
        np.testing.assert_allclose(logits[row], expected[stream][t], rtol=0, atol=1e-12)
    logits = decoder([texts[0][4], texts[2][2]], [0, 2], [4, 2], 1)  # only the last row's are asked for
    assert logits.shape == (1, 50)
    np.testing.assert_allclose(logits[0], expected[2][2], rtol=0, atol=1e-12)


def test_a_prompt_of_several_chunks_is_read_and_copied():
    model = model_of(SHAPES[3])
    tokens = tokens_of(model)
    assert len(tokens) > 2 * CHUNK
    expected = full(model, tokens)
    decoder = Decoder(model, n_streams=3)
    np.testing.assert_allclose(decoder.read(tokens[:-1], stream=1), expected[-2], rtol=0, atol=1e-12)
    decoder.copy(1, len(tokens) - 1)
    for stream in range(3):
        logits = decoder.read(tokens[-1:], stream, len(tokens) - 1)
        np.testing.assert_allclose(logits, expected[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("int8", [False, True])
def test_a_row_has_the_same_bits_whatever_is_computed_beside_it_and_by_any_number_of_threads(int8):
    model = model_of(SHAPES[2], dtype=np.float32)
    tokens = tokens_of(model)
    results = []
    for threads in (1, 2, 5):
        for width in (1, 2, 3, 4, 7, CHUNK):
            decoder = Decoder(model, 2, int8=int8, threads=threads)
            rows = []
            for start in range(0, len(tokens), width):
                part = tokens[start : start + width]
                n = len(part)
                rows.extend(decoder(part, [1] * n, range(start, start + n), n).copy())
            results.append(np.array(rows))
    assert all(np.array_equal(result, results[0]) for result in results)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n_logits", [0, 1, 3])
def test_rows_that_get_no_logits_are_in_the_cache_all_the_same(n_logits, threads):
    """The last layer makes no more of them than their keys and values."""
    model = model_of((2, 4, 64, 65, 70), dtype=np.float32)
    tokens = tokens_of(model, 8)
    some, all_ = Decoder(model, threads=threads), Decoder(model, threads=threads)
    logits = some(tokens[:7], [0] * 7, range(7), n_logits).copy()
    np.testing.assert_array_equal(logits, all_(tokens[:7], [0] * 7, range(7), 7)[7 - n_logits :])
    for ours, theirs in ((some.keys, all_.keys), (some.values, all_.values)):
        np.testing.assert_array_equal(ours, theirs)
    ours, theirs = (decoder(tokens[7:], [0], [7], 1) for decoder in (some, all_))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("temperature", [0.7, 1e-309])  # the latter's reciprocal is not finite
def test_the_kernel_draws_what_is_chosen_step_by_step_outside_of_it(temperature):
    model, steps = model_of(SHAPES[0], dtype=np.float32), 5
    uniforms = np.random.default_rng(3).random((steps, 3))
    for threads in (1, 2, 3):
        ahead, plain = (Decoder(model, 4, threads=threads) for _ in range(2))
        for decoder in (ahead, plain):
            decoder.read([5, 1, 2], 3)  # this stream is at another position
        tokens, streams, positions = [7, 8, 9], [0, 2, 3], [0, 0, 3]
        drawn = ahead.draw(tokens, streams, positions, uniforms, temperature, 40)
        for step in range(steps):
            logits = plain(tokens, streams, positions, 3)[:, :40]
            tokens = choose(probabilities(logits, [[]] * 3, Controls(temperature=temperature)), uniforms[step])
            assert drawn[step].tolist() == tokens
            positions = [position + 1 for position in positions]
        assert np.array_equal(ahead.keys, plain.keys) and np.array_equal(ahead.values, plain.values)
        with pytest.raises(ValueError, match="5 steps are too many"):
            ahead.draw([1], [0], [16], uniforms[:, :1], 1.0, 40)
        for vocab_size in (0, 51, -1):
            with pytest.raises(ValueError, match=f"of 50 tokens none can be drawn below {vocab_size}"):
                ahead.draw([1], [0], [0], uniforms[:, :1], 1.0, vocab_size)


@pytest.fixture
def two_draws(monkeypatch):
    """draw(model, vocab_size, threads) -> (likeliest tokens of three texts, Decoder) without and with a shortlist."""

    def draw(model, vocab_size, threads):
        pairs, steps = [], 6
        for large in (2**60, 0):
            monkeypatch.setattr(decode, "LARGE", large)
            decoder = Decoder(model, 3, threads=threads)
            assert decoder.has_draft_model(decode.FEW + 1) == (large == 0)
            tokens = decoder.draw([1, 2, 3], [2, 0, 1], [0, 0, 0], np.zeros((steps, 3)), 0.0, vocab_size)
            pairs.append((tokens.tolist(), decoder))
        return pairs

    return draw


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_shortlist_draws_the_likeliest_token_of_all(two_draws, dtype):
    for seed in range(80):
        rng = np.random.default_rng(seed)
        V, C = int(rng.integers(20, 300)), 2 * int(rng.integers(1, 40))
        vocab_size, threads = int(rng.integers(4, V + 1)), int(rng.integers(1, 4))
        model = model_of((1, 2, C, V, 8), dtype=dtype, seed=seed)
        head = model.lm_head.weight.data
        if seed % 4 == 0:  # nearer to each other than int8 can tell
            head[...] = head[0] + rng.normal(0, 1e-3, (V, C))
        elif seed % 4 == 1:  # sizes of all kinds, the same row twice, and none
            head *= 10.0 ** rng.integers(-3, 4, (V, 1))
            head[V // 2 :] = head[: V - V // 2]
            head[V // 3] = 0
        elif seed % 4 == 2:  # logits that are finite, and sums with int8 that are not
            model.transformer.ln_f.weight.data *= 1e36
            head *= 10.0 ** rng.integers(-9, -3, (V, 1))
        expected, found = two_draws(model, vocab_size, threads)
        assert found[0] == expected[0], seed


def test_a_shortlist_is_short_and_its_logits_are_those_of_the_model(two_draws):
    model = model_of((1, 2, 32, 2000, 8), dtype=np.float32)
    (_, whole), (_, found) = two_draws(model, 2000, 2)
    expected, logits = whole._job.logits[:3], found._job.logits[:3]
    chosen = logits > -np.inf
    assert np.array_equal(logits[chosen], expected[chosen]) and 3 <= chosen.sum() < 300
    assert np.array_equal(found([5], [0], [6], 1), whole([5], [0], [6], 1))  # who asks for logits gets all


@pytest.mark.parametrize("where, number", [("head", np.nan), ("head", np.inf), ("head", -np.inf), ("ln_f", np.nan)])
def test_a_shortlist_holds_what_is_not_finite(two_draws, where, number):
    model = model_of(SHAPES[0], dtype=np.float32)
    (model.lm_head.weight if where == "head" else model.transformer.ln_f.weight).data[17:18, ...] = number
    for threads in (1, 2):
        expected, found = two_draws(model, 50, threads)
        assert found[0] == expected[0] and expected[0][0] == [-1, -1, -1]


@pytest.mark.parametrize("dtype, hidden", [(np.float32, -33), (np.float32, -83), (np.float64, -970)])
def test_a_shortlist_allows_for_logits_so_small_that_each_product_is_rounded_to_a_whole_step(two_draws, dtype, hidden):
    model, hidden = model_of((1, 2, 64, 20, 8), dtype=dtype), 2.0**hidden
    model.transformer.ln_f.weight.data[...], model.transformer.ln_f.bias.data[...] = 0, hidden
    step, head = float(np.finfo(dtype).smallest_subnormal), model.lm_head.weight.data
    head[...] = 0
    head[5], head[6, :52] = 0.7 * step / hidden, step / hidden  # 64 products of 0.7 steps, rounded to one; and 52
    expected, found = two_draws(model, 20, 2)
    assert found[0] == expected[0] and expected[0][0] == [5, 5, 5]


def test_a_draft_model_is_made_anew_when_the_weights_have_changed_and_not_for_few_tokens(two_draws):
    model = model_of(SHAPES[0], dtype=np.float32)
    first, again = (two_draws(model, 50, 2)[1][1]._draft_model.lm_head.numbers for _ in range(2))
    assert first is again
    model.lm_head.weight.data[...] = model.lm_head.weight.data[::-1].copy()
    expected, found = two_draws(model, 50, 2)
    assert found[0] == expected[0] and found[1]._draft_model.lm_head.numbers is not first
    decoder = Decoder(model)
    assert not decoder.has_draft_model(decode.FEW) and decoder._draft_model is None
    with pytest.raises(ValueError, match="no draft model"):
        decoder.draw([1], [0], [0], np.zeros((1, 1)), 0.0, 50, by_draft_model=True)
    assert decoder.has_draft_model(decode.FEW + 1) and decoder.has_draft_model(0)


def test_the_likeliest_token_of_rounded_weights_is_not_sought_in_the_shortlist_of_what_was_rounded(monkeypatch):
    """Of rows 5 and 6 bfloat16 rounds nearly all numbers up and down, and int8 down and up: what it has seems lower."""
    model = model_of((1, 2, 64, 20, 8), dtype=np.float32)
    model.transformer.ln_f.weight.data[...], model.transformer.ln_f.bias.data[...] = 0, 1
    head, half = model.lm_head.weight.data, 1 + 2**-8  # between two numbers of bfloat16
    head[...] = 0
    head[5, 2:], head[6, 1], head[6, 2:] = half + 2**-20, 0.3, half - 2**-20
    head[5, 0], head[6, 0] = 127 / 126.45 * half, 127 / 126.55 * half
    for large in (2**60, 0):
        monkeypatch.setattr(decode, "LARGE", large)
        for dtype, likeliest in ((None, 6), ("bfloat16", 5)):
            decoder = Decoder(model, dtype=dtype)
            assert decoder.has_draft_model(decode.FEW + 1) == (large == 0)
            assert decoder.draw([1], [0], [0], np.zeros((1, 1)), 0.0, 20) == likeliest


def test_where_there_is_no_memory_for_a_draft_model_texts_are_written_without(monkeypatch):
    def empty(shape, dtype):
        raise MemoryError

    model, texts = model_of((2, 3, 24, 50, 60), dtype=np.float32), []
    for large in (2**60, 0):
        monkeypatch.setattr(decode, "LARGE", large)
        monkeypatch.setattr("npgpt.generate.matrices.empty", empty)
        texts.append(list(model.generate([7, 8, 9], 50, 0, temperature=0)))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_draft_model_draws_what_the_model_in_int8_draws(monkeypatch, dtype):
    monkeypatch.setattr(decode, "LARGE", 0)
    model, rows = model_of(SHAPES[0], dtype=np.float32), ([1, 2, 3], [2, 0, 1], [0, 0, 0])
    for threads in (1, 2):
        decoder, rounded = (Decoder(model, 3, threads=threads, **kind) for kind in ({"dtype": dtype}, {"int8": True}))
        with pytest.raises(ValueError, match="no draft model"):
            decoder(*rows, 3, by_draft_model=True)
        assert decoder.has_draft_model(decode.FEW + 1) and not rounded.has_draft_model(decode.FEW + 1)
        assert decoder.draft_share == rounded.nbytes / decoder.nbytes < 1
        assert np.array_equal(decoder(*rows, 3, by_draft_model=True), rounded(*rows, 3))
        for temperature in (0.0, 0.7):
            uniforms = np.random.default_rng(1).random((5, 3))
            drawn = decoder.draw(*rows, uniforms, temperature, 40, by_draft_model=True)
            assert np.array_equal(drawn, rounded.draw(*rows, uniforms, temperature, 40))
            assert np.array_equal(decoder.keys, rounded.keys) and np.array_equal(decoder.values, rounded.values)


@pytest.mark.parametrize(
    "asked, cores, processors, expected",
    [(8, 2, 2, 2), (None, 2, 2, 2), (None, 2, 4, 2), (3, 2, 4, 3), (8, 1, 1, 1), (None, 64, 64, 16), (64, 64, 64, 16)],
)
def test_no_more_threads_begin_than_processors_can_run(monkeypatch, asked, cores, processors, expected):
    def threads():
        return {thread for thread in threading.enumerate() if thread.name.startswith("npgpt-decoder")}

    monkeypatch.setattr(decode, "cores", lambda: cores)
    monkeypatch.setattr(decode, "processors", lambda: processors)
    model, before = model_of(SHAPES[0], dtype=np.float32), threads()
    decoder, alone = Decoder(model, threads=asked), Decoder(model, threads=1)
    assert decoder.threads == expected
    assert np.array_equal(decoder([3], [0], [0], 1), alone([3], [0], [0], 1))
    assert len(threads() - before) == expected - 1


def test_weights_are_read_where_the_model_has_them():
    model = model_of(SHAPES[0])
    decoder = Decoder(model)
    before = decoder([3], [0], [0], 1).copy()
    for parameter in model.parameters():
        parameter.data *= 1.5
    after = decoder([3], [0], [0], 1)
    assert not np.allclose(before, after)
    np.testing.assert_allclose(after[0], full(model, np.array([3]))[0], rtol=0, atol=1e-12)


def test_quantize_rounds_each_row_by_its_own_largest_number():
    w = np.random.default_rng(0).standard_normal((7, 30)) * np.array([1, 10, 1e-3, 0, 5, 1, 1])[:, None]
    q, scale = quantize_ref(w)
    assert q.dtype == np.int8 and (abs(q).max(axis=1) == [127, 127, 127, 0, 127, 127, 127]).all()
    assert (abs(scale[:, None] * q - w) <= scale[:, None] / 2 * 1.0001).all()
    assert not scale[3] * q[3].any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_int8_is_the_model_with_rounded_matrices(dtype):
    model = model_of(SHAPES[0], dtype=dtype)
    tokens = tokens_of(model)
    exact = full(model, tokens)
    for threads in (1, 2):
        logits = Decoder(model, int8=True, threads=threads)(tokens, [0] * 20, range(20), 20).copy()
    expected = full(rounded(model, "int8"), tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=10 * TOLERANCE[dtype] * abs(expected).max())
    assert 1e-4 < abs(expected - exact).max() / exact.std() < 0.3  # there is a difference, and it is small


@pytest.mark.parametrize(
    "rows",
    [
        ([50], [0], [0], 1),
        ([-1], [0], [0], 1),
        ([0], [2], [0], 1),
        ([0], [0], [20], 1),
        ([0], [0], [0], 2),
        ([0] * (CHUNK + 1), [0] * (CHUNK + 1), range(CHUNK + 1), 1),
    ],
)
def test_rows_that_are_not_there_are_refused(rows):
    decoder = Decoder(model_of(SHAPES[0]), 2)
    with pytest.raises(ValueError, match=r"expected at most 32 rows|from 0 to below \[50, 2, 20\]; got others"):
        decoder(*rows)


def test_an_interrupt_sets_the_other_threads_free(monkeypatch):
    model = model_of(SHAPES[0])
    decoder = Decoder(model, threads=3)
    kernel = decode.kernel.decode_kernel

    def interrupted(*args):
        if threading.current_thread() is threading.main_thread():
            time.sleep(0.05)  # the others have come to the first place where they wait for this one
            raise KeyboardInterrupt
        kernel(*args)

    monkeypatch.setattr(decode.kernel, "decode_kernel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoder([3], [0], [0], 1)
    monkeypatch.setattr(decode.kernel, "decode_kernel", kernel)
    np.testing.assert_allclose(decoder([3], [0], [0], 1)[0], full(model, np.array([3]))[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_of_the_kernel_comes_when_it_has_drawn_its_tokens(monkeypatch, times):
    """And nobody may draw them once more, from where they end; nor if a second one comes while this is seen to."""
    model = model_of(SHAPES[3])
    decoder, uniforms = Decoder(model, 2, threads=3), np.random.default_rng(0).random((AHEAD, 2))
    for stream in range(2):
        decoder.read(tokens_of(model, 20), stream)

    def draw():
        return decoder.draw([1, 2], [0, 1], [20, 20], uniforms, 1.0, 65).copy()

    expected, cache, run = draw(), decoder.keys.copy(), Decoder._run

    def interrupted(self, rank, ranks, seen):
        run(self, rank, ranks, seen)
        if rank == 0:
            raise KeyboardInterrupt

    def again(seconds):
        raise KeyboardInterrupt

    for _ in range(20):
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "_run", interrupted)
            if times == 2:
                patch.setattr(time, "sleep", again)
            with pytest.raises(KeyboardInterrupt):
                draw()
        assert np.array_equal(decoder.keys, cache)
        assert np.array_equal(draw(), expected)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timers that interrupt")
def test_interrupts_at_any_moment_leave_a_decoder_that_is_right():
    model = model_of(SHAPES[0])
    tokens = tokens_of(model)
    decoder, expected = Decoder(model, threads=3), full(model, tokens)

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    rng, interrupted = np.random.default_rng(0), 0
    try:
        for _ in range(300):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 1e-3))
                while True:
                    decoder.read(tokens)
            except KeyboardInterrupt:
                interrupted += 1
            np.testing.assert_allclose(decoder.read(tokens), expected[-1], rtol=0, atol=1e-12)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted == 300


def test_a_thread_that_begins_after_an_interrupt_touches_nothing(monkeypatch):
    model = model_of(SHAPES[0])
    tokens = tokens_of(model)
    decoder, expected = Decoder(model, threads=3), full(model, tokens)
    with monkeypatch.context() as patch:
        late = begins_late(patch)
        with pytest.raises(KeyboardInterrupt):
            decoder.read(tokens)
    end = time.perf_counter() + 0.2
    while time.perf_counter() < end or late[0].is_alive():
        np.testing.assert_allclose(decoder.read(tokens), expected[-1], rtol=0, atol=1e-12)


def test_a_thread_that_cannot_begin_holds_up_nobody(monkeypatch):
    decoder = Decoder(model_of(SHAPES[0]), threads=3)
    expected = decoder([3], [0], [0], 1).copy()
    while decoder._crew._at_work:  # until the others have gone to sleep
        time.sleep(0.001)
    run = Decoder._run

    def failing(self, rank, ranks, seen):
        if rank == 2:
            raise MemoryError
        run(self, rank, ranks, seen)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "_run", failing)
        with pytest.raises(MemoryError):
            decoder([3], [0], [0], 1)
    assert np.array_equal(decoder([3], [0], [0], 1), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_decodes_too():
    decoder = Decoder(model_of(SHAPES[0]), threads=2)
    expected = decoder([3], [0], [0], 1).copy()
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(decoder([3], [0], [0], 1), expected) else 1)
    deadline = time.monotonic() + 30
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    assert done[1] == 0


# ---- what kernels with several threads need


def test_threads_meet():
    @jit.kernel
    def count(steps, seen, rank, counter, n):
        """Every thread counts its own steps, and after each looks whether the others have made theirs."""
        for step in range(n):
            steps[rank] = step + 1
            jit_meet(counter, len(steps))
            for other in range(len(steps)):
                seen[rank] += steps[other] != step + 1
            jit_meet(counter, len(steps))

    for threads in (1, 2, 4):
        steps, seen, counter = np.zeros(threads, np.int64), np.zeros(threads, np.int64), np.zeros(1, np.int64)
        count(steps[:1].copy(), seen[:1].copy(), 0, np.zeros(1, np.int64), 1)  # compiled before they start
        others = [threading.Thread(target=count, args=(steps, seen, rank, counter, 500)) for rank in range(threads)]
        for other in others:
            other.start()
        for other in others:
            other.join()
        assert steps.tolist() == [500] * threads and not seen.any()


jit_meet = spin.meet


def test_what_is_no_counter_is_refused_before_anything_is_written():
    @jit.kernel
    def count(counter):
        jit_count_up(counter)

    @jit.kernel
    def wait(counter):
        jit_meet(counter, 2)

    @jit.kernel
    def look_for_a_job(counter):
        jit_next_job(counter, 0, counter)

    @jit.kernel
    def claim(counter):
        jit_claim(counter.reshape(1, len(counter)))

    for kernel in (count, wait, look_for_a_job, claim):
        with pytest.raises(ValueError, match="this array has none"):
            kernel(np.zeros(1, np.int64)[1:])
        read_only = np.ones(1, np.int64)
        read_only.flags.writeable = False
        for other in (np.ones(1, np.int32), np.ones(1), np.ones(1, np.uint64), read_only):
            with pytest.raises(Exception, match=r"No implementation|Failed in nopython"):
                kernel(other)
            assert other.tolist() == [1]


def test_an_array_at_an_address_is_the_array_itself():
    @jit.kernel(counts=True)
    def double(address, n, like):
        values = jit_array_at(address, n, like)
        for i in range(len(values)):
            values[i] *= 2
        return len(values)

    for dtype in (np.float32, np.float64, np.int8):
        values = np.arange(5, dtype=dtype)
        assert double(values.ctypes.data, 5, values[:0]) == 5
        assert values.tolist() == [0, 2, 4, 6, 8]
        assert double(0, 5, values[:0]) == 0


jit_array_at, jit_claim, jit_count_up, jit_next_job = maths.array_at, spin.claim, spin.count_up, spin.next_job


@pytest.mark.filterwarnings("error")
def test_weights_that_are_not_finite_are_rounded_without_a_warning():
    w = np.array([[1.0, -2.0], [np.nan, 1.0], [np.inf, 0.0]], np.float32)
    q, scale = quantize_ref(w)
    assert q[0].tolist() == [64, -127] and not np.isfinite(scale[1:]).any()
