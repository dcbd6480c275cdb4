"""RC-MAE: reconstruction-consistent masked auto-encoding (Lee et al., ICLR 2023, arXiv 2210.02077).

    L = mean |s - x|^2 + gamma * mean |s - t|^2          over the hidden patches
    teacher <- m * teacher + (1 - m) * student           after every applied optimizer step

t: the reconstruction of the mean teacher from the same visible patches (S, the default) or from its own (D).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Rules, Section, parse_half_life
from ..engine.distributed import average
from ..engine.schedules import Progress
from ..models.patches import take
from ..models.teacher import Teacher
from .base import Comparison
from .loss import squared_errors
from .mae import MAE, CropAndOrder, MAERecipe
from .mean_teacher import MeanTeacher, MeanTeacherRecipe


@dataclass(frozen=True, kw_only=True)
class Settings(Section):
    """What RC-MAE adds to MAE."""

    gamma: float = 1.0
    "weight of the consistency with the teacher; 0 is MAE"
    teacher_mask: Literal["same", "different"] = "same"
    "the teacher sees the student's visible patches (the paper's S), or draws its own (D)"

    def rules(self) -> Rules:
        return [(self.gamma >= 0, f"gamma must be 0 or more, not {self.gamma}")]


@dataclass(frozen=True, kw_only=True)
class RCMAERecipe(MAERecipe, MeanTeacherRecipe):
    """What `rcmae` is told."""

    method: str = "rcmae"
    rcmae: Settings = Settings()


class RCMAE(MeanTeacher, MAE):
    """MAE that also agrees with a slow average of itself."""

    recipe_type = RCMAERecipe
    recipe: RCMAERecipe

    def __init__(self, recipe: RCMAERecipe, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__(recipe, mean, std)
        self.teacher = Teacher(self.student)
        # The half-life in steps where it is steered: a part of the checkpoint. 0 until the length of the run is known.
        steered = recipe.teacher.schedule == "half-life" and parse_half_life(recipe.teacher.half_life)[1] == "auto"
        self.register_buffer("memory", torch.zeros(()) if steered else None)
        self.ahead: list[Tensor] = []

    def views(self) -> CropAndOrder:
        own = ("teacher_order",) if self.recipe.rcmae.teacher_mask == "different" else ()
        return CropAndOrder(self.recipe.images, self.patches, ("order", *own))

    @property
    def last_layer(self) -> nn.Linear:
        return self.student.decoder.pred

    def compare(self, batch: dict[str, Tensor]) -> Comparison:
        patches, order = self.cut(batch["image"]), batch["order"]
        target = self.target(take(patches, order[:, self.visible :]))
        # The teacher runs first: nothing of it is kept when the student's activations are.
        if "teacher_order" not in batch:
            guess = self.teacher(patches, order, self.visible)
            return Comparison(self.student(patches, order, self.visible), target, guess)
        # D: consistency on the patches hidden from both (the paper leaves open on which; ours is stated).
        teacher_order, (b, n) = batch["teacher_order"], order.shape
        guess = self.teacher(patches, teacher_order, self.visible)
        rank = torch.empty_like(order).scatter_(1, teacher_order, torch.arange(n, device=order.device).expand(b, n))
        place = take(rank.unsqueeze(2), order[:, self.visible :]).squeeze(2) - self.visible  # below 0: the teacher saw it
        return Comparison(self.student(patches, order, self.visible), target, take(guess, place.clamp_min(0)), (place >= 0).float())

    def forward(self, batch: dict[str, Tensor], t: Progress) -> dict[str, Tensor]:
        gamma, c = self.recipe.rcmae.gamma, self.compare(batch)
        self.watch(c)
        if c.weight is None:
            losses = squared_errors(c.prediction, c.target, c.guess, gamma)
        else:
            reconstruction, consistency = F.mse_loss(c.prediction, c.target), c.mean(c.prediction - c.guess)
            losses = {
                "loss": reconstruction + gamma * consistency,
                "reconstruction": reconstruction.detach(),
                "consistency": consistency.detach(),
                "teacher_reconstruction": c.mean(c.guess - c.target),
            }
        if self.memory is not None:
            own = losses["reconstruction"] if c.weight is None else c.mean((c.prediction - c.target).detach())
            self.ahead.append(torch.stack([own, losses["teacher_reconstruction"]]))
        return losses

    def after_step(self, t: Progress, applied: Tensor) -> None:
        super().after_step(t, applied)
        if self.memory is not None:
            self.steer(t, applied)

    @torch.no_grad()
    def steer(self, t: Progress, applied: Tensor) -> None:
        """`half_life = "auto"`: longer while the teacher reconstructs better than the student, shorter while worse.

        An advantage of 1 % or more moves the half-life by ln 2 steps a step, less moves it in proportion: so it grows no faster
        than the run does. Bounds: 2 steps, and a tenth of the run.
        """
        low, high = auto_bounds(t)
        own, theirs = average(torch.stack(self.ahead).mean(0))
        self.ahead.clear()
        change = (100 * (1 - theirs / own)).clamp(-1, 1) * math.log(2)
        self.memory.copy_((self.half_life(t) + torch.where(applied > 0, change, 0.0)).clamp(low, high))

    def half_life(self, t: Progress) -> float | Tensor:
        return super().half_life(t) if self.memory is None else self.memory.clamp(*auto_bounds(t))

    @torch.no_grad()
    def snapshot(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, facts = super().snapshot(batch)
        return tensors | {"teacher": self.teacher(self.cut(batch["image"]), batch["order"], self.visible)}, facts


def auto_bounds(t: Progress) -> tuple[float, float]:
    """Shortest and longest half-life, in steps, that `auto` may take."""
    return 2.0, max(2.0, t.total_steps / 10)
