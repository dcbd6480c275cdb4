"""What the methods of self-distillation share: an encoder with a head, several crops of an image, and a mean teacher."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from ..data.augment import Crops, MultiCrop
from ..engine.distributed import average
from ..models.autoencoder import build_encoder
from ..models.encoder import Encoder
from ..models.heads import HeadSettings
from ..models.patches import take
from ..models.teacher import Teacher
from .diagnostics import Curve, Figure, Numbers, Sentence
from .mean_teacher import MeanTeacher, MeanTeacherRecipe


@dataclass(frozen=True, kw_only=True)
class SelfDistillationRecipe(MeanTeacherRecipe):
    """Of every method of self-distillation."""

    crops: Crops = Crops()
    head: HeadSettings = HeadSettings()


class Batch(TypedDict):
    """What the crops of b images make together."""

    image: UInt8[Tensor, "b 2 c h w"]
    "the two global crops"
    local: NotRequired[UInt8[Tensor, "b k c s s"]]
    "k small ones"


class EncoderWithHead(nn.Module):
    """An encoder and a projection head, which student and teacher both have."""

    def __init__(self, encoder: Encoder, head: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.head = head


class SelfDistillation(MeanTeacher):
    """Views of an image are told of each other by a teacher. Letters: v views, b images, t tokens, d width."""

    recipe: SelfDistillationRecipe

    def __init__(self, recipe: SelfDistillationRecipe, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.recipe = recipe
        self.standardise_by(mean, std)
        encoder = build_encoder(recipe.images, recipe.network)
        self.patch = encoder.patch
        self.patches = encoder.grid[0] * encoder.grid[1]
        self.student = self.build_student(EncoderWithHead(encoder, self.head(encoder.width)))
        self.teacher = Teacher(self.ema_source)

    @classmethod
    def problems(cls, recipe: SelfDistillationRecipe) -> list[str]:
        c, optim = recipe.crops, recipe.optim
        with torch.device("meta"):
            encoder = build_encoder(recipe.images, recipe.network)
        rules = [
            (encoder.vit.has_class_token, f"{recipe.method} reads the class token, which {recipe.network.model} has not"),
            (optim.batch_size >= 2, f"{recipe.method} compares images: give a batch_size of 2 or more, not {optim.batch_size}"),
            (
                not c.local_crops or c.local_size <= min(recipe.images.shape),
                f"local_size {c.local_size} is larger than the image, {min(recipe.images.shape)}",
            ),
            (
                not c.local_crops or c.local_size % encoder.patch == 0,
                f"local_size {c.local_size} is not a multiple of the patch, {encoder.patch}",
            ),
            (recipe.teacher.memory[1] != "auto", "half_life auto is steered by a reconstruction: give a length"),
        ]
        return [text for fine, text in rules if not fine]

    @abstractmethod
    def head(self, inputs: int) -> nn.Module:
        """What is put on an encoder of that width."""

    def build_student(self, net: EncoderWithHead) -> nn.Module:
        """The student, from the part that the teacher averages."""
        return net

    def views(self) -> MultiCrop:
        return MultiCrop(self.recipe.images, self.recipe.crops)

    def tokens(
        self, net: EncoderWithHead, images: UInt8[Tensor, "b v c h w"], ids: Int[Tensor, "vb k"] | None = None, masked=None
    ) -> Float[Tensor, "v b t d"]:
        """Views of a batch through an encoder; see `Encoder.forward` for `ids` and `masked`."""
        b, v, _, h, w = images.shape
        patches = self.normalize_and_patchify(images.transpose(0, 1).flatten(0, 1))
        if ids is not None:
            patches = take(patches, ids)
        return net.encoder(patches, ids, (h // self.patch, w // self.patch), masked).unflatten(0, (v, b))


class StudentWithPredictor(nn.Module):
    """A student with a part that the teacher has not: MoCo v3's predictor, MSN's prototypes."""

    def __init__(self, shared: EncoderWithHead, predictor: nn.Module):
        super().__init__()
        self.shared = shared
        self.predictor = predictor


class Center(nn.Module):
    """A running mean of the teacher's logits, over all ranks, updated once an applied optimizer step of any number of micro-batches."""

    def __init__(self, width: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(width))
        self.accumulated: list[Tensor] = []

    def accumulate(self, logits: Float[Tensor, "*s c"], counted: Bool[Tensor, " m"] | None = None) -> None:
        """Add the logits of a micro-batch to those of the step; `counted` says which rows count (default: all)."""
        rows = logits.detach().float().flatten(0, -2)
        weight = torch.ones(len(rows), device=rows.device) if counted is None else counted.float()
        self.accumulated.append(torch.cat([weight @ rows, weight.sum(0, keepdim=True)]))

    @torch.no_grad()
    def update(self, applied: Tensor) -> None:
        """Move to the mean over the step, and begin another step; `applied` as in `Method.after_step`."""
        # Sums and counts, not means: the same however rows fall to micro-batches and ranks.
        sums = average(torch.stack(self.accumulated).sum(0))
        self.accumulated.clear()
        total = sums[-1]
        mean = sums[:-1] / total.clamp_min(1e-6)
        self.value.copy_(torch.where((applied > 0) & (total > 0), torch.lerp(mean, self.value, self.momentum), self.value))


SPREAD = {"entropy": "entropy", "prototypes_used": "prototypes"}
"What `spread_of` finds, and its names on the line of progress."

LOOKED_AT = 256
"Rows of a step that `spread_of` looks at: what it costs does not grow with the batch."


def spread_of(p: Float[Tensor, "*s c"]) -> dict[str, Tensor]:
    """Of probabilities: their mean entropy in nats, and how many prototypes the mean of them uses (its perplexity).

    To be asked of what a teacher says before it is balanced: balancing uses all prototypes even if all images are alike.
    """
    p = p.detach().flatten(0, -2)[:LOOKED_AT].float()
    mean = p.mean(0)
    return {
        "entropy": -torch.special.xlogy(p, p).sum(1).mean(),
        "prototypes_used": (-torch.special.xlogy(mean, mean).sum()).exp(),
    }


def spread_figures() -> tuple[Figure, ...]:
    """The two numbers of `spread_of`."""
    used = (
        "How many prototypes the teacher's answers to a batch use, before they are balanced. At 1 all images get the same answer: collapse."
    )
    sure = "Entropy of one answer of the teacher. At the dashed line an answer is even and tells nothing; far below it the teacher is sure."
    return (
        Figure("figure-prototypes", "prototypes in use", (Curve("prototypes_used", "", "teacher"),), used, (("collapse", 1.0),), log=True),
        Figure("figure-entropy", "entropy, nats", (Curve("entropy", "", "teacher"),), sure, (("even", "even"),)),
    )


def judge_answers(name: str, loss: float, reference: Numbers, what: str = "answers") -> Sentence:
    """Of a cross-entropy in nats against the teacher's answers, called `name`."""
    text, even = f"The {name} is {loss:.3f} nats", reference.get("even")
    if even is None:
        return ("note", text + ".")
    text += f"; even {what} would score {even:.3f}. "
    if loss > even:
        return ("note", text + "It is above: sure and wrong. Early in a run that is normal; if it stays, lower --base-lr.")
    return ("note", text + "It falls slowly, and need not fall to the end: the teacher's answers become harder.")


def judge_spread(means: Numbers, reference: Numbers) -> Sentence:
    """Whether the teacher's answers tell images apart."""
    used, entropy, even = means["prototypes_used"], means["entropy"], reference.get("even")
    text = f"The teacher's answers to a batch use {used:,.1f} prototypes, with an entropy of {entropy:.2f} nats each"
    text += f" ({even:.2f} where an answer is even). " if even else ". "
    if used < 1.5:
        return ("bad", text + "All images get the same answer: collapsed.")
    if even and entropy > 0.98 * even:
        return ("note", text + "Nearly even answers tell little apart: early in a run that is normal, later it is not.")
    return ("good", text + "Images are told apart.")
