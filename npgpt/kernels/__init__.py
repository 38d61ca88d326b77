"""All that knows Numba, LLVM, BLAS and this processor.  It imports the leaves only: errors, context, machine.

    jit.py          how a kernel is compiled, by compiler.py, and tied to its NumPy reference: start here
    maths.py        what kernels call for their numbers, such as `exp`; spin.py: for threads that wait for each other
    matmul.py       large products, by tiles.py, which is made of vectors.py, or by blas.py; sums.py: large sums
    buffers.py      where arrays come from; masks.py: where random bits do
    cache.py        where compiled kernels are kept: in folders that private.py looks after
    crew.py         threads, which wait for the lock of Python as gil.py says; profiler.py: where their time goes

Whoever studies the mathematics need not open any of them.
"""
