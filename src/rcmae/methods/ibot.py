"""iBOT: image BERT pre-training with an online tokenizer (Zhou et al., ICLR 2022, arXiv 2111.07832).

    L = DINO's loss + mean over masked patches of  - softmax((t - center') / tt) . log softmax(s / ts)

The student sees the global crops with patches replaced by a token, and is asked what the teacher says of those patches. One head
for class tokens and patches, a center for each.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor, nn

from ..config import Rules, Section
from ..data.augment import MultiCrop
from ..data.masking import block_mask, random_order
from ..engine.schedules import Progress
from .diagnostics import Curve, Figure, Numbers, Sentence, Variant
from .dino import DINO, DINORecipe
from .distillation import SPREAD, Center, EncoderWithHead, judge_answers, judge_spread
from .distillation import Batch as Crops
from .distillation_losses import across_views, masked_patches


@dataclass(frozen=True, kw_only=True)
class IBOTSettings(Section):
    """What iBOT adds to DINO: masked patches."""

    masked_images: float = 0.5
    "share of the global crops of which patches are masked"
    masked_share: tuple[float, float] = (0.1, 0.5)
    "share of the patches of such a crop that is masked"
    mask_shape: Literal["block", "random"] = "block"
    "how masked patches lie"
    patch_head: Literal["all", "masked"] = "all"
    "patches that the head is put on: all, as the reference code does, or the masked ones, on which alone the loss is"

    def rules(self) -> Rules:
        low, high = self.masked_share
        return [
            (0 <= low <= high <= 1, f"masked_share must satisfy 0 <= low <= high <= 1, not {self.masked_share}"),
            (0 <= self.masked_images <= 1, f"masked_images is a share, from 0 to 1, not {self.masked_images}"),
        ]


@dataclass(frozen=True, kw_only=True)
class IBOTRecipe(DINORecipe):
    """What `ibot` is told."""

    method: str = "ibot"
    ibot: IBOTSettings = IBOTSettings()


class Batch(Crops):
    """Crops, and what is masked."""

    masked: Bool[Tensor, "b 2 n"]
    "patches of the global crops that the student does not see"


@dataclass(frozen=True)
class MaskedCrops:
    """Crops, and under "masked" which patches of the two global ones the student does not see."""

    crops: MultiCrop
    grid: tuple[int, int]
    settings: IBOTSettings

    def __call__(self, image: UInt8[np.ndarray, "h w c"], rng: np.random.Generator) -> dict[str, Tensor]:
        return self.crops(image, rng) | {"masked": torch.stack([self._mask(rng) for _ in range(2)])}

    def _mask(self, rng: np.random.Generator) -> Tensor:
        n = self.grid[0] * self.grid[1]
        count = round(n * rng.uniform(*self.settings.masked_share)) if rng.random() < self.settings.masked_images else 0
        if self.settings.mask_shape == "block":
            return torch.from_numpy(block_mask(self.grid, count, rng)).flatten()
        mask = torch.zeros(n, dtype=torch.bool)
        mask[torch.from_numpy(random_order(n, rng))[:count]] = True
        return mask


class IBOT(DINO):
    """DINO that also foretells masked patches."""

    recipe_type = IBOTRecipe
    recipe: IBOTRecipe
    losses: ClassVar[dict[str, str]] = {"loss": "loss", "across": "views", "within": "patches"} | SPREAD
    variants: ClassVar[tuple[Variant, ...]] = (
        Variant(
            "ibot, head on masked", {"patch_head": "masked"},
            "iBOT stands here twice: with its head on all patches, as in its code, and on the masked ones, which its loss reads.",
        ),
    )  # fmt: skip

    def __init__(self, recipe: IBOTRecipe, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__(recipe, mean, std)
        self.patch_center = Center(recipe.dino.prototypes, recipe.dino.centre_momentum)

    def build_student(self, net: EncoderWithHead) -> EncoderWithHead:
        net.mask_token = nn.Parameter(torch.zeros(net.encoder.width))
        return net

    def views(self) -> MaskedCrops:
        return MaskedCrops(super().views(), self.student.encoder.grid, self.recipe.ibot)

    def forward(self, batch: Batch, t: Progress) -> dict[str, Tensor]:
        teacher, temperature, prefix = self.teacher.model, self.teacher_temperature(t), self.student.encoder.prefix
        masked = batch["masked"].transpose(0, 1)  # v b n
        chosen = self.chosen(masked)
        with torch.no_grad():
            seen = self.tokens(teacher, batch["image"])
            teacher_logits, patch_logits = teacher.head(seen[:, :, 0]), teacher.head(_at(seen[:, :, prefix:], chosen))
        self.center.accumulate(teacher_logits)
        self.patch_center.accumulate(patch_logits, None if chosen is None else masked.flatten()[chosen])
        target = self.target(teacher_logits, self.center, temperature)
        tokens = self.tokens(self.student, batch["image"], masked=(masked.flatten(0, 1), self.student.mask_token))
        classes = tokens[:, :, 0]
        if "local" in batch:
            classes = torch.cat([classes, self.tokens(self.student, batch["local"])[:, :, 0]])
        ts = self.recipe.dino.student_temperature
        across = across_views(self.student.head(classes), target, ts)
        foretold = self.student.head(_at(tokens[:, :, prefix:], chosen))
        within = masked_patches(foretold, self.target(patch_logits, self.patch_center, temperature), masked, ts, chosen)
        return {"loss": across + within, "across": across.detach(), "within": within.detach()} | self.spread(teacher_logits, temperature)

    def chosen(self, masked: Bool[Tensor, "v b n"]) -> Int[Tensor, " k"] | None:
        """Places, among all patches of all views, on which the head is put; None: on every one."""
        if self.recipe.ibot.patch_head == "all":
            return None
        places = masked.flatten().nonzero().squeeze(1)
        return places if len(places) else places.new_zeros(1)  # nobody masked anything: one patch, of no weight

    def average_shapes(self, images: int) -> None:
        d = self.recipe.ibot
        if d.patch_head == "masked":
            low, high = d.masked_share
            count = round(2 * images * self.patches * d.masked_images * (low + high) / 2)
            self.chosen = lambda masked: torch.zeros(count, dtype=torch.long)

    def after_step(self, t: Progress, applied: Tensor) -> None:
        super().after_step(t, applied)
        self.patch_center.update(applied)

    @classmethod
    def figures(cls) -> tuple[Figure, ...]:
        text = "Cross-entropy of the student's answers against the teacher's: on whole views against other views, and on masked patches of "
        text += "the same view. Both fall below even answers; only zero, or even answers to the end, mean collapse."
        loss, *others = super().figures()
        both = Curve("across", "views", "student"), Curve("within", "masked patches", "both")
        return (loss._replace(ylabel="cross-entropy", curves=both, caption=text), *others)

    @classmethod
    def judge(cls, means: Numbers, reference: Numbers) -> list[Sentence]:
        terms = {"across": "cross-entropy between views", "within": "cross-entropy on masked patches"}
        return [*(judge_answers(name, means[key], reference) for key, name in terms.items()), judge_spread(means, reference)]


def _at(patches: Tensor, places: Tensor | None) -> Tensor:
    return patches if places is None else patches.flatten(0, 2)[places]
