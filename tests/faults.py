"""Wrong gradients: a list of mistakes that are easily made, each in one place of npgpt.

tests/mutation.py plants them one at a time and demands that the tests notice.  They are also an exercise: plant one,
run `python -m npgpt.gradcheck`, and find it by what is wrong.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    before: str  # stands exactly once in the file ...
    after: str  # ... and this is what the mistake makes of it
    why: str  # what is wrong, in a sentence
    kernel: bool = False  # in code that runs with Numba only, not with NPGPT_KERNELS=numpy

    @property
    def kernels(self):
        """A value of NPGPT_KERNELS under which the faulty line runs; of both, the one that starts faster."""
        return "numba" if self.kernel else "numpy"


FAULTS = [
    # ----------------------------------------------------------------------------------------------------------------
    # engine.py
    Fault(
        "engine: a later contribution replaces the first",
        "npgpt/engine.py",
        "            self.grad += grad\n",
        "            self.grad = grad\n",
        "A tensor that is used twice gets the sum of both gradients, not the last one.",
    ),
    Fault(
        "engine: the second contribution forgets the first",
        "npgpt/engine.py",
        "            np.add(self.grad, grad, out=total)\n",
        "            total[...] = grad\n",
        "The first contribution was somebody else's array, so the sum needs a new one; but it must be the sum.",
    ),
    Fault(
        "engine: the two halves of a + a are taken for one",
        "npgpt/engine.py",
        "        self._handed_out = None\n        if grad.shape",
        "        self._handed_out = None\n        if grad is self.grad:\n            return\n        if grad.shape",
        "In y = a + a the same array is the gradient of both operands, and both count.",
    ),
    Fault(
        "engine: adds in place to an array that others see",
        "npgpt/engine.py",
        "            total = grad if ours else empty(self.data.shape, self.data.dtype)\n",
        "            total = self.grad\n",
        "In y = a + b both gradients are the gradient of y itself: adding to a's in place changes b's as well.",
    ),
    Fault(
        "engine: a leaf keeps the array that an op returned",
        "npgpt/engine.py",
        "            if is_leaf and not (ours and (place is None or grad is place)):\n",
        "            if is_leaf and place is not None and grad is not place:\n",
        "A leaf's gradient outlives the backward pass, so it must be a copy of its own, not another tensor's gradient.",
    ),
    Fault(
        "engine: the gradient's place is given out twice",
        "npgpt/engine.py",
        "        if self.grad is None and self.grad_buffer is not None and self._handed_out is None:\n",
        "        if self.grad_buffer is not None:\n",
        "The second op that asks for the place overwrites what the first one wrote there.",
    ),
    Fault(
        "engine: embedding adds to an array that others see",
        "npgpt/engine.py",
        "        if self.grad is None or not self._grad_is_ours:\n",
        "        if self.grad is None:\n",
        "Adding in place is allowed only in an array that no other tensor has for its gradient.",
    ),
    Fault(
        "engine: what the output layer left for the tied weight is overwritten",
        "npgpt/engine.py",
        "            self.grad[...] = 0 if so_far is None else so_far\n",
        "            self.grad[...] = 0\n",
        "The gradient so far must be carried over into the array that is added to.",
    ),
    Fault(
        "engine: breadth-first instead of topological order",
        "npgpt/engine.py",
        """\
        node, parents = stack[-1]
        for parent in parents:
            if parent.requires_grad and id(parent) not in visited:
                visited.add(id(parent))
                stack.append((parent, iter(parent._parents)))
                break
        else:
            order.append(node)
            stack.pop()
""",
        """\
        node, parents = stack.pop(0)
        order.insert(0, node)
        for parent in parents:
            if parent.requires_grad and id(parent) not in visited:
                visited.add(id(parent))
                stack.append((parent, iter(parent._parents)))
""",
        "A backward that runs before all contributions to its gradient have come passes on only a part of it.",
    ),
    Fault(
        "engine: records within no_grad",
        "npgpt/engine.py",
        "    if _state.recording and any(",
        "    if any(",
        "Evaluation would keep the whole graph in memory.",
    ),
    Fault(
        "engine: a block is given out while a view of it is alive",
        "npgpt/engine.py",
        "    return (ctypes.c_char * nbytes).from_buffer(memory, -memory.ctypes.data % align)\n",
        "    return memory[-memory.ctypes.data % align :][:nbytes]\n",
        "NumPy lets a view refer to the array that owns the memory, so the array in between, whose end is waited for, "
        "is gone while the view is still in use.",
    ),
    Fault(
        "engine: one mask for all dropouts",
        "npgpt/engine.py",
        "    _state.random_calls += 1\n",
        "",
        "Every dropout of a step would drop the same elements.",
    ),
    # ----------------------------------------------------------------------------------------------------------------
    # primitives.py
    Fault(
        "sub: sign of the second gradient",
        "npgpt/ops/primitives.py",
        "_unbroadcast(-dy, b)",
        "_unbroadcast(dy, b)",
        "a - b falls when b rises.",
    ),
    Fault(
        "mul: both factors get the same gradient",
        "npgpt/ops/primitives.py",
        "_unbroadcast(dy * a.data, b)",
        "_unbroadcast(dy * b.data, b)",
        "A factor's gradient is dy times the other factor.",
    ),
    Fault(
        "div: sign of the denominator's gradient",
        "npgpt/ops/primitives.py",
        "_unbroadcast(-dy * y / b.data, b)",
        "_unbroadcast(dy * y / b.data, b)",
        "a / b falls when b rises: d(a/b)/db = -a/b^2.",
    ),
    Fault(
        "pow: exponent not lowered",
        "npgpt/ops/primitives.py",
        "a.data ** (exponent - 1)",
        "a.data**exponent",
        "The derivative of x^n is n x^(n-1).",
    ),
    Fault(
        "matmul: operands in the wrong order",
        "npgpt/ops/primitives.py",
        "        db = np.matmul(np.swapaxes(a.data, -1, -2), dy)\n",
        "        db = np.matmul(np.swapaxes(dy, -1, -2), a.data)\n",
        "dB = A^T dY; dY^T A is its transpose.",
    ),
    Fault(
        "unbroadcast: mean instead of sum",
        "npgpt/ops/primitives.py",
        "    grad = grad.sum(axis=tuple(range(extra)) + stretched, keepdims=True)\n",
        "    grad = grad.mean(axis=tuple(range(extra)) + stretched, keepdims=True)\n",
        "Broadcasting copies a number to several places; its gradient is the sum over these places.",
    ),
    Fault(
        "unbroadcast: stretched axes are not summed",
        "npgpt/ops/primitives.py",
        "    grad = grad.sum(axis=tuple(range(extra)) + stretched, keepdims=True)\n",
        "    grad = grad.sum(axis=tuple(range(extra)))[tuple(slice(0, n) for n in x.shape)]\n",
        "An axis of length 1 that was stretched was copied too, so it must be summed over, not cut.",
    ),
    Fault(
        "log: multiplied instead of divided",
        "npgpt/ops/primitives.py",
        "(dy / a.data,)",
        "(dy * a.data,)",
        "The derivative of log x is 1/x.",
    ),
    Fault(
        "tanh: slope from the input",
        "npgpt/ops/primitives.py",
        "(dy * (1 - y * y),)",
        "(dy * (1 - a.data * a.data),)",
        "The slope 1 - tanh(x)^2 is made of the output, not of the input.",
    ),
    Fault(
        "relu: gate by the gradient",
        "npgpt/ops/primitives.py",
        "dy * (a.data > 0)",
        "dy * (dy > 0)",
        "ReLU lets a gradient pass where its input was positive, whatever the gradient's own sign.",
    ),
    Fault(
        "mean: not divided by the count",
        "npgpt/ops/primitives.py",
        "keepdims) / count, a.shape)",
        "keepdims), a.shape)",
        "A mean is a sum divided by the count, and so is its gradient.",
    ),
    Fault(
        "max: equal maxima each get the whole gradient",
        "npgpt/ops/primitives.py",
        "        share = largest / largest.sum(axis=axis, keepdims=True)\n",
        "        share = largest\n",
        "Where several entries are the maximum they share its gradient, or more goes back than came.",
    ),
    Fault(
        "transpose: the same permutation backwards",
        "npgpt/ops/primitives.py",
        "(dy.transpose(np.argsort([i % a.ndim for i in axes])),)",
        "(dy.transpose(axes),)",
        "The way back is the inverse permutation, which is the same one for a mere swap of two axes only.",
    ),
    Fault(
        "getitem: of a repeated index one gradient counts",
        "npgpt/ops/primitives.py",
        "        np.add.at(da, index, dy)",
        "        da[index] += dy",
        "With a repeated index, NumPy's `da[index] += dy` adds only the last of the contributions.",
    ),
    Fault(
        "where: the second value gets the whole gradient",
        "npgpt/ops/primitives.py",
        "np.where(condition, 0, dy)",
        "dy",
        "A value that was not chosen did not reach the output.",
    ),
    # ----------------------------------------------------------------------------------------------------------------
    # embedding.py
    Fault(
        "embedding: of a repeated token one gradient counts",
        "npgpt/ops/embedding.py",
        "    np.add.at(dwte, idx, dy)",
        "    dwte[idx] += dy",
        "A token that occurs twice in the batch used the same row twice; both gradients belong to it.",
    ),
    Fault(
        "embedding kernel: of a repeated token the last gradient counts",
        "npgpt/ops/embedding.py",
        "                dwte[v, i] += dy[b, t, i]\n",
        "                dwte[v, i] = dy[b, t, i]\n",
        "The row may hold gradients already: of the same token earlier in the batch, or of the tied output layer.",
        kernel=True,
    ),
    Fault(
        "embedding: positions get the first sequence's gradient only",
        "npgpt/ops/embedding.py",
        "    dwpe[:T] += dy.sum(axis=0)\n",
        "    dwpe[:T] += dy[0]\n",
        "Every sequence of the batch used the same position embeddings, so their gradients add up.",
    ),
    Fault(
        "embedding: the tied output layer's share is lost",
        "npgpt/ops/embedding.py",
        "        dwte, dwpe = wte.grad_to_add_to(), wpe.grad_to_add_to()\n",
        "        wte.grad = None\n        dwte, dwpe = wte.grad_to_add_to(), wpe.grad_to_add_to()\n",
        "The token table is the output layer's weight as well; what that layer left in its gradient must stay.",
    ),
    Fault(
        "embedding: what was added in place is added again",
        "npgpt/ops/embedding.py",
        "        return None, None  # both are added already\n",
        "        return wte.grad, wpe.grad\n",
        "The kernel has added to the tables' gradients already; the engine must not do so again.",
    ),
    # ----------------------------------------------------------------------------------------------------------------
    # layernorm.py
    Fault(
        "layernorm: without the mean's term",
        "npgpt/ops/layernorm.py",
        "    dx = rstd[:, None] * (g - g_mean - xhat * g_xhat_mean)\n",
        "    dx = rstd[:, None] * (g - xhat * g_xhat_mean)\n",
        "x reaches the output through the mean, too.",
    ),
    Fault(
        "layernorm: without the variance's term",
        "npgpt/ops/layernorm.py",
        "    dx = rstd[:, None] * (g - g_mean - xhat * g_xhat_mean)\n",
        "    dx = rstd[:, None] * (g - g_mean)\n",
        "x reaches the output through the variance, too.",
    ),
    Fault(
        "layernorm: weight's gradient from x instead of xhat",
        "npgpt/ops/layernorm.py",
        "    dweight = (dy * xhat).sum(axis=0)\n",
        "    dweight = (dy * x).sum(axis=0)\n",
        "The weight multiplied the normalised value.",
    ),
    Fault(
        "layernorm: weight forgotten on the way to x",
        "npgpt/ops/layernorm.py",
        "    g = dy * weight\n",
        "    g = dy\n",
        "The gradient of xhat is dy times the weight; with weights of 1, as at the start of training, nobody notices.",
    ),
    Fault(
        "layernorm kernel: without the mean's term",
        "npgpt/ops/layernorm.py",
        "r * (dy[n, i] * weight[i] - g_mean - xhat * g_xhat_mean)",
        "r * (dy[n, i] * weight[i] - xhat * g_xhat_mean)",
        "x reaches the output through the mean, too.",
        kernel=True,
    ),
    Fault(
        "layernorm kernel: without the variance's term",
        "npgpt/ops/layernorm.py",
        "r * (dy[n, i] * weight[i] - g_mean - xhat * g_xhat_mean)",
        "r * (dy[n, i] * weight[i] - g_mean)",
        "x reaches the output through the variance, too.",
        kernel=True,
    ),
    Fault(
        "layernorm kernel: sums start from what the buffer held",
        "npgpt/ops/layernorm.py",
        "    dweight[:] = 0\n",
        "",
        "A buffer that is used again holds the figures of the last step.",
        kernel=True,
    ),
    # ----------------------------------------------------------------------------------------------------------------
    # linear.py
    Fault(
        "linear: the weight's gradient is transposed",
        "npgpt/ops/linear.py",
        "    dweight = dy.T @ x\n",
        "    dweight = (x.T @ dy).reshape(weight.shape)\n",
        "x^T dy is the transpose of what is wanted; reshaping it makes the shapes agree, and the figures no righter.",
    ),
    Fault(
        "linear: the bias gets the mean",
        "npgpt/ops/linear.py",
        "    dbias = dy.sum(axis=0)\n",
        "    dbias = dy.mean(axis=0)\n",
        "Every row used the bias; the gradients of the rows add up.",
    ),
    Fault(
        "linear kernel: the weight's gradient is transposed",
        "npgpt/ops/linear.py",
        "    np.matmul(dy.T, x, out=dweight)\n",
        "    dweight[...] = (x.T @ dy).reshape(dweight.shape)\n",
        "x^T dy is the transpose of what is wanted; reshaping it makes the shapes agree, and the figures no righter.",
        kernel=True,
    ),
    Fault(
        "linear kernel: the bias gets the last row's gradient",
        "npgpt/ops/linear.py",
        "            total[i] += x[n, i]\n",
        "            total[i] = x[n, i]\n",
        "Every row used the bias; the gradients of the rows add up.",
        kernel=True,
    ),
    # ----------------------------------------------------------------------------------------------------------------
    # attention.py
    Fault(
        "attention: keys from ds instead of its transpose",
        "npgpt/ops/attention.py",
        "    dk = ds.swapaxes(-1, -2) @ q",
        "    dk = ds @ q",
        "The gradient of key j is a sum over the queries that looked at it: a column of ds, not a row.",
    ),
    Fault(
        "attention: values from the weights instead of their transpose",
        "npgpt/ops/attention.py",
        "    dv = (p * drop).swapaxes(-1, -2) @ dy\n",
        "    dv = (p * drop) @ dy\n",
        "The gradient of value j is a sum over the queries that looked at it: a column of the weights, not a row.",
    ),
    Fault(
        "attention: keys transposed, then reshaped",
        "npgpt/ops/attention.py",
        "    dk = ds.swapaxes(-1, -2) @ q",
        "    dk = (q.swapaxes(-1, -2) @ ds).reshape(q.shape)",
        "q^T ds is the transpose of what is wanted; reshaping it makes the shapes agree, and the figures no righter.",
    ),
    Fault(
        "attention: softmax backward without the sum",
        "npgpt/ops/attention.py",
        "    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))\n",
        "    ds = p * dp\n",
        "The probabilities of a row sum to 1: raising one score lowers all other probabilities.",
    ),
    Fault(
        "attention: queries without the scale",
        "npgpt/ops/attention.py",
        "    dq = ds @ k / math.sqrt(q.shape[-1])\n",
        "    dq = ds @ k\n",
        "The scores were divided by sqrt(hs), and so is their gradient on its way to q.",
    ),
    Fault(
        "attention: backward without the dropout mask",
        "npgpt/ops/attention.py",
        "    dp = da * drop\n",
        "    dp = da\n",
        "A weight that was dropped did not reach the output.",
    ),
    Fault(
        "attention: sees one position of the future",
        "npgpt/ops/attention.py",
        "np.triu(np.ones((T, T), bool), k=1)",
        "np.triu(np.ones((T, T), bool), k=2)",
        "Position t may see 0 .. t.  Finite differences cannot find this one: forward and backward agree.",
    ),
    Fault(
        "attention kernel: sees one position of the future",
        "npgpt/ops/attention.py",
        "row, stop = s[t - t0], round_up(t + 1, LANES)\n                    row[t + 1 : stop] = -np.inf",
        "row, stop = s[t - t0], round_up(t + 1, LANES)\n                    row[t + 2 : stop] = -np.inf",
        "Position t may see 0 .. t, which are t + 1 positions.",
        kernel=True,
    ),
    Fault(
        "attention kernel: backward mask one short",
        "npgpt/ops/attention.py",
        "                        row[t + 1 : stop] = -np.inf\n                        for j in range(stop):\n",
        "                        row[t:stop] = -np.inf\n                        for j in range(stop):\n",
        "Position t sees itself, too.",
        kernel=True,
    ),
    Fault(
        "attention kernel: softmax backward without the sum",
        "npgpt/ops/attention.py",
        "row[j] * (row_grad[j] - total) * scale",
        "row[j] * row_grad[j] * scale",
        "The probabilities of a row sum to 1: raising one score lowers all other probabilities.",
        kernel=True,
    ),
    Fault(
        "attention kernel: without the scale",
        "npgpt/ops/attention.py",
        "row[j] * (row_grad[j] - total) * scale",
        "row[j] * (row_grad[j] - total)",
        "The scores were multiplied with 1 / sqrt(hs), and so is their gradient.",
        kernel=True,
    ),
    Fault(
        "attention kernel: p again without the scale",
        "npgpt/ops/attention.py",
        "exp(row[j] * scale - row_lse)",
        "exp(row[j] - row_lse)",
        "lse was taken of the scaled scores.",
        kernel=True,
    ),
    Fault(
        "attention kernel: keys from the gradient of the values' weights",
        "npgpt/ops/attention.py",
        "product(dk[j0:j1], grad[rows, j0:j1].T, q[t0:end], end < T)",
        "product(dk[j0:j1], a[rows, j0:j1].T, q[t0:end], end < T)",
        "The gradient of key j is a sum over the queries that looked at it: a column of ds.",
        kernel=True,
    ),
    Fault(
        "attention kernel: keys are told of one query less",
        "npgpt/ops/attention.py",
        "t0 = max(start, j0)  #",
        "t0 = min(max(start, j0) + 1, end - 1)  #",
        "Position t sees itself, too.",
        kernel=True,
    ),
    Fault(
        "attention kernel: values from weights before dropout",
        "npgpt/ops/attention.py",
        "                            drop(row, t + 1, p_drop, key, number)  # a again\n",
        "                            pass\n",
        "y = a v with the weights a after dropout, so dv = a^T dy.",
        kernel=True,
    ),
    Fault(
        "attention kernel: backward without the dropout mask",
        "npgpt/ops/attention.py",
        "                            drop(row_grad, t + 1, p_drop, key, number)  # dp\n",
        "                            pass\n",
        "A weight that was dropped did not reach the output.",
        kernel=True,
    ),
    Fault(
        "attention kernel: later blocks replace the gradient of the keys",
        "npgpt/ops/attention.py",
        "product(dk[j0:j1], grad[rows, j0:j1].T, q[t0:end], end < T)",
        "product(dk[j0:j1], grad[rows, j0:j1].T, q[t0:end], False)",
        "A key is seen by the queries of its own block and of all later ones; their contributions add up.",
        kernel=True,
    ),
    Fault(
        "attention kernel: blocks in the wrong order",
        "npgpt/ops/attention.py",
        "for start in range((T - 1) // QUERY_BLOCK * QUERY_BLOCK, -1, -QUERY_BLOCK):",
        "for start in range(0, T, QUERY_BLOCK):",
        "Only the last block reaches all keys: it must come first, as it writes where the others add.",
        kernel=True,
    ),
    Fault(
        "attention kernel: every sequence has the first one's dropout mask",
        "npgpt/ops/attention.py",
        "drop(row, t + 1, p_drop, key, ((batch_offset + b) * H + h) * T + t)",
        "drop(row, t + 1, p_drop, key, (batch_offset * H + h) * T + t)",
        "A row of the mask is known by its sequence in the whole batch.",
        kernel=True,
    ),
    # ----------------------------------------------------------------------------------------------------------------
    # tiles.py
    Fault(
        "tiles: a sum that should be added replaces",
        "npgpt/tiles.py",
        "builder.store(builder.fadd(olds[r][v], builder.load(sums[r][v])), sums[r][v])",
        "builder.store(builder.load(sums[r][v]), sums[r][v])",
        "Contributions to a gradient add up.",
        kernel=True,
    ),
    Fault(
        "tiles: the last column is left out",
        "npgpt/tiles.py",
        'builder.icmp_signed("<", builder.add(splat(column), steps), splat(N))',
        'builder.icmp_signed("<", builder.add(splat(column), steps), splat(builder.sub(N, number(1))))',
        "Columns 0 .. N - 1 are inside.",
        kernel=True,
    ),
    Fault(
        "tiles: rows beyond the edge are written",
        "npgpt/tiles.py",
        'builder.select(builder.icmp_signed("<", row, last), row, last)',
        "row",
        "What lies beyond the edge is somebody else's.",
        kernel=True,
    ),
    # ----------------------------------------------------------------------------------------------------------------
    # mlp.py
    Fault(
        "mlp: second weight from the value before the activation",
        "npgpt/ops/mlp.py",
        "linear_backward_ref(dy, act, w_proj)",
        "linear_backward_ref(dy, pre, w_proj)",
        "The second layer multiplied what came out of the GELU.",
    ),
    Fault(
        "mlp: slope at the value after the activation",
        "npgpt/ops/mlp.py",
        "    dpre = dact * gelu_slope_ref(pre)\n",
        "    dpre = dact * gelu_slope_ref(act)\n",
        "The slope of the GELU is taken where the GELU was: at its input.",
    ),
    Fault(
        "mlp: GELU's slope without the product rule's second term",
        "npgpt/ops/mlp.py",
        "    return 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * K * (1 + 3 * A * z**2)\n",
        "    return 0.5 * (1 + t)\n",
        "z s(z) has two factors that depend on z.",
    ),
    Fault(
        "mlp kernel: second weight from the value before the activation",
        "npgpt/ops/mlp.py",
        "    np.matmul(dy.T, act, out=dw_proj)\n",
        "    np.matmul(dy.T, pre, out=dw_proj)\n",
        "The second layer multiplied what came out of the GELU.",
        kernel=True,
    ),
    Fault(
        "mlp kernel: GELU's slope without the inner derivative",
        "npgpt/ops/mlp.py",
        " * two_k * (one + a3 * z * z)\n",
        " * two_k\n",
        "u = k (z + a z^3) has the derivative k (1 + 3 a z^2); near 0 it is nearly k.",
        kernel=True,
    ),
    Fault(
        "mlp kernel: first bias from the gradient after the activation",
        "npgpt/ops/mlp.py",
        "            dz = grad[n, i] * slope\n",
        "            dbias[i] += grad[n, i] * (one - slope)\n            dz = grad[n, i] * slope\n",
        "The bias was added before the GELU, so its gradient has passed the GELU, slope and all.",
        kernel=True,
    ),
    # ----------------------------------------------------------------------------------------------------------------
    # cross_entropy.py
    Fault(
        "cross-entropy: p instead of p - y",
        "npgpt/ops/cross_entropy.py",
        "    dlogits[rows, targets[rows]] -= 1\n",
        "",
        "The loss has the target's own logit in it with a minus sign.",
    ),
    Fault(
        "cross-entropy: ignored rows get a gradient",
        "npgpt/ops/cross_entropy.py",
        "    dlogits[~valid] = 0\n",
        "",
        "The loss does not depend on rows whose target is ignored.",
    ),
    Fault(
        "cross-entropy: mean over the ignored rows as well",
        "npgpt/ops/cross_entropy.py",
        "    return dlogits * logits.dtype.type(dloss / count)\n",
        "    return dlogits * logits.dtype.type(dloss / len(targets))\n",
        "The loss was divided by the number of targets that count, and so is its gradient.",
    ),
    Fault(
        "cross-entropy: takes the loss's gradient for 1",
        "npgpt/ops/cross_entropy.py",
        "    return dlogits * logits.dtype.type(dloss / count)\n",
        "    return dlogits * logits.dtype.type(1 / count)\n",
        "Gradient accumulation and workers call backward with a share of 1.",
    ),
    Fault(
        "cross-entropy: count of all targets",
        "npgpt/ops/cross_entropy.py",
        "    count = int((targets != ignore_index).sum())\n",
        "    count = targets.size\n",
        "The mean is over targets that count.  Finite differences cannot find this one: forward and backward agree.",
    ),
    Fault(
        "cross-entropy kernel: y without the mean's factor",
        "npgpt/ops/cross_entropy.py",
        "            dlogits[n, targets[n]] -= scale\n",
        "            dlogits[n, targets[n]] -= 1\n",
        "Both p and y are multiplied with dloss / count.",
        kernel=True,
    ),
    Fault(
        "cross-entropy kernel: ignored rows are left as they were",
        "npgpt/ops/cross_entropy.py",
        "            dlogits[n, :] = 0\n",
        "            continue\n",
        "A buffer that is used again holds the figures of the last step; 0 must be written into it.",
        kernel=True,
    ),
    # ----------------------------------------------------------------------------------------------------------------
    # dropout.py
    Fault(
        "dropout: backward without mask and scale",
        "npgpt/ops/dropout.py",
        "        dropout_rows(dx.reshape(rows.shape), as_rows(dy), key, first_row, p)\n",
        "        dx[...] = dy\n",
        "What was dropped did not reach the output, and what was kept reached it scaled up.",
    ),
    Fault(
        "dropout: backward without the scale",
        "npgpt/ops/dropout.py",
        "        dropout_rows(dx.reshape(rows.shape), as_rows(dy), key, first_row, p)\n",
        "        dropout_rows(dx.reshape(rows.shape), as_rows(dy), key, first_row, p)\n        dx *= 1 - p\n",
        "What was kept was scaled up by 1 / (1 - p), and so is its gradient.",
    ),
    Fault(
        "dropout: another mask in the backward",
        "npgpt/ops/dropout.py",
        "        dropout_rows(dx.reshape(rows.shape), as_rows(dy), key, first_row, p)\n",
        "        dropout_rows(dx.reshape(rows.shape), as_rows(dy), next_random_key()[0], first_row, p)\n",
        "The gradient goes where the forward's mask let the value pass.",
    ),
    Fault(
        "dropout: the same mask in every worker",
        "npgpt/ops/dropout.py",
        "    first_row = batch_offset * (len(rows) // x.shape[0])\n",
        "    first_row = 0\n",
        "A sequence's mask must not depend on how the batch is split over workers.",
    ),
    Fault(
        "dropout kernel: without the scale",
        "npgpt/ops/dropout.py",
        "x[n, i] * scale if keeps(",
        "x[n, i] if keeps(",
        "Without the factor 1 / (1 - p) the mean of the activations shifts when dropout is switched off.",
        kernel=True,
    ),
    # ----------------------------------------------------------------------------------------------------------------
    # model.py and nn.py
    Fault(
        "model: the output layer is not tied",
        "npgpt/model.py",
        "        self.lm_head.weight = self.transformer.wte.weight",
        "        self.lm_head.weight.data[...] = self.transformer.wte.weight.data",
        "A copy has the same value for one step; tied means one parameter in two places.",
    ),
    Fault(
        "model: the residual stream is cut",
        "npgpt/model.py",
        "        x = x + self.mlp(self.ln_2(x))\n",
        "        x = self.mlp(self.ln_2(x))\n",
        "The block adds to the residual stream; without the sum, gradients must pass every MLP on their way back.",
    ),
    # ----------------------------------------------------------------------------------------------------------------
    # optim.py
    Fault(
        "adamw: mean of gradients without the correction of its bias",
        "npgpt/optim.py",
        "    m_hat = m / (1 - beta1**step)",
        "    m_hat = m",
        "The mean starts at 0, so the first steps would be too short.",
    ),
    Fault(
        "adamw kernel: mean of squares without the correction of its bias",
        "npgpt/optim.py",
        "    root = real(1 / math.sqrt(1 - beta2**step))\n",
        "    root = real(1)\n",
        "The mean of squares starts at 0, so the first steps would be far too long.",
        kernel=True,
    ),
    Fault(
        "adamw: decay without the learning rate",
        "npgpt/optim.py",
        "    p[...] = p * (1 - lr * weight_decay) -",
        "    p[...] = p * (1 - weight_decay) -",
        "PyTorch's AdamW, and all published settings for it, multiply the decay with the learning rate.",
    ),
    Fault(
        "adamw: clipping ignored",
        "npgpt/optim.py",
        "    g = g * scale\n",
        "",
        "The gradient is multiplied with the clipping's factor before it enters the moments.",
    ),
    Fault(
        "adamw kernel: clipping ignored",
        "npgpt/optim.py",
        "        gi = g[i] * scale\n",
        "        gi = g[i]\n",
        "The gradient is multiplied with the clipping's factor before it enters the moments.",
        kernel=True,
    ),
    Fault(
        "adamw kernel: squares of the gradients before clipping",
        "npgpt/optim.py",
        "c2 * gi * gi",
        "c2 * g[i] * g[i]",
        "Both moments are made of the clipped gradient.",
        kernel=True,
    ),
    Fault(
        "optim: decay on biases and layer norms",
        "npgpt/optim.py",
        "(cut, stop, 0.0)",
        "(cut, stop, self.weight_decay)",
        "Weight decay is for matrices only.",
    ),
    Fault(
        "optim: short gradients are stretched",
        "npgpt/optim.py",
        "    return min(1.0, grad_clip / (norm + 1e-6)) if",
        "    return grad_clip / (norm + 1e-6) if",
        "Clipping cuts gradients that are too long and leaves the others as they are.",
    ),
    Fault(
        "optim: gradient of an unused parameter left from the last step",
        "npgpt/optim.py",
        "                parameter.grad_buffer[...] = 0\n",
        "                pass\n",
        "A parameter that the loss does not depend on has a gradient of 0, not yesterday's.",
    ),
    Fault(
        "muon: queries, keys and values as one matrix",
        "npgpt/optim.py",
        'n = 3 if name.endswith("c_attn.weight") else 1',
        "n = 1",
        "Three layers that happen to lie in one array: made orthogonal together, they take from each other's step.",
    ),
    Fault(
        "muon: the first moment without the new gradient",
        "npgpt/optim.py",
        "    momentum[...] = momentum * g.dtype.type(mu) + new\n",
        "    momentum[...] = momentum * g.dtype.type(mu)\n",
        "A mean that nothing is added to stays at 0.",
    ),
    Fault(
        "muon: the fifth power of the singular values is lost",
        "npgpt/optim.py",
        "+ b * gram + c * square\n    return square",
        "+ b * gram\n    return square",
        "Without c s^5 the iteration grows without bound instead of settling near 1.",
    ),
    Fault(
        "muon: the product's factor acts once on the Gram matrix",
        "npgpt/optim.py",
        "            symmetric_product(gram, spare, poly)\n",
        "            gram[...] = spare\n",
        "x was multiplied by the factor, so x x^T is multiplied by it on both sides.",
    ),
    Fault(
        "muon kernel: the symmetric half is left as it was",
        "npgpt/optim.py",
        "                out[n, i, j] = out[n, j, i]\n",
        "                out[n, i, j] = out[n, i, j]\n",
        "Only the lower half was computed.",
        kernel=True,
    ),
    Fault(
        "muon: a tall matrix by its rows",
        "npgpt/optim.py",
        "np.matmul(*((q, x) if rows == m else (x, q)), out",
        "np.matmul(*((q, x) if rows == m else (x, q @ q)), out",
        "One factor (x^T x)^(-1/2) makes the columns orthonormal.",
    ),
    # ----------------------------------------------------------------------------------------------------------------
    # parallel.py
    Fault(
        "parallel: a worker's gradient is lost",
        "npgpt/parallel.py",
        "            for replica in self.replicas[1:]:\n",
        "            for replica in self.replicas[2:]:\n",
        "The gradient of the batch is the sum of all workers' gradients.",
    ),
    Fault(
        "parallel: the micro-step's weight is lost",
        "npgpt/parallel.py",
        "                loss.backward(weight * share)\n",
        "                loss.backward(share)\n",
        "With gradient accumulation each micro-step counts as its share of the update.",
    ),
    Fault(
        "parallel: the worker's share is lost",
        "npgpt/parallel.py",
        "                loss.backward(weight * share)\n",
        "                loss.backward(weight)\n",
        "The mean over the batch is the sum of the workers' means, each times its share of the batch.",
    ),
    Fault(
        "parallel: every worker draws the same masks",
        "npgpt/parallel.py",
        "random_stream(seed, batch_offset=start)",
        "random_stream(seed)",
        "A sequence's mask must not depend on how the batch is split over workers.",
    ),
    Fault(
        "parallel: other workers' gradients are not forgotten",
        "npgpt/parallel.py",
        "            replica.flat.zero_grad()\n",
        "            self.flat.zero_grad()\n",
        "Every worker has gradients of its own, and all of them start from nothing at each update.",
    ),
]
