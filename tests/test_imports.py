"""The house rules that can be read off the source: who imports whom, and what npgpt does without."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from npgpt.faults import FAULTS

ROOT = Path(__file__).resolve().parent.parent
FILES = {  # "ops.linear" -> its path
    ".".join(path.relative_to(ROOT / "npgpt").with_suffix("").parts): path
    for path in sorted((ROOT / "npgpt").rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in FILES.items()}

# From the ground up: a module may import those that stand in a line above its own, and no others.
LINES = [
    ["errors", "faults", "kinds", "machine"],
    ["config", "profiler", "stop", "memory", "private"],
    ["engine", "jit", "crew"],
    ["tiles", "ranks"],
    ["blas"],
    ["tokenizer", "checkpoint"],
    ["folder"],
    ["ops"],
    ["decode"],
    ["nn", "sampling"],
    ["hub"],
    ["model"],
    ["command"],
    ["gradcheck", "optim"],
    ["parallel"],
    ["data", "audit", "hints"],
    ["trainer"],
    ["train", "sample", "receipt", "plot", "exercise"],
    ["explain"],
]
# Some may import less than that.
ONLY = {
    "errors": set(),
    "faults": set(),
    "kinds": set(),
    "config": {"errors"},
    "engine": {"errors"},
    "profiler": set(),
    "stop": set(),
    "ranks": {"errors", "machine", "profiler", "stop"},
    "machine": set(),
    "memory": {"machine"},
    "private": {"machine"},
    "jit": {"errors", "machine", "private", "profiler"},
    "crew": set(),
    "tiles": {"jit"},
    "blas": {"crew", "engine", "jit", "machine", "tiles"},
    "ops": {"blas", "engine", "jit", "tiles", "ops"},
    "decode": {"crew", "jit", "machine", "tiles", "ops"},
    "sampling": {"config", "engine", "errors", "jit", "decode"},
    "optim": {"blas", "errors", "engine", "jit", "tiles", "profiler"},
    "data": {"errors", "kinds", "config", "machine", "folder"},
    "tokenizer": {"errors", "kinds", "config", "jit"},
    "checkpoint": {"errors", "kinds", "config", "jit"},
    "folder": {"errors", "checkpoint"},
    "hub": {"errors", "kinds", "config", "ops", "tokenizer", "checkpoint", "folder"},
}
EXTRAS = {"torch", "safetensors", "tokenizers", "matplotlib", "mpi4py"}  # never needed by npgpt itself
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__"}


def layer(module):
    """The name in LINES for a module: its own, or its folder's."""
    return module.split(".")[0]


def imported_names(tree):
    """Full name of everything that is imported somewhere in a file: npgpt.engine.Tensor, math, ..."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "npgpt imports by full names"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(name):
    """Modules of npgpt that the module `name` imports, at its top or in a function."""
    for full in imported_names(TREES[name]):
        parts = full.split(".")
        if parts[0] == "npgpt":
            inner = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
            yield next((module for module in inner if module in FILES), "__init__")


def top_level(tree):
    """Statements that run when a file is imported; not the bodies of its functions."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            todo.extend(ast.iter_child_nodes(node))


MODULES = [name for name in FILES if name != "__init__" and not name.endswith(".__init__")]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    place = {name: i for i, line in enumerate(LINES) for name in line}
    assert layer(module) in place, f"npgpt/{module.replace('.', '/')}.py needs a place in LINES"
    for other in imported_modules(module):
        if other == "__init__":
            assert layer(module) in ("trainer", "train", "sample"), f"{module} imports the package itself"
            continue
        if layer(module) in ONLY:
            assert layer(other) in ONLY[layer(module)], f"{module} imports {other}"
        else:
            assert place[layer(other)] < place[layer(module)], f"{module} imports {other}"


def test_nothing_imports_itself_in_a_circle():
    done = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in set(imported_modules(module)) - {"__init__"}:
                visit(other, [*path, module])
            done.add(module)

    for module in MODULES:
        visit(module, [])


def test_the_package_itself_loads_its_names_when_they_are_asked_for():
    assert not list(imported_modules("__init__"))


@pytest.mark.parametrize("module", FILES)
def test_optional_packages_are_not_needed_to_import_npgpt(module):
    names = {full.split(".")[0] for node in top_level(TREES[module]) for full in imported_names_of(node)}
    assert not names & EXTRAS


def imported_names_of(node):
    return imported_names(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else ()


@pytest.mark.parametrize("module", FILES)
def test_no_file_can_run_code(module):
    """Checkpoints and data come from elsewhere: nothing that npgpt reads may be executed."""
    names = {full.split(".")[0] for full in imported_names(TREES[module])}
    assert not names & FORBIDDEN_MODULES
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call):
            assert not (isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS), f"line {node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant) and node.value.value is False, f"line {node.value.lineno}"


def test_the_rules_are_read_off_correctly():
    """The helpers above see what they are meant to see."""
    tree = ast.parse("import a.b, c\nfrom npgpt.ops import linear\ndef f():\n  import torch\nif x:\n  import mpi4py")
    assert set(imported_names(tree)) == {"a.b", "c", "npgpt.ops.linear", "mpi4py", "torch"}
    loaded = {name for node in top_level(tree) for name in imported_names_of(node)}
    assert "mpi4py" in loaded and "torch" not in loaded
    assert "engine" in set(imported_modules("ops.linear")) and "ops.linear" in set(imported_modules("ops.mlp"))
    assert set(imported_modules("gradcheck")) >= {"engine", "model", "ops.attention"}


def loaded_modules(code, **variables):
    """Names of the modules that are loaded after some code ran in a new Python."""
    command = [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in output.stdout.split()}


def test_settings_and_errors_need_the_standard_library_only():
    assert not loaded_modules("import npgpt, npgpt.config, npgpt.errors") & ({"numpy", "numba"} | EXTRAS)


def test_numba_is_not_loaded_when_the_references_are_asked_for():
    loaded = loaded_modules("import npgpt.model, npgpt.parallel, npgpt.gradcheck", NPGPT_KERNELS="numpy")
    assert "numpy" in loaded and not loaded & ({"numba", "llvmlite"} | EXTRAS)


# --------------------------------------------------------------------------------------------------------------------
# The faults that tests/mutation.py plants


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault):
    source = (ROOT / fault.file).read_text(encoding="utf-8")
    assert source.count(fault.before) == 1, "the text that the fault replaces must stand in its file exactly once"
    assert fault.after != fault.before
    ast.parse(source.replace(fault.before, fault.after))


def test_faults_have_names_of_their_own_and_an_explanation_in_a_sentence():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 30
    for fault in FAULTS:
        assert fault.why.endswith(".") and len(fault.why) > 20, fault.name
