"""From a path that a command names to the weights that it leads to, and to a model that can write."""

import contextlib
import sys
from pathlib import Path

from npgpt.command import say
from npgpt.data.bpe import from_dict
from npgpt.errors import CheckpointError, UsageError, user_path
from npgpt.files import folder
from npgpt.files.hub import CONFIG, INDEX, PICKLES, WEIGHTS, open_folder
from npgpt.files.weights import Found, at_most, check_entry, fit, gpt_config
from npgpt.model import GPT


@contextlib.contextmanager
def opened(path):
    """The Found of a checkpoint file, a run folder or a Hugging Face folder, to be used within the `with`.

    Names, shapes, dtypes and the hashes of npgpt's files have been checked then.  Raises CheckpointError.
    """
    path = Path(user_path(path))
    if path.is_file() and path.name in (WEIGHTS, INDEX, CONFIG) and (path.parent / CONFIG).is_file():
        raise CheckpointError(f"{path} is one file of a Hugging Face folder; name the folder, {path.parent}")
    if not path.exists():
        raise CheckpointError(
            f"there is no {path}: name a run folder, a checkpoint, or a folder with {CONFIG} and {WEIGHTS} in it "
            f"(nothing is downloaded)"
        )
    is_theirs = any((path / name).exists() for name in (CONFIG, WEIGHTS, INDEX, *PICKLES))
    if path.is_dir() and (folder.checkpoints(path) or not is_theirs):
        path = folder.best(path)
    with contextlib.ExitStack() as stack:
        yield open_folder(path, stack) if path.is_dir() else _open_checkpoint(path, stack)


def _open_checkpoint(path, stack):
    """The Found of a checkpoint of npgpt.train."""
    reader, state = stack.enter_context(folder.opened(path))
    try:
        config, tokenizer = gpt_config(state["model"]), from_dict(state["tokenizer"])
    except (KeyError, TypeError, ValueError, UsageError, CheckpointError) as error:
        raise CheckpointError(f"{path} was not written by npgpt.train, or is damaged ({error})") from None
    fit(path, config, tokenizer)
    places = {}
    for name, shape in at_most(len(reader.entries), config, path):
        check_entry(reader, name, shape)
        places[name] = reader, name, False
    return Found(config, tokenizer, places)


def open_model(path, checkpoint="best"):
    """GPT.from_pretrained(path), with a tokenizer.  Raises UsageError if it has none, and CheckpointError.

    checkpoint: of a run folder; "best", "last", or a file, in the folder or elsewhere.
    """
    if checkpoint == "last" and folder.checkpoints(path):
        path = folder.newest(path)
    elif checkpoint not in ("best", "last"):
        inside = Path(path, checkpoint)
        path = inside if inside.exists() else checkpoint
    model = GPT.from_pretrained(path)
    if words := folder.choice(path):
        say(words, file=sys.stderr)
    if model.tokenizer is None:
        raise UsageError(f"{path} has no tokenizer that can be opened (a tokenizer.json needs the package tokenizers)")
    return model
