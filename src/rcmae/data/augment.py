"""Several crops of one image with colour changes, as self-distillation sees it; all draws from the sample's own generator."""

from dataclasses import dataclass

import numpy as np
import torch
import torchvision.transforms.v2.functional as tf
from jaxtyping import UInt8
from torch import Tensor

from ..config import Images, Rules, Section
from .views import flip, random_resized_crop

JITTER = 0.8
"Share of the crops whose colours are changed (SimCLR's, and so everybody's)."

SIGMA = (0.1, 2.0)
"Deviation of the blur in pixels, of small crops too, where the image is 224 px wide; drawn evenly."


@dataclass(frozen=True, kw_only=True)
class Crops(Section):
    """The views of self-distillation: two crops as [images] says, and small ones, in changed colours."""

    local_crops: int = 8
    "small crops an image (MSN's focal views)"
    local_size: int = 96
    "their side in pixels; a multiple of the patch"
    local_scale: tuple[float, float] = (0.05, 0.4)
    "share of the image's area that they cover"
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    "change of brightness, contrast, saturation and hue in 80 % of the crops; images of other than 3 channels keep theirs"
    grey: float = 0.2
    "share of the crops without colour"
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    "share of the crops that are blurred: of the first global one, the second, the small ones"
    solarize: float = 0.2
    "share of the second global crops whose bright pixels are inverted"

    def rules(self) -> Rules:
        low, high = self.local_scale
        shares = {"grey": self.grey, "solarize": self.solarize} | {f"blur {i}": v for i, v in enumerate(self.blur)}
        return [
            (self.local_crops >= 0, f"local_crops must be 0 or more, not {self.local_crops}"),
            (self.local_size > 0, f"local_size must be above 0, not {self.local_size}"),
            (0 < low <= high <= 1, f"local_scale must satisfy 0 < low <= high <= 1, not {self.local_scale}"),
            (
                all(v >= 0 for v in self.jitter) and self.jitter[3] <= 0.5,
                f"jitter must be 0 or more, its hue at most 0.5, not {self.jitter}",
            ),
            *((0 <= v <= 1, f"{k} is a share, from 0 to 1, not {v}") for k, v in shares.items()),
        ]


@dataclass(frozen=True)
class MultiCrop:
    """Two global crops, stacked under "image", and `local_crops` small ones under "local"."""

    images: Images
    crops: Crops

    def __call__(self, image: UInt8[np.ndarray, "h w c"], rng: np.random.Generator) -> dict[str, Tensor]:
        c = self.crops
        views = [self._view(image, self.images.shape, self.images.crop_scale, rng, c.blur[i], c.solarize * (i == 1)) for i in (0, 1)]
        small = [self._view(image, (c.local_size,) * 2, c.local_scale, rng, c.blur[2], 0.0) for _ in range(c.local_crops)]
        return {"image": torch.stack(views)} | ({"local": torch.stack(small)} if small else {})

    def _view(self, image, shape: tuple[int, int], scale: tuple[float, float], rng: np.random.Generator, blur: float, solarize: float):
        crop = random_resized_crop(image, shape, scale, rng=rng)
        if self.images.flip:
            crop = flip(crop, rng)
        if self.images.channels == 3:
            crop = recoloured(crop, self.crops.jitter, self.crops.grey, rng)
        if rng.random() < blur:
            sigma = rng.uniform(*SIGMA) * max(self.images.shape) / 224
            side = 2 * max(1, round(3 * sigma)) + 1
            crop = tf.gaussian_blur(crop, [side, side], [sigma, sigma])
        if rng.random() < solarize:
            crop = torch.where(crop < 128, crop, 255 - crop)
        return crop


def recoloured(
    crop: UInt8[Tensor, "c h w"], strength: tuple[float, float, float, float], grey: float, rng: np.random.Generator
) -> UInt8[Tensor, "c h w"]:
    """Brightness, contrast, saturation (each by a factor of 1 +- strength) and hue (+- strength of the circle), in any order; some grey."""
    if rng.random() < JITTER:
        amounts = [rng.uniform(max(0.0, 1 - s), 1 + s) for s in strength[:3]] + [rng.uniform(-strength[3], strength[3])]
        change = (tf.adjust_brightness, tf.adjust_contrast, tf.adjust_saturation, tf.adjust_hue)
        for i in rng.permutation(4):
            if strength[i]:
                crop = change[i](crop, amounts[i])
    if rng.random() < grey:
        crop = tf.rgb_to_grayscale(crop, num_output_channels=3)
    return crop
