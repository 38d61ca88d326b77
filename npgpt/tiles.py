"""Matrix products that are too small for BLAS, inside kernels.

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

A product of few rows with a large matrix (npgpt/decode.py) is another matter: there it is w that must be fetched from
memory, row by row, and each sum is a dot product along a row (`dots`).
"""

import numpy as np

from npgpt.jit import KERNELS, helper

if KERNELS == "numba":
    import llvmlite.binding
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    _FEATURES = llvmlite.binding.get_host_cpu_features()
    # bytes of a vector, and rows of a tile: its 2 ROWS sums must fit into the registers, of which AVX-512 has 32, the
    # others 16 (or 32 short ones)
    VECTOR, ROWS = (64, 8) if _FEATURES.get("avx512f") else (32, 4) if _FEATURES.get("avx") else (16, 4)

    def _number(n):
        return ir.Constant(ir.IntType(64), n)

    def _place(builder, array, row, column, kind):
        """Pointer to array[row, column], as a pointer to `kind`."""
        strides = cgutils.unpack_tuple(builder, array.strides)
        offset = builder.add(builder.mul(row, strides[0]), builder.mul(column, strides[1]))
        start = builder.bitcast(array.data, ir.IntType(8).as_pointer())
        return builder.bitcast(builder.gep(start, [offset]), kind.as_pointer())

    def _splat(builder, value, lanes):
        """A vector with this value in all lanes."""
        undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
        first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
        return builder.shuffle_vector(first, undefined, zeros)

    def _below(builder, start, limit, lanes):
        """For each lane i, whether start + i < limit."""
        steps = ir.Constant(ir.VectorType(ir.IntType(64), lanes), list(range(lanes)))
        return builder.icmp_signed(
            "<", builder.add(_splat(builder, start, lanes), steps), _splat(builder, limit, lanes)
        )  # fmt: skip

    def _not_beyond(builder, n, last):
        return builder.select(builder.icmp_signed("<", n, last), n, last)

    def _load(builder, pointer, itemsize, mask=None):
        """The vector that a pointer to one points to; lanes whose mask is 0 are not read, but 0."""
        kind, alignment = pointer.type.pointee, ir.Constant(ir.IntType(32), itemsize)
        if mask is None:
            loaded = builder.load(pointer)
            loaded.align = itemsize
            return loaded
        zeros = ir.Constant(kind, [0 if isinstance(kind.element, ir.IntType) else 0.0] * kind.count)
        return _masked(builder, "load", kind, itemsize, kind, [pointer, alignment, mask, zeros])

    def _store(builder, values, pointer, itemsize, mask=None):
        """Write a vector; lanes whose mask is 0 are left alone."""
        if mask is None:
            builder.store(values, pointer).align = itemsize
            return
        alignment = ir.Constant(ir.IntType(32), itemsize)
        _masked(builder, "store", values.type, itemsize, ir.VoidType(), [values, pointer, alignment, mask])

    def _masked(builder, name, kind, itemsize, result, arguments):
        function = ir.FunctionType(result, [argument.type for argument in arguments])
        letter = "i" if isinstance(kind.element, ir.IntType) else "f"
        full_name = f"llvm.masked.{name}.v{kind.count}{letter}{8 * itemsize}.p0"
        return builder.call(cgutils.get_or_insert_function(builder.module, function, full_name), arguments)

    AHEAD = 16384  # bytes that `dots` is ahead of itself, at least, in what it has fetched from memory

    @intrinsic
    def _tile(typingctx, out, a, b, i, j, add):
        """out[i:i+ROWS, j:j+WIDTH] = a[i:i+ROWS] @ b[:, j:j+WIDTH], or += where `add` is true.

        WIDTH is 2 VECTOR / itemsize.  What lies beyond the edges of out is neither read nor written.
        """
        if not (out.dtype == a.dtype == b.dtype and out.ndim == a.ndim == b.ndim == 2):
            return None

        def codegen(context, builder, signature, args):
            real = context.get_value_type(out.dtype)
            itemsize = context.get_abi_sizeof(real)
            lanes = VECTOR // itemsize
            vector = ir.VectorType(real, lanes)
            out_array, a_array, b_array = (
                cgutils.create_struct_proxy(kind)(context, builder, value=value)
                for kind, value in zip(signature.args[:3], args[:3], strict=True)
            )
            i_value, j_value, add_value = args[3:]
            M, N = cgutils.unpack_tuple(builder, out_array.shape)
            _, K = cgutils.unpack_tuple(builder, a_array.shape)
            # rows beyond the last one are the last one again: the same sums go to the same place twice
            last = builder.sub(M, _number(1))
            rows = [_not_beyond(builder, builder.add(i_value, _number(r)), last) for r in range(ROWS)]
            columns = [builder.add(j_value, _number(v * lanes)) for v in range(2)]

            def body(masks):
                sums = [[cgutils.alloca_once(builder, vector) for _ in range(2)] for _ in range(ROWS)]
                for row_sums in sums:
                    for total in row_sums:
                        builder.store(ir.Constant(vector, [0.0] * lanes), total)
                with cgutils.for_range(builder, K, intp=ir.IntType(64)) as loop:
                    factors = []
                    for v in range(2):
                        pointer = _place(builder, b_array, loop.index, columns[v], vector)
                        factors.append(_load(builder, pointer, itemsize, masks[v]))
                    for r in range(ROWS):
                        number = builder.load(_place(builder, a_array, rows[r], loop.index, real))
                        copies = _splat(builder, number, lanes)
                        for v in range(2):
                            product = builder.fmul(copies, factors[v], flags=("contract",))
                            total = builder.fadd(builder.load(sums[r][v]), product, flags=("contract",))
                            builder.store(total, sums[r][v])
                places = [[_place(builder, out_array, row, column, vector) for column in columns] for row in rows]
                with builder.if_then(add_value):  # all is read before anything is written: see `rows`
                    olds = [[_load(builder, places[r][v], itemsize, masks[v]) for v in range(2)] for r in range(ROWS)]
                    for r in range(ROWS):
                        for v in range(2):
                            builder.store(builder.fadd(olds[r][v], builder.load(sums[r][v])), sums[r][v])
                for r in range(ROWS):
                    for v in range(2):
                        _store(builder, builder.load(sums[r][v]), places[r][v], itemsize, masks[v])

            is_whole = builder.icmp_signed("<=", builder.add(j_value, _number(2 * lanes)), N)
            with builder.if_else(is_whole, likely=True) as (whole, edge):
                with whole:
                    body((None, None))
                with edge:
                    body([_below(builder, column, N, lanes) for column in columns])
            return context.get_dummy_value()

        return types.void(out, a, b, types.intp, types.intp, types.boolean), codegen

    def _make_dots(m, n):
        """The intrinsic dots(sums, x, w, i, j, last): sums[a, b] = x[i + a] . w[j + b] for a < m and b < n.

        Rows beyond the last one of x, or beyond w[last], are that row again.  w may be of whole numbers.
        """

        @intrinsic
        def dots(typingctx, sums, x, w, i, j, last):
            if not (sums.dtype == x.dtype and sums.ndim == x.ndim == w.ndim == 2 and sums.layout == "C"):
                return None

            def codegen(context, builder, signature, args):
                real, weight = context.get_value_type(x.dtype), context.get_value_type(w.dtype)
                itemsize, w_itemsize = context.get_abi_sizeof(real), context.get_abi_sizeof(weight)
                lanes = VECTOR // itemsize
                vector = ir.VectorType(real, lanes)
                sums_array, x_array, w_array = (
                    cgutils.create_struct_proxy(kind)(context, builder, value=value)
                    for kind, value in zip(signature.args[:3], args[:3], strict=True)
                )
                i_value, j_value, last_value = args[3:]
                M, K = cgutils.unpack_tuple(builder, x_array.shape)
                last_x = builder.sub(M, _number(1))
                x_rows = [_not_beyond(builder, builder.add(i_value, _number(a)), last_x) for a in range(m)]
                w_rows = [_not_beyond(builder, builder.add(j_value, _number(b)), last_value) for b in range(n)]
                # what the processor does not foresee: after a short row the next one of these n follows
                tile = builder.mul(K, _number(n * w_itemsize))
                ahead = builder.mul(tile, builder.add(builder.udiv(_number(AHEAD), tile), _number(1)))
                byte = ir.IntType(8).as_pointer()
                kinds = [byte] + [ir.IntType(32)] * 3
                name = "llvm.prefetch.p0"
                prefetch = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), kinds), name)
                how = [ir.Constant(ir.IntType(32), number) for number in (0, 3, 1)]  # to read, to keep near, data
                totals = [[cgutils.alloca_once(builder, vector) for _ in range(n)] for _ in range(m)]
                for row in totals:
                    for total in row:
                        builder.store(ir.Constant(vector, [0.0] * lanes), total)

                def step(k, mask=None):
                    """The products of `lanes` columns from k on."""
                    pointers = [_place(builder, x_array, row, k, vector) for row in x_rows]
                    factors = [_load(builder, pointer, itemsize, mask) for pointer in pointers]
                    for b in range(n):
                        pointer = _place(builder, w_array, w_rows[b], k, ir.VectorType(weight, lanes))
                        builder.call(prefetch, [builder.gep(builder.bitcast(pointer, byte), [ahead]), *how])
                        weights = _load(builder, pointer, w_itemsize, mask)
                        if isinstance(weight, ir.IntType):
                            wide = ir.VectorType(ir.IntType(32), lanes)
                            weights = builder.sitofp(builder.sext(weights, wide), vector)
                        for a in range(m):
                            product = builder.fmul(factors[a], weights, flags=("contract",))
                            total = builder.fadd(builder.load(totals[a][b]), product, flags=("contract",))
                            builder.store(total, totals[a][b])

                whole = builder.udiv(K, _number(lanes))
                with cgutils.for_range(builder, whole, intp=ir.IntType(64)) as loop:
                    step(builder.mul(loop.index, _number(lanes)))
                done = builder.mul(whole, _number(lanes))
                with builder.if_then(builder.icmp_signed("<", done, K), likely=False):
                    step(done, _below(builder, done, K, lanes))
                name = f"llvm.vector.reduce.fadd.v{lanes}f{8 * itemsize}"
                add_up = cgutils.get_or_insert_function(builder.module, ir.FunctionType(real, [real, vector]), name)
                start = builder.bitcast(sums_array.data, real.as_pointer())
                for a in range(m):
                    for b in range(n):
                        numbers = [ir.Constant(real, 0.0), builder.load(totals[a][b])]
                        total = builder.call(add_up, numbers, fastmath=("reassoc",))
                        builder.store(total, builder.gep(start, [_number(a * n + b)]))
                return context.get_dummy_value()

            return types.void(sums, x, w, types.intp, types.intp, types.intp), codegen

        return dots

    _one_row, _four_rows = _make_dots(1, 8), _make_dots(4, 4)

else:

    VECTOR, ROWS = 16, 4

    def _tile(out, a, b, i, j, add):
        raise TypeError("npgpt.tiles: tiles exist inside kernels only")

    _one_row = _four_rows = _tile


@helper
def product(out, a, b, add):
    """Inside a kernel: out = a @ b, or out += a @ b where `add` is true.

    out (M, N), a (M, K), b (K, N), of one dtype.  The last axes of out and b must be contiguous; a may be transposed.
    M and N must not be 0.
    """
    width = 2 * VECTOR // out.itemsize
    for j in range(0, out.shape[1], width):
        for i in range(0, out.shape[0], ROWS):
            _tile(out, a, b, i, j, add)


@helper
def dots(out, x, w, scale, bias, first, last, add):
    """Inside a kernel: out[:, first:last] = x @ w[first:last].T * scale[first:last] + bias[first:last], or out += that.

    out (R, N) and x (R, K) of one dtype, w (N, K) of this dtype or int8, scale and bias (N,) or of no length; the last
    axes contiguous.  Each row of w is read once for four rows of x, so that w may be large: what counts is to fetch it from
    memory in the order in which it lies there.  The result of an element does not depend on `first` and `last`.
    """
    R, n = len(x), 8 if len(x) == 1 else 4
    sums = np.empty((8 // n * 2 if n == 4 else 1, n), out.dtype)
    for j in range(first, last, n):
        for i in range(0, R, len(sums)):
            if R == 1:
                _one_row(sums, x, w, i, j, last - 1)
            else:
                _four_rows(sums, x, w, i, j, last - 1)
            for a in range(min(len(sums), R - i)):
                for b in range(min(n, last - j)):
                    total = sums[a, b]
                    if len(scale):
                        total *= scale[j + b]
                    if len(bias):
                        total += bias[j + b]
                    out[i + a, j + b] = total + out[i + a, j + b] if add else total
