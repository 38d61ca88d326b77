"""11: train a GPT, in sixty lines.

You will understand what a training loop is: take some text, ask the model for the next character everywhere, go
downhill, again.  Everything that 01 to 10 took apart is used here from outside.

The counterpart is npgpt/trainer.py, which does the same with more cores, a schedule, checkpoints and a log:
`python -m npgpt.train` is where to go next.
Try: leave out flat.zero_grad().  The gradients of all steps then add up; the loss falls even so, for a while.
"""

import numpy as np
from checks import check

from npgpt import GPT, AdamW, GPTConfig, no_grad
from npgpt.data import load_text
from npgpt.optim import FlatParameters, clip_scale
from npgpt.tokenizer import CharTokenizer

# Text to tokens: the language reference that comes with Python, whose last tenth is held back.

text = load_text(["pydoc"])
tokenizer = CharTokenizer.from_text(text)
tokens = tokenizer.encode(text)
train, held_back = np.split(tokens, [len(tokens) * 9 // 10])
V = tokenizer.vocab_size


def batch(tokens, B, T, rng):
    """B pieces of T tokens from anywhere, and for each token the one that follows: two (B, T) arrays."""
    places = rng.integers(0, len(tokens) - T, (B, 1)) + np.arange(T + 1)
    return tokens[places[:, :-1]], tokens[places[:, 1:]]


# A model and its optimizer.  float64, so that the gradient can be measured; float32, the default, takes half the time.

T = 32
model = GPT(GPTConfig(vocab_size=V, block_size=T, n_layer=2, n_head=4, n_embd=48), dtype=np.float64)
flat = FlatParameters(model)  # all weights in one array, all gradients in another
optimizer = AdamW(flat)
rng = np.random.default_rng(1337)

# What can be had without a GPT: the frequencies of characters, and those of pairs of them.

pairs = np.zeros((V, V))
np.add.at(pairs, (train[:-1], train[1:]), 1 / (len(train) - 1))
one, two = (-(p[p > 0] * np.log(p[p > 0])).sum() for p in (pairs.sum(axis=1), pairs))
print(f"{model.num_params():,} parameters, {len(train):,} tokens.  Nats per character, if one knows")
print(f"nothing: {np.log(V):.3f}; how frequent it is: {one:.3f}; and the one before: {two - one:.3f}\n")

# Training.

for step in range(301):
    x, y = batch(train, 16, T, rng)
    flat.zero_grad()
    logits, loss = model(x, y)
    loss.backward()
    norm = np.linalg.norm(flat.grads)
    lr = 5e-3 * min(1, (step + 1) / 20, (330 - step) / 100)
    optimizer.step += 1
    optimizer.update(flat.grads, lr, clip_scale(norm, 1.0))
    if step % 50 == 0:
        print(f"step {step:3}   loss {loss.item():.3f}   gradient {norm:.3f}")

print("\n" + tokenizer.decode(model.generate(tokenizer.encode("The "), 200, rng, temperature=0.8)) + "\n")

# Checks: what it has learnt, on text that it has not seen; and the last gradient in a random direction, measured.

with no_grad():
    unseen = model(*batch(held_back, 256, T, np.random.default_rng(1)))[1].item()
check("held-back text: loss, below that of knowing the one before", unseen, two - one)
