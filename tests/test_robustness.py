"""Robustness sets: small ones in the published layouts, read end to end by toy models with known
predictions."""

import dataclasses
import multiprocessing
from functools import partial
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rcmae.data.digits import DigitsSource
from rcmae.data.sources import Subset, open_source
from rcmae.data.views import center
from rcmae.errors import ConfigError, DataError
from rcmae.report.severity import by_severity, figures
from rcmae.tasks.evaluation.robustness import Robustness
from rcmae.tasks.robustness.adversarial import fgsm, pgd
from rcmae.tasks.robustness.corruptions import STANDARD, corrupt
from rcmae.tasks.robustness.metrics import ALEXNET, ece, imagenet_classes
from rcmae.tasks.robustness.sets import (
    C_STYLE,
    IMAGENET_C,
    SEVERITIES,
    Corrupted,
    Loading,
    adversarial,
    check_imagenet_c,
    clean,
    corrupted,
    imagenet_c,
    labels_for,
    real_labels,
    sketch,
    subset,
)
from tests.mutations import catches

CPU = torch.device("cpu")
LOADING = Loading((8, 8), CPU, batch=16)
THREE = ["n01440764", "n01443537", "n01484850"]


def color(number: int) -> np.ndarray:
    """A flat image that encodes a number up to 4,095 in its color, robust to any resizing."""
    return np.array(
        [16 * (number // 256) + 8, 16 * (number // 16 % 16) + 8, 16 * (number % 16) + 8], np.uint8
    )


def save(path: Path, number: int, side: int = 8, form: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.tile(color(number), (side, side, 1))).save(path, form)


class Reads(nn.Module):
    """Decodes the number in an image's color: logit 1 for that column, and 2 for `instead` of it where one is
    given. `order`: the column of each number, if a model has its classes in another order."""

    def __init__(self, classes: int, instead: dict[int, int] | None = None, order: np.ndarray | None = None):
        super().__init__()
        self.classes, self.instead = classes, instead or {}
        self.order = np.arange(classes) if order is None else order

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        levels = (images.mean((2, 3)) * 255 / 16).long()
        numbers = (levels * torch.tensor([256, 16, 1])).sum(1).tolist()
        logits = torch.zeros(len(images), self.classes)
        for row, number in zip(logits, numbers, strict=True):
            if number < self.classes:
                row[self.order[number]] = 1
                if number in self.instead:
                    row[self.order[self.instead[number]]] = 2
        return logits


def synsets(which: str) -> list[str]:
    return sorted(files("timm.data").joinpath(f"_info/imagenet_{which}_synsets.txt").read_text().split())


# --- published sets -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet_c_folder(tmp_path_factory) -> Path:
    """Three classes, of 2, 1 and 1 images. Frost at severity 4 and 5 shows the wrong class in the first
    image."""
    root = tmp_path_factory.mktemp("c")
    for name in STANDARD:
        for severity in range(1, 6):
            for number, (wnid, i) in enumerate([(THREE[0], 0), (THREE[0], 1), (THREE[1], 2), (THREE[2], 3)]):
                shown = 1 if name == "frost" and severity > 3 and number == 0 else THREE.index(wnid)
                save(root / name / str(severity) / wnid / f"ILSVRC2012_val_{i + 1:08d}.JPEG", shown)
    return root


def test_imagenet_c_is_read_by_corruption_severity_and_class(imagenet_c_folder):
    messages = []
    models = {"reads": Reads(3), "turned": Reads(3, order=np.array([2, 0, 1])), "swaps": Reads(3, {2: 1})}
    results = imagenet_c(models, imagenet_c_folder, THREE, LOADING, messages.append)
    assert results["reads"].kind == IMAGENET_C and list(results["reads"].correct) == list(STANDARD)
    expected = {name: [0.0] * 5 for name in STANDARD} | {"frost": [0, 0, 0, 25, 25]}
    assert results["reads"].errors == expected
    assert (
        results["swaps"].errors["fog"] == [25] * 5
        and results["swaps"].correct["fog"].tolist() == [[True, True, True, False]] * 5
    )
    assert results["reads"].mean_error == pytest.approx(50 / 75) and results["reads"].mce is None, (
        "three classes are not ImageNet-C"
    )
    assert results["turned"].mean_error > 50
    turned = imagenet_c(models, imagenet_c_folder, [THREE[1], THREE[2], THREE[0]], LOADING)["turned"]
    assert turned.errors == expected, "columns are found by name"
    assert (
        len(messages) == 15
        and "frost, error by severity in percent: reads 0.0 0.0 0.0 25.0 25.0; turned" in messages[8]
    )


def test_mce_is_computed_only_for_the_published_set():
    correct = {name: np.arange(2000) >= np.array([[round(20 * ALEXNET[name])]] * 5) for name in STANDARD}
    official = Corrupted(IMAGENET_C, correct, published=True)
    assert official.mce == pytest.approx(100, abs=0.03) and official.mean_error == pytest.approx(
        78.87, abs=0.1
    )
    assert Corrupted(C_STYLE, correct, published=False).mce is None


def test_an_incomplete_imagenet_c_is_named(imagenet_c_folder, tmp_path):
    check, read = (
        partial(check_imagenet_c, shape=LOADING.shape),
        partial(imagenet_c, {"reads": Reads(3)}, loading=LOADING),
    )
    with pytest.raises(
        DataError,
        match=r"gaussian_noise/1, gaussian_noise/2, gaussian_noise/3 and 72 more of corruption/severity "
        r"missing",
    ):
        check(tmp_path, THREE)
    for name in STANDARD:
        (tmp_path / name).symlink_to(imagenet_c_folder / name)
    (tmp_path / "fog").unlink()
    for severity in range(1, 5):
        (tmp_path / "fog" / str(severity)).mkdir(parents=True)
    with pytest.raises(DataError, match=r"not the complete ImageNet-C: fog/5 of corruption/severity missing"):
        check(tmp_path, THREE)
    (tmp_path / "fog" / "5").mkdir()
    with pytest.raises(
        DataError, match=r"fog/1 has 0 class folders; n01440764, n01443537, n01484850 of 3 missing"
    ):
        check(tmp_path, THREE)
    for severity in range(1, 6):
        for k, wnid in enumerate(THREE):
            save(tmp_path / "fog" / str(severity) / wnid / f"ILSVRC2012_val_{k + 2:08d}.JPEG", k)
    with pytest.raises(
        DataError, match=r"fog/1 holds 3 images, and .*gaussian_noise/1 4, with different names"
    ):
        read(tmp_path, THREE)
    with pytest.raises(DataError, match=r"3 class folders; n01484850 not among the 2 of this set"):
        check(imagenet_c_folder, THREE[:2])
    with pytest.raises(DataError, match=r"8 x 8, but the model takes 16 x 16: ImageNet-C is used as stored"):
        check(imagenet_c_folder, THREE, shape=(16, 16))
    with pytest.raises(DataError, match=r"8 x 8, but the model takes 16 x 16: ImageNet-C is used as stored"):
        imagenet_c(
            {"reads": Reads(3)}, imagenet_c_folder, THREE, dataclasses.replace(LOADING, shape=(16, 16))
        )
    with pytest.raises(DataError, match="gaussian_noise"):
        read(tmp_path / "nothing", THREE)


@catches(
    "logits are in the order of the folders",
    "rcmae.tasks.robustness.sets:columns",
    lambda old: lambda classes, folders: np.arange(len(folders)),
)
@pytest.mark.parametrize("which", ["a", "r"])
def test_predictions_are_among_the_two_hundred_classes_of_the_set(tmp_path, which):
    """Three images get a class outside of the set, and one another of its classes."""
    classes, members = imagenet_classes(), synsets(which)
    for wnid in members:
        save(tmp_path / wnid / "0.jpg", classes.index(wnid), 11)
    outside = next(i for i, wnid in enumerate(classes) if wnid not in members)
    column = [classes.index(wnid) for wnid in members]
    mistakes = {column[3]: outside, column[50]: outside, column[199]: outside, column[7]: column[8]}
    order = np.random.default_rng(0).permutation(1000)
    mixed = [classes[i] for i in np.argsort(order)]
    for model, named in ((Reads(1000, mistakes), classes), (Reads(1000, mistakes, order), mixed)):
        result = subset({"toy": model}, tmp_path, named, which, LOADING)["toy"]
        assert np.flatnonzero(~result.among_200).tolist() == [7]
        assert np.flatnonzero(~result.among_all).tolist() == [3, 7, 50, 199]
    other = {"a": "r", "r": "a"}[which]
    with pytest.raises(
        DataError, match=r"has 200 class folders; n\d+, n\d+, n\d+ and \d+ more of 200 missing"
    ):
        subset({"toy": model}, tmp_path, classes, other, LOADING)
    (tmp_path / members[0] / "0.jpg").unlink()
    with pytest.raises(DataError, match=f"empty class folders: {members[0]}"):
        subset({"toy": model}, tmp_path, classes, which, LOADING)
    (tmp_path / "README.png").write_bytes(b"")
    with pytest.raises(DataError, match="must contain images in class folders, and nothing else"):
        subset({"toy": model}, tmp_path, classes, which, LOADING)
    with pytest.raises(DataError, match=f"199 class folders; {members[0]} of 200 missing"):
        (tmp_path / members[0]).rmdir()
        subset({"toy": model}, tmp_path, classes, which, LOADING)


def test_sketch_is_scored_among_all_classes(tmp_path):
    classes = imagenet_classes()
    for number, wnid in enumerate(classes):
        save(tmp_path / wnid / "sketch_0.JPEG", number, 8, "BMP")
    correct = sketch({"toy": Reads(1000, {5: 6, 999: 0})}, tmp_path, classes, LOADING)["toy"]
    assert np.flatnonzero(~correct).tolist() == [5, 999]
    with pytest.raises(DataError, match="folders are no class of the model|1000 folders"):
        sketch({"toy": Reads(3)}, tmp_path, THREE, LOADING)
    with pytest.raises(DataError, match="is not a folder; give the folder that contains the class folders"):
        sketch({"toy": Reads(1000)}, tmp_path / "nowhere", classes, LOADING)


@pytest.mark.parametrize("layout", ["", "n01440764/"], ids=["flat", "in folders"])
def test_real_labels_are_taken_by_file_name(tmp_path, layout):
    """The first validation image has no label left, the second two (970 and 795), the fourth one (809), the
    fifth 516 and 850."""
    shown = {1: 0, 2: 795, 3: 5, 4: 809, 5: 850}
    for number, column in shown.items():
        save(
            tmp_path
            / f"{layout if number < 3 else layout.replace('7', '8')}ILSVRC2012_val_{number:08d}.JPEG",
            column,
        )
    classes = imagenet_classes()
    assert real_labels({"toy": Reads(1000)}, tmp_path, classes, LOADING)["toy"].tolist() == [
        True,
        False,
        True,
        True,
    ]
    order = np.arange(1000)[::-1].copy()
    turned = real_labels({"toy": Reads(1000, order=order)}, tmp_path, classes[::-1], LOADING)["toy"]
    assert turned.tolist() == [True, False, True, True]
    save(tmp_path / f"{layout}cat.JPEG", 0)
    with pytest.raises(DataError, match=r"cat.JPEG is no image of ImageNet's validation set, by its name"):
        real_labels({"toy": Reads(1000)}, tmp_path, classes, LOADING)


# --- any labeled source -------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Random weights over pixels; standardizes inside."""

    def __init__(self, seed: int, side: int = 32, classes: int = 10):
        super().__init__()
        self.weight = (
            torch.randn(3 * side * side, classes, generator=torch.Generator().manual_seed(seed)) / 10
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return ((images - 0.4) / 0.25).flatten(1) @ self.weight


def digits(count: int = 23) -> tuple[DigitsSource, np.ndarray, dict[str, nn.Module]]:
    """A source, labels that are the predictions of the first model except for two unknown ones, and two
    models."""
    source, models = DigitsSource("test", count, 32, 0), {"one": Linear(0), "two": Linear(1)}
    labels = (
        models["one"](torch.from_numpy(source.images).permute(0, 3, 1, 2).float() / 255).argmax(1).numpy()
    )
    labels[[4, 9]] = -1
    return source, labels, models


def test_clean_images_and_their_calibration():
    source, labels, models = digits()
    results = clean(models, source, labels, Loading((32, 32), CPU, batch=5))
    assert (
        results["one"].correct.all()
        and len(results["one"].correct) == 21
        and not results["two"].correct.all()
    )
    x = torch.from_numpy(source.images[labels >= 0]).permute(0, 3, 1, 2).float() / 255
    np.testing.assert_allclose(
        results["two"].confidence, models["two"](x).softmax(1).max(1).values, rtol=1e-5
    )
    gap = abs(results["one"].confidence.mean() - 1)
    assert ece(results["one"].confidence, results["one"].correct) == pytest.approx(100 * gap), (
        "all are correct: every bin deviates in the same direction"
    )


def test_corrupted_images_are_those_of_corrupt_whatever_the_batch_and_workers():
    source, labels, models = digits()
    names, messages = ("shot_noise", "contrast"), []
    results = corrupted(models, source, labels, Loading((32, 32), CPU, batch=9), 3, names, messages.append)
    known = np.flatnonzero(labels >= 0)
    for model in models:
        assert (
            results[model].kind == C_STYLE
            and results[model].mce is None
            and list(results[model].correct) == list(names)
        )
        for name in names:
            for row, severity in zip(results[model].correct[name], SEVERITIES, strict=True):
                changed = np.stack([corrupt(source.images[i], name, severity, 3, int(i)) for i in known])
                x = torch.from_numpy(changed).permute(0, 3, 1, 2).float() / 255
                assert (row == (models[model](x).argmax(1).numpy() == labels[known])).all()
    assert (
        0 < results["one"].mean_error < 100
        and len(messages) == 2
        and messages[0].startswith("shot_noise, error by severity in percent: one ")
    )
    again = corrupted(models, source, labels, Loading((32, 32), CPU, batch=4, workers=2), 3, names)
    assert all((again[m].correct[n] == results[m].correct[n]).all() for m in models for n in names)
    corrupted(models, source, labels, Loading((96, 128), CPU), 3, (), messages.append)
    assert messages[2:] == [
        "note: no constants are published for 96 px: corruptions use those for 64 px, with lengths in pixels "
        "times 1.5"
    ]
    other = corrupted(models, source, labels, Loading((32, 32), CPU), 4, names)
    assert any((other[m].correct["shot_noise"] != results[m].correct["shot_noise"]).any() for m in models)


def test_shifted_sets_have_the_range_of_the_test_images(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(tmp_path / name / "0.png")
    monkeypatch.setattr("rcmae.tasks.robustness.sets.synsets", lambda which: ["a", "b"])
    shown: list[float] = []

    def model(pixels):
        shown.append(round(float(pixels.mean()), 2))
        return torch.zeros(len(pixels), 2)

    def measure(model, classes, test, task, loading, seed, screen):
        subset({"toy": model}, tmp_path, classes, "a", loading)
        return {}, {}, {"clean": None}

    monkeypatch.setattr("rcmae.tasks.robustness.study.measure_robustness", measure)
    for bits in (12, 16, None):
        context = SimpleNamespace(
            classifier=(model, ["a", "b"]),
            backbone=SimpleNamespace(shape=(8, 8), channels=3),
            device=CPU,
            set=SimpleNamespace(test=SimpleNamespace(bits=bits, in_memory=True)),
            options=SimpleNamespace(workers=0, seed=0),
            screen=None,
        )
        Robustness().run(context)
    assert shown == [1.0, 0.06, 0.06]


def test_draws_depend_on_the_index_in_the_full_set():
    """Also for a subset of a subset."""
    source, labels, _ = digits(40)
    part = Subset(Subset(source, np.arange(5, 30), labels[5:30]), np.array([0, 3, 20]))
    batches = []
    corrupted(
        {"toy": lambda x: batches.append(x) or torch.zeros(len(x), 10)},
        part,
        part.labels,
        Loading((32, 32), CPU),
        3,
        ("shot_noise",),
    )
    expected = [corrupt(source.images[i], "shot_noise", 4, 3, i) for i in (5, 8, 25)]
    fourth = batches[0][3::5].permute(0, 2, 3, 1).numpy()
    assert ((fourth * 255).round().astype(np.uint8) == np.stack(expected)).all()


@catches(
    "images are corrupted before they are cropped",
    "rcmae.tasks.robustness.sets:_severities",
    lambda old: (
        lambda image, index, shape, corruption, seed: torch.stack(
            [center(corrupt(image, corruption, s, seed, index), shape) for s in SEVERITIES]
        )
    ),
)
def test_images_are_cropped_before_corruption_and_labels_matched_by_name(tmp_path):
    """Images of another size, in class folders whose order is not the model's; an unreadable one ends the
    evaluation, from a worker too."""
    for number, wnid in enumerate(THREE):
        for i in range(2):
            save(tmp_path / wnid / f"{i}.png", number, 30)
    source = open_source(str(tmp_path))
    labels = labels_for(source, [THREE[2], "n1", THREE[0], THREE[1]])
    assert labels.tolist() == [2, 2, 3, 3, 0, 0]
    result = clean({"toy": Reads(4, order=np.array([2, 3, 0, 1]))}, source, labels, LOADING)["toy"]
    assert result.correct.all()
    batches = []
    corrupted(
        {"toy": lambda x: batches.append(x) or torch.zeros(len(x), 4)},
        source,
        labels,
        LOADING,
        corruptions=("fog",),
    )
    assert [tuple(x.shape) for x in batches] == [(20, 3, 8, 8), (10, 3, 8, 8)], (
        "batches of at most 16 hold four images in five severities"
    )
    flat = np.tile(color(0), (8, 8, 1))
    assert (batches[0][2].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8).tolist() == corrupt(
        flat, "fog", 3, 0, 0
    ).tolist()
    (tmp_path / THREE[0] / "1.png").write_bytes(b"no image")
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"1\.png cannot be read \(not an image\); fix it") as e:
            clean({"toy": Reads(4)}, source, labels, dataclasses.replace(LOADING, workers=workers))
        assert "\n" not in str(e.value)
        assert not multiprocessing.active_children(), (
            "a remaining loader process would keep the interpreter from exiting"
        )
    with pytest.raises(DataError, match="folders are no class of the model: n01484850"):
        labels_for(source, THREE[:2])
    source.labels = None
    with pytest.raises(DataError, match="has no labels; give a folder with a folder for each class"):
        labels_for(source, THREE)
    with pytest.raises(DataError, match="has no image with a known label"):
        clean({"toy": Reads(4)}, source, np.full(6, -1), LOADING)
    with pytest.raises(DataError, match="5 labels for the 6 images"):
        clean({"toy": Reads(4)}, source, np.zeros(5, np.int64), LOADING)


def test_attacks_on_a_source():
    source, labels, models = digits(60)
    attacks, messages = [fgsm(0.5), pgd(0.5, steps=5, restarts=2)], []
    results = adversarial(
        models, source, labels, attacks, Loading((32, 32), CPU, batch=16), 40, 0, messages.append
    )
    for one in results.values():
        clean_right, *attacked = one.correct.values()
        assert list(one.correct) == ["clean", "FGSM 0.5/255", "PGD-5 x2 0.5/255"] and len(clean_right) == 40
        assert all((correct <= clean_right).all() for correct in attacked)
        assert (attacked[0] == attacked[1]).all(), "both attacks reach the optimum of a linear model"
        assert list(one.checks) == ["PGD-5 x2 0.5/255"] and all(
            c.holds for c in one.checks["PGD-5 x2 0.5/255"].values()
        )
    assert 0 < results["one"].correct["FGSM 0.5/255"].sum() < 40 and results["one"].correct["clean"].all()
    assert messages[0].startswith(
        "one, PGD-5 x2 0.5/255: eps 0 equals clean: yes (100.0 % and 100.0 %, 16 images)"
    )
    assert messages[-2].startswith("one, accuracy in percent: clean 100.0, FGSM")
    cut = adversarial(models, source, labels, attacks, Loading((32, 32), CPU, batch=7), 40)
    assert all((cut[m].correct[a] == results[m].correct[a]).all() for m in models for a in results[m].correct)
    whole = adversarial(models, source, labels, attacks[:1], Loading((32, 32), CPU))["one"]
    assert len(whole.correct["clean"]) == 58
    with pytest.raises(ConfigError, match="two attacks have the same name"):
        adversarial(models, source, labels, [fgsm(1), fgsm(1)], LOADING)


@pytest.mark.usefixtures("drawn")
def test_severity_figures_have_a_curve_for_each_model():
    errors = {
        "student": {"fog": [10, 20, 30, 40, 50], "snow": [20, 30, 40, 50, 60]},
        "teacher": {"fog": [5] * 5, "snow": [7] * 5},
    }
    svg = by_severity({"student": 95.0, "teacher": 96.0}, errors)
    assert svg.startswith("<svg") and "severity" in svg and "clean" in svg and svg.count("var(--teacher)") > 1
    record = {
        "network": "teacher",
        "labels_percent": 100,
        "settings": {"probe": "linear"},
        "metrics": {"top1": 96.0},
        "seed": 0,
    }
    record |= {"backbone": "runs/mine/evaluate/finetune-teacher", "hashes": {"request": "abcdefgh"}}
    first = record | {"details": {"errors": {"C-style": errors["teacher"]}}}
    unusual = {"labels_percent": 10, "settings": {"probe": "knn"}}
    second = (
        record
        | unusual
        | {"details": {"errors": {"C-style": errors["student"], "ImageNet-C": {"fog": [9] * 5}}}}
    )
    svgs = figures([first, second, second | {"seed": 3}, first | {"network": "classifier"}, first])
    assert svgs.keys() == {"C-style", "ImageNet-C"}
    for name in (
        "teacher, knn probe, 10 % of labels",
        "% of labels, seed 3",
        "finetune-teacher",
        "teacher, abcdef",
    ):
        assert name in svgs["C-style"]
