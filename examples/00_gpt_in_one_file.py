"""A GPT on one page: a text, its characters, autograd, the model, AdamW, training and writing, with NumPy alone.

You will understand what all of npgpt is about, before you meet what makes it fast, safe and proved.

Counterpart: all of npgpt/.  Its GPT has the same losses for the same weights, and is a hundred times faster.
Next: 01_chain_rule.py, where the derivatives begin.
Try it: put your own text into TEXT, and other numbers into the line of B, T, L, H, C; set FIRST to () then.

    python examples/00_gpt_in_one_file.py
"""

import math
import sys

import numpy as np

TEXT = """\
'Twas brillig, and the slithy toves
Did gyre and gimble in the wabe;
All mimsy were the borogoves,
And the mome raths outgrabe.

"Beware the Jabberwock, my son!
The jaws that bite, the claws that catch!
Beware the Jubjub bird, and shun
The frumious Bandersnatch!"

He took his vorpal sword in hand:
Long time the manxome foe he sought--
So rested he by the Tumtum tree,
And stood awhile in thought.

And as in uffish thought he stood,
The Jabberwock, with eyes of flame,
Came whiffling through the tulgey wood,
And burbled as it came!
"""  # Lewis Carroll, 1871
alphabet = sorted(set(TEXT))
tokens = np.array([alphabet.index(character) for character in TEXT])  # a token is a character's place in the alphabet

# --------------------------------------------------------------------------------------------------------------------
# Autograd: arrays that remember what they were computed from


class Tensor:
    """data; and grad, after the backward() of something that was computed from it: the derivatives by these numbers."""

    made = 0

    def __init__(self, data, parents=(), back=None):
        self.data, self.grad, self.parents, self.back = np.asarray(data, float), 0.0, parents, back
        Tensor.made += 1
        self.number = Tensor.made  # a tensor is made after its parents

    def backward(self):
        graph, todo = {self}, [self]
        while todo:
            new = set(todo.pop().parents) - graph
            graph |= new
            todo += new
        self.grad = np.ones_like(self.data)
        for tensor in sorted(graph, key=lambda tensor: -tensor.number):  # so its gradient is complete by its turn
            for parent, grad in zip(tensor.parents, tensor.back(tensor.grad) if tensor.parents else (), strict=True):
                parent.grad = parent.grad + summed(grad, parent.data.shape)  # the sum over all uses

    def __add__(self, other):
        return Tensor(self.data + other.data, (self, other), lambda dy: (dy, dy))

    def __mul__(self, other):
        return Tensor(self.data * other.data, (self, other), lambda dy: (dy * other.data, dy * self.data))

    def __matmul__(self, other):
        a, b = self.data, other.data
        return Tensor(a @ b, (self, other), lambda dy: (dy @ b.swapaxes(-1, -2), a.swapaxes(-1, -2) @ dy))

    def __pow__(self, n):
        return Tensor(self.data**n, (self,), lambda dy: (dy * n * self.data ** (n - 1),))

    def __getitem__(self, index):
        def back(dy):
            dx = np.zeros_like(self.data)
            np.add.at(dx, index, dy)  # what was taken twice gets both gradients
            return (dx,)

        return Tensor(self.data[index], (self,), back)

    def exp(self):
        y = np.exp(self.data)
        return Tensor(y, (self,), lambda dy: (dy * y,))

    def log(self):
        return Tensor(np.log(self.data), (self,), lambda dy: (dy / self.data,))

    def tanh(self):
        y = np.tanh(self.data)
        return Tensor(y, (self,), lambda dy: (dy * (1 - y * y),))

    def sum(self):
        """Over the last axis, which stays, with length 1."""
        return Tensor(self.data.sum(-1, keepdims=True), (self,), lambda dy: (dy + np.zeros_like(self.data),))

    def reshape(self, *shape):
        return Tensor(self.data.reshape(shape), (self,), lambda dy: (dy.reshape(self.data.shape),))

    def transpose(self, *axes):
        return Tensor(self.data.transpose(axes), (self,), lambda dy: (dy.transpose(np.argsort(axes)),))


def summed(grad, shape):
    """Broadcasting copies a number to several places; its gradient is the sum over them."""
    grad = grad.sum(tuple(range(grad.ndim - len(shape))))
    return grad.sum(tuple(i for i, n in enumerate(shape) if n < grad.shape[i]), keepdims=True)


# --------------------------------------------------------------------------------------------------------------------
# The model: GPT-2 (Radford et al. 2019), without biases

B, T, L, H, C, V = 8, 32, 2, 4, 64, len(alphabet)  # sequences, positions, layers, heads, channels, characters


def new_weights(rng):
    shapes = {"wte": (V, C), "wpe": (T, C), "ln_f": (C,)}
    for n in range(L):
        shapes |= {f"h.{n}.ln_1": (C,), f"h.{n}.attn.c_attn": (3 * C, C), f"h.{n}.attn.c_proj": (C, C)}
        shapes |= {f"h.{n}.ln_2": (C,), f"h.{n}.mlp.c_fc": (4 * C, C), f"h.{n}.mlp.c_proj": (C, 4 * C)}
    std = {name: 0.02 / math.sqrt(2 * L) if "c_proj" in name else 0.02 for name in shapes}
    return {
        name: Tensor(np.ones(shape) if "ln_" in name else std[name] * rng.standard_normal(shape))
        for name, shape in shapes.items()
    }


def linear(x, w):
    return x @ w.transpose(1, 0)


def layernorm(x, w):
    x = x + x.sum() * Tensor(-1 / C)  # less the row's mean
    variance = (x * x).sum() * Tensor(1 / C)
    return x * (variance + Tensor(1e-5)) ** -0.5 * w


def softmax(x):
    e = (x + Tensor(-x.data.max(-1, keepdims=True))).exp()  # e^(x - max) does not overflow
    return e * e.sum() ** -1


def attention(x, c_attn, c_proj):
    B, T, _ = x.data.shape
    q, k, v = (linear(x, c_attn).reshape(B, T, 3, H, C // H).transpose(2, 0, 3, 1, 4)[i] for i in range(3))
    scores = q @ k.transpose(0, 1, 3, 2) * Tensor(1 / math.sqrt(C // H))  # (B, H, T, T)
    scores = scores + Tensor(np.triu(np.full((T, T), -1e9), 1))  # nobody sees what comes later
    return linear((softmax(scores) @ v).transpose(0, 2, 1, 3).reshape(B, T, C), c_proj)


def gelu(x):
    return x * Tensor(0.5) * ((x + x**3 * Tensor(0.044715)) * Tensor(math.sqrt(2 / math.pi))).tanh() + x * Tensor(0.5)


def scores_of(w, idx):
    """Tokens (B, T) -> a score for each character that may come next (B, T, V)."""
    x = w["wte"][idx] + w["wpe"][: idx.shape[1]]
    for n in range(L):
        x = x + attention(layernorm(x, w[f"h.{n}.ln_1"]), w[f"h.{n}.attn.c_attn"], w[f"h.{n}.attn.c_proj"])
        z = linear(layernorm(x, w[f"h.{n}.ln_2"]), w[f"h.{n}.mlp.c_fc"])
        x = x + linear(gelu(z), w[f"h.{n}.mlp.c_proj"])
    return linear(layernorm(x, w["ln_f"]), w["wte"])


def loss_of(w, x, y):
    """The mean of -log p(next character)."""
    p = softmax(scores_of(w, x)).reshape(-1, V)[np.arange(y.size), y.ravel()]
    return p.log().sum() * Tensor(-1 / y.size)


# --------------------------------------------------------------------------------------------------------------------
# Training, by AdamW (Loshchilov and Hutter 2019), and writing

STEPS, WARMUP, LEARNING_RATE, BETA1, BETA2, DECAY = 400, 20, 4e-3, 0.9, 0.99, 0.1
FIRST = (  # losses, on every processor
    3.769467442, 3.746914411, 3.651342247, 3.584851274, 3.523659045,
    3.481321577, 3.467370475, 3.391958286, 3.338274721, 3.281564113,
)  # fmt: skip
LAST = 0.6  # at most, of the mean of the last ten losses


def batch(rng):
    rows = rng.integers(len(tokens) - T, size=(B, 1)) + np.arange(T)
    return tokens[rows], tokens[rows + 1]


def learning_rate(step):
    return LEARNING_RATE * min(step / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))


def train(w, rng):
    """Changes the weights, step by step; yields each loss."""
    m, v = ({name: np.zeros_like(p.data) for name, p in w.items()} for _ in range(2))
    for step in range(1, STEPS + 1):
        for p in w.values():
            p.grad = 0.0
        loss = loss_of(w, *batch(rng))
        loss.backward()
        lr = learning_rate(step)
        for name, p in w.items():
            m[name] = BETA1 * m[name] + (1 - BETA1) * p.grad  # the gradient, on average
            v[name] = BETA2 * v[name] + (1 - BETA2) * p.grad**2  # its square, on average
            size = np.sqrt(v[name] / (1 - BETA2**step)) + 1e-8
            p.data = p.data * (1 - lr * DECAY * (p.data.ndim == 2)) - lr * m[name] / (1 - BETA1**step) / size
        yield loss.data.item()


def write(w, rng, text, n):
    for _ in range(n):
        idx = np.array([[alphabet.index(character) for character in text[-T:]]])
        text += alphabet[rng.choice(V, p=softmax(scores_of(w, idx)).data[0, -1])]
    return text


def check(what, error, bound):
    print(f"check: {what}: {error:.1e} <= {bound:.0e}  {'ok' if error <= bound else 'WRONG'}", flush=True)
    if not error <= bound:
        sys.exit(1)


if __name__ == "__main__":
    rng, losses = np.random.default_rng(0), []
    w = new_weights(rng)
    for loss in train(w, rng):
        losses.append(loss)
        if len(losses) == len(FIRST):
            check("the first ten losses", np.abs(np.subtract(losses, FIRST)).max(), 1e-6)
        if len(losses) % 50 == 0:
            print(f"step {len(losses):3}  loss {loss:.3f}", flush=True)
    print("\n" + write(w, rng, "The ", 200) + "\n")
    check("the mean of the last ten losses", np.mean(losses[-10:]), LAST)
