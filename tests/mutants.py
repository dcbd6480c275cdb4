"""`make mutants`: run the test that a break of tests/breaks.py names with the break applied, and see it fail; unbroken, all must pass."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from tests.breaks import BREAKS, HERE


def run(files: list[str], broken: str = "") -> tuple[int, str]:
    """pytest's exit code and what it printed, in a process of its own in which the break is applied by conftest."""
    command = [sys.executable, "-m", "pytest", *(str(HERE / f) for f in files), "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=os.environ | {"RCMAE_BREAK": broken}, capture_output=True, text=True, cwd=HERE.parent)
    return done.returncode, done.stdout + done.stderr


def main(chosen: list[str]) -> int:
    """Print a line a break; 0 only if each made a test fail (not crash) and the unbroken code passes the same tests."""
    names = [name for name in BREAKS if not chosen or any(word in name for word in chosen)]
    wrong = 0
    with ThreadPoolExecutor(2) as pool:
        control = pool.submit(run, sorted({BREAKS[name][2] for name in names}))
        for name, (code, text) in zip(names, pool.map(lambda n: run([BREAKS[n][2]], n), names), strict=True):
            red = re.search(r"^FAILED (\S+)", text, re.MULTILINE)
            caught = code == 1 and red is not None
            wrong += not caught
            print(f"{'red     ' if caught else 'SURVIVED'} {name}: {red[1] if red else text[-300:]}", flush=True)
    if control.result()[0]:
        print(f"the unbroken code is red:\n{control.result()[1][-2000:]}")
        return 1
    print(f"{len(names) - wrong} of {len(names)} breaks made a test fail; the unbroken code passes")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
