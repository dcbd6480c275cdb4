"""A backbone with a classification head, for end-to-end fine-tuning."""

import copy

import torch
from jaxtyping import Float
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import ConfigError
from .backbone import Backbone, StandardizingViT


class Classifier(StandardizingViT):
    """A timm Vision Transformer with a head."""

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Images with values in 0 to 1 to float32 logits. Raises ValueError for images of another type,
        number of channels or size."""
        return self.vit(self._standardize(images)).float()


def classifier(
    backbone: Backbone, classes: int, *, drop_path: float = 0.0, seed: int = 0
) -> VisionTransformer:
    """A copy of the backbone's ViT with a new head on the mean of its patches; everything is trainable,
    including the positions.

    As in MAE's fine-tuning, the mean is taken before the last norm, a new one (`fc_norm`), and the head's
    initial standard deviation is 2e-5. The stochastic depth rate grows linearly over the blocks from 0 to
    `drop_path`. The weights load into `timm.create_model(..., global_pool="avg")`. Raises ConfigError for
    blocks without stochastic depth.
    """
    if type(backbone.vit) is not VisionTransformer:
        raise ConfigError(
            f"a {type(backbone.vit).__name__} is not a plain VisionTransformer, which fine-tuning needs"
        )
    vit = copy.deepcopy(backbone.vit).requires_grad_(True)
    width, eps = vit.embed_dim, getattr(vit.norm, "eps", 1e-6)
    vit.norm, vit.fc_norm = nn.Identity(), nn.LayerNorm(width, eps=eps)
    vit.attn_pool = None  # type: ignore[assignment]  # as in timm, for every global_pool but "map"
    head: nn.Linear = nn.utils.skip_init(nn.Linear, width, classes)
    nn.init.normal_(head.weight, std=2e-5, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    vit.global_pool, vit.num_classes, vit.head = "avg", classes, head
    for block, rate in zip(vit.blocks, torch.linspace(0, drop_path, len(vit.blocks)).tolist(), strict=True):
        if not (hasattr(block, "drop_path1") and hasattr(block, "drop_path2")):
            raise ConfigError(
                f"a {type(block).__name__} is not a plain block; fine-tuning needs a plain VisionTransformer"
            )
        block.drop_path1, block.drop_path2 = (DropPath(rate) if rate else nn.Identity() for _ in range(2))
    return vit
