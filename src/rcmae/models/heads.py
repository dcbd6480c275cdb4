"""What self-distillation puts on an encoder. Weights are drawn anew for each head; nothing here is evaluated."""

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
    """The head on the encoder."""

    head_width: int = 2048
    "hidden width of the head"
    embedding: int = 256
    "width in which similarity is measured: before the prototypes, or (MoCo v3) of queries and keys"

    def rules(self) -> Rules:
        return [
            (self.head_width > 0, f"head_width must be above 0, not {self.head_width}"),
            (self.embedding > 1, f"embedding must be 2 or more, not {self.embedding}"),
        ]


class BatchNorm(nn.Module):
    """Standardises by the batch over all ranks, in training and in a teacher alike: there is nothing to remember, so nothing to miss."""

    def __init__(self, width: int, affine: bool = True):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(v(width)) if affine else None for v in (torch.ones, torch.zeros))

    def forward(self, x: Float[Tensor, "m d"]) -> Float[Tensor, "m d"]:
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            share = len(x) / average(x.new_full((), len(x)))  # a rank may have more rows than another, as of masked patches
            x = x - mean_with_gradient(share * x.mean(0))
            x = x * (mean_with_gradient(share * x.square().mean(0)) + 1e-5).rsqrt()
            return x if self.weight is None else x * self.weight + self.bias


def mlp(widths: list[int], *, norm: bool = False, activation: type[nn.Module] = nn.GELU, bias: bool = True, last_norm: bool = False):
    """Linear layers, with BatchNorm (`norm`) and an activation between them; `last_norm` standardises the output, without affine."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        normed = last_norm if last else norm
        layers.append(linear := nn.Linear(a, b, bias=bias and not normed))  # a bias before BatchNorm does nothing
        nn.init.normal_(linear.weight, std=0.02)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        if normed:
            layers.append(BatchNorm(b, affine=not last))
        if not last:
            layers.append(activation())
    return nn.Sequential(*layers)


class PrototypeHead(nn.Module):
    """DINO's: three layers (`norm`: with BatchNorm between them), a unit vector, and its cosines with `prototypes` directions."""

    def __init__(self, inputs: int, width: int, embedding: int, prototypes: int, norm: bool = False):
        super().__init__()
        self.mlp = mlp([inputs, width, width, embedding], norm=norm)
        self.last = nn.Parameter(torch.empty(prototypes, embedding))
        nn.init.kaiming_uniform_(self.last, a=5**0.5)

    def forward(self, x: Float[Tensor, "*s d"]) -> Float[Tensor, "*s c"]:
        x = self.mlp(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        # In float32: the teacher's softmax multiplies the rounding of a cosine by 25.
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(F.normalize(x.float(), dim=-1), F.normalize(self.last, dim=1))
