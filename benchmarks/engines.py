"""Engines that write with a GPT-2, each in a process of its own: npgpt, transformers, CTranslate2, llama.cpp.

    python -m benchmarks.sample --prompts 16 256 900 --peer transformers ctranslate2 llama --python PATH

All open the same folder, as npgpt's save_pretrained leaves it, with a made-up tokenizer, which some of them ask for;
what they need besides they make of it.  A side is

    write(prompts, n) -> the likeliest n tokens after each of some equal prompts, lists of tokens; and the seconds for
                         which the prompt was read, or None if the engine does not tell

and is asked and timed by this file, which runs in the side's process with the interpreter that has the engine.  What a
text of one token takes is the time to the first token, everything included; the others took the rest of a longer one.
Of several texts npgpt reads the prompt once, the others read it for each.
"""

import contextlib
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import PAUSE, ROOT, BenchmarkError, write_all
from npgpt.errors import UsageError

NEEDS = {  # what the interpreter must have: to run a side, and to make its files
    "npgpt": "numba", "npgpt-bfloat16": "numba", "npgpt-int8": "numba", "transformers": "torch transformers",
    "ctranslate2": "ctranslate2 torch transformers", "ctranslate2-int8": "ctranslate2 torch transformers",
    "llama": "llama_cpp gguf safetensors",
}  # fmt: skip
BYTES = 256
FLOAT = [name for name in NEEDS if "-" not in name]  # these must choose the same tokens
ALIKE = {"llama": 4}  # or as many of the first ones: it keeps keys and values in float16, and near a tie texts part


# --------------------------------------------------------------------------------------------------------------------
# The folder


def make_folder(folder, config):
    """A GPT-2 with the benchmarks' weights, and a vocabulary of bytes and numbers."""
    from benchmarks.workloads import initial_model

    model = initial_model(config)
    model.save_pretrained(folder)
    tokens = names(config.vocab_size)
    texts = {
        "vocab.json": json.dumps({token: i for i, token in enumerate(tokens)}),
        "merges.txt": "#version: 0.2\nĠ 0\n",
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "GPT2Tokenizer", **dict.fromkeys(("bos_token", "eos_token", "unk_token"), tokens[-1])}
        ),
    }
    for name, text in texts.items():
        (Path(folder) / name).write_text(text, encoding="utf-8")


def names(vocab_size):
    """A vocabulary's tokens, as GPT-2's tokenizer spells bytes; the last one ends a text."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [chr(256 + n) for n in range(BYTES - len(shown))]
    return [*map(chr, shown), *others, *(f"Ġ{n}" for n in range(vocab_size - BYTES - 1)), "<|endoftext|>"]


# --------------------------------------------------------------------------------------------------------------------
# The sides


def npgpt_side(folder, threads, **kind):
    from npgpt import GPT
    from npgpt.config import Controls
    from npgpt.generate.generation import Generation

    model = GPT.from_pretrained(folder)
    model.tokenizer = None

    def write(prompts, n):
        length = len(prompts[0]) + n
        generation = Generation(
            model, prompts[0], [np.random.default_rng(i) for i in range(len(prompts))], Controls(temperature=0), length,
            threads=threads, **kind,
        )  # fmt: skip
        write_all(generation)
        return [text[-n:] for text in generation.texts], generation.stats.prompt_seconds

    return write


def transformers_side(folder, threads):
    import torch
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(threads)
    model = GPT2LMHeadModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def write(prompts, n):
        x, past, tokens = torch.tensor(prompts), None, []
        for _ in range(n):
            out = model(x, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = out.past_key_values
            tokens.append(out.logits[:, -1].argmax(-1))
            x = tokens[-1][:, None]
        return torch.stack(tokens, 1).tolist(), None

    return write


def ctranslate2_side(folder, threads, kind="float32"):
    import ctranslate2

    made = Path(folder) / f"ctranslate2-{kind}"
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(made), quantization=kind)
    generator = ctranslate2.Generator(str(made), device="cpu", intra_threads=threads, compute_type=kind)
    tokens = names(json.loads((Path(folder) / "config.json").read_text())["vocab_size"])

    def write(prompts, n):
        found = generator.generate_batch(
            [[tokens[i] for i in prompt] for prompt in prompts], max_length=n, min_length=n, sampling_topk=1,
            include_prompt_in_result=False, end_token=[],
        )  # fmt: skip
        return [one.sequences_ids[0] for one in found], None

    return write


def make_gguf(folder, path):
    """llama.cpp's file of a GPT-2."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((Path(folder) / "config.json").read_text())
    weights = load_file(Path(folder) / "model.safetensors")
    weights = {name.removeprefix("transformer."): array for name, array in weights.items()}
    writer, V = gguf.GGUFWriter(str(path), "gpt2"), config["vocab_size"]
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names(V))
    writer.add_token_merges(["Ġ 0"])
    writer.add_token_types([1] * (V - 1) + [3])
    writer.add_bos_token_id(V - 1)
    writer.add_eos_token_id(V - 1)
    ends = ("token_embd", "wte"), ("position_embd", "wpe"), ("output", "wte"), ("output_norm", "ln_f")
    layers = (
        ("attn_norm", "ln_1"), ("attn_qkv", "attn.c_attn"), ("attn_output", "attn.c_proj"), ("ffn_norm", "ln_2"),
        ("ffn_up", "mlp.c_fc"), ("ffn_down", "mlp.c_proj"),
    )  # fmt: skip
    blocks = [(f"blk.{i}.{theirs}", f"h.{i}.{ours}") for i in range(config["n_layer"]) for theirs, ours in layers]
    for theirs, ours in (*ends, *blocks):
        for part in ("weight", "bias"):
            if (array := weights.get(f"{ours}.{part}")) is not None:
                transposed = array.T if array.ndim == 2 and ours.startswith("h.") else array
                writer.add_tensor(f"{theirs}.{part}", np.ascontiguousarray(transposed, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_side(folder, threads):
    import llama_cpp as ll

    made, config = Path(folder) / "llama.gguf", json.loads((Path(folder) / "config.json").read_text())
    make_gguf(folder, made)
    quiet = ll.llama_log_callback(lambda level, text, data: None)
    ll.llama_log_set(quiet, None)
    ll.llama_backend_init()
    contexts, V = {}, config["vocab_size"]
    model = ll.llama_model_load_from_file(str(made).encode(), ll.llama_model_default_params())

    def context_of(streams):
        if streams not in contexts:
            params = ll.llama_context_default_params()
            params.n_ctx = params.n_batch = streams * config["n_positions"]
            params.n_ubatch, params.n_seq_max = 512, streams
            params.n_threads = params.n_threads_batch = threads
            contexts[streams] = ll.llama_init_from_model(model, params)
        return contexts[streams]

    def write(prompts, n, quiet=quiet):  # (which must live as long as this)
        context = context_of(len(prompts))
        ll.llama_memory_clear(ll.llama_get_memory(context), True)
        batch, tokens = ll.llama_batch_init(sum(map(len, prompts)), 0, 1), [[] for _ in prompts]
        place, newest = 0, prompts
        for _ in range(n):
            batch.n_tokens, last = 0, []
            for stream, part in enumerate(newest):
                for at, token in enumerate(part):
                    i = batch.n_tokens
                    batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, place + at, 1
                    batch.seq_id[i][0], batch.logits[i] = stream, at + 1 == len(part)
                    batch.n_tokens += 1
                last.append(batch.n_tokens - 1)
            if ll.llama_decode(context, batch):
                raise BenchmarkError("llama_decode has failed")
            place += len(newest[0])
            rows = [np.ctypeslib.as_array(ll.llama_get_logits_ith(context, i), (V,)) for i in last]
            newest = [[int(row.argmax())] for row in rows]
            for text, part in zip(tokens, newest, strict=True):
                text += part
        ll.llama_batch_free(batch)
        return tokens, None

    return write


SIDES = {
    "npgpt": npgpt_side, "npgpt-bfloat16": lambda *args: npgpt_side(*args, dtype="bfloat16"),
    "npgpt-int8": lambda *args: npgpt_side(*args, int8=True), "transformers": transformers_side,
    "ctranslate2": ctranslate2_side, "ctranslate2-int8": lambda *args: ctranslate2_side(*args, kind="int8"),
    "llama": llama_side,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------
# A side's process, and what asks it


class Engine:
    """A side in a process of its own, with another interpreter if need be."""

    def __init__(self, name, folder, threads, python):
        self.name = name
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OPENBLAS_", "OMP_", "MKL_"))}
        environment |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
        command = [python, "-m", "benchmarks.engines", name, str(folder), str(threads)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, question):
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            raise BenchmarkError(f"the {self.name} process died; its message stands above") from None

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def missing(name, python):
    """Of the packages that a side needs, those that an interpreter has not got."""
    code = "import importlib.util, sys; print(*[n for n in sys.argv[1:] if importlib.util.find_spec(n) is None])"
    done = subprocess.run([python, "-c", code, *NEEDS[name].split()], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.split()


def serve(name, folder, threads):
    """Answer questions [prompts, n], a line each: [tokens, seconds that they took, those of the prompt]."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what an engine prints is no answer
    write = SIDES[name](folder, threads)
    for line in sys.stdin:
        prompts, n = json.loads(line)
        start = time.perf_counter()
        tokens, prompt = write(prompts, n)
        seconds = time.perf_counter() - start
        print(json.dumps([[list(map(int, text)) for text in tokens], seconds, prompt]), file=answers, flush=True)


# --------------------------------------------------------------------------------------------------------------------
# The parent


def are_alike(name, texts):
    """Whether an engine has chosen npgpt's tokens, as far as it must."""
    ours, theirs = ([text[: ALIKE.get(name)] for text in texts[side]] for side in ("npgpt", name))
    return ours == theirs


def measure(engines, lengths, streams, n, rounds, vocab_size):
    """(side, streams, prompt) -> the seconds of the prompt, of one token, of n tokens in each round, all in turn."""
    rng, seconds = np.random.default_rng(0), {}
    for round_ in range(rounds + 1):  # the first one fills caches
        for B in streams:
            for P in lengths:
                prompts = [rng.integers(0, vocab_size - 1, P).tolist()] * B
                texts = {}
                for name, engine in engines.items():
                    time.sleep(PAUSE)  # the threads that worked last go to sleep
                    engine.ask([prompts[:1], 1])  # its threads wake up, and its weights come into the cache
                    _, first, _ = engine.ask([prompts, 1])
                    texts[name], whole, prompt = engine.ask([prompts, n])
                    if round_:
                        seconds.setdefault((name, B, P), []).append((prompt or math.nan, first, whole))
                others = [name for name in engines if name in FLOAT and not are_alike(name, texts)]
                if others:
                    raise BenchmarkError(f"{others[0]} does not continue a prompt of {P} tokens as npgpt does")
    return seconds


def report(seconds, n):
    """Print a table for each number of streams and length of the prompt."""
    for B, P in dict.fromkeys((B, P) for _, B, P in seconds):
        print(f"\n{B} text{'s' * (B > 1)} at once, after {P} tokens")
        print(f"{'':<17} {'prompt ms':>10} {'first token ms':>15} {'tokens/s':>9} {'npgpt is':>20}")
        ours = None
        for name, streams, length in seconds:
            if (streams, length) != (B, P):
                continue
            prompt, first, whole = (statistics.median(values) for values in zip(*seconds[name, B, P], strict=True))
            each = (whole - first) / (n - 1)
            ours = ours or (first, each)
            print(
                f"{name:<17} {'' if math.isnan(prompt) else f'{prompt * 1e3:,.1f}':>10} {first * 1e3:>15,.1f} "
                f"{B / each:>9,.1f} {first / ours[0]:>9.2f}x, {each / ours[1]:>7.2f}x"
            )


def compare(config, peers, python, lengths, streams, n, rounds, threads):
    """Print how long prompts, first tokens and those that follow take, of npgpt and of those peers that are there."""
    if config.vocab_size <= BYTES:
        raise UsageError("with --prompts give --workload gpt2: the peers' tokenizer must know all bytes")
    config = dataclasses.replace(config, block_size=max(lengths) + n)
    with tempfile.TemporaryDirectory(prefix="npgpt-engines-") as folder, contextlib.ExitStack() as stack:
        make_folder(folder, config)
        engines = {}
        for name in ("npgpt", "npgpt-bfloat16", "npgpt-int8", *peers):
            interpreter = sys.executable if name.startswith("npgpt") else python
            if packages := missing(name, interpreter):
                print(f"{name} is left out: {interpreter} has no {' '.join(packages)}")
                continue
            engines[name] = Engine(name, folder, threads, interpreter)
            stack.callback(engines[name].close)
        print(f"{n} tokens, the likeliest each time; medians of {rounds} rounds in turn; {threads} threads", flush=True)
        report(measure(engines, lengths, streams, n, rounds, config.vocab_size), n)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
