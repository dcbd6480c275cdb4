"""Tar shards in the WebDataset layout, indexed once for random access."""

import fnmatch
import glob
import hashlib
import os
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from ..config import how_many
from ..errors import DataError
from .base import EXTENSIONS, OpenOptions, Source, Strings, numbered, printable
from .files import parts_of_folder

OPEN_SHARDS = 64
"Open shards per process; systems typically allow 1,024 open files."


class Shards(Source):
    """Images in tar files, with labels in .cls files next to them."""

    form, kind = "tar shards (folder or pattern)", "tar"

    def __init__(
        self,
        name: str,
        shards: list[Path],
        names: list[bytes],
        extents: list[tuple[int, int, int]],
        labels: list[bytes],
    ):
        """`extents`: for each image the index of its shard, and its offset and size in bytes."""
        self.name, self.shards = name, [str(s) for s in shards]
        self.names, self.extents = Strings(names), np.array(extents, dtype=np.int64)
        self.labels, self.classes = numbered(labels)
        self.opened: OrderedDict[int, int] = OrderedDict()

    @classmethod
    def matches(cls, spec: str) -> bool:
        return bool(tars_of(spec))

    @classmethod
    def open(cls, spec: str, options: OpenOptions) -> "Shards":
        shards = tars_of(spec)
        names, extents, labels = [], [], []
        for number, shard in enumerate(shards):
            classes: dict[bytes, bytes] = {}
            images: list[tuple[bytes, int, int]] = []
            total = max(shard.stat().st_size, 1)
            try:
                with tarfile.open(shard, "r:") as tar:
                    for member in tar:
                        options.tick((number + min(1, member.offset / total)) / len(shards))
                        name = os.fsencode(member.name)
                        key, _, extension = name.rpartition(b".")
                        if not member.isfile():
                            continue
                        if extension == b"cls" and (file := tar.extractfile(member)):
                            classes[key] = file.read(256).strip()
                        elif b"." + extension.lower() in (e.encode() for e in EXTENSIONS):
                            images.append((name, member.offset_data, member.size))
            except PermissionError:
                raise
            except (tarfile.TarError, EOFError, OSError) as e:
                raise DataError(
                    f"{shard} is not a complete tar file ({e}); compressed shards must be unpacked to .tar"
                ) from e
            for name, offset, size in images:
                names.append(name)
                extents.append((number, offset, size))
                labels.append(classes.get(name.rpartition(b".")[0], b""))
        if not names:
            raise DataError(
                f"{spec} holds no images in {how_many(len(shards), 'tar file')}; looked for "
                f"{' '.join(EXTENSIONS)}"
            )
        return cls(spec, shards, names, extents, labels)

    @classmethod
    def parts(cls, spec: str) -> tuple[str, str] | None:
        return parts_of_folder(spec) if Path(spec).is_dir() else None

    def __len__(self) -> int:
        return len(self.names)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"opened": OrderedDict()}

    def read(self, index: int) -> bytes:
        shard, offset, size = (int(v) for v in self.extents[index])
        if shard not in self.opened:
            if len(self.opened) >= OPEN_SHARDS:
                os.close(self.opened.popitem(last=False)[1])
            self.opened[shard] = os.open(self.shards[shard], os.O_RDONLY)
        self.opened.move_to_end(shard)
        return os.pread(self.opened[shard], size, offset)

    def where(self, index: int) -> str:
        return printable(os.fsencode(self.shards[int(self.extents[index, 0])]) + b"!" + self.names[index])

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.names.data.tobytes())
        digest.update(self.names.ends.tobytes() + self.extents.tobytes())
        return digest.hexdigest()


def tars_of(spec: str) -> list[Path]:
    """The tar files of a spec: a file, a pattern, or a folder that holds only tar files. Raises DataError if
    some are missing."""
    path = Path(spec)
    if path.suffix == ".tar" and path.is_file():
        return [path]
    if path.is_dir():
        tars = []
        with os.scandir(path) as entries:
            for entry in entries:  # stops at the first image or subfolder
                if entry.name.startswith("."):
                    continue
                if entry.is_dir() or Path(entry.name).suffix.lower() in EXTENSIONS:
                    return []
                tars += [Path(entry.path)] if entry.name.endswith(".tar") else []
        return sorted(tars)
    patterns = _expand_braces(spec)
    missing = [p for p in patterns if len(patterns) > 1 and not glob.has_magic(p) and not Path(p).exists()]
    if missing:
        raise DataError(
            f"{missing[0]} does not exist ({len(missing)} of {len(patterns)} shards of {spec} are missing)"
        )
    return sorted(
        Path(path)
        for pattern in patterns
        for path in glob.glob(pattern)  # noqa: PTH207 - patterns may be absolute
        if fnmatch.fnmatch(path, "*.tar")
    )


def _expand_braces(spec: str) -> list[str]:
    """The file names of WebDataset's 'x-{000..003}.tar'."""
    head, brace, rest = spec.partition("{")
    inner, closed, tail = rest.partition("}")
    first, dots, last = inner.partition("..")
    if not (brace and closed and dots and first.isdigit() and last.isdigit()):
        return [spec]
    return [
        f"{head}{i:0{len(first)}d}{end}"
        for i in range(int(first), int(last) + 1)
        for end in _expand_braces(tail)
    ]
