"""The operations of the graph, one file each, to be read top to bottom:

1. the docstring: the formula, and the derivation of its gradient;
2. the reference: `*_forward_ref` and `*_backward_ref`, plain NumPy, any float dtype, fresh arrays;
3. the op: checks shapes, asks for buffers, calls forward, records backward;
4. the kernels: the reference's figures, written into given buffers, outputs first.

A reader may stop at any depth.  The small operations that everything can be composed from are the operators of a Tensor
(npgpt/tensor.py); primitives.py has three more.
"""
