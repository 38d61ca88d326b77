"""Every setting of a run: its name, default and meaning, in one place.  The command line is made from it.

This file needs the standard library only, so that `--help` answers before NumPy and Numba are loaded.
"""

import difflib
import math
import os
import typing
from dataclasses import dataclass, field, fields

from npgpt.errors import UsageError, user_path

# Every random choice is drawn from [the run's seed, one of these, a step], so that no two kinds share their numbers.
# From 1 on: for NumPy [seed, 0] is the same as [seed], which others may use.
INIT, ORDER, DROPOUT, SAMPLE, AUDIT = 1, 2, 3, 4, 5

DTYPES = ("float32", "bfloat16")  # what products of float32 round their operands to
TOKENIZERS = ("char", "byte", "bpe")  # the setting `tokenizer`, if it is no file
MOST = 10**15  # no setting that is a whole number is larger
LEAST_RATE = 1e-30  # of a smaller one Muon's rate is no finite multiple
BPE_VOCAB_SIZE = 4096  # what bpe learns if nobody says how many


def _setting(default, text, low=None, above=None, high=None, below=None, choices=None, is_path=False):
    """A field with its help text, the range it must lie in, and whether it names a file or folder."""
    limits = dict(low=low, above=above, high=high, below=below, choices=choices)
    return field(default=default, metadata=dict(help=text, is_path=is_path, **limits))


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT, with GPT-2's and nanoGPT's names."""

    block_size: int = _setting(64, "longest context, in tokens", low=1)
    vocab_size: int = _setting(50257, "number of different tokens", low=1)
    n_layer: int = _setting(4, "number of transformer blocks", low=1)
    n_head: int = _setting(4, "number of attention heads; must divide n_embd", low=1)
    n_embd: int = _setting(128, "width of the model", low=1)
    dropout: float = _setting(0.0, "probability of dropping an activation in training", low=0, below=1)
    bias: bool = _setting(False, "biases in the linear layers and layer norms, as in GPT-2")

    def __post_init__(self):
        check_ranges(self)
        if self.n_embd % self.n_head:
            raise UsageError(f"n_embd = {self.n_embd} must be divisible by n_head = {self.n_head}")

    def training_flops(self, B, T):
        """Multiplications and additions in the matrix products of one training step with B sequences of T tokens.

        Linear layers, the tied output layer among them: one product forward and two backward (dx and dweight), each of
        2 FLOPs per row and weight, so 6 N params for N = B T rows.  A block has 12 C^2 such weights: 3 C^2 for q, k, v,
        C^2 for the attention's output, 8 C^2 for the MLP.  Looking up an embedding multiplies nothing.

        Attention: two products forward (q k^T, p v) and four backward (dp, dv, dq, dk), each of 2 hs FLOPs for each
        head and pair of a query and a key, so 12 C per pair.  What had to be done counts: the T (T + 1) / 2 pairs that
        the causal mask leaves, and q k^T once, though a backward makes it a second time.
        """
        C = self.n_embd
        linear = 6 * B * T * (self.n_layer * 12 * C * C + self.vocab_size * C)
        attention = self.n_layer * B * 12 * C * T * (T + 1) // 2
        return linear + attention


def _setting_of_gpt(name):
    """A field as GPTConfig has it, with the same default, help text and range."""
    same = next(f for f in fields(GPTConfig) if f.name == name)
    return field(default=same.default, metadata=same.metadata)


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run.  The defaults are the preset `default`."""

    data: tuple = _setting(
        ("pydoc",),
        "corpus: pydoc, shakespeare, or text files and folders of them; or a folder with train.bin and val.bin, "
        "tokens as nanoGPT prepares them",
        is_path=True,
    )
    tokenizer: str = _setting(
        "char",
        "what a token is: char, byte, bpe (learnt from the corpus), or a file: tokenizer.json, vocab.json with "
        "merges.txt beside it, or a text whose characters are the tokens",
        is_path=True,
    )
    vocab_size: int | None = _setting(None, "number of tokens that bpe learns; by default 4096", low=257, high=10**6)
    val_fraction: float = _setting(0.1, "share of the text, at its end, held back for validation", above=0, below=1)
    out_dir: str = _setting("out", "run folder for checkpoints and metrics.jsonl", is_path=True)

    init_from: str | None = _setting(
        None, "run folder, checkpoint or Hugging Face GPT-2 folder to begin with", is_path=True
    )
    n_layer: int = _setting_of_gpt("n_layer")
    n_head: int = _setting_of_gpt("n_head")
    n_embd: int = _setting_of_gpt("n_embd")
    block_size: int = _setting_of_gpt("block_size")
    dropout: float = _setting_of_gpt("dropout")
    bias: bool = _setting_of_gpt("bias")

    batch_size: int = _setting(12, "sequences per micro-step", low=1)
    gradient_accumulation_steps: int = _setting(1, "micro-steps per update", low=1)
    max_iters: int = _setting(2400, "number of updates", low=0)
    epochs: float | None = _setting(None, "passes over the training text, instead of max_iters", above=0, high=1e9)

    optimizer: str = _setting("muon", "AdamW, or Muon for the blocks' matrices", choices=("adamw", "muon"))
    learning_rate: float = _setting(4e-3, "peak learning rate", low=0)
    min_lr: float | None = _setting(None, "learning rate at the end of the decay; by default learning_rate / 10", low=0)
    decay_lr: bool = _setting(True, "decay the learning rate along a cosine")
    warmup_iters: int = _setting(20, "updates over which the learning rate rises from 0", low=0)
    lr_decay_iters: int | None = _setting(None, "update at which min_lr is reached; by default the last one", low=0)
    muon_learning_rate: float = _setting(0.03, "peak learning rate of Muon's matrices", low=0)
    muon_momentum: float = _setting(0.95, "decay of Muon's mean of gradients", above=0, below=1)
    weight_decay: float = _setting(0.1, "AdamW's weight decay, on matrices only", low=0)
    beta1: float = _setting(0.9, "decay of AdamW's mean of gradients", low=0, below=1)
    beta2: float = _setting(0.99, "decay of AdamW's mean of squared gradients", low=0, below=1)
    grad_clip: float = _setting(1.0, "longest gradient, all parameters together (0: no clipping)", low=0)

    eval_interval: int = _setting(400, "updates between evaluations", low=1)
    patience: int | None = _setting(None, "stop after so many evaluations without a new best", low=1)
    keep: int = _setting(2, "checkpoints kept, the newest ones; the best is kept besides", low=1)
    save_minutes: float = _setting(
        10.0, "minutes between saves of the whole state, beside those at evaluations (0: none)", low=0, high=1e6
    )
    eval_iters: int = _setting(20, "validation batches per evaluation", low=1)
    log_interval: int = _setting(50, "updates between progress lines", low=1)
    gradcheck_every: int = _setting(
        0, "updates between audits of the gradient, which end the run if it is wrong (0: none)", low=0
    )
    gradcheck_entries: int = _setting(2, "entries of each tensor that an audit looks at one by one", low=0, high=10_000)
    sample_tokens: int = _setting(120, "length of the sample at each evaluation, in tokens (0: none)", low=0)
    final_sample_tokens: int = _setting(600, "length of the sample at the end, in tokens (0: none)", low=0)

    dtype: str = _setting(
        "auto", "what matrix products round their operands to: float32, bfloat16, or auto: bfloat16 where this "
        "processor has a quick instruction for it; weights, sums and all else stay float32", choices=(*DTYPES, "auto"),
    )  # fmt: skip
    seed: int = _setting(1337, "what every random choice is made from", low=0, high=2**32 - 1)
    workers: int | None = _setting(None, "threads that share each batch; by default chosen for this machine", low=1)
    blas_threads: int | None = _setting(None, "threads of each matrix product; by default chosen too", low=1, high=4096)

    def __post_init__(self):
        if self.dtype in ("float16", "fp16", "half"):
            raise UsageError(f"dtype: of 16 bits there is bfloat16 here, not {self.dtype}")
        check_ranges(self)
        self.gpt_config(vocab_size=1)
        if 0 < self.learning_rate < LEAST_RATE:
            raise UsageError(f"learning_rate must be 0 or at least {LEAST_RATE:g}, got {self.learning_rate}")

    def gpt_config(self, vocab_size):
        """The GPTConfig of this run; vocab_size is that of its tokenizer."""
        names = {f.name for f in fields(GPTConfig)} - {"vocab_size"}
        return GPTConfig(vocab_size=vocab_size, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Controls:
    """How the next token is chosen, in the order in which npgpt/generate/sampling.py goes by them."""

    repetition_penalty: float = _setting(1.0, "above 1: tokens that the text has already are less likely", above=0)
    temperature: float = _setting(1.0, "0 takes the likeliest token, 1 is as learnt, more is wilder", low=0)
    top_k: int | None = _setting(None, "only so many tokens, the likeliest ones", low=1)
    top_p: float | None = _setting(None, "only the likeliest tokens, which have this probability", above=0, high=1)
    min_p: float | None = _setting(None, "only tokens with this share of the likeliest's probability", low=0, high=1)

    def __post_init__(self):
        check_ranges(self)


PRESETS = {
    "default": ("about two minutes on two cores", {}),
    "nanogpt-cpu": (
        "the CPU recipe of nanoGPT's README: shakespeare, 0.8M parameters",
        dict(
            data=("shakespeare",), n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, dropout=0.0,
            max_iters=2000, lr_decay_iters=2000, learning_rate=1e-3, min_lr=1e-4, warmup_iters=100, beta2=0.99,
            optimizer="adamw", weight_decay=0.1, eval_interval=250, eval_iters=20, log_interval=1,
        ),
    ),
    "nanogpt-gpu": (
        "nanoGPT's config/train_shakespeare_char.py: 10.7M parameters, hours on a CPU",
        dict(
            data=("shakespeare",), n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, dropout=0.2,
            max_iters=5000, lr_decay_iters=5000, learning_rate=1e-3, min_lr=1e-4, warmup_iters=100, beta2=0.99,
            optimizer="adamw", weight_decay=0.1, eval_interval=250, eval_iters=200, log_interval=10,
        ),
    ),
    "speedrun": (
        "nanogpt-cpu's model to the same loss with Muon, in a quarter of the iterations",
        dict(
            data=("shakespeare",), n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, dropout=0.0,
            max_iters=440, optimizer="muon", learning_rate=5e-3, muon_learning_rate=0.04, muon_momentum=0.85,
            min_lr=4e-4, warmup_iters=10, beta2=0.99, weight_decay=0.0, eval_interval=220, eval_iters=20,
        ),
    ),
    "gpt2": (
        "the shape and schedule of GPT-2 124M",
        dict(
            n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=4, gradient_accumulation_steps=8, bias=True,
            dropout=0.0, max_iters=600000, lr_decay_iters=600000, learning_rate=6e-4, min_lr=6e-5, warmup_iters=2000,
            beta2=0.95, optimizer="adamw", weight_decay=0.1, eval_interval=1000, eval_iters=20, log_interval=1,
        ),
    ),
}  # fmt: skip


# What the command line takes where a run begins with a model: rates for one that knows nothing yet would ruin it.
FINE_TUNING = dict(optimizer="adamw", learning_rate=3e-5, muon_learning_rate=2e-4)
FAR = 10  # times these rates are worth a line

_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def _converted(value, kind, name):
    """A setting's value as the type that it must have.  NumPy's numbers and paths are fine; raises UsageError."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if kind is tuple:
        values = value if isinstance(value, (tuple, list)) else [value]  # a text is one source, not one for each letter
        return tuple(_converted(item, str, name) for item in values)
    if kind is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if kind is float and type(value) is int:
        value = float(value) if abs(value) <= MOST else math.inf
    if type(value) is not kind:
        raise UsageError(f"{name} must be {_KINDS[kind]}, got {value!r}, of type {type(value).__name__}")
    return value


def check_ranges(config):
    """Give each field of a config its type; raise UsageError for the first that cannot have it, or is out of range."""
    hints = typing.get_type_hints(type(config))
    for f in fields(config):
        value, limits = getattr(config, f.name), f.metadata
        kinds = typing.get_args(hints[f.name]) or (hints[f.name],)
        if value is None and type(None) in kinds:
            continue
        value = _converted(value, kinds[0], f.name)
        if limits["is_path"]:
            value = user_path(value, f.name) if isinstance(value, str) else tuple(user_path(v, f.name) for v in value)
        object.__setattr__(config, f.name, value)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{f.name} must be a finite number, got {value}")
        if limits["choices"] is not None and value not in limits["choices"]:
            raise UsageError(f"{f.name} must be one of {', '.join(limits['choices'])}, got {value!r}")
        for limit, holds, words in (
            ("low", lambda v, x: v >= x, "at least"),
            ("above", lambda v, x: v > x, "greater than"),
            ("high", lambda v, x: v <= x, "at most"),
            ("below", lambda v, x: v < x, "less than"),
        ):
            if limits[limit] is not None and not holds(value, limits[limit]):
                raise UsageError(f"{f.name} must be {words} {limits[limit]}, got {value}")
        if isinstance(value, int) and value > MOST:
            raise UsageError(f"{f.name} must be at most {MOST:,}, got a number of {len(str(value))} digits")


def check_tokenizer(config):
    """Raise UsageError if a new run (a resumed one has its own) cannot have the tokenizer that a TrainConfig names."""
    tokenizer = config.tokenizer
    if config.vocab_size is not None and tokenizer != "bpe":
        raise UsageError(f"vocab_size is for --tokenizer bpe; with {tokenizer} the tokens are what they are")
    if tokenizer not in TOKENIZERS and not os.path.exists(tokenizer):
        close = difflib.get_close_matches(tokenizer, TOKENIZERS, 1)
        hint = f". Did you mean {close[0]}?" if close else ""
        names = ", ".join(TOKENIZERS)
        raise UsageError(f"tokenizer must be one of {names}, or a file; there is no file {tokenizer!r}{hint}")


def preset(name):
    """The settings of a preset, as a dict; UsageError for an unknown name."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UsageError(f"unknown preset {name!r}.{hint} There are: {', '.join(PRESETS)}")
    return PRESETS[name][1]


def composed(name, given, new=True):
    """The settings of a run as a dict: those of a preset (or None), and what is given beside it.  Raises UsageError.

    Settings of a preset that belong together follow the given ones: the decay ends with the run, min_lr is the same
    share of the learning rate, and the warm-up is a tenth of the run at most.
    """
    base = preset(name) if name else {}
    settings, followed = {**base, **given}, base.keys() - given.keys()
    if "lr_decay_iters" in followed and ("max_iters" in given or "epochs" in given):
        settings["lr_decay_iters"] = None
    if "warmup_iters" in followed and "max_iters" in given:
        settings["warmup_iters"] = min(base["warmup_iters"], given["max_iters"] // 10)
    if "min_lr" in followed and "learning_rate" in given:
        settings["min_lr"] = base["min_lr"] / base["learning_rate"] * given["learning_rate"]
    if new and name is None and settings.get("init_from") is not None:
        settings = {**FINE_TUNING, **settings}
    return settings


def contradictions(config, max_iters):
    """A line for each two settings of a TrainConfig that do not go together: which of them wins."""
    rate, warmup, decay = config.learning_rate, config.warmup_iters, config.lr_decay_iters
    if warmup >= max_iters >= 100:  # (of a shorter trial nobody expects anything)
        yield (
            f"warmup_iters = {warmup:,} is not over when the run ends, after {max_iters:,} updates: the learning rate "
            f"reaches {rate * max_iters / (warmup + 1):.2g} of {rate:g}"
        )
    elif config.decay_lr and decay is not None and decay <= warmup < max_iters:
        yield f"lr_decay_iters = {decay:,} is not beyond warmup_iters = {warmup:,}: after these it is min_lr at once"
    if config.decay_lr and config.min_lr is not None and config.min_lr > rate:
        yield f"min_lr = {config.min_lr:g} is above learning_rate = {rate:g}: the rate rises to it"
    if config.init_from is not None:
        for name in ("learning_rate", "muon_learning_rate")[: 1 + (config.optimizer == "muon")]:
            times = getattr(config, name) / FINE_TUNING[name]
            if times >= FAR:
                yield (
                    f"{name} = {getattr(config, name):g} is {times:,.0f} times {FINE_TUNING[name]:g}, which suits a "
                    f"model that has learnt: it may forget what it knows"
                )
