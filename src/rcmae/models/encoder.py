"""The encoder: a plain timm Vision Transformer that is given only the patches it may see."""

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import ConfigError, first_line
from .blocks import Attention
from .patches import sincos_positions, take


class Encoder(nn.Module):
    """Composes a timm `VisionTransformer` (`self.vit`); any plain one will do.

    Hidden patches are left out before the patch embedding's matrix product, so they can neither cost nor leak anything.
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
        """Class and register tokens in front of the patches."""
        return self.vit.num_prefix_tokens

    def forward(
        self,
        patches: Float[Tensor, "b v p"],
        ids: Int[Tensor, "b v"] | None = None,
        grid: tuple[int, int] | None = None,
        masked: tuple[Bool[Tensor, "b v"], Float[Tensor, " d"]] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Patches at the places `ids` to tokens [class, registers, patches], t = prefix + v.

        Without `ids`, they are all patches of an image of `grid` (rows, columns; default: the encoder's own), to which positions are
        resampled. `masked` says which of them are replaced by a token.
        """
        vit = self.vit
        weight = vit.patch_embed.proj.weight  # a convolution [d c row column]; patches run (row, column, channel)
        x = F.linear(patches, weight.permute(0, 2, 3, 1).flatten(1), vit.patch_embed.proj.bias)
        x = vit.patch_embed.norm(x)
        if masked is not None:
            x = torch.where(masked[0].unsqueeze(2), masked[1].to(x.dtype), x)
        front = [token.expand(len(x), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
        if vit.pos_embed is not None:
            own = 0 if vit.no_embed_class else self.prefix
            places = vit.pos_embed[:, own:]
            if grid not in (None, self.grid):
                places = resample_abs_pos_embed(places, list(grid), list(self.grid), num_prefix_tokens=0)
            x = x + (places if ids is None else take(places[0], ids))
            if own:
                front = [torch.cat(front, 1) + vit.pos_embed[:, :own]]
        x = vit.norm_pre(torch.cat([*front, x.float()], 1))
        for block in vit.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and x.requires_grad else block(x)
        return vit.norm(x)


def build_vit(
    *, size: int | tuple[int, int], channels: int, patch: int, width: int, depth: int, heads: int, registers: int
) -> VisionTransformer:
    """A timm ViT with MAE's fixed sine-cosine positions and MAE's initial weights; `img_size` is (h, w) or a side."""
    vit = VisionTransformer(
        img_size=size, patch_size=patch, in_chans=channels, embed_dim=width, depth=depth, num_heads=heads, reg_tokens=registers,
        num_classes=0, global_pool="", attn_layer=Attention,
    )  # fmt: skip
    with torch.no_grad():
        vit.pos_embed.zero_()
        vit.pos_embed[0, vit.num_prefix_tokens :] = sincos_positions(vit.patch_embed.grid_size, width)
        for module in vit.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(vit.patch_embed.proj.weight.flatten(1))
        for token in (vit.cls_token, vit.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
    vit.pos_embed.requires_grad_(False)
    return vit


def timm_vit(name: str, *, size: int | tuple[int, int], channels: int) -> VisionTransformer:
    """Any plain timm Vision Transformer by name, untrained, with its own positions and initial weights.

    Raises ConfigError when timm does not know the name or the model is of another kind.
    """
    try:
        options = {"img_size": size, "in_chans": channels, "num_classes": 0, "global_pool": "", "attn_layer": Attention}
        vit = timm.create_model(name, pretrained=False, **options)
    except (RuntimeError, TypeError, AssertionError) as e:
        if "attn_layer" in str(e):
            raise ConfigError(f"timm:{name} is no plain VisionTransformer, which pre-training needs") from e
        raise ConfigError(f"timm cannot build {name!r} as a Vision Transformer: {first_line(e)}") from e
    if type(vit) is not VisionTransformer or type(vit.patch_embed).__name__ != "PatchEmbed":
        raise ConfigError(f"timm:{name} is a {type(vit).__name__}; pre-training needs a plain VisionTransformer")
    return vit
