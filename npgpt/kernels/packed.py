"""The product of two large matrices, whose parts are packed so that the innermost loop finds them side by side.

After Goto and van de Geijn 2008.  A tile of the output, ROWS rows by three vectors of columns, stays in registers while
k runs.  Each step loads three vectors of b, copies ROWS numbers of a to all lanes of a vector each, and multiplies and
adds 3 ROWS vectors.  As b lies in memory, a step's vectors are far from those of the step before; so it is packed:

    block    (k, columns) of b, as many as the second cache holds, in panels of three vectors: (k, 3 lanes) each
    strip    (PACK, k) of a transposed matrix a, whose numbers, too, would lie far apart (see _rows)

PACK rows of a stay in the first cache while they meet all panels of the block.  The bits of an element of the output
depend on its row of a and its column of b only, not on where the matrices are cut.

Scratch of pairs instead of numbers makes it a product of bfloat16 (bfloat16.py): what is packed is rounded, and a step
takes a pair of k.  Then all rows of a are packed.  By tiles (amx.py) a strip has twice the rows and half of k, a block
half of k and twice the columns, and a panel is two vectors wide.
"""

from npgpt.kernels.amx import amx_1_1, amx_1_2, amx_2_1, amx_2_2, begin_tiles, end_tiles
from npgpt.kernels.bfloat16 import GROUP, Totals, can_pack, load_across, load_along, numbers_in, steps_of, vector_for
from npgpt.kernels.jit import KERNELS, helper, inside_kernels, intrinsic, kernel
from npgpt.kernels.tiles import ROWS, fetch, in_line, put, transpose, turn_across
from npgpt.kernels.vectors import (
    IS_AMD,
    VECTOR,
    below,
    constant,
    load_vector,
    not_beyond,
    pointer_to,
    prefetch,
    splat,
    store_vector,
    vector_of,
    written,
)
from npgpt.machine import second_cache

if KERNELS == "numba":
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils

PACK = 16  # rows of a strip; of tiles it has twice as many, and half of k: see _cut
STRIPS = 4  # that are packed at a time, of numbers, not of pairs
ROOM = 64  # strips that there is memory for: if they are all, and meet several blocks, each is packed once
SHORT = 32  # rows of a transposed a that all of these strips are packed from, before it is the turn of the next ones
DEPTH = 1536  # bytes along k that are packed at a time: a strip of float32 takes 24 KiB
NEAR = 1536  # bytes between two rows of a transposed a that may be read as it lies
MANY, TALL = 384, 128  # columns that a strip meets, and rows of the output, from which on it is packed all the same
SPAN = 2 * DEPTH // 4  # numbers of bfloat16 along k that are packed at a time
FETCHED = 2  # rows of the next block that a tile has fetched: a part of their lines in each step
FETCHES_STRIPS = IS_AMD  # whether, where no block follows, it has fetched what the next strips are packed from
AHEAD = 8  # rows that copying is ahead of itself in what it has fetched
SOON = 0 if IS_AMD else 4  # steps that a tile is ahead of itself in what of its panel comes into the first cache
PANEL = 3 * VECTOR  # bytes of a panel's row
WIDTH = min(max(second_cache() * 5 // 8 // (DEPTH // 4) // PANEL, 1), 8) * PANEL  # bytes of a block's row: few panels


def scratch_size(itemsize):
    """How many numbers of so many bytes the strips and a block have."""
    return DEPTH // itemsize * (ROOM * PACK + WIDTH // itemsize)


@kernel(counts=True)
def multiply(out, a, b, a_turned, b_turned, scratch, top, bottom, left, right):
    """out[top:bottom, left:right] = this part of a @ b.

    out (M, N), a (M, K) or, if `a_turned`, (K, M), b (K, N) or, if `b_turned`, (N, K), all of one dtype and contiguous
    along the last axis; K is not 0.  b may be of int8 or bfloat16 (uint16) and is widened where it is packed.  scratch
    (scratch_size,) contiguous, of the dtype of out, or of pairs for float32.
    Raises ValueError for other shapes.
    """
    M, K = a.shape[::-1] if a_turned else a.shape
    inner, N = b.shape[::-1] if b_turned else b.shape
    depth = DEPTH // scratch.itemsize
    for_strips, for_block = depth * PACK * ROOM, depth * (WIDTH // scratch.itemsize)
    if not (
        (out.shape == (M, N) and inner == K > 0 and 0 <= top <= bottom <= M and 0 <= left <= right <= N)
        and (len(scratch) == for_strips + for_block and in_line(out) and in_line(a) and in_line(b))
    ):
        raise ValueError("multiply: contiguous out (M, N) needs a (M, K) and b (K, N), or their transposes; 0 < K")
    tall, span, width = _cut(scratch)
    strips, block = scratch[:for_strips].reshape(ROOM, depth * PACK), scratch[for_strips:]
    columns, stay = right - left, width < right - left and bottom - top <= ROOM * tall
    if not stay:
        columns, strips = min(columns, width), strips[:STRIPS]
    begin_tiles(scratch)
    for k in range(0, K, span):
        after = min(k + span, K)
        for j in range(left, right, width):
            end = min(j + width, right)
            _pack_block(block, _part(b, b_turned, k, after, j, end), b_turned)
            if end < right:  # while this block is at work, the next one is fetched from memory
                coming = _part(b, b_turned, k, after, end, min(end + width, right))
            else:
                coming = _part(b, b_turned, after, min(after + span, K), left, min(left + width, right))
            share = len(coming) / max(bottom - top, 1)  # for each row of a
            is_packed = stay and j > left
            for i in range(top, bottom, tall):
                stop = min(i + tall, bottom)
                soon = coming[int(share * (i - top)) : int(share * (stop - top))]
                if FETCHES_STRIPS and a_turned and not is_packed and coming.size == 0:
                    soon = _next_strips(b, soon, a[k:after, top:bottom], i - top)
                few_rows = _rows(strips, a, a_turned, i, stop, k, after, top, bottom, columns, is_packed)
                _meet_block(block, out[i:stop, j:end], few_rows, soon, k > 0)
    end_tiles(scratch)


@inside_kernels(
    pairs=lambda scratch: (PACK, SPAN, WIDTH // scratch.itemsize),
    tiles=lambda scratch: (2 * PACK, SPAN // 2, 2 * (WIDTH // scratch.itemsize)),
    loops=False,
)
def _cut(scratch):
    """How many rows of a a strip has, how many of k are packed at a time, and how many columns a block has.

    All ways fill the same scratch: half of k leaves room for twice as many rows, or columns.
    """
    return PACK, DEPTH // scratch.itemsize, WIDTH // scratch.itemsize


@helper(loops=False)
def _rounded_rows(rows, x):
    """rows[:M] = the pairs of x (M, K), with zeros up to a whole vector, or tile."""
    for r in range(len(x)):
        for step in range(0, steps_of(rows, x.shape[1]), VECTOR // rows.itemsize):
            _round(rows, x, r, step)


def _rows_of_pairs(strips, a, turned, i, stop, k, after, top, bottom, columns, is_packed):
    strip = strips[(i - top) // PACK % len(strips)]
    steps = steps_of(strip, after - k)
    if turned:
        panel = strip.reshape(len(strip) // PACK, PACK)
        if not is_packed:
            _copy(panel[:steps], a[k:after, i:stop])
        return panel.T[: stop - i, :steps]
    rows = strip.reshape(PACK, len(strip) // PACK)
    if not is_packed:
        _rounded_rows(rows, a[i:stop, k:after])
    return rows[: stop - i, :steps]


def _rows_of_tiles(strips, a, turned, i, stop, k, after, top, bottom, columns, is_packed):
    strip = strips[(i - top) // (2 * PACK) % len(strips)]
    rows, steps = strip.reshape(2 * PACK, len(strip) // (2 * PACK)), steps_of(strip, after - k)
    if turned and not is_packed:
        turn_across(rows[:, :steps], a[k:after, i:stop])
    elif not is_packed:
        _rounded_rows(rows, a[i:stop, k:after])
    return rows[: stop - i, :steps]


@inside_kernels(pairs=_rows_of_pairs, tiles=_rows_of_tiles, loops=False)
def _rows(strips, a, turned, i, stop, k, after, top, bottom, columns, is_packed):
    """Rows i:stop of a, or of a.T if `turned`, and of k only k:after; as they lie, or packed if that pays.

    Rows top:bottom meet so many columns as long as a strip stays packed, from the first row on.  Each STRIPS-th call
    packs the rows of the next ones, too, unless the strip is packed already.
    """
    if not turned:
        return a[i:stop, k:after]
    if abs(a.strides[0]) <= NEAR and (columns < MANY or bottom - top < TALL):
        return a.T[i:stop, k:after]
    rows = strips.reshape(len(strips) * PACK, strips.shape[1] // PACK)
    first = (i - top) % len(rows)
    if first % (STRIPS * PACK) == 0 and not is_packed:
        width = min(STRIPS * PACK, bottom - i)
        for start in range(k, after, SHORT):
            end = min(start + SHORT, after)
            fetch(a[end : min(end + SHORT, after), i : i + width])
            transpose(rows[first:, start - k : end - k], a[start:end, i : i + width])
    return rows[first : first + stop - i, : after - k]


def _next_strips_of_float32(b, soon, a, i):
    if i % (STRIPS * PACK) > 0:
        return soon
    return a.T[i + STRIPS * PACK : i + 2 * STRIPS * PACK : PACK]


@inside_kernels(float32=_next_strips_of_float32, loops=False)
def _next_strips(b, soon, a, i):
    """What is fetched where no block of b follows: of a (K, M) all lines of the strips after those that hold row i.

    These are a part of a.T with one row for each line of the cache, if i begins a strip that is packed with others;
    else nothing, or if b has not the type of a: that is `soon`.
    """
    return soon


@helper(counts=True)
def _part(b, turned, k, after, j, end):
    """Of b its rows k:after and its columns j:end, or of b.T those where b is turned."""
    return b[j:end, k:after] if turned else b[k:after, j:end]


@inside_kernels(tiles=lambda block, left: min(left, 2), loops=False)
def _vectors_of_panel(block, left):
    """Of so many vectors of columns that are left, how many the next panel takes: 4 become 2 and 2, not 3 and 1."""
    return 2 if left in (2, 4) else min(left, 3)


def _fill_tiles(panel, k):
    for step in range((k + 1) // 2, len(panel)):
        for column in range(panel.shape[1]):
            panel[step, column] = 0


@inside_kernels(pairs=lambda panel, k: None, tiles=_fill_tiles, loops=False)
def _fill(panel, k):
    """Zeros behind the k numbers of a panel, up to the end of the last tile."""


@helper(loops=False)
def _pack_block(block, b, turned):
    """block = the panels of b, one after the other; b (k, columns), or (columns, k) if `turned`.

    Columns of a panel that b has not are zeros, or copies of its last one.
    """
    k, columns = b.shape[::-1] if turned else b.shape
    steps, lanes, j, place = steps_of(block, k), VECTOR // block.itemsize, 0, 0
    while j < columns:
        width = _vectors_of_panel(block, (columns - j + lanes - 1) // lanes) * lanes
        panel = block[place : place + steps * width].reshape(steps, width)
        _fill(panel, k)
        if turned:
            transpose(panel, b[j : j + width])
        else:
            _copy(panel, b[:, j : j + width])
        j, place = j + width, place + steps * width


def _meet_tiles(block, out, a, soon, add):
    (M, columns), steps = out.shape, a.shape[1]
    fetch(soon)
    lanes, j, place = VECTOR // out.itemsize, 0, 0
    while j < columns:
        n = _vectors_of_panel(block, (columns - j + lanes - 1) // lanes)
        if n == 2 and M > GROUP:
            amx_2_2(out, a, block, j, place, add)
        elif n == 2:
            amx_1_2(out, a, block, j, place, add)
        elif M > GROUP:
            amx_2_1(out, a, block, j, place, add)
        else:
            amx_1_1(out, a, block, j, place, add)
        j, place = j + n * lanes, place + steps * n * lanes


@inside_kernels(tiles=_meet_tiles, loops=False)
def _meet_block(block, out, a, soon, add):
    """out (M, columns) = a @ the block, or += where `add` is true, for M up to PACK; the rows of `soon` are fetched."""
    (M, columns), k = out.shape, a.shape[1]
    lanes, j, place = VECTOR // out.itemsize, 0, 0
    share, done = len(soon) * 3.0 * lanes * ROWS / (M * columns), 0  # rows of `soon` for each tile, and tiles
    while j < columns:
        n = _vectors_of_panel(block, (columns - j + lanes - 1) // lanes)
        for i in range(0, M, ROWS):
            row = int(done * share)
            if n == 3 and M - i <= ROWS // 2:
                _tile_3_low(out, a, block, soon, i, j, place, row, add)
            elif n == 3:
                _tile_3(out, a, block, soon, i, j, place, row, add)
            elif n == 2 and columns - j <= lanes + lanes // 2:
                _tile_2_narrow(out, a, block, soon, i, j, place, row, add)
            elif n == 2:
                _tile_2(out, a, block, soon, i, j, place, row, add)
            else:
                _tile_1(out, a, block, soon, i, j, place, row, add)
            done += 1
        j, place = j + n * lanes, place + k * n * lanes


@intrinsic
def _copy(typingctx, panel, x):
    """panel[:, :N] = x (K, N), and zeros from there to the end of the vector; for the widths of strips and panels.

    A panel of pairs gets the pairs of rows, half as many.
    """
    if not (can_pack(panel, x) and panel.ndim == x.ndim == 2):
        return None

    def write(context, builder, arrays, others):
        itemsize, lanes, vector = vector_for(context, panel, x)
        panel_vector, n = vector_of(context, panel)[2], numbers_in(panel.dtype)
        panel_array, x_array = arrays
        K, N = cgutils.unpack_tuple(builder, x_array.shape)
        steps = builder.sdiv(builder.add(K, constant(n - 1)), constant(n))

        def copy(columns, masks):
            is_strip = len(columns) * lanes == PACK
            with cgutils.for_range(builder, steps, intp=ir.IntType(64)) as loop:
                row = builder.mul(loop.index, constant(n))
                for r in range(n if is_strip else 0):  # the next strip's numbers
                    place = pointer_to(builder, x_array, builder.add(row, constant(r)), constant(PACK), ir.IntType(8))
                    prefetch(builder, place, near=False)
                ahead = [builder.add(row, constant(AHEAD + r)) for r in range(n)]
                for column, mask in zip(columns, masks, strict=True):
                    for later in ahead:
                        prefetch(builder, pointer_to(builder, x_array, later, column, ir.IntType(8)))
                    numbers = load_across(builder, panel.dtype, x_array, loop.index, column, vector, mask)
                    place = pointer_to(builder, panel_array, loop.index, column, panel_vector)
                    store_vector(builder, numbers, place, itemsize)

        for many in range(1, max(3, PACK // lanes) + 1):  # loops whose length the compiler knows
            columns, end = [constant(v * lanes) for v in range(many)], constant(many * lanes)
            with builder.if_then(builder.icmp_signed("==", N, end)):
                copy(columns, [None] * many)
            is_edge = builder.and_(builder.icmp_signed("<", columns[-1], N), builder.icmp_signed("<", N, end))
            with builder.if_then(is_edge, likely=False):
                copy(columns, [None] * (many - 1) + [below(builder, columns[-1], N, lanes)])

    return written(types.void(panel, x), write)


@intrinsic
def _round(typingctx, pairs, x, row, step):
    """pairs[row, step:step + lanes] = those of a row of x, with zeros beyond its end."""
    if not (can_pack(pairs, x) and pairs.ndim == x.ndim == 2):
        return None

    def write(context, builder, arrays, others):
        itemsize, lanes, vector = vector_for(context, pairs, x)
        (pairs_array, x_array), (row_value, step_value) = arrays, others
        _, K = cgutils.unpack_tuple(builder, x_array.shape)
        column = builder.mul(step_value, constant(2))
        place = pointer_to(builder, pairs_array, row_value, step_value, vector_of(context, pairs)[2])
        is_whole = builder.icmp_signed("<=", builder.add(column, constant(2 * lanes)), K)
        with builder.if_else(is_whole, likely=True) as (whole, edge):
            for branch, width in ((whole, None), (edge, K)):
                with branch:
                    found = load_along(builder, pairs.dtype, x_array, row_value, column, vector, width)
                    store_vector(builder, found, place, itemsize)

    return written(types.void(pairs, x, types.intp, types.intp), write)


def _make_tile(n, height=ROWS, narrow=False):
    """The intrinsic that computes a tile of so many rows, and n vectors of columns, the last one half if `narrow`."""

    @intrinsic
    def tile(typingctx, out, a, block, soon, i, j, place, row, add):
        """out[i:i+height, j:j+width] = a[i:i+height] @ a panel, or += where `add` is true; nothing beyond out's edges.

        The panel (k, n lanes) begins at block[place].  Meanwhile some rows of `soon` are fetched, from `row` on.
        """
        if not (a.dtype == block.dtype and can_pack(block, out) and out.ndim == a.ndim == 2 and block.ndim == 1):
            return None

        def write(context, builder, arrays, others):
            itemsize, lanes, vector = vector_of(context, out)
            widths = [lanes] * (n - 1) + [lanes // 2 if narrow else lanes]
            out_array, a_array, block_array, soon_array = arrays
            i_value, j_value, place_value, row_value, add_value = others
            M, N = cgutils.unpack_tuple(builder, out_array.shape)
            _, K = cgutils.unpack_tuple(builder, a_array.shape)
            _, step = cgutils.unpack_tuple(builder, a_array.strides)
            rows = [builder.add(i_value, constant(r)) for r in range(height)]
            columns = [builder.add(j_value, constant(v * lanes)) for v in range(n)]
            corners = [(row, *of_vector) for row in rows for of_vector in zip(columns, widths, strict=True)]
            vectors = [ir.VectorType(vector.element, width) for *_, width in corners]
            # rows beyond the last one are the last one again; their sums are not stored
            last, byte = builder.sub(M, constant(1)), ir.IntType(8)
            starts = [pointer_to(builder, a_array, not_beyond(builder, row, last), constant(0), byte) for row in rows]
            next_rows = [builder.add(row_value, constant(r)) for r in range(FETCHED)]
            _, length = cgutils.unpack_tuple(builder, soon_array.shape)
            each = builder.udiv(builder.add(length, builder.sub(K, constant(1))), K)  # numbers of a row for each step
            packed = context.get_value_type(block.dtype)
            panel = builder.bitcast(builder.gep(block_array.data, [place_value]), packed.as_pointer())
            placed = zip(corners, vectors, strict=True)
            places = [pointer_to(builder, out_array, row, column, kind) for (row, column, _), kind in placed]
            for place in places:  # (a line fetched for writing comes into the first cache, which AMD gains less by)
                prefetch(builder, place, near=False, to_write=not IS_AMD)
            totals = Totals(builder, block.dtype, vectors)
            with cgutils.for_range(builder, K, intp=ir.IntType(64)) as loop:
                offset, first = builder.mul(loop.index, step), builder.mul(loop.index, constant(n * lanes))
                factors = []
                for v in range(n):
                    pointer = builder.gep(panel, [builder.add(first, constant(v * lanes))])
                    kind = ir.VectorType(packed, widths[v])
                    factors.append(load_vector(builder, builder.bitcast(pointer, kind.as_pointer()), itemsize))
                    if SOON:
                        prefetch(builder, builder.gep(pointer, [constant(SOON * n * lanes)]))
                column = builder.mul(loop.index, each)
                for row in next_rows:
                    prefetch(builder, pointer_to(builder, soon_array, row, column, byte), near=False)
                for r in range(height):
                    number = builder.load(builder.bitcast(builder.gep(starts[r], [offset]), packed.as_pointer()))
                    copies = {width: splat(builder, number, width) for width in widths}
                    for v in range(n):
                        totals.add(r * n + v, copies[widths[v]], factors[v])
            is_whole = builder.and_(
                builder.icmp_signed("<=", builder.add(i_value, constant(height)), M),
                builder.icmp_signed("<=", builder.add(j_value, constant(sum(widths))), N),
            )
            with builder.if_else(is_whole, likely=True) as (whole, edge):
                with whole:
                    put(builder, places, totals.places, [None] * len(places), add_value, itemsize)
                with edge:
                    masks = []
                    for row, column, width in corners:
                        has_row = splat(builder, builder.icmp_signed("<", row, M), width)
                        masks.append(builder.and_(has_row, below(builder, column, N, width)))
                    put(builder, places, totals.places, masks, add_value, itemsize)

        return written(types.void(out, a, block, soon, *[types.intp] * 4, types.boolean), write)

    return tile


_tile_1, _tile_2, _tile_3 = map(_make_tile, (1, 2, 3))
_tile_3_low, _tile_2_narrow = _make_tile(3, ROWS // 2), _make_tile(2, narrow=True)  # of edges
