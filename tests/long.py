"""What takes too long for every change: to be run by hand, when what it is about has changed.

    python tests/long.py             the list
    python tests/long.py NAME ...    run these, one after the other
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent

# name -> (what it is, how long it takes on two cores, script and arguments)
CHECKS = {
    "endurance": ("kills, full disks, damaged files, signals, races, memory", "50 minutes", "endurance.py"),
    "clock": ("20 kills of a run that the clock alone saves", "6 minutes", "endurance.py clock"),
    "processors": ("the tests of what computes, with AVX2 only and with SSE only", "8 minutes", "elsewhere.py"),
    "processors-all": ("the whole suite, with AVX2 only and with SSE only", "15 minutes", "elsewhere.py --all"),
    "library": ("2,000 random models through all that the library does", "8 minutes", "fuzz_library.py --show"),
    "bounds": ("the tests of what computes, with each access to an array checked", "2 minutes", "test_bounds.py"),
    "commands": ("500 random command lines", "1 minute", "fuzz_commands.py"),
    "draft": ("1,000 generations of each kind with drafts and without", "3 minutes", "test_draft.py"),
    "folders": ("200 Hugging Face folders beside transformers, which must be installed", "1 minute", "fuzz_folders.py"),
    "audit": ("wrong gradients planted in live trainings: audits must end them", "30 minutes", "mutation.py --audit"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CHECKS))
    names = parser.parse_args().names
    if unknown := [name for name in names if name not in CHECKS]:
        parser.error(f"there is no {unknown[0]}; there are {', '.join(CHECKS)}")
    if not names:
        for name, (what, long, _) in CHECKS.items():
            print(f"{name:<16}{what}; {long}")
    failed = []
    for name in names:
        script, *args = CHECKS[name][2].split()
        start = time.perf_counter()
        code = subprocess.run([sys.executable, str(TESTS / script), *args]).returncode
        print(f"{name}: exit code {code} after {time.perf_counter() - start:.0f} s", flush=True)
        failed += [name] if code else []
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
