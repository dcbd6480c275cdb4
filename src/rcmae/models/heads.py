"""The projection and prototype heads of self-distillation; evaluation does not use them."""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..config import Rules, Section
from ..engine.distributed import average, mean_with_gradient


@dataclass(frozen=True, kw_only=True)
class HeadSettings(Section):
    """The head on top of the encoder."""

    head_width: int = 2048
    "hidden width of the head"
    embedding: int = 256
    "width of the vectors that are compared: with the prototypes, or (MoCo v3) queries with keys"

    def rules(self) -> Rules:
        return [*self.each("must be above 0", "head_width"), *self.each("must be 2 or more", "embedding")]


class BatchNorm(nn.Module):
    """Batch normalization over all ranks. Student and teacher always use the statistics of the batch, so
    there are no running statistics that the teacher could miss."""

    def __init__(self, width: int, affine: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            # Ranks may hold different numbers of rows, for example of masked patches.
            weight = len(x) / average(x.new_full((), len(x)))
            x = x - mean_with_gradient(weight * x.mean(0))
            x = x * (mean_with_gradient(weight * x.square().mean(0)) + 1e-5).rsqrt()
            return x if self.weight is None or self.bias is None else x * self.weight + self.bias


def mlp(
    widths: list[int],
    *,
    norm: bool = False,
    activation: type[nn.Module] = nn.GELU,
    bias: bool = True,
    last_norm: bool = False,
) -> nn.Sequential:
    """Linear layers with BatchNorm (`norm`) and an activation between them. `last_norm` normalizes the output
    too, without an affine map."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        normed = last_norm if last else norm
        linear = nn.Linear(a, b, bias=bias and not normed)  # a bias before BatchNorm has no effect
        layers.append(linear)
        nn.init.normal_(linear.weight, std=0.02)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        if normed:
            layers.append(BatchNorm(b, affine=not last))
        if not last:
            layers.append(activation())
    return nn.Sequential(*layers)


class PrototypeHead(nn.Module):
    """DINO's head: an MLP of three layers (with BatchNorm if `norm`), and the cosines of its output with the
    prototypes, each times a trained factor if `scaled`."""

    def __init__(
        self,
        inputs: int,
        width: int,
        embedding: int,
        prototypes: int,
        norm: bool = False,
        scaled: bool = False,
    ):
        super().__init__()
        self.mlp = mlp([inputs, width, width, embedding], norm=norm)
        self.last = nn.Parameter(torch.empty(prototypes, embedding))
        nn.init.kaiming_uniform_(self.last, a=5**0.5)
        self.scale = nn.Parameter(torch.ones(prototypes, 1)) if scaled else None

    def forward(self, x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s c"]:
        x = self.mlp(x.flatten(0, -2)).unflatten(0, x.shape[:-1])  # BatchNorm sees all rows of all views
        # In float32, since the teacher's temperature multiplies the rounding of a cosine by 25.
        with torch.autocast(x.device.type, enabled=False):
            prototypes = F.normalize(self.last, dim=1)
            if self.scale is not None:
                prototypes = self.scale * prototypes
            return F.linear(F.normalize(x.float(), dim=-1), prototypes)
