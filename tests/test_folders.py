"""Hugging Face folders as people have them: what transformers read in them stands in tests/data/folders.json."""

import json

import fuzz_folders
import pytest

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
