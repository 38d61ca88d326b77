"""Drafts: the same text as without, whatever is guessed; how guesses are made; and when they are left alone.

    python tests/test_draft.py [--n 1000]    that many generations of each kind, for which tests/long.py is
"""

import argparse
import contextlib
import sys
import time

import numpy as np
import pytest
from test_sampling import lively, rngs

from npgpt.config import Controls, GPTConfig
from npgpt.data.characters import CharTokenizer
from npgpt.errors import CheckpointError
from npgpt.generate import decode
from npgpt.generate.draft import (
    ANEW,
    AT_MOST,
    CHECK,
    GAIN,
    GUESSES,
    LONGEST,
    LONGEST_REST,
    MEMORY,
    MOST_TEXTS,
    PATIENCE,
    REMEMBERED,
    REST,
    TOGETHER,
    Drafts,
    Lookup,
    ModelDrafts,
)
from npgpt.generate.generation import Generation
from npgpt.generate.matrices import rounded_weights
from npgpt.generate.stats import Stats
from npgpt.generate.writer import write
from npgpt.kernels.jit import KERNELS

kernels = pytest.mark.skipif(KERNELS == "numpy", reason="the kernel checks drafts")

ALPHABET = "abcdefghijk"  # of lively()'s tokens
CONFIGS = [GPTConfig(vocab_size=11, block_size=T, n_layer=1, n_head=2, n_embd=16) for T in (9, 40)]
KINDS = {  # name -> what write() is given
    "greedy": dict(temperature=0.0),
    "temperature": dict(temperature=0.3),
    "top-k": dict(temperature=0.5, top_k=3),
    "top-p": dict(temperature=0.5, top_p=0.6),
    "min-p": dict(temperature=0.5, min_p=0.3),
    "penalties": dict(temperature=0.2, repetition_penalty=1.3),
    "greedy with penalties": dict(temperature=0.0, repetition_penalty=1.05),
    "stop": dict(temperature=0.3, stops=["abc", "dd", "k"]),
    "streams": dict(temperature=0.3, streams=5),
    "streams, top-k and stop": dict(temperature=0.4, streams=4, top_k=4, stops=["ab", "ij"]),
    "int8": dict(temperature=0.3, int8=True),
    "int8 and top-p": dict(temperature=0.3, top_p=0.8, streams=2, int8=True),
    "bfloat16": dict(temperature=0.3, streams=2, top_k=5, dtype="bfloat16"),
    "two threads": dict(temperature=0.3, streams=2, threads=2),
    "log-probabilities": dict(temperature=0.3, logprobs=True),
    "a tokenizer with fewer tokens": dict(temperature=0.3, tokenizer=CharTokenizer("abcd")),
}


@pytest.fixture
def all_checked(monkeypatch):
    """Every guess is checked, whether it is worth it or not."""
    check_all(monkeypatch.setattr)


def check_all(replace):
    replace(Drafts, "_worth_it", lambda self, odds: len(odds))
    replace("npgpt.generate.draft.PATIENCE", 0)
    replace("npgpt.generate.draft.LEAST", 0)
    replace("npgpt.generate.decode.ONE_CORE", 0)
    replace("npgpt.generate.generation.AHEAD", 2)  # or small models would write whole texts without a draft


def texts_of(
    model, seed, draft, stats, streams=1, stops=(), threads=1, tokenizer=None, logprobs=False, int8=False, dtype=None,
    **controls,
):  # fmt: skip
    """The Pieces of the texts that write() gives."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, 4, rng.integers(1, 30)).tolist()
    generators = rngs(*range(seed, seed + streams))
    pieces = write(
        model, tokenizer or CharTokenizer(ALPHABET), prompt, generators, int(rng.integers(1, 90)), Controls(**controls),
        stops, logprobs=logprobs, int8=int8, threads=threads, dtype=dtype, draft=draft, stats=stats,
    )  # fmt: skip
    return [list(text) for text in pieces]


def same_texts(kind, seeds):
    """Write with drafts and without: both must say the same.  Returns Stats of those with drafts."""
    stats = Stats()
    for seed in seeds:
        model = lively(CONFIGS[seed % 2], seed=seed // 2 % 4)
        expected = texts_of(model, seed, 0, None, **KINDS[kind])
        found = texts_of(model, seed, 1 + seed % 9, stats, **KINDS[kind])
        assert found == expected, f"{kind}, seed {seed}"
    return stats


@kernels
@pytest.mark.parametrize("kind", KINDS)
def test_with_drafts_and_without_them_the_texts_are_the_same(kind, all_checked):
    stats = same_texts(kind, range(24))
    assert stats.accepted > 50 and stats.proposed - stats.accepted > 50  # many are right, and many wrong


@pytest.fixture
def draft_models(monkeypatch):
    """draft_models(True): small models have draft models, too, which err and are trusted; (False): none has one."""
    prepare_draft_models(monkeypatch.setattr)
    return lambda on: monkeypatch.setattr(decode, "LARGE", 0 if on else 2**60)


def prepare_draft_models(replace):
    def coarse_weights(model, kind, weights):
        weights = rounded_weights(model, kind, weights)
        if kind != "int8":
            return weights
        coarse = [layer.c_fc._replace(numbers=layer.c_fc.numbers // 64 * 64) for layer in weights.layers]
        pairs = zip(weights.layers, coarse, strict=True)
        return weights._replace(layers=[layer._replace(c_fc=c_fc) for layer, c_fc in pairs])

    replace(decode, "rounded_weights", coarse_weights)
    replace(decode, "FEW", 0)
    replace("npgpt.generate.draft.CHECK", -99)


GREEDY = dict(temperature=0.0)
MODELS_DRAFT = {name: how for name, how in KINDS.items() if "int8" not in name} | {
    "greedy, stop": dict(stops=["abc", "dd", "k"], **GREEDY),
    "greedy, two texts": dict(streams=2, threads=2, **GREEDY),
    "greedy, two texts, one of which ends": dict(streams=2, stops=["ab"], **GREEDY),
    "greedy, five texts, of which some end": dict(streams=5, stops=["ab"], **GREEDY),
    "greedy, a tokenizer with fewer tokens": dict(tokenizer=CharTokenizer("abcd"), **GREEDY),
    "greedy, bfloat16": dict(dtype="bfloat16", **GREEDY),
    "two texts, penalties": dict(temperature=0.5, streams=2, repetition_penalty=1.3),
}


def are_few(kind):
    return MODELS_DRAFT[kind].get("streams", 1) <= MOST_TEXTS


def same_texts_as_without_a_draft_model(kind, seeds, draft_models):
    stats = Stats()
    for seed in seeds:
        model, texts = lively(CONFIGS[seed % 2], seed=seed // 2 % 16), []
        for on, draft in ((False, 0), (True, 0), (True, 4)):
            draft_models(on)
            texts.append(texts_of(model, seed, draft, stats, **MODELS_DRAFT[kind]))
        assert texts[1:] == texts[:1] * 2, f"{kind}, seed {seed}"
    return stats


@kernels
@pytest.mark.parametrize("kind", MODELS_DRAFT)
def test_with_a_draft_model_and_without_it_the_texts_are_the_same(kind, draft_models):
    stats = same_texts_as_without_a_draft_model(kind, range(24), draft_models)
    if are_few(kind):
        assert stats.accepted > 50 and stats.proposed - stats.accepted > 10


@kernels
@pytest.mark.parametrize("kind", [kind for kind in MODELS_DRAFT if are_few(kind)])
def test_what_a_draft_model_guesses_has_the_random_numbers_and_controls_of_what_is_written(kind, monkeypatch):
    """So nearly all of it is right, if int8 is near enough to the model."""
    monkeypatch.setattr(decode, "LARGE", 0)
    monkeypatch.setattr(decode, "FEW", 0)
    monkeypatch.setattr("npgpt.generate.draft.CHECK", -99)  # they never rest
    stats, how = Stats(), {**MODELS_DRAFT[kind], "stops": ()}
    for seed in range(12):
        texts_of(lively(CONFIGS[1], seed=seed), seed, 0, stats, **how)
    assert stats.accepted > 0.9 * stats.proposed > 100


@kernels
@pytest.mark.parametrize("streams, temperature, has_one", [(2, 0.5, True), (3, 0.5, False), (3, 0, True)])
def test_a_draft_model_is_made_for_those_who_use_it(streams, temperature, has_one, draft_models):
    """Three texts have no drafts, but a shortlist of their likeliest tokens."""
    draft_models(True)
    generation = Generation(lively(CONFIGS[1]), [1, 2], rngs(*range(streams)), Controls(temperature=temperature), 40)
    generation.step()
    generation.step()
    assert (generation.decoder._draft_model is not None) == has_one


@kernels
@pytest.mark.parametrize("controls", [Controls(repetition_penalty=1.5), Controls(repetition_penalty=1.5, top_k=20)])
def test_drafts_may_have_tokens_that_the_text_did_not_have(controls):
    """Then they count as repeated from the place on at which they stand."""
    model, texts = lively(GPTConfig(vocab_size=60, block_size=64, n_layer=1, n_head=2, n_embd=16)), []
    for drafts in (False, True):
        generation = Generation(model, [1], rngs(5), controls, 60, draft=5)
        text = generation.texts[0]

        def right(alive, room, text=text, drafts=drafts):
            return [texts[0][len(text) :][: min(5, room(0))]] if drafts else []

        generation.drafts.propose = right
        while len(text) < 60:
            generation.step()
        texts.append(text)
    assert texts[0] == texts[1] and generation.stats.accepted == generation.stats.proposed > 40


@kernels
def test_the_rows_of_a_refused_draft_are_never_seen(all_checked):
    """A model with a long memory, whose draft is always wrong."""
    model = lively(CONFIGS[1])
    generations = [Generation(model, [1, 2, 3], rngs(7, 8), length=40, draft=draft) for draft in (0, 3)]
    generations[1].drafts.propose = lambda alive, room: [[10, 10, 10][: room(i)] for i in alive]
    for generation in generations:
        while len(generation.texts[0]) < 40 or len(generation.texts[1]) < 40:
            generation.step()
            for i in list(generation.alive):
                if len(generation.texts[i]) == 40:
                    generation.end(i)
    assert generations[0].texts == generations[1].texts
    caches = [(g.decoder.keys[:, :, :, :39], g.decoder.values[:, :, :, :39]) for g in generations]
    assert all(np.array_equal(a, b) for a, b in zip(*caches, strict=True))


@kernels
def test_a_draft_model_leaves_nothing_in_the_cache(draft_models):
    generations = []
    for on in (False, True):
        draft_models(on)
        generations.append(Generation(lively(CONFIGS[1]), [1, 2, 3], rngs(7), Controls(temperature=0), 40))
        while len(generations[-1].texts[0]) < 40:
            generations[-1].step()
    assert generations[0].texts == generations[1].texts
    assert 5 < generations[1].stats.accepted < generations[1].stats.proposed - 5
    for name in ("keys", "values"):
        plain, found = (getattr(generation.decoder, name)[:, :, :, :39] for generation in generations)
        assert np.array_equal(plain, found)


@kernels
def test_weights_that_int8_cannot_hold_cost_a_draft_model_its_tokens_and_nothing_else(draft_models):
    texts, stats = [], Stats()
    for on in (False, True):
        draft_models(on)
        model = lively(CONFIGS[1])
        model.transformer.h[0].ln_2.weight.data[...] = 0  # what the MLP gets is 0, and finite after its matrix
        model.transformer.h[0].mlp.c_fc.weight.data[3, 5] = 1e37
        generation = Generation(model, [1, 2, 3], rngs(7), Controls(temperature=0), 40, stats=stats)
        while len(generation.texts[0]) < 40:
            generation.step()
        texts.append(generation.texts)
    assert texts[0] == texts[1] and stats.proposed > stats.accepted == 0


@kernels
@pytest.mark.parametrize("controls", [GREEDY, dict(temperature=0.5), dict(temperature=0.5, top_k=3)])
@pytest.mark.parametrize("on, draft", [(False, 0), (True, 0), (False, 4)])
def test_what_comes_before_logits_that_are_not_finite_is_written(on, draft, controls, draft_models, all_checked):
    draft_models(on)
    model, found = lively(CONFIGS[1]), []
    whole = list(model.generate([1, 2, 3], 30, 0, **controls))
    model.transformer.wpe.weight.data[20] = np.nan
    with pytest.raises(CheckpointError, match="not finite"):
        for token in model.generate([1, 2, 3], 30, 0, draft=draft, **controls):
            found.append(token)
    assert found == whole[:18]


@kernels
@pytest.mark.parametrize("controls", [Controls(temperature=0), Controls(temperature=0, repetition_penalty=1.1)])
def test_guesses_that_were_right_before_logits_that_are_not_finite_count_as_right(controls, draft_models):
    draft_models(True)
    model, expected = lively(CONFIGS[1]), 0
    whole = list(model.generate([1, 2, 3], 30, 0, temperature=0, repetition_penalty=controls.repetition_penalty))
    model.transformer.wpe.weight.data[20] = np.nan
    generation = Generation(model, [1, 2, 3], rngs(0), controls, 33)

    def guesses(contexts, n):
        nonlocal expected
        at = len(generation.texts[0]) - 3
        expected += min(n, 18 - at)
        return [whole[at : at + n]]

    generation._guesses = guesses
    with pytest.raises(CheckpointError, match="not finite"):
        while True:
            generation.step()
    assert generation.texts[0][3:] == whole[:18] and generation.stats.accepted == expected > 10


@kernels
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_draft_model_that_is_not_complete_is_none(error, draft_models, monkeypatch):
    draft_models(True)
    generation, records = Generation(lively(CONFIGS[1]), [1], rngs(1), Controls(temperature=0), 40), decode._records

    def interrupted(weights):
        monkeypatch.setattr(decode, "_records", records)
        raise error

    monkeypatch.setattr(decode, "_records", interrupted)
    for _ in range(40):
        try:
            generation.step()
        except KeyboardInterrupt:
            assert generation.decoder._draft_model is None
        if len(generation.texts[0]) == 40:
            break
    assert len(generation.texts[0]) == 40
    assert (generation.stats.proposed > 0) == (error is KeyboardInterrupt)  # or else it goes on without


@kernels
def test_a_draft_model_is_that_of_the_weights_that_are_read(draft_models):
    """Which are those that the model had when the text began."""
    texts = []
    for on in (False, True):
        draft_models(on)
        model = lively(CONFIGS[1])
        generation = Generation(model, [1, 2, 3], rngs(1), Controls(temperature=0), 40)
        for parameter in model.parameters():
            parameter.data = parameter.data[::-1].copy()
        while len(generation.texts[0]) < 40:
            generation.step()
        texts.append(generation.texts)
    assert texts[0] == texts[1]


NEVER = 10**6


@contextlib.contextmanager
def interrupt_before_line(n):
    """Within this context a KeyboardInterrupt comes before the n-th line of generation.py that is run, if it is."""
    left = iter(range(n, -1, -1))

    def trace(frame, event, _):
        if frame.f_code.co_filename != Generation._check.__code__.co_filename:
            return None
        if event == "line" and next(left) == 0:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(
    "kind", ["temperature", "penalties", "streams", "streams, top-k and stop", "greedy, two texts", "bfloat16"]
)
@pytest.mark.parametrize("way", ["drafts", "draft models", "neither", "the model itself"])
def test_an_interrupt_at_any_line_leaves_texts_that_go_on(way, kind, draft_models, monkeypatch):
    how = {"streams": 1, "threads": 1, "dtype": None, **MODELS_DRAFT[kind]}
    how.pop("stops", None)
    streams, threads, dtype = (how.pop(name) for name in ("streams", "threads", "dtype"))
    if way == "the model itself":
        monkeypatch.setattr("npgpt.generate.generation.KERNELS", "numpy")
    elif KERNELS == "numpy":
        pytest.skip("the kernel checks drafts")
    elif way == "drafts":
        check_all(monkeypatch.setattr)
    draft_models(way == "draft models")
    model, rng, interrupts = lively(CONFIGS[0], seed=3), np.random.default_rng(5), 0
    texts, began = [], [1, 2, 1, 2]
    for n in (NEVER, *rng.integers(1, 80, 40)):
        some = Generation(
            model, began, rngs(*range(streams)), Controls(**how), 30, threads=threads, dtype=dtype,
            draft=4 if way == "drafts" else 0,
        )  # fmt: skip
        attempts = 0
        while some.alive:
            attempts += 1
            with contextlib.suppress(KeyboardInterrupt), interrupt_before_line(n if attempts % 2 else NEVER):
                some.step()
            for i in [i for i in some.alive if len(some.texts[i]) == 30]:
                some.end(i)
        texts.append(some.texts)
        interrupts += attempts - some.steps
    assert texts[1:] == texts[:1] * 40
    assert interrupts > 100


@kernels
def test_generate_has_the_same_text(all_checked):
    model = lively(CONFIGS[1])
    for controls in ({}, {"top_k": 3, "temperature": 0.5}):
        expected, found = (list(model.generate([1, 2], 200, 3, draft=draft, **controls)) for draft in (0, 5))
        assert found == expected


@kernels
def test_logits_that_are_not_finite_are_an_error_with_drafts_too(all_checked):
    for controls in (Controls(temperature=0), Controls(temperature=0, top_k=4)):
        model = lively(CONFIGS[1])
        generation = Generation(model, [1, 2] * 6, rngs(1), controls, 40, draft=4)
        generation.drafts.propose = lambda alive, room: [[1, 2]]
        generation.step()
        model.transformer.ln_f.weight.data[3] = np.nan
        with pytest.raises(CheckpointError, match="not finite"):
            generation.step()


# ---- what is guessed


def plainly(text, places):
    """What a Lookup must have found, in the plainest way -> (place to be repeated, length of the match)."""
    at = length = 0
    for n in range(1, len(text) + 1):
        if at:
            at, length = (at + 1, length + 1) if text[at] == text[n - 1] else (0, 0)
        for k in (3, 1):
            if not at:
                at = next((m for m in range(n - 1, k - 1, -1) if text[m - k : m] == text[n - k : n]), 0)
                length = k
    return at, min(length, LONGEST)


def test_a_lookup_follows_the_last_occurrence_for_as_long_as_it_is_right():
    rng = np.random.default_rng(0)
    for _ in range(300):
        text, whole = [], rng.integers(0, rng.integers(2, 6), rng.integers(1, 60)).tolist()
        lookup = Lookup(text)
        while len(text) < len(whole):
            text += whole[len(text) : len(text) + int(rng.integers(1, 9))]
            lookup.look()
            assert (lookup.at, lookup.length) == plainly(text, whole)


def test_texts_with_one_prompt_have_an_index_each():
    texts = [[1, 2, 3, 1, 2] for _ in range(2)]
    one, other = Drafts(texts, 4, 32).lookups
    texts[0] += [4, 1, 2]
    texts[1] += [3, 5, 1, 2]
    for text, lookup, expected in ((texts[0], one, [4, 1, 2, 4]), (texts[1], other, [3, 5, 1, 2])):
        lookup.look()
        fresh = Lookup(text)
        fresh.look()
        assert vars(lookup) == vars(fresh) and lookup.draft(4) == expected


def test_a_draft_goes_on_as_the_text_did_and_repeats_itself_where_it_ends():
    text = [1, 2, 3, 4, 5, 9, 1, 2]
    lookup = Lookup(text)
    lookup.look()
    assert lookup.draft(3) == [3, 4, 5]
    assert lookup.draft(9) == [3, 4, 5, 9, 1, 2, 3, 4, 5]
    text += [7, 7, 7]
    lookup.look()
    assert lookup.draft(4) == [7, 7, 7, 7]
    text += [8]
    lookup.look()
    assert lookup.odds(4) == [] and lookup.at == 0


def test_the_odds_are_those_of_what_became_of_earlier_guesses():
    text = [1, 2, 3] * 40
    lookup = Lookup(text)
    lookup.look()
    odds = lookup.odds(5)
    hits = len(text) - 3 - LONGEST  # of so long a match: there is one from the fourth token on
    wrong = (1 / REMEMBERED) * (1 - 1 / REMEMBERED) ** (hits - REMEMBERED + 1)
    np.testing.assert_allclose(odds, (1 - wrong) ** np.arange(1, 6))
    noise = Lookup(np.random.default_rng(0).integers(0, 65, 3000).tolist())
    noise.look()
    assert noise.odds(5) == []


# ---- whether it is worth it


def room(i):
    return 9


def drafts_of(text, streams=1):
    drafts = Drafts([list(text) for _ in range(streams)], 7, 32)
    assert drafts.propose(list(range(streams)), room) == []  # how long a step takes is not known yet
    drafts.took(1.0)
    return drafts


def test_as_many_tokens_are_checked_as_are_worth_it():
    drafts = drafts_of([1, 2, 3] * 40)
    assert [len(draft) for draft in drafts.propose([0], room)] == [7]
    assert drafts.propose([0], lambda i: 3) == [[1, 2, 3]]
    drafts.took(1.5, rows=4)
    drafts.took(8.0, rows=8)
    assert [len(draft) for draft in drafts.propose([0], room)] == [3]
    drafts.took(1.5, rows=4)
    drafts.seconds[1] = 4 / GAIN  # four tokens in the time of four steps
    assert drafts.propose([0], room) == [] and drafts.wait > 0


def test_a_search_that_comes_to_nothing_waits_for_a_time_and_all_is_measured_anew():
    drafts = drafts_of([1, 2, 3] * 40)
    drafts.seconds[1] = drafts.seconds[2] = 100.0
    began = time.perf_counter()
    assert drafts.propose([0], room) == []
    assert 0 < drafts.wait <= PATIENCE * (time.perf_counter() - began)
    drafts.took(1e-9)
    drafts.seconds = {0: 1.0, 1: 1.1, 2: 1.2}
    assert drafts.wait > 0 and drafts.propose([0], room) == []
    drafts.took(1e3, steps=1000)
    drafts.lookups[0].chances = [0.0] * len(drafts.lookups[0].chances)
    drafts.seconds[0] = 1e-12
    assert drafts.propose([0], room) == [] and drafts.wait == AT_MOST * 1e-12
    drafts.lookups[0].chances = [1.0] * len(drafts.lookups[0].chances)
    drafts.took(1.0)
    drafts.seconds[0] = 1.0
    assert len(drafts.propose([0], room)[0]) == 7
    while drafts.steps < ANEW:
        drafts.took(1.0)
    assert drafts.propose([0], room) == [] and not drafts.seconds
    drafts.took(1.0)
    assert len(drafts.propose([0], room)[0]) == 7


def test_a_pass_that_was_held_up_counts_little():
    drafts = drafts_of([1, 2])
    for seconds in (2.0, 9.0, 0.5):
        drafts.took(seconds, rows=3)
    assert drafts.seconds == {0: 1.0, 1: 0.5}
    drafts.took(9.0, rows=TOGETHER)
    assert drafts.seconds[1] == 1.05 * 0.5


def test_the_text_that_repeats_gets_the_rows():
    drafts = Drafts([[1, 2], [1, 2]], 7, 32)
    drafts.lookups[0].text += [3, 1, 2] * 20
    drafts.lookups[1].text += range(3, 60)
    drafts.propose([0, 1], room)
    drafts.took(1.0)
    drafts.seconds[1] = 1.1
    one, other = drafts.propose([0, 1], room)
    assert len(one) == 7 and other == []


def test_a_draft_model_rests_when_too_few_of_its_tokens_were_right():
    drafts, share = ModelDrafts(), 0.25
    cost = GUESSES * (share + CHECK)

    def passes_until_the_next():
        return next(n for n in range(1000) if drafts.wanted(40))

    for right, guesses in ((3, 5), (2, 5), (0, 5), (3, 5), (1, 1), (1, 1), (1, 1), (1, 1)):
        assert drafts.wanted(40) == GUESSES
        drafts.took(right, guesses, share)
    assert drafts.wanted(3) == 3 and drafts.wanted(0) == 0
    wrong = 0
    while wrong < 9 and drafts.wanted(40):
        drafts.took(0, GUESSES, share)
        wrong += 1
    assert 2 <= wrong <= MEMORY
    rests = []
    for right in (0, cost - 0.1, 0, 0, 0, cost, 0):  # (after the rest that has begun)
        rests.append(passes_until_the_next())
        drafts.took(right, GUESSES, share)
    assert rests == [REST - 1, 2 * REST, 4 * REST, LONGEST_REST, LONGEST_REST, LONGEST_REST, 0]
    assert passes_until_the_next() == REST


def test_more_is_guessed_of_a_single_text_where_nearly_all_is_right():
    drafts, wanted = ModelDrafts(), []
    for right in (3, 4, 5, 7, 7, 4, 0, 0):
        wanted.append(drafts.wanted(40))
        assert drafts.wanted(40, texts=2) == GUESSES and drafts.wanted(6) <= 6
        drafts.took(right, wanted[-1], 0.25)
    assert wanted == [5, 5, 6, 7, 7, 7, 6, 5]


def test_a_draft_must_save_what_it_costs():
    for share, enough in ((0.25, 2), (0.5, 4)):
        drafts = ModelDrafts()
        for _ in range(100):
            drafts.took(enough, GUESSES, share)
            assert drafts.wanted(40)
        too_few = 0
        while too_few < 99 and drafts.wanted(40):
            drafts.took(enough - 1, GUESSES, share)
            too_few += 1
        assert 2 <= too_few <= 3 * MEMORY


def test_seconds_in_which_python_chooses_guesses_count_among_their_costs():
    for guessing, is_worth_it in ((0.0, True), (0.2, True), (0.7, False)):  # (of 1 s that two and a half tokens take)
        drafts = ModelDrafts()
        for _ in range(MEMORY):
            drafts.took(3, GUESSES, 0.2, 1.0, guessing)
        assert (drafts.wanted(40) > 0) == is_worth_it


@kernels
def test_a_text_that_does_not_repeat_itself_is_left_alone():
    model, stats = lively(GPTConfig(vocab_size=500, block_size=64, n_layer=1, n_head=1, n_embd=16)), Stats()
    generation = Generation(model, [1], rngs(1), Controls(temperature=5.0), draft=8, stats=stats)
    while len(generation.texts[0]) < 2000:
        generation.step()
    assert stats.proposed < 10


# ---- Stats


def test_stats_tell_the_prompt_the_first_token_and_the_others_apart(monkeypatch):
    now = iter(np.arange(0.0, 100.0, 0.5).tolist())
    stats = Stats(began=0.0)
    stats.read(9, 0.25, 1.5)
    assert str(stats) == "9 tokens of the prompt in 250.0 ms, the first one written after 1,500.0 ms"
    stats.wrote(8, 0.5)
    stats.wrote(8, 0.5)
    assert str(stats).endswith(" ms, then 16.0 tokens a second")
    stats.read(9, 7.0, next(now))  # of another Generation
    assert (stats.prompt, stats.prompt_seconds, stats.first_seconds) == (9, 0.25, 1.5)
    stats.proposed, stats.accepted = 2000, 1000
    assert str(stats).endswith("a second; 1,000 of 2,000 drafted tokens were right")


@pytest.mark.parametrize("controls", [Controls(), Controls(top_k=3)])
def test_a_generation_tells_its_stats(controls):
    stats = Stats()
    generation = Generation(lively(), [1, 2, 3], rngs(1, 2), controls, 8, stats=stats)
    began, written = time.perf_counter(), []
    while len(generation.texts[0]) < 8:
        written += [len(generation.step()[0])]
    assert stats.prompt == 3 and stats.tokens == 2 * sum(written[1:])
    assert 0 < stats.prompt_seconds < stats.first_seconds
    assert 0 < stats.seconds < time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description="Write with drafts and without: the texts must be the same.")
    parser.add_argument("--n", type=int, default=1000, help="generations of each kind (default: 1000)")
    parser.add_argument("--only", default="", metavar="WORD", help="only kinds with this in their name")
    args = parser.parse_args()
    replace = pytest.MonkeyPatch().setattr
    check_all(replace)
    prepare_draft_models(replace)

    def draft_models(on):
        replace(decode, "LARGE", 0 if on else 2**60)

    def tell(kind, stats):
        print(f"{kind:<54}{args.n} texts alike; {stats.accepted:,} of {stats.proposed:,} were right", flush=True)

    draft_models(False)
    for kind in [kind for kind in KINDS if args.only in kind]:
        tell(kind, same_texts(kind, range(args.n)))
    for kind in [kind for kind in MODELS_DRAFT if args.only in kind]:
        stats = same_texts_as_without_a_draft_model(kind, range(args.n), draft_models)
        tell(f"a draft model: {kind}", stats)


if __name__ == "__main__":
    main()
