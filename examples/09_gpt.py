"""A whole GPT, forward and backward, as one straight list of steps.

You will understand

- that there is no more to it than 01 to 08: twenty steps from the tokens to the loss, and the same twenty back, the
  last one first, each undoing its namesake,
- that where the residual stream was read, two gradients meet and are added,
- that wte, which is used at both ends, gets its gradient from both ends.

Counterpart: npgpt/model.py for the way forward, and npgpt/engine.py, which finds the way back by itself; each gradient
here equals the engine's to the last bit.
Next: 10_adamw.py, what to do with all these gradients.
Try it: leave out the line `dx3 = dx3 + d`.  Which gradients are wrong then, and why not the others?

    python examples/09_gpt.py
"""

import os

# npgpt runs its NumPy references with this, and the same references are called below.  The compiled kernels add in
# another order, and a mistake could hide behind "equal but for rounding"; so every bit has to agree.
os.environ["NPGPT_KERNELS"] = "numpy"  # read once, when npgpt is imported

import numpy as np
from checks import check, finish

from npgpt import GPT, GPTConfig, Tensor
from npgpt.gradcheck import numeric_grad
from npgpt.kernels.masks import Dropout
from npgpt.ops.attention import attention_backward_ref, attention_forward_ref
from npgpt.ops.cross_entropy import cross_entropy_backward_ref, cross_entropy_forward_ref
from npgpt.ops.embedding import embedding_backward_ref, embedding_forward_ref
from npgpt.ops.layernorm import EPS, layernorm_backward_ref, layernorm_forward_ref
from npgpt.ops.linear import linear_backward_ref, linear_forward_ref
from npgpt.ops.mlp import mlp_backward_ref, mlp_forward_ref

# --------------------------------------------------------------------------------------------------------------------
# A GPT of two layers with biases, and a batch.  The weights are larger than fresh ones, so that every part counts.

B, T, C, V, n_head = 3, 7, 12, 11, 3
N = B * T
rng = np.random.default_rng(9)
model = GPT(GPTConfig(vocab_size=V, block_size=8, n_layer=2, n_head=n_head, n_embd=C, bias=True), dtype=np.float64)
idx, targets = rng.integers(0, V, (2, B, T))

parameters, w, g = {}, {}, {}  # each: "h.0.ln_1" -> [weight, bias], "h.0.mlp" -> [w_fc, b_fc, w_proj, b_proj], ...
for name, parameter in model.named_parameters():
    module = name.removeprefix("transformer.").rpartition(".")[0]
    module = module.replace("mlp.c_fc", "mlp").replace("mlp.c_proj", "mlp")
    parameter.data[...] = rng.normal(size=parameter.shape) * (0.5 if parameter.ndim == 2 else 1)
    parameters.setdefault(module, []).append(parameter)
    w.setdefault(module, []).append(parameter.data)
(wte,), (wpe,) = w["wte"], w["wpe"]  # (V, C), (8, C)
no_dropout = Dropout()

# --------------------------------------------------------------------------------------------------------------------
# Forward.  x0 ... x4 is the residual stream (N, C), with a row for each token.  A layer reads it and adds what it makes
# of it: attention in steps 2 to 6, the MLP in steps 7 to 9, and so again in the second block.
#
# Some steps keep a second result for their backward: stats_a0 is the mean and rstd of each row that a0 was made of
# (04), lse0 the log-sum-exp of each row of scores, from which p is made again (06), and pre0 the MLP's values before
# GELU (07).  In step 20, -1 is the target that would not count, and N the number of rows that do (05): all of them.

x0 = embedding_forward_ref(idx, wte, wpe).reshape(N, C)                                                   # 1

a0, *stats_a0 = layernorm_forward_ref(x0, *w["h.0.ln_1"], EPS)                                            # 2
qkv0 = linear_forward_ref(a0, *w["h.0.attn.c_attn"]).reshape(B, T, 3 * C)                                 # 3
y0, lse0 = attention_forward_ref(qkv0, n_head, no_dropout)                                                # 4
z0 = linear_forward_ref(y0.reshape(N, C), *w["h.0.attn.c_proj"])                                          # 5
x1 = x0 + z0                                                                                              # 6
b0, *stats_b0 = layernorm_forward_ref(x1, *w["h.0.ln_2"], EPS)                                            # 7
m0, pre0 = mlp_forward_ref(b0, *w["h.0.mlp"])                                                             # 8
x2 = x1 + m0                                                                                              # 9

a1, *stats_a1 = layernorm_forward_ref(x2, *w["h.1.ln_1"], EPS)                                            # 10
qkv1 = linear_forward_ref(a1, *w["h.1.attn.c_attn"]).reshape(B, T, 3 * C)                                 # 11
y1, lse1 = attention_forward_ref(qkv1, n_head, no_dropout)                                                # 12
z1 = linear_forward_ref(y1.reshape(N, C), *w["h.1.attn.c_proj"])                                          # 13
x3 = x2 + z1                                                                                              # 14
b1, *stats_b1 = layernorm_forward_ref(x3, *w["h.1.ln_2"], EPS)                                            # 15
m1, pre1 = mlp_forward_ref(b1, *w["h.1.mlp"])                                                             # 16
x4 = x3 + m1                                                                                              # 17

f, *stats_f = layernorm_forward_ref(x4, *w["ln_f"], EPS)                                                  # 18
logits = linear_forward_ref(f, wte, None)                                                                 # 19
loss, lse = cross_entropy_forward_ref(logits, targets.reshape(N), -1, N)                                  # 20

# --------------------------------------------------------------------------------------------------------------------
# Backward.  dx3 is the gradient of the loss with respect to x3, and so on; each has the shape of its namesake.  In step
# 17, x4 = x3 + m1, both terms get all of dx4.  But step 15 has read x3 too: what comes back from there is added.
#
# It is added by dx3 = dx3 + d, which makes a new array, and not by dx3 += d, as in 04.  After dx3, dm1 = dx4, dx4 all
# three names mean one array: += would write into dx4 and dm1 as well.  No gradient of a parameter would be wrong here,
# as nobody reads dm1 or dx4 again; but dx0 to dx4 would be one array.  (12_engine.py: whose array a gradient is.)
#
# The gradients of a linear layer do not depend on its bias, so it takes [0], the weight, alone; the MLP [::2], both.

dlogits = cross_entropy_backward_ref(1.0, logits, targets.reshape(N), lse, -1, N)                         # 20
df, dwte_head, _ = linear_backward_ref(dlogits, f, wte)                                                   # 19
dx4, *g["ln_f"] = layernorm_backward_ref(df, x4, w["ln_f"][0], *stats_f)                                  # 18

dx3, dm1 = dx4, dx4                                                                                       # 17
db1, *g["h.1.mlp"] = mlp_backward_ref(dm1, b1, *w["h.1.mlp"][::2], pre1)                                  # 16
d, *g["h.1.ln_2"] = layernorm_backward_ref(db1, x3, w["h.1.ln_2"][0], *stats_b1)                          # 15
dx3 = dx3 + d
dx2, dz1 = dx3, dx3                                                                                       # 14
dy1, *g["h.1.attn.c_proj"] = linear_backward_ref(dz1, y1.reshape(N, C), w["h.1.attn.c_proj"][0])          # 13
dqkv1 = attention_backward_ref(dy1.reshape(B, T, C), qkv1, lse1, n_head, no_dropout)                      # 12
da1, *g["h.1.attn.c_attn"] = linear_backward_ref(dqkv1.reshape(N, 3 * C), a1, w["h.1.attn.c_attn"][0])    # 11
d, *g["h.1.ln_1"] = layernorm_backward_ref(da1, x2, w["h.1.ln_1"][0], *stats_a1)                          # 10
dx2 = dx2 + d

dx1, dm0 = dx2, dx2                                                                                       # 9
db0, *g["h.0.mlp"] = mlp_backward_ref(dm0, b0, *w["h.0.mlp"][::2], pre0)                                  # 8
d, *g["h.0.ln_2"] = layernorm_backward_ref(db0, x1, w["h.0.ln_2"][0], *stats_b0)                          # 7
dx1 = dx1 + d
dx0, dz0 = dx1, dx1                                                                                       # 6
dy0, *g["h.0.attn.c_proj"] = linear_backward_ref(dz0, y0.reshape(N, C), w["h.0.attn.c_proj"][0])          # 5
dqkv0 = attention_backward_ref(dy0.reshape(B, T, C), qkv0, lse0, n_head, no_dropout)                      # 4
da0, *g["h.0.attn.c_attn"] = linear_backward_ref(dqkv0.reshape(N, 3 * C), a0, w["h.0.attn.c_attn"][0])    # 3
d, *g["h.0.ln_1"] = layernorm_backward_ref(da0, x0, w["h.0.ln_1"][0], *stats_a0)                          # 2
dx0 = dx0 + d

# The embedding adds to given gradients: of wte to what the head has left there, of wpe to nothing.
g["wte"], g["wpe"] = [dwte_head.copy()], [np.zeros_like(wpe)]
embedding_backward_ref(*g["wte"], *g["wpe"], dx0.reshape(B, T, C), idx)                                   # 1

# --------------------------------------------------------------------------------------------------------------------
# What passes by on the stream reaches the bottom as it is, and each layer adds its own.  So the gradient is not lost on
# the way, however many layers there are.


def length(array):
    return float(np.linalg.norm(array))


print(f"loss {loss:.4f}\n")
print("lengths:    x        dx")
for i, (x, dx) in enumerate(zip((x4, x3, x2, x1, x0), (dx4, dx3, dx2, dx1, dx0), strict=True)):
    print(f"x{4 - i} {length(x):10.2f} {length(dx):9.4f}")
(dwte,) = g["wte"]
shares = f"{length(dwte_head):.4f} from the head, {length(dwte - dwte_head):.4f} from the embedding"
print(f"wte's gradient: {shares}, {length(dwte):.4f} together\n")

# The engine: the same model, but the way back found by npgpt.

engine_loss = model(idx, targets)[1]
engine_loss.backward()
unlike = [
    module
    for module in parameters
    if not all(map(np.array_equal, g[module], [parameter.grad for parameter in parameters[module]]))
]
stream = [dx0, dx1, dx2, dx3, dx4]
shared = sum(np.shares_memory(a, b) for i, a in enumerate(stream) for b in stream[:i])
check("pairs of dx0 to dx4 that are one array", shared, 0)
check("the loss is the engine's, to the last bit", engine_loss.data != loss, 0)
check(f"gradients that are not the engine's, to the last bit: {', '.join(unlike) or 'none'}", len(unlike), 0)

# Finite differences: two entries of each tensor, chosen at random.

for module, gradients in g.items():
    worst = 0.0
    for value, grad in zip(w[module], gradients, strict=True):
        for i in rng.integers(0, value.size, 2):
            entry = value.reshape(-1)[i : i + 1]  # a view: to change it is to change the model
            numeric = numeric_grad(lambda: model(idx, targets)[1].data, Tensor(entry), 1.0)
            worst = max(worst, abs(grad.reshape(-1)[i] - numeric[0]) / np.abs(grad).max())
    check(f"{module}, finite differences", worst, 1e-6)

finish()
