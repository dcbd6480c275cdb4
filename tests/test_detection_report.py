"""The page of a detector agrees with the files of the run, whether it has finished, was stopped, or failed to
read images."""

import base64
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

import rcmae.tasks.detection.train as dt
from rcmae.cli import main
from rcmae.errors import Preempted
from rcmae.tasks.detection.coco import open_coco
from tests.conftest import stop_at
from tests.mutations import catches
from tests.test_detection_train import TINY, run
from tests.test_report import chromium, curves, part, run_directory, words

LONGER = dataclasses.replace(TINY, steps=15)
"Evaluated twice."
pytestmark = pytest.mark.usefixtures("drawn")


@pytest.fixture(scope="module")
def sets():
    return open_coco("bundled:scenes", train_images=8, test_images=3, size=64)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, sets) -> Path:
    """A finished run. Read only."""
    out = tmp_path_factory.mktemp("ended") / "detect"
    run(out, sets, LONGER)
    return out


@pytest.fixture
def copy(tmp_path, finished) -> Path:
    """A copy of the finished run that may be changed."""
    return shutil.copytree(
        finished, tmp_path / "detect", ignore=shutil.ignore_patterns("checkpoints", "export")
    )


def page(out: Path) -> str:
    """The page that the command writes."""
    assert main(["report", str(out)]) == 0
    return (out / "report.html").read_text()


@catches(
    "pictures are shown with another range than those of the training",
    "rcmae.report.detection_page:decode",
    lambda old: lambda *more, bits: old(*more),
)
def test_images_are_shown_as_they_are_trained_on(tmp_path, finished, capsys):
    detector = shutil.copytree(finished / "export" / "detector", tmp_path / "detector")
    config = json.loads((detector / "config.json").read_text())
    config["rcmae"]["bits"] = 12
    (detector / "config.json").write_text(json.dumps(config))
    Image.fromarray(np.full((64, 64), 4000, np.uint16)).save(tmp_path / "x.png")
    out = ["--threshold", "1", "--device", "cpu", "--out", str(tmp_path / "out")]
    show = ["detect", "show", str(detector), str(tmp_path / "x.png"), *out]
    for options, brightness in (([], 249), (["--range", "dtype"], 16)):
        assert main([*show, *options]) == 0
        assert np.median(np.asarray(Image.open(tmp_path / "out" / "x.png").convert("L"))) == brightness
    assert main([*show, "--max-pixels", "4000"]) == 3
    assert "64 x 64 is above the limit of 4,000 pixels, see --max-pixels" in capsys.readouterr().err
    assert main(["detect", "eval", str(finished), "--max-pixels", "9", "--out", str(tmp_path / "e")]) == 3
    assert "images of more than 9 pixels, see --max-pixels" in capsys.readouterr().err


def test_a_detector_that_was_stopped_has_a_page_too(tmp_path, sets, monkeypatch):
    stop_at(monkeypatch, dt.DetectionTraining, 2)
    with pytest.raises(Preempted):
        run(tmp_path / "run", sets, log_every=1)
    text = page(tmp_path / "run")
    assert "Stopped at step 2 of 6: the same command resumes it." in words(text)
    assert 'id="figure-losses"' in text and 'id="scores"' not in text and "Finished" not in words(text)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "Stopped before its first recorded step" in words(page(tmp_path / "run"))


def test_report_rejects_runs_without_a_page(tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text("steps = 3\nmixup = 0.8\n")
    assert main(["report", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "is a run of fine-tuning, which has no page" in err and err.count("\n") == 1
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "is no run directory: recipe.toml is missing" in capsys.readouterr().err


def cells(page: str, table: str) -> list[list[str]]:
    """The rows of a table as text, without its header."""
    body = part(part(page, f'<table id="{table}"', "</table>"), "<tbody>", "</tbody>")
    return [
        [words(cell).strip() for cell in re.findall(r"<td.*?</td>", row)]
        for row in re.findall(r"<tr>.*?</tr>", body)
    ]


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def test_the_page_agrees_with_the_scores(copy):
    scores = json.loads((copy / "scores.json").read_text())
    for k, name in enumerate(("box", "mask")):  # not reached in 15 steps, and all different
        for j, values in enumerate((scores[name]["stats"], scores[name]["per_class"])):
            values.update({key: 0.123 + 0.02 * i + 0.3 * k + 0.007 * j for i, key in enumerate(values)})
    scores["mask"]["stats"]["AP_small"] = scores["mask"]["per_class"]["7"] = None
    scores["mask"]["objects"] = {name: 1200 + i for i, name in enumerate(scores["mask"]["per_class"])}
    (copy / "scores.json").write_text(json.dumps(scores))
    text = page(copy)
    box, mask = (scores[name]["stats"] for name in ("box", "mask"))
    verdict = words(part(text, 'id="verdict"', "</ul>"))
    assert (
        f"Finished: box AP {percent(box['AP'])}, mask AP {percent(mask['AP'])} on 3 test images." in verdict
    )
    assert (
        f"box AP50 is {percent(box['AP50'])} and mask AP50 {percent(mask['AP50'])}; of all objects "
        f"{percent(mask['AR100'])} %" in verdict
    )
    known = {name: ap for name, ap in scores["mask"]["per_class"].items() if ap is not None}
    hardest = min(known, key=known.get)
    assert (
        f"hardest of {len(known)} classes is {hardest} (mask AP {percent(known[hardest])} on "
        f"{scores['mask']['objects'][hardest]:,} objects)"
        in verdict
        and "could not be read" not in verdict
    )
    assert cells(text, "scores") == [
        [name, *map(percent, scores[name]["stats"].values())] for name in ("box", "mask")
    ]
    assert cells(text, "scores")[1][4] == "–" and len(box) == len(mask) == 12
    assert cells(text, "classes") == [
        [c, *(percent(scores[p]["per_class"][c]) for p in ("box", "mask"))] for c in map(str, range(10))
    ]


def test_the_page_is_complete(copy):
    text = page(copy)
    for figure in ("progress", "curves", "losses"):
        assert len(max(curves(part(text, f'id="figure-{figure}"', "</figure>")), key=len, default=[])) > 1, (
            f"{figure} has no curve"
        )
    for examples in ("first", "worst"):
        bundled = re.findall('src="data:image/webp;base64,([^"]+)"', part(text, f'id="{examples}"', "</div>"))
        sizes = [Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in bundled]
        assert len(sizes) == 3 and all(width > 1.5 * height for width, height in sizes), (
            "ground truth and detections side by side"
        )
    assert "Learning rate: warm-up, then steps." in words(text)
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?\s*(?:https?:|//)""", text), (
        "no external resources"
    )
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_examples_of_an_earlier_version_are_one_line(copy, capsys):
    """They had other names for the same things."""
    file = copy / "examples.safetensors"
    with safe_open(file, "np") as f:
        about, pixels = f.metadata()["about"], {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    save_file(pixels, file, {"about": about.replace('"predictions"', '"found"')})
    assert main(["report", str(copy)]) == 4
    *progress, error = capsys.readouterr().err.strip().splitlines()
    assert "is of an earlier version or damaged; the same `rcmae detect train`" in error
    assert all(line.endswith(("so far", "left")) for line in progress), "printed on a slow machine"
    file.unlink()
    assert 'id="first"' not in page(copy)


def test_images_that_could_not_be_read_are_named(copy):
    for name, where in (("bad_files", "a<b>.png"), ("bad_test_files", "c.png"), ("bad_test_files", "d.png")):
        with (copy / f"{name}.jsonl").open("a") as f:
            f.write(json.dumps({"index": 1, "where": where, "reason": "truncated"}) + "\n")
    text = page(copy)
    verdict = words(part(text, 'id="verdict"', "</ul>"))
    assert "1 image could not be read; others were used instead" in verdict
    assert "2 test images could not be read: left out of the scores, listed below." in verdict
    assert cells(text, "bad") == [["a<b>.png", "truncated"]] and cells(text, "bad-test") == [
        ["c.png", "truncated"],
        ["d.png", "truncated"],
    ]


def test_the_report_of_the_backbone_shows_its_detector(tmp_path, finished):
    backbone = run_directory(tmp_path / "run", teacher=False)
    assert 'id="detector"' not in page(backbone)
    (backbone / "detect").mkdir()
    scores = json.loads((finished / "scores.json").read_text()) | {"network": "teacher", "data_name": "a<b>"}
    scores["box"]["stats"]["AP"], scores["mask"]["stats"]["AP"] = 0.314, 0.271
    (backbone / "detect" / "scores.json").write_text(json.dumps(scores))
    text = page(backbone)
    aps = [percent(scores[name]["stats"]["AP"]) for name in ("box", "mask")]
    assert cells(text, "detector") == [
        ["detection, vitdet", "teacher", "a<b>", "8", *aps]
    ] and "On labeled images" in words(text)


@pytest.mark.browser
def test_the_page_fits_the_window_of_a_browser(copy):
    """In headless Chromium, as wide as a phone and as a desktop: no wider than the window, with pictures and
    figures that have a size."""
    (copy / "bad_test_files.jsonl").write_text(
        json.dumps({"index": 1, "where": "images/" + "long_name" * 20, "reason": "truncated"}) + "\n"
    )
    text = page(copy).replace("<details", "<details open")
    for width in (390, 1280):
        layout = chromium(
            text,
            copy,
            width,
            over="document.documentElement.scrollWidth - window.innerWidth",
            widths='[...document.querySelectorAll("figure svg, img.wide")]'
            ".map(e => e.getBoundingClientRect().width)",
        )
        assert layout["over"] <= 0 and len(layout["widths"]) == 13 and min(layout["widths"]) > 300, layout
