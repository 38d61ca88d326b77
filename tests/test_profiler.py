"""Where the time goes, and that the FLOPs which are counted are the ones which are done."""

import threading
import time

import numpy as np
import pytest

from npgpt import GPT, AdamW, DataParallel, GPTConfig
from npgpt.kernels.jit import KERNELS
from npgpt.kernels.profiler import Profile, measured, measuring, profiling
from npgpt.muon import Muon


@measured("sleep", cost=lambda seconds: (3, 5))
def sleep(seconds):
    time.sleep(seconds)
    return "awake"


@measured("outer", cost=lambda: (1, 1))
def outer():
    sleep(0.01)


def test_calls_costs_and_seconds_of_what_is_measured():
    profile = Profile()
    sleep(0.0)  # nothing is being profiled
    with profiling(profile):
        assert sleep(0.01) == sleep(0.02) == "awake"
        time.sleep(0.01)
    with profiling(profile):
        sleep(0.0)
    sleep(0.0)
    row = profile.rows["sleep"]
    assert set(profile.rows) == {"sleep"} and profile.entries == 2
    assert (row.calls, row.flops, row.nbytes) == (3, 9, 15)
    assert 0.03 <= row.seconds <= profile.seconds - 0.01


def test_a_call_within_a_call_belongs_to_the_outer_one():
    profile = Profile()
    with profiling(profile):
        outer()
        sleep(0.0)
    assert profile.rows["outer"].calls == profile.rows["sleep"].calls == 1


@pytest.mark.skipif(KERNELS == "numpy", reason="the references write a product as @")
def test_a_product_has_a_row_of_its_own_and_its_caller_the_rest():
    import npgpt.ops.linear as linear

    y, x, weight, bias = np.empty((5, 3)), np.ones((5, 4)), np.ones((3, 4)), np.ones(3)
    linear.linear_forward(y, x, weight, bias)  # compiles
    profile = Profile()
    with profiling(profile):
        linear.linear_forward(y, x, weight, bias)
        with measuring("whole", lambda: (120, 0)):
            linear.linear_forward(y, x, weight, bias)
    rows = profile.rows
    assert set(rows) == {"product 5 x 4 x 3", "linear_forward", "whole"}
    assert [rows[name].flops for name in ("product 5 x 4 x 3", "linear_forward", "whole")] == [120, 0, 120]
    assert all(row.calls == 1 and row.seconds > 0 for row in rows.values())
    assert sum(row.seconds for row in rows.values()) <= profile.seconds


def test_other_threads_are_not_measured():
    profile = Profile()
    with profiling(profile):
        thread = threading.Thread(target=sleep, args=(0.01,))
        thread.start()
        thread.join()
    assert profile.rows == {} and profile.entries == 1


def test_a_call_that_fails_is_measured_too_and_those_after_it():
    @measured("fail", cost=lambda: (0, 0))
    def fail():
        raise OSError

    profile = Profile()
    with profiling(profile):
        with pytest.raises(OSError):
            fail()
        sleep(0.0)
    assert set(profile.rows) == {"fail", "sleep"}


@pytest.mark.parametrize("make_optimizer", [AdamW, lambda flat: Muon(flat, rate=2.0)], ids=["AdamW", "Muon"])
def test_the_ops_flops_are_those_of_the_formula(make_optimizer):
    config = GPTConfig(vocab_size=17, block_size=9, n_layer=2, n_head=3, n_embd=12, bias=True)
    parallel = DataParallel(GPT(config, seed=0), workers=1)
    optimizer = make_optimizer(parallel.flat)
    idx = np.random.default_rng(0).integers(0, 17, (2, 5, 9))
    profile = Profile()
    with profiling(profile):
        parallel.zero_grad()
        parallel.forward_backward(*idx)
        parallel.gather_grads()
        parallel.update(optimizer, 1e-3, 1.0)
    parallel.close()
    rows = profile.rows
    assert {"embedding_backward", "attention_forward", "adamw", "sum_of_squares"} <= set(rows)
    assert sum(row.flops for name, row in rows.items() if name != "muon") == config.training_flops(5, 9)
    assert all(row.seconds > 0 and row.nbytes > 0 for row in rows.values())
    assert rows["linear_forward"].calls == 2 * 2 + 1 and rows["mlp_backward"].calls == 2
    assert rows["adamw"].nbytes <= 4 * parallel.flat.weights.nbytes
    if "muon" in rows:
        square = 17 * 12 * 12 * 13  # of each of the 6 matrices of a block: q, k, v, c_proj, c_fc, mlp.c_proj
        assert rows["muon"].flops == 2 * (6 * square + 4 * 12 * 12 * 12 * 12)


def test_a_steps_flops_are_six_for_each_weight_and_token_and_those_of_attention():
    config = GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768, bias=True)
    weights = 12 * 12 * 768**2 + 50257 * 768
    assert config.training_flops(1, 1) == 6 * weights + 12 * 12 * 768
    assert config.training_flops(2, 1024) == 2 * (6 * 1024 * weights + 12 * 12 * 768 * 1024 * 1025 // 2)


def test_a_kernel_is_wrapped_only_while_a_profile_is_made():
    """So a debugger's stack shows an op, its kernel's reference, and nothing in between."""
    import npgpt.ops.linear as linear
    import npgpt.ops.mlp as mlp
    from npgpt.kernels import matmul as products

    before = linear.linear_forward, products.matmul, linear.matmul
    assert before[1] is before[2] and not hasattr(before[0], "__wrapped__")
    profile = Profile()
    with pytest.raises(OSError), profiling(profile):
        assert linear.linear_forward.__wrapped__ is before[0]
        assert products.matmul is linear.matmul is mlp.matmul and products.matmul.__wrapped__ is before[1]
        with measuring("outer", lambda n: (n, 1), 7):
            linear.matmul(np.empty((2, 3)), np.ones((2, 4)), np.ones((4, 3)))
        products.matmul(np.empty((2, 3)), np.ones((2, 4)), np.ones((4, 3)))
        raise OSError
    assert (linear.linear_forward, products.matmul, linear.matmul) == before
    assert profile.rows["outer"].flops == 7 and profile.rows["product 2 x 4 x 3"].calls == 1


def test_a_profile_within_another_one_leaves_it_at_work():
    around, within = Profile(), Profile()
    with profiling(around):
        sleep(0.0)
        with profiling(within):
            sleep(0.0)
        sleep(0.0)
    sleep(0.0)
    assert (around.rows["sleep"].calls, within.rows["sleep"].calls) == (2, 1)


def test_after_a_call_whose_arguments_have_no_cost_the_next_ones_are_measured():
    product = measured("product", cost=lambda a: (a.shape[1], 0))(lambda a: a.sum(axis=1))
    profile = Profile()
    with profiling(profile):
        with pytest.raises(IndexError):
            product(np.zeros(3))
        sleep(0.0)
    assert set(profile.rows) == {"sleep"}
