"""What drafts are worth: how many times as fast a GPT writes texts that repeat themselves, and one that does not.

    python -m benchmarks.drafts --workload gpt2 --draft 8 --streams 1

The model's weights are random, so its own texts tell nothing.  Its kernel does all that it does for any text, and then
gives the tokens of a known one; the first half of each is the prompt.  With drafts and without, in turn.

    python -m benchmarks.drafts --model out --dtype bfloat16

What a draft model is worth to a model that was trained: it writes with one and without, in turn, by several controls.
What it has learnt counts: of random weights int8 foresees few tokens that are drawn by their probability.
"""

import argparse
import dataclasses
import inspect
import re
import statistics

import numpy as np

from benchmarks.common import machine, machine_line, positive, write_all
from benchmarks.workloads import WORKLOADS
from npgpt.config import DTYPES, Controls
from npgpt.errors import run_command
from npgpt.files.pretrained import open_model
from npgpt.generate.decode import Decoder
from npgpt.generate.generation import Generation, first_token
from npgpt.generate.stats import Stats
from npgpt.machine import cores
from npgpt.model import GPT

CONTROLS = {
    "temperature 0": Controls(temperature=0),
    "0.8": Controls(temperature=0.8),
    "1": Controls(),
    "0.8, top-k 50": Controls(temperature=0.8, top_k=50),
    "0.8, top-p 0.9": Controls(temperature=0.8, top_p=0.9),
    "0.8, penalty 1.2": Controls(temperature=0.8, repetition_penalty=1.2),
}


class Reader(Decoder):
    """A Decoder that takes its time, and then has drawn the tokens of `text`, whatever they are."""

    text = None

    def has_draft_model(self, n):
        return False  # it would know them, too

    def draw(self, tokens, streams, positions, *others):
        drawn = super().draw(tokens, streams, positions, *others)
        steps = np.arange(1, len(drawn) + 1)[:, None]
        return self.text[np.minimum(np.array(positions) + steps, len(self.text) - 1)]


def texts(vocab_size, length):
    """{what it is: (length,) tokens}."""
    pieces = inspect.getsource(argparse)
    if vocab_size > 1000:
        pieces = re.findall(r"\s*\w{1,6}|\s*[^\w\s]{1,3}|\s+", pieces)  # about as long as GPT-2's
    numbers = {piece: n % vocab_size for n, piece in enumerate(dict.fromkeys(pieces))}
    code = np.array([numbers[piece] for piece in pieces[len(pieces) // 2 :]])
    rng = np.random.default_rng(0)
    noise, changed = rng.integers(0, vocab_size, length), rng.random(length) < 0.05
    changed[: length // 2] = False
    return {
        "new code": code[:length],  # of argparse.py
        "code, 5 % changed": np.where(changed, noise, np.resize(code[: length // 2], length)),
        "a prompt, quoted": np.resize(noise[: length // 2], length),
        "noise": noise,
    }


def write(model, decoder, text, streams, draft):
    """Write the second half of a text -> Stats of it."""
    prompt, stats = text[: len(text) // 2], Stats()
    rngs = [np.random.default_rng(i) for i in range(streams)]
    generation = Generation(model, prompt, rngs, length=len(text), draft=draft, stats=stats)
    generation.decoder, decoder.text = decoder, text
    write_all(generation)
    return stats


def write_by(model, controls, options, has_draft_model):
    """Have a model write texts of its own -> Stats of them."""
    prompt, stats = [first_token(model.tokenizer)], Stats()
    rngs = [np.random.default_rng(i) for i in range(options.streams)]
    generation = Generation(model, prompt, rngs, controls, 1 + options.tokens, dtype=options.dtype, stats=stats)
    if not has_draft_model:
        generation.decoder.has_draft_model = lambda n: False
    write_all(generation)
    return stats


def compare(name, rounds, write):
    """Print how much faster write(True), which gives Stats, is than write(False)."""
    rates, proposed, accepted = {False: [], True: []}, 0, 0
    for round_ in range(rounds + 1):  # the first one fills caches
        for on in rates:
            stats = write(on)
            rates[on] += [stats.tokens / stats.seconds] if round_ else []
        proposed, accepted = proposed + stats.proposed, accepted + stats.accepted
    times = sorted(b / a for a, b in zip(*rates.values(), strict=True))
    without, with_ = map(statistics.median, rates.values())
    print(
        f"{name:<20} {without:>9,.1f} {with_:>12,.1f} {statistics.median(times):>13.2f}x   {accepted:,} of "
        f"{proposed:,}   (rounds: {times[0]:.2f} to {times[-1]:.2f})", flush=True,
    )  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drafts", description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="gpt2")
    parser.add_argument("--model", metavar="PATH", help="write with its draft model and without it, instead")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of --model's weights (%(default)s)")
    parser.add_argument("--draft", type=positive, default=8, help="the most tokens of a draft (%(default)s)")
    parser.add_argument("--streams", type=positive, default=1, help="texts written at once (%(default)s)")
    parser.add_argument("--tokens", type=positive, default=256, help="of each text; and, of a workload, of its prompt")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--int8", action="store_true", help="of a workload's weights")
    options = parser.parse_args(argv)
    print(machine_line(machine(["numpy", "numba"]), cores()))
    print(f"{'':<20} {'tokens/s':>9} {'with drafts':>12} {'times as fast':>14}   right of those proposed")
    if options.model:
        model = open_model(options.model)
        for name, controls in CONTROLS.items():
            compare(name, options.rounds, lambda on, controls=controls: write_by(model, controls, options, on))
        return 0
    config = dataclasses.replace(WORKLOADS[options.workload].config, block_size=2 * options.tokens)
    model = GPT(config)
    decoder = Reader(model, options.streams, int8=options.int8)
    for name, text in texts(config.vocab_size, config.block_size).items():
        how = model, decoder, text, options.streams
        compare(name, options.rounds, lambda on, how=how: write(*how, options.draft if on else 0))
    return 0


if __name__ == "__main__":
    run_command("python -m benchmarks.drafts", main)
