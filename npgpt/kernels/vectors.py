"""Vectors in LLVM's own words: what tiles.py builds its loops of.

An intrinsic is a function that writes LLVM's instructions, one by one, through a `builder`.  The functions here write
a few of them each: they take the builder, and LLVM's values, and return LLVM's values.  Lanes are a vector's numbers.
"""

import itertools

from npgpt.kernels.jit import KERNELS

VECTOR, FEATURES, NARROW = 16, {}, ()  # bytes of a vector; what the processor has, by LLVM's names
if KERNELS == "numba":
    import llvmlite.binding
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils

    FEATURES = llvmlite.binding.get_host_cpu_features()
    NARROW = types.int8, types.uint16  # of numbers that are widened when they are loaded: int8, and bfloat16
    VECTOR = 64 if FEATURES.get("avx512f") else 32 if FEATURES.get("avx") else 16
IS_AMD = bool(FEATURES.get("sse4a"))  # which nobody else has


def are_fit(out, *others):
    """Whether arrays of these kinds are all of one dtype that vectors are made of, and the first may be written."""
    is_real = out.dtype in (types.float32, types.float64)
    return is_real and out.mutable and all(array.dtype == out.dtype for array in others)


def written(signature, write):
    """What an intrinsic of this signature returns: write(context, builder, arrays, others) writes its instructions.

    It is given the arrays among the arguments, which come first, with their fields; what it returns is the result.
    """

    def codegen(context, builder, signature, args):
        kinds = [kind for kind in signature.args if isinstance(kind, types.Array)]
        proxies = map(cgutils.create_struct_proxy, kinds)
        arrays = [proxy(context, builder, value=value) for proxy, value in zip(proxies, args, strict=False)]
        result = write(context, builder, arrays, args[len(arrays) :])
        return context.get_dummy_value() if result is None else result

    return signature, codegen


def vector_of(context, kind):
    """(bytes of a number, numbers in a vector, the vector) for arrays of this kind."""
    real = context.get_value_type(kind.dtype)
    itemsize = context.get_abi_sizeof(real)
    return itemsize, VECTOR // itemsize, ir.VectorType(real, VECTOR // itemsize)


def constant(n):
    """The number n, in 64 bits."""
    return ir.Constant(ir.IntType(64), n)


def not_beyond(builder, n, last):
    """n, or the last number if n is greater."""
    return builder.select(builder.icmp_signed("<", n, last), n, last)


def pointer_to(builder, array, row, column, kind):
    """Pointer to array[row, column], as a pointer to `kind`."""
    strides = cgutils.unpack_tuple(builder, array.strides)
    offset = builder.add(builder.mul(row, strides[0]), builder.mul(column, strides[1]))
    start = builder.bitcast(array.data, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(start, [offset]), kind.as_pointer())


def prefetch(builder, pointer, near=True, to_write=False):
    """Have the line of the cache that a pointer points into fetched; what it points to need not exist.

    near: into the first cache, or else no nearer than the second, since the first one can wait for few lines at a time
    to_write: taken away from all other cores, too
    """
    how = int(to_write), 3 if near else 2, 1  # (1: data, not instructions)
    place = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    args = [place, *(ir.Constant(ir.IntType(32), number) for number in how)]
    kind = ir.FunctionType(ir.VoidType(), [arg.type for arg in args])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"), args)


def pause(builder):
    """Tell the processor that this thread looks again and again, where it has a word for that (x86)."""
    if FEATURES.get("sse2"):
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])


def splat(builder, value, lanes):
    """A vector with this value in all lanes."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    return pick(builder, first, undefined, lambda lane: 0)


def below(builder, start, limit, lanes):
    """For each lane i, whether start + i < limit."""
    steps = ir.Constant(ir.VectorType(ir.IntType(64), lanes), list(range(lanes)))
    places = builder.add(splat(builder, start, lanes), steps)
    return builder.icmp_signed("<", places, splat(builder, limit, lanes))


def load_vector(builder, pointer, itemsize, mask=None):
    """The vector that a pointer to one points to; lanes whose mask is 0 are not read, but 0."""
    kind, alignment = pointer.type.pointee, ir.Constant(ir.IntType(32), itemsize)
    if mask is None:
        return builder.load(pointer, align=itemsize)
    zeros = ir.Constant(kind, [0 if isinstance(kind.element, ir.IntType) else 0.0] * kind.count)
    return _masked(builder, "load", kind, itemsize, kind, [pointer, alignment, mask, zeros])


def load_wide(builder, array, row, column, vector, mask=None):
    """Of array[row] the numbers from a column on, as a `vector`; int8 and bfloat16 (uint16) become its numbers."""
    kind = array.data.type.pointee
    itemsize = kind.width // 8 if isinstance(kind, ir.IntType) else VECTOR // vector.count
    place = pointer_to(builder, array, row, column, ir.VectorType(kind, vector.count))
    numbers = load_vector(builder, place, itemsize, mask)
    if not isinstance(kind, ir.IntType):
        return numbers
    integers = ir.VectorType(ir.IntType(32), vector.count)
    if kind.width == 8:
        return builder.sitofp(builder.sext(numbers, integers), vector)
    halves = builder.shl(builder.zext(numbers, integers), ir.Constant(integers, [16] * vector.count))
    numbers = builder.bitcast(halves, ir.VectorType(ir.FloatType(), vector.count))
    return numbers if vector.element == ir.FloatType() else builder.fpext(numbers, vector)


def store_vector(builder, values, pointer, itemsize, mask=None):
    """Write a vector; lanes whose mask is 0 are left alone."""
    if mask is None:
        builder.store(values, pointer, align=itemsize)
        return
    alignment = ir.Constant(ir.IntType(32), itemsize)
    _masked(builder, "store", values.type, itemsize, ir.VoidType(), [values, pointer, alignment, mask])


def _masked(builder, name, kind, itemsize, result, arguments):
    function = ir.FunctionType(result, [argument.type for argument in arguments])
    letter = "i" if isinstance(kind.element, ir.IntType) else "f"
    full_name = f"llvm.masked.{name}.v{kind.count}{letter}{8 * itemsize}.p0"
    return builder.call(cgutils.get_or_insert_function(builder.module, function, full_name), arguments)


def pick(builder, a, b, lane_of):
    """The vector whose lane i is lane lane_of(i) of a, or lane lane_of(i) - lanes of b if that is not below 0."""
    chosen = [lane_of(lane) for lane in range(a.type.count)]
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(chosen)), chosen))


def sum_each(builder, vectors):
    """The sums of the lanes of n vectors, as many at most as these lanes, as the first n lanes of a vector.

    As in a tournament: two vectors of partial sums become one that has every other lane of each, until one is left.
    The vector has as many lanes as the next power of 2; those beyond n have some of the sums again.
    """
    lanes, step, width = vectors[0].type.count, 1, 1 << (len(vectors) - 1).bit_length()

    def add(a, b, step):
        # lanes with bit `step` take from b, the others from a; each adds the lane that differs in this bit
        here = pick(builder, a, b, lambda lane: lane + lanes if lane & step else lane)
        other = pick(builder, a, b, lambda lane: (lane ^ step) + lanes if lane & step else lane ^ step)
        return builder.fadd(here, other)

    while step < lanes:
        pairs = itertools.zip_longest(vectors[::2], vectors[1::2], fillvalue=vectors[-1])  # (who is odd meets itself)
        vectors = [add(a, b, step) for a, b in pairs]
        step *= 2
    first = ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(width)))
    return builder.shuffle_vector(vectors[0], vectors[0], first)
