"""Objects in COCO's layout, from JSON files or from a source that has objects; checked as a whole before any training.

Labels are 1 to K by ascending category id, 0 is background. Boxes and masks are those of the pixels as they are stored: an image is
turned as EXIF says only where it has the annotated height and width that way alone.
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
from ...data.base import Asked, Source, Strings, printable
from ...data.decode import PIXEL_LIMIT
from ...data.files import Files
from ...data.pixels import read_image
from ...data.sources import SOURCES, kind_of, namesakes
from ...engine.metrics import optional
from ...errors import ConfigError, DataError
from .masks import Masks

FLAT_SHARE = 0.001
"Share of the annotations whose boxes may have no area: COCO's train2017 has a few. They are left out of training."

BLANK_SHARE = 0.01
"Share of the annotations whose masks may hold no pixel, as those of very small objects do. They are left out of training."

BESIDE_SHARE = 0.1
"Share of the annotations whose boxes may not be around their masks. COCO's nearly all are; of boxes in another format few would be."

OVERLAP = 0.5
"Least intersection over union of a box and the box around its mask, each a pixel larger on all sides: rounding moves small ones."

FAR = 10
"A polygon's point may lie so many image sides away; further ones are no slip of a pen, and would cost memory."

LOOKED_AT = 200
"Image files of a part whose sizes are compared with the annotations before any work; the others when their turn comes."

ODD_SHARE, ODD = 0.01, 10
"Share or number of images that may have another size than annotated: more of them would end the run (`--bad-share`)."

SHOWN = 3
"Examples of a problem that are named."

KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}
"What the lists of a file hold; annotations also segmentation, and where they have it iscrowd and area."


class Objects(NamedTuple):
    """The objects of an image: labels from 1, masks Bool "h w". Their boxes are those of what a view leaves of the masks."""

    labels: Int64[np.ndarray, " n"]
    masks: Sequence[Bool[np.ndarray, "h w"]]


class CocoSet(Source):
    """A source of images with their objects. Annotations are flat arrays and run lengths: loader processes share them."""

    def __init__(self, name: str, pictures: Source, found: dict[str, Any], codes: list[bytes], trained: list[bool], notes: list[str]):
        """`found` is in COCO's layout and checked, image i is picture i; of each annotation the compressed run lengths of the mask, and
        whether it is trained on. `notes` says in lines what the reader should know of the set.
        """
        self.name, self.in_memory, self.pictures, self.notes = name, pictures.in_memory, pictures, notes
        categories = sorted(found["categories"], key=lambda c: c["id"])
        self.category_ids = [int(c["id"]) for c in categories]
        self.classes = [str(c["name"]) for c in categories]
        self.image_ids = np.array([i["id"] for i in found["images"]], dtype=np.int64)
        self.sizes = np.array([(i["height"], i["width"]) for i in found["images"]], dtype=np.int64)
        self.chosen = np.arange(len(self.sizes))
        place = {int(i): k for k, i in enumerate(self.image_ids)}
        label = {c: k for k, c in enumerate(self.category_ids, 1)}
        owners = np.array([place[a["image_id"]] for a in found["annotations"]], dtype=np.int64)
        order = np.argsort(owners, kind="stable").tolist()
        rows = [found["annotations"][k] for k in order]
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
        """The image as it is annotated. Raises BadImage, also where it has another size than the annotations say."""
        return read_image(self, index, channels, self.size(index))

    def where(self, index: int) -> str:
        return self.pictures.where(int(self.chosen[index]))

    def counts(self) -> Int64[np.ndarray, "n"]:
        """Objects that are trained on, by image."""
        before = np.concatenate([[0], np.cumsum(self.trained)])
        return np.diff(before[self.starts])[self.chosen]

    def fingerprint(self) -> str:
        """A hash of all annotations, and of names and sizes of the images."""
        digest = hashlib.sha256((self.pictures.fingerprint() + json.dumps([self.category_ids, self.classes])).encode())
        arrays = (self.chosen, self.image_ids, self.sizes, self.starts, self.ids, self.object_labels, self.boxes, self.areas, self.crowds)
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
        """What is trained on in an image: no crowds, and nothing without a pixel."""
        rows = [k for k in self._rows(index) if self.trained[k]]
        h, w = self.size(index)
        return Objects(self.object_labels[rows], Masks(rows, lambda k: self._mask(k, h, w)))

    @property
    def truth(self) -> dict[str, Any]:
        """All annotations, crowds too, as COCO's evaluation wants them: masks as compressed run lengths. Made when it is asked for."""
        images, annotations = [], []
        for index in range(len(self)):
            key, (h, w) = self.image_id(index), self.size(index)
            images.append({"id": key, "height": h, "width": w})
            annotations += [
                {"id": int(self.ids[k]), "image_id": key, "category_id": self.category_ids[self.object_labels[k] - 1],
                 "bbox": self.boxes[k].tolist(), "area": float(self.areas[k]), "iscrowd": int(self.crowds[k]),
                 "segmentation": {"size": [h, w], "counts": self.codes[k].decode()}}
                for k in self._rows(index)
            ]  # fmt: skip
        categories = [{"id": c, "name": name} for c, name in zip(self.category_ids, self.classes, strict=True)]
        return {"images": images, "categories": categories, "annotations": annotations}

    def _mask(self, k: int, h: int, w: int) -> Bool[np.ndarray, "{h} {w}"]:
        return _api().decode({"size": [h, w], "counts": self.codes[k]}).view(bool)

    def _rows(self, index: int) -> range:
        i = self.chosen[index]
        return range(int(self.starts[i]), int(self.starts[i + 1]))


def few(whole: CocoSet, count: int, seed: int = 0) -> CocoSet:
    """`count` images of a set: the first of a permutation, so that more of them hold fewer. Raises DataError."""
    if not 0 < count <= len(whole):
        raise DataError(f"{whole.name} holds {how_many(len(whole), 'image')}, of which {count:,} cannot be taken")
    part = copy.copy(whole)
    part.chosen = whole.chosen[np.random.Generator(np.random.Philox(key=seed, counter=[0, 6, 0, 0])).permutation(len(whole))[:count]]
    if not any(part.trained[part._rows(i)].any() for i in range(count)):
        raise DataError(f"no object in {how_many(count, 'image')} of {whole.name}, taken with seed {seed}; take more")
    return part


def open_coco(
    data: str, val: str | None = None, *, train_images: int = 1024, test_images: int = 256, size: int = 128, channels: int = 3
) -> tuple[CocoSet, CocoSet]:
    """What is trained on and what is scored: `data` is a folder in COCO's layout, a JSON file, or a source that has objects.

    In a folder the JSON files lie in annotations/, or else in the folder itself; "train" in its name chooses one, "val" (or else "test")
    the other, unless `val` names another folder or file. Images lie in the folder, in SPLIT/, images/SPLIT/ or images/, where the file
    is instances_SPLIT.json. The numbers of images, their size in pixels and the channels are for such a source. Raises ConfigError, or
    DataError with all that is wrong in both parts.
    """
    train = _part(data, "train", train_images, size, channels, alone=val is not None)
    test = _part(val or data, "test", test_images, size, channels, alone=val is not None)
    train, test = _examined([train, test])
    return train, test


def open_test(data: str, *, images: int = 256, size: int = 128, channels: int = 3) -> CocoSet:
    """What is scored, alone: a folder's file with "val" (or else "test") in its name, a JSON file, or a source with objects.

    Raises likewise.
    """
    [test] = _examined([_part(data, "test", images, size, channels, alone=True)])
    return test


def forms() -> str:
    """How objects can be given, in a line."""
    return " or ".join(["a folder with annotations/*.json and images", "its JSON file", *(k.form for k in SOURCES if k.has_objects)])


def _part(spec: str, split: str, images: int, size: int, channels: int, alone: bool) -> "_Part":
    if not spec.strip():
        raise ConfigError(f"--data is empty; give {forms()}")
    if (kind := kind_of(spec)) and kind.has_objects:
        pictures, found = kind.with_objects(split, images, Asked(channels, size))
        return _Part(spec, found, pictures)
    if namesakes(spec):
        known = [kind.form for kind in SOURCES if kind.has_objects]
        raise ConfigError(f"{spec} has no objects{hint(spec, known) or '; there is ' + ' and '.join(known)}")
    path, root = _place(spec, ("train",) if split == "train" else ("val", "test"), alone)
    return _Part(str(path), _load(path), root=root)


def _examined(parts: list["_Part"]) -> list[CocoSet]:
    """The sets, the first of which tells the categories. Raises DataError with all that is wrong in any of them."""
    for examine in (_Part.structure, _Part.content):
        for part in parts:
            examine(part)
        if examine is _Part.content:
            for other in parts[1:]:
                other.compare(parts[0])
        if problems := [part.problems for part in parts if part.wrong]:
            raise DataError("; ".join(problems) + "; mend this first")
    return [part.set() for part in parts]


@functools.cache
def _api() -> Any:
    return optional("pycocotools.mask", "coco")


# --- where things are -------------------------------------------------------------------------------------------------


def _place(spec: str, words: tuple[str, ...], alone: bool) -> tuple[Path, Path]:
    """The JSON file of a part, and the folder its images are looked for in. `alone`: a folder's only file is it, whatever its name."""
    path, flag = Path(spec), "--data" if "train" in words else "--val"
    try:
        if path.is_file():
            if not alone:
                raise DataError(f"{spec} is one part; name the other file or folder with --val")
            return path, path.parent.parent if path.parent.name == "annotations" else path.parent
        folder = path / "annotations" if (path / "annotations").is_dir() else path
        files = sorted(f for f in folder.iterdir() if f.suffix == ".json" and not f.name.startswith("."))
    except OSError as e:
        raise DataError(f"{spec} cannot be read: {e.strerror}; give {flag} {forms()}") from e
    if alone and len(files) == 1:
        return files[0], path
    for word in words:
        named = [f for f in files if word in f.stem.lower() and ("train" in words or "train" not in f.stem.lower())]
        best = [f for f in named if f.stem.startswith("instances_")] or named
        if len(best) == 1:
            return best[0], path
        if best:
            raise DataError(f"{folder} has several files for {word}: {', '.join(f.name for f in best)}; give one with {flag}")
    found = ", ".join(f.name for f in files) or "no JSON file"
    raise DataError(f"{folder} has no file with {' or '.join(words)} in its name ({found}); give a file with {flag}")


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path} is not JSON ({e}); fetch or write it again") from e


def _find(image: dict[str, Any], root: Path, folders: list[str]) -> tuple[bytes, int] | None:
    """Name below the root, and size in bytes, of an image's file."""
    for folder in folders:
        try:
            name = os.fsencode(os.path.join(folder, image["file_name"]))  # noqa: PTH118 - quick, over a million names
            found = os.stat(os.path.join(os.fsencode(root), name))  # noqa: PTH116, PTH118
        except (OSError, ValueError):  # ValueError: no name that a system could give
            continue
        if stat.S_ISREG(found.st_mode):
            return name, found.st_size
    return None


def _as_annotated(path: Path, image: dict[str, Any]) -> bool:
    """Has the file the annotated size, stored upright or turned? True also of what is not easily told."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as file:
            return sorted(file.size) == sorted((image["width"], image["height"]))
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError):
        return True


# --- what is wrong ----------------------------------------------------------------------------------------------------


class _Part:
    """One part while it is examined: kinds of problems and of notes, each with the ids at which it was met."""

    def __init__(self, name: str, found: Any, pictures: Source | None = None, root: Path = Path()):
        self.name, self.found, self.pictures, self.root = name, found, pictures, root
        self.wrong: dict[str, list[Any]] = defaultdict(list)
        self.noted: dict[str, list[Any]] = defaultdict(list)
        self.codes: list[bytes] = []
        self.trained: list[bool] = []

    @property
    def problems(self) -> str:
        return f"{self.name}: {'; '.join(_lines(self.wrong))}"

    def set(self) -> CocoSet:
        return CocoSet(self.name, self.pictures, self.found, self.codes, self.trained, _lines(self.noted))

    def structure(self) -> None:
        """Lists and keys, without which there is nothing to look at."""
        for name, keys in KEYS.items():
            entries = self.found.get(name) if isinstance(self.found, dict) else None
            if not isinstance(entries, list):
                self.wrong[f"no list {name!r}"] = []
                continue
            if not entries:
                self.wrong[f"{name!r} is empty"] = []
            for place, entry in enumerate(entries):
                for key in keys:
                    if not isinstance(entry, dict) or key not in entry:
                        self.wrong[f"entries of {name!r} without {key!r}"].append(f"number {place}")

    def content(self) -> None:
        """All else. Fills in what each annotation lacks."""
        images, categories, _ = (self.unique(name) for name in KEYS)
        names = Counter(str(c["name"]) for c in categories.values())
        if repeated := [name for name, count in names.items() if count > 1]:
            self.wrong["names of categories that repeat"] = repeated
        sized: dict[int, tuple[int, int]] = {}
        busy: set[int] = set()
        for image in images.values():
            h, w = image["height"], image["width"]
            if _whole(h) and _whole(w) and min(h, w) > 0 and h * w <= PIXEL_LIMIT:
                sized[image["id"]] = h, w
            else:
                self.wrong["images whose height and width are no numbers of pixels"].append(image["id"])
        for a in self.found["annotations"]:
            image, crowd = a["image_id"] if _whole(a["image_id"]) else None, bool(a.get("iscrowd"))
            if a.get("iscrowd") not in (None, 0, 1):  # text, say: "0" would be a crowd
                self.wrong["iscrowd other than 0 and 1"].append(a["id"])
            if image not in images:
                self.wrong["annotations of images that are not listed"].append(a["id"])
            if not _whole(a["category_id"]) or a["category_id"] not in categories:
                self.wrong["annotations of categories that are not listed"].append(a["id"])
            code, pixels = self.code(a, *sized[image]) if image in sized else (b"", 0)
            flat = image in sized and self.box(a, *sized[image])
            if pixels and not flat and not crowd and not _around(a["bbox"], code, *sized[image]):
                self.noted["boxes that are not around their masks"].append(a["id"])
            a["area"] = pixels if a.get("area") is None else a["area"]
            if not is_number(a["area"]) or a["area"] < 0:
                self.wrong["areas that are no finite numbers from 0"].append(a["id"])
            if crowd:
                self.noted["crowds, left out of training"].append(a["id"])
            elif code and not pixels:
                self.noted["masks without a pixel, left out of training"].append(a["id"])
            self.codes.append(code)
            self.trained.append(not crowd and not flat and pixels > 0)
            if self.trained[-1]:
                busy.add(image)
        self.shares()
        if not busy and not self.wrong:
            crowds = self.noted.get("crowds, left out of training", [])
            self.wrong["no object to train on or to score" + ", only crowds" * bool(crowds)] = crowds
        if empty := [k for k in images if k not in busy]:
            self.noted["images without an object to train on"] = empty
        if self.pictures is None:
            self.files()

    def unique(self, name: str) -> dict[int, dict[str, Any]]:
        """Entries by their id."""
        entries: dict[int, dict[str, Any]] = {}
        for entry in self.found[name]:
            if not _whole(entry["id"]):
                self.wrong[f"ids of {name} that are no whole numbers"].append(entry["id"])
            elif entry["id"] in entries:
                self.wrong[f"ids of {name} that repeat"].append(entry["id"])
            else:
                entries[entry["id"]] = entry
        return entries

    def code(self, a: dict[str, Any], h: int, w: int) -> tuple[bytes, int]:
        """Compressed run lengths of a mask, and its pixels."""
        try:
            code = run_length_code(a.get("segmentation"), h, w)
        except ValueError as e:
            self.wrong[str(e)].append(a["id"])
            return b"", 0
        return code, int(_api().area({"size": [h, w], "counts": code}))

    def box(self, a: dict[str, Any], h: int, w: int) -> bool:
        """Is the box without area (or no box at all)?"""
        box = a["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
            self.wrong["boxes that are not 4 finite numbers"].append(a["id"])
            return True
        x, y, width, height = box
        if flat := width <= 0 or height <= 0:
            self.noted["boxes without area, left out of training"].append(a["id"])
        elif x >= w or y >= h or x + width <= 0 or y + height <= 0:
            self.wrong["boxes outside their image"].append(a["id"])
        elif x < 0 or y < 0 or x + width > w or y + height > h:
            self.noted["boxes that stick out of their image"].append(a["id"])
        return flat

    def compare(self, other: "_Part") -> None:
        """The categories must be those of the other part."""
        one, two = ({c["id"]: c["name"] for c in part.found["categories"] if _whole(c["id"])} for part in (other, self))
        if ids := [k for k in sorted(one | two) if one.get(k) != two.get(k)]:
            self.wrong[f"categories that are not those of {other.name}"] = [f"{k}: {two.get(k)}, not {one.get(k)}" for k in ids]

    def shares(self) -> None:
        """What a set may have a few of is wrong where there are more."""
        beside = "boxes that are not around their masks"
        for noted, share, wrong in (
            ("boxes without area, left out of training", FLAT_SHARE, "boxes without area"),
            ("masks without a pixel, left out of training", BLANK_SHARE, "masks without a pixel"),
            (beside, BESIDE_SHARE, f"{beside} (a box must be x, y, width and height)"),
        ):
            ids = self.noted.get(noted, [])
            if len(ids) > share * len(self.codes):
                self.wrong[wrong] = ids

    def files(self) -> None:
        """Look for the images."""
        stem = PurePath(self.name).stem
        split = stem.removeprefix("instances_")
        folders = [f for f in ("", split, f"images/{split}", "images") if (self.root / f).is_dir()]
        names, sizes, places, there = [], [], set(), []
        for image in self.found["images"]:
            path = PurePath(image["file_name"]) if isinstance(image["file_name"], str) else None
            if path is None or path.is_absolute() or ".." in path.parts:
                self.wrong["file names that are no paths below the folder"].append(image["file_name"])
            elif found := _find(image, self.root, folders):
                if found[0] in places:
                    self.noted["image files of several images"].append(image["file_name"])
                places.add(found[0])
                names.append(found[0])
                sizes.append(found[1])
                there.append(image)
            else:
                looked = ", ".join(f or "." for f in folders)
                self.wrong[f"image files that are not in {self.root} ({looked})"].append(image["file_name"])
        looked = np.unique(np.linspace(0, len(names) - 1, min(LOOKED_AT, len(names)), dtype=np.int64)).tolist()
        odd = [there[k]["file_name"] for k in looked if not _as_annotated(self.root / os.fsdecode(names[k]), there[k])]
        if odd:
            many = len(odd) / len(looked) * len(names) > max(ODD, ODD_SHARE * len(names))
            kinds = self.wrong if many else self.noted
            kinds[f"images of another size than annotated, of {len(looked)} looked at"] = odd
        self.pictures = Files(self.name, self.root, names, sizes, [b""] * len(names))


def _lines(kinds: dict[str, list[Any]]) -> list[str]:
    """A line a kind, with how often it was met and a few of the places."""
    lines = []
    for kind, ids in kinds.items():
        shown = [printable(str(i).encode("utf-8", "backslashreplace")) for i in ids[:SHOWN]] + ["..."] * (len(ids) > SHOWN)
        lines.append(f"{kind}: {len(ids):,} ({', '.join(shown)})" if ids else kind)
    return lines


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def is_number(value: Any) -> bool:
    """A finite number that may be a place, a length, an area or a score: COCO's evaluation knows no area above 1e10."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e10  # false for what is no number


# --- masks ------------------------------------------------------------------------------------------------------------


def run_length_code(segmentation: Any, h: int, w: int) -> bytes:
    """COCO's compressed run lengths of a mask given as polygons or as run lengths, compressed or not.

    Everything is checked before pycocotools sees it: run lengths that do not fit corrupt its memory. Raises ValueError with the kind of
    problem.
    """
    mask = _api()
    if not segmentation or (isinstance(segmentation, list) and not any(segmentation)):
        raise ValueError("annotations without segmentation, from whose boxes alone no masks are learnt")
    if isinstance(segmentation, list):
        polygons = [_polygon(p, h, w) for p in segmentation]
        codes = mask.frPyObjects([p for p in polygons if len(p) >= 6] or [[0.0] * 6], h, w)  # two points hold no pixel
        return mask.merge(codes)["counts"]
    if not (isinstance(segmentation, dict) and {"size", "counts"} <= segmentation.keys()):
        raise ValueError("segmentations that are neither polygons nor run lengths")
    if segmentation["size"] != [h, w]:
        raise ValueError("masks of another size than their image")
    counts = segmentation["counts"]
    runs = _runs(counts) if isinstance(counts, str) else counts
    if not (isinstance(runs, list) and all(_whole(r) and r >= 0 for r in runs) and sum(runs) == h * w):
        raise ValueError("run lengths that do not make up the image")
    return mask.frPyObjects({"size": [h, w], "counts": runs}, h, w)["counts"]


def _around(box: list[float], code: bytes, h: int, w: int) -> bool:
    """Is the box, x y width height, about the one around the mask?"""
    one, two = ([[x - 1, y - 1, width + 2, height + 2]] for x, y, width, height in (box, _api().toBbox({"size": [h, w], "counts": code})))
    return _api().iou(np.array(one, np.float64), np.array(two, np.float64), [0]).item() >= OVERLAP


def _polygon(points: Any, h: int, w: int) -> list[float]:
    try:
        values = np.array(points)
    except ValueError:  # lists of other lengths
        values = np.array(None)
    if values.dtype.kind not in "if" or values.ndim != 1 or values.size % 2 or not np.isfinite(values).all():
        raise ValueError("polygons that are not lists of x and y")
    if np.abs(values).max(initial=0) > FAR * max(h, w):
        raise ValueError("polygons far outside their image")
    return points


def _runs(text: str) -> list[int] | None:
    """Compressed run lengths spelled out: five bits a character, lowest first, a sixth says that more follow; from the fourth on the
    difference to the run before the last. None for other text.
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
