"""Random models through everything that the library does with a model: right, or refused in one line.

    python tests/fuzz_library.py [--models 2000] [--first 0] [--show]

Model number n is made by seed n: a small GPT, and some random changes, before workers and an optimizer know it and
after.  It goes through forward, backward, updates with 1 and with 2 workers, writing with and without the cache, and a
Hugging Face folder.  Logits, losses and gradients must be those of the same model in float64, to 1e-4 of their largest,
or a line must say why not.  Prints a line for each model that does something else.

Exit codes: 0 all is well, 1 something was wrong, or a process crashed, 2 bad arguments.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from npgpt import GPT, AdamW, DataParallel, GPTConfig, Tensor, no_grad
from npgpt.model import Block
from npgpt.muon import Muon
from npgpt.nn import MLP, LayerNorm, Linear, Module, Parameter

BOUND = 1e-4  # of the largest number


class Wrong(Exception):
    """Something was silently wrong."""


# --------------------------------------------------------------------------------------------------------------------
# Models


class Relu(Module):
    """An MLP of another kind, with the names and shapes of the usual one."""

    def __init__(self, mlp):
        self.c_fc, self.c_proj = mlp.c_fc, mlp.c_proj

    def forward(self, x):
        return self.c_proj(self.c_fc(x).relu())


class Scaled(Module):
    """Another module, times a number that is learnt."""

    def __init__(self, inner):
        self.inner, self.scale = inner, Parameter(np.full(1, 0.7, np.float32))

    def forward(self, x):
        return self.inner(x) * self.scale


class Nothing(Module):
    def forward(self, x):
        return x


class Louder(GPT):
    def forward(self, idx, targets=None):
        logits, loss = super().forward(idx, targets)
        return logits * 2.0, loss


def model_of(rng):
    n_head = int(rng.integers(1, 3))
    config = GPTConfig(
        vocab_size=int(rng.integers(5, 14)), block_size=int(rng.integers(4, 9)), n_layer=int(rng.integers(1, 4)),
        n_head=n_head, n_embd=n_head * int(rng.choice([4, 6, 8])), bias=bool(rng.integers(2)),
    )  # fmt: skip
    model = (Louder if rng.random() < 0.05 else GPT)(config, seed=int(rng.integers(100)))
    for p in model.parameters():
        p.data += rng.normal(0, 0.2, p.shape).astype(np.float32)
    return model.eval()


def places(model):
    """(module, attribute) of each place that holds a parameter."""
    found = [(model, name) for name, value in vars(model).items() if isinstance(value, Parameter)]
    for _, child in model.children():
        found += places(child)
    return found


def modules(model):
    """(module, attribute, module there) of each module."""
    found = []
    for name, value in vars(model).items():
        if isinstance(value, Module):
            found += [(model, name, value), *modules(value)]
        elif isinstance(value, list):
            for item in value:
                if isinstance(item, Module):
                    found += modules(item)
    return found


# --------------------------------------------------------------------------------------------------------------------
# Changes: each takes a random generator and a model


def pick(rng, items):
    items = list(items)
    return items[int(rng.integers(len(items)))]


def numbers(rng, shape, dtype=np.float32):
    return rng.normal(0, 0.3, shape).astype(dtype)


def new_numbers(rng, model):
    p = pick(rng, model.parameters())
    p.data = numbers(rng, p.shape)


def numbers_in_place(rng, model):
    p = pick(rng, model.parameters())
    p.data[...] = numbers(rng, p.shape)
    p.data *= np.float32(0.9)


def another_shape(rng, model):
    p = pick(rng, model.parameters())
    p.data = pick(
        rng, [p.data[: max(1, len(p.data) // 2)].copy(), p.data.T.copy(), np.concatenate([p.data, p.data]), p.data[:0]]
    )


def another_dtype(rng, model):
    p = pick(rng, model.parameters())
    p.data = p.data.astype(pick(rng, [np.float64, np.float16, np.int32]))


def another_layout(rng, model):
    p = pick(rng, model.parameters())
    wide = np.repeat(p.data, 2, axis=-1)
    p.data = pick(rng, [np.asfortranarray(p.data), wide[..., ::2], p.data[::-1].copy()[::-1]])


def read_only(rng, model):
    p = pick(rng, model.parameters())
    values = p.data.copy()
    values.flags.writeable = False
    p.data = values


def memory_of_another(rng, model):
    a, b = pick(rng, model.parameters()), pick(rng, model.parameters())
    if a.data.size >= b.data.size:
        b.data = a.data.reshape(-1)[: b.data.size].reshape(b.shape)


def new_parameter(rng, model):
    module, name = pick(rng, places(model))
    shape = getattr(module, name).shape
    kind = pick(rng, [np.float32, np.float32, np.float64])
    setattr(module, name, Parameter(numbers(rng, pick(rng, [shape, shape, shape, shape[::-1], (3,)]), kind)))


def something_else(rng, model):
    module, name = pick(rng, places(model))
    values = numbers(rng, getattr(module, name).shape)
    setattr(module, name, pick(rng, [values, Tensor(values), Tensor(values, requires_grad=True), 1.0]))


def no_parameter(rng, model):
    module, name = pick(rng, places(model))
    setattr(module, name, None)


def deleted(rng, model):
    module, name = pick(rng, places(model))
    delattr(module, name)


def frozen(rng, model):
    for p in model.parameters():
        if rng.random() < 0.4:
            p.requires_grad = False


def shared_parameter(rng, model):
    module, name = pick(rng, places(model))
    other, other_name = pick(rng, places(model))
    if getattr(module, name).shape == getattr(other, other_name).shape:
        setattr(module, name, getattr(other, other_name))


def shared_module(rng, model):
    h = model.transformer.h
    h[int(rng.integers(len(h)))] = pick(rng, h)


def one_more_block(rng, model):
    block = copy.deepcopy(pick(rng, model.transformer.h)) if rng.random() < 0.5 else Block(model.config, np.float32)
    model.transformer.h.insert(int(rng.integers(len(model.transformer.h) + 1)), block)


def one_block_less(rng, model):
    del model.transformer.h[int(rng.integers(len(model.transformer.h)))]


def blocks_turned(rng, model):
    model.transformer.h = model.transformer.h[::-1]


def own_module(rng, model):
    parent, name, module = pick(rng, modules(model))
    if isinstance(module, MLP) and rng.random() < 0.5:
        setattr(parent, name, Relu(module))
    elif isinstance(module, (MLP, LayerNorm, Linear)):
        setattr(parent, name, Scaled(module))


def no_module(rng, model):
    block = pick(rng, model.transformer.h)
    setattr(block, pick(rng, ["ln_1", "ln_2", "mlp", "attn"]), pick(rng, [Nothing(), Nothing(), None]))


def own_forward(rng, model):
    module = pick(rng, model.transformer.h)
    forward = module.forward
    module.forward = lambda x: forward(x) * 0.5


def other_heads(rng, model):
    attn = pick(rng, model.transformer.h).attn
    attn.n_head = int(rng.choice([1, 2, 3, 4]))


def cropped(rng, model):
    model.crop_block_size(int(rng.integers(1, model.config.block_size + 1)))


def other_config(rng, model):
    name = pick(rng, ["vocab_size", "block_size", "n_layer", "n_head", "n_embd", "bias"])
    value = getattr(model.config, name)
    model.config = dataclasses.replace(
        model.config, **{name: not value if name == "bias" else max(1, value + int(rng.integers(-2, 3)))}
    )


def own_head(rng, model):
    model.lm_head.weight = Parameter(numbers(rng, model.lm_head.weight.shape))


def modes(rng, model):
    for _, _, module in modules(model):
        if rng.random() < 0.3:
            module.train(bool(rng.integers(2)))


CHANGES = [
    new_numbers, numbers_in_place, another_shape, another_dtype, another_layout, read_only, memory_of_another,
    new_parameter, something_else, no_parameter, deleted, frozen, shared_parameter, shared_module, one_more_block,
    one_block_less, blocks_turned, own_module, no_module, own_forward, other_heads, cropped, other_config, own_head,
    modes,
]  # fmt: skip

# --------------------------------------------------------------------------------------------------------------------
# What the model in float64 says


@contextlib.contextmanager
def in_float64(model):
    """Within this context the model's parameters are in float64, and have no place in an optimizer."""
    homes = [(p, p.data, p.grad, p.grad_buffer) for p in model.parameters()]
    for p, data, _, _ in homes:
        p.move(np.array(data, np.float64), None)
    try:
        yield
    finally:
        for p, data, grad, place in homes:
            p.move(data, place)
            p.grad = grad


def expected(model, x, y):
    """Logits, loss, and name -> gradient (0 of what is frozen), in float64."""
    with in_float64(model):
        logits, loss = model(x, y)
        if loss.requires_grad:
            loss.backward()
        gradients = {
            name: np.zeros(p.shape) if p.grad is None else p.grad.copy() for name, p in model.named_parameters()
        }
    return logits.data, loss.item(), gradients


def compare(what, ours, exact):
    ours, exact = np.asarray(ours), np.asarray(exact)
    if ours.shape != exact.shape:
        raise Wrong(f"{what}: shape {ours.shape}, not {exact.shape}")
    largest = np.abs(exact).max(initial=0)
    off = np.abs(ours - exact).max(initial=0)
    if not off <= BOUND * max(largest, 1e-6):
        raise Wrong(f"{what} is off by {off:.2g}, where the largest is {largest:.2g}")


# --------------------------------------------------------------------------------------------------------------------
# The ways through the library


class Trial:
    """One model on its way.  refusals: (step, what was said) of each line that refused one."""

    def __init__(self, seed):
        self.rng, self.refusals, self.changes = np.random.default_rng(seed), [], []
        self.model = model_of(self.rng)
        config = self.model.config
        tokens = self.rng.integers(0, config.vocab_size, (4, config.block_size + 1))
        self.x, self.y = tokens[:, :-1], tokens[:, 1:]

    @contextlib.contextmanager
    def step(self, name):
        """Within this context an error counts as a refusal, if it is one line."""
        try:
            yield
        except Wrong as error:
            raise Wrong(f"{name}: {error}") from None
        except Exception as error:
            line = f"{type(error).__name__}: {error}"
            if "\n" in line or len(line) > 400:
                raise Wrong(f"{name}: more than a line: {line[:300]!r}") from None
            self.refusals.append((name, line))

    def change(self, most):
        for _ in range(int(self.rng.integers(most + 1))):
            change = pick(self.rng, CHANGES)
            self.changes.append(change.__name__)
            with self.step(change.__name__):
                change(self.rng, self.model)

    def run(self):
        self.change(3)
        self.alone()
        for workers in (1, 2):
            self.trained(workers)
        self.written()
        self.saved()

    def alone(self):
        exact = None
        with self.step("float64"):
            exact = expected(self.model, self.x, self.y)
        self.model.zero_grad()
        with self.step("forward"):
            logits, loss = self.model(self.x, self.y)
            self.same("forward", exact, logits=logits.data, loss=loss.item())
            if loss.requires_grad:
                loss.backward()
                for name, p in self.model.named_parameters():
                    grad = np.zeros(p.shape) if p.grad is None else p.grad
                    self.same("backward", exact, **{name: grad})
        self.model.zero_grad()

    def same(self, what, exact, **ours):
        if exact is None:
            raise Wrong(f"{what} answers where float64 refuses: {self.refusals[-1]}")
        for name, value in ours.items():
            known = {"logits": exact[0], "loss": exact[1]}
            wanted = known[name] if name in known else exact[2][name]
            with np.errstate(invalid="ignore"):
                compare(f"{what}, {name}", value, wanted)

    def trained(self, workers):
        with self.step(f"{workers} workers"):
            parallel = DataParallel(self.model, workers)
            optimizer = AdamW(parallel.flat)
            with contextlib.suppress(ValueError):  # there may be no matrices for it
                if self.rng.random() < 0.5:
                    optimizer = Muon(parallel.flat, 1.0)
            try:
                for _ in range(2):
                    exact = None
                    with self.step("float64"):
                        exact = expected(self.model, self.x, self.y)
                    parallel.zero_grad()
                    loss = parallel.forward_backward(self.x, self.y)
                    parallel.gather_grads()
                    self.same(f"{workers} workers", exact, loss=loss, **dict(parallel.flat.views(parallel.flat.grads)))
                    if self.rng.random() < 0.5:
                        self.change(1)
                    held = [(p, p.data.tobytes()) for p in self.model.parameters() if not p.requires_grad]
                    parallel.update(optimizer, 1e-3, 1.0)
                    if any(p.data.tobytes() != before for p, before in held):
                        raise Wrong("what is frozen has moved")
                    exact = None
                    with self.step("float64"):
                        exact = expected(self.model, self.x, self.y)
                    total, count = parallel.loss(self.x, self.y)
                    self.same(f"{workers} workers' loss", exact, loss=total / count)
            finally:
                parallel.close()

    def written(self):
        prompt = self.x[0, : 1 + len(self.x[0]) // 2].tolist()
        n = max(0, min(self.x.shape[1], self.model.config.block_size) - len(prompt))  # so that the context is all of it
        written = {}
        for cache in (True, False):
            with self.step(f"written, cache={cache}"):
                tokens = prompt + list(self.model.generate(prompt, n, cache=cache, temperature=0))
                for i in range(len(prompt), len(tokens)):
                    with in_float64(self.model), no_grad():
                        logits = self.model(np.array([tokens[:i]]))[0].data[0, -1]
                    if not logits[tokens[i]] >= logits.max() - BOUND * np.abs(logits).max():
                        raise Wrong(f"token {i} is {tokens[i]}, with {logits[tokens[i]]:.4f} of {logits.max():.4f}")
                written[cache] = [*self.model.generate(prompt, 12, cache=cache, rng=1)]  # beyond the context, too
                if not all(0 <= token < self.model.config.vocab_size for token in written[cache]):
                    raise Wrong(f"tokens {written[cache]}")
        if len(written) == 1:
            raise Wrong(f"only cache={next(iter(written))} writes: {self.refusals[-1]}")

    def saved(self):
        with tempfile.TemporaryDirectory() as folder, self.step("saved"):
            self.model.save_pretrained(folder)
            again = GPT.from_pretrained(folder)
            exact = None
            with self.step("float64"):
                exact = expected(self.model, self.x, self.y)
            self.same("saved", exact, logits=again(self.x)[0].data)


# --------------------------------------------------------------------------------------------------------------------


def run(first, models, show):
    """Run these models in this process, and say what was wrong: 0 or 1."""
    wrong, said = 0, collections.Counter()
    for seed in range(first, first + models):
        print(f"#{seed}", flush=True)
        trial = Trial(seed)
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                trial.run()
        except Wrong as error:
            wrong += 1
            print(f"model {seed}, {', '.join(trial.changes)}: {error}", flush=True)
        said.update(f"{step}: {re.sub('[0-9]+', 'N', line)}" for step, line in trial.refusals)
        if not trial.refusals:
            said["nothing was refused"] += 1
    if show:
        for line, n in said.most_common():
            print(f"{n:6} {line}")
    return 1 if wrong else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first one")
    parser.add_argument("--show", action="store_true", help="print what was refused, and how often")
    parser.add_argument("--here", action="store_true", help="in this process: a crash ends it")
    args = parser.parse_args()
    if args.here:
        return run(args.first, args.models, args.show)
    seed, end, wrong, crashes = args.first, args.first + args.models, 0, 0
    while seed < end:
        command = [sys.executable, __file__, "--here", "--first", str(seed), "--models", str(end - seed)]
        done = subprocess.run(command + ["--show"] * args.show, capture_output=True, encoding="utf-8")
        lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
        print("\n".join(lines), flush=True)
        wrong += sum(line.startswith("model ") for line in lines)
        if done.returncode in (0, 1) and not done.stderr.strip():
            break
        at = int(re.findall(r"^#(\d+)$", done.stdout, re.MULTILINE)[-1])
        crashes += 1
        print(f"model {at}: the process ended with {done.returncode}: {done.stderr.strip()[-300:]}", flush=True)
        seed = at + 1
    print(f"{args.models} models, {wrong} of them wrong, {crashes} crashes")
    return 1 if wrong or crashes else 0


if __name__ == "__main__":
    sys.exit(main())
