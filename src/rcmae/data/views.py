"""Crops as pure functions of a generator, and the generator as a pure function of (seed, epoch, index). Letters: ch cw, a crop's pixels."""

import math

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

Image = UInt8[np.ndarray, "h w c"]


def rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of sample `index` in `epoch`: counter-based, so that nothing needs to be drawn before it."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, index, epoch]))


def random_resized_crop(
    image: Image,
    shape: tuple[int, int],
    scale: tuple[float, float],
    rng: np.random.Generator,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> UInt8[Tensor, "c ch cw"]:
    """A crop of a random share of the area and a random aspect, resized to `shape` (height, width): bicubic, antialiased.

    An image that already has the shape, with scale (1, 1), is taken as it is.
    """
    h, w = image.shape[:2]
    if scale == (1.0, 1.0) and (h, w) == tuple(shape):
        return torch.from_numpy(image).permute(2, 0, 1)
    top, left, height, width = crop_box(h, w, scale, ratio, rng)
    return _resize(image[top : top + height, left : left + width], shape)


def crop_box(h: int, w: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop inside h x w, at least one pixel; the whole width or height if no draw fits."""
    for area, aspect in zip(rng.uniform(*scale, 10) * h * w, np.exp(rng.uniform(*np.log(ratio), 10)), strict=True):
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= w and 0 < height <= h:
            return int(rng.integers(h - height + 1)), int(rng.integers(w - width + 1)), height, width
    aspect = min(max(w / h, ratio[0]), ratio[1])
    height, width = min(h, max(1, round(w / aspect))), min(w, max(1, round(h * aspect)))
    return (h - height) // 2, (w - width) // 2, height, width


def flip(crop: UInt8[Tensor, "c h w"], rng: np.random.Generator) -> UInt8[Tensor, "c h w"]:
    """Left and right exchanged, every other time."""
    return crop.flip(2) if rng.random() < 0.5 else crop


def center(image: Image, shape: tuple[int, int]) -> UInt8[Tensor, "c ch cw"]:
    """For evaluation: resized so that `shape` (height, width) is 224/256 of it, then its centre; untouched if it has the shape."""
    h, w = image.shape[:2]
    if (h, w) == tuple(shape):
        return torch.from_numpy(image).permute(2, 0, 1)
    share = 224 / 256 * min(h / shape[0], w / shape[1])
    height, width = (min(side, max(1, round(share * target))) for side, target in zip((h, w), shape, strict=True))
    top, left = (h - height) // 2, (w - width) // 2
    return _resize(image[top : top + height, left : left + width], shape)


def _resize(part: Image, shape: tuple[int, int]) -> UInt8[Tensor, "c ch cw"]:
    pixels = torch.from_numpy(np.ascontiguousarray(part)).permute(2, 0, 1)
    return resize(pixels, list(shape), InterpolationMode.BICUBIC, antialias=True)
