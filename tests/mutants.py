"""`make mutants`: run the test that a break of tests/breaks.py names with the break applied, and see it fail; unbroken, all must pass.

`python -m tests.mutants WORD...` takes those whose names hold a word, `python -m tests.mutants 2/3` every third one from the third on.
"""

import importlib
import multiprocessing as mp
import os
import re
import sys
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.breaks import BREAKS, HERE

# Loaded once and handed down to every child: half of a short test's time. Not rcmae itself, which conftest imports its own way.
for library in ("torchvision.transforms.v2", "timm", "sklearn.linear_model", "matplotlib.figure", "jinja2", "beartype", "jaxtyping"):
    importlib.import_module(library)


def run(files: list[str], broken: str = "") -> tuple[int, str]:
    """pytest's exit code and what it printed, in a process of its own in which the break is applied by conftest."""
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
                os.environ["RCMAE_BREAK"] = broken
                quiet = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # of what is loaded already
                code = int(pytest.main([*(str(HERE / f) for f in files), *quiet, "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return code, said.read().decode(errors="replace")


def main(chosen: list[str]) -> int:
    """Print a line a break; 0 only if each made a test fail (not crash) and the unbroken code passes the same tests."""
    parts = [tuple(map(int, word.split("/"))) for word in chosen if re.fullmatch(r"\d+/\d+", word)]
    names = [
        name
        for place, name in enumerate(BREAKS)
        if not chosen or any(word in name for word in chosen) or any(place % of == part for part, of in parts)
    ]
    wrong = 0
    with ProcessPoolExecutor(2, mp.get_context("fork")) as pool:
        control = pool.submit(run, sorted({BREAKS[name][2] for name in names}))
        for name, (code, text) in zip(names, pool.map(run, [[BREAKS[name][2]] for name in names], names), strict=True):
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
