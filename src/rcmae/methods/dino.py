"""DINO: self-distillation with no labels (Caron et al., ICCV 2021, arXiv 2104.14294).

    L = mean over (teacher view, other student view) of  - softmax((t - center) / tt) . log softmax(s / ts)

t, s: the cosines of an image's class token with the prototypes, from the teacher and from the student.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config import Rules, Section
from ..data.augment import LocalCrops
from ..engine.schedules import Progress
from ..models.backbone import Channels
from ..models.heads import PrototypeHead
from .diagnostics import Curve, Figure, Numbers, Sentence
from .distillation import (
    SPREAD_METRICS,
    SPREAD_ROWS,
    Batch,
    Center,
    EncoderWithHead,
    SelfDistillation,
    SelfDistillationRecipe,
    judge_cross_entropy,
    judge_spread,
    spread_figures,
    spread_metrics,
)
from .distillation_losses import centered_softmax, cross_view_loss, sinkhorn_knopp

LONGEST_FREEZE = 0.1
"""Largest fraction of the run in which the last layer is frozen, since an epoch of a large data set can be
longer than a run."""


@dataclass(frozen=True, kw_only=True)
class DINOSettings(Section):
    """Prototypes, temperatures and the center."""

    prototypes: int = 65536
    "number of prototypes"
    head_norm: bool = False
    "BatchNorm between the layers of the head, an option in the code of DINO and iBOT"
    student_temperature: float = 0.1
    "temperature of the student's softmax"
    teacher_temperature: float = 0.04
    "temperature of the teacher's softmax"
    teacher_temperature_start: float = 0.04
    "the teacher's temperature at the start of the run"
    teacher_temperature_warmup: float = 0.0
    "fraction of the run in which the teacher's temperature rises linearly"
    center_momentum: float = 0.9
    "momentum of the center"
    sinkhorn: bool = False
    "Sinkhorn-Knopp instead of centering, as in DINOv2"
    prototype_norm: bool = False
    "train the norms of the prototypes, as the released ViT-S of DINO and iBOT do"
    freeze_last: float = 1.0
    "epochs in which the head's last layer is frozen, at most a tenth of the run"

    def rules(self) -> Rules:
        temperatures = ("student_temperature", "teacher_temperature", "teacher_temperature_start")
        warmup = self.teacher_temperature_warmup
        return [
            *self.each("must be 2 or more", "prototypes"),
            *self.each("must lie in 0 to below 1", "center_momentum"),
            (0 <= warmup <= 1, f"teacher_temperature_warmup is a fraction of the run, not {warmup}"),
            *self.each("must be above 0", *temperatures),
        ]


@dataclass(frozen=True, kw_only=True)
class DINORecipe(SelfDistillationRecipe):
    """The recipe of `dino`."""

    method: str = "dino"
    crops: LocalCrops = LocalCrops()
    dino: DINOSettings = DINOSettings()


class DINO(SelfDistillation):
    """Self-distillation across crops, with a centered and sharpened teacher."""

    recipe_type = DINORecipe
    recipe: DINORecipe
    student: EncoderWithHead
    losses: ClassVar[dict[str, str]] = {"loss": "loss"} | SPREAD_METRICS

    def __init__(self, recipe: DINORecipe, mean: Channels, std: Channels):
        super().__init__(recipe, mean, std)
        self.center = Center(recipe.dino.prototypes, recipe.dino.center_momentum)

    @classmethod
    def linear_feature(cls, width: int) -> tuple[Literal["cls", "cls+mean"], int]:
        """As in the papers of DINO and iBOT for ViT-S, and from ViT-B on."""
        return ("cls", 4) if width < 768 else ("cls+mean", 1)

    @classmethod
    def micro_batch_statistics(cls, recipe: DINORecipe) -> str:
        parts = {
            "the head's statistics": recipe.dino.head_norm,
            "the balance of the targets": recipe.dino.sinkhorn,
        }
        names = " and ".join(name for name, used in parts.items() if used)
        return f"{names} are those of a micro-batch" if names else ""

    @property
    def clipped_together(self) -> list[list[nn.Parameter]] | None:
        weights = self.student.parameters()
        return [[p] for p in weights] if self.recipe.faithful else super().clipped_together

    def build_head(self, inputs: int) -> PrototypeHead:
        head, s = self.recipe.head, self.recipe.dino
        return PrototypeHead(
            inputs, head.head_width, head.embedding, s.prototypes, s.head_norm, s.prototype_norm
        )

    def forward(self, batch: Batch, t: Progress) -> dict[str, Tensor]:
        teacher, temperature = self.teacher.model, self.teacher_temperature(t)
        with torch.no_grad():
            teacher_logits = teacher.head(self.tokens(teacher, batch["image"])[:, :, 0])
        self.center.accumulate(teacher_logits)
        target = self.target(teacher_logits, self.center, temperature)
        logits = self.student.head(self.class_tokens(batch))  # [v, b, c]
        loss = cross_view_loss(logits, target, self.recipe.dino.student_temperature)
        return {"loss": loss} | self.spread(teacher_logits, temperature)

    def target(
        self, teacher_logits: Float[Tensor, "*s c"], center: Center, temperature: float
    ) -> Float[Tensor, "*s c"]:
        """The teacher's probabilities, centered or balanced against a collapse to one prototype."""
        if self.recipe.dino.sinkhorn:
            p = (teacher_logits.flatten(0, -2) / temperature).softmax(-1)
            return sinkhorn_knopp(p).view_as(teacher_logits)
        return centered_softmax(teacher_logits, center.value, temperature)

    def spread(self, teacher_logits: Float[Tensor, "*s c"], temperature: float) -> dict[str, Tensor]:
        """`spread_metrics` of the teacher's centered probabilities (with Sinkhorn-Knopp, of those before
        it)."""
        shift = 0.0 if self.recipe.dino.sinkhorn else self.center.value
        logits = teacher_logits.flatten(0, -2)[:SPREAD_ROWS]
        return spread_metrics(((logits - shift) / temperature).softmax(-1))

    def class_tokens(self, batch: Batch) -> Tensor:
        """The student's class tokens of all views [v b d]."""
        crops = [batch["image"], batch["local"]] if "local" in batch else [batch["image"]]
        return torch.cat([self.tokens(self.student, images)[:, :, 0] for images in crops])

    def teacher_temperature(self, t: Progress) -> float:
        s = self.recipe.dino
        rise = min(1.0, t.fraction / s.teacher_temperature_warmup) if s.teacher_temperature_warmup else 1.0
        return s.teacher_temperature_start + rise * (s.teacher_temperature - s.teacher_temperature_start)

    def before_step(self, t: Progress, applied: Tensor) -> None:
        super().before_step(t, applied)
        if t.epoch < self.recipe.dino.freeze_last and t.fraction < LONGEST_FREEZE:
            for weight in (self.student.head.last, self.student.head.scale):
                if weight is not None:
                    weight.grad = None

    def after_step(self, t: Progress, applied: Tensor) -> None:
        super().after_step(t, applied)
        self.center.update(applied)

    def references(self, batch: Batch) -> dict[str, float]:
        """The cross-entropy of a student with uniform probabilities, in nats."""
        return {"even": math.log(self.recipe.dino.prototypes)}

    @classmethod
    def figures(cls) -> tuple[Figure, ...]:
        text = (
            "Cross-entropy of the student's assignments on one view with the teacher's on another. It falls "
            "below that of uniform assignments, and rises again as the teacher's targets become harder; only "
            "zero, or uniform assignments until the end, mean collapse."
        )
        loss, levels = Curve("loss", "", "student"), (("uniform assignments", "even"),)
        return (
            Figure("figure-loss", "cross-entropy between views", (loss,), text, levels),
            *spread_figures(),
        )

    @classmethod
    def judge(cls, means: Numbers, reference: Numbers) -> list[Sentence]:
        return [
            judge_cross_entropy("cross-entropy between views", means["loss"], reference),
            judge_spread(means, reference),
        ]
