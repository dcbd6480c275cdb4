"""Whatever a run trains, its page and the commands speak of that and of nothing else. Over METHODS, so that a new method is held to it."""

import re
from pathlib import Path

import pytest

from rcmae import pretrain
from rcmae.config import Machine, flat
from rcmae.engine.metrics import read_metrics
from rcmae.methods import METHODS, Method
from rcmae.report import write_report
from tests.conftest import small
from tests.test_loop import folder  # noqa: F401 - a fixture
from tests.test_report import curves, part, words

FLAGS = {"gamma": lambda method: method.compare is not Method.compare, "half-life": lambda method: "teacher" in method.networks}
FLAGS |= dict.fromkeys(("momentum", "ema-updates"), FLAGS["half-life"])
"Flags that some methods have, and which."


@pytest.fixture(scope="module")
def runs(tmp_path_factory, folder):  # noqa: F811
    """A run of each method: six steps, each logged, probed at the end."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            out = made[name] = tmp_path_factory.mktemp("methods") / name
            recipe = small(name, data=str(folder), probes=1, probe_train=12, probe_test=12)
            pretrain(recipe, Machine(out=out, device="cpu", precision="fp32", workers=0, log_every=1))
        return made[name]

    return run


@pytest.mark.parametrize("name", METHODS)
def test_the_page_speaks_of_its_own_method(runs, request, name):
    """A sentence on its loss, figures with data only, the loss under its own name, and no flag that it does not have."""
    run, method = runs(name), METHODS[name]
    request.getfixturevalue("drawn")
    page = write_report(run).read_text()
    loss, *_ = method.figures()
    said = [words(item) for item in part(page, 'id="verdict"', "</ul>").split("<li")[1:]]
    assert any(f"{loss.ylabel} " in text for text in said), said
    assert not any("not finite" in text for text in said)
    figures = page.split("<figure")[1:]
    for figure in figures:
        assert max(map(len, curves(figure)), default=0) > 0, f"nothing is drawn in {words(figure)[:200]}"
    assert f">{loss.ylabel}<" in part(page, 'id="figure-loss"', "</figure>")
    own = {flag.replace("_", "-") for flag in [*flat(small(name)), *Machine.__dataclass_fields__]}
    own -= {flag for flag, has in FLAGS.items() if not has(method)}
    assert set(re.findall(r"--([a-z][a-z-]*)", words(page.split("<h2>Settings")[0]))) <= own


@pytest.mark.parametrize("name", METHODS)
def test_a_method_declares_what_it_logs(runs, name):
    """What `forward` returns is what `losses` names, and figures ask for keys that are logged."""
    train = [line for line in read_metrics(runs(name)) if line["kind"] == "train"]
    method = METHODS[name]
    assert all(key in line for line in train for key in method.losses)
    asked = [curve.key for figure in method.figures() for curve in figure.curves if isinstance(curve.key, str)]
    assert asked
    assert set(asked) <= set(method.losses)
