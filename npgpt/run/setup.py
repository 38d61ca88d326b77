"""What a run is made of: all that is prepared once, before the first update, in one record."""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from npgpt import __version__, machine
from npgpt.config import DROPOUT, TrainConfig, check_tokenizer
from npgpt.data.batches import Blocks, EvaluationBlocks
from npgpt.data.bpe import from_dict
from npgpt.data.text import open_data
from npgpt.data.tokens import TokenFiles
from npgpt.errors import UsageError
from npgpt.files import folder, hub
from npgpt.kernels import jit
from npgpt.kernels.blas import blas_kernels, blas_threads, sgemm_peak
from npgpt.kernels.matmul import PRODUCTS, quicker_dtype, way
from npgpt.model import GPT
from npgpt.muon import Muon
from npgpt.optim import AdamW, cosine_lr
from npgpt.run import memory
from npgpt.run.audit import Auditor
from npgpt.run.beginning import beginning
from npgpt.run.parallel import DataParallel, choose_threads
from npgpt.run.ranks import World, share
from npgpt.run.state import vocab_size_of
from npgpt.run.tokens import Tokens, TokensChanged, blocks_of, prepare_tokens


@dataclass(frozen=True, eq=False)
class Setup:
    """What a run is made of.  Weights and moments change while it trains; which objects these are does not."""

    config: TrainConfig
    world: World
    numbered: bool  # see Corpus
    n_characters: int | None  # of the text; None if the data is tokens
    n_bytes: int | None
    fingerprint: str  # of the data
    tokenizer: object
    tokens: Tokens
    blocks: Blocks  # of the training tokens
    val_blocks: EvaluationBlocks  # all of the validation split
    val_sample: EvaluationBlocks  # those of each evaluation
    micro_steps: range  # of an update that this rank takes
    sequences: slice  # of each of them that are this rank's
    max_iters: int
    iters_per_epoch: float
    memory_needed: float  # bytes
    workers: int
    blas_threads: int  # of each worker
    dtype: str  # what products round their operands to
    model: GPT
    parallel: DataParallel
    optimizer: AdamW | Muon
    auditor: Auditor | None  # on rank 0

    @property
    def out_dir(self):
        return Path(self.config.out_dir)

    @property
    def tokens_per_iter(self):
        return self.config.batch_size * self.config.block_size * self.config.gradient_accumulation_steps

    @property
    def environment(self):
        """What the bits of a result depend on, besides the settings."""
        return {
            "ranks": self.world.size,
            **versions(),
            "processor": machine.cpu_name(),
            "workers": self.workers,
            "blas_threads": self.blas_threads,
            "blas_kernels": blas_kernels(),
            "products": PRODUCTS,
            "dtype": f"bfloat16 by {way()}" if self.dtype == "bfloat16" else self.dtype,
        }

    def arrays(self):
        """(prefix of the names, flat array) of all that a checkpoint holds."""
        return ("", self.parallel.flat.weights), ("adamw.m.", self.optimizer.m), ("adamw.v.", self.optimizer.v)

    def micro_batches(self, iteration, numbers=None):
        """Micro-steps of an update, by default all: of each x, y (B, T) and the seed of its dropout masks."""
        config, n_micro = self.config, self.config.gradient_accumulation_steps
        for i in range(n_micro) if numbers is None else numbers:
            if self.tokens.changed():
                return
            n = iteration * n_micro + i
            seed = np.random.SeedSequence([config.seed, DROPOUT, n]).generate_state(1)[0]
            yield *self.blocks.batch(n, config.batch_size), seed

    def learning_rate(self, iteration):
        """Of the update after so many others."""
        config = self.config
        min_lr = config.learning_rate / 10 if config.min_lr is None else config.min_lr
        decay_iters = self.max_iters if config.lr_decay_iters is None else config.lr_decay_iters
        if not config.decay_lr:
            min_lr, decay_iters = config.learning_rate, 0
        return cosine_lr(iteration, config.learning_rate, min_lr, config.warmup_iters, decay_iters)

    def mean_loss(self, blocks, stop):
        """Of the weights as they are on EvaluationBlocks, finite or not; ranks take turns at a micro-step's share.

        Raises TokensChanged, and StopNow.
        """
        total, count, B = 0, 0, self.sequences.stop - self.sequences.start
        self.parallel.train(False)
        try:
            for i in range(self.world.rank * B, len(blocks), self.world.size * B):
                if stop.number is not None or self.tokens.changed():
                    break
                loss, n = self.parallel.loss(*blocks[i : i + B])
                total, count = total + loss, count + n
        finally:
            self.parallel.train(True)
        total, count = self.sum(stop, total, count)
        return total / count

    def sum(self, stop, *numbers):
        """World.sum.  Raises TokensChanged, too, on all ranks, if the tokens of one have changed."""
        *totals, gone = self.world.sum(stop, *numbers, self.tokens.changed())
        if gone:
            file = self.tokens.gone or " ".join(self.config.data)
            raise TokensChanged(f"data: {file} was changed while the run read it")
        return totals

    def broadcast(self):
        """Make all that a checkpoint holds what it is on rank 0."""
        for _, values in self.arrays():
            self.world.broadcast(values)

    def brought_together(self):
        """Whether the ranks' weights were no longer the same; then all have those of rank 0 now."""
        drifted = not self.world.all_same(self.parallel.flat.weights)
        if drifted:
            self.broadcast()
        return drifted

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


def prepare(config, world, stop, overwrite=False, force=False, origin=None):
    """The Setup of a run, as it is before the first update.  Raises UsageError and CheckpointError.

    overwrite, force as for a Trainer; origin: the Origin that the run goes on from, if it does.
    """
    if origin is None:
        world.first(lambda: _refuse(config, overwrite))
    world.check_same(versions())
    n_micro = config.gradient_accumulation_steps
    micro_steps, sequences = world.agree(lambda: share(world.rank, world.size, n_micro, config.batch_size))
    numbered = origin is None or bool(origin.state.get("numbered"))  # see Corpus; earlier versions do not say it
    mine, told = world.first_keeps(lambda: _read_data(config, stop, force, numbered, origin))
    data, model, tokenizer = mine or (None, None, None)
    words, vocab_size, n_characters, n_bytes, fingerprint, most_tokens = told
    tokenizer = world.agree(lambda: from_dict(words) if tokenizer is None else tokenizer)
    n_sequences = sequences.stop - sequences.start
    workers, blas = choose_threads(n_sequences, config.block_size, config.workers, config.blas_threads, world.cores)
    needed = functools.partial(memory.of_rank, config, world, vocab_size, n_sequences, workers)
    world.agree(lambda: memory.check(needed(most_tokens), world, force))
    tokens = prepare_tokens(config, world, data, tokenizer, fingerprint)
    memory_needed = memory.total(needed(len(tokens)))
    blocks, val_blocks = blocks_of(config, tokens.train, tokens.val)
    val_sample = EvaluationBlocks(tokens.val, config.block_size, config.eval_iters * config.batch_size)
    iters_per_epoch = blocks.per_epoch / (config.batch_size * n_micro)
    max_iters = config.max_iters if config.epochs is None else math.ceil(config.epochs * iters_per_epoch)
    model = model or GPT(config.gpt_config(vocab_size), seed=config.seed)
    model.tokenizer = tokenizer
    dtype = world.first(lambda: quicker_dtype(config.n_embd) if config.dtype == "auto" else config.dtype)
    parallel = DataParallel(model, workers, blas, world, dtype)
    audits = config.gradcheck_every and world.rank == 0
    return Setup(
        config=config, world=world, numbered=numbered, n_characters=n_characters, n_bytes=n_bytes,
        fingerprint=fingerprint, tokenizer=tokenizer, tokens=tokens, blocks=blocks, val_blocks=val_blocks,
        val_sample=val_sample, micro_steps=micro_steps, sequences=sequences, max_iters=max_iters,
        iters_per_epoch=iters_per_epoch, memory_needed=memory_needed, workers=workers, blas_threads=blas, dtype=dtype,
        model=model, parallel=parallel, optimizer=_optimizer(config, parallel.flat),
        auditor=Auditor(parallel, config.gradcheck_entries) if audits else None,
    )  # fmt: skip


def versions():
    """Of what the ranks of a run must have the same."""
    kernels = f"numba {jit.numba.__version__}" if jit.KERNELS == "numba" else jit.KERNELS
    return {"npgpt": __version__, "numpy": np.__version__, "kernels": kernels}


def _refuse(config, overwrite):
    """Raise UsageError if a new run cannot begin."""
    out_dir = Path(config.out_dir)
    if not overwrite:
        folder.refuse_earlier_run(out_dir)
    if not folder.checkpoints(out_dir) and (out_dir / hub.CONFIG).exists():
        words = "as a Hugging Face folder does; name another folder: one model would hide the other"
        raise UsageError(f"--out-dir {out_dir} holds a {hub.CONFIG}, {words}")
    check_tokenizer(config)


def _read_data(config, stop, force, numbered, origin):
    """((data, model to begin with or None, tokenizer), what the other ranks are told of them), on rank 0."""
    # a run that is resumed has its data as they were when it was begun, whatever they look like
    data = open_data(config.data, stop, force or origin is not None, numbered)
    out_dir = Path(config.out_dir)
    texts = [] if isinstance(data, TokenFiles) else [Path(source).resolve() for source in config.data]
    if out_dir.is_dir() and out_dir.resolve() in texts:
        raise UsageError(f"--out-dir {out_dir} is --data as well, but a run is no text; name another")
    if origin is None:
        model, tokenizer = beginning(config, data, stop)
        vocab_size = tokenizer.vocab_size if model is None else model.config.vocab_size
    else:
        _check_same_text(config, origin.state, data)
        model, tokenizer = None, from_dict(origin.state.get("tokenizer"))
        vocab_size = max(tokenizer.vocab_size, vocab_size_of(origin.state))
    most_tokens = len(data.train) + len(data.val) if isinstance(data, TokenFiles) else data.n_bytes
    told = tokenizer.to_dict(), vocab_size, data.n_characters, data.n_bytes, data.fingerprint, most_tokens
    return (data, model, tokenizer), told


def _check_same_text(config, state, data):
    """Raise UsageError if the data is not what the run of a checkpoint was begun with."""
    if state.get("data_sha256") == data.fingerprint:
        return
    was, now = state.get("n_characters"), data.n_characters
    both = isinstance(was, int) and isinstance(now, int)  # token files have no characters
    lengths = f"it had {was:,} characters, now there are {now:,} " if both else ""
    hashes = f"(sha256 {str(state.get('data_sha256'))[:8]}..., now {data.fingerprint[:8]}...)"
    lead = f"data: {' '.join(config.data)} is not the text that the run in {config.out_dir} was begun with"
    raise UsageError(f"{lead}: {lengths}{hashes}")


def _optimizer(config, flat):
    options = dict(beta1=config.beta1, beta2=config.beta2, weight_decay=config.weight_decay)
    if config.optimizer == "adamw":
        return AdamW(flat, **options)
    rate = config.muon_learning_rate / config.learning_rate if config.learning_rate else 0.0
    return Muon(flat, rate, config.muon_momentum, **options)
