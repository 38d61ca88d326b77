"""The training loop: data, model, workers, evaluation, checkpoints and log, from one TrainConfig.

    trainer = Trainer(config)
    for event in trainer.run():        # Progress after an update, Evaluation at each evaluation
        print(event)

The loop computes and writes files; what is shown to a person is the business of npgpt/train.py.
"""

import dataclasses
import functools
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from npgpt import checkpoint
from npgpt.config import DROPOUT, SAMPLE, GPTConfig
from npgpt.data import Blocks, evaluation_blocks, load_text, split
from npgpt.errors import CheckpointError, DivergedError, UsageError
from npgpt.model import GPT
from npgpt.optim import AdamW, Muon, clip_scale, cosine_lr
from npgpt.parallel import DataParallel, blas_threads, choose_threads, sgemm_peak
from npgpt.profiler import profiling
from npgpt.tokenizer import TOKENIZERS, from_dict

BEST, LAST = "best.safetensors", "last.safetensors"


@dataclass(frozen=True)
class Progress:
    """One update."""

    iter: int
    train_loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float  # since the last Progress that was logged
    seconds_left: float | None  # None after the first update, which compiles kernels or loads them


@dataclass(frozen=True)
class Evaluation:
    """Validation loss, in nats per token, of the weights after `iter` updates."""

    iter: int
    val_loss: float  # on eval_iters batches of the validation split, always the same ones
    is_best: bool
    val_loss_whole: float | None = None  # on all of the split; at the end of the run only


class Trainer:
    """A training run.  Raises UsageError and CheckpointError before anything is trained.

    config     a TrainConfig
    overwrite  whether an earlier run in config.out_dir may be lost
    profile    a Profile that gets to know where the updates' time goes; not that of the first, which compiles kernels
    """

    def __init__(self, config, overwrite=False, profile=None):
        self.config, self.profile = config, profile
        self.out_dir = Path(config.out_dir)
        if self.out_dir.exists() and not self.out_dir.is_dir():
            raise UsageError(f"--out-dir {self.out_dir} is a file; name a folder")
        if not overwrite and any((self.out_dir / name).exists() for name in (BEST, LAST)):
            raise UsageError(
                f"{self.out_dir} holds an earlier run. Choose another folder with --out-dir, "
                f"or add --overwrite to replace that run"
            )
        text = load_text(config.data)
        self.n_characters = len(text)
        self.fingerprint = hashlib.sha256(text.encode("utf-8")).hexdigest()
        self.tokenizer = TOKENIZERS[config.tokenizer].from_text(text)
        tokens = self.tokenizer.encode(text)
        self.train_tokens, self.val_tokens = split(tokens, config.val_fraction)
        self.blocks = Blocks(self.train_tokens, config.block_size, config.seed)
        self.val_blocks = evaluation_blocks(self.val_tokens, config.block_size)
        most = config.eval_iters * config.batch_size
        self.val_sample = evaluation_blocks(self.val_tokens, config.block_size, most)

        self.iters_per_epoch = self.blocks.per_epoch / (config.batch_size * config.gradient_accumulation_steps)
        self.max_iters = config.max_iters
        if config.epochs is not None:
            self.max_iters = math.ceil(config.epochs * self.iters_per_epoch)
        self.tokens_per_iter = config.batch_size * config.block_size * config.gradient_accumulation_steps

        self.workers, self.blas_threads = choose_threads(
            config.batch_size, config.block_size, config.workers, config.blas_threads
        )
        self.model = GPT(config.gpt_config(self.tokenizer.vocab_size), seed=config.seed)
        self.parallel = DataParallel(self.model, self.workers, self.blas_threads)
        self.optimizer = self._optimizer()
        self.iter = 0
        self.best_loss = math.inf

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
        """Training speed as a share of sgemm_peak: that of the FLOPs which a step needs at least."""
        B, T = self.config.batch_size, self.config.block_size
        return tokens_per_second * self.model.config.training_flops(B, T) / (B * T) / self.sgemm_peak

    def learning_rate(self, iteration):
        config = self.config
        min_lr = config.learning_rate / 10 if config.min_lr is None else config.min_lr
        decay_iters = self.max_iters if config.lr_decay_iters is None else config.lr_decay_iters
        if not config.decay_lr:
            min_lr, decay_iters = config.learning_rate, 0
        return cosine_lr(iteration, config.learning_rate, min_lr, config.warmup_iters, decay_iters)

    def step(self):
        """One update -> (loss, learning rate, gradient norm).

        Raises DivergedError, and leaves the weights as they are, if the loss or the norm is not finite.
        """
        config, n_micro = self.config, self.config.gradient_accumulation_steps
        self.parallel.zero_grad()
        loss = 0.0
        for n in range(self.iter * n_micro, (self.iter + 1) * n_micro):
            x, y = self.blocks.batch(n, config.batch_size)
            seed = np.random.SeedSequence([config.seed, DROPOUT, n]).generate_state(1)[0]
            loss += self.parallel.forward_backward(x, y, seed, weight=1 / n_micro) / n_micro
        norm = self.parallel.gather_grads()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise self._diverged(f"the loss is {loss}, the gradient's norm {norm}")
        lr = self.learning_rate(self.iter)
        self.parallel.update(self.optimizer, lr, clip_scale(norm, config.grad_clip))
        self.iter += 1
        return loss, lr, norm

    def _diverged(self, what):
        return DivergedError(
            f"{what} at iteration {self.iter}. Try a smaller --learning-rate; "
            f"{self.out_dir / BEST} holds the best weights so far"
        )

    def evaluate(self, blocks):
        """Mean loss over evaluation blocks x, y (n, block_size)."""
        x, y = blocks
        total = count = 0
        self.parallel.train(False)
        for i in range(0, len(x), self.config.batch_size):
            part = slice(i, i + self.config.batch_size)
            loss, n = self.parallel.loss(x[part], y[part])
            total, count = total + loss, count + n
        self.parallel.train(True)
        if not math.isfinite(total):
            raise self._diverged(f"the validation loss is {total / count}")
        return total / count

    def sample(self, n_tokens):
        """Iterator of text that the model writes now, from a line break on, if it knows one."""
        start = 0
        if "\n" in getattr(self.tokenizer, "chars", "\n"):
            start = int(self.tokenizer.encode("\n")[0])
        rng = np.random.default_rng([self.config.seed, SAMPLE, self.iter])
        return self.tokenizer.stream(self.model.generate([start], n_tokens, temperature=0.8, rng=rng))

    def run(self):
        """Train to the end; yields a Progress after each logged update and an Evaluation at each evaluation."""
        config = self.config
        self._open_folder()
        with open(self.out_dir / "metrics.jsonl", "w", encoding="utf-8") as log:
            began = logged = time.perf_counter()
            logged_iter, steady = self.iter, None
            while True:
                evaluation = None
                at_end = self.iter >= self.max_iters
                if at_end or self.iter % config.eval_interval == 0:
                    evaluation = self._evaluate_and_save(at_end)
                    yield evaluation
                    if at_end:
                        self._log(log, began, evaluation)
                        return
                    logged, logged_iter = time.perf_counter(), self.iter
                n = self.iter
                with profiling(None if steady is None else self.profile):
                    loss, lr, norm = self.step()
                now = time.perf_counter()
                speed = (self.iter - logged_iter) * self.tokens_per_iter / (now - logged)
                left = None
                if steady is None:
                    steady = (now, self.iter)  # from here on every update takes about the same time
                else:
                    left = (now - steady[0]) / (self.iter - steady[1]) * (self.max_iters - self.iter)
                progress = Progress(n, loss, lr, norm, speed, left)
                self._log(log, began, evaluation, progress)
                if n % config.log_interval == 0:
                    logged, logged_iter = now, self.iter
                    yield progress

    def _log(self, log, began, evaluation, progress=None):
        row = {"iter": self.iter if progress is None else progress.iter}
        row["train_loss"] = None if progress is None else progress.train_loss
        if evaluation is not None:
            row["val_loss"] = evaluation.val_loss
            if evaluation.val_loss_whole is not None:
                row["val_loss_whole"] = evaluation.val_loss_whole
        for name in ("lr", "grad_norm", "tokens_per_second"):
            row[name] = None if progress is None else getattr(progress, name)
        row["elapsed_s"] = round(time.perf_counter() - began, 3)
        try:
            log.write(json.dumps(row) + "\n")
            log.flush()
        except OSError as error:
            raise CheckpointError(f"cannot write {log.name}: {error.strerror}") from None

    def _open_folder(self):
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            (self.out_dir / "metrics.jsonl").touch()
        except OSError as error:
            raise CheckpointError(f"cannot write to the run folder {self.out_dir}: {error.strerror}") from None

    def _evaluate_and_save(self, at_end):
        loss = self.evaluate(self.val_sample)
        is_best = loss < self.best_loss
        names = [LAST]
        if is_best:
            self.best_loss = loss
            names.append(BEST)
        for name in names:
            self.save(name, loss)
        return Evaluation(self.iter, loss, is_best, self.evaluate(self.val_blocks) if at_end else None)

    def save(self, name, val_loss):
        """Write a checkpoint: weights, AdamW's moments, and what is needed to use them."""
        flat, arrays = self.parallel.flat, {}
        for prefix, values in (("", flat.weights), ("adamw.m.", self.optimizer.m), ("adamw.v.", self.optimizer.v)):
            for parameter, view in flat.views(values):
                arrays[prefix + parameter] = view
        state = {
            "iter": self.iter,
            "val_loss": val_loss,
            "best_loss": self.best_loss,
            "train": dataclasses.asdict(self.config),
            "model": dataclasses.asdict(self.model.config),
            "tokenizer": self.tokenizer.to_dict(),
            "data_sha256": self.fingerprint,
        }
        checkpoint.save(self.out_dir / name, arrays, {"format": "npgpt", "npgpt": json.dumps(state)})


def load_model(path):
    """(GPT, tokenizer, state) of a checkpoint file; state is what Trainer.save wrote beside the arrays.

    Raises CheckpointError if the file is not a checkpoint of npgpt.
    """
    arrays, metadata = checkpoint.load(path)
    try:
        state = json.loads(metadata["npgpt"])
        config, tokenizer = GPTConfig(**state["model"]), from_dict(state["tokenizer"])
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise CheckpointError(f"{path} was not written by npgpt.train, or is damaged ({error})") from None
    if config.vocab_size != tokenizer.vocab_size:
        raise CheckpointError(f"{path}: vocab_size {config.vocab_size}, but its tokenizer has {tokenizer.vocab_size}")
    model = GPT(config, seed=None)
    for name, parameter in model.named_parameters():
        if name not in arrays or arrays[name].shape != parameter.shape:
            found = arrays[name].shape if name in arrays else "nothing"
            raise CheckpointError(f"{path}: {name} must have shape {parameter.shape}, found {found}")
        parameter.data[...] = arrays[name]
    return model, tokenizer, state
