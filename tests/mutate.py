"""`make mutations`: for each mutation that a test registers with `catches`, run the test on the mutated code
and expect it to fail. On the original code, all of them must pass.

`python -m tests.mutate WORD...` runs those with a word in their key, "test_module: description";
`python -m tests.mutate 2/6` runs every sixth one, beginning with index 2.
"""

import importlib
import multiprocessing as mp
import os
import re
import sys
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

# Imported once for all child processes: half of the time of a short test. Not rcmae, which tests/conftest.py
# imports with checks of shapes.
for library in (
    "torchvision.transforms.v2",
    "timm",
    "sklearn.linear_model",
    "matplotlib.figure",
    "jinja2",
    "beartype",
    "jaxtyping",
):
    importlib.import_module(library)

FORK = mp.get_context("fork")
QUIET = ["-W", "ignore::pytest.PytestAssertRewriteWarning", "-q", "-p", "no:cacheprovider"]


def tests_by_mutation() -> dict[str, str]:
    """The test of each mutation. To be called in a process of its own, since it imports rcmae."""
    importlib.import_module("tests.conftest")
    return {
        key: mutation.test for key, mutation in importlib.import_module("tests.mutations").collect().items()
    }


def run(tests: list[str], mutation: str = "") -> tuple[int, str]:
    """The exit code and output of pytest in a new process, where tests/conftest.py applies the mutation."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
                os.environ["RCMAE_MUTATION"] = mutation
                paths = [str(Path(__file__).parent / test) for test in tests]
                code = int(pytest.main([*paths, *QUIET, "-x", "-n", "0"]))
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return code, output.read().decode(errors="replace")


def main(words: list[str]) -> int:
    """Print a line per mutation. Returns 0 only if each makes its test fail (not crash) and the original code
    passes."""
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    slices = [tuple(map(int, word.split("/"))) for word in words if re.fullmatch(r"\d+/\d+", word)]
    with ProcessPoolExecutor(1, FORK) as pool:
        tests = pool.submit(tests_by_mutation).result()
    keys = [
        key
        for index, key in enumerate(tests)
        if not words
        or any(word in key for word in words)
        or any(index % count == start for start, count in slices)
    ]
    survivors = 0
    with ProcessPoolExecutor(2, FORK) as pool:
        original = pool.submit(run, sorted({tests[key] for key in keys}))
        results = pool.map(run, [[tests[key]] for key in keys], keys)
        for key, (code, output) in zip(keys, results, strict=True):
            failed = re.search(r"^FAILED (\S+)", output, re.MULTILINE)
            caught = code == 1 and failed is not None
            survivors += not caught
            print(
                f"caught   {key}" if caught else f"SURVIVED {key} ({tests[key]}): {output[-300:]}", flush=True
            )
    code, output = original.result()
    if code:
        print(f"the tests fail on the original code:\n{output[-2000:]}")
        return 1
    print(f"{len(keys) - survivors} of {len(keys)} mutations were caught; the original code passes")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
