"""A model's weights as they are read when text is written: its own, or with its matrices rounded, which is done once.

    "int8"      w[n, k] ~ scale[n] q[n, k]      scale[n] = max_k |w[n, k]| / 127,   q[n, k] = round(w[n, k] / scale[n])
    "bfloat16"  each number is rounded to the upper half of a float32: see npgpt/kernels/bfloat16.py

Dettmers et al. 2022 (LLM.int8(), section 2.1) call the first one row-wise quantisation.  Biases, layer norms and wpe
stay as they are.

What was rounded is kept for the next text.  A checksum tells whether the model's matrices are still the same: weights
may be changed in place, by an optimizer or by hand.
"""

import math
import threading
import weakref
from typing import NamedTuple

import numpy as np

from npgpt.kernels.bfloat16 import narrowed_ref, widened_ref
from npgpt.kernels.buffers import empty, side_by_side
from npgpt.kernels.jit import KERNELS, kernel, writing
from npgpt.kernels.maths import largest_magnitude
from npgpt.kernels.matmul import share_out
from npgpt.kernels.tiles import fetch
from npgpt.machine import processors
from npgpt.model import GPT

SPACING = np.uint32(0x9E3779B9)  # odd, so that no two of 2^32 places add the same
# a row whose numbers are all smaller counts as zeros, one with a larger number as infinite: 127 w / max |w| would be
NOTHING, TOO_MUCH = 1e-36, 1e36


class Matrix(NamedTuple):
    numbers: np.ndarray  # (N, K) of the model's dtype, int8, or bfloat16 (uint16)
    scale: np.ndarray | None  # (N,) where they are int8
    bias: np.ndarray | None  # (N,)


class Norm(NamedTuple):
    weight: np.ndarray  # (C,)
    bias: np.ndarray  # (C,)
    eps: float


class Layer(NamedTuple):
    ln_1: Norm
    c_attn: Matrix
    scale: float  # of attention's scores
    attn_proj: Matrix
    ln_2: Norm
    c_fc: Matrix
    mlp_proj: Matrix


class Weights(NamedTuple):
    lm_head: Matrix
    wte: Matrix  # the same object, where the two are tied
    wpe: np.ndarray  # (T, C)
    ln_f: Norm
    layers: list


def quantize_ref(w):
    """w (N, K) -> q (N, K) int8 and scale (N,), with w ~ scale[:, None] q.  Of a row that is not finite scale tells."""
    largest, real = np.maximum(w.max(axis=1), -w.min(axis=1)), w.dtype.type
    largest[largest < NOTHING] = 127  # a row of zeros
    largest[largest > TOO_MUCH] = np.inf
    with np.errstate(invalid="ignore"):
        q = np.rint(w * (real(127) / largest)[:, None])
        return np.where(abs(q) <= 127, q, 0).astype(np.int8), largest * real(1 / 127)


@kernel
def quantize(q, scale, w):
    """q, scale = quantize_ref(w)."""
    zero, most, real = w.dtype.type(0), w.dtype.type(127), w.dtype.type
    nothing, too_much = real(NOTHING), real(TOO_MUCH)
    for n in range(len(w)):
        row, q_row, top = w[n], q[n], largest_magnitude(w[n])
        top = real(np.inf) if top > too_much else most if top < nothing else top
        factor = most / top
        for k in range(w.shape[1]):
            number = np.rint(row[k] * factor)
            q_row[k] = np.int8(number if abs(number) <= most else zero)
        scale[n] = top * real(1 / 127)


@kernel
def narrow(halves, w):
    """halves (N, K), uint16 = narrowed_ref(w) for w (N, K), float32."""
    numbers = w.view(np.uint32)
    for n in range(len(w)):
        row, out = numbers[n], halves[n]
        for k in range(w.shape[1]):
            bits = row[k]
            size = np.uint32(bits & np.uint32(0x7FFFFFFF))
            up = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
            up = np.uint32(bits & np.uint32(0x80000000)) if size < np.uint32(0x00800000) else up
            up = np.uint32(bits | np.uint32(0x400000)) if size > np.uint32(0x7F800000) else up
            out[k] = np.uint16(up >> np.uint32(16))


def checksum_ref(words, first):
    """A number that changes if one of words (n,) uint32 does; their places are numbered from `first` on (uint32).

    Each word's place is added to it, and the sum is squared: a number below 2^32 has a square of its own modulo 2^64.
    Before, its upper bits are mixed into the lower ones, or squares of words that change places could add up alike.
    """
    places = (np.arange(len(words), dtype=np.uint64) + np.uint64(first)).astype(np.uint32) * SPACING
    numbers = words + places
    numbers = (numbers ^ (numbers >> np.uint32(15))).astype(np.uint64)
    return (numbers * numbers).sum(dtype=np.uint64)


@kernel
def checksum(total, words, first):
    """total[0] = checksum_ref(words, first)."""
    sums, line = np.uint64(0), words.reshape(1, len(words))
    for begin in range(0, len(words), 256):
        fetch(line[:, begin + 1024 : begin + 1280])  # left to itself, the processor reads half as fast
        few, place = words[begin : begin + 256], np.uint32((first + begin) * SPACING)
        for i in range(len(few)):
            number = np.uint32(few[i] + place)
            number = np.uint64(np.uint32(number ^ (number >> np.uint32(15))))
            sums += number * number
            place = np.uint32(place + SPACING)
    total[0] = sums


if KERNELS == "numpy":  # not by `replaces`: its pairs compute with numbers of one dtype
    quantize, narrow, checksum = writing(quantize_ref), writing(narrowed_ref), writing(checksum_ref)


def rounded(model, kind):
    """A GPT with the numbers that the matrices of another one have as int8 or bfloat16."""
    copy = GPT(model.config, seed=None, dtype=model.lm_head.weight.dtype)
    for (name, parameter), ours in zip(model.named_parameters(), copy.parameters(), strict=True):
        w = parameter.data
        if ours.ndim != 2 or "wpe" in name:
            ours.data[...] = w
        elif kind == "bfloat16":
            ours.data[...] = widened_ref(narrowed_ref(w))
        else:
            q, scale = quantize_ref(w)
            ours.data[...] = scale[:, None] * q
    return copy.eval()


_lock = threading.Lock()
_kept = weakref.WeakKeyDictionary()  # model -> (state, {kind: what was rounded of matrices in this state})


def kind_of(int8, dtype, real):
    """What matrices are rounded to, "int8", "bfloat16", or None.  Raises ValueError for what cannot be."""
    if dtype not in (None, "float32", "bfloat16") or (int8 and dtype == "bfloat16"):
        raise ValueError(f"weights for writing are int8, bfloat16 or neither; got int8={int8}, dtype={dtype!r}")
    if dtype == "bfloat16" and real != np.float32:
        raise ValueError(f"weights of bfloat16 are made from float32, this model has {real}")
    return "int8" if int8 else "bfloat16" if dtype == "bfloat16" else None


def weights_of(model):
    """The Weights of a GPT, which are read where the model has them, if they are contiguous."""
    transformer, layers = model.transformer, []
    for block in transformer.h:
        attn, mlp = block.attn, block.mlp
        c_attn, attn_proj, c_fc, mlp_proj = map(_matrix, (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj))
        scale = 1 / math.sqrt(attn_proj.numbers.shape[1] // attn.n_head) if attn.scale is None else attn.scale
        layers.append(Layer(_norm(block.ln_1), c_attn, scale, attn_proj, _norm(block.ln_2), c_fc, mlp_proj))
    head, wpe = _matrix(model.lm_head), np.ascontiguousarray(transformer.wpe.weight.data)
    wte = head if model.lm_head.weight is transformer.wte.weight else _matrix(transformer.wte)
    return Weights(head, wte, wpe, _norm(transformer.ln_f), layers)


def rounded_weights(model, kind, weights):
    """The Weights of a model with their matrices rounded, or as they are where `kind` is None."""
    if kind is None:
        return weights
    tables = [weights.lm_head] if weights.lm_head is weights.wte else [weights.lm_head, weights.wte]
    matrices = [*tables, *(matrix for layer in weights.layers for matrix in layer if isinstance(matrix, Matrix))]
    found = _rounded_once(model, kind, [matrix.numbers for matrix in matrices])
    new = (Matrix(*pair, matrix.bias) for pair, matrix in zip(found, matrices, strict=True))
    tables = [next(new) for _ in tables]
    layers = [Layer(*(next(new) if isinstance(part, Matrix) else part for part in layer)) for layer in weights.layers]
    return weights._replace(lm_head=tables[0], wte=tables[-1], layers=layers)


def _matrix(layer):
    bias = getattr(layer, "bias", None)
    return Matrix(np.ascontiguousarray(layer.weight.data), None, None if bias is None else bias.data)


def _norm(layer):
    weight, bias = layer.weight.data, layer.bias
    return Norm(weight, np.zeros_like(weight) if bias is None else bias.data, layer.eps)


def _rounded_once(model, kind, matrices):
    """[(numbers, scale or None)] of these matrices of a model, as they were rounded last if nothing has changed."""
    state = _state_of(matrices)
    with _lock:
        if model not in _kept or _kept[model][0] != state:
            _kept[model] = state, {}  # what was rounded before is of no more use
        _, kept = _kept[model]
        if kind not in kept:
            with side_by_side():
                kept[kind] = [_round(w, kind) for w in matrices]
        return kept[kind]


def _round(w, kind):
    if kind == "int8":
        numbers, scale = empty(w.shape, np.int8), np.empty(len(w), w.dtype)
        share_out(lambda rows: quantize(numbers[rows], scale[rows], w[rows]), len(w), processors())
    else:
        numbers, scale = empty(w.shape, np.uint16), None
        share_out(lambda rows: narrow(numbers[rows], w[rows]), len(w), processors())
    return numbers, scale


def _state_of(matrices):
    """What tells whether these are the same numbers as before: the shapes, and a checksum of them all."""
    words = [w.reshape(-1).view(np.uint32) for w in matrices]
    ends, sums = np.cumsum([len(some) for some in words]).tolist(), []

    def share(part):
        total = np.zeros(1, np.uint64)
        for end, some in zip(ends, words, strict=True):
            begin = end - len(some)
            first, last = (max(place - begin, 0) for place in (part.start, part.stop))
            checksum(total, some[first:last], np.uint32((begin + first) % 2**32))
            sums.append(int(total[0]))

    share_out(share, ends[-1], processors())
    return [w.shape for w in matrices], sum(sums) % 2**64
