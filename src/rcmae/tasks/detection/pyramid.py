"""Maps of several resolutions from a plain ViT, which has one: the simple pyramid of ViTDet, and an FPN on four depths."""

import math
from collections import OrderedDict

import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import LayerNorm2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from .settings import Detect
from .windows import ends, windowed


class Pyramid(nn.Module):
    """Standardised images to maps of `width` channels from fine to coarse: "0", "1", ... of `strides`, and "pool" of twice the last.

    vitdet: each from the ViT's last map (Li et al. 2022; detectron2's SimpleFeaturePyramid, LayerNorm of eps 1e-6). benchmarking: each from
    a depth of its own, the finest from the shallowest, then an ordinary FPN with BatchNorm (Li et al. 2021; MIMDet).
    """

    def __init__(self, plain: VisionTransformer, s: Detect):
        super().__init__()
        self.vit, self.tables = windowed(plain, s)
        self.width = s.width
        patch, d = self.vit.patch_embed.patch_size[0], self.vit.embed_dim
        self.strides = [patch / scale for scale in s.scales]
        "pixels between neighbours on a map"
        if s.preset == "vitdet":
            self.depths = [len(self.vit.blocks) - 1] * len(s.scales)
            self.levels = nn.ModuleList(simple_level(d, scale, s.width) for scale in s.scales)
            self.fpn = None
        else:
            self.depths = ends(len(self.vit.blocks), len(s.scales))
            self.levels = nn.ModuleList(level(d, scale) for scale in s.scales)
            self.fpn = FeaturePyramidNetwork([d] * len(s.scales), s.width, LastLevelMaxPool(), norm_layer=nn.BatchNorm2d)

    def forward(self, images: Float[Tensor, "b c s s"]) -> dict[str, Float[Tensor, "b width _ _"]]:
        depths = sorted(set(self.depths))
        maps = dict(zip(depths, self.vit.forward_intermediates(images, indices=depths, intermediates_only=True), strict=True))
        found = OrderedDict((str(i), level(maps[k])) for i, (k, level) in enumerate(zip(self.depths, self.levels, strict=True)))
        if self.fpn is not None:
            return self.fpn(found)
        return found | {"pool": F.max_pool2d(found[str(len(found) - 1)], 1, 2)}


def level(d: int, scale: float) -> nn.Sequential:
    """A map of `d` channels to one of `scale` times its sides. (MIMDet's adapter; GroupNorm of 32 groups where they divide d.)"""

    def double():
        return nn.ConvTranspose2d(d, d, 2, 2)

    layers = {4: [double(), nn.GroupNorm(math.gcd(32, d), d), nn.GELU(), double()], 2: [double()], 1: [], 0.5: [nn.MaxPool2d(2)]}
    return nn.Sequential(*layers[scale])


def simple_level(d: int, scale: float, width: int) -> nn.Sequential:
    """The same, with fewer channels the finer the map, and two convolutions to `width`."""
    up = [nn.ConvTranspose2d(d, d // 2, 2, 2)]
    layers = {4: [*up, LayerNorm2d(d // 2), nn.GELU(), nn.ConvTranspose2d(d // 2, d // 4, 2, 2)], 2: up, 1: [], 0.5: [nn.MaxPool2d(2)]}
    convs = [nn.Conv2d(int(d // max(scale, 1)), width, 1, bias=False), LayerNorm2d(width)]
    return nn.Sequential(*layers[scale], *convs, nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width))
