"""The door to the Hugging Face world: GPT-2 folders read and written.

    config.json                     the model's shape; of a folder that npgpt wrote, the tokenizer too
    model.safetensors               the weights, in the layout of npgpt/files/checkpoint.py, or instead of it
    model.safetensors.index.json    {"weight_map": {name: file}}, and the files that it names

Hugging Face's GPT-2 is the model of npgpt/model.py with these differences:

- Four matrices of each block are layers of the class Conv1D, whose weights have the shape (in, out): the transpose of a
  Linear's (out, in).
- The file of OpenAI's GPT-2 has no "transformer." before its names, and holds causal masks as if they were weights.
- It always has biases.  A model without is written with biases of zero, which changes no logit.
"""

import dataclasses
import importlib.util
import json
import os
import re
import reprlib
from pathlib import Path

import numpy as np

from npgpt.data.bpe import BPETokenizer, from_dict
from npgpt.data.bpe_files import BPE_FILES, OTHER_FILES, SETTINGS, TEMPLATES, find_bpe
from npgpt.data.kinds import read_json
from npgpt.errors import CheckpointError, UsageError, told_as, user_path
from npgpt.files import checkpoint, folder
from npgpt.files.weights import CHUNK, PREFIX, Found, at_most, check_entry, fit, gpt_config, is_finite, parameter_shapes
from npgpt.ops.layernorm import EPS

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = "pytorch_model.bin", "pytorch_model.bin.index.json"
HEAD = "lm_head.weight"
# what GPT2LMHeadModel, torch.compile, DataParallel and others around a model put before its names
_AROUND = re.compile(r"^((_orig_mod|module|model|transformer)\.)+|(?<=\.)_orig_mod\.")

# our name of a setting -> Hugging Face's, and what holds where config.json does not say
SHAPE = {
    "vocab_size": ("vocab_size", 50257),
    "block_size": ("n_positions", 1024),
    "n_embd": ("n_embd", 768),
    "n_layer": ("n_layer", 12),
    "n_head": ("n_head", 12),
    "dropout": ("resid_pdrop", 0.1),  # (it has three of them, which nobody sets apart)
}
# other names of theirs for these
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# settings that change what is computed -> the values that mean what this model does, the first of them the default
DOES = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (EPS,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
_TRANSPOSED = re.compile(r"h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


# --------------------------------------------------------------------------------------------------------------------
# Reading


def open_folder(path, stack):
    """The Found of a Hugging Face folder."""
    settings = read_json(path / CONFIG, CheckpointError)
    config = _config_of(settings, path / CONFIG)
    if (tokenizer := open_tokenizer(path, settings)) is not None:
        fit(path / CONFIG, config, tokenizer)
    weights = path / WEIGHTS if (path / WEIGHTS).exists() else path / INDEX
    stored = {}  # name without prefix -> (Reader, name)
    for reader in _readers(path, stack):
        for name in reader.entries:
            if (short := _AROUND.sub("", name)) in stored:
                raise CheckpointError(
                    f"{reader.path}: {name!r} stands there twice, the other time as {stored[short][1]!r}"
                )
            if not _MASK.fullmatch(short):
                stored[short] = reader, name
    if (head := stored.pop(HEAD, None)) is not None:
        stored.setdefault("wte.weight", head)  # they are one: of tied weights a file may hold either
    places = {}
    for name, shape in at_most(len(stored), config, weights):
        short = name.removeprefix(PREFIX)
        transposed = _TRANSPOSED.fullmatch(short) is not None
        if short not in stored:
            others = [name for name in stored if name.endswith(f".{short}")]
            hint = f"; it has {others[0]!r}" if others else ""
            raise CheckpointError(f"{weights}: {short} must have shape {shape}, found nothing{hint}")
        reader, stored_name = stored.pop(short)
        check_entry(reader, stored_name, shape[::-1] if transposed else shape)
        places[name] = reader, stored_name, transposed
    for short, (reader, name) in stored.items():
        hint = f"; {CONFIG} says n_layer = {config.n_layer}" if short.startswith("h.") else ""
        raise CheckpointError(f"{reader.path}: GPT-2 has no {name!r}{hint}")
    wte = places[f"{PREFIX}wte.weight"][:2]
    if head not in (None, wte):
        check_entry(*head, (config.vocab_size, config.n_embd))
        _check_tied(head, wte)
    return Found(config, tokenizer, places)


def open_tokenizer(path, settings):
    """The tokenizer in a Hugging Face folder, or None where there is none that can be opened.

    settings: the folder's config.json, where save_pretrained writes the tokenizers that have no file of their own.
    The others need the package tokenizers.  Raises CheckpointError for one that is damaged.
    """
    ours = settings.get("npgpt")
    try:
        if ours is not None:
            try:
                return from_dict(ours["tokenizer"])
            except (KeyError, TypeError, CheckpointError) as error:
                raise CheckpointError(f"{path / CONFIG}: the tokenizer in npgpt is damaged ({error})") from None
        if importlib.util.find_spec("tokenizers") is None or not any((path / name).exists() for name in BPE_FILES):
            return None
        tokenizer = BPETokenizer.load(find_bpe(path))
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from None
    usual = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text, "pad_token_id": None}
    tokenizer.ids = {name: settings[name] for name in usual if settings.get(name, usual[name]) != usual[name]}
    return tokenizer


def _config_of(settings, path):
    """The GPTConfig that a Hugging Face config.json describes.  Raises CheckpointError for what GPT cannot be."""
    kind = settings.get("model_type", "gpt2")  # their class for it needs none
    if kind != "gpt2":
        raise CheckpointError(f"{path}: model_type is {reprlib.repr(kind)}; only 'gpt2' is read")
    for other, name in ALIASES.items():
        if other in settings:
            if name in settings and reprlib.repr(settings[name]) != (value := reprlib.repr(settings[other])):
                values = f"{name} is {reprlib.repr(settings[name])} and {other} {value}"
                raise CheckpointError(f"{path}: {values}, which are two names of one setting")
            settings = {**settings, name: settings[other]}
    values = {name: settings.get(theirs, default) for name, (theirs, default) in SHAPE.items()}
    try:
        config = gpt_config({**values, "bias": True})
    except (ValueError, UsageError) as error:
        names = ", ".join(f"{theirs} {reprlib.repr(values[name])}" for name, (theirs, _) in SHAPE.items())
        raise CheckpointError(f"{path}: {error} (it says {names})") from None
    for key, good in {**DOES, "n_inner": (None, 4 * config.n_embd)}.items():
        if (value := settings.get(key, good[0])) not in good:
            raise CheckpointError(
                f"{path}: {key} is {reprlib.repr(value)}, which npgpt's GPT cannot be; "
                f"it has {' or '.join(map(repr, good))}"
            )
    return config


def _readers(path, stack):
    """Open Readers for the weights in a Hugging Face folder."""
    if (path / WEIGHTS).exists():
        return [stack.enter_context(checkpoint.Reader(path / WEIGHTS, needs_hash=False))]
    if not (path / INDEX).exists():
        for name in PICKLES:
            if (path / name).exists():
                raise CheckpointError(
                    f"{path / name} is a pickle, which can hold code: it is not read. Let transformers convert it: "
                    f"GPT2LMHeadModel.from_pretrained(folder).save_pretrained(other, safe_serialization=True)"
                )
        raise CheckpointError(f"there are no weights in {path}: neither {WEIGHTS} nor {INDEX}")
    parts = read_json(path / INDEX, CheckpointError).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise CheckpointError(f"{path / INDEX}: weight_map must say which file holds which weight")
    names = {}  # file -> the weights that it should hold
    for name, part in parts.items():
        # a plain name, so that no index leads out of its folder
        if not isinstance(part, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", part, re.ASCII):
            raise CheckpointError(f"{path / INDEX}: {reprlib.repr(part)} is not the name of a file beside it")
        names.setdefault(part, set()).add(name)
    readers = []
    for part, expected in names.items():
        if not (path / part).is_file():
            raise CheckpointError(f"{path / INDEX} names {part}, which is not there; was it downloaded as a whole?")
        readers.append(stack.enter_context(checkpoint.Reader(path / part, needs_hash=False)))
        if different := sorted(expected ^ readers[-1].entries.keys()):
            words = "is missing in it" if different[0] in expected else "is not expected there"
            raise CheckpointError(f"{path / part} does not fit {INDEX}: {different[0]!r} {words}")
    return readers


def _check_tied(head, wte):
    """Raise CheckpointError if a file's output layer is another than its token embedding: (Reader, name) of each."""
    a, b = (reader.mapped(name) for reader, name in (head, wte))
    rows = max(1, CHUNK // a.shape[1])
    parts = [slice(i, i + rows) for i in range(0, len(a), rows)]
    if a.dtype != b.dtype or not all(np.array_equal(a[part], b[part]) for part in parts):
        raise CheckpointError(
            f"{head[0].path}: {HEAD} is not the same as wte.weight; npgpt's GPT has one matrix for both (tied)"
        )


# --------------------------------------------------------------------------------------------------------------------
# Writing


def save(model, path):
    """Write a GPT as a Hugging Face folder.  Raises CheckpointError; then a file is the old one or the new one.

    Raises ValueError for a model that is not GPT(config) any more, which such a folder cannot tell.
    """
    if other := model.difference():
        raise ValueError(f"save_pretrained: this is no GPT-2 any more: {other}")
    path, tokenizer = Path(user_path(path)), model.tokenizer
    if folder.checkpoints(path):
        raise CheckpointError(f"{path} holds the checkpoints of a run; name another folder: one would hide the other")
    arrays = dict(_stored(model))
    for name, array in arrays.items():
        if not is_finite(array):
            raise CheckpointError(f"{name} has numbers that are not finite: nothing was written to {path}")
    settings = _settings(model)
    with told_as(CheckpointError, f"cannot write to {path}"):
        path.mkdir(parents=True, exist_ok=True)
    if hasattr(tokenizer, "save"):
        tokenizer.save(path)
    elif tokenizer is not None:
        settings["npgpt"] = {"tokenizer": tokenizer.to_dict()}
    checkpoint.save(path / WEIGHTS, arrays, {"format": "pt"})
    # last: a new folder without it is not taken for a whole one
    checkpoint.replace(path / CONFIG, [json.dumps(settings, indent=2).encode("ascii") + b"\n"])
    kept = {BPE_FILES[0], SETTINGS, *getattr(tokenizer, "files", ())} if hasattr(tokenizer, "save") else set()
    for file in [path / name for name in (*BPE_FILES, *OTHER_FILES)] + list(path.glob(TEMPLATES)):
        if file.relative_to(path).as_posix() not in kept:
            # another model's tokenizer, which would be taken for this one's; it may be all that there is of it
            with told_as(CheckpointError, f"cannot rename {file}"):
                if file.exists():
                    os.replace(file, folder.free_name(file))


def _stored(model):
    """(name, array) of each weight as Hugging Face's GPT-2 has it, float32."""
    parameters = dict(model.named_parameters())
    for name, shape in parameter_shapes(dataclasses.replace(model.config, bias=True)):
        array = parameters[name].data if name in parameters else np.zeros(shape, np.float32)
        transposed = _TRANSPOSED.fullmatch(name.removeprefix(PREFIX)) is not None
        yield name, (array.T if transposed else array).astype(np.float32, copy=False)


def _settings(model):
    """What config.json says about a GPT."""
    end = getattr(model.tokenizer, "end_of_text", None)  # the token <|endoftext|>, of a tokenizer that has it
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(model.config, name) for name, (theirs, _) in SHAPE.items()},
        "attn_pdrop": model.config.dropout,
        "embd_pdrop": model.config.dropout,
        "n_inner": None,
        **{key: good[0] for key, good in DOES.items()},
        "bos_token_id": end,  # (null: without it transformers would take GPT-2's)
        "eos_token_id": end,
        **getattr(model.tokenizer, "ids", {}),
        "initializer_range": 0.02,
        "dtype": "float32",
        "torch_dtype": "float32",  # the same, as older versions call it
    }
