"""iBOT: image BERT pre-training with an online tokenizer (Zhou et al., ICLR 2022, arXiv 2111.07832).

    L = DINO's loss + mean over masked patches of  - softmax((t - center') / tt) . log softmax(s / ts)

In the student's global crops, patches are replaced by a mask token, and the student predicts the teacher's
output on those patches. One head serves class tokens and patches, with a center for each.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from ..config import Rules, Section
from ..data.masking import block_mask, random_order
from ..data.views import Image
from ..engine.schedules import Progress
from ..models.backbone import Channels
from .base import Transform
from .diagnostics import Curve, Figure, Numbers, Sentence, Variant
from .dino import DINO, DINORecipe
from .distillation import SPREAD_METRICS, Center, EncoderWithHead, judge_cross_entropy, judge_spread
from .distillation import Batch as Crops
from .distillation_losses import cross_view_loss, masked_patch_loss


@dataclass(frozen=True, kw_only=True)
class IBOTSettings(Section):
    """What iBOT adds to DINO: masked patches."""

    masked_images: float = 0.5
    "fraction of the global crops with masked patches"
    masked_fraction: tuple[float, float] = (0.1, 0.5)
    "range of the fraction of masked patches in such a crop"
    mask_shape: Literal["block", "random"] = "block"
    "mask blocks of patches, or random patches"
    patch_head: Literal["all", "masked"] = "all"
    """patches to which the head is applied: all, as in the reference code, or only the masked ones, which the
    loss needs"""

    def rules(self) -> Rules:
        low, high = self.masked_fraction
        return [
            (
                0 <= low <= high <= 1,
                f"masked_fraction must satisfy 0 <= low <= high <= 1, not {self.masked_fraction}",
            ),
            *self.each("is a fraction, from 0 to 1", "masked_images"),
        ]


@dataclass(frozen=True, kw_only=True)
class IBOTRecipe(DINORecipe):
    """The recipe of `ibot`."""

    method: str = "ibot"
    ibot: IBOTSettings = IBOTSettings()


class Batch(Crops):
    """Crops and masks."""

    masked: Bool[Tensor, "b 2 n"]
    "patches of the global crops that are masked for the student"


@dataclass(frozen=True)
class MaskedCrops:
    """Crops, and under "masked" the mask of each of the two global crops."""

    crops: Transform
    grid: tuple[int, int]
    settings: IBOTSettings

    def __call__(self, image: Image, rng: np.random.Generator) -> dict[str, Tensor]:
        return self.crops(image, rng) | {"masked": torch.stack([self._mask(rng) for _ in range(2)])}

    def _mask(self, rng: np.random.Generator) -> Tensor:
        n, s = self.grid[0] * self.grid[1], self.settings
        count = round(n * rng.uniform(*s.masked_fraction)) if rng.random() < s.masked_images else 0
        if s.mask_shape == "block":
            return torch.from_numpy(block_mask(self.grid, count, rng)).flatten()
        mask = torch.zeros(n, dtype=torch.bool)
        mask[torch.from_numpy(random_order(n, rng))[:count]] = True
        return mask


class IBOT(DINO):
    """DINO that also predicts masked patches."""

    recipe_type = IBOTRecipe
    recipe: IBOTRecipe
    losses: ClassVar[dict[str, str]] = {
        "loss": "loss",
        "across": "views",
        "within": "patches",
    } | SPREAD_METRICS
    variants: ClassVar[tuple[Variant, ...]] = (
        Variant(
            "ibot, head on masked",
            {"patch_head": "masked"},
            "iBOT is listed twice: with its head on all patches, as in its code, and on the masked ones that "
            "its loss uses.",
        ),
    )
    average_count: int | None = None
    "see `average_shapes`"

    def __init__(self, recipe: IBOTRecipe, mean: Channels, std: Channels):
        super().__init__(recipe, mean, std)
        self.patch_center = Center(recipe.dino.prototypes, recipe.dino.center_momentum)

    def build_student(self, net: EncoderWithHead) -> EncoderWithHead:
        net.mask_token = nn.Parameter(torch.zeros(net.encoder.width))
        return net

    def views(self) -> Transform:
        return MaskedCrops(super().views(), self.student.encoder.grid, self.recipe.ibot)

    # The batch of iBOT has masks.
    def forward(self, batch: Batch, t: Progress) -> dict[str, Tensor]:  # type: ignore[override]
        student, teacher, temperature = self.student, self.teacher.model, self.teacher_temperature(t)
        prefix, student_temperature = student.encoder.prefix, self.recipe.dino.student_temperature
        masked = batch["masked"].transpose(0, 1)  # [v, b, n]
        ids = self.head_ids(masked)
        with torch.no_grad():
            tokens = self.tokens(teacher, batch["image"])  # [v, b, t, d]
            teacher_logits = teacher.head(tokens[:, :, 0])
            patch_logits = teacher.head(_select(tokens[:, :, prefix:], ids))
        self.center.accumulate(teacher_logits)
        self.patch_center.accumulate(patch_logits, None if ids is None else masked.flatten()[ids])
        target = self.target(teacher_logits, self.center, temperature)
        tokens = self.tokens(student, batch["image"], masked=(masked.flatten(0, 1), student.mask_token))
        classes = tokens[:, :, 0]
        if "local" in batch:
            classes = torch.cat([classes, self.tokens(student, batch["local"])[:, :, 0]])
        across = cross_view_loss(student.head(classes), target, student_temperature)
        predictions = student.head(_select(tokens[:, :, prefix:], ids))
        patch_target = self.target(patch_logits, self.patch_center, temperature)
        within = masked_patch_loss(predictions, patch_target, masked, student_temperature, ids)
        losses = {"loss": across + within, "across": across.detach(), "within": within.detach()}
        return losses | self.spread(teacher_logits, temperature)

    def head_ids(self, masked: Bool[Tensor, "v b n"]) -> Int[Tensor, " k"] | None:
        """Indices, among all patches of all views, to which the head is applied; None: to all of them."""
        if self.recipe.ibot.patch_head == "all":
            return None
        if self.average_count is not None:
            return torch.zeros(self.average_count, dtype=torch.long, device=masked.device)
        ids = masked.flatten().nonzero().squeeze(1)
        return ids if len(ids) else ids.new_zeros(1)  # without masked patches: one patch of weight 0

    def average_shapes(self, images: int) -> None:
        s = self.recipe.ibot
        low, high = s.masked_fraction
        self.average_count = round(2 * images * self.patches * s.masked_images * (low + high) / 2)

    def after_step(self, t: Progress, applied: Tensor) -> None:
        super().after_step(t, applied)
        self.patch_center.update(applied)

    @classmethod
    def figures(cls) -> tuple[Figure, ...]:
        text = (
            "Cross-entropy of the student's assignments with the teacher's: between views of an image, and "
            "on masked patches of the same view. Both fall below that of uniform assignments; only zero, or "
            "uniform assignments until the end, mean collapse."
        )
        loss, *others = super().figures()
        both = Curve("across", "views", "student"), Curve("within", "masked patches", "both")
        return (loss._replace(ylabel="cross-entropy", curves=both, caption=text), *others)

    @classmethod
    def judge(cls, means: Numbers, reference: Numbers) -> list[Sentence]:
        terms = {"across": "cross-entropy between views", "within": "cross-entropy on masked patches"}
        return [
            *(judge_cross_entropy(name, means[key], reference) for key, name in terms.items()),
            judge_spread(means, reference),
        ]


def _select(patches: Tensor, ids: Tensor | None) -> Tensor:
    return patches if ids is None else patches.flatten(0, 2)[ids]
