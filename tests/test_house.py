"""The sizes of the house: no module, class or function is too long to be read in one sitting."""

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    path.relative_to(ROOT / "npgpt").as_posix(): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "npgpt").rglob("*.py"))
}

MODULE, CLASS, FUNCTION = 500, 300, 80  # lines at most
TENSOR = "Tensor"  # one class with all its operators, however many they are


def too_large(file, text):
    """What is above its limit in a file: its place -> lines."""
    found, lines = {}, len(text.splitlines())
    if lines > MODULE:
        found[file] = lines
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if lines > (CLASS if isinstance(node, ast.ClassDef) else FUNCTION) and node.name != TENSOR:
                found[f"{file}: {node.name}"] = lines
    return found


def test_nothing_is_too_large():
    found = {}
    for file, text in SOURCES.items():
        found |= too_large(file, text)
    assert not found


def test_what_is_too_large_is_found():
    text = "class A:\n" + "    def f(self):\n" + "        pass\n" * 80 + "    x = 1\n" * 219
    assert too_large("a.py", text) == {"a.py: A": 301, "a.py: f": 81}
    assert too_large("a.py", text.replace("A", "Tensor")) == {"a.py: f": 81}
    assert too_large("a.py", "x = 1\n" * 501) == {"a.py": 501} and too_large("a.py", "x = 1\n" * 500) == {}


def test_the_lines_of_each_folder(capsys):
    """How large the house is, for whoever reads what CI prints."""
    lines, files = Counter(), Counter()
    for file, text in SOURCES.items():
        folder = f"{Path(file).parent}/".removeprefix("./")
        lines[folder] += len(text.splitlines())
        files[folder] += 1
    with capsys.disabled():
        print("\nlines of npgpt (files):")
        for folder in sorted(lines):
            print(f"{lines[folder]:8,}  {folder or 'top level'} ({files[folder]})")
        print(f"{lines.total():8,}  in all ({files.total()})")
