"""What a run tells of itself while it goes on, and the rows of its log."""

import math
from dataclasses import dataclass

from npgpt.run.audit import Audit


@dataclass(frozen=True)
class Progress:
    """One update."""

    iter: int
    train_loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float  # since the last Progress that was logged
    seconds_left: float | None  # None after the first update, which compiles kernels or loads them
    skipped: bool = False  # whether the weights were left as they are, because loss or gradient was not finite


@dataclass(frozen=True)
class Evaluation:
    """Validation loss, in nats per token, of the weights after `iter` updates."""

    iter: int
    val_loss: float  # on eval_iters batches of the validation split, always the same ones
    is_best: bool
    val_loss_whole: float | None = None  # on all of the split; at the end of the run only


@dataclass(frozen=True)
class Audited:
    """What an audit of the gradient found, just before the update that was made with it."""

    iter: int
    audit: Audit


@dataclass(frozen=True)
class Notice:
    """Something that a person should know, in a line."""

    text: str


def log_row(iteration, seconds, progress=None, evaluation=None, audit=None):
    """A row of the log; numbers that are not finite are null.  seconds: that the run has taken."""
    row = {"iter": iteration, "train_loss": getattr(progress, "train_loss", None)}
    losses = {name: getattr(evaluation, name, None) for name in ("val_loss", "val_loss_whole")}
    row |= {name: loss for name, loss in losses.items() if loss is not None}
    row |= {name: getattr(progress, name, None) for name in ("lr", "grad_norm", "tokens_per_second")}
    if audit is not None:
        row["gradcheck"] = audit.errors
    row["elapsed_s"] = round(seconds, 3)
    if progress is not None and progress.skipped:
        row["skipped"] = True
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
