"""What evaluation sees of any encoder."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..config import Images

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"Channel means and deviations of ImageNet, in units of 0 to 1 (torchvision's documentation)."


def usual_statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """ImageNet's, where a recipe takes them: for grey images their means over the channels. None: the data's own are to be measured."""
    if images.normalize != "imagenet" or images.channels not in (1, 3):
        return None
    return IMAGENET if images.channels == 3 else tuple((sum(s) / 3,) for s in IMAGENET)


class Features(NamedTuple):
    """A class token "b d" (the mean of the patches for a ViT without one) and patch tokens "b d gh gw"."""

    cls: Float[Tensor, "b d"]
    patches: Float[Tensor, "b d gh gw"]

    @property
    def mean(self) -> Float[Tensor, "b d"]:
        """Mean over the patch tokens, the feature that masked image models are read by."""
        return self.patches.mean((2, 3))

    @property
    def tokens(self) -> Float[Tensor, "b t d"]:
        """The class token, then the patches row by row."""
        return torch.cat([self.cls.unsqueeze(1), self.patches.flatten(2).transpose(1, 2)], 1)


def check_images(images: Tensor, channels: int, shape: tuple[int, int] | None) -> None:
    """Raises ValueError, by type and shape alone, for what is no float "b c h w" of these channels and, if given, height and width."""
    if not images.is_floating_point():
        raise ValueError(f"images are floats with values in 0 to 1, not {images.dtype}; give images.float() / 255 of 8-bit ones")
    wanted = (channels, *(shape or images.shape[-2:]))
    if images.ndim != 4 or tuple(images.shape[1:]) != wanted:
        named = f"[b, {channels}, {shape[0]}, {shape[1]}]" if shape else f"[b, {channels}, h, w]"
        raise ValueError(f"this network takes images {named}, not {list(images.shape)}; resize or crop them, or add the missing axis")


class Backbone(nn.Module):
    """A timm Vision Transformer with the statistics its images are standardised by. It takes pixels in 0 to 1."""

    def __init__(self, vit: VisionTransformer, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.vit = vit
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the images it takes."""
        return self.vit.patch_embed.img_size

    @property
    def channels(self) -> int:
        return self.vit.in_chans

    def forward(self, images: Float[Tensor, "b c h w"]) -> Features:
        """Images with values in 0 to 1 to features. Raises ValueError for images of another type, number of channels or size."""
        check_images(images, self.channels, self.shape if self.vit.patch_embed.strict_img_size else None)
        tokens = self.vit.forward_features((images - self.mean) / self.std).float()
        grid = tokens[:, self.vit.num_prefix_tokens :].transpose(1, 2).unflatten(2, self.vit.patch_embed.grid_size)
        return Features(tokens[:, 0] if self.vit.has_class_token else grid.mean((2, 3)), grid)


class RawFeatures(Features):
    """Pixels: all of them stand for the image, patches of them are its tokens."""

    __slots__ = ()

    @property
    def mean(self) -> Float[Tensor, "b d"]:
        return self.cls

    @property
    def tokens(self) -> Float[Tensor, "b t d"]:
        return self.patches.flatten(2).transpose(1, 2)


class Pixels(nn.Module):
    """The floor below every backbone: an image's own pixels as its features, its patches as tokens."""

    def __init__(self, shape: tuple[int, int] = (32, 32), channels: int = 3, patch: int = 4):
        super().__init__()
        self.shape, self.channels, self.patch = shape, channels, patch

    def forward(self, images: Float[Tensor, "b c h w"]) -> Features:
        """Images with values in 0 to 1 to features. Raises ValueError for images of another type, number of channels or size."""
        check_images(images, self.channels, self.shape)
        h, w = (side // self.patch for side in self.shape)
        patches = F.unfold(images, self.patch, stride=self.patch).unflatten(2, (h, w))
        return RawFeatures(images.flatten(1), patches)
