"""The settings of fine-tuning. This module does not import torch, so that invalid settings are refused before
it is loaded."""

import math
from dataclasses import dataclass

from ..config import Rules, Section, check, load_settings, parse_settings, shipped_recipes

SMALL = 112
"Side of images, in pixels, below which the recipe `small` fits better than that for a GPU."


@dataclass(frozen=True, kw_only=True)
class FineTuneRecipe(Section):
    """All settings that affect the result of fine-tuning a backbone on given images."""

    seed: int = 0
    "seed of all random choices: crops, mixtures, dropped paths and the head's initial weights"
    epochs: float | None = None
    "length of the run in epochs"
    steps: int | None = None
    "length of the run in optimizer steps"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    "fraction of the image's area that a random crop covers (lowest, highest); 1 1 for the full image"
    flip: bool = True
    "flip horizontally at random"
    randaugment: str = "rand-m9-mstd0.5-inc1"
    "RandAugment in timm's notation; empty for none"
    erasing: float = 0.25
    "probability of random erasing"
    mixup: float = 0.8
    "alpha of mixup; 0: none"
    cutmix: float = 1.0
    "alpha of cutmix; 0: none"
    mix_prob: float = 1.0
    "probability of mixing a group"
    switch_prob: float = 0.5
    "fraction of the mixtures that use cutmix, if both are enabled"
    mix_group: int = 128
    """number of consecutive images with the same random numbers for mixup or cutmix; even, a divisor of the
    micro-batch"""
    smoothing: float = 0.1
    "label smoothing"
    drop_path: float = 0.1
    "drop path rate of the last block, which increases linearly over the blocks from 0"
    layer_decay: float = 0.65
    "factor of the learning rate from each block to the previous one"
    batch_size: int = 1024
    "images per optimizer step, over all devices and micro-batches"
    base_lr: float = 5e-4
    "learning rate of the head for a batch of 256; the learning rate is base_lr * batch_size / 256"
    min_lr: float = 1e-6
    "learning rate of the head at the end of the run"
    warmup_epochs: float = 5.0
    "epochs in which the learning rate rises linearly"
    weight_decay: float = 0.05
    "weight decay, on matrices only (not on positions and tokens)"
    betas: tuple[float, float] = (0.9, 0.999)
    "betas of AdamW"
    clip: float | None = None
    "maximum norm of the gradient; default: no clipping"

    @property
    def peak_lr(self) -> float:
        """The learning rate after the warm-up."""
        return self.base_lr * self.batch_size / 256

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def total_steps(self, images: int) -> int:
        """Number of optimizer steps on this number of training images."""
        return self.steps or max(1, round((self.epochs or 0) * (images // self.batch_size)))

    def rules(self) -> Rules:
        lo, hi = self.crop_scale
        # An upper bound of the epochs: a step covers at most one. The exact check needs the number of images.
        max_epochs = self.epochs or self.steps or math.inf
        return [
            ((self.epochs is None) != (self.steps is None), "give one of epochs and steps"),
            *self.each("must be above 0", "epochs", "steps", "batch_size", "base_lr", "clip"),
            *self.each("must be 0 or more", "min_lr", "warmup_epochs", "weight_decay"),
            *self.each("must lie in 0 to below 1", "drop_path", "smoothing", "betas"),
            *self.each("must be above 0 and at most 1", "layer_decay"),
            *self.each("is a fraction, from 0 to 1", "erasing", "mix_prob", "switch_prob"),
            *self.each("must be 0 or more and below 2**63", "seed"),
            (0 < lo <= hi <= 1, f"crop_scale must satisfy 0 < low <= high <= 1, not {lo} {hi}"),
            (
                self.mixup >= 0 and self.cutmix >= 0,
                f"mixup and cutmix must be 0 or more, not {self.mixup} and {self.cutmix}",
            ),
            (
                not self.mixes or (self.mix_group > 0 and self.mix_group % 2 == 0),
                f"mix_group must be even and above 0, not {self.mix_group}",
            ),
            (
                max_epochs <= 0 or self.warmup_epochs < max_epochs,
                f"warmup_epochs {self.warmup_epochs:g} is not below the length of the run, "
                + (f"{self.epochs:.2f} epochs" if self.epochs else f"{self.steps} steps"),
            ),
            (
                _is_randaugment(self.randaugment),
                f"randaugment must be written like rand-m9-mstd0.5-inc1, not {self.randaugment!r}",
            ),
        ]


def load_finetune(name: str) -> FineTuneRecipe:
    """Load a shipped recipe by its name, or a TOML file by its path. Raises ConfigError."""
    return load_settings(
        name,
        shipped_recipes("finetune"),
        lambda text, source: check(parse_settings(FineTuneRecipe, text, source)),
    )


def _is_randaugment(text: str) -> bool:
    if text in ("", FineTuneRecipe.randaugment):
        return True
    from timm.data.auto_augment import rand_augment_transform  # imports torch

    try:
        return rand_augment_transform(text) is not None
    except (AssertionError, ValueError, KeyError):
        return False
