"""Hugging Face folders as people have them: what transformers read in them stands in tests/data/folders.json."""

import json
import random
import shutil

import fuzz_folders
import pytest

from npgpt.errors import CheckpointError
from npgpt.model import GPT

pytest.importorskip("tokenizers")
FOLDERS = json.loads(fuzz_folders.FIGURES.read_text(encoding="utf-8"))


def outcome(seed, path):
    """("refused", line), or ("read", lines with what is other than transformers found) of a folder made at random."""
    config, _ = fuzz_folders.make(seed, path)
    mine = fuzz_folders.ours(path, config)
    return ("refused" if "refused" in mine else "read"), fuzz_folders.differences(path, mine, FOLDERS[seed])


@pytest.mark.parametrize("seed", range(len(FOLDERS)))
def test_a_folder_is_read_as_transformers_reads_it_or_refused_in_a_line(tmp_path, seed):
    assert not outcome(seed, tmp_path / str(seed))[1]


def test_most_folders_are_read(tmp_path):
    kinds = [outcome(seed, tmp_path / str(seed))[0] for seed in range(len(FOLDERS))]
    assert len(kinds) == fuzz_folders.N_FIGURES and kinds.count("read") >= 10


def test_whatever_is_changed_in_its_texts_a_folder_is_opened_and_written_or_refused(tmp_path):
    rng = random.Random(0)
    odd = [None, True, -1, 0, 3, 2**63, 1e300, "", "x" * 99, [], [1], {}, "<|x|>", {"type": "ByteLevel"}, float("nan")]
    keys = "type", "eos_token", "model", "id", "added_tokens_decoder", "extra_special_tokens", "pre_tokenizer"

    def places(value):
        """(object or list, key) of each value in it, but for most words of a vocabulary."""
        found = [(value, key) for key in (value if isinstance(value, dict) else range(len(value)))]
        inner = [part[key] for part, key in found if isinstance(part[key], (dict, list))]
        return rng.sample(found, min(9, len(found))) + [place for part in inner[:9] for place in places(part)]

    opened = 0
    for n in range(300):
        path = tmp_path / str(n)
        fuzz_folders.make(rng.randrange(400), path)
        file = rng.choice([file for file in sorted(path.glob("*.json")) if "index" not in file.name])
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        if content:
            part, key = rng.choice(places(content))
            if isinstance(part, dict) and rng.random() < 0.3:
                key = rng.choice(keys)
            part[key] = rng.choice(odd)
        file.write_text(json.dumps(content), encoding="utf-8")
        try:
            GPT.from_pretrained(path).save_pretrained(path / "written")
            GPT.from_pretrained(path / "written")
            opened += 1
        except CheckpointError as error:
            assert "\n" not in str(error)
        shutil.rmtree(path)
    assert 30 < opened < 250
