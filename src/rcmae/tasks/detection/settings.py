"""Recipes and options of object detection. This module does not import torch, so that --help is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...config import Rules, Section, check, load_settings, parse_settings, shipped_recipes
from ..evaluation.base import ReadingOptions, WeightsOptions


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe(Section):
    """All settings that affect the result of training a detector on a given backbone and images."""

    preset: Literal["vitdet", "benchmarking"] = "vitdet"
    """vitdet: pyramid from the last feature map, LayerNorm (Li et al. 2022); benchmarking: feature maps of
    four depths, FPN, BatchNorm (Li et al. 2021)"""
    seed: int = 0
    "seed of all random choices: crops, proposals, dropped paths and initial weights"
    epochs: float | None = None
    "length of the run in epochs"
    steps: int | None = None
    "length of the run in optimizer steps"
    size: int = 1024
    "height and width of the square that images are cropped or padded to, in pixels"
    jitter: tuple[float, float] = (0.1, 2.0)
    """large-scale jitter: an image is resized to this multiple of the square (lowest, highest) before it
    is cropped"""
    flip: bool = True
    "flip horizontally at random"
    max_instances: int = 100
    """maximum number of annotated objects in a view; of more, a random subset is used and the others count
    as background (each object needs a mask of the size of the view)"""
    window: int = 14
    "side of the attention windows in tokens; 0: global attention in all blocks"
    rel_pos: bool = True
    "learn relative position embeddings in attention (initialized to zero)"
    scales: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5)
    "levels of the pyramid, as multiples of the patch grid; one more is pooled for the proposals"
    width: int = 256
    "channels of the pyramid and the heads"
    box_width: int = 1024
    "width of the box head's linear layer"
    box_convs: int = 4
    "3 x 3 convolutions of the box head"
    mask_convs: int = 4
    "3 x 3 convolutions of the mask head"
    proposals: int = 1000
    "proposals per image that are passed to the heads, in training and in evaluation"
    drop_path: float = 0.1
    "drop path rate of the last block, which increases linearly over the blocks from 0"
    layer_decay: float = 0.7
    "factor of the backbone's learning rate from each block to the previous one; 1: none"
    batch_size: int = 64
    "images per optimizer step, over all devices and micro-batches"
    lr: float = 1e-4
    "learning rate of pyramid and heads after the warm-up"
    schedule: Literal["steps", "cosine"] = "steps"
    "steps: a tenth of lr from 8/9 of the run on, a hundredth from 26/27 on; cosine: to 0"
    warmup_steps: int = 250
    "steps of linear warm-up"
    weight_decay: float = 0.1
    "weight decay, on matrices only (not on positions and tokens)"
    betas: tuple[float, float] = (0.9, 0.999)
    "betas of AdamW"
    clip: float | None = None
    "maximum norm of the gradient; default: no clipping"

    def total_steps(self, train_images: int) -> int:
        """Number of optimizer steps on this number of training images."""
        return self.steps or max(1, round((self.epochs or 0) * (train_images // self.batch_size)))

    def rules(self) -> Rules:
        lo, hi = self.jitter
        positive = ("size", "max_instances", "width", "box_width", "proposals", "batch_size", "lr")
        not_negative = ("window", "box_convs", "mask_convs", "warmup_steps", "weight_decay")
        return [
            ((self.epochs is None) != (self.steps is None), "give one of epochs and steps"),
            (self.epochs is None or self.epochs > 0, f"epochs must be above 0, not {self.epochs}"),
            (self.steps is None or self.steps > 0, f"steps must be above 0, not {self.steps}"),
            (0 <= self.seed < 2**63, f"seed must be 0 or more and below 2**63, not {self.seed}"),
            (0 < lo <= hi <= 16, f"jitter must satisfy 0 < low <= high <= 16, not {lo} {hi}"),
            (
                bool(self.scales) and all(x in (4, 2, 1, 0.5) for x in self.scales),
                f"scales are some of 4, 2, 1 and 0.5, not {self.scales}",
            ),
            (
                sorted(set(self.scales), reverse=True) == list(self.scales),
                f"scales go from fine to coarse, each once, unlike {self.scales}",
            ),
            (0 <= self.drop_path < 1, f"drop_path must lie in 0 to below 1, not {self.drop_path}"),
            (0 < self.layer_decay <= 1, f"layer_decay must be above 0 and at most 1, not {self.layer_decay}"),
            (
                not self.steps or self.steps < 0 or self.warmup_steps < self.steps,
                f"warmup_steps {self.warmup_steps} is not below the run's {self.steps} steps; give "
                "--settings warmup_steps=N",
            ),
            (all(0 <= b < 1 for b in self.betas), f"betas must lie in 0 to below 1, not {self.betas}"),
            (self.clip is None or self.clip > 0, f"clip must be above 0, not {self.clip}"),
            *((getattr(self, k) > 0, f"{k} must be above 0, not {getattr(self, k)}") for k in positive),
            *(
                (getattr(self, k) >= 0, f"{k} must be 0 or more, not {getattr(self, k)}")
                for k in not_negative
            ),
        ]


def load_detect(name: str) -> DetectionRecipe:
    """Load a shipped recipe by its name, or a TOML file by its path. Raises ConfigError."""
    return load_settings(
        name,
        shipped_recipes("detection"),
        lambda text, source: check(parse_settings(DetectionRecipe, text, source)),
    )


@dataclass(frozen=True, kw_only=True)
class DetectionOptions(ReadingOptions, WeightsOptions):
    """Options of `rcmae detect train`, in addition to those of the runtime."""

    data: str = "bundled:scenes"
    """a folder in COCO's layout or exported by Roboflow, CVAT, Label Studio or FiftyOne, a JSON file, or a
    source with objects (`rcmae list`)"""
    val: str | None = None
    "the folder or JSON file to score on, if data does not contain it"
    which: Literal["teacher", "student"] = "teacher"
    "which network of a run or an official checkpoint"
    train_images: int | None = None
    "train on this number of images only; larger subsets contain smaller ones, equal for all backbones"
    recipe: str | None = None
    """a detection recipe (`rcmae list`) or TOML file; default: the recipe for the data, else vitdet-base
    (vitdet-large for a width of 1,024 or more)"""
    settings: tuple[str, ...] = ()
    "changes to the recipe: --settings epochs=25 size=512"

    def rules(self) -> Rules:
        return [*self.each("must be 1 or more", "train_images"), *super().rules()]


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(ReadingOptions):
    """Options of `rcmae detect eval`."""

    data: str | None = None
    "data as for `rcmae detect train`, of which the test part is scored; default: that of the training"
    results: Path | None = None
    "evaluate this file of COCO results instead of running the detector"
    areas: Literal["auto", "coco", "relative"] = "auto"
    """bounds between small, medium and large objects: coco; relative: scaled by the area of the images;
    auto: relative for images below 320 x 240 px"""
    batch: int = 8
    "images per batch"
    device: str = "auto"
    "auto, cpu, cuda, cuda:1 or mps"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    "precision of the matrix products"
    workers: int | None = None
    "loader processes; default: chosen by the data and the number of cores"
    out: Path | None = None
    "where to write the results; default: CHECKPOINT/eval"

    def rules(self) -> Rules:
        return [
            *super().rules(),
            (self.batch >= 1, f"batch must be 1 or more, not {self.batch}"),
            (self.workers is None or self.workers >= 0, f"workers must be 0 or more, not {self.workers}"),
        ]
