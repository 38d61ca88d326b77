"""Train a GPT, in sixty lines.

You will understand

- what a training loop is: take some text, have the model guess every next character, go downhill, again,
- that a loss means something beside the loss of a simpler guess.

Counterpart: npgpt/run/trainer.py, the same with all cores, a schedule, checkpoints and a log.
Next: `python -m npgpt.train`, on a text of your own; or 12_engine.py, how the engine beneath came to be.
Try it: leave out flat.zero_grad().  The gradients of all steps add up then: would you have seen it from the loss?

    python examples/11_train.py
"""

import numpy as np
from checks import check, difference, finish

from npgpt import GPT, AdamW, GPTConfig, Tensor, no_grad
from npgpt.data.characters import CharTokenizer
from npgpt.data.text import load_text
from npgpt.gradcheck import numeric_grad
from npgpt.kernels.blas import blas_threads
from npgpt.optim import FlatParameters, clip_scale

# Text to tokens: the language reference that comes with Python.  Its last tenth is held back.

text = load_text(["pydoc"])
tokenizer = CharTokenizer.from_text(text)
tokens = tokenizer.encode(text)
train, held_back = np.split(tokens, [len(tokens) * 9 // 10])

# A model and its optimizer.  And a twin in float64: in float32 the small differences of finite differences drown.

B, T, V, steps = 32, 16, tokenizer.vocab_size, 200
config = GPTConfig(vocab_size=V, block_size=T, n_layer=1, n_head=4, n_embd=64)
model, twin = GPT(config), GPT(config, dtype=np.float64)
flat, twin_flat = FlatParameters(model), FlatParameters(twin)  # all weights in one array, all gradients in another
optimizer = AdamW(flat)
rng = np.random.default_rng(11)
direction = rng.normal(size=flat.weights.shape) / np.sqrt(flat.weights.size)


def measured_slope(x, y):
    """How fast the loss changes as all weights together move along the direction, by finite differences."""
    way = Tensor(np.zeros(1))

    def loss():
        twin_flat.weights[...] = flat.weights + way.data * direction
        return twin(x, y)[1].data

    return numeric_grad(loss, way, 1.0)[0]


with blas_threads(1):  # for matrices as small as these a second thread costs more than it brings
    for step in range(steps):
        places = rng.integers(0, len(train) - T, (B, 1)) + np.arange(T + 1)  # B pieces of the text, from anywhere
        x, y = train[places[:, :-1]], train[places[:, 1:]]  # (B, T) and, for each token, the one that follows
        flat.zero_grad()
        logits, loss = model(x, y)
        loss.backward()
        norm = np.linalg.norm(flat.grads)
        if step == 10:
            slope = flat.grads @ direction
            check("step 10, the slope in a random direction", difference(slope, measured_slope(x, y)), 1e-4)
        if step % 40 == 0 or step == steps - 1:
            print(f"step {step:3}   loss {loss.item():.3f}   length of the gradient {norm:.3f}")
        lr = 4e-3 * min(1, (step + 1) / 20, 2 - 2 * step / steps)  # up, level, and down to 0
        optimizer.step += 1
        optimizer.update(flat.grads, lr, clip_scale(norm, 1.0))

    # It writes a text.  (The cache of keys and values pays for longer ones: its kernels take seconds to compile.)

    written = model.generate(tokenizer.encode("The "), 150, rng, cache=False)
    print("\nThe " + tokenizer.decode(written) + "\n")

    # What has it learnt?  More than a table of which character follows which, on text that neither has seen.

    table = np.ones((V, V))
    np.add.at(table, (train[:-1], train[1:]), 1)
    table /= table.sum(axis=1, keepdims=True)
    places = np.arange(0, len(held_back) - T, 5 * T)[:, None] + np.arange(T)
    x, y = held_back[places], held_back[places + 1]
    with no_grad():
        unseen = model(x, y)[1].item()
    guess = -np.log(table[x, y]).mean()
    print(f"held-back text: loss {unseen:.3f}, by the table {guess:.3f}, with no idea {np.log(V):.3f}")
    check("the loss, as a share of the table's", unseen / guess, 1)

finish()
