"""The house rules that can be read off the source: who imports whom, and what npgpt does without."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import mutation
import pytest
from faults import FAULTS

ROOT = Path(__file__).resolve().parent.parent
FILES = {  # "ops.linear" -> its path
    ".".join(path.relative_to(ROOT / "npgpt").with_suffix("").parts): path
    for path in sorted((ROOT / "npgpt").rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in FILES.items()}

# From the ground up: a module may import its own floor and those below it.  run and study do not see each other.
FLOORS = [["leaves"], ["kernels"], ["core"], ["data"], ["files"], ["generate"], ["run", "study"], ["commands"]]
TOP = {  # the modules that stand directly in npgpt/; all others belong to the folder in which they stand
    "leaves": ["errors", "config", "context", "machine", "signals", "command"],
    "core": ["engine", "tensor", "ops", "nn", "model", "optim", "muon", "gradcheck"],
    "commands": ["train", "sample", "exercise", "explain", "plot", "prove"],
}
# The only imports that go up, each within a function: GPT.from_pretrained, save_pretrained and generate.
UPWARD = {("model", "files.pretrained"), ("model", "files.hub"), ("model", "generate.generation")}
CORE_LINES = 2750  # that `import npgpt.model` loads, at most, beside kernels/
EXTRAS = {"torch", "safetensors", "tokenizers", "matplotlib", "mpi4py"}  # never needed by npgpt itself
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__"}


def room(module):
    """The room in FLOORS that a module belongs to."""
    first = module.split(".")[0]
    return next((name for name, modules in TOP.items() if first in modules), first)


def floor(module):
    return next((n for n, rooms in enumerate(FLOORS) if room(module) in rooms), None)


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
            names = (name for module in inner for name in (module, f"{module}.__init__"))
            yield next((name for name in names if name in FILES), "__init__")


def top_level(tree):
    """Statements that run when a file is imported; not the bodies of its functions."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            todo.extend(ast.iter_child_nodes(node))


MODULES = [name for name in FILES if name.rpartition(".")[2] != "__init__"]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    assert floor(module) is not None, f"npgpt/{module.replace('.', '/')}.py needs a place in TOP"
    for other in set(imported_modules(module)):
        if other == "__init__":
            assert room(module) in ("run", "commands"), f"{module} imports the package itself"
        elif (module, other) not in UPWARD:
            allowed = floor(other) < floor(module) or room(other) == room(module)
            assert allowed, f"{module}, in {room(module)}, imports {other}, in {room(other)}"


def test_what_goes_up_is_imported_within_functions():
    for module, other in UPWARD:
        full = {name for node in top_level(TREES[module]) for name in imported_names_of(node)}
        assert other in imported_modules(module) and not any(name.startswith(f"npgpt.{other}") for name in full)


def test_the_core_closes(capsys):
    """`import npgpt.model` loads nothing from the wings, and no more than somebody can read."""
    code = "import sys, npgpt.model; print(*(name for name in sys.modules if name.startswith('npgpt')))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = [name.removeprefix("npgpt").lstrip(".") for name in done.stdout.split()]
    loaded = [name if name in FILES else f"{name}.__init__".lstrip(".") for name in loaded]
    modules = [name for name in loaded if room(name) != "kernels"]
    lines = sum(len(FILES[name].read_text(encoding="utf-8").splitlines()) for name in modules)
    with capsys.disabled():
        print(f"\nimport npgpt.model: {len(modules)} files beside kernels/, {lines:,} lines; none of the wings")
    assert {room(name) for name in modules} == {"leaves", "core", "__init__"}
    assert lines <= CORE_LINES


def test_nothing_imports_itself_in_a_circle():
    done = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in set(imported_modules(module)) - {"__init__"}:
                if (module, other) in UPWARD:
                    continue
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
    assert "tensor" in set(imported_modules("ops.linear")) and "ops.linear" in set(imported_modules("ops.mlp"))
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
    loaded = loaded_modules("import npgpt.model, npgpt.run.parallel, npgpt.gradcheck", NPGPT_KERNELS="numpy")
    assert "numpy" in loaded and not loaded & ({"numba", "llvmlite"} | EXTRAS)


# --------------------------------------------------------------------------------------------------------------------
# The faults that tests/mutation.py plants


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault):
    source = (ROOT / fault.file).read_text(encoding="utf-8")
    assert source.count(fault.before) == 1, "the text that the fault replaces must stand in its file exactly once"
    assert fault.after != fault.before
    ast.parse(source.replace(fault.before, fault.after))
    assert mutation.relevant(fault)


def test_faults_have_names_of_their_own_and_an_explanation_in_a_sentence():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 30
    for fault in FAULTS:
        assert fault.why.endswith(".") and len(fault.why) > 20, fault.name
