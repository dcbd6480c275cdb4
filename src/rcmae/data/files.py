"""Image files in a folder."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from ..errors import DataError
from .base import EXTENSIONS, OpenOptions, Source, Strings, no_labels, numbered, printable, reading
from .index import Index, Stamp, stamp
from .layout import TESTING, ImageFilter, divide, hidden, part_of, select


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
        left_out: Mapping[str, int] | None = None,
        why_unlabeled: str = "",
    ):
        self.name, self.root = name, os.fspath(root)
        self.names, self.sizes = Strings(names), np.array(sizes, dtype=np.int64)
        self.labels, self.classes = numbered(labels)
        self.left_out, self.why_unlabeled = left_out or {}, why_unlabeled
        self.notes = (*notes, *no_labels(why_unlabeled))

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> bytes:
        with open(self._path(index), "rb") as f:  # noqa: PTH123 - bytes
            return f.read()

    def where(self, index: int) -> str:
        return printable(self._path(index))

    def _path(self, index: int) -> bytes:
        return os.path.join(os.fsencode(self.root), self.names[index])  # noqa: PTH118 - bytes

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.names.data.tobytes())
        digest.update(self.names.ends.tobytes() + self.sizes.tobytes())
        return digest.hexdigest()


class Visits:
    """The files and folders that were visited. One is visited again only if a link leads to it: without one,
    equal numbers are those of a file system that does not number its files."""

    def __init__(self) -> None:
        self.all, self.linked = set[tuple[int, int]](), set[tuple[int, int]]()

    def again(self, stat: os.stat_result, linked: bool) -> bool:
        """Whether it was visited before, now or then over a link (`linked`). It is visited now."""
        identity = stat.st_dev, stat.st_ino
        before = identity in (self.all if linked else self.linked)
        self.all.add(identity)
        if linked:
            self.linked.add(identity)
        return before


class Folder(Files):
    """All images below a folder; subfolders are classes, unless they are parts (train, val) or there are
    images beside them."""

    form, kind = "folder", "folder"

    @classmethod
    def matches(cls, spec: str) -> bool:
        return Path(spec).is_dir()

    @classmethod
    def open(cls, spec: str, options: OpenOptions) -> "Folder":
        """If the folder is divided into parts, those for testing are left out."""
        names: list[bytes] = []
        sizes: list[int] = []
        links: list[int] = []
        image_filter = ImageFilter()
        index = Index(cls, spec)
        if source := index.load():
            return source
        listed: list[Stamp] = []
        for name, size, linked in _walk(os.fsencode(spec), image_filter, options.tick, listed):
            if linked:
                links.append(len(names))
            names.append(name)
            sizes.append(size)
        if not names:
            raise DataError(
                f"{spec} holds no images: {reading(0, image_filter.left_out)}; looked for "
                f"{' '.join(EXTENSIONS)}"
            )
        chosen, labels, why, notes = select(names, links, image_filter)
        names, sizes = [names[i] for i in chosen], [sizes[i] for i in chosen]
        source = cls(spec, Path(spec), names, sizes, labels, notes, image_filter.left_out, why)
        index.save(source, listed)
        return source

    @classmethod
    def parts(cls, spec: str) -> tuple[str, str] | None:
        """Raises DataError if there is no part for testing, or several folders for one part."""
        root, folders = Path(spec), _image_folders(Path(spec))
        while len(folders) == 1 and not part_of(folders[0]):
            root, folders = root / folders[0], _image_folders(root / folders[0])
        if not any(part_of(name) == "train" for name in folders):
            return None
        if len(folders) == 1:
            raise DataError(
                f"{spec} only holds {folders[0]}/; give the other part with --val, or split the training "
                f"images with --data {root / folders[0]}"
            )
        parts = divide({name: _image_folders(root / name) for name in folders})
        by_part = {part: [name for name, p in parts.items() if p == part] for part in ("train", *TESTING)}
        testing = by_part["val"] or by_part["test"]
        if len(by_part["train"]) > 1 or len(testing) > 1:
            names = ", ".join([*by_part["train"], *testing])
            raise DataError(f"{spec} has several folders for a part ({names}); choose with --data and --val")
        return (str(root / by_part["train"][0]), str(root / testing[0])) if parts and testing else None


def _walk(
    root: bytes, image_filter: ImageFilter, tick: Callable[[float], None], listed: list[Stamp]
) -> Iterator[tuple[bytes, int, bool]]:
    """Sorted names of the images below the root, with their sizes, and whether it is a further link to an
    image that came before.

    Links are followed, except to a folder that contains them. What is left out is counted in `image_filter`,
    and the folders are added to `listed`.
    """
    visits = Visits()

    def walk(
        folder: bytes,
        prefix: bytes,
        above: frozenset[tuple[int, int]],
        inside_link: bool,
        done: float,
        fraction: float,
    ) -> Iterator[tuple[bytes, int, bool]]:
        listed.append(stamp(folder))
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda e: e.name)
        for number, entry in enumerate(entries):
            before = done + fraction * number / len(entries)
            tick(before)
            if image_filter.is_hidden(entry.name):
                continue
            try:
                stat = entry.stat()
            except OSError as e:
                if e.errno in (errno.ENOENT, errno.ELOOP):
                    image_filter.left_out["broken links"] += 1
                    continue
                raise
            identity, linked = (stat.st_dev, stat.st_ino), inside_link or entry.is_symlink()
            if entry.is_dir():
                if linked and identity in above:
                    image_filter.left_out["loops of links"] += 1
                else:
                    yield from walk(
                        entry.path,
                        prefix + entry.name + b"/",
                        above | {identity},
                        linked,
                        before,
                        fraction / len(entries),
                    )
            elif not entry.is_file():
                image_filter.left_out["special files"] += 1
            elif image_filter.takes(name := prefix + entry.name):
                yield name, stat.st_size, visits.again(stat, linked or stat.st_nlink > 1)

    stat = os.stat(root)  # noqa: PTH116 - bytes
    return walk(root, b"", frozenset({(stat.st_dev, stat.st_ino)}), False, 0.0, 1.0)


def _image_folders(folder: Path) -> list[str]:
    """The subfolders that hold images, in any depth; others, such as annotations, are no parts of a set."""
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if not hidden(os.fsencode(e.name)) and _is_folder(e))
    image_filter = ImageFilter()
    return [
        n
        for n in names
        if any(image_filter.takes(os.fsencode(f.name)) for f in files_below(folder / n, image_filter))
    ]


def files_below(folder: str | Path, image_filter: ImageFilter) -> Iterator[os.DirEntry[str]]:
    """All files in a folder and its subfolders, in no particular order. Hidden ones are counted in
    `image_filter`."""
    pending, visits = [(os.fspath(folder), False)], Visits()
    while pending:
        path, inside_link = pending.pop()
        with os.scandir(path) as entries:
            for entry in entries:
                if image_filter.is_hidden(os.fsencode(entry.name)):
                    continue
                if not _is_folder(entry):
                    yield entry
                elif not visits.again(entry.stat(), linked := inside_link or entry.is_symlink()):
                    pending.append((entry.path, linked))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as e:
        if e.errno == errno.ELOOP:  # a link to itself
            return False
        raise
