"""From a path that a command names to a model that can write."""

import sys
from pathlib import Path

from npgpt.command import say
from npgpt.errors import UsageError
from npgpt.files import folder
from npgpt.model import GPT


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
