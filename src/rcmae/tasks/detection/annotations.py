"""Validation of annotations in COCO's format: all of it before any training, and all problems in one line."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...data.base import Source, printable
from ...data.files import Files
from ...engine.console import ShowProgress
from ...engine.distributed import World
from .layouts import ImageFolders
from .masks import is_around, is_integer, mask_api, run_length_code
from .orientation import Fit, read_headers

NO_AREA_FRACTION = 0.001
"""Tolerated fraction of annotations whose boxes have no area: COCO's train2017 has a few. They are left out
of training."""

NO_PIXEL_FRACTION = 0.01
"""Tolerated fraction of annotations whose masks have no pixel, as for very small objects. They are left out
of training."""

MISMATCH_FRACTION = 0.1
"""Tolerated fraction of annotations whose boxes are not around their masks. COCO has hardly any; with boxes
in another format most would be mismatches."""

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


class Part:
    """A part during validation: kinds of problems (`wrong`) and of notes (`noted`), each with the ids of the
    affected entries."""

    def __init__(self, name: str, data: Any, source: Source | None = None):
        """`data` is the content of the JSON file `name`, or the objects of the images of a `source`."""
        self.name, self.data, self.source = name, data, source
        self.wrong: dict[str, list[Any]] = defaultdict(list)
        self.noted: dict[str, list[Any]] = defaultdict(list)
        self.codes: list[bytes] = []
        "for each annotation, the compressed run lengths of its mask"
        self.trained: list[bool] = []
        "for each annotation, whether it is used in training"
        self.fits = Counter[Fit]()
        "how the image files fit the annotated sizes"

    @property
    def problems(self) -> str:
        return f"{self.name}: {'; '.join(_lines(self.wrong))}"

    @property
    def notes(self) -> list[str]:
        return _lines(self.noted)

    @property
    def categories(self) -> dict[int, str]:
        """The names of the categories by id, in ascending order of the ids."""
        categories = {c["id"]: str(c["name"]) for c in self.data["categories"] if is_integer(c["id"])}
        return dict(sorted(categories.items()))

    def validate_structure(self) -> None:
        """Validate the lists and keys, which all other checks require, and convert ids to integers."""
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
                    elif key.endswith("id") and type(entry[key]) is not int:
                        given, entry[key] = entry[key], whole(entry[key])
                        if is_integer(entry[key]):
                            self.noted["ids given as text or float, read as integers"].append(given)

    def validate_content(self, tick: Callable[[int], None], max_pixels: float = Source.pixel_limit) -> None:
        """Validate everything else but the image files. Adds missing areas to the annotations. `tick` is
        called with the number of annotations that were validated."""
        images, categories, _ = (self.unique(name) for name in KEYS)
        names = Counter(str(c["name"]) for c in categories.values())
        if repeated := [name for name, count in names.items() if count > 1]:
            self.wrong["names of categories that repeat"] = repeated
        sizes: dict[int | None, tuple[int, int]] = {}
        with_objects: set[int | None] = set()
        for image in images.values():
            h, w = image["height"], image["width"]
            if not (is_integer(h) and is_integer(w) and min(h, w) > 0):
                self.wrong["images with an invalid height or width"].append(image["id"])
            elif h * w > max_pixels:
                self.wrong[f"images of more than {max_pixels:,.0f} pixels, see --max-pixels"].append(
                    image["id"]
                )
            else:
                sizes[image["id"]] = h, w
        for number, a in enumerate(self.data["annotations"]):
            tick(number)
            image_id, crowd = a["image_id"] if is_integer(a["image_id"]) else None, bool(a.get("iscrowd"))
            if a.get("iscrowd") not in (None, 0, 1):  # such as the text "0", which would count as true
                self.wrong["iscrowd other than 0 and 1"].append(a["id"])
            if image_id not in images:
                self.wrong["annotations of images that are not listed"].append(a["id"])
            if not is_integer(a["category_id"]) or a["category_id"] not in categories:
                self.wrong["annotations of categories that are not listed"].append(a["id"])
            size = sizes.get(image_id)
            code, pixels = self.encode_mask(a, *size) if size else (b"", 0)
            no_area = size is not None and self.validate_box(a, *size)
            if size and pixels and not no_area and not crowd and not is_around(a["bbox"], code, *size):
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

    def unique(self, name: str) -> dict[int, dict[str, Any]]:
        """Entries by their id."""
        entries: dict[int, dict[str, Any]] = {}
        for entry in self.data[name]:
            if not is_integer(entry["id"]):
                self.wrong[f"ids of {name} that are not whole numbers"].append(entry["id"])
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
        return code, int(mask_api().area({"size": [h, w], "counts": code}))

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

    def use_categories(self, expected: Mapping[int, str], owner: str) -> None:
        """Take the categories of `owner`, which must include those of this part."""
        listed = self.categories
        if wrong := [
            f"{k}: {v}, not {expected.get(k, 'listed')}" for k, v in listed.items() if expected.get(k) != v
        ]:
            self.wrong[f"categories that are not those of {owner}"] = wrong
        elif missing := [f"{k}: {name}" for k, name in expected.items() if k not in listed]:
            self.noted[f"categories that only {owner} lists"] = missing
            self.data["categories"] = [{"id": k, "name": name} for k, name in expected.items()]

    def validate_fractions(self) -> None:
        """Turn notes that affect too many annotations into problems."""
        mismatch = "boxes that are not around their masks"
        for noted, fraction, wrong in (
            ("boxes without area, left out of training", NO_AREA_FRACTION, "boxes without area"),
            (
                "masks without a pixel, left out of training",
                NO_PIXEL_FRACTION,
                "masks without a pixel (coordinates must be in pixels)",
            ),
            (
                mismatch,
                MISMATCH_FRACTION,
                f"{mismatch} (a box must be x, y, width and height; run lengths go down the columns)",
            ),
        ):
            ids = self.noted.get(noted, [])
            if len(ids) > fraction * len(self.codes):
                self.wrong[wrong] = ids

    def validate_files(self, progress: ShowProgress, world: World) -> None:
        """Find the image files, and compare their sizes with the annotated ones."""
        folders = ImageFolders(Path(self.name))
        names: list[bytes] = []
        byte_counts: list[int] = []
        annotated: list[tuple[str, tuple[int, int]]] = []
        file_names: dict[bytes, str] = {}
        for image in self.data["images"]:
            file_name = image["file_name"]
            file = folders.find(file_name) if isinstance(file_name, str) else None
            if file is None:
                self.wrong[f"image files that are not in {folders}"].append(file_name)
                continue
            name, byte_count = file
            if file_names.get(name) == file_name:
                self.noted["image files of several images"].append(file_name)
            elif name in file_names:
                self.wrong["different names of one image file"].append(f"{file_names[name]} = {file_name}")
            if not name.endswith(os.fsencode(file_name.replace("\\", "/").removeprefix("./"))):
                self.noted["image files found by the end of their names"].append(file_name)
            file_names[name] = file_name
            names.append(name)
            byte_counts.append(byte_count)
            annotated.append((file_name, (image["height"], image["width"])))
        paths = [folders.root / os.fsdecode(name) for name in names]
        with progress(f"reading the headers of the images of {self.name}", len(paths)) as tick:
            headers = read_headers(paths, tick, world)
        by_fit: dict[Fit | None, list[str]] = defaultdict(list)
        for (file_name, size), header in zip(annotated, headers, strict=True):
            by_fit[header and header.fit(size)].append(file_name)
        self.fits = Counter({fit: len(of_fit) for fit, of_fit in by_fit.items() if fit})
        if exchanged := by_fit["exchanged"]:
            self.wrong["images with height and width exchanged, though EXIF does not turn them"] = exchanged
        if other := by_fit["other"]:
            too_many = len(other) > max(WRONG_SIZE_COUNT, WRONG_SIZE_FRACTION * len(names))
            (self.wrong if too_many else self.noted)["images of another size than annotated"] = other
        if unknown := by_fit[None]:
            self.noted["image files whose size cannot be read"] = unknown
        self.source = Files(self.name, folders.root, names, byte_counts, [b""] * len(names))


def drop_groups(parts: Sequence[Part], known: Collection[int] = ()) -> None:
    """Leave out categories without annotations in any part that other categories name as their supercategory:
    export sites list such a root with the id 0. Those with a `known` id stay."""
    used = {
        *known,
        *(a["category_id"] for p in parts for a in p.data["annotations"] if is_integer(a["category_id"])),
    }
    for part in parts:
        categories = part.data["categories"]
        members = Counter(str(c["supercategory"]) for c in categories if c.get("supercategory"))

        def is_group(c: dict[str, Any], members: Counter[str] = members) -> bool:
            name = str(c["name"])
            others = members[name] - (c.get("supercategory") == name)
            return others > 0 and is_integer(c["id"]) and c["id"] not in used

        if groups := [c["name"] for c in categories if is_group(c)]:
            part.data["categories"] = [c for c in categories if not is_group(c)]
            part.noted["categories without objects that only group others, left out"] = groups


def whole(value: Any) -> Any:
    """An id as an integer, if it is a whole number given as text or float; otherwise unchanged."""
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,16}(\.0*)?", value):
        return int(value.partition(".")[0])
    return int(value) if isinstance(value, float) and value.is_integer() else value


def is_number(value: Any) -> bool:
    """A finite number that may be a coordinate, a length, an area or a score: the limit of 1e10 is that of
    areas in COCO's evaluation."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e10  # no nan


def _lines(kinds: Mapping[str, list[Any]]) -> list[str]:
    """A line per kind, with the number of affected entries and the first few of them."""
    lines = []
    for kind, ids in kinds.items():
        shown = [printable(str(i).encode("utf-8", "backslashreplace")) for i in ids[:SHOWN]] + ["..."] * (
            len(ids) > SHOWN
        )
        lines.append(f"{kind}: {len(ids):,} ({', '.join(shown)})" if ids else kind)
    return lines
