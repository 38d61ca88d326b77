"""Numba's compiler, told what it has no options for: how long vectors are, and what need not be done of helpers."""

import functools
import gc

from numba import _dynfunc
from numba.core.compiler import Compiler

# LLVM takes half of Intel's registers otherwise: all of them made its first processors with AVX-512 slower, which
# our products do anyway
LONG_VECTORS = '"prefer-vector-width"="512"'


class OfKernels(Compiler):
    """With vectors as long as the processor has in loops that LLVM vectorises, and without garbage collection."""

    def compile_extra(self, function):
        collects = gc.isenabled()
        try:
            gc.disable()  # most of what Numba makes, hundreds of thousands of objects, it needs to the end
            return super().compile_extra(function)
        finally:
            if collects:
                gc.enable()

    def define_pipelines(self):
        library = self.state.targetctx.codegen().create_library(self.state.func_id.func_qualname)
        library.enable_object_caching()  # as Numba does for those that it creates itself
        add = library.add_ir_module

        def add_ir_module(module):
            for function in module.functions:
                if function.blocks:  # (llvmlite knows no attributes with a value, and would refuse it)
                    set.add(function.attributes, LONG_VECTORS)
            add(module)

        library.add_ir_module = add_ir_module
        self.state.library = library
        return super().define_pipelines()


class OfHelpers(OfKernels):
    """Without machine code, since nobody calls a helper but kernels, of which it becomes a part."""

    def define_pipelines(self):
        pipelines, library = super().define_pipelines(), self.state.library
        library._finalize_final_module = functools.partial(setattr, library, "_finalized", True)
        self.state.targetctx = self.state.targetctx.subtarget(get_executable=_stand_in)
        return pipelines


class OfPlainHelpers(OfHelpers):
    """Without LLVM's optimisation, too: each kernel optimises its copy."""

    def define_pipelines(self):
        pipelines = super().define_pipelines()
        self.state.library._optimize_final_module = lambda: None  # (Numba's own switch makes compiling longer)
        return pipelines


def _stand_in(library, description, environment):
    """What Numba takes for a helper's function, and knows it by; Python must not call it, since there is no code."""
    return _dynfunc.make_function(
        description.lookup_module(), description.qualname, "a helper of kernels", 0, environment, (library,)
    )
