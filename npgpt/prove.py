"""Gradients over exact numbers: that each backward is the derivative of its forward is proved, not measured.

gradcheck.py lets pass what is off by less than its bound.  Here nothing is rounded, so nothing has to pass.  The
references of npgpt/ops/ run, as they stand there, on integers modulo the prime 2^61 - 1 instead of floats
(study/field.py).  The derivative along a random direction, by forward mode, and what the gradients say of it must be
one and the same integer.  If they are the same for numbers drawn at random, they are the same for all numbers: two
different polynomials of degree d agree at a random point with probability d / p at most (Schwartz and Zippel).

    python -m npgpt.prove            every op, and every parameter of a two-layer GPT; exit code 1 if one is refused
"""

from npgpt.command import Parser, showing_all
from npgpt.errors import UsageError, run_command

PROG = "python -m npgpt.prove"
PROVED = """\
Proved: the formula of each backward is the derivative of its forward's formula; the GPT's by the engine's walk.
Rules: e^x, tanh x and the root of x are variables r, one for each x, with r' = r x', (1 - r^2) x' and x' / 2r; layer
norm's root is that for the eps with r^2 = var + eps.  A maximum is one of its elements, GELU's k and a are any numbers.
Not proved: how floats round, and that a kernel computes what its reference says.  Each kernel is held to its reference
by tests/test_ops.py, in float32 and float64, and to finite differences by python -m npgpt.gradcheck."""


@showing_all()
def main(argv=None):
    words = "Prove the backward of every op, and of a two-layer GPT, with integers modulo 2^61 - 1."
    codes = "exit codes: 0 proved, 1 a gradient is not the derivative of its forward, 2 usage"
    parser = Parser(prog=PROG, description=words, epilog=codes)
    parser.add_argument("--op", action="append", metavar="NAME", help="only what has this in its name (more: again)")
    parser.add_argument("--seed", type=int, default=0, help="what the numbers are drawn from (default: 0)")
    args = parser.parse_args(argv)
    from npgpt.study.proof import cases, certificate

    chosen = [case for case in cases() if not args.op or any(word.lower() in case[0].lower() for word in args.op)]
    if not chosen:
        titles = ", ".join(title for title, *_ in cases())
        raise UsageError(f"--op: nothing has {' or '.join(args.op)} in its name; there are: {titles}")
    print(f"The NumPy references over the integers modulo p = 2^61 - 1, seed {args.seed}:")
    print(f"{'op':<28} {'gradients of':<30} {'degree':>8} {'by chance':>9} {'seconds':>8}  verdict")
    wrong, worst, seconds = [], 0.0, 0.0
    for title, f, inputs, names in chosen:
        found = certificate(f, inputs, names, args.seed)
        what = ", ".join(name.split(".")[-1] for name in names) if len(names) < 6 else f"{len(names)} parameters"
        figures = f"{found.degree:>8,} {found.probability:>9.0e} {found.seconds:>8.2f}"
        print(f"{title:<28} {what:<30} {figures}  {'REFUSED' if found.wrong else 'proved'}")
        wrong += [f"{title}: the gradient of {name} is not the derivative of the forward" for name in found.wrong]
        worst, seconds = max(worst, found.probability), seconds + found.seconds
    print("\n".join(wrong) if wrong else PROVED)
    print(f"{'REFUSED' if wrong else 'proved'}: a wrong formula passes with a chance of {worst:.0e}; {seconds:.1f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    run_command(PROG, main)
