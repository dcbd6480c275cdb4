"""Images with their objects as training and evaluation see them, and batches of them."""

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
from .coco import Objects

LEAST = 4
"Pixels of an object below which it is left out of a view: no anchor and no mask of 28 x 28 shows less."

TARGET = ("boxes", "labels", "masks")


class Jitter:
    """Large-scale jitter: an image is flipped, resized to fit a random multiple of the square, and cut to the square at random.

    It is detectron2's ResizeScale and FixedSizeCrop, but for the crop's offsets (theirs: one draw for both). What the image does not
    fill, at the right and at the bottom, has the mean colour (`mean`, in units of 0 to 1): to within half a step of 255 what is 0 once a
    model has subtracted its mean. At most `max_instances` objects are kept, drawn at random among those that can be seen.
    """

    def __init__(self, size: int, scale: tuple[float, float], flip: bool, max_instances: int, mean: tuple[float, ...]):
        self.size, self.scale, self.flip, self.max_instances = size, scale, flip, max_instances
        self.fill = torch.tensor([round(255 * m) for m in mean], dtype=torch.uint8)[:, None, None]

    def __call__(self, image: UInt8[np.ndarray, "h w c"], objects: Objects, rng: np.random.Generator) -> dict[str, Tensor]:
        """Gives "image" uint8 [c s s], "boxes" float32 [n 4] around what is left of masks, "labels" int64 [n], "masks" bool [n s s]."""
        s = self.size
        flipped = self.flip and rng.random() < 0.5
        if flipped:
            image = image[:, ::-1].copy()
        shape = fitted(image.shape[:2], s * rng.uniform(*self.scale))
        (top, h), (left, w) = ((int(rng.integers(max(side - s, 0) + 1)), min(side, s)) for side in shape)
        canvas = self.fill.repeat(1, s, s)
        canvas[:, :h, :w] = resized(image, shape)[:, top : top + h, left : left + w]
        rows, columns = nearest(image.shape[0], shape[0])[top : top + h], nearest(image.shape[1], shape[1])[left : left + w]
        if flipped:
            columns = image.shape[1] - 1 - columns
        kept: dict[int, np.ndarray] = {}
        for k in rng.permutation(len(objects.masks)).tolist():
            if len(kept) == self.max_instances:
                break
            part = objects.masks[k][:, columns][rows]
            if np.count_nonzero(part) >= LEAST:
                kept[k] = part
        order = sorted(kept)
        found = torch.zeros(len(order), s, s, dtype=torch.bool)
        for place, k in enumerate(order):
            found[place, :h, :w] = torch.from_numpy(kept.pop(k))
        boxes = masks_to_boxes(found) + torch.tensor([0.0, 0.0, 1.0, 1.0])
        return {"image": canvas, "boxes": boxes, "labels": torch.from_numpy(objects.labels[order]), "masks": found}


def fit(image: UInt8[np.ndarray, "h w c"], size: int) -> UInt8[Tensor, "c ch cw"]:
    """For evaluation: the longest side becomes `size`, and nothing is added."""
    return resized(image, fitted(image.shape[:2], size))


def fitted(shape: tuple[int, ...], side: float) -> tuple[int, int]:
    """Height and width, at least one pixel, of what fits a square of `side` in the aspect of `shape`."""
    h, w = (max(1, round(length * side / max(shape))) for length in shape)
    return h, w


def resized(image: UInt8[np.ndarray, "h w c"], shape: tuple[int, int]) -> UInt8[Tensor, "c ch cw"]:
    """Bilinear, antialiased."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    return resize(pixels, list(shape), InterpolationMode.BILINEAR, antialias=True)


def nearest(side: int, resized_side: int) -> Int[np.ndarray, " n"]:
    """Which of `side` pixels lies under the centre of each of the resized ones.

    So masks are resized: of antialiased ones above a half, what is thinner than a pixel vanishes.
    """
    return ((2 * np.arange(resized_side) + 1) * side) // (2 * resized_side)


class Detections(Images):
    """Sample (epoch, index) of a CocoSet through a `Jitter`: of the image that was taken, with its objects."""

    def pixels(self, index: int) -> np.ndarray:
        return self.source.pixels(index, self.channels)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        image, taken, bad = self.read(index)
        return self.view(image, self.source.objects(taken), rng(self.seed, epoch, index)) | {"bad": bad}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of few tensors, as each costs a file handle between processes: "image" [b c s s], all objects in a row, how many of each.

    Masks are packed, eight pixels a byte: those of the batches that wait would fill the memory.
    """
    joined = {k: torch.cat([sample[k] for sample in samples]) for k in TARGET}
    joined["masks"] = torch.from_numpy(np.packbits(joined["masks"].numpy(), axis=2))
    images = torch.stack([sample["image"] for sample in samples])
    return {"image": images, "counts": [len(s["labels"]) for s in samples], "bad": [b for s in samples for b in s["bad"]]} | joined


def detection_batches(
    dataset: Detections, keys: Iterable[list[Key]], workers: int | None, device: torch.device, note: Callable[[list[Bad]], None]
) -> Iterator[dict[str, Any]]:
    """Batches on the device: "image" uint8 [b c s s], and "targets", of each image "boxes", "labels" and "masks" as `Jitter` makes them."""
    for batch in batches_of(dataset, keys, dataset.source, workers, device, note, collate):
        batch["masks"] = unpacked(batch["masks"], batch["image"].shape[-1])
        parts = zip(*(batch[k].split(batch["counts"]) for k in TARGET), strict=True)
        yield {"image": batch["image"], "targets": [dict(zip(TARGET, part, strict=True)) for part in parts]}


def unpacked(masks: UInt8[Tensor, "n h _"], width: int) -> Bool[Tensor, "n h {width}"]:
    """The reverse of numpy's packbits of rows, on any device."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=masks.device)  # made there: a copy from the host would wait
    return (masks[..., None] >> shifts & 1).bool().flatten(2)[..., :width]
