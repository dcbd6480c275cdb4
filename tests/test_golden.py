"""The golden step: has a change of code changed the numbers?"""

import json

import pytest

from rcmae.methods import METHODS
from tests.golden_steps import FILE, steps


@pytest.mark.parametrize("name", METHODS)
def test_golden_step(name):
    expected, found = json.loads(FILE.read_text())[name], steps(name)
    assert found == pytest.approx(expected, rel=1e-4), (
        "The numbers of a training step changed. If the change was to be neutral (a refactoring, a speed-up), this is a bug. "
        "If it was to change results: run `make golden`, commit tests/golden/steps.json with it, and say why in LOG.md."
    )
