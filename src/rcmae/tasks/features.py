"""Frozen features of a labelled set."""

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..models.backbone import Backbone


@torch.no_grad()
def mean_patches(
    backbone: Backbone, images: UInt8[Tensor, "n c h w"], device: torch.device, precision: str = "fp32", batch: int = 256
) -> Float[np.ndarray, "n d"]:
    """The mean over the patch tokens of each image; `precision` is that of the matrix products."""
    backbone = backbone.to(device).eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return np.concatenate([backbone(part.to(device).float() / 255).mean.cpu().numpy() for part in images.split(batch)])
