"""The losses of self-distillation, as functions of outputs. Letters: v views, b images, c prototypes, d width, n patches.

Views are the first axis everywhere, so that what compares views never has to know how many images there are.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..engine.distributed import average, gather, mean_with_gradient, rank


def centered(logits: Float[Tensor, "*s c"], center: Float[Tensor, " c"], temperature: float) -> Float[Tensor, "*s c"]:
    """The teacher's probabilities: softmax((t - center) / temperature)."""
    return ((logits - center) / temperature).softmax(-1)


def across_views(student: Float[Tensor, "v b c"], teacher: Float[Tensor, "w b c"], temperature: float) -> Float[Tensor, ""]:
    """Mean cross-entropy of each student view against each teacher view but its own (teacher view i is student view i).

    `student` holds logits, `teacher` probabilities (Caron et al., ICCV 2021, eq. 3).
    """
    log = (student / temperature).log_softmax(-1)
    others = log.sum(0) - log[: len(teacher)]
    terms = len(teacher) * (len(student) - 1)
    return -(teacher * others).sum(-1).mean(1).sum() / terms


def masked_patches(
    student: Float[Tensor, "*k c"], teacher: Float[Tensor, "*k c"], masked: Bool[Tensor, "v b n"], temperature: float,
    places: Int[Tensor, " k"] | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """Cross-entropy on the masked patches of the same view, a mean an image, then over images and views (Zhou et al., ICLR 2022, eq. 2).

    Outputs are those of all patches [v b n c], or with `places` of some [k c], which hold all that are masked.
    """
    each = -(teacher * (student / temperature).log_softmax(-1)).sum(-1)
    weight = masked.to(each.dtype) / masked.sum(-1, keepdim=True).clamp_min(1) / (masked.shape[0] * masked.shape[1])
    return (each * (weight if places is None else weight.flatten()[places])).sum()


def assignments(z: Float[Tensor, "m d"], prototypes: Float[Tensor, "c d"], temperature: float) -> Float[Tensor, "m c"]:
    """Softmax over the cosine similarities to the prototypes."""
    return (F.normalize(z, dim=1) @ F.normalize(prototypes, dim=1).T / temperature).softmax(1)


def sharpened(p: Float[Tensor, "m c"], temperature: float) -> Float[Tensor, "m c"]:
    """p ** (1 / temperature), normalised."""
    p = p ** (1 / temperature)
    return p / p.sum(1, keepdim=True)


def balanced(p: Float[Tensor, "m c"], rounds: int = 3) -> Float[Tensor, "m c"]:
    """Sinkhorn and Knopp: every prototype gets the same total, over all ranks, and every row sums to 1."""
    for _ in range(rounds):
        p = p / average(p.sum(0)).clamp_min(torch.finfo(p.dtype).tiny)  # a factor common to all columns is gone with the next line
        p = p / p.sum(1, keepdim=True)
    return p


def entropy_gap(p: Float[Tensor, "m c"]) -> Float[Tensor, ""]:
    """log c less the entropy of the mean assignment, over all ranks: 0 where all prototypes are used alike."""
    mean = mean_with_gradient(p.mean(0))
    return torch.special.xlogy(mean, mean).sum() + math.log(len(mean))


def contrast(q: Float[Tensor, "b d"], k: Float[Tensor, "b d"], temperature: float) -> Float[Tensor, ""]:
    """InfoNCE of queries against the keys of all ranks, times 2 * temperature (Chen et al., ICCV 2021, eq. 1 and its code)."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    labels = torch.arange(len(q), device=q.device) + rank() * len(q)
    return F.cross_entropy(q @ gather(k).T / temperature, labels) * (2 * temperature)
