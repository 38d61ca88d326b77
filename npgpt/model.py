"""GPT-2 (Radford et al. 2019): embeddings, a stack of pre-norm transformer blocks, and a tied output layer.

    x = wte[idx] + wpe                        (B, T, C)
    for each block:
        x = x + attn(ln_1(x))
        x = x + mlp(ln_2(x))
    logits = ln_f(x) wte^T                    (B, T, V)

Each call here is an op in npgpt/ops/ with its derivation, its gradient and its kernel.
"""

import dataclasses
import functools
import itertools
import math

import numpy as np

from npgpt import nn
from npgpt.config import INIT, SAMPLE, Controls
from npgpt.kernels.buffers import side_by_side
from npgpt.ops.cross_entropy import cross_entropy
from npgpt.ops.embedding import embedding

_generations = itertools.count()  # generate() without rng


class Block(nn.Module):
    """One transformer block: attention, then the MLP, each added to the residual stream."""

    def __init__(self, config, dtype):
        self.ln_1 = nn.LayerNorm(config.n_embd, config.bias, dtype)
        self.attn = nn.CausalSelfAttention(config.n_embd, config.n_head, config.dropout, config.bias, dtype)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.bias, dtype)
        self.mlp = nn.MLP(config.n_embd, config.dropout, config.bias, dtype)

    def forward(self, x, *past):
        x = x + self.attn(self.ln_1(x), *past)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """logits, loss = GPT(config)(idx, targets)

    config     a GPTConfig
    seed       what the initial weights are drawn from; None leaves them zero, to be filled in afterwards
    dtype      float32, or float64 for gradient checks
    tokenizer  (attribute) what its tokens mean, or None where that is not known; the model has no use for it
    """

    tokenizer = None

    def __init__(self, config, seed=1337, dtype=np.float32):
        self.config = config
        V, C = config.vocab_size, config.n_embd
        with side_by_side():
            self.transformer = nn.ModuleDict(
                wte=nn.Embedding(V, C, dtype),
                wpe=nn.Embedding(config.block_size, C, dtype),
                drop=nn.Dropout(config.dropout),
                h=[Block(config, dtype) for _ in range(config.n_layer)],
                ln_f=nn.LayerNorm(C, config.bias, dtype),
            )
        self.lm_head = nn.Linear(C, V, False, dtype)
        self.lm_head.weight = self.transformer.wte.weight  # tied: one parameter in two places (Press and Wolf 2017)
        if seed is not None:
            self._init_weights(np.random.default_rng([seed, INIT]))

    @classmethod
    def from_pretrained(cls, path):
        """The GPT in a run folder (its best checkpoint), a checkpoint file, or a Hugging Face GPT-2 folder.

        A Hugging Face folder holds config.json and model.safetensors, or the parts of a model.safetensors.index.json.
        Nothing is downloaded, and no code that a file may hold is run.  The GPT comes with its `tokenizer`, and with
        dropout switched off, as after eval().  Raises CheckpointError that names the file and what is wrong with it.
        """
        from npgpt.files import pretrained

        with pretrained.opened(path) as found:
            model = cls(found.config, seed=None)
            found.copy_to(model)
        model.tokenizer = found.tokenizer
        return model.eval()

    def save_pretrained(self, path):
        """Write config.json and model.safetensors, which Hugging Face's GPT2LMHeadModel.from_pretrained opens.

        path: a folder, which is made if need be; files of these names are replaced, each of them whole or not at all.
        The `tokenizer` is written too; files of another one get names that end in .set-aside.  Raises CheckpointError.
        """
        from npgpt.files import hub

        hub.save(self, path)

    def crop_block_size(self, block_size):
        """Shorten the longest context: later positions are forgotten.  Raises ValueError for one that is longer."""
        if block_size > self.config.block_size:
            raise ValueError(f"crop_block_size: {block_size} is longer than block_size = {self.config.block_size}")
        self.config = dataclasses.replace(self.config, block_size=block_size)
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight.data[:block_size].copy())

    def set_dropout(self, p):
        """Drop activations with another probability from now on."""
        self.config = dataclasses.replace(self.config, dropout=p)
        self.transformer.drop.p = p
        for block in self.transformer.h:
            block.attn.p_drop = block.attn.resid_dropout.p = block.mlp.dropout.p = p

    def _init_weights(self, rng):
        # GPT-2's initialisation: N(0, 0.02), the layers that write to the residual stream smaller, as 2 n_layer of
        # them add up there; biases 0 and layer norms 1, as they are
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
                parameter.data[...] = rng.normal(0.0, std, parameter.shape)

    def features(self, idx, x=None, first=0, cache=None):
        """idx (B, T) integers -> the last layer's output (B, T, C), from which the logits are made.

        x: what the blocks before number `first` put out (B, T, C), if that is known; then idx is not looked at.
        """
        transformer, h = self.transformer, self.transformer.h
        if cache == []:
            cache += [[] for _ in h]
        pasts = [()] * len(h) if cache is None else list(zip(cache, strict=True))  # each block's, or none
        if x is None:
            n = cache[0][0].shape[2] if cache and cache[0] else 0  # positions that have been
            x = transformer.drop(embedding(idx, transformer.wte.weight, transformer.wpe.weight, n))
        for block, past in zip(h[first:], pasts[first:], strict=True):
            x = block(x, *past)
        return transformer.ln_f(x)

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) integers, targets (B, T) integers or None -> logits (B, T, V) and the loss, or None.

        The loss is the mean cross-entropy in nats; targets of -1 do not count.  The caller shifts: the target at a
        place is the token that follows it, as in model(tokens[:, :-1], tokens[:, 1:]).
        cache: a list, empty at first, which keeps each layer's `past` (see causal_attention) from call to call: idx
        then follows the tokens of the calls before.  Only without gradient and dropout.
        Raises ValueError for T > block_size, those in the cache included, and for tokens outside 0 .. V - 1.
        """
        logits = self.lm_head(self.features(idx, cache=cache))
        return logits, None if targets is None else cross_entropy(logits, targets)

    def difference(self):
        """Words for what makes this model another one than GPT(config), or None if nothing does.

        Those ask who know GPT(config) only: writing with a cache, checkpoints, Hugging Face's folders, audits.
        """
        methods = ("__call__", "forward", "features")
        if any(getattr(type(self), name) is not getattr(GPT, name) or name in vars(self) for name in methods):
            return f"the model is a {type(self).__name__} with a {' or '.join(methods)} of its own"
        ours, theirs = nn.structure(self), _structure_of(self.config, self.transformer.wte.weight.dtype)
        for place in (*theirs, *ours):
            if place and ours.get(place) != theirs.get(place):
                pair = [there.get(place, "missing") for there in (ours, theirs)]
                names = ["{} of shape {}".format(*w) if type(w) is tuple else getattr(w, "__name__", w) for w in pair]
                return f"{place} is {names[0]}" + ("" if pair[1] == "missing" else f", not {names[1]}")
        return None

    def num_params(self, non_embedding=True):
        """Number of parameters; as in nanoGPT, the position embedding is left out unless asked for."""
        n = sum(parameter.size for parameter in self.parameters())
        return n - self.transformer.wpe.weight.size if non_embedding else n

    def generate(self, idx, max_new_tokens, rng=None, cache=True, int8=False, dtype=None, draft=0, **controls):
        """Continue a list of tokens, one token at a time: yields each new one as an int.

        rng        numpy Generator, one number of which is used for each token, some of them ahead; or a seed.  By
                   default the number of calls without one before: calls differ, and the same script repeats itself
        cache      whether keys and values are kept from token to token; without it the result is the same, later.  A
                   model that is not GPT(config) any more (see `difference`) writes without it
        int8       whether matrices are rounded to 8 bits; dtype: "bfloat16" rounds them to that (ValueError for both)
        draft      the most tokens that are guessed ahead, where the text repeats itself: the text is the same, sooner
        controls   those of npgpt.config.Controls: temperature, top_k, top_p, ...

        Weights must stay as they are meanwhile.  Where the model has a tokenizer, only its tokens are written.
        """
        from npgpt.generate.generation import Generation

        if not isinstance(rng, np.random.Generator):
            rng = np.random.default_rng([SAMPLE, next(_generations)] if rng is None else rng)
        length = np.size(idx) + max_new_tokens
        generation = Generation(
            self, idx, [rng], Controls(**controls), length, cache=cache, tokenizer=self.tokenizer, int8=int8,
            dtype=dtype, draft=draft,
        )  # fmt: skip
        while len(generation.texts[0]) < length:
            for token, _ in generation.step()[0]:
                yield token


@functools.lru_cache(8)
def _structure_of(config, dtype):
    return nn.structure(GPT(config, seed=None, dtype=dtype))
