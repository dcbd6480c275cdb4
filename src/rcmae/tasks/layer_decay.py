"""Layer-wise learning rate decay for fine-tuning, as in BEiT and MAE."""

from typing import Any

from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay


def layer_decay_groups(vit: VisionTransformer, weight_decay: float, decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW, each with a `weight_decay` and an `lr_scale`, a factor of the learning rate
    that the caller has to apply.

    The scale is decay ** (depth + 1 - layer): layer 0 consists of patch embedding, position embedding, class
    and register tokens; layers 1 to depth are the blocks; layer depth + 1 is the rest, which is the head with
    its norm at the full rate. Vectors, position embeddings and tokens have no weight decay.

    timm's rule equals MAE's if patches are averaged before the last norm (`fc_norm`), as in MAE's
    fine-tuning. With a class token (`norm`), timm assigns that norm to the last block, MAE to the head.
    """
    return param_groups_layer_decay(
        vit, weight_decay=weight_decay, no_weight_decay_list=vit.no_weight_decay(), layer_decay=decay
    )
