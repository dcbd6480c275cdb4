"""A backbone with a classification head, for end-to-end fine-tuning."""

import copy

import torch
from jaxtyping import Float
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import ConfigError
from .backbone import Backbone, check_images


class Classifier(nn.Module):
    """A timm Vision Transformer with a head, and the statistics that standardize its input, which is pixels
    in 0 to 1."""

    mean: Tensor
    std: Tensor

    def __init__(self, vit: VisionTransformer, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.vit = vit
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Images with values in 0 to 1 to float32 logits. Raises ValueError for images of another type,
        number of channels or size."""
        embed = self.vit.patch_embed
        check_images(images, self.vit.in_chans, embed.img_size if embed.strict_img_size else None)
        return self.vit((images - self.mean) / self.std).float()


def classifier(
    backbone: Backbone, classes: int, *, drop_path: float = 0.0, seed: int = 0, head_std: float = 2e-5
) -> VisionTransformer:
    """A copy of the backbone's ViT with a new head on the mean of its patches; everything is trainable,
    including the positions.

    As in MAE's fine-tuning, the mean is taken before the last norm, a new one (`fc_norm`), and the head is
    initialized with `head_std`. The stochastic depth rate grows linearly over the blocks from 0 to
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
    nn.init.normal_(head.weight, std=head_std, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    vit.global_pool, vit.num_classes, vit.head = "avg", classes, head
    for block, rate in zip(vit.blocks, torch.linspace(0, drop_path, len(vit.blocks)).tolist(), strict=True):
        if not (hasattr(block, "drop_path1") and hasattr(block, "drop_path2")):
            raise ConfigError(
                f"a {type(block).__name__} is not a plain block; fine-tuning needs a plain VisionTransformer"
            )
        block.drop_path1, block.drop_path2 = (DropPath(rate) if rate else nn.Identity() for _ in range(2))
    return vit
