"""Objects in COCO's format, from JSON files or from a source that has objects; validated completely before
any training.

Labels are 1 to K by ascending category id, 0 is background. Boxes and masks refer to the pixels as stored: an
image is rotated according to EXIF only if it has the annotated height and width in that orientation alone.
"""

import copy
import functools
import hashlib
import json
import os
import stat
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt8
from PIL import Image

from ...config import hint, how_many
from ...data.base import OpenOptions, Source, Strings, printable
from ...data.decode import PIXEL_LIMIT
from ...data.files import Files
from ...data.pixels import read_image
from ...data.sources import SOURCES, kind_of, similar_forms
from ...engine.metrics import optional
from ...errors import ConfigError, DataError
from .masks import Masks

NO_AREA_FRACTION = 0.001
"""Tolerated fraction of annotations whose boxes have no area: COCO's train2017 has a few. They are left out
of training."""

NO_PIXEL_FRACTION = 0.01
"""Tolerated fraction of annotations whose masks have no pixel, as for very small objects. They are left out
of training."""

MISMATCH_FRACTION = 0.1
"""Tolerated fraction of annotations whose boxes are not around their masks. COCO has hardly any; with boxes
in another format most would be mismatches."""

OVERLAP = 0.5
"""Minimum intersection over union of a box and the box around its mask, each enlarged by a pixel on all
sides, because rounding matters for small ones."""

FAR = 10
"""Maximum distance of a polygon's point from the origin, in image sides. Points farther away are no drawing
errors, and rasterizing them would need too much memory."""

CHECKED_FILES = 200
"""Number of image files of a part whose sizes are compared with the annotations before any work; the others
are checked when they are read."""

WRONG_SIZE_FRACTION, WRONG_SIZE_COUNT = 0.01, 10
"""Tolerated fraction or number of images with another size than annotated: more of them would end the run
(`--max-corrupt-fraction`)."""

SHOWN = 3
"Number of examples in the description of a problem."

KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}
"Required keys of the lists in a file; annotations also have segmentation, and optionally iscrowd and area."


class Objects(NamedTuple):
    """The objects of an image: labels from 1, masks Bool "h w". Boxes are computed from the parts of the
    masks that are visible in a view."""

    labels: Int64[np.ndarray, " n"]
    masks: Sequence[Bool[np.ndarray, "h w"]]


class CocoSet(Source):
    """A source of images with their objects. Annotations are stored as flat arrays and run lengths, which
    loader processes can share."""

    def __init__(
        self,
        name: str,
        pictures: Source,
        annotations: dict[str, Any],
        codes: list[bytes],
        trained: list[bool],
        notes: list[str],
    ):
        """`annotations` are validated, in COCO's format, and their i-th image is the i-th of `pictures`. For
        each annotation, `codes` has the compressed run lengths of the mask, and `trained` whether it is used
        in training. `notes` are sentences that the user should read.
        """
        self.name, self.in_memory, self.pictures, self.notes = name, pictures.in_memory, pictures, notes
        categories = sorted(annotations["categories"], key=lambda c: c["id"])
        self.category_ids = [int(c["id"]) for c in categories]
        self.classes = [str(c["name"]) for c in categories]
        self.image_ids = np.array([i["id"] for i in annotations["images"]], dtype=np.int64)
        self.sizes = np.array([(i["height"], i["width"]) for i in annotations["images"]], dtype=np.int64)
        self.chosen = np.arange(len(self.sizes))
        index = {int(i): k for k, i in enumerate(self.image_ids)}
        label = {c: k for k, c in enumerate(self.category_ids, 1)}
        owners = np.array([index[a["image_id"]] for a in annotations["annotations"]], dtype=np.int64)
        order = np.argsort(owners, kind="stable").tolist()
        rows = [annotations["annotations"][k] for k in order]
        self.starts = np.searchsorted(owners[order], np.arange(len(self.sizes) + 1))
        self.ids = np.array([a["id"] for a in rows], dtype=np.int64)
        self.object_labels = np.array([label[a["category_id"]] for a in rows], dtype=np.int64)
        self.boxes = np.array([a["bbox"] for a in rows], dtype=np.float64).reshape(-1, 4)
        self.areas = np.array([a["area"] for a in rows], dtype=np.float64)
        self.crowds = np.array([bool(a.get("iscrowd")) for a in rows], dtype=bool)
        self.codes = Strings([codes[k] for k in order])
        self.trained = np.array([trained[k] for k in order], dtype=bool)

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, index: int) -> bytes | np.ndarray:
        return self.pictures.read(int(self.chosen[index]))

    def pixels(self, index: int, channels: int = 3) -> UInt8[np.ndarray, "h w {channels}"]:
        """The image in its annotated orientation. Raises BadImage, also if its size is not the annotated
        one."""
        return read_image(self, index, channels, self.size(index))

    def where(self, index: int) -> str:
        return self.pictures.where(int(self.chosen[index]))

    def counts(self) -> Int64[np.ndarray, " n"]:
        """Number of objects for training in each image."""
        before = np.concatenate([[0], np.cumsum(self.trained)])
        return np.diff(before[self.starts])[self.chosen]

    def fingerprint(self) -> str:
        """A hash of all annotations, and of names and sizes of the images."""
        digest = hashlib.sha256(
            (self.pictures.fingerprint() + json.dumps([self.category_ids, self.classes])).encode()
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
        return _api().decode({"size": [h, w], "counts": self.codes[k]}).view(bool)

    def _rows(self, index: int) -> range:
        i = self.chosen[index]
        return range(int(self.starts[i]), int(self.starts[i + 1]))


def sample_images(data: CocoSet, count: int, seed: int = 0) -> CocoSet:
    """`count` images of a set: the first ones of a permutation, so that larger subsets contain smaller ones.
    Raises DataError."""
    if not 0 < count <= len(data):
        raise DataError(
            f"{data.name} has {how_many(len(data), 'image')}, so a subset cannot have {count:,} of them"
        )
    part, draws = copy.copy(data), np.random.Generator(np.random.Philox(key=seed, counter=[0, 6, 0, 0]))
    part.chosen = data.chosen[draws.permutation(len(data))[:count]]
    if not any(part.trained[part._rows(i)].any() for i in range(count)):
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
) -> tuple[CocoSet, CocoSet]:
    """Open the training and the test set: `data` is a folder in COCO's layout, a JSON file, or a source that
    has objects.

    The JSON files of a folder are in annotations/, or in the folder itself. The training set is the file with
    "train" in its name, the test set the one with "val" (or, without such a file, "test"), unless `val` is
    another folder or file. The images of instances_SPLIT.json are in the folder itself, in SPLIT/,
    images/SPLIT/ or images/. The numbers of images, `size` in pixels and `channels` are for a source that
    generates its images. Raises ConfigError, or DataError with all problems of both sets.
    """
    only_file = val is not None
    train, test = _validated(
        [
            _part(data, "train", train_images, size, channels, only_file),
            _part(val or data, "test", test_images, size, channels, only_file),
        ]
    )
    return train, test


def open_test(data: str, *, images: int = 256, size: int = 128, channels: int = 3) -> CocoSet:
    """Open only the test set: the file of a folder with "val" (or, without such a file, "test") in its name,
    a JSON file, or a source with objects. Raises the same errors as `open_coco`.
    """
    [test] = _validated([_part(data, "test", images, size, channels, only_file=True)])
    return test


def forms() -> str:
    """The accepted forms of `data` in a line."""
    return " or ".join(
        [
            "a folder with annotations/*.json and images",
            "its JSON file",
            *(k.form for k in SOURCES if k.has_objects),
        ]
    )


def _part(spec: str, split: str, images: int, size: int, channels: int, only_file: bool) -> "_Part":
    if not spec.strip():
        raise ConfigError(f"--data is empty; give {forms()}")
    if (kind := kind_of(spec)) and kind.has_objects:
        pictures, content = kind.with_objects(split, images, OpenOptions(channels, size))
        return _Part(spec, content, pictures)
    if similar_forms(spec):
        known = [kind.form for kind in SOURCES if kind.has_objects]
        raise ConfigError(f"{spec} has no objects{hint(spec, known) or '; there is ' + ' and '.join(known)}")
    path, root = _find_annotations(spec, ("train",) if split == "train" else ("val", "test"), only_file)
    return _Part(str(path), _load(path), root=root)


def _validated(parts: list["_Part"]) -> list[CocoSet]:
    """The sets, which must have the categories of the first one. Raises DataError with all problems of all
    sets."""
    for validate in (_Part.validate_structure, _Part.validate_content):
        for part in parts:
            validate(part)
        if validate is _Part.validate_content:
            for other in parts[1:]:
                other.compare_categories(parts[0])
        if problems := [part.problems for part in parts if part.wrong]:
            raise DataError("; ".join(problems) + "; fix this first")
    return [part.set() for part in parts]


@functools.cache
def _api() -> Any:
    return optional("pycocotools.mask", "coco")


# --- finding files ------------------------------------------------------------------------------------------


def _find_annotations(spec: str, words: tuple[str, ...], only_file: bool) -> tuple[Path, Path]:
    """The JSON file of a part, and the root folder of its images. With `only_file`, the only file of a folder
    is accepted regardless of its name."""
    path, flag = Path(spec), "--data" if "train" in words else "--val"
    try:
        if path.is_file():
            if not only_file:
                raise DataError(f"{spec} is only one part; give the other file or folder with --val")
            return path, path.parent.parent if path.parent.name == "annotations" else path.parent
        folder = path / "annotations" if (path / "annotations").is_dir() else path
        files = sorted(f for f in folder.iterdir() if f.suffix == ".json" and not f.name.startswith("."))
    except OSError as e:
        raise DataError(f"{spec} cannot be read: {e.strerror}; give {flag} {forms()}") from e
    if only_file and len(files) == 1:
        return files[0], path
    for word in words:
        named = [
            f for f in files if word in f.stem.lower() and ("train" in words or "train" not in f.stem.lower())
        ]
        best = [f for f in named if f.stem.startswith("instances_")] or named
        if len(best) == 1:
            return best[0], path
        if best:
            raise DataError(
                f"{folder} has several files for {word}: {', '.join(f.name for f in best)}; give one with "
                f"{flag}"
            )
    names = ", ".join(f.name for f in files) or "no JSON file"
    raise DataError(
        f"{folder} has no file with {' or '.join(words)} in its name ({names}); give a file with {flag}"
    )


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path} is not JSON ({e}); fetch or write it again") from e


def _find(image: dict[str, Any], root: Path, folders: list[str]) -> tuple[bytes, int] | None:
    """Path below the root, and size in bytes, of an image file."""
    for folder in folders:
        try:
            name = os.fsencode(os.path.join(folder, image["file_name"]))  # noqa: PTH118 - fast for a million files
            status = os.stat(os.path.join(os.fsencode(root), name))  # noqa: PTH116, PTH118
        except (OSError, ValueError):  # ValueError: the name is invalid, for example contains a null byte
            continue
        if stat.S_ISREG(status.st_mode):
            return name, status.st_size
    return None


def _has_annotated_size(path: Path, image: dict[str, Any]) -> bool:
    """Whether the file has the annotated size, in any orientation. Also true if the size cannot be read
    quickly."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as file:
            return sorted(file.size) == sorted((image["width"], image["height"]))
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError):
        return True


# --- validation ---------------------------------------------------------------------------------------------


class _Part:
    """A part during validation: kinds of problems (`wrong`) and of notes (`noted`), each with the ids of the
    affected entries."""

    def __init__(self, name: str, data: Any, pictures: Source | None = None, root: Path = Path()):
        self.name, self.data, self.pictures, self.root = name, data, pictures, root
        self.wrong: dict[str, list[Any]] = defaultdict(list)
        self.noted: dict[str, list[Any]] = defaultdict(list)
        self.codes: list[bytes] = []
        self.trained: list[bool] = []

    @property
    def problems(self) -> str:
        return f"{self.name}: {'; '.join(_lines(self.wrong))}"

    def set(self) -> CocoSet:
        assert self.pictures is not None  # see validate_files
        return CocoSet(self.name, self.pictures, self.data, self.codes, self.trained, _lines(self.noted))

    def validate_structure(self) -> None:
        """Validate the lists and keys, which all other checks require."""
        for name, keys in KEYS.items():
            entries = self.data.get(name) if isinstance(self.data, dict) else None
            if not isinstance(entries, list):
                self.wrong[f"no list {name!r}"] = []
                continue
            if not entries:
                self.wrong[f"{name!r} is empty"] = []
            for number, entry in enumerate(entries):
                for key in keys:
                    if not isinstance(entry, dict) or key not in entry:
                        self.wrong[f"entries of {name!r} without {key!r}"].append(f"number {number}")

    def validate_content(self) -> None:
        """Validate everything else. Adds missing areas to the annotations."""
        images, categories, _ = (self.unique(name) for name in KEYS)
        names = Counter(str(c["name"]) for c in categories.values())
        if repeated := [name for name, count in names.items() if count > 1]:
            self.wrong["names of categories that repeat"] = repeated
        sizes: dict[int | None, tuple[int, int]] = {}
        with_objects: set[int | None] = set()
        for image in images.values():
            h, w = image["height"], image["width"]
            if _is_integer(h) and _is_integer(w) and min(h, w) > 0 and h * w <= PIXEL_LIMIT:
                sizes[image["id"]] = h, w
            else:
                self.wrong["images with an invalid height or width"].append(image["id"])
        for a in self.data["annotations"]:
            image_id, crowd = a["image_id"] if _is_integer(a["image_id"]) else None, bool(a.get("iscrowd"))
            if a.get("iscrowd") not in (None, 0, 1):  # such as the text "0", which would count as true
                self.wrong["iscrowd other than 0 and 1"].append(a["id"])
            if image_id not in images:
                self.wrong["annotations of images that are not listed"].append(a["id"])
            if not _is_integer(a["category_id"]) or a["category_id"] not in categories:
                self.wrong["annotations of categories that are not listed"].append(a["id"])
            size = sizes.get(image_id)
            code, pixels = self.encode_mask(a, *size) if size else (b"", 0)
            no_area = size is not None and self.validate_box(a, *size)
            if size and pixels and not no_area and not crowd and not _is_around(a["bbox"], code, *size):
                self.noted["boxes that are not around their masks"].append(a["id"])
            a["area"] = pixels if a.get("area") is None else a["area"]
            if not is_number(a["area"]) or a["area"] < 0:
                self.wrong["areas that are not between 0 and 1e10"].append(a["id"])
            if crowd:
                self.noted["crowds, left out of training"].append(a["id"])
            elif code and not pixels:
                self.noted["masks without a pixel, left out of training"].append(a["id"])
            self.codes.append(code)
            self.trained.append(not crowd and not no_area and pixels > 0)
            if self.trained[-1]:
                with_objects.add(image_id)
        self.validate_fractions()
        if not with_objects and not self.wrong:
            crowds = self.noted.get("crowds, left out of training", [])
            self.wrong["no object to train on or to score" + ", only crowds" * bool(crowds)] = crowds
        if empty := [k for k in images if k not in with_objects]:
            self.noted["images without an object to train on"] = empty
        if self.pictures is None:
            self.validate_files()

    def unique(self, name: str) -> dict[int, dict[str, Any]]:
        """Entries by their id."""
        entries: dict[int, dict[str, Any]] = {}
        for entry in self.data[name]:
            if not _is_integer(entry["id"]):
                self.wrong[f"ids of {name} that are no integers"].append(entry["id"])
            elif entry["id"] in entries:
                self.wrong[f"ids of {name} that repeat"].append(entry["id"])
            else:
                entries[entry["id"]] = entry
        return entries

    def encode_mask(self, a: dict[str, Any], h: int, w: int) -> tuple[bytes, int]:
        """Compressed run lengths of a mask, and its number of pixels."""
        try:
            code = run_length_code(a.get("segmentation"), h, w)
        except ValueError as e:
            self.wrong[str(e)].append(a["id"])
            return b"", 0
        return code, int(_api().area({"size": [h, w], "counts": code}))

    def validate_box(self, a: dict[str, Any], h: int, w: int) -> bool:
        """Validate a box. Returns whether it has no area or is invalid."""
        box = a["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
            self.wrong["boxes that are not 4 finite numbers"].append(a["id"])
            return True
        x, y, width, height = box
        if no_area := width <= 0 or height <= 0:
            self.noted["boxes without area, left out of training"].append(a["id"])
        elif x >= w or y >= h or x + width <= 0 or y + height <= 0:
            self.wrong["boxes outside their image"].append(a["id"])
        elif x < 0 or y < 0 or x + width > w or y + height > h:
            self.noted["boxes that stick out of their image"].append(a["id"])
        return no_area

    def compare_categories(self, other: "_Part") -> None:
        """Require the categories of the other part."""
        expected, actual = (
            {c["id"]: c["name"] for c in part.data["categories"] if _is_integer(c["id"])}
            for part in (other, self)
        )
        if ids := [k for k in sorted(expected | actual) if expected.get(k) != actual.get(k)]:
            self.wrong[f"categories that are not those of {other.name}"] = [
                f"{k}: {actual.get(k)}, not {expected.get(k)}" for k in ids
            ]

    def validate_fractions(self) -> None:
        """Turn notes that affect too many annotations into problems."""
        mismatch = "boxes that are not around their masks"
        for noted, fraction, wrong in (
            ("boxes without area, left out of training", NO_AREA_FRACTION, "boxes without area"),
            ("masks without a pixel, left out of training", NO_PIXEL_FRACTION, "masks without a pixel"),
            (mismatch, MISMATCH_FRACTION, f"{mismatch} (a box must be x, y, width and height)"),
        ):
            ids = self.noted.get(noted, [])
            if len(ids) > fraction * len(self.codes):
                self.wrong[wrong] = ids

    def validate_files(self) -> None:
        """Find the image files and compare the sizes of some of them with the annotations."""
        stem = PurePath(self.name).stem
        split = stem.removeprefix("instances_")
        folders = [f for f in ("", split, f"images/{split}", "images") if (self.root / f).is_dir()]
        names: list[bytes] = []
        byte_counts, unique_names, images = [], set(), []
        for image in self.data["images"]:
            path = PurePath(image["file_name"]) if isinstance(image["file_name"], str) else None
            if path is None or path.is_absolute() or ".." in path.parts:
                self.wrong["file names that are no paths below the folder"].append(image["file_name"])
            elif file := _find(image, self.root, folders):
                name, byte_count = file
                if name in unique_names:
                    self.noted["image files of several images"].append(image["file_name"])
                unique_names.add(name)
                names.append(name)
                byte_counts.append(byte_count)
                images.append(image)
            else:
                searched = ", ".join(f or "." for f in folders)
                self.wrong[f"image files that are not in {self.root} ({searched})"].append(image["file_name"])
        count = min(CHECKED_FILES, len(names))
        checked = np.unique(np.linspace(0, len(names) - 1, count, dtype=np.int64)).tolist()
        wrong_size = [
            images[k]["file_name"]
            for k in checked
            if not _has_annotated_size(self.root / os.fsdecode(names[k]), images[k])
        ]
        if wrong_size:
            estimate = len(wrong_size) / len(checked) * len(names)
            too_many = estimate > max(WRONG_SIZE_COUNT, WRONG_SIZE_FRACTION * len(names))
            kinds = self.wrong if too_many else self.noted
            kinds[f"images of another size than annotated, of {len(checked)} checked"] = wrong_size
        self.pictures = Files(self.name, self.root, names, byte_counts, [b""] * len(names))


def _lines(kinds: dict[str, list[Any]]) -> list[str]:
    """A line per kind, with the number of affected entries and the first few of them."""
    lines = []
    for kind, ids in kinds.items():
        shown = [printable(str(i).encode("utf-8", "backslashreplace")) for i in ids[:SHOWN]] + ["..."] * (
            len(ids) > SHOWN
        )
        lines.append(f"{kind}: {len(ids):,} ({', '.join(shown)})" if ids else kind)
    return lines


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def is_number(value: Any) -> bool:
    """A finite number that may be a coordinate, a length, an area or a score: the limit of 1e10 is that of
    areas in COCO's evaluation."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e10  # no nan


# --- masks --------------------------------------------------------------------------------------------------


def run_length_code(segmentation: Any, h: int, w: int) -> bytes:
    """COCO's compressed run lengths of a mask given as polygons or as run lengths, compressed or not.

    Everything is validated before it is passed to pycocotools, where run lengths of a wrong size corrupt
    memory. Raises ValueError with the kind of problem.
    """
    mask = _api()
    if not segmentation or (isinstance(segmentation, list) and not any(segmentation)):
        raise ValueError("annotations without segmentation: masks cannot be learned from boxes alone")
    if isinstance(segmentation, list):
        polygons = [p for p in (_polygon(p, h, w) for p in segmentation) if len(p) >= 6]  # 2 points: no pixel
        return mask.merge(mask.frPyObjects(polygons or [[0.0] * 6], h, w))["counts"]
    if not (isinstance(segmentation, dict) and {"size", "counts"} <= segmentation.keys()):
        raise ValueError("segmentations that are neither polygons nor run lengths")
    if segmentation["size"] != [h, w]:
        raise ValueError("masks of another size than their image")
    counts = segmentation["counts"]
    runs = _runs(counts) if isinstance(counts, str) else counts
    if not (isinstance(runs, list) and all(_is_integer(r) and r >= 0 for r in runs) and sum(runs) == h * w):
        raise ValueError("run lengths that do not fit the image")
    return mask.frPyObjects({"size": [h, w], "counts": runs}, h, w)["counts"]


def _is_around(box: list[float], code: bytes, h: int, w: int) -> bool:
    """Whether the box (x, y, width, height) is approximately that of the mask."""
    annotated, tight = (
        np.array([[x - 1, y - 1, width + 2, height + 2]], np.float64)
        for x, y, width, height in (box, _api().toBbox({"size": [h, w], "counts": code}))
    )
    return _api().iou(annotated, tight, [0]).item() >= OVERLAP


def _polygon(points: Any, h: int, w: int) -> list[float]:
    try:
        values = np.array(points)
    except ValueError:  # nested lists of different lengths
        values = np.array(None)
    if values.dtype.kind not in "if" or values.ndim != 1 or values.size % 2 or not np.isfinite(values).all():
        raise ValueError("polygons that are not lists of x and y")
    if np.abs(values).max(initial=0) > FAR * max(h, w):
        raise ValueError("polygons far outside their image")
    return points


def _runs(text: str) -> list[int] | None:
    """Decode compressed run lengths: five bits per character, lowest first, a sixth bit marks continuation;
    from the fourth run on they are differences to the run before the previous one. None for invalid text.
    """
    c = np.frombuffer(text.encode(errors="surrogatepass"), dtype=np.uint8).astype(np.int64) - 48
    if not c.size or c.min() < 0 or c.max() > 63 or c[-1] & 32:
        return None
    ends = np.flatnonzero(c < 32)
    starts = np.concatenate([[0], ends[:-1] + 1])
    shift = 5 * (np.arange(c.size) - np.repeat(starts, ends - starts + 1))
    if shift.max() > 30:
        return None
    runs = np.add.reduceat((c & 31) << shift, starts) - ((c[ends] & 16) << (shift[ends] + 1))
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs.tolist()
