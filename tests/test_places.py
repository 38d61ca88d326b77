"""What people type, and the places where commands run: notebooks, homes, other people's command lines."""

import ast
import collections
import importlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from npgpt import (
    GPT,
    GPTConfig,
    TrainConfig,
    Trainer,
    errors,
    exercise,
    explain,
    gradcheck,
    machine,
    plot,
    sample,
    train,
)
from npgpt.command import NANOGPT
from npgpt.config import SAMPLE
from npgpt.data.characters import ByteTokenizer
from npgpt.errors import CheckpointError, NpgptError, StoppedError, UsageError, quoted, run_command, user_path
from npgpt.files import pretrained
from npgpt.signals import Stop

ROOT = Path(__file__).resolve().parents[1]
TEXT = "to be, or not to be: that is the question.\n" * 40
SMALL = (
    "--n-layer 1 --n-head 2 --n-embd 16 --block-size 8 --batch-size 4 --max-iters 2 --eval-interval 2 --eval-iters 1 "
    "--sample-tokens 2 --final-sample-tokens 2"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a text and a run trained on it."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    assert train.main(["--data", str(folder / "text.txt"), "--out-dir", str(folder / "run"), *SMALL]) == 0
    return folder


@pytest.fixture
def home(folder, monkeypatch):
    """The folder as the home folder, and another one as the current one."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    monkeypatch.chdir(elsewhere)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(folder))
    yield folder
    assert not [name for name in os.listdir(elsewhere) if name.startswith("~")]


def refused(main, *args):
    """What a command says of its flags."""
    with pytest.raises(UsageError) as error:
        main(list(args))
    return str(error.value)


# ---- the home folder


def test_every_flag_that_names_a_file_knows_the_home_folder(home, capsys):
    given, rest = train.parse(["--data=~/text.txt", "--out-dir=~/a", "--tokenizer=~/text.txt", "--resume=~/run"])
    places = [given["data"][0], given["out_dir"], given["tokenizer"], rest["resume"]]
    assert places == [str(home / name) for name in ("text.txt", "a", "text.txt", "run")]
    assert train.parse(["--init-from=~/run"])[0]["init_from"] == str(home / "run")
    args = sample.parse(["--model=~/run", "--checkpoint=~/c", "--prompt-file=~/text.txt"])
    assert [args.model, args.checkpoint, args.prompt_file] == [str(home / name) for name in ("run", "c", "text.txt")]
    args = explain.parse(["--model=~/run", "--out=~/page.html"])
    assert [args.model, args.out] == [str(home / "run"), str(home / "page.html")]
    args = plot.parse(["--out=~/loss.svg", "--", "~/run"])
    assert args.runs == [str(home / "run")] and args.out == home / "loss.svg"
    assert exercise.parse(["show", "mlp", "--out=~/mlp.py"]).out == str(home / "mlp.py")
    assert exercise.parse(["check", "~/mlp.py"]).file == str(home / "mlp.py")
    assert exercise.parse(["bug", "1", "--dir=~/bug"]).dir == str(home / "bug")


def test_the_library_knows_the_home_folder(home):
    config = TrainConfig(data=["~/text.txt", "pydoc"], out_dir="~/r", tokenizer="~/text.txt", init_from="~/run")
    assert config.data == (str(home / "text.txt"), "pydoc")
    assert [config.out_dir, config.tokenizer, config.init_from] == [str(home / n) for n in ("r", "text.txt", "run")]
    GPT.from_pretrained("~/run").save_pretrained("~/exported")
    assert (home / "exported" / "config.json").exists()
    assert Trainer.resume("~/run", {"out_dir": "~/run"}).iter == 2


def test_the_cache_folder_may_be_named_by_the_home_folder(home, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/c")
    assert machine.cache_folder() == home / "c" / "npgpt"


def test_what_is_really_named_with_a_tilde_is_reached_as_a_file_of_this_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for name in ("./~", "./~root"):
        path = user_path(name)
        assert path == os.path.join(os.getcwd(), name[2:]) == user_path(path)
        assert user_path(quoted(name[2:]).strip("'")) == path  # a command that npgpt prints means the same


def test_a_null_character_is_one_line(folder):
    for main, args in (
        (train.main, ["--data", "a\0b"]), (sample.main, ["--model", "a\0b"]), (plot.main, ["a\0b"]),
        (explain.main, ["--out", "a\0.html"]), (exercise.main, ["check", "a\0b"]),
    ):  # fmt: skip
        assert "a null character is in no file's name" in refused(main, *args)
    with pytest.raises(UsageError, match="out_dir: a null character"):
        TrainConfig(out_dir="a\0b")


# ---- what argparse hands over


@pytest.mark.parametrize(
    "main, flags",
    [
        (sample.main, "prompt start out-dir model prompt-file checkpoint seed stop"),
        (train.main, "out-dir init-from tokenizer max-iters resume preset data bias device"),
        (explain.main, "text param out"),
        (lambda args: plot.main([*args, "run"]), "out attention"),
        (lambda args: exercise.main(["show", "mlp", *args]), "out level"),
    ],
)
def test_two_dashes_are_no_flags_value(main, flags):
    for flag in flags.split():
        assert refused(main, f"--{flag}=--").startswith(f"--{flag}=--: a value cannot be --, which ends the flags")


def test_no_flag_becomes_a_list_that_nobody_asked_for(folder):
    assert sample.parse(["--prompt=-"]).prompt == "-" and sample.parse(["--prompt=---"]).prompt == "---"
    assert plot.parse(["--", "--", "a"]).runs == ["--", "a"]


def test_line_ends_of_a_text_are_those_of_the_data():
    args = sample.parse(["--prompt", "a\r\nb\rc", "--stop", "\r\n"])
    assert (args.prompt, args.stop) == ("a\nb\nc", ["\n"])
    assert sample.parse(["--start=a\r\nb"]).prompt == "a\nb"
    assert explain.parse(["--text", "a\r\nb"]).text == "a\nb"
    assert plot.parse(["run", "--attention", "a\r\nb"]).attention == "a\nb"


def test_an_error_stays_in_its_line_whatever_a_file_is_named(capsys):
    def main():
        raise NpgptError("there is no a\nb\r\x1b[31m\u2028\udc80é")

    with pytest.raises(SystemExit):
        run_command("name", main)
    assert capsys.readouterr().err == "name: there is no a\\nb\\r\\x1b[31m\\u2028\\udc80é\n"


# ---- a command that was written for nanoGPT


def test_nanogpts_sampling_command_runs(folder, capsys):
    (folder / "ok.txt").write_text("to be", encoding="utf-8")
    args = ["--out_dir", str(folder / "run"), "--max_new_tokens=20", "--num_samples=1", "--seed=1"]
    assert sample.main([*args, "--prompt", "to be"]) == 0
    expected = capsys.readouterr().out
    pasted = ["--device=cpu", "--compile=False", "--dtype=float32", "--init_from=resume", "--eval_only=False"]
    for start in ("--start=to be", f"--start=FILE:{folder / 'ok.txt'}"):
        assert sample.main([*args, *pasted, start]) == 0
        assert capsys.readouterr().out == expected
    assert "cannot read" in refused(sample.main, *args, "--start=FILE:nowhere.txt")
    assert "give one of them" in refused(sample.main, "--start=a", "--prompt=b")


@pytest.mark.parametrize(
    "main, flags, words",
    [
        (sample.main, "--compile", "--compile can only be False here, got True"),
        (sample.main, "--device=cuda:0", "--device can only be cpu here, got cuda:0"),
        (sample.main, "--dtype=float16", "--dtype: invalid choice: 'float16' (choose from"),
        (sample.main, "--dtype=bfloat16 --int8", "--int8 and --dtype bfloat16: give one of them"),
        (sample.main, "--init_from=gpt2-xl", "--init-from can only be resume here, got gpt2-xl; write --model PATH"),
        (sample.main, "config/x.py", "unknown argument config/x.py; a model is named with --model PATH"),
        (sample.main, "--eval_only", "python -m npgpt.train --init-from MODEL --max-iters 0 evaluates a model"),
        (train.main, "--eval_only=True", "python -m npgpt.train --init-from MODEL --max-iters 0 evaluates a model"),
        (train.main, "config/eval_gpt2.py", "a program is not run: write its settings as flags, or a --preset"),
        (train.main, "--init_from=resume", "--init-from resume is nanoGPT's; write --resume"),
        (train.main, "--dataset=openwebtext", "--dataset is a flag of nanoGPT's; write --data data/NAME"),
        (train.main, "--wandb_log=True", "--wandb-log can only be False here"),
        (train.main, "--wandb_run_name=a", "--out-dir"),
        (train.main, "--wandb_project=a", "npgpt.plot"),
        (train.main, "--always_save_checkpoint=False", "--keep"),
        (train.main, "--backend=nccl", "mpiexec"),
    ],
)
def test_a_flag_of_nanogpts_that_cannot_run_names_what_to_write(main, flags, words):
    assert words in refused(main, *flags.split())


def test_nanogpts_training_flags_that_change_nothing_are_passed_over():
    flags = "--device=cpu --compile=False --wandb_log=False --init_from=scratch --eval_only=false"
    assert train.parse(flags.split()) == train.parse([])


# ---- a process that goes on when the command has ended


def handlers():
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def ended(command, monkeypatch, *args):
    """The exit code of a command as `%run -m` of IPython starts it."""
    monkeypatch.setattr(sys, "argv", ["name", *map(str, args)])
    with pytest.raises(SystemExit) as done:
        command()
    return done.value.code


@pytest.mark.parametrize("code, more", [(0, []), (2, ["--n-embd", "3"]), (3, ["--data", 300 * "x"])])
def test_a_training_leaves_its_process_as_it_was(folder, tmp_path, monkeypatch, code, more):
    if code == 3:  # an error of the system's, that no one has words for
        monkeypatch.setattr(train, "train", lambda *_: os.stat(tmp_path / "missing"))
    read, write = os.pipe()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(os.fdopen(write, "wb"), encoding="ascii", errors="strict"))
    before, descriptors = handlers(), os.fstat(write)
    args = ["--data", folder / "text.txt", "--out-dir", tmp_path / "run", *SMALL, *more]
    assert ended(train.command, monkeypatch, *args) == code
    assert handlers() == before and sys.stdout.errors == "strict"
    assert os.path.samestat(os.fstat(write), descriptors)  # it is no /dev/null now
    sys.stdout.close()
    os.close(read)


def test_signals_that_come_while_python_ends_say_nothing():
    """As the second Ctrl-C does: it comes when the handlers of the command are gone."""
    code = (
        "import atexit, os, signal, sys\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"  # comes first, as it goes last
        "from npgpt import train\n"
        "sys.argv = ['train', '--data', 'nowhere']\n"
        "train.command()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_a_command_may_be_called_in_a_thread(folder, capsys):
    def call():
        with pytest.raises(SystemExit):
            run_command("name", lambda: 0)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert capsys.readouterr() == ("", "")


class Notebook(io.StringIO):
    """What a notebook has in the place of standard output: no descriptor, no buffer, no encoding to choose."""

    errors = encoding = None


@pytest.mark.parametrize(
    "main, args",
    [
        (train.main, ["--resume", "--out-dir", "{}/run"]),
        (sample.main, ["--model", "{}/run", "--max-new-tokens", "3"]),
        (plot.main, ["{}/run"]),
        (explain.main, ["--model", "{}/run", "--out", "{}/page.html"]),
        (exercise.main, ["list"]),
        (gradcheck.main, ["neg"]),
    ],
)
def test_a_command_runs_where_the_output_is_no_console(folder, monkeypatch, main, args):
    monkeypatch.setattr(sys, "stdout", Notebook())
    monkeypatch.setattr(sys, "stderr", Notebook())
    assert main([arg.format(folder) for arg in args]) == 0
    assert sys.stdout.getvalue()


def test_the_error_of_a_notebooks_output_is_one_line(monkeypatch):
    def main():
        raise OSError(28, "No space left on device")

    registered = []
    monkeypatch.setattr(errors.atexit, "register", lambda *call: registered.append(call))
    monkeypatch.setattr(sys, "stdout", Notebook())
    monkeypatch.setattr(sys, "stderr", Notebook())
    with pytest.raises(SystemExit) as done:
        run_command("name", main)
    assert (done.value.code, sys.stderr.getvalue()) == (3, "name: No space left on device\n")
    for function, *args in registered:
        function(*args)


def test_a_prompt_may_come_from_a_standard_input_without_bytes(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("to be\r\nor"))
    assert sample.main(["--model", str(folder / "run"), "--prompt-file", "-", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("to be\nor")


def test_a_text_without_a_prompt_begins_as_the_trainings_own_samples_do(tmp_path, capsys):
    """Also where there is no line break among the characters."""
    import json

    import numpy as np

    (tmp_path / "letters.txt").write_text("abcdefghij" * 60, encoding="utf-8")
    run = tmp_path / "run"
    assert train.main(["--data", str(tmp_path / "letters.txt"), "--out-dir", str(run), *SMALL]) == 0
    GPT.from_pretrained(run).save_pretrained(tmp_path / "hub")
    capsys.readouterr()
    from npgpt.generate.generation import first_token

    model = GPT.from_pretrained(run)
    start = first_token(model.tokenizer)
    text = [start, *model.generate([start], 5, np.random.default_rng([1337, SAMPLE, 0]), temperature=0.8)]
    for path in (run, tmp_path / "hub"):
        assert sample.main(["--model", str(path), "--max-new-tokens", "5", "--json"]) == 0
        row = json.loads(capsys.readouterr().out)
        assert row["prompt"] == "a" and row["tokens"] == text[1:]
    assert sample.main(["--model", str(run), "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == model.tokenizer.decode(text) + "\n"




# ---- what is printed


def printed(text):
    """The command lines that a text names, as lists: module, arguments."""
    found = re.findall(r"python -m (npgpt\.\w+)((?: [^\n;]*?)?)(?=$|;|  | makes one| writes one)", text, re.MULTILINE)
    return [[module, *shlex.split(rest)] for module, rest in found]


def run_printed(module, *args):
    """Run a command that was printed; a new training is a small one."""
    is_new = module == "npgpt.train" and not {"--resume", "--init-from"} & set(args)
    more = SMALL if is_new else ["--data", "letters.txt"] if "--init-from" in args else []
    return importlib.import_module(module).main([*args, *more])


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """A folder whose name must be quoted, and in it a text; it is the current one."""
    odd = tmp_path / "a 'run's\" $(folder)"
    odd.mkdir()
    (odd / "letters.txt").write_text("abcdefghij" * 60, encoding="utf-8")
    monkeypatch.chdir(odd)
    return odd


@pytest.mark.skipif(os.name == "nt", reason="shlex reads as a POSIX shell does")
def test_every_command_that_is_printed_runs(odd, capsys, monkeypatch):
    """At the end of a training, when it is stopped, in hints, and by the exercises."""

    def run_all(exit_code, *expected):
        out, err = capsys.readouterr()
        commands = printed(out + err)
        assert [module for module, *_ in commands] == [f"npgpt.{name}" for name in expected], out + err
        for one in commands:
            assert run_printed(*one) == exit_code, one

    flags = ["--data", "letters.txt", *SMALL]
    for out_dir in ("own run", "./-run", "./~"):
        assert train.main(["--out-dir", out_dir, *flags]) == 0
        run_all(0, "sample", "plot")

    stop = Stop()
    monkeypatch.setattr(train, "say", lambda *_, **__: setattr(stop, "number", 15))
    with pytest.raises(StoppedError) as stopped:
        train.main(["--out-dir", "stopped run", *flags], stop)
    monkeypatch.undo()
    monkeypatch.chdir(odd)
    print(stopped.value)
    run_all(0, "train")

    capsys.readouterr()
    print(NANOGPT["eval-only"][1].replace("MODEL", quoted("own run")).replace(" evaluates", "; evaluates"))
    run_all(0, "train")
    capsys.readouterr()

    (odd / "no run").mkdir()
    with pytest.raises(CheckpointError) as missing:
        sample.main(["--model", "no run"])
    capsys.readouterr()
    print(missing.value)
    run_all(0, "train")
    capsys.readouterr()

    assert exercise.main(["show", "mlp", "--out", "mlp of mine.py"]) == 0
    run_all(1, "exercise")  # which says that it is blank
    assert exercise.main(["next"]) == 0
    run_all(1, "exercise")  # it was missed, and is to be checked again
    (odd / "progress.json").unlink()
    assert exercise.main(["next"]) == 0
    run_all(0, "exercise")  # the first one is shown
    capsys.readouterr()
    assert exercise.main(["bug"]) == 0
    run_all(0, "exercise")
    command, train_it, answer = printed(capsys.readouterr().out)
    assert (command, train_it) == (["npgpt.gradcheck"], ["npgpt.exercise", "train"])  # to be run in the copy
    assert run_printed(*answer) == 0


def test_that_test_knows_every_place_where_a_command_is_printed():
    found = collections.Counter()
    for path in (ROOT / "npgpt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found[path.name] += len(re.findall(r"(\{PROG\}|npgpt\.\w+|\.command\}) \S", ast.unparse(node)))
    study = {"check.py": 1, "exercise.py": 5, "lesson.py": 1, "progress.py": 3}
    assert +found == {**study, "folder.py": 1, "saving.py": 1, "train.py": 2}


def test_a_picture_of_several_runs_does_not_take_the_place_of_a_runs_own(folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder / "run", tmp_path / "one")
    shutil.copytree(folder / "run", tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    assert plot.main(["one"]) == 0
    before = (tmp_path / "one" / "loss.svg").read_bytes()
    assert plot.main(["one", "two/"]) == 0
    assert (tmp_path / "one" / "loss.svg").read_bytes() == before
    assert f"wrote {Path('one', 'loss-one-two.svg')}\n" in capsys.readouterr().out


def test_a_text_that_goes_on_after_its_end_says_how_to_end_it_there(monkeypatch, capsys):
    class Tokenizer(ByteTokenizer):
        end_of_text = 65

        def bytes_of(self, token):
            return b"<|endoftext|>" if token == 65 else super().bytes_of(token)

    model = GPT(GPTConfig(vocab_size=256, block_size=8, n_layer=1, n_head=1, n_embd=4)).eval()
    model.tokenizer = Tokenizer()
    monkeypatch.setattr(pretrained, "open_model", lambda path, checkpoint: model)
    line = "python -m npgpt.sample: the text goes on after '<|endoftext|>'; --stop '<|endoftext|>' ends it there\n"
    for more in ([], ["--json"], ["--num-samples", "3"]):
        assert sample.main(["--max-new-tokens", "2000", *more]) == 0
        assert capsys.readouterr().err == line
    assert sample.main(["--max-new-tokens", "2000", "--stop", "<|endoftext|>"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "<|endoftext|>" not in out
    model.tokenizer.end_of_text = None
    assert sample.main(["--max-new-tokens", "2000"]) == 0 and capsys.readouterr().err == ""


# ---- other ways to start Python


def python(*args, cwd, **variables):
    """Run Python in a process of its own -> (exit code, standard output, standard error)."""
    environment = {**os.environ, "NPGPT_KERNELS": "numpy", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, env={**environment, **variables}, capture_output=True, text=True,
        encoding="utf-8",
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


EVERY_COMMAND = """
import sys
import tarfile
from npgpt import exercise, explain, gradcheck, plot, sample, train
for main, line in (
    (train.main, ["--data", *sys.argv[1:]]), (sample.main, ["--max-new-tokens=3"]), (plot.main, ["out"]),
    (plot.main, ["out", "--attention=to be"]), (explain.main, []), (explain.main, ["--param=wte[1,2]"]),
    (exercise.main, ["list"]), (exercise.main, ["show", "mlp", "--out=mlp.py"]), (exercise.main, ["train"]),
    (exercise.main, ["bug", "1"]), (exercise.main, ["answer", "1"]), (gradcheck.main, ["neg"]),
):
    assert main(line) == 0, line
"""


def test_commands_that_show_sources_need_no_docstrings(folder, tmp_path):
    """`python -OO` drops them."""
    args = "-m", "npgpt.explain", "--model", folder / "run", "--text", "to be", "--out"
    for flags, name in ((["-OO"], "without.html"), ([], "with.html")):
        code, _, err = python(*flags, *args, name, cwd=tmp_path)
        assert (code, err) == (0, "")
    assert (tmp_path / "without.html").read_bytes() == (tmp_path / "with.html").read_bytes()
    code, _, err = python("-OO", "-c", EVERY_COMMAND, folder / "text.txt", *SMALL, cwd=tmp_path)
    assert (code, err) == (0, "")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A zip with npgpt in it."""
    path = tmp_path_factory.mktemp("archive") / "npgpt.zip"
    with zipfile.ZipFile(path, "w") as file:
        for source in (ROOT / "npgpt").rglob("*"):
            if source.suffix in (".py", ".html"):
                file.write(source, source.relative_to(ROOT))
    return path


def test_all_commands_run_from_a_zip(folder, tmp_path, archive):
    lines = [folder / "text.txt", *SMALL]
    code, _, err = python("-c", EVERY_COMMAND, *lines, cwd=tmp_path, PYTHONPATH=str(archive))
    assert (code, err) == (0, "")
    assert (tmp_path / "explain.html").stat().st_size > 50_000
    copied = {path.relative_to(tmp_path / "bug-1") for path in (tmp_path / "bug-1").rglob("*") if path.is_file()}
    assert copied == {Path(name) for name in zipfile.ZipFile(archive).namelist()} | {Path("npgpt", "planted.txt")}


def test_kernels_that_cannot_be_kept_because_of_a_zip_are_a_line(tmp_path, archive):
    code, _, err = python("-c", "import npgpt.ops.mlp", cwd=tmp_path, PYTHONPATH=str(archive), NPGPT_KERNELS="numba")
    words = f"the kernels compile anew in each process, because {archive} is not a folder: unpack it"
    assert (code, err) == (0, f"npgpt: {words}\n")


def test_a_source_distribution_holds_what_its_tests_need(tmp_path):
    pytest.importorskip("setuptools")
    left_out = shutil.ignore_patterns(".git", "__pycache__", "*.pyc", "*.egg-info", ".*_cache", "out*", "venv", ".venv")
    shutil.copytree(ROOT, tmp_path / "source", ignore=left_out)
    code = "import setuptools.build_meta as backend; backend.build_sdist('..')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "source", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        packed = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    needed = {
        path.relative_to(tmp_path / "source")
        for folder in ("npgpt", "tests", "examples", "benchmarks", ".ci", ".github")
        for path in (tmp_path / "source" / folder).rglob("*")
    }
    assert {Path("tests/runs.py"), Path("tests/torch_figures.npz"), Path(".ci/run")} <= needed <= packed
    assert {Path("README.md"), Path("CHANGELOG.md"), Path("setup.cfg")} <= packed
