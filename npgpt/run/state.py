"""Where a run stands, how fast it is, and what of it goes to a checkpoint and comes from one.

    with opened(path, changes, world) as origin:            for a new run, origin is None
        setup = prepare(origin.config, ..., origin=origin)
        standing, notices = first(setup, origin)
    arrays, state = written(setup, standing)                what folder.RunFolder.save writes
"""

import contextlib
import dataclasses
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from npgpt import __version__
from npgpt.config import TrainConfig, contradictions
from npgpt.errors import CheckpointError, UsageError, user_path
from npgpt.files import checkpoint, folder

clock = time.perf_counter  # whoever asks for the time calls state.clock(), so that tests can set it

# settings without which a run would not be the same run any more
FIXED = (
    "tokenizer", "vocab_size", "val_fraction", "n_layer", "n_head", "n_embd", "block_size", "bias", "batch_size",
    "gradient_accumulation_steps", "optimizer", "seed", "init_from",
)  # fmt: skip


@dataclass
class Standing:
    """Where a run stands."""

    iter: int = 0  # updates that were made
    skipped: int = 0  # updates in a row that were skipped
    best_loss: float = math.inf
    best_iter: int = 0
    since_best: int = 0  # evaluations since then
    evaluated_iter: int | None = None  # of the last evaluation
    elapsed: float = 0.0  # seconds that run() had taken when it was interrupted
    began: float | None = None  # what the clock showed, or would have shown without interruptions, at the first update
    resumed_from: int | None = None  # the iteration of the checkpoint that this run goes on from
    changes: dict = field(default_factory=dict)  # of settings at that iteration: name -> [old, new]

    def start(self):
        """The run goes on from here."""
        self.began = clock() - self.elapsed

    def pause(self):
        """The run is interrupted."""
        self.elapsed, self.began = self.seconds(), None

    def seconds(self):
        """That run() has taken up to now."""
        return self.elapsed if self.began is None else clock() - self.began

    def evaluated(self, loss):
        """Note the validation loss of the weights as they are; whether it is the best so far."""
        # (the run may have been resumed from just here: then its best may be this evaluation)
        is_best = loss < self.best_loss or (loss == self.best_loss and self.iter == self.best_iter)
        if is_best:
            self.best_loss, self.best_iter, self.since_best = loss, self.iter, 0
        elif self.evaluated_iter != self.iter:
            self.since_best += 1
        self.evaluated_iter = self.iter
        return is_best


class Pace:
    """How fast a run is, and how much time is left.

    iteration   the one that it begins at
    tokens      of an update
    most        iterations that there will be

    since       when the speed began to be measured; to be put off by what was not spent on training
    """

    def __init__(self, iteration, tokens, most):
        self.tokens, self.most = tokens, most
        self.steady = None  # (time, iteration) after the first update: from there on all take about the same time
        self.restart(iteration)

    def restart(self, iteration):
        """Measure the speed from now on."""
        self.since, self.since_iter = clock(), iteration

    def measure(self, iteration, restart):
        """(tokens per second, seconds left or None) after an update; restart: whether to measure from here on."""
        now, left = clock(), None
        speed = (iteration - self.since_iter) * self.tokens / (now - self.since) if now > self.since else math.inf
        if self.steady is None:
            self.steady = now, iteration
        else:
            left = (now - self.steady[0]) / (iteration - self.steady[1]) * (self.most - iteration)
        if restart:
            self.since, self.since_iter = now, iteration
        return speed, left


@dataclass(frozen=True, eq=False)
class Origin:
    """The checkpoint that a run goes on from."""

    path: Path  # as it was named: of the checkpoint, or of its folder
    state: dict  # what it says of its run
    before: TrainConfig  # that its run had
    config: TrainConfig  # that the run has from now on
    found: Path | None = None  # the checkpoint's own path, on rank 0, as what follows
    reader: checkpoint.Reader | None = None  # open within `opened`
    there: tuple = ()  # all checkpoints in the folder

    @property
    def changes(self):
        """Of settings, by this command: name -> [old, new]."""
        before, now = dataclasses.asdict(self.before), dataclasses.asdict(self.config)
        return {name: [old, now[name]] for name, old in before.items() if name != "out_dir" and old != now[name]}


@contextlib.contextmanager
def opened(path, changes, world):
    """The Origin of a run that goes on with other settings, as its newest checkpoint says or the one that is named.

    Raises CheckpointError if there is no good checkpoint, and UsageError for settings that cannot change.
    """
    path = Path(user_path(path))
    with contextlib.ExitStack() as stack:
        mine, (state, out_dir) = world.first_keeps(lambda: _find(path, changes or {}, stack))
        before = _config_of(state, path)
        changes = {**(changes or {}), "out_dir": out_dir}
        if "max_iters" in changes:
            changes.setdefault("epochs", None)
        config = world.agree(lambda: dataclasses.replace(before, **changes))
        world.agree(lambda: _check_fixed(before, config))
        yield Origin(path, state, before, config, *(mine or ()))


def _find(path, changes, stack):
    """((checkpoint, Reader, all checkpoints of its folder), (state, folder)), on rank 0."""
    if path.suffix == ".safetensors" and not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    found, out_dir = (path, path.parent) if path.is_file() else (folder.newest(path), path)
    asked = user_path(changes.get("out_dir", out_dir))
    if os.path.realpath(asked) != os.path.realpath(out_dir):
        words = "for a run there, copy the checkpoint to it first, or begin one by --init-from"
        raise UsageError(f"--resume {path} goes on with the run in {out_dir}, and --out-dir names {asked}; {words}")
    there = folder.checkpoints(out_dir)
    reader, state = stack.enter_context(folder.opened(found))
    _config_of(state, path)
    _find_best(state, out_dir)
    return (found, reader, there), (state, str(out_dir))


def first(setup, origin):
    """(Standing, lines for a person) of a run: a new one, or that of an Origin, whose arrays go to their places.

    Raises CheckpointError.
    """
    config, contradicting = setup.config, [*contradictions(setup.config, setup.max_iters)]
    if origin is None:
        words = setup.world.first(lambda: config.init_from and folder.choice(config.init_from))
        return Standing(), [*contradicting, *([f"init_from: {words}"] if words else [])]
    path, state = origin.path, origin.state
    setup.world.first(lambda: _read_arrays(setup, origin))
    try:
        at = Standing(iter=int(state["iter"]), resumed_from=int(state["iter"]))
        setup.optimizer.step, at.skipped = int(state["optimizer_step"]), int(state["skipped"])
        at.best_loss = math.inf if state["best_loss"] is None else float(state["best_loss"])
        at.best_iter, at.elapsed = int(state["best_iter"]), float(state["elapsed_s"])
        since_best = (at.iter - at.best_iter) // origin.before.eval_interval  # if it does not say
        at.since_best = int(state.get("since_best", since_best))
        at.evaluated_iter = None if state.get("val_loss") is None else at.iter
        now = setup.environment
        # by earlier versions
        unsaid = {"ranks": 1, "blas_kernels": now["blas_kernels"], "products": "blas", "dtype": "float32"}
        then = {**unsaid, **state["environment"]}
        frozen = [str(name) for name in state.get("frozen", ())]
        earlier = {**state.get("changed", {})}  # settings that were changed at this very iteration
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the state of the run is not complete ({error})") from None
    for name, parameter in setup.model.named_parameters():
        parameter.requires_grad = name not in frozen
    changes = origin.changes
    at.changes = {**earlier, **{k: [earlier.get(k, [old])[0], new] for k, (old, new) in changes.items()}}
    notices = [f"{', '.join(frozen)} stay as they are (requires_grad is False), as before"] if frozen else []
    for name, value in now.items():
        if then.get(name) != value:
            notices.append(f"{name} was {then.get(name)} and is {value}: the run goes on, but not with the same bits")
    notices += contradicting if changes else []
    notices += (f"{name} was {old} and is {new} from iteration {at.iter:,} on" for name, (old, new) in changes.items())
    return at, notices


def _read_arrays(setup, origin):
    for prefix, values in setup.arrays():
        for name, view in setup.parallel.flat.views(values):
            full, entry = prefix + name, origin.reader.entries.get(prefix + name)
            if entry is None or entry.shape != view.shape or entry.dtype not in checkpoint.FLOATS:
                raise CheckpointError(f"{origin.path}: {full} is missing, or has another shape than {view.shape}")
            origin.reader.copy_to(full, view)


def written(setup, standing, val_loss=None, by_clock=False):
    """(arrays, state) of a checkpoint of the run as it is now; npgpt/files/folder.py says what may change in it.

    val_loss, by_clock    the loss of these weights, if it is known; whether the clock asks for it
    """
    flat = setup.parallel.flat
    arrays = {prefix + name: view for prefix, values in setup.arrays() for name, view in flat.views(values)}
    state = {
        "format": folder.FORMAT,
        "iter": standing.iter,
        "optimizer_step": setup.optimizer.step,
        "skipped": standing.skipped,
        "val_loss": val_loss,
        "by_clock": by_clock,
        "frozen": flat.frozen,
        "best_loss": None if math.isinf(standing.best_loss) else standing.best_loss,
        "best_iter": standing.best_iter,
        "since_best": standing.since_best,
        "elapsed_s": standing.seconds(),
        "changed": standing.changes if standing.iter == standing.resumed_from else {},
        "train": dataclasses.asdict(setup.config),
        "model": dataclasses.asdict(setup.model.config),
        "tokenizer": setup.tokenizer.to_dict(),
        "data_sha256": setup.fingerprint,
        "n_characters": setup.n_characters,
        "numbered": setup.numbered,
        "environment": setup.environment,
    }
    return arrays, state


def _check_fixed(before, config):
    """Raise UsageError if a run is to go on with other settings that make it another run."""
    for name in FIXED:
        old, new = getattr(before, name), getattr(config, name)
        if old != new:
            raise UsageError(f"the run in {config.out_dir} was begun with {name} = {old}; it cannot go on with {new}")


def _find_best(state, out_dir):
    """Have a state name the best checkpoint that is in a folder, if its best one is not: it was copied here alone."""
    if type(state.get("iter")) is int and {"best_loss", "best_iter"} <= state.keys():
        best = folder.best_there(out_dir, state["iter"], state["best_loss"], state["best_iter"])
        loss = state.get("val_loss")  # of this one, whatever its file is named
        if best[1] != state["best_iter"] and isinstance(loss, float) and (best[0] is None or loss < best[0]):
            best = loss, state["iter"]
        state["best_loss"], state["best_iter"] = best


def vocab_size_of(state):
    """The number of tokens of a checkpoint's model, which may be more than its tokenizer has; 0 if it is not there."""
    model = state.get("model")
    size = model.get("vocab_size") if isinstance(model, dict) else None
    return size if type(size) is int and 0 < size < 2**31 else 0


def _config_of(state, path):
    """The TrainConfig that a checkpoint's run was made with."""
    try:
        settings = {"dtype": "float32", **state["train"]}  # earlier versions knew no other
        unknown = sorted({*settings} - {f.name for f in dataclasses.fields(TrainConfig)})
        if unknown:
            words = f"which npgpt {__version__} does not know; {folder.writer_of(state)} wrote it: use that version"
            raise CheckpointError(f"{path}: its run has the setting {unknown[0]}, {words}")
        return TrainConfig(**{**settings, "data": tuple(settings["data"])})
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise CheckpointError(f"{path} was not written by npgpt.train, or is damaged ({error})") from None
