"""Write tests/torch_figures.npz: what PyTorch makes of a small GPT, in float64.

    python tests/make_torch_figures.py        needs PyTorch; test_torch_parity.py, which reads the file, does not

Weights are of size 1 and not GPT-2's 0.02, at which a wrong gradient hides behind the residual stream.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks and npgpt, wherever this is started from

FILE = Path(__file__).with_name("torch_figures.npz")

MODEL = dict(n_layer=2, n_head=3, n_embd=12, vocab_size=17, block_size=9, bias=True)
TRAINING = dict(learning_rate=1e-2, beta1=0.9, beta2=0.99, weight_decay=0.1, grad_clip=0.5)
B, T, STEPS = 3, 7, 10


def make_figures():
    """dict name -> array:

    config                       MODEL and TRAINING, as JSON
    idx, targets                 (STEPS, B, T) batches; the first has a target that does not count
    weights/NAME, grads/NAME     of each parameter: at the start, and the gradient of the first batch's loss there
    logits, loss                 (B, T, V) and (): of the first batch, at the start
    losses                       (STEPS,): of each batch before the step on it
    norms                        (STEPS,): of the gradient, before it is clipped
    """
    from benchmarks.torch_gpt import TorchGPT, copy_weights, make_adamw, torch, train_step
    from npgpt.config import GPTConfig

    rng = np.random.default_rng(20)
    model = TorchGPT(GPTConfig(**MODEL)).double()
    weights = {
        name: rng.normal(".ln_" in name and name.endswith("weight"), 0.3, tuple(parameter.shape))
        for name, parameter in model.named_parameters()
    }
    copy_weights(model, weights.items())
    idx, targets = rng.integers(0, MODEL["vocab_size"], (2, STEPS, B, T))
    targets[0, 1, 3] = -1
    batches = list(zip(torch.from_numpy(idx), torch.from_numpy(targets), strict=True))

    logits, loss = model(*batches[0])
    loss.backward()
    grads = {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}

    betas = TRAINING["beta1"], TRAINING["beta2"]
    optimizer = make_adamw(model, TRAINING["learning_rate"], betas, TRAINING["weight_decay"])
    losses, norms = zip(*(train_step(model, optimizer, *b, TRAINING["grad_clip"]) for b in batches), strict=True)
    if min(norms) < TRAINING["grad_clip"]:
        raise ValueError(f"these figures would not test clipping: norms {norms}")
    return {
        "config": np.array(json.dumps({**MODEL, **TRAINING})),
        "idx": idx,
        "targets": targets,
        "logits": logits.detach().numpy(),
        "loss": loss.detach().numpy(),
        "losses": np.array(losses),
        "norms": np.array(norms),
        **{f"weights/{name}": values for name, values in weights.items()},
        **{f"grads/{name}": values for name, values in grads.items()},
    }


if __name__ == "__main__":
    try:
        figures = make_figures()
    except ImportError as error:
        sys.exit(f"make_torch_figures.py: {error}")
    np.savez_compressed(FILE, **figures)
    print(f"{FILE.name}: {FILE.stat().st_size / 1e3:.0f} kB")
    print("losses", np.round(figures["losses"], 3), "norms", np.round(figures["norms"], 2), sep="\n")
