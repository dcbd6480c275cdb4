"""Settings that change the result of a run. Those of a single method are next to its code in `methods`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, TypeVar

from ..errors import refuse
from .toml import flat, replaced, sections
from .units import parse_time, readable

Rules = list[tuple[bool, str]]
"Conditions on settings, each with the error message if it does not hold."


@dataclass(frozen=True, kw_only=True)
class Section:
    """A group of settings."""

    resets: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Setting -> settings that return to their defaults when it is changed, unless they are also set."""

    def rules(self) -> Rules:
        """Conditions on the values of this section."""
        return []


S = TypeVar("S", bound=Section)


@dataclass(frozen=True, kw_only=True)
class Images(Section):
    """Size, normalization and augmentation of training images."""

    size: int = 224
    "side of the training crop in pixels (width, if height is given); a multiple of the patch size"
    height: int | None = None
    "height of a crop that is not square"
    channels: int = 3
    "channels of an image; other than 1 or 3 needs multi-band TIFF and the [tiff] extra"
    normalize: Literal["imagenet", "data"] = "imagenet"
    "mean and standard deviation for normalization: ImageNet's, or measured on the data"
    crop_scale: tuple[float, float] = (0.2, 1.0)
    "range of the area of a random crop, as a fraction of the image; 1 1: the whole image"
    flip: bool = True
    "random horizontal flips"

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of a crop in pixels."""
        return self.height or self.size, self.size

    def rules(self) -> Rules:
        low, high = self.crop_scale
        return [
            (self.size > 0, f"size must be above 0, not {self.size}"),
            (self.channels > 0, f"channels must be above 0, not {self.channels}"),
            (0 < low <= high <= 1, f"crop_scale must satisfy 0 < low <= high <= 1, not {low} {high}"),
            (self.height is None or self.height > 0, f"height must be above 0, not {self.height}"),
        ]


@dataclass(frozen=True, kw_only=True)
class Network(Section):
    """The encoder, a plain timm Vision Transformer."""

    model: str = "vit_base_patch16"
    "a named model (see `rcmae list`) or timm:NAME of any plain timm Vision Transformer"
    patch: int | None = None
    "patch side in pixels; default: the model's"
    width: int | None = None
    "encoder width; default: the model's"
    depth: int | None = None
    "encoder blocks; default: the model's"
    heads: int | None = None
    "encoder attention heads; default: the model's"
    registers: int = 0
    "register tokens, in addition to the class token"

    def rules(self) -> Rules:
        sizes = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("model", "registers")}
        return [
            (self.registers >= 0, f"registers must be 0 or more, not {self.registers}"),
            *((v is None or v > 0, f"{k} must be above 0, not {v}") for k, v in sizes.items()),
        ]


@dataclass(frozen=True, kw_only=True)
class Optim(Section):
    """AdamW with linear warm-up and cosine decay."""

    batch_size: int = 256
    "images per optimizer step, over all devices and micro-batches"
    base_lr: float = 1.5e-4
    "learning rate for a batch of 256; the learning rate is base_lr * batch_size / 256"
    min_lr: float = 0.0
    "learning rate at the end of the run"
    warmup: float = 0.05
    "fraction of the run with linear warm-up"
    weight_decay: float = 0.05
    "weight decay, on matrices only"
    weight_decay_end: float | None = None
    "weight decay at the end of the run, reached by a cosine schedule; default: constant"
    betas: tuple[float, float] = (0.9, 0.95)
    "betas of AdamW"
    clip: float | None = None
    "largest norm of the gradient; default: no clipping"

    def rules(self) -> Rules:
        end = self.weight_decay_end
        return [
            (self.batch_size > 0, f"batch_size must be above 0, not {self.batch_size}"),
            (
                self.base_lr > 0 and math.isfinite(self.base_lr),
                f"base_lr must be above 0, not {self.base_lr}",
            ),
            (self.min_lr >= 0, f"min_lr must be 0 or more, not {self.min_lr}"),
            (0 <= self.warmup < 1, f"warmup is a fraction of the run, from 0 to below 1, not {self.warmup}"),
            (self.weight_decay >= 0, f"weight_decay must be 0 or more, not {self.weight_decay}"),
            (
                end is None or (end >= 0 and self.weight_decay > 0),
                f"weight_decay_end must be 0 or more, and needs a weight_decay above 0; not {end}",
            ),
            (all(0 <= b < 1 for b in self.betas), f"betas must lie in 0 to below 1, not {self.betas}"),
            (self.clip is None or self.clip > 0, f"clip must be above 0, not {self.clip}"),
        ]


@dataclass(frozen=True, kw_only=True)
class Probe(Section):
    """Accuracy of probes during training, on a small labeled subset, if the data has labels."""

    probes: int = 6
    "number of times that student and teacher are probed during the run; 0: never"
    probe_train: int = 2000
    "labeled images to fit the probes on"
    probe_test: int = 1000
    "labeled images to test the probes on"
    attentive: Literal["last", "every", "never"] = "last"
    """when to also fit an attentive probe, which pools all tokens by attention: for the baseline and the last
    probe, for every probe, or never"""

    def rules(self) -> Rules:
        return [
            (self.probes >= 0, f"probes must be 0 or more, not {self.probes}"),
            (self.probe_train > 0, f"probe_train must be above 0, not {self.probe_train}"),
            (self.probe_test > 0, f"probe_test must be above 0, not {self.probe_test}"),
        ]


@dataclass(frozen=True, kw_only=True)
class Recipe(Section):
    """All settings that change the result of a pre-training run and that every method has. Methods add
    sections."""

    resets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "epochs": ("steps", "time"),
        "steps": ("epochs", "time"),
        "time": ("epochs", "steps"),
    }
    "a new length replaces the previous one, in any unit"
    method: str = ""
    "the method: see `rcmae list`"
    data: str = "bundled:digits"
    "the images: a folder, or another source listed by `rcmae list`"
    seed: int = 0
    "seed of all crops, masks and initial weights"
    epochs: float | None = None
    "length of the run in epochs"
    steps: int | None = None
    "length of the run in optimizer steps"
    time: str | None = None
    "length of the run as a duration (90s, 10m, 8h), converted to a number of steps at the start"
    images: Images = Images()
    network: Network = Network()
    optim: Optim = Optim()
    probe: Probe = Probe()

    def total_steps(self, images: int) -> int | None:
        """Optimizer steps for a set of `images`; None if the length is given as `time`.

        Without any length, 400 epochs, but at least 4 and at most 40 million samples: from an hour to a day
        on one GPU.
        """
        if self.time:
            return None
        if self.steps:
            return self.steps
        if self.epochs:
            return max(1, round(self.epochs * (images // self.optim.batch_size)))
        return max(1, min(max(400 * images, 4_000_000), 40_000_000) // self.optim.batch_size)

    def rules(self) -> Rules:
        lengths = [n for n in ("epochs", "steps", "time") if getattr(self, n) is not None]
        return [
            (
                self.method == type(self).method,
                f"method must be {type(self).method} in a {type(self).__name__}, not {self.method}",
            ),
            (len(lengths) <= 1, f"give one of epochs, steps and time, not {' and '.join(lengths)}"),
            (self.epochs is None or self.epochs > 0, f"epochs must be above 0, not {self.epochs}"),
            (self.steps is None or self.steps > 0, f"steps must be above 0, not {self.steps}"),
            readable(parse_time, self.time),
            (0 <= self.seed < 2**63, f"seed must be 0 or more and below 2**63, not {self.seed}"),
        ]


def check(settings: S) -> S:
    """Returns the settings. Raises SettingsError with all invalid values in one message."""
    rules = [
        rule
        for part in (settings, *(getattr(settings, name) for name in sections(type(settings))))
        for rule in part.rules()
    ]
    values = [
        (k, x)
        for k, v in flat(settings).items()
        for x in (v if isinstance(v, (list, tuple)) else [v])
        if isinstance(x, float)
    ]
    rules += [(math.isfinite(v), f"{k} must be a finite number, not {v}") for k, v in values]
    refuse(message for holds, message in rules if not holds)
    return settings


def with_settings(recipe: S, settings: Sequence[str], source: str) -> S:
    """The recipe with settings of any section replaced, each given as "key=value", and checked. Raises
    ConfigError that names `source`."""
    return check(replaced(recipe, settings, source))
