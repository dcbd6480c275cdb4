"""DINO: self-distillation with no labels (Caron et al., ICCV 2021, arXiv 2104.14294).

    L = mean over (teacher view, other student view) of  - softmax((t - center) / tt) . log softmax(s / ts)

t, s: the cosines of an image's class token with the prototypes, from the teacher and from the student.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import Rules, Section
from ..engine.schedules import Progress
from ..models.heads import PrototypeHead
from .diagnostics import Curve, Figure, Numbers, Sentence
from .distillation import (
    LOOKED_AT,
    SPREAD,
    Batch,
    Center,
    SelfDistillation,
    SelfDistillationRecipe,
    judge_answers,
    judge_spread,
    spread_figures,
    spread_of,
)
from .distillation_losses import across_views, balanced, centered

LONGEST_FREEZE = 0.1
"Share of the run in which the last layer may be frozen: an epoch of a large set can be longer than a run."


@dataclass(frozen=True, kw_only=True)
class DINOSettings(Section):
    """Prototypes, temperatures and the center."""

    prototypes: int = 65536
    "width of the head's output"
    head_norm: bool = False
    "BatchNorm between the head's layers, an option in the code of DINO and iBOT"
    student_temperature: float = 0.1
    "of the student's softmax"
    teacher_temperature: float = 0.04
    "of the teacher's softmax"
    teacher_temperature_start: float = 0.04
    "where the teacher's temperature starts"
    teacher_temperature_warmup: float = 0.0
    "share of the run in which it rises linearly"
    centre_momentum: float = 0.9
    "what a center keeps of itself in a step"
    sinkhorn: bool = False
    "balance the targets over the prototypes in place of the center, as DINOv2 does"
    freeze_last: float = 1.0
    "epochs in which the head's last layer does not move, within the first tenth of the run"

    def rules(self) -> Rules:
        temperatures = ("student_temperature", "teacher_temperature", "teacher_temperature_start")
        warmup = self.teacher_temperature_warmup
        return [
            (self.prototypes >= 2, f"prototypes must be 2 or more, not {self.prototypes}"),
            (0 <= self.centre_momentum < 1, f"centre_momentum must lie in 0 to below 1, not {self.centre_momentum}"),
            (0 <= warmup <= 1, f"teacher_temperature_warmup is a share of the run, not {warmup}"),
            *((getattr(self, k) > 0, f"{k} must be above 0, not {getattr(self, k)}") for k in temperatures),
        ]


@dataclass(frozen=True, kw_only=True)
class DINORecipe(SelfDistillationRecipe):
    """What `dino` is told."""

    method: str = "dino"
    dino: DINOSettings = DINOSettings()


class DINO(SelfDistillation):
    """Self-distillation across crops, with a centered and sharpened teacher."""

    recipe_type = DINORecipe
    recipe: DINORecipe
    losses: ClassVar[dict[str, str]] = {"loss": "loss"} | SPREAD

    def __init__(self, recipe: DINORecipe, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__(recipe, mean, std)
        self.center = Center(recipe.dino.prototypes, recipe.dino.centre_momentum)

    @classmethod
    def accumulation_caveat(cls, recipe: DINORecipe) -> str:
        own = {"the head's statistics": recipe.dino.head_norm, "the balance of the targets": recipe.dino.sinkhorn}
        names = " and ".join(name for name, there in own.items() if there)
        return f"{names} are those of a micro-batch" if names else ""

    def head(self, inputs: int) -> PrototypeHead:
        head, own = self.recipe.head, self.recipe.dino
        return PrototypeHead(inputs, head.head_width, head.embedding, own.prototypes, own.head_norm)

    def forward(self, batch: Batch, t: Progress) -> dict[str, Tensor]:
        teacher, temperature = self.teacher.model, self.teacher_temperature(t)
        with torch.no_grad():
            teacher_logits = teacher.head(self.tokens(teacher, batch["image"])[:, :, 0])
        self.center.accumulate(teacher_logits)
        target = self.target(teacher_logits, self.center, temperature)
        loss = across_views(self.student.head(self.classes(batch)), target, self.recipe.dino.student_temperature)
        return {"loss": loss} | self.spread(teacher_logits, temperature)

    def target(self, teacher_logits: Float[Tensor, "*s c"], center: Center, temperature: float) -> Float[Tensor, "*s c"]:
        """The teacher's probabilities, centered or balanced so that they do not all fall to one prototype."""
        if self.recipe.dino.sinkhorn:
            return balanced((teacher_logits.flatten(0, -2) / temperature).softmax(-1)).view_as(teacher_logits)
        return centered(teacher_logits, center.value, temperature)

    def spread(self, teacher_logits: Float[Tensor, "*s c"], temperature: float) -> dict[str, Tensor]:
        """Of the teacher's answers, see `spread_of`; what is balanced is looked at before."""
        shift = 0.0 if self.recipe.dino.sinkhorn else self.center.value
        return spread_of(((teacher_logits.flatten(0, -2)[:LOOKED_AT] - shift) / temperature).softmax(-1))

    def classes(self, batch: Batch) -> Tensor:
        """The student's class tokens of all views [v b d]."""
        sizes = [batch[k] for k in ("image", "local") if k in batch]
        return torch.cat([self.tokens(self.student, images)[:, :, 0] for images in sizes])

    def teacher_temperature(self, t: Progress) -> float:
        d = self.recipe.dino
        rise = min(1.0, t.fraction / d.teacher_temperature_warmup) if d.teacher_temperature_warmup else 1.0
        return d.teacher_temperature_start + rise * (d.teacher_temperature - d.teacher_temperature_start)

    def before_step(self, t: Progress, applied: Tensor) -> None:
        super().before_step(t, applied)
        if t.epoch < self.recipe.dino.freeze_last and t.fraction < LONGEST_FREEZE:
            self.student.head.last.grad = None

    def after_step(self, t: Progress, applied: Tensor) -> None:
        super().after_step(t, applied)
        self.center.update(applied)

    def references(self, batch: Batch) -> dict[str, float]:
        """The cross-entropy of a student whose answers are even, in nats."""
        return {"even": math.log(self.recipe.dino.prototypes)}

    @classmethod
    def figures(cls) -> tuple[Figure, ...]:
        text = (
            "Cross-entropy of the student's answers on one view against the teacher's on another. It falls below even answers, and rises "
        )
        text += "again where the teacher's answers become harder; only zero, or even answers to the end, mean collapse."
        across = Curve("loss", "", "student")
        return (Figure("figure-loss", "cross-entropy between views", (across,), text, (("even answers", "even"),)), *spread_figures())

    @classmethod
    def judge(cls, means: Numbers, reference: Numbers) -> list[Sentence]:
        return [judge_answers("cross-entropy between views", means["loss"], reference), judge_spread(means, reference)]
