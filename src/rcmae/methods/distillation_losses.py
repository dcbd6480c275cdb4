"""The losses of self-distillation. Letters: v views, b images, c prototypes, d width, n patches; views are
always the first axis."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..engine.distributed import average, gather, mean_with_gradient, rank


def centered_softmax(
    logits: Float[Tensor, "*s c"], center: Float[Tensor, " c"], temperature: float
) -> Float[Tensor, "*s c"]:
    """The teacher's probabilities: softmax((t - center) / temperature)."""
    return ((logits - center) / temperature).softmax(-1)


def cross_view_loss(
    student: Float[Tensor, "v b c"], teacher: Float[Tensor, "w b c"], temperature: float
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the student's logits with the teacher's probabilities over all pairs of different
    views (Caron et al., ICCV 2021, eq. 3). The teacher's views are the first ones of the student."""
    log = (student / temperature).log_softmax(-1)
    others = log.sum(0) - log[: len(teacher)]  # [w, b, c]: for each teacher view, the sum over other views
    terms = len(teacher) * (len(student) - 1)
    return -(teacher * others).sum(-1).mean(1).sum() / terms


def masked_patch_loss(
    student: Float[Tensor, "*k c"],
    teacher: Float[Tensor, "*k c"],
    masked: Bool[Tensor, "v b n"],
    temperature: float,
    ids: Int[Tensor, " k"] | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy on the masked patches of the same view: the mean per image, then over images and views
    (Zhou et al., ICLR 2022, eq. 2).

    Outputs are those of all patches [v b n c], or of the patches `ids` [k c], which include all masked ones.
    """
    errors = -(teacher * (student / temperature).log_softmax(-1)).sum(-1)  # [v, b, n] or [k]
    v, b, _ = masked.shape
    weight = masked.to(errors.dtype) / masked.sum(-1, keepdim=True).clamp_min(1) / (v * b)
    return (errors * (weight if ids is None else weight.flatten()[ids])).sum()


def assignments(
    z: Float[Tensor, "m d"], prototypes: Float[Tensor, "c d"], temperature: float
) -> Float[Tensor, "m c"]:
    """Softmax over the cosine similarities to the prototypes."""
    return (F.normalize(z, dim=1) @ F.normalize(prototypes, dim=1).T / temperature).softmax(1)


def sharpen(p: Float[Tensor, "m c"], temperature: float) -> Float[Tensor, "m c"]:
    """p ** (1 / temperature), normalized."""
    p = p ** (1 / temperature)
    return p / p.sum(1, keepdim=True)


def sinkhorn_knopp(p: Float[Tensor, "m c"], rounds: int = 3) -> Float[Tensor, "m c"]:
    """Sinkhorn-Knopp: every prototype gets the same total over all ranks, and every row sums to 1."""
    for _ in range(rounds):
        # The next line cancels a factor common to all columns, so the average may replace the sum.
        p = p / average(p.sum(0)).clamp_min(torch.finfo(p.dtype).tiny)
        p = p / p.sum(1, keepdim=True)
    return p


def me_max(p: Float[Tensor, "m c"]) -> Float[Tensor, ""]:
    """MSN's mean entropy maximization: log c minus the entropy of the mean assignment over all ranks, 0 if
    all prototypes are used equally."""
    mean = mean_with_gradient(p.mean(0))
    return torch.special.xlogy(mean, mean).sum() + math.log(len(mean))


def info_nce(q: Float[Tensor, "b d"], k: Float[Tensor, "b d"], temperature: float) -> Float[Tensor, ""]:
    """InfoNCE of queries with the keys of all ranks, times 2 * temperature (Chen et al., ICCV 2021, eq. 1 and
    the official code)."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    labels = torch.arange(len(q), device=q.device) + rank() * len(q)
    return F.cross_entropy(q @ gather(k).T / temperature, labels) * (2 * temperature)
