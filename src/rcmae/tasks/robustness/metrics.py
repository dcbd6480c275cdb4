"""Robustness metrics: corruption errors, with and without AlexNet's; calibration; and the mapping of class
folders to logits."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from timm.data import ImageNetInfo

from ...errors import DataError

Errors = dict[str, Sequence[float]]
"By corruption, the top-1 errors in percent at severities 1 to 5."

ALEXNET = {
    "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640, "defocus_blur": 81.9880,
    "glass_blur": 82.6268, "motion_blur": 78.5948, "zoom_blur": 79.8360, "snow": 86.6816, "frost": 82.6572,
    "fog": 81.9324, "brightness": 56.4592, "contrast": 85.3204, "elastic_transform": 64.6056,
    "pixelate": 71.7840, "jpeg_compression": 60.6500,
}  # fmt: skip
"""Top-1 errors of torchvision's AlexNet on ImageNet-C in percent, means over the severities: the divisors of
mCE.

They are the means of the errors by severity in github.com/hendrycks/robustness/issues/10, and equal the list
in common use. They are stored by name because some public code lists them in a different order than its
corruptions.
"""


def corruption_errors(errors: Errors) -> dict[str, float]:
    """CE by corruption: the mean error over all severities, divided by AlexNet's, in percent. Only for the
    published ImageNet-C, on which AlexNet's errors were measured.

    Raises DataError for missing or additional corruptions or severities: their mean would not be an mCE.
    """
    if missing := ALEXNET.keys() - errors.keys():
        raise DataError(f"mCE needs all 15 corruptions; missing: {', '.join(sorted(missing))}")
    if extra := errors.keys() - ALEXNET.keys():
        raise DataError(f"mCE is over the 15 corruptions only; leave out {', '.join(sorted(extra))}")
    if short := [name for name, e in errors.items() if len(e) != 5]:
        raise DataError(f"mCE needs all 5 severities; {', '.join(short)} has others")
    return {name: 100 * float(np.mean(errors[name])) / ALEXNET[name] for name in ALEXNET}


def mean_corruption_error(errors: Errors) -> float:
    """mCE: the mean of the 15 corruption errors; AlexNet has 100."""
    return float(np.mean(list(corruption_errors(errors).values())))


class Bin(NamedTuple):
    """Predictions with a confidence above `low` and up to `high`: their number, mean confidence and accuracy
    (0 to 1; nan for an empty bin)."""

    low: float
    high: float
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls on a Bin
    confidence: float
    accuracy: float


def reliability(confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"]) -> list[Bin]:
    """The table behind a reliability diagram: 15 equal-width bins of the highest class probability (Guo et
    al. 2017)."""
    edges = np.linspace(0, 1, 16)
    index = np.searchsorted(edges[1:-1], confidence)
    rows = []
    for i in range(15):
        inside = index == i
        means = (float(x[inside].mean()) if inside.any() else float("nan") for x in (confidence, correct))
        rows.append(Bin(float(edges[i]), float(edges[i + 1]), int(inside.sum()), *means))
    return rows


def ece(confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"]) -> float:
    """Expected calibration error in percent: the mean of |accuracy - confidence| over the bins, weighted by
    their number of predictions."""
    filled = (row for row in reliability(confidence, correct) if row.count)
    return 100 * sum(row.count * abs(row.accuracy - row.confidence) for row in filled) / len(correct)


def imagenet_classes() -> list[str]:
    """The 1,000 wnids in the order of the logits of ImageNet classifiers, which is alphabetical."""
    return ImageNetInfo("imagenet-1k").label_names()


def columns(classes: Sequence[str], folders: Sequence[str]) -> Int[np.ndarray, " k"]:
    """The index of each folder's logit, by name. Raises DataError for folders that are no class of the model,
    and for duplicate classes."""
    index = {name: i for i, name in enumerate(classes)}
    if len(index) < len(classes):
        raise DataError(
            "the model has a class twice: "
            f"{', '.join(sorted({c for c in classes if list(classes).count(c) > 1}))}"
        )
    if unknown := [name for name in folders if name not in index]:
        raise DataError(
            f"{len(unknown)} of {len(folders)} folders are no class of the model: {', '.join(unknown[:5])}"
        )
    return np.array([index[name] for name in folders])
