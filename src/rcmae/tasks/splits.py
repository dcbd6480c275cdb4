"""Subsets of a labeled set, as pure functions of (labels, seed): fractions of its labels, a held-out part."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from ..engine.checkpoint import replace_file
from ..errors import ConfigError, DataError

PERCENTS = (1, 5, 10, 100)
"Percentages of the labels at which papers compare."

Labels = Int[np.ndarray, " n"]
"The class of each image, from 0; -1 without a label."


def splits(
    labels: Labels, seed: int = 0, percents: Sequence[float | int] = PERCENTS
) -> dict[float | int, Int[np.ndarray, " k"]]:
    """By percentage, the images whose labels are used, in ascending order. Larger percentages contain the
    smaller ones.

    Images are taken in rounds, one per class and round, until there are enough. So the classes differ by one
    image, unless a small class runs out, and each has at least one, even if that exceeds the percentage.
    Raises ConfigError, or DataError without labels.
    """
    if wrong := [p for p in percents if not 0 < p <= 100]:
        raise ConfigError(f"a percentage of the labels lies above 0 and is at most 100, not {wrong[0]}")
    labeled = np.flatnonzero(labels >= 0)
    if not len(labeled):
        raise DataError("none of the images has a label")
    classes, class_index = np.unique(labels[labeled], return_inverse=True)
    # The order of the classes within a round is random, so that the last round favors no class.
    turn = _draws(seed, 1).permutation(len(classes))[class_index]
    order = labeled[np.lexsort((turn, _ranks(class_index, seed)))]
    return {p: np.sort(order[: max(len(classes), round(p * len(order) / 100))]) for p in percents}


def held_out(labels: Labels, seed: int = 0) -> Bool[np.ndarray, " n"]:
    """Which images are held out to select a setting: a fifth of every class, at least one image, but never
    all of them."""
    size = np.bincount(labels)[labels]
    return _ranks(labels, seed) < np.minimum(np.maximum(np.round(0.2 * size), 1), size - 1)


def write_splits(folder: Path, labels: Labels, seed: int, percents: Sequence[float | int] = PERCENTS) -> None:
    """Write labels-PERCENT.json for each percentage; its bytes depend on the arguments only. Raises
    StorageError."""
    about = {"seed": seed, "images": len(labels), "labels": _hash(labels)}
    for percent, chosen in splits(labels, seed, percents).items():
        content = json.dumps(about | {"percent": percent, "chosen": chosen.tolist()})
        replace_file(folder / f"labels-{percent:g}.json", content + "\n")


def read_split(path: Path, labels: Labels) -> Int[np.ndarray, " k"]:
    """The images listed in a file. Raises DataError if it is not such a file, or was written for other
    labels."""
    try:
        content = json.loads(path.read_bytes())
        chosen, label_hash = np.array(content["chosen"], dtype=np.int64), content["labels"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(
            f"{path} is not a split: `rcmae evaluate` writes one for each percentage of the labels"
        ) from e
    if label_hash != _hash(labels):
        raise DataError(
            f"{path} was written for other labels than those of this data set; delete it to have it rewritten"
        )
    return chosen


def _ranks(labels: Labels, seed: int) -> Labels:
    """The rank of each image, from 0, in a random order of its class."""
    shuffled = _draws(seed, 0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[by_class] = np.arange(len(labels)) - np.searchsorted(labels[by_class], labels[by_class])
    return ranks


def _draws(seed: int, purpose: int) -> np.random.Generator:
    # rcmae.data uses counters with 0 to 2 in the second position.
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 3, purpose, 0]))


def _hash(labels: Labels) -> str:
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()
