"""Dropout's random bits: a mask is a pure function of (key, row, column).

So the backward makes it again instead of storing it, and how the batch is split over workers does not change it.  The
key comes from the thread's random stream: which masks come next.
"""

from typing import NamedTuple

import numpy as np

from npgpt.context import ThreadState
from npgpt.kernels.jit import helper


class _State(ThreadState):
    seed = 0
    calls = 0
    batch_offset = 0


_state = _State()


def random_stream(seed, batch_offset=0, drawn=0):
    """Within this context dropout draws its masks from `seed` (a uint32), one mask after the other.

    batch_offset: index of the first sequence of this batch in a larger batch that is split over workers, so that a
    sequence gets the same mask however the batch is split.
    drawn: number of masks that were drawn before, where the stream goes on (see masks_drawn).
    """
    return _state.within(seed=int(seed), calls=drawn, batch_offset=int(batch_offset))


def masks_drawn():
    """How many random masks were drawn so far from the stream of this context."""
    return _state.calls


def next_random_key():
    """(key, batch_offset) for the next random mask: key is a uint32 made of the stream's seed and a running number."""
    _state.calls += 1
    key = (_state.seed * 0x9E3779B1 + _state.calls * 0x85EBCA77) & 0xFFFFFFFF
    return np.uint32(key), _state.batch_offset


class Dropout(NamedTuple):
    """What a batch drops: with which probability, by which mask, from which sequence of the whole batch on."""

    p: float = 0.0
    key: np.uint32 = np.uint32(0)
    batch_offset: int = 0


def mix32_ref(x):
    """mix32 for an array of uint32."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x85EBCA6B)
    x = x ^ (x >> np.uint32(13))
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def dropout_mask_ref(key, first_row, shape, p):
    """Zeros and ones, shape (N, C), for rows first_row ... first_row + N - 1 of the mask named by key (uint32)."""
    rows = np.uint64(first_row) + np.arange(shape[0], dtype=np.uint64)
    low, high = rows.astype(np.uint32), (rows >> np.uint64(32)).astype(np.uint32)
    bits = mix32_ref(mix32_ref(low ^ key) + mix32_ref(high + np.uint32(0x9E3779B9)))  # (N,) row_key
    columns = np.arange(shape[1], dtype=np.uint32) * np.uint32(0x9E3779B9)
    return mix32_ref(bits[:, None] + columns) >= np.uint32(p * 2**32)


@helper
def mix32(x):
    """Scramble 32 bits: the finaliser of MurmurHash3 (Appleby 2011), in which each input bit flips half of the output.

    Numba widens the result of integer arithmetic to 64 bits; np.uint32 cuts it back.
    """
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x85EBCA6B))
    x = np.uint32(x ^ (x >> np.uint32(13)))
    x = np.uint32(x * np.uint32(0xC2B2AE35))
    return np.uint32(x ^ (x >> np.uint32(16)))


@helper
def row_key(key, row):
    """32 random bits for row number `row` (uint64) of the mask with this `key` (uint32)."""
    low = np.uint32(row & np.uint64(0xFFFFFFFF))
    high = np.uint32(row >> np.uint64(32))
    return mix32(np.uint32(mix32(np.uint32(low ^ key)) + mix32(np.uint32(high + np.uint32(0x9E3779B9)))))


@helper
def keeps(bits, column, threshold):
    """Whether the element in `column` (uint32) of the row with these `bits` is kept; `threshold` = rate * 2^32."""
    return mix32(np.uint32(bits + column * np.uint32(0x9E3779B9))) >= threshold
