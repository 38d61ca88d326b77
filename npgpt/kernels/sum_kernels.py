"""The kernels of sums.py: of arrays of one shape and dtype, in which the numbers lie side by side."""

from npgpt.kernels.jit import kernel, replaces


def add_both_ref(a, b):
    return a + b


@replaces(add_both_ref)
@kernel
def add_both(out, a, b):
    for i in range(out.size):
        out.flat[i] = a.flat[i] + b.flat[i]


def add_to_ref(total, a):
    return total + a


@replaces(add_to_ref)
@kernel
def add_to(total, a):  # (LLVM would add number by number if `add_both` were given one array twice)
    for i in range(total.size):
        total.flat[i] += a.flat[i]
