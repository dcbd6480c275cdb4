"""RC-MAE: reconstruction-consistent masked auto-encoding (Lee et al., ICLR 2023, arXiv 2210.02077).

    L = mean |s - x|^2 + gamma * mean |s - t|^2          over the hidden patches
    teacher <- m * teacher + (1 - m) * student           after every applied optimizer step

t: the reconstruction of the mean teacher from the same visible patches (S, the default) or from its own (D).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Recipe, parse_half_life
from ..engine.schedules import Progress, cosine
from ..models.backbone import Backbone
from ..models.patches import take
from ..models.teacher import Teacher
from .loss import squared_errors
from .mae import MAE, CropAndOrder


class RCMAE(MAE):
    """MAE that also agrees with a slow average of itself."""

    networks = ("student", "teacher")

    def __init__(self, recipe: Recipe, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__(recipe, mean, std)
        self.teacher = Teacher(self.student)

    def views(self) -> CropAndOrder:
        own = ("teacher_order",) if self.recipe.rcmae.teacher_mask == "different" else ()
        return CropAndOrder(self.recipe.images, self.patches, ("order", *own))

    def forward(self, batch: dict[str, Tensor], t: Progress) -> dict[str, Tensor]:
        patches, order = self.cut(batch["image"]), batch["order"]
        target = self.target(take(patches, order[:, self.visible :]))
        # The teacher runs first: nothing of it is kept when the student's activations are.
        if "teacher_order" in batch:
            return self.different(patches, order, batch["teacher_order"], target)
        guess = self.teacher(patches, order, self.visible)
        return squared_errors(self.student(patches, order, self.visible), target, guess, self.recipe.rcmae.gamma)

    def different(self, patches: Tensor, order: Tensor, teacher_order: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The D variant: consistency on the patches hidden from both (the paper leaves open on which; ours is stated)."""
        b, n = order.shape
        guess = self.teacher(patches, teacher_order, self.visible)
        rank = torch.empty_like(order).scatter_(1, teacher_order, torch.arange(n, device=order.device).expand(b, n))
        place = take(rank.unsqueeze(2), order[:, self.visible :]).squeeze(2) - self.visible  # below 0: the teacher saw it
        both = (place >= 0).float()
        guess = take(guess, place.clamp_min(0))
        prediction = self.student(patches, order, self.visible)
        reconstruction = F.mse_loss(prediction, target)
        consistency = ((prediction - guess).square().mean(2) * both).sum() / both.sum().clamp_min(1)
        ahead = ((guess - target).square().mean(2) * both).sum() / both.sum().clamp_min(1)
        return {
            "loss": reconstruction + self.recipe.rcmae.gamma * consistency,
            "reconstruction": reconstruction.detach(),
            "consistency": consistency.detach(),
            "teacher_reconstruction": ahead,
        }

    def before_step(self, t: Progress, applied: Tensor) -> None:
        # The reference code moves the teacher after every micro-batch, all but the last towards the student as it was.
        for _ in range(self.recipe.rcmae.ema_updates - 1):
            self.teacher.update(self.student, self.momentum(t), applied)

    def after_step(self, t: Progress, applied: Tensor) -> None:
        self.teacher.update(self.student, self.momentum(t), applied)

    def momentum(self, t: Progress) -> float:
        """Momentum of one teacher update."""
        r = self.recipe.rcmae
        if r.schedule == "released":
            return r.momentum
        if r.schedule == "described":
            return cosine(r.momentum, 1.0, t.fraction)
        return 0.5 ** (1 / (self._half_life(t) * r.ema_updates))

    def _half_life(self, t: Progress) -> float:
        """The recipe's half-life in optimizer steps."""
        number, unit = parse_half_life(self.recipe.rcmae.half_life)
        return (
            number
            * {
                "%": t.total_steps / 100,
                "steps": 1,
                "images": 1 / self.recipe.optim.batch_size,
                "epochs": t.steps_per_epoch,
            }[unit]
        )

    def backbone(self, which: str = "teacher") -> Backbone:
        model = self.student if which == "student" else self.teacher.model
        return Backbone(model.encoder.vit, *self.statistics)

    def state(self, t: Progress) -> dict[str, float | Tensor]:
        return teacher_clock(self.momentum(t) ** self.recipe.rcmae.ema_updates, t, self.recipe.optim.batch_size) | {
            "drift": self.teacher.drift(self.student)
        }

    @torch.no_grad()
    def snapshot(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, facts = super().snapshot(batch)
        return tensors | {"teacher": self.teacher(self.cut(batch["image"]), batch["order"], self.visible)}, facts


def teacher_clock(momentum: float, t: Progress, batch_size: int) -> dict[str, float]:
    """Momentum an optimizer step in all its units: half-life in steps, images, epochs and share of the run."""
    steps = float("inf") if momentum >= 1 else 0.0 if momentum <= 0 else -1 / math.log2(momentum)
    return {
        "momentum": momentum,
        "half_life_steps": steps,
        "half_life_images": steps * batch_size,
        "half_life_epochs": steps / t.steps_per_epoch,
        "half_life_share": steps / t.total_steps,
    }
