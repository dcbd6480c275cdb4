"""The mean teacher: an exponential moving average of past students."""

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

Network = TypeVar("Network", bound=nn.Module)


class Teacher(nn.Module, Generic[Network]):
    """A copy of the student whose weights, in float32, follow the student's without gradients."""

    def __init__(self, student: Network):
        super().__init__()
        self.model: Network = copy.deepcopy(student).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Teacher[Network]":
        return super().train(False)  # always in evaluation mode

    def forward(self, *args: Any) -> Any:
        with torch.no_grad():
            return self.model(*args)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float | Tensor, applied: Tensor) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, over all trained parameters in fused
        calls.

        `applied` is 1 or 0 on the device; 0 leaves the teacher as it is, without a synchronization.
        """
        pairs = zip(self.model.parameters(), student.parameters(), strict=True)
        trained: list[tuple[Tensor, Tensor]] = [(t, s) for t, s in pairs if s.requires_grad]
        old, new = [t for t, _ in trained], [s for _, s in trained]
        # On a CPU, reading `applied` waits for nothing, and no temporary is needed.
        if applied.device.type == "cpu":
            if applied:
                get_ema_multi_avg_fn(float(momentum))(old, new, 1)
            return
        step = torch._foreach_sub(new, old)
        torch._foreach_mul_(step, (1 - momentum) * applied)
        torch._foreach_add_(old, step)

    @torch.no_grad()
    def drift(self, student: nn.Module) -> Tensor:
        """|student - teacher| / |student| over all weights, a scalar on the device."""
        teacher: list[Tensor] = list(self.model.parameters())
        weights: list[Tensor] = list(student.parameters())
        gap = torch.stack(torch._foreach_norm(torch._foreach_sub(weights, teacher))).norm()
        return gap / torch.stack(torch._foreach_norm(weights)).norm()
