"""The same GPT in PyTorch, as fast as its own building blocks make it: what npgpt is compared with.

Parameters have the names and shapes of npgpt's `model.named_parameters()`, so weights are copied by name.
"""

import math

try:
    import torch
    import torch.nn.functional as F
    from torch import nn
except ImportError:
    raise ImportError("the comparison needs PyTorch, which is not installed: pip install torch") from None


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.c_attn = nn.Linear(C, 3 * C, config.bias)
        self.c_proj = nn.Linear(C, C, config.bias)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in self.c_attn(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, n_head, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.c_fc = nn.Linear(C, 4 * C, config.bias)
        self.c_proj = nn.Linear(4 * C, C, config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TorchGPT(nn.Module):
    """logits, loss = TorchGPT(config)(idx, targets)

    config: a GPTConfig; its dropout is not looked at, there is none.
    """

    def __init__(self, config):
        super().__init__()
        V, C = config.vocab_size, config.n_embd
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(V, C),
                "wpe": nn.Embedding(config.block_size, C),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(C, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(C, V, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight  # tied; comes under its first name only

    def forward(self, idx, targets):
        """idx (B, T), targets (B, T) with -1 for those that do not count -> logits (B, T, V), mean loss in nats."""
        part = self.transformer
        x = part["wte"](idx) + part["wpe"].weight[: idx.shape[1]]
        for block in part["h"]:
            x = block(x)
        logits = self.lm_head(part["ln_f"](x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


@torch.no_grad()
def copy_weights(model, weights):
    """Fill the model with weights: pairs (name, array), one for each of its parameters."""
    missing = dict(model.named_parameters())
    for name, values in weights:
        parameter = missing.pop(name)
        if parameter.shape != values.shape:
            raise ValueError(f"{name}: shape {values.shape}, but PyTorch's model has {tuple(parameter.shape)}")
        parameter.copy_(torch.from_numpy(values))
    if missing:
        raise ValueError(f"no weights for {', '.join(missing)}")


def make_adamw(model, lr, betas, weight_decay, fused=False):
    """AdamW with weight decay on the matrices only.  fused: one kernel for all of an update."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)


def train_step(model, optimizer, idx, targets, grad_clip, forward=None):
    """One update from tensors (B, T).  Returns the loss before it, and the gradient's norm before it was clipped.

    forward: what is called in the model's place: the same, compiled or with less precision.
    """
    optimizer.zero_grad(set_to_none=True)
    _, loss = (forward or model)(idx, targets)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    optimizer.step()
    return loss.item(), norm.item()
