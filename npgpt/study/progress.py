"""How far a student is: which exercises were tried, which are right, and what to try next.

It is kept in progress.json, beside the files that are checked: {op: what came of its last check}, for anybody to read.

    right   whether the last check found all of it right
    tries   how often it was checked
    passed  the highest level at which it was right; 0 if it never was
    level   the last file's level, and file its name
    parts   result -> ok, wrong or blank
    words   the first thing that was wrong
"""

import ast
import json
import re
from pathlib import Path

from npgpt.errors import UsageError, quoted, told_as
from npgpt.study.lesson import LEVELS, PROG
from npgpt.study.lessons import LESSONS

NAME = "progress.json"
KINDS = {"right": bool, "tries": int, "passed": int, "level": int, "file": str, "parts": dict, "words": str}


def read(folder):
    """{op: what came of its last check}; nothing where no exercise has been checked.  Raises UsageError."""
    path = Path(folder) / NAME
    try:
        with told_as(UsageError, f"cannot read {path}"):
            entries = json.loads(path.read_bytes()) if path.exists() else {}
    except (ValueError, RecursionError):
        entries = None
    known = isinstance(entries, dict) and all(op in LESSONS and isinstance(entries[op], dict) for op in entries)
    if not known or any(type(e.get(key)) is not kind for e in entries.values() for key, kind in KINDS.items()):
        raise UsageError(f"{path} is not what `check` writes; mend it, or remove it to begin anew")
    return entries


def record(path, outcomes):
    """Keep what came of a check of a file.  Raises UsageError and CheckpointError."""
    from npgpt.files.checkpoint import replace

    if not outcomes:
        return
    path = Path(path)
    entries, level = read(path.parent), level_of(path)
    for outcome in outcomes:
        before = entries.get(outcome.op, {"tries": 0, "passed": 0})
        entries[outcome.op] = {
            "right": outcome.passed, "tries": before["tries"] + 1,
            "passed": max(before["passed"], level if outcome.passed else 0), "level": level, "file": path.name,
            "parts": outcome.parts, "words": outcome.words,
        }  # fmt: skip
    replace(path.parent / NAME, [json.dumps(entries, indent=1).encode("utf-8"), b"\n"])


def level_of(path):
    """The level that a file's docstring tells; 1 if it tells none."""
    with told_as(UsageError, f"cannot read {path}"):
        docstring = ast.get_docstring(ast.parse(path.read_bytes())) or ""
    found = re.search(r"level (\d) of", docstring)
    return int(found[1]) if found and int(found[1]) in LEVELS else min(LEVELS)


def next_step(folder):
    """Lines on what to do next: what was missed, most tries first; then what was not tried; then a higher level."""
    entries = read(folder)
    missed = sorted((op for op in entries if not entries[op]["right"]), key=lambda op: -entries[op]["tries"])
    new = [op for op in LESSONS if op not in entries]
    passed = [op for op in LESSONS if op in entries and op not in missed]
    if missed:
        op, entry = missed[0], entries[missed[0]]
        parts = [f"{name} {state}" for name, state in entry["parts"].items()]
        times = f"{entry['tries']} tr{'y' if entry['tries'] == 1 else 'ies'}"
        yield f"{op}, level {entry['level']}, not right after {times}" + (f": {', '.join(parts)}" if parts else "")
        if entry["words"]:
            yield f"  {entry['words']}"
        yield f"  {PROG} check {quoted(str(Path(folder) / entry['file']))}"
    elif new:
        yield f"{new[0]}: {LESSONS[new[0]].topic}"
        yield _show(folder, new[0], max((entry["passed"] for entry in entries.values()), default=1))
    else:
        op = min(passed, key=lambda op: (entries[op]["passed"], -entries[op]["tries"]))
        if (level := entries[op]["passed"]) < max(LEVELS):
            yield f"{op} once more, at level {level + 1}: {LEVELS[level + 1]}"
            yield _show(folder, op, level + 1)
        else:
            yield f"all exercises are done, at every level; now find mistakes:  {PROG} bug 1"
    for words, ops in (("missed", missed), ("right", passed), ("not tried", new)):
        if ops:
            levels = {op: f" (level {entry['level']})" for op, entry in entries.items()}
            yield f"{words}: {', '.join(op + levels.get(op, '') for op in ops)}"


def _show(folder, op, level):
    """The command for an exercise, with a name for its file that is free."""
    names = (f"{LESSONS[op].file}{n}.py" for n in ("", *(f"_{n}" for n in range(2, 1000))))
    path = next(path for path in map(Path(folder).joinpath, names) if not path.exists())
    return f"  {PROG} show {op} --level {level} --out {quoted(str(path))}"
