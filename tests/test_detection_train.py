"""Training a detector: it learns, resumes exactly, and its files can be used by other programs."""

import contextlib
import copy
import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

import rcmae.tasks.detection.commands as commands
import rcmae.tasks.detection.examples as keeping
import rcmae.tasks.detection.train as dt
from rcmae.cli import main
from rcmae.config import RuntimeConfig, how_many, to_toml
from rcmae.data.digits import write_coco
from rcmae.engine.checkpoint import checkpoints
from rcmae.engine.console import Screen
from rcmae.engine.distributed import World
from rcmae.engine.metrics import read_metrics
from rcmae.engine.run import RunContext
from rcmae.engine.schedules import Progress
from rcmae.errors import CheckpointError, ConfigError, DataError, Preempted
from rcmae.interop.timm_export import export
from rcmae.models.backbone import Backbone
from rcmae.models.encoder import build_vit
from rcmae.tasks.detection.average_precision import evaluate, load_results
from rcmae.tasks.detection.coco import open_coco, open_test, sample_images
from rcmae.tasks.detection.commands import run_folder
from rcmae.tasks.detection.examples import read_examples
from rcmae.tasks.detection.files import load_detector
from rcmae.tasks.detection.predict import Predictions, predict
from rcmae.tasks.detection.settings import DetectionOptions, DetectionRecipe, check, load_detect
from tests.conftest import stop_at
from tests.mutations import catches

CPU = torch.device("cpu")
TINY = DetectionRecipe(
    steps=6,
    size=64,
    jitter=(0.8, 1.25),
    flip=True,
    window=0,
    rel_pos=False,
    scales=(2.0, 1.0),
    width=16,
    box_width=32,
    box_convs=1,
    mask_convs=1,
    proposals=20,
    drop_path=0.2,
    layer_decay=0.8,
    batch_size=4,
    lr=2e-3,
    warmup_steps=2,
    clip=1.0,
)


def backbone(seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return Backbone(
        build_vit(size=32, channels=3, patch=8, width=24, depth=2, heads=2, registers=0),
        (0.5,) * 3,
        (0.25,) * 3,
    )


@pytest.fixture(scope="module")
def sets():
    return open_coco("bundled:scenes", train_images=8, test_images=4, size=64)


def run(
    out: Path, sets, settings: DetectionRecipe = TINY, pretrained: Backbone | None = None, **runtime
) -> dt.Detected:
    options = {"device": "cpu", "precision": "fp32", "workers": 0, "save_every": "1h"}
    return dt.train(
        pretrained or backbone(),
        *sets,
        settings,
        RuntimeConfig(out=out, **(options | runtime)),
        {"backbone_name": "tiny"},
    )


def weights(out: Path) -> str:
    """One hash of the saved model and optimizer."""
    last = checkpoints(out / "checkpoints")[0]
    return hashlib.sha256(
        b"".join((last / f"{n}.safetensors").read_bytes() for n in ("model", "optimizer"))
    ).hexdigest()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, sets) -> tuple[Path, dt.Detected]:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    return out, run(out, sets)


SHORT = dataclasses.replace(TINY, steps=3, warmup_steps=1)


@catches(
    "a resumed run samples other proposals",
    "rcmae.tasks.detection.train:path_seed",
    lambda old, draws=iter(range(10**6)): lambda seed, step, part: old(seed, next(draws), part),
)
@pytest.mark.parametrize(
    ("stops", "settings", "runtime"),
    [
        ((1,), TINY, {}),
        ((3, 4), TINY, {}),
        ((2,), dataclasses.replace(SHORT, preset="benchmarking"), {}),
        ((2,), SHORT, {"precision": "bf16", "accumulate": 2}),
    ],
    ids=["early", "twice", "benchmarking", "bf16 in two parts"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    tmp_path, sets, uninterrupted, monkeypatch, stops, settings, runtime
):
    expected = (
        uninterrupted
        if settings is TINY
        else (tmp_path / "whole", run(tmp_path / "whole", sets, settings, **runtime))
    )
    for stop in stops:
        with monkeypatch.context() as patch:
            stop_at(patch, dt.DetectionTraining, stop)
            with pytest.raises(Preempted, match=f"SIGTERM; saved at step {stop}, run the same command again"):
                run(tmp_path / "run", sets, settings, **runtime)
    result = run(tmp_path / "run", sets, settings, **runtime)
    assert weights(tmp_path / "run") == weights(expected[0])
    assert result.results == expected[1].results and result.history == expected[1].history


def test_results_depend_on_the_seed_but_not_on_workers(tmp_path, sets, uninterrupted):
    run(tmp_path / "workers", sets, workers=2)
    assert weights(tmp_path / "workers") == weights(uninterrupted[0])
    run(tmp_path / "seed", sets, dataclasses.replace(TINY, seed=1))
    assert weights(tmp_path / "seed") != weights(uninterrupted[0])


def test_the_files_of_a_run_agree(sets, uninterrupted):
    out, result = uninterrupted
    scores, results = (
        json.loads((out / "scores.json").read_text()),
        load_results(out / "coco_results.json", sets[1].truth),
    )
    assert results == result.results and scores["preset"] == "vitdet" and scores["backbone_name"] == "tiny"
    for part, kind in (("box", "bbox"), ("mask", "segm")):
        assert scores[part]["stats"] == evaluate(sets[1].truth, results, kind).stats
    assert [line["mask AP"] for line in read_metrics(out) if line["kind"] == "val"] == [
        h["mask AP"] for h in result.history
    ]
    assert result.history[-1]["mask AP"] == 100 * scores["mask"]["stats"]["AP"]
    loaded = load_detector(out)
    assert (
        loaded.classes == [str(d) for d in range(10)]
        and loaded.category_ids == list(range(1, 11))
        and loaded.settings == TINY
    )
    assert predict(loaded.model, sets[1], size=64, channels=3, device=CPU, batch=3) == (results, []), (
        "the exported detector is the result"
    )
    classes, examples = read_examples(out / "examples.safetensors")
    assert classes == loaded.classes and [len(kept) for kept in examples.values()] == [4, 4]
    for i, example in enumerate(examples["first"]):
        assert (example.pixels == sets[1].read(i)).all() and all(
            (mask.numpy() == expected).all()
            for mask, expected in zip(example.truth["masks"], sets[1].objects(i).masks, strict=True)
        )
        assert len(example.predictions["scores"]) == sum(
            r["image_id"] == sets[1].image_id(i) for r in results
        )
    assert not any(
        example.truth["masks"][0].shape != example.pixels.shape[:2] for example in examples["worst"]
    )
    losses = [line for line in read_metrics(out) if line["kind"] == "train"]
    parts = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
    assert losses[-1]["loss"] == pytest.approx(sum(losses[-1][p] for p in parts), rel=1e-5)


def test_it_overfits_scenes(tmp_path):
    """Some steps on two scenes: the score is low but no longer zero."""
    train, _ = open_coco("bundled:scenes", train_images=2, test_images=1, size=64)
    settings = dataclasses.replace(
        TINY, steps=60, batch_size=2, jitter=(1.0, 1.0), flip=False, drop_path=0.0, width=32, lr=4e-3
    )
    result = run(tmp_path / "run", (train, train), settings)
    lines = [line["loss"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert lines[-1] < 0.6 * lines[0]  # 0.51 to 0.53 with two seeds, on two processors
    assert result.box.stats["AP50"] > 0.2


def test_the_learning_rate_schedules():
    settings = dataclasses.replace(TINY, steps=2700, lr=1.0, warmup_steps=9)
    rates = [dt.rate(settings, Progress(step, 2700, 10)) for step in (0, 4, 9, 2399, 2400, 2599, 2600, 2699)]
    assert rates == pytest.approx([0.1, 0.5, 1, 1, 0.1, 0.1, 0.01, 0.01])
    falling = [
        dt.rate(dataclasses.replace(settings, schedule="cosine"), Progress(step, 2700, 10))
        for step in (0, 9, 2699)
    ]
    assert falling == pytest.approx([0, 1, 0], abs=1e-5)


def test_benchmarking_trains_too_and_a_run_is_not_continued_as_another(tmp_path, sets, uninterrupted):
    other = dataclasses.replace(TINY, preset="benchmarking", steps=3)
    result = run(tmp_path / "run", sets, other)
    assert (
        result.history[-1]["step"] == 3 and load_detector(tmp_path / "run").settings.preset == "benchmarking"
    )
    with pytest.raises(
        ConfigError, match="was started with preset benchmarking .now vitdet.*use another --out"
    ):
        run(tmp_path / "run", sets, dataclasses.replace(TINY, steps=3))
    with pytest.raises(CheckpointError, match="was started from another backbone"):
        run(tmp_path / "run", sets, other, backbone(1))
    with pytest.raises(DataError, match=r"the data \(train\) has changed since"):
        run(tmp_path / "run", (sample_images(sets[0], 7), sets[1]), other)
    deep = copy.copy(sets[0])
    deep.bits = 16  # as without 16-bit images
    run(tmp_path / "run", (deep, sets[1]), other)
    deep.bits = 12
    with pytest.raises(DataError, match=r"the data \(range of 16-bit images\) has changed since"):
        run(tmp_path / "run", (deep, sets[1]), other)


def test_category_names_must_agree_between_both_splits(tmp_path, sets):
    other = copy.copy(sets[1])
    other.classes = [f"letter {name}" for name in other.classes]
    with pytest.raises(
        DataError, match="has other categories than bundled:scenes; give both parts the same ids and names"
    ):
        run(tmp_path / "run", (sets[0], other))


def test_a_set_smaller_than_a_batch_lowers_it_and_a_long_warmup_is_refused(tmp_path, sets, capsys):
    run(tmp_path / "run", (sample_images(sets[0], 3), sets[1]), dataclasses.replace(TINY, steps=3))
    assert "note: 3 training images: batches of 2 instead of 4" in capsys.readouterr().out
    run(
        tmp_path / "parts",
        (sample_images(sets[0], 3), sets[1]),
        dataclasses.replace(TINY, steps=3),
        accumulate=3,
    )
    assert "note: 3 training images: batches of 3 instead of 4" in capsys.readouterr().out
    with pytest.raises(
        ConfigError, match="warmup_steps 6 is not below the run's 6 steps; give --settings warmup_steps=N"
    ):
        run(tmp_path / "other", sets, dataclasses.replace(TINY, warmup_steps=6))


def test_images_with_more_objects_than_max_instances_are_counted(tmp_path, sets, capsys, monkeypatch):
    monkeypatch.setattr(dt.DetectionTraining, "train", lambda self: None)
    counts = [len(sets[0].objects(i).labels) for i in range(8)]
    assert sets[0].counts().tolist() == counts
    part = sample_images(sets[0], 5, seed=3)
    assert part.counts().tolist() == [len(part.objects(i).labels) for i in range(5)]
    run(tmp_path / "few", (part, sets[1]), dataclasses.replace(TINY, max_instances=int(part.counts().max())))
    assert "more than" not in capsys.readouterr().out
    run(tmp_path / "run", sets, dataclasses.replace(TINY, max_instances=4))
    above = sum(count > 4 for count in counts)
    assert (
        above
        and f"note: more than 4 objects in {how_many(above, 'training image')}"
        in capsys.readouterr().out.replace("\n", " ")
    )


def test_the_bundled_recipe_is_evaluated_during_training(tmp_path, monkeypatch):
    scenes, lengths = open_coco("bundled:scenes", size=32), []
    monkeypatch.setattr(
        dt.DetectionTraining, "train", lambda self: lengths.append((self.total, self.scorings()))
    )
    run(tmp_path / "run", scenes, dataclasses.replace(load_detect("bundled"), size=32))
    assert lengths == [(4000, 7)], "the report shows precision over training"


def test_batchnorm_over_several_ranks_needs_cuda(tmp_path, sets, monkeypatch):
    monkeypatch.setattr(dt.DetectionTraining, "learn", lambda *args: None)
    context = RunContext(tmp_path, RuntimeConfig(workers=0), CPU, World(0, 2), Screen(False))
    with pytest.raises(
        ConfigError, match="synchronizes BatchNorm on CUDA devices only; use one process on a CPU"
    ):
        dt.DetectionTraining(backbone(), *sets, dataclasses.replace(TINY, preset="benchmarking"), context, {})


@pytest.mark.parametrize(
    ("width", "given", "recipe"),
    [(1024, None, "vitdet-large"), (24, None, "vitdet-base"), (1024, "bundled", "bundled")],
)
def test_the_recipe_fits_the_backbone(tmp_path, foreign, monkeypatch, width, given, recipe):
    vit = build_vit(size=32, channels=3, patch=8, width=width, depth=1, heads=2, registers=0)
    monkeypatch.setattr(commands, "load", lambda *args: Backbone(vit, (0.5,) * 3, (0.25,) * 3))
    calls = []
    monkeypatch.setattr(
        commands,
        "train",
        lambda backbone, train, test, settings, runtime, about: calls.append((settings, about["recipe"])),
    )
    options = DetectionOptions(data=str(foreign), recipe=given, settings=("steps=7", "warmup_steps=1"))
    commands.train_detector("x", options, RuntimeConfig(out=tmp_path / "run", device="cpu"))
    expected = dataclasses.replace(load_detect(recipe), steps=7, epochs=None, warmup_steps=1)
    assert calls == [(expected, recipe)]


def test_examples_are_kept_small(tmp_path, sets, uninterrupted, monkeypatch):
    results, examples = uninterrupted[1].results, {}
    for side in (768, 32):
        monkeypatch.setattr(keeping, "SIDE", side)
        keeping.write_examples(tmp_path / "x.safetensors", sets[1], results, 3)
        examples[side] = read_examples(tmp_path / "x.safetensors")[1]["first"]
    for large, small in zip(*examples.values(), strict=True):
        assert (large.pixels.shape, small.pixels.shape) == ((64, 64, 3), (32, 32, 3))
        for whole, half in zip(large[1:], small[1:], strict=True):
            assert torch.equal(whole["boxes"], 2 * half["boxes"]) and torch.equal(
                whole["labels"], half["labels"]
            )
            assert all(
                torch.equal(a[1::2, 1::2], b) for a, b in zip(whole["masks"], half["masks"], strict=True)
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 3.0}, "give one of epochs and steps"),
        ({"scales": (1.0, 2.0)}, "scales go from fine to coarse"),
        ({"scales": (2.0, 2.0)}, "each once"),
        ({"jitter": (1.0, 1e9)}, "0 < low <= high <= 16"),
        ({"scales": (3.0,)}, "scales are some of 4, 2, 1 and 0.5"),
        ({"jitter": (0.0, 1.0)}, "jitter must satisfy 0 < low <= high <= 16, not 0.0 1.0"),
        ({"lr": 0.0, "size": -1}, "size must be above 0, not -1; lr must be above 0, not 0.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number"),
    ],
)
def test_impossible_settings_are_named(change, message):
    with pytest.raises(ConfigError) as e:
        check(dataclasses.replace(TINY, **change))
    assert message in str(e.value)


def test_an_unreadable_test_image_is_named_and_has_no_detections(tmp_path, sets, uninterrupted):
    write_coco(tmp_path, "test", 4, size=64)
    (tmp_path / "images" / "test" / "000001.png").write_bytes(b"no image")
    unreadable = []
    results = predict(
        load_detector(uninterrupted[0]).model,
        open_test(str(tmp_path)),
        size=64,
        channels=3,
        device=CPU,
        batch=2,
        note=unreadable.extend,
    )
    assert [(bad[0], bad[1].endswith("000001.png")) for bad in unreadable] == [(1, True)]
    assert results.unreadable == unreadable
    assert results.results == [r for r in uninterrupted[1].results if r["image_id"] != 2]
    assert len(results.results) < len(uninterrupted[1].results)


def everything_found(monkeypatch, *unreadable: int) -> None:
    """Let detection return the ground truth, except for some images that cannot be read."""

    def perfect(model, data, *, note=lambda bad: None, **how):
        bad = [(i, data.where(i), "truncated") for i in unreadable]
        note(bad)
        ids = {data.image_id(i) for i in range(len(data))} - {data.image_id(i) for i in unreadable}
        return Predictions(
            [{**a, "score": 0.9} for a in data.truth["annotations"] if a["image_id"] in ids], bad
        )

    monkeypatch.setattr(dt, "predict", perfect)
    monkeypatch.setattr(commands, "predict", perfect)


@catches(
    "objects in unreadable test images count as missed",
    "rcmae.tasks.detection.predict:Predictions.readable",
    lambda old: lambda self, data: data,
)
def test_scores_are_those_of_the_readable_images_with_the_count_beside_them(
    tmp_path, sets, monkeypatch, capsys
):
    everything_found(monkeypatch, 2)
    test = sets[1]
    detected = run(tmp_path / "run", sets, SHORT)
    assert (detected.box.stats["AP"], detected.mask.stats["AP"]) == pytest.approx((1, 1))
    out = capsys.readouterr().out.replace("\n", " ")
    assert out.count("mask AP50 100.0 on 3 of 4 test images (1 could not be read)") == 2, (
        "scored, and at the end"
    )
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert (scores["test_images"], scores["unreadable"]) == (4, [test.where(2)])
    _, examples = read_examples(tmp_path / "run" / "examples.safetensors")
    assert (len(examples["first"]), examples["worst"]) == (3, []), "nothing is missed"
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "mask AP 100.0 on 3 of 4 test images (1 could not be read)." in page

    write_coco(tmp_path / "set", "test", 4, size=64)
    command = ["detect", "eval", str(tmp_path / "run"), "--data", str(tmp_path / "set"), "--device", "cpu"]
    assert main(command) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert "scored are 3 of 4 test images (1 could not be read), for example" in out and "(truncated)" in out
    scores = json.loads((tmp_path / "run" / "eval" / "scores.json").read_text())
    assert scores["mask"]["stats"]["AP"] == pytest.approx(1) and len(scores["unreadable"]) == 1
    everything_found(monkeypatch, 0, 1, 2, 3)
    assert main(command) == 3
    assert (
        "0 of 4 test images (4 could not be read), and no object is left to score" in capsys.readouterr().err
    )


def test_pictures_lie_in_the_run_and_tell_what_is_on_them(tmp_path, uninterrupted, capsys):
    shutil.copytree(uninterrupted[0] / "export", tmp_path / "run" / "export")
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    for checkpoint in ("run", "run/export/detector"):
        shutil.rmtree(tmp_path / "run" / "show", ignore_errors=True)
        command = ["detect", "show", str(tmp_path / checkpoint), str(tmp_path / "a.png"), "--device", "cpu"]
        assert main([*command, "--threshold", "1"]) == 0
        out = capsys.readouterr().out.replace("\n", " ")
        assert f"Open {tmp_path}/run/show/a.png: no object with a score of 1 or more; " in out
        best = re.search(r"the best score is (0\.\d\d)|nothing was detected", out)
        assert best and [f.name for f in (tmp_path / "run" / "show").iterdir()] == ["a.png"]
    assert main([*command, "--threshold", "0"]) == 0
    out = capsys.readouterr().out
    assert bool(re.search(r"a.png: [1-9]\d* objects?$", out, re.MULTILINE)) == bool(best[1])


def test_a_window_larger_than_the_image_is_noted(tmp_path, sets, monkeypatch, capsys):
    monkeypatch.setattr(dt.DetectionTraining, "train", lambda self: None)
    for window, mentioned in ((8, False), (9, True)):
        run(tmp_path / str(window), sets, dataclasses.replace(TINY, window=window))
        out = capsys.readouterr().out.replace("\n", " ")
        assert (
            f"a window of {window} x {window} patches contains the whole grid of 8 x 8" in out
        ) == mentioned


# --- data sets of other tools -------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A set as other tools write it: polygons and both kinds of run lengths, ids with gaps, an image without
    objects, a crowd."""
    root = tmp_path / "set"
    (root / "annotations").mkdir(parents=True)
    draws = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 3)):
        (root / split).mkdir()
        images, annotations = [], []
        for k in range(1, count + 1):
            h, w = 48 + 8 * (k % 3), 64
            pixels = draws.integers(0, 60, (h, w, 3), dtype=np.uint8)
            images.append(
                {
                    "id": 100 * k,
                    "file_name": f"{k}.png",
                    "height": h,
                    "width": w,
                    "license": 1,
                    "flickr_url": "http://",
                }
            )
            for n in range(0 if k == 3 else 2):
                x, y, side = 4 + 28 * n, 6, 20 + 2 * k
                mask = np.zeros((h, w), np.uint8, order="F")
                mask[y : y + side, x : x + side] = 1
                pixels[mask > 0] = (250, 40, 40) if n else (40, 250, 40)
                code = rle.encode(mask)
                forms = [
                    [[x, y, x + side, y, x + side, y + side, x, y + side]],
                    {"size": [h, w], "counts": code["counts"].decode()},
                    {
                        "size": [h, w],
                        "counts": np.diff(
                            [0, *np.flatnonzero(np.diff(mask.ravel("F"), prepend=0)), mask.size]
                        ).tolist(),
                    },
                ]
                entry = {
                    "id": 7 + 10 * len(annotations),
                    "image_id": 100 * k,
                    "category_id": 90 if n else 3,
                    "iscrowd": 0,
                }
                annotations.append(
                    entry
                    | {"bbox": [x, y, side, side], "area": side * side, "segmentation": forms[(k + n) % 3]}
                )
            Image.fromarray(pixels).save(root / split / f"{k}.png")
        crowd = {"id": 5, "image_id": 100, "category_id": 3, "iscrowd": 1, "bbox": [0, 40, 10, 8], "area": 80}
        annotations.append(
            crowd | {"segmentation": {"size": [56, 64], "counts": [40, 8, 48, 8, 56 * 64 - 104]}}
        )
        content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
        content["categories"] = [
            {"id": 90, "name": "red", "supercategory": "x"},
            {"id": 3, "name": "green", "supercategory": "x"},
        ]
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        (root / "annotations" / f"captions_{split}.json").write_text("{}")
    return root


def test_a_foreign_folder_trains_evaluates_and_is_shown(tmp_path, foreign, capsys):
    export(backbone(), tmp_path / "backbone", {})
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        "".join(f"{k} = {json.dumps(v)}\n" for k, v in dataclasses.asdict(TINY).items() if v is not None)
    )
    out, common = tmp_path / "run", ["--device", "cpu", "--workers", "0"]
    command = [
        "detect",
        "train",
        str(tmp_path / "backbone"),
        "--data",
        str(foreign),
        "--recipe",
        str(recipe),
        "--out",
        str(out),
    ]
    assert main([*command, "--settings", "steps=4", "flip=false", *common]) == 0
    output = capsys.readouterr().out.replace("\n", " ")
    assert (
        "5 images of 2 classes, 3 to test on" in output
        and "note: crowds, left out of training: 1 (5)" in output
    )
    assert "note: images without an object to train on: 1 (300)" in output and (out / "report.html").exists()
    results = json.loads((out / "coco_results.json").read_text())
    assert {r["category_id"] for r in results} <= {3, 90} and {r["image_id"] for r in results} <= {
        100,
        200,
        300,
    }
    scores = json.loads((out / "scores.json").read_text())
    assert scores["box"]["per_class"].keys() == {"green", "red"}

    assert main(["detect", "eval", str(out), "--batch", "2", "--precision", "fp32", *common]) == 0
    again = json.loads((out / "eval" / "scores.json").read_text())
    assert (
        again["data"] == str(foreign)
        and again["test_images"] == 3
        and again["detector"]["recipe"] == str(recipe)
    )
    output = capsys.readouterr().out
    assert "small, medium, large" in output and "green" in output and "AP_small" in output
    masks_only = tmp_path / "masks_only.json"
    masks_only.write_text(json.dumps([{k: v for k, v in r.items() if k != "bbox"} for r in results]))
    assert main(["detect", "eval", str(out), "--data", str(foreign), "--results", str(masks_only)]) == 0
    rescored = json.loads((out / "eval" / "scores-masks_only.json").read_text())
    assert (
        rescored["mask"]["stats"] == scores["mask"]["stats"]
        and "box" not in rescored
        and rescored["results"] == str(masks_only)
    )
    assert json.loads((out / "eval" / "scores.json").read_text()) == again, (
        "external results do not overwrite the scores of the detector"
    )

    shown = ["none.png", str(foreign / "val" / "1.png"), str(foreign / "train" / "1.png")]
    assert (
        main(
            [
                "detect",
                "show",
                str(out),
                *shown,
                "--out",
                str(tmp_path / "shown"),
                "--device",
                "cpu",
                "--threshold",
                "0",
            ]
        )
        == 3
    )
    assert sorted(f.name for f in (tmp_path / "shown").iterdir()) == ["001-1.png", "002-1.png"]
    assert "cannot read the image none.png: No such file" in capsys.readouterr().err, (
        "an unreadable image does not stop the others"
    )
    assert main(["detect", "export", str(out), "--out", str(tmp_path / "p.pt2")]) == 0
    maps = torch.export.load(tmp_path / "p.pt2").module()(torch.rand(1, 3, 64, 64))
    assert all(m.shape[1] == 16 for m in maps.values())


def test_class_names_and_channels_must_match_the_detector(tmp_path, uninterrupted, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_coco(tmp_path / "set", "test", 2, size=64)
    content = json.loads(file.read_text())
    file.write_text(
        json.dumps(
            content | {"categories": [c | {"name": f"letter {c['name']}"} for c in content["categories"]]}
        )
    )
    assert main(["detect", "eval", str(uninterrupted[0]), "--data", str(tmp_path / "set")]) == 3
    assert "categories that are not those of the detector: 10 (1: letter 0, not 0" in (
        err := capsys.readouterr().err
    )
    assert err.count("\n") == 1
    vit = build_vit(size=32, channels=1, patch=8, width=24, depth=2, heads=2, registers=0)
    export(Backbone(vit, (0.5,), (0.25,)), tmp_path / "gray", {})
    assert main(["detect", "train", str(tmp_path / "gray")]) == 2
    assert "bundled:scenes has 3 channels, but the backbone expects 1" in capsys.readouterr().err


def test_a_skipped_step_leaves_the_running_statistics(tmp_path, sets, monkeypatch):
    statistics = []
    losses, update = dt.DetectionTraining.losses, dt.DetectionTraining.update

    def broken(self, batch, step, part):
        values = losses(self, batch, step, part)
        return values | {"loss": values["loss"] * float("nan")} if step == 1 else values

    def recorded(self, t):
        applied = update(self, t)
        statistics.append([b.clone() for b in self.running_statistics])
        return applied

    monkeypatch.setattr(dt.DetectionTraining, "losses", broken)
    monkeypatch.setattr(dt.DetectionTraining, "update", recorded)
    run(tmp_path / "run", sets, dataclasses.replace(TINY, preset="benchmarking", steps=3))
    assert statistics[0] and all((a == b).all() for a, b in zip(statistics[0], statistics[1], strict=True)), (
        "step 1 was skipped"
    )
    assert not all((a == b).all() for a, b in zip(statistics[1], statistics[2], strict=True))


def test_detectors_of_student_and_teacher_have_different_folders(tmp_path):
    (tmp_path / "recipe.toml").touch()
    assert (
        run_folder(str(tmp_path)) == tmp_path / "detect"
        and run_folder(str(tmp_path), "student") == tmp_path / "detect-student"
    )
    assert run_folder("timm:vit_base_patch16_224", "student") == Path(
        "runs/detect-student/timm-vit_base_patch16_224"
    )


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["detect", "show", "RUN"], 2, "no images given: rcmae detect show CHECKPOINT IMAGE..."),
        (
            ["detect", "show", "RUN", "none.png"],
            3,
            "cannot read the image none.png: No such file or directory",
        ),
        (["detect", "show", "RUN", "none.png", "--threshold", "2"], 2, "threshold must lie in 0 to 1, not 2"),
        (
            ["detect", "eval", "nowhere"],
            4,
            "nowhere contains no detector; give a finished run of `rcmae detect train`",
        ),
        (["detect", "eval", "RUN", "--data", "FOREIGN"], 3, "categories that are not those of the detector"),
        (
            ["detect", "show", "RUN", "none.png", "--threshold", "nan"],
            2,
            "threshold must lie in 0 to 1, not nan",
        ),
        (
            ["detect", "train", "BACKBONE", "--settings", "size=60"],
            2,
            "size 60 is not a multiple of the backbone's",
        ),
        (
            ["detect", "train", "BACKBONE", "--settings", "batch_size=0"],
            2,
            "batch_size must be above 0, not 0",
        ),
        (["detect", "train", "BACKBONE", "--settings", "window=-1"], 2, "window must be 0 or more, not -1"),
        (["detect", "eval", "RUN", "--batch", "0"], 2, "error: --batch must be 1 or more, not 0"),
        (["detect", "train", "nowhere"], 4, "nowhere does not exist"),
        (
            ["detect", "train", "RUN", "--recipe", "vitdet-bas"],
            2,
            "there is no recipe 'vitdet-bas'; did you mean vitdet-base?",
        ),
        (["detect", "train", "RUN", "--settings", "siez=3"], 2, "'siez=3' is no setting"),
        (["detect", "export", "RUN", "--out", "x.onnx"], 2, "the name of an exported program ends in .pt2"),
    ],
)
def test_bad_input_is_reported_in_one_line(
    tmp_path, uninterrupted, foreign, capsys, monkeypatch, argv, code, message
):
    monkeypatch.chdir(tmp_path)
    export(backbone(), tmp_path / "backbone", {})
    names = {"RUN": str(uninterrupted[0]), "FOREIGN": str(foreign), "BACKBONE": "backbone"}
    assert main([names.get(a, a) for a in argv]) == code
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


@catches(
    "settings are checked after annotations are read",
    "rcmae.tasks.detection.commands:check_parts",
    lambda old: lambda *args: None,
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--accumulate", "3"], "a batch of 4 does not divide into 1 processes x accumulate 3"),
        (
            ["--settings", "batch_size=4", "steps=9", "warmup_steps=1"],
            r"started with .*steps 8 \(now 9\); use another",
        ),
        (
            ["--settings", "preset=benchmarking", "batch_size=4"],
            "synchronizes BatchNorm on CUDA devices only",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_before_annotations_are_read(
    tmp_path, capsys, monkeypatch, change, message
):
    monkeypatch.chdir(tmp_path)
    export(backbone(), tmp_path / "backbone", {})
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000000").mkdir(parents=True)
    (run / "recipe.toml").write_text(
        to_toml(commands.settings_of("bundled", ("batch_size=2", "steps=8", "warmup_steps=1")))
    )
    monkeypatch.setattr(commands, "open_coco", lambda *args, **options: pytest.fail("reads annotations"))
    monkeypatch.setattr(
        commands.distributed,
        "process_group",
        lambda device: contextlib.nullcontext(World(0, 1 + ("preset=benchmarking" in change))),
    )
    argv = ["detect", "train", "backbone", "--recipe", "bundled", "--device", "cpu", "--out", str(run)]
    if "--settings" not in change:
        argv += ["--settings", "batch_size=4"]
    assert main([*argv, *change]) == 2
    assert re.search(message, capsys.readouterr().err)
