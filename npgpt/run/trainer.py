"""The training loop: data, model, workers, evaluation, checkpoints and log, from one TrainConfig.

    trainer = Trainer(config)              # or Trainer.resume(out_dir)
    for event in trainer.run():            # Progress after an update, Evaluation, Audited, Notice
        print(event)

The loop computes and writes files; what is shown to a person is the business of npgpt/train.py.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import signal
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from npgpt import __version__, machine
from npgpt.config import BPE_VOCAB_SIZE, DROPOUT, SAMPLE, TOKENIZERS, TrainConfig, check_tokenizer, contradictions
from npgpt.data.batches import Blocks, EvaluationBlocks, split
from npgpt.data.bpe import BPETokenizer
from npgpt.data.bpe_files import BPE_FILES, find_bpe
from npgpt.data.characters import ByteTokenizer, CharTokenizer, name_of
from npgpt.data.notes import repeated_lines
from npgpt.data.text import Corpus, open_data
from npgpt.data.tokenizer import from_dict
from npgpt.data.tokens import PIECE, SPLITS, TokenFiles, Watch, map_tokens
from npgpt.engine import NotFinite, finite_checks
from npgpt.errors import (
    BusyError,
    CheckpointError,
    DivergedError,
    GradientError,
    StoppedError,
    UsageError,
    quoted,
    user_path,
)
from npgpt.files import checkpoint, folder, hub, pretrained
from npgpt.generate.generation import unprompted
from npgpt.generate.writer import Writer
from npgpt.kernels import jit
from npgpt.kernels.blas import blas_kernels, blas_threads, sgemm_peak
from npgpt.kernels.masks import random_stream
from npgpt.kernels.profiler import profiling
from npgpt.model import GPT
from npgpt.muon import Muon
from npgpt.optim import AdamW, clip_scale, cosine_lr
from npgpt.run import memory
from npgpt.run.audit import BOUND, Audit, Auditor
from npgpt.run.parallel import DataParallel, choose_threads
from npgpt.run.ranks import ALONE, share
from npgpt.signals import SIGNALS, Stop, StopNow, held, interrupts_noted

MOST_SKIPPED = 5  # updates in a row that may be skipped because something was not finite
SAVE_SHARE = 0.01  # of the time that saves by the clock may take
SEEN_WITHIN = 20  # seconds in which a file that one machine has written shows on the others that share the folder

# settings without which a run would not be the same run any more
FIXED = (
    "tokenizer", "vocab_size", "val_fraction", "n_layer", "n_head", "n_embd", "block_size", "bias", "batch_size",
    "gradient_accumulation_steps", "optimizer", "seed", "init_from",
)  # fmt: skip

clock = time.perf_counter


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


class TokensChanged(UsageError):
    """A file of tokens is not what it was when the run began."""


class Trainer:
    """A training run.  Raises UsageError and CheckpointError before anything is trained.

    config     a TrainConfig
    overwrite  whether an earlier run in config.out_dir may be lost
    force      whether to begin even if the memory seems too small
    profile    a Profile that gets to know where the updates' time goes; not that of the first, which compiles kernels,
               and not that of audited ones
    stop       a Stop; when it has a number while the data is read, StoppedError is raised
    world      the World of ranks that share the work; all of them must be given the same settings
    """

    def __init__(self, config, overwrite=False, profile=None, force=False, stop=Stop, world=ALONE):
        self.config, self.profile, self.force, self.world = config, profile, force, world
        self.out_dir = Path(config.out_dir)
        self.overwrite = overwrite
        world.first(self._refuse)
        self._prepare(stop)
        self.notices += contradictions(config, self.max_iters)
        if config.init_from is not None and (words := world.first(lambda: folder.choice(config.init_from))):
            self.notices.append(f"init_from: {words}")

    def _refuse(self):
        """Raise UsageError if a new run cannot begin."""
        if not self.overwrite:
            folder.refuse_earlier_run(self.out_dir)
        if not folder.checkpoints(self.out_dir) and (self.out_dir / hub.CONFIG).exists():
            raise UsageError(
                f"--out-dir {self.out_dir} holds a {hub.CONFIG}, as a Hugging Face folder does; name another folder: "
                f"one model would hide the other"
            )
        check_tokenizer(self.config)

    @classmethod
    def resume(cls, path, changes=None, profile=None, force=False, stop=Stop, world=ALONE):
        """The run in a folder, or in a checkpoint file, as it stood when its newest checkpoint was written.

        changes    settings that are to be other than before, as a dict
        profile, force, stop, world    as for a new run

        Raises CheckpointError if there is no good checkpoint, and UsageError if data or changes do not fit it.
        """
        path = Path(user_path(path))
        found, reader, there = None, None, ()
        with contextlib.ExitStack() as stack:

            def begin():
                nonlocal found, reader, there
                if path.suffix == ".safetensors" and not path.exists():
                    raise CheckpointError(f"there is no checkpoint {path}")
                found, out_dir = (path, path.parent) if path.is_file() else (folder.newest(path), path)
                asked = user_path((changes or {}).get("out_dir", out_dir))
                if os.path.realpath(asked) != os.path.realpath(out_dir):
                    raise UsageError(
                        f"--resume {path} goes on with the run in {out_dir}, and --out-dir names {asked}; for a run "
                        f"there, copy the checkpoint to it first, or begin one by --init-from"
                    )
                there = folder.checkpoints(out_dir)
                reader, state = stack.enter_context(folder.opened(found))
                _config_of(state, path)
                _find_best(state, out_dir)
                return state, str(out_dir)

            state, out_dir = world.first(begin)
            trainer = cls._resume(path, Path(out_dir), reader, state, changes, profile, force, stop, world)
            trainer.opened, trainer.there = found, there
            return trainer

    @classmethod
    def _resume(cls, path, out_dir, reader, state, changes, profile, force, stop, world):
        """The run that wrote a checkpoint, which rank 0 has opened."""
        trainer = cls.__new__(cls)
        before = _config_of(state, path)
        changes = dict(changes or {})
        if "max_iters" in changes:
            changes.setdefault("epochs", None)
        trainer.config = world.agree(lambda: dataclasses.replace(before, **{**changes, "out_dir": str(out_dir)}))
        trainer.profile, trainer.force, trainer.world = profile, force, world
        trainer.out_dir, trainer.overwrite = out_dir, False
        world.agree(lambda: _check_fixed(before, trainer.config))
        trainer._prepare(stop, state)
        trainer._restore(reader, state, before, path)
        return trainer

    def _prepare(self, stop, state=None):
        """Data, model, workers and optimizer, as they are before the first update.

        state: of the checkpoint that the run goes on from.
        """
        config, world = self.config, self.world
        world.check_same(self._versions())
        self.micro_steps, self.sequences = world.agree(
            lambda: share(world.rank, world.size, config.gradient_accumulation_steps, config.batch_size)
        )
        self.n_sequences = self.sequences.stop - self.sequences.start
        data = model = tokenizer = None
        self.numbered = state is None or bool(state.get("numbered"))  # see Corpus; earlier versions do not say it

        def begin():
            nonlocal data, model, tokenizer
            # a run that is resumed has its data as they were when it was begun, whatever they look like
            data = open_data(config.data, stop, self.force or state is not None, self.numbered)
            texts = [] if isinstance(data, TokenFiles) else [Path(source).resolve() for source in config.data]
            if self.out_dir.is_dir() and self.out_dir.resolve() in texts:
                raise UsageError(f"--out-dir {self.out_dir} is --data as well, but a run is no text; name another")
            if state is None:
                model, tokenizer = _beginning(config, data, stop)
            else:
                self._check_same_text(state, data)
                tokenizer = from_dict(state.get("tokenizer"))
            vocab_size = tokenizer.vocab_size if model is None else model.config.vocab_size
            if state is not None:
                vocab_size = max(vocab_size, _vocab_size_of(state))
            most = len(data.train) + len(data.val) if isinstance(data, TokenFiles) else data.n_bytes
            return tokenizer.to_dict(), vocab_size, data.n_characters, data.n_bytes, data.fingerprint, most

        words, self.vocab_size, self.n_characters, self.n_bytes, self.fingerprint, most = world.first(begin)
        self.tokenizer = world.agree(lambda: from_dict(words) if tokenizer is None else tokenizer)
        self.workers, self.blas_threads = choose_threads(
            self.n_sequences, config.block_size, config.workers, config.blas_threads, world.cores
        )
        world.agree(lambda: self._check_memory(most))
        self.tokens_file = self.repeated_lines = None
        self.data_notes = []  # what else to know of the data, a line each

        def read_tokens():
            if isinstance(data, TokenFiles):
                data.check(self.tokenizer.vocab_size)
                self.train_tokens, self.val_tokens = data.train, data.val
            else:
                self.train_tokens, self.val_tokens = split(self._encode(data), config.val_fraction)
                self.repeated_lines = repeated_lines(data.pieces, data.n_characters, config.val_fraction)
                self.data_notes = [*data.notes, *data.held_back_notes(config.val_fraction)]
            return len(self.train_tokens) + len(self.val_tokens), self.tokens_file

        self.n_tokens, self.tokens_file = world.first(read_tokens)
        world.agree(lambda: world.rank and self._map_tokens())
        self.watch, self.gone = self._watch(), None  # over the files of the tokens; the one that has changed
        self.memory_needed = memory.total(self._memory(self.n_tokens))
        self.blocks, self.val_blocks = _blocks(config, self.train_tokens, self.val_tokens)
        self.val_sample = EvaluationBlocks(self.val_tokens, config.block_size, config.eval_iters * config.batch_size)

        self.iters_per_epoch = self.blocks.per_epoch / (config.batch_size * config.gradient_accumulation_steps)
        self.max_iters = config.max_iters
        if config.epochs is not None:
            self.max_iters = math.ceil(config.epochs * self.iters_per_epoch)
        self.tokens_per_iter = config.batch_size * config.block_size * config.gradient_accumulation_steps

        self.model = model or GPT(config.gpt_config(self.vocab_size), seed=config.seed)
        self.model.tokenizer = self.tokenizer
        self.parallel = DataParallel(self.model, self.workers, self.blas_threads, world)
        self.optimizer = self._optimizer()
        audits = config.gradcheck_every and world.rank == 0
        self.auditor = Auditor(self.parallel, config.gradcheck_entries) if audits else None
        self.audit, self.audited_iter = None, None  # of the last update if it was audited; the last that passed
        self.iter = 0
        self.best_loss, self.best_iter = math.inf, 0
        self.since_best, self.evaluated_iter = 0, None  # evaluations since then; the last one's iteration
        self.skipped = 0  # updates in a row
        self.elapsed = 0.0  # seconds that run() had taken when it was interrupted
        self.resumed_from = None  # the iteration of the checkpoint that this run goes on from
        self.saved_as = {}  # what is to be said of that checkpoint only, if it is written anew; see _state
        self.all_changes = {}  # of settings at that iteration, by this command and others before it
        self.notices = []  # what run() has to say first
        self.has_run = self.at_end = False  # whether run() was called before; whether it came to the end
        self.began = None  # what the clock showed at the run's first update, or would have shown without interruptions
        self.saved_iter, self.unsaved = None, None  # of the last checkpoint, and why it could not be written
        self.next_save = math.inf  # what the clock of rank 0, which writes, shows when it saves between evaluations
        self.save_is_due = False  # whether that was so at the last update
        self._said_slow = False  # whether it was said that saves come less often than they should
        self._aside = None  # (process that saves, iteration), if there is one

    def _memory(self, n_tokens):
        """What this rank will need memory for: words -> bytes."""
        share = dataclasses.replace(self.config, batch_size=self.n_sequences, gradcheck_every=0)
        parts = memory.parts(share, self.vocab_size, n_tokens, self.workers)
        if self.config.gradcheck_every and self.world.rank == 0:  # which audits alone, whole micro-steps
            whole = memory.parts(self.config, self.vocab_size, n_tokens, self.workers)
            parts[memory.AUDIT] = whole[memory.AUDIT]
        return parts

    @property
    def _dtype(self):
        """Of the tokens in a file that this run or one before it has written."""
        return np.dtype("<u2" if self.tokenizer.vocab_size <= 2**16 else "<u4")

    def _map_tokens(self):
        """Map the tokens that rank 0 has found or written.  Raises UsageError if they are not to be seen here."""
        if self.tokens_file is None:
            paths = [Path(self.config.data[0]) / name for name in SPLITS]
            found = [map_tokens(path, TokenFiles.dtype) for path in paths]
        else:
            paths = [self.out_dir / self.tokens_file]
            for _ in range(SEEN_WITHIN):
                found = [map_tokens(paths[0], self._dtype, self.n_tokens)]
                if found[0] is not None:
                    found = split(found[0], self.config.val_fraction)
                    break
                time.sleep(1)
        if any(tokens is None for tokens in found) or sum(map(len, found)) != self.n_tokens:
            raise UsageError(
                f"{paths[0]} is not here as rank 0 sees it; all ranks must see the same files: let --out-dir and "
                f"--data name folders that their machines share"
            )
        self.train_tokens, self.val_tokens = found

    def _watch(self):
        """The Watch over the files that the tokens are mapped from."""
        if self.tokens_file is not None:
            path = self.out_dir / self.tokens_file
            return Watch({path: self.train_tokens}, lambda: folder.is_whole(path))
        path = Path(self.config.data[0])
        files = {path / name: tokens for name, tokens in zip(SPLITS, (self.train_tokens, self.val_tokens), strict=True)}
        return Watch(files, lambda: TokenFiles(path, force=True).fingerprint == self.fingerprint)

    def _tokens_changed(self):
        """Whether the tokens are not what they were any more: then nobody may look at them."""
        self.gone = self.gone or self.watch.changed()
        return self.gone is not None

    def _other_tokens(self):
        path = self.gone or " ".join(self.config.data)  # (another rank may have seen it)
        return TokensChanged(f"data: {path} was changed while the run read it")

    def _encode(self, corpus):
        """(n,) tokens of a Corpus, mapped from a file in the run folder; it is written if it is not there yet.

        Raises UsageError for a text that is too short, CheckpointError if the file cannot be written, and BusyError if
        another training writes to the folder.
        """
        words = json.dumps(self.tokenizer.to_dict(), sort_keys=True)
        name = f"tokens-{hashlib.sha256((self.fingerprint + words).encode()).hexdigest()[:16]}"
        n = self.tokenizer.n_tokens(corpus.n_characters, corpus.n_bytes)
        if n is None and corpus.n_bytes <= PIECE:  # a short text is encoded twice, lest a folder be made for nothing
            n = sum(map(len, self.tokenizer.encode_pieces(corpus.pieces())))
        if n is not None:
            _blocks(self.config, *split(range(n), self.config.val_fraction))  # they look at the length only
        path = folder.tokens_file(self.out_dir, name)
        if path is None:  # there are none, or they are damaged
            run = folder.RunFolder(self.out_dir)
            try:
                parts = self.tokenizer.encode_pieces(corpus.pieces())
                path = run.write_tokens(name, (part.astype(self._dtype) for part in parts))
            finally:
                run.close()
        self.tokens_file = path.name
        return map_tokens(path, self._dtype)

    def _check_memory(self, most_tokens):
        """Raise UsageError if the run will need more memory than there is, with so many tokens at most.

        The tokens themselves do not count: they are mapped from a file, which may be larger than the memory.
        """
        parts = self._memory(most_tokens)
        del parts[memory.MAPPED]
        others = memory.KERNELS + sum(size for words, size in parts.items() if words != memory.AUDIT)
        needed, there_is = memory.total(parts) + (self.world.local_size - 1) * others, machine.available()
        if there_is is not None and needed > there_is and not self.force:
            most = sorted(parts.items(), key=lambda part: -part[1])[:3]
            raise UsageError(
                f"this run needs about {needed / 1e9:,.1f} GB of memory, and there are "
                f"{there_is / 1e9:,.1f} GB ({', '.join(f'{words} {size / 1e9:,.1f}' for words, size in most)}). "
                f"Lower --batch-size, --block-size, --n-embd, --n-layer or --workers; --force tries it all the same"
            )

    @property
    def environment(self):
        """What the bits of a result depend on, besides the settings."""
        return {
            "ranks": self.world.size,
            **self._versions(),
            "processor": machine.cpu_name(),
            "workers": self.workers,
            "blas_threads": self.blas_threads,
            "blas_kernels": blas_kernels(),
        }

    def _versions(self):
        kernels = f"numba {jit.numba.__version__}" if jit.KERNELS == "numba" else jit.KERNELS
        return {"npgpt": __version__, "numpy": np.__version__, "kernels": kernels}

    def _check_same_text(self, state, data):
        """Raise UsageError if the data is not what the run of a checkpoint was begun with."""
        if state.get("data_sha256") == data.fingerprint:
            return
        was, now = state.get("n_characters"), data.n_characters
        both = isinstance(was, int) and isinstance(now, int)  # token files have no characters
        lengths = f"it had {was:,} characters, now there are {now:,} " if both else ""
        raise UsageError(
            f"data: {' '.join(self.config.data)} is not the text that the run in {self.out_dir} was begun with: "
            f"{lengths}(sha256 {str(state.get('data_sha256'))[:8]}..., now {data.fingerprint[:8]}...)"
        )

    def _restore(self, reader, state, before, path):
        """Become the run that wrote this checkpoint; its arrays go straight from the file to their places."""

        def read():
            for prefix, values in self._arrays():
                for name, view in self.parallel.flat.views(values):
                    entry = reader.entries.get(prefix + name)
                    if entry is None or entry.shape != view.shape or entry.dtype not in checkpoint.FLOATS:
                        raise CheckpointError(
                            f"{path}: {prefix + name} is missing, or has another shape than {view.shape}"
                        )
                    reader.copy_to(prefix + name, view)

        self.world.first(read)
        try:
            self.iter = self.resumed_from = self.saved_iter = int(state["iter"])
            self.optimizer.step, self.skipped = int(state["optimizer_step"]), int(state["skipped"])
            self.best_loss = math.inf if state["best_loss"] is None else float(state["best_loss"])
            self.best_iter, self.elapsed = int(state["best_iter"]), float(state["elapsed_s"])
            since_best = (self.iter - self.best_iter) // before.eval_interval  # if it does not say
            self.since_best = int(state.get("since_best", since_best))
            self.evaluated_iter = None if state.get("val_loss") is None else self.iter
            self.saved_as = {"val_loss": state.get("val_loss"), "by_clock": bool(state.get("by_clock"))}
            environment = {"ranks": 1, "blas_kernels": blas_kernels(), **state["environment"]}  # if it does not say
            frozen = [str(name) for name in state.get("frozen", ())]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: the state of the run is not complete ({error})") from None
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad = name not in frozen
        if frozen:
            self.notices.append(f"{', '.join(frozen)} stay as they are (requires_grad is False), as before")
        for name, value in self.environment.items():
            if environment.get(name) != value:
                self.notices.append(
                    f"{name} was {environment.get(name)} and is {value}: the run goes on, but not with the same bits"
                )
        self.changes = {
            f.name: [getattr(before, f.name), getattr(self.config, f.name)]
            for f in dataclasses.fields(TrainConfig)
            if f.name != "out_dir" and getattr(before, f.name) != getattr(self.config, f.name)
        }
        earlier = _changes_of(state, path)
        self.all_changes = {**earlier, **{k: [earlier.get(k, [old])[0], new] for k, (old, new) in self.changes.items()}}
        if self.changes:
            self.notices += contradictions(self.config, self.max_iters)
        for name, (old, new) in self.changes.items():
            self.notices.append(f"{name} was {old} and is {new} from iteration {self.iter:,} on")

    def _arrays(self):
        """(prefix of the names, flat array) of all that a checkpoint holds."""
        return ("", self.parallel.flat.weights), ("adamw.m.", self.optimizer.m), ("adamw.v.", self.optimizer.v)

    def _optimizer(self):
        config = self.config
        options = dict(beta1=config.beta1, beta2=config.beta2, weight_decay=config.weight_decay)
        if config.optimizer == "adamw":
            return AdamW(self.parallel.flat, **options)
        rate = config.muon_learning_rate / config.learning_rate if config.learning_rate else 0.0
        return Muon(self.parallel.flat, rate, config.muon_momentum, **options)

    @functools.cached_property
    def sgemm_peak(self):
        """FLOP/s of large matrix products with all threads of this run, measured when it is first asked for."""
        with blas_threads(self.workers * self.blas_threads):
            return sgemm_peak()[0]

    def share_of_peak(self, tokens_per_second):
        """Training speed as a share of sgemm_peak, all ranks': that of the FLOPs which a step needs at least."""
        B, T = self.config.batch_size, self.config.block_size
        peak = self.sgemm_peak * self.world.size
        return tokens_per_second * self.model.config.training_flops(B, T) / (B * T) / peak

    def learning_rate(self, iteration):
        config = self.config
        min_lr = config.learning_rate / 10 if config.min_lr is None else config.min_lr
        decay_iters = self.max_iters if config.lr_decay_iters is None else config.lr_decay_iters
        if not config.decay_lr:
            min_lr, decay_iters = config.learning_rate, 0
        return cosine_lr(iteration, config.learning_rate, min_lr, config.warmup_iters, decay_iters)

    def step(self, stop=Stop):
        """One update -> (loss, learning rate, gradient norm, whether it was skipped).

        If the loss or the gradient's norm is not finite, the update is skipped: weights and moments stay as they are.
        Raises DivergedError at the fifth in a row, and GradientError if the gradient is audited and wrong.
        """
        self.audit = None
        self.parallel.zero_grad()
        mine, n, loss = self.sequences, len(self.micro_steps) * self.world.size, 0.0
        for i, (x, y, seed) in zip(self.micro_steps, self._micro_batches(self.micro_steps), strict=False):
            if stop.number is not None:
                break  # what there is goes into the sum all the same, by which all ranks learn of it
            loss += self.parallel.forward_backward(
                x[mine], y[mine], seed, weight=1 / n, offset=mine.start, last=i == self.micro_steps[-1]
            ) / n  # fmt: skip
        squares, due = self.parallel.gather_grads(), clock() >= self.next_save
        loss, squares, due, gone = self.world.sum(stop, loss, squares, due, self._tokens_changed())
        if gone:
            raise self._other_tokens()
        self.save_is_due = due > 0
        norm, lr = math.sqrt(squares), self.learning_rate(self.iter)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        n_skipped = self.skipped + 1 if skipped else 0
        if n_skipped == MOST_SKIPPED:
            self.skipped = n_skipped
            raise self._diverged(f"the loss is {loss}, the gradient's norm {norm}{self._first_not_finite()}")
        if self._is_audited() and not skipped:
            self._audit(stop)
        with held():  # weights, moments and iter belong together
            if not skipped:
                self.parallel.update(self.optimizer, lr, clip_scale(norm, self.config.grad_clip))
            self.skipped, self.iter = n_skipped, self.iter + 1
        return loss, lr, norm, skipped

    def _is_audited(self):
        return self.config.gradcheck_every and self.iter % self.config.gradcheck_every == 0

    def _audit(self, stop):
        """Compare the gradient with finite differences, on rank 0.  Raises GradientError if it is wrong."""
        if self.auditor is not None and not self._tokens_changed():
            self.audit = self.auditor.audit(list(self._micro_batches()), (self.config.seed, self.iter), stop)
        (wrong,) = self.world.sum(stop, self.audit is not None and not self.audit.passed)
        if wrong:
            good = folder.newest_until(self.out_dir, 0 if self.audited_iter is None else self.audited_iter + 1)
            worst = self.audit and self.audit.worst  # there is none where rank 0 has the words
            raise GradientError(
                f"the gradient at iteration {self.iter} is wrong: {worst}, bound {BOUND:.0e}; nothing of it "
                f"was saved" + (f". The last checkpoint before it that is beyond doubt is {good}" if good else "")
            )
        self.audited_iter = self.iter

    def _micro_batches(self, numbers=None):
        """Micro-steps of this update, by default all: of each x, y (B, T) and the seed of its dropout masks.

        They are the same for any number of ranks.
        """
        n_micro = self.config.gradient_accumulation_steps
        for i in range(n_micro) if numbers is None else numbers:
            if self._tokens_changed():
                return
            n = self.iter * n_micro + i
            seed = np.random.SeedSequence([self.config.seed, DROPOUT, n]).generate_state(1)[0]
            yield *self.blocks.batch(n, self.config.batch_size), seed

    def _diverged(self, what):
        good = folder.checkpoints(self.out_dir)
        hint = f"; the last good checkpoint is {good[0]}" if good else ""
        return DivergedError(f"{what} at iteration {self.iter}{hint}. Try a smaller {_flag_too_large(self.config)}")

    def _first_not_finite(self):
        """Words for the first op of this update whose result was not finite; found by doing the update once more."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for x, y, seed in self._micro_batches() if self.world.rank == 0 else ():
            try:
                with finite_checks(names), random_stream(seed), np.errstate(all="ignore"):
                    _, loss = self.model(x, y)
                    loss.backward()
            except NotFinite as error:
                return f", first in {error}"
        return ""

    def evaluate(self, blocks, stop=Stop):
        """Mean loss over EvaluationBlocks.  Raises DivergedError if it is not finite, and TokensChanged."""
        loss = self._mean_loss(blocks, stop)
        if not math.isfinite(loss):
            raise self._diverged(f"the validation loss is {loss}")
        return loss

    def _mean_loss(self, blocks, stop):
        total = count = 0
        self.parallel.train(False)
        try:
            B = self.n_sequences  # the ranks take turns with so many at once
            for i in range(self.world.rank * B, len(blocks), self.world.size * B):
                if stop.number is not None or self._tokens_changed():
                    break
                loss, n = self.parallel.loss(*blocks[i : i + B])
                total, count = total + loss, count + n
        finally:
            self.parallel.train(True)
        total, count, gone = self.world.sum(stop, total, count, self._tokens_changed())
        if gone:
            raise self._other_tokens()
        return total / count

    def sample(self, n_tokens):
        """Iterator of text that the model writes now, from a line break on, if it knows one."""
        rng = np.random.default_rng([self.config.seed, SAMPLE, self.iter])
        writer = Writer(self.tokenizer)
        generation = unprompted(self.model, self.tokenizer, rng, 1 + n_tokens)
        for _ in range(n_tokens):
            yield writer.feed(generation.step()[0][0])
        yield writer.end()

    def run(self, stop=Stop):
        """Train to the end; yields a Progress after each logged update and an Evaluation at each evaluation.

        stop: a Stop; when it has a number, the work ends within a micro-step, a checkpoint is written, and StoppedError
        is raised.  Raises DivergedError, GradientError, BusyError, and CheckpointError if at the end the last
        checkpoint or the log could not be written; while it goes on, such a failure is a Notice.

        Parameters of `model` with requires_grad = False stay as they are, also after a resume.  Raises ValueError for a
        model that was made another one than its config says, before anything of it is written.

        Called again, it goes on where the loop over it was left, and yields nothing if it had come to the end.  Without
        a `stop`, Ctrl-C (or a notebook's stop button) does not break an update: a checkpoint is written after it, and
        KeyboardInterrupt is raised.
        """
        if self.at_end:
            return
        if stop is not Stop:
            yield from self._run_in_folder(stop)
            return
        stop = Stop()
        with contextlib.closing(self._run_in_folder(stop)) as events:
            while True:
                try:
                    with interrupts_noted(stop):
                        event = next(events)
                except StopIteration:
                    return
                except StoppedError as stopped:
                    raise KeyboardInterrupt(str(stopped)) from None
                yield event

    def _check_model(self):
        if other := self.model.difference():
            raise ValueError(f"a Trainer's checkpoints hold GPT(config) only: {other}")

    def _run_in_folder(self, stop):
        self.folder = None
        self._check_model()
        try:
            self.world.first(self._open_folder)
            if self.world.size > 1 and isinstance(stop, Stop):
                stop.warned = self._save_aside
            for _, values in self._arrays():
                self.world.broadcast(values)
            yield from self._run(stop)
        except (StopNow, TokensChanged) as stopped:
            self.world.first(self._check_weights)
            list(self._save(None))
            if isinstance(stopped, TokensChanged):
                raise TokensChanged(f"{stopped}; {self._farewell()}, with the data as they were") from None
            raise StoppedError(stopped.number, self._farewell()) from None
        except GeneratorExit:  # nobody asks for the next event: the output was closed, say
            self._check_weights()
            list(self._save(None))
            raise
        finally:
            stop.warned = None
            self.has_run, self.notices = True, []
            if self.began is not None:
                self.elapsed = clock() - self.began
            if self.folder is not None:
                self.there = None
                with contextlib.suppress(CheckpointError):  # the folder cannot be read
                    self.there = folder.checkpoints(self.out_dir)
                self.folder.close()

    def _open_folder(self):
        """Take the run folder into possession, and put away what this run replaces."""
        self.folder = folder.RunFolder(self.out_dir)
        if self.resumed_from is None and not self.has_run:
            if not self.overwrite:
                folder.refuse_earlier_run(self.out_dir)  # it may have come while the lock was another's
            self.folder.clear(self.tokens_file)
        else:
            # before this run had the lock, another may have gone on
            if self.there is not None and not {*folder.checkpoints(self.out_dir)} <= {*self.there}:
                raise BusyError(
                    f"another training has just saved a checkpoint to {self.out_dir}: nothing was changed; give the "
                    f"same command again to go on from there"
                )
            self.there = None
            if not self.has_run:
                # what was agreed on is on the disk before the first update
                self.folder.go_on_from(self.iter, self.opened, *self._state(**self.saved_as), bool(self.changes))
        self.folder.open_log(self.iter)

    def _save_aside(self):
        """Save in a process of its own, from the memory as it is now: nobody knows how long this one has to live."""
        if self.folder is None or self.saved_iter == self.iter or not hasattr(os, "fork"):
            return
        if self._aside is not None:
            if self._aside[1] == self.iter:
                return
            self._wait_for_aside()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python warns of threads, which are not there in the new process
                child = os.fork()
        except OSError:  # no memory for it
            return
        if child:
            self._aside = child, self.iter
            return
        try:
            os.setsid()  # away from the processes that mpiexec kills
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            self._check_weights()
            list(self._save(None))
        finally:
            os._exit(self.saved_iter != self.iter)

    def _wait_for_aside(self):
        """Wait until the process that saves, if there is one, has ended."""
        if self._aside is not None:
            (child, iteration), self._aside = self._aside, None
            if os.waitpid(child, 0)[1] == 0:
                self.saved_iter = iteration

    def _farewell(self):
        if self.saved_iter is None:
            return f"stopped; nothing could be saved: {self.unsaved}"
        return (
            f"stopped at iteration {self.iter:,}; the checkpoint is of iteration {self.saved_iter:,}. Go on with: "
            f"{self.world.command} --resume --out-dir {quoted(self.out_dir)}"
        )

    def _run(self, stop):
        config = self.config
        for text in (*self.notices, *(() if self.folder is None else self.folder.notices)):
            yield Notice(text)
        if self.resumed_from == self.iter and self.all_changes:
            yield from self._log({"iter": self.iter, "changed": self.all_changes})
        self.began, logged = clock() - self.elapsed, clock()
        yield from self._set_next_save(0)
        logged_iter, steady = self.iter, None
        while True:
            evaluation = None
            out_of_patience = False
            if self.iter >= self.max_iters or self.iter % config.eval_interval == 0:
                evaluation = yield from self._evaluate_and_save(stop)
                out_of_patience = config.patience is not None and self.since_best >= config.patience
                at_end = self.iter >= self.max_iters or out_of_patience
                if at_end:
                    # (it may have come when the disk was full)
                    self.best_loss, self.best_iter = self.world.first(
                        lambda: folder.best_there(self.out_dir, self.iter, self.best_loss, self.best_iter)
                    )
                    whole = self.evaluate(self.val_blocks, stop)
                    evaluation = dataclasses.replace(evaluation, val_loss_whole=whole)
                yield evaluation
                if at_end:
                    yield from self._log(self._row(evaluation))
                    if out_of_patience:
                        yield Notice(f"no new best in {config.patience} evaluations: the run ends here")
                    self.at_end = True
                    self.world.first(self._check_saved)
                    return
                logged, logged_iter = clock(), self.iter
            n = self.iter
            try:
                with profiling(None if steady is None or self._is_audited() else self.profile):
                    loss, lr, norm, skipped = self.step(stop)
            except GradientError:
                if self.audit is not None:
                    yield from self._log({"iter": n, "gradcheck": self.audit.errors})
                raise
            now = clock()
            if self.audit is not None:
                logged += self.audit.seconds  # its time is not the training's
                yield Audited(n, self.audit)
            speed = (self.iter - logged_iter) * self.tokens_per_iter / (now - logged) if now > logged else math.inf
            left = None
            if steady is None:
                steady = (now, self.iter)  # from here on every update takes about the same time
            else:
                left = (now - steady[0]) / (self.iter - steady[1]) * (self.max_iters - self.iter)
            progress = Progress(n, loss, lr, norm, speed, left, skipped)
            yield from self._log(self._row(evaluation, progress))
            if skipped:
                yield Notice(f"iteration {n:,}: loss {loss}, gradient norm {norm}; the update was skipped")
            if n % config.log_interval == 0:
                logged, logged_iter = now, self.iter
                yield progress
            if self.save_is_due:
                started = clock()
                self.world.first(self._check_weights)
                yield from self._save(None, by_clock=True)
                logged += clock() - started  # no training either

    def _check_saved(self):
        if self.unsaved is not None:
            raise CheckpointError(str(self.unsaved))

    def _row(self, evaluation, progress=None):
        """A row of the log; numbers that are not finite are null."""
        row = {"iter": self.iter if progress is None else progress.iter}
        row["train_loss"] = None if progress is None else progress.train_loss
        if evaluation is not None:
            row["val_loss"] = evaluation.val_loss
            if evaluation.val_loss_whole is not None:
                row["val_loss_whole"] = evaluation.val_loss_whole
        for name in ("lr", "grad_norm", "tokens_per_second"):
            row[name] = None if progress is None else getattr(progress, name)
        if progress is not None and self.audit is not None:
            row["gradcheck"] = self.audit.errors
        row["elapsed_s"] = round(clock() - self.began, 3)
        if progress is not None and progress.skipped:
            row["skipped"] = True
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}

    def _log(self, row):
        if self.folder is None:
            return
        try:
            self.folder.log(row)
            if isinstance(self.unsaved, _LogError):
                self.unsaved = None
        except CheckpointError as error:
            if self.unsaved is None:
                self.unsaved = _LogError(str(error))
                yield Notice(f"{error}; the training goes on, and tries again")

    def _evaluate_and_save(self, stop):
        loss = self._mean_loss(self.val_sample, stop)
        if not math.isfinite(loss):  # of text that the training may know nothing of: what was learnt is not lost
            self.world.first(self._check_weights)
            yield from self._save(None)
            raise self._diverged(f"the validation loss is {loss}")
        # (the run may have been resumed from just here: then its best may be this evaluation)
        is_best = loss < self.best_loss or (loss == self.best_loss and self.iter == self.best_iter)
        if is_best:
            self.best_loss, self.best_iter, self.since_best = loss, self.iter, 0
        elif self.evaluated_iter != self.iter:
            self.since_best += 1
        self.evaluated_iter = self.iter
        if not self.world.all_same(self.parallel.flat.weights):
            yield Notice(
                "the ranks' weights were no longer the same (are their processors, and numbers of threads?); "
                "now all have those of rank 0"
            )
            for _, values in self._arrays():
                self.world.broadcast(values)
        self.world.first(self._check_weights)
        yield from self._save(loss)
        ignorance = math.log(self.model.config.vocab_size)
        if self.iter == 0 and self.config.init_from is not None and loss > ignorance + 0.1:
            yield Notice(
                f"the model that this run begins with has the validation loss {loss:.2f}, and one that knows nothing "
                f"{ignorance:.2f} (ln vocab_size): did it learn other tokens, or another kind of text?"
            )
        return Evaluation(self.iter, loss, is_best)

    def _check_weights(self):
        """Raise DivergedError if what a checkpoint would hold is not finite."""
        if not all(np.isfinite(values).all() for _, values in self._arrays()):
            raise self._diverged("weights are not finite: no checkpoint is written of them")

    def _set_next_save(self, took):
        """When the clock saves next.  Yields a Notice if a save, which took so many seconds, comes later than asked."""
        if self.folder is None or not self.config.save_minutes:
            return
        asked, least = 60 * self.config.save_minutes, took / SAVE_SHARE
        self.next_save = clock() + max(asked, least)
        if least > asked and not self._said_slow:
            self._said_slow = True
            yield Notice(
                f"a save takes {took:.3g} s: between evaluations one comes every {least / 60:.3g} minutes, not every "
                f"{self.config.save_minutes:g}, so that saves take no more than {SAVE_SHARE:.0%} of the time"
            )

    def _save(self, val_loss, by_clock=False):
        """Write a checkpoint of the weights after `iter` updates, unless there is one.  Yields a Notice if it fails."""
        self._wait_for_aside()
        if self.folder is None or (self.saved_iter == self.iter and val_loss is None):
            return
        self._check_model()
        started = clock()
        try:
            self.folder.save(self.iter, *self._state(val_loss, by_clock), self.config.keep)
            self.saved_iter, self.unsaved = self.iter, None
        except CheckpointError as error:
            self.unsaved = error
            yield Notice(f"{error}; the training goes on, and tries again at the next save")
        yield from self._set_next_save(clock() - started)

    def _state(self, val_loss, by_clock):
        """(arrays, state) of a checkpoint of the run as it is now.

        val_loss, by_clock    the loss of these weights, if it is known; whether the clock asks for it
        """
        flat = self.parallel.flat
        arrays = {prefix + name: view for prefix, values in self._arrays() for name, view in flat.views(values)}
        state = {
            "format": folder.FORMAT,
            "iter": self.iter,
            "optimizer_step": self.optimizer.step,
            "skipped": self.skipped,
            "val_loss": val_loss,
            "by_clock": by_clock,
            "frozen": flat.frozen,
            "best_loss": None if math.isinf(self.best_loss) else self.best_loss,
            "best_iter": self.best_iter,
            "since_best": self.since_best,
            "elapsed_s": self.elapsed if self.began is None else clock() - self.began,
            "changed": self.all_changes if self.iter == self.resumed_from else {},
            "train": dataclasses.asdict(self.config),
            "model": dataclasses.asdict(self.model.config),
            "tokenizer": self.tokenizer.to_dict(),
            "data_sha256": self.fingerprint,
            "n_characters": self.n_characters,
            "numbered": self.numbered,
            "environment": self.environment,
        }
        return arrays, state


class _LogError(CheckpointError):
    """A row of the log that waits to be written."""


def _flag_too_large(config):
    """The flag of the setting that is farthest above its default, of those that make a run diverge."""
    factors = {
        "learning_rate": config.learning_rate / TrainConfig.learning_rate,
        "min_lr": (config.min_lr or 0) / TrainConfig.learning_rate if config.decay_lr else 0,
        "muon_learning_rate": config.muon_learning_rate / TrainConfig.muon_learning_rate * (config.optimizer == "muon"),
        "weight_decay": config.weight_decay * config.learning_rate,  # from 1 on, weights change their sign
    }
    return "--" + max(factors, key=factors.get).replace("_", "-")


def _check_fixed(before, config):
    """Raise UsageError if a run is to go on with other settings that make it another run."""
    for name in FIXED:
        old, new = getattr(before, name), getattr(config, name)
        if old != new:
            raise UsageError(f"the run in {config.out_dir} was begun with {name} = {old}; it cannot go on with {new}")


def _blocks(config, train_tokens, val_tokens):
    """The two splits as Blocks and EvaluationBlocks.  Raises UsageError if one is too short."""
    blocks = Blocks(train_tokens, config.block_size, config.seed)
    return blocks, EvaluationBlocks(val_tokens, config.block_size)


def settings_of(path):
    """The settings that a run has which begins with the model at a path (see GPT.from_pretrained), as a dict.

    Raises CheckpointError.
    """
    with pretrained.opened(path) as found:
        settings = dataclasses.asdict(found.config)
        if found.tokenizer is not None:
            settings["tokenizer"] = found.tokenizer.kind
        elif any((Path(path) / name).exists() for name in BPE_FILES):
            settings["tokenizer"] = "bpe"  # its package is missing, which will be said: no other fits the weights
    return {name: value for name, value in settings.items() if name not in ("vocab_size", "dropout")}


def _beginning(config, data, stop):
    """(model to begin with or None, tokenizer) of a new run.  Raises UsageError, and CheckpointError for init_from."""
    if config.init_from is None:
        return None, _make_tokenizer(config, data, stop)
    model = GPT.from_pretrained(config.init_from).train()
    for name in ("n_layer", "n_head", "n_embd", "bias", "block_size"):
        has, asked = getattr(model.config, name), getattr(config, name)
        if has != asked and not (name == "block_size" and asked < has):
            raise UsageError(f"init_from: the model in {config.init_from} has {name} = {has}, not {asked}")
    tokenizer = model.tokenizer
    if tokenizer is None:
        tokenizer = _make_tokenizer(config, data, stop)
    elif config.tokenizer != tokenizer.kind:
        tokenizer = _same_tokenizer(config, data, stop, tokenizer)
    elif config.vocab_size not in (None, tokenizer.vocab_size):
        raise UsageError(
            f"init_from: the tokenizer in {config.init_from} has {tokenizer.vocab_size} tokens, not vocab_size = "
            f"{config.vocab_size}"
        )
    elif isinstance(data, Corpus):
        _check_characters(tokenizer, data, config.init_from)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UsageError(
            f"init_from: the model in {config.init_from} knows {model.config.vocab_size} tokens, but the tokenizer "
            f"{config.tokenizer} has {tokenizer.vocab_size}"
        )
    model.crop_block_size(config.block_size)
    model.set_dropout(config.dropout)
    return model, tokenizer


def _same_tokenizer(config, data, stop, before):
    """The tokenizer that --tokenizer names, if its tokens mean what they mean to the model that the run begins with.

    Raises UsageError if they do not: the weights would be of no use, and nothing but the loss would tell.
    """
    lead = f"init_from: the model in {config.init_from} was trained with other tokens than {config.tokenizer}:"
    if config.tokenizer in TOKENIZERS:
        raise UsageError(f"{lead} its tokenizer is {before.kind}; leave out --tokenizer, or --init-from")
    after = _make_tokenizer(config, data, stop)
    for token in range(before.vocab_size):
        was, is_now = (t.bytes_of(token) if token < t.vocab_size else b"" for t in (before, after))
        if was != is_now:
            was, is_now = (repr(text.decode("utf-8", "replace")) if text else "none" for text in (was, is_now))
            raise UsageError(f"{lead} token {token} was {was} and is {is_now}; leave out --tokenizer, or --init-from")
    return after


def _make_tokenizer(config, data, stop):
    """The tokenizer of a new run.  Raises UsageError."""
    has_text = isinstance(data, Corpus)
    if config.tokenizer in ("char", "bpe") and not has_text:
        lead = f"data: {data.path} holds tokens and no text;"
        if (data.path / "meta.pkl").exists():
            lead = f"data: {data.path} holds tokens; its meta.pkl is pickle, which can run code, and is not read;"
        raise UsageError(
            f"{lead} pass the vocabulary with --tokenizer input.txt (the text whose characters it is) or tokenizer.json"
        )
    if config.tokenizer == "char":
        return CharTokenizer(data.characters)
    if config.tokenizer == "byte":
        return ByteTokenizer()
    if config.tokenizer == "bpe":

        def check():
            if stop.number is not None:
                raise StoppedError(stop.number, "stopped before anything was trained")

        return BPETokenizer.learn(data.pieces(), config.vocab_size or BPE_VOCAB_SIZE, check)
    file = find_bpe(config.tokenizer)
    if file is not None:
        return BPETokenizer.load(file)
    tokenizer = CharTokenizer(Corpus([Path(config.tokenizer)], stop, "tokenizer").characters)
    if has_text:
        _check_characters(tokenizer, data, config.tokenizer)
    return tokenizer


def _check_characters(tokenizer, data, source):
    """Raise UsageError if a text has characters that a tokenizer of characters does not know."""
    unknown = sorted(set(data.characters) - set(tokenizer.chars)) if isinstance(tokenizer, CharTokenizer) else []
    if unknown:
        raise UsageError(
            f"data: the text has {len(unknown)} characters that {source} does not have, such as {name_of(unknown[0])}"
        )


def _changes_of(state, path):
    """The settings that were changed at a checkpoint's own iteration: name -> [old, new]."""
    changed = state.get("changed", {})
    if not isinstance(changed, dict):
        raise CheckpointError(f"{path}: the state of the run is not complete (changed)")
    return changed


def _find_best(state, out_dir):
    """Have a state name the best checkpoint that is in a folder, if its best one is not: it was copied here alone."""
    if type(state.get("iter")) is int and {"best_loss", "best_iter"} <= state.keys():
        best = folder.best_there(out_dir, state["iter"], state["best_loss"], state["best_iter"])
        loss = state.get("val_loss")  # of this one, whatever its file is named
        if best[1] != state["best_iter"] and isinstance(loss, float) and (best[0] is None or loss < best[0]):
            best = loss, state["iter"]
        state["best_loss"], state["best_iter"] = best


def _vocab_size_of(state):
    """The number of tokens of a checkpoint's model, which may be more than its tokenizer has; 0 if it is not there."""
    model = state.get("model")
    size = model.get("vocab_size") if isinstance(model, dict) else None
    return size if type(size) is int and 0 < size < 2**31 else 0


def _config_of(state, path):
    """The TrainConfig that a checkpoint's run was made with."""
    try:
        settings = dict(state["train"])
        unknown = sorted({*settings} - {f.name for f in dataclasses.fields(TrainConfig)})
        if unknown:
            raise CheckpointError(
                f"{path}: its run has the setting {unknown[0]}, which npgpt {__version__} does not know; "
                f"{folder.writer_of(state)} wrote it: use that version"
            )
        return TrainConfig(**{**settings, "data": tuple(settings["data"])})
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise CheckpointError(f"{path} was not written by npgpt.train, or is damaged ({error})") from None
