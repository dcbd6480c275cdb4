"""Image files: a folder of them, or a list."""

import codecs
import errno
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..errors import DataError
from .base import EXTENSIONS, OpenOptions, Source, Strings, numbered, printable

PARTS = {b"train", b"val", b"valid", b"validation", b"test"}
"Folder names that denote parts of a data set, not classes."

TRAIN, TEST = ("train", "training"), ("val", "validation", "valid", "test")
"Names of the two parts of a labeled set, as folders or shards (`train-000.tar`)."


class Files(Source):
    """Image files below a root; an empty label means none, `sizes` are in bytes."""

    kind = "files"

    def __init__(
        self,
        name: str,
        root: Path,
        names: list[bytes],
        sizes: list[int],
        labels: list[bytes],
        notes: tuple[str, ...] = (),
    ):
        self.name, self.root, self.notes = name, os.fsencode(root), notes
        self.names, self.sizes = Strings(names), np.array(sizes, dtype=np.int64)
        self.labels, self.classes = numbered(labels)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        with open(os.path.join(self.root, self.names[index]), "rb") as f:  # noqa: PTH118, PTH123 - names are bytes
            return f.read()

    def where(self, index: int) -> str:
        return printable(os.path.join(self.root, self.names[index]))  # noqa: PTH118

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.names.data.tobytes())
        digest.update(self.names.ends.tobytes() + self.sizes.tobytes())
        return digest.hexdigest()


class Folder(Files):
    """All images below a folder; subfolders are classes, unless they are parts (train, val) or there are
    images beside them."""

    form, kind = "folder", "folder"

    @classmethod
    def matches(cls, spec: str) -> bool:
        return Path(spec).is_dir()

    @classmethod
    def open(cls, spec: str, options: OpenOptions) -> "Folder":
        names, sizes = [], []
        ignored = Counter[str]()
        for name, size in _walk(os.fsencode(spec), ignored, options.tick):
            if name.lower().endswith(tuple(e.encode() for e in EXTENSIONS)):
                names.append(name)
                sizes.append(size)
            else:
                ignored["files of other kinds"] += 1
        if not names:
            raise DataError(
                f"{spec} holds no images ({ignored.total()} other files); looked for {' '.join(EXTENSIONS)}"
            )
        tops = [name.split(b"/")[0] if b"/" in name else b"" for name in names]
        labeled = all(tops) and not set(tops) <= PARTS  # all images in subfolders that are not parts
        labels = tops if labeled else [b""] * len(tops)
        counts = ", ".join(f"{n:,} {kind}" for kind, n in ignored.items())
        notes = (f"left out of {spec}: {counts}",) if ignored else ()
        return cls(spec, Path(spec), names, sizes, labels, notes)

    @classmethod
    def parts(cls, spec: str) -> tuple[str, str] | None:
        return parts_of_folder(spec)


def _walk(root: bytes, ignored: Counter[str], tick: Callable[[float], None]) -> Iterator[tuple[bytes, int]]:
    """Sorted names below the root, with sizes, without hidden ones. Each file and folder appears once, even
    if there are links to it.

    Links that are left out are counted in `ignored`.
    """
    visited: set[tuple[int, int]] = set()

    def walk(folder: bytes, prefix: bytes, done: float, fraction: float) -> Iterator[tuple[bytes, int]]:
        with os.scandir(folder) as listing:
            entries = sorted((e for e in listing if not e.name.startswith(b".")), key=lambda e: e.name)
        for number, entry in enumerate(entries):
            before = done + fraction * number / len(entries)
            tick(before)
            try:
                stat = entry.stat()
            except OSError as e:
                if e.errno in (errno.ENOENT, errno.ELOOP):
                    ignored["broken links"] += 1
                    continue
                raise
            if (stat.st_dev, stat.st_ino) in visited:
                ignored["duplicate links"] += 1
                continue
            visited.add((stat.st_dev, stat.st_ino))
            if entry.is_dir():
                yield from walk(entry.path, prefix + entry.name + b"/", before, fraction / len(entries))
            elif entry.is_file():
                yield prefix + entry.name, stat.st_size

    stat = os.stat(root)  # noqa: PTH116 - bytes
    visited.add((stat.st_dev, stat.st_ino))
    return walk(root, b"", 0.0, 1.0)


def parts_of_folder(spec: str) -> tuple[str, str] | None:
    """The training and test part of a folder, as folders or shards; None if it is not divided. Raises
    DataError if there is only train/."""
    root = Path(spec)
    for train in TRAIN:
        for test in TEST:
            if (root / train).is_dir() and (root / test).is_dir():
                return str(root / train), str(root / test)
            if any(root.glob(f"{train}*.tar")) and any(root.glob(f"{test}*.tar")):
                return str(root / f"{train}*.tar"), str(root / f"{test}*.tar")
    if (
        any((root / train).is_dir() for train in TRAIN)
        and len([p for p in root.iterdir() if p.is_dir()]) == 1
    ):
        raise DataError(
            f"{spec} only holds train/; give the other part with --val, or split the training images with "
            f"--data {spec}/train"
        )
    return None


class ListFile(Files):
    """The files listed in a text file: one relative path per line, optionally a tab and a label."""

    form, kind = "list file (.txt)", "list"

    @classmethod
    def matches(cls, spec: str) -> bool:
        return Path(spec).suffix == ".txt" and Path(spec).is_file()

    @classmethod
    def open(cls, spec: str, options: OpenOptions) -> "ListFile":
        root = Path(spec).parent
        names, sizes, labels = [], [], []
        lines = Path(spec).read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
        for number, line in enumerate(lines, 1):
            options.tick(number / len(lines))
            if not line.strip():
                continue
            name, _, label = line.partition(b"\t")
            try:
                sizes.append(os.stat(os.path.join(os.fsencode(root), name)).st_size)  # noqa: PTH116, PTH118
            except (FileNotFoundError, ValueError):  # ValueError: a null byte
                raise DataError(
                    f"{spec} line {number}: {printable(name)} does not exist; paths are relative to the list"
                ) from None
            names.append(name)
            labels.append(label.strip())
        if not names:
            raise DataError(f"{spec} lists no images; write one path per line, optionally a tab and a label")
        return cls(spec, root, names, sizes, labels)
