"""The experiment on a folder of pictures."""

import functools

import numpy as np
import pytest
from PIL import Image

from benchmarks import pictures, runs
from rcmae.config import changed
from rcmae.data.sources import open_source

TINY = {
    "width": 16,
    "depth": 1,
    "heads": 2,
    "decoder_width": 8,
    "decoder_depth": 1,
    "decoder_heads": 1,
    "batch_size": 8,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three classes of 10 to 20 pictures, and an experiment of few steps on them."""
    rng, images = np.random.default_rng(0), tmp_path / "drawings"
    for name, count in (("red", 20), ("green", 15), ("blue", 10)):
        (images / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (70, 80, 3), np.uint8)).save(images / name / f"{i}.png")
    monkeypatch.setattr(pictures, "ROOT", tmp_path)
    monkeypatch.setattr(pictures, "RESULTS", runs.Results(tmp_path / "pictures.jsonl"))
    recipe, settings = pictures.recipe, ("steps=2", "batch_size=4", "warmup_epochs=0")
    monkeypatch.setattr(pictures, "recipe", lambda job: changed(recipe(job), **TINY))
    monkeypatch.setattr(pictures, "fine_tuned", functools.partial(runs.fine_tuned, settings=settings))
    return images


def names(part) -> set[str]:
    source = open_source(str(part))
    return {source.where(i).rpartition("/")[2] for i in range(len(source))}


def test_a_fifth_of_each_class_is_held_out(folder):
    first = pictures.divide(str(folder))
    parts = [open_source(str(pictures.folder_of(first) / "data" / name)) for name in ("train", "val")]
    counts = [dict(zip(part.classes, np.bincount(part.labels).tolist(), strict=True)) for part in parts]
    assert counts == [{"blue": 8, "green": 12, "red": 16}, {"blue": 2, "green": 3, "red": 4}]
    lists = [(pictures.folder_of(first) / "data" / f"{name}.txt").read_text() for name in ("train", "val")]
    assert len({*"".join(lists).splitlines()}) == 45, "no picture is in both parts"
    assert pictures.divide(str(folder)) == first
    assert lists[1] == (pictures.folder_of(first) / "data" / "val.txt").read_text(), "the same fifth again"


def test_a_tiny_experiment(folder):
    """Pre-training, the probe and fine-tuning of one seed, and the analysis of two."""
    which = pictures.divide(str(folder))
    jobs = list(pictures.jobs(which, steps=2, seed=1))
    assert len(jobs) == len(pictures.TASKS) * len(pictures.ARMS)
    for job in {job.run: job for job in jobs}.values():
        pictures.pretrain(job)
    for job in jobs:
        pictures.evaluate(job)
    assert not pictures.RESULTS.missing(jobs)
    lines = pictures.RESULTS.lines()
    assert {line["images"] for line in lines} == {9}
    assert "too few" in pictures.table(pictures.analysis(which, 2))
    for line in lines:
        pictures.RESULTS.append(line | {"seed": 2})
    results = pictures.analysis(which, 2)
    assert results["seeds"] == [1, 2] and pictures.analysis("others", 2)["seeds"] == []
    assert [len(results["against"][other]) for other in (pictures.START, pictures.MAE)] == [8, 6]
    text = pictures.table(results)
    assert "2 of 5 seeds" in text and "9 held-out pictures" in text
