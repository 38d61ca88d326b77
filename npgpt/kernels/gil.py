"""Python's lock (the GIL): a thread that comes out of a kernel spins before it sleeps for it.

Workers take turns: one runs Python while the others are in kernels.  A thread that wants the lock while another one has
it sleeps, and needs 40 to 90 us to wake up, about as long as the other one has it for.  So `spin` has it look again and
again first.

A kernel calls PyEval_SaveThread where it begins, and PyEval_RestoreThread where it ends.  LLVM asks for them by name
when a kernel is loaded, and `spin` gives it two functions of ours.  They call CPython's, and keep a note:

    save        gives the lock away, then writes 0
    restore     looks until it finds 0, and writes 1 in the same step, or for half a millisecond; then takes the lock

The note is not the lock.  A thread that gives the lock away elsewhere, as NumPy does in a product, leaves 1 behind: the
next kernel looks in vain, sleeps for the lock as always, and writes 0 when another one begins.  So does a thread in a
kernel that was loaded before `spin`.  So `spin` is for processes whose products are kernels, too, and comes first.
"""

import ctypes
import functools
import sys
import time
import warnings

from npgpt.kernels.jit import KERNELS
from npgpt.kernels.vectors import constant, pause

if KERNELS == "numba":
    from llvmlite import binding, ir
    from numba.core import cgutils
    from numba.core.codegen import initialize_llvm

SAVE, RESTORE = "PyEval_SaveThread", "PyEval_RestoreThread"
SECONDS = 5e-4  # for which a thread looks before it sleeps

note = ctypes.c_int64(0)  # 1 from the end of a thread's kernel to the beginning of its next one, or to `rest`
looks = ctypes.c_int64(10_000)  # that take about so long; `spin` finds out how many they are here
for number in note, looks:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(number))  # threads in a kernel as the process ends still need them


def rest():
    """To be called by a thread that is about to wait for another one: it takes no turn any more."""
    note.value = 0


@functools.cache
def spin():
    """Have threads spin for the lock at the end of all functions of Numba that are loaded from now on.

    Nothing is changed in a Python without the lock.
    """
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return None
    try:
        initialize_llvm()
        target = binding.Target.from_default_triple().create_target_machine(opt=2)
        engine = binding.create_mcjit_compiler(binding.parse_assembly(str(_functions())), target)
        engine.finalize_object()  # from here on its functions know CPython's
        save, restore, wait = map(engine.get_function_address, ("save", "restore", "wait"))
    except Exception as error:  # of some version of LLVM: all works without it
        warnings.warn(f"threads do not spin for Python's lock, which takes time: {error}", RuntimeWarning, stacklevel=2)
        return None
    looks.value = _looks_in(SECONDS, ctypes.CFUNCTYPE(None)(wait))
    binding.add_symbol(SAVE, save)
    binding.add_symbol(RESTORE, restore)
    return engine  # which has the functions' memory


def _looks_in(seconds, wait):
    """How many looks take so long: a pause takes 10 ns or 50, whatever the processor's name."""
    looks.value, each = 1000, []
    for _ in range(5):
        start = time.perf_counter()
        wait()
        each.append((time.perf_counter() - start) / looks.value)
    return int(seconds / max(min(each), 1e-9))


def _functions():
    """LLVM's module with `save` and `restore`, which have the arguments and results of CPython's, and `wait`."""
    module, state, free, taken = ir.Module(), ir.IntType(8).as_pointer(), constant(0), constant(1)
    place, patience = (constant(ctypes.addressof(number)).inttoptr(free.type.as_pointer()) for number in (note, looks))

    def begin(name, *signature):
        function = ir.Function(module, ir.FunctionType(*signature), name)
        return function, ir.IRBuilder(function.append_basic_block())

    save, builder = begin("save", state, [])
    saved = builder.call(ir.Function(module, save.function_type, SAVE), [])
    builder.store_atomic(free, place, "seq_cst", 8)
    builder.ret(saved)

    restore, builder = begin("restore", ir.VoidType(), [state])
    with cgutils.for_range(builder, builder.load(patience)) as loop:
        with builder.if_then(builder.icmp_signed("==", builder.load_atomic(place, "monotonic", 8), free)):
            changed = builder.cmpxchg(place, free, taken, "seq_cst", "seq_cst")
            with builder.if_then(builder.extract_value(changed, 1)):
                loop.do_break()
        pause(builder)
    builder.call(ir.Function(module, restore.function_type, RESTORE), restore.args)
    builder.ret_void()

    _, builder = begin("wait", ir.VoidType(), [])  # as long as `restore` looks at most
    with cgutils.for_range(builder, builder.load(patience)):
        builder.load_atomic(place, "monotonic", 8)
        pause(builder)
    builder.ret_void()
    return module
