"""MoCo v3: contrast between two views (Chen, Xie, He, ICCV 2021, arXiv 2104.02057).

    L = 2 tau (CE(q1 . k2 / tau) + CE(q2 . k1 / tau))

q: unit vectors from encoder, projector and predictor of the student; k: from encoder and projector of the teacher, of all images
of the batch on all ranks; the right answer is the other view of the same image.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import Rules, Section
from ..data.augment import Crops
from ..engine.schedules import Progress
from ..models.heads import mlp
from .diagnostics import Curve, Figure, Numbers, Sentence
from .distillation import Batch, EncoderWithHead, SelfDistillation, SelfDistillationRecipe, StudentWithPredictor
from .distillation_losses import contrast


@dataclass(frozen=True, kw_only=True)
class MoCoV3Settings(Section):
    """The contrast."""

    student_temperature: float = 0.1
    "of the contrast"
    freeze_patches: bool = True
    "the patch embedding stays as it is drawn"

    def rules(self) -> Rules:
        return [(self.student_temperature > 0, f"student_temperature must be above 0, not {self.student_temperature}")]


@dataclass(frozen=True, kw_only=True)
class MoCoV3Recipe(SelfDistillationRecipe):
    """What `mocov3` is told."""

    method: str = "mocov3"
    crops: Crops = Crops(local_crops=0)
    mocov3: MoCoV3Settings = MoCoV3Settings()


class MoCoV3(SelfDistillation):
    """Tells the two views of an image from those of all others."""

    recipe_type = MoCoV3Recipe
    recipe: MoCoV3Recipe

    @classmethod
    def accumulation_caveat(cls, recipe: MoCoV3Recipe) -> str:
        return "the other images and the heads' statistics are those of a micro-batch"

    @classmethod
    def problems(cls, recipe: MoCoV3Recipe) -> list[str]:
        small = recipe.crops.local_crops
        return super().problems(recipe) + ([f"mocov3 has no small crops: give --local-crops 0, not {small}"] if small else [])

    def head(self, inputs: int) -> nn.Module:
        h = self.recipe.head
        return mlp([inputs, h.head_width, h.head_width, h.embedding], norm=True, activation=nn.ReLU, bias=False, last_norm=True)

    def build_student(self, net: EncoderWithHead) -> StudentWithPredictor:
        h = self.recipe.head
        if self.recipe.mocov3.freeze_patches:
            net.encoder.vit.patch_embed.requires_grad_(False)
        return StudentWithPredictor(
            net, mlp([h.embedding, h.head_width, h.embedding], norm=True, activation=nn.ReLU, bias=False, last_norm=True)
        )

    @property
    def ema_source(self) -> EncoderWithHead:
        return self.student.shared

    def forward(self, batch: Batch, t: Progress) -> dict[str, Tensor]:
        tau = self.recipe.mocov3.student_temperature
        with torch.no_grad():
            k = self.project(self.teacher.model, batch["image"])
        q = [self.student.predictor(z) for z in self.project(self.student.shared, batch["image"])]
        with torch.autocast(q[0].device.type, enabled=False):
            loss = contrast(q[0].float(), k[1].float(), tau) + contrast(q[1].float(), k[0].float(), tau)
        return {"loss": loss}

    def project(self, net: EncoderWithHead, images: Tensor) -> list[Tensor]:
        """The projections of each view: statistics are those of one view."""
        return [net.head(tokens[:, 0]) for tokens in self.tokens(net, images)]

    def references(self, batch: Batch) -> dict[str, float]:
        """The loss where every image of a whole batch is as likely the right one."""
        return {"chance": 4 * self.recipe.mocov3.student_temperature * math.log(self.recipe.optim.batch_size)}

    @classmethod
    def figures(cls) -> tuple[Figure, ...]:
        text = "Contrastive loss: how hard the other view of an image is to find among all images of the batch. Dashed: by chance, in a "
        text += "whole batch. It falls well below; a loss that stays there means that nothing is told apart."
        return (Figure("figure-loss", "contrastive loss", (Curve("loss", "", "student"),), text, (("chance", "chance"),)),)

    @classmethod
    def judge(cls, means: Numbers, reference: Numbers) -> list[Sentence]:
        loss, chance = means["loss"], reference.get("chance")
        text = f"The contrastive loss is {loss:.3f}"
        if not chance:
            return [("note", text + ".")]
        text += f"; finding the other view of an image by chance would score {chance:.3f}. "
        if loss > 0.95 * chance:
            return [("bad", text + "Nothing is told apart yet: early in a run that is normal, later it is not.")]
        return [("good", text + "Images are told apart.")]
