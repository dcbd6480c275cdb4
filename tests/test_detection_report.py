"""The page of a detector: it says what the files of the run say, of a run that has ended, stopped or failed to read something."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import rcmae.tasks.detection.train as dt
from rcmae.cli import main
from rcmae.errors import Preempted
from rcmae.tasks.detection.coco import SCENES, open_coco
from tests.test_detection_train import TINY, run
from tests.test_report import words

LONGER = dataclasses.replace(TINY, steps=15)
"scored twice"


@pytest.fixture(scope="module")
def sets():
    return open_coco(SCENES, train_images=8, test_images=3, size=64)


@pytest.fixture(scope="module")
def ended(tmp_path_factory, sets) -> Path:
    """A run that has ended. Not to be written to."""
    out = tmp_path_factory.mktemp("ended") / "detect"
    run(out, sets, LONGER)
    return out


@pytest.fixture
def copy(tmp_path, ended) -> Path:
    """The same, to be changed."""
    return shutil.copytree(ended, tmp_path / "detect", ignore=shutil.ignore_patterns("checkpoints", "export"))


def page(out: Path) -> str:
    """What the command writes."""
    assert main(["report", str(out)]) == 0
    return (out / "report.html").read_text()


def test_a_detector_that_was_stopped_has_a_page_too(tmp_path, sets, monkeypatch):
    update = dt.Run.update

    def stopped(self, batches, t):
        if t.step + 1 == 2:
            self.stop.asked = "SIGTERM"
        return update(self, batches, t)

    monkeypatch.setattr(dt.Run, "update", stopped)
    with pytest.raises(Preempted):
        run(tmp_path / "run", sets, log_every=1)
    text = page(tmp_path / "run")
    assert "Running or stopped at step 2 of 6: the same command goes on." in words(text)
    assert 'id="figure-losses"' in text and 'id="scores"' not in text and "Finished" not in words(text)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "Running or stopped before a step was recorded" in words(page(tmp_path / "run"))


def test_only_runs_that_have_a_page_get_one(tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text("steps = 3\nmixup = 0.8\n")
    assert main(["report", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "is a run of fine-tuning, which has no page" in err and err.count("\n") == 1
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "is no run directory: recipe.toml is missing" in capsys.readouterr().err
