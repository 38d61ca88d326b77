"""The gradient receipt: its parts sum to the engine's gradient, and each part is what it says it is."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

import npgpt
from npgpt import GPT, GPTConfig
from npgpt.data.characters import CharTokenizer
from npgpt.errors import UsageError
from npgpt.gradcheck import FLOOR
from npgpt.ops.cross_entropy import cross_entropy
from npgpt.ops.embedding import embedding
from npgpt.study.receipt import RULES, find, gradient, made_at, receipt, ways
from npgpt.tensor import Tensor

BOUND = 1e-6
B, T, V = 2, 5, 7
RNG = np.random.default_rng(3)
IDX = np.array([[1, 0, 1, 6, 2], [3, 1, 4, 4, 2]])  # 1 occurs three times, 5 never
TARGETS = np.array([[0, 1, 6, 2, -1], [1, 4, -1, 2, 5]])


def random_model(bias, n_layer):
    """A GPT with weights of size 1, so that no way is negligible."""
    config = GPTConfig(vocab_size=V, block_size=6, n_layer=n_layer, n_head=2, n_embd=6, bias=bias, dropout=0.1)
    model = GPT(config, dtype=np.float64).eval()
    for _, parameter in model.named_parameters():
        parameter.data[...] = RNG.normal(size=parameter.shape) * (0.7 if parameter.ndim == 2 else 1.0)
    return model


MODELS = {"biases, 2 layers": random_model(True, 2), "no bias, 3 layers": random_model(False, 3)}
MODEL = MODELS["biases, 2 layers"]
TENSORS = [(title, name) for title, model in MODELS.items() for name, _ in model.named_parameters()]


def error(total, grad, index):
    """Relative error of a sum; where the gradient is 0 but for rounding, it is measured by the tensor's largest."""
    largest = np.abs(grad).max()
    scale = abs(grad[index]) if abs(grad[index]) > 1e-12 * largest else FLOOR * largest
    return abs(total - grad[index]) / scale


# --------------------------------------------------------------------------------------------------------------------
# The parts and the whole


@pytest.mark.parametrize("title, name", TENSORS)
def test_the_parts_sum_to_the_gradient(title, name):
    """490 random weights of every kind: 10 of each of the 49 tensors of two models."""
    model = MODELS[title]
    parameter = dict(model.named_parameters())[name]
    _, grad = gradient(model, IDX, TARGETS, parameter)
    found = ways(model, IDX, TARGETS, name)
    rng = np.random.default_rng(TENSORS.index((title, name)))
    for _ in range(10):
        index = tuple(int(rng.integers(n)) for n in parameter.shape)
        terms = [dy * x for dy, x in (way.factors(index) for way in found)]
        assert error(sum(term.sum() for term in terms), grad, index) <= BOUND, index
        if abs(grad[index]) > FLOOR * np.abs(grad).max():
            for left_out in terms:  # with a way missing they do not
                if abs(left_out.sum()) > FLOOR * abs(grad[index]):
                    assert error(sum(term.sum() for term in terms) - left_out.sum(), grad, index) > BOUND


def test_the_parts_as_data_are_those_ways_position_by_position():
    _, grad = gradient(MODEL, IDX, TARGETS, MODEL.transformer.wte.weight)
    found = ways(MODEL, IDX, TARGETS, "transformer.wte.weight")
    parts = {}  # (use, path, position) -> what it adds, if it adds anything
    for way in found:
        dy, x = way.factors((1, 3))
        parts |= {(way.use, way.words, position): (dy * x)[position] for position in np.ndindex(B, T)}
    parts = {place: value for place, value in parts.items() if value}
    assert math.isclose(math.fsum(parts.values()), grad[1, 3], rel_tol=1e-12)
    head = [place for place in parts if place[0] == "the output layer (tied)"]
    assert len(head) == (TARGETS != -1).sum()
    lookups = [place for place in parts if place not in head]
    assert len(lookups) == 3 * 5  # 1 occurs three times, and there are five ways
    assert {position for *_, position in lookups} == {(0, 0), (0, 2), (1, 1)}
    assert len({path for _, path, _ in lookups}) == 5


# --------------------------------------------------------------------------------------------------------------------
# Each part by itself: other ways are closed, and what the engine then gives is the part


def engine_with(model, name, opened):
    """Gradient of a parameter where the sublayers whose numbers are not in `opened` add constants to the stream."""
    gpt = model.transformer
    x = embedding(IDX, gpt.wte.weight, gpt.wpe.weight)
    sublayers = [f for block in gpt.h for f in ((block.ln_1, block.attn), (block.ln_2, block.mlp))]
    for k, (ln, f) in enumerate(sublayers):
        x = x + (f(ln(x)) if k in opened else Tensor(f(ln(x)).data))
    model.zero_grad()
    cross_entropy(model.lm_head(gpt.ln_f(x)), TARGETS).backward()
    return dict(model.named_parameters())[name].grad.copy()


@pytest.mark.parametrize(
    "name, own",
    [("wpe.weight", -1), ("h.0.attn.c_attn.weight", 0), ("h.0.ln_2.weight", 1), ("h.0.mlp.c_fc.bias", 1)],
)
def test_each_way_is_what_comes_through_when_the_others_are_closed(name, own):
    name = "transformer." + name
    found = ways(MODEL, IDX, TARGETS, name)
    assert [way.words for way in found] == [
        "straight along the residual stream", "back through block 1's MLP", "back through block 1's attention",
        "back through block 0's MLP", "back through block 0's attention",
    ][: 4 - own]  # fmt: skip
    before = 0.0
    for way, first in zip(found, range(4, own, -1), strict=True):
        opened = engine_with(MODEL, name, {own, *range(first, 4)})
        for index in list(np.ndindex(*opened.shape))[::7]:
            dy, x = way.factors(index)
            came = (opened - before)[index]
            assert math.isclose((dy * x).sum(), came, rel_tol=1e-9, abs_tol=1e-12), (way.words, index)
        before = opened


@pytest.mark.parametrize("name", ["h.0.attn.c_attn.weight", "h.1.ln_1.weight", "h.1.attn.c_proj.bias", "ln_f.weight"])
def test_each_position_is_what_is_left_when_the_weight_is_a_constant_at_the_others(name, monkeypatch):
    found = ways(MODEL, IDX, TARGETS, "transformer." + name)
    *path, kind = name.split(".")
    module = MODEL.transformer
    for step in path:
        module = module[int(step)] if step.isdigit() else getattr(module, step)
    parameter, forward = getattr(module, kind), module.forward
    constant = Tensor(parameter.data)
    here = np.zeros((B, T, 1))
    here[1, 2] = 1

    def split(x):
        y = forward(x) * here
        vars(module)[kind] = constant  # (a module takes no constant in the place of a Parameter)
        y = y + forward(x) * (1 - here)
        setattr(module, kind, parameter)
        return y

    monkeypatch.setattr(module, "forward", split)
    _, grad = gradient(MODEL, IDX, TARGETS, parameter)
    for index in list(np.ndindex(*grad.shape))[::7]:
        terms = [dy[1, 2] * x[1, 2] for dy, x in (way.factors(index) for way in found)]
        assert math.isclose(sum(terms), grad[index], rel_tol=1e-9, abs_tol=1e-15), index


# --------------------------------------------------------------------------------------------------------------------
# The text


def amounts(text, words):
    """The amounts in the lines of a receipt that begin with some words."""
    lines = [line for line in text.splitlines() if line.endswith(("%", " -"))]
    return [float(line.split()[-2]) for line in lines if line.strip().startswith(words)]


@pytest.mark.parametrize("param", ["wte[1,3]", "h.0.attn.c_attn.weight[7,2]", "h.1.mlp.c_proj.bias[4]", "ln_f.bias[0]"])
def test_the_receipt_adds_up_as_it_is_printed(param):
    _, parameter, index = find(MODEL, param)
    loss, grad = gradient(MODEL, IDX, TARGETS, parameter)
    text = receipt(MODEL, IDX, TARGETS, param)
    lines = text.splitlines()
    assert lines[0].startswith(f"{param} = {parameter.data[index]:.6g}") and f"{loss:.6f}" in lines[0]
    (total,), (engine,), (numeric,) = (amounts(text, words) for words in ("total", "the engine's", "by finite"))
    assert engine == float(f"{grad[index]:.6e}") and total == engine
    assert abs(numeric - engine) <= BOUND * abs(engine)
    assert abs(amounts(text, "their difference")[0]) <= 1e-12
    near = dict(abs_tol=1e-6 * max(map(abs, amounts(text, ""))))  # of the digits that are printed
    assert math.isclose(sum(amounts(text, "subtotal")), total, **near)
    ways_of = [amounts(text, words) for words in ("from the", "straight", "back through")]
    assert math.isclose(sum(map(sum, ways_of)), total, **near)
    positions = amounts(text, "sequence") + amounts(text, "the other")
    assert math.isclose(sum(positions), total, **near)
    assert len({len(line) for line in lines if line.endswith("%")}) == 1  # the columns stand one below the other


def test_formulas_and_the_lines_that_they_name():
    text = receipt(MODEL, IDX, TARGETS, "wte[1,3]")
    assert "dweight[1,3] += dy[b,t,1] x[b,t,3]" in text and "dwte[1,3] += dy[b,t,3] if idx[b,t] = 1" in text
    root = Path(npgpt.__file__).resolve().parents[1]

    def line(place):
        file, number = place.rsplit(":", 1)
        return (root / file).read_text(encoding="utf-8").splitlines()[int(number) - 1].strip()

    assert {line(rule.made_at()) for rule in RULES.values()} == {
        "np.add.at(dwte, idx, dy)  # not dwte[idx] += dy: a token that occurs twice would count once",
        "dwpe[:T] += dy.sum(axis=0)", "dweight = (dy * xhat).sum(axis=0)", "dbias = dy.sum(axis=0)",
        "dweight = dy.T @ x",
    }  # fmt: skip
    for place in re.findall(r"npgpt/ops/\w+\.py:\d+", text):
        assert re.search(r"\bd\w+\b.*(=|\()", line(place)), place
    with pytest.raises(LookupError, match="made_at has no variable nothing"):
        made_at(made_at, "nothing")


def test_a_weight_that_is_not_used_and_one_of_a_tokenizer_with_words():
    text = receipt(MODEL, IDX, TARGETS, "wpe[5,0]")
    assert "at none of these positions" in text and amounts(text, "total") == [0] == amounts(text, "by finite")
    model = random_model(True, 2)
    model.tokenizer = CharTokenizer("abcdefg")
    assert "position 3, 'g'" in receipt(model, IDX[:1], TARGETS[:1], "ln_f.bias[0]")
    assert "(for number 1 of head 0's keys)" in receipt(model, IDX, TARGETS, "h.0.attn.c_attn.bias[7]")


def test_a_gradient_that_is_zero_but_for_rounding_has_no_shares():
    """A bias of the keys adds the same number to all scores of a row, which the softmax does not see."""
    text = receipt(MODEL, IDX, TARGETS, "h.1.attn.c_attn.bias[7]")
    assert "%" not in text and abs(amounts(text, "total")[0]) < 1e-12
    assert max(map(abs, amounts(text, "sequence"))) > 1e-6


def test_names_may_be_short_or_whole():
    wte = MODEL.transformer.wte.weight
    for name in ("wte", "wte.weight", "transformer.wte.weight", "lm_head.weight"):
        assert find(MODEL, f" {name}[2, 3] ") == ("transformer.wte.weight", wte, (2, 3))


@pytest.mark.parametrize(
    "param, words",
    [
        ("wte", "'wte' is not a name with indices, such as wte[17,3]"),
        ("wte[1.5,2]", "is not a name with indices"),
        ("h.0.mlp.c_fcc.bias[1]", "has no parameter h.0.mlp.c_fcc.bias; did you mean h.0.mlp.c_fc.bias?"),
        ("xyz[1]", "has no parameter xyz; there are wte, wpe, h.0.ln_1.weight"),
        ("wte[1]", "wte has the shape (7, 6): wte[1] has not as many indices"),
        ("ln_f.bias[1,2]", "ln_f.bias has the shape (6,)"),
        ("wte[7,0]", "wte[7,0]: 7 is not in 0 .. 6; wte has the shape (7, 6)"),
        ("ln_f.bias[-1]", "-1 is not in 0 .. 5"),
        (f"wte[{5000 * '9'},0]", "is not a name with indices"),
    ],
)
def test_errors(param, words):
    with pytest.raises(UsageError) as caught:
        receipt(MODEL, IDX, TARGETS, param)
    assert words in str(caught.value) and "\n" not in str(caught.value)
