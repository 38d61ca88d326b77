"""Where arrays come from: `empty`, which within `reuse_buffers(pool)` takes memory that is used no more."""

import collections
import ctypes
import math
import os
import weakref

import numpy as np

from npgpt.context import ThreadState

# With NPGPT_NAN_FILL=1 every array from `empty` starts as NaN, so that reading what was never written fails loudly.
NAN_FILL = os.environ.get("NPGPT_NAN_FILL", "0") not in ("", "0")
LINE = 64  # bytes of a line of the cache
SMALL = 2048  # bytes; below this the memory allocator is as fast as a pool
LARGE = 2**26  # bytes that an arena asks the system for at once, at most, unless one array is larger


class _State(ThreadState):
    pool = None
    arena = None


_state = _State()


class BufferPool:
    """Memory that is used again.

    An array handed out by `empty` stands on a block of memory; when the last reference to the array (or to a view of
    it) is gone, the block goes back to the pool.  So a block is never given out while anybody can still see it, and
    the second training step finds every block that the first one needed.  One pool serves one thread at a time.
    """

    def __init__(self):
        self.free = collections.defaultdict(list)  # size in bytes -> the last loans of blocks that are not in use
        self._loans = {}  # id of a block -> its last loan
        self.nbytes = 0  # memory owned, in use or not

    def empty(self, shape, dtype):
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < SMALL:
            return np.empty(shape, dtype)
        free = self.free[nbytes]
        if free:
            block = free.pop().block
        else:
            block = _aligned_block(nbytes)
            self.nbytes += nbytes
        array = np.ndarray(shape, dtype, block)
        loan = self._loans[id(block)] = _Loan(array, free.append)
        loan.block = block
        return array


class _Loan(weakref.ref):
    """A weak reference to an array, with the block that is free again when the array is gone."""

    __slots__ = ("block",)


def _aligned_block(nbytes):
    # NumPy allocates (it asks for huge pages where they pay), and ctypes holds: an array made on a ctypes object keeps
    # itself, not the memory beneath, as the base of its views, so a view keeps the loan alive.
    return (ctypes.c_char * nbytes).from_buffer(_aligned(nbytes))


def _aligned(nbytes, make=np.empty):
    memory = make(nbytes + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + nbytes]


def _new(shape, dtype, make=np.empty):
    nbytes, arena = math.prod(shape) * dtype.itemsize, _state.arena
    if nbytes < SMALL:
        return make(shape, dtype)
    memory = _aligned(nbytes, make) if arena is None else arena.cut(nbytes)
    return memory.view(dtype).reshape(shape)


class _Arena:
    """Memory, all 0, of which arrays are cut; when it is used up, there is as much again, or LARGE."""

    def __init__(self):
        self.rest, self.nbytes = b"", 0

    def cut(self, nbytes):
        whole_lines = -(-nbytes // LINE) * LINE
        if whole_lines > len(self.rest):
            self.rest = _aligned(max(whole_lines, min(self.nbytes, LARGE)), np.zeros)
            self.nbytes += len(self.rest)
        memory, self.rest = self.rest[:nbytes], self.rest[whole_lines:]
        return memory


def side_by_side():
    """Within this context `empty` and `zeros` cut new arrays from an arena, one behind the other.

    The system maps large memory by pages of 2 MB, but not arrays of a few MB: so weights are read faster.  A part of
    the arena stays as long as one of its arrays does.
    """
    return _state.within(arena=_Arena())


def reuse_buffers(pool):
    """Within this context `empty` takes its memory from `pool`, a BufferPool kept from step to step."""
    return _state.within(pool=pool)


def empty(shape, dtype):
    """An uninitialised array, C-contiguous, from the current pool if there is one.

    It begins at a line of the cache, unless it is small: a vector that lies in two lines takes twice as long to load.
    """
    pool, dtype = _state.pool, np.dtype(dtype)
    array = _new(shape, dtype) if pool is None else pool.empty(shape, dtype)
    if NAN_FILL and array.dtype.kind == "f":
        array.fill(np.nan)
    return array


def zeros(shape, dtype):
    """Like `empty`, filled with zeros; memory that is new gets them from the system, where it is first touched."""
    if _state.pool is None:
        return _new(shape, np.dtype(dtype), np.zeros)
    array = empty(shape, dtype)
    array.fill(0)
    return array


def as_rows(array):
    """An (..., C) array as C-contiguous, writeable (N, C) rows, which is what kernels take.  Copies only if it must."""
    flags = array.flags
    if not (flags.c_contiguous and flags.writeable):
        array = array.copy()
    return array.reshape(-1, array.shape[-1])
