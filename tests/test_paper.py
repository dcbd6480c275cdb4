"""`python -m benchmarks.paper`: its small forms can be run. tests/test_docs.py parses its commands."""

import pytest

from benchmarks.paper.experiments import EXPERIMENTS
from rcmae.compare.race import arms


@pytest.mark.parametrize("name", [name for name, e in EXPERIMENTS.items() if e.races])
def test_the_arms_of_a_small_form_are_valid(name):
    for race in EXPERIMENTS[name].races:
        assert len(arms(race.arms)) == len(race.arms)
