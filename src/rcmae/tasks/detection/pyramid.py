"""Feature maps of several resolutions from a plain ViT, which has only one: the simple feature pyramid of
ViTDet, and an FPN on four depths."""

import math
from collections import OrderedDict

import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import LayerNorm2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from .settings import DetectionRecipe
from .windows import ends, windowed


class Pyramid(nn.Module):
    """Standardized images to feature maps of `width` channels from fine to coarse: "0", "1", ... with
    `strides`, and "pool" with twice the last stride.

    vitdet: all maps are computed from the last feature map of the ViT (Li et al. 2022; detectron2's
    SimpleFeaturePyramid, LayerNorm with eps 1e-6). benchmarking: each map is computed from a different depth,
    the finest from the shallowest, followed by a standard FPN with BatchNorm (Li et al. 2021; MIMDet).
    """

    def __init__(self, plain: VisionTransformer, s: DetectionRecipe):
        super().__init__()
        self.vit, self.tables = windowed(plain, s)
        self.width = s.width
        patch, d = self.vit.patch_embed.patch_size[0], self.vit.embed_dim
        self.strides = [patch / scale for scale in s.scales]
        "pixels between neighbors on a map"
        if s.preset == "vitdet":
            self.depths = [len(self.vit.blocks) - 1] * len(s.scales)
            self.levels = nn.ModuleList(simple_level(d, scale, s.width) for scale in s.scales)
            self.fpn = None
        else:
            self.depths = ends(len(self.vit.blocks), len(s.scales))
            self.levels = nn.ModuleList(level(d, scale) for scale in s.scales)
            self.fpn = FeaturePyramidNetwork(
                [d] * len(s.scales), s.width, LastLevelMaxPool(), norm_layer=nn.BatchNorm2d
            )

    def forward(self, images: Float[Tensor, "b c s s"]) -> dict[str, Float[Tensor, "b width _ _"]]:
        depths = sorted(set(self.depths))
        features = self.vit.forward_intermediates(images, indices=depths, intermediates_only=True)
        by_depth = dict(zip(depths, features, strict=True))  # [b, d, h / patch, w / patch] each
        maps = OrderedDict(
            (str(i), level(by_depth[depth]))
            for i, (depth, level) in enumerate(zip(self.depths, self.levels, strict=True))
        )
        if self.fpn is not None:
            return self.fpn(maps)
        return maps | {"pool": F.max_pool2d(maps[str(len(maps) - 1)], 1, 2)}


def level(d: int, scale: float) -> nn.Sequential:
    """Resize a map of `d` channels by `scale`. (MIMDet's adapter; GroupNorm with 32 groups if 32 divides
    d.)"""

    def upsample() -> nn.Module:
        return nn.ConvTranspose2d(d, d, 2, 2)

    layers: dict[float, list[nn.Module]] = {
        4: [upsample(), nn.GroupNorm(math.gcd(32, d), d), nn.GELU(), upsample()],
        2: [upsample()],
        1: [],
        0.5: [nn.MaxPool2d(2)],
    }
    return nn.Sequential(*layers[scale])


def simple_level(d: int, scale: float, width: int) -> nn.Sequential:
    """Like `level`, but with fewer channels for finer maps, and two convolutions to `width` channels."""
    upsample = nn.ConvTranspose2d(d, d // 2, 2, 2)
    layers: dict[float, list[nn.Module]] = {
        4: [upsample, LayerNorm2d(d // 2), nn.GELU(), nn.ConvTranspose2d(d // 2, d // 4, 2, 2)],
        2: [upsample],
        1: [],
        0.5: [nn.MaxPool2d(2)],
    }
    convs = [nn.Conv2d(int(d // max(scale, 1)), width, 1, bias=False), LayerNorm2d(width)]
    return nn.Sequential(
        *layers[scale], *convs, nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width)
    )
