"""Where the files of a set in COCO's format are: COCO's own layout, and those of the usual tools and sites.

    COCO          annotations/instances_train2017.json, images in train2017/, images/train2017/ or images/
    Roboflow      train/_annotations.coco.json beside the images; also valid/ and test/
    CVAT          annotations/instances_default.json, images/
    Label Studio  result.json, images/
    FiftyOne      labels.json, data/

The last three describe a single part. Two of them are given separately, or as train/ and val/ of one folder.
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from ...errors import DataError

PARTS = {
    "train": {"train", "training"},
    "test": {"test", "testing"},
    "val": {"val", "valid", "validation", "dev"},
}
"Words in the name of a file or folder that denote a part. The first one counts: test-dev is a test part."

INSTANCES = re.compile(r"instances.*|_annotations\.coco|result|labels", re.IGNORECASE)
"Names of the files with objects, as opposed to captions and keypoints, among several JSON files."


def part_of(name: str) -> str | None:
    """The part that a name denotes, without regard to case, years and separators.

    >>> part_of("instances_Train2017"), part_of("valid"), part_of("image_info_test-dev"), part_of("latest")
    ('train', 'val', 'test', None)
    """
    words = {word.removesuffix("set") for word in re.findall("[a-z]+", name.lower())}
    return next((part for part, names in PARTS.items() if words & names), None)


def annotation_files(root: Path) -> dict[Path, str | None]:
    """The JSON files of a folder, each with its part: by its own name, or else by the folder train/, val/ or
    test/ that it is in. May raise OSError."""
    files = {file: part_of(file.stem) for file in _json_files(root)}
    if any(files.values()):
        return files
    return {file: part_of(name) for name in _part_folders(root) for file in _json_files(root / name)} or files


def _json_files(folder: Path) -> list[Path]:
    """The JSON files in annotations/, or else in the folder itself."""
    for place in (folder / "annotations", folder):
        files = place.iterdir() if place is folder or place.is_dir() else ()
        if json_files := sorted(
            f for f in files if f.suffix.lower() == ".json" and not f.name.startswith(".")
        ):
            return json_files
    return []


def _part_folders(folder: Path) -> list[str]:
    """The names of the folders in a folder that denote parts."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and part_of(entry.name))


def find_annotations(spec: str, parts: tuple[str, ...], alone: bool, advice: str) -> tuple[Path, list[Path]]:
    """The JSON file of the first of the `parts` that the folder `spec` has, and the files of the others. If
    it has none of them, a single file is accepted with `alone`, whatever its name.

    Raises DataError that ends with the `advice`.
    """
    try:
        files = annotation_files(Path(spec))
    except OSError as e:
        raise DataError(f"{spec} cannot be read: {e.strerror}; {advice}") from e
    named = [_with_objects([file for file, of_part in files.items() if of_part == part]) for part in parts]
    candidates, *unused = list(filter(None, named)) or [[]]
    if alone and not candidates and (len(files) == 1 or not any(files.values())):
        candidates = best if len(best := _with_objects(list(files))) == 1 else []
    if len(candidates) == 1:
        return candidates[0], [file for others in unused for file in others]
    names = ", ".join(str(file.relative_to(spec)) for file in candidates or files) or "none"
    problem = "several JSON files" if candidates else "no JSON file"
    raise DataError(f"{spec} has {problem} named {' or '.join(parts)} ({names}); {advice}")


def _with_objects(files: list[Path]) -> list[Path]:
    """The files that hold objects by their names, if there are any."""
    return [file for file in files if INSTANCES.fullmatch(file.stem)] or files


def load_json(path: Path) -> Any:
    """The content of a JSON file. Raises DataError."""
    try:
        return json.loads(path.read_bytes())
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path} is not JSON ({e}); fetch or write it again") from e


class ImageFolders:
    """The folders in which the images of an annotation file may be."""

    def __init__(self, file: Path):
        self.root = file.parent.parent if file.parent.name == "annotations" else file.parent
        split, part = file.stem.removeprefix("instances_"), part_of(file.stem)
        # Those of the part come first: the other ones may hold images of the same names.
        folders = [split, f"images/{split}"]
        for parent in ("", "images/") if part else ():
            folders += [parent + name for name in _part_folders(self.root / parent) if part_of(name) == part]
        folders += ["", "images", "data"]
        self.folders = [folder for folder in dict.fromkeys(folders) if (self.root / folder).is_dir()]

    def __str__(self) -> str:
        return f"{self.root} ({', '.join(folder or '.' for folder in self.folders)})"

    def find(self, file_name: str) -> tuple[bytes, int] | None:
        """Path below the root, and size in bytes, of an image.

        If it is not where its name says, as with ../../data/upload/1/a.jpg or images\\a.jpg, leading folders
        are left out of the name until there is such a file. A name never leads out of the root.
        """
        parts = [part for part in re.split(r"[/\\]", file_name) if part not in ("", ".", "..")]
        names = [] if file_name.startswith("/") or ".." in file_name.split("/") else [file_name]
        names += ["/".join(parts[k:]) for k in range(len(parts))]
        for name in dict.fromkeys(names):
            for folder in self.folders:
                try:
                    path = os.fsencode(os.path.join(folder, name))  # noqa: PTH118 - fast for a million files
                    status = os.stat(os.path.join(os.fsencode(self.root), path))  # noqa: PTH116, PTH118
                except (OSError, ValueError):  # ValueError: an invalid name, for example with a null byte
                    continue
                if stat.S_ISREG(status.st_mode):
                    return path, status.st_size
        return None
