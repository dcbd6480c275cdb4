"""AdamW with the parameter groups of masked autoencoders."""

import torch
from torch import nn

from ..config import Optim


def adamw(model: nn.Module, optim: Optim, lr: float) -> torch.optim.AdamW:
    """AdamW over the trained parameters, with weight decay on matrices only (not on biases, norms and other
    vectors).

    Class and mask tokens have shape [1, 1, d] and are decayed, as in the reference code. Parameters with a
    true `no_decay` attribute are not, and those with a true `decay` attribute always are.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            exempt = p.ndim <= 1 or name.endswith(".bias") or getattr(p, "no_decay", False)
            exempt = exempt and not getattr(p, "decay", False)
            (undecayed if exempt else decayed).append(p)
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=optim.betas, fused=True)
