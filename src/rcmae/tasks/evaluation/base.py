"""The base class of evaluation tasks, and the options that all of them share. This package imports torch only
inside the methods that need it, so that --help is quick."""

import contextlib
import json
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from ...config import Recipe, Rules, Section, check
from ...errors import ConfigError, refuse

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Bool
    from torch import nn

    from ..context import EvaluationContext

Which = Literal["teacher", "student", "both"]
Pool = Literal["mean", "cls", "cls+mean"]


@dataclass(frozen=True, kw_only=True)
class WeightsOptions(Section):
    """What weights do not reveal that come without a configuration."""

    heads: int | None = None
    "number of attention heads, for weights that come without a configuration"
    size: int | None = None
    "side of the images (width, if height is given), for such weights"
    height: int | None = None
    "height of images that are not square, for such weights"

    @property
    def shape(self) -> tuple[int, int] | None:
        """Height and width of the images, if given."""
        return None if self.size is None else (self.height or self.size, self.size)

    def rules(self) -> Rules:
        return [
            *super().rules(),
            (self.height is None or self.size is not None, "height needs size, which is then the width"),
            *self.each("must be 1 or more", "heads", "size", "height"),
        ]


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(Section):
    """How images are read."""

    range: Literal["data", "dtype"] = "data"
    """what is white in 16-bit images: the largest value of the bits that the data use (8, 10, 12, 14 or 16),
    or 65,535; as in pre-training"""
    max_pixels: float = 100e6
    "images of more pixels count as unreadable, since decoding one takes 3 bytes per pixel and more"

    def rules(self) -> Rules:
        return [*super().rules(), *self.each("must be above 0", "max_pixels")]


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(ReadingOptions, WeightsOptions):
    """Options of every task."""

    data: str | None = None
    """labeled images: a folder with train/ and val/, a folder of classes, or another source that
    `rcmae list` shows; default: those of the run, or the bundled digits for a backbone from elsewhere"""
    val: str | None = None
    "the images to score on, if data does not contain them"
    which: Which = "teacher"
    "which network of a run or an official checkpoint; both evaluates both"
    labels: float = 100.0
    "percentage of the training labels that are used; the same images for every backbone"
    seed: int = 0
    "seed of the split, the order of the images and the random initialization"
    device: str = "auto"
    "auto, cpu, cuda, cuda:1 or mps"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    "precision of the backbone's matrix products"
    workers: int | None = None
    "loader processes; default: chosen by the data and the number of cores"
    out: Path | None = None
    "where to write the results; default: RUN/evaluate, or runs/evaluate/NAME"
    feature_cache: Path | None = None
    "where to keep features and label splits; default: ~/.cache/rcmae"

    def with_data(self, backbone: str) -> Self:
        """The options with the default for `data`: what the run of the backbone was trained on. Raises
        ConfigError if the run does not say so."""
        if self.data is not None:
            return self
        if run := run_of_backbone(backbone):
            recorded = recorded_settings(run)
            if not recorded.get("data"):
                raise ConfigError(f"{run} does not say which images it was trained on: give --data")
            return replace(self, data=recorded["data"], val=self.val or recorded.get("val"))
        return replace(self, data=Recipe.data)

    def rules(self) -> Rules:
        return [
            *super().rules(),
            (0 < self.labels <= 100, f"labels is a percentage above 0 and up to 100, not {self.labels:g}"),
            *self.each("must be 0 or more and below 2**63", "seed"),
            *self.each("must be 0 or more", "workers"),
        ]


class TaskResult(NamedTuple):
    """Metrics, which test images were classified correctly, the model (pixels in 0 to 1 to logits), and the
    settings, given or selected."""

    metrics: dict[str, float]
    correct: "Bool[np.ndarray, ' m']"
    model: "nn.Module"
    settings: dict[str, Any]
    details: dict[str, Any] | None = None
    correct_by_condition: "dict[str, Bool[np.ndarray, '...']] | None" = None
    "the same for each corruption, attack or shifted set"
    seconds: float | None = None
    "duration, if the work was done earlier or in parts"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One way to evaluate a backbone on a labeled set. A task is a frozen dataclass in its own file and an
    entry in `TASKS`.

    Its fields, with the help strings below them, are the options of `rcmae evaluate NAME`; its docstring is
    the help of that command.
    """

    name: ClassVar[str]
    "name of the command and of the result files"
    takes: ClassVar[str] = (
        "A run directory, an exported folder, a .safetensors, an official .pth, timm:NAME; scratch:ANY OF "
        "THESE is the same network, randomly initialized."
    )
    "what can be evaluated, for --help"
    takes_classifiers: ClassVar[bool] = False
    "whether a classifier is evaluated with its own head"
    all_ranks: ClassVar[bool] = False
    """whether all ranks run it; otherwise they share the extraction of its `required_features`, and rank 0
    runs it"""
    resumes: ClassVar[bool] = False
    """whether its results belong to a run that the same command resumes: one result file, whatever the
    settings; otherwise other settings, images or weights get a file of their own"""

    def validate(self) -> list[str]:
        """One phrase for each invalid setting. By default, numbers must be above 0."""
        values = [(f.name, getattr(self, f.name)) for f in fields(self)]
        numbers = [
            (k, x) for k, v in values for x in (v if isinstance(v, tuple) else [v]) if type(x) in (int, float)
        ]
        return [f"{k} must be above 0, not {x:g}" for k, x in numbers if not x > 0]

    def check_settings(self, backbone: str, options: EvaluationOptions) -> None:
        """Raise ConfigError, before anything is loaded, for settings that are invalid for any images."""
        refuse(self.validate())
        check(options)

    def check(self, context: "EvaluationContext") -> None:
        """Raise ConfigError or DataError, before any work, if the task cannot run for this backbone on these
        images."""

    def required_features(self, context: "EvaluationContext") -> Literal["pooled", "tokens"] | None:
        """The features that `run` needs first; None if it reads the images itself."""
        return "pooled"

    def last_blocks(self, context: "EvaluationContext") -> int:
        """Of how many of the last blocks the required features hold the class token."""
        return 1

    def run(self, context: "EvaluationContext") -> TaskResult:
        """Fit on the training part, score on the test part. Raises the errors of `rcmae.errors`."""
        raise NotImplementedError

    def variant(self) -> str:
        """Suffix of the file names for text settings other than the default: "-mae", "-cls", "-latent"."""
        if self.resumes:
            return ""
        values = [(getattr(self, f.name), getattr(type(self)(), f.name)) for f in fields(self)]
        return "".join(f"-{v}" for v, default in values if isinstance(v, str) and v != default)


@dataclass(frozen=True, kw_only=True)
class PooledTask(Task):
    """A task on one feature of an image."""

    pool: Pool | None = None
    """the feature of an image: the mean over the patches, the class token, or both one after the other;
    default: that of the paper of the method that trained the backbone, mean if it is not known"""
    blocks: int | None = None
    """concatenate the class tokens of the last so many blocks; default: as the paper for linear, else 1"""

    def validate(self) -> list[str]:
        useless = (self.blocks or 1) > 1 and self.pool == "mean"
        return [*super().validate(), *(["blocks needs pool cls or cls+mean"] if useless else [])]

    def check(self, context: "EvaluationContext") -> None:
        vit = getattr(context.backbone, "vit", None)
        if self.blocks and self.blocks > 1 and not (vit and vit.has_class_token):
            raise ConfigError(f"--blocks {self.blocks}: {context.name} has no class token")
        if self.blocks and vit and self.blocks > len(vit.blocks):
            raise ConfigError(f"--blocks {self.blocks}: {context.name} has only {len(vit.blocks)}")

    def default_feature(self, context: "EvaluationContext") -> tuple[Pool, int]:
        """Pool and blocks, if neither is given."""
        return context.method.pool, 1

    def feature(self, context: "EvaluationContext") -> tuple[Pool, int]:
        """Pool and blocks; a given pool resets blocks to 1, and given blocks the pool to the class token."""
        pool, blocks = self.default_feature(context)
        if self.pool or self.blocks:
            blocks = self.blocks or 1
            pool = self.pool or ("cls" if blocks > 1 else pool)
        vit = getattr(context.backbone, "vit", None)
        return pool, min(blocks, len(vit.blocks)) if vit else 1

    def last_blocks(self, context: "EvaluationContext") -> int:
        return self.feature(context)[1]


def run_of_backbone(name: str) -> Path | None:
    """The run directory that a backbone comes from: itself, or that of an exported folder RUN/export/NAME;
    None for others."""
    path = Path(name.removeprefix("scratch:"))
    folders = (path, *path.parents[:2]) if path.exists() else ()
    return next((folder for folder in folders if (folder / "recipe.toml").is_file()), None)


def recorded_settings(run: Path) -> dict[str, Any]:
    """The recipe of a run, and for a run on a backbone what it was trained on; what is damaged is left
    out."""
    recorded: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, KeyError):
        recorded = json.loads((run / "machine.json").read_text(encoding="utf-8"))["about"]
    with contextlib.suppress(OSError, ValueError):
        recorded |= tomllib.loads((run / "recipe.toml").read_text(encoding="utf-8"))
    return recorded
