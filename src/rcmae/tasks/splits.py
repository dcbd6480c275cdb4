"""Which labels are used: shares of a labelled set and a part held out of it, pure functions of (labels, seed)."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from ..engine.checkpoint import replace_file
from ..errors import ConfigError, DataError

PERCENTS = (1, 5, 10, 100)
"Shares of the labels at which papers compare."

Labels = Int[np.ndarray, " n"]
"A class from 0 for each image, -1 where it has none."


def splits(labels: Labels, seed: int = 0, percents: Sequence[float | int] = PERCENTS) -> dict[float | int, Int[np.ndarray, " k"]]:
    """By percent, the images whose labels are used, in ascending order; of a smaller share all are in a larger one.

    Images are taken in rounds, one of every class a round, until there are enough; so classes differ by one image, or by what
    a small class lacks, and each has at least one, even if that is more than the share. Raises ConfigError, or DataError without labels.
    """
    if wrong := [p for p in percents if not 0 < p <= 100]:
        raise ConfigError(f"a share of the labels lies above 0 and is at most 100 %, not {wrong[0]}")
    labelled = np.flatnonzero(labels >= 0)
    if not len(labelled):
        raise DataError("none of the images has a label")
    classes, own = np.unique(labels[labelled], return_inverse=True)
    turn = _draws(seed, 1).permutation(len(classes))[own]  # who comes first in a round, so that the last one is no class's for sure
    order = labelled[np.lexsort((turn, _places(own, seed)))]
    return {p: np.sort(order[: max(len(classes), round(p * len(order) / 100))]) for p in percents}


def held_out(labels: Labels, seed: int = 0, share: float = 0.2) -> Bool[np.ndarray, " n"]:
    """Which images a setting is judged on: this share of every class, at least one image, but never the last one."""
    size = np.bincount(labels)[labels]
    return _places(labels, seed) < np.minimum(np.maximum(np.round(share * size), 1), size - 1)


def write_splits(folder: Path, labels: Labels, seed: int = 0, percents: Sequence[float | int] = PERCENTS) -> list[Path]:
    """One JSON file a share, the same bytes whenever and for whichever backbone it is written. Raises StorageError."""
    found = splits(labels, seed, percents)
    about = {"seed": seed, "images": len(labels), "labels": _hash(labels)}
    paths = [folder / f"labels-{p:g}.json" for p in found]
    for path, (percent, chosen) in zip(paths, found.items(), strict=True):
        replace_file(path, json.dumps(about | {"percent": percent, "chosen": chosen.tolist()}) + "\n")
    return paths


def read_split(path: Path, labels: Labels) -> Int[np.ndarray, " k"]:
    """The images that a file names. Raises DataError when it is no such file, or was written for other labels."""
    try:
        found = json.loads(path.read_bytes())
        chosen, of = np.array(found["chosen"], dtype=np.int64), found["labels"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path} is no split: `rcmae evaluate` writes one for each share of the labels") from e
    if of != _hash(labels):
        raise DataError(f"{path} was written for other labels than those of this data set; delete it to have it written anew")
    return chosen


def _places(labels: Labels, seed: int) -> Labels:
    """The place of each image, from 0, in a random order of its class."""
    shuffled = _draws(seed, 0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    places = np.empty(len(labels), dtype=np.int64)
    places[by_class] = np.arange(len(labels)) - np.searchsorted(labels[by_class], labels[by_class])
    return places


def _draws(seed: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 3, purpose, 0]))  # 0 to 2 in the second place are rcmae.data's


def _hash(labels: Labels) -> str:
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()
