"""Hugging Face GPT-2 folders: what is read is what was written, by them and by us, and all else is refused in a line.

Most of these tests write the folders by hand, as transformers writes them; those that ask transformers itself need
torch and transformers, and are skipped without.
"""

import dataclasses
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from npgpt import sample
from npgpt.config import GPTConfig, TrainConfig
from npgpt.data.bpe import BPETokenizer, from_dict
from npgpt.data.characters import ByteTokenizer, CharTokenizer
from npgpt.errors import CheckpointError, UsageError
from npgpt.files import checkpoint, folder, weights
from npgpt.model import GPT
from npgpt.run.events import Evaluation
from npgpt.run.trainer import Trainer

CONFIG = GPTConfig(vocab_size=13, block_size=7, n_layer=2, n_head=3, n_embd=15, bias=True)
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def random_gpt(config=CONFIG, seed=0):
    """A GPT none of whose parameters has a special value."""
    model, rng = GPT(config, seed=None), np.random.default_rng(seed)
    for parameter in model.parameters():
        parameter.data[...] = rng.normal(0, 0.3, parameter.shape) + (parameter.ndim == 1)
    return model.eval()


def logits(model, seed=0):
    idx = np.random.default_rng(seed).integers(0, model.config.vocab_size, (2, model.config.block_size))
    return model(idx)[0].data


def same_weights(a, b):
    pairs = list(zip(a.named_parameters(), b.named_parameters(), strict=True))
    return all(n == m and x.data.tobytes() == y.data.tobytes() for (n, x), (m, y) in pairs)


# ---- folders made by hand


def settings_of(config, **changes):
    """config.json as transformers writes it."""
    return {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": config.block_size, "n_embd": config.n_embd,
        "n_head": config.n_head, "n_inner": None, "n_layer": config.n_layer, "n_positions": config.block_size,
        "reorder_and_upcast_attn": False, "resid_pdrop": 0.1, "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True, "summary_type": "cls_index", "tie_word_embeddings": True,
        "torch_dtype": "float32", "use_cache": True, "vocab_size": config.vocab_size, **changes,
    }  # fmt: skip


def tensors_of(model):
    """The weights with the names and shapes that transformers gives them."""
    return {
        name: np.ascontiguousarray(parameter.data.T if name.endswith(TRANSPOSED) else parameter.data)
        for name, parameter in model.named_parameters()
    }


def raw_file(tensors, header=lambda header: header):
    """A safetensors file as another program may write it; header: changes what its header says.

    tensors: name -> array, or (dtype, shape, bytes) for a dtype that NumPy does not have.
    """
    kinds = {"f4": "F32", "f8": "F64", "f2": "F16", "i8": "I64", "u1": "U8", "b1": "BOOL"}
    entries, body = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        if not isinstance(tensor, tuple):
            tensor = kinds[tensor.dtype.str[1:]], list(tensor.shape), tensor.tobytes()
        dtype, shape, raw = tensor
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header(entries)).encode()
    return struct.pack("<Q", len(text)) + text + body


def make(path, settings=None, tensors=None, header=lambda header: header):
    """A folder with config.json and model.safetensors; left out, they are those of random_gpt()."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(settings_of(CONFIG) if settings is None else settings))
    tensors = tensors_of(random_gpt()) if tensors is None else tensors
    (path / "model.safetensors").write_bytes(raw_file(tensors, header))
    return path


def shard(path, weight_map=lambda weight_map: weight_map):
    """Make a folder's model.safetensors two parts and an index."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    parts, where = {name: {} for name in names}, {}
    for i, (name, array) in enumerate(tensors_of(random_gpt()).items()):
        where[name] = names[i % 2]
        parts[names[i % 2]][name] = array
    for name, tensors in parts.items():
        (path / name).write_bytes(raw_file(tensors))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map(where)}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "model.safetensors").unlink()
    return path


@pytest.mark.parametrize("bias", [True, False])
def test_the_shapes_are_those_of_the_model(bias):
    config = dataclasses.replace(CONFIG, bias=bias)
    assert list(weights.parameter_shapes(config)) == [(n, p.shape) for n, p in GPT(config, None).named_parameters()]


def test_a_folder_gives_the_gpt_that_it_came_from(tmp_path):
    model = GPT.from_pretrained(make(tmp_path))
    assert model.config == dataclasses.replace(CONFIG, dropout=0.1) and model.tokenizer is None
    assert same_weights(model, random_gpt())
    assert (logits(model) == logits(random_gpt())).all()  # without dropout, that is
    model.train()
    assert not np.allclose(logits(model), logits(random_gpt()))
    assert GPT.tokenizer is None and GPT.from_pretrained(str(tmp_path)).config == model.config


def test_names_without_prefix_masks_any_order_and_a_tied_output_layer(tmp_path):
    tensors = {name.removeprefix("transformer."): array for name, array in tensors_of(random_gpt()).items()}
    mask = np.tril(np.ones((1, 1, 7, 7), np.float32))
    tensors = {"h.0.attn.bias": mask, "h.1.attn.bias": mask.astype(np.bool_), **tensors}
    tensors["h.0.attn.masked_bias"], tensors["lm_head.weight"] = np.array(-1e4, np.float32), tensors["wte.weight"]

    def shuffled(header):
        return {name: header[name] for name in sorted(header, key=lambda name: name[::-1])}

    assert same_weights(GPT.from_pretrained(make(tmp_path, tensors=tensors, header=shuffled)), random_gpt())


def test_half_and_double_precision(tmp_path):
    exact = random_gpt()
    for parameter in exact.parameters():  # numbers that BF16 and F16 have both
        parameter.data[...] = np.round(parameter.data * 16) / 16
    for kind in ("f2", "f8", "BF16"):
        tensors = tensors_of(exact)
        for name, array in tensors.items():
            if kind == "BF16":
                bits = (array.view(np.uint32) >> 16).astype("<u2")
                tensors[name] = ("BF16", list(array.shape), bits.tobytes())
            else:
                tensors[name] = array.astype(kind)
        model = GPT.from_pretrained(make(tmp_path, tensors=tensors))
        assert same_weights(model, exact)
        assert all(parameter.dtype == np.float32 for parameter in model.parameters())


def test_a_folder_in_parts(tmp_path):
    assert same_weights(GPT.from_pretrained(shard(make(tmp_path))), random_gpt())


def test_what_changes_nothing_is_not_refused(tmp_path):
    settings = settings_of(CONFIG, n_inner=60, activation_function="gelu_pytorch_tanh", reorder_and_upcast_attn=True)
    assert same_weights(GPT.from_pretrained(make(tmp_path, settings)), random_gpt())
    for name in ("n_inner", "layer_norm_epsilon", "scale_attn_weights", "tie_word_embeddings", "resid_pdrop"):
        del settings[name]
    assert GPT.from_pretrained(make(tmp_path, settings)).config.dropout == 0.1  # as transformers completes it


# ---- what is refused


def refused(path):
    with pytest.raises(CheckpointError) as error:
        GPT.from_pretrained(path)
    text = str(error.value)
    assert "\n" not in text and len(text) < 500 and error.value.exit_code == 3
    return text


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", "llama"),
        ("model_type", None),
        ("activation_function", "relu"),
        ("activation_function", ["gelu_new"]),
        ("n_inner", 61),
        ("layer_norm_epsilon", 1e-6),
        ("layer_norm_epsilon", float("nan")),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("n_head", 4),
        ("n_head", 0),
        ("n_layer", "2"),
        ("n_layer", True),
        ("n_layer", 10**12),
        ("n_embd", 15.0),
        ("n_embd", 9 * 10**4000),
        ("n_positions", -7),
        ("vocab_size", None),
        ("vocab_size", 2**39),
        ("resid_pdrop", 1.0),
        ("resid_pdrop", "none"),
        ("npgpt", 3),
        ("npgpt", {"tokenizer": {"kind": "word"}}),
        ("npgpt", {"tokenizer": {"kind": "char", "chars": {"a": 1}}}),
        ("npgpt", {"tokenizer": {"kind": "byte"}}),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, key, value):
    text = refused(make(tmp_path, settings_of(CONFIG, **{key: value})))
    assert str(tmp_path) in text
    # weights of another shape than the config says are found in their file; the rest in the config, by its key
    if value not in (10**12, 2**39):
        assert "config.json" in text and ({"npgpt": "tokenizer"}.get(key, key) in text)


def without(name):
    return {n: a for n, a in tensors_of(random_gpt()).items() if n != name}


@pytest.mark.parametrize(
    "tensors, words",
    [
        (lambda: without("transformer.h.1.ln_2.bias"), "h.1.ln_2.bias must have shape (15,), found nothing"),
        (lambda: without("transformer.wte.weight"), "wte.weight must have shape (13, 15), found nothing"),
        (lambda: tensors_of(random_gpt()) | {"surprise": np.zeros(3)}, "GPT-2 has no 'surprise'"),
        (
            lambda: tensors_of(random_gpt()) | {"transformer.h.2.ln_1.bias": np.zeros(15)},
            "GPT-2 has no 'transformer.h.2.ln_1.bias'; config.json says n_layer = 2",
        ),
        (
            lambda: {n: np.ascontiguousarray(a.T) for n, a in tensors_of(random_gpt()).items()},
            "transformer.wte.weight must have shape (13, 15), found (15, 13)",
        ),
        (
            lambda: {n: a.T if "c_fc.w" in n else a for n, a in tensors_of(random_gpt()).items()},
            "c_fc.weight must have shape (15, 60), found (60, 15)",
        ),
        (
            lambda: tensors_of(random_gpt()) | {"transformer.wpe.weight": np.zeros((7, 15), np.int64)},
            "transformer.wpe.weight has dtype I64",
        ),
        (
            lambda: tensors_of(random_gpt()) | {"transformer.ln_f.bias": np.full(15, np.nan, np.float32)},
            "transformer.ln_f.bias has numbers that are not finite",
        ),
        (
            lambda: tensors_of(random_gpt()) | {"transformer.ln_f.bias": np.full(15, 1e300)},
            "transformer.ln_f.bias has numbers that are not finite",
        ),
        (
            lambda: tensors_of(random_gpt()) | {"wte.weight": np.zeros((13, 15), np.float32)},
            "stands there twice",
        ),
        (
            lambda: tensors_of(random_gpt()) | {"lm_head.weight": np.zeros((13, 15), np.float32)},
            "lm_head.weight is not the same as wte.weight",
        ),
        (
            lambda: tensors_of(random_gpt()) | {"lm_head.weight": np.zeros((14, 15), np.float32)},
            "lm_head.weight must have shape (13, 15), found (14, 15)",
        ),
        (
            lambda: tensors_of(random_gpt()) | {"transformer.ln_f.bias": ("F8_E5M2", [15], bytes(15))},
            "'transformer.ln_f.bias' is damaged, or of a dtype that is not read",
        ),
        (lambda: {}, "0 arrays"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, tensors, words):
    text = refused(make(tmp_path, tensors=tensors()))
    assert words in text and "model.safetensors" in text


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda p: (p / "config.json").unlink(), "there is no"),
        (lambda p: (p / "config.json").write_bytes(b"\xff{}"), "is not JSON"),
        (lambda p: (p / "config.json").write_text("[" * 100_000), "is not JSON"),
        (lambda p: (p / "config.json").write_text('{"n_embd": ' + "9" * 100_000 + "}"), "config.json"),
        (lambda p: (p / "config.json").write_text(" " * 2**26 + "{}"), "more than 67108864 bytes"),
        (lambda p: (p / "config.json").write_text("[]"), "is not a JSON object"),
        (lambda p: ((p / "config.json").unlink(), (p / "config.json").mkdir()), "cannot read"),
        (lambda p: (p / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "safe_serialization=True"),
        (lambda p: shard(p, lambda m: []), "weight_map must say"),
        (lambda p: shard(p, lambda m: {}), "weight_map must say"),
        (lambda p: shard(p, lambda m: m | {"x": "../model.safetensors"}), "'../model.safetensors' is not the name"),
        (lambda p: shard(p, lambda m: m | {"x": "/etc/passwd"}), "'/etc/passwd' is not the name"),
        (lambda p: shard(p, lambda m: m | {"x": "..\\model.safetensors"}), "is not the name"),
        (lambda p: shard(p, lambda m: m | {"x": "a/b.safetensors"}), "is not the name"),
        (lambda p: shard(p, lambda m: m | {"x": ["a.safetensors"]}), "is not the name"),
        (lambda p: shard(p, lambda m: m | {"x": "model-3.safetensors"}), "names model-3.safetensors, which is not"),
        (lambda p: shard(p, lambda m: m | {"x": next(iter(m.values()))}), "does not fit model.safetensors.index.json"),
        (lambda p: shard(p, lambda m: dict(list(m.items())[1:])), "'transformer.wte.weight' is not expected there"),
        (lambda p: (shard(p) / "model.safetensors.index.json").write_text("{"), "is not JSON"),
        (lambda p: (shard(p) / "model-00002-of-00002.safetensors").unlink(), "downloaded as a whole?"),
        (lambda p: (shard(p) / "model-00002-of-00002.safetensors").write_bytes(b"x"), "it has 1 bytes only"),
    ],
)
def test_a_damaged_folder_is_one_clear_error(tmp_path, damage, words):
    damage(make(tmp_path))
    text = refused(tmp_path)
    assert words in text and str(tmp_path) in text


def test_what_is_no_folder_of_that_kind(tmp_path):
    assert "nothing is downloaded" in refused(tmp_path / "gpt2")
    assert "there is no checkpoint in" in refused(tmp_path)
    make(tmp_path)
    assert f"name the folder, {tmp_path}" in refused(tmp_path / "model.safetensors")


def test_whatever_is_changed_in_a_folder_it_is_opened_or_refused(tmp_path):
    """Hundreds of damaged configs, headers, indexes and bodies: a GPT or one line, never a traceback."""
    rng = random.Random(0)
    odd = [None, True, -1, 0, 3, 10**12, 2**63, 10**400, 0.5, float("nan"), float("inf"), "", "x" * 9999, [], [1], {}]
    odd += [[2**62], [2**40, 2**40], [0], [0, 2**62, 2**62], [1] * 100, [10**400], [0, 4], [4, 0], "F32", "BF16", "F16"]

    def bits(raw):
        raw = bytearray(raw)
        for _ in range(rng.choice([1, 1, 2, 20])):
            raw[rng.randrange(min(len(raw), 3000))] ^= 1 << rng.randrange(8)
        return bytes(raw)

    def value(raw):
        """Another value somewhere in a JSON object, or one less or more."""
        found = json.loads(raw)
        inner = rng.choice([found, *(v for v in found.values() if isinstance(v, dict))])
        keys = [*inner, "npgpt", "tokenizer", "wte.weight"]
        inner[rng.choice(keys)] = rng.choice(odd)
        if rng.random() < 0.1:
            inner.pop(rng.choice(list(inner)))
        return json.dumps(found).encode()

    def header(raw):
        (length,) = struct.unpack("<Q", raw[:8])
        text = raw[8 : 8 + length]
        found = json.loads(text)
        name = rng.choice(list(found))
        found[name][rng.choice(list(found[name]))] = rng.choice(odd)
        text = json.dumps(found).encode() if rng.random() < 0.7 else value(text)
        return struct.pack("<Q", len(text)) + text + raw[8 + length :]

    def cut(raw):
        return raw[: rng.randrange(len(raw))]

    def longer(raw):
        return raw + rng.randbytes(rng.choice([1, 8, 4096]))

    whole, parts = make(tmp_path / "whole"), shard(make(tmp_path / "parts"))
    weights = [whole / "model.safetensors", parts / "model-00001-of-00002.safetensors"]
    texts = [whole / "config.json", parts / "model.safetensors.index.json"]
    good = {path: path.read_bytes() for path in [*weights, *texts]}
    opened = 0
    for _ in range(700):
        path = rng.choice(list(good))
        change = rng.choice([bits, cut, longer, *([header] * 3 if path in weights else [value] * 3)])
        path.write_bytes(change(good[path]))
        try:
            model = GPT.from_pretrained(path.parent)
        except CheckpointError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
        else:
            opened += 1
            assert all(np.isfinite(parameter.data).all() for parameter in model.parameters())
        path.write_bytes(good[path])
    assert 20 < opened < 400  # some changes change nothing that matters


def test_every_truncation_of_the_header_is_noticed(tmp_path):
    path = make(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(tmp_path)


# ---- writing


def header_of(path):
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])


def test_what_is_written_has_their_names_and_shapes(tmp_path):
    model = random_gpt()
    model.save_pretrained(tmp_path / "a" / "b")
    path = tmp_path / "a" / "b"
    assert sorted(os.listdir(path)) == ["config.json", "model.safetensors"]
    header = header_of(path / "model.safetensors")
    assert header.pop("__metadata__")["format"] == "pt"
    expected = tensors_of(model)
    assert {name: tuple(entry["shape"]) for name, entry in header.items()} == {n: a.shape for n, a in expected.items()}
    arrays, _ = checkpoint.load(path / "model.safetensors")
    assert all(arrays[name].tobytes() == array.tobytes() for name, array in expected.items())
    settings, theirs = json.loads((path / "config.json").read_text()), settings_of(CONFIG)
    same = set(theirs) - {"attn_pdrop", "bos_token_id", "embd_pdrop", "eos_token_id", "resid_pdrop"}
    same -= {"n_ctx", "summary_type", "use_cache", "reorder_and_upcast_attn"}  # of no meaning, or the default
    assert {name: settings[name] for name in same} == {name: theirs[name] for name in same}
    assert settings["bos_token_id"] is settings["eos_token_id"] is None and "npgpt" not in settings
    assert same_weights(GPT.from_pretrained(path), model) and GPT.from_pretrained(path).config == model.config


def test_a_model_without_biases_gets_zeros(tmp_path):
    model = random_gpt(dataclasses.replace(CONFIG, bias=False, dropout=0.25))
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == dataclasses.replace(CONFIG, dropout=0.25)
    biases = [p.data for name, p in again.named_parameters() if name.endswith("bias")]
    assert len(biases) == 2 * 6 + 1 and not any(b.any() for b in biases)
    assert np.abs(logits(again) - logits(model)).max() < 1e-5


def test_a_model_in_double_precision_is_written_in_single(tmp_path):
    model = GPT(CONFIG, dtype=np.float64)
    model.save_pretrained(tmp_path)
    header = header_of(tmp_path / "model.safetensors")
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"F32"}


@pytest.mark.parametrize("tokenizer", [CharTokenizer("\n\"\\aé…日\ud800😀"), ByteTokenizer()], ids=lambda t: t.kind)
def test_the_tokenizer_comes_along(tmp_path, tokenizer):
    model = random_gpt(dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size))
    model.tokenizer = tokenizer
    model.save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).tokenizer.to_dict() == tokenizer.to_dict()


def test_a_tokenizer_that_has_files_of_its_own_writes_them(tmp_path):
    class Tokenizer:
        vocab_size, end_of_text = 13, 12

        def save(self, path):
            (path / "tokenizer.json").write_text("{}")

    model = random_gpt()
    model.tokenizer = Tokenizer()
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert settings["bos_token_id"] == settings["eos_token_id"] == 12 and "npgpt" not in settings


@pytest.mark.parametrize("tokenizer", [None, ByteTokenizer()], ids=["none", "byte"])
def test_the_tokenizer_of_an_earlier_export_is_set_aside(tmp_path, tokenizer):
    pytest.importorskip("tokenizers")
    model = random_gpt(dataclasses.replace(CONFIG, vocab_size=300))
    model.tokenizer = BPETokenizer.learn(["the cat the cat "], 300)
    model.save_pretrained(tmp_path)
    earlier = (tmp_path / "tokenizer.json").read_bytes()
    for name in ("tokenizer.json.set-aside", "vocab.json", "merges.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    model.tokenizer = tokenizer
    model.save_pretrained(tmp_path)
    names = ["tokenizer.json.set-aside", "tokenizer.json.set-aside-2", "vocab.json.set-aside", "merges.txt.set-aside"]
    settings = "tokenizer_config.json.set-aside"
    assert sorted(os.listdir(tmp_path)) == sorted(["config.json", "model.safetensors", *names, settings])
    texts = [(tmp_path / name).read_bytes() for name in names]
    assert texts == [b"tokenizer.json.set-aside", earlier, b"vocab.json", b"merges.txt"]
    assert type(GPT.from_pretrained(tmp_path).tokenizer) is type(tokenizer)


def test_a_damaged_tokenizer_json_is_named(tmp_path):
    pytest.importorskip("tokenizers")
    state = json.loads(BPETokenizer.learn(["the cat the cat "], 260).json)
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": 5}
    (make(tmp_path) / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    text = refused(tmp_path)
    assert f"{tmp_path / 'tokenizer.json'} cannot be used" in text and "config.json" not in text


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    old, new = random_gpt(), random_gpt(seed=1)
    old.save_pretrained(tmp_path)

    def fail(*args):
        raise OSError(28, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(CheckpointError, match="No space left on device"):
                new.save_pretrained(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
        assert same_weights(GPT.from_pretrained(tmp_path), old)
    new.save_pretrained(tmp_path)
    assert same_weights(GPT.from_pretrained(tmp_path), new)


def test_what_is_not_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write to"):
        random_gpt().save_pretrained(tmp_path / "file")
    (tmp_path / "iter-00000001.safetensors").touch()
    with pytest.raises(CheckpointError, match="holds the checkpoints of a run"):
        random_gpt().save_pretrained(tmp_path)
    model = random_gpt()
    model.lm_head.weight.data[0, 0] = np.inf
    with pytest.raises(CheckpointError, match="not finite"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run."""
    path = tmp_path_factory.mktemp("hub")
    (path / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 20)
    config = TrainConfig(
        data=(str(path / "text.txt"),), out_dir=str(path / "run"), n_layer=2, n_head=2, n_embd=16, block_size=8,
        batch_size=2, dropout=0.1, bias=True, max_iters=4, warmup_iters=1, eval_interval=2, eval_iters=1,
        sample_tokens=0, final_sample_tokens=0,
    )  # fmt: skip
    list(Trainer(config).run())
    return path / "run"


def test_a_run_is_opened_at_its_best_and_exported_bit_by_bit(run, tmp_path):
    model = GPT.from_pretrained(run)
    assert same_weights(model, GPT.from_pretrained(folder.best(run))) and not model.training
    model.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == model.config and again.tokenizer.to_dict() == model.tokenizer.to_dict()
    assert logits(again).tobytes() == logits(model).tobytes()


def test_samples_of_a_run_and_of_its_export_are_the_same(run, tmp_path, capsys):
    GPT.from_pretrained(run).save_pretrained(tmp_path)
    texts = []
    for path in (run, tmp_path):
        assert sample.main(["--out-dir", str(path), "--prompt", "fox", "--max-new-tokens", "20"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("fox")


def test_sampling_needs_a_tokenizer(tmp_path):
    with pytest.raises(UsageError, match=r"no tokenizer that can be opened .*package tokenizers"):
        sample.main(["--out-dir", str(make(tmp_path))])


def test_a_hostile_checkpoint_is_one_line(run, tmp_path):
    arrays, state = folder.load(folder.best(run))
    for changes in ({"n_layer": 10**12}, {"n_embd": 16.0}, {"vocab_size": 2**39}, {"block_size": 10**400}, {"bias": 1}):
        changed = {**state, "model": {**state["model"], **changes}}
        checkpoint.save(tmp_path / "bad", arrays, {"npgpt": json.dumps(changed)})
        refused(tmp_path / "bad")
    for name in ("model", "tokenizer"):
        for value in (None, 3, [], "x", {}):
            checkpoint.save(tmp_path / "bad", arrays, {"npgpt": json.dumps({**state, name: value})})
            if (name, value) != ("model", {}):  # (a GPT of the default settings, which these arrays are not)
                assert "was not written by npgpt.train, or is damaged" in refused(tmp_path / "bad")


# ---- memory

OPEN = """
import sys
from npgpt import GPT
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
GPT, before = GPT, peak()
GPT.from_pretrained(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
def test_opening_holds_the_weights_once(tmp_path):
    """Not the optimizer's moments, and no second copy of the weights; beside them one array's pages of the file."""
    config = GPTConfig(vocab_size=256, block_size=16, n_layer=12, n_head=4, n_embd=320, bias=True)
    model = GPT(config)
    megabytes = sum(parameter.data.nbytes for parameter in model.parameters()) / 2**20
    model.save_pretrained(tmp_path / "hub")
    arrays = {name: parameter.data for name, parameter in model.named_parameters()}
    moments = {f"adamw.{k}.{name}": array for name, array in arrays.items() for k in "mv"}
    state = {"model": dataclasses.asdict(config), "tokenizer": {"kind": "byte"}, "val_loss": 1.0}
    (tmp_path / "run").mkdir()
    checkpoint.save(folder_file := tmp_path / "run" / "iter-00000001.safetensors", arrays | moments,
                    {"npgpt": json.dumps(state)})  # fmt: skip
    assert folder_file.stat().st_size > 3 * megabytes * 2**20
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    for name in ("hub", "run"):
        command = [sys.executable, "-c", OPEN, str(tmp_path / name)]
        grown = float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
        assert 0.8 * megabytes < grown < 1.1 * megabytes + 8, f"{name}: {grown:.0f} MB for {megabytes:.0f} MB"


# ---- safetensors and transformers themselves


def test_the_package_safetensors_reads_what_is_written_and_writes_what_is_read(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    model, path = random_gpt(), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    found = safetensors.load_file(path)
    assert found.keys() == tensors_of(model).keys()
    assert all(found[name].tobytes() == array.tobytes() for name, array in tensors_of(model).items())
    found["transformer.h.0.attn.bias"] = np.ones((1, 1, 7, 7), np.bool_)  # another dtype: it changes the order
    found["transformer.wpe.weight"] = found["transformer.wpe.weight"].astype(np.float64)
    safetensors.save_file(found, path, metadata={"format": "pt"})
    assert same_weights(GPT.from_pretrained(tmp_path), model)


HF_SHAPES = [
    dict(vocab_size=40, n_positions=16, n_embd=48, n_layer=3, n_head=4),
    dict(vocab_size=5, n_positions=9, n_embd=21, n_layer=2, n_head=7),
    dict(vocab_size=300, n_positions=33, n_embd=100, n_layer=1, n_head=5, n_inner=400),
    dict(vocab_size=2, n_positions=1, n_embd=3, n_layer=4, n_head=1, activation_function="gelu_pytorch_tanh"),
]


@pytest.fixture
def transformers():
    pytest.importorskip("torch")
    found = pytest.importorskip("transformers")
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    return found


def theirs(transformers, **shape):
    """A GPT2LMHeadModel none of whose parameters has a special value."""
    import torch

    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=None, eos_token_id=None, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def their_logits(model, seed=0):
    import torch

    idx = np.random.default_rng(seed).integers(0, model.config.vocab_size, (2, model.config.n_positions))
    with torch.no_grad():
        return model(torch.tensor(idx)).logits.float().numpy()


def same_tensors(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[name].numpy().tobytes() == b[name].numpy().tobytes() for name in a)


@pytest.mark.parametrize("shape", HF_SHAPES)
def test_logits_are_those_of_transformers_and_all_bits_come_back(transformers, tmp_path, shape):
    original = theirs(transformers, **shape)
    original.save_pretrained(tmp_path / "theirs")
    model = GPT.from_pretrained(tmp_path / "theirs")
    assert np.abs(logits(model) - their_logits(original)).max() < 1e-4
    model.save_pretrained(tmp_path / "ours")
    again, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert same_tensors(original, again) and again.config.eos_token_id is None
    # what came as gelu_pytorch_tanh is written as gelu_new: the same function, rounded otherwise
    bound = 0 if original.config.activation_function == "gelu_new" else 1e-6
    assert np.abs(their_logits(again.eval()) - their_logits(original)).max() <= bound


def test_transformers_folders_in_parts(transformers, tmp_path):
    original = theirs(transformers, **HF_SHAPES[0])
    original.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert np.abs(logits(GPT.from_pretrained(tmp_path)) - their_logits(original)).max() < 1e-4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_transformers_folders_of_other_dtypes(transformers, tmp_path, dtype):
    import torch

    original = theirs(transformers, **HF_SHAPES[0]).to(getattr(torch, dtype))
    original.save_pretrained(tmp_path)
    assert np.abs(logits(GPT.from_pretrained(tmp_path)) - their_logits(original.float())).max() < 1e-4


def test_a_file_of_safetensors_with_masks_and_without_prefix(transformers, tmp_path):
    import safetensors.torch
    import torch

    original = theirs(transformers, **HF_SHAPES[0])
    original.save_pretrained(tmp_path)
    tensors = {n: t.contiguous() for n, t in original.transformer.state_dict().items()}
    for n in range(3):  # as the file of OpenAI's GPT-2 on the hub has them
        tensors[f"h.{n}.attn.bias"] = torch.tril(torch.ones(1, 1, 16, 16))
        tensors[f"h.{n}.attn.masked_bias"] = torch.tensor(-1e4)
    tensors["h.0.attn.bias"] = tensors["h.0.attn.bias"].to(torch.bool)  # another dtype: it changes the order
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert np.abs(logits(GPT.from_pretrained(tmp_path)) - their_logits(original)).max() < 1e-4


def test_transformers_opens_what_a_run_learnt(transformers, run, tmp_path):
    model = GPT.from_pretrained(run)
    model.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert np.abs(their_logits(again) - logits(model)).max() < 1e-4


def test_transformers_opens_a_model_without_biases(transformers, tmp_path):
    model = random_gpt(dataclasses.replace(CONFIG, bias=False))
    model.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert np.abs(their_logits(again) - logits(model)).max() < 1e-4


def test_transformers_opens_what_was_begun_with_its_model_and_trained(transformers, tmp_path):
    import torch

    text = "the quick brown fox jumps over the lazy dog.\n" * 30
    (tmp_path / "text.txt").write_text(text)
    shape = dict(n_layer=2, n_head=2, n_embd=16)
    original = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_positions=12, bos_token_id=None, eos_token_id=None, **shape)
    )
    original.save_pretrained(tmp_path / "theirs")
    config = TrainConfig(
        data=(str(tmp_path / "text.txt"),), out_dir=str(tmp_path / "run"), init_from=str(tmp_path / "theirs"),
        block_size=8, bias=True, batch_size=4, max_iters=20, warmup_iters=1, eval_interval=10, eval_iters=1,
        learning_rate=1e-2, dropout=0.1, sample_tokens=0, final_sample_tokens=0, **shape,
    )  # fmt: skip
    losses = [event.val_loss for event in Trainer(config).run() if isinstance(event, Evaluation)]
    assert losses[-1] < losses[0] - 0.5
    model = GPT.from_pretrained(tmp_path / "run")
    model.save_pretrained(tmp_path / "ours")
    again, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()) and again.config.n_positions == 8 and again.config.vocab_size == 40
    assert np.abs(their_logits(again.eval()) - logits(model)).max() < 1e-4
    # and both write the same, while the context has room
    prompt = model.tokenizer.encode("the").tolist()
    with torch.no_grad():
        theirs_next = again.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)[0].tolist()
    assert theirs_next == prompt + list(model.generate(prompt, 5, temperature=0))


# ---- names, settings and files of other programs


@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_the_tied_matrix_may_be_stored_as_the_output_layer_only(tmp_path, kind):
    exact = random_gpt()
    for parameter in exact.parameters():
        parameter.data[...] = np.round(parameter.data * 16) / 16
    tensors = tensors_of(exact)
    tensors = {"lm_head.weight" if name.endswith("wte.weight") else name: array for name, array in tensors.items()}
    if kind == "BF16":
        for name, array in tensors.items():
            tensors[name] = ("BF16", list(array.shape), (array.view(np.uint32) >> 16).astype("<u2").tobytes())
    assert same_weights(GPT.from_pretrained(make(tmp_path, tensors=tensors)), exact)
    del tensors["lm_head.weight"]
    make(tmp_path, tensors=tensors)
    assert "wte.weight must have shape (13, 15), found nothing" in refused(tmp_path)


def test_the_output_layer_alone_is_found_in_parts_too(tmp_path, monkeypatch):
    tensors = tensors_of(random_gpt())
    renamed = {"lm_head.weight" if "wte" in name else name: array for name, array in tensors.items()}
    monkeypatch.setitem(globals(), "tensors_of", lambda model: renamed)
    path = shard(make(tmp_path))
    monkeypatch.undo()
    assert same_weights(GPT.from_pretrained(path), random_gpt())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "module._orig_mod.", "transformer._orig_mod."])
def test_what_other_programs_put_before_the_names_is_passed_over(tmp_path, prefix):
    inner = "" if prefix.startswith("transformer.") else "transformer."
    tensors = {prefix + inner + n.removeprefix("transformer."): a for n, a in tensors_of(random_gpt()).items()}
    tensors[prefix.removeprefix("transformer.") + "lm_head.weight"] = tensors[f"{prefix}{inner}wte.weight"]
    assert same_weights(GPT.from_pretrained(make(tmp_path, tensors=tensors)), random_gpt())


def test_a_prefix_that_is_not_known_is_named(tmp_path):
    tensors = {f"net.{name}": array for name, array in tensors_of(random_gpt()).items()}
    assert "found nothing; it has 'net.transformer.wte.weight'" in refused(make(tmp_path, tensors=tensors))


def test_a_config_may_call_its_settings_by_their_other_names(tmp_path):
    others = {"hidden_size": 15, "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 7}
    theirs = settings_of(CONFIG)
    for name in ("n_embd", "n_layer", "n_head", "n_positions", "model_type"):
        del theirs[name]
    path = make(tmp_path, {**theirs, **others})
    assert same_weights(GPT.from_pretrained(path), random_gpt())
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text, encoding="utf-8-sig")  # which begins with a byte order mark
    assert same_weights(GPT.from_pretrained(path), random_gpt())
    make(tmp_path, {**settings_of(CONFIG), **others})  # both, and the same
    assert same_weights(GPT.from_pretrained(path), random_gpt())
    make(tmp_path, {**settings_of(CONFIG), **others, "num_hidden_layers": 3})
    assert "n_layer is 2 and num_hidden_layers 3, which are two names of one setting" in refused(path)


@pytest.mark.parametrize(
    "raw, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 13\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "a page of HTML"),
        (b"PK\x03\x04" + bytes(99), "a zip archive, as .docx, .epub and PyTorch's .pt"),
        (b"\x80\x04\x95" + bytes(99), "a pickle"),
        (b"GGUF\x03\0\0\0" + bytes(99), "llama.cpp"),
        (b"\x1f\x8b\x08" + bytes(99), "gzip"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
        ("First Citizen: text".encode("utf-16"), "text in UTF-16"),
        (b"First Citizen:\nBefore we proceed any further, hear me speak.\n", "it is text"),
        (bytes(1000), "nothing but zeros"),
    ],
)
def test_a_file_that_is_no_safetensors_is_named_for_what_it_is(tmp_path, raw, words):
    (make(tmp_path) / "model.safetensors").write_bytes(raw)
    assert words in refused(tmp_path) and "model.safetensors" in refused(tmp_path)
    (tmp_path / "ckpt.pt").write_bytes(raw)
    assert words in refused(tmp_path / "ckpt.pt")
    if "text" not in words:
        (tmp_path / "config.json").write_bytes(raw)
        assert words in refused(tmp_path)


# ---- tokenizers that have a folder

CHAT_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|pad|>",
    "padding_side": "left", "chat_template": "{{ messages }}",
}  # fmt: skip


def chat_folder(path):
    """A folder whose tokenizer has 300 words, <|end|> and <|pad|>, and all that belongs to a chat model."""
    pytest.importorskip("tokenizers")
    state = json.loads(BPETokenizer.learn(["the cat sat on the mat, the best of times, " * 9], 300).json)
    V = len(state["model"]["vocab"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    state["added_tokens"] = [{"id": V, "content": "<|end|>", **flags}, {"id": V + 1, "content": "<|pad|>", **flags}]
    config = dataclasses.replace(CONFIG, vocab_size=V + 2)
    settings = settings_of(config, eos_token_id=V, bos_token_id=None, pad_token_id=V + 1)
    make(path, settings, tensors_of(random_gpt(config)))
    (path / "additional_chat_templates").mkdir()
    for name, text in {
        "tokenizer.json": json.dumps(state), "tokenizer_config.json": json.dumps(CHAT_SETTINGS),
        "chat_template.jinja": "{{ messages }}é", "additional_chat_templates/rag.jinja": "{{ documents }}",
        "generation_config.json": json.dumps({"eos_token_id": [V, 3], "temperature": 0.7}),
    }.items():  # fmt: skip
        (path / name).write_text(text, encoding="utf-8")
    return path, V


def test_special_tokens_and_templates_survive_being_written(tmp_path):
    path, V = chat_folder(tmp_path / "a")
    model = GPT.from_pretrained(path)
    model.save_pretrained(tmp_path / "b")
    for name in ("chat_template.jinja", "additional_chat_templates/rag.jinja", "generation_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (path / name).read_bytes()
    written = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert written == {**CHAT_SETTINGS, "add_prefix_space": False}
    states = [json.loads((folder / "tokenizer.json").read_text()) for folder in (path, tmp_path / "b")]
    assert states[0] == states[1]
    settings = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"], settings["pad_token_id"]) == (None, V, V + 1)
    again = GPT.from_pretrained(tmp_path / "b")
    assert again.tokenizer.to_dict() == model.tokenizer.to_dict() and again.tokenizer.vocab_size == V + 2
    # through a checkpoint too
    tokenizer = from_dict(json.loads(json.dumps(model.tokenizer.to_dict())))
    assert tokenizer.files == model.tokenizer.files and tokenizer.ids == model.tokenizer.ids
    # a checkpoint cannot have any other file written
    with pytest.raises(CheckpointError, match="files are none of a tokenizer"):
        from_dict({**model.tokenizer.to_dict(), "files": {"../x": ""}})


@pytest.mark.parametrize("other", [None, ByteTokenizer(), "bpe"])
def test_what_another_models_tokenizer_says_is_set_aside(tmp_path, other):
    path, _ = chat_folder(tmp_path / "a")
    for name in ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"):
        (path / name).write_text("{}")
    model = random_gpt(dataclasses.replace(CONFIG, vocab_size=300))
    model.tokenizer = BPETokenizer.learn(["the cat the cat "], 300) if other == "bpe" else other
    model.save_pretrained(path)
    names = [file.name for file in path.rglob("*") if file.is_file() and "set-aside" not in file.name]
    own = ["tokenizer.json", "tokenizer_config.json"] if other == "bpe" else []
    assert sorted(names) == sorted(["config.json", "model.safetensors", *own])
    if own:
        settings = json.loads((path / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "eos_token" not in settings
    found = GPT.from_pretrained(path).tokenizer
    assert found is None if other is None else found.to_dict() == model.tokenizer.to_dict()


def test_an_added_token_beyond_the_models_is_no_reason_to_refuse_the_folder(tmp_path):
    path, V = chat_folder(tmp_path / "a")
    config = dataclasses.replace(CONFIG, vocab_size=V + 1)
    make(path, settings_of(config), tensors_of(random_gpt(config)))
    model = GPT.from_pretrained(path)
    assert model.tokenizer.vocab_size == V + 1 and model.tokenizer.encode("<|end|>").tolist() == [V]
    with pytest.raises(UsageError, match=rf"the token '<\|pad\|>', whose number is {V + 1}"):
        model.tokenizer.encode("the <|pad|>")
    with pytest.raises(UsageError, match="whose number"):
        sample.main(["--out-dir", str(path), "--prompt", "the <|pad|>", "--max-new-tokens", "1"])
    model.save_pretrained(tmp_path / "b")
    assert GPT.from_pretrained(tmp_path / "b").tokenizer.to_dict() == model.tokenizer.to_dict()
    config = dataclasses.replace(CONFIG, vocab_size=V - 1)  # but there must be all words
    make(path, settings_of(config), tensors_of(random_gpt(config)))
    assert f"vocab_size {V - 1}, but its tokenizer has {V + 2}" in refused(path)


def test_transformers_has_the_same_tokens_in_what_npgpt_wrote(transformers, tmp_path):
    path, V = chat_folder(tmp_path / "a")
    models = {"chat": GPT.from_pretrained(path)}
    models["learnt"] = random_gpt(dataclasses.replace(CONFIG, vocab_size=300))
    models["learnt"].tokenizer = BPETokenizer.learn(["the cat the cat sat, the best of times <|endoftext|> " * 9], 300)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert len(theirs) == model.tokenizer.vocab_size
        for text in ("the cat<|end|> sat", "<|endoftext|>", " é\n\n\u200b", ""):
            assert theirs(text, add_special_tokens=False)["input_ids"] == model.tokenizer.encode(text).tolist()
    chat = transformers.AutoTokenizer.from_pretrained(tmp_path / "chat")
    assert (chat.eos_token, chat.eos_token_id, chat.pad_token_id) == ("<|end|>", V, V + 1)
