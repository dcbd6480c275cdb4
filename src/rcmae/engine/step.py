"""One optimizer step, framed: whatever learns here moves as a whole or not at all, and nothing waits for the device."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import DivergedError
from . import distributed
from .checkpoint import newest
from .distributed import World

PATIENCE = 5
"Non-finite steps in a row after which a run has diverged."

Losses = dict[str, Tensor]
"Scalars by name; `loss` is the one that is learned from."


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of every group: `lr`, times the group's own `lr_scale` where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def optimizer_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[dict[str, Tensor]],
    losses_of: Callable[[dict[str, Tensor], int], Losses],
    window: "Window",
    *,
    images: int,
    micro: int,
    clip: float | None,
    precision: str,
    device: torch.device,
    world: World,
    before: Callable[[Tensor], None] = lambda applied: None,
    after: Callable[[Tensor], None] = lambda applied: None,
) -> Tensor:
    """`micro` micro-batches, then everything moves, or nothing. Returns 1 or 0, on the device.

    `losses_of(batch, i)` is asked for each micro-batch and must go through `net`; `images` is what the step sees over all ranks.
    `before` and `after` are called around the optimizer with what is returned.
    """
    total: Losses = {}
    for i in range(micro):
        batch = window.wait(batches)
        with distributed.only_last(net, i == micro - 1):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                losses = losses_of(batch, i)
            (losses["loss"] / micro).backward()
        total = {k: total.get(k, 0) + v.detach() / micro for k, v in losses.items()}
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if clip:
        torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
    # Decided on the device: no step waits for the host, and no rank goes its own way.
    applied = world.everywhere((norm.isfinite() & total["loss"].isfinite()).float())
    before(applied)
    optimizer.found_inf = 1 - applied  # the fused optimizer leaves everything alone where this is 1
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    after(applied)
    window.add(total | {"grad_norm": norm}, applied, images)
    return applied


class Skips:
    """What the steps since the last look returned. Only looking waits for the device."""

    def __init__(self, checkpoints: Path, remedy: str = "lower --base-lr, set --clip 1"):
        self.checkpoints, self.remedy = checkpoints, remedy
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
                advice = f"{self.remedy}, or try --precision fp32"
                raise DivergedError(f"{PATIENCE} steps in a row were not finite, up to step {step}; {last} is kept; {advice}")


class Window:
    """Sums since the last log line, kept on the device; reading them is the only time the host waits for it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.applied: Tensor | float = 0.0
        self.images, self.waited, self.since = 0, 0.0, time.monotonic()

    def wait(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        start = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - start
        return batch

    def pause(self, seconds: float) -> None:
        """Time that was no training: probes, pictures, checkpoints."""
        self.since += seconds

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
