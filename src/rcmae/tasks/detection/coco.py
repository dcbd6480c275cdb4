"""Objects in COCO's format, from JSON files or from a source that has objects.

Labels are 1 to K by ascending category id, 0 is background. Boxes and masks refer to the pixels as they were
annotated: upright, or as stored (see `orientation`).
"""

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from ...config import hint, how_many
from ...data.base import OpenOptions, Source, Strings
from ...data.pixels import measure_bits, read_image
from ...data.sources import SOURCES, kind_of, similar_forms
from ...engine.console import ShowProgress, no_progress
from ...engine.distributed import World
from ...errors import ConfigError, DataError
from .annotations import Part, drop_groups
from .layouts import find_annotations, load_json
from .masks import Masks, mask_api
from .orientation import Fit, decide

TEST = ("val", "test")
"The parts to test on: the first one that a folder has."


class Objects(NamedTuple):
    """The objects of an image: labels from 1, masks Bool "h w". Boxes are computed from the parts of the
    masks that are visible in a view."""

    labels: Int64[np.ndarray, " n"]
    masks: Sequence[Bool[np.ndarray, "h w"]]


class CocoSet(Source):
    """A source of images with their objects. Annotations are stored as flat arrays and run lengths, which
    loader processes can share."""

    def __init__(self, part: Part, upright: bool | None):
        """`part` is validated. `upright` tells whether its objects are annotated on the upright images or on
        those as stored; None: EXIF turns no image."""
        assert part.source is not None  # see Part.validate_files
        self.name, self.source, self.notes, self.upright = part.name, part.source, part.notes, upright
        self.in_memory = part.source.in_memory
        images, annotations, categories = part.data["images"], part.data["annotations"], part.categories
        self.category_ids, self.classes = list(categories), list(categories.values())
        self.image_ids = np.array([i["id"] for i in images], dtype=np.int64)
        self.sizes = np.array([(i["height"], i["width"]) for i in images], dtype=np.int64)
        self.chosen = np.arange(len(self.sizes))
        index = {int(i): k for k, i in enumerate(self.image_ids)}
        label = {c: k for k, c in enumerate(self.category_ids, 1)}
        owners = np.array([index[a["image_id"]] for a in annotations], dtype=np.int64)
        order = np.argsort(owners, kind="stable").tolist()
        rows = [annotations[k] for k in order]
        self.starts = np.searchsorted(owners[order], np.arange(len(self.sizes) + 1))
        self.ids = np.array([a["id"] for a in rows], dtype=np.int64)
        self.object_labels = np.array([label[a["category_id"]] for a in rows], dtype=np.int64)
        self.boxes = np.array([a["bbox"] for a in rows], dtype=np.float64).reshape(-1, 4)
        self.areas = np.array([a["area"] for a in rows], dtype=np.float64)
        self.crowds = np.array([bool(a.get("iscrowd")) for a in rows], dtype=bool)
        self.codes = Strings([part.codes[k] for k in order])
        self.trained = np.array([part.trained[k] for k in order], dtype=bool)

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, index: int) -> bytes | np.ndarray:
        return self.source.read(int(self.chosen[index]))

    def pixels(self, index: int, channels: int = 3) -> UInt8[np.ndarray, "h w {channels}"]:
        """The image in its annotated orientation. Raises BadImage, also if its size is not the annotated
        one."""
        size = self.size(index)
        if self.upright:
            pixels = read_image(self, index, channels)
            if pixels.shape[:2] == size:
                return pixels
        return read_image(self, index, channels, size)  # as stored, or turned if only that has the size

    def where(self, index: int) -> str:
        return self.source.where(int(self.chosen[index]))

    def counts(self) -> Int64[np.ndarray, " n"]:
        """Number of objects for training in each image."""
        before = np.concatenate([[0], np.cumsum(self.trained)])
        return np.diff(before[self.starts])[self.chosen]

    def fingerprint(self) -> str:
        """A hash of all annotations, their orientation, and names and sizes of the images."""
        digest = hashlib.sha256(
            (self.source.fingerprint() + json.dumps([self.category_ids, self.classes])).encode()
        )
        arrays = (
            self.chosen,
            self.image_ids,
            self.sizes,
            self.starts,
            self.ids,
            self.object_labels,
            self.boxes,
            self.areas,
            self.crowds,
        )
        for array in (*arrays, self.codes.ends, self.codes.data):
            digest.update(array.tobytes())
        if self.upright is not None:
            digest.update(b"upright" if self.upright else b"as stored")
        return digest.hexdigest()

    def image_id(self, index: int) -> int:
        return int(self.image_ids[self.chosen[index]])

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels."""
        h, w = self.sizes[self.chosen[index]].tolist()
        return h, w

    def objects(self, index: int) -> Objects:
        """The objects of an image for training, without crowds and empty masks."""
        rows = [k for k in self._rows(index) if self.trained[k]]
        h, w = self.size(index)
        return Objects(self.object_labels[rows], Masks(rows, lambda k: self._mask(k, h, w)))

    @property
    def truth(self) -> dict[str, Any]:
        """All annotations, including crowds, in the format of COCO's evaluation, with masks as compressed run
        lengths. Computed on access."""
        images, annotations = [], []
        for index in range(len(self)):
            key, (h, w) = self.image_id(index), self.size(index)
            images.append({"id": key, "height": h, "width": w})
            annotations += [
                {
                    "id": int(self.ids[k]),
                    "image_id": key,
                    "category_id": self.category_ids[self.object_labels[k] - 1],
                    "bbox": self.boxes[k].tolist(),
                    "area": float(self.areas[k]),
                    "iscrowd": int(self.crowds[k]),
                    "segmentation": {"size": [h, w], "counts": self.codes[k].decode()},
                }
                for k in self._rows(index)
            ]
        categories = [
            {"id": c, "name": name} for c, name in zip(self.category_ids, self.classes, strict=True)
        ]
        return {"images": images, "categories": categories, "annotations": annotations}

    def _mask(self, k: int, h: int, w: int) -> Bool[np.ndarray, "{h} {w}"]:
        return mask_api().decode({"size": [h, w], "counts": self.codes[k]}).view(bool)

    def _rows(self, index: int) -> range:
        i = self.chosen[index]
        return range(int(self.starts[i]), int(self.starts[i + 1]))

    def take(self, indices: Sequence[int] | Int64[np.ndarray, " k"]) -> "CocoSet":
        """A set of some of the images."""
        part = copy.copy(self)
        part.chosen = self.chosen[np.asarray(indices, dtype=np.int64)]
        return part


def sample_images(data: CocoSet, count: int, seed: int = 0) -> CocoSet:
    """`count` images of a set: the first ones of a permutation, so that larger subsets contain smaller ones.
    Raises DataError."""
    if not 0 < count <= len(data):
        raise DataError(
            f"{data.name} has {how_many(len(data), 'image')}, so a subset cannot have {count:,} of them"
        )
    draws = np.random.Generator(np.random.Philox(key=seed, counter=[0, 6, 0, 0]))
    part = data.take(draws.permutation(len(data))[:count])
    if not part.counts().any():
        raise DataError(
            f"no object in the {how_many(count, 'image')} sampled from {data.name} with seed {seed}; use more"
        )
    return part


def open_coco(
    data: str,
    val: str | None = None,
    *,
    train_images: int = 1024,
    test_images: int = 256,
    size: int = 128,
    channels: int = 3,
    value_range: str = "data",
    bits: int | None = None,
    max_pixels: float = Source.pixel_limit,
    progress: ShowProgress = no_progress,
    world: World = World(),
) -> tuple[CocoSet, CocoSet]:
    """Open the training and the test set: `data` is a folder in one of the `layouts`, or a source that has
    objects.

    The test set is the part val of the folder (or, without it, test), unless `val` is another folder. With
    `val`, each of the two may also be a JSON file, or a folder of a single part. The numbers of images,
    `size` in pixels and `channels` are for a source that generates its images; `value_range` and `max_pixels`
    as in `open_source`, and `bits` are those of the images that the backbone was trained on, see
    `measure_bits`. Raises ConfigError, or DataError with all problems of both sets.
    """
    options, alone = OpenOptions(channels, size), val is not None
    both = "give the part to train on with --data and the other with --val, as folders or JSON files"
    other = "give it with --val, a folder or JSON file"
    with progress(f"reading the annotations of {data}", 1):
        parts = [
            _part(data, ("train",), train_images, options, alone, both),
            _part(val or data, TEST, test_images, options, alone, other),
        ]
    train, test = _validated(parts, max_pixels, progress, world)
    _set_range((train, test), value_range, channels, bits, progress, world)
    return train, test


def open_test(
    data: str,
    *,
    images: int = 256,
    size: int = 128,
    channels: int = 3,
    categories: Mapping[int, str] | None = None,
    upright: bool | None = None,
    value_range: str = "data",
    bits: int | None = None,
    max_pixels: float = Source.pixel_limit,
    progress: ShowProgress = no_progress,
    world: World = World(),
) -> CocoSet:
    """Open only the test set: the part val of a folder (or, without it, test), a folder of a single part, a
    JSON file, or a source with objects.

    `categories` are the names of the detector's classes by their ids, and `upright` is the orientation of the
    annotations that it was trained on, for a set that does not tell its own; the other arguments as in
    `open_coco`. Raises the errors of `open_coco`.
    """
    advice = "give --data a folder or JSON file of this part"
    with progress(f"reading the annotations of {data}", 1):
        part = _part(data, TEST, images, OpenOptions(channels, size), True, advice)
    [test] = _validated([part], max_pixels, progress, world, categories, upright)
    _set_range([test], value_range, channels, bits, progress, world)
    return test


def _set_range(
    sets: Sequence[CocoSet],
    value_range: str,
    channels: int,
    bits: int | None,
    progress: ShowProgress,
    world: World,
) -> None:
    """Set what is white in 16-bit images, see `open_source`."""
    if value_range == "data":
        measure_bits(sets, channels, bits, progress, world)
    else:
        for each in sets:
            each.bits = 16


def forms() -> str:
    """The accepted forms of `data` in a line."""
    known = (kind.form for kind in SOURCES if kind.has_objects)
    return " or ".join(["a folder of images with annotations in COCO's format", "its JSON file", *known])


def _part(
    spec: str, parts: tuple[str, ...], images: int, options: OpenOptions, alone: bool, advice: str
) -> Part:
    """The first of the `parts` that the data has. `alone`: `spec` may also be a single part of any name."""
    if not spec.strip():
        raise ConfigError(f"--data is empty; give {forms()}")
    if (kind := kind_of(spec)) and kind.has_objects:
        source, content = kind.with_objects(parts[-1], images, options)
        return Part(spec, content, source)
    if similar_forms(spec):
        known = [kind.form for kind in SOURCES if kind.has_objects]
        raise ConfigError(f"{spec} has no objects{hint(spec, known) or '; there is ' + ' and '.join(known)}")
    if not Path(spec).is_file():
        file, unused = find_annotations(spec, parts, alone, advice)
    elif alone:
        file, unused = Path(spec), []
    else:
        raise DataError(f"{spec} is only one part; give the other file or folder with --val")
    part = Part(str(file), load_json(file))
    if unused:
        part.noted["parts that are not used (`rcmae detect eval RUN --data` scores them)"] = unused
    return part


def _validated(
    parts: list[Part],
    max_pixels: float,
    progress: ShowProgress,
    world: World,
    categories: Mapping[int, str] | None = None,
    upright: bool | None = None,
) -> list[CocoSet]:
    """The sets, with the categories of the detector or else of the first part. Raises DataError with all
    problems of all parts."""
    for part in parts:
        part.validate_structure()
    _refuse(parts)
    drop_groups(parts, categories or ())
    for part in parts:
        with progress(f"checking the objects of {part.name}", len(part.data["annotations"])) as tick:
            part.validate_content(tick, max_pixels)
        if part.source is None:
            part.validate_files(progress, world)
    owner = "the detector"
    if categories is None:
        categories, owner = parts[0].categories, parts[0].name
    for part in parts:
        part.use_categories(categories, owner)
    _refuse(parts)
    upright, reasons = decide(sum((part.fits for part in parts), Counter[Fit]()), upright)
    sets = [CocoSet(part, upright) for part in parts]
    for each in sets:
        each.pixel_limit = int(max_pixels)
    sets[0].notes = [*sets[0].notes, *reasons]
    return sets


def _refuse(parts: list[Part]) -> None:
    if problems := [part.problems for part in parts if part.wrong]:
        raise DataError("; ".join(problems) + "; fix this first")
