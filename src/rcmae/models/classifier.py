"""A backbone with a head: what end-to-end fine-tuning trains."""

import copy

import torch
from jaxtyping import Float
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import ConfigError
from .backbone import Backbone, check_images


class Classifier(nn.Module):
    """A timm Vision Transformer with a head, and the statistics its images are standardised by. It takes pixels in 0 to 1."""

    def __init__(self, vit: VisionTransformer, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.vit = vit
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Images with values in 0 to 1 to logits, float32 whatever the precision of the network.

        Raises ValueError for images of another type, number of channels or size.
        """
        check_images(images, self.vit.in_chans, self.vit.patch_embed.img_size if self.vit.patch_embed.strict_img_size else None)
        return self.vit((images - self.mean) / self.std).float()


def classifier(backbone: Backbone, classes: int, *, drop_path: float = 0.0, seed: int = 0, head_std: float = 2e-5) -> VisionTransformer:
    """A copy of the backbone's ViT with a new head on the mean of its patches, all of it trainable, the positions too.

    The mean is taken before the last norm, which is a new one (`fc_norm`), as MAE fine-tunes; so is `head_std`. Paths are dropped at
    rates that grow linearly over the blocks from 0 to `drop_path`. Loads into `timm.create_model(..., global_pool="avg")`.
    Raises ConfigError when the blocks have no paths to drop.
    """
    if type(backbone.vit) is not VisionTransformer:
        raise ConfigError(f"a {type(backbone.vit).__name__} is no plain VisionTransformer, which fine-tuning needs")
    vit = copy.deepcopy(backbone.vit).requires_grad_(True)
    width, eps = vit.embed_dim, getattr(vit.norm, "eps", 1e-6)
    vit.norm, vit.fc_norm, vit.attn_pool = nn.Identity(), nn.LayerNorm(width, eps=eps), None
    vit.global_pool, vit.num_classes, vit.head = "avg", classes, nn.utils.skip_init(nn.Linear, width, classes)
    nn.init.normal_(vit.head.weight, std=head_std, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(vit.head.bias)
    for block, rate in zip(vit.blocks, torch.linspace(0, drop_path, len(vit.blocks)).tolist(), strict=True):
        if not (hasattr(block, "drop_path1") and hasattr(block, "drop_path2")):
            raise ConfigError(f"a {type(block).__name__} is no plain block; fine-tuning needs a plain VisionTransformer")
        block.drop_path1, block.drop_path2 = (DropPath(rate) if rate else nn.Identity() for _ in range(2))
    return vit
