"""Small trainings for tests: what test_trainer, test_resume and test_audit do alike."""

import dataclasses
import json
from pathlib import Path

from npgpt.trainer import Trainer

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40


def variant(config, **changes):
    return dataclasses.replace(config, **changes)


def run(config, **options):
    """A Trainer that has run to the end, and its events."""
    trainer = Trainer(config, **options)
    return trainer, list(trainer.run())


def metrics(config):
    rows = (Path(config.out_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(row) for row in rows]
