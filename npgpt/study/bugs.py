"""The mistakes that students are given to find, from easy to hard: each fails `python -m npgpt.gradcheck`."""

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


BUGS = [
    Fault(
        "linear: the bias gets the mean",
        "npgpt/ops/linear.py",
        "    dbias = dy.sum(axis=0)\n",
        "    dbias = dy.mean(axis=0)\n",
        "Every row used the bias; the gradients of the rows add up.",
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
        "dy * (1 - y * y)",
        "dy * (1 - a.data * a.data)",
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
        "cross-entropy: ignored rows get a gradient",
        "npgpt/ops/cross_entropy.py",
        "    dlogits[~valid] = 0\n",
        "",
        "The loss does not depend on rows whose target is ignored.",
    ),
    Fault(
        "layernorm: weight's gradient from x instead of xhat",
        "npgpt/ops/layernorm.py",
        "    dweight = (dy * xhat).sum(axis=0)\n",
        "    dweight = (dy * x).sum(axis=0)\n",
        "The weight multiplied the normalised value.",
    ),
    Fault(
        "layernorm: without the mean's term",
        "npgpt/ops/layernorm.py",
        "    dx = rstd[:, None] * (g - g_mean - xhat * g_xhat_mean)\n",
        "    dx = rstd[:, None] * (g - xhat * g_xhat_mean)\n",
        "x reaches the output through the mean, too.",
    ),
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
        "attention: queries without the scale",
        "npgpt/ops/attention.py",
        "    dq = ds @ k / math.sqrt(q.shape[-1])\n",
        "    dq = ds @ k\n",
        "The scores were divided by sqrt(hs), and so is their gradient on its way to q.",
    ),
    Fault(
        "attention: softmax backward without the sum",
        "npgpt/ops/attention.py",
        "    ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))\n",
        "    ds = p * dp\n",
        "The probabilities of a row sum to 1: raising one score lowers all other probabilities.",
    ),
    Fault(
        "attention: keys transposed, then reshaped",
        "npgpt/ops/attention.py",
        "    dk = ds.swapaxes(-1, -2) @ q",
        "    dk = (q.swapaxes(-1, -2) @ ds).reshape(q.shape)",
        "q^T ds is the transpose of what is wanted; reshaping it makes the shapes agree, and the figures no righter.",
    ),
    Fault(
        "embedding: of a repeated token one gradient counts",
        "npgpt/ops/embedding.py",
        "    np.add.at(dwte, idx, dy)  # not dwte[idx] += dy: a token that occurs twice would count once\n",
        "    dwte[idx] += dy\n",
        "A token that occurs twice in the batch used the same row twice; both gradients belong to it.",
    ),
    Fault(
        "unbroadcast: stretched axes are not summed",
        "npgpt/ops/primitives.py",
        "    grad = grad.sum(axis=tuple(range(extra)) + stretched, keepdims=True)\n",
        "    grad = grad.sum(axis=tuple(range(extra)))[tuple(slice(0, n) for n in x.shape)]\n",
        "An axis of length 1 that was stretched was copied too, so it must be summed over, not cut.",
    ),
    Fault(
        "attention: backward without the dropout mask",
        "npgpt/ops/attention.py",
        "    dp = da * drop\n",
        "    dp = da\n",
        "A weight that was dropped did not reach the output.",
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
        "mlp kernel: GELU's slope without the inner derivative",
        "npgpt/ops/mlp.py",
        " * two_k * (one + a3 * z * z)\n",
        " * two_k\n",
        "u = k (z + a z^3) has the derivative k (1 + 3 a z^2); near 0 it is nearly k.",
        kernel=True,
    ),
    Fault(
        "embedding: the tied output layer's share is lost",
        "npgpt/ops/embedding.py",
        "        dwte, dwpe = wte.grad_to_add_to(), wpe.grad_to_add_to()\n",
        "        wte.grad = None\n        dwte, dwpe = wte.grad_to_add_to(), wpe.grad_to_add_to()\n",
        "The token table is the output layer's weight as well; what that layer left in its gradient must stay.",
    ),
    Fault(
        "dropout: another mask in the backward",
        "npgpt/ops/dropout.py",
        "        dropout_rows(dx.reshape(rows.shape), as_rows(dy), key, first_row, p)\n",
        "        dropout_rows(dx.reshape(rows.shape), as_rows(dy), next_random_key()[0], first_row, p)\n",
        "The gradient goes where the forward's mask let the value pass.",
    ),
    Fault(
        "engine: the second contribution forgets the first",
        "npgpt/engine.py",
        "            np.add(self.grad, grad, out=total)\n",
        "            total[...] = grad\n",
        "The first contribution was somebody else's array, so the sum needs a new one; but it must be the sum.",
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
        "attention kernel: later blocks replace the gradient of the keys",
        "npgpt/ops/attention.py",
        "product(dk[j0:j1], grad[rows, j0:j1].T, q[t0:end], end < T)",
        "product(dk[j0:j1], grad[rows, j0:j1].T, q[t0:end], False)",
        "A key is seen by the queries of its own block and of all later ones; their contributions add up.",
        kernel=True,
    ),
]
