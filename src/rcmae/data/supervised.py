"""The augmentation of supervised training: timm's RandAugment, random erasing, mixup and cutmix, made
deterministic."""

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

from . import views
from .views import flip, random_resized_crop


@contextmanager
def seeded(rng: np.random.Generator) -> Iterator[None]:
    """Seed the global generators, which timm uses, from `rng`, and restore them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    seeds = rng.integers(2**32, size=3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(seeds[2])
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


def posterize(image: Image.Image, bits: int, **unused) -> Image.Image:
    """timm's operation, which at magnitude 10 keeps 0 bits ("increasing" variant): a black image.

    Pillow before version 13 returned it, so the published trainings had it; Pillow 13 raises an error.
    """
    return auto_augment.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


class SupervisedView:
    """The training augmentation: random crop, flip, RandAugment, random erasing.

    `randaugment` is timm's configuration string ("" for none); geometric operations fill with `mean` and
    interpolate bicubically. `erasing` is the probability of random erasing, whose noise has the mean and
    standard deviation of the data (`mean`, `std`, for pixels in 0 to 1).
    """

    def __init__(
        self,
        shape: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        scale: tuple[float, float],
        flip: bool,
        randaugment: str,
        erasing: float,
    ):
        self.shape, self.scale, self.flip = shape, scale, flip
        # In timm's training transforms, the largest shift is 0.45 of the side.
        fill = tuple(min(255, round(255 * m)) for m in mean)
        options = {
            "translate_const": int(0.45 * min(shape)),
            "img_mean": fill,
            "interpolation": Image.Resampling.BICUBIC,
        }
        self.augment = auto_augment.rand_augment_transform(randaugment, options) if randaugment else None
        for operation in self.augment.ops if self.augment else ():
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = posterize
        self.erase = RandomErasing(erasing, mode="pixel", device="cpu") if erasing else None
        self.mean, self.std = (torch.tensor(s).view(-1, 1, 1) for s in (mean, std))

    def __call__(self, image: views.Image, rng: np.random.Generator) -> dict[str, Tensor]:
        """`image`: uint8 [c, h, w]; with random erasing float32 [c, h, w], pixels in 0 to 1 except for the
        noise."""
        crop = random_resized_crop(image, self.shape, self.scale, rng)
        if self.flip:
            crop = flip(crop, rng)
        with seeded(rng):
            if self.augment:
                augmented = self.augment(Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy()))
                crop = torch.from_numpy(np.array(augmented)).permute(2, 0, 1)  # [h, w, c] -> [c, h, w]
            if self.erase:
                crop = self.erase((crop / 255 - self.mean) / self.std) * self.std + self.mean
        return {"image": crop.contiguous()}


class Mixing:
    """Mixup and cutmix within groups of consecutive images of a step, and label smoothing.

    A group is mixed with itself in reverse order, with random numbers that are a function of (seed, step,
    group). So the result does not depend on the number of ranks and micro-batches, as long as each holds
    complete groups.
    """

    def __init__(
        self,
        classes: int,
        *,
        mixup: float,
        cutmix: float,
        mix_prob: float,
        switch_prob: float,
        smoothing: float,
        mix_group: int,
        seed: int,
    ):
        self.classes, self.smoothing, self.group, self.seed = classes, smoothing, mix_group, seed
        self.mixup = None
        if mixup or cutmix:
            self.mixup = Mixup(
                mixup_alpha=mixup,
                cutmix_alpha=cutmix,
                prob=mix_prob,
                switch_prob=switch_prob,
                label_smoothing=smoothing,
                num_classes=classes,
            )

    def __call__(
        self, images: Float[Tensor, "b c h w"], labels: Int[Tensor, " b"], step: int, part: int
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]:
        """The images, changed in place, and their target distributions. They are micro-batch `part` of the
        step, over all ranks."""
        if self.mixup is None:
            return images, mixup_target(labels, self.classes, smoothing=self.smoothing)
        first = part * len(images) // self.group
        targets = []
        groups = zip(images.split(self.group), labels.split(self.group), strict=True)
        for i, (group_images, group_labels) in enumerate(groups, first):
            with seeded(np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 4, i, step]))):
                targets.append(self.mixup(group_images, group_labels)[1])  # [g, k]
        return images, torch.cat(targets)


def path_seed(seed: int, step: int, part: int) -> int:
    """The seed of torch's generator for drop path in micro-batch `part` of a step."""
    return int(np.random.Generator(np.random.Philox(key=seed, counter=[0, 5, part, step])).integers(2**63))
