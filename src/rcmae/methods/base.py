"""The contract of a method: all that the trainer, the evaluation and the laboratory know of it."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from ..config import Recipe
from ..engine.schedules import Progress
from ..models.backbone import Backbone
from ..models.patches import patchify
from ..models.teacher import Teacher
from .diagnostics import Diagnostics

Transform = Callable[[np.ndarray, np.random.Generator], dict[str, Tensor]]
"image uint8 [h, w, c] and a generator -> named tensors of one sample; must pickle, for loader workers."

WATCHED = 2**17
"""Predicted values of a step that instruments look at: the images that hold so many, but at least 8. What is kept does not grow with the
batch; at 224 px and batch 64, all that is watched cost 2.4 % of a ViT-Ti's time on a CPU."""


class Comparison(NamedTuple):
    """What a student that reconstructs is judged by, on its hidden patches."""

    prediction: Float[Tensor, "b m p"]
    target: Float[Tensor, "b m p"]
    guess: Float[Tensor, "b m p"]
    "the teacher's prediction"
    weight: Float[Tensor, "b m"] | None = None
    "1 where the guess counts, 0 where the teacher saw the patch; None: it counts everywhere"
    gamma: float = 1.0
    "weight of the consistency |prediction - guess|^2 in the loss"

    def mean(self, difference: Float[Tensor, "b m p"]) -> Tensor:
        """Mean square over the patches on which the guess counts: of each image, then over the images, however a batch is cut."""
        if self.weight is None:
            return difference.square().mean()
        return ((difference.square().mean(2) * self.weight).sum(1) / self.weight.sum(1).clamp_min(1)).mean()


class Method(Diagnostics, nn.Module):
    """A way of learning without labels. One file a method; the first three functions and the first three attributes are what each has."""

    recipe_type: type[Recipe]
    "what the method is told: the sections that every method has, and those it shares or has alone, each with its rules"
    recipe: Recipe
    student: nn.Module
    "every trained parameter lives here"
    teacher: Teacher | None
    "follows the student and gives it its targets; None without one"
    patch: int
    "side of a patch in pixels"
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    "mean and deviation of each channel that standardise the pixels, in units of 0 to 1"
    networks: tuple[str, ...] = ("student",)
    "what is probed and exported, the one to use last"
    shorter, longer = "", ""
    "what gives the teacher a shorter or a longer memory, for messages"
    watched: list[Comparison] | None = None
    "where `forward` leaves what it compared, if somebody looks"

    def __init__(self) -> None:
        super().__init__()
        self.teacher = None

    # --- what a method implements ----------------------------------------------------------------------------------------

    def views(self) -> Transform:
        """The transform of one image: uint8 [h, w, c] and a generator to named tensors (crops, mask order)."""
        raise NotImplementedError

    def forward(self, batch: dict[str, Tensor], t: Progress) -> dict[str, Tensor]:
        """Scalars on the device: "loss" is what is minimised, the rest is logged."""
        raise NotImplementedError

    def backbone(self, which: Literal["student", "teacher"] = "teacher") -> Backbone:
        """What evaluation loads; a method without a teacher has only the student."""
        raise NotImplementedError

    # --- what it may add -------------------------------------------------------------------------------------------------

    @classmethod
    def problems(cls, recipe: Recipe) -> list[str]:
        """What of a recipe this method cannot work with, each in a few words; asked before any data is touched."""
        return []

    @classmethod
    def accumulation_caveat(cls, recipe: Recipe) -> str:
        """Why micro-batches are another step than the batch they make; empty where they are the same."""
        return ""

    @property
    def ema_source(self) -> nn.Module:
        """The part of the student that the teacher averages and that evaluation loads."""
        return self.student

    def before_step(self, t: Progress, applied: Tensor) -> None:
        """Once an optimizer step, after the gradients are there and before the weights move.

        `applied` is a scalar on the device: 1, or 0 if the gradients are not finite and nothing may move.
        """

    def after_step(self, t: Progress, applied: Tensor) -> None:
        """Once an optimizer step, after the weights moved (`applied` 1) or were left alone (0)."""

    def momentum_per_step(self, t: Progress) -> float:
        """Share of itself that the teacher keeps in an applied optimizer step; 1 without a teacher."""
        return 1.0

    def state(self, t: Progress) -> dict[str, float | Tensor]:
        """More to log at `t`: numbers, or scalars on the device."""
        return {}

    def references(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """What simple guesses would score on this batch, to read the loss against."""
        return {}

    def snapshot(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and text from which the report draws pictures of a fixed batch; nothing by default."""
        return {}, {}

    # --- what rcmae.lab and `compare cost` ask of the methods that can answer --------------------------------------------

    @classmethod
    def compares(cls) -> bool:
        """Whether there is a reconstruction and a teacher's, so that `compare` can be asked."""
        return cls.compare is not Method.compare

    def compare(self, batch: dict[str, Tensor]) -> Comparison | None:
        """The student against the target and the teacher; None for a method that does not reconstruct under a teacher."""
        return None

    @property
    def last_layer(self) -> nn.Linear | None:
        """The student's layer that makes the predictions of `compare`."""
        return None

    def encode(self, batch: dict[str, Tensor]) -> Tensor:
        """The student's tokens [b t d] of what a batch shows, of a method that compares or masks anew."""
        raise NotImplementedError

    def masked_anew(self, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor] | None:
        """The batch with other masks, drawn on the CPU, of what `encode` reads; None for a method that shows it everything."""
        return None

    def watch(self, comparison: Comparison) -> None:
        """Leave a part of what a step compared to whoever asked for it by setting `watched` to a list."""
        if self.watched is not None:
            few = max(8, WATCHED // comparison.prediction[0].numel())
            parts = {name: v[:few].detach().clone() for name, v in comparison._asdict().items() if isinstance(v, Tensor)}
            self.watched[:] = [comparison._replace(**parts)]

    def average_shapes(self, images: int) -> None:
        """Make shapes that depend on what was drawn those of the average of so many images, for who counts and does not learn."""

    # --- what all methods share ------------------------------------------------------------------------------------------

    def standardise_by(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Remember the statistics, a value a channel, in units of 0 to 1."""
        self.statistics = mean, std
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def normalize_and_patchify(self, images: Num[Tensor, "b c h w"]) -> Float[Tensor, "b n p"]:
        """Pixels from 0 to 255 to standardised patches."""
        return patchify((images.float() - self.mean) / self.std, self.patch)
