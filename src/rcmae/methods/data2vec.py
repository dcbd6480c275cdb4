"""data2vec 2.0 for images: masked latent prediction with contextualized targets (Baevski et al., ICML 2023,
arXiv 2212.07525).

    y = layer norm (mean over the top K blocks of instance norm (feed-forward output))
    L = mean over masks and hidden patches of |s - y|^2 / sqrt(d)  +  w * |c - mean y|^2 / sqrt(d)

y: the target of a patch, from the teacher on the full image; s: the prediction of a small convolutional
decoder at a hidden patch, from the student's tokens of the visible ones; c: the student's class token. All
masks of an image share one forward pass of the teacher. Letters: b images, k masks, n patches, v visible,
m hidden, d width.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from ..config import Images, Rules, Section, broken
from ..data.masking import visible_count
from ..data.views import Image, Stored, random_crop
from ..engine.schedules import Progress
from ..models.autoencoder import build_encoder
from ..models.backbone import Channels
from ..models.encoder import Encoder
from ..models.patches import gather_tokens
from ..models.teacher import Teacher
from .base import RECORDED_VALUES
from .diagnostics import Curve, Figure, Numbers, Sentence
from .distillation import EncoderWithHead, StudentWithPredictor
from .mean_teacher import MeanTeacher, MeanTeacherRecipe, TeacherSettings, latent_rules


@dataclass(frozen=True, kw_only=True)
class Data2VecSettings(Section):
    """Masked latent prediction."""

    masks: int = 16
    "masks per image, which share a forward pass of the teacher"
    hidden_fraction: float = 0.8
    "fraction of the patches that a mask hides"
    square: int = 3
    "side, in patches, of the visible squares"
    top_blocks: int | None = None
    """number of last teacher blocks whose feed-forward outputs are averaged as the target; default: all but
    the first sixth (10 of 12)"""
    class_weight: float = 0.01
    "weight of the loss of the class token"
    conv_depth: int = 6
    "convolutions of the decoder"
    conv_width: int | None = None
    "width of the convolutions; default: the encoder's"
    conv_kernel: int = 3
    "kernel size of the convolutions, an odd number of patches"
    conv_groups: int | None = None
    "groups of the convolutions; default: the greatest common divisor of 16 and both widths"
    noise: float = 0.01
    "standard deviation of the noise that the decoder reads at hidden patches"
    ema_end: float = 0.99999
    "the teacher's final momentum, with schedule linear"
    ema_steps: int = 100_000
    "optimizer steps in which the momentum rises linearly to `ema_end`"

    def rules(self) -> Rules:
        counts = ("masks", "square", "top_blocks", "conv_depth", "conv_width", "conv_groups", "ema_steps")
        return [
            *self.each("must be 1 or more", *counts),
            *self.each("must lie between 0 and 1", "hidden_fraction"),
            *self.each("must be 0 or more", "class_weight", "noise"),
            *self.each("must lie in 0 to 1", "ema_end"),
            (
                self.conv_kernel % 2 == 1 and self.conv_kernel > 0,
                f"conv_kernel must be an odd number, not {self.conv_kernel}",
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class Data2VecRecipe(MeanTeacherRecipe):
    """The recipe of `data2vec`."""

    method: str = "data2vec"
    teacher: TeacherSettings = TeacherSettings(schedule="linear", momentum=0.9998)
    data2vec: Data2VecSettings = Data2VecSettings()


def squares_mask(
    grid: tuple[int, int], count: int, side: int, rng: np.random.Generator
) -> Bool[np.ndarray, "gh gw"]:
    """Exactly `count` visible patches in squares of `side` x `side` patches around random centers.

    Squares may overlap, and are cropped at the edge; only a random part of the last one may be visible.
    """
    visible = np.zeros(grid, dtype=bool)
    while (missing := count - int(visible.sum())) > 0:
        top, left = rng.integers(grid) - side // 2
        square = np.zeros(grid, dtype=bool)
        square[max(top, 0) : top + side, max(left, 0) : left + side] = True
        new = rng.permutation(np.flatnonzero(square & ~visible))[:missing]
        visible.flat[new] = True
    return visible


class Batch(TypedDict):
    """The views of b images."""

    image: UInt8[Tensor, "b c h w"]
    orders: Int[Tensor, "b k n"]
    "an order of the patches for each mask; the first ones are visible"


def mask_order(
    grid: tuple[int, int], visible: int, side: int, rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """An order of the patches with the `visible` ones first. Both parts are shuffled, since the decoder's
    noise depends on the index of a hidden patch."""
    mask = squares_mask(grid, visible, side, rng).ravel()
    return np.concatenate([rng.permutation(np.flatnonzero(part)) for part in (mask, ~mask)])


@dataclass(frozen=True)
class CropAndMasks:
    """One random crop, and under "orders" an order of its patches for each of `masks` masks."""

    images: Images
    grid: tuple[int, int]
    masks: int
    visible: int
    side: int

    def __call__(self, image: Image | Stored, rng: np.random.Generator) -> dict[str, Any]:
        crop = random_crop(image, self.images, rng)
        orders = [mask_order(self.grid, self.visible, self.side, rng) for _ in range(self.masks)]
        return {"image": crop, "orders": torch.from_numpy(np.stack(orders))}


class ConvDecoder(nn.Module):
    """Convolutions on the grid of patches: the student's tokens at visible patches, noise at hidden ones."""

    noise: Tensor

    def __init__(
        self, s: Data2VecSettings, grid: tuple[int, int], hidden: int, inputs: int, width: int, groups: int
    ):
        super().__init__()
        self.grid = grid
        # A fixed table, so that the noise depends neither on micro-batches nor on a resume.
        self.register_buffer("noise", s.noise * torch.randn(hidden, inputs))
        widths, k = [inputs] + [width] * s.conv_depth, s.conv_kernel
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, k, padding=k // 2, groups=groups) for a, b in itertools.pairwise(widths)
        )
        self.predict = nn.Linear(width, inputs)

    def forward(self, tokens: Float[Tensor, "b v d"], order: Int[Tensor, "b n"]) -> Float[Tensor, "b m d"]:
        """Tokens of the visible patches, the first ones of `order`, to predictions for the hidden ones."""
        x = torch.cat([tokens.float(), self.noise.expand(len(order), -1, -1)], 1)  # [b, n, d], by `order`
        x = gather_tokens(x, order.argsort(1)).transpose(1, 2).unflatten(2, self.grid)  # [b, d, gh, gw]
        for i, convolution in enumerate(self.convolutions):
            y = convolution(x).permute(0, 2, 3, 1).float()  # [b, gh, gw, width]
            y = F.gelu(F.layer_norm(y, y.shape[-1:])).permute(0, 3, 1, 2)
            x = x + y if i else y
        patches = x.flatten(2).transpose(1, 2)  # [b, n, width]
        return self.predict(gather_tokens(patches, order[:, tokens.shape[1] :])).float()


class Data2Vec(MeanTeacher):
    """Predicts a mean teacher's features of an image from the visible fifth of its patches."""

    recipe_type = Data2VecRecipe
    recipe: Data2VecRecipe
    student: StudentWithPredictor
    teacher: Teacher[EncoderWithHead]
    losses: ClassVar[dict[str, str]] = {
        "loss": "loss",
        "regression": "patches",
        "class": "class",
        "target_std": "target std",
        "prediction_std": "prediction std",
    }

    def __init__(self, recipe: Data2VecRecipe, mean: Channels, std: Channels):
        super().__init__(recipe, mean, std)
        s = self.settings = recipe.data2vec
        encoder = build_encoder(recipe.images, recipe.network)
        self.patch, self.prefix = encoder.patch, encoder.prefix
        n = math.prod(encoder.grid)
        self.visible = visible_count(n, s.hidden_fraction)
        width, groups, top_blocks = sizes(s, encoder)
        decoder = ConvDecoder(s, encoder.grid, n - self.visible, encoder.width, width, groups)
        self.student = StudentWithPredictor(EncoderWithHead(encoder, nn.Identity()), decoder)
        self.teacher = Teacher(self.ema_source)
        self.feed_forward: list[Tensor] | None = None
        for block in self.teacher.model.encoder.vit.blocks[-top_blocks:]:
            block.get_submodule("mlp").register_forward_hook(self._collect)

    @property
    def ema_source(self) -> EncoderWithHead:
        return self.student.shared

    @classmethod
    def validate(cls, recipe: Data2VecRecipe) -> list[str]:
        with torch.device("meta"):
            encoder = build_encoder(recipe.images, recipe.network)
        s, depth = recipe.data2vec, len(encoder.vit.blocks)
        width, groups, top_blocks = sizes(s, encoder)
        rules = [
            *latent_rules(recipe, encoder),
            (
                1 <= top_blocks <= depth,
                f"top_blocks must lie in 1 to the encoder's {depth} blocks, not {top_blocks}",
            ),
            (
                encoder.width % groups == 0 == width % groups,
                f"conv_groups {groups} must divide the encoder's width, {encoder.width}, and conv_width, "
                f"{width}",
            ),
        ]
        return broken(rules)

    def views(self) -> CropAndMasks:
        s = self.settings
        return CropAndMasks(self.recipe.images, self.ema_source.encoder.grid, s.masks, self.visible, s.square)

    def forward(self, batch: Batch, t: Progress) -> dict[str, Tensor]:
        patches, orders = self.normalize_and_patchify(batch["image"]), batch["orders"]
        k = orders.shape[1]
        target = self.target(patches)
        classes, prediction = self.predict(patches, orders)
        with torch.autocast(prediction.device.type, enabled=False):
            hidden = _gathered(target, orders[:, :, self.visible :])  # [bk, m, d]
            regression = self.distance(prediction, hidden)
            class_loss = self.distance(classes.float(), target.mean(1).repeat_interleave(k, 0))
        return {
            "loss": regression + self.settings.class_weight * class_loss,
            "regression": regression.detach(),
            "class": class_loss.detach(),
            "target_std": mean_std(hidden),
            "prediction_std": mean_std(prediction.detach()),
        }

    @staticmethod
    def distance(a: Float[Tensor, "*s d"], b: Float[Tensor, "*s d"]) -> Tensor:
        """Mean over tokens of the squared distance, divided by the square root of the width."""
        return (a - b).square().sum(-1).mean() * a.shape[-1] ** -0.5

    @torch.no_grad()
    def target(self, patches: Float[Tensor, "b n p"]) -> Float[Tensor, "b n d"]:
        """The teacher's features of each patch of the full image, in float32."""
        outputs = self.feed_forward = []
        self.teacher.model.encoder(patches)  # fills `outputs` through the hooks
        self.feed_forward = None
        with torch.autocast(patches.device.type, enabled=False):
            # Instance norm: each channel over the patches of its image.
            normed = [F.instance_norm(y[:, self.prefix :].float().transpose(1, 2)) for y in outputs]
            mean = torch.stack(normed).mean(0).transpose(1, 2)  # [b, n, d]
            return F.layer_norm(mean, mean.shape[-1:])

    def _collect(self, mlp: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if self.feed_forward is not None:  # not while the teacher is probed
            self.feed_forward.append(output)

    def predict(
        self, patches: Float[Tensor, "b n p"], orders: Int[Tensor, "b k n"]
    ) -> tuple[Float[Tensor, "bk d"], Float[Tensor, "bk m d"]]:
        """The student's class token under each mask, and its predictions for the hidden patches."""
        ids = orders[:, :, : self.visible]
        tokens = self.ema_source.encoder(_gathered(patches, ids), ids.flatten(0, 1))  # [bk, t, d]
        return tokens[:, 0], self.student.predictor(tokens[:, self.prefix :], orders.flatten(0, 1))

    def encode(self, batch: Batch) -> Float[Tensor, "b t d"]:
        ids = batch["orders"][:, 0, : self.visible]
        return self.ema_source.encoder(gather_tokens(self.normalize_and_patchify(batch["image"]), ids), ids)

    def remask(self, batch: Batch, generator: torch.Generator) -> Batch:
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        grid, square = self.ema_source.encoder.grid, self.settings.square
        orders = np.stack([mask_order(grid, self.visible, square, rng) for _ in batch["orders"]])  # [b, n]
        return {**batch, "orders": torch.from_numpy(orders).unsqueeze(1).to(batch["orders"].device)}

    def momentum(self, t: Progress) -> float | Tensor:
        s, start = self.settings, self.recipe.teacher.momentum
        if self.recipe.teacher.schedule != "linear":
            return super().momentum(t)
        return start + (s.ema_end - start) * min(1.0, t.step / s.ema_steps)

    def references(self, batch: Batch) -> dict[str, float]:
        """The loss of predicting zero for standardized targets, the square root of the width."""
        return {"zero": self.ema_source.encoder.width**0.5}

    @classmethod
    def figures(cls) -> tuple[Figure, ...]:
        text = (
            "Squared distance of the predictions from the teacher's features of hidden patches. The targets "
            "change with the teacher, so the loss may rise again while they become richer."
        )
        spread = (
            "Standard deviation over patches of targets and of predictions, mean over channels. If both are "
            "zero, the run has collapsed."
        )
        loss, levels = Curve("regression", "", "student"), (("predicting zero", "zero"),)
        both = Curve("target_std", "targets", "teacher"), Curve("prediction_std", "predictions", "student")
        return (
            Figure("figure-loss", "latent loss", (loss,), text, levels, log=True),
            Figure("figure-spread", "standard deviation", both, spread),
        )

    @classmethod
    def judge(cls, means: Numbers, reference: Numbers) -> list[Sentence]:
        loss, target, prediction = (means[key] for key in ("regression", "target_std", "prediction_std"))
        text = f"The latent loss is {loss:.3f}"
        text += f"; predicting zero would score {reference['zero']:.3f}." if reference else "."
        learns = not reference or loss < 0.98 * reference["zero"]
        if not learns:
            text += " Nothing is learned yet: normal early in a run, but not later."
        spread = f"Over patches, the standard deviation of targets is {target:.2f}, of predictions "
        spread += f"{prediction:.2f}: "
        if min(target, prediction) > 0.1:
            judged = ("good", spread + "patches are distinguished.")
        else:
            judged = ("bad", spread + "the same output for all patches is collapse.")
        return [("note" if learns else "bad", text), judged]


def _gathered(tokens: Float[Tensor, "b n d"], ids: Int[Tensor, "b k m"]) -> Float[Tensor, "bk m d"]:
    """The tokens of each image at the positions of each mask."""
    return gather_tokens(tokens, ids.flatten(1)).unflatten(1, ids.shape[1:]).flatten(0, 1)


def sizes(s: Data2VecSettings, encoder: Encoder) -> tuple[int, int, int]:
    """Width and groups of the decoder, and the number of the teacher's blocks in the target."""
    width, depth = s.conv_width or encoder.width, len(encoder.vit.blocks)
    return width, s.conv_groups or math.gcd(16, width, encoder.width), s.top_blocks or depth - depth // 6


def mean_std(x: Float[Tensor, "b m d"]) -> Tensor:
    """Mean over channels of the standard deviation over all patches of the first images."""
    count = max(8, RECORDED_VALUES // x[0].numel())
    return x[:count].flatten(0, 1).var(0).add(1e-6).sqrt().mean()
