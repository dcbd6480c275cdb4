"""The interface of image sources. A new kind is one class and one entry in `sources.SOURCES`.

A source is an index: names and offsets in a few flat arrays, so that loader processes share the memory.
"""

import hashlib
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from ..config import how_many

OPTIONAL = {".heic": "heif", ".heif": "heif", ".hif": "heif", ".jxl": "jxl", ".dcm": "dicom"}
"Extensions of images that need an extra, with its name."

DECODERS = {"heif": "pillow_heif", "jxl": "pillow_jxl", "dicom": "pydicom"}
"The module that an extra installs, which decodes its images."

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".jpe", ".jp2", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"),
    *(".pgm", ".avif"),
    *OPTIONAL,
)
"Extensions of images, in lower case. Pillow alone decodes those that are not in `OPTIONAL`."

REASONS = 8
"Number of reasons for leaving out files that a line names."


def missing_extra(extension: str) -> str:
    """The extra that images with this extension need, if it is not installed; otherwise empty."""
    extra = OPTIONAL.get(extension, "")
    return "" if extra == "" or find_spec(DECODERS[extra]) else extra


def silent(done: float) -> None:
    """Ignore progress."""


@dataclass(frozen=True)
class OpenOptions:
    """Options for opening a source."""

    channels: int = 3
    size: int = 32
    "side in pixels of generated images"
    seed: int = 0
    "seed of generated images"
    tick: Callable[[float], None] = silent
    "called with the fraction of the images indexed, 0 to 1"


class Source(ABC):
    """Images by index. A subclass defines `form`, `kind`, `open` and the abstract methods."""

    form: ClassVar[str]
    "how to write it in --data, for help and messages; by default `matches` compares with it"
    kind: ClassVar[str]
    "its name, one word"
    recipe: ClassVar[str] = "folder"
    "the default recipe for this kind"
    has_objects: ClassVar[bool] = False
    "the images come with objects, so that detection needs no annotation file"
    in_memory: bool = False
    "the images are in memory, so that loader processes would only slow down reading"
    name: str
    "as the user wrote it"
    labels: np.ndarray | None = None
    "int64 [n], -1 where unknown; None if there are no labels"
    classes: Sequence[str] = ()
    why_unlabeled: str = ""
    "why there are no labels, if that is worth mentioning"
    left_out: Mapping[str, int] = MappingProxyType({})
    "the number of files that were found and are not read, by reason, see `reading`"
    notes: Sequence[str] = ()
    "notes for the user"
    bits: int | None = None
    """bits that its unsigned 16-bit values use: 2**bits - 1 is white; None if no image is known to have such
    values, which means 16; see `pixels.measure_bits`"""

    pixel_limit: int = 100_000_000
    "pixels above which an image is not decoded: 100 megapixels are 300 MB as RGB"

    # --- before opening -------------------------------------------------------------------------------------

    @classmethod
    def matches(cls, spec: str) -> bool:
        """Whether `spec`, the value of --data, denotes this kind. May raise OSError."""
        return spec == cls.form

    @classmethod
    def open(cls, spec: str, options: OpenOptions) -> "Source":
        """Open the source. Raises DataError or ConfigError; `open_source` translates OSError."""
        raise NotImplementedError

    @classmethod
    def parts(cls, spec: str) -> tuple[str, str] | None:
        """The specs of its training and validation parts; None if it is not divided. Raises DataError."""
        return None

    @classmethod
    def with_objects(cls, split: str, images: int, options: OpenOptions) -> "tuple[Source, dict[str, Any]]":
        """`images` images of the split "train" or "test", and their objects in COCO format. Only with
        `has_objects`."""
        raise NotImplementedError

    # --- images ---------------------------------------------------------------------------------------------

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> bytes | np.ndarray:
        """The encoded bytes, or pixels uint8 [h, w, c]."""

    @abstractmethod
    def where(self, index: int) -> str:
        """The name of the image for messages: printable, on one line."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of names and sizes that does not depend on the path of the data."""

    def summary(self) -> str:
        """The number of images and classes, and of the files left out, on one line."""
        labeled = 0 if self.labels is None else int((self.labels >= 0).sum())
        return f"{self.name}: {reading(len(self), self.left_out, 0, self.classes, labeled)}"

    def for_probes(self, train: int, test: int, seed: int) -> "tuple[Source, Source] | None":
        """Additional labeled images of the same kind for fitting and testing probes; None to take them from
        this source."""
        return None

    def samples(self) -> Int[np.ndarray, " n"] | None:
        """A number for what each image shows, if images that show the same are alike, and so no independent
        samples; None if each shows something else."""
        return None


class Subset(Source):
    """The images `chosen` of a source, optionally with other labels, which the fingerprint does not
    include."""

    def __init__(
        self,
        source: Source,
        chosen: Int[np.ndarray, " k"],
        labels: Int[np.ndarray, " k"] | None = None,
        classes: Sequence[str] | None = None,
    ):
        self.source, self.chosen = source, chosen
        self.name, self.in_memory, self.notes = source.name, source.in_memory, source.notes
        self.bits, self.pixel_limit = source.bits, source.pixel_limit
        self.classes, self.left_out = classes or source.classes, source.left_out
        self.labels = labels if labels is not None or source.labels is None else source.labels[chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, index: int) -> bytes | np.ndarray:
        return self.source.read(int(self.chosen[index]))

    def where(self, index: int) -> str:
        return self.source.where(int(self.chosen[index]))

    def samples(self) -> Int[np.ndarray, " k"] | None:
        samples = self.source.samples()
        return None if samples is None else samples[self.chosen]

    def fingerprint(self) -> str:
        return hashlib.sha256(
            self.source.fingerprint().encode() + self.chosen.astype("<i8").tobytes()
        ).hexdigest()


class Strings:
    """A list of byte strings, stored in two arrays."""

    def __init__(self, names: list[bytes]):
        self.ends = np.cumsum([len(n) for n in names], dtype=np.int64)
        self.data = np.frombuffer(b"".join(names), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> bytes:
        start = self.ends[i - 1] if i else 0
        return self.data[start : self.ends[i]].tobytes()


def printable(name: bytes) -> str:
    """A file name on one line, with control characters and invalid UTF-8 escaped."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def numbered(labels: list[bytes]) -> tuple[Int[np.ndarray, " n"] | None, list[str]]:
    """Labels as class indices, -1 for empty labels, and the names of the classes; (None, []) if there are
    fewer than two classes. Names that differ only in their Unicode normal form are one class."""
    names = {label: composed(label) for label in set(labels)}
    classes = sorted(set(names.values()) - {b""})
    if len(classes) < 2:
        return None, []
    index = {c: i for i, c in enumerate(classes)} | {b"": -1}
    indices = {label: index[name] for label, name in names.items()}
    return np.array([indices[label] for label in labels], dtype=np.int64), [printable(c) for c in classes]


def composed(name: bytes) -> bytes:
    """A name in Unicode normal form C. macOS writes file names in form D, other systems mostly in form C."""
    try:
        return unicodedata.normalize("NFC", name.decode()).encode()
    except UnicodeDecodeError:
        return name


def no_labels(why: str) -> tuple[str, ...]:
    """The note for a reason why labels are not used, see `Source.why_unlabeled`."""
    return (f"no labels are used: {why}",) if why else ()


def reading(
    images: int,
    left_out: Mapping[str, int],
    unreadable: int = 0,
    classes: Sequence[str] = (),
    labeled: int = 0,
) -> str:
    """What is read of the files found, on one line: "read 3,812 images; left out 190: 152 .heic (install the
    [heif] extra), 30 duplicate links, 8 unreadable".

    `images` include the unreadable ones; `labeled` of them have a label, one of `classes`.
    """
    text = f"read {how_many(images - unreadable, 'image')}"
    if labeled:
        more = ", ..." if len(classes) > 4 else ""
        text += f", {labeled:,} of them" if labeled < images else ""
        text += f" of {how_many(len(classes), 'class')} ({', '.join(classes[:4])}{more})"
    counts = sorted(left_out.items(), key=lambda item: -item[1])
    if len(counts) > REASONS:
        counts[REASONS - 1 :] = [("others", sum(n for _, n in counts[REASONS - 1 :]))]
    counts += [("unreadable", unreadable)] if unreadable else []
    reasons = [f"{n:,} {_singular(reason) if n == 1 else reason}" for reason, n in counts]
    return f"{text}; left out {sum(n for _, n in counts):,}: {', '.join(reasons)}" if counts else text


def _singular(reason: str) -> str:
    """A reason with its first plural in the singular. Those that start with an extension have none.

    >>> _singular("loops of links"), _singular(".cls")
    ('loop of links', '.cls')
    """
    return re.sub(r"(?<=[a-z])s\b", "", reason, count=1) if reason[:1].isalpha() else reason
