"""How many tokens a second a GPT writes, beside Hugging Face's transformers with its cache, and nanoGPT's way without.

    python -m benchmarks.sample --workload gpt2 --streams 1 --peer transformers
    python -m benchmarks.sample --workload cpu --peer torch             # every token through the whole model
    python -m benchmarks.sample --model out --data my_book.txt          # what rounding to int8 costs in quality

Each side lives in a process of its own, and they write in turn.  Before anything is timed, all must continue a prompt
in the same way, with the same weights and the likeliest token each time; if they do not, the exit code is 1.  The time
is that of everything from one token to the next: temperature 1, the token drawn from all that there are.

    python -m benchmarks.sample --workload gpt2 --against 508dc90

compares the working tree with a revision of npgpt: see benchmarks/against.py.

    python -m benchmarks.sample --workload gpt2 --prompts 16 256 900 --peer transformers ctranslate2 llama --python PATH

gives the time for a prompt, to the first token, and the tokens a second after it, apart, for one text and for eight:
see benchmarks/engines.py.  PATH is the interpreter that has the peers; what it does not have is left out.
"""

import argparse
import importlib.util
import re
import signal
import statistics
import sys
import time

import numpy as np

from benchmarks import against, engines
from benchmarks.common import (
    PAUSE,
    BenchmarkError,
    Process,
    machine,
    machine_line,
    peak_memory,
    positive,
    write_all,
)
from benchmarks.workloads import WORKLOADS, initial_model, initial_weights
from npgpt.errors import UsageError, run_command

PROMPT = 8  # tokens
CHECKED = 16  # tokens that all sides must choose alike
TOKENS = {"cpu": 1000, "baby": 400, "long": 200, "gpt2": 48}  # of each stream and round
SCORED = 8192  # tokens on which the losses with and without int8 are compared
ROUNDS = 5
EXTRA = {"torch": "torch", "transformers": "transformers"}


# --------------------------------------------------------------------------------------------------------------------
# The sides: each gives  write(n, greedy) -> (streams, n) tokens that follow the prompt


def prompts(config, streams):
    """(streams, PROMPT) tokens."""
    return np.tile(np.random.default_rng(0).integers(0, config.vocab_size, PROMPT), (streams, 1))


def npgpt_side(config, streams, int8):
    from npgpt.config import Controls
    from npgpt.generate.generation import Generation

    model = initial_model(config)
    prompt = prompts(config, streams)[0].tolist()
    generation = Generation(model, prompt, [None] * streams, int8=int8)  # its decoder is used again and again

    def write(n, greedy):
        generation.texts = [list(prompt) for _ in range(streams)]
        generation.starts, generation.cached = [0] * streams, [0] * streams
        generation.length = PROMPT + n
        generation.rngs = [np.random.default_rng(i) for i in range(streams)]
        generation.controls = Controls(temperature=0.0 if greedy else 1.0)
        generation.alive = list(range(streams))
        write_all(generation)
        return np.array(generation.texts)[:, PROMPT:]

    return write, generation.decoder.nbytes


def torch_model(config):
    from benchmarks.torch_gpt import TorchGPT, copy_weights

    model = TorchGPT(config)
    copy_weights(model, initial_weights({name: tuple(p.shape) for name, p in model.named_parameters()}))
    return model.eval()


def torch_side(config, streams, int8):
    """The whole window goes through the model for each token, as in nanoGPT's generate()."""
    import torch

    model = torch_model(config)

    @torch.inference_mode()
    def write(n, greedy):
        idx = torch.from_numpy(prompts(config, streams))
        for _ in range(n):
            window = idx[:, -config.block_size :]
            x = model.transformer["wte"](window) + model.transformer["wpe"].weight[: window.shape[1]]
            for block in model.transformer["h"]:
                x = block(x)
            logits = model.lm_head(model.transformer["ln_f"](x[:, -1]))
            if greedy:
                chosen = logits.argmax(dim=-1, keepdim=True)
            else:
                chosen = torch.multinomial(torch.softmax(logits, dim=-1), 1)
            idx = torch.cat((idx, chosen), dim=1)
        return idx[:, PROMPT:].numpy()

    return write, None


def transformers_side(config, streams, int8):
    """GPT2LMHeadModel with its cache, whose length is that of the model's context."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(theirs).eval()
    state = dict(model.named_parameters())
    with torch.no_grad():
        for p in state.values():
            p.zero_()  # biases, where the workload has none
        ours = torch_model(config).state_dict()
        for name, p in ours.items():
            if name in state:
                state[name].copy_(p.T if state[name].shape != p.shape or _is_conv(name) else p)

    @torch.inference_mode()
    def write(n, greedy):
        idx = torch.from_numpy(prompts(config, streams))
        out = model.generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, use_cache=True, pad_token_id=0,
            **({"do_sample": False} if greedy else {"do_sample": True, "top_k": 0}),
        )  # fmt: skip
        return out[:, PROMPT:].numpy()

    return write, None


def _is_conv(name):
    return ".h." in name and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


SIDES = {"npgpt": npgpt_side, "npgpt int8": npgpt_side, "torch": torch_side, "transformers": transformers_side}


def serve(pipe, name, workload, streams):
    """A side's process: sends its greedy tokens and the bytes of its weights; then, for each n, the seconds of n
    tokens; and its peak memory when n is 0."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; this process ends with it
    write, nbytes = SIDES[name](WORKLOADS[workload].config, streams, name.endswith("int8"))
    pipe.send((write(CHECKED, True), nbytes))
    while n := pipe.recv():  # blocks, and does not spin
        write(2, False)  # wakes the threads and fills the caches
        start = time.perf_counter()
        write(n, False)
        pipe.send(time.perf_counter() - start)
    pipe.send(peak_memory())


# --------------------------------------------------------------------------------------------------------------------
# The parent


def read_bandwidth(threads, megabytes=256):
    """Bytes a second that all cores together read from memory, the best of some runs."""
    from concurrent.futures import ThreadPoolExecutor

    from npgpt.optim import sum_of_squares

    arrays = [np.ones(megabytes * 2**18, np.float32) for _ in range(threads)]
    totals = [np.zeros(()) for _ in range(threads)]
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(6):
            start = time.perf_counter()
            list(pool.map(sum_of_squares, totals, arrays))
            seconds.append(time.perf_counter() - start)
    return sum(array.nbytes for array in arrays) / min(seconds[1:])


def measure(options, cores):
    names = ["npgpt", "npgpt int8", *options.peer]
    sides, nbytes, greedy = {}, {}, {}
    for name in names:
        sides[name] = Process(name, serve, name, options.workload, options.streams)
        greedy[name], nbytes[name] = sides[name].receive()
        if name != "npgpt int8" and not np.array_equal(greedy[name], greedy["npgpt"]):
            both = f"{greedy[name].tolist()}, {greedy['npgpt'].tolist()}"
            raise BenchmarkError(f"{name} does not continue the prompt as npgpt does: {both}")
    n = options.tokens or TOKENS[options.workload]
    seconds, bandwidth = {name: [] for name in names}, []
    for _ in range(options.rounds):
        for name, side in sides.items():
            time.sleep(PAUSE)  # the threads that worked last go to sleep
            seconds[name].append(side.ask(n))
        time.sleep(PAUSE)
        bandwidth.append(read_bandwidth(cores))
    return n, seconds, nbytes, max(bandwidth), {name: side.ask(0) for name, side in sides.items()}


def report(options, n, seconds, nbytes, bandwidth, memory):
    B = options.streams
    print(f"workload  {options.workload}: {WORKLOADS[options.workload]}")
    print(f"writing   {n} tokens after {PROMPT}, {B} text{'s' * (B > 1)} at once; {options.rounds} rounds in turn")
    print(f"memory    {bandwidth / 1e9:.1f} GB/s read by all cores, the best of this run")
    print(f"check     all sides but int8 choose the same {CHECKED} tokens\n")
    # compare() reads the rows of other revisions: the first two columns and the memory must stay as they are
    head = f"{'tokens/s':>9} {'ms a token':>11} {'GB/s':>6} {'of memory':>10} {'npgpt is':>9} {'peak memory':>12}"
    print(f"{'':<14} {head}")
    ours = statistics.median(seconds["npgpt"])
    for name, values in seconds.items():
        s = statistics.median(values)
        rate = nbytes[name] * n / s if nbytes[name] else None
        of_memory = f"{rate / 1e9:>6.1f} {rate / bandwidth:>10.0%}" if rate else f"{'':>17}"
        ratios = sorted(b / a for a, b in zip(seconds["npgpt"], values, strict=True))
        print(
            f"{name:<14} {B * n / s:>9,.0f} {s / n * 1e3:>11.3f} {of_memory} {s / ours:>8.2f}x "
            f"{memory[name] / 1e6:>9,.0f} MB   (rounds: {ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
    for name in options.peer:
        times = statistics.median(seconds[name]) / statistics.median(seconds["npgpt int8"])
        print(f"npgpt int8 is {times:.2f}x {name}")


def quality(path, source):
    """Print the mean loss over tokens of a text with float32 weights, with bfloat16 ones and with int8 ones."""
    from npgpt.data.text import load_text
    from npgpt.generate.decode import Decoder
    from npgpt.model import GPT

    model = GPT.from_pretrained(path)
    if model.tokenizer is None:
        raise UsageError(f"{path} has no tokenizer that can be opened")
    tokens = model.tokenizer.encode(load_text([source])[-4 * SCORED :])[-SCORED - 1 :]
    if len(tokens) < 2:
        raise UsageError(f"{source} has {len(tokens)} token; two are needed")
    T, losses = model.config.block_size, {}
    for dtype in ("float32", "bfloat16", "int8"):
        kind = {"int8": True} if dtype == "int8" else {"dtype": dtype}
        decoder, total, count = Decoder(model, **kind), 0.0, 0
        for start in range(0, len(tokens) - 1, T):
            window = tokens[start : start + T + 1]
            for at in range(0, len(window) - 1, decoder.rows):
                part = window[at : min(at + decoder.rows, len(window) - 1)]
                z = decoder(part, [0] * len(part), range(at, at + len(part)), len(part)).astype(np.float64)
                z -= z.max(axis=1, keepdims=True)
                targets = window[at + 1 : at + 1 + len(part)]
                total += (np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(part)), targets]).sum()
                count += len(part)
        losses[dtype] = total / count
    print(f"{path}: loss on {count:,} tokens, in nats per token")
    for dtype, loss in losses.items():
        print(f"{dtype:<9}{loss:.5f}  ({loss - losses['float32']:+.5f})")


def read_table(output, streams):
    """{side: (seconds of a token, bytes of memory)} from the rows of npgpt in what report() printed."""
    figures = {}
    for name, rate, ms, memory in re.findall(r"^(npgpt(?: int8)?) +([\d,]+) +([\d.]+) .* ([\d,]+) MB", output, re.M):
        rate, ms, memory = (float(number.replace(",", "")) for number in (rate, ms, memory))
        # tokens/s has no decimals, ms a token has three: the one with more digits is read
        figures[name] = streams / rate if rate > 1000 * ms else ms / 1000, memory * 1e6
    if list(figures) != ["npgpt", "npgpt int8"]:
        raise BenchmarkError("benchmarks.sample printed a table that cannot be read")
    return figures


def compare(options):
    """The working tree beside another revision.  508dc90 knows these flags and prints such a table already."""
    command = f"benchmarks.sample --workload {options.workload} --streams {options.streams} --rounds {ROUNDS}".split()
    if options.tokens:
        command += ["--tokens", str(options.tokens)]

    def read(output):
        return read_table(output, options.streams), False  # whether the cores were busy, it does not tell

    return against.compare(options.against, [*command, "--peer"], read, options.rounds)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sample", description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="cpu")
    parser.add_argument("--streams", type=positive, help="texts written at once (1; with --prompts 1, and 8)")
    other = parser.add_mutually_exclusive_group()
    peers = [*EXTRA, *(name for name in engines.NEEDS if name not in EXTRA and not name.startswith("npgpt"))]
    other.add_argument("--peer", choices=peers, nargs="*", default=["torch"], help="sides to compare with")
    other.add_argument("--against", metavar="REV", help="compare npgpt with itself at this git revision")
    parser.add_argument("--prompts", type=positive, nargs="+", metavar="N", help="lengths: prompts and tokens apart")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="with --prompts: what runs the peers")
    rounds = f"rounds of each side, in turn ({ROUNDS}; with --against as many as are needed)"
    parser.add_argument("--rounds", type=positive, help=rounds)
    parser.add_argument("--tokens", type=positive, help="tokens of each text in a round (default: seconds' worth)")
    other.add_argument("--model", help="instead: compare the losses of this model with and without int8")
    parser.add_argument("--data", default="pydoc", help="text for --model (%(default)s)")
    options = parser.parse_args(argv)
    asked, options.streams = options.streams, options.streams or 1
    if options.model:
        quality(options.model, options.data)
        return 0
    if options.against:
        against.report(compare(options), "ms a token")
        return 0
    from npgpt.machine import cores

    if options.prompts:
        print(machine_line(machine(["numpy", "numba"]), cores()), flush=True)
        engines.compare(
            WORKLOADS[options.workload].config, [name for name in options.peer if name != "torch"], options.python,
            options.prompts, [asked] if asked else [1, 8], max(2, options.tokens or TOKENS[options.workload]),
            options.rounds or ROUNDS, cores(),
        )  # fmt: skip
        return 0
    if unknown := [peer for peer in options.peer if peer not in EXTRA]:
        raise UsageError(f"{unknown[0]} is a peer with --prompts only")
    n, T = options.tokens or TOKENS[options.workload], WORKLOADS[options.workload].config.block_size
    if "transformers" in options.peer and PROMPT + n > T:
        raise UsageError(f"transformers writes no further than its context: give --tokens {T - PROMPT} or less")
    for peer in options.peer:
        if importlib.util.find_spec(EXTRA[peer]) is None:
            raise UsageError(f"{peer} is not installed: pip install {EXTRA[peer]}, or measure npgpt alone with --peer")

    options.rounds = options.rounds or ROUNDS
    print(machine_line(machine(["numpy", "numba", *options.peer]), cores()), flush=True)
    report(options, *measure(options, cores()))
    return 0


if __name__ == "__main__":
    run_command("python -m benchmarks.sample", main)
