"""What a run learns: all that changes its result. What only one method has stands beside its code in `methods`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, TypeVar

from ..errors import ConfigError
from .toml import flat, replaced, sections
from .units import parse_time, readable

Rules = list[tuple[bool, str]]
"What must hold of values, each with what is said where it does not."


@dataclass(frozen=True, kw_only=True)
class Section:
    """Settings that belong together."""

    replaces: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    "Settings that go back to their default when another one is given another value, and are not given themselves."

    def rules(self) -> Rules:
        """What must hold of these values alone."""
        return []


S = TypeVar("S", bound=Section)


@dataclass(frozen=True, kw_only=True)
class Images(Section):
    """What a training sample is."""

    size: int = 224
    "side of the training crop in pixels (its width, if `height` is given); a multiple of the patch"
    height: int | None = None
    "height of a crop that is not square"
    channels: int = 3
    "bands of an image; other than 1 and 3 needs multi-band TIFF and the [tiff] extra"
    normalize: Literal["imagenet", "data"] = "imagenet"
    "statistics that standardise the pixels: ImageNet's, or the data's own (measured and recorded)"
    crop_scale: tuple[float, float] = (0.2, 1.0)
    "share of the image's area that a random crop covers (lowest, highest); 1 1 takes the whole image"
    flip: bool = True
    "flip left and right at random"

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
    "a named size (see `rcmae list`) or timm:NAME of any plain timm Vision Transformer"
    patch: int | None = None
    "patch side in pixels; default: the named size's own"
    width: int | None = None
    "encoder width; default: the named size's own"
    depth: int | None = None
    "encoder blocks; default: the named size's own"
    heads: int | None = None
    "encoder attention heads; default: the named size's own"
    registers: int = 0
    "register tokens beside the class token"

    def rules(self) -> Rules:
        sizes = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("model", "registers")}
        return [
            (self.registers >= 0, f"registers must be 0 or more, not {self.registers}"),
            *((v is None or v > 0, f"{k} must be above 0, not {v}") for k, v in sizes.items()),
        ]


@dataclass(frozen=True, kw_only=True)
class Optim(Section):
    """AdamW with warm-up and cosine."""

    batch_size: int = 256
    "images an optimizer step, over all devices and micro-batches"
    base_lr: float = 1.5e-4
    "learning rate for a batch of 256; the linear rule gives base_lr * batch_size / 256"
    min_lr: float = 0.0
    "learning rate at the end of the cosine"
    warmup: float = 0.05
    "share of the run in which the learning rate rises linearly"
    weight_decay: float = 0.05
    "decoupled weight decay, on matrices only"
    weight_decay_end: float | None = None
    "where a cosine takes it by the end of the run; default: it stays"
    betas: tuple[float, float] = (0.9, 0.95)
    "AdamW's decay rates"
    clip: float | None = None
    "largest norm of the gradient; default: no clipping"

    def rules(self) -> Rules:
        end = self.weight_decay_end
        return [
            (self.batch_size > 0, f"batch_size must be above 0, not {self.batch_size}"),
            (self.base_lr > 0 and math.isfinite(self.base_lr), f"base_lr must be above 0, not {self.base_lr}"),
            (self.min_lr >= 0, f"min_lr must be 0 or more, not {self.min_lr}"),
            (0 <= self.warmup < 1, f"warmup is a share of the run, from 0 to below 1, not {self.warmup}"),
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
    """What is measured on the way, on a small labelled subset when the data has labels."""

    probes: int = 6
    "times that student and teacher are probed during the run; 0: never"
    probe_train: int = 2000
    "labelled images that the probes are fitted on"
    probe_test: int = 1000
    "labelled images that they are scored on"
    attentive: bool = False
    "also fit a probe that chooses what to look at among all tokens"

    def rules(self) -> Rules:
        return [
            (self.probes >= 0, f"probes must be 0 or more, not {self.probes}"),
            (self.probe_train > 0, f"probe_train must be above 0, not {self.probe_train}"),
            (self.probe_test > 0, f"probe_test must be above 0, not {self.probe_test}"),
        ]


@dataclass(frozen=True, kw_only=True)
class Recipe(Section):
    """All that changes the result of a pre-training run: what every method has. Each adds its own sections, beside its code."""

    replaces: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "epochs": ("steps", "time"), "steps": ("epochs", "time"), "time": ("epochs", "steps"),
    }  # fmt: skip
    "a length replaces a length, in whatever unit"
    method: str = ""
    "what is learned: see `rcmae list`"
    data: str = "embedded:digits"
    "the images: a folder, or another source that `rcmae list` shows"
    seed: int = 0
    "every crop, mask and initial weight is a function of it"
    epochs: float | None = None
    "length of the run in passes over the data"
    steps: int | None = None
    "length of the run in optimizer steps"
    time: str | None = None
    "length of the run as time (90s, 10m, 8h): the steps that fit are measured first, then fixed"
    images: Images = Images()
    network: Network = Network()
    optim: Optim = Optim()
    probe: Probe = Probe()

    def total_steps(self, images: int) -> int | None:
        """Optimizer steps on a set of so many images; None where `time` decides.

        Without any length: some 400 passes over a small set, but no run is shorter than 4 or longer than 40 million samples,
        the budget of one GPU from an hour to a day.
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
            (self.method == type(self).method, f"method is {type(self).method} in a {type(self).__name__}, not {self.method}"),
            (len(lengths) <= 1, f"give one of epochs, steps and time, not {' and '.join(lengths)}"),
            (self.epochs is None or self.epochs > 0, f"epochs must be above 0, not {self.epochs}"),
            (self.steps is None or self.steps > 0, f"steps must be above 0, not {self.steps}"),
            readable(parse_time, self.time),
            (0 <= self.seed < 2**63, f"seed must be 0 or more and below 2**63, not {self.seed}"),
        ]


def check(settings: S) -> S:
    """Refuse impossible values, all problems in one message, before any data is touched. Returns the settings."""
    rules = [rule for part in (settings, *(getattr(settings, name) for name in sections(type(settings)))) for rule in part.rules()]
    values = [(k, x) for k, v in flat(settings).items() for x in (v if isinstance(v, (list, tuple)) else [v]) if isinstance(x, float)]
    rules += [(math.isfinite(v), f"{k} must be a finite number, not {v}") for k, v in values]
    if problems := [message for fine, message in rules if not fine]:
        raise ConfigError("; ".join(problems))
    return settings


def with_settings(recipe: S, settings: Sequence[str], source: str) -> S:
    """The recipe with settings of any section replaced, each given as "key=value". Raises ConfigError that names `source`."""
    return check(replaced(recipe, settings, source))
