"""AdamW as masked auto-encoders use it."""

import torch
from torch import nn

from ..config import Optim


def adamw(model: nn.Module, optim: Optim, lr: float) -> torch.optim.AdamW:
    """AdamW over the trained parameters; weight decay on matrices only (not on biases, norms and other vectors).

    Class and mask tokens are [1, 1, d] and are decayed, as in the reference code; what says `no_decay` of itself is not.
    """
    plain, matrices = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (plain if p.ndim <= 1 or name.endswith(".bias") or getattr(p, "no_decay", False) else matrices).append(p)
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=optim.betas, fused=True)


def linear_rule(optim: Optim) -> float:
    """The learning rate for this batch: base_lr * batch_size / 256."""
    return optim.base_lr * optim.batch_size / 256
