"""Masked auto-encoding (He et al., CVPR 2022, arXiv 2111.06377).

    L = mean over hidden patches of |s - x|^2 / p

x: the p pixel values of a patch, standardized by the mean and unbiased variance of the patch; s: the
reconstruction from the visible quarter of the patches.
"""

import json
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NotRequired, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ..config import Images, Recipe, Rules, Section
from ..data.masking import random_order, visible_count
from ..data.views import Image, Stored, random_crop
from ..engine.schedules import Progress
from ..models.autoencoder import Autoencoder, AutoencoderNetwork, build
from ..models.backbone import Backbone, Channels
from ..models.patches import gather_tokens, standardize
from .base import Method
from .diagnostics import Curve, Figure, Numbers, Sentence
from .reconstruction_loss import squared_errors


@dataclass(frozen=True, kw_only=True)
class MAESettings(Section):
    """Masked auto-encoding."""

    mask_ratio: float = 0.75
    "fraction of masked patches"
    target: Literal["normalized", "pixels"] = "normalized"
    "target of a hidden patch: its pixels, standardized by the mean and variance of the patch, or as they are"
    target_eps: float = 1e-6
    "added to the variance that standardizes a patch; raise it for small patches, where flat ones are noise"

    def rules(self) -> Rules:
        eps = self.each("must be above 0", "target_eps")
        return [*self.each("must lie between 0 and 1", "mask_ratio"), *eps]


@dataclass(frozen=True, kw_only=True)
class MAERecipe(Recipe):
    """The recipe of `mae`."""

    method: str = "mae"
    network: AutoencoderNetwork = AutoencoderNetwork()
    mae: MAESettings = MAESettings()


class Batch(TypedDict):
    """The views of b images."""

    image: UInt8[Tensor, "b c h w"]
    order: Int[Tensor, "b n"]
    "order of the patches; the first ones are visible"
    teacher_order: NotRequired[Int[Tensor, "b n"]]
    "RC-MAE with different masks: the order for the teacher"


@dataclass(frozen=True)
class CropAndMask:
    """One random crop, and a random order of its patches (visible ones first) under each name in `orders`."""

    images: Images
    patches: int
    orders: tuple[str, ...] = ("order",)

    def __call__(self, image: Image | Stored, rng: np.random.Generator) -> dict[str, Any]:
        crop = random_crop(image, self.images, rng)
        return {"image": crop} | {k: torch.from_numpy(random_order(self.patches, rng)) for k in self.orders}


class MAE(Method):
    """Masked auto-encoding."""

    recipe_type = MAERecipe
    recipe: MAERecipe
    student: Autoencoder
    losses: ClassVar[dict[str, str]] = {"loss": "loss", "reconstruction": "rec"}

    def __init__(self, recipe: MAERecipe, mean: Channels, std: Channels):
        super().__init__(recipe, mean, std)
        self.student = build(recipe.images, recipe.network)
        self.patch = self.student.encoder.patch
        gh, gw = self.student.encoder.grid
        self.patches = gh * gw
        self.visible = visible_count(self.patches, recipe.mae.mask_ratio)

    @classmethod
    def validate(cls, recipe: MAERecipe) -> list[str]:
        with torch.device("meta"):
            build(recipe.images, recipe.network)  # raises ConfigError for sizes that do not fit together
        return []

    def views(self) -> CropAndMask:
        return CropAndMask(self.recipe.images, self.patches)

    def target(self, hidden: Float[Tensor, "b m p"]) -> Float[Tensor, "b m p"]:
        s = self.recipe.mae
        return standardize(hidden, s.target_eps) if s.target == "normalized" else hidden

    def encode(self, batch: Batch) -> Float[Tensor, "b t d"]:
        ids = batch["order"][:, : self.visible]
        return self.student.encoder(gather_tokens(self.normalize_and_patchify(batch["image"]), ids), ids)

    def remask(self, batch: Batch, generator: torch.Generator) -> Batch:
        order = torch.stack([torch.randperm(self.patches, generator=generator) for _ in batch["order"]])
        return {**batch, "order": order.to(batch["order"].device)}

    def forward(self, batch: Batch, t: Progress) -> dict[str, Tensor]:
        patches, order = self.normalize_and_patchify(batch["image"]), batch["order"]
        prediction = self.student(patches, order, self.visible)  # [b, m, p]
        return squared_errors(prediction, self.target(gather_tokens(patches, order[:, self.visible :])))

    def backbone(self, which: str = "student") -> Backbone:
        return Backbone(self.student.encoder.vit, *self.statistics)

    @torch.no_grad()
    def references(self, batch: Batch) -> dict[str, float]:
        """The reconstruction loss of three baselines: zero, the mean color of each patch, and the nearest
        visible patch."""
        patches, order = self.normalize_and_patchify(batch["image"]), batch["order"]
        visible, hidden = order[:, : self.visible], order[:, self.visible :]
        target = self.target(gather_tokens(patches, hidden))  # [b, m, p]
        pixels = target.unflatten(2, (-1, self.recipe.images.channels))  # [b, m, pixels, c]
        gw = self.student.encoder.grid[1]
        (hy, hx), (vy, vx) = ((ids.unsqueeze(-1) // gw, ids.unsqueeze(-1) % gw) for ids in (hidden, visible))
        nearest = ((hy - vy.transpose(1, 2)) ** 2 + (hx - vx.transpose(1, 2)) ** 2).argmin(2)  # [b, m]
        baselines = {
            "zero": torch.zeros_like(target),
            "nearest_visible": self.target(gather_tokens(gather_tokens(patches, visible), nearest)),
            "patch_mean": pixels.mean(2, keepdim=True).expand_as(pixels).flatten(2),
        }
        return {name: F.mse_loss(baseline, target).item() for name, baseline in baselines.items()}

    @torch.no_grad()
    def snapshot(
        self, batch: Batch, mask_ratio: float | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        order = batch["order"]
        visible = self.visible if mask_ratio is None else visible_count(self.patches, mask_ratio)
        tensors = {
            "image": batch["image"],
            "visible": order[:, :visible],
            "hidden": order[:, visible:],
            "student": self.student(self.normalize_and_patchify(batch["image"]), order, visible),
        }
        s, (mean, std) = self.recipe.mae, self.statistics
        return tensors, {
            "patch": str(self.patch),
            "target": s.target,
            "target_eps": str(s.target_eps),
            "mean": json.dumps(mean),
            "std": json.dumps(std),
        }

    @classmethod
    def figures(cls) -> tuple[Figure, ...]:
        text = (
            "Reconstruction loss on hidden patches. Dashed: the loss of simple baselines on these images. A "
            "quick fall and then a long slow one is normal."
        )
        levels = (
            ("zero", "zero"),
            ("nearest visible patch", "nearest_visible"),
            ("true mean color", "patch_mean"),
        )
        student = Curve("reconstruction", "student", "student")
        return (Figure("figure-loss", "reconstruction loss", (student,), text, levels, log=True),)

    @classmethod
    def judge(cls, means: Numbers, reference: Numbers) -> list[Sentence]:
        loss = means["reconstruction"]
        if not reference:
            return [("note", f"The reconstruction loss is {loss:.4f}.")]
        explained = 1 - loss / reference["zero"] if reference["zero"] else 0.0  # 0 for flat images
        fraction = f"{explained:.0%}" if explained >= 0.005 else "none"
        text = (
            f"The reconstruction loss is {loss:.3f}. Predicting zero would score {reference['zero']:.3f}, so "
            f"{fraction} of the variance of hidden patches is explained; predicting the true mean color of "
            f"each patch would score {reference['patch_mean']:.3f}, and copying the nearest visible patch "
            f"{reference['nearest_visible']:.3f}. "
        )
        if explained <= 0.02:
            return [("bad", text + "Nothing is learned yet: normal early in a run, but not later.")]
        text += (
            "That is healthy: the model does better than predicting zero, and hidden detail cannot be known."
        )
        return [("good", text)]
