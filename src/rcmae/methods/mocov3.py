"""MoCo v3: contrastive learning between two views (Chen, Xie, He, ICCV 2021, arXiv 2104.02057).

    L = 2 tau (CE(q1 . k2 / tau) + CE(q2 . k1 / tau))

q: unit vectors from the student's encoder, projector and predictor; k: those from the teacher's encoder and
projector, for all images of the batch on all ranks. The positive is the other view of the same image.
"""

import math
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..config import Rules, Section
from ..engine.schedules import Progress
from ..models.heads import mlp
from .diagnostics import Curve, Figure, Numbers, Sentence
from .distillation import (
    Batch,
    EncoderWithHead,
    SelfDistillation,
    SelfDistillationRecipe,
    StudentWithPredictor,
)
from .distillation_losses import info_nce


@dataclass(frozen=True, kw_only=True)
class MoCoV3Settings(Section):
    """The contrastive loss."""

    student_temperature: float = 0.1
    "temperature of the contrastive loss"
    freeze_patches: bool = True
    "keep the patch embedding at its random initialization"

    def rules(self) -> Rules:
        return self.each("must be above 0", "student_temperature")


@dataclass(frozen=True, kw_only=True)
class MoCoV3Recipe(SelfDistillationRecipe):
    """The recipe of `mocov3`."""

    method: str = "mocov3"
    mocov3: MoCoV3Settings = MoCoV3Settings()


class MoCoV3(SelfDistillation):
    """Distinguishes the two views of an image from the views of all other images."""

    recipe_type = MoCoV3Recipe
    recipe: MoCoV3Recipe
    student: StudentWithPredictor

    @classmethod
    def micro_batch_statistics(cls, recipe: MoCoV3Recipe) -> str:
        return "the other images and the heads' statistics are those of a micro-batch"

    def build_head(self, inputs: int) -> nn.Module:
        h = self.recipe.head
        return _mlp(inputs, h.head_width, h.head_width, h.embedding)

    def build_student(self, net: EncoderWithHead) -> StudentWithPredictor:
        h = self.recipe.head
        if self.recipe.mocov3.freeze_patches:
            net.encoder.vit.patch_embed.requires_grad_(False)
        student = StudentWithPredictor(net, _mlp(h.embedding, h.head_width, h.embedding))
        if self.recipe.faithful:
            for layer in (*net.head.modules(), *student.predictor.modules()):
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()
            for weight in student.parameters():
                weight.decay = True  # type: ignore[attr-defined]  # read by engine.optim
        return student

    @classmethod
    def initialize(cls, vit: VisionTransformer) -> None:
        """Glorot's, also for queries, keys and values each and for the patch embedding; a class token near
        zero, and fixed positions."""
        for name, layer in vit.named_modules():
            if isinstance(layer, nn.Linear):
                parts = 3 if name.endswith("qkv") else 1
                bound = (6 / (layer.out_features / parts + layer.in_features)) ** 0.5
                nn.init.uniform_(layer.weight, -bound, bound)
                nn.init.zeros_(layer.bias)
        width, *patch = vit.patch_embed.proj.weight.shape
        bound = (6 / (width + math.prod(patch))) ** 0.5
        nn.init.uniform_(vit.patch_embed.proj.weight, -bound, bound)
        nn.init.zeros_(vit.patch_embed.proj.bias)
        assert vit.cls_token is not None  # see latent_rules
        nn.init.normal_(vit.cls_token, std=1e-6)

    def forward(self, batch: Batch, t: Progress) -> dict[str, Tensor]:
        tau = self.recipe.mocov3.student_temperature
        with torch.no_grad():
            k = self.project(self.teacher.model, batch["image"])  # two views [b, d]
        q = [self.student.predictor(z) for z in self.project(self.student.shared, batch["image"])]
        with torch.autocast(q[0].device.type, enabled=False):
            loss = info_nce(q[0].float(), k[1].float(), tau) + info_nce(q[1].float(), k[0].float(), tau)
        return {"loss": loss}

    def project(self, net: EncoderWithHead, images: Tensor) -> list[Tensor]:
        """The projections of each view; BatchNorm uses the statistics of a view."""
        return [net.head(tokens[:, 0]) for tokens in self.tokens(net, images)]

    def references(self, batch: Batch) -> dict[str, float]:
        """The loss if every image of the batch is equally likely to be the positive."""
        return {"chance": 4 * self.recipe.mocov3.student_temperature * math.log(self.recipe.optim.batch_size)}

    @classmethod
    def figures(cls) -> tuple[Figure, ...]:
        text = (
            "Contrastive loss: how hard it is to find the other view of an image among all images of the "
            "batch. Dashed: guessing at chance. The loss falls well below it; if it stays there, images are "
            "not distinguished."
        )
        loss, levels = Curve("loss", "", "student"), (("chance", "chance"),)
        return (Figure("figure-loss", "contrastive loss", (loss,), text, levels),)

    @classmethod
    def judge(cls, means: Numbers, reference: Numbers) -> list[Sentence]:
        loss, chance = means["loss"], reference.get("chance")
        text = f"The contrastive loss is {loss:.3f}"
        if not chance:
            return [("note", text + ".")]
        text += f"; finding the other view of an image by chance would score {chance:.3f}. "
        if loss > 0.95 * chance:
            text += "Images are not distinguished yet: normal early in a run, but not later."
            return [("bad", text)]
        return [("good", text + "Images are distinguished.")]


def _mlp(*widths: int) -> nn.Module:
    return mlp(list(widths), norm=True, activation=nn.ReLU, bias=False, last_norm=True)
