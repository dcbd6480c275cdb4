"""Labeled data for evaluation: a training and a test part with the same class names."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from ..config import how_many
from ..engine.console import ShowProgress, no_progress
from ..engine.distributed import World
from ..errors import DataError
from .base import Source, Subset
from .pixels import measure_bits
from .sources import open_source, parts_of

TEST_EVERY = 5
"Without a validation part, every fifth image of each class is held out."

NO_LABELS = (
    ", or only one class: there must be a folder for each class, a list with labels, or shards with .cls or "
    ".json files"
)


@dataclass(frozen=True)
class Labeled:
    """Two parts with labels from 0 to len(classes) - 1."""

    train: Subset
    test: Subset
    classes: list[str]
    notes: tuple[str, ...] = ()
    "notes for the user"
    read: tuple[str, ...] = ()
    "a line for each source: what was read of it, and what was left out"


def open_labeled(
    data: str,
    val: str | None = None,
    *,
    channels: int = 3,
    size: int = 32,
    tested: str | None = None,
    value_range: str = "data",
    bits: int | None = None,
    max_pixels: float = Source.pixel_limit,
    progress: ShowProgress = no_progress,
    world: World = World(),
) -> Labeled:
    """Open `data` that has a training and a test part, such as a folder with train/ and val/, or one labeled
    set, with `val` as its test part.

    Of a `val` that is itself divided, the test part is used. Without `val`, one set is split: every fifth
    image of each class is for testing. For an already trained classifier, `tested` is the start of the
    fingerprint of its test images: if they are the same, it is tested on them, since it was trained on the
    others, otherwise on all. `size` is that of generated images, `value_range` and `max_pixels` as in
    `open_source`, and `bits` are those of the images that the network was trained on, see `measure_bits`.
    Raises DataError if there are no labels, fewer than two classes, too few images to split, or test classes
    that the training part lacks.
    """
    parts = (data, (parts_of(val) or (val, val))[1]) if val else parts_of(data)
    if parts:
        train, test = (
            open_source(part, channels, size, value_range="dtype", max_pixels=max_pixels) for part in parts
        )
        if value_range == "data":
            measure_bits((train, test), channels, bits, progress, world)
        return _join(train, test)
    source = open_source(data, channels, size, value_range="dtype", max_pixels=max_pixels)
    if value_range == "data":
        measure_bits([source], channels, bits, progress, world)
    labels = _labels(source)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in range(len(source.classes)):
        held_out[np.flatnonzero(labels == label)[TEST_EVERY - 1 :: TEST_EVERY]] = True
    known = labels >= 0
    train, test = (Subset(source, np.flatnonzero(part & known)) for part in (~held_out, held_out))
    notes = [
        f"{data} has no validation part: every {TEST_EVERY}th image of each class is held out for testing"
    ]
    if tested is not None and not (tested and test.fingerprint().startswith(tested)):
        train = test = Subset(source, np.flatnonzero(known))
        notes = [
            f"{data} has no validation part: testing on all images, possibly including the classifier's "
            "training images"
        ]
    elif few := _too_few(source, labels):
        if not len(test):
            raise DataError(
                f"{data} has too few images of each class to hold out every {TEST_EVERY}th: {few}; add "
                "images, or give others for testing with --val"
            )
        notes.append(f"classes with too few images to hold out every {TEST_EVERY}th are not tested: {few}")
    return _checked(train, test, (*notes, *_unlabeled(source, labels)), (source,))


def _too_few(source: Source, labels: Int[np.ndarray, " n"]) -> str:
    """The classes of which no image is held out, with their numbers of images."""
    counts = np.bincount(labels[labels >= 0], minlength=len(source.classes))
    pairs = zip(source.classes, counts.tolist(), strict=True)
    return _some([f"{name} has {count}" for name, count in pairs if count < TEST_EVERY])


def _join(train: Source, test: Source) -> Labeled:
    """Two sources, with the test labels renumbered by class name to those of the training part."""
    index = {name: i for i, name in enumerate(train.classes)}
    train_labels = _labels(train)
    test_labels = _labels(test, f"; give other images with --val, or split those of --data {train.name}")
    if unknown := [name for name in test.classes if name not in index]:
        raise DataError(
            f"{test.name} has {_count(unknown)} that {train.name} lacks: {_some(unknown)}; the class folders "
            "must have the same names"
        )
    renumbered = np.array([index[name] for name in test.classes], dtype=np.int64)
    known = [np.flatnonzero(labels >= 0) for labels in (train_labels, test_labels)]
    parts = (
        Subset(train, known[0], train_labels[known[0]], train.classes),
        Subset(test, known[1], renumbered[test_labels[known[1]]], train.classes),
    )
    notes = (*_unlabeled(train, train_labels), *_unlabeled(test, test_labels), *_untested(parts[1]))
    return _checked(*parts, notes, (train, test))


def _labels(source: Source, advice: str = "") -> Int[np.ndarray, " n"]:
    if source.labels is None:
        why = f": {source.why_unlabeled}" if source.why_unlabeled else NO_LABELS
        raise DataError(f"{source.name} has no labels{why}{advice}")
    if (largest := source.labels.max(initial=-1)) >= len(source.classes):
        image = source.where(int(source.labels.argmax()))
        raise DataError(
            f"{source.name}: {image} has label {largest}, outside the set's "
            f"{how_many(len(source.classes), 'class')}"
        )
    return source.labels


def _checked(train: Subset, test: Subset, notes: tuple[str, ...], sources: tuple[Source, ...]) -> Labeled:
    for part in (train, test):
        if not len(part):
            raise DataError(f"{part.name} has no labeled image")
    classes, train_labels = list(train.classes), _labels(train)
    if len(np.unique(train_labels)) < 2:
        raise DataError(f"{train.name} has images of only one class ({classes[train_labels[0]]})")
    if missing := [classes[i] for i in np.setdiff1d(np.arange(len(classes)), train_labels)]:
        raise DataError(f"{train.name} has no image of {_count(missing)}: {_some(missing)}")
    notes += tuple(dict.fromkeys([*train.notes, *test.notes]))
    return Labeled(train, test, classes, notes, tuple(source.summary() for source in sources))


def _untested(test: Subset) -> tuple[str, ...]:
    untested = [test.classes[i] for i in np.setdiff1d(np.arange(len(test.classes)), _labels(test))]
    return (f"{test.name} has no test image of {_count(untested)}: {_some(untested)}",) if untested else ()


def _unlabeled(source: Source, labels: Int[np.ndarray, " n"]) -> tuple[str, ...]:
    unlabeled = how_many(count := int((labels < 0).sum()), "image")
    return (f"left out of {source.name}: {unlabeled} of {len(labels):,} without a label",) if count else ()


def _count(names: Sequence[str]) -> str:
    return how_many(len(names), "class")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
