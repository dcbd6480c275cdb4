"""LARS as MAE's and MoCo v3's linear probes use it."""

from timm.optim import Lars
from torch import nn


def lars(model: nn.Module, lr: float) -> Lars:
    """Momentum 0.9 on gradients g that are first scaled, for a matrix w, to g * 0.001 |w| / |g|; no weight decay.

    Biases and other vectors are not scaled, nor is a matrix whose weights or gradients are all zero. timm scales nothing where there is
    no decay unless `always_adapt` says so; and its `eps`, which the formula does not have, is 0. (With decay the two would differ: timm
    divides by |g| + decay |w|, MAE by |g + decay w|.)
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": matrices, "always_adapt": True}, {"params": vectors, "always_adapt": False}]
    return Lars(groups, lr=lr, momentum=0.9, weight_decay=0.0, trust_coeff=0.001, eps=0.0)
