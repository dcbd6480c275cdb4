"""MSN: masked siamese networks (Assran et al., ECCV 2022, arXiv 2204.07141).

    L = mean over anchor views of  - target . log p  +  lambda (log c - entropy of the mean p)

p: softmax of an anchor's cosines with the prototypes; the target is the same of another crop through the teacher, sharpened. Of the
large anchor, part of the patches is left out; the others are small.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from ..config import Rules, Section
from ..data.augment import MultiCrop
from ..data.masking import random_order
from ..engine.schedules import Progress
from ..models.heads import mlp
from .diagnostics import Curve, Figure, Numbers, Sentence
from .distillation import (
    SPREAD,
    EncoderWithHead,
    SelfDistillation,
    SelfDistillationRecipe,
    StudentWithPredictor,
    judge_answers,
    judge_spread,
    spread_figures,
    spread_of,
)
from .distillation import Batch as Crops
from .distillation_losses import assignments, balanced, entropy_gap, sharpened


@dataclass(frozen=True, kw_only=True)
class MSNSettings(Section):
    """Prototypes, anchors and targets."""

    prototypes: int = 65536
    "number of prototypes"
    student_temperature: float = 0.1
    "of the softmax over the prototypes"
    sharpen: float = 0.25
    "temperature that sharpens the targets"
    sinkhorn: bool = False
    "balance the targets over the prototypes"
    anchor_drop: float = 0.15
    "share of the patches that a large anchor view loses"
    entropy: float = 1.0
    "weight of the mean entropy that is maximised"

    def rules(self) -> Rules:
        return [
            (self.prototypes >= 2, f"prototypes must be 2 or more, not {self.prototypes}"),
            (self.student_temperature > 0, f"student_temperature must be above 0, not {self.student_temperature}"),
            (self.sharpen > 0, f"sharpen must be above 0, not {self.sharpen}"),
            (0 <= self.anchor_drop < 1, f"anchor_drop must lie in 0 to below 1, not {self.anchor_drop}"),
            (self.entropy >= 0, f"entropy must be 0 or more, not {self.entropy}"),
        ]


@dataclass(frozen=True, kw_only=True)
class MSNRecipe(SelfDistillationRecipe):
    """What `msn` is told."""

    method: str = "msn"
    msn: MSNSettings = MSNSettings()


class Batch(Crops):
    """Crops, and which patches of the anchor stay."""

    anchor_order: Int[Tensor, "b n"]
    "of the patches of the second global crop; the last ones are left out"


@dataclass(frozen=True)
class AnchoredCrops:
    """Crops, and under "anchor_order" an order of the patches of the second one, of which the last are left out."""

    crops: MultiCrop
    patches: int

    def __call__(self, image: UInt8[np.ndarray, "h w c"], rng: np.random.Generator) -> dict[str, Tensor]:
        return self.crops(image, rng) | {"anchor_order": torch.from_numpy(random_order(self.patches, rng))}


class Prototypes(nn.Module):
    """Directions that are trained with the student, without weight decay, and have no teacher."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width).uniform_(-1, 1) * width**-0.5)
        self.weight.no_decay = True


class MSN(SelfDistillation):
    """Assigns masked and small views to the prototypes that the teacher chooses for the whole one."""

    recipe_type = MSNRecipe
    recipe: MSNRecipe
    losses: ClassVar[dict[str, str]] = {"loss": "loss", "agreement": "agreement", "entropy_gap": "gap"} | SPREAD

    @classmethod
    def accumulation_caveat(cls, recipe: MSNRecipe) -> str:
        return "the mean entropy and the head's statistics are those of a micro-batch"

    def head(self, inputs: int) -> nn.Module:
        h = self.recipe.head
        return mlp([inputs, h.head_width, h.head_width, h.embedding], norm=True)

    def build_student(self, net: EncoderWithHead) -> StudentWithPredictor:
        return StudentWithPredictor(net, Prototypes(self.recipe.msn.prototypes, self.recipe.head.embedding))

    @property
    def ema_source(self) -> EncoderWithHead:
        return self.student.shared

    def views(self) -> AnchoredCrops:
        return AnchoredCrops(super().views(), self.patches)

    def forward(self, batch: Batch, t: Progress) -> dict[str, Tensor]:
        own, teacher, shared = self.recipe.msn, self.teacher.model, self.student.shared
        kept = batch["anchor_order"][:, : max(1, int((1 - own.anchor_drop) * self.patches))]
        classes = [self.tokens(shared, batch["image"][:, 1:], ids=kept)]
        classes += [self.tokens(shared, batch["local"])] if "local" in batch else []
        with torch.no_grad():
            z = teacher.head(self.tokens(teacher, batch["image"][:, :1])[0, :, 0])
        z_anchor = torch.cat([shared.head(tokens[:, :, 0].flatten(0, 1)) for tokens in classes])  # statistics are those of one size
        with torch.autocast(z.device.type, enabled=False):
            prototypes = self.student.predictor.weight
            with torch.no_grad():
                assigned = sharpened(assignments(z.float(), prototypes, own.student_temperature), own.sharpen)
                target = balanced(assigned) if own.sinkhorn else assigned
            p = assignments(z_anchor.float(), prototypes, own.student_temperature)
            agreement = -torch.special.xlogy(target.repeat(len(z_anchor) // len(target), 1), p).sum(1).mean()
            gap = entropy_gap(p)
        return {"loss": agreement + own.entropy * gap, "agreement": agreement.detach(), "entropy_gap": gap.detach()} | spread_of(assigned)

    def references(self, batch: Batch) -> dict[str, float]:
        """The cross-entropy of anchors whose assignments are even, in nats; also the largest entropy gap."""
        return {"even": math.log(self.recipe.msn.prototypes)}

    @classmethod
    def figures(cls) -> tuple[Figure, ...]:
        text = "Cross-entropy of the anchors' assignments against the targets. It falls below even assignments; only zero, or even "
        text += "assignments to the end, mean collapse."
        gap = "Entropy gap: 0 where all prototypes are used alike on average, at the dashed line where one is used for everything."
        agreement = Curve("agreement", "", "student")
        return (
            Figure("figure-loss", "cross-entropy of the anchors", (agreement,), text, (("even assignments", "even"),)),
            Figure("figure-gap", "entropy gap, nats", (Curve("entropy_gap", "", "student"),), gap, (("one prototype", "even"),)),
            *spread_figures(),
        )

    @classmethod
    def judge(cls, means: Numbers, reference: Numbers) -> list[Sentence]:
        agreement = judge_answers("cross-entropy of the anchors", means["agreement"], reference, "assignments")
        gap = f"The entropy gap is {means['entropy_gap']:.3f} nats: 0 where all prototypes are used alike on average."
        return [agreement, ("note", gap), judge_spread(means, reference)]
