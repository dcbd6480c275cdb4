"""Masked auto-encoding (He et al., CVPR 2022, arXiv 2111.06377).

    L = mean over hidden patches of |s - x|^2 / p

x: the p pixel values of a patch, standardised by the patch's own mean and unbiased variance; s: the reconstruction from
the visible quarter.
"""

import json
from dataclasses import dataclass
from typing import ClassVar, Literal, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ..config import Images, Recipe, Rules, Section
from ..data.masking import random_order, visible_count
from ..data.views import flip, random_resized_crop
from ..engine.schedules import Progress
from ..models.autoencoder import AutoencoderNetwork, build
from ..models.backbone import Backbone
from ..models.patches import standardise, take
from .base import Method
from .diagnostics import Curve, Figure, Numbers, Sentence
from .reconstruction_loss import squared_errors


@dataclass(frozen=True, kw_only=True)
class MAESettings(Section):
    """Masked auto-encoding."""

    mask_ratio: float = 0.75
    "share of the patches that is hidden"
    target: Literal["normalised", "pixels"] = "normalised"
    "what a hidden patch is compared with: standardised by its own mean and variance, or plain pixels"
    target_eps: float = 1e-6
    "added to a patch's variance before it is divided by; larger on small patches, where flat ones are noise"

    def rules(self) -> Rules:
        return [
            (0 < self.mask_ratio < 1, f"mask_ratio must lie between 0 and 1, not {self.mask_ratio}"),
            (self.target_eps > 0, f"target_eps must be above 0, not {self.target_eps}"),
        ]


@dataclass(frozen=True, kw_only=True)
class MAERecipe(Recipe):
    """What `mae` is told."""

    method: str = "mae"
    network: AutoencoderNetwork = AutoencoderNetwork()
    mae: MAESettings = MAESettings()


class Batch(TypedDict):
    """What the views of b images make together."""

    image: UInt8[Tensor, "b c h w"]
    order: Int[Tensor, "b n"]
    "of the patches; the first ones are visible"


@dataclass(frozen=True)
class CropAndMask:
    """One random crop, and for each name in `orders` a random order of its patches (the visible ones first)."""

    images: Images
    patches: int
    orders: tuple[str, ...] = ("order",)

    def __call__(self, image: UInt8[np.ndarray, "h w c"], rng: np.random.Generator) -> dict[str, Tensor]:
        crop = random_resized_crop(image, self.images.shape, self.images.crop_scale, rng=rng)
        if self.images.flip:
            crop = flip(crop, rng)
        return {"image": crop} | {name: torch.from_numpy(random_order(self.patches, rng)) for name in self.orders}


class MAE(Method):
    """Masked auto-encoding."""

    recipe_type = MAERecipe
    recipe: MAERecipe
    losses: ClassVar[dict[str, str]] = {"loss": "loss", "reconstruction": "rec"}

    def __init__(self, recipe: MAERecipe, mean: tuple[float, ...], std: tuple[float, ...]):
        """`mean` and `std` standardise the pixels, a value a channel, in units of 0 to 1."""
        super().__init__()
        self.recipe = recipe
        self.standardise_by(mean, std)
        self.student = build(recipe.images, recipe.network)
        self.patch = self.student.encoder.patch
        gh, gw = self.student.encoder.grid
        self.patches = gh * gw
        self.visible = visible_count(self.patches, recipe.mae.mask_ratio)

    @classmethod
    def problems(cls, recipe: MAERecipe) -> list[str]:
        with torch.device("meta"):
            build(recipe.images, recipe.network)  # raises what does not fit together
        return []

    def views(self) -> CropAndMask:
        return CropAndMask(self.recipe.images, self.patches)

    def target(self, hidden: Float[Tensor, "b m p"]) -> Float[Tensor, "b m p"]:
        """What the hidden patches are compared with."""
        return standardise(hidden, self.recipe.mae.target_eps) if self.recipe.mae.target == "normalised" else hidden

    def encode(self, batch: Batch) -> Float[Tensor, "b t d"]:
        seen = batch["order"][:, : self.visible]
        return self.student.encoder(take(self.normalize_and_patchify(batch["image"]), seen), seen)

    def masked_anew(self, batch: Batch, generator: torch.Generator) -> Batch:
        order = torch.stack([torch.randperm(self.patches, generator=generator) for _ in batch["order"]])
        return batch | {"order": order.to(batch["order"].device)}

    def forward(self, batch: Batch, t: Progress) -> dict[str, Tensor]:
        patches, order = self.normalize_and_patchify(batch["image"]), batch["order"]
        prediction = self.student(patches, order, self.visible)
        return squared_errors(prediction, self.target(take(patches, order[:, self.visible :])))

    def backbone(self, which: str = "student") -> Backbone:
        return Backbone(self.student.encoder.vit, *self.statistics)

    @torch.no_grad()
    def references(self, batch: Batch) -> dict[str, float]:
        """The reconstruction loss of three guesses: nothing (0), each patch's own mean colour, the nearest visible patch."""
        patches, order = self.normalize_and_patchify(batch["image"]), batch["order"]
        seen, hidden = order[:, : self.visible], order[:, self.visible :]
        target = self.target(take(patches, hidden))
        colours = self.target(take(patches, hidden)).unflatten(2, (-1, self.recipe.images.channels)).mean(2, keepdim=True)
        gw = self.student.encoder.grid[1]
        (hy, hx), (sy, sx) = ((ids.unsqueeze(-1) // gw, ids.unsqueeze(-1) % gw) for ids in (hidden, seen))
        nearest = ((hy - sy.transpose(1, 2)) ** 2 + (hx - sx.transpose(1, 2)) ** 2).argmin(2)
        copied = self.target(take(take(patches, seen), nearest))
        guesses = {"zero": torch.zeros_like(target), "nearest_visible": copied}
        guesses["patch_mean"] = colours.expand(-1, -1, self.patch**2, -1).flatten(2)
        return {name: F.mse_loss(guess, target).item() for name, guess in guesses.items()}

    @torch.no_grad()
    def snapshot(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, str]]:
        order = batch["order"]
        tensors = {
            "image": batch["image"],
            "visible": order[:, : self.visible],
            "hidden": order[:, self.visible :],
            "student": self.student(self.normalize_and_patchify(batch["image"]), order, self.visible),
        }
        mean, std = self.statistics
        facts = {"patch": self.patch, "target": self.recipe.mae.target, "target_eps": self.recipe.mae.target_eps}
        return tensors, {k: str(v) for k, v in facts.items()} | {"mean": json.dumps(mean), "std": json.dumps(std)}

    @classmethod
    def figures(cls) -> tuple[Figure, ...]:
        text = (
            "Reconstruction loss on hidden patches. Dashed: what simple guesses score on these images. A quick fall and then a long slow "
        )
        levels = ("guessing nothing", "zero"), ("nearest visible patch", "nearest_visible"), ("true mean color", "patch_mean")
        student = Curve("reconstruction", "student", "student")
        return (Figure("figure-loss", "reconstruction loss", (student,), text + "one is normal.", levels, log=True),)

    @classmethod
    def judge(cls, means: Numbers, reference: Numbers) -> list[Sentence]:
        loss = means["reconstruction"]
        if not reference:
            return [("note", f"The reconstruction loss is {loss:.4f}.")]
        explained = 1 - loss / reference["zero"] if reference["zero"] else 0.0  # flat images hold nothing to explain
        share = f"{explained:.0%}" if explained >= 0.005 else "none"
        text = f"The reconstruction loss is {loss:.3f}. Guessing nothing would score {reference['zero']:.3f}, so {share} of what "
        text += f"is hidden is explained; painting each hidden patch in its own true mean color would score {reference['patch_mean']:.3f}, "
        text += f"and copying the nearest visible patch {reference['nearest_visible']:.3f}. "
        if explained <= 0.02:
            return [("bad", text + "Nothing is learned yet: early in a run that is normal, later it is not.")]
        return [("good", text + "That is a healthy loss: well below guessing, and never near zero, since hidden detail cannot be known.")]
