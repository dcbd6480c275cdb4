"""MSN: masked siamese networks (Assran et al., ECCV 2022, arXiv 2204.07141).

    L = mean over anchor views of  - target . log p  +  lambda (log c - entropy of the mean p)

p: softmax of an anchor's cosines with the prototypes; target: the teacher's softmax for another crop,
sharpened. The anchors are a global crop, part of whose patches is dropped, and local crops.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from ..config import Rules, Section
from ..data.augment import LocalCrops
from ..data.masking import random_order
from ..data.views import Image
from ..engine.schedules import Progress
from ..models.heads import mlp
from .base import Transform
from .diagnostics import Curve, Figure, Numbers, Sentence
from .distillation import (
    SPREAD_METRICS,
    EncoderWithHead,
    SelfDistillation,
    SelfDistillationRecipe,
    StudentWithPredictor,
    judge_cross_entropy,
    judge_spread,
    spread_figures,
    spread_metrics,
)
from .distillation import Batch as Crops
from .distillation_losses import assignments, me_max, sharpen, sinkhorn_knopp
from .mean_teacher import MSN_STRETCH


@dataclass(frozen=True, kw_only=True)
class MSNSettings(Section):
    """Prototypes, anchors and targets."""

    prototypes: int = 65536
    "number of prototypes"
    student_temperature: float = 0.1
    "temperature of the softmax over the prototypes"
    sharpen: float = 0.25
    "temperature that sharpens the targets"
    sinkhorn: bool = False
    "balance the targets over the prototypes with Sinkhorn-Knopp"
    anchor_drop: float = 0.15
    "fraction of the patches of the global anchor that is dropped"
    entropy: float = 1.0
    "weight of mean entropy maximization (me-max)"

    def rules(self) -> Rules:
        return [
            *self.each("must be 2 or more", "prototypes"),
            *self.each("must be above 0", "student_temperature", "sharpen"),
            *self.each("must lie in 0 to below 1", "anchor_drop"),
            *self.each("must be 0 or more", "entropy"),
        ]


@dataclass(frozen=True, kw_only=True)
class MSNRecipe(SelfDistillationRecipe):
    """The recipe of `msn`."""

    method: str = "msn"
    crops: LocalCrops = LocalCrops()
    msn: MSNSettings = MSNSettings()


class Batch(Crops):
    """Crops and the order of the anchor's patches."""

    anchor_order: Int[Tensor, "b n"]
    "order of the patches of the second global crop; the last ones are dropped"


@dataclass(frozen=True)
class AnchoredCrops:
    """Crops, and under "anchor_order" an order of the patches of the second one, the last of which are
    dropped."""

    crops: Transform
    patches: int

    def __call__(self, image: Image, rng: np.random.Generator) -> dict[str, Tensor]:
        return self.crops(image, rng) | {"anchor_order": torch.from_numpy(random_order(self.patches, rng))}


class Prototypes(nn.Module):
    """Prototypes, trained with the student and without weight decay; the teacher uses the student's."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width).uniform_(-1, 1) * width**-0.5)
        self.weight.no_decay = True  # type: ignore[attr-defined]  # read by engine.optim


class MSN(SelfDistillation):
    """Matches the assignments of masked and local views to the teacher's assignment of the full view."""

    recipe_type = MSNRecipe
    recipe: MSNRecipe
    student: StudentWithPredictor
    losses: ClassVar[dict[str, str]] = {
        "loss": "loss",
        "agreement": "agreement",
        "me_max": "me-max",
    } | SPREAD_METRICS

    @classmethod
    def micro_batch_statistics(cls, recipe: MSNRecipe) -> str:
        return "the mean entropy and the head's statistics are those of a micro-batch"

    @property
    def clipped_together(self) -> list[list[nn.Parameter]] | None:
        return [list(self.student.shared.parameters())] if self.recipe.faithful else super().clipped_together

    @property
    def schedule(self) -> tuple[float, float]:
        return (0.2, MSN_STRETCH) if self.recipe.faithful else super().schedule

    def build_head(self, inputs: int) -> nn.Module:
        h = self.recipe.head
        return mlp([inputs, h.head_width, h.head_width, h.embedding], norm=True)

    def build_student(self, net: EncoderWithHead) -> StudentWithPredictor:
        return StudentWithPredictor(net, Prototypes(self.recipe.msn.prototypes, self.recipe.head.embedding))

    def views(self) -> Transform:
        return AnchoredCrops(super().views(), self.patches)

    def forward(self, batch: Batch, t: Progress) -> dict[str, Tensor]:
        s, teacher, shared = self.recipe.msn, self.teacher.model, self.student.shared
        ids = batch["anchor_order"][:, : max(1, int((1 - s.anchor_drop) * self.patches))]
        anchors = [self.tokens(shared, batch["image"][:, 1:], ids=ids)]
        anchors += [self.tokens(shared, batch["local"])] if "local" in batch else []
        with torch.no_grad():
            z = teacher.head(self.tokens(teacher, batch["image"][:, :1])[0, :, 0])  # [b, d]
        # Apart for each crop size, since the head's BatchNorm uses the statistics of its input.
        z_anchor = torch.cat([shared.head(tokens[:, :, 0].flatten(0, 1)) for tokens in anchors])  # [vb, d]
        with torch.autocast(z.device.type, enabled=False):
            prototypes = cast(Prototypes, self.student.predictor).weight
            with torch.no_grad():
                assigned = sharpen(assignments(z.float(), prototypes, s.student_temperature), s.sharpen)
                target = sinkhorn_knopp(assigned) if s.sinkhorn else assigned  # [b, c]
            p = assignments(z_anchor.float(), prototypes, s.student_temperature)  # [vb, c]
            agreement = -torch.special.xlogy(target.repeat(len(z_anchor) // len(target), 1), p).sum(1).mean()
            gap = me_max(p)
        return {
            "loss": agreement + s.entropy * gap,
            "agreement": agreement.detach(),
            "me_max": gap.detach(),
        } | spread_metrics(assigned)

    def references(self, batch: Batch) -> dict[str, float]:
        """The cross-entropy of uniform assignments in nats, which is also the maximum of me-max."""
        return {"even": math.log(self.recipe.msn.prototypes)}

    @classmethod
    def figures(cls) -> tuple[Figure, ...]:
        text = (
            "Cross-entropy of the anchors' assignments with the targets. It falls below that of uniform "
            "assignments; only zero, or uniform assignments until the end, mean collapse."
        )
        gap = (
            "Mean entropy maximization (me-max): 0 if all prototypes are used equally on average; at the "
            "dashed line, one prototype is used for all images."
        )
        agreement, me_max_curve = Curve("agreement", "", "student"), Curve("me_max", "", "student")
        uniform, single = (("uniform assignments", "even"),), (("one prototype", "even"),)
        return (
            Figure("figure-loss", "cross-entropy of the anchors", (agreement,), text, uniform),
            Figure("figure-gap", "me-max, nats", (me_max_curve,), gap, single),
            *spread_figures(),
        )

    @classmethod
    def judge(cls, means: Numbers, reference: Numbers) -> list[Sentence]:
        agreement = judge_cross_entropy("cross-entropy of the anchors", means["agreement"], reference)
        gap = (
            f"The me-max term is {means['me_max']:.3f} nats: 0 if all prototypes are used equally on average."
        )
        return [agreement, ("note", gap), judge_spread(means, reference)]
