"""Several crops of one image with colour changes, as self-distillation sees it; all draws from the sample's own generator."""

from dataclasses import dataclass

import numpy as np
import torch
import torchvision.transforms.v2.functional as tf
from jaxtyping import UInt8
from torch import Tensor

from ..config import Crops, Images
from .views import flip, random_resized_crop

JITTER = 0.8
"Share of the crops whose colours are changed (SimCLR's, and so everybody's)."

SIGMA = (0.1, 2.0)
"Deviation of the blur in pixels, of small crops too, where the image is 224 px wide; drawn evenly."


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
