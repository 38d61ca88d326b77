"""Products of bfloat16: every way's bits beside its reference, what is rounded and what is not."""

import contextlib
import json
import os
import platform
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from runs import TEXT, metrics, run, variant

from npgpt import train
from npgpt.config import DTYPES, GPTConfig, TrainConfig
from npgpt.errors import GradientError, StoppedError, UsageError
from npgpt.files import checkpoint, folder
from npgpt.kernels import bfloat16, jit, matmul, packed
from npgpt.kernels.bfloat16 import GROUP, PAIRS, product_ref, rounded_ref
from npgpt.kernels.blas import blas_threads
from npgpt.kernels.packed import SPAN, WIDTH, multiply, scratch_size
from npgpt.model import GPT
from npgpt.ops import linear
from npgpt.run import setup
from npgpt.run.audit import BOUND, ROUNDED, Auditor
from npgpt.run.events import Audited, Notice
from npgpt.run.parallel import DataParallel
from npgpt.run.trainer import Trainer
from npgpt.signals import NEVER, Stop

needs_kernels = pytest.mark.skipif(jit.KERNELS == "numpy", reason="the ways are kernels")
SPECIAL = np.array(
    [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-39, 1.1754943e-38, 1.1754944e-38, 3.4e38, -3.4e38], np.float32
)
SPECIAL = np.append(SPECIAL, np.array([0x7FFFFFFF, 0xFF800001, 0x7F800001], np.uint32).view(np.float32))


def as_bits(x):
    return np.ascontiguousarray(x).view(np.uint32)


def same_bits(x, y):
    """Whether two arrays have the same bits, and NaN in the same places."""
    return bool(((np.isnan(x) & np.isnan(y)) | (as_bits(x) == as_bits(y))).all())


def numbers(rng, shape, spread, special):
    """Random numbers from 2^-spread to 2^spread, some of which are SPECIAL."""
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-spread, spread + 1, shape))
    x = x.astype(np.float32)
    chosen = rng.random(shape) < special
    x[chosen] = rng.choice(SPECIAL, int(chosen.sum()))
    return x


def test_rounding_is_to_the_nearest_of_two_equal_ones_to_the_even():
    step = 2.0**-7
    rounds = {1 + step / 2: 1, 1 + 1.5 * step: 1 + 2 * step, 1 + 0.51 * step: 1 + step, -1 - 0.49 * step: -1}
    x = np.array(list(rounds), np.float32)
    np.testing.assert_array_equal(rounded_ref(x), np.array(list(rounds.values()), np.float32))
    assert rounded_ref(np.float32(3.4e38)) == np.inf  # beyond the largest bfloat16
    assert np.isnan(rounded_ref(SPECIAL[np.isnan(SPECIAL)])).all()
    assert as_bits(rounded_ref(np.array([-1e-39, -0.0], np.float32))).tolist() == [0x80000000] * 2


@needs_kernels
@pytest.mark.parametrize("way", ["avx512_bf16", bfloat16.TILES])
def test_bits_are_those_of_the_reference_in_1000_random_products(way):
    if way == "avx512_bf16" and not matmul.HAS_INSTRUCTION:
        pytest.skip("this processor has no vdpbf16ps")
    if way == "amx" and not bfloat16.MAY_USE_AMX:
        pytest.skip("this process may not use AMX")
    rng = np.random.default_rng(0)
    scratch = np.empty(scratch_size(4), PAIRS[way])
    for n in range(250):
        M, K, N = rng.integers(1, 70, 3)
        if n % 50 == 49:
            K = rng.integers(SPAN - 1, 2 * SPAN + 3)
        if n % 100 == 99:  # what was packed meets a second block, even by tiles
            N += 2 * WIDTH // 4
        spread, special = (0, 20, 70)[n % 3], (0, 0.01)[n % 2]
        a, b = numbers(rng, (M, K), spread, special), numbers(rng, (K, N), spread, special)
        if n % 5 == 4:  # the products are near the smallest normal number
            with np.errstate(invalid="ignore"):  # of a signalling NaN
                a, b = a * np.float32(2.0**-63), b * np.float32(2.0**-63)
        expected = product_ref(a, b, way, SPAN)
        for turned in range(4):
            left, right = (np.ascontiguousarray(x.T) if turned >> i & 1 else x for i, x in enumerate((a, b)))
            whole = np.full((M + 1, N + 1), 7, np.float32)
            scratch.fill(0x7FC07FC0)  # pairs of NaN
            multiply(whole[:M, :N], left, right, bool(turned & 1), bool(turned & 2), scratch, 0, M, 0, N)
            assert same_bits(whole[:M, :N], expected), (M, K, N, turned)
            assert (whole[M] == 7).all() and (whole[:, N] == 7).all()  # nothing beyond the edges


@needs_kernels
@pytest.mark.skipif(bfloat16.TILES == "plain", reason="here it is what the test above looks at")
def test_bits_are_those_of_the_reference_by_plain_where_amx_is_taken():
    """A process has one of the two."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "1000 and plain"]
    done = subprocess.run(command, env={**os.environ, "NPGPT_BFLOAT16": "plain"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


@needs_kernels
def test_the_ways_differ():
    rng = np.random.default_rng(0)
    a, b = numbers(rng, (8, 4 * GROUP), 3, 0), numbers(rng, (4 * GROUP, 8), 3, 0)
    assert not same_bits(product_ref(a, b, "plain", SPAN), product_ref(a, b, "avx512_bf16", SPAN))


@needs_kernels
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
def test_products_have_the_same_bits_for_any_number_of_threads(monkeypatch, turned):
    monkeypatch.setattr(matmul, "TINY", 0)
    rng = np.random.default_rng(0)
    for M, K, N in ((100, 33, 65), (48, 7, 300), (1, 64, 64), (70, 1, 1)):
        a, b = numbers(rng, (M, K), 3, 0), numbers(rng, (K, N), 3, 0)
        a, b = (np.ascontiguousarray(x.T).T if t else x for x, t in zip((a, b), turned, strict=True))
        found = []
        for threads, lead in ((1, 0), (2, 0), (5, 0), (2, M * K * N // 3)):
            monkeypatch.setattr(matmul, "LEAD", lead)
            found.append(np.full((M, N), np.nan, np.float32))
            with blas_threads(threads), matmul.products_of("bfloat16"):
                matmul.matmul(found[-1], a, b)
        assert len({x.tobytes() for x in found}) == 1
        assert same_bits(found[0], product_ref(a, b, matmul.way(), SPAN))


@needs_kernels
def test_only_products_of_float32_within_the_context_are_rounded():
    x = np.full((3, 5), 1 + 2.0**-9)
    for dtype, within, expected in (
        (np.float32, "bfloat16", 5.0), (np.float32, "float32", 5 * (1 + 2.0**-9) ** 2),
        (np.float64, "bfloat16", 5 * (1 + 2.0**-9) ** 2),
    ):  # fmt: skip
        a, out = x.astype(dtype), np.empty((3, 3), dtype)
        with matmul.products_of(within):
            matmul.matmul(out, a, a.T)
        np.testing.assert_allclose(out, expected, rtol=1e-6)
    out = np.empty((3, 3), np.float32)
    matmul.matmul(out, x.astype(np.float32), x.T.astype(np.float32))
    np.testing.assert_allclose(out, 5 * (1 + 2.0**-9) ** 2, rtol=1e-6)  # the context is over


@needs_kernels
def test_rounded_by_numpy_is_the_same_but_for_the_order_of_the_sums():
    rng = np.random.default_rng(0)
    a, b = numbers(rng, (20, 40), 3, 0), numbers(rng, (40, 30), 3, 0)
    found = {}
    for dtype in (*DTYPES, "rounded"):
        found[dtype] = np.empty((20, 30), np.float32)
        with matmul.products_of(dtype):
            matmul.matmul(found[dtype], a, b)
    most = np.abs(a) @ np.abs(b)
    assert (np.abs(found["rounded"] - found["bfloat16"]) <= 1e-6 * most).all()
    assert (np.abs(found["rounded"] - found["float32"]) / most).max() > 1e-4


def test_the_context_ends_with_an_error_and_holds_in_its_thread_only():
    def dtype():
        return matmul._state.dtype

    with pytest.raises(KeyboardInterrupt), matmul.products_of("bfloat16"):
        with matmul.products_of("float32"):
            assert dtype() == "float32"
        assert dtype() == "bfloat16"
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(dtype).result() == "float32"
        raise KeyboardInterrupt
    assert dtype() == "float32"
    with pytest.raises(ValueError, match="not of 'float16'"):
        matmul.products_of("float16")


def layouts(x):
    """The same numbers, as they may lie in memory."""
    yield np.asfortranarray(x)
    yield np.ascontiguousarray(x[::-1])[::-1]
    yield np.ascontiguousarray(x[:, ::-1])[:, ::-1]
    gaps = np.full((2 * x.shape[0], 3 * x.shape[1]), np.nan, np.float32)
    gaps[::2, ::3] = x
    yield gaps[::2, ::3]
    wide = np.full((x.shape[0], x.shape[1] + 5), np.nan, np.float32)
    wide[:, : x.shape[1]] = x
    yield wide[:, : x.shape[1]]
    unaligned = np.ndarray(x.shape, np.float32, buffer=bytearray(x.nbytes + 1), offset=1)
    unaligned[...] = x
    unaligned.flags.writeable = False
    yield unaligned


@needs_kernels
@pytest.mark.parametrize("M, K, N", [(1, 1, 1), (3, 1, 2), (2, 3, 1), (1, 100, 1), (17, 33, 65), (40, SPAN + 1, 3)])
def test_bits_do_not_depend_on_how_numbers_lie(M, K, N):
    rng = np.random.default_rng(0)
    a, b = numbers(rng, (M, K), 3, 0), numbers(rng, (K, N), 3, 0)
    row, column = np.broadcast_to(a[:1], (M, K)), np.broadcast_to(b[:, :1], (K, N))
    cases = [(x, y, a, b) for x in layouts(a) for y in layouts(b)] + [(row, column, row, column)]
    for x, y, first, second in cases:
        out = np.full((M, N), np.nan, np.float32)
        with matmul.products_of("bfloat16"):
            matmul.matmul(out, x, y)
        assert same_bits(out, product_ref(first, second, matmul.way(), SPAN)), (x.strides, y.strides)


@needs_kernels
def test_products_that_lie_anyhow_or_of_nothing():
    x = np.ones((6, 10), np.float32)[:, ::2]
    out = np.full((6, 6), np.nan, np.float32)
    with matmul.products_of("bfloat16"):
        matmul.matmul(out, x, x.T)
        assert (out == 5).all()
        matmul.matmul(out, x[:, :0], x[:, :0].T)
        assert (out == 0).all()
        matmul.matmul(out[:0], x[:0], x.T)
        for shapes in (((6, 6), (6, 5), (4, 6)), ((6, 6), (5, 5), (5, 6)), ((6, 6), (6, 0), (5, 6))):
            with pytest.raises(ValueError):
                matmul.matmul(*(np.ones(shape, np.float32) for shape in shapes))


@needs_kernels
def test_one_wrong_bit_makes_a_way_wrong(monkeypatch):
    ways = {matmul.way(), bfloat16.TILES}
    assert all(matmul._is_right(way) for way in ways)

    def wrong(*args):
        expected = product_ref(*args)
        as_bits(expected)[63, 63] ^= 1
        return expected

    monkeypatch.setattr(matmul, "product_ref", wrong)
    assert not any(matmul._is_right(way) for way in ways)


@needs_kernels
def test_kernels_are_kept_for_a_way_and_for_what_they_are_made_of(monkeypatch):
    from npgpt.kernels import cache  # with the references nobody may import it

    sources = {path.name for path in cache.kernel_sources(Path(packed.__file__))}
    assert sources >= {"packed.py", "tiles.py", "vectors.py", "bfloat16.py", "amx.py", "jit.py"}
    keys = {}
    for way in ("", *PAIRS):
        monkeypatch.setenv("NPGPT_BFLOAT16", way)
        keys[way] = cache._key(Path(packed.__file__))
    assert len({*keys.values()}) == 2 and keys["amx"] != keys["plain"]  # whose pairs have one dtype


@needs_kernels
@pytest.mark.parametrize(
    "has_amx, permitted, right, expected, said",
    [
        (True, True, {"amx", "avx512_bf16"}, "amx", []),
        (True, False, {"avx512_bf16"}, "avx512_bf16", ["Linux does not let this process use AMX"]),
        (True, True, {"avx512_bf16"}, "avx512_bf16", ["products by amx have other bits here than they should"]),
        (True, False, set(), "plain", ["Linux does not let this", "products by avx512_bf16 have other bits here"]),
        (False, False, {"avx512_bf16"}, "avx512_bf16", []),
        (False, False, set(), "plain", ["products by avx512_bf16 have other bits here than they should"]),
    ],
)
def test_a_wrong_instruction_is_not_used(monkeypatch, has_amx, permitted, right, expected, said):
    for name, value in {
        "WANTED": "", "HAS_AMX": has_amx, "MAY_USE_AMX": permitted, "TILES": "amx" if permitted else "plain",
        "HAS_INSTRUCTION": True, "_is_right": lambda name: name in right,
    }.items():  # fmt: skip
        monkeypatch.setattr(matmul, name, value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert matmul.way.__wrapped__() == expected
    assert len(caught) == len(said)
    assert all(words in str(warning.message) for warning, words in zip(caught, said, strict=True))


@needs_kernels
def test_where_every_instruction_is_wrong_bfloat16_says_how_to_do_without(monkeypatch):
    monkeypatch.setattr(matmul, "WANTED", "")
    monkeypatch.setattr(matmul, "TILES", "amx")
    monkeypatch.setattr(matmul, "MAY_USE_AMX", True)
    monkeypatch.setattr(matmul, "_is_right", lambda name: False)
    monkeypatch.setattr(matmul, "way", matmul.way.__wrapped__)
    with pytest.warns(RuntimeWarning), pytest.raises(UsageError, match="NPGPT_BFLOAT16=plain"):
        matmul.way()
    with pytest.warns(RuntimeWarning):
        assert matmul.quicker_dtype(512) == "float32"  # auto goes on without


def test_the_way_is_chosen_by_a_variable():
    code = "from npgpt.kernels import matmul; print(matmul.way())"

    def run(wanted):
        environment = {**os.environ, "NPGPT_BFLOAT16": wanted}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    done = run("plain")
    assert "bfloat16 needs kernels" in done.stderr if jit.KERNELS == "numpy" else done.stdout.strip() == "plain"
    assert "must be one of amx, avx512_bf16, plain, got 'amx16'" in run("amx16").stderr
    if not bfloat16.MAY_USE_AMX:
        assert "NPGPT_BFLOAT16=amx: it is not there" in run("amx").stderr or jit.KERNELS == "numpy"


@needs_kernels
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AMX is Intel's")
def test_the_kernel_for_amx_compiles_to_its_instructions(tmp_path):
    """It differs from `plain`, which runs here, by these instructions only."""
    code = (
        "from numba import types; from npgpt.kernels.packed import multiply; "
        "numbers, n = types.float32[:, ::1], types.intp; scratch = types.int32[::1]; "
        "multiply.compile((numbers,) * 3 + (types.boolean,) * 2 + (scratch,) + (n,) * 4); "
        "print(*multiply.inspect_asm().values())"
    )
    features = "avx2 fma bmi2 avx512f avx512bw avx512vl avx512dq avx512bf16 amx-tile amx-bf16".split()
    environment = {
        **os.environ, "NPGPT_BFLOAT16": "amx", "NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_CPU_NAME": "sapphirerapids",
        "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in features),
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for instruction in ("ldtilecfg", "tilezero", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
        assert instruction in done.stdout


@needs_kernels
def test_gradients_of_a_model_are_near_those_of_float32_and_the_seed_decides_their_bits():
    config = GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=32, bias=True, dropout=0.1)
    idx, targets = np.random.default_rng(0).integers(0, 31, (2, 4, 16))
    found = {}
    for name, dtype, workers in (
        ("float32", "float32", 1), ("first", "bfloat16", 1), ("again", "bfloat16", 1), ("two", "bfloat16", 2),
    ):  # fmt: skip
        parallel = DataParallel(GPT(config, seed=1), workers, 1, dtype=dtype)
        parallel.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss = parallel.forward_backward(idx, targets, seed=3)
        parallel.gather_grads()
        found[name] = loss, parallel.flat.grads.copy()
        parallel.close()
    assert found["first"][1].tobytes() == found["again"][1].tobytes() != found["float32"][1].tobytes()
    exact, rounded = found["float32"][1], found["first"][1]
    assert np.linalg.norm(rounded - exact) <= 0.02 * np.linalg.norm(exact)
    assert np.linalg.norm(found["two"][1] - rounded) <= 0.01 * np.linalg.norm(rounded)
    assert abs(found["first"][0] - found["float32"][0]) <= 1e-3


@needs_kernels
def test_an_evaluation_is_in_the_dtype_of_the_training():
    config = GPTConfig(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=32)
    idx, targets = np.random.default_rng(0).integers(0, 31, (2, 4, 16))
    losses = {}
    for dtype in DTYPES:
        parallel = DataParallel(GPT(config, seed=1), 2, 1, dtype=dtype)
        losses[dtype] = parallel.loss(idx, targets)[0]
        assert abs(losses[dtype] - 64 * parallel.forward_backward(idx, targets)) < 1e-3
        parallel.close()
    assert 0 < abs(losses["bfloat16"] - losses["float32"]) < 0.1


# --------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return TrainConfig(
        data=(str(tmp_path / "text.txt"),), out_dir=str(tmp_path / "run"), n_layer=2, n_head=2, n_embd=32,
        block_size=16, batch_size=4, max_iters=6, eval_interval=3, eval_iters=1, warmup_iters=0, workers=2,
        blas_threads=1, dropout=0.1, bias=True, dtype="bfloat16", sample_tokens=0, final_sample_tokens=0,
        log_interval=1,
    )  # fmt: skip


def notices(events):
    return [event.text for event in events if isinstance(event, Notice)]


def weights(config):
    arrays = checkpoint.load(folder.newest(config.out_dir))[0]
    return {name: np.array(array) for name, array in arrays.items()}


def same(one, other):
    return {name: array.tobytes() for name, array in one.items()} == {n: a.tobytes() for n, a in other.items()}


@needs_kernels
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_has_the_same_bits_twice_and_when_it_is_resumed(config, workers):
    config = variant(config, workers=workers, optimizer="adamw")
    found = []
    for name in ("once", "twice", "stopped"):
        one = variant(config, out_dir=f"{config.out_dir}-{name}")
        trainer, stop = Trainer(one), Stop()
        with pytest.raises(StoppedError) if name == "stopped" else contextlib.nullcontext():
            for _ in trainer.run(stop):
                if name == "stopped" and trainer.iter == 2:
                    stop.number = 15
        if name == "stopped":
            assert notices(Trainer.resume(one.out_dir).run()) == []
        found.append(weights(one))
    assert same(found[0], found[1]) and same(found[0], found[2])
    run(variant(config, dtype="float32"))
    assert not same(found[0], weights(config))


@needs_kernels
def test_losses_are_near_those_of_float32(config):
    losses = {}
    for dtype in DTYPES:
        one = variant(config, dtype=dtype, dropout=0.0, max_iters=20, out_dir=f"{config.out_dir}-{dtype}")
        run(one)
        losses[dtype] = np.array([row["train_loss"] for row in metrics(one) if row["train_loss"] is not None])
    assert 0 < np.abs(losses["bfloat16"] - losses["float32"]).max() < 0.02


@needs_kernels
def test_a_run_by_the_plain_way_is_near_that_of_the_instruction(config, monkeypatch):
    def first_loss(name):
        one = variant(config, out_dir=f"{config.out_dir}-{name}", max_iters=1)
        return run(one)[0], metrics(one)[0]["train_loss"]

    _, expected = first_loss("by instruction")
    monkeypatch.setattr(setup, "way", lambda: "plain")
    trainer, loss = first_loss("plain")
    assert abs(loss - expected) < 1e-3
    assert trainer.setup.environment["dtype"] == "bfloat16 by plain"


@needs_kernels
def test_another_way_and_another_dtype_are_said_and_the_run_goes_on(config, monkeypatch):
    run(config)
    way = setup.way()
    monkeypatch.setattr(setup, "way", lambda: "other")
    said = notices(Trainer.resume(config.out_dir, {"max_iters": 7}).run())
    assert f"dtype was bfloat16 by {way} and is bfloat16 by other: the run goes on, but not with the same bits" in said
    said = notices(Trainer.resume(config.out_dir, {"max_iters": 8, "dtype": "float32"}).run())
    assert "dtype was bfloat16 by other and is float32: the run goes on, but not with the same bits" in said
    assert "dtype was bfloat16 and is float32 from iteration 7 on" in said


def test_a_checkpoint_that_names_no_dtype_was_float32(config):
    config = variant(config, dtype="float32")
    run(config)
    path = folder.newest(config.out_dir)
    arrays, state = folder.load(path)
    del state["train"]["dtype"], state["environment"]["dtype"]
    checkpoint.save(path, arrays, {"npgpt": json.dumps(state)})
    trainer = Trainer.resume(config.out_dir, {"max_iters": 7})
    assert trainer.setup.dtype == trainer.config.dtype == "float32"
    assert [words for words in notices(trainer.run()) if "dtype" in words] == []


@needs_kernels
@pytest.mark.parametrize(
    "width, way, expected",
    [(32, "amx", "bfloat16"), (31, "amx", "float32"), (512, "plain", "float32")],
)
def test_auto_is_what_is_quicker(monkeypatch, width, way, expected):
    monkeypatch.setattr(matmul, "way", lambda: way)
    assert matmul.quicker_dtype(width) == expected


@needs_kernels
def test_the_command_says_what_multiplies(config, capsys):
    flags = ["--data", *config.data, "--max-iters", "1", "--eval-iters", "1", "--sample-tokens", "0"]
    flags += ["--n-layer", "1", "--n-embd", "32", "--final-sample-tokens", "0", "--out-dir", config.out_dir]
    assert train.main([*flags, "--device=cpu", "--compile=False", "--dtype=bfloat16"]) == 0
    slow = ", which is slow" if matmul.way() == "plain" else ""
    said = f"\ndtype   | products of bfloat16, by {matmul.way()}{slow}; all else is float32\n"
    assert said in capsys.readouterr().out
    assert train.main([*flags, "--overwrite", "--dtype", "auto"]) == 0
    assert ("products of bfloat16" in capsys.readouterr().out) == (matmul.quicker_dtype(32) == "bfloat16")


@needs_kernels
@pytest.mark.parametrize("is_amd", [True, False])
def test_auto_leaves_a_slow_instruction_alone(monkeypatch, is_amd):
    monkeypatch.setattr(matmul, "way", lambda: "avx512_bf16")
    monkeypatch.setattr(matmul, "IS_AMD", is_amd)
    assert matmul.quicker_dtype(512) == ("bfloat16" if is_amd else "float32")


def test_float16_is_answered_with_bfloat16():
    for name in ("float16", "half"):
        with pytest.raises(UsageError, match=f"^dtype: of 16 bits there is bfloat16 here, not {name}$"):
            train.main(["--dtype", name])
    with pytest.raises(UsageError, match="dtype must be one of float32, bfloat16, auto, got 'float64'"):
        train.main(["--dtype", "float64"])


def test_references_multiply_in_float32_and_say_so(config):
    environment = {**os.environ, "NPGPT_KERNELS": "numpy"}
    command = [sys.executable, "-m", "npgpt.train", "--data", *config.data, "--out-dir", config.out_dir]
    done = subprocess.run([*command, "--dtype", "bfloat16"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "bfloat16 needs kernels" in done.stderr and "Traceback" not in done.stderr


# --------------------------------------------------------------------------------------------------------------------
# Audits


@needs_kernels
def test_an_audit_of_a_healthy_run_passes_and_tells_how_far_bfloat16_is_off(config):
    _, events = run(variant(config, gradcheck_every=3, gradient_accumulation_steps=2))
    audits = [event.audit for event in events if isinstance(event, Audited)]
    assert len(audits) == 2
    for audit in audits:
        assert audit.passed and audit.worst.error < BOUND / 20
        assert len(audit.rounded) == len(audit.worst_of)
        assert 1e-4 < max(found.error for found in audit.rounded) < ROUNDED / 2
        assert "bfloat16 is off by" in str(audit)


@needs_kernels
def test_an_audit_sees_what_only_the_gradient_in_bfloat16_has(config):
    trainer = Trainer(variant(config, gradcheck_every=1))
    batch = list(trainer.setup.micro_batches(0))
    trainer.parallel.zero_grad()
    trainer.parallel.forward_backward(*batch[0])
    trainer.parallel.gather_grads()
    assert trainer.setup.auditor.audit(batch, (1, 2), NEVER).passed
    name = "transformer.h.1.mlp.c_fc.weight"
    for change in (1.04, 0.0, np.nan):
        gradient = dict(trainer.parallel.flat.views(trainer.parallel.flat.grads))[name]
        before = gradient.copy()
        gradient *= np.float32(change)
        found = trainer.setup.auditor.audit(batch, (1, 2), NEVER)
        assert not found.passed and found.worst.name == name and found.worst.error > ROUNDED
        assert str(found.worst).startswith(f"{name}: bfloat16 differs from float32 by")
        gradient[...] = before


@needs_kernels
def test_an_audit_tells_rounding_from_a_mistake_where_gradients_cancel_each_other():
    config = GPTConfig(block_size=16, vocab_size=31, n_layer=1, n_head=2, n_embd=32, bias=True)
    parallel, rng = DataParallel(GPT(config, seed=1), 2, 1, dtype="bfloat16"), np.random.default_rng(0)
    # all tokens are as frequent, and have nearly the same p; so p - y is 0 in the mean, but p is rounded each time
    parallel.model.transformer.wte.weight.data[...] *= 0.1
    idx, targets = rng.integers(0, 31, (31, 16)), rng.permutation(np.arange(31 * 16) % 31).reshape(31, 16)
    parallel.zero_grad()
    parallel.forward_backward(idx, targets)
    parallel.gather_grads()
    auditor = Auditor(parallel, 1)
    found = auditor.audit([(idx, targets, 1)], (1, 2), NEVER)
    assert found.passed and max(each.error for each in found.rounded) > 3 * ROUNDED
    gradient = dict(parallel.flat.views(parallel.flat.grads))["transformer.ln_f.bias"]
    gradient *= np.float32(1.04)
    found = auditor.audit([(idx, targets, 1)], (1, 2), NEVER)
    assert not found.passed and found.worst.name == "transformer.ln_f.bias"
    parallel.close()


@needs_kernels
def test_an_audit_of_a_run_in_bfloat16_misses_a_micro_step(config):
    trainer = Trainer(variant(config, gradcheck_every=1, gradient_accumulation_steps=2))
    batches = list(trainer.setup.micro_batches(0))
    for done in (2, 1):
        trainer.parallel.zero_grad()
        for batch in batches[:done]:
            trainer.parallel.forward_backward(*batch, weight=1 / 2)
        trainer.parallel.gather_grads()
        found = trainer.setup.auditor.audit(batches, (1, 2), NEVER)
        assert found.passed == (done == 2)
    assert len(found.wrong) > len(found.rounded) / 2


@needs_kernels
def test_an_audit_of_a_run_in_bfloat16_finds_a_wrong_backward(config, monkeypatch):
    good = linear.linear_backward

    def wrong(dx, dweight, *rest):
        good(dx, dweight, *rest)
        dweight *= np.float32(1.01)

    monkeypatch.setattr(linear, "linear_backward", wrong)
    with pytest.raises(GradientError, match=r"the gradient at iteration 0 is wrong: .*finite differences.*bound 1e-03"):
        run(variant(config, gradcheck_every=1))
