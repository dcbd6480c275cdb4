"""What changes a detector, and what changes only how it is made. Without torch, so that --help is quick."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np

from ...config import load_settings, parse_settings, shipped_recipes
from ...errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Detect:
    """All that changes the result of training a detector on a backbone and given images."""

    preset: Literal["vitdet", "benchmarking"] = "vitdet"
    "vitdet: pyramid from the last map, LayerNorm (Li et al. 2022); benchmarking: maps of four depths, FPN, BatchNorm (Li et al. 2021)"
    seed: int = 0
    "every crop, proposal, dropped path and new weight is a function of it"
    epochs: float | None = None
    "length of the run in passes over the training images"
    steps: int | None = None
    "length of the run in optimizer steps"
    size: int = 1024
    "height and width of the square that images are cut or padded to, in pixels"
    jitter: tuple[float, float] = (0.1, 2.0)
    "large-scale jitter: an image is resized to this share of the square (lowest, highest) before it is cut"
    flip: bool = True
    "flip left and right at random"
    max_instances: int = 100
    "objects of a view that are marked; of more, a random choice, the others pass for background: each costs a mask of the whole square"
    window: int = 14
    "side of the attention windows in tokens; 0: every block attends everywhere"
    rel_pos: bool = True
    "learn relative positions in attention (they start at zero)"
    scales: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5)
    "maps of the pyramid, as multiples of the patch grid; one more is pooled for the proposals"
    width: int = 256
    "channels of the pyramid and the heads"
    box_width: int = 1024
    "of the box head's linear layer"
    box_convs: int = 4
    "3 x 3 convolutions of the box head"
    mask_convs: int = 4
    "3 x 3 convolutions of the mask head"
    proposals: int = 1000
    "proposals an image that the heads see, in training and after"
    drop_path: float = 0.1
    "share of the last block's paths that are dropped; it grows linearly over the blocks, from 0"
    layer_decay: float = 0.7
    "factor of the backbone's learning rate from a block to the one before it; 1 for none"
    batch_size: int = 64
    "images an optimizer step, over all devices and micro-batches"
    lr: float = 1e-4
    "learning rate after the warm-up, of pyramid and heads"
    schedule: Literal["steps", "cosine"] = "steps"
    "steps: a tenth of it from 8/9, a hundredth from 26/27 of the run; cosine: to 0"
    warmup_steps: int = 250
    "steps in which the learning rate rises linearly"
    weight_decay: float = 0.1
    "decoupled weight decay, on matrices only (not on positions and tokens)"
    betas: tuple[float, float] = (0.9, 0.999)
    "AdamW's decay rates"
    clip: float | None = None
    "largest norm of the gradient; default: no clipping"

    def total_steps(self, images: int) -> int:
        """Optimizer steps on so many training images."""
        return self.steps or max(1, round((self.epochs or 0) * (images // self.batch_size)))


def load_detect(name: str) -> Detect:
    """Settings by the name of a shipped recipe or by the path of a TOML file. Raises ConfigError in one line."""
    return load_settings(name, shipped_recipes("detection"), lambda text, source: check_detect(parse_settings(Detect, text, source)))


def check_detect(s: Detect) -> Detect:
    """Refuse impossible values, all problems in one message. Returns the settings."""
    lo, hi = s.jitter
    above = ("size", "max_instances", "width", "box_width", "proposals", "batch_size", "lr")
    whole = ("window", "box_convs", "mask_convs", "warmup_steps", "weight_decay")
    rules = [
        ((s.epochs is None) != (s.steps is None), "give one of epochs and steps"),
        (s.epochs is None or s.epochs > 0, f"epochs must be above 0, not {s.epochs}"),
        (s.steps is None or s.steps > 0, f"steps must be above 0, not {s.steps}"),
        (0 <= s.seed < 2**63, f"seed must be 0 or more and below 2**63, not {s.seed}"),
        (0 < lo <= hi <= 16, f"jitter must satisfy 0 < low <= high <= 16, not {lo} {hi}"),
        (bool(s.scales) and all(x in (4, 2, 1, 0.5) for x in s.scales), f"scales are some of 4, 2, 1 and 0.5, not {s.scales}"),
        (sorted(set(s.scales), reverse=True) == list(s.scales), f"scales go from fine to coarse, each once, unlike {s.scales}"),
        (0 <= s.drop_path < 1, f"drop_path must lie in 0 to below 1, not {s.drop_path}"),
        (0 < s.layer_decay <= 1, f"layer_decay must be above 0 and at most 1, not {s.layer_decay}"),
        (
            not s.steps or s.steps < 0 or s.warmup_steps < s.steps,
            f"warmup_steps {s.warmup_steps} is not below the run's {s.steps} steps; give --settings warmup_steps=N",
        ),
        (all(0 <= b < 1 for b in s.betas), f"betas must lie in 0 to below 1, not {s.betas}"),
        (s.clip is None or s.clip > 0, f"clip must be above 0, not {s.clip}"),
    ]
    rules += [(getattr(s, k) > 0, f"{k} must be above 0, not {getattr(s, k)}") for k in above]
    rules += [(getattr(s, k) >= 0, f"{k} must be 0 or more, not {getattr(s, k)}") for k in whole]
    values = [(f.name, x) for f in fields(s) for x in np.ravel(getattr(s, f.name)) if isinstance(x, float)]
    rules += [(math.isfinite(v), f"{k} must be a finite number, not {v}") for k, v in values]
    if problems := [message for fine, message in rules if not fine]:
        raise ConfigError("; ".join(problems))
    return s


@dataclass(frozen=True, kw_only=True)
class Detection:
    """What `rcmae detect train` is told beside the machine."""

    data: str = "embedded:scenes"
    "a folder with annotations/*.json and images, a JSON file, or a source with objects (`rcmae list`)"
    val: str | None = None
    "the folder or JSON file to score on, where data does not hold it"
    which: Literal["teacher", "student"] = "teacher"
    "network of a run or an official checkpoint"
    images: int | None = None
    "train on so many images only; fewer are among more, the same for every backbone"
    heads: int | None = None
    "attention heads, for weights that come without a configuration"
    recipe: str | None = None
    "a detection recipe (`rcmae list`) or TOML file; default: what suits the data, else vitdet-base (a width of 1,024 or more: -large)"
    settings: tuple[str, ...] = ()
    "settings of the recipe that are replaced: --settings epochs=25 size=512"


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What `rcmae detect eval` is told."""

    data: str | None = None
    "as `rcmae detect train` takes it; its test part is scored; default: what the detector was trained on"
    results: Path | None = None
    "score this file of COCO results instead of running the detector"
    areas: Literal["auto", "coco", "relative"] = "auto"
    "bounds between small, medium and large objects: COCO's, or scaled by the area of the images; auto: scaled below 320 x 240 px"
    batch: int = 8
    "images at a time"
    device: str = "auto"
    "auto, cpu, cuda, cuda:1 or mps"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    "of the matrix products"
    workers: int | None = None
    "loader processes; default: by the data and the cores"
    out: Path | None = None
    "where results go; default: CHECKPOINT/eval"


def check_detection(d: Detection) -> None:
    """Refuse impossible values. Raises ConfigError."""
    above = {"images": d.images, "heads": d.heads}
    if problems := [f"{name} must be 1 or more, not {value}" for name, value in above.items() if value is not None and value < 1]:
        raise ConfigError("; ".join(problems))


def check_scoring(s: Scoring) -> None:
    """Refuse impossible values. Raises ConfigError."""
    rules = [
        (s.batch >= 1, f"batch must be 1 or more, not {s.batch}"),
        (s.workers is None or s.workers >= 0, f"workers must be 0 or more, not {s.workers}"),
    ]
    if problems := [message for fine, message in rules if not fine]:
        raise ConfigError("; ".join(problems))
