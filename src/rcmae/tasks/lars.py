"""LARS, as in the linear probes of MAE and MoCo v3."""

from timm.optim import Lars
from torch import nn


def lars(model: nn.Module, lr: float) -> Lars:
    """SGD with momentum 0.9 where the gradient g of a matrix w is first scaled to g * 0.001 |w| / |g|; no
    weight decay.

    Biases and other vectors are not scaled, nor is a matrix whose weights or gradients are all zero. Without
    weight decay timm scales nothing unless `always_adapt` is set; its `eps`, which the formula does not have,
    is 0. (With weight decay the two would differ: timm divides by |g| + decay |w|, MAE by |g + decay w|.)
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": matrices, "always_adapt": True}, {"params": vectors, "always_adapt": False}]
    return Lars(groups, lr=lr, momentum=0.9, weight_decay=0.0, trust_coeff=0.001, eps=0.0)
