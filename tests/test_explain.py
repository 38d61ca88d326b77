"""npgpt.explain: verdicts that find the wrong op, a page that is complete, and the page in a browser."""

import base64
import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

import npgpt.ops.attention
import npgpt.ops.cross_entropy
import npgpt.ops.embedding
import npgpt.ops.layernorm
import npgpt.ops.linear
import npgpt.ops.mlp
import npgpt.study.page
from npgpt import explain
from npgpt.config import GPTConfig
from npgpt.data.characters import CharTokenizer
from npgpt.engine import Gradient
from npgpt.errors import CheckpointError, UsageError
from npgpt.files import checkpoint
from npgpt.model import GPT
from npgpt.study.page import heat_map, html
from npgpt.study.trace import check, check_whole, trace

IDX = np.array([[3, 1, 4, 1, 5, 0]])
TARGETS = np.array([[1, 4, 1, 5, 0, 2]])
HOSTILE = "</script><img src=x onerror=alert(1)>" + 80 * "x"


def small_gpt(**options):
    shape = {"vocab_size": 11, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 12, "bias": True}
    model = GPT(GPTConfig(**(shape | options)), dtype=np.float64).eval()
    rng = np.random.default_rng(0)
    for parameter in model.parameters():
        parameter.data[...] = rng.normal(size=parameter.shape) * (0.5 if parameter.ndim == 2 else 1.0)
    return model


def describe(model):
    return npgpt.study.page.describe(model, IDX, TARGETS, lambda token: f"<{token}>")


def wrong(data):
    """Label of each box with a wrong backward -> names of the inputs whose gradients are wrong."""
    return {
        f"{box['group']}: {box['label']}": [row["name"] for row in box["inputs"] if not row["ok"]]
        for box in data["boxes"]
        if not box["ok"]
    }


# --------------------------------------------------------------------------------------------------------------------
# Verdicts


@pytest.mark.parametrize("bias", [True, False])
def test_every_op_and_the_whole_are_right(bias):
    data = describe(small_gpt(bias=bias))
    assert wrong(data) == {} and data["whole"]["ok"]
    assert [box["label"] for box in data["boxes"]] == [
        "embedding",
        *["ln_1", "attn.c_attn", "attention", "attn.c_proj", "x + attn.c_proj", "ln_2", "mlp", "x + mlp"] * 2,
        "ln_f", "lm_head", "cross_entropy",
    ]  # fmt: skip
    for box in data["boxes"]:
        for row in box["inputs"]:
            assert float(row["error"]) < 1e-6
            assert any(float(analytic) != 0 for _, analytic, _, _ in row["checks"])  # there is something to compare


FAULTS = {  # (module, function, its output that is spoiled, in which call in the order of the forward): (box, input)
    (npgpt.ops.layernorm, "layernorm_backward", 0, 3): ("block 1: ln_2", "x"),
    (npgpt.ops.layernorm, "layernorm_backward", 1, 4): ("output: ln_f", "weight"),
    (npgpt.ops.linear, "linear_backward", 0, 4): ("output: lm_head", "x"),
    (npgpt.ops.linear, "linear_backward", 2, 1): ("block 0: attn.c_proj", "bias"),
    (npgpt.ops.attention, "attention_backward", 0, 0): ("block 0: attention", "qkv"),
    (npgpt.ops.mlp, "mlp_backward", 3, 1): ("block 1: mlp", "c_proj.weight"),
    (npgpt.ops.cross_entropy, "cross_entropy_backward", 0, 0): ("output: cross_entropy", "logits"),
    (npgpt.ops.embedding, "embedding_backward", 1, 0): ("embedding: embedding", "wpe.weight"),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[1]} {fault[2]}")
def test_a_wrong_backward_is_found_in_its_box_and_in_no_other(fault, monkeypatch):
    module, name, spoiled, place = fault
    right, calls, n = getattr(module, name), [], None

    def backward(*args):
        right(*args)
        calls.append(name)
        # the engine calls the backwards from the last to the first, then explain does, from the first to the last
        if n is not None and len(calls) in (n - place, n + place + 1):
            args[spoiled][...] *= 1.001

    monkeypatch.setattr(module, name, backward)
    trace(small_gpt(), IDX, TARGETS)
    n = len(calls) // 2
    calls.clear()
    data = describe(small_gpt())
    box, row = FAULTS[fault]
    assert len(calls) == 2 * n and wrong(data) == {box: [row]}
    assert not data["whole"]["ok"]


def test_gradients_that_the_engine_adds_up_wrongly_are_found_in_the_whole(monkeypatch):
    right = Gradient.add
    monkeypatch.setattr(Gradient, "add", lambda self, *args: right(self, *args) if self.value is None else None)
    data = describe(small_gpt())
    assert wrong(data) == {} and not data["whole"]["ok"]


def test_a_gradient_that_is_not_a_number_is_wrong(monkeypatch):
    right = npgpt.ops.mlp.mlp_backward

    def backward(dx, *args):
        right(dx, *args)
        dx[0, 0] = np.nan

    monkeypatch.setattr(npgpt.ops.mlp, "mlp_backward", backward)
    data = describe(small_gpt())
    assert wrong(data)["block 1: mlp"] == ["x"]
    html(data)  # and there is a page, although JSON has no NaN


def test_the_checks_leave_model_and_values_as_they_were():
    model = small_gpt()
    before = [parameter.data.copy() for parameter in model.parameters()]
    nodes = trace(model, IDX, TARGETS)
    values = [node.y.data.copy() for node in nodes]
    gradients = [parameter.grad.copy() for parameter in model.parameters()]
    check(model, IDX, TARGETS, nodes)
    check_whole(model, IDX, TARGETS)
    for parameter, value, gradient in zip(model.parameters(), before, gradients, strict=True):
        np.testing.assert_array_equal(parameter.data, value)
        np.testing.assert_array_equal(parameter.grad, gradient)
    for node, value in zip(nodes, values, strict=True):
        np.testing.assert_array_equal(node.y.data, value)


# --------------------------------------------------------------------------------------------------------------------
# What the page is told


def codes_of(row):
    return np.frombuffer(base64.b64decode(row["codes"]), np.int8).reshape(row["cells"])


def test_a_heat_map_shows_each_entry_of_a_small_array():
    array = np.array([[1.0, -4.0, 0.0], [0.25, 2.0, -0.01]])
    row = heat_map(array)
    assert (row["shape"], row["cells"], row["min"], row["max"]) == ([2, 3], [2, 3], "-4", "2")
    shown = np.sign(codes_of(row)) * (codes_of(row) / 127) ** 2 * 4
    np.testing.assert_allclose(shown, array, atol=0.04)


def test_a_heat_map_shows_the_largest_of_each_block_of_a_large_array():
    array = np.random.default_rng(0).normal(size=(1, 100, 96)) * 0.1
    array[0, 99, 95], array[0, 0, 0] = 3.0, -12.0
    row = heat_map(array)
    codes = codes_of(row)
    assert row["shape"] == [100, 96] and codes.shape == (48, 48)
    assert codes[0, 0] == -127 and codes[47, 47] == round(127 * np.sqrt(3 / 12))
    assert np.abs(codes[1:47]).max() < 40
    assert heat_map(np.zeros(1000))["cells"] == [1, 192] and not codes_of(heat_map(np.zeros(5))).any()


def test_the_page_holds_everything():
    model = small_gpt()
    data = json.loads(re.search(DATA, html(describe(model)), re.S)[1])
    logits, loss = model(IDX, TARGETS)
    model.zero_grad()
    loss.backward()
    assert data["loss"] == f"{loss.item():.4f}" and data["n_params"] == model.num_params()
    assert np.mean([float(x) for x in data["losses"]]) == pytest.approx(loss.item(), abs=1e-3)
    assert data["guesses"][2][0][0] == f"<{logits.data[0, 2].argmax()}>" and len(data["texts"]) == 7
    for box in data["boxes"]:
        op = data["ops"][box["op"]]
        assert any(formula for formula, _ in op["forward"]) and any(formula for formula, _ in op["backward"])
        assert op["forward"][0][1].startswith("Forward") and op["backward"][0][1].startswith("Backward")
        for _, name, where, text in op["sources"]:
            file, line = where.split(":")
            lines = (Path(explain.__file__).parents[1] / file).read_text(encoding="utf-8").splitlines()
            assert text.splitlines()[0] == lines[int(line) - 1] and f"def {name}(" in text
    kinds = {op: [kind for kind, *_ in about["sources"]] for op, about in data["ops"].items()}
    assert kinds["mlp"] == ["reference", "reference", "kernel", "kernel", "op"] and kinds["add"] == ["op"]
    heads = [codes_of(p) for p in data["boxes"][3]["heads"]]
    assert len(heads) == 2
    for codes in heads:  # rows of probabilities, under the diagonal
        np.testing.assert_allclose(((codes / 127) ** 2).sum(axis=1), 1, atol=0.05)
        assert not np.triu(codes, 1).any()
    assert [row["name"] for row in data["boxes"][-2]["inputs"]] == ["x", "wte.weight"]
    tied = [row["total"] for box in data["boxes"] for row in box["inputs"] if "x" in row and row["uses"] == 2]
    assert len(tied) == 2 and tied[0] == tied[1] == f"{np.sqrt(np.mean(model.lm_head.weight.grad ** 2)):.3g}"


def test_no_text_of_the_user_becomes_markup():
    page = html(npgpt.study.page.describe(small_gpt(), IDX, TARGETS, lambda token: HOSTILE))
    assert "<img" not in page and page.count("</script>") == html(describe(small_gpt())).count("</script>")
    assert json.loads(re.search(DATA, page, re.S)[1])["texts"] == [HOSTILE] * 7


def test_the_page_of_a_model_of_six_layers_is_small():
    model = GPT(GPTConfig(vocab_size=65, block_size=24, n_layer=6, n_head=6, n_embd=96), dtype=np.float64)
    idx = np.random.default_rng(0).integers(0, 65, (1, 25))
    data = npgpt.study.page.describe(model, idx[:, :-1], idx[:, 1:], str)
    assert wrong(data) == {} and data["whole"]["ok"]
    assert len(data["boxes"]) == 52 and len(html(data)) < 1e6
    one, other = (heat_map(np.ones(shape)) for shape in ((48, 48), (3072, 768)))
    assert one["codes"] == other["codes"]  # a wider model takes no more than one of 48 channels


# --------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder: a model that was trained for a moment."""
    folder = tmp_path_factory.mktemp("explain")
    (folder / "text.txt").write_text("to be, or not to be: <that> is the question.\n" * 40, encoding="utf-8")
    flags = "--n-layer 2 --n-head 2 --n-embd 32 --block-size 16 --batch-size 4 --max-iters 20 --eval-interval 20"
    flags = ["--data", folder / "text.txt", "--out-dir", folder / "run", *flags.split()]
    environment = {**os.environ, "NPGPT_KERNELS": "numpy"}
    subprocess.run([sys.executable, "-m", "npgpt.train", *flags], env=environment, check=True, capture_output=True)
    return folder / "run"


def test_the_command_writes_the_page_and_says_where(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert explain.main(["--out-dir", str(run), "--text", "to be, or not to be: that"]) == 0
    out, err = capsys.readouterr()
    assert "explain.html" in out and "over 16 tokens" in out and "finite differences: ok" in out
    assert f"{(tmp_path / 'explain.html').stat().st_size:,} bytes" in out
    assert err == "python -m npgpt.explain: the text has 25 tokens; these are the first 17\n"
    data = json.loads(re.search(DATA, (tmp_path / "explain.html").read_text(encoding="utf-8"), re.S)[1])
    assert "".join(data["texts"]) == "to be, or not to "


def test_without_a_text_the_model_writes_one_and_always_the_same(run, tmp_path, capsys):
    for name in ("a.html", "b.html"):
        assert explain.main(["--model", str(run), "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    texts = json.loads(re.search(DATA, (tmp_path / "a.html").read_text(encoding="utf-8"), re.S)[1])["texts"]
    assert len(texts) == 17 and texts[0] == "\n"


def test_a_model_that_knows_no_line_break_writes_a_text_too(tmp_path, capsys):
    model = GPT(GPTConfig(vocab_size=3, block_size=4, n_layer=1, n_head=1, n_embd=8))
    model.tokenizer = CharTokenizer("abc")
    model.save_pretrained(tmp_path / "model")
    assert explain.main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "x.html")]) == 0
    assert "over 4 tokens" in capsys.readouterr().out


def test_a_model_that_knows_more_tokens_than_its_tokenizer(tmp_path, capsys):
    model = GPT(GPTConfig(vocab_size=9, block_size=20, n_layer=1, n_head=1, n_embd=8))
    model.tokenizer = CharTokenizer("abc")
    model.save_pretrained(tmp_path / "model")
    for flags in ([], ["--text", "abcab"]):
        assert explain.main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "x.html"), *flags]) == 0
    data = json.loads(re.search(DATA, (tmp_path / "x.html").read_text(encoding="utf-8"), re.S)[1])
    assert data["texts"] == list("abcab") and any(text == "token 5" for row in data["guesses"] for text, _ in row)


def test_a_page_that_cannot_be_written_leaves_the_one_before(run, tmp_path, monkeypatch):
    (tmp_path / "x.html").write_text("before", encoding="utf-8")

    def full(path, parts):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*x\.html: No space left on device"):
        explain.main(["--model", str(run), "--out", str(tmp_path / "x.html")])
    assert (tmp_path / "x.html").read_text(encoding="utf-8") == "before"


def test_a_wrong_backward_is_named_and_ends_with_exit_code_1(run, tmp_path, monkeypatch, capsys):
    right = npgpt.ops.attention.attention_backward

    def backward(dqkv, *args):
        right(dqkv, *args)
        dqkv *= -1

    monkeypatch.setattr(npgpt.ops.attention, "attention_backward", backward)
    assert explain.main(["--out-dir", str(run), "--out", str(tmp_path / "x.html")]) == 1
    assert "WRONG in block 0: attention, block 1: attention, the whole model" in capsys.readouterr().out


def test_one_parameter_is_left_to_the_receipt(run, monkeypatch, capsys):
    module, given = types.ModuleType("npgpt.study.receipt"), []
    module.receipt = lambda *args: given.extend(args) or "where it comes from"
    monkeypatch.setitem(sys.modules, "npgpt.study.receipt", module)
    assert explain.main(["--out-dir", str(run), "--text", "to be", "--param", "wte[1,2]"]) == 0
    model, idx, targets, param = given
    assert capsys.readouterr().out == "where it comes from\n" and param == "wte[1,2]"
    assert model.lm_head.weight.dtype == np.float64 and not model.training
    assert idx.shape == targets.shape == (1, 4) and (idx[0, 1:] == targets[0, :-1]).all()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--text", "t"], "--text must have two tokens at least"),
        (["--text", ""], "--text must have two tokens at least"),
        (["--text", "Zebra"], "--text: character 'Z' (U+005A LATIN CAPITAL LETTER Z) at position 0 is not among the"),
        (["--out", "model.safetensors"], "--out must end in .html"),
        (["--txt", "a"], "unknown argument --txt"),
    ],
)
def test_a_mistake_is_answered_in_one_line(run, flags, words):
    with pytest.raises(UsageError, match=re.escape(words)) as caught:
        explain.main(["--out-dir", str(run), *flags])
    assert "\n" not in str(caught.value)


def test_mistakes_end_the_command_with_their_exit_codes(run, tmp_path):
    for flags, code in (
        (["--text", "x", "--out", "x.txt"], 2),
        (["--out-dir", run, "--out", tmp_path / "none" / "x.html"], 3),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "npgpt.explain", *flags], env={**os.environ, "NPGPT_KERNELS": "numpy"},
            capture_output=True, encoding="utf-8",
        )  # fmt: skip
        assert done.returncode == code and len(done.stderr.splitlines()) == 1, done.stderr


# --------------------------------------------------------------------------------------------------------------------
# In a browser

DATA = r'<script type="application/json" id="data">(.*?)</script>'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(os.name != "posix" or BROWSER is None, reason="no Chromium that can be steered here")


class Browser:
    """Headless Chromium, steered by its DevTools protocol: JSON messages through two pipes, each with a zero behind."""

    def __init__(self, program, folder):
        import fcntl  # where there is none, Chromium's pipes have other names

        commands, self.commands = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in os.pipe())
        self.answers, answers = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in os.pipe())

        def pipes_to_their_places():
            os.dup2(commands, 3)
            os.dup2(answers, 4)

        flags = "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --no-first-run --disable-dev-shm-usage"
        self.process = subprocess.Popen(
            [program, *flags.split(), "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"],
            preexec_fn=pipes_to_their_places, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        self.rest, self.n, self.session, self.events = b"", 0, None, []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def read(self):
        """The next message."""
        deadline = time.monotonic() + 20
        while b"\0" not in self.rest:
            if not select.select([self.answers], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            data = os.read(self.answers, 2**16)
            assert data, "the browser has ended"
            self.rest += data
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **params):
        self.n += 1
        message = {"id": self.n, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.n:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def run(self, script):
        """The value of an expression in JavaScript."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, (script, answer["exceptionDetails"])
        return answer["result"].get("value")

    def open(self, path, width, height=900, scheme="light"):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())
        self.settle()

    def settle(self):
        """Wait until what was asked for is drawn."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))")

    def key(self, key, text=None):
        press = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS.get(key, 0)}
        self.call("Input.dispatchKeyEvent", type="keyDown", **press, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **press)
        self.settle()

    def click(self, selector):
        self.run(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        self.settle()
        x, y = self.run(
            f"(r => [r.left + r.width / 2, r.top + r.height / 2])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def picture(self, whole=False):
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def close(self):
        with contextlib.suppress(AssertionError, OSError):
            self.call("Browser.close")
        for fd in (self.commands, self.answers):
            os.close(fd)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


KEYS = {"Enter": 13, "Escape": 27, " ": 32, "ArrowUp": 38, "ArrowDown": 40, "Tab": 9}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(BROWSER, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "explain.html"
    assert explain.main(["--out-dir", str(run), "--out", str(path)]) == 0
    return path


def complaints(browser):
    """What went wrong in the page, and every address that it asked for but its own."""
    found = []
    for event in browser.events:
        method, params = event["method"], event["params"]
        if method == "Runtime.exceptionThrown" or (method == "Log.entryAdded" and params["entry"]["level"] == "error"):
            found.append(params)
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            found.append(params)
        if method == "Network.requestWillBeSent" and params["request"]["url"].split(":")[0] not in ("file", "data"):
            found.append(params["request"]["url"])
    return found


# opens every box by its button; afterwards each with what is wider than its place
OPEN_ALL = """(async () => {
  const tick = () => new Promise(done => setTimeout(done, 5)), found = [];
  const look = name => {
    const panel = document.getElementById("panel"), root = document.documentElement;
    if (root.scrollWidth > innerWidth || panel.scrollWidth > panel.clientWidth) found.push(name);
  };
  look("closed");
  const buttons = [...document.querySelectorAll(".box button")];
  for (const button of buttons) {
    button.click();
    await tick();
    if (button.getAttribute("aria-expanded") !== "true") found.push("not open: " + button.id);
    document.querySelectorAll("details").forEach(part => part.open = true);
    look(button.id);
  }
  dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
  return [buttons.length, found];
})()"""
OPEN = "document.querySelector('[aria-expanded=true]')?.id"
TITLE = "document.getElementById('panel').hidden ? null : document.getElementById('panel-title').textContent"


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_too_wide_and_nothing_is_complained_of(browser, page, width, scheme):
    browser.open(page, width, scheme=scheme)
    assert browser.run("innerWidth") == width
    n, found = browser.run(OPEN_ALL)
    assert n == 20 and found == []
    assert complaints(browser) == []
    red, *_ = map(int, re.findall(r"\d+", browser.run("getComputedStyle(document.body).backgroundColor")))
    assert red > 200 if scheme == "light" else red < 50


@in_a_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_boxes_open_by_click_and_by_keyboard(browser, page, width):
    browser.open(page, width)
    assert browser.run(TITLE) is None
    browser.click("#button-3")
    assert browser.run(TITLE) == "attention" and browser.run(OPEN) == "button-3"
    assert browser.run("document.querySelectorAll('#panel figure canvas').length") == 2 + 2 + 2
    browser.key("Escape")
    assert browser.run(TITLE) is None and browser.run("document.activeElement.id") == "button-3"
    for _ in range(5):
        browser.key("ArrowUp")
    browser.key("Tab")
    assert browser.run("document.activeElement.id") == "button-1" and browser.run(TITLE) is None
    browser.key("Enter", "\r")
    assert browser.run(TITLE) == "ln_1"
    browser.key("j", "j")
    browser.key("j", "j")
    assert browser.run(TITLE) == "attention"
    browser.key("k", "k")
    assert browser.run(TITLE) == "attn.c_attn"
    browser.click("#panel .top button:last-child")
    assert browser.run(TITLE) is None and browser.run("document.activeElement.id") == "button-2"
    browser.key("ArrowDown")
    browser.key(" ", " ")
    assert browser.run(TITLE) == "attention"
    assert complaints(browser) == []


@in_a_browser
def test_a_finger_opens_a_box_and_the_way_back_closes_it(browser, page):
    browser.open(page, 390)
    browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
    browser.run("document.getElementById('button-7').scrollIntoView({block: 'center'})")
    browser.settle()
    x, y = browser.run("(r => [r.left + 90, r.top + 20])(document.getElementById('button-7').getBoundingClientRect())")
    browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    browser.settle()
    assert browser.run(TITLE) == "mlp"
    assert browser.run("document.getElementById('graph').inert")  # what the panel covers cannot be reached
    sizes = "[...document.querySelectorAll('.box button, .top button')].map(b => b.getBoundingClientRect().height)"
    assert min(browser.run(sizes)) >= 44
    browser.run("history.back()")
    browser.settle()
    assert browser.run(TITLE) is None
    browser.call("Emulation.setTouchEmulationEnabled", enabled=False)


@in_a_browser
def test_a_token_that_is_chosen_tells_what_was_guessed(browser, page):
    browser.open(page, 1280)
    browser.click("#text button:nth-child(3)")
    data = json.loads(re.search(DATA, page.read_text(encoding="utf-8"), re.S)[1])
    said = browser.run("document.getElementById('said').textContent")
    assert f"loss {data['losses'][1]}" in said and data["guesses"][1][0][1] in said
    assert "position 1" in browser.run("document.querySelector('#heads .read').textContent")
    assert browser.run("document.querySelectorAll('#heads canvas').length") == 2


@in_a_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_legends_stand_beside_what_they_explain(browser, page, width):
    browser.open(page, width)
    assert "The bar in a box: how large" in browser.run("document.getElementById('graph').innerText")
    browser.click("#button-3")
    top = "document.querySelector('#panel {}').getBoundingClientRect().top"
    assert 0 < browser.run(top.format("figure canvas")) - browser.run(top.format(".legend")) < 300
    assert browser.run("document.querySelectorAll('.legend').length") == 1


@in_a_browser
def test_every_parameter_has_a_bar(browser, page, run):
    browser.open(page, 1280)
    names = [name.removeprefix("transformer.") for name, _ in GPT.from_pretrained(run).named_parameters()]
    assert browser.run("[...document.querySelectorAll('#parameters button')].map(part => part.textContent)") == names
    assert browser.run("document.querySelectorAll('#stream button').length") == 5


@in_a_browser
def test_a_heat_map_tells_the_number_beneath_the_pointer(browser, page):
    browser.open(page, 1280)
    browser.click("#button-0")
    first = "document.querySelector('#panel figure')"
    browser.run(f"{first}.scrollIntoView()")
    x, y = browser.run(f"(r => [r.left + 2, r.bottom - 2])({first}.querySelector('canvas').getBoundingClientRect())")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    browser.settle()
    row = json.loads(re.search(DATA, page.read_text(encoding="utf-8"), re.S)[1])["boxes"][0]["y"]
    assert row["cells"] == row["shape"] == [16, 32]
    place, value = browser.run(f"{first}.querySelector('.read').textContent").split(" ≈ ")
    largest = max(abs(float(row["min"])), abs(float(row["max"])))
    code = float(codes_of(row)[15, 0])
    assert place == "[15, 0]" and float(value) == pytest.approx(np.sign(code) * (code / 127) ** 2 * largest, rel=0.06)
    pixel = browser.run(f"[...{first}.querySelector('canvas').getContext('2d').getImageData(0, 15, 1, 1).data]")
    assert (pixel[0] > pixel[2]) == (code > 0)  # red for plus, blue for minus


@in_a_browser
def test_a_wrong_op_and_a_hostile_text_in_the_page(browser, tmp_path, monkeypatch):
    right = npgpt.ops.mlp.mlp_backward

    def backward(dx, *args):
        right(dx, *args)
        dx *= 1.01

    monkeypatch.setattr(npgpt.ops.mlp, "mlp_backward", backward)
    path = tmp_path / "wrong.html"
    data = npgpt.study.page.describe(small_gpt(), IDX, TARGETS, lambda token: HOSTILE)
    path.write_text(html(data), encoding="utf-8")
    browser.open(path, 390)
    verdicts = browser.run("[...document.querySelectorAll('.box .verdict')].map(part => part.textContent)")
    assert [i for i, verdict in enumerate(verdicts) if "WRONG" in verdict] == [7, 15]
    assert browser.run(OPEN_ALL) == [20, []]
    assert browser.run("document.images.length") == 0
    assert complaints(browser) == []
