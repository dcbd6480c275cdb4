"""Multi-crop with color augmentation for self-distillation. All random numbers come from the generator of the
sample."""

from dataclasses import dataclass

import numpy as np
import torch
import torchvision.transforms.v2.functional as tf
from jaxtyping import UInt8
from torch import Tensor

from ..config import Images, Rules, Section
from .views import Image, flip, random_resized_crop

JITTER = 0.8
"Probability of color jitter (SimCLR's, which all later methods use)."

SIGMA = (0.1, 2.0)
"Range of the standard deviation of the blur in pixels of a 224 px image, for small crops too."


@dataclass(frozen=True, kw_only=True)
class Crops(Section):
    """Two global crops, set by [images], with color augmentation."""

    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """strength of the jitter of brightness, contrast, saturation and hue in 80 % of the crops, for images
    with 3 channels"""
    gray: float = 0.2
    "probability of converting a crop to grayscale"
    blur: tuple[float, float] = (1.0, 0.1)
    "probability of Gaussian blur: first global crop, second global crop"
    solarize: float = 0.2
    "probability of solarization, for the second global crop only"

    def rules(self) -> Rules:
        return [
            (
                all(v >= 0 for v in self.jitter) and self.jitter[3] <= 0.5,
                f"jitter must be 0 or more, its hue at most 0.5, not {self.jitter}",
            ),
            *self.each("is a fraction, from 0 to 1", "gray", "blur", "solarize"),
        ]


@dataclass(frozen=True, kw_only=True)
class LocalCrops(Crops):
    """The views of self-distillation: two global crops, set by [images], and local crops, with color
    augmentation."""

    local_crops: int = 8
    "number of local crops per image (MSN's focal views)"
    local_size: int = 96
    "side of a local crop in pixels; a multiple of the patch size"
    local_scale: tuple[float, float] = (0.05, 0.4)
    "range of the area of a local crop, as a fraction of the image"
    local_blur: float = 0.5
    "probability of Gaussian blur of a local crop"

    def rules(self) -> Rules:
        low, high = self.local_scale
        return [
            *self.each("must be 0 or more", "local_crops"),
            *self.each("must be above 0", "local_size"),
            (0 < low <= high <= 1, f"local_scale must satisfy 0 < low <= high <= 1, not {self.local_scale}"),
            *self.each("is a fraction, from 0 to 1", "local_blur"),
            *super().rules(),
        ]


@dataclass(frozen=True)
class MultiCrop:
    """Two global crops, stacked as "image", and local ones, if there are any, as "local"."""

    images: Images
    crops: Crops

    def __call__(self, image: Image, rng: np.random.Generator) -> dict[str, Tensor]:
        c = self.crops
        views = [
            self._view(
                image, self.images.shape, self.images.crop_scale, rng, c.blur[i], c.solarize * (i == 1)
            )
            for i in (0, 1)
        ]
        batch = {"image": torch.stack(views)}  # [2, c, h, w]
        if isinstance(c, LocalCrops) and c.local_crops:
            small = [
                self._view(image, (c.local_size,) * 2, c.local_scale, rng, c.local_blur, 0.0)
                for _ in range(c.local_crops)
            ]
            batch["local"] = torch.stack(small)  # [v, c, h, w]
        return batch

    def _view(
        self,
        image: Image,
        shape: tuple[int, int],
        scale: tuple[float, float],
        rng: np.random.Generator,
        blur: float,
        solarize: float,
    ) -> UInt8[Tensor, "c ch cw"]:
        crop = random_resized_crop(image, shape, scale, rng=rng)
        if self.images.flip:
            crop = flip(crop, rng)
        if self.images.channels == 3:
            crop = color_jitter(crop, self.crops.jitter, self.crops.gray, rng)
        if rng.random() < blur:
            sigma = rng.uniform(*SIGMA) * max(self.images.shape) / 224
            side = 2 * max(1, round(3 * sigma)) + 1
            crop = tf.gaussian_blur(crop, [side, side], [sigma, sigma])
        if rng.random() < solarize:
            crop = torch.where(crop < 128, crop, 255 - crop)
        return crop


def color_jitter(
    crop: UInt8[Tensor, "c h w"],
    strength: tuple[float, float, float, float],
    gray: float,
    rng: np.random.Generator,
) -> UInt8[Tensor, "c h w"]:
    """Brightness, contrast, saturation (factors of 1 +- strength) and hue (+- strength of the circle) in
    random order, then grayscale with probability `gray`."""
    if rng.random() < JITTER:
        amounts = [rng.uniform(max(0.0, 1 - s), 1 + s) for s in strength[:3]] + [
            rng.uniform(-strength[3], strength[3])
        ]
        change = (tf.adjust_brightness, tf.adjust_contrast, tf.adjust_saturation, tf.adjust_hue)
        for i in rng.permutation(4):
            if strength[i]:
                crop = change[i](crop, amounts[i])
    if rng.random() < gray:
        crop = tf.rgb_to_grayscale(crop, num_output_channels=3)
    return crop
