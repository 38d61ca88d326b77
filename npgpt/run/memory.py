"""How much memory a training run will need, told before it begins."""

import dataclasses

from npgpt.errors import UsageError
from npgpt.machine import available, in_use

FLOAT = 4  # bytes
KERNELS = 50e6  # bytes that compiled kernels and BLAS take once they run
AUDIT = "the audit of the gradient"
MAPPED = "the text's tokens, mapped from their file"  # which the system takes back when it has no other memory left


def total(parts):
    """Peak memory in bytes of a run that needs these parts; to be asked before anything of them is allocated."""
    return in_use() + KERNELS + sum(parts.values())


def parts(config, vocab_size, n_tokens, workers):
    """What the memory of a training run will be for, from a TrainConfig, its corpus and its workers: words -> bytes."""
    L, C, T, V = config.n_layer, config.n_embd, config.block_size, vocab_size
    size = 12 * C * C * L + (V + T) * C  # of the blocks' matrices and the embeddings; vectors are small
    n = -(-config.batch_size // workers) * T  # tokens in a worker's share of a micro-step
    # a block keeps for its backward: two layer norms' outputs (2 C), q, k, v (3 C), attention (C), the MLP before its
    # activation (4 C), and what is added to the residual stream, and its sums (4 C)
    block = 14 * C + (3 * C if config.dropout else 0)
    # beside them: GELU's output and gradients on their way (some 20 C), logits and their gradient
    activations = n * (L * block + 20 * C + 2 * V) + 9 * C * T
    # Muon: four arrays like the Gram matrices of all its matrices, and one step for each thread
    muon = 4 * 6 * C * C * L + 5 * C * C * workers if config.optimizer == "muon" else 0
    found = {
        "weights": FLOAT * size,
        "gradients, for each worker": FLOAT * size * workers,
        "the optimizer": FLOAT * (2 * size + muon),
        "activations, for each worker": FLOAT * activations * workers,
        MAPPED: (2 if V <= 2**16 else 4) * n_tokens,
        "the order of the text's blocks": 8 * n_tokens / T,
    }
    if config.gradcheck_every:
        # in float64: weights, one tensor and its changes for each thread, what the blocks put out, and what is there
        # within a block without a graph, most of it the MLP's two wide arrays
        batch, largest = config.batch_size * T, max(4 * C, V) * C
        looks = size + batch * L * C + workers * (6 * largest + batch * (14 * C + V))
        # a second look: gradient and activations in float64 for each worker; and once for all in float32, where there
        # are weights, three gradients, what the weights are made from in float64, and six arrays like the logits, too
        again = (2 * workers + 8) * size + 3 * workers * activations + 6 * batch * V
        # of each entry its place, and what was measured there; a block has 12 tensors, 3 of them beside the blocks
        entries = 100 * config.gradcheck_entries * (12 * L + 4)
        found[AUDIT] = 8 * looks + FLOAT * again + entries
    return found


def of_rank(config, world, vocab_size, n_sequences, workers, n_tokens):
    """What one rank will need memory for, as `parts` says it; n_sequences: its share of a micro-step."""
    its_own = dataclasses.replace(config, batch_size=n_sequences, gradcheck_every=0)
    found = parts(its_own, vocab_size, n_tokens, workers)
    if config.gradcheck_every and world.rank == 0:  # which audits alone, whole micro-steps
        found[AUDIT] = parts(config, vocab_size, n_tokens, workers)[AUDIT]
    return found


def check(parts, world, force=False):
    """Raise UsageError if a rank's run, which needs these parts, will need more memory than there is."""
    parts = {words: size for words, size in parts.items() if words != MAPPED}
    others = KERNELS + sum(size for words, size in parts.items() if words != AUDIT)
    needed, there_is = total(parts) + (world.local_size - 1) * others, available()
    if there_is is not None and needed > there_is and not force:
        most = sorted(parts.items(), key=lambda part: -part[1])[:3]
        raise UsageError(
            f"this run needs about {needed / 1e9:,.1f} GB of memory, and there are "
            f"{there_is / 1e9:,.1f} GB ({', '.join(f'{words} {size / 1e9:,.1f}' for words, size in most)}). "
            f"Lower --batch-size, --block-size, --n-embd, --n-layer or --workers; --force tries it all the same"
        )
