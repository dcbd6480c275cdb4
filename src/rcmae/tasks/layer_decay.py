"""Layer-wise learning rates for fine-tuning, as BEiT and MAE set them."""

from typing import Any

from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay


def layer_decay_groups(vit: VisionTransformer, weight_decay: float, decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW, each with a `weight_decay` and an `lr_scale` by which whoever sets `lr` must multiply it.

    The scale is decay ** (depth + 1 - layer): layer 0 are patch embedding, positions, class and register tokens, 1 to depth the blocks,
    depth + 1 the rest, which is the head with its norm and so learns at the full rate. No weight decay for vectors, positions and tokens.

    timm's rule is MAE's where patches are averaged before the last norm (`fc_norm`), as MAE fine-tunes. On a class token (`norm`), timm
    counts that norm with the last block, MAE with the head.
    """
    return param_groups_layer_decay(vit, weight_decay=weight_decay, no_weight_decay_list=vit.no_weight_decay(), layer_decay=decay)
