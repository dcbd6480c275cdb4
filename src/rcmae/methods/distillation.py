"""What the methods of self-distillation share: an encoder with a head, several crops of an image, and a mean
teacher."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
from jaxtyping import Bool, Float, Int, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..config import broken
from ..data.augment import Crops, LocalCrops, MultiCrop
from ..engine.distributed import average
from ..models.autoencoder import build_encoder
from ..models.backbone import Channels
from ..models.encoder import Encoder, WithEncoder, set_drop_path
from ..models.heads import HeadSettings
from ..models.patches import gather_tokens
from ..models.teacher import Teacher
from .base import Transform
from .diagnostics import Curve, Figure, Numbers, Sentence
from .mean_teacher import MeanTeacher, MeanTeacherRecipe, latent_rules


@dataclass(frozen=True, kw_only=True)
class SelfDistillationRecipe(MeanTeacherRecipe):
    """The recipe of every method of self-distillation."""

    faithful: bool = False
    """follow the method's reference code where this package has one rule for all methods: initialization,
    positions, clipping, weight decay, schedules (docs/methods/ has the list)"""
    drop_path: float = 0.0
    "rate at which the student's last block is skipped for an image (drop path); it grows linearly from 0"
    crops: Crops = Crops()
    head: HeadSettings = HeadSettings()


class Batch(TypedDict):
    """The crops of b images."""

    image: UInt8[Tensor, "b 2 c h w"]
    "two global crops"
    local: NotRequired[UInt8[Tensor, "b k c s s"]]
    "k local crops"


class EncoderWithHead(WithEncoder):
    """An encoder and a projection head, which both student and teacher have."""

    mask_token: nn.Parameter
    "iBOT only: replaces masked patches in the student"

    def __init__(self, encoder: Encoder, head: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.head = head


class SelfDistillation(MeanTeacher):
    """Matches the student's output on one view of an image to the teacher's on another. Letters: v views,
    b images, t tokens, d width."""

    pool = "cls"
    recipe: SelfDistillationRecipe
    student: "EncoderWithHead | StudentWithPredictor"
    teacher: Teacher[EncoderWithHead]

    def __init__(self, recipe: SelfDistillationRecipe, mean: Channels, std: Channels):
        super().__init__(recipe, mean, std)
        encoder = build_encoder(recipe.images, recipe.network)
        if recipe.faithful:
            self.initialize(encoder.vit)
        set_drop_path(encoder.vit, recipe.drop_path)
        self.patch = encoder.patch
        self.patches = math.prod(encoder.grid)
        self.student = self.build_student(EncoderWithHead(encoder, self.build_head(encoder.width)))
        self.teacher = Teacher(self.ema_source)

    @property
    def ema_source(self) -> EncoderWithHead:
        student = self.student
        return student.shared if isinstance(student, StudentWithPredictor) else student

    @classmethod
    def initialize(cls, vit: VisionTransformer) -> None:
        """The initialization of the reference code, here that of DINO, iBOT and MSN: normal weights and
        trained positions."""
        for layer in vit.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        vit.patch_embed.proj.reset_parameters()
        for weight in (vit.cls_token, vit.pos_embed):
            if weight is not None:
                nn.init.trunc_normal_(weight.requires_grad_(True), std=0.02)

    @classmethod
    def accumulation_caveat(cls, recipe: SelfDistillationRecipe) -> str:
        paths = "the dropped paths are those of a micro-batch" if recipe.drop_path else ""
        return " and ".join(part for part in (cls.micro_batch_statistics(recipe), paths) if part)

    @classmethod
    def validate(cls, recipe: SelfDistillationRecipe) -> list[str]:
        c, optim = recipe.crops, recipe.optim
        with torch.device("meta"):
            encoder = build_encoder(recipe.images, recipe.network)
        rules = [
            *latent_rules(recipe, encoder),
            (0 <= recipe.drop_path < 1, f"drop_path must lie in 0 to below 1, not {recipe.drop_path}"),
            (
                optim.batch_size >= 2,
                f"{recipe.method} compares images: give a batch_size of 2 or more, not {optim.batch_size}",
            ),
        ]
        if isinstance(c, LocalCrops) and c.local_crops:
            shortest = min(recipe.images.shape)
            rules += [
                (c.local_size <= shortest, f"local_size {c.local_size} is larger than the image, {shortest}"),
                (
                    c.local_size % encoder.patch == 0,
                    f"local_size {c.local_size} is not a multiple of the patch, {encoder.patch}",
                ),
            ]
        return broken(rules)

    @abstractmethod
    def build_head(self, inputs: int) -> nn.Module:
        """The head for an encoder of this width."""

    def build_student(self, net: EncoderWithHead) -> "EncoderWithHead | StudentWithPredictor":
        """The student around `net`, the part that the teacher averages."""
        return net

    def views(self) -> Transform:
        return MultiCrop(self.recipe.images, self.recipe.crops)

    def tokens(
        self,
        net: EncoderWithHead,
        images: UInt8[Tensor, "b v c h w"],
        ids: Int[Tensor, "vb k"] | None = None,
        masked: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "v b t d"]:
        """The encoder's tokens for all views of a batch; see `Encoder.forward` for `ids` and `masked`."""
        b, v, _, h, w = images.shape
        patches = self.normalize_and_patchify(images.transpose(0, 1).flatten(0, 1))  # [vb, n, p]
        if ids is not None:
            patches = gather_tokens(patches, ids)  # [vb, k, p]
        return net.encoder(patches, ids, (h // self.patch, w // self.patch), masked).unflatten(0, (v, b))


class StudentWithPredictor(nn.Module):
    """A student with a part that the teacher does not have: a predictor, or MSN's prototypes."""

    def __init__(self, shared: EncoderWithHead, predictor: nn.Module):
        super().__init__()
        self.shared = shared
        self.predictor = predictor


class Center(nn.Module):
    """A running mean of the teacher's logits over all ranks, updated once per optimizer step."""

    value: Tensor

    def __init__(self, width: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(width))
        self.accumulated: list[Tensor] = []

    def accumulate(self, logits: Float[Tensor, "*s c"], counted: Bool[Tensor, " m"] | None = None) -> None:
        """Add the logits of a micro-batch to the mean of this step; `counted` selects rows (default: all)."""
        rows = logits.detach().float().flatten(0, -2)  # [m, c]
        weight = torch.ones(len(rows), device=rows.device) if counted is None else counted.float()
        self.accumulated.append(torch.cat([weight @ rows, weight.sum(0, keepdim=True)]))  # [c + 1]

    @torch.no_grad()
    def update(self, applied: Tensor) -> None:
        """Move towards the mean of this step, unless `applied` is 0 (see `Method.after_step`)."""
        # Sums and counts instead of means: micro-batches and ranks may differ in their number of rows.
        sums = average(torch.stack(self.accumulated).sum(0))
        self.accumulated.clear()
        count = sums[-1]
        mean = sums[:-1] / count.clamp_min(1e-6)
        moved = torch.lerp(mean, self.value, self.momentum)
        self.value.copy_(torch.where((applied > 0) & (count > 0), moved, self.value))


SPREAD_METRICS = {"entropy": "entropy", "prototypes_used": "prototypes"}
"Keys of `spread_metrics` and their names in the progress line."

SPREAD_ROWS = 256
"Rows per step that `spread_metrics` uses, so that its cost does not grow with the batch."


def spread_metrics(p: Float[Tensor, "*s c"]) -> dict[str, Tensor]:
    """The mean entropy of assignments in nats, and the number of prototypes that a batch uses (the perplexity
    of its mean assignment).

    `p` are the teacher's assignments before Sinkhorn-Knopp, which uses all prototypes even if all images
    collapse to the same output.
    """
    p = p.detach().flatten(0, -2)[:SPREAD_ROWS].float()  # [m, c]
    mean = p.mean(0)
    return {
        "entropy": -torch.special.xlogy(p, p).sum(1).mean(),
        "prototypes_used": (-torch.special.xlogy(mean, mean).sum()).exp(),
    }


def spread_figures() -> tuple[Figure, ...]:
    """Figures of `spread_metrics`."""
    used = (
        "Number of prototypes that the teacher's assignments of a batch use, before balancing. At 1 all "
        "images get the same assignment: collapse."
    )
    confidence = (
        "Entropy of the teacher's assignments. At the dashed line they are uniform and carry no information; "
        "far below it the teacher is confident."
    )
    entropy, prototypes = ((Curve(key, "", "teacher"),) for key in SPREAD_METRICS)
    return (
        Figure("figure-prototypes", "prototypes in use", prototypes, used, (("collapse", 1.0),), log=True),
        Figure("figure-entropy", "entropy, nats", entropy, confidence, (("uniform", "even"),)),
    )


def judge_cross_entropy(name: str, loss: float, reference: Numbers) -> Sentence:
    """A sentence on the cross-entropy `name`, in nats, with the teacher's assignments."""
    text, uniform = f"The {name} is {loss:.3f} nats", reference.get("even")
    if uniform is None:
        return ("note", text + ".")
    text += f"; uniform assignments would score {uniform:.3f}. "
    if loss > uniform:
        text += "It is higher, since the student is confident and wrong: normal early in a run; if it stays, "
        return ("note", text + "lower --base-lr.")
    text += "It falls slowly, and may rise again as the teacher's targets become harder."
    return ("note", text)


def judge_spread(means: Numbers, reference: Numbers) -> Sentence:
    """A sentence on whether the teacher's assignments distinguish images."""
    used, entropy, uniform = means["prototypes_used"], means["entropy"], reference.get("even")
    text = (
        f"The teacher's assignments of a batch use {used:,.1f} prototypes and have a mean entropy of "
        f"{entropy:.2f} nats"
    )
    text += f" ({uniform:.2f} if uniform). " if uniform else ". "
    if used < 1.5:
        return ("bad", text + "All images get the same assignment: collapse.")
    if uniform and entropy > 0.98 * uniform:
        text += "Nearly uniform assignments hardly distinguish images: normal early in a run, but not later."
        return ("note", text)
    return ("good", text + "Images are distinguished.")
