"""Settings that change the result of a run. Those of a single method are next to its code in `methods`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar

from ..errors import refuse
from .toml import flat, sections
from .units import parse_time, readable

Rules = list[tuple[bool, str]]
"Conditions on settings, each with the error message if it does not hold."

LENGTHS = ("epochs", "steps", "time")
"Settings that give the length of a run, each in its unit."

BOUNDS: dict[str, Callable[[Any], bool]] = {
    "must be above 0": lambda v: v > 0,
    "must be 0 or more": lambda v: v >= 0,
    "must be 1 or more": lambda v: v >= 1,
    "must be 2 or more": lambda v: v >= 2,
    "must be 0 or more and below 2**63": lambda v: 0 <= v < 2**63,
    "must be above 0 and at most 1": lambda v: 0 < v <= 1,
    "must lie between 0 and 1": lambda v: 0 < v < 1,
    "must lie in 0 to 1": lambda v: 0 <= v <= 1,
    "must lie in 0 to below 1": lambda v: 0 <= v < 1,
    "is a fraction, from 0 to 1": lambda v: 0 <= v <= 1,
}


@dataclass(frozen=True, kw_only=True)
class Section:
    """A group of settings."""

    resets: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Setting -> settings that return to their defaults when it is changed, unless they are also set."""

    def rules(self) -> Rules:
        """Conditions on the values of this section."""
        return []

    def each(self, bound: str, *names: str) -> Rules:
        """A rule for each of these settings that its value, or all values of a tuple, keep a bound, which is
        a key of BOUNDS. None always does."""
        rules = []
        for name in names:
            value = getattr(self, name)
            parts = value if isinstance(value, tuple) else () if value is None else (value,)
            rules.append((all(map(BOUNDS[bound], parts)), f"{name} {bound}, not {value}"))
        return rules


def broken(rules: Rules) -> list[str]:
    """The messages of the rules that do not hold."""
    return [message for holds, message in rules if not holds]


S = TypeVar("S", bound=Section)

FEWEST_SAMPLES = 400_000
"Samples of the shortest default run, whatever the number of images: docs/recipes.md#how-long."


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
    range: Literal["data", "dtype"] = "data"
    """what is white in 16-bit images: the largest value of the bits that the data use (8, 10, 12, 14 or 16),
    or 65,535"""
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
            *self.each("must be above 0", "size", "channels", "height"),
            (0 < low <= high <= 1, f"crop_scale must satisfy 0 < low <= high <= 1, not {low} {high}"),
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
    init: str | None = None
    """weights to start from: a run, an exported or imported folder, a file of weights, or timm:NAME. The
    network takes their shape; positions, patches and statistics are adapted"""

    def rules(self) -> Rules:
        sizes = [f.name for f in fields(self) if f.name not in ("model", "registers", "init")]
        return [*self.each("must be 0 or more", "registers"), *self.each("must be above 0", *sizes)]


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
            *self.each("must be above 0", "batch_size", "base_lr", "clip"),
            *self.each("must be 0 or more", "min_lr", "weight_decay"),
            *self.each("must lie in 0 to below 1", "betas"),
            (0 <= self.warmup < 1, f"warmup is a fraction of the run, from 0 to below 1, not {self.warmup}"),
            (
                end is None or (end >= 0 and self.weight_decay > 0),
                f"weight_decay_end must be 0 or more, and needs a weight_decay above 0; not {end}",
            ),
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
        sizes = self.each("must be above 0", "probe_train", "probe_test")
        return [*self.each("must be 0 or more", "probes"), *sizes]


@dataclass(frozen=True, kw_only=True)
class Recipe(Section):
    """All settings that change the result of a pre-training run and that every method has. Methods add
    sections."""

    resets: ClassVar[Mapping[str, tuple[str, ...]]] = {
        name: tuple(other for other in LENGTHS if other != name) for name in LENGTHS
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

    @property
    def length(self) -> dict[str, Any]:
        """The settings of the length, of which at most one is not None."""
        return {name: getattr(self, name) for name in LENGTHS}

    def total_steps(self, images: int) -> int | None:
        """Optimizer steps for a set of `images`; None if the length is given as `time`.

        Without any length, 400 epochs, but at least 400,000 and at most 40 million samples.
        """
        if self.time:
            return None
        if self.steps:
            return self.steps
        if self.epochs:
            return max(1, round(self.epochs * (images // self.optim.batch_size)))
        return max(1, min(max(400 * images, FEWEST_SAMPLES), 40_000_000) // self.optim.batch_size)

    def most_steps(self, images: int) -> int:
        """Optimizer steps beyond which no run on so many images is known to have gained: 1,600 epochs (MAE's
        longest), or `FEWEST_SAMPLES`."""
        return max(1600 * images, FEWEST_SAMPLES) // self.optim.batch_size

    def rules(self) -> Rules:
        lengths = [name for name, value in self.length.items() if value is not None]
        return [
            (
                self.method == type(self).method,
                f"method must be {type(self).method} in a {type(self).__name__}, not {self.method}",
            ),
            (len(lengths) <= 1, f"give one of epochs, steps and time, not {' and '.join(lengths)}"),
            *self.each("must be above 0", "epochs", "steps"),
            readable(parse_time, self.time),
            *self.each("must be 0 or more and below 2**63", "seed"),
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
    refuse(broken(rules))
    return settings
