"""Crops and flips as pure functions of a generator, which is a pure function of (seed, epoch, index).

In shapes, ch and cw are the height and width of a crop.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from ..config import Images
from .decode import Picture

Box = tuple[int, int, int, int]
"Top, left, height and width, in pixels."


class Reduced:
    """A reduced image, of which crops are requested in the coordinates of the original one."""

    def __init__(self, pixels: UInt8[np.ndarray, "h w c"], original: tuple[int, int]):
        self.pixels, self.shape = pixels, (*original, pixels.shape[2])

    def crop(self, box: Box, shape: tuple[int, int]) -> UInt8[np.ndarray, "ch cw c"]:
        """The pixels in `box`, to the nearest pixel; `shape` does not matter."""
        y, x, height, width = reduced_box(box, self.shape[:2], self.pixels.shape[:2])
        return np.ascontiguousarray(self.pixels[y : y + height, x : x + width])


def reduced_box(box: Box, original: tuple[int, ...], reduced: tuple[int, ...]) -> Box:
    """`box` of an image of `original` height and width, in the nearest pixels of one that is `reduced`."""
    starts, lengths = [], []
    for start, length, before, size in zip(box[:2], box[2:], original, reduced, strict=True):
        factor = size / before
        starts.append(min(round(start * factor), size - 1))
        lengths.append(max(1, round((start + length) * factor) - starts[-1]))
    return starts[0], starts[1], lengths[0], lengths[1]


@dataclass(frozen=True)
class Stored:
    """Image `index` of those stored on a device, of `stored` height and width, of which a crop is requested
    in the coordinates of the original one."""

    index: int
    stored: tuple[int, int]
    shape: tuple[int, int]
    "height and width of the original"


class Cut(NamedTuple):
    """A crop of image number `image` that the device cuts out, in pixels of the stored image; in a batch,
    every value is a tensor [b]."""

    image: int
    top: int
    left: int
    height: int
    width: int
    flipped: bool


Opened = UInt8[np.ndarray, "h w c"] | Picture

Image = Opened | Reduced


def rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator for sample `index` in `epoch`. It is counter-based, so samples are independent of each
    other."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, index, epoch]))


def crop_box(
    h: int, w: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """A random crop of an image of h x w. As in torchvision, a central crop if none of ten draws fits."""
    low, high = np.log(ratio)
    areas, aspects = rng.uniform(*scale, 10) * h * w, np.exp(rng.uniform(low, high, 10))
    for area, aspect in zip(areas.tolist(), aspects.tolist(), strict=True):
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= w and 0 < height <= h:
            return int(rng.integers(h - height + 1)), int(rng.integers(w - width + 1)), height, width
    aspect = min(max(w / h, ratio[0]), ratio[1])
    height, width = min(h, max(1, round(w / aspect))), min(w, max(1, round(h * aspect)))
    return (h - height) // 2, (w - width) // 2, height, width


def clipped_crop_box(
    h: int, w: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """As `crop_box`, but drawn once: a side that is longer than the image's is cut to it. So do the probes of
    MAE, RC-MAE and Efficient Probing (and BYOL)."""
    area, aspect = rng.uniform(*scale) * h * w, math.exp(rng.uniform(*np.log(ratio)))
    width = min(w, max(1, round(math.sqrt(area * aspect))))
    height = min(h, max(1, round(math.sqrt(area / aspect))))
    return int(rng.integers(h - height + 1)), int(rng.integers(w - width + 1)), height, width


def random_resized_crop(
    image: Image,
    shape: tuple[int, int],
    scale: tuple[float, float],
    rng: np.random.Generator,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    box: Callable[..., Box] = crop_box,
) -> UInt8[Tensor, "c ch cw"]:
    """A crop of random area and aspect ratio, resized to `shape` (height, width), bicubic with antialiasing.
    `box` draws it.

    With scale (1, 1), an image that already has the shape is returned unchanged.
    """
    return _resized(image, _random_box(image.shape, shape, scale, rng, ratio, box), shape)


def _random_box(
    size: tuple[int, ...],
    shape: tuple[int, int],
    scale: tuple[float, float],
    rng: np.random.Generator,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    box: Callable[..., Box] = crop_box,
) -> Box:
    h, w = size[:2]
    whole = scale == (1.0, 1.0) and (h, w) == tuple(shape)
    return (0, 0, h, w) if whole else box(h, w, scale, ratio, rng)


def random_crop(
    image: Image | Stored, settings: Images, rng: np.random.Generator
) -> UInt8[Tensor, "c ch cw"] | Cut:
    """A random crop, perhaps flipped, as [images] of a recipe says."""
    if isinstance(image, Stored):
        box = _random_box(image.shape, settings.shape, settings.crop_scale, rng)
        flipped = settings.flip and rng.random() < 0.5
        return Cut(image.index, *reduced_box(box, image.shape, image.stored), flipped)
    crop = random_resized_crop(image, settings.shape, settings.crop_scale, rng)
    return flip(crop, rng) if settings.flip else crop


def flip(crop: UInt8[Tensor, "c h w"], rng: np.random.Generator) -> UInt8[Tensor, "c h w"]:
    """A horizontal flip with probability 0.5."""
    return crop.flip(2) if rng.random() < 0.5 else crop


def center_share(shape: tuple[int, int]) -> float:
    """The share of an image's side in the evaluation crop: 224/256, and all of it for networks above 224
    px (by the shorter side)."""
    return 1.0 if min(shape) > 224 else 224 / 256


def center(image: Image, shape: tuple[int, int]) -> UInt8[Tensor, "c ch cw"]:
    """The evaluation crop, as in MAE: the center, of `center_share` of the shorter side, resized to `shape`
    (height, width). An image that already has the shape is returned unchanged."""
    h, w = image.shape[:2]
    if (h, w) == tuple(shape):
        return _resized(image, (0, 0, h, w), shape)
    fraction = center_share(shape) * min(h / shape[0], w / shape[1])
    height, width = (
        min(side, max(1, round(fraction * target))) for side, target in zip((h, w), shape, strict=True)
    )
    return _resized(image, ((h - height) // 2, (w - width) // 2, height, width), shape)


def shrink(image: Opened, side: int) -> UInt8[np.ndarray, "sh sw c"]:
    """All of an image, its shorter side reduced to `side` pixels, bicubic with antialiasing; unchanged if it
    is not longer."""
    h, w, _ = image.shape
    if min(h, w) <= side:
        return image.pixels() if isinstance(image, Picture) else image
    shape = tuple(max(1, round(length * side / min(h, w))) for length in (h, w))
    return _resized(image, (0, 0, h, w), shape).permute(1, 2, 0).numpy()


def _resized(image: Image, box: Box, shape: tuple[int, int]) -> UInt8[Tensor, "c ch cw"]:
    top, left, height, width = box
    if isinstance(image, np.ndarray):
        part = np.ascontiguousarray(image[top : top + height, left : left + width])
    else:
        part = image.crop(box, shape)
    pixels = torch.from_numpy(part).permute(2, 0, 1)
    return resize(pixels, list(shape), InterpolationMode.BICUBIC, antialias=True)
