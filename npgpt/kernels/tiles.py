"""Small matrix products inside kernels, and products of few rows; large ones are in packed.py.

BLAS is made for large matrices.  The products of attention are (T, hs) times (hs, T) for one head of one sequence: of
its peak BLAS reaches there a half, and it has no word for "only the keys that the causal mask leaves".

Here a product is cut into tiles of the output, ROWS rows by two vectors of columns.  A tile's sums stay in registers
while k runs; each step loads two vectors of b, copies ROWS numbers of a to all lanes of a vector, and multiplies and
adds 2 ROWS vectors:

    for k in range(K):
        for r in range(ROWS):
            out[i + r, j:j+WIDTH] += a[i + r, k] * b[k, j:j+WIDTH]

The compiler would vectorise the loop over columns, but store the sums to memory in every step.  So `_tile` spells it
out in LLVM's own vectors.

A product of few rows with a large matrix (npgpt/generate/decode.py) is another matter: there w must be fetched from
memory, row by row, and each sum is a dot product along a row (`dots`).

LLVM reads and writes where it is told, also beyond an array, and Numba's bounds checks do not see it.  So `product`,
`transpose` and `dots` compare the shapes first, once in a call: ValueError if they do not fit, and nothing is written.
"""

import itertools

from npgpt.kernels.bfloat16 import Totals, can_pack, load_across, load_along, numbers_in, steps_of, vector_for
from npgpt.kernels.jit import KERNELS, helper, intrinsic
from npgpt.kernels.vectors import (
    IS_AMD,
    NARROW,
    VECTOR,
    are_fit,
    below,
    constant,
    load_vector,
    load_wide,
    not_beyond,
    pick,
    pointer_to,
    prefetch,
    splat,
    store_vector,
    sum_each,
    vector_of,
    written,
)

if KERNELS == "numba":
    from llvmlite import ir
    from numba import config, types
    from numba.core import cgutils

# rows of a tile: its 2 ROWS sums must fit into the registers, of which AVX-512 has 32, the others 16 (or 32 short ones)
ROWS = 8 if VECTOR == 64 else 4
COLUMNS = 6 if VECTOR == 64 else 4  # of the output that `dots` makes of four rows at a time
LINE, PAGE = 64, 4096  # bytes of a line of the cache, and of a page of memory
AHEAD = 16384  # bytes that `dots` is ahead of itself, at least, in what it has fetched from memory


def share_of(n, unit, i, parts):
    """Where the i-th of so many parts of n begins and ends, in whole units but for the last one; for kernels, too."""
    units = (n + unit - 1) // unit
    return min(n, units * i // parts * unit), min(n, units * (i + 1) // parts * unit)


@helper(loops=False)
def in_line(x):
    """Whether the numbers along the last axis of x lie side by side, if there are any."""
    return x.strides[-1] == x.itemsize or x.shape[-1] < 2 or x.size == 0


@helper(loops=False)
def product(out, a, b, add):
    """Inside a kernel: out = a @ b, or out += a @ b where `add` is true.

    out (M, N), a (M, K), b (K, N or more), of one dtype.  The last axes of out and b must be contiguous; a may be
    transposed.
    """
    (M, N), K = out.shape, b.shape[0]
    if not (a.shape[0] == M and a.shape[1] == K and b.shape[1] >= N and in_line(out) and in_line(b)):
        raise ValueError("product: out (M, N) needs a (M, K) and b (K, N or more), and last axes contiguous but a's")
    for j in range(0, N, 2 * VECTOR // out.itemsize):
        for i in range(0, M, ROWS):
            _tile(out, a, b, i, j, add)


@intrinsic
def _tile(typingctx, out, a, b, i, j, add):
    """out[i:i+ROWS, j:j+WIDTH] = a[i:i+ROWS] @ b[:, j:j+WIDTH], or += where `add` is true.

    WIDTH is 2 VECTOR / itemsize.  What lies beyond the edges of out is neither read nor written.
    """
    if not (are_fit(out, a, b) and out.ndim == a.ndim == b.ndim == 2):
        return None

    def write(context, builder, arrays, others):
        itemsize, lanes, vector = vector_of(context, out)
        (out_array, a_array, b_array), (i_value, j_value, add_value) = arrays, others
        M, N = cgutils.unpack_tuple(builder, out_array.shape)
        _, K = cgutils.unpack_tuple(builder, a_array.shape)
        # rows beyond the last one are the last one again: the same sums go to the same place twice
        last = builder.sub(M, constant(1))
        rows = [not_beyond(builder, builder.add(i_value, constant(r)), last) for r in range(ROWS)]
        columns = [builder.add(j_value, constant(v * lanes)) for v in range(2)]

        def body(masks):
            totals = Totals(builder, out.dtype, [vector] * (2 * ROWS))
            with cgutils.for_range(builder, K, intp=ir.IntType(64)) as loop:
                pointers = [pointer_to(builder, b_array, loop.index, column, vector) for column in columns]
                factors = [load_vector(builder, pointers[v], itemsize, masks[v]) for v in range(2)]
                for r, row in enumerate(rows):
                    number = builder.load(pointer_to(builder, a_array, row, loop.index, vector.element))
                    copies = splat(builder, number, lanes)
                    for v in range(2):
                        totals.add(2 * r + v, copies, factors[v])
            places = [pointer_to(builder, out_array, row, column, vector) for row in rows for column in columns]
            put(builder, places, totals.places, masks * ROWS, add_value, itemsize)

        is_whole = builder.icmp_signed("<=", builder.add(j_value, constant(2 * lanes)), N)
        with builder.if_else(is_whole, likely=True) as (whole, edge):
            with whole:
                body([None, None])
            with edge:
                body([below(builder, column, N, lanes) for column in columns])

    return written(types.void(out, a, b, types.intp, types.intp, types.boolean), write)


def put(builder, places, sums, masks, add, itemsize):
    """Store, or add where `add` is true, what stands in `sums` to `places` in the output.

    All is read before anything is written: two places may be one.
    """
    with builder.if_then(add):
        for place, total, mask in zip(places, sums, masks, strict=True):
            old = load_vector(builder, place, itemsize, mask)
            builder.store(builder.fadd(old, builder.load(total)), total)
    for place, total, mask in zip(places, sums, masks, strict=True):
        store_vector(builder, builder.load(total), place, itemsize, mask)


@helper(loops=False)
def transpose(out, x):
    """Inside a kernel: out[:N, :M] = x.T for x (M, N), of one dtype; the last axes contiguous.

    out (N or more, M or more): of its first N rows, columns beyond M may get copies of the last one.  If it is of pairs
    (bfloat16.py), they are made along x's rows, and N counts them.
    """
    M, N = x.shape[0], steps_of(out, x.shape[1])
    if not (out.shape[0] >= N and out.shape[1] >= M and in_line(out) and in_line(x)):
        raise ValueError("transpose: x (M, N) needs out (N or more, M or more), and last axes contiguous")
    n = VECTOR // out.itemsize
    for i in range(0, M, n):
        for j in range(0, N, n):
            _turn(out, x, i, j)


@helper(loops=False)
def turn_across(out, x):
    """Inside a kernel: out (M or more, steps) = pairs of the rows of x (K, M), transposed; steps are those of K."""
    K, M = x.shape
    if not (out.shape[0] >= M and out.shape[1] == steps_of(out, K) and in_line(out) and in_line(x)):
        raise ValueError("turn_across: x (K, M) needs out (M or more, steps of K), and last axes contiguous")
    n = VECTOR // x.itemsize
    for i in range(0, out.shape[1], n):
        for j in range(0, M, n):
            _turn_across(out, x, i, j)


def _make_turn(across):
    """The intrinsic that transposes n by n elements, as many as fill a vector.

    An element is a number, or where `out` has pairs a pair: of x's rows, or across them if `across` is true.
    """

    @intrinsic
    def turn(typingctx, out, x, i, j):
        """out[j:j+n, i:i+n] = x[i:i+n, j:j+n].T, in elements; if not `across`, the last row stands for those beyond.

        What lies beyond the edges of x or out is neither read nor written.
        """
        if not (can_pack(out, x) and out.ndim == x.ndim == 2):
            return None

        def write(context, builder, arrays, others):
            itemsize, lanes, vector = vector_for(context, out, x)
            out_vector = vector_of(context, out)[2]
            along = 1 if across else numbers_in(out.dtype)  # columns of x that an element takes
            (out_array, x_array), (i_value, j_value) = arrays, others
            M, width = cgutils.unpack_tuple(builder, x_array.shape)
            N = builder.sdiv(builder.add(width, constant(along - 1)), constant(along))
            first = builder.mul(j_value, constant(along))  # the first column of element j
            _, columns = cgutils.unpack_tuple(builder, out_array.shape)
            last = builder.sub(M, constant(1))

            def exchange(a, b, step):
                """Rows a and b, `step` apart: of a the lanes with bit `step` change places with those of b without."""
                upper = pick(builder, a, b, lambda lane: (lane ^ step) + lanes if lane & step else lane)
                lower = pick(builder, a, b, lambda lane: lane + lanes if lane & step else lane ^ step)
                return upper, lower

            def load(r, width):
                row = builder.add(i_value, constant(r))
                if across:
                    mask = width and below(builder, first, width, lanes)
                    return load_across(builder, out.dtype, x_array, row, first, vector, mask)
                return load_along(builder, out.dtype, x_array, not_beyond(builder, row, last), first, vector, width)

            def body(width, inside):
                vectors = [load(r, width) for r in range(lanes)]
                # the corners off the diagonal change places: of blocks of 2 by 2, then of those of 4 by 4, ...
                step = 1
                while step < lanes:
                    for r in range(lanes):
                        if not r & step:
                            vectors[r], vectors[r + step] = exchange(vectors[r], vectors[r + step], step)
                    step *= 2
                for r in range(lanes):
                    row = builder.add(j_value, constant(r))
                    with builder.if_then(builder.icmp_signed("<", row, N)):
                        pointer = pointer_to(builder, out_array, row, i_value, out_vector)
                        store_vector(builder, vectors[r], pointer, itemsize, inside)

            n = constant(lanes)
            is_whole = builder.and_(
                builder.icmp_signed("<=", builder.add(first, constant(lanes * along)), width),
                builder.icmp_signed("<=", builder.add(i_value, n), columns),
            )
            with builder.if_else(is_whole, likely=True) as (whole, edge):
                with whole:
                    body(None, None)
                with edge:
                    body(width, below(builder, i_value, columns, lanes))

        return written(types.void(out, x, types.intp, types.intp), write)

    return turn


_turn, _turn_across = map(_make_turn, (False, True))


@helper(loops=False)
def fetch(x):
    """Inside a kernel: x (M, N) will be read or written soon; it changes nothing, wherever it points.

    Rows that lie far apart are not what the processor fetches from memory unasked.
    """
    for i in range(x.shape[0]):
        for j in range(0, x.shape[1], LINE // x.itemsize):
            _fetch(x, i, j)


@intrinsic
def _fetch(typingctx, x, row, column):
    """Have the line of the cache with x[row, column] fetched."""

    def write(context, builder, arrays, place):  # (AMD's first cache has few places for rows that are far apart)
        prefetch(builder, pointer_to(builder, *arrays, *place, ir.IntType(8)), near=not IS_AMD)

    return written(types.void(x, types.intp, types.intp), write)


@helper(loops=False)
def fetch_to_write(x):
    """Inside a kernel: x (N,), which other cores have read, will be written soon; it changes nothing.

    A line of the cache that others have, too, can only be written when they have let it go.
    """
    for i in range(0, x.size, LINE // x.itemsize):
        _fetch_to_write(x, i)


@intrinsic
def _fetch_to_write(typingctx, x, i):
    """Have the line of the cache with x[i] fetched, and taken from the other cores."""

    def write(context, builder, arrays, place):
        prefetch(builder, builder.gep(arrays[0].data, place), to_write=True)

    return written(types.void(x, types.intp), write)


@helper(loops=False)
def dots(out, x, w, scale, bias, first, last, add):
    """Inside a kernel: out[:, first:last] = x @ w[first:last].T * scale[first:last] + bias[first:last], or out += that.

    out (R, N) and x (R, K) of one dtype, w (N, K) of this dtype, int8 or bfloat16 (uint16), scale and bias (N,) or of
    no length; K is not 0, and the last axes are contiguous.  N need not be one number: what counts is that all have the
    columns first:last.  Some rows of w are read for all of x at a time, so that w may be large: what counts is to fetch
    it from memory once, in the order in which it lies there.  The bits of an element depend on its row of x and its row
    of w only.
    """
    R, K = x.shape
    if not (
        (out.shape[0] == R and w.shape[1] == K > 0 and 0 <= first <= last <= min(out.shape[1], w.shape[0]))
        and ((len(scale) == 0 or len(scale) >= last) and (len(bias) == 0 or len(bias) >= last))
        and (in_line(out) and in_line(x) and in_line(w) and in_line(scale) and in_line(bias))
    ):
        raise ValueError("dots: out (R, N) needs x (R, K), w (N, K), scale and bias (N,) or (0,), contiguous; 0 < K")
    _dots(out, x, w, scale, bias, first, last, add)


@helper(loops=False)
def _dots(out, x, w, scale, bias, first, last, add):
    R = len(x)
    if R == 1:
        for j in range(first, last, 8):
            _one_row(out, x, w, scale, bias, 0, j, last, add)
    else:
        for j in range(first, last, COLUMNS):
            for i in range(0, R, 4):
                _four_rows(out, x, w, scale, bias, i, j, last, add)


class _Ahead:
    """What a tile of m rows of x and n rows of w has fetched: of the rows of w that follow, its share, line by line.

    All tiles that read the same rows of w share that, so that memory is at work while they compute.  The processor
    fetches by itself what follows in a page that is read in order, but not the page that follows: so the first lines
    of that one are fetched long before.
    """

    def __init__(self, builder, rows, nbytes, left, of_step, tile, tiles):
        """The n rows of w that this tile reads lie at `rows`; from there to the last row there are `left` bytes.

        nbytes: of these n rows; of_step: of them in a step; tile, tiles: this tile's number, and how many read them.
        """
        ahead = builder.mul(nbytes, builder.add(builder.udiv(constant(AHEAD), nbytes), constant(1)))
        # at the end nothing follows: what is fetched then is what is read now
        ahead = builder.select(builder.icmp_signed("<", ahead, left), ahead, constant(0))
        share = builder.mul(builder.udiv(nbytes, tiles), tile)
        place = builder.gep(rows, [builder.add(ahead, share)])
        self.builder, self.of_step, self.line = builder, of_step, builder.mul(tiles, constant(LINE))
        self.place, self.due = (cgutils.alloca_once_value(builder, value) for value in (place, constant(0)))

    def step(self):
        """Have fetched what is due in a step."""
        self.builder.store(self.builder.add(self.builder.load(self.due), constant(self.of_step)), self.due)
        self._lines((self.of_step + LINE - 1) // LINE)

    def _lines(self, most):
        builder, due, place = self.builder, self.builder.load(self.due), self.builder.load(self.place)
        with builder.if_then(builder.icmp_signed(">=", due, self.line)):
            prefetch(builder, place, near=False)
            within = builder.and_(builder.ptrtoint(place, ir.IntType(64)), constant(PAGE - 1))
            with builder.if_then(builder.icmp_signed("<", within, constant(PAGE // 8))):
                prefetch(builder, builder.gep(place, [constant(PAGE)]), near=False)
            builder.store(builder.gep(place, [constant(LINE)]), self.place)
            builder.store(builder.sub(due, self.line), self.due)
            if most > 1:
                self._lines(most - 1)


def _make_dots(m, n):
    """The intrinsic that computes m rows and n columns of `dots`, from row i and column j on."""

    @intrinsic
    def dots(typingctx, out, x, w, scale, bias, i, j, last, add):
        have_axes = out.ndim == x.ndim == w.ndim == 2 and scale.ndim == bias.ndim == 1
        if not (have_axes and are_fit(out, x, scale, bias) and (w.dtype == out.dtype or w.dtype in NARROW)):
            return None

        def write(context, builder, arrays, others):
            itemsize, lanes, vector = vector_of(context, x)
            w_itemsize = context.get_abi_sizeof(context.get_value_type(w.dtype))
            # rows of w that are read side by side: few are read faster, but narrow numbers need more to keep busy
            at_once = n if m > 1 else n // w_itemsize
            out_array, x_array, w_array, scale_array, bias_array = arrays
            i_value, j_value, last_value, add_value = others
            M, K = cgutils.unpack_tuple(builder, x_array.shape)
            # rows beyond the last one are the last one again: the same sums go to the same place twice
            last_x, last_w = builder.sub(M, constant(1)), builder.sub(last_value, constant(1))
            x_rows = [not_beyond(builder, builder.add(i_value, constant(a)), last_x) for a in range(m)]
            w_rows = [not_beyond(builder, builder.add(j_value, constant(b)), last_w) for b in range(n)]
            tile, tiles = builder.udiv(i_value, constant(m)), builder.udiv(builder.add(M, constant(m - 1)), constant(m))
            place = pointer_to(builder, w_array, j_value, constant(0), ir.IntType(8))
            row = builder.mul(K, constant(w_itemsize))  # its bytes
            nbytes, left = builder.mul(row, constant(n)), builder.mul(row, builder.sub(last_value, j_value))
            ahead = _Ahead(builder, place, nbytes, left, at_once * lanes * w_itemsize, tile, tiles)
            totals = Totals(builder, x.dtype, [vector] * (m * n))

            def step(some, k, mask=None):
                """The products of `lanes` columns from k on, with some rows of w."""
                pointers = [pointer_to(builder, x_array, row, k, vector) for row in x_rows]
                factors = [load_vector(builder, pointer, itemsize, mask) for pointer in pointers]
                ahead.step()
                for b in some:
                    weights = load_wide(builder, w_array, w_rows[b], k, vector, mask)
                    for a in range(m):
                        totals.add(a * n + b, factors[a], weights)

            whole = builder.udiv(K, constant(lanes))
            done = builder.mul(whole, constant(lanes))
            for start in range(0, n, at_once):
                some = range(start, start + at_once)
                with cgutils.for_range(builder, whole, intp=ir.IntType(64)) as loop:
                    step(some, builder.mul(loop.index, constant(lanes)))
                with builder.if_then(builder.icmp_signed("<", done, K), likely=False):
                    step(some, done, below(builder, done, K, lanes))
            places = []  # the n columns of a row become one vector, or several where a vector is short
            for a, first in itertools.product(range(m), range(0, n, lanes)):
                sums = totals.places[a * n + first : a * n + min(first + lanes, n)]
                part = sum_each(builder, [builder.load(total) for total in sums])
                column = builder.add(j_value, constant(first))
                pointer = pointer_to(builder, out_array, x_rows[a], column, part.type)
                end = not_beyond(builder, builder.add(column, constant(len(sums))), last_value)
                mask = below(builder, column, end, part.type.count)
                places.append((cgutils.alloca_once_value(builder, part), column, pointer, mask))

            def change(condition, operation, array=None):
                """Where the condition holds, combine each part with what an array, or else out, has in its columns."""
                with builder.if_then(condition):
                    changed = []
                    for place, column, pointer, mask in places:
                        if array is not None:
                            start = builder.bitcast(array.data, vector.element.as_pointer())
                            pointer = builder.bitcast(builder.gep(start, [column]), pointer.type)
                        other = load_vector(builder, pointer, itemsize, mask)
                        changed.append(operation(builder.load(place), other))
                    for (place, *_), value in zip(places, changed, strict=True):
                        builder.store(value, place)

            for array, operation in ((scale_array, builder.fmul), (bias_array, builder.fadd)):
                (length,) = cgutils.unpack_tuple(builder, array.shape)
                change(builder.icmp_signed(">", length, constant(0)), operation, array)
            change(add_value, builder.fadd)
            for place, _, pointer, mask in places:
                store_vector(builder, builder.load(place), pointer, itemsize, mask)

        return written(types.void(out, x, w, scale, bias, i, j, last, types.boolean), write)

    return dots


_one_row, _four_rows = _make_dots(1, 8), _make_dots(4, COLUMNS)

# For kernels that check their arrays once, not at every call: 5 % of a small model's token.
dots_unchecked = dots if KERNELS == "numba" and config.BOUNDSCHECK else _dots
