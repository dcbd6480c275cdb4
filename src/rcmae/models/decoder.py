"""The decoder: from the tokens of the visible patches to the pixels of the hidden ones."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .blocks import Attention, Block, initialize
from .patches import gather_tokens, sincos_positions


class Decoder(nn.Module):
    """MAE's decoder over tokens in the order [prefix, visible, hidden].

    Attention does not depend on the order of tokens, so the positions are gathered instead of sorting the
    tokens back. The last block and the head run on hidden tokens only, the only ones in the loss.
    """

    positions: Tensor

    def __init__(
        self,
        *,
        inputs: int,
        prefix: int,
        grid: tuple[int, int],
        values: int,
        width: int,
        depth: int,
        heads: int,
    ):
        super().__init__()
        self.prefix = prefix
        self.embed = nn.Linear(inputs, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, qkv_bias=True, norm_layer=LayerNorm, attn_layer=Attention)
            for _ in range(depth)
        )
        self.norm = LayerNorm(width)
        self.pred = nn.Linear(width, values)
        self.register_buffer("positions", sincos_positions(grid, width), persistent=False)
        self.checkpointing = False
        initialize(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Float[Tensor, "b t d"], order: Int[Tensor, "b n"]) -> Float[Tensor, "b m p"]:
        """Encoder tokens [prefix, visible] and the order of the patches (visible first) to predictions for
        the hidden patches."""
        prefix, visible = self.prefix, tokens.shape[1] - self.prefix
        hidden = order.shape[1] - visible
        x = self.embed(tokens).float()
        positions = gather_tokens(self.positions, order)  # [b, n, width]
        seen, masked = x[:, prefix:] + positions[:, :visible], self.mask_token + positions[:, visible:]
        x = torch.cat([x[:, :prefix], seen, masked], 1)
        for i, block in enumerate(self.blocks):
            last = hidden if i == len(self.blocks) - 1 else 0
            if self.checkpointing and x.requires_grad:
                x = checkpoint(block, x, last=last, use_reentrant=False)
            else:
                x = block(x, last=last)
        # In float32, since the gap between student and teacher is smaller than the rounding of bf16.
        with torch.autocast(x.device.type, enabled=False):
            return self.pred(self.norm(x.float()))


class LayerNorm(nn.LayerNorm):
    """LayerNorm with the epsilon of the reference code, 1e-6."""

    def __init__(self, width: int, **kwargs: Any):
        super().__init__(width, eps=1e-6, **kwargs)
