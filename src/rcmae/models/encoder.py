"""The encoder: a plain timm Vision Transformer that reads only the visible patches."""

from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from timm.layers import Attention as TimmAttention
from timm.layers import DropPath, PatchDropout, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError, first_line
from .blocks import Attention, initialize
from .blueprint import architecture_of, blueprint
from .patches import gather_tokens, sincos_positions


class Encoder(nn.Module):
    """A plain timm `VisionTransformer` (`self.vit`) applied to patches.

    Hidden patches are removed before the patch embedding, so they cost nothing and cannot leak.
    """

    def __init__(self, vit: VisionTransformer):
        super().__init__()
        self.vit = vit
        self.checkpointing = False

    @property
    def width(self) -> int:
        return self.vit.embed_dim

    @property
    def patch(self) -> int:
        return self.vit.patch_embed.patch_size[0]

    @property
    def grid(self) -> tuple[int, int]:
        return self.vit.patch_embed.grid_size

    @property
    def prefix(self) -> int:
        """Number of class and register tokens in front of the patches."""
        return self.vit.num_prefix_tokens

    def forward(
        self,
        patches: Float[Tensor, "b v p"],
        ids: Int[Tensor, "b v"] | None = None,
        grid: tuple[int, int] | None = None,
        masked: tuple[Bool[Tensor, "b v"], Float[Tensor, " d"]] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """The patches at the positions `ids` to tokens [class, registers, patches], t = prefix + v.

        Without `ids`, `patches` are all patches of an image of `grid` (rows, columns; default: the encoder's
        grid), to which the position embedding is resampled. `masked` is a mask and the token that replaces
        the masked patches.
        """
        vit = self.vit
        # The convolution's kernel is [d, c, row, column]; a patch's values run (row, column, channel).
        weight = vit.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)  # [d, p]
        x = vit.patch_embed.norm(F.linear(patches, weight, vit.patch_embed.proj.bias))  # [b, v, d]
        if masked is not None:
            mask, mask_token = masked
            x = torch.where(mask.unsqueeze(2), mask_token.to(x.dtype), x)
        prefix = [
            token.expand(len(x), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None
        ]
        if vit.pos_embed is not None:
            embedded = 0 if vit.no_embed_class else self.prefix  # prefix tokens that have a position
            positions = vit.pos_embed[:, embedded:]  # [1, n, d]
            if grid is not None and grid != self.grid:
                positions = resample_abs_pos_embed(
                    positions, list(grid), list(self.grid), num_prefix_tokens=0
                )
            x = x + (positions if ids is None else gather_tokens(positions[0], ids))
            if embedded:
                prefix = [torch.cat(prefix, 1) + vit.pos_embed[:, :embedded]]
        x = vit.norm_pre(torch.cat([*prefix, x.float()], 1))  # [b, t, d]
        for block in vit.blocks:
            saves = self.checkpointing and x.requires_grad
            x = checkpoint(block, x, use_reentrant=False) if saves else block(x)
        return vit.norm(x)


class WithEncoder(nn.Module):
    """A network with an encoder, which evaluation loads."""

    encoder: Encoder


def build_vit(
    *,
    size: int | tuple[int, int],
    channels: int,
    patch: int,
    width: int,
    depth: int,
    heads: int,
    registers: int,
) -> VisionTransformer:
    """A timm ViT with MAE's fixed sine-cosine positions and MAE's initialization; `size` is (h, w) or the
    side of a square."""
    vit = VisionTransformer(
        img_size=size,
        patch_size=patch,
        in_chans=channels,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        reg_tokens=registers,
        num_classes=0,
        global_pool="",
        attn_layer=Attention,
    )
    assert vit.pos_embed is not None
    with torch.no_grad():
        vit.pos_embed.zero_()
        vit.pos_embed[0, vit.num_prefix_tokens :] = sincos_positions(vit.patch_embed.grid_size, width)
        initialize(vit)
        nn.init.xavier_uniform_(vit.patch_embed.proj.weight.flatten(1))
        for token in (vit.cls_token, vit.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
    vit.pos_embed.requires_grad_(False)
    return vit


def set_drop_path(vit: VisionTransformer, rate: float) -> None:
    """Skip blocks for single images in training, at rates that grow linearly from 0 to `rate`."""
    rates = torch.linspace(0, rate, len(vit.blocks), device="cpu").tolist() if rate else []
    for block, block_rate in zip(vit.blocks, rates, strict=False):
        block.drop_path1, block.drop_path2 = DropPath(block_rate), DropPath(block_rate)


NEEDS = "pre-training needs a plain VisionTransformer with plain attention"


def timm_vit(name: str, *, size: int | tuple[int, int], channels: int) -> VisionTransformer:
    """Any plain timm Vision Transformer by name, with timm's positions and initialization.

    Raises ConfigError when timm does not know the name, or for a network that `Encoder` does not compute or
    that cannot be exported.
    """
    options: dict[str, Any] = {"img_size": size, "in_chans": channels, "num_classes": 0, "global_pool": ""}
    try:
        vit = timm.create_model(name, pretrained=False, **options)
    except Exception as e:  # an unknown name, a model without these arguments, no network
        raise ConfigError(f"timm cannot build {name!r} as a Vision Transformer: {first_line(e)}") from e
    if type(vit) is not VisionTransformer:
        raise ConfigError(f"timm:{name} is timm's {type(vit).__name__}; {NEEDS}")
    if type(vit.patch_embed).__name__ != "PatchEmbed":
        raise ConfigError(f"timm:{name} has a {type(vit.patch_embed).__name__}; {NEEDS}")
    for block in vit.blocks:
        attn = getattr(block, "attn", block)
        gated = getattr(attn, "gate", None) is not None
        if type(attn) is not TimmAttention or gated:
            raise ConfigError(f"timm:{name} has {'gated ' * gated}{type(attn).__name__}; {NEEDS}")
        if attn.attn_drop.p or vit.pos_drop.p or isinstance(vit.patch_drop, PatchDropout):
            raise ConfigError(f"timm:{name} drops patches, positions or attention; {NEEDS} without that")
        attn.__class__ = Attention  # the same parameters with another kernel
    (h, w), (height, width) = vit.patch_embed.img_size, vit.patch_embed.patch_size
    if height != width or h % height or w % width:
        raise ConfigError(
            f"size {h} x {w} is not a multiple of a square patch: timm:{name} has {height} x {width}"
        )
    blueprint(vit, architecture_of(vit))  # refuses now what cannot be exported later
    return vit
