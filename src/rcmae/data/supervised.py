"""What supervised training draws: RandAugment, erasing, mixup and cutmix by timm, each a pure function of numbers."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from timm.data import auto_augment
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from .views import flip, random_resized_crop


@contextmanager
def seeded(rng: np.random.Generator) -> Iterator[None]:
    """Within it, the global generators that timm draws from start at integers of `rng`; afterwards they are as they were before."""
    kept = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    seeds = rng.integers(2**32, size=3).tolist()
    random.seed(seeds[0]), np.random.seed(seeds[1]), torch.default_generator.manual_seed(seeds[2])
    try:
        yield
    finally:
        random.setstate(kept[0]), np.random.set_state(kept[1]), torch.random.set_rng_state(kept[2])


def posterize(image: Image.Image, bits: int, **unused) -> Image.Image:
    """timm's operation, whose "increasing" form goes down to 0 bits (a magnitude of 10). That is a black image.

    So Pillow made it until version 13, and so did the published trainings; Pillow 13 refuses to be asked for it.
    """
    return auto_augment.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


class SupervisedView:
    """A training image: crop, flip, RandAugment, then a box of noise in place of what is erased.

    `randaugment` is timm's string ("" for none); operations that move pixels fill with `mean` and interpolate bicubically.
    `erasing` is the share of images with such a box; its noise has the mean and deviation of the data (`mean`, `std`, units of 0 to 1).
    """

    def __init__(
        self, shape: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...],
        *, scale: tuple[float, float], flip: bool, randaugment: str, erasing: float,
    ):  # fmt: skip
        self.shape, self.scale, self.flip = shape, scale, flip
        # 0.45 of the side is the largest shift of an image in timm's training transforms.
        fill = tuple(min(255, round(255 * m)) for m in mean)
        options = {"translate_const": int(0.45 * min(shape)), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
        self.augment = auto_augment.rand_augment_transform(randaugment, options) if randaugment else None
        for operation in self.augment.ops if self.augment else ():
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = posterize
        self.erase = RandomErasing(erasing, mode="pixel", device="cpu") if erasing else None
        self.mean, self.std = (torch.tensor(s).view(-1, 1, 1) for s in (mean, std))

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> dict[str, Tensor]:
        """`image`: uint8 [c h w], or where boxes are erased float32 [c h w] with pixels in 0 to 1 and noise beyond."""
        crop = random_resized_crop(image, self.shape, self.scale, rng)
        if self.flip:
            crop = flip(crop, rng)
        with seeded(rng):
            if self.augment:
                picture = self.augment(Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy()))
                crop = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            if self.erase:
                crop = self.erase((crop / 255 - self.mean) / self.std) * self.std + self.mean
        return {"image": crop.contiguous()}


class Mixing:
    """Mixup and cutmix within groups of consecutive images of a step, and smoothed targets.

    A group is mixed with itself in reverse by one draw, a function of (seed, step, group): the mixed step is the same however it is cut
    into ranks and micro-batches, as long as these hold whole groups.
    """

    def __init__(
        self, classes: int,
        *, mixup: float, cutmix: float, mix_prob: float, switch_prob: float, smoothing: float, mix_group: int, seed: int,
    ):  # fmt: skip
        self.classes, self.smoothing, self.group, self.seed = classes, smoothing, mix_group, seed
        self.mixup = None
        if mixup or cutmix:
            self.mixup = Mixup(
                mixup_alpha=mixup, cutmix_alpha=cutmix, prob=mix_prob, switch_prob=switch_prob, label_smoothing=smoothing,
                num_classes=classes,
            )  # fmt: skip

    def __call__(
        self, images: Float[Tensor, "b c h w"], labels: Int[Tensor, " b"], step: int, part: int
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]:
        """The images, changed in place, and a distribution over the classes for each; they are the `part`-th of as many of the step."""
        if self.mixup is None:
            return images, mixup_target(labels, self.classes, smoothing=self.smoothing)
        first = part * len(images) // self.group
        targets = []
        for i, (own, their) in enumerate(zip(images.split(self.group), labels.split(self.group), strict=True)):
            with seeded(np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 4, first + i, step]))):
                targets.append(self.mixup(own, their)[1])
        return images, torch.cat(targets)


def path_seed(seed: int, step: int, part: int) -> int:
    """What torch's generator starts from, for the paths that the `part`-th micro-batch of a step drops."""
    return int(np.random.Generator(np.random.Philox(key=seed, counter=[0, 5, part, step])).integers(2**63))
