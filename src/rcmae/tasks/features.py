"""Frozen features of a labelled set."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..models.backbone import Backbone


@torch.no_grad()
def features(
    backbone: Backbone,
    images: UInt8[Tensor, "n c h w"],
    device: torch.device,
    precision: str = "fp32",
    batch: int = 256,
    tokens: bool = False,
) -> tuple[Float[np.ndarray, "n d"], Float[Tensor, "n t d"] | None]:
    """The mean over the patch tokens of each image, and if asked all tokens in half precision; `precision` is that of the products."""
    backbone, means, kept = backbone.to(device).eval(), [], []
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for part in images.split(batch):
            seen = backbone(part.to(device).float() / 255)
            means.append(seen.mean.cpu().numpy())
            if tokens:
                kept.append(torch.cat([seen.cls.unsqueeze(1), seen.patches.flatten(2).transpose(1, 2)], 1).half())
    return np.concatenate(means), torch.cat(kept) if tokens else None
