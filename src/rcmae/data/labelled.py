"""A labelled set for evaluation: a part to fit on and a part to score on, whose classes are the same by name."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from ..config import how_many
from ..errors import DataError
from .base import Source, Subset
from .sources import kind_of, open_source

HELD = 5
"Without a validation part, every fifth image of a class is one."


@dataclass(frozen=True)
class Labelled:
    """Two parts with labels from 0 to len(classes) - 1; `notes` says in lines what the reader should know of them."""

    train: Subset
    test: Subset
    classes: list[str]
    notes: tuple[str, ...] = ()


def open_labelled(data: str, val: str | None = None, *, channels: int = 3, size: int = 32, tested: str | None = None) -> Labelled:
    """`data` holds two parts, as a folder with train/ and val/ in it does, or is one labelled set.

    One set without `val` is divided: every fifth image of a class is scored on. A classifier that comes fitted is scored on these if they
    are the images it was tested on (`tested`, the start of their fingerprint), as it was trained on the others; else on all of the set.
    `size` is for what is drawn. Raises DataError when there are no labels, fewer than two classes, or classes to score on that the training
    part lacks.
    """
    kind = kind_of(data)
    names = (data, val) if val else kind.parts(data) if kind else None
    if names:
        return _parts(*(open_source(name, channels, size) for name in names))
    whole = open_source(data, channels, size)
    labels = _labels(whole)
    held = np.zeros(len(labels), dtype=bool)
    for label in range(len(whole.classes)):
        held[np.flatnonzero(labels == label)[HELD - 1 :: HELD]] = True
    known = labels >= 0
    train, test = (Subset(whole, np.flatnonzero(chosen & known)) for chosen in (~held, held))
    note = f"{data} has no validation part: every {HELD}th image of a class is scored on"
    if tested is not None and not (tested and test.fingerprint().startswith(tested)):
        train = test = Subset(whole, np.flatnonzero(known))
        note = f"{data} has no validation part: all of it is scored on, also what the classifier may have been trained on"
    return _checked(train, test, (note, *_unlabelled(whole, labels)))


def _parts(train: Source, test: Source) -> Labelled:
    """Two sources, their labels joined by the names of the classes."""
    numbers = {name: i for i, name in enumerate(train.classes)}
    ours, theirs = _labels(train), _labels(test)
    if unknown := [name for name in test.classes if name not in numbers]:
        raise DataError(f"{test.name} has {_count(unknown)} that {train.name} lacks: {_some(unknown)}; the folders must have equal names")
    place = np.array([numbers[name] for name in test.classes], dtype=np.int64)
    known = [np.flatnonzero(labels >= 0) for labels in (ours, theirs)]
    parts = Subset(train, known[0], ours[known[0]], train.classes), Subset(test, known[1], place[theirs[known[1]]], train.classes)
    return _checked(*parts, (*_unlabelled(train, ours), *_unlabelled(test, theirs)))


def _labels(source: Source) -> Int[np.ndarray, " n"]:
    if source.labels is None:
        raise DataError(
            f"{source.name} has no labels, or one class alone: there must be a folder for each class, or shards with .cls files"
        )
    if (far := source.labels.max(initial=-1)) >= len(source.classes):
        where = source.where(int(source.labels.argmax()))
        raise DataError(f"{source.name}: {where} has label {far}, outside the set's {how_many(len(source.classes), 'class')}")
    return source.labels


def _checked(train: Subset, test: Subset, notes: tuple[str, ...]) -> Labelled:
    for part in (train, test):
        if not len(part):
            raise DataError(f"{part.name} has no labelled image")
    classes = train.classes
    if len(np.unique(train.labels)) < 2:
        raise DataError(f"{train.name} has images of one class alone ({classes[train.labels[0]]}): there is nothing to tell apart")
    if missing := [classes[i] for i in np.setdiff1d(np.arange(len(classes)), train.labels)]:
        raise DataError(f"{train.name} has no image of {_count(missing)}: {_some(missing)}")
    if absent := [classes[i] for i in np.setdiff1d(np.arange(len(classes)), test.labels)]:
        notes = (*notes, f"{test.name} has no image of {_count(absent)}, which are not scored: {_some(absent)}")
    return Labelled(train, test, classes, (*notes, *dict.fromkeys([*train.notes, *test.notes])))


def _unlabelled(source: Source, labels: Int[np.ndarray, " n"]) -> tuple[str, ...]:
    without = int((labels < 0).sum())
    return (f"left out of {source.name}: {how_many(without, 'image')} of {len(labels):,} without a label",) if without else ()


def _count(names: Sequence[str]) -> str:
    return how_many(len(names), "class")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
