"""The end of `rcmae check`: the command for a set of images on this machine."""

import functools
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from rcmae import planning
from rcmae.cli import main
from rcmae.config import changed, to_toml
from rcmae.data import sources
from rcmae.data.sources import kind_of, open_source
from rcmae.engine.console import Screen
from rcmae.methods.recipes import load_recipe
from rcmae.planning import lines, plan, suggested

from .conftest import small
from .images import encode, photograph, ramp, tiff


@pytest.fixture
def recipe(tmp_path):
    """A recipe file for 24 images of two classes."""
    for i in range(24):
        (tmp_path / "set" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / "ab"[i % 2] / f"{i}.png").write_bytes(encode(ramp(20 + i, 30)))
    path = tmp_path / "small.toml"
    path.write_text(to_toml(changed(small(probes=1), steps=None)))
    return path


def planned(recipe, monkeypatch, step, reading=(0.0, 0.0, 1000.0), **changes):
    monkeypatch.setattr(planning, "measure_step", lambda run: step)
    monkeypatch.setattr(planning, "_reading", lambda run: reading)
    monkeypatch.setattr(planning, "_probing", lambda run: 0.0)
    monkeypatch.setattr(planning, "_waiting", lambda run: 0.0)
    monkeypatch.setattr(planning, "processes", lambda source, workers: 1)
    loaded = changed(load_recipe(str(recipe)), data=str(recipe.parent / "set"), **changes)
    return plan(str(recipe), loaded, open_source(loaded.data), Screen(False))


def test_check_ends_with_a_command_that_runs(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    opened = []
    monkeypatch.setattr(sources, "kind_of", lambda spec: opened.append(spec) or kind_of(spec))
    args = ["check", "set", "--recipe", "small.toml", "--batch-size", "12", "--json", "check.json"]
    assert main(args) == 0
    output = capsys.readouterr().out
    assert opened == ["set"]
    assert re.search(r"│ crop +│ 16 x 16 px +│", output), "none is smaller"
    command = re.search(r"^ +(rcmae pretrain .*)$", output, re.M)[1]
    written = json.loads(Path("check.json").read_text())
    assert written["plan"]["command"] == command and written["smaller_than_crop"] == 0
    assert all(written["plan"][key] > 0 for key in ("seconds", "memory", "disk"))
    words = shlex.split(command)[1:]
    steps = int(words[words.index("--steps") + 1])
    assert steps >= planning.SHORTEST * 2 and "--batch-size" in words
    words[words.index("--steps") + 1] = "2"
    assert main(words) == 0
    run = load_recipe(str(tmp_path / "runs" / "set" / "recipe.toml"))
    assert run == changed(load_recipe("small.toml"), data="set", batch_size=12, steps=2)


def test_the_length_follows_the_speed_and_the_number_of_images(recipe, monkeypatch):
    """24 images in batches of 8; 25 minutes on a CPU."""
    usual = planned(recipe, monkeypatch, step=0.5)
    assert usual.steps == 3000 and usual.seconds == 1500 and usual.epochs == 1000
    assert usual.longer == {6000: 3000, 12000: 6000, 24000: 12000}
    slow = planned(recipe, monkeypatch, step=100.0)
    assert slow.epochs == planning.SHORTEST and slow.seconds == 6000
    fast = planned(recipe, monkeypatch, step=0.001)
    assert fast.steps == 50_000 and not fast.longer, "400,000 samples, all that so few images bear"
    given = planned(recipe, monkeypatch, step=0.5, epochs=7.0)
    assert given.steps == 21 and not given.longer


def test_packing_is_suggested_where_it_saves_time(recipe, monkeypatch):
    slow = planned(recipe, monkeypatch, step=0.8, reading=(0.1, 0.001, 1000.0))
    assert slow.pack.startswith("rcmae pack ") and slow.packed_seconds < 0.6 * slow.seconds
    assert slow.packed_bytes == 24_000 and slow.pack in "\n".join(lines(slow))
    assert not planned(recipe, monkeypatch, step=0.8, reading=(0.01, 0.001, 1000.0)).pack


def test_packing_saves_the_time_of_reading_or_of_waiting_for_it():
    """Steps of 1 s; reading a batch takes one process 1.2 s, packed 0.2."""
    step = functools.partial(planning._packed_step, 1.0, 1.2, 0.2)
    assert step(waiting=0.0, workers=1, shared=True) == 0.5, "two cores share a second of work less"
    assert step(waiting=0.0, workers=4, shared=False) == 1.0, "a device that never waits"
    assert step(waiting=0.9, workers=4, shared=False) == pytest.approx(0.1)
    assert step(waiting=0.9, workers=1, shared=False) == 0.2, "the loader is still the slower one"


def test_reading_originals_and_packed_images_is_measured(tmp_path, monkeypatch):
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(encode(photograph(1200, 1600), "JPEG"))
    monkeypatch.setattr(planning, "measure_step", lambda run: 0.1)
    monkeypatch.setattr(planning, "_waiting", lambda run: 0.0)
    measured = []
    reading = planning._reading
    monkeypatch.setattr(planning, "_reading", lambda run: measured.append(reading(run)) or measured[0])
    small = changed(load_recipe("small"), data=str(tmp_path), batch_size=8)
    plan("small", small, open_source(small.data), Screen(False))
    original, packed, size = measured[0]
    assert original > 2 * packed > 0 and 1000 < size < 50_000


def test_the_recipe_follows_the_size_of_the_images_and_the_device(monkeypatch):
    assert suggested(500) == ("small", {}) and suggested(40) == ("small", {"size": 32, "patch": 4})
    gpu = type("device", (), {"type": "cuda"})
    monkeypatch.setattr(planning, "pick_device", lambda name: gpu)
    assert suggested(500) == ("folder", {}) and suggested(100) == ("small", {})


def test_names_in_commands_are_those_of_folders_and_files(tmp_path, monkeypatch):
    for name in ("v1.2", "-odd"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert planning._label(".") == planning._label(str(tmp_path / name)) == name.lstrip("-")
    assert planning._label("some/list.txt") == "list"


def test_images_that_cannot_be_packed_smaller_have_a_plan(tmp_path, monkeypatch):
    for i in range(8):
        bands = np.full((150, 150, 5), 10 * i, np.uint8)
        (tmp_path / f"{i}.tif").write_bytes(tiff(bands, photometric="minisblack", planarconfig="contig"))
    monkeypatch.setattr(planning, "measure_step", lambda run: 0.1)
    monkeypatch.setattr(planning, "_waiting", lambda run: 0.0)
    recipe = changed(load_recipe("small"), data=str(tmp_path), batch_size=8, channels=5)
    assert not plan("small", recipe, open_source(recipe.data, 5), Screen(False)).pack


def test_a_set_that_is_large_enough_for_the_suggested_recipe_is_fit(tmp_path, monkeypatch, capsys):
    """The recipe `folder` has batches of 256, `small` of 128."""
    monkeypatch.setattr(planning, "measure_step", lambda run: 0.1)
    monkeypatch.setattr(planning, "_waiting", lambda run: 0.0)
    for i in range(130):
        (tmp_path / f"{i}.png").write_bytes(encode(ramp(16, 20 + i)))
    assert main(["check", str(tmp_path)]) == 0
    assert "rcmae pretrain small" in capsys.readouterr().out


def test_commands_name_what_does_not_exist_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set" / "train").mkdir(parents=True)
    assert planning._label("set/train") == "set-train" and planning._label("shards.tar") == "shards"
    assert planning._unused(tmp_path / "runs") == str(tmp_path / "runs")
    for name in ("runs", "runs-2"):
        (tmp_path / name).mkdir()
    assert planning._unused(tmp_path / "runs") == str(tmp_path / "runs-3")
