"""Views of images with their objects for training and evaluation, and batches of them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from ...data.dataset import Bad, Images
from ...data.loader import batches_of
from ...data.sampler import Key
from ...data.views import rng
from .coco import CocoSet, Objects

MIN_PIXELS = 4
"Objects with fewer pixels are left out of a view: no anchor and no mask of 28 x 28 can represent them."

TARGET = ("boxes", "labels", "masks")


class Jitter:
    """Large-scale jitter: flip an image, resize it to fit a random multiple of the square, and crop it to the
    square at random.

    Same as detectron2's ResizeScale and FixedSizeCrop except for the offsets of the crop (detectron2: a
    single draw for both). Padding, at the right and at the bottom, has the mean color (`mean`, in units of 0
    to 1), which is 0 after standardization, up to rounding to 8 bits. At most `max_instances` objects are
    kept, drawn at random from the visible ones.
    """

    def __init__(
        self, size: int, scale: tuple[float, float], flip: bool, max_instances: int, mean: tuple[float, ...]
    ):
        self.size, self.scale, self.flip, self.max_instances = size, scale, flip, max_instances
        self.fill = torch.tensor([round(255 * m) for m in mean], dtype=torch.uint8)[:, None, None]

    def __call__(
        self, image: UInt8[np.ndarray, "h w c"], objects: Objects, rng: np.random.Generator
    ) -> dict[str, Tensor]:
        """Returns "image" uint8 [c s s], "boxes" float32 [n 4] around the visible parts of the masks,
        "labels" int64 [n], "masks" bool [n s s]."""
        s = self.size
        flipped = self.flip and rng.random() < 0.5
        if flipped:
            image = image[:, ::-1].copy()
        shape = fitted(image.shape[:2], s * rng.uniform(*self.scale))
        (top, h), (left, w) = ((int(rng.integers(max(side - s, 0) + 1)), min(side, s)) for side in shape)
        canvas = self.fill.repeat(1, s, s)
        canvas[:, :h, :w] = resized(image, shape)[:, top : top + h, left : left + w]
        rows, columns = (
            nearest(image.shape[0], shape[0])[top : top + h],
            nearest(image.shape[1], shape[1])[left : left + w],
        )
        if flipped:
            columns = image.shape[1] - 1 - columns
        visible: dict[int, np.ndarray] = {}
        for k in rng.permutation(len(objects.masks)).tolist():
            if len(visible) == self.max_instances:
                break
            part = objects.masks[k][:, columns][rows]
            if np.count_nonzero(part) >= MIN_PIXELS:
                visible[k] = part
        order = sorted(visible)
        masks = torch.zeros(len(order), s, s, dtype=torch.bool)
        for i, k in enumerate(order):
            masks[i, :h, :w] = torch.from_numpy(visible.pop(k))  # pop frees memory
        boxes = masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0])
        labels = torch.from_numpy(objects.labels[order])
        return {"image": canvas, "boxes": boxes, "labels": labels, "masks": masks}


def fit(image: UInt8[np.ndarray, "h w c"], size: int) -> UInt8[Tensor, "c ch cw"]:
    """The view for evaluation: the longer side is resized to `size`, without padding."""
    return resized(image, fitted(image.shape[:2], size))


def fitted(shape: tuple[int, ...], side: float) -> tuple[int, int]:
    """Height and width, at least one pixel, of an image of `shape` that is resized to fit a square of
    `side`."""
    h, w = (max(1, round(length * side / max(shape))) for length in shape)
    return h, w


def resized(image: UInt8[np.ndarray, "h w c"], shape: tuple[int, int]) -> UInt8[Tensor, "c ch cw"]:
    """Bilinear, antialiased."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    return resize(pixels, list(shape), InterpolationMode.BILINEAR, antialias=True)


def nearest(side: int, resized_side: int) -> Int[np.ndarray, " n"]:
    """Which of `side` pixels lies at the center of each of the resized ones.

    Masks are resized this way because antialiasing with a threshold of one half would remove structures
    thinner than a pixel.
    """
    return ((2 * np.arange(resized_side) + 1) * side) // (2 * resized_side)


class Detections(Images):
    """Sample (epoch, index) of a CocoSet through a `Jitter`, with the objects of the image that was read (a
    substitute if the requested one is unreadable)."""

    source: CocoSet

    def __init__(self, source: CocoSet, jitter: Jitter, seed: int, channels: int = 3):
        # The base class passes no objects to its view; __getitem__ below uses `jitter` instead.
        super().__init__(source, jitter, seed, channels)  # type: ignore[arg-type]
        self.jitter, self.channels = jitter, channels

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        image, taken, bad = self.readable(index, lambda i: self.source.pixels(i, self.channels))
        return self.jitter(image, self.source.objects(taken), rng(self.seed, epoch, index)) | {"bad": bad}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate a batch: "image" [b c s s], the objects of all images concatenated, and "counts" of them.

    There are few tensors because each needs a file handle between processes. Masks are packed, eight pixels
    per byte, to limit the memory of prefetched batches.
    """
    joined = {k: torch.cat([sample[k] for sample in samples]) for k in TARGET}
    joined["masks"] = torch.from_numpy(np.packbits(joined["masks"].numpy(), axis=2))
    images = torch.stack([sample["image"] for sample in samples])
    return {
        "image": images,
        "counts": [len(s["labels"]) for s in samples],
        "bad": [b for s in samples for b in s["bad"]],
    } | joined


def detection_batches(
    dataset: Detections,
    keys: Iterable[list[Key]],
    workers: int | None,
    device: torch.device,
    note: Callable[[list[Bad]], None],
) -> Iterator[dict[str, Any]]:
    """Batches on the device: "image" uint8 [b c s s], and "targets", for each image the "boxes", "labels" and
    "masks" of `Jitter`."""
    for batch in batches_of(dataset, keys, dataset.source, workers, device, note, collate):
        batch["masks"] = unpacked(batch["masks"], batch["image"].shape[-1])
        parts = zip(*(batch[k].split(batch["counts"]) for k in TARGET), strict=True)
        yield {"image": batch["image"], "targets": [dict(zip(TARGET, part, strict=True)) for part in parts]}


def unpacked(masks: UInt8[Tensor, "n h _"], width: int) -> Bool[Tensor, "n h {width}"]:
    """The reverse of numpy's packbits along rows, on any device."""
    # Created on the device, since a copy from the host would synchronize.
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=masks.device)
    return (masks[..., None] >> shifts & 1).bool().flatten(2)[..., :width]
