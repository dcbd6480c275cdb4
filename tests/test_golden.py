"""The golden steps: did a change of the code change the numbers?"""

import json

import pytest

from rcmae.methods import METHODS
from tests.golden_steps import FILE, steps
from tests.mutations import catches


@catches(
    "predictions are 0.1 % too large",
    "rcmae.models.autoencoder:Autoencoder.forward",
    lambda old: lambda self, patches, order, visible: old(self, patches, order, visible) * 1.001,
)
@pytest.mark.parametrize("name", METHODS)
def test_golden_step(name):
    expected, computed = json.loads(FILE.read_text())[name], steps(name)
    assert computed == pytest.approx(expected, rel=1e-4), (
        "The numbers of a training step changed. If the change was to be neutral (a refactoring, a "
        "speed-up), this is a bug. "
        "If it was to change results: run `make golden`, commit tests/golden/steps.json with it, and say why "
        "in LOG.md."
    )
