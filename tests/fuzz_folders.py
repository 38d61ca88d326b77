"""Hugging Face folders as people have them, made at random: what npgpt reads in them, beside the package transformers.

    python tests/fuzz_folders.py --seed 0 --n 200     compares npgpt with transformers, where that is installed
    python tests/fuzz_folders.py --figures            writes what transformers reads in the first folders, for the tests

Each folder is either read alike, with the same tokens for its texts and the same logits, or refused in one line.  What
npgpt then writes is read by transformers with the same tokens.
"""

import argparse
import json
import random
import shutil
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np

from npgpt.errors import CheckpointError, UsageError
from npgpt.model import GPT

FIGURES = Path(__file__).resolve().parent / "data" / "folders.json"
N_FIGURES = 20
TEXTS = (
    "It was the best of times", " It was", "<|endoftext|>It was<|endoftext|>the end", "hi <|user|> there<|bot|>",
    "a<|pad|>b <|pad|> c", "end\nstart end\n start", "  two  spaces \n\n\t tabs\r\n", "naïve café — 日本 😀 e\u0301",
    "it's we'll 1859 12345 don't", "<mask> x <mask>y", "", "\n", "word<w>word <w> word", "a\u00a0b\u200bc\u2028d\x00e",
)  # fmt: skip
PARTS = (
    "<|user|>", "<|bot|>", "<|pad|>", "end\nstart", "<mask>", "<w>", "<|endoftext|>", " ", "\n", "\t", "the", " best",
    "12", "日", "\u00a0", "\u200d", "e\u0301", "'s", "\r\n", "<|", "\x00", "\ufeff", "😀", "\x1c", "ﬁ", "İ", "\u202e",
)  # fmt: skip
LETTERS = {
    byte: chr(byte) for byte in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
}  # GPT-2's letters for bytes
LETTERS |= {byte: chr(256 + n) for n, byte in enumerate(byte for byte in range(256) if byte not in LETTERS)}
WORDS = " the", " was", "It", " best", " of", " times", "end", "start", " there", "12", "日", "\n\n", "  ", " end"


def vocabulary(rng):
    """(words -> number, merges) of a byte-level BPE."""
    words, merges = [LETTERS[byte] for byte in sorted(LETTERS)], []
    for word in rng.sample(WORDS, rng.randrange(4, len(WORDS))):
        letters = [LETTERS[byte] for byte in word.encode()]
        for letter in letters[1:]:
            if letters[0] + letter not in words:
                words.append(letters[0] + letter)
                merges.append([letters[0], letter])
            letters[0] += letter
    return {word: number for number, word in enumerate(words)}, merges


def added(rng, content, number=None):
    """An added token as a tokenizer.json has it."""
    special = rng.random() < 0.6
    flags = {name: rng.random() < 0.15 for name in ("single_word", "lstrip", "rstrip")}
    token = {"content": content, **flags, "normalized": not special and rng.random() < 0.7, "special": special}
    return token if number is None else {"id": number, **token}


def tokenizer_files(rng):
    """name -> content of a tokenizer's files."""
    if rng.random() < 0.1:
        return {}
    vocab, merges = vocabulary(rng)
    n = len(vocab)
    files, settings, more = {}, {}, {}
    names = ["<|user|>", "<|bot|>", "<|pad|>", "end\nstart", "<mask>", "<w>", "<|endoftext|>"]
    names = rng.sample(names, rng.randrange(5))
    if rng.random() < 0.5 and "<|endoftext|>" in names:
        names.remove("<|endoftext|>")
        vocab["<|endoftext|>"] = n
        n += 1
    tokens = [added(rng, content, n + i) for i, content in enumerate(names)]
    if tokens and rng.random() < 0.1:
        tokens[-1]["id"] += rng.choice([1, 7])  # a gap
    where = rng.choice(["tokenizer.json"] * 3 + ["vocab.json", "added_tokens.json", "settings", "special"])
    if where in ("tokenizer.json", "settings", "special") or rng.random() < 0.4:
        before = {"type": "ByteLevel", "add_prefix_space": rng.random() < 0.2, "trim_offsets": True, "use_regex": True}
        if rng.random() < 0.2:
            before = rng.choice([
                {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, before]},
                {"type": "Sequence", "pretokenizers": [
                    {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithNext", "invert": False},
                    {**before, "use_regex": False, "add_prefix_space": False},
                ]},
            ])  # fmt: skip
        files["tokenizer.json"] = {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": tokens if where == "tokenizer.json" else [],
            "normalizer": {"type": "NFC"} if rng.random() < 0.1 else None, "pre_tokenizer": before,
            "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                      "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": vocab, "merges": merges if rng.random() < 0.5 else [" ".join(m) for m in merges]},
        }  # fmt: skip
        if rng.random() < 0.1:
            files["tokenizer.json"]["truncation"] = {
                "max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"
            }  # fmt: skip
    else:
        words = vocab if where != "vocab.json" else {**vocab, **{token["content"]: token["id"] for token in tokens}}
        files["vocab.json"] = words
        files["merges.txt"] = "#version: 0.2\n" + "".join(" ".join(merge) + "\n" for merge in merges)
    if where == "added_tokens.json" and tokens:
        files["added_tokens.json"] = {token["content"]: token["id"] for token in tokens}
    if where == "settings":
        settings["added_tokens_decoder"] = {
            str(token["id"]): {name: value for name, value in token.items() if name != "id"} for token in tokens
        }
    if where == "special":
        place = settings if rng.random() < 0.5 else more
        place[rng.choice(["additional_special_tokens", "extra_special_tokens"])] = [t["content"] for t in tokens]
    if names and rng.random() < 0.4:
        named = {"eos_token": rng.choice(names), "pad_token": rng.choice([*names, "<|pad|>", None])}
        named["image_token"] = rng.choice([*names, None])
        (settings if rng.random() < 0.7 else more).update({k: v for k, v in named.items() if v or k == "pad_token"})
    kinds = ["PreTrainedTokenizerFast", "TokenizersBackend", "GPT2Tokenizer", "GPT2TokenizerFast"]
    if rng.random() < 0.5:
        settings["tokenizer_class"] = rng.choice(kinds)
    if rng.random() < 0.2:
        settings["add_prefix_space"] = rng.random() < 0.6
    if rng.random() < 0.05:
        settings["split_special_tokens"] = True
    if rng.random() < 0.3:
        settings |= {"model_max_length": 8, "errors": "replace", "padding_side": "left"}
    if settings or rng.random() < 0.2:
        files["tokenizer_config.json"] = settings
    if more:
        files["special_tokens_map.json"] = more
    return files


def n_tokens(files):
    """How many tokens a tokenizer's files speak of."""
    numbers = [0]
    if "tokenizer.json" in files:
        numbers += files["tokenizer.json"]["model"]["vocab"].values()
        numbers += [token["id"] for token in files["tokenizer.json"]["added_tokens"]]
    numbers += [*files.get("vocab.json", {}).values(), *files.get("added_tokens.json", {}).values()]
    numbers += map(int, files.get("tokenizer_config.json", {}).get("added_tokens_decoder", {}))
    return max(numbers) + 1


def weights(config, rng):
    """name -> float32 array, as GPT2LMHeadModel has them."""
    V, T, C, L = (config[name] for name in ("vocab_size", "n_positions", "n_embd", "n_layer"))
    shapes = {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for n in range(L):
        for name, shape in {
            "ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "ln_2": (C,), "mlp.c_fc": (C, 4 * C),
            "mlp.c_proj": (4 * C, C),
        }.items():  # fmt: skip
            shapes[f"h.{n}.{name}.weight"], shapes[f"h.{n}.{name}.bias"] = shape, shape[-1:]
    tensors = {  # numbers that bfloat16 has too
        name: np.round(rng.normal(0, 0.3, shape) * 32).astype(np.float32) / 32 for name, shape in shapes.items()
    }
    return {name: array + (array.ndim == 1 and name.endswith("weight")) for name, array in tensors.items()}


def safetensors(tensors, dtype):
    """The bytes of a safetensors file."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, array in tensors.items():
        if dtype == "BF16":
            raw = (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        else:
            raw = array.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def make(seed, path):
    """Write the folder of a seed; returns the weights that are in it, name -> array."""
    rng = random.Random(seed)
    path.mkdir()
    files = tokenizer_files(rng)
    V = n_tokens(files) + rng.choice([0] * 8 + [-1, 3, 17]) if files else rng.randrange(2, 40)
    config = {
        "vocab_size": V, "n_positions": rng.choice([1, 7, 16]), "n_layer": rng.choice([1, 2]),
        "n_head": rng.choice([1, 2, 3]), "model_type": "gpt2",
    }  # fmt: skip
    config["n_embd"] = config["n_head"] * rng.choice([1, 4, 5])
    tensors = weights(config, np.random.default_rng(seed))
    truth = dict(tensors)
    # config.json
    aliases = {"n_embd": "hidden_size", "n_positions": "max_position_embeddings", "n_head": "num_attention_heads",
               "n_layer": "num_hidden_layers"}  # fmt: skip
    settings = dict(config)
    if rng.random() < 0.3:
        for name, other in aliases.items():
            if rng.random() < 0.7:
                settings[other] = settings[name]
                if rng.random() < 0.7:
                    del settings[name]
    if rng.random() < 0.15:
        del settings["model_type"]
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        if rng.random() < 0.5:
            settings[name] = rng.choice([0, 5, None])
    odd = {"activation_function": ["gelu_new", "gelu_pytorch_tanh", "relu"], "n_inner": [None, 4 * config["n_embd"], 3],
           "layer_norm_epsilon": [1e-5, 1e-5, 1e-6], "scale_attn_by_inverse_layer_idx": [False, False, True],
           "tie_word_embeddings": [True, True, False], "reorder_and_upcast_attn": [True, False],
           "architectures": [["GPT2LMHeadModel"], ["GPT2Model"]], "resid_pdrop": [0.0, 0.1]}  # fmt: skip
    for name, values in odd.items():
        if rng.random() < 0.08:
            settings[name] = rng.choice(values)
    text = json.dumps(settings)
    (path / "config.json").write_text(("\ufeff" if rng.random() < 0.1 else "") + text, encoding="utf-8")
    # names, dtypes and parts
    prefixes = ["transformer."] * 4 + ["", "", "_orig_mod.transformer.", "module.transformer.", "model.", "module."]
    prefix = rng.choice(prefixes)
    around = prefix.removesuffix("transformer.")
    tensors = {prefix + name: array for name, array in tensors.items()}
    if rng.random() < 0.3:
        tensors[f"{around}lm_head.weight"] = tensors[f"{prefix}wte.weight"]
        if rng.random() < 0.6:
            del tensors[f"{prefix}wte.weight"]
        elif rng.random() < 0.2:
            tensors[f"{around}lm_head.weight"] = tensors[f"{prefix}wte.weight"] + 1
    if rng.random() < 0.2:
        for n in range(config["n_layer"]):
            size = config["n_positions"]
            tensors[f"{prefix}h.{n}.attn.bias"] = np.tril(np.ones((1, 1, size, size), np.float32))
            tensors[f"{prefix}h.{n}.attn.masked_bias"] = np.array(-1e4, np.float32)
    if rng.random() < 0.03:
        del tensors[f"{prefix}ln_f.bias"]
    names = rng.sample(list(tensors), len(tensors))
    dtype = rng.choice(["F32", "F32", "F16", "BF16", "F64"])
    if rng.random() < 0.25:
        parts = [names[: len(names) // 2], names[len(names) // 2 :]]
        index = {}
        for n, part in enumerate(parts, 1):
            file = f"model-{n:05}-of-00002.safetensors"
            (path / file).write_bytes(safetensors({name: tensors[name] for name in part}, dtype))
            index |= dict.fromkeys(part, file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    else:
        (path / "model.safetensors").write_bytes(safetensors({name: tensors[name] for name in names}, dtype))
    for name, content in files.items():
        content = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        (path / name).write_text(content, encoding="utf-8")
    return config, truth


def texts(seed):
    """Those that a folder's tokenizer is asked for."""
    rng = random.Random(seed)
    return [*TEXTS, *("".join(rng.choices(PARTS, k=rng.randrange(30))) for _ in range(6))]


def prompts(config):
    """Tokens, (1, T), of which both compute the logits."""
    return np.arange(config["n_positions"])[None] * 7 % config["vocab_size"]


def ours(path, config):
    """What npgpt reads: {"refused": line}, or {"ids": a list or a line for each text, or None; "logits": array}."""
    try:
        model = GPT.from_pretrained(path)
    except CheckpointError as error:
        return {"refused": str(error)}
    model.save_pretrained(path / "written")
    ids = None
    if model.tokenizer is not None:
        ids = []
        for text in texts(path.name):
            try:
                tokens = model.tokenizer.encode(text).tolist()
                ids.append(tokens)
            except UsageError as error:
                ids.append(str(error))
    return {"ids": ids, "logits": model(prompts(config))[0].data[0, -1]}


def theirs(path, config, truth, seed=None):
    """The same as transformers reads it.  seed: of the texts, if it is not the path's name."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = {"ids": None, "logits": None}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        if (path / "tokenizer.json").exists() or (path / "vocab.json").exists():
            encoded = (tokenizer(text, add_special_tokens=False) for text in texts(seed or path.name))
            found["ids"] = [tokens["input_ids"] for tokens in encoded]
            found["special"] = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    except Exception as error:
        found["no tokenizer"] = f"{type(error).__name__}: {error}"
    try:
        model, info = transformers.GPT2LMHeadModel.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
        if info["missing_keys"] or info["mismatched_keys"] or info["unexpected_keys"]:
            # names that it does not know: it would begin with random weights, so they are given to it
            settings = {**config, "bos_token_id": None, "eos_token_id": None}
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings))
            model.transformer.load_state_dict({name: torch.tensor(array) for name, array in truth.items()})
            model.tie_weights()
        with torch.no_grad():
            found["logits"] = model.eval()(torch.tensor(prompts(config))).logits[0, -1].numpy()
    except Exception as error:
        found["no model"] = f"{type(error).__name__}: {error}"
    return found


def differences(path, mine, other):
    """What differs, as lines: nothing where npgpt refuses, and where transformers cannot say."""
    if "refused" in mine:
        return ["a refusal of several lines"] if "\n" in mine["refused"] else []
    found = []
    if mine["ids"] is not None and other["ids"] is not None:
        for text, a, b in zip(texts(path.name), mine["ids"], other["ids"], strict=True):
            if a != b and not isinstance(a, str):
                found.append(f"{text!r}: {a}, transformers {b}")
    elif (mine["ids"] is None) != (other["ids"] is None) and "no tokenizer" not in other:
        found.append(f"tokenizer: {mine['ids'] is not None}, transformers {other['ids'] is not None}")
    if other["logits"] is not None:
        difference = np.abs(mine["logits"][: len(other["logits"])] - np.array(other["logits"])).max()
        if not difference < 1e-4:
            found.append(f"logits: by {difference:.2g}")
    return found


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--figures", action="store_true")
    parser.add_argument("--show", action="store_true", help="what is refused, too")
    args = parser.parse_args(argv)
    work = Path(tempfile.mkdtemp())
    counts, figures = {}, []
    try:
        for seed in range(args.seed * 1000, args.seed * 1000 + (N_FIGURES if args.figures else args.n)):
            path = work / f"{seed}"
            config, truth = make(seed, path)
            other = theirs(path, config, truth)
            if args.figures:
                if other["logits"] is not None:
                    other["logits"] = [round(float(logit), 5) for logit in other["logits"][:8]]
                figures.append(other)
                continue
            mine = ours(path, config)
            found = differences(path, mine, other)
            if (path / "written").exists():  # and what npgpt makes of it
                again = theirs(path / "written", config, truth, path.name)
                found += [f"written: {line}" for line in differences(path, mine, again)]
                if "special" in other and again.get("special") != other["special"]:
                    found.append(f"written: {again.get('special')}, transformers {other['special']}")
            kind = "different" if found else "refused" if "refused" in mine else "alike"
            if kind == "alike" and ("no tokenizer" in other or "no model" in other):
                kind = "opened by npgpt only"
            counts[kind] = counts.get(kind, 0) + 1
            if found or (args.show and kind != "alike"):
                print(seed, kind, *found, mine.get("refused", ""), other.get("no tokenizer", "")[:200],
                      other.get("no model", "")[:200], sep="\n    ")  # fmt: skip
    finally:
        shutil.rmtree(work)
    if args.figures:
        FIGURES.write_text(json.dumps(figures, separators=(",", ":")) + "\n")
    print(counts)
    return int("different" in counts)


if __name__ == "__main__":
    sys.exit(main())
