"""Mistakes for students to find: which there are, and a copy of the package with one of them in it."""

import shutil

from npgpt.command import PLANTED
from npgpt.errors import CheckpointError, UsageError, told_as
from npgpt.study.lesson import SOURCES, Fault
from npgpt.study.lessons import LESSONS

OTHERS = {  # in files that have no lesson: the small operations, and the engine
    2: Fault(
        "log: multiplied instead of divided", "npgpt/tensor.py",
        "(dy / a.data,)", "(dy * a.data,)",
        "The derivative of log x is 1/x.",
    ),
    3: Fault(
        "tanh: slope from the input", "npgpt/tensor.py",
        "dy * (1 - y * y)", "dy * (1 - a.data * a.data)",
        "The slope 1 - tanh(x)^2 is made of the output, not of the input.",
    ),
    4: Fault(
        "relu: gate by the gradient", "npgpt/tensor.py",
        "dy * (a.data > 0)", "dy * (dy > 0)",
        "ReLU lets a gradient pass where its input was positive, whatever the gradient's own sign.",
    ),
    14: Fault(
        "unbroadcast: stretched axes are not summed", "npgpt/tensor.py",
        "    grad = grad.sum(axis=tuple(range(extra)) + stretched, keepdims=True)\n",
        "    grad = grad.sum(axis=tuple(range(extra)))[tuple(slice(0, n) for n in x.shape)]\n",
        "An axis of length 1 that was stretched was copied too, so it must be summed over, not cut.",
    ),
    20: Fault(
        "engine: the second contribution forgets the first", "npgpt/engine.py",
        "            sums.add(total, self.value, grad)\n", "            total[...] = grad\n",
        "The first contribution was somebody else's array, so the sum needs a new one; but it must be the sum.",
    ),
    21: Fault(
        "engine: breadth-first instead of topological order", "npgpt/engine.py",
        """\
        node, parents = stack[-1]
        for parent in parents:
            if parent.requires_grad and id(parent) not in visited:
                visited.add(id(parent))
                stack.append((parent, iter(parent._parents)))
                break
        else:
            order.append(node)
            stack.pop()
""",
        """\
        node, parents = stack.pop(0)
        order.insert(0, node)
        for parent in parents:
            if parent.requires_grad and id(parent) not in visited:
                visited.add(id(parent))
                stack.append((parent, iter(parent._parents)))
""",
        "A backward that runs before all contributions to its gradient have come passes on only a part of it.",
    ),
}  # fmt: skip
NUMBERED = [pair for bugs in (OTHERS, *(lesson.bugs for lesson in LESSONS.values())) for pair in bugs.items()]
BUGS = [fault for _, fault in sorted(NUMBERED)]  # from easy to hard; bug N is BUGS[N - 1]


def bug(number):
    """The Fault of this number."""
    if not 1 <= number <= len(BUGS):
        raise UsageError(f"bug: there are bugs 1 to {len(BUGS)}, got {number}")
    return BUGS[number - 1]


def right_source(fault):
    """The text of the file into which a fault is planted, where it has not been."""
    text = SOURCES.joinpath(*fault.file.split("/")[1:]).read_text(encoding="utf-8")
    if text.count(fault.before) != 1:
        raise UsageError("this npgpt is a copy with a mistake in it, or has been changed; ask in another folder")
    return text


def plant(fault, folder):
    """Copy the package's sources into folder/npgpt, with the fault in them: all of it or nothing."""
    for other in BUGS:
        right_source(other)  # two mistakes at a time are one too many
    sources = dict(_contents(SOURCES, "npgpt"))
    sources[f"npgpt/{PLANTED}"] = fault.kernels.encode("utf-8")
    sources[fault.file] = right_source(fault).replace(fault.before, fault.after).encode("utf-8")
    with told_as(CheckpointError, f"cannot make {folder}"):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise UsageError(f"{folder} exists; remove it, or choose another folder with --dir") from None
    try:
        for name, text in sources.items():
            path = folder / name
            with told_as(CheckpointError, f"cannot write {path}"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(text)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _contents(place, name):
    """(name, content) of all sources in a folder of the package, which is called `name`."""
    for part in place.iterdir():
        if part.is_dir():
            yield from _contents(part, f"{name}/{part.name}")
        elif part.name.endswith((".py", ".html")):
            yield f"{name}/{part.name}", part.read_bytes()
