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
from .base import EXTENSIONS, Asked, Source, Strings, numbered, printable

PARTS = {b"train", b"val", b"valid", b"validation", b"test"}
"Folders that part a set, and are no classes."

TRAIN, TEST = ("train", "training"), ("val", "validation", "valid", "test")
"What the two parts of a labelled set are called, as folders or as shards (`train-000.tar`)."


class Files(Source):
    """Image files below a root; `names` and `labels` (empty: none) are bytes, `sizes` of the files in bytes."""

    kind = "files"

    def __init__(self, name: str, root: Path, names: list[bytes], sizes: list[int], labels: list[bytes], notes: tuple[str, ...] = ()):
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
    """All images below a folder; its folders are classes, unless they part the set or images lie beside them."""

    form, kind = "folder", "folder"

    @classmethod
    def matches(cls, spec: str) -> bool:
        return Path(spec).is_dir()

    @classmethod
    def open(cls, spec: str, asked: Asked) -> "Folder":
        found, left = [], Counter[str]()
        for name, size in _walk(os.fsencode(spec), left, asked.tick):
            if name.lower().endswith(tuple(e.encode() for e in EXTENSIONS)):
                found.append((name, size))
            else:
                left["files of other kinds"] += 1
        if not found:
            raise DataError(f"{spec} holds no images ({left.total()} other files); looked for {' '.join(EXTENSIONS)}")
        tops = [name.split(b"/")[0] if b"/" in name else b"" for name, _ in found]
        labelled = all(tops) and not set(tops) <= PARTS  # images beside the folders, or parts of a set: these are no classes
        labels = tops if labelled else [b""] * len(tops)
        notes = (f"left out of {spec}: " + ", ".join(f"{n:,} {what}" for what, n in left.items()),) if left else ()
        return cls(spec, Path(spec), [n for n, _ in found], [s for _, s in found], labels, notes)

    @classmethod
    def parts(cls, spec: str) -> tuple[str, str] | None:
        return parts_of_folder(spec)


def _walk(root: bytes, left: Counter[str], tick: Callable[[float], None]) -> Iterator[tuple[bytes, int]]:
    """Names below the root, with sizes, sorted. Hidden ones are left out; each file and folder is met once, however linked.

    What else is left out is counted in `left`.
    """
    met: set[tuple[int, int]] = set()

    def below(folder: bytes, prefix: bytes, done: float, share: float) -> Iterator[tuple[bytes, int]]:
        with os.scandir(folder) as listed:
            entries = sorted((e for e in listed if not e.name.startswith(b".")), key=lambda e: e.name)
        for number, entry in enumerate(entries):
            before = done + share * number / len(entries)
            tick(before)
            try:
                stat = entry.stat()
            except OSError as e:
                if e.errno in (errno.ENOENT, errno.ELOOP):  # a link to nowhere, or to itself
                    left["links to nowhere"] += 1
                    continue
                raise
            if (stat.st_dev, stat.st_ino) in met:
                left["links to what is there already"] += 1
                continue
            met.add((stat.st_dev, stat.st_ino))
            if entry.is_dir():
                yield from below(entry.path, prefix + entry.name + b"/", before, share / len(entries))
            elif entry.is_file():
                yield prefix + entry.name, stat.st_size

    top = os.stat(root)  # noqa: PTH116 - bytes
    met.add((top.st_dev, top.st_ino))
    return below(root, b"", 0.0, 1.0)


def parts_of_folder(spec: str) -> tuple[str, str] | None:
    """The two parts that a folder holds, as folders or as shards. Raises DataError where there is but one."""
    root = Path(spec)
    for train in TRAIN:
        for test in TEST:
            if (root / train).is_dir() and (root / test).is_dir():
                return str(root / train), str(root / test)
            if any(root.glob(f"{train}*.tar")) and any(root.glob(f"{test}*.tar")):
                return str(root / f"{train}*.tar"), str(root / f"{test}*.tar")
    if any((root / train).is_dir() for train in TRAIN) and len([p for p in root.iterdir() if p.is_dir()]) == 1:
        raise DataError(f"{spec} holds train/ alone; name the other part with --val, or give {spec}/train to have it divided")
    return None


class ListFile(Files):
    """The files that a text file names: a path a line, relative to it, optionally a tab and a label."""

    form, kind = "list file (.txt)", "list"

    @classmethod
    def matches(cls, spec: str) -> bool:
        return Path(spec).suffix == ".txt" and Path(spec).is_file()

    @classmethod
    def open(cls, spec: str, asked: Asked) -> "ListFile":
        root = Path(spec).parent
        names, sizes, labels = [], [], []
        lines = Path(spec).read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
        for number, line in enumerate(lines, 1):
            asked.tick(number / len(lines))
            if not line.strip():
                continue
            name, _, label = line.partition(b"\t")
            try:
                sizes.append(os.stat(os.path.join(os.fsencode(root), name)).st_size)  # noqa: PTH116, PTH118
            except (FileNotFoundError, ValueError):  # ValueError: a zero byte, so the list is no text
                raise DataError(f"{spec} line {number}: {printable(name)} does not exist; paths are relative to the list") from None
            names.append(name)
            labels.append(label.strip())
        if not names:
            raise DataError(f"{spec} lists no images; write one path a line, optionally a tab and a label")
        return cls(spec, root, names, sizes, labels)
