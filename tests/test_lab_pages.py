"""The pages of the lab: measured and expected values, readable on a phone."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rcmae.lab import gradients, linear_experiment
from rcmae.lab.linear_controls import CONTROLS, ControlSettings
from rcmae.lab.linear_experiment import RELATIONS, LinearSettings, run_linear
from tests.test_gradients import about, rows_of

BLOCKS = ["encoder patch_embed", "encoder 0", "encoder norm", "decoder embed", "decoder pred"]
FEW = ControlSettings(lengths=(5, 10), tuning=2, seeds=2, rates=2)
pytestmark = pytest.mark.usefixtures("drawn")


@pytest.fixture(scope="module")
def linear_page(tmp_path_factory) -> Path:
    """The page of a small linear experiment: the table's values are not those of the default setting."""
    return linear_experiment.write_linear_page(
        run_linear(LinearSettings(width=64, rank=4, steps=20, seeds=1), controls=FEW),
        tmp_path_factory.mktemp("linear"),
    )


@pytest.fixture
def gradients_page(tmp_path) -> Path:
    """A page of gradients with synthetic values."""
    rows = rows_of(0.4, 0.1)
    for row in rows:
        row["by_block"] = {
            name: {b: first + 0.1 * i for i, b in enumerate(BLOCKS)}
            for name, first in (("same", 0.3), ("other", 0.1))
        }
    return gradients.write_gradients_page(gradients.analyzed(about(rows, whole_images=True), rows), tmp_path)


def words(page: str) -> str:
    return re.sub(
        r"\s+",
        " ",
        html.unescape(re.sub("<[^>]+>", " ", re.sub("<style.*?</style>", "", page, flags=re.DOTALL))),
    )


def curves(svg: str) -> dict[str, list[float]]:
    """Heights of the longest curve of each color, in points above the bottom."""
    paths = re.findall(r'<path d="([^"]+)" clip-path="[^"]+" style="[^"]*var\(--(\w+)\)', svg)
    paths.sort(key=lambda path: len(path[0]))
    return {color: [-float(y) for _, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", d)] for d, color in paths}


def test_the_linear_page_shows_reference_and_measured_values(linear_page):
    page = linear_page.read_text()
    rows = re.findall(r"<tr>(.*?)</tr>", page.split('id="correction"')[1].split("</table>")[0], re.DOTALL)[2:]
    table = json.loads((linear_page.parent / "linear.json").read_text())["table"]
    assert len(rows) == 9
    for i, row in enumerate(rows):
        cells = re.findall("<td[^>]*>(.*?)</td>", row)
        optimizer, alpha = table[3 * i]["optimizer"], table[3 * i]["alpha"]
        expected = linear_experiment.REFERENCE.get((optimizer, alpha))
        assert cells[:2] == [linear_experiment.NAMES[optimizer], str(alpha)]
        for k in range(len(RELATIONS)):
            measured = f"{table[3 * i + k]['previous']:.3f}".replace("-0.000", "0.000").replace("-", "−")
            reference = f"{expected[k]:.3f}".replace("-", "−") if expected else "–"
            assert cells[2 + 2 * k : 4 + 2 * k] == [measured, reference]
    assert "−0.982" in page
    assert "−0.757" in page


def test_the_linear_page_states_that_the_teacher_slows_descent(linear_page):
    """It states that the teacher slows noise-free descent, and its numbers show it."""
    text = words(linear_page.read_text())
    assert "Without noise the teacher does not speed descent up" in text
    descent = json.loads((linear_page.parent / "linear.json").read_text())["descent"]
    steps = [d["steps"] for d in descent.values()]
    assert steps == sorted(steps)
    for name, d in descent.items():
        assert f"{name} {d['limit']:.2f} {d['steps']:,}" in text


def test_the_curves_of_the_linear_figures_are_ordered_by_memory(linear_page):
    """The longer the memory, the higher the momentum of rare directions, and the more error is left."""
    page = linear_page.read_text()
    for figure, index in (("momentum", 0), ("descent", -1)):
        heights = curves(page.split(f'id="figure-{figure}"')[1].split("</figure>")[0])
        ends = [heights[f"memory{k}"][index] for k in (1, 2, 3)]
        assert ends == sorted(ends)
        assert len(set(ends)) == 3


def test_the_gradients_page_shows_the_contrast(gradients_page):
    page = gradients_page.read_text()
    text = words(page)
    assert re.search(r"S − T, all past updates 0\.\d{3} 0\.\d{3} to 0\.\d{3} 0\.\d{3}", text)
    assert (
        "The removal of past updates is mostly conditional: of what the consistency gradient removes" in text
    )
    assert "over 5 runs, each the mean of its blocks" in text and "new crops are the same crops" in text
    heights = curves(page.split('id="figure-lags"')[1].split("</figure>")[0])
    assert min(heights["memory2"]) > max(heights["baseline"])
    for label in ("patch embed", "pred", "encoder, then decoder"):
        assert f">{label}<" in page


def test_the_linear_page_shows_the_controls_and_their_verdicts(linear_page):
    text = words(linear_page.read_text())
    controls = json.loads((linear_page.parent / "linear.json").read_text())["controls"]
    assert len(controls["rows"]) == 28 and controls["comparisons"] == 22
    for arm in CONTROLS.values():
        assert f"Teacher against {arm}: " in text
    assert "corrected for 22 comparisons" in text
    table = linear_page.read_text().split('id="controls"')[1].split("</table>")[0]
    assert table.count("<tr>") == 2 + 14 and table.count("<td>SGD</td>") == 1


@pytest.mark.browser
@pytest.mark.parametrize("name", ["linear_page", "gradients_page"])
def test_the_page_fits_a_phone(tmp_path, request, name):
    """In headless Chromium at 390 px: the page is no wider than the window, and every figure has a size."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium on this machine; CI installs Debian's")
    page = tmp_path / "page.html"
    probe = """<script>window.addEventListener("load", () => { document.title = JSON.stringify({
        over: document.documentElement.scrollWidth - window.innerWidth,
        figures: [...document.querySelectorAll("figure svg")].map(e => e.getBoundingClientRect().width)
        }) })</script></body>"""
    page.write_text(request.getfixturevalue(name).read_text().replace("</body>", probe))
    command = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=390,900",
        "--virtual-time-budget=3000",
        "--dump-dom",
        page.as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    layout = json.loads(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1])
    assert layout["over"] <= 0
    assert len(layout["figures"]) >= 2
    assert min(layout["figures"]) > 200
