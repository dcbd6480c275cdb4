"""MoCo v3: contrast between two views (Chen, Xie, He, ICCV 2021, arXiv 2104.02057).

    L = 2 tau (CE(q1 . k2 / tau) + CE(q2 . k1 / tau))

q: unit vectors from encoder, projector and predictor of the student; k: from encoder and projector of the teacher, of all images
of the batch on all ranks; the right answer is the other view of the same image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import Rules, Section
from ..data.augment import Crops
from ..engine.schedules import Progress
from ..models.heads import mlp
from .distillation import SelfDistillation, SelfDistillationRecipe, Siamese, Student
from .losses import contrast


@dataclass(frozen=True, kw_only=True)
class Settings(Section):
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
    mocov3: Settings = Settings()


class MoCoV3(SelfDistillation):
    """Tells the two views of an image from those of all others."""

    recipe_type = MoCoV3Recipe
    recipe: MoCoV3Recipe

    @classmethod
    def whole_batch(cls, recipe: MoCoV3Recipe) -> str:
        return "the other images and the heads' statistics are those of a micro-batch"

    @classmethod
    def problems(cls, recipe: MoCoV3Recipe) -> list[str]:
        small = recipe.crops.local_crops
        return super().problems(recipe) + ([f"mocov3 has no small crops: give --local-crops 0, not {small}"] if small else [])

    def head(self, inputs: int) -> nn.Module:
        h = self.recipe.head
        return mlp([inputs, h.head_width, h.head_width, h.embedding], norm=True, activation=nn.ReLU, bias=False, last_norm=True)

    def grow(self, net: Siamese) -> Student:
        h = self.recipe.head
        if self.recipe.mocov3.freeze_patches:
            net.encoder.vit.patch_embed.requires_grad_(False)
        return Student(net, mlp([h.embedding, h.head_width, h.embedding], norm=True, activation=nn.ReLU, bias=False, last_norm=True))

    @property
    def followed(self) -> Siamese:
        return self.student.trunk

    def forward(self, batch: dict[str, Tensor], t: Progress) -> dict[str, Tensor]:
        tau = self.recipe.mocov3.student_temperature
        with torch.no_grad():
            k = self.project(self.teacher.model, batch["image"])
        q = [self.student.top(z) for z in self.project(self.student.trunk, batch["image"])]
        with torch.autocast(q[0].device.type, enabled=False):
            loss = contrast(q[0].float(), k[1].float(), tau) + contrast(q[1].float(), k[0].float(), tau)
        return {"loss": loss}

    def project(self, net: Siamese, images: Tensor) -> list[Tensor]:
        """The projections of each view: statistics are those of one view."""
        return [net.head(tokens[:, 0]) for tokens in self.tokens(net, images)]
