"""Known values: AlexNet's mCE is 100, the public errors of a ResNet-50 give its public numbers; calibration
of toys; classes by name."""

from importlib.resources import files

import numpy as np
import pytest

from rcmae.errors import DataError
from rcmae.tasks.robustness.metrics import (
    ALEXNET,
    columns,
    corruption_errors,
    ece,
    imagenet_classes,
    mean_corruption_error,
    reliability,
)
from tests.mutations import catches

# AlexNet's errors by severity, in fractions (github.com/hendrycks/robustness/issues/10).
BY_SEVERITY = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.94870, 0.98720, 0.99548),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "motion_blur": (0.58430, 0.70048, 0.82108, 0.89750, 0.92638),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "snow": (0.71726, 0.88392, 0.86468, 0.91870, 0.94952),
    "frost": (0.61390, 0.79734, 0.88790, 0.89942, 0.93430),
    "fog": (0.67474, 0.76050, 0.84378, 0.87260, 0.94500),
    "brightness": (0.45140, 0.48502, 0.54048, 0.62166, 0.72440),
    "contrast": (0.64548, 0.76150, 0.88874, 0.97760, 0.99270),
    "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "pixelate": (0.52218, 0.54620, 0.73728, 0.87092, 0.91262),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
}


def alexnet() -> dict[str, list[float]]:
    return {name: [100 * e for e in errors] for name, errors in BY_SEVERITY.items()}


@catches(
    "AlexNet's errors are those of the next corruption",
    "rcmae.tasks.robustness.metrics:ALEXNET",
    lambda old: dict(zip(old, [*list(old.values())[1:], next(iter(old.values()))], strict=True)),
)
def test_alexnet_has_an_mce_of_100():
    assert mean_corruption_error(alexnet()) == pytest.approx(100, abs=1e-9)
    assert corruption_errors(alexnet()) == pytest.approx(dict.fromkeys(ALEXNET, 100.0), abs=1e-9)


def test_a_resnet_50_has_its_public_corruption_errors():
    """Accuracies and CEs in percent, as a public evaluation of torchvision's ResNet-50 (76.13 % clean)
    printed them."""
    public = {
        "brightness": (68.02, 56.64),
        "contrast": (39.06, 71.43),
        "defocus_blur": (38.75, 74.71),
        "elastic_transform": (45.25, 84.75),
        "fog": (45.83, 66.11),
        "frost": (38.14, 74.84),
        "gaussian_noise": (29.29, 79.77),
        "glass_blur": (26.79, 88.61),
        "impulse_noise": (23.81, 82.58),
    }
    errors = alexnet() | {name: [100 - accuracy] * 5 for name, (accuracy, _) in public.items()}
    for name, (_, expected) in public.items():
        assert corruption_errors(errors)[name] == pytest.approx(expected, abs=0.011), name


def test_half_of_alexnets_errors_give_an_mce_of_50_in_any_order():
    half = {name: [e / 2 for e in errors] for name, errors in reversed(alexnet().items())}
    assert mean_corruption_error(half) == pytest.approx(50)


def test_an_mce_needs_all_corruptions():
    errors = alexnet()
    fog = errors.pop("fog")
    with pytest.raises(DataError, match="missing: fog"):
        mean_corruption_error(errors)
    with pytest.raises(DataError, match="leave out spatter"):
        mean_corruption_error(errors | {"fog": fog, "spatter": fog})
    with pytest.raises(DataError, match="all 5 severities; fog has"):
        mean_corruption_error(errors | {"fog": fog[:3]})


@catches(
    "the calibration error compares two means",
    "rcmae.tasks.robustness.metrics:ece",
    lambda old: lambda confidence, correct, bins=15: 100 * abs(float(confidence.mean() - correct.mean())),
)
def test_calibration_of_toys():
    draws = np.random.default_rng(0)
    confidence = draws.uniform(0.1, 1, 200_000)
    assert ece(confidence, draws.random(200_000) < confidence) < 0.5, "calibrated"
    assert ece(confidence, draws.random(200_000) < confidence - 0.1) == pytest.approx(10, abs=0.5), (
        "overconfident by 0.1"
    )
    sure, correct = np.full(10, 0.95), np.arange(10) < 6
    assert ece(sure, correct) == pytest.approx(35)
    two = np.array([0.62, 0.62, 0.98, 0.98])  # 50 % at 0.62 and 100 % at 0.98
    assert ece(two, np.array([True, False, True, True])) == pytest.approx(100 * (0.12 + 0.02) / 2)


def test_the_reliability_table_has_every_prediction_once():
    """Edges belong to the lower bin, 0 to the first."""
    edges = np.linspace(0, 1, 16)
    assert [row.count for row in reliability(edges, np.ones(16, bool))] == [2] + [1] * 14
    row = reliability(np.array([0.91, 0.93, 0.2]), np.array([True, False, True]))[13]
    assert (row.count, row.confidence, row.accuracy) == (2, pytest.approx(0.92), 0.5)
    assert row.low < 0.91 and row.high > 0.93


@pytest.mark.parametrize("name", ["a", "r"])
def test_classes_are_found_by_name_where_the_published_indices_are(name):
    folders = sorted(files("timm.data").joinpath(f"_info/imagenet_{name}_synsets.txt").read_text().split())
    classes = imagenet_classes()
    assert len(classes) == 1000 and classes == sorted(classes) and len(folders) == 200
    published = files("timm.data").joinpath(f"_info/imagenet_{name}_indices.txt").read_text().split()
    assert sorted(columns(classes, folders).tolist()) == sorted(int(i) for i in published)
    assert columns(classes[::-1], folders).tolist() == [999 - i for i in columns(classes, folders)]


def test_folders_that_are_no_class_are_named():
    with pytest.raises(DataError, match="1 of 2 folders are no class of the model: n9"):
        columns(["n1", "n2"], ["n2", "n9"])
    with pytest.raises(DataError, match="a class twice: n1"):
        columns(["n1", "n1"], ["n1"])
