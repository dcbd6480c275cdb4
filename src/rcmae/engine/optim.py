"""AdamW with the parameter groups of masked autoencoders, and its schedules in pre-training."""

from collections.abc import Sequence

import torch
from torch import nn

from ..config import Optim
from .schedules import Progress, cosine, ramp, warmup_cosine
from .step import set_lr, set_weight_decay


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


def set_schedules(
    optimizer: torch.optim.Optimizer,
    optim: Optim,
    shape: tuple[float, float],
    t: Progress,
    extended: Sequence[tuple[int, int]] = (),
) -> None:
    """Set the learning rate and the weight decay of the step at `t`.

    `shape` is the schedule of a method: where its warm-up starts and how long its cosines are. `extended`:
    for each extension of the run, the step at which it began and the new number of steps.
    """
    start_of_warmup, length = shape
    peak = optim.base_lr * optim.batch_size / 256
    lr = warmup_cosine(peak, optim.min_lr, optim.warmup, t, peak * start_of_warmup, length)
    if extended:
        start, stop = extended[-1]
        lr *= ramp(optim.warmup * (stop - start), t.step - start)
    set_lr(optimizer, lr)
    if optim.weight_decay_end is not None:
        decay = cosine(optim.weight_decay, optim.weight_decay_end, t.fraction / length)
        set_weight_decay(optimizer, decay)
