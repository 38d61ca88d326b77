"""A batch split over worker threads trains the same model, and how many threads there are."""

import math
import os
import platform
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from test_crew import Busy, begins_late

from npgpt import GPT, AdamW, DataParallel, GPTConfig, no_grad, random_stream
from npgpt.kernels import blas, jit, matmul
from npgpt.kernels.blas import blas_kernels, blas_threads, get_blas_threads
from npgpt.kernels.vectors import VECTOR
from npgpt.model import Block
from npgpt.muon import Muon
from npgpt.optim import clip_scale
from npgpt.run import parallel
from npgpt.run.parallel import choose_threads
from npgpt.run.ranks import World


def small_gpt(dropout=0.0, dtype=np.float32):
    config = GPTConfig(vocab_size=13, block_size=8, n_layer=2, n_head=2, n_embd=12, dropout=dropout, bias=True)
    return GPT(config, seed=3, dtype=dtype)


def batches(n, batch_size=5, T=7, seed=0):
    """Sequences that can be learned: each token is the one before it plus 1 or 2."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        steps = rng.integers(1, 3, (batch_size, T + 1))
        steps[:, 0] = rng.integers(0, 13, batch_size)
        tokens = steps.cumsum(axis=1) % 13
        yield tokens[:, :-1], tokens[:, 1:]


@pytest.fixture(autouse=True)
def many_processors(monkeypatch):
    """Workers run side by side, and BLAS threads too, also where there are few processors."""
    for module in (blas, matmul, parallel):
        monkeypatch.setattr(module, "processors", lambda: 64)


@pytest.fixture
def workers():
    """workers(model, n): a DataParallel that is closed when the test ends."""
    opened = []

    def make(*args):
        opened.append(DataParallel(*args))
        return opened[-1]

    yield make
    for data_parallel in opened:
        data_parallel.close()


class OtherMachines(World):
    """The only rank, which notes what it would send to those on other machines."""

    between_machines = True

    def __init__(self):
        self.begun = []

    def start_sum(self, array):
        self.begun.append((array, array.copy()))


def frozen(model):
    for parameter in (model.transformer.wte.weight, model.transformer.h[1].attn.c_attn.weight):
        parameter.requires_grad = False


def one_block_in_two_places(model):
    model.transformer.h[2] = model.transformer.h[0]


@pytest.mark.parametrize("n, change, sent", [
    (1, None, 3), (2, None, None), (1, frozen, 3), (1, one_block_in_two_places, 2),
])  # fmt: skip
def test_what_is_sent_early_is_complete_and_the_model_is_left_alone(workers, monkeypatch, n, change, sent):
    monkeypatch.setattr(parallel, "BUCKET", 1)
    config = GPTConfig(vocab_size=13, block_size=8, n_layer=3, n_head=2, n_embd=12, dropout=0.1, bias=True)
    model, world = GPT(config, seed=3), OtherMachines()
    if change:
        change(model)
    split = workers(model, n, 1, world)
    for (idx, targets), last in zip(batches(2), (False, True), strict=True):
        assert not world.begun
        split.forward_backward(idx, targets, last=last)
    assert sent is None or len(world.begun) == sent
    for array, when_sent in world.begun:  # block by block, each with all that the backward had to add to it
        np.testing.assert_array_equal(array, when_sent)
        assert array.any()
    assert all(type(block) is Block for block in model.transformer.h)


def train(data_parallel, steps=50, batch_size=5, n_micro=1, make_optimizer=AdamW):
    """Steps of an optimizer -> the loss of each."""
    optimizer = make_optimizer(data_parallel.flat)
    losses = []
    data = batches(steps * n_micro, batch_size)
    for step in range(steps):
        data_parallel.zero_grad()
        loss = 0.0
        for micro in range(n_micro):
            seed = step * n_micro + micro
            loss += data_parallel.forward_backward(*next(data), seed=seed, weight=1 / n_micro) / n_micro
        norm = math.sqrt(data_parallel.gather_grads())
        data_parallel.update(optimizer, 3e-3, clip_scale(norm, 1.0))
        losses.append(loss)
    return np.array(losses)


def gradients(data_parallel, *micro_batches, weight=1.0, seed=4):
    """All parameters' gradients, flat, and their norm."""
    data_parallel.zero_grad()
    for idx, targets in micro_batches:
        data_parallel.forward_backward(idx, targets, seed=seed, weight=weight)
    norm = math.sqrt(data_parallel.gather_grads())
    return data_parallel.flat.grads.copy(), norm


# --------------------------------------------------------------------------------------------------------------------
# Splitting changes nothing


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_any_number_of_workers_trains_the_same_and_the_same_number_gives_the_same_bits(workers, dropout):
    """With dropout, too: a sequence's mask does not depend on the worker that it falls to."""
    curves = {}
    for n in (1, 2, 3):
        first, again = workers(small_gpt(dropout), n), workers(small_gpt(dropout), n)
        curves[n] = train(first)
        np.testing.assert_array_equal(train(again), curves[n])
        np.testing.assert_array_equal(again.flat.weights, first.flat.weights)
    assert curves[1][-5:].mean() < curves[1][0] - 0.5  # something is learned
    np.testing.assert_allclose(curves[2], curves[1], rtol=1e-4)
    np.testing.assert_allclose(curves[3], curves[1], rtol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_gradients_of_the_workers_add_up_to_the_models(workers, n, dropout):
    (batch,) = batches(1)
    plain = small_gpt(dropout, np.float64)
    with random_stream(4):
        _, loss = plain(*batch)
    loss.backward()
    split = workers(small_gpt(dropout, np.float64), n)
    for replica in split.replicas:
        for parameter in replica.model.parameters():
            parameter.grad_buffer[...] = np.nan  # whatever was there before
    flat_grads, norm = gradients(split, batch)
    for name, parameter in plain.named_parameters():
        ours = flat_grads[split.flat.names[name]].reshape(parameter.shape)
        np.testing.assert_allclose(ours, parameter.grad, rtol=1e-10, atol=1e-12, err_msg=name)
    squares = sum(float((parameter.grad**2).sum()) for parameter in plain.parameters())
    assert norm == pytest.approx(np.sqrt(squares))
    assert split.forward_backward(*batch, seed=4) == pytest.approx(loss.item())


@pytest.mark.parametrize("n", [1, 2, 3])
def test_gradients_of_micro_steps_add_up_with_their_weights(workers, n):
    first, second = batches(2, batch_size=4)
    whole = np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]])
    split = workers(small_gpt(dtype=np.float64), n)
    in_one, _ = gradients(split, whole)
    in_two, _ = gradients(split, first, second, weight=0.5)
    np.testing.assert_allclose(in_two, in_one, rtol=1e-10, atol=1e-12)


def test_an_update_starts_from_no_gradient(workers):
    first, second = batches(2)
    used, fresh = workers(small_gpt(), 3), workers(small_gpt(), 3)
    gradients(used, first)
    np.testing.assert_array_equal(gradients(used, second)[0], gradients(fresh, second)[0])


def test_a_batch_smaller_than_the_number_of_workers(workers):
    one, five = workers(small_gpt(), 1), workers(small_gpt(), 5)
    np.testing.assert_allclose(train(five, 5, batch_size=2), train(one, 5, batch_size=2), rtol=1e-4)
    np.testing.assert_allclose(train(five, 5, batch_size=1), train(one, 5, batch_size=1), rtol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ignored_targets_count_in_no_share(workers, n):
    """The loss is the mean over all targets of the batch that count, however unevenly the shares have them."""
    ((idx, targets),) = batches(1, batch_size=6)
    targets = targets.copy()
    targets[0, 1:] = targets[1] = targets[2] = -1  # with 3 workers, one has nothing to learn from
    plain = small_gpt(dtype=np.float64)
    _, loss = plain(idx, targets)
    loss.backward()
    split = workers(small_gpt(dtype=np.float64), n)
    split.zero_grad()
    assert split.forward_backward(idx, targets) == pytest.approx(loss.item())
    split.gather_grads()
    for name, parameter in plain.named_parameters():
        ours = split.flat.grads[split.flat.names[name]].reshape(parameter.shape)
        np.testing.assert_allclose(ours, parameter.grad, rtol=1e-10, atol=1e-12, err_msg=name)


def test_every_worker_takes_part(workers):
    for n in (1, 2, 3, 5):
        split = workers(small_gpt(), n)
        split.forward_backward(*next(batches(1)))
        assert len(split.replicas) == n
        assert all(parameter.grad is not None for replica in split.replicas for parameter in replica.model.parameters())
        for size in (1, 5, 12):
            shares = split._shares(size)
            assert [start for start, _ in shares] == [0, *(stop for _, stop in shares[:-1])] and shares[-1][1] == size
            assert max(b - a for a, b in shares) - min(b - a for a, b in shares) <= 1


def test_workers_share_the_weights_and_keep_them_shared(workers):
    split = workers(small_gpt(), 3)
    train(split, 2)
    for replica in split.replicas:
        for ours, theirs in zip(replica.model.parameters(), split.model.parameters(), strict=True):
            assert np.shares_memory(ours.data, split.flat.weights)
            np.testing.assert_array_equal(ours.data, theirs.data)


def test_the_slices_of_the_update_cover_all_weights_once(workers):
    for n in (1, 2, 3, 5):
        split = workers(small_gpt(), n)
        covered = np.zeros(len(split.flat.weights), int)
        for part in split.slices:
            covered[part] += 1
        assert len(split.slices) == n and (covered == 1).all()


def test_buffers_are_found_again_from_step_to_step(workers):
    split = workers(small_gpt(dropout=0.1), 2)
    train(split, 2, batch_size=24)
    before = [replica.pool.nbytes for replica in split.replicas]
    train(split, 4, batch_size=24)
    assert [replica.pool.nbytes for replica in split.replicas] == before
    assert all(before)


# --------------------------------------------------------------------------------------------------------------------
# More workers than processors


def threads_of_workers():
    return {thread for thread in threading.enumerate() if thread.name.startswith("npgpt-worker")}


@pytest.mark.parametrize(
    "make_optimizer, blas_threads", [(AdamW, 1), (lambda flat: Muon(flat, rate=5.0), 1), (AdamW, 2)]
)
def test_workers_that_take_turns_give_the_bits_of_workers_side_by_side(
    workers, monkeypatch, make_optimizer, blas_threads
):
    results, before = {}, threads_of_workers()
    for processors in (64, 2, 1):
        monkeypatch.setattr(parallel, "processors", lambda n=processors: n)
        split = workers(small_gpt(0.2), 8, blas_threads)
        losses = train(split, 20, batch_size=19, n_micro=2, make_optimizer=make_optimizer)
        after = threads_of_workers()
        assert len(after - before) <= min(processors, 8 * blas_threads) - 1
        assert processors != 2 or len(after - before) == 1
        before, grads = after, gradients(split, next(batches(1, batch_size=19)))
        split.train(False)
        validation = split.loss(*next(batches(1, batch_size=13)))
        results[processors] = [losses, *grads, validation, split.flat.weights.copy()]
    for found in (results[2], results[1]):
        for ours, expected in zip(found, results[64], strict=True):
            np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("processors", [1, 2, 3])
def test_no_more_workers_are_busy_at_a_time_than_there_are_processors(workers, monkeypatch, processors):
    monkeypatch.setattr(parallel, "processors", lambda: processors)
    split, work = workers(small_gpt(), 8), Busy(processors)
    for _ in range(3):
        assert split.each(work) == list(range(8))
    assert work.most == len(set(work.met)) == processors


# --------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize("n", [1, 2, 3])
def test_loss_is_the_models_and_counts_the_targets(workers, n):
    model = small_gpt(dropout=0.3)
    split = workers(model, n)
    ((idx, targets),) = batches(1, batch_size=6)
    targets = targets.copy()
    targets[0, 1:] = targets[4] = -1
    split.train(False)
    with no_grad():
        expected = model(idx, targets)[1].item()
    total, count = split.loss(idx, targets)
    assert count == (targets != -1).sum() == 6 * 7 - 6 - 7
    assert total / count == pytest.approx(expected, rel=1e-5)
    assert all(parameter.grad is None for replica in split.replicas for parameter in replica.model.parameters())


def test_loss_where_a_worker_or_every_worker_has_no_target(workers):
    split = workers(small_gpt(), 3)
    ((idx, targets),) = batches(1, batch_size=3)
    alone, _ = split.loss(idx[2:], targets[2:])
    targets = targets.copy()
    targets[:2] = -1
    total, count = split.loss(idx, targets)
    assert count == 7 and total == pytest.approx(alone, rel=1e-5)
    targets[2] = -1
    assert split.loss(idx, targets) == (0, 0)


def test_train_switches_dropout_of_every_worker(workers):
    split = workers(small_gpt(dropout=0.5), 3)
    batch = next(batches(1, batch_size=6))
    split.train(False)
    assert len({split.forward_backward(*batch, seed=seed) for seed in (1, 2)}) == 1
    split.train(True)
    assert len({split.forward_backward(*batch, seed=seed) for seed in (1, 2)}) == 2


# --------------------------------------------------------------------------------------------------------------------
# Errors and threads


@pytest.mark.parametrize("position", [0, 5])
def test_an_error_in_any_worker_reaches_the_caller_and_the_next_step_works(workers, position):
    split = workers(small_gpt(), 3)
    ((idx, targets),) = batches(1, batch_size=6)
    broken = idx.copy()
    broken[position] = 99
    with pytest.raises(ValueError, match=r"embedding: idx must lie in 0 \.\. 12, got"):
        split.forward_backward(broken, targets)
    fresh = workers(small_gpt(), 3)
    np.testing.assert_array_equal(gradients(split, (idx, targets))[0], gradients(fresh, (idx, targets))[0])


def test_an_error_is_raised_only_after_all_workers_have_stopped(workers):
    """Else the caller could start the next step while a worker still writes its gradients."""
    split, finished = workers(small_gpt(), 3), []
    started = threading.Event()

    def work(rank):
        if rank == 0:
            started.wait(5)
            raise ZeroDivisionError
        started.set()
        threading.Event().wait(0.05)
        finished.append(rank)

    with pytest.raises(ZeroDivisionError):
        split.each(work)
    assert sorted(finished) == [1, 2]


def test_a_worker_that_begins_after_an_interrupt_adds_to_no_gradient(workers, monkeypatch):
    split, (idx, targets) = workers(small_gpt(), 3), next(batches(1))
    with monkeypatch.context() as patch:
        late = begins_late(patch)
        with pytest.raises(KeyboardInterrupt):
            split.forward_backward(idx, targets)
    split.zero_grad()
    late[0].join(5)
    assert not any(replica.flat.grads.any() for replica in split.replicas)


def test_results_come_in_the_order_of_the_workers(workers):
    assert workers(small_gpt(), 4).each(lambda rank: rank * 10) == [0, 10, 20, 30]


def test_a_closed_model_has_no_threads_left():
    before = threads_of_workers()
    data_parallel = DataParallel(small_gpt(), 3)
    train(data_parallel, 1)
    begun = threads_of_workers() - before
    assert begun
    data_parallel.close()
    assert not any(thread.is_alive() for thread in begun)


needs_known_blas = pytest.mark.skipif(get_blas_threads() is None, reason="NumPy's BLAS is not one we know how to ask")


def test_the_blas_of_numpys_own_packages_is_known():
    try:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    except (TypeError, KeyError):
        pytest.skip("this version of NumPy does not say what it was built with")
    if sys.platform != "linux" or blas != "scipy-openblas":
        pytest.skip(f"NumPy's BLAS is {blas}, on {sys.platform}")
    assert get_blas_threads() >= 1


@needs_known_blas
def test_blas_threads_are_set_and_set_back():
    before = get_blas_threads()
    with blas_threads(1):
        assert get_blas_threads() == 1
        with blas_threads(2):
            assert get_blas_threads() == 2
        assert get_blas_threads() == 1
    assert get_blas_threads() == before
    with pytest.raises(ZeroDivisionError), blas_threads(1):
        raise ZeroDivisionError
    assert get_blas_threads() == before


@needs_known_blas
def test_blas_has_no_more_threads_than_there_are_processors(monkeypatch):
    monkeypatch.setattr(blas, "processors", lambda: 2)
    with blas_threads(8):
        assert get_blas_threads() == 2
    with blas_threads(1):
        assert get_blas_threads() == 1


@pytest.mark.skipif(jit.KERNELS == "numpy" or VECTOR < 64, reason="our product is for kernels, and for AVX-512")
def test_what_threads_share_has_the_same_bits_for_any_number_of_them(monkeypatch):
    monkeypatch.setattr(matmul, "processors", lambda: 3)
    shares, share_out, found = [], matmul.share_out, {}

    def counted(work, n, threads, unit=1):
        shares.append(threads)
        return share_out(work, n, threads, unit)

    monkeypatch.setattr(matmul, "share_out", counted)
    idx, targets = next(batches(1))
    for few in (2**18, 0):  # of so few numbers nothing is shared
        monkeypatch.setattr(matmul, "FEW", few)
        for threads in (1, 2, 3):
            model = small_gpt(dropout=0.3)
            with blas_threads(threads), random_stream(0):
                _, loss = model(idx, targets)
                loss.backward()
            found[few, threads] = [loss.data.tobytes()] + [p.grad.tobytes() for p in model.parameters()]
    assert all(bits == found[0, 1] for bits in found.values())
    each = 2 * (2 * 2) + 1  # attention and the MLP of two blocks, forward and backward, and cross-entropy's backward
    assert shares == [2] * each + [3] * each


@pytest.mark.skipif(jit.KERNELS == "numpy" or VECTOR < 64, reason="our product is for kernels, and for AVX-512")
def test_a_product_has_the_same_shares_and_fewer_threads_where_there_are_fewer_processors(monkeypatch):
    a, b = np.random.default_rng(0).standard_normal((2, 300, 300), np.float32)
    results, threads, multiply = [], set(), matmul.multiply

    def seen(*args):
        threads.add(threading.current_thread())
        multiply(*args)

    monkeypatch.setattr(matmul, "multiply", seen)
    for processors, least in ((64, 2), (2, 1), (1, 1)):
        for module in (blas, matmul):
            monkeypatch.setattr(module, "processors", lambda n=processors: n)
        monkeypatch.setattr(matmul, "_helpers", matmul._Helpers())
        threads.clear()
        with blas_threads(8):
            results.append(np.empty((300, 300), np.float32))
            matmul.matmul(results[-1], a, b)
        assert least <= len(threads) <= processors
    assert np.array_equal(results[1], results[0]) and np.array_equal(results[2], results[0])


@needs_known_blas
def test_the_workers_products_use_their_number_of_blas_threads(workers):
    before = get_blas_threads()
    for n in (1, 2):
        split = workers(small_gpt(), 2, n)
        assert split.each(lambda rank: get_blas_threads()) == [n, n]
        assert get_blas_threads() == before


def test_the_blas_kernels_are_those_that_openblas_was_told_to_use():
    if blas_kernels() is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("NumPy's BLAS is not an OpenBLAS for this kind of processor")
    code = "from npgpt.kernels.blas import blas_kernels; print(blas_kernels())"
    for wanted in ("Nehalem", "Sandybridge"):
        environment = {**os.environ, "OPENBLAS_CORETYPE": wanted}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == wanted


def test_an_unknown_blas_is_left_alone(monkeypatch):
    monkeypatch.setattr("npgpt.kernels.blas._blas_functions", lambda: None)
    assert get_blas_threads() is blas_kernels() is None
    with blas_threads(3):
        pass


BLAS_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


@pytest.fixture
def machine(monkeypatch):
    """machine(cores=8, processors=16, OMP_NUM_THREADS="4"): what choose_threads finds."""

    def pretend(cores, processors=64, **variables):
        monkeypatch.setattr(parallel, "cores", lambda: cores)
        monkeypatch.setattr(parallel, "processors", lambda: processors)
        for name in BLAS_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return pretend


@pytest.mark.parametrize(
    "cores, batch_size, block_size, expected",
    [
        (1, 12, 64, (1, 1)),
        (2, 12, 64, (2, 1)),
        (8, 12, 64, (3, 2)),  # 768 tokens: three workers are worth their pass over the gradients
        (8, 4, 64, (1, 8)),
        (8, 1, 1024, (1, 8)),  # a single sequence cannot be split
        (8, 2, 1024, (2, 4)),
        (4, 64, 256, (4, 1)),
        (8, 1, 1, (1, 8)),
    ],
)
def test_workers_and_blas_threads_fill_the_cores(machine, cores, batch_size, block_size, expected):
    machine(cores)
    assert choose_threads(batch_size, block_size) == expected


def test_what_the_user_chose_is_kept(machine):
    machine(8)
    assert choose_threads(12, 64, workers=2) == (2, 4)
    assert choose_threads(12, 64, workers=16, blas=3) == (12, 3)
    assert choose_threads(12, 64, blas=5) == (3, 5)
    for name in BLAS_VARIABLES:
        machine(8, **{name: "2"})
        assert choose_threads(1, 64) == (1, 2)
        assert choose_threads(1, 64, blas=4) == (1, 4)
    machine(8, OMP_NUM_THREADS="nonsense", MKL_NUM_THREADS="0")
    assert choose_threads(1, 64) == (1, 8)


def test_no_more_threads_are_chosen_than_processors_can_run(machine):
    """Workers take turns: there may be any number of them.  BLAS threads cannot."""
    machine(2, processors=2)
    assert choose_threads(12, 64, workers=8) == (8, 1)
    assert choose_threads(64, 64, workers=16, blas=4) == (16, 1)
    assert choose_threads(12, 64, workers=2, blas=2) == (2, 1)
    assert choose_threads(12, 64, workers=1, blas=8) == choose_threads(12, 64, blas=8) == (1, 2)
    machine(2, processors=4)  # two hyperthreads of each core are used if they are asked for
    assert choose_threads(12, 64) == (2, 1)
    assert choose_threads(12, 64, workers=4) == (4, 1)
    assert choose_threads(12, 64, workers=2, blas=2) == choose_threads(12, 64, blas=2) == (2, 2)
    assert choose_threads(12, 64, workers=1) == (1, 2)
    assert choose_threads(12, 64, workers=1, blas=9) == (1, 4)
    machine(1, processors=1)
    assert choose_threads(12, 64) == choose_threads(12, 64, blas=8) == (1, 1)
    assert choose_threads(12, 64, workers=3, blas=8) == (3, 1)


def test_workers_that_cannot_be_used_leave_their_cores_to_blas(machine):
    machine(8)
    assert choose_threads(1, 64, workers=4) == (1, 8)


@pytest.mark.skipif(jit.KERNELS == "numpy", reason="the references return fresh arrays")
@pytest.mark.parametrize(
    "make_optimizer, bound", [(AdamW, 64 * 1024), (lambda flat: Muon(flat, rate=5.0), 96 * 1024)], ids=["AdamW", "Muon"]
)
@pytest.mark.parametrize("dropout, dtype", [(0.0, "float32"), (0.1, "float32"), (0.0, "bfloat16")])
def test_a_steady_step_allocates_no_large_array(workers, make_optimizer, bound, dropout, dtype):
    """All that is allocated on the way, taken together, stays below the bound; one activation would have 192 KiB."""
    model = GPT(GPTConfig(vocab_size=65, block_size=64, n_layer=1, n_head=4, n_embd=128, dropout=dropout))
    split = workers(model, 2)
    split.dtype = dtype
    optimizer = make_optimizer(split.flat)
    idx, targets = np.random.default_rng(0).integers(0, 65, (2, 12, 64))

    def step():
        split.zero_grad()
        split.forward_backward(idx, targets)
        split.gather_grads()
        split.update(optimizer, 1e-3, 1.0)

    for _ in range(3):
        step()
    tracemalloc.start()
    try:
        step()
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        step()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < bound


def test_evaluation_takes_a_fraction_of_the_memory_of_a_training_step():
    config = GPTConfig(vocab_size=65, block_size=64, n_layer=8, n_head=2, n_embd=64)
    trained, evaluated = (DataParallel(GPT(config, seed=0), workers=1) for _ in range(2))
    idx = np.random.default_rng(0).integers(0, 65, (2, 4, 64))
    trained.forward_backward(*idx)
    evaluated.loss(*idx)
    trained.close()
    evaluated.close()
    assert evaluated.replicas[0].pool.nbytes < trained.replicas[0].pool.nbytes / 4
