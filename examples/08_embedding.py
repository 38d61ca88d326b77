"""The embedding, and what tying does to its gradient.

You will understand

- why looking up a row is a matrix product in disguise,
- why a token that occurs three times gets the sum of three gradients, and how `+=` gets that wrong,
- that in GPT-2 the same table is the output layer too: its gradient has two shares, of different kinds, and characters
  that nobody has written get one of them.

Counterpart: npgpt/ops/embedding.py, and `lm_head` in npgpt/model.py.
Next: 09_gpt.py, all of it in one list.
Try it: forget the output layer's share, `dwte = lookup`.  Would you have noticed, had you only seen the loss fall?

    python examples/08_embedding.py
"""

import numpy as np
from checks import check, difference, finish

from npgpt import GPT, GPTConfig, Tensor
from npgpt.data.characters import CharTokenizer
from npgpt.gradcheck import numeric_grad
from npgpt.ops.embedding import embedding

rng = np.random.default_rng(8)

# --------------------------------------------------------------------------------------------------------------------
# Looking up.  GPT-2 has two tables of weights: wte, "word token embedding", has a row for each token, and wpe, "word
# position embedding", one for each position.  What enters the model at place t is the sum of two rows,
#
#     y_t = wte[idx_t] + wpe[t]
#
# Token 1 is used three times here, token 2 never.

idx = np.array([1, 0, 1, 3, 1])
V, T, C = 4, len(idx), 3
wte, wpe, dy = rng.normal(size=(V, C)), rng.normal(size=(T, C)), rng.normal(size=(T, C))

# Row t of `one_hot` has its 1 at the token of place t.  So wte[idx] = one_hot wte is a linear layer that reads one_hot,
# and 03 has its gradient: dwte = one_hot^T dy.  Row v of that is the sum of dy_t over all places t where v stands.

one_hot = np.eye(V)[idx]  # (T, V)
check("wte[idx] is a matrix product", difference(one_hot @ wte, wte[idx]), 0)
dwte_product = one_hot.T @ dy  # (V, C)

# Nobody multiplies by all those zeros: each dy_t is added to the row that it belongs to.  Each place t has a row of its
# own in wpe, so dwpe is dy; with several sequences in a batch it would be the sum of theirs.

dwte = np.zeros((V, C))
np.add.at(dwte, idx, dy)
dwpe = dy

overwritten = np.zeros((V, C))
overwritten[idx] += dy  # reads all rows, then writes all rows: of a token's gradients the last one is left

for t in np.flatnonzero(idx == 1):
    print(f"dy[{t}]                 {dy[t].round(3)}")
print(f"dwte[1], their sum    {dwte[1].round(3)}")
print(f"with dwte[idx] += dy  {overwritten[1].round(3)}   only the last: wrong")

check("dwte, one_hot^T dy", difference(dwte, dwte_product), 1e-14)
for name, value, grad in (("wte", wte, dwte), ("wpe", wpe, dwpe)):
    numeric = numeric_grad(lambda: wte[idx] + wpe, Tensor(value), dy)
    check(f"d{name}, finite differences", difference(grad, numeric), 1e-8)
tensors = Tensor(wte, requires_grad=True), Tensor(wpe, requires_grad=True)
embedding(idx[None], *tensors).backward(dy[None])
check("dwte and dwpe, npgpt's op", max(difference(dwte, tensors[0].grad), difference(dwpe, tensors[1].grad)), 1e-14)

# --------------------------------------------------------------------------------------------------------------------
# Tying.  GPT-2's output layer has no matrix of its own: logits = x wte^T, so a token is likely if its row resembles x.
# wte is then used twice, and its gradient is the sum over both uses:
#
#     dlogits = (p - y) / N                        as in 05, y_nv = [target_n = v]
#     head    = dlogits^T x                        as in 03: every row v gets one, sum_n (p_nv - [target_n = v]) x_n / N
#     dx      = dlogits wte                        goes back through the whole model, down to the embedding, where
#     lookup  = each dy added to its token's row   as above: only tokens of the input get one
#     dwte    = head + lookup

text = "the same table reads and writes, so each row is pulled from two sides"
tokenizer = CharTokenizer("".join(map(chr, range(32, 127))))
tokens = tokenizer.encode(text)
idx, targets = tokens[None, :-1], tokens[1:]
V, N = tokenizer.vocab_size, len(targets)
model = GPT(GPTConfig(vocab_size=V, block_size=N, n_layer=2, n_head=4, n_embd=32), dtype=np.float64)
wte = model.transformer.wte.weight

x = model.features(idx)  # (1, N, C): all of the model but the output layer
logits = x.data[0] @ wte.data.T  # (N, V)
e = np.exp(logits - logits.max(axis=1, keepdims=True))
p = e / e.sum(axis=1, keepdims=True)
dlogits = (p - np.eye(V)[targets]) / N  # (N, V)
head = dlogits.T @ x.data[0]  # (V, C)
dx = dlogits @ wte.data  # (N, C)
x.backward(dx[None])  # the engine goes back from here, and meets wte as the embedding only
lookup = wte.grad  # (V, C)
dwte = head + lookup

model.zero_grad()
model(idx, targets[None])[1].backward()  # now the engine goes all the way, and meets wte twice
check("head + lookup, the engine's wte.grad", difference(dwte, wte.grad), 1e-12)

# Finite differences move a number of the table, and with it both of its uses.  Two rows are enough to tell:

for char in "ez":
    v = tokenizer.encode(char)[0]
    numeric = numeric_grad(lambda: model(idx, targets[None])[1].data, Tensor(wte.data[v]), 1.0)
    check(f"row {char!r} of head + lookup, finite differences", difference(dwte[v], numeric), 1e-7)

# --------------------------------------------------------------------------------------------------------------------
# How large are the two shares, on this fresh model?  About the same, though dx = dlogits wte is small: a fresh wte has
# entries of size 0.02.  On the way back dx first passes the last layer norm, which divides by the standard deviation of
# what it normalised (04).  In a fresh model that is about as small as wte, of which it was made: the two cancel.

read, written = np.isin(np.arange(V), idx), np.isin(np.arange(V), targets)
absent = ~(read | written)
print(f"\n{'mean length of the rows of':<30} {'head':>8} {'lookup':>8}")
for kind, rows in (("characters of the text", ~absent), ("characters it does not have", absent)):
    lengths = [np.linalg.norm(share[rows], axis=1).mean() for share in (head, lookup)]
    print(f"{rows.sum()} {kind:<27} {lengths[0]:8.5f} {lengths[1]:8.5f}")
print(f"{'length of the whole table':<30} {np.linalg.norm(head):8.5f} {np.linalg.norm(lookup):8.5f}")
check("rows of absent characters get nothing from lookup", np.abs(lookup[absent]).max(), 0)

# What the head's share tells the absent ones: there p - y = p > 0 at every place, so a step downhill turns their
# rows away from what the model's features have in common.

before = p[:, absent].sum(axis=1).mean()
wte.data -= 0.1 * dwte
e = np.exp(model(idx)[0].data[0])
after = (e / e.sum(axis=1, keepdims=True))[:, absent].sum(axis=1).mean()
print(f"\nOne step of descent takes the absent characters' probability from {before:.3f} to {after:.3f}.")
check("absent characters become less likely, after - before", after - before, -1e-3)

finish()
