"""RC-MAE: reconstruction-consistent masked auto-encoding (Lee et al., ICLR 2023, arXiv 2210.02077).

    L = mean |s - x|^2 + gamma * mean |s - t|^2          over the hidden patches
    teacher <- m * teacher + (1 - m) * student           after every applied optimizer step

t: the reconstruction of the mean teacher from the same visible patches (S, the default) or from its own (D).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Recipe, parse_half_life
from ..engine.distributed import average
from ..engine.schedules import Progress, cosine
from ..models.backbone import Backbone
from ..models.patches import take
from ..models.teacher import Teacher
from .base import Comparison
from .loss import squared_errors
from .mae import MAE, CropAndOrder


class RCMAE(MAE):
    """MAE that also agrees with a slow average of itself."""

    networks = ("student", "teacher")

    def __init__(self, recipe: Recipe, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__(recipe, mean, std)
        self.teacher = Teacher(self.student)
        # The half-life in steps where it is steered: a part of the checkpoint. 0 until the length of the run is known.
        steered = recipe.rcmae.schedule == "half-life" and parse_half_life(recipe.rcmae.half_life)[1] == "auto"
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

    def before_step(self, t: Progress, applied: Tensor) -> None:
        # The reference code moves the teacher after every micro-batch, all but the last towards the student as it was.
        for _ in range(self.recipe.rcmae.ema_updates - 1):
            self.teacher.update(self.student, self.momentum(t), applied)

    def after_step(self, t: Progress, applied: Tensor) -> None:
        self.teacher.update(self.student, self.momentum(t), applied)
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

    def momentum(self, t: Progress) -> float | Tensor:
        """Momentum of one teacher update; a scalar on the device where it is steered."""
        r = self.recipe.rcmae
        if r.schedule == "released":
            return r.momentum
        if r.schedule == "described":
            return cosine(r.momentum, 1.0, t.fraction)
        return 0.5 ** (1 / (self.half_life(t) * r.ema_updates))

    def momentum_per_step(self, t: Progress) -> float:
        return float(self.momentum(t)) ** self.recipe.rcmae.ema_updates

    def half_life(self, t: Progress) -> float | Tensor:
        """The recipe's half-life in optimizer steps."""
        if self.memory is not None:
            return self.memory.clamp(*auto_bounds(t))
        number, unit = parse_half_life(self.recipe.rcmae.half_life)
        steps = {"%": t.total_steps / 100, "steps": 1, "images": 1 / self.recipe.optim.batch_size, "epochs": t.steps_per_epoch}
        return number * steps[unit]

    def backbone(self, which: str = "teacher") -> Backbone:
        model = self.student if which == "student" else self.teacher.model
        return Backbone(model.encoder.vit, *self.statistics)

    def state(self, t: Progress) -> dict[str, float | Tensor]:
        return teacher_clock(self.momentum_per_step(t), t, self.recipe.optim.batch_size) | {"drift": self.teacher.drift(self.student)}

    @torch.no_grad()
    def snapshot(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, facts = super().snapshot(batch)
        return tensors | {"teacher": self.teacher(self.cut(batch["image"]), batch["order"], self.visible)}, facts


def auto_bounds(t: Progress) -> tuple[float, float]:
    """Shortest and longest half-life, in steps, that `auto` may take."""
    return 2.0, max(2.0, t.total_steps / 10)


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
