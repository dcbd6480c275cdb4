"""Numbers of robustness: corruption errors, with and without AlexNet; calibration; which logit stands for which class."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from timm.data import ImageNetInfo

from ...errors import DataError

Errors = dict[str, Sequence[float]]
"By corruption, the top-1 error in percent at severity 1 to 5."

ALEXNET = {
    "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640, "defocus_blur": 81.9880, "glass_blur": 82.6268,
    "motion_blur": 78.5948, "zoom_blur": 79.8360, "snow": 86.6816, "frost": 82.6572, "fog": 81.9324, "brightness": 56.4592,
    "contrast": 85.3204, "elastic_transform": 64.6056, "pixelate": 71.7840, "jpeg_compression": 60.6500,
}  # fmt: skip
"""Top-1 errors of torchvision's AlexNet on ImageNet-C in percent, means over the severities: what mCE is divided by.

They are the means of the errors by severity in github.com/hendrycks/robustness/issues/10, and equal the list that is in common use.
By name: some public code has them in another order than its corruptions.
"""


def mean_error(errors: Errors) -> float:
    """Plain mean over corruptions and severities, in percent. Of ImageNet-C, or of any C-style set; it is NOT mCE."""
    return float(np.mean([np.mean(e) for e in errors.values()]))


def corruption_errors(errors: Errors) -> dict[str, float]:
    """CE by corruption: the errors of all severities over AlexNet's, in percent. For the published ImageNet-C alone, as AlexNet's are.

    DataError when a corruption or severity is missing or there is another one: a mean over a part would pass for an mCE.
    """
    if missing := ALEXNET.keys() - errors.keys():
        raise DataError(f"mCE needs all 15 corruptions; missing: {', '.join(sorted(missing))}")
    if extra := errors.keys() - ALEXNET.keys():
        raise DataError(f"mCE is over the 15 corruptions alone; leave out {', '.join(sorted(extra))}")
    if short := [name for name, e in errors.items() if len(e) != 5]:
        raise DataError(f"mCE needs all 5 severities; {', '.join(short)} has others")
    return {name: 100 * float(np.mean(errors[name])) / ALEXNET[name] for name in ALEXNET}


def mean_corruption_error(errors: Errors) -> float:
    """mCE: the mean of the 15 corruption errors; AlexNet has 100."""
    return float(np.mean(list(corruption_errors(errors).values())))


class Bin(NamedTuple):
    """Predictions with a confidence above `low` and up to `high`: how many, their mean confidence and accuracy (shares; nan of none)."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def reliability(confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], bins: int = 15) -> list[Bin]:
    """The table behind a reliability diagram: equal-width bins of the highest class probability (Guo et al. 2017)."""
    edges = np.linspace(0, 1, bins + 1)
    place = np.searchsorted(edges[1:-1], confidence)
    rows = []
    for i in range(bins):
        mine = place == i
        means = (float(x[mine].mean()) if mine.any() else float("nan") for x in (confidence, right))
        rows.append(Bin(float(edges[i]), float(edges[i + 1]), int(mine.sum()), *means))
    return rows


def ece(confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"], bins: int = 15) -> float:
    """Expected calibration error in percent: the mean over all predictions of their bin's |accuracy - confidence|."""
    gaps = [row.count * abs(row.accuracy - row.confidence) for row in reliability(confidence, right, bins) if row.count]
    return 100 * sum(gaps) / len(right)


def imagenet_classes() -> list[str]:
    """The 1,000 wnids in the order of ImageNet classifiers' logits, which is that of the sorted folder names."""
    return ImageNetInfo("imagenet-1k").label_names()


def columns(classes: Sequence[str], folders: Sequence[str]) -> Int[np.ndarray, " k"]:
    """Which logit stands for each folder, by name. DataError names the folders that are no class of the model, and classes given twice."""
    place = {name: i for i, name in enumerate(classes)}
    if len(place) < len(classes):
        raise DataError(f"the model has a class twice: {', '.join(sorted({c for c in classes if list(classes).count(c) > 1}))}")
    if unknown := [name for name in folders if name not in place]:
        raise DataError(f"{len(unknown)} of {len(folders)} folders are no class of the model: {', '.join(unknown[:5])}")
    return np.array([place[name] for name in folders])
