"""The interface of a method to the trainer, the evaluation and the diagnostics."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from ..config import Recipe
from ..engine.schedules import Progress
from ..models.backbone import Backbone, Channels, Standardizing, Statistics
from ..models.encoder import WithEncoder
from ..models.patches import patchify
from ..models.teacher import Teacher
from .diagnostics import Diagnostics

Transform = Callable[[Any, np.random.Generator], dict[str, Any]]
"""An image and a generator to the named tensors of a sample. Picklable, for loader workers. Methods that only
cut out crops take a `Stored` image too."""

RECORDED_VALUES = 2**17
"""Predicted values of a step that the diagnostics use: those of the first images, at least 8. The memory for
them does not grow with the batch; at 224 px and batch 64, the diagnostics that read them take 2.4 % of a
ViT-Ti's time on a CPU."""


class Comparison(NamedTuple):
    """The reconstructions of student and teacher, and their target, on the hidden patches."""

    prediction: Float[Tensor, "b m p"]
    target: Float[Tensor, "b m p"]
    teacher_prediction: Float[Tensor, "b m p"]
    weight: Float[Tensor, "b m"] | None = None
    "1 on patches with a consistency loss, 0 on patches visible to the teacher; None: all 1"
    gamma: float = 1.0
    "weight of the consistency |prediction - teacher_prediction|^2 in the loss"

    def mean_square(self, difference: Float[Tensor, "b m p"]) -> Tensor:
        """Weighted mean square: first over the patches of each image, then over the images, so that it does
        not depend on the split into micro-batches."""
        if self.weight is None:
            return difference.square().mean()
        errors = difference.square().mean(2)  # [b, m]
        return ((errors * self.weight).sum(1) / self.weight.sum(1).clamp_min(1)).mean()


class Method(Diagnostics, Standardizing):
    """A method of self-supervised pre-training, one per file. Every method defines `recipe_type`, `recipe`,
    `student` and `patch`, and the first three functions. Recipes and batches are `Any` here, since each
    method narrows them to its own recipe class and to the TypedDict of its batch."""

    recipe_type: type[Recipe]
    "class of the method's recipes"
    recipe: Recipe
    student: nn.Module
    "holds every trained parameter"
    teacher: Teacher[Any] | None
    "follows the student and makes its targets; None for a method without a teacher"
    patch: int
    "side of a patch in pixels"
    statistics: Statistics
    "mean and standard deviation per channel that standardize the pixels, in units of 0 to 1"
    networks: tuple[str, ...] = ("student",)
    "networks that are probed and exported, the recommended one last"
    pool: Literal["mean", "cls"] = "mean"
    """the feature of an image, by default of k-NN and of the exports in timm: the mean over the patches, or
    the class token"""
    recorded: list[Comparison] | None = None
    "a list into which `forward` writes its comparison, set by the diagnostics"

    def __init__(self, recipe: Any, mean: Channels, std: Channels) -> None:
        """`mean` and `std` standardize the pixels: a value per channel, in units of 0 to 1."""
        super().__init__(mean, std, white=255.0)
        self.recipe, self.teacher, self.statistics = recipe, None, (mean, std)

    # --- what every method implements -----------------------------------------------------------------------

    def views(self) -> Transform:
        """The transform of one image to named tensors (crops, order of the patches)."""
        raise NotImplementedError

    def forward(self, batch: Any, t: Progress) -> dict[str, Tensor]:
        """Scalars on the device: "loss" is minimized, the others are logged."""
        raise NotImplementedError

    def backbone(self, which: Literal["student", "teacher"] = "teacher") -> Backbone:
        """The network for evaluation; the student's for a method without a teacher."""
        raise NotImplementedError

    # --- what a method may override -------------------------------------------------------------------------

    @classmethod
    def linear_feature(cls, width: int) -> tuple[Literal["mean", "cls", "cls+mean"], int]:
        """The feature that the method's paper probes linearly, and of how many of the last blocks it takes
        the class token."""
        return cls.pool, 1

    @classmethod
    def validate(cls, recipe: Any) -> list[str]:
        """Problems of a recipe with this method, one message each; called before any data is read."""
        return []

    @classmethod
    def micro_batch_statistics(cls, recipe: Any) -> str:
        """What the loss of an image takes from the others of its micro-batch; empty if nothing."""
        return ""

    @classmethod
    def accumulation_caveat(cls, recipe: Any) -> str:
        """Why accumulating micro-batches differs from one large batch; empty if it does not."""
        return cls.micro_batch_statistics(recipe)

    @property
    def ema_source(self) -> WithEncoder:
        """The part of the student that the teacher averages and that evaluation loads."""
        return cast(WithEncoder, self.student)

    @property
    def shorter_memory(self) -> str:
        """The setting that gives the teacher a shorter memory, for messages."""
        return ""

    @property
    def longer_memory(self) -> str:
        """The setting that gives the teacher a longer memory, for messages."""
        return ""

    @property
    def clipped_together(self) -> list[list[nn.Parameter]] | None:
        """Groups of parameters whose gradients are clipped, each by its own norm; None: all by their norm."""
        return None

    @property
    def schedule(self) -> tuple[float, float]:
        """Where the warm-up of the learning rate starts, as a fraction of the peak, and the length of the
        cosines of learning rate and weight decay, in runs."""
        return 0.0, 1.0

    def after_micro_batch(self, t: Progress, part: int, parts: int) -> None:
        """Called after the backward pass of micro-batch `part` of `parts`, from 1, except for the last one.
        It may be interrupted, and must not change the state of the method."""

    def before_step(self, t: Progress, applied: Tensor) -> None:
        """Called in every optimizer step between the backward pass and the update of the weights.

        `applied` is a scalar on the device: 1, or 0 if the gradients are not finite and no weight may change.
        """

    def after_step(self, t: Progress, applied: Tensor) -> None:
        """Called in every optimizer step after the update of the weights, which `applied` 0 skips."""

    def momentum_per_step(self, t: Progress) -> float:
        """Momentum of the teacher over an applied optimizer step; 1 without a teacher."""
        return 1.0

    def state(self, t: Progress) -> dict[str, float | Tensor]:
        """Further values to log at `t`: numbers, or scalars on the device."""
        return {}

    def references(self, batch: Any) -> dict[str, float]:
        """The losses of trivial baselines on this batch, to compare the loss with."""
        return {}

    def snapshot(
        self, batch: Any, mask_ratio: float | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and text from which pictures of a fixed batch are drawn (`report.pictures.Snapshot`), with
        the fraction of hidden patches of training or another one; empty for a method without a decoder of
        pixels."""
        return {}, {}

    @classmethod
    def reconstructs(cls) -> bool:
        """Whether the method implements `snapshot`: it has a decoder of pixels."""
        return cls.snapshot is not Method.snapshot

    # --- for rcmae.lab and `compare cost` -------------------------------------------------------------------

    @classmethod
    def compares(cls) -> bool:
        """Whether the method implements `compare`."""
        return cls.compare is not Method.compare

    def compare(self, batch: Any) -> Comparison | None:
        """The student's reconstruction, its target and the teacher's reconstruction; None for other
        methods."""
        return None

    @property
    def last_layer(self) -> nn.Linear | None:
        """The student's layer that makes the predictions of `compare`."""
        return None

    def encode(self, batch: Any) -> Tensor:
        """The student's tokens [b t d] of the visible patches; for methods with `compare` or `remask`."""
        raise NotImplementedError

    def remask(self, batch: Any, generator: torch.Generator) -> Any:
        """The batch for `encode` with other masks, drawn on the CPU; None for a method without masks."""
        return None

    def record_comparison(self, comparison: Comparison) -> None:
        """Write the comparison of the first images into `recorded`, if the diagnostics have set it."""
        if self.recorded is None:
            return
        c, count = comparison, max(8, RECORDED_VALUES // comparison.prediction[0].numel())
        prediction, target, teacher = (
            x[:count].detach().clone() for x in (c.prediction, c.target, c.teacher_prediction)
        )
        weight = None if c.weight is None else c.weight[:count].clone()
        self.recorded[:] = [Comparison(prediction, target, teacher, weight, c.gamma)]

    def average_shapes(self, images: int) -> None:
        """Replace shapes that depend on random draws by their average over so many images, for counting the
        cost of a step."""

    # --- what all methods share -----------------------------------------------------------------------------

    def normalize_and_patchify(self, images: Num[Tensor, "b c h w"]) -> Float[Tensor, "b n p"]:
        """Pixels from 0 to 255 to standardized patches."""
        return patchify(self._standardize(images.float()), self.patch)
