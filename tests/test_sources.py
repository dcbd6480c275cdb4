"""A new kind of source needs one class and one line in SOURCES, and works with every command."""

import hashlib
import json

import numpy as np
import pytest

from rcmae.cli import main
from rcmae.compare.race import arms
from rcmae.config import RuntimeConfig
from rcmae.data import sources
from rcmae.data.base import OpenOptions, Source
from rcmae.data.loader import processes
from rcmae.errors import ConfigError
from rcmae.pretraining import pretrain
from rcmae.tasks.detection.coco import open_coco
from tests.conftest import small


class Stripes(Source):
    """Noise over stripes, horizontal or vertical."""

    form, kind, recipe, in_memory = "stripes:COUNT", "stripes", "bundled", True
    classes, notes = ("lying", "standing"), ("stripes lie or stand",)

    @classmethod
    def matches(cls, spec: str) -> bool:
        return spec.startswith("stripes:")

    @classmethod
    def open(cls, spec: str, options: OpenOptions) -> "Stripes":
        return cls(spec, options.size)

    @classmethod
    def parts(cls, spec: str) -> tuple[str, str] | None:
        return (spec, f"{spec}:test") if spec.count(":") == 1 else None

    def __init__(self, name: str, size: int):
        self.name, count = name, int(name.split(":")[1])
        rng = np.random.default_rng(name.endswith("test"))
        self.images = rng.integers(0, 100, (count, size, size, 3), dtype=np.uint8)
        self.images[::2, ::4] += 150
        self.images[1::2, :, ::4] += 150
        self.labels = np.arange(count) % 2

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        return self.images[index]

    def where(self, index: int) -> str:
        return f"{self.name}/{index}"

    def fingerprint(self) -> str:
        return hashlib.sha256(self.images.tobytes()).hexdigest()


@pytest.fixture(autouse=True)
def _register(monkeypatch):
    monkeypatch.setattr(sources, "SOURCES", (Stripes, *sources.SOURCES))


def test_a_new_kind_of_source_works_with_every_command(tmp_path, capsys):
    recipe = small(data="stripes:32", probes=1, probe_train=12, probe_test=12)
    result = pretrain(recipe, RuntimeConfig(out=tmp_path / "run", device="cpu"))
    assert result.step == 6 and result.probe
    assert "note: stripes lie or stand" in capsys.readouterr().out
    assert main(["check", "stripes:32", "--batch-size", "8", "--json", str(tmp_path / "report.json")]) == 0
    out, report = capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())
    assert "note: stripes lie or stand" in out and "stripes:32 (stripes)" in out
    assert out.count("stripes:32: read 32 images of 2 classes (lying, standing)") == 1
    assert (report["formats"], report["classes"]) == ({"pixels": 32}, {"lying": 16, "standing": 16})
    assert report["widths"] == [32] * 3, "the size of the recipe that the kind of source names"
    common = [
        "--device",
        "cpu",
        "--feature-cache",
        str(tmp_path / "cache"),
        "--out",
        str(tmp_path / "scores"),
        "--which",
        "teacher",
    ]
    assert main(["evaluate", "knn", str(tmp_path / "run"), "--data", "stripes:32", *common]) == 0
    out = capsys.readouterr().out
    assert "note: stripes lie or stand" in out and "32 test images" in out


def test_a_new_kind_of_source_is_listed_like_the_others(capsys):
    assert processes(sources.open_source("stripes:4"), None) == 0
    assert arms(["mae", "rcmae"], "stripes:32")[0].recipe.network == arms(["mae", "rcmae"])[0].recipe.network
    assert main(["check", "nowhere"]) == 3
    assert "bundled:scenes or stripes:COUNT" in capsys.readouterr().err
    assert main(["list"]) == 0
    assert "Noise over stripes" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="stripes:32 has no objects; there is bundled:scenes"):
        open_coco("stripes:32")
