"""A plain Vision Transformer adapted to large images: window attention, relative positions, no class token.

It remains a timm `VisionTransformer`; only the attention of its blocks is replaced, with the same parameters
and names. So it accepts every backbone that fine-tuning accepts, and layer scale, drop path and checkpointing
are timm's. (timm's `VisionTransformerSAM` is similar, but it drops paths by window instead of by image, and
its blocks cannot share tables of relative positions.)
"""

import copy
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import Attention, DropPath, RelPosBias
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer_sam import (
    get_decomposed_rel_pos_bias,
    window_partition,
    window_unpartition,
)
from torch import Tensor, nn

from ...errors import ConfigError
from .settings import DetectionRecipe


class WindowAttention(nn.Module):
    """Attention within windows; a window as wide as the grid makes it global.

    Windows that extend beyond the grid are padded with zeros, which are attended to, as in ViTDet.
    """

    def __init__(
        self,
        attn: Attention,
        grid: int,
        window: int,
        bias: Callable[[], Tensor] | None = None,
        rel_pos: bool = False,
    ):
        """The parameters are those of `attn`. `bias` returns a relative position bias "1 heads n n" from a
        table that blocks share; `rel_pos` adds decomposed relative positions to this block alone."""
        super().__init__()
        self.qkv, self.proj, self.norm = attn.qkv, attn.proj, attn.norm
        self.q_norm, self.k_norm = attn.q_norm, attn.k_norm
        self.heads, self.grid, self.window, self.bias = attn.num_heads, grid, window, bias
        if rel_pos:
            self.rel_pos_h, self.rel_pos_w = (
                nn.Parameter(torch.zeros(2 * window - 1, attn.head_dim)) for _ in range(2)
            )

    def forward(
        self, x: Float[Tensor, "b n d"], attn_mask: None = None, is_causal: bool = False
    ) -> Float[Tensor, "b n d"]:
        """Tokens of the full grid, row by row. timm's blocks pass the two other arguments, which are not used
        here."""
        x, padded = window_partition(
            x.unflatten(1, (self.grid, self.grid)), self.window
        )  # [w, side, side, d]
        qkv = self.qkv(x.flatten(1, 2)).unflatten(2, (3, self.heads, -1))  # [w, side^2, 3, heads, k]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        x = F.scaled_dot_product_attention(q, k, v, self.positions(q)).transpose(1, 2).flatten(2)
        x = self.proj(self.norm(x)).unflatten(1, (self.window, self.window))
        return window_unpartition(x, self.window, (self.grid, self.grid), padded).flatten(1, 2)

    def positions(self, q: Float[Tensor, "w heads n k"]) -> Float[Tensor, "_ heads n n"] | None:
        """The relative position bias of the attention logits."""
        if self.bias is not None:
            return self.bias().to(q.dtype)
        if not hasattr(self, "rel_pos_h"):
            return None
        sides = (self.window, self.window)
        bias = get_decomposed_rel_pos_bias(q.flatten(0, 1), self.rel_pos_h, self.rel_pos_w, sides, sides)
        return bias.unflatten(0, q.shape[:2]).to(q.dtype)


def ends(depth: int, parts: int) -> list[int]:
    """The last block of each of `parts` equal parts of a ViT; a shallow ViT repeats blocks.

    >>> ends(12, 4), ends(3, 4), ends(4, 1)
    ([2, 5, 8, 11], [0, 1, 2, 2], [3])
    """
    return [-(-depth * part // parts) - 1 for part in range(1, parts + 1)]


def check_backbone(plain: VisionTransformer, s: DetectionRecipe) -> None:
    """Raise ConfigError unless the ViT is a plain one and `s.size` fits it."""
    if type(plain) is not VisionTransformer:
        raise ConfigError(f"a {type(plain).__name__} is no plain VisionTransformer, which a detector needs")
    for block in plain.blocks:
        if not (isinstance(block, Block) and isinstance(block.attn, Attention) and block.attn.gate is None):
            raise ConfigError(
                f"a {type(block).__name__} is not a plain block; a detector needs a plain VisionTransformer"
            )
    patch, width = plain.patch_embed.patch_size
    if patch != width:
        raise ConfigError(
            f"the backbone's patches of {patch} x {width} px are not square, as a detector needs them"
        )
    if s.size % patch:
        raise ConfigError(f"size {s.size} is not a multiple of the backbone's patches of {patch} px")
    least = 2 if s.preset == "benchmarking" else 1  # BatchNorm fails on one position of one image
    if s.size * min(s.scales) < least * patch:
        raise ConfigError(
            f"size {s.size} is too small for a map of scale {min(s.scales):g} of patches of {patch} px; "
            "leave out the scale"
        )


def windowed(plain: VisionTransformer, s: DetectionRecipe) -> tuple[VisionTransformer, nn.ModuleDict]:
    """A trainable copy for images of `s.size`, and the tables of relative positions that its blocks share
    (preset benchmarking).

    The last block of each quarter has global attention, the others window attention. Class and register
    tokens, the last norm and the head are removed; position embeddings are resampled (bicubic). Raises the
    errors of `check_backbone`.
    """
    check_backbone(plain, s)
    vit, depth = copy.deepcopy(plain).requires_grad_(True), len(plain.blocks)
    vit.set_input_size((s.size, s.size))
    if vit.pos_embed is not None:
        vit.pos_embed = nn.Parameter(
            vit.pos_embed[:, 0 if vit.no_embed_class else vit.num_prefix_tokens :].detach().clone()
        )
    vit.cls_token = vit.reg_token = None
    vit.attn_pool = None  # type: ignore[assignment]  # timm sets None, too, but annotates only the module
    vit.num_prefix_tokens, vit.num_reg_tokens, vit.has_class_token, vit.num_classes = 0, 0, False, 0
    vit.norm, vit.fc_norm, vit.head = nn.Identity(), nn.Identity(), nn.Identity()
    grid = vit.patch_embed.grid_size[0]
    tables: dict[str, RelPosBias] = {}
    global_blocks = ends(depth, 4) if s.window else range(depth)
    for i, (block, rate) in enumerate(
        zip(vit.blocks, torch.linspace(0, s.drop_path, depth).tolist(), strict=True)
    ):
        block.drop_path1, block.drop_path2 = (DropPath(rate) if rate else nn.Identity() for _ in range(2))
        attn = cast(Attention, block.attn)  # see check_backbone
        name, window = ("grid", grid) if i in global_blocks else ("window", min(s.window, grid))
        shared = s.rel_pos and s.preset == "benchmarking"
        if shared and name not in tables:
            tables[name] = RelPosBias((window, window), attn.num_heads)
            nn.init.zeros_(tables[name].relative_position_bias_table)
        if s.rel_pos or name == "window":
            bias = tables[name].get_bias if shared else None  # a method, so that no block owns the table
            block.attn = WindowAttention(attn, grid, window, bias, rel_pos=s.rel_pos and not shared)
    return vit, nn.ModuleDict(tables)
