"""The parts of an optimizer step that all trainers share: a step moves everything or nothing, and nothing waits for the device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DivergedError
from . import distributed
from .checkpoint import newest

PATIENCE = 5
"Non-finite steps in a row after which a run has diverged."


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of every group: `lr`, times the group's own `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def set_weight_decay(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    """The weight decay of every group that has one."""
    for group in optimizer.param_groups:
        if group["weight_decay"]:
            group["weight_decay"] = weight_decay


def clip_gradients(optimizer: torch.optim.Optimizer, limit: float | None) -> Tensor:
    """Scale the gradients so that their norm is at most `limit`, if there is one. Returns the norm before."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def conditional_step(optimizer: torch.optim.Optimizer, applied: Tensor) -> None:
    """The step of a fused optimizer where `applied`, on the device, is 1; nothing moves where it is 0. Gradients are dropped."""
    optimizer.found_inf = 1 - applied  # the fused optimizer leaves everything alone where this is 1
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Mean:
    """The mean of named scalars over the micro-batches of a step, on the device."""

    def __init__(self, parts: int):
        self.parts = parts
        self.values: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0) + value.detach() / self.parts


class Skips:
    """What the steps since the last look returned. Only looking waits for the device."""

    def __init__(self, checkpoints: Path, divergence_advice: str):
        self.checkpoints, self.divergence_advice = checkpoints, divergence_advice
        self.recent: list[Tensor] = []
        self.in_a_row = 0

    def note(self, applied: Tensor) -> None:
        self.recent.append(applied)

    def look(self, step: int) -> Iterator[int]:
        """Those of the last steps, up to before `step`, that were skipped. Raises DivergedError after PATIENCE in a row."""
        recent, self.recent = self.recent, []
        for i, fine in enumerate(torch.stack(recent).tolist() if recent else []):
            self.in_a_row = 0 if fine else self.in_a_row + 1
            if not fine:
                yield step - len(recent) + i
            if self.in_a_row >= PATIENCE:
                last = newest(self.checkpoints)
                advice = f"{self.divergence_advice}, or try --precision fp32"
                raise DivergedError(f"{PATIENCE} steps in a row were not finite, up to step {step}; {last} is kept; {advice}")


class LogWindow:
    """Sums since the last log line, kept on the device; reading them is the only time the host waits for it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.applied: Tensor | float = 0.0
        self.images, self.waited, self.since = 0, 0.0, time.monotonic()

    def next_of(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """The next batch; how long it took is counted."""
        start = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - start
        return batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is no training: probes, pictures, checkpoints."""
        start = time.monotonic()
        yield
        self.since += time.monotonic() - start

    def add(self, values: dict[str, Tensor], applied: Tensor, images: int) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + torch.where(applied > 0, value, 0.0)
        self.applied = self.applied + applied
        self.images += images

    def read(self) -> dict[str, float]:
        """Means over the applied steps and all ranks, images a second and the share of time that waited; then start anew."""
        applied = float(self.applied)
        sums = distributed.average(torch.stack(list(self.sums.values()))).tolist()
        means = {name: value / applied if applied else float("nan") for name, value in zip(self.sums, sums, strict=True)}
        seconds = time.monotonic() - self.since
        line = means | {"images_per_s": self.images / seconds, "data_wait": self.waited / seconds}
        self.clear()
        return line
