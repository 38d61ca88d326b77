"""All that knows Numba, LLVM, BLAS and this processor.

Imports the leaves only: errors, config, context, machine.  Start with jit.py: how a kernel is compiled, and tied to its
NumPy reference.  tiles.py and blas.py multiply matrices, buffers.py and masks.py are where arrays and random bits come
from, crew.py has the threads, profiler.py measures.  Whoever studies the mathematics need not open any of them.
"""
