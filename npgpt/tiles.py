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
"""

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

    @intrinsic
    def _tile(typingctx, out, a, b, i, j, add):
        """out[i:i+ROWS, j:j+WIDTH] = a[i:i+ROWS] @ b[:, j:j+WIDTH], or += where `add` is true.

        WIDTH is 2 VECTOR / itemsize.  What lies beyond the edges of out is neither read nor written.
        """
        if not (out.dtype == a.dtype == b.dtype and out.ndim == a.ndim == b.ndim == 2):
            return None

        def codegen(context, builder, signature, args):
            real, index = context.get_value_type(out.dtype), ir.IntType(64)
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

            def number(n):
                return ir.Constant(index, n)

            def place(array, row, column, kind):
                """Pointer to array[row, column], as a pointer to `kind`."""
                strides = cgutils.unpack_tuple(builder, array.strides)
                offset = builder.add(builder.mul(row, strides[0]), builder.mul(column, strides[1]))
                start = builder.bitcast(array.data, ir.IntType(8).as_pointer())
                return builder.bitcast(builder.gep(start, [offset]), kind.as_pointer())

            def splat(value):
                undefined = ir.Constant(vector if value.type == real else ir.VectorType(index, lanes), ir.Undefined)
                first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
                zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
                return builder.shuffle_vector(first, undefined, zeros)

            def whole_load(pointer, _):
                loaded = builder.load(pointer)
                loaded.align = itemsize
                return loaded

            def whole_store(values, pointer, _):
                builder.store(values, pointer).align = itemsize

            def masked(name, *arguments):
                """Call llvm.masked.load or .store, which leave the lanes alone whose mask is 0."""
                result = vector if name == "load" else ir.VoidType()
                kind = ir.FunctionType(result, [argument.type for argument in arguments])
                letter = f"v{lanes}f{8 * itemsize}"
                function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.{name}.{letter}.p0")
                return builder.call(function, arguments)

            alignment = ir.Constant(ir.IntType(32), itemsize)

            def edge_load(pointer, mask):
                return masked("load", pointer, alignment, mask, ir.Constant(vector, [0.0] * lanes))

            def edge_store(values, pointer, mask):
                masked("store", values, pointer, alignment, mask)

            # rows beyond the last one are the last one again: the same sums go to the same place twice
            last = builder.sub(M, number(1))
            rows = []
            for r in range(ROWS):
                row = builder.add(i_value, number(r))
                rows.append(builder.select(builder.icmp_signed("<", row, last), row, last))
            columns = [builder.add(j_value, number(v * lanes)) for v in range(2)]

            def body(load, store, masks):
                sums = [[cgutils.alloca_once(builder, vector) for _ in range(2)] for _ in range(ROWS)]
                for row_sums in sums:
                    for total in row_sums:
                        builder.store(ir.Constant(vector, [0.0] * lanes), total)
                with cgutils.for_range(builder, K, intp=index) as loop:
                    factors = [load(place(b_array, loop.index, columns[v], vector), masks[v]) for v in range(2)]
                    for r in range(ROWS):
                        copies = splat(builder.load(place(a_array, rows[r], loop.index, real)))
                        for v in range(2):
                            product = builder.fmul(copies, factors[v], flags=("contract",))
                            total = builder.fadd(builder.load(sums[r][v]), product, flags=("contract",))
                            builder.store(total, sums[r][v])
                places = [[place(out_array, rows[r], columns[v], vector) for v in range(2)] for r in range(ROWS)]
                with builder.if_then(add_value):  # all is read before anything is written: see `rows`
                    olds = [[load(places[r][v], masks[v]) for v in range(2)] for r in range(ROWS)]
                    for r in range(ROWS):
                        for v in range(2):
                            builder.store(builder.fadd(olds[r][v], builder.load(sums[r][v])), sums[r][v])
                for r in range(ROWS):
                    for v in range(2):
                        store(builder.load(sums[r][v]), places[r][v], masks[v])

            is_whole = builder.icmp_signed("<=", builder.add(j_value, number(2 * lanes)), N)
            with builder.if_else(is_whole, likely=True) as (whole, edge):
                with whole:
                    body(whole_load, whole_store, (None, None))
                with edge:
                    steps = ir.Constant(ir.VectorType(index, lanes), list(range(lanes)))
                    masks = []
                    for column in columns:
                        masks.append(builder.icmp_signed("<", builder.add(splat(column), steps), splat(N)))
                    body(edge_load, edge_store, masks)
            return context.get_dummy_value()

        return types.void(out, a, b, types.intp, types.intp, types.boolean), codegen

else:

    VECTOR, ROWS = 16, 4

    def _tile(out, a, b, i, j, add):
        raise TypeError("npgpt.tiles: tiles exist inside kernels only")


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
