"""Deliberate mutations of the code, each registered beside the test that must catch it; tests/mutate.py runs
them."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar


class Mutation(NamedTuple):
    target: str
    make: Callable[[Any], Any]
    test: str


MUTATIONS: dict[str, Mutation] = {}
'Keys: "test_module: description". Filled when the modules of the tests are imported.'


Test = TypeVar("Test", bound=Callable[..., None])


def catches(
    description: str, target: str, make: Callable[[Any], Any], case: str = ""
) -> Callable[[Test], Test]:
    """Decorate a test that must fail when the object at `target`, "module:Class.name", is replaced by
    make(object). `case` is the id of one case of a parametrized test."""

    def register(test: Test) -> Test:
        module = test.__module__.removeprefix("tests.")
        mutation = Mutation(target, make, f"{module}.py::{test.__name__}" + (f"[{case}]" if case else ""))
        known = MUTATIONS.setdefault(f"{module}: {description}", mutation)
        assert known.test == mutation.test, f"two mutations are called {description!r}"
        return test

    return register


def collect() -> dict[str, Mutation]:
    """All mutations, from all test modules."""
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        importlib.import_module(f"tests.{file.stem}")
    return MUTATIONS


def apply(key: str) -> None:
    """Mutate the code of this process."""
    loaded = set(sys.modules)
    importlib.import_module("tests." + key.partition(":")[0])
    target, make, _ = MUTATIONS[key]
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, name, make(getattr(owner, name)))
    # These modules hold references to the original, and must be imported again.
    for each in [each for each in sys.modules.keys() - loaded if each.startswith(("tests.", "benchmarks."))]:
        parent, _, child = each.rpartition(".")
        del sys.modules[each]
        if parent in sys.modules:
            delattr(sys.modules[parent], child)
