"""Exercises: files with an op's forward given and its backward blank, made from the op's own source.

The solution is the op, and nothing is written twice.
"""

import ast
import re
from pathlib import Path

PROG = "python -m npgpt.exercise"

LEVELS = {
    1: "the backward's lines are there, but for what stands right of the =",
    2: "the forward's lines are quoted, in the order in which they are undone",
    3: "a signature, and what to return",
}


def exercise_text(lesson, level, name):
    """The file for an op's exercise; level 0 is the solution.  name: where the file will be.

    A name becomes part of the file's docstring if there is nothing in it that could end the docstring or mean something
    else there, as a backslash does.
    """
    base = Path(name).name
    name = base if re.fullmatch(r"\w[\w.-]*", base) else "FILE"
    source = lesson.source()
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    lines = {node.name: source.splitlines()[node.lineno - 1 : node.end_lineno] for node in nodes}
    forward = ["\n".join(lines[name]) for name in lesson.forward]
    backward = ["\n".join(_blank(lines[name], level)) for name in lesson.backward]
    if lesson.exchange:  # one function is both
        forward[-1] = forward[-1].replace(lesson.forward[-1], f"{lesson.file}_forward")
    for before, after in lesson.exchange:
        backward = [re.sub(rf"\b{before}\b", after, text) for text in backward]
    functions = "\n\n\n".join((*forward, *backward))
    for name_here in re.findall(r"^def (\w+)_ref\(", functions, re.MULTILINE):
        functions = re.sub(rf"\b{name_here}_ref\b", name_here, functions)
    blanks = " and ".join((*(helper.removesuffix("_ref") for helper in lesson.backward[:-1]), lesson.function()))
    imports = "import math\n\n" * ("math." in functions) + "import numpy as np\n"
    imports += f"\n{lesson.imports}\n" if lesson.imports else ""
    return f'''"""Exercise: the backward of {lesson.op}, level {level} of {len(LEVELS)}.

The forward is given.  Put code in the place of each `...` in {blanks}; it may be
more lines than there are blanks, and others.  Then

    {PROG} check {name}

compares what it returns with finite differences, says what kind of mistake a wrong result looks
like, and trains a small GPT with it.  The solution is npgpt/ops/{lesson.file}.py, with its derivation.
"""

{imports}

{functions}
'''


def _blank(lines, level):
    """The lines of a function with blanks in it."""
    (node,) = ast.parse("\n".join(lines)).body
    first = node.body[0]
    documented = ast.get_docstring(node) is not None
    body, head = (node.body[1:], lines[: first.end_lineno]) if documented else (node.body, lines[: first.lineno - 1])
    comments = [i for i, line in enumerate(lines) if line.startswith("    #")]
    if level == 0:
        return lines
    if level == 3:
        return [*head, "    ..."]
    if level == 2:
        quoted = [line for i in comments for line in (lines[i], "    ...")]
        returned = list(ast.walk(body[-1].value))
        if not all(isinstance(part, (ast.Name, ast.Tuple, ast.Load)) for part in returned):
            return [*head, *quoted, "    return ..."]
        arguments = {argument.arg for argument in node.args.args}
        new = [part.id for part in returned if isinstance(part, ast.Name) and part.id not in arguments]
        return [*head, *(["    " + " = ".join([*new, "..."])] if new else []), *quoted, lines[-1]]
    # Before the first quotation, values of the forward are made again; memory for a result is no secret.
    lines = list(lines)
    for statement in reversed(body):
        value = getattr(statement, "value", None)
        names_only = isinstance(statement, ast.Return) and isinstance(value, (ast.Name, ast.Tuple))
        is_memory = isinstance(value, ast.Call) and ast.unparse(value.func) == "np.empty_like"
        if value is None or names_only or is_memory or (comments and statement.lineno <= comments[0]):
            continue
        first, last = value.lineno - 1, value.end_lineno - 1
        lines[first : last + 1] = [lines[first][: value.col_offset] + "..." + lines[last][value.end_col_offset :]]
    return lines


def blank_lines(tree):
    """Numbers of the lines of a file in which there is still a `...` where code belongs.

    In dx = dweight = dbias = ... results have got a value for the time being; that line may stay.
    """
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    values = [getattr(node, "value", None) for node in statements if len(getattr(node, "targets", ())) < 2]
    return sorted({value.lineno for value in values if isinstance(value, ast.Constant) and value.value is ...})
