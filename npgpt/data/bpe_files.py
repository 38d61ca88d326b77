"""A tokenizer's folder, read as the package transformers reads it."""

import json
import re
from pathlib import Path

from npgpt.data.bpe_format import checked, has_prefix_space, one_line, the_package, tokenizer_of
from npgpt.data.kinds import read_json
from npgpt.errors import UsageError

BPE_FILES = "tokenizer.json", "vocab.json"  # the latter with merges.txt beside it
SETTINGS, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
TEMPLATES = "additional_chat_templates/*.jinja"
# what else may say in a Hugging Face folder which tokens there are, or what is to be done with them
OTHER_FILES = (
    "merges.txt", "added_tokens.json", "special_tokens_map.json", SETTINGS, TEMPLATE, "generation_config.json",
)  # fmt: skip
# those of them that are kept, to be written again; the others are in tokenizer.json and SETTINGS then
KEPT = re.compile(
    r"tokenizer_config\.json|generation_config\.json|chat_template\.jinja|additional_chat_templates/\w[\w.-]*\.jinja",
    re.ASCII,
)

END = "<|endoftext|>"  # GPT-2's token between two texts
NAMED = "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"
FLAGS = "single_word", "lstrip", "rstrip", "normalized", "special"  # of an added token
_GPT2 = "GPT2Tokenizer", "GPT2TokenizerFast"


def find_bpe(path):
    """The file that BPETokenizer.load reads for --tokenizer PATH; None if the path is another file.

    Raises UsageError for a folder that has none.
    """
    path = Path(path)
    if not path.is_dir():
        return path if path.suffix == ".json" else None
    for name in BPE_FILES:
        if (path / name).is_file():
            return path / name
    raise UsageError(f"tokenizer: the folder {path} has neither tokenizer.json nor vocab.json with merges.txt")


def _read_state(path):
    """(content of a tokenizer.json, False), or (what it would be, True) of a vocab.json with a merges.txt."""
    state = read_json(path, UsageError, "tokenizer: ")
    if isinstance(state.get("model"), dict):
        return state, False
    merges = path.with_name("merges.txt")  # for these are words and their numbers
    if not merges.is_file():
        raise UsageError(
            f"tokenizer: {path} is no tokenizer.json (it has no model), nor is there a merges.txt beside it"
        )
    return _gpt2_state(state, _read_merges(merges)), True


def read_folder(path):
    """(json, files) of the BPETokenizer of a tokenizer.json or a vocab.json, and of its folder; or of another file.

    Raises ValueError for what npgpt's cannot be, and UsageError for a file that cannot be read.
    """
    folder = path.parent
    state, from_words = _read_state(path)
    if path.name not in BPE_FILES:  # what lies beside it is not its
        state = checked(json.dumps(state))
        _add_tokens(state, {}, [], {})
        return json.dumps(state), {}
    settings, config, more, numbers = (
        read_json(folder / name, UsageError, "tokenizer: ") if (folder / name).is_file() else {}
        for name in (SETTINGS, "config.json", "special_tokens_map.json", "added_tokens.json")
    )
    kind = settings.get("tokenizer_class") or config.get("tokenizer_class")
    is_gpt2 = kind in _GPT2 if kind else from_words or config.get("model_type") == "gpt2"
    if settings.get("split_special_tokens"):
        raise ValueError(f"{SETTINGS} says split_special_tokens; npgpt finds special tokens in a text")
    if settings.get("fast_tokenizer_files") not in (None, [BPE_FILES[0]]):
        raise ValueError(f"{SETTINGS} says fast_tokenizer_files; npgpt reads tokenizer.json only")
    if from_words and not is_gpt2:
        raise ValueError(f"tokenizer_class is {kind!r}; without a tokenizer.json npgpt reads GPT2Tokenizer only")
    state = checked(json.dumps(state))
    tokenizer_of(state)  # a damaged one is named as such first
    if is_gpt2:
        _make_gpt2(state, settings.get("add_prefix_space", False))
    named, others, numbered = _special_tokens(settings, more, numbers, is_gpt2)
    _add_tokens(state, named, others, numbered)
    kept = [folder / "generation_config.json", folder / TEMPLATE, *folder.glob(TEMPLATES)]
    files = {file.relative_to(folder).as_posix(): _read_text(file) for file in sorted(kept) if file.is_file()}
    settings.pop("added_tokens_decoder", None)  # they are in tokenizer.json now
    settings |= {name: token.content for name, token in named.items()}
    if others and not settings.get("extra_special_tokens"):
        settings["additional_special_tokens"] = [token.content for token in others]
    usual = usual_settings(state)
    if settings and settings != usual:
        settings = {"tokenizer_class": usual["tokenizer_class"], **settings}
        files[SETTINGS] = dumped({**settings, "add_prefix_space": usual["add_prefix_space"]})
    return json.dumps(state), files


def usual_settings(state):
    """What tokenizer_config.json must say, so that transformers takes tokenizer.json as it stands, and adds nothing."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": has_prefix_space(state),
        "clean_up_tokenization_spaces": False,
    }


def dumped(settings):
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"


def _read_text(path):
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"tokenizer: cannot read {path}: {error}") from None


def _make_gpt2(state, prefix_space):
    """Have a tokenizer.json's content cut texts as transformers' GPT2Tokenizer does.

    That takes no more than vocabulary and merges from the file.  Raises ValueError if it says that more is different
    than a space in front.
    """
    model, before = state["model"], state.get("pre_tokenizer") or {}
    same = before.get("type") == "ByteLevel" and before.get("use_regex", True) and state.get("normalizer") is None
    if not same or model.get("end_of_word_suffix") or model.get("ignore_merges"):
        raise ValueError(
            "it cuts texts in another way than GPT2Tokenizer, which transformers takes for this folder; if the file is "
            f'right, say so in {SETTINGS} beside it: "tokenizer_class": "PreTrainedTokenizerFast"'
        )
    if not isinstance(prefix_space, bool):
        raise ValueError(f"{SETTINGS} says add_prefix_space {prefix_space!r}, which is neither true nor false")
    before["add_prefix_space"] = prefix_space


def _special_tokens(settings, more, numbers, is_gpt2):
    """(named, others, numbered): the added tokens that the files beside a tokenizer.json name, as transformers does.

    named     "eos_token" ... -> AddedToken
    others    AddedTokens that are special too
    numbered  number -> AddedToken
    settings, more, numbers    contents of tokenizer_config.json, special_tokens_map.json and added_tokens.json

    Raises ValueError for what is none.
    """
    listed = settings.get("added_tokens_decoder")
    found, others = {}, []
    for source in (settings, more) if listed is None else (settings,):  # with a list transformers reads no other file
        found |= {name: token for name, token in source.items() if name.endswith("_token")}
        others = others or source.get("extra_special_tokens") or source.get("additional_special_tokens") or []
    if is_gpt2:
        found = {**dict.fromkeys(("bos_token", "eos_token", "unk_token"), END), **found}
    if isinstance(others, dict):
        found, others = {**found, **others}, []
    if not isinstance(others, list) or not (listed is None or isinstance(listed, dict)):
        raise ValueError(f"{SETTINGS}: its special tokens are no list")
    named = {
        name: _added_token(token, name, special=True)
        for name, token in {**dict.fromkeys(NAMED), **found}.items()
        if isinstance(token, (str, dict)) or (name in NAMED and token is not None)
    }
    for token in named.values():
        token.special = True
    others = [_added_token(token, "additional_special_tokens", special=True) for token in others]
    special = {token.content for token in [*named.values(), *others]}
    if listed is not None:
        numbered = {number: _added_token(token, "added_tokens_decoder") for number, token in listed.items()}
        for token in numbered.values():
            token.special = token.special or token.content in {token.content for token in named.values()}
    else:
        numbered = {}
        for content, number in numbers.items():
            if type(number) is not int:
                raise ValueError(f"added_tokens.json: {content!r} has no number")
            flags = {"special": content in special, "normalized": content not in special}
            numbered[number] = _added_token(content, "added_tokens.json", **flags)
    try:
        return named, others, {int(number): token for number, token in numbered.items()}
    except (TypeError, ValueError):
        raise ValueError("its added tokens are not numbered") from None


def _added_token(token, name, **flags):
    """An AddedToken of the package, of a text with these flags or of a JSON object with its own.

    Raises ValueError with the name of what has it.
    """
    if isinstance(token, dict):
        flags = {flag: token[flag] for flag in FLAGS if flag in token}
        token = token.get("content")
    if not isinstance(token, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError(f"{name} is no token")
    return the_package().AddedToken(token, **flags)


def _add_tokens(state, named, others, numbered):
    """Add tokens to the content of a tokenizer.json.  ValueError for one that cannot have its number."""
    tokenizer = tokenizer_of(state)
    with one_line():
        tokenizer.add_tokens([numbered[number] for number in sorted(numbered)])
        for token in [*named.values(), *others]:
            if token.content not in {added.content for added in tokenizer.get_added_tokens_decoder().values()}:
                tokenizer.add_tokens([token])
        for number, token in numbered.items():
            if tokenizer.token_to_id(token.content) != number:
                raise ValueError(
                    f"the files beside it give {token.content!r} the number {number}, "
                    f"which would be {tokenizer.token_to_id(token.content)}"
                )
        before = {added["id"]: added for added in state["added_tokens"]}
        state["added_tokens"] = [
            {"id": number, "content": token.content, **{flag: getattr(token, flag) for flag in FLAGS}}
            for number, token in sorted(tokenizer.get_added_tokens_decoder().items())
        ]
        for number, added in before.items():
            if tokenizer.token_to_id(added["content"]) != number:
                raise ValueError(
                    f"its added token {added['content']!r} is number {number}, "
                    f"but takes number {tokenizer.token_to_id(added['content'])} (they have no gaps)"
                )


def _read_merges(path):
    """merges.txt: a line for each pair, the most frequent first."""
    merges = []
    for n, line in enumerate(_read_text(path).splitlines(), 1):
        if line and not (n == 1 and line.startswith("#version")):
            if line.count(" ") != 1:
                raise UsageError(f"tokenizer: {path} is not a list of pairs: line {n} has {line.count(' ') + 1} words")
            merges.append(line)
    return merges


def _gpt2_state(vocab, merges):
    """What would stand in a tokenizer.json with this vocabulary and these merges, all else as in GPT-2's."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": vocab.get(END), "content": END, **dict.fromkeys(FLAGS, False), "special": True}
    return {
        "version": "1.0",
        "added_tokens": [end] if END in vocab else [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
