"""`rcmae check`: an audit of a data set before training."""

import dataclasses
import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image
from rich.console import Group
from rich.table import Table

from ..config import Recipe
from ..engine.console import Screen
from .base import Source, reading
from .dataset import STATISTICS_SIDE
from .decode import FORMATS, BadImage
from .pixels import moments, open_image
from .sources import open_source

FLAT = 2.0
"Standard deviation of the pixels (of 255) below which an image counts as nearly constant."

SHOWN = 10
"Number of entries of a list that are printed; the JSON file has all."


@dataclass(frozen=True)
class Audit:
    """The results. Sizes are (smallest, median, largest) in pixels; mean and std are per channel, for pixels
    in 0 to 1. `left_out` counts the files that are no images to read, by reason."""

    name: str
    kind: str
    images: int
    left_out: dict[str, int]
    notes: list[str]
    formats: dict[str, int]
    modes: dict[str, int]
    widths: tuple[int, int, int]
    heights: tuple[int, int, int]
    unreadable: list[tuple[str, str]]
    duplicates: list[tuple[str, ...]]
    leaks: list[tuple[str, str]] | None
    "images that are in the validation set too; None without one"
    constant: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images_per_second: float
    classes: dict[str, int]
    batch: int
    crop: tuple[int, int]
    "height and width, in pixels"
    max_corrupt_fraction: float
    sizes: Int[np.ndarray, "n 2"]
    "height and width of each readable image, in pixels; not in the JSON file"

    @property
    def shorter_side(self) -> int:
        """The median of the images' shorter sides."""
        return _range(self.sizes.min(1))[1]

    @property
    def smaller(self) -> float:
        """The fraction of the images that are smaller than the crop, which enlarges them."""
        return float((self.sizes < self.crop).any(1).mean()) if len(self.sizes) else 0.0

    @property
    def fit(self) -> bool:
        """Whether a run with this recipe has enough images and tolerates the unreadable ones."""
        return (
            self.images >= self.batch
            and self.images > len(self.unreadable)
            and len(self.unreadable) <= max(10, self.max_corrupt_fraction * self.images)
        )


def audit(
    source: Source,
    val: Source | None = None,
    recipe: Recipe = Recipe(),
    max_corrupt_fraction: float = 0.01,
    screen: Screen | None = None,
) -> Audit:
    """Read every image of `source` once, and the bytes of the images of `val`, with progress on the
    `screen`."""
    channels, screen = recipe.images.channels, screen or Screen(False)
    formats, modes = Counter[str](), Counter[str]()
    sizes: list[tuple[int, int]] = []
    unreadable: list[tuple[str, str]] = []
    constant: list[str] = []
    hashes: dict[bytes, list[int]] = {}
    sums, squares, seconds = np.zeros(channels), np.zeros(channels), 0.0
    for i in _each(source, "reading", screen):
        try:
            raw, digest = _bytes(source, i)
            start = time.perf_counter()
            image = open_image(source, i, channels)
            pixels = image if isinstance(image, np.ndarray) else image.pixels(STATISTICS_SIDE)
            seconds += time.perf_counter() - start
        except BadImage as e:
            unreadable.append((source.where(i), str(e)))
            continue
        hashes.setdefault(digest, []).append(i)
        file_format, mode = _header(raw)
        formats[file_format] += 1
        modes[mode] += 1
        sizes.append(image.shape[:2])
        mean, square = moments(pixels)
        sums, squares = sums + mean, squares + square
        if 255 * np.sqrt(np.maximum(square - mean**2, 0)).max() < FLAT:
            constant.append(source.where(i))
    if unreadable:
        counts = reading(len(source), source.left_out, len(unreadable))
        screen.say(f"{source.name}: after decoding all, {counts}")
    count = len(sizes)
    mean = sums / max(count, 1)
    heights, widths = np.array(sizes, int).reshape(-1, 2).T
    return Audit(
        name=source.name,
        kind=source.kind,
        images=len(source),
        left_out=dict(source.left_out),
        notes=list(source.notes),
        formats=dict(formats),
        modes=dict(modes),
        widths=_range(widths),
        heights=_range(heights),
        unreadable=unreadable,
        duplicates=[tuple(source.where(i) for i in same) for same in hashes.values() if len(same) > 1],
        leaks=_leaks(source, hashes, val, screen) if val else None,
        constant=constant,
        mean=tuple(mean.tolist()),
        std=tuple(np.sqrt(np.maximum(squares / max(count, 1) - mean**2, 0)).tolist()),
        images_per_second=count / max(seconds, 1e-9),
        classes=_classes(source),
        batch=recipe.optim.batch_size,
        crop=recipe.images.shape,
        max_corrupt_fraction=max_corrupt_fraction,
        sizes=np.stack([heights, widths], 1),
    )


def indexed(path: str, recipe: Recipe, screen: Screen, max_pixels: float = Source.pixel_limit) -> Source:
    """The images of `path`, with the settings of `recipe`. Raises the errors of `open_source`."""
    with screen.progress(f"indexing {path}, %", 100) as tick:
        source = open_source(
            path,
            recipe.images.channels,
            recipe.images.size,
            recipe.seed,
            lambda fraction: tick(int(100 * fraction)),
            recipe.images.range,
            max_pixels,
        )
    screen.say(source.summary())
    for note in source.notes:
        screen.say(f"note: {note}")
    return source


def _each(source: Source, what: str, screen: Screen) -> Iterator[int]:
    """The indices of all images, with progress."""
    with screen.progress(f"{what} {source.name}", len(source)) as tick:
        for i in range(len(source)):
            yield i
            tick(i + 1)


def _bytes(source: Source, index: int) -> tuple[bytes | np.ndarray, bytes]:
    try:
        raw = source.read(index)
    except OSError as e:
        raise BadImage(e.strerror or "cannot be read") from e
    return raw, hashlib.sha256(raw.tobytes() if isinstance(raw, np.ndarray) else raw).digest()


def _header(raw: bytes | np.ndarray) -> tuple[str, str]:
    """Format and mode."""
    if isinstance(raw, np.ndarray):
        return "pixels", {1: "L", 3: "RGB"}.get(raw.shape[2], f"{raw.shape[2]} bands")
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            return image.format or "?", image.mode
    except Exception:  # a multi-band TIFF has no header that Pillow reads
        return "other", "other"


def _range(values: np.ndarray) -> tuple[int, int, int]:
    return (int(values.min()), int(np.median(values)), int(values.max())) if len(values) else (0, 0, 0)


def _leaks(
    source: Source, hashes: dict[bytes, list[int]], val: Source, screen: Screen
) -> list[tuple[str, str]]:
    leaks = []
    for i in _each(val, "comparing", screen):
        try:
            _, digest = _bytes(val, i)
        except BadImage:
            continue
        if digest in hashes:
            leaks.append((source.where(hashes[digest][0]), val.where(i)))
    return leaks


def _classes(source: Source) -> dict[str, int]:
    if source.labels is None:
        return {}
    counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
    return {name: int(n) for name, n in zip(source.classes, counts, strict=True)}


def to_json(result: Audit, **more: Any) -> str:
    """The complete results, and `more` of them."""
    values = dataclasses.asdict(result) | {"smaller_than_crop": result.smaller, "fit": result.fit} | more
    del values["sizes"]
    return json.dumps(values, indent=1) + "\n"


def render(result: Audit) -> Group:
    """The results for a terminal."""
    table = Table(title=f"{result.name} ({result.kind})", title_justify="left", show_header=False)
    rows = {
        "formats": _counts(result.formats),
        "modes": _counts(result.modes),
        "width": "smallest {:,}, median {:,}, largest {:,} px".format(*result.widths),
        "height": "smallest {:,}, median {:,}, largest {:,} px".format(*result.heights),
        "crop": "{1} x {0} px".format(*result.crop)
        + (f"; {result.smaller:.1%} of the images are smaller, and are enlarged" if result.smaller else ""),
        "mean of channels": " ".join(f"{v:.3f}" for v in result.mean),
        "standard deviation": " ".join(f"{v:.3f}" for v in result.std) + "  (used by --normalize data)",
        "decoding": f"{result.images_per_second:,.0f} images/s on one core now (JPEGs reduced "
        f"to about {STATISTICS_SIDE} px)",
        "classes": f"{len(result.classes)}: {_extremes(result.classes)}"
        if result.classes
        else "none: pre-training needs none, probes do",
    }
    for name, text in rows.items():
        table.add_row(name, text)
    parts: list[Table | str] = [table]
    lists = {
        "unreadable": [f"{w}: {r}" for w, r in result.unreadable],
        f"exact duplicate{'s' * (len(result.duplicates) != 1)}": [" = ".join(d) for d in result.duplicates],
        "nearly constant": result.constant,
    }
    if result.leaks is not None:
        lists["in both training and validation"] = [" = ".join(pair) for pair in result.leaks]
    for title, lines in lists.items():
        more = [f"  ... and {len(lines) - SHOWN} more (--json FILE has all)"] if len(lines) > SHOWN else []
        parts.append("\n".join([f"{len(lines):,} {title}", *(f"  {line}" for line in lines[:SHOWN]), *more]))
    parts.append("Fit for training." if result.fit else _unfit(result))
    return Group(*parts)


def _unfit(result: Audit) -> str:
    if result.images < result.batch:
        return f"Not fit for training: fewer than a batch of {result.batch}; give a smaller --batch-size."
    return "Not fit for training: too many unreadable images; fix them or raise --max-corrupt-fraction."


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in sorted(counts.items(), key=lambda x: -x[1])) or "none"


def _extremes(classes: dict[str, int]) -> str:
    smallest, largest = min(classes, key=classes.__getitem__), max(classes, key=classes.__getitem__)
    return f"smallest {smallest} ({classes[smallest]:,}), largest {largest} ({classes[largest]:,})"
