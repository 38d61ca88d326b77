"""Training that begins with another model: --init-from a run, or a Hugging Face folder."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys

import pytest

from npgpt.config import GPTConfig, TrainConfig
from npgpt.data.bpe import BPETokenizer
from npgpt.data.characters import CharTokenizer
from npgpt.engine import no_grad
from npgpt.errors import CheckpointError, UsageError
from npgpt.model import GPT
from npgpt.run.beginning import settings_of
from npgpt.run.events import Evaluation
from npgpt.run.trainer import Trainer

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 40
OTHER = "a lazy fox quits the brown dog.\n" * 60  # another sentence of the same characters
SHAPE = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, bias=True)


def config_of(folder, **changes):
    """Settings of a run in this folder, on its text."""
    settings = dict(
        data=(str(folder / "other.txt"),), out_dir=str(folder / "run"), batch_size=4, max_iters=30, eval_interval=10,
        eval_iters=2, log_interval=10, warmup_iters=2, workers=2, blas_threads=1, learning_rate=3e-3,
        sample_tokens=0, final_sample_tokens=0, **SHAPE,
    )  # fmt: skip
    return TrainConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder with a run in `run`, and its model as a Hugging Face folder in `exported`."""
    folder = tmp_path_factory.mktemp("init")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "other.txt").write_text(OTHER, encoding="utf-8")
    list(Trainer(config_of(folder, data=(str(folder / "text.txt"),), max_iters=80, learning_rate=1e-2)).run())
    GPT.from_pretrained(folder / "run").save_pretrained(folder / "exported")
    return folder


def beginning(first, tmp_path, name="run", **changes):
    """Settings of a run that begins with one of the two."""
    changes = {"out_dir": str(tmp_path / "second"), "init_from": str(first / name), **changes}
    return config_of(first, **changes)


def loss_of(model, blocks):
    """The mean loss of a model over evaluation blocks, in one go."""
    with no_grad():
        return float(model.eval()(*blocks[0 : len(blocks)])[1].data)


def evaluations(trainer):
    return [event for event in trainer.run() if isinstance(event, Evaluation)]


def weights(trainer):
    return trainer.parallel.flat.weights.copy()


@pytest.mark.parametrize("name", ["run", "exported"])
def test_a_run_begins_with_the_weights_of_another_and_goes_on_learning(first, tmp_path, name):
    trainer = Trainer(beginning(first, tmp_path, name))
    model = GPT.from_pretrained(first / name)
    for (mine, a), (its, b) in zip(trainer.model.named_parameters(), model.named_parameters(), strict=True):
        assert mine == its and a.data.tobytes() == b.data.tobytes()
    assert trainer.tokenizer.to_dict() == model.tokenizer.to_dict()
    expected = loss_of(model, trainer.val_sample)
    found = evaluations(trainer)
    assert math.isclose(found[0].val_loss, expected, rel_tol=1e-5)
    fresh = Trainer(config_of(first, out_dir=str(tmp_path / "fresh")))
    assert abs(fresh.evaluate(fresh.val_sample) - expected) > 0.1  # else it would be no test
    assert found[-1].val_loss < 0.8 * found[0].val_loss
    # what is written knows its tokenizer, and may be the beginning of a third
    assert GPT.from_pretrained(tmp_path / "second").tokenizer.to_dict() == model.tokenizer.to_dict()


def test_a_shorter_context_forgets_the_later_positions(first, tmp_path):
    trainer = Trainer(beginning(first, tmp_path, block_size=5))
    model = GPT.from_pretrained(first / "run")
    wpe = model.transformer.wpe.weight.data
    assert wpe.shape == (8, 16) and trainer.model.transformer.wpe.weight.data.tobytes() == wpe[:5].tobytes()
    assert trainer.model.config.block_size == 5
    # positions that are left see what they saw before
    assert math.isclose(trainer.evaluate(trainer.val_sample), loss_of(model, trainer.val_sample), rel_tol=1e-5)
    list(trainer.run())
    assert GPT.from_pretrained(tmp_path / "second").config.block_size == 5


@pytest.mark.parametrize("name, has, asked", [("n_layer", 2, 3), ("n_head", 2, 4), ("block_size", 8, 9)])
def test_another_shape_is_refused(first, tmp_path, name, has, asked):
    with pytest.raises(UsageError, match=f"init_from: the model in .*run has {name} = {has}, not {asked}$"):
        Trainer(beginning(first, tmp_path, **{name: asked}))
    assert not (tmp_path / "second").exists()


def test_a_text_with_characters_that_the_model_does_not_know_is_refused(first, tmp_path):
    (tmp_path / "new.txt").write_text(TEXT + "é", encoding="utf-8")
    with pytest.raises(UsageError, match="'é'") as error:
        Trainer(beginning(first, tmp_path, data=(str(tmp_path / "new.txt"),)))
    assert "\n" not in str(error.value) and not (tmp_path / "second").exists()


def test_there_must_be_a_model(first, tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no .*nowhere"):
        Trainer(beginning(first, tmp_path, "nowhere"))
    assert not (tmp_path / "second").exists()


def test_dropout_is_that_of_the_new_run(first, tmp_path):
    losses = []
    for p in (0.0, 0.5):
        trainer = Trainer(beginning(first, tmp_path, dropout=p))
        assert trainer.model.config.dropout == p and trainer.model.training
        losses.append((trainer.step()[0], trainer.step()[0]))
    assert losses[0] != losses[1] and losses[0][0] < losses[1][0]


def test_settings_of_a_model_are_those_that_a_run_must_have(first):
    for name in ("run", "exported"):
        assert settings_of(first / name) == {**SHAPE, "tokenizer": "char"}


def padded(path):
    """A Hugging Face folder whose model has more tokens than its tokenizer, as those whose size is a round number."""
    model = GPT(GPTConfig(vocab_size=48, **SHAPE), seed=5)
    model.tokenizer = CharTokenizer.from_text(TEXT)
    assert model.tokenizer.vocab_size < 40
    model.save_pretrained(path)
    return path


def test_tokens_beyond_the_tokenizer_stay_and_a_resumed_run_has_the_same_bits(first, tmp_path):
    begun = padded(tmp_path / "padded")
    whole = Trainer(beginning(first, tmp_path, init_from=str(begun), out_dir=str(tmp_path / "whole"), dropout=0.1))
    assert whole.model.config.vocab_size == 48
    assert set("".join(whole.sample(300))) <= set(TEXT)  # what has no text is not chosen
    list(whole.run())
    half = beginning(first, tmp_path, init_from=str(begun), max_iters=10, lr_decay_iters=30, dropout=0.1)
    list(Trainer(half).run())
    shutil.rmtree(begun)  # the checkpoint is all that is needed
    resumed = Trainer.resume(tmp_path / "second", {"max_iters": 30})
    assert resumed.model.config.vocab_size == 48 and resumed.iter == 10
    list(resumed.run())
    assert weights(resumed).tobytes() == weights(whole).tobytes()
    assert GPT.from_pretrained(tmp_path / "second").config.vocab_size == 48


def test_a_run_goes_on_with_the_beginning_that_it_had(first, tmp_path):
    config = beginning(first, tmp_path, max_iters=2)
    list(Trainer(config).run())
    for other in (str(first / "exported"), None):
        with pytest.raises(UsageError, match=r"was begun with init_from = .*run; it cannot go on with"):
            Trainer.resume(tmp_path / "second", {"init_from": other})
    assert Trainer.resume(tmp_path / "second", {"init_from": config.init_from}).iter == 2


def test_the_bpe_of_the_first_run_is_that_of_the_second(first, tmp_path):
    pytest.importorskip("tokenizers")
    data = dict(data=(str(first / "text.txt"),), out_dir=str(tmp_path / "first"))
    list(Trainer(config_of(first, tokenizer="bpe", vocab_size=280, max_iters=4, **data)).run())
    model = GPT.from_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "exported")
    assert isinstance(model.tokenizer, BPETokenizer)
    for name in ("first", "exported"):
        begun = dict(init_from=str(tmp_path / name), tokenizer="bpe", out_dir=str(tmp_path / f"second-{name}"))
        trainer = Trainer(beginning(first, tmp_path, **begun))
        # of its own text it would have learnt others
        assert trainer.tokenizer.to_dict() == model.tokenizer.to_dict()
        assert math.isclose(trainer.evaluate(trainer.val_sample), loss_of(model, trainer.val_sample), rel_tol=1e-5)
        found = evaluations(trainer)
        assert found[-1].val_loss < found[0].val_loss
        with pytest.raises(UsageError, match=r"init_from: the tokenizer in .* has \d+ tokens, not vocab_size = 300$"):
            Trainer(dataclasses.replace(trainer.config, out_dir=str(tmp_path / "third"), vocab_size=300))


def test_from_the_command_line_the_shape_is_the_models(first, tmp_path):
    for name in ("run", "exported"):
        args = ["--data", first / "other.txt", "--init-from", first / name, "--out-dir", tmp_path / name]
        args += "--batch-size 4 --max-iters 6 --eval-interval 3 --eval-iters 2 --dropout 0.1 --workers 1".split()
        done = subprocess.run(
            [sys.executable, "-m", "npgpt.train", *map(str, args)], capture_output=True, text=True, encoding="utf-8",
            env={**os.environ, "NPGPT_KERNELS": "numpy", "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert "n_layer 2" in done.stdout
        model = GPT.from_pretrained(tmp_path / name)
        assert dataclasses.replace(model.config, dropout=0.0) == GPTConfig(vocab_size=model.config.vocab_size, **SHAPE)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        before = Trainer(beginning(first, tmp_path, name))
        assert math.isclose(rows[0]["val_loss"], before.evaluate(before.val_sample), rel_tol=1e-4)


def test_a_tokenizer_that_cannot_be_opened_is_not_replaced_by_characters(first, tmp_path):
    """Weights that were learnt with other tokens would be of no use, and nobody would be told."""
    GPT(GPTConfig(vocab_size=300, **SHAPE)).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    code = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "from npgpt import train; sys.argv[0] = 'train'; train.command()"
    )
    args = ["--data", first / "other.txt", "--init-from", tmp_path / "model", "--out-dir", tmp_path / "run"]

    def trained(*more):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, args), *more], capture_output=True, text=True,
            env={**os.environ, "NPGPT_KERNELS": "numpy"},
        )  # fmt: skip
        return done.returncode, done.stderr

    words = "a BPE tokenizer needs the package tokenizers: pip install 'npgpt[hub]'"
    assert trained("--max-iters", "1") == (2, f"python -m npgpt.train: {words}\n")
    assert not (tmp_path / "run").exists()
    assert trained("--max-iters", "1", "--tokenizer", "char") == (0, "")  # who asks for it gets it


def test_tokens_that_mean_something_else_to_the_model_are_refused(first, tmp_path):
    (tmp_path / "more.txt").write_text("!" + TEXT, encoding="utf-8")  # which moves each letter by one place
    with pytest.raises(UsageError, match=r"other tokens than .*more.txt: token 2 was '\.' and is '!'") as error:
        Trainer(beginning(first, tmp_path, tokenizer=str(tmp_path / "more.txt")))
    assert "\n" not in str(error.value) and not (tmp_path / "second").exists()
    for name in ("byte", "bpe"):
        with pytest.raises(UsageError, match=f"other tokens than {name}: its tokenizer is char"):
            Trainer(beginning(first, tmp_path, tokenizer=name))
    # the same characters are the same tokens, from whatever file they come
    trainer = Trainer(beginning(first, tmp_path, tokenizer=str(first / "text.txt")))
    assert trainer.tokenizer.to_dict() == GPT.from_pretrained(first / "run").tokenizer.to_dict()


def test_a_bpe_of_other_tokens_than_the_models_is_refused(first, tmp_path):
    pytest.importorskip("tokenizers")
    for name, text in (("a", TEXT), ("b", "fox fox the the quick quick " * 20)):
        (tmp_path / name).mkdir()
        BPETokenizer.learn([text], 270).save(tmp_path / name)
    model = GPT(GPTConfig(vocab_size=270, **SHAPE))
    model.tokenizer = BPETokenizer.load(tmp_path / "a" / "tokenizer.json")
    model.save_pretrained(tmp_path / "model")
    changes = dict(init_from=str(tmp_path / "model"), out_dir=str(tmp_path / "run"))
    with pytest.raises(UsageError, match=r"token 2\d\d was '.+' and is '.+'; leave out --tokenizer"):
        Trainer(beginning(first, tmp_path, tokenizer=str(tmp_path / "b"), **changes))
    with pytest.raises(UsageError, match="its tokenizer is bpe"):
        Trainer(beginning(first, tmp_path, tokenizer="byte", **changes))
    assert Trainer(beginning(first, tmp_path, tokenizer=str(tmp_path / "a"), **changes)).tokenizer.vocab_size == 270
