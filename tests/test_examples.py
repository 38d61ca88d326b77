"""Every example runs, and its checks would notice wrong mathematics."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from npgpt import GPT, AdamW, GPTConfig
from npgpt.data.bpe import BPETokenizer
from npgpt.optim import FlatParameters

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NAMES = [path.name for path in sorted(EXAMPLES.glob("[0-9]*.py"))]

# example -> mistakes (what stands there once, what the mistake makes of it)
WRONG = {
    "00_gpt_in_one_file.py": [
        ("parent.grad = parent.grad + summed(grad", "parent.grad = summed(grad"),
        ("np.add.at(dx, index, dy)", "dx[index] += dy"),
        ("x = x + x.sum() * Tensor(-1 / C)  # less", "x = x + x.sum() * Tensor(0.0)  # less"),
        ("np.triu(np.full((T, T), -1e9), 1)", "np.triu(np.full((T, T), -1e9), 2)"),
        ("(1 - BETA2) * p.grad**2", "(1 - BETA2) * abs(p.grad)"),
        ("Tensor(-1 / y.size)", "Tensor(-1 / len(y))"),
    ],
    "01_chain_rule.py": [
        ("parent.grad += node.grad * slope", "parent.grad = node.grad * slope"),
        ("(other.value, self.value)", "(self.value, other.value)"),
        ("(1 - y * y,)", "(1 + y * y,)"),
        ("return order[::-1]", "return order"),
        ("order_of=topological_order", "order_of=nearest_first"),
    ],
    "02_broadcasting.py": [
        ("db = dy.sum(axis=0)", "db = dy.mean(axis=0)"),
        ("dtotal / len(x)", "dtotal"),
        ("grad.sum(axis=tuple(range(added)))", "grad[(0,) * added]"),
        ("grad.sum(axis=stretched, keepdims=True)", "grad.mean(axis=stretched, keepdims=True)"),
        ("(dy * b, dy * a)", "(dy * a, dy * b)"),
        ("-dy * a / b**2", "dy * a / b**2"),
    ],
    "03_linear.py": [
        ("return x @ w.T + b ", "return x @ w.T - b "),
        ("dx = dy @ w\n", "dx = -dy @ w\n"),
        ("dw = dy.T @ x\n", "dw = x.T @ dy\n"),
        ("db = dy.sum(axis=0)\n", "db = dy.mean(axis=0)\n"),
        ("right, wrong = dy @ square, dy @ square.T", "right, wrong = dy @ square.T, dy @ square"),
    ],
    "04_layernorm.py": [
        ("(centred**2).mean(axis=1, keepdims=True)", "(centred**2).sum(axis=1, keepdims=True) / (w.size - 1)"),
        ("drstd * -0.5 * rstd**3", "drstd * -0.5 * rstd**2"),
        ("dcentred += dvar * 2 * centred / C", "dcentred += dvar * centred / C"),
        ("dx += dmean / C", "dx += dmean"),
        ("(g - g_mean - xhat * g_xhat_mean)", "(g - xhat * g_xhat_mean)"),
        ("(g - g_mean - xhat * g_xhat_mean)", "(g - g_mean - g_xhat_mean)"),
        ("return dx, (dy * xhat).sum(axis=0)", "return dx, (dy * x).sum(axis=0)"),
    ],
    "05_cross_entropy.py": [
        ("np.diag(p_row) - np.outer", "np.diag(p_row) + np.outer"),
        ("-1 / p_row[c]", "1 / p_row[c]"),
        ("return (p - y) / len(p)", "return (y - p) / len(p)"),
        ("return (p - y) / len(p)", "return p - y"),
        ("lse = m + np.log", "lse = np.log"),
        ("scores -= backward", "scores += backward"),
        ("p - y, 0) / counted.sum()", "p - y, 0) / len(z)"),
        ("np.where(counted[:, None], p - y, 0)", "(p - y)"),
        ("p = np.exp(z - lse[:, None])", "p = np.exp(z)"),
    ],
    "06_attention.py": [
        ("np.tri(T, dtype=bool)", "np.tri(T, k=1, dtype=bool)"),
        ("hs**-0.5", "hs**-1.0"),
        ("return x.transpose(0, 2, 1, 3).reshape(B, T, n_head * hs)", "return x.reshape(B, T, n_head * hs)"),
        ("dv = p.swapaxes(-1, -2) @ dy", "dv = p @ dy"),
        ("ds = p * (dp - (dp * p).sum(axis=-1, keepdims=True))", "ds = p * dp"),
        ("dq = scale * ds @ k", "dq = ds @ k"),
        ("dk = scale * ds.swapaxes(-1, -2) @ q", "dk = scale * ds @ q"),
        ("dp = da * drop", "dp = da"),
        ("dv = (p * drop).swapaxes", "dv = p.swapaxes"),
        ("lse = m + np.log(", "lse = np.log("),
        ("return x.reshape(B, T, n_head, hs)", "return x.reshape(B, T, hs, n_head).swapaxes(2, 3)"),
    ],
    "07_mlp.py": [
        ("k * (1 + 3 * a * z**2)\n", "k * (1 + a * z**2)\n"),
        ("z * (1 - t**2) * k", "z * (1 - t) * k"),
        ("dw_proj = dy.T @ act ", "dw_proj = dy.T @ pre "),
        ("dpre = dact * gelu_slope(pre)", "dpre = dact * gelu_slope(act)"),
        ("db_fc = dpre.sum(axis=0)", "db_fc = dact.sum(axis=0)"),
        ("dx = dpre @ w_fc ", "dx = dpre @ -w_fc "),
    ],
    "08_embedding.py": [
        ("np.add.at(dwte, idx, dy)", "dwte[idx] += dy"),
        ("dwte = head + lookup\n\nmodel", "dwte = lookup\n\nmodel"),
        ("dwte = head + lookup\n\nmodel", "dwte = head\n\nmodel"),
        ("(p - np.eye(V)[targets]) / N", "(p - np.eye(V)[targets])"),
        ("wte.data -= 0.1 * dwte", "wte.data += 0.1 * dwte"),
    ],
    "09_gpt.py": [
        ("dx3 = dx3 + d\n", ""),
        ("dx3 = dx3 + d\n", "dx3 += d\n"),
        ("dx0 = dx0 + d\n", "dx0 += d\n"),
        ("[dwte_head.copy()]", "[np.zeros_like(wte)]"),
        ("layernorm_backward_ref(da1, x2,", "layernorm_backward_ref(da1, x3,"),
        ("linear_backward_ref(dz0, y0.", "linear_backward_ref(dz0, z0."),
        ("lse, -1, N)  ", "lse, -1, T)  "),
        ("x2 = x1 + m0", "x2 = x0 + m0"),
    ],
    "10_adamw.py": [
        ("m_hat = m / (1 - beta1**t)", "m_hat = m"),
        ("v_hat = v / (1 - beta2**t)", "v_hat = v / (1 - beta1**t)"),
        ("(1 - beta2) * g**2", "(1 - beta2) * g"),
        ("p = p - lr * weight_decay * p ", "g = g + weight_decay * p "),
        ("sum((g**2).sum() for g in gradients)", "max((g**2).sum() for g in gradients)"),
        ("0.1 if p.ndim == 2 else 0.0", "0.1"),
    ],
    "11_train.py": [
        ("        flat.zero_grad()\n", ""),
        ("loss.backward()", "(loss * loss).backward()"),
        ("logits, loss = model(x, y)", "logits, loss = model(x, x)"),
    ],
    "12_engine.py": [
        ("grad.sum(axis=tuple(range(grad.ndim - len(shape))))", "grad[(0,) * (grad.ndim - len(shape))]"),
        ("return self.grad is self.own\n", "return True\n"),
        ("self.grad = self.own = np.add", "self.grad = np.add"),
        ("self.grad = self.own = self.empty() if self.place is None else self.place", "self.grad = self.own = grad"),
        ("if self.back is None:\n            self.own", "if self.back is not None:\n            self.own"),
        ("return self.grad is self.own or self.grad is self.place", "return self.grad is self.own"),
        ("self.parents, self.back, self.own = (), used_up,", "self.parents, self.back, self.own = (), None,"),
        ("self.parents, self.back, self.own = (), used_up,", "self.back, self.own = used_up,"),
        ("if self.recording and any", "if any"),
        ("weakref.finalize(array, self.free[size].append, block)", "self.free[size].append(block)"),
        ("lambda dy: (dy * b.data, dy * a.data)", "lambda dy: (dy * a.data, dy * b.data)"),
    ],
    "13_muon.py": [
        ("b * A + c * A @ A", "b * A + c * A"),
        ("    X = X / (np.sqrt((X**2).sum()) + 1e-7)", "    X = X / ((X**2).sum() + 1e-7)"),
        ("return m, mu * m + (1 - mu) * g", "return m, m"),
        ("np.sqrt(max(1, rows / columns)) * newton_schulz", "np.sqrt(max(1, columns / rows)) * newton_schulz"),
        ("/ singular_values(D).max()", "/ np.abs(D).max()"),
        ('3 if "c_attn" in name else 1', "1"),
        ("W * (1 - lr * 0.1)", "W * (1 - 5.0 * lr * 0.1)"),
    ],
    "14_tokens.py": [
        (r"?[^\sA-Za-z0-9]+|\s+(?!\S)", r"?[^\sA-Za-z0-9]+"),
        ("counts[pair] += times", "counts[pair] += 1"),
        ("numbers[pair[0]], numbers[pair[1]])", "-numbers[pair[0]], numbers[pair[1]])"),
        ("i += 2 if here else 1", "i += 1"),
        ("counts[best] < 2", "counts[best] < 1"),
        ("min(known, key=ranks.get)", "known[0]"),
        (
            'b"".join(bytes_of[token] for token in tokens).decode("utf-8", "replace")',
            '"".join(bytes_of[token].decode("utf-8", "replace") for token in tokens)',
        ),
    ],
    "15_bfloat16.py": [
        ("return (bits + np.uint32(0x7FFF) + is_odd) & UPPER", "return bits & UPPER"),
        ("np.uint32(0x7FFF) + is_odd) & UPPER", "np.uint32(0x8000)) & UPPER"),
        ("np.where(np.isnan(x), (bits & UPPER) | np.uint32(0x400000), nearest(bits))", "nearest(bits)"),
        ("return rounded(a) @ rounded(b)", "return a @ b"),
        ("return rounded(a) @ rounded(b)", "return rounded(rounded(a) @ rounded(b))"),
        ("total = rounded(total + term)", "total = total + term"),
        ("multiply(dy, w2) * (1 - act**2)", "multiply(dy, w2) * (1 - act)"),
        ("np.frexp(np.abs(w))[1] - 8", "np.frexp(np.abs(w))[1] - 7"),
        ('master weights": train(product, keep=np.copy)', 'master weights": train(product, keep=rounded)'),
    ],
    "16_proof.py": [
        ("return p * (dp - (dp * p).sum() * of_sum)", "return p * (dp - (dp * p).sum() * of_sum - 1e-3)"),
        ("return above * pow(below, -1, P) % P", "return above // below % P"),
        ("points.T) % small == 0", "points.T) % 2 == 0"),
        ("self.slope * other.value + self.value * other.slope", "self.slope * other.value"),
        ("-other.slope * value * value", "-other.slope * value"),
        ("known.setdefault(self.value, draw.randrange(1, P))", "draw.randrange(1, P)"),
        ("return Dual(e, e * self.slope)", "return Dual(e, self.slope)"),
        ("(ds * row(v)).sum().value", "ds.sum().value"),
        ("exactly(1 + 1e-9), \"no sum\"", "round(1 + 1e-9), \"no sum\""),
        ("\"1 + P times it\": 1 + P", "\"1 + P times it\": P"),
    ],
}


def run(path, **variables):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)]), **variables}
    return subprocess.run(
        [sys.executable, str(path)], cwd=path.parent, env=environment, capture_output=True, encoding="utf-8", timeout=60
    )


def test_the_first_examples_suggestion_to_try_works(tmp_path):
    name = "01_chain_rule.py"
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    assert "let `small` return d * d" in source and source.count("return d * e") == 1
    (tmp_path / name).write_text(source.replace("return d * e", "return d * d"), encoding="utf-8")
    done = run(tmp_path / name)
    assert done.returncode == 0 and "WRONG" not in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_and_its_checks_hold(name):
    done = run(EXAMPLES / name)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "check: " in done.stdout and "WRONG" not in done.stdout


@pytest.mark.parametrize(("name", "i"), [(name, i) for name in NAMES for i in range(len(WRONG.get(name, [None])))])
def test_an_example_notices_a_mistake(tmp_path, name, i):
    before, after = WRONG[name][i]
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    assert source.count(before) == 1
    (tmp_path / name).write_text(source.replace(before, after), encoding="utf-8")
    # the mistake is the example's, and without kernels it starts faster; a training goes faster with them
    done = run(tmp_path / name, **({} if name == "11_train.py" else {"NPGPT_KERNELS": "numpy"}))
    assert done.returncode == 1 and "WRONG" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_gpt_in_one_file_has_the_losses_of_the_engine():
    spec = importlib.util.spec_from_file_location("one_file", EXAMPLES / "00_gpt_in_one_file.py")
    one = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(one)
    weights = one.new_weights(np.random.default_rng(1))
    config = GPTConfig(vocab_size=one.V, block_size=one.T, n_layer=one.L, n_head=one.H, n_embd=one.C, bias=False)
    model = GPT(config, dtype=np.float64)
    for name, parameter in model.named_parameters():
        parameter.data[...] = weights[name.removeprefix("transformer.").removesuffix(".weight")].data
    theirs = list(itertools.islice(one.train(weights, np.random.default_rng(2)), 10))
    flat, rng, ours = FlatParameters(model), np.random.default_rng(2), []
    adamw = AdamW(flat, beta1=one.BETA1, beta2=one.BETA2, weight_decay=one.DECAY)
    for step in range(1, 11):
        flat.zero_grad()
        _, loss = model(*one.batch(rng))
        loss.backward()
        flat.finish_grads()
        adamw.step = step
        adamw.update(flat.grads, one.learning_rate(step))
        ours.append(loss.item())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)
    assert theirs[0] - theirs[-1] > 0.3


def test_the_chapter_on_tokens_learns_what_the_package_and_npgpt_learn(tmp_path):
    package = pytest.importorskip("tokenizers")
    source = (EXAMPLES / "14_tokens.py").read_text(encoding="utf-8").replace("\nfinish()\n", "")
    source += """
rng, found = random.Random(0), []
for text in TEXTS.values():
    words = cut(text)
    for part in (text, "".join(rng.choices(words, k=300)), "".join(rng.choices(text, k=300))):
        numbers, merges = learn(part, 350)
        merged = [(numbers[a], numbers[b]) for a, b in merges]
        found.append((part, len(numbers), merged, encode(text, numbers, merges), encode(part, numbers, merges)))
print(json.dumps(found))
"""
    (tmp_path / "tokens.py").write_text("import random\n" + source, encoding="utf-8")
    done = run(tmp_path / "tokens.py")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 30 and sum(len(merges) for _, _, merges, _, _ in found) > 1000
    byte_level = package.pre_tokenizers.ByteLevel
    for i, (text, size, merges, tokens_of_all, tokens) in enumerate(found):
        theirs = package.Tokenizer(package.models.BPE())
        theirs.pre_tokenizer = byte_level(add_prefix_space=False)
        options = dict(vocab_size=350, min_frequency=2, initial_alphabet=sorted(byte_level.alphabet()))
        theirs.train_from_iterator([text], package.trainers.BpeTrainer(**options, show_progress=False))
        states = [theirs.to_str()] + [BPETokenizer.learn([text], 350).json] * (i % 3 == 0)  # npgpt's is a process each
        for state in states:
            model = json.loads(state)["model"]
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            assert [[model["vocab"][a], model["vocab"][b]] for a, b in pairs] == merges and len(model["vocab"]) == size
        assert theirs.encode(text).ids == tokens and theirs.encode(found[i // 3 * 3][0]).ids == tokens_of_all
