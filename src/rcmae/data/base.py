"""What a source of images is: a kind of it is one class, and one line in `sources.SOURCES`.

A source is an index: names and offsets in a few flat arrays, so that loader processes share them instead of copying.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".avif")


def silent(done: float) -> None:
    """Progress that nobody is shown."""


@dataclass(frozen=True)
class Asked:
    """What a kind may want to know when it is opened. `tick` is told which share of the index is made, 0 to 1."""

    channels: int = 3
    size: int = 32
    "pixels a side, for what is drawn"
    seed: int = 0
    "likewise"
    tick: Callable[[float], None] = silent


class Source(ABC):
    """Images by number. Beside the abstract methods a kind says `form`, `kind` and how it is opened; all else has a default."""

    form: ClassVar[str]
    "how it is written, for help and messages; without anything else to tell it by, exactly this is it"
    kind: ClassVar[str]
    "what it is called, in a word"
    recipe: ClassVar[str] = "folder"
    "the recipe that suits it where none is named"
    has_objects: ClassVar[bool] = False
    "objects come with the images, so that detection needs no annotation file"
    in_memory: bool = False
    "reading costs nothing, so that loader processes would only cost"
    name: str
    "as the user gave it"
    labels: np.ndarray | None = None
    "int64 [n], -1 where unknown; None without any"
    classes: Sequence[str] = ()
    notes: Sequence[str] = ()
    "lines that the reader should know, as what was left out"

    # --- a kind, before anything is opened ----------------------------------------------------------------------------

    @classmethod
    def matches(cls, spec: str) -> bool:
        """Whether the user means this kind. May raise OSError."""
        return spec == cls.form

    @classmethod
    def open(cls, spec: str, asked: Asked) -> "Source":
        """The images. Raises DataError or ConfigError in one line; an OSError becomes one."""
        raise NotImplementedError

    @classmethod
    def parts(cls, spec: str) -> tuple[str, str] | None:
        """What a training and a validation part within it are called; None where there is one set. Raises DataError."""
        return None

    @classmethod
    def with_objects(cls, split: str, images: int, asked: Asked) -> "tuple[Source, dict[str, Any]]":
        """So many images of the split "train" or "test", and their objects in COCO's layout, where the kind `has_objects`."""
        raise NotImplementedError

    # --- images -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> bytes | np.ndarray:
        """The encoded bytes, or pixels uint8 [h, w, c]."""

    @abstractmethod
    def where(self, index: int) -> str:
        """What to call the image in a message: printable on one line."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of names and sizes, the same wherever the data lies."""

    def for_probes(self, train: int, test: int, seed: int) -> "tuple[Source, Source] | None":
        """So many other labelled images of the same kind, to fit and to score probes on; None: they are taken from this source."""
        return None


class Subset(Source):
    """Some images of a source, in the order of `chosen`, under its labels or others. Its fingerprint is that of the images alone."""

    def __init__(
        self, source: Source, chosen: Int[np.ndarray, " k"], labels: Int[np.ndarray, " k"] | None = None,
        classes: Sequence[str] | None = None,
    ):  # fmt: skip
        self.source, self.chosen = source, chosen
        self.name, self.in_memory, self.classes, self.notes = source.name, source.in_memory, classes or source.classes, source.notes
        self.labels = labels if labels is not None or source.labels is None else source.labels[chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, index: int) -> bytes | np.ndarray:
        return self.source.read(int(self.chosen[index]))

    def where(self, index: int) -> str:
        return self.source.where(int(self.chosen[index]))

    def fingerprint(self) -> str:
        return hashlib.sha256(self.source.fingerprint().encode() + self.chosen.astype("<i8").tobytes()).hexdigest()


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


def numbered(labels: list[bytes]) -> tuple[Int[np.ndarray, " n"] | None, list[str]]:
    """Labels as numbers, -1 where there is none, and the names of the classes; (None, []) when they tell no two classes apart."""
    classes = sorted(set(labels) - {b""})
    if len(classes) < 2:
        return None, []
    place = {c: i for i, c in enumerate(classes)} | {b"": -1}
    return np.array([place[label] for label in labels], dtype=np.int64), [printable(c) for c in classes]
