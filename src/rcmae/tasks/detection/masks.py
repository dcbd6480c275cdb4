"""Masks: decoded on access, and encoded from the polygons and run lengths of COCO's format."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...engine.metrics import optional

OVERLAP = 0.5
"""Minimum intersection over union of a box and the box around its mask, each enlarged by a pixel on all
sides, because rounding matters for small ones."""

FAR = 10
"""Maximum distance of a polygon's point from the origin, in image sides. Points farther away are no drawing
errors, and rasterizing them would need too much memory."""


class Masks(Sequence[Any]):
    """The masks of an image, decoded on each access: all of them at full size may not fit into memory."""

    def __init__(self, items: Sequence[Any], decode: Callable[[Any], Any]):
        """`decode` returns the mask of an item."""
        self.items, self.decode = items, decode

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, k: int) -> Any:  # type: ignore[override]  # slices are not supported
        return self.decode(self.items[k])


@functools.cache
def mask_api() -> Any:
    """pycocotools' functions for masks. Raises ConfigError if it is not installed."""
    return optional("pycocotools.mask", "coco")


def is_integer(value: Any) -> bool:
    """An integer that float64 represents exactly."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53


def run_length_code(segmentation: Any, h: int, w: int) -> bytes:
    """COCO's compressed run lengths of a mask given as polygons or as run lengths, compressed or not.

    Everything is validated before it is passed to pycocotools, where run lengths of a wrong size corrupt
    memory. Raises ValueError with the kind of problem.
    """
    mask = mask_api()
    if not segmentation or (isinstance(segmentation, list) and not any(segmentation)):
        raise ValueError("annotations without segmentation: masks cannot be learned from boxes alone")
    if isinstance(segmentation, list) and not any(isinstance(part, dict) for part in segmentation):
        polygons = [p for p in (_polygon(p, h, w) for p in segmentation) if len(p) >= 6]  # 2 points: no pixel
        return mask.merge(mask.frPyObjects(polygons or [[0.0] * 6], h, w))["counts"]
    if not (isinstance(segmentation, dict) and {"size", "counts"} <= segmentation.keys()):
        raise ValueError("segmentations that are neither polygons nor run lengths")
    if segmentation["size"] != [h, w]:
        raise ValueError("masks of another size than their image")
    counts = segmentation["counts"]
    if isinstance(counts, str) and counts[:2] in ("b'", 'b"'):
        raise ValueError("run lengths written as Python bytes (write counts.decode(), not str(counts))")
    runs = _runs(counts) if isinstance(counts, str) else counts
    if not (isinstance(runs, list) and all(is_integer(r) and r >= 0 for r in runs) and sum(runs) == h * w):
        raise ValueError("run lengths that do not fit the image")
    return mask.frPyObjects({"size": [h, w], "counts": runs}, h, w)["counts"]


def is_around(box: list[float], code: bytes, h: int, w: int) -> bool:
    """Whether the box (x, y, width, height) is approximately that of the mask."""
    api = mask_api()
    annotated, tight = (
        np.array([[x - 1, y - 1, width + 2, height + 2]], np.float64)
        for x, y, width, height in (box, api.toBbox({"size": [h, w], "counts": code}))
    )
    return api.iou(annotated, tight, [0]).item() >= OVERLAP


def _polygon(points: Any, h: int, w: int) -> list[float]:
    try:
        values = np.array(points)
    except ValueError:  # nested lists of different lengths
        values = np.array(None)
    if values.dtype.kind not in "if" or values.ndim != 1 or values.size % 2 or not np.isfinite(values).all():
        raise ValueError("polygons that are not lists of x and y, as in [[x1, y1, x2, y2, ...]]")
    if np.abs(values).max(initial=0) > FAR * max(h, w):
        raise ValueError("polygons far outside their image")
    return points


def _runs(text: str) -> list[int] | None:
    """Decode compressed run lengths: five bits per character, lowest first, a sixth bit marks continuation;
    from the fourth run on they are differences to the run before the previous one. None for invalid text.
    """
    c = np.frombuffer(text.encode(errors="surrogatepass"), dtype=np.uint8).astype(np.int64) - 48
    if not c.size or c.min() < 0 or c.max() > 63 or c[-1] & 32:
        return None
    ends = np.flatnonzero(c < 32)
    starts = np.concatenate([[0], ends[:-1] + 1])
    shift = 5 * (np.arange(c.size) - np.repeat(starts, ends - starts + 1))
    if shift.max() > 30:
        return None
    runs = np.add.reduceat((c & 31) << shift, starts) - ((c[ends] & 16) << (shift[ends] + 1))
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs.tolist()
