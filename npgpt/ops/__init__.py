"""The operations of the graph, one file each, to be read top to bottom:

1. the docstring: the formula, and the derivation of its gradient;
2. the reference: `*_forward_ref` and `*_backward_ref`, plain NumPy, any float dtype, fresh arrays;
3. the op: checks shapes, asks for buffers, calls forward, records backward;
4. the kernels: the reference's figures, written into given buffers, outputs first.

Two commands read this text as data, and tests/test_exercise.py says where an edit breaks it:

- `npgpt.exercise`: a comment that has a line of a `*_backward_ref` to itself quotes what is undone there,
  `# y = xhat * weight + bias`; level 2 shows these lines and a blank for each;
- `npgpt.explain`: the docstring of the op, or of its file, has formulas after a line that begins with "Forward", and
  derivatives after one that begins with "Backward".

A reader may stop at any depth.  The small operations that everything can be composed from are the operators of a Tensor
(npgpt/tensor.py); primitives.py has three more.
"""
