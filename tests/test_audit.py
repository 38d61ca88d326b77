"""The audit of a run's gradient: it lets a healthy run pass and leaves it as it is, and it stops a wrong one."""

import dataclasses
import math

import mutation
import numpy as np
import pytest
from faults import FAULTS
from runs import TEXT, metrics, run, variant

from npgpt import engine
from npgpt.config import DTYPES, GPTConfig, TrainConfig
from npgpt.errors import GradientError, StoppedError, UsageError
from npgpt.files import checkpoint, folder
from npgpt.kernels import jit
from npgpt.kernels.masks import random_stream
from npgpt.model import GPT
from npgpt.ops import attention, cross_entropy, dropout, embedding, layernorm, linear, mlp
from npgpt.run import audit, memory
from npgpt.run.audit import BOUND, Probes, length, loss_from, outputs
from npgpt.run.events import Audited, Evaluation, Notice
from npgpt.run.parallel import DataParallel
from npgpt.run.trainer import Trainer
from npgpt.signals import NEVER, Stop
from npgpt.train import main


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return TrainConfig(
        data=(str(tmp_path / "text.txt"),), out_dir=str(tmp_path / "run"), n_layer=2, n_head=2, n_embd=12, block_size=9,
        batch_size=3, gradient_accumulation_steps=2, max_iters=6, eval_interval=3, eval_iters=1, warmup_iters=0,
        workers=2, blas_threads=1, dropout=0.1, bias=True, keep=9, gradcheck_every=5,
    )  # fmt: skip


def weights(path):
    arrays = checkpoint.load(path)[0]
    return {name: np.array(array).tobytes() for name, array in arrays.items()}


# --------------------------------------------------------------------------------------------------------------------
# A healthy run


@pytest.mark.parametrize("optimizer, p, bias", [("muon", 0.1, True), ("adamw", 0.0, False)])
def test_a_healthy_run_stays_far_below_the_bound(config, optimizer, p, bias):
    config = variant(config, optimizer=optimizer, dropout=p, bias=bias, gradcheck_every=2, max_iters=5)
    trainer, events = run(config)
    found = [event for event in events if isinstance(event, Audited)]
    assert [event.iter for event in found] == [0, 2, 4]
    names = {name for name, _ in trainer.model.named_parameters()}
    for event in found:
        assert event.audit.passed and event.audit.worst.error < BOUND / 20
        assert set(event.audit.errors) == names and event.audit.n_derivatives == len(names) * 3
    logged = {row["iter"]: row["gradcheck"] for row in metrics(config) if "gradcheck" in row}
    assert logged == {event.iter: event.audit.errors for event in found}


def test_an_audit_changes_no_bit_of_the_run(config, tmp_path):
    with_audits = variant(config, n_layer=1, max_iters=3, gradcheck_every=1)
    without = variant(with_audits, gradcheck_every=0, out_dir=str(tmp_path / "without"))
    for one in (with_audits, without):
        run(one)
    assert weights(folder.newest(with_audits.out_dir)) == weights(folder.newest(without.out_dir))
    for one, other in zip(metrics(with_audits), metrics(without), strict=True):
        assert ("gradcheck" in one) == (one["train_loss"] is not None)
        for name in ("train_loss", "val_loss", "grad_norm", "lr"):
            assert one.get(name) == other.get(name)


def test_what_a_block_puts_out_stands_for_all_before_it():
    parallel = DataParallel(GPT(GPTConfig(vocab_size=5, n_layer=3, n_head=2, n_embd=8, dropout=0.3), dtype=np.float64))
    rng = np.random.default_rng(0)
    for parameter in parallel.model.parameters():
        parameter.data[...] = rng.normal(size=parameter.shape)
    x, y = rng.integers(5, size=(2, 3, 7))
    with engine.no_grad(), random_stream(8):
        whole = parallel.model(x, y)[1].item()
    kept = outputs(parallel.model, x, y, 8)
    assert len(kept) == 3
    for first in range(4):
        assert loss_from(parallel.replicas[0], first, kept, x, y, 8)() == whole
    assert loss_from(parallel.replicas[0], 2, kept, x, y, 9)() != whole  # the masks count
    parallel.close()


def test_a_tensor_is_looked_at_entry_by_entry_and_as_a_whole():
    point, gradient = np.array([[1.0, 2.0], [0.5, -1.0]]), np.array([[2.0, 0.0], [1.0, -2.0]])
    probes = Probes("transformer.h.1.x", gradient.astype(np.float32), point, 4, np.random.default_rng(0))
    assert probes.first_block(5) == 1 and len(probes.places) == 5 and probes.places[-1] is None
    assert all(gradient.reshape(-1)[i] != 0 for i in probes.places[2:4])  # drawn in proportion to the gradient
    x = point.reshape(-1)
    for longer, most in ((None, 1e-9), (1, 1e-9), (1000, 1e-12)):
        probes.measured[:] = 0
        for _ in range(2):  # two micro-batches of equal weight
            probes.measure(x, lambda: float(x[0] ** 2 + x[2] ** 2 + x[3] ** 2), NEVER, 0.5, longer)
        assert probes.compare(gradient).error < most and np.array_equal(x, [1, 2, 0.5, -1])
    assert probes.compare(gradient / 2).error > 0.3
    assert probes.compare(gradient / 2, 1e6 * length(gradient)).error < BOUND  # were it that long, nobody would see it


def gradient_of(trainer):
    """[first micro-batch of the next update], and its gradients by name, as they stand in trainer.parallel."""
    batch = [next(trainer.setup.micro_batches(trainer.iter))]
    trainer.parallel.zero_grad()
    trainer.parallel.forward_backward(*batch[0])
    trainer.parallel.gather_grads()
    return batch, dict(trainer.parallel.flat.views(trainer.parallel.flat.grads))


def test_one_wrong_entry_shows_in_the_direction(config):
    trainer = Trainer(variant(config, gradcheck_entries=0))
    batch, gradients = gradient_of(trainer)
    assert trainer.setup.auditor.audit(batch, (1, 2), NEVER).passed
    name = "transformer.h.1.attn.c_attn.weight"
    gradients[name][7, 3] += 3 * BOUND * length(gradients[name])
    found = trainer.setup.auditor.audit(batch, (1, 2), NEVER)
    assert not found.passed and found.worst.name == name and found.worst.error > BOUND
    assert [each.name for each in found.worst_of if each.error > BOUND] == [name]


# --------------------------------------------------------------------------------------------------------------------
# A second look: what is rounding, and what is not


@pytest.fixture
def certain(tmp_path):
    """A trainer whose model knows its text by heart: of p - y, float32 has few digits left."""
    (tmp_path / "ab.txt").write_text("ab" * 5000, encoding="utf-8")
    trainer = Trainer(TrainConfig(
        data=(str(tmp_path / "ab.txt"),), out_dir=str(tmp_path / "run"), n_layer=1, n_head=2, n_embd=16, block_size=16,
        batch_size=4, max_iters=100, eval_interval=99, eval_iters=1, warmup_iters=0, workers=2, gradcheck_every=999,
        learning_rate=0.01,
    ))  # fmt: skip
    list(trainer.run())
    dict(trainer.model.named_parameters())["transformer.ln_f.weight"].data *= 1.5
    assert trainer.parallel.loss(*next(trainer.setup.micro_batches(trainer.iter))[:2])[0] / 64 < 1e-4
    return trainer


def test_a_model_that_knows_its_text_passes(certain):
    batch, _ = gradient_of(certain)
    flat = certain.parallel.flat
    before = flat.weights.tobytes(), flat.grads.tobytes()
    for seed in range(3):
        found = certain.setup.auditor.audit(batch, (seed, 0), NEVER)
        assert found.passed and found.worst.error > BOUND and found.worst.name in found.rounding
        assert "(rounding is that coarse)" in str(found)
    assert (flat.weights.tobytes(), flat.grads.tobytes()) == before


def test_a_stop_ends_a_second_look(certain, monkeypatch):
    batch, _ = gradient_of(certain)
    stop, digits, repeats = Stop(), audit.last_digit, []

    def stopping(*args):
        repeats.append(1)
        stop.number = 2
        return digits(*args)

    monkeypatch.setattr(audit, "last_digit", stopping)
    assert certain.setup.auditor.audit(batch, (0, 0), stop) is None and len(repeats) == 1


def test_a_gradient_that_drowns_in_the_rounding_of_the_loss_passes(config):
    tiny = variant(
        config, n_layer=1, n_head=1, n_embd=8, block_size=4, batch_size=4, gradient_accumulation_steps=1, dropout=0.9,
        max_iters=20, eval_interval=20, gradcheck_every=1, workers=1,
    )  # fmt: skip
    _, events = run(tiny)
    audits = [event.audit for event in events if isinstance(event, Audited)]
    assert len(audits) == 20 and all(found.passed for found in audits)
    assert any(found.rounding for found in audits)


@pytest.mark.parametrize("factor", [1.045, 0.99, 1.003])
def test_a_fault_of_float32_alone_is_not_rounding(config, monkeypatch, factor):
    gather = DataParallel.gather_grads

    def changed(self):
        norm = gather(self)
        if self.flat.grads.dtype == np.float32:
            dict(self.flat.views(self.flat.grads))["transformer.h.0.attn.c_attn.weight"][...] *= factor
        return norm

    monkeypatch.setattr(DataParallel, "gather_grads", changed)
    with pytest.raises(GradientError, match=r"iteration 0 is wrong: transformer.h.0.attn.c_attn.weight"):
        run(config)


def test_a_gradient_of_nothing_and_one_that_is_no_number():
    for gradient, measured, passes in ((0.0, 0.0, True), (0.0, 1e-3, False), (math.nan, 0.0, False)):
        gradient = np.full(3, gradient, np.float32)
        probes = Probes("wte", gradient, np.ones(3), 2, np.random.default_rng(0))
        probes.measured[:] = measured
        assert audit.Audit((probes.compare(gradient),), 3, 0.0).passed == passes


# --------------------------------------------------------------------------------------------------------------------
# A wrong one


def scaled(which, factor):
    """A change of a function that writes into its first arguments: one of them comes out too large."""

    def change(function):
        def changed(*args):
            function(*args)
            if args[which] is not None:  # the output layer has no bias
                args[which][...] *= factor

        return changed

    return change


def no_mask(function):
    def changed(dqkv, dy, qkv, lse, n_head, dropout):
        function(dqkv, dy, qkv, lse, n_head, dropout._replace(p=0.0))

    return changed


def first_sequence_only(function):
    return lambda dwte, dwpe, dy, idx: function(dwte, dwpe, dy[:1], idx[:1])


def replaced(function):
    def changed(self, *args):
        self.value = None
        function(self, *args)

    return changed


def lost(function):
    def changed(self):
        self.replicas[1].flat.grads[...] = 0
        return function(self)

    return changed


FAULTY = {
    "layernorm's dx": (layernorm, "layernorm_backward", scaled(0, 1.03)),
    "layernorm's dweight": (layernorm, "layernorm_backward", scaled(1, 1.03)),
    "linear's dweight": (linear, "linear_backward", scaled(1, 1.03)),
    "linear's dbias": (linear, "linear_backward", scaled(2, 1.03)),
    "mlp's dw_proj": (mlp, "mlp_backward", scaled(3, 1.03)),
    "attention without its mask": (attention, "attention_backward", no_mask),
    "embedding of one sequence": (embedding, "embedding_backward", first_sequence_only),
    "cross-entropy's p - y": (cross_entropy, "cross_entropy_backward", scaled(0, 1.03)),
    # a worker's share begins elsewhere in the batch; what the shadow computes is whole
    "dropout's first row": (dropout, "next_random_key", lambda f: lambda: (f()[0], 0)),
    "the engine's sums": (engine.Gradient, "add", replaced),
    "a worker's gradient": (DataParallel, "gather_grads", lost),
    "the weight of a micro-step": (
        DataParallel, "forward_backward", lambda f: lambda *args, weight, **rest: f(*args, **rest),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[: 1 if jit.KERNELS == "numpy" else 2])
@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_ends_the_run_at_its_first_audit(config, monkeypatch, name, dtype):
    config = variant(config, dtype=dtype)
    module, function, change = FAULTY[name]
    monkeypatch.setattr(module, function, change(getattr(module, function)))
    with pytest.raises(GradientError, match=r"^the gradient at iteration 0 is wrong: transformer\.") as raised:
        run(config)
    assert raised.value.exit_code == 6 and "\n" not in str(raised.value) and "bound 1e-03" in str(raised.value)
    assert [row["iter"] for row in metrics(config)] == [0]
    assert max(metrics(config)[0]["gradcheck"].values()) > BOUND


def test_a_fault_that_comes_later_loses_no_good_checkpoint(config, monkeypatch):
    trainer, good = Trainer(config), linear.linear_backward
    with pytest.raises(GradientError, match="the gradient at iteration 5 is wrong") as raised:
        for event in trainer.run():
            if isinstance(event, Evaluation) and event.iter == 3:
                monkeypatch.setattr(linear, "linear_backward", scaled(1, 0.9)(good))
    # updates 1 .. 4 were not audited: of the checkpoints at 0 and 3 only the first is beyond doubt
    assert [path.name for path in folder.checkpoints(config.out_dir)] == [
        "iter-00000003.safetensors", "iter-00000000.safetensors",
    ]  # fmt: skip
    assert str(raised.value).endswith("beyond doubt is " + str(folder.checkpoints(config.out_dir)[1]))
    assert [row["iter"] for row in metrics(config)] == list(range(6))


# --------------------------------------------------------------------------------------------------------------------
# What belongs to a setting


def test_a_stop_ends_an_audit_at_once_and_the_run_goes_on_with_the_same_bits(config, tmp_path, monkeypatch):
    stop, evaluations = Stop(), []

    def counted(replica, *args):
        loss = loss_from(replica, *args)

        def count():
            evaluations.append(1)
            if len(evaluations) == 5:
                stop.number = 2
            return loss()

        return count

    with monkeypatch.context() as patch:
        patch.setattr(audit, "loss_from", counted)
        with pytest.raises(StoppedError, match="stopped at iteration 0; the checkpoint is of iteration 0"):
            list(Trainer(config).run(stop))
    assert len(evaluations) <= 6  # one more for the other worker
    list(Trainer.resume(config.out_dir).run())
    whole = variant(config, out_dir=str(tmp_path / "whole"))
    run(whole)
    assert weights(folder.newest(config.out_dir)) == weights(folder.newest(whole.out_dir))


def test_a_run_from_before_there_were_audits_can_go_on_with_them(config, monkeypatch):
    asdict = dataclasses.asdict

    def as_it_was(settings):
        return {name: value for name, value in asdict(settings).items() if "gradcheck" not in name}

    with monkeypatch.context() as patch:
        patch.setattr(dataclasses, "asdict", as_it_was)
        run(variant(config, gradcheck_every=0))
    resumed = Trainer.resume(config.out_dir, {"max_iters": 8, "gradcheck_every": 7})
    events = list(resumed.run())
    assert [event.iter for event in events if isinstance(event, Audited)] == [7]
    assert any(isinstance(e, Notice) and "gradcheck_every was 0 and is 7" in e.text for e in events)


def test_the_command_shows_each_audit_in_a_line(config, capsys):
    flags = ["--max-iters", "3", "--gradcheck-every", "2", "--sample-tokens", "0", "--final-sample-tokens", "0"]
    shape = ["--n-layer", "1", "--n-head", "1", "--n-embd", "8", "--block-size", "8", "--batch-size", "2"]
    assert main(["--data", *config.data, "--out-dir", config.out_dir, *flags, *shape]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "gradient checked" in line]
    assert len(lines) == 2 and lines[1].startswith("iter      2 | gradient checked at ") and lines[1].endswith(" s")
    with pytest.raises(UsageError, match="gradcheck_every must be at least 0, got -1"):
        main(["--data", *config.data, "--out-dir", config.out_dir, "--gradcheck-every", "-1"])
    for entries in (10**14, 10**27):
        with pytest.raises(UsageError, match="gradcheck_entries must be at most 10000, got 10"):
            main(["--data", *config.data, "--out-dir", config.out_dir, "--gradcheck-entries", str(entries)])


def test_the_shadow_counts_in_the_estimate_of_memory():
    def parts(**changes):
        return memory.parts(TrainConfig(**changes), 100, 1000, 2)

    with_audits, without = parts(gradcheck_every=5), parts()
    (words,) = set(with_audits) - set(without)
    assert "audit" in words
    assert with_audits[words] > 8 * GPT(GPTConfig(vocab_size=100), seed=None).num_params(non_embedding=False)
    assert parts(gradcheck_every=5, batch_size=24)[words] > with_audits[words]
    assert parts(gradcheck_every=5, gradcheck_entries=10_000)[words] > with_audits[words] + 8 * 10_000 * 52


def test_every_fault_that_an_audit_is_said_not_to_show_exists():
    for word in mutation.UNSEEN:
        assert any(fault.file == word or fault.name.startswith(word) for fault in FAULTS), word
