"""The interface of every encoder to evaluation."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import Attention as TimmAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..config import Images
from ..errors import ConfigError

Channels = tuple[float, ...]
"A value for each channel."

Statistics = tuple[Channels, Channels]
"Mean and standard deviation of each channel, for pixels in 0 to 1."

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"Channel means and standard deviations of ImageNet for pixels in 0 to 1 (torchvision's documentation)."


def usual_statistics(images: Images) -> Statistics | None:
    """ImageNet's statistics if the recipe uses them, averaged over the channels for gray images; None if they
    are to be measured on the data."""
    if images.normalize != "imagenet" or images.channels not in (1, 3):
        return None
    if images.channels == 3:
        return IMAGENET
    mean, std = IMAGENET
    return (sum(mean) / 3,), (sum(std) / 3,)


class Features(NamedTuple):
    """The class token (the mean of the patches for a ViT without one) and the patch tokens."""

    cls: Float[Tensor, "b d"]
    patches: Float[Tensor, "b d gh gw"]

    @property
    def mean(self) -> Float[Tensor, "b d"]:
        """Mean over the patch tokens, the usual feature of masked image models."""
        return self.patches.mean((2, 3))

    @property
    def tokens(self) -> Float[Tensor, "b t d"]:
        """The class token, then the patches row by row."""
        return torch.cat([self.cls.unsqueeze(1), self.patches.flatten(2).transpose(1, 2)], 1)


def pooled(features: Any, pool: str) -> Float[Tensor, "b d"]:
    """The feature of images by name: "mean", "cls", or "cls+mean", which is both."""
    parts = [getattr(features, name) for name in pool.split("+")]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def check_images(images: Tensor, channels: int, shape: tuple[int, int] | None) -> None:
    """Raises ValueError unless the images are floats [b, c, h, w] of these channels and, if given, of this
    height and width. Values are not checked."""
    if not images.is_floating_point():
        raise ValueError(
            f"images are floats with values in 0 to 1, not {images.dtype}; give images.float() / 255 for "
            "8-bit images"
        )
    expected = (channels, *(shape or images.shape[-2:]))
    if images.ndim != 4 or tuple(images.shape[1:]) != expected:
        h, w = shape or ("h", "w")
        raise ValueError(
            f"this network takes images [b, {channels}, {h}, {w}], not {list(images.shape)}; resize or crop "
            "them, or add the missing axis"
        )


def check_range(images: Tensor) -> None:
    """Raises ValueError for images with values far from 0 to 1, such as 0 to 255 or standardized pixels.
    Resizing overshoots by less than the half that is allowed."""
    if torch.compiler.is_compiling():
        return
    low, high = (value.item() for value in images.detach().aminmax())
    if low < -0.5 or high > 1.5:
        raise ValueError(
            f"images have values from {low:.3g} to {high:.3g} instead of 0 to 1; divide 8-bit pixels by 255, "
            "and leave it to the network to standardize them"
        )


class Standardizing(nn.Module):
    """A network that standardizes its input by the mean and standard deviation of each channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Channels, std: Channels, white: float = 1.0):
        """`mean` and `std` are for pixels in 0 to 1; the input is in 0 to `white`."""
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, white * torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def _standardize(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return (images - self.mean) / self.std


class StandardizingViT(Standardizing):
    """A timm Vision Transformer of pixels in 0 to 1."""

    bits: int | None = None
    "bits of the 16-bit images that it was trained on, if there were any; see `Source.bits`"
    license: str = ""
    "of the weights, or of those it was initialized from, if it is another's"

    def __init__(self, vit: VisionTransformer, mean: Channels, std: Channels):
        super().__init__(mean, std)
        self.vit = vit

    @property
    def statistics(self) -> Statistics:
        """Two tuples: the mean and the standard deviation of each channel, which standardize the input."""
        return tuple(self.mean.flatten().tolist()), tuple(self.std.flatten().tolist())

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of its input."""
        return self.vit.patch_embed.img_size

    @property
    def channels(self) -> int:
        return self.vit.in_chans

    def _standardize(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Raises ValueError for images of another type, number of channels or size."""
        check_images(images, self.channels, self.shape if self.vit.patch_embed.strict_img_size else None)
        return super()._standardize(images)


class Backbone(StandardizingViT):
    """A timm Vision Transformer and the statistics that standardize its input, which is pixels in 0 to 1.

    Its features are the tokens of timm's `forward_features`, without the head and its pooling.
    """

    method: str = ""
    "the method that trained it, if it is known"
    blocks: int = 1
    "the class token of its features is that of the last so many blocks, see `last`"

    def last(self, blocks: int) -> "Backbone":
        """The same network, whose class token is that of the last `blocks` blocks, after the last norm,
        concatenated; the patches stay those of the last one. As in DINO's linear probe."""
        network = Backbone(self.vit, *self.statistics)
        network.bits, network.method, network.blocks = self.bits, self.method, blocks
        network.license = self.license
        return network.train(self.training)

    def resized(self, shape: tuple[int, int]) -> "Backbone":
        """A copy for images of another height and width, whose position embedding is resampled to the new
        grid. Raises ConfigError unless both are multiples of the patch and the positions can be resampled."""
        patch: tuple[int, int] = self.vit.patch_embed.patch_size
        if any(side < 1 or side % p for side, p in zip(shape, patch, strict=True)):
            raise ConfigError(
                f"size {shape[0]} x {shape[1]} is not a multiple of the patch, {patch[0]} x {patch[1]}"
            )
        network = copy.deepcopy(self)
        network.vit.set_input_size(img_size=shape)
        return network

    def intermediate(
        self, images: Float[Tensor, "b c h w"], blocks: Sequence[int], norm: bool = False
    ) -> dict[str, Float[Tensor, "b d gh gw"]]:
        """Feature maps: the patch tokens after some blocks, under timm's names of these blocks ("blocks.3").

        `blocks` count from 0; negative ones from the last, -1. With `norm` each map is normalized by the last
        norm of the network; then that of the last block is `patches` of the features. Without it, the maps
        are those of timm's `features_only`. Raises ValueError as the network itself does, and IndexError for
        a block that the network lacks.
        """
        depth = len(self.vit.blocks)
        if unknown := [i for i in blocks if not -depth <= i < depth]:
            raise IndexError(f"this network has blocks 0 to {depth - 1}, not {', '.join(map(str, unknown))}")
        numbers = sorted({i % depth for i in blocks})
        standardized = self._standardize(images)
        check_range(images)
        maps: Any = self.vit.forward_intermediates(
            standardized, numbers, norm=norm, output_fmt="NCHW", intermediates_only=True
        )
        return {f"blocks.{i}": values.float() for i, values in zip(numbers, maps, strict=True)}

    @property
    def has_class_attention(self) -> bool:
        """Whether `class_attention` is defined: there is a class token and timm's plain attention."""
        return self.vit.has_class_token and isinstance(
            getattr(self.vit.blocks[-1], "attn", None), TimmAttention
        )

    def class_attention(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b gh gw"]:
        """The attention of the class token to the patches in the last block, averaged over the heads; it sums
        to less than 1 per image, as part of it is on the class token itself. Raises ValueError as the network
        itself does."""
        attention: Any = self.vit.blocks[-1].attn
        inputs: list[Tensor] = []
        hook = attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        try:
            _, patches = self(images)
        finally:
            hook.remove()
        [x] = inputs  # [b, t, d]
        q, k, _ = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = attention.q_norm(q[:, :, :1]), attention.k_norm(k)  # [b, heads, 1 or t, head width]
        weights = (q @ k.transpose(2, 3) * attention.scale).float().softmax(3)[:, :, 0].mean(1)  # [b, t]
        return weights[:, self.vit.num_prefix_tokens :].unflatten(1, patches.shape[-2:])

    def forward(self, images: Float[Tensor, "b c h w"]) -> Features:
        """Images with values in 0 to 1 to features. Raises ValueError for images of another type, number of
        channels, size or range of values."""
        vit, embed = self.vit, self.vit.patch_embed
        standardized = self._standardize(images)
        check_range(images)
        if self.blocks > 1:
            each: Any = vit.forward_intermediates(
                standardized,
                self.blocks,
                return_prefix_tokens=True,
                norm=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
            tokens = torch.cat([each[-1][1], each[-1][0]], 1).float()
            cls = torch.cat([prefix[:, 0] for _, prefix in each], 1).float()
        else:
            tokens = vit.forward_features(standardized).float()  # [b, t, d]
            cls = tokens[:, 0]
        grid = embed.grid_size if embed.strict_img_size else embed.dynamic_feat_size(images.shape[-2:])
        patches = tokens[:, vit.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)
        return Features(cls if vit.has_class_token else patches.mean((2, 3)), patches)


class RawFeatures(Features):
    """All pixels as the feature of an image, and patches of pixels as its tokens."""

    __slots__ = ()

    @property
    def mean(self) -> Float[Tensor, "b d"]:
        return self.cls

    @property
    def tokens(self) -> Float[Tensor, "b t d"]:
        return self.patches.flatten(2).transpose(1, 2)


class Pixels(nn.Module):
    """The baseline for every backbone: an image's pixels as its features, its patches as tokens."""

    channels, patch = 3, 4
    bits, method, blocks = None, "", 1

    def __init__(self, shape: tuple[int, int] = (32, 32)):
        super().__init__()
        self.shape = shape

    def forward(self, images: Float[Tensor, "b c h w"]) -> Features:
        """As `Backbone.forward`."""
        check_images(images, self.channels, self.shape)
        h, w = (side // self.patch for side in self.shape)
        patches = F.unfold(images, self.patch, stride=self.patch).unflatten(2, (h, w))
        return RawFeatures(images.flatten(1), patches)
