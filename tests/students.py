"""Wrong answers to the exercises, and whether the hints see what was meant.

    python tests/students.py            prints what was meant and what the hints named, and how often they were right
    python tests/students.py --write    and writes it to students.txt
    python tests/students.py --list     each answer that was not seen rightly

students.txt keeps the table.  The first answers are those of one student.  Three readers (fresh_students.py) had not
seen the hints; more answers were thought of when the first two were done, 40 and then 30.  Each of these groups was
measured before anything was changed on account of it, and what was changed were whole classes of mistakes.  Rightly
named were

                                 table    first reader    second reader    40 more    30 more    third reader
    before mistakes.py            12 %        47 %             27 %          28 %       20 %
    before it was looked at                   47 %             47 %          57 %       67 %          70 %
    after                        100 %        93 %            100 %          95 %       83 %          77 %

and wrongly, before they were looked at, 20 %, 7 %, 15 %, 3 %, 7 %.  The table and the third reader's 30 are 79 answers,
of which 89 % were named rightly and 3 % wrongly; of unusual answers that nobody has looked at it is two in three.

An answer counts as

    right   every kind of mistake in it was named, and no other
    part    of several mistakes some were named, and no other
    none    no kind was named
    wrong   some kind was named that is not in it
"""

import ast
import collections
import itertools
import sys
import tempfile
from pathlib import Path

import fresh_students

from npgpt.study.check import Answer, Wrong, imports_beside
from npgpt.study.hints import Case
from npgpt.study.lesson import exercise_text
from npgpt.study.lessons import LESSONS

TABLE = Path(__file__).with_suffix(".txt")

# (exercise, {blank: what the student wrote there}, what kind of mistake that is).  A blank is the variable that level 1
# leaves open, or how the solution's line begins; a def replaces the function of its name.  "a + b": two mistakes;
# "a | b": one, which has two names.
ANSWERS = {}
ANSWERS["table"] = [
    ("attention", {"ds": "ds = p * drop * (da - (da * p * drop).sum(axis=-1, keepdims=True))"}, "wrong value"),
    ("attention", {"dq": "dq = ds @ q / math.sqrt(q.shape[-1])"}, "wrong value"),
    (
        "attention",
        {
            "dq": "dq = ds @ k / math.sqrt(dy.shape[1] * dy.shape[-1])",
            "dk": "dk = ds.swapaxes(-1, -2) @ q / math.sqrt(dy.shape[1] * dy.shape[-1])",
        },
        "constant factor",
    ),
    ("attention", {"ds": "ds = dp * p * (1 - p)"}, "missing term"),
    ("attention", {"ds": "ds = p * dp - (dp * p).sum(axis=-1, keepdims=True)"}, "missing factor"),
    ("attention", {"ds": "ds = p * (dp - (dp * p).mean(axis=-1, keepdims=True))"}, "mean for sum"),
    ("attention", {"p = np.exp": "p = np.tril(np.exp(_scores(q, k) - lse[..., None]), -1)"}, "wrong mask"),
    ("attention", {"p = np.exp": "p = np.exp(_scores(q, k))"}, "wrong value | missing term"),
    ("attention", {"q, k, v": "q, k, v = qkv.reshape(3, qkv.shape[0], n_head, qkv.shape[1], -1)"}, "reshape"),
    (
        "cross-entropy",
        {
            "dlogits = p": "dlogits = np.zeros_like(p)",
            "dlogits[rows": "dlogits[rows, targets[rows]] = p[rows, targets[rows]] - 1",
        },
        "missing term",
    ),
    ("cross-entropy", {"dlogits[rows": "dlogits[:, targets[rows]] -= 1"}, "wrong index"),
    ("cross-entropy", {"dlogits[rows": "dlogits -= targets[:, None]"}, "wrong value"),
    (
        "cross-entropy",
        {
            "dlogits = p": "dlogits = np.zeros_like(p)",
            "dlogits[rows": "dlogits[rows, targets[rows]] = -1 / p[rows, targets[rows]]",
        },
        "missing line",
    ),
    (
        "cross-entropy",
        {
            "dlogits[~valid]": "dlogits[~valid] = 0\ndlogits = dlogits * P * (1 - P)",
            "p = np.exp": "P = np.exp(logits - lse[:, None])\np = P.copy()",
        },
        "factor too many",
    ),
    ("embedding", {"dwpe": "dwpe[1 : T + 1] += dy.sum(axis=0)"}, "wrong index"),
    ("embedding", {"dwpe": "dwpe[-T:] += dy.sum(axis=0)"}, "wrong index"),
    ("embedding", {"dwpe": "dwpe += dy.sum(axis=0)"}, "wrong index"),
    ("embedding", {"dwpe": "dwpe[:T] += dy.sum(axis=1)"}, "wrong axis"),
    ("embedding", {"np.add": "dwte[idx] = dy"}, "overwritten"),
    ("embedding", {"dwpe": "dwpe[:T] = dy.sum(axis=0)"}, "overwritten"),
    ("mlp", {"return 0.5": "return 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * K * (1 + A * z**2)"}, "missing factor"),
    ("mlp", {"return 0.5": "return 0.5 * (1 + t) + 0.5 * z * (1 - t**2) * (1 + 3 * A * z**2)"}, "missing factor"),
    ("mlp", {"return 0.5": "return 0.5 * (1 + t) + z * (1 - t**2) * K * (1 + 3 * A * z**2)"}, "missing factor"),
    ("mlp", {"return 0.5": "return 0.5 * (1 + t) + 0.5 * (1 - t**2) * K * (1 + 3 * A * z**2)"}, "missing factor"),
    (
        "mlp",
        {"return 0.5": "return 0.5 * (1 + t) + 0.5 * z * (1 - t) * K * (1 + 3 * A * z**2)"},
        "wrong value | wrong power",
    ),
    ("mlp", {"dpre": "dpre = dact * gelu_slope(dact)"}, "wrong value"),
    ("mlp", {"dpre": "dpre = dact * (pre > 0)"}, "wrong value"),
    ("mlp", {"dpre": "dpre = dact @ gelu_slope(pre)"}, "wrong product"),
    ("layernorm", {"dx": "dx = rstd[:, None] * (g - g_mean - g_xhat_mean)"}, "missing factor"),
    ("layernorm", {"dx": "dx = rstd[:, None] * (g - g_mean - 0.5 * xhat * g_xhat_mean)"}, "constant factor"),
    (
        "layernorm",
        {
            "g_mean": "g_mean = dy.mean(axis=1, keepdims=True)",
            "g_xhat_mean": "g_xhat_mean = (dy * xhat).mean(axis=1, keepdims=True)",
        },
        "missing factor | wrong value",
    ),
    ("layernorm", {"dx": "dx = rstd[:, None] * (g + g_mean + xhat * g_xhat_mean)"}, "sign"),
    (
        "layernorm",
        {
            "g_mean": "C = x.shape[1]\ng_mean = g.sum(axis=1, keepdims=True) / (C - 1)",
            "g_xhat_mean": "g_xhat_mean = (g * xhat).sum(axis=1, keepdims=True) / (C - 1)",
        },
        "constant factor",
    ),
    (
        "layernorm",
        {
            "g_mean": "g_mean = g.sum(axis=1, keepdims=True) / len(x)",
            "g_xhat_mean": "g_xhat_mean = (g * xhat).sum(axis=1, keepdims=True) / len(x)",
        },
        "constant factor",
    ),
    ("layernorm", {"dweight": "dweight = (dy * weight * xhat).sum(axis=0)"}, "factor too many"),
    ("layernorm", {"dx": "dx = (g - g_mean - xhat * g_xhat_mean) / rstd[:, None]"}, "upside down"),
    # two mistakes in one answer
    ("layernorm", {"dx": "dx = rstd[:, None] * (g + xhat * g_xhat_mean)"}, "missing term + sign"),
    ("layernorm", {"g =": "g = dy", "dx": "dx = rstd[:, None] * (g - g_mean)"}, "missing factor + missing term"),
    ("layernorm", {"dx": "dx = g - g_mean"}, "missing factor + missing term"),
    (
        "layernorm",
        {
            "g_mean": "g_mean = g.sum(axis=1, keepdims=True)",
            "dx": "dx = rstd[:, None] * (g - g_mean - x * g_xhat_mean)",
        },
        "sum for mean + wrong value",
    ),
    (
        "layernorm",
        {
            "g_xhat_mean": "g_xhat_mean = (g * xhat).sum(axis=1, keepdims=True)",
            "dx": "dx = g - g_mean - xhat * g_xhat_mean",
        },
        "sum for mean + missing factor",
    ),
    ("embedding", {"dwpe": "dwpe[1 : T + 1] += dy.mean(axis=0)"}, "wrong index + mean for sum"),
    (
        "embedding",
        {"np.add": "dwte[idx] += dy", "dwpe": "dwpe[:T] = dy[0]"},
        "repeated index + overwritten + one row only",
    ),
    (
        "mlp",
        {"return 0.5": "return 0.5 * (1 + t) + 0.5 * z * (1 - t**2)", "dpre": "dpre = dact * gelu_slope(act)"},
        "missing factor + wrong value",
    ),
    (
        "attention",
        {"ds": "ds = p * dp", "dq": "dq = ds @ k", "dk": "dk = ds.swapaxes(-1, -2) @ q"},
        "missing term + constant factor",
    ),
    ("attention", {"dk": "dk = ds @ q"}, "transposed + constant factor"),
    ("linear", {"dweight": "dweight = x.T @ dy / len(x)"}, "transposed + mean for sum"),
    ("dropout", {"return np.where": "return dy * ~mask"}, "wrong mask + constant factor"),
    (
        "cross-entropy",
        {"dlogits[~valid]": "pass", "return dlogits": "return dlogits * dloss"},
        "wrong mask + constant factor",
    ),
]  # fmt: skip

ANSWERS["first reader"] = fresh_students.FIRST
ANSWERS["second reader"] = fresh_students.SECOND
ANSWERS["more"] = fresh_students.MORE
ANSWERS["third reader"] = fresh_students.THIRD

# How the words of a hint begin, up to a colon or comma -> its kind in the table.
KINDS = {
    "missing terms": "missing term",
    "mean instead of sum": "mean for sum",
    "sum instead of mean": "sum for mean",
    "a factor too many": "factor too many",
    "a sum too many": "sum too many",
    "a term too many": "term too many",
    "a line too many": "line too many",
    "a factor that": "",
    "right numbers at wrong places": "reshape",
    "sign of": "sign",
    "none of the usual mistakes": "",
    "wrong in the": "",
}


def student_text(op, lines):
    """The file of a student who wrote these lines in the place of the solution's."""
    text = exercise_text(LESSONS[op], 0, "mine.py")
    for blank, written in lines.items():
        source = text.splitlines()
        nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        names = {name.removesuffix("_ref") for name in LESSONS[op].backward} | {LESSONS[op].function()}
        if written.startswith("def "):
            (node,) = (node for node in nodes if node.name == blank)
            places, indent = [node], ""
        else:
            inside = [part for node in nodes if node.name in names for part in node.body]
            places = [part for part in inside if source[part.lineno - 1].strip().startswith(blank)]
            if len(places) > 1:
                places = [part for part in places if source[part.lineno - 1].strip().startswith(f"{blank} =")]
            indent = "    "
        assert len(places) == 1, (op, blank, places)
        (node,) = places
        source[node.lineno - 1 : node.end_lineno] = [indent + line for line in written.splitlines()]
        text = "\n".join(source) + "\n"
    return text


def named(words):
    """The kinds of mistakes that the words of hints name."""
    kinds = set()
    for hint in words:
        for part in hint.replace("; besides, a ", "; and ").replace("still wrong: ", "; and ").split("; and "):
            begin = part.removeprefix("sign, and ").partition(":")[0]
            if part.startswith("sign, and "):
                kinds.add("sign")
            kind = next((kind for start, kind in KINDS.items() if begin.startswith(start)), begin.partition(",")[0])
            kinds |= {kind} - {""}
    return kinds


def hints_for(op, text, cases={}):  # noqa: B006  (a case is made once)
    """What the hints say of a student's file: the kinds of mistakes in words."""
    lesson = LESSONS[op]
    if op not in cases:
        cases[op] = Case(lesson)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine.py"
        path.write_text(text, encoding="utf-8")
        try:
            with imports_beside(path):
                answer = Answer(path)
                results = answer.helpers(cases[op]) | answer.results(lesson, cases[op].arguments())
        except Wrong as error:
            return [str(error).partition("(hint: ")[2].rstrip(")").rpartition("do not fit; ")[2]]
    return [kind for hint in cases[op].hints(cases[op].compare(results)) for kind in hint.kinds]


def judged(meant, got):
    """How an answer counts: what it was meant to be, what was named."""
    meant = [{kind.strip() for kind in kinds.split("|")} for kinds in meant.split("+")]
    if not got:
        return "none"
    if not got <= set().union(*meant):
        return "wrong"
    return "right" if all(kinds & got for kinds in meant) else "part"


def measured():
    """[(group, op, lines, meant, named, how it counts)] of all answers."""
    rows = []
    for group, answers in ANSWERS.items():
        for op, lines, meant in answers:
            got = named(hints_for(op, student_text(op, lines)))
            rows.append((group, op, lines, meant, got, judged(meant, got)))
    return rows


def rates(rows):
    """{how it counts: share}."""
    count = collections.Counter(row[-1] for row in rows)
    return {how: count[how] / len(rows) for how in ("right", "part", "none", "wrong")}


def table(rows):
    """The confusion matrix as text: what was meant, what was named, how often."""
    groups = [(group, list(members)) for group, members in itertools.groupby(rows, lambda row: row[0])]
    lines = []
    for name, members in [*groups, *([("all", rows)] if len(groups) > 1 else [])]:
        shares = ", ".join(f"{share:.0%} {how}" for how, share in rates(members).items())
        lines.append(f"{name}: {len(members)} answers: {shares}")
    lines += ["", f"{'meant':<48} {'named':<48} answers"]
    count = collections.Counter((meant, " + ".join(sorted(got)) or "-", how) for *_, meant, got, how in rows)
    for (meant, got, how), n in sorted(count.items()):
        lines.append(f"{meant:<48} {got:<48} {n:>3}" + ("" if how == "right" else f"  {how}"))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    rows = measured()
    print(table(rows), end="")
    if "--write" in sys.argv[1:]:
        TABLE.write_bytes(table(rows).encode())
    if "--list" in sys.argv[1:]:
        for group, op, lines, meant, got, how in rows:
            if how != "right":
                print(f"\n{how}: {group}, {op}: meant {meant}; named {' + '.join(sorted(got)) or '-'}")
                print("\n".join(f"    {line}" for written in lines.values() for line in written.splitlines()))
