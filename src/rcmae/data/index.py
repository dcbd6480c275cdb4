"""Indices of large sets in a cache folder, so that the next start need not list millions of files again.

An index is used if everything that was listed has the same modification time and size: the folders of a set
of files, the tar files of shards. It is left out if the folder cannot be written.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .. import __version__
from ..engine.checkpoint import replace_file
from ..errors import StorageError
from .base import OPTIONAL, Source, Strings, missing_extra

SMALLEST = 50_000
"Images of a set whose index is kept; listing fewer takes a second."

SETTLED = 2.0
"""Seconds since the last change of what is listed. A later change within the resolution of its modification
time would not be noticed."""

AnySource = TypeVar("AnySource", bound=Source)


def cache_folder() -> Path:
    """Where to keep what can be computed again: in ~/.cache, or with other temporary files for a user without
    a home."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(given) if given else Path.home() / ".cache") / "rcmae"
    except RuntimeError:  # there is neither HOME nor an entry of the user
        return Path(tempfile.gettempdir()) / "rcmae"


class Stamp(NamedTuple):
    """A folder or file that was listed, and its state before."""

    path: bytes
    modified: int
    "in nanoseconds"
    size: int


def stamp(path: bytes) -> Stamp:
    """The current state of a folder or file. Raises OSError."""
    status = os.stat(path)  # noqa: PTH116 - bytes
    return Stamp(path, status.st_mtime_ns, status.st_size)


class Index:
    """The place of the index of a set, which `about` distinguishes from those of other sets and settings."""

    def __init__(self, kind: type[AnySource], spec: str, *about: Any):
        extras = [extension for extension in OPTIONAL if missing_extra(extension)]
        key = json.dumps([__version__, kind.kind, spec, os.path.abspath(spec), extras, about])  # noqa: PTH100
        self.path = cache_folder() / "index" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
        self.kind, self.began = kind, time.time()

    def load(self) -> Any:
        """The source, without its files being listed; None if there is no index or something has changed."""
        try:
            with safe_open(self.path, "np") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                values = json.loads(file.metadata()["values"])
            if not _unchanged(_strings(arrays, "listed"), arrays.pop("states")):
                return None
        except (OSError, SafetensorError, ValueError, KeyError):
            return None
        source = self.kind.__new__(self.kind)
        values |= {name: _strings(arrays, name) for name in values.pop("strings")} | arrays
        vars(source).update(values)
        return source

    def save(self, source: Source, listed: Sequence[Stamp]) -> None:
        """Keep the index of a source, made from what was `listed`, if it is large and nothing has just
        changed. Broken links may be those of a disk that is not mounted yet."""
        if source.left_out.get("broken links"):
            return
        if len(source) < SMALLEST or max(s.modified for s in listed) / 1e9 > self.began - SETTLED:
            return
        arrays: dict[str, np.ndarray] = {"states": np.array([s[1:] for s in listed], np.int64)}
        strings = {"listed": Strings([s.path for s in listed])}
        values: dict[str, Any] = {}
        for name, value in cast(dict[str, Any], source.__getstate__()).items():
            place: dict[str, Any] = (
                strings if isinstance(value, Strings) else arrays if isinstance(value, np.ndarray) else values
            )
            place[name] = value
        for name, text in strings.items():
            arrays |= {f"{name}.data": text.data, f"{name}.ends": text.ends}
        values["strings"] = [name for name in strings if name != "listed"]
        with contextlib.suppress(OSError, StorageError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, save(arrays, {"values": json.dumps(values)}))


def _unchanged(listed: Strings, states: np.ndarray) -> bool:
    """Whether folders and files have their recorded states. Raises OSError if one is gone."""
    return all(stamp(listed[i])[1:] == tuple(states[i]) for i in range(len(listed)))


def _strings(arrays: dict[str, np.ndarray], name: str) -> Strings:
    strings = Strings([])
    strings.data, strings.ends = arrays.pop(f"{name}.data"), arrays.pop(f"{name}.ends")
    return strings
