"""Intel's AMX: eight registers that hold a tile each, and an instruction that multiplies two of them.

A tile has 16 rows of 64 bytes: pairs of bfloat16 (see bfloat16.py), or numbers of float32.  TDPBF16PS adds to a tile
c (16, 16) the product of a, 16 rows of 16 pairs along k, and of b, 16 pairs along k for each of 16 columns.

Where there are no such registers, memory stands for them, and loops for the instructions: the way "plain".  Registers
and Memory answer the same calls, so that what packs and cuts the matrices is the same, and runs on any processor.

If the rows of a tile lie across two lines of the cache each, its load takes six times as long, longer than its products
do.  So what is packed begins at a line.
"""

import itertools

from npgpt.kernels.bfloat16 import GROUP, TILES, add_product, can_pack, flushed, halves
from npgpt.kernels.jit import KERNELS, intrinsic
from npgpt.kernels.vectors import (
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

if KERNELS == "numba":
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils

LINE = 64  # bytes of a tile's row
BYTE, WORD = 8, 32  # bits


def _call(builder, name, *args):
    """Call what LLVM names so; numbers of Python's are those of tiles."""
    args = [ir.Constant(ir.IntType(BYTE), arg) if isinstance(arg, int) else arg for arg in args]
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), args)


class Spare:
    """Memory for n tiles that lie in no array."""

    def __init__(self, builder, vector, n):
        self.builder, self.vector, self.lanes = builder, vector, vector.count
        self.tiles = [cgutils.alloca_once(builder, ir.ArrayType(vector, GROUP)) for _ in range(n)]

    def row(self, tile, row):
        """Pointer to a row of a tile."""
        return self.builder.gep(self.tiles[tile], [constant(0), row])

    def place(self, tile):
        """Pointer to a tile's first byte, and bytes from row to row."""
        return self.builder.bitcast(self.tiles[tile], ir.IntType(BYTE).as_pointer()), constant(4 * self.lanes)


class Memory:
    """Memory that stands for the registers 0, 1, ...: those of c, n of them, are kept; a and b stay where they are."""

    def __init__(self, builder, vector, n):
        self.builder, self.vector, self.n, self.places = builder, vector, n, {}
        self.totals = Spare(builder, vector, n)
        self.sums = [cgutils.alloca_once(builder, vector) for _ in range(2)]  # of the even products, and the odd ones
        self.zeros = ir.Constant(vector, [0.0] * vector.count)

    def _rows(self):
        return cgutils.for_range(self.builder, constant(GROUP))

    def zero(self, c):
        with self._rows() as rows:
            self.builder.store(self.zeros, self.totals.row(c, rows.index))

    def load(self, tile, pointer, stride):
        """pointer: to the first byte; stride: bytes from row to row."""
        if tile >= self.n:
            self.places[tile] = pointer, stride
            return
        with self._rows() as rows:
            place = self._at((pointer, stride), rows.index, self.vector)
            self.builder.store(load_vector(self.builder, place, 4), self.totals.row(tile, rows.index))

    def store(self, c, pointer, stride):
        with self._rows() as rows:
            numbers = self.builder.load(self.totals.row(c, rows.index))
            store_vector(self.builder, numbers, self._at((pointer, stride), rows.index, self.vector), 4)

    def _at(self, place, row, kind, column=0):
        pointer, stride = place
        offset = self.builder.add(self.builder.mul(row, stride), self.builder.mul(constant(4), column or constant(0)))
        return self.builder.bitcast(self.builder.gep(pointer, [offset]), kind.as_pointer())

    def fetch(self, pointer, stride):
        """Have the lines of a tile fetched to the first cache."""

    def multiply(self, c, a, b):
        """c += a @ b."""
        builder, lanes = self.builder, self.vector.count
        word, words = ir.IntType(WORD), ir.VectorType(ir.IntType(WORD), lanes)
        with self._rows() as rows:
            for place in self.sums:
                builder.store(self.zeros, place)
            with cgutils.for_range(builder, constant(GROUP)) as k:
                left = splat(builder, builder.load(self._at(self.places[a], rows.index, word, k.index)), lanes)
                right = load_vector(builder, self._at(self.places[b], k.index, words), 4)
                for place, x, y in zip(self.sums, halves(builder, left), halves(builder, right), strict=True):
                    builder.store(add_product(builder, builder.load(place), x, y), place)
            both = flushed(builder, builder.fadd(*map(builder.load, self.sums)))
            place = self.totals.row(c, rows.index)
            builder.store(flushed(builder, builder.fadd(builder.load(place), both)), place)


class Registers:
    """AMX's registers, between `begin_tiles` and `end_tiles`."""

    def __init__(self, builder):
        self.builder = builder

    def zero(self, c):
        _call(self.builder, "tilezero", c)

    def load(self, tile, pointer, stride):
        _call(self.builder, "tileloadd64", tile, pointer, stride)

    def store(self, c, pointer, stride):
        _call(self.builder, "tilestored64", c, pointer, stride)

    def fetch(self, pointer, stride):
        for row in range(GROUP):
            prefetch(self.builder, self.builder.gep(pointer, [self.builder.mul(constant(row), stride)]))

    def multiply(self, c, a, b):
        _call(self.builder, "tdpbf16ps", c, a, b)


def tiles_of(builder, vector, n):
    """What stands for the registers: n tiles to add to, and two or more to multiply."""
    return Registers(builder) if TILES == "amx" else Memory(builder, vector, n)


@intrinsic
def begin_tiles(typingctx, scratch):
    """Tell the processor the shape of all tiles, if it has them."""

    def write(context, builder, arrays, others):
        if TILES == "amx" and scratch.dtype == types.int32:
            palette, lines, rows = bytes([1] + [0] * 15), LINE.to_bytes(2, "little") * 8 + bytes(16), bytes([GROUP] * 8)
            shapes = cgutils.make_bytearray(palette + lines + rows + bytes(8))
            place = cgutils.global_constant(builder, "npgpt_tiles", shapes)
            _call(builder, "ldtilecfg", builder.bitcast(place, ir.IntType(BYTE).as_pointer()))

    return written(types.void(scratch), write)


@intrinsic
def end_tiles(typingctx, scratch):
    """Let the tiles go, which the system would save whenever it stops the thread."""

    def write(context, builder, arrays, others):
        if TILES == "amx" and scratch.dtype == types.int32:
            _call(builder, "tilerelease")

    return written(types.void(scratch), write)


def _move(builder, out_array, tops, columns, spare, itemsize, is_out):
    """Move tiles at these rows and columns from the output to spare memory, or back if `is_out`, within its edges."""
    M, N = cgutils.unpack_tuple(builder, out_array.shape)
    masks = [below(builder, column, N, spare.lanes) for column in columns]
    for r, top in enumerate(tops):
        height = not_beyond(builder, builder.sub(M, constant(top)), constant(GROUP))
        with cgutils.for_range(builder, height, intp=ir.IntType(64)) as rows:
            for v, (column, mask) in enumerate(zip(columns, masks, strict=True)):
                inside = spare.row(r * len(columns) + v, rows.index)
                row = builder.add(rows.index, constant(top))
                outside = pointer_to(builder, out_array, row, column, spare.vector)
                if is_out:
                    store_vector(builder, builder.load(inside), outside, itemsize, mask)
                else:
                    builder.store(load_vector(builder, outside, itemsize, mask), inside)


def _make_amx(m, n):
    """The intrinsic that computes m by n tiles of the output, all of whose pairs are packed."""

    @intrinsic
    def tiles(typingctx, out, a, block, j, place, add):
        """out[:, j:j+n lanes] = a @ a panel, or += where `add` is true; `out` has m GROUP rows at most.

        a (rows, steps) is a part of a strip.  The panel (steps, n lanes) begins at block[place].
        """
        if not (a.dtype == block.dtype and can_pack(block, out) and out.ndim == a.ndim == 2 and block.ndim == 1):
            return None

        def write(context, builder, arrays, others):
            itemsize, lanes, vector = vector_of(context, out)
            (out_array, a_array, block_array), (j_value, place_value, add_value) = arrays, others
            M, N = cgutils.unpack_tuple(builder, out_array.shape)
            _, steps = cgutils.unpack_tuple(builder, a_array.shape)
            (out_line, _), (a_line, _) = (cgutils.unpack_tuple(builder, x.strides) for x in (out_array, a_array))
            line, byte = constant(n * lanes * itemsize), ir.IntType(8)
            panel = builder.bitcast(builder.gep(block_array.data, [place_value]), byte.as_pointer())
            tops, columns = [GROUP * r for r in range(m)], [builder.add(j_value, constant(v * lanes)) for v in range(n)]
            c, spare = tiles_of(builder, vector, m * n), Spare(builder, vector, m * n)
            places = itertools.product(map(constant, tops), columns)
            corners = [pointer_to(builder, out_array, row, column, byte) for row, column in places]
            is_whole = builder.and_(
                builder.icmp_signed("==", M, constant(m * GROUP)),
                builder.icmp_signed("<=", builder.add(j_value, constant(n * lanes)), N),
            )

            def transfer(operation, is_out):
                """Load or store all tiles of the output; at its edges by way of spare memory."""
                with builder.if_else(is_whole, likely=True) as (whole, edge):
                    with whole:
                        for i, corner in enumerate(corners):
                            operation(i, corner, out_line)
                    with edge:
                        if not is_out:
                            _move(builder, out_array, tops, columns, spare, itemsize, is_out)
                        for i in range(m * n):
                            operation(i, *spare.place(i))
                        if is_out:
                            _move(builder, out_array, tops, columns, spare, itemsize, is_out)

            with builder.if_else(add_value) as (adding, fresh):
                with adding:
                    transfer(c.load, is_out=False)
                with fresh:
                    for i in range(m * n):
                        c.zero(i)
            with cgutils.for_range(builder, builder.udiv(steps, constant(GROUP)), intp=ir.IntType(64)) as loop:
                step = builder.mul(loop.index, constant(GROUP))
                for r in range(m):
                    c.load(m * n + r, pointer_to(builder, a_array, constant(tops[r]), step, byte), a_line)
                for v in range(n):
                    place = builder.gep(panel, [builder.add(builder.mul(step, line), constant(v * lanes * itemsize))])
                    c.load(m * n + m + v, place, line)
                    c.fetch(builder.gep(place, [builder.mul(constant(GROUP), line)]), line)
                for r in range(m):
                    for v in range(n):
                        c.multiply(r * n + v, m * n + r, m * n + m + v)
            transfer(c.store, is_out=True)

        return written(types.void(out, a, block, *[types.intp] * 2, types.boolean), write)

    return tiles


amx_1_1, amx_1_2, amx_2_1, amx_2_2 = (_make_amx(m, n) for m in (1, 2) for n in (1, 2))
