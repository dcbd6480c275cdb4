"""timm's attention and block, with the attention kernel chosen by device and dtype, and with queries for only
the last tokens."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over [b, heads, tokens, head width].

    On a CPU, the bf16 backward of the fused kernel is 3 to 9 times slower than plain matrix products (torch
    2.15, AMX), so bf16 on a CPU uses those; everything else uses the fused kernel. The teacher, which needs
    no backward, uses the student's kernel: both then round alike, while with two kernels they differed by
    3e-3 at equal weights.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def initialize(network: nn.Module) -> None:
    """Initialize all linear layers as MAE does."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


class Attention(TimmAttention):
    """timm's `Attention` (same parameters and names) through `attend`."""

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        last: int = 0,
    ) -> Tensor:
        """Every token attends to all tokens; with `last`, only the last `last` tokens are queries and are
        returned."""
        if attn_mask is not None or is_causal:  # not used in pre-training
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        b, n, _ = x.shape
        if last:
            weight, bias, d = self.qkv.weight, self.qkv.bias, self.attn_dim
            q = F.linear(x[:, -last:], weight[:d], None if bias is None else bias[:d])
            kv = F.linear(x, weight[d:], None if bias is None else bias[d:]).view(
                b, n, 2, self.num_heads, self.head_dim
            )
            q = q.view(b, last, self.num_heads, self.head_dim).transpose(1, 2)
            k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (
                self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            )
        with torch.autocast(x.device.type, enabled=False):
            x = attend(self.q_norm(q), self.k_norm(k), v)
        return self.proj_drop(self.proj(self.norm(x.transpose(1, 2).flatten(2))))


class Block(TimmBlock):
    """timm's pre-norm block; with `last`, only the last `last` tokens are returned (they attend to all)."""

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        last: int = 0,
    ) -> Tensor:
        if not last:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        x = x[:, -last:] + self.drop_path1(self.ls1(self.attn(self.norm1(x), last=last)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
