"""Tar shards in the WebDataset layout: indexed once, then read at random."""

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
from .base import EXTENSIONS, Asked, Source, Strings, numbered, printable
from .files import parts_of_folder

OPEN_SHARDS = 64
"Shards a process keeps open; a system allows some 1,024 files."


class Shards(Source):
    """Images in tar files, whose labels lie beside them in .cls files."""

    form, kind = "tar shards (folder or pattern)", "tar"

    def __init__(self, name: str, shards: list[Path], names: list[bytes], places: list[tuple[int, int, int]], labels: list[bytes]):
        """`places`: of each image the number of its shard, and its offset and size there in bytes."""
        self.name, self.shards = name, [str(s) for s in shards]
        self.names, self.places = Strings(names), np.array(places, dtype=np.int64)
        self.labels, self.classes = numbered(labels)
        self.opened: OrderedDict[int, int] = OrderedDict()

    @classmethod
    def matches(cls, spec: str) -> bool:
        return bool(tars_of(spec))

    @classmethod
    def open(cls, spec: str, asked: Asked) -> "Shards":
        shards = tars_of(spec)
        names, places, labels = [], [], []
        for number, shard in enumerate(shards):
            classes: dict[bytes, bytes] = {}
            found: list[tuple[bytes, int, int]] = []
            whole = max(shard.stat().st_size, 1)
            try:
                with tarfile.open(shard, "r:") as tar:
                    for member in tar:
                        asked.tick((number + min(1, member.offset / whole)) / len(shards))
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
            raise DataError(f"{spec} holds no images in {how_many(len(shards), 'tar file')}; looked for {' '.join(EXTENSIONS)}")
        return cls(spec, shards, names, places, labels)

    @classmethod
    def parts(cls, spec: str) -> tuple[str, str] | None:
        return parts_of_folder(spec) if Path(spec).is_dir() else None

    def __len__(self) -> int:
        return len(self.names)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"opened": OrderedDict()}

    def read(self, index: int) -> bytes:
        shard, offset, size = (int(v) for v in self.places[index])
        if shard not in self.opened:
            if len(self.opened) >= OPEN_SHARDS:
                os.close(self.opened.popitem(last=False)[1])
            self.opened[shard] = os.open(self.shards[shard], os.O_RDONLY)
        self.opened.move_to_end(shard)
        return os.pread(self.opened[shard], size, offset)

    def where(self, index: int) -> str:
        return printable(os.fsencode(self.shards[int(self.places[index, 0])]) + b"!" + self.names[index])

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.names.data.tobytes())
        digest.update(self.names.ends.tobytes() + self.places.tobytes())
        return digest.hexdigest()


def tars_of(spec: str) -> list[Path]:
    """Tar files that a spec means: one, a pattern, or a folder with nothing but tars. Raises DataError where some are missing."""
    path = Path(spec)
    if path.suffix == ".tar" and path.is_file():
        return [path]
    if path.is_dir():
        tars = []
        with os.scandir(path) as entries:
            for entry in entries:  # of a large folder of images only the first one is looked at
                if entry.name.startswith("."):
                    continue
                if entry.is_dir() or Path(entry.name).suffix.lower() in EXTENSIONS:
                    return []
                tars += [Path(entry.path)] if entry.name.endswith(".tar") else []
        return sorted(tars)
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
