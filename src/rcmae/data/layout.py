"""What the names of files mean: images, parts of a set, classes. The same in folders and in tar files.

Every file that is found is read or counted: an `ImageFilter` counts what is left out, by reason.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from ..config import how_many
from .base import EXTENSIONS, missing_extra, printable

# --- files --------------------------------------------------------------------------------------------------

SYSTEM = {
    b"@eadir",
    b"__macosx",
    b"thumbs.db",
    b"desktop.ini",
    b"$recycle.bin",
    b"#recycle",
    b"lost+found",
    b"system volume information",
}
"Files and folders, in lower case, that operating systems and network drives leave beside images."


def hidden(name: bytes) -> bool:
    """Whether a file or folder of this name, without its path, is hidden or left by an operating system."""
    return name.startswith(b".") or name.lower() in SYSTEM


class ImageFilter:
    """Tells by their names which of the files found are images to read, and counts the others in
    `left_out`."""

    def __init__(self, any_kind: bool = False) -> None:
        """With `any_kind`, files are taken whatever their extension, unless they need an extra."""
        self.any_kind = any_kind
        self.left_out = Counter[str]()
        "number of files by reason, which is in the plural"
        self.unread: set[bytes] = set()
        "folders with images that need an extra"
        self._reasons: dict[bytes, str] = {}

    def takes(self, path: bytes) -> bool:
        """Whether the file is an image to read; it is counted if not."""
        folder, _, name = path.rpartition(b"/")
        _, dot, extension = name.rpartition(b".")
        extension = dot + extension if dot else b""
        reason = self._reasons.get(extension)
        if reason is None:
            reason = self._reasons[extension] = self._why_not(extension.decode("ascii", "replace").lower())
        if reason:
            self.left_out[reason] += 1
            if reason.endswith(" extra)"):
                self.unread.add(folder)
        return not reason

    def _why_not(self, extension: str) -> str:
        """Why files with this extension, which includes the dot, are not read; empty if they are."""
        if extra := missing_extra(extension):
            return f"{extension} (install the [{extra}] extra)"
        if extension in EXTENSIONS or self.any_kind:
            return ""
        if not extension:
            return "files without an extension"
        return extension if re.fullmatch(r"\.[a-z][a-z0-9]{0,9}", extension) else "files of other kinds"

    def is_hidden(self, name: bytes) -> bool:
        """Whether a file or folder is hidden, see `hidden`; it is counted if so."""
        if is_hidden := hidden(name):
            self.left_out["hidden or system files"] += 1
        return is_hidden

    def vanished(self, names: Sequence[bytes]) -> tuple[str, ...]:
        """A note on folders of which no image is read for lack of an extra, given the names of the images
        that are read."""
        if not self.unread:
            return ()
        folders = self.unread - {os.path.dirname(name) for name in names} - {b""}  # noqa: PTH120
        return (f"no image of {listed(folders)} can be read without the extra",) if folders else ()


# --- parts of a set -----------------------------------------------------------------------------------------

_PARTS = re.compile(
    r"(?<![a-z])(?:(?P<train>train(?:ing|val)?)|(?P<val>val(?:id(?:ation)?)?|dev)|(?P<test>test(?:ing)?)"
    r"|(?P<unlabeled>unlabell?ed))(?:[\W_]*(?:set|data|images?|imgs?|files?|folder))?(?![a-z])"
)

TESTING = {"val": "validation", "test": "test"}
"The parts that are not trained on, in words, the preferred one first."


def part_of(name: str) -> str:
    """The part of a set that a folder, shard or split is called after: train, val, test, unlabeled, or "" if
    none.

    The first word that denotes a part counts, in any case and with any prefix or suffix: "train2017",
    "seg_train", "Validation Set", "imagenet1k-val-0001.tar", "testA".
    """
    match = _PARTS.search(_words(name))
    return (match.lastgroup or "") if match else ""


def _words(name: str) -> str:
    """A name in lower case, with spaces between words that are separated by capitals only."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()


def divide(folders: Mapping[str, Collection[str | bytes]]) -> dict[str, str]:
    """The part that each folder of a set denotes ("" for none); {} if they are not parts. `folders` maps the
    folders to their subfolders.

    Since a class may be called "train" or "test tube", there must be folders for training and for testing
    whose names have the same other words, if any; or all folders must be called after parts, or have the same
    content. Without a folder for testing, all must be called after parts.
    """
    kinds = {name: part_of(name) for name in folders}
    named = {name: kind for name, kind in kinds.items() if kind}
    if "train" not in named.values():
        return {}
    if TESTING.keys().isdisjoint(named.values()):
        return kinds if len(named) == len(kinds) else {}
    others = {name: re.sub("[^a-z]+", " ", _PARTS.sub("", _words(name), 1)).strip() for name in named}
    pairs = {
        (others[a], others[b]) for a in named if named[a] == "train" for b in named if named[b] in TESTING
    }
    same = any(a == b for a, b in pairs)
    return kinds if same or len(named) == len(kinds) or _alike(folders) else {}


def _alike(folders: Mapping[str, Collection[str | bytes]]) -> bool:
    """Whether all folders have the same subfolders, and no images beside them.

    There must be several: in Tiny ImageNet, each class has a single folder of the same name.
    """
    first, *others = (set(inside) for inside in folders.values())
    return len(first) > 1 and all(first) and bool(others) and all(inside == first for inside in others)


# --- classes ------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """What the folders of a set mean, for each image."""

    labels: list[bytes]
    "the class, empty for none"
    parts: list[str]
    "the part of the set, see `part_of`; empty for none"
    why_unlabeled: str = ""
    "why the folders are not taken for classes"
    notes: tuple[str, ...] = ()


def arrange(names: Sequence[bytes]) -> Layout:
    """The classes and parts that images belong to by their paths.

    Folders that hold all images are looked through. The topmost others are classes, unless they are parts or
    all have the same subfolders, or images lie beside them. Within a part, its own folders are the classes.
    """
    start = len(_shared_folder(names))
    tops: list[bytes] = []
    inside: dict[bytes, set[bytes]] = defaultdict(set)
    for name in names:
        top, slash, rest = name[start:].partition(b"/")
        tops.append(top if slash else b"")
        if slash:
            inner, slash, _ = rest.partition(b"/")
            inside[top].add(inner if slash else b"")
    folders = {os.fsdecode(top): names for top, names in inside.items()}
    if parts := divide(folders):
        return _divided(names, [os.fsdecode(top) for top in tops], parts)
    no_labels, no_parts = [b""] * len(names), [""] * len(names)
    named = [os.fsencode(folder) for folder in folders if part_of(folder)]
    why = ""
    if beside := tops.count(b""):
        why = f"{how_many(beside, 'image')} beside the folders {listed(inside)}" if inside else ""
    elif 1 < len(named) >= len(folders) / 2:
        why = f"the folders {listed(inside)} are called after parts of a set"
    elif _alike(folders):
        content = listed(next(iter(inside.values())))
        why = f"the folders {listed(inside)} all have the same subfolders ({content})"
    else:
        notes = (f"taken for classes, not for parts of a set: {listed(named)}",) if named else ()
        return Layout(tops, no_parts, notes=notes)
    return Layout(no_labels, no_parts, why)


def _divided(names: Sequence[bytes], tops: list[str], parts: dict[str, str]) -> Layout:
    """The layout of a set whose topmost folders are parts."""
    labels, why = [b""] * len(names), ""
    inside = defaultdict[str, list[int]](list)
    for i, top in enumerate(tops):
        inside[top].append(i)
    for folder, part in parts.items():
        if part in ("train", *TESTING):
            chosen = inside[folder]
            within = arrange([names[i] for i in chosen])
            why = within.why_unlabeled if part == "train" else why
            for i, label in zip(chosen, within.labels, strict=True):
                labels[i] = label
    return Layout(labels, [parts.get(top, "") for top in tops], why)


def _shared_folder(names: Sequence[bytes]) -> bytes:
    """The path of the deepest folder that holds all files, with a slash at its end."""
    if not names:
        return b""
    shared = os.path.commonpath([os.path.dirname(min(names)), os.path.dirname(max(names))])  # noqa: PTH120
    return shared + b"/" if shared else b""


def listed(names: Iterable[bytes]) -> str:
    """The first names in alphabetical order, and whether there are more."""
    ordered = sorted(names)
    return ", ".join(map(printable, ordered[:4])) + (", ..." if len(ordered) > 4 else "")


class Selection(NamedTuple):
    """The images that are read of those found."""

    chosen: list[int]
    labels: list[bytes]
    "the class of each chosen image, empty for none"
    why_unlabeled: str
    notes: tuple[str, ...]


def select(
    names: Sequence[bytes],
    links: Collection[int],
    image_filter: ImageFilter,
    labels: Sequence[bytes] = (),
    part: str = "",
) -> Selection:
    """The images to read: those of `part`, or by default all but the parts for testing.

    Labels are `labels`, if any image has one, otherwise by folder. `links` are the images that are further
    links to another one: they are kept if they have a label, since classes are balanced so. What is left out
    is counted in `image_filter`.
    """
    layout, given = arrange(names), any(labels)
    known, why = (labels, several_labels(names, labels)) if given else (layout.labels, layout.why_unlabeled)
    if why:
        known = [b""] * len(names)
    chosen = [i for i, p in enumerate(layout.parts) if (p == part if part else p not in TESTING)]
    notes = () if given else (*layout.notes, *image_filter.vanished(names))
    if not part:
        image_filter.left_out.update(f"images of the {TESTING[p]} part" for p in layout.parts if p in TESTING)
    if copies := set(links).intersection(chosen):
        dropped = {i for i in copies if not known[i]}
        image_filter.left_out.update("duplicate links" for _ in dropped)
        chosen = [i for i in chosen if i not in dropped]
        if kept := len(copies) - len(dropped):
            notes += (
                f"{how_many(kept, 'labeled image')} linked to other images of the set: kept, so copies of an "
                "image may be in training and in testing",
            )
    return Selection(chosen, [known[i] for i in chosen], why, notes)


# --- labels -------------------------------------------------------------------------------------------------

LABEL_NAMES = (
    *("cls", "label", "labels", "class", "classes", "class_id", "class_name", "class_label", "label_name"),
    *("category", "category_id", "target"),
)
"Names of label columns in tables, and of label keys in JSON, in lower case."

_SEVERAL = re.compile(rb"[|;\t\n]|^\[.*\]$|^\d+([ ,]+\d+)+$")


def several_labels(names: Sequence[bytes], labels: Sequence[bytes]) -> str:
    """Why labels cannot be used, if an image has several of them, as in "cat|dog", "cat,dog", "[0, 3]" or
    "0 3"; otherwise empty.

    Names of classes may contain commas: "cat,dog" is such a name, unless "cat" or "dog" is another label or
    stands elsewhere in another one, as in "dog,owl". With a space after the comma it always is.
    """
    if not (multiple := combined(set(labels))):
        return ""
    image, label = next(pair for pair in zip(names, labels, strict=True) if pair[1] in multiple)
    return MULTI_LABEL.format(printable(image), printable(label))


def combined(labels: set[bytes]) -> set[bytes]:
    """The labels that consist of several ones."""
    return {label for label in labels if _SEVERAL.search(label)} or _joined(labels)


def _joined(labels: set[bytes]) -> set[bytes]:
    """The labels that consist of several ones, separated by commas."""
    lists = {label: label.split(b",") for label in labels if re.search(rb"\S,\S", label)}
    places: dict[bytes, set[int]] = defaultdict(set)
    for parts in lists.values():
        for place, part in enumerate(parts):
            places[part].add(place)
    return {
        label
        for label, parts in lists.items()
        if any(part in labels or len(places[part]) > 1 for part in parts)
    }


MULTI_LABEL = "{} has several labels ({}), and multi-label data is not supported"
