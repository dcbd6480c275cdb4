"""The parts of an optimizer step that all trainers share. A step is applied completely or not at all, and the
host never waits for the device."""

import time
from collections.abc import Iterable, Iterator
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

DIVERGED = f"diverged: {PATIENCE} steps in a row were not finite"
"The last event of a run that ends with DivergedError."


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group to `lr`, times the group's `lr_scale` if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def set_weight_decay(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    """Set the weight decay of every group whose weight decay is not 0."""
    for group in optimizer.param_groups:
        if group["weight_decay"]:
            group["weight_decay"] = weight_decay


def clip_gradients(
    optimizer: torch.optim.Optimizer,
    limit: float | None,
    groups: Iterable[Iterable[torch.nn.Parameter]] | None = None,
) -> Tensor:
    """Clip the gradients of each of the groups of parameters to the norm `limit`, if given; by default, all
    are one group. Returns the norm of all before clipping."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit and groups is None:
        _clip(gradients, norm, limit)
    elif limit and groups is not None:
        for group in groups:
            if clipped := [p.grad for p in group if p.grad is not None]:
                _clip(clipped, torch.nn.utils.get_total_norm(clipped), limit)
    return norm


def _clip(gradients: list[Tensor], norm: Tensor, limit: float) -> None:
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))


def conditional_step(optimizer: torch.optim.Optimizer, applied: Tensor) -> None:
    """One step of a fused optimizer if `applied`, a tensor on the device, is 1; no change if it is 0. The
    gradients are released."""
    optimizer.found_inf = 1 - applied  # type: ignore[attr-defined]  # fused optimizers skip the step if 1
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
    """Which steps were skipped because they were not finite. Only `read` waits for the device."""

    def __init__(self, checkpoints: Path, divergence_advice: str):
        self.checkpoints, self.divergence_advice = checkpoints, divergence_advice
        self.recent: list[Tensor] = []
        self.in_a_row = 0

    def note(self, applied: Tensor) -> None:
        self.recent.append(applied)

    def read(self, step: int) -> Iterator[int]:
        """The skipped steps since the last call, all before `step`. Raises DivergedError after PATIENCE in a
        row."""
        recent, self.recent = self.recent, []
        for i, applied in enumerate(torch.stack(recent).tolist() if recent else []):
            self.in_a_row = 0 if applied else self.in_a_row + 1
            if not applied:
                yield step - len(recent) + i
            if self.in_a_row >= PATIENCE:
                last = newest(self.checkpoints)
                advice = f"{self.divergence_advice}, or try --precision fp32"
                raise DivergedError(
                    f"{PATIENCE} steps in a row were not finite, up to step {step}; {last} is kept; {advice}"
                )


class LogWindow:
    """Sums since the last log line, on the device. The host waits for the device only in `read`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.applied: Tensor | float = 0.0
        self.images, self.waited = 0, 0.0
        self.since, self.used = time.monotonic(), time.process_time()

    def next_of(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """The next batch; the time spent waiting for it is recorded."""
        start = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - start
        return batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of this block, such as probes and checkpoints, from the speed."""
        start, used = time.monotonic(), time.process_time()
        yield
        self.since += time.monotonic() - start
        self.used += time.process_time() - used

    def add(self, values: dict[str, Tensor], applied: Tensor, images: int) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + torch.where(applied > 0, value, 0.0)
        self.applied = self.applied + applied
        self.images += images

    def read(self) -> dict[str, float]:
        """Means over the applied steps and all ranks, images/s, the fraction of time spent waiting for data,
        and the processor's cores that this process used. Clears the sums."""
        applied = float(self.applied)
        sums = distributed.average(torch.stack(list(self.sums.values()))).tolist()
        means = {
            name: value / applied if applied else float("nan")
            for name, value in zip(self.sums, sums, strict=True)
        }
        seconds = time.monotonic() - self.since
        cores = (time.process_time() - self.used) / seconds
        line = means | {"images_per_s": self.images / seconds, "data_wait": self.waited / seconds}
        line["cores"] = cores
        self.clear()
        return line
