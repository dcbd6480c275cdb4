"""Where images are: a folder, a list, tar shards, a hub data set or an embedded set, all behind one small contract.

A source is an index: names and offsets in a few flat arrays, so that loader processes share them instead of copying.
"""

import codecs
import errno
import fnmatch
import glob
import hashlib
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from ..config import hint
from ..engine.metrics import optional
from ..errors import ConfigError, DataError

EMBEDDED = ("embedded:digits", "embedded:scenes")
"Sets that are drawn: single digits with a label, and many digits in a picture."

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".avif")


class Source(Protocol):
    """Images by number."""

    name: str
    "as the user gave it"
    kind: str
    "folder, list, tar, hub, coco or embedded"
    labels: np.ndarray | None
    "int64 [n], -1 where unknown; None without any"
    classes: list[str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes | np.ndarray:
        """The encoded bytes, or pixels uint8 [h, w, c]."""

    def where(self, index: int) -> str:
        """What to call the image in a message: printable on one line."""

    def fingerprint(self) -> str:
        """A hash of names and sizes, the same wherever the data lies."""


class Strings:
    """A million names as two arrays."""

    def __init__(self, names: list[bytes]):
        self.ends = np.cumsum([len(n) for n in names], dtype=np.int64)
        self.data = np.frombuffer(b"".join(names), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> bytes:
        start = self.ends[i - 1] if i else 0
        return self.data[start : self.ends[i]].tobytes()


def printable(name: bytes) -> str:
    """A file name for a message or a log: one line, control characters and bytes that are not UTF-8 escaped."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Files:
    """Image files below a root."""

    def __init__(self, name: str, kind: str, root: Path, names: list[bytes], sizes: list[int], labels: list[bytes]):
        self.name, self.kind, self.root = name, kind, os.fsencode(root)
        self.names, self.sizes = Strings(names), np.array(sizes, dtype=np.int64)
        self.labels, self.classes = _numbered(labels)

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


OPEN_SHARDS = 64
"Shards a process keeps open; a system allows some 1,024 files."


class Shards:
    """Tar shards in the WebDataset layout: indexed once, then read at random."""

    def __init__(self, name: str, shards: list[Path], names: list[bytes], places: list[tuple[int, int, int]], labels: list[bytes]):
        self.name, self.kind, self.shards = name, "tar", [str(s) for s in shards]
        self.names, self.places = Strings(names), np.array(places, dtype=np.int64)
        self.labels, self.classes = _numbered(labels)
        self.open: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.names)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"open": OrderedDict()}

    def read(self, index: int) -> bytes:
        shard, offset, size = (int(v) for v in self.places[index])
        if shard not in self.open:
            if len(self.open) >= OPEN_SHARDS:
                os.close(self.open.popitem(last=False)[1])
            self.open[shard] = os.open(self.shards[shard], os.O_RDONLY)
        self.open.move_to_end(shard)
        return os.pread(self.open[shard], size, offset)

    def where(self, index: int) -> str:
        return printable(os.fsencode(self.shards[int(self.places[index, 0])]) + b"!" + self.names[index])

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.names.data.tobytes())
        digest.update(self.names.ends.tobytes() + self.places.tobytes())
        return digest.hexdigest()


class Hub:
    """A Hugging Face data set."""

    def __init__(self, name: str):
        datasets = optional("datasets", "hub")
        path, _, split = name.partition(":")
        try:
            self.table = datasets.load_dataset(path, split=split or "train")
        except Exception as e:
            raise DataError(f"hub:{name} cannot be loaded: {type(e).__name__}: {next(iter(str(e).splitlines()), '')}") from e
        kinds = self.table.features
        self.column = next((k for k, v in kinds.items() if type(v).__name__ == "Image"), None)
        if self.column is None:
            raise DataError(f"hub:{name} has no image column; its columns are {', '.join(kinds)}")
        label = next((k for k, v in kinds.items() if type(v).__name__ == "ClassLabel"), None)
        self.name, self.kind = f"hub:{name}", "hub"
        self.classes = kinds[label].names if label else []
        self.labels = np.array([-1 if v is None else v for v in self.table[label]], dtype=np.int64) if label else None
        self.table = self.table.cast_column(self.column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.table)

    def read(self, index: int) -> bytes:
        cell = self.table[index][self.column]
        if cell is None:
            raise FileNotFoundError(errno.ENOENT, "no image in this row")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    def where(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.name} {len(self)} {self.table._fingerprint}".encode()).hexdigest()


class Subset:
    """Some images of a source, in the order of `chosen`, under its labels or others. Its fingerprint is that of the images alone."""

    def __init__(
        self, source: Source, chosen: Int[np.ndarray, " k"], labels: Int[np.ndarray, " k"] | None = None, classes: list[str] | None = None
    ):
        self.source, self.chosen = source, chosen
        self.name, self.kind, self.classes = source.name, source.kind, classes or source.classes
        self.labels = labels if labels is not None or source.labels is None else source.labels[chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, index: int) -> bytes | np.ndarray:
        return self.source.read(int(self.chosen[index]))

    def where(self, index: int) -> str:
        return self.source.where(int(self.chosen[index]))

    def fingerprint(self) -> str:
        return hashlib.sha256(self.source.fingerprint().encode() + self.chosen.astype("<i8").tobytes()).hexdigest()


def open_source(spec: str, channels: int = 3, size: int = 32, seed: int = 0) -> Source:
    """A source by what the user wrote: folder, list file (.txt), tar shards, hub:NAME, embedded:digits or embedded:scenes.

    `size` and `seed` are for the embedded sets. Raises DataError or ConfigError in one line.
    """
    if spec.startswith("embedded:"):
        if spec not in EMBEDDED:
            raise ConfigError(f"there is no {spec}{hint(spec, EMBEDDED) or '; there are ' + ' and '.join(EMBEDDED)}")
        if channels != 3:
            raise ConfigError(f"{spec} is drawn in 3 channels, not {channels}; leave --channels out")
        from .digits import DigitsSource, ScenesSource  # only here: it reads scikit-learn's data

        return {"embedded:digits": DigitsSource, "embedded:scenes": ScenesSource}[spec]("train", size=size, seed=seed)
    if spec.startswith("hub:"):
        return Hub(spec.removeprefix("hub:"))
    if not spec.strip():
        raise ConfigError("--data is empty; give a folder, a list file, tar shards, hub:NAME, embedded:digits or embedded:scenes")
    path = Path(spec)
    try:
        if shards := _shards(spec):
            return _open_shards(spec, shards)
        if path.is_dir():
            return _open_folder(spec, path)
        if path.suffix == ".txt" and path.is_file():
            return _open_list(spec, path)
        there = path.exists()
    except PermissionError as e:
        raise DataError(f"no permission to read {printable(os.fsencode(e.filename))}; change it, or leave that folder out") from e
    except OSError as e:
        raise DataError(f"{printable(os.fsencode(e.filename or spec))} cannot be read: {e.strerror}") from e
    if there:
        raise DataError(f"{spec} is neither a folder, nor a list (.txt), nor a tar; give the folder that holds the images")
    raise DataError(f"{spec} does not exist; give --data a folder, a list file, tar shards, hub:NAME, embedded:digits or embedded:scenes")


# --- folders ----------------------------------------------------------------------------------------------------------


PARTS = {b"train", b"val", b"valid", b"validation", b"test"}
"Folders that part a set, and are no classes."


def _open_folder(spec: str, root: Path) -> Files:
    found, others = [], 0
    for name, size in _walk(os.fsencode(root)):
        if name.lower().endswith(tuple(e.encode() for e in EXTENSIONS)):
            found.append((name, size))
        else:
            others += 1
    if not found:
        raise DataError(f"{spec} holds no images ({others} other files); looked for {' '.join(EXTENSIONS)}")
    tops = [name.split(b"/")[0] if b"/" in name else b"" for name, _ in found]
    labelled = all(tops) and not set(tops) <= PARTS  # images beside the folders, or parts of a set: these are no classes
    labels = tops if labelled else [b""] * len(tops)
    return Files(spec, "folder", root, [n for n, _ in found], [s for _, s in found], labels)


def _walk(root: bytes) -> Iterator[tuple[bytes, int]]:
    """Names below the root, with sizes, sorted. Hidden ones are left out; each file and folder is met once, however linked."""
    met: set[tuple[int, int]] = set()

    def below(folder: bytes, prefix: bytes) -> Iterator[tuple[bytes, int]]:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if entry.name.startswith(b"."):
                    continue
                try:
                    stat = entry.stat()
                except OSError as e:
                    if e.errno in (errno.ENOENT, errno.ELOOP):  # a link to nowhere, or to itself
                        continue
                    raise
                if (stat.st_dev, stat.st_ino) in met:
                    continue
                met.add((stat.st_dev, stat.st_ino))
                if entry.is_dir():
                    yield from below(entry.path, prefix + entry.name + b"/")
                elif entry.is_file():
                    yield prefix + entry.name, stat.st_size

    top = os.stat(root)  # noqa: PTH116 - bytes
    met.add((top.st_dev, top.st_ino))
    return below(root, b"")


def _open_list(spec: str, path: Path) -> Files:
    names, sizes, labels = [], [], []
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.partition(b"\t")
        try:
            sizes.append(os.stat(os.path.join(os.fsencode(path.parent), name)).st_size)  # noqa: PTH116, PTH118
        except (FileNotFoundError, ValueError):  # ValueError: a zero byte, so the list is no text
            raise DataError(f"{spec} line {number}: {printable(name)} does not exist; paths are relative to the list") from None
        names.append(name)
        labels.append(label.strip())
    if not names:
        raise DataError(f"{spec} lists no images; write one path a line, optionally a tab and a label")
    return Files(spec, "list", path.parent, names, sizes, labels)


def _numbered(labels: list[bytes]) -> tuple[Int[np.ndarray, " n"] | None, list[str]]:
    """Labels as numbers, -1 where there is none, and the names of the classes; (None, []) when they tell no two classes apart."""
    classes = sorted(set(labels) - {b""})
    if len(classes) < 2:
        return None, []
    place = {c: i for i, c in enumerate(classes)} | {b"": -1}
    return np.array([place[label] for label in labels], dtype=np.int64), [printable(c) for c in classes]


# --- tar shards -------------------------------------------------------------------------------------------------------


def _shards(spec: str) -> list[Path]:
    """Tar files that a spec means: one, a pattern, or a folder with nothing but tars."""
    path = Path(spec)
    if path.suffix == ".tar" and path.is_file():
        return [path]
    if path.is_dir():
        visible = [p for p in path.iterdir() if not p.name.startswith(".")]
        tars = sorted(p for p in visible if p.suffix == ".tar")
        return tars if tars and not any(p.is_dir() or p.suffix.lower() in EXTENSIONS for p in visible) else []
    spelled = _braces(spec)
    missing = [s for s in spelled if len(spelled) > 1 and not glob.has_magic(s) and not Path(s).exists()]
    if missing:
        raise DataError(f"{missing[0]} does not exist ({len(missing)} of {len(spelled)} shards of {spec} are missing)")
    return sorted(
        Path(p)
        for s in spelled
        for p in glob.glob(s)  # noqa: PTH207 - whole paths
        if fnmatch.fnmatch(p, "*.tar")
    )


def _braces(spec: str) -> list[str]:
    """WebDataset's 'x-{000..003}.tar' spelled out."""
    head, brace, rest = spec.partition("{")
    inner, closed, tail = rest.partition("}")
    first, dots, last = inner.partition("..")
    if not (brace and closed and dots and first.isdigit() and last.isdigit()):
        return [spec]
    return [f"{head}{i:0{len(first)}d}{end}" for i in range(int(first), int(last) + 1) for end in _braces(tail)]


def _open_shards(spec: str, shards: list[Path]) -> Shards:
    names, places, labels = [], [], []
    for number, shard in enumerate(shards):
        classes: dict[bytes, bytes] = {}
        found: list[tuple[bytes, int, int]] = []
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    name = os.fsencode(member.name)
                    key, _, extension = name.rpartition(b".")
                    if not member.isfile():
                        continue
                    if extension == b"cls" and (file := tar.extractfile(member)):
                        classes[key] = file.read(256).strip()
                    elif b"." + extension.lower() in (e.encode() for e in EXTENSIONS):
                        found.append((name, member.offset_data, member.size))
        except PermissionError:
            raise
        except (tarfile.TarError, EOFError, OSError) as e:
            raise DataError(f"{shard} is not a whole tar file ({e}); compressed shards must be unpacked to plain .tar") from e
        for name, offset, size in found:
            names.append(name)
            places.append((number, offset, size))
            labels.append(classes.get(name.rpartition(b".")[0], b""))
    if not names:
        raise DataError(f"{spec} holds no images in {len(shards)} tar files; looked for {' '.join(EXTENSIONS)}")
    return Shards(spec, shards, names, places, labels)
