"""The mean teacher: an exponential moving average of past students."""

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Teacher(nn.Module):
    """A frozen copy of the student, without gradients, whose weights follow it in float32."""

    def __init__(self, student: nn.Module):
        super().__init__()
        self.model = copy.deepcopy(student).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    def forward(self, *args):
        with torch.no_grad():
            return self.model(*args)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float | Tensor, applied: Tensor | None = None) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, over all trained parameters in fused calls.

        `applied` is 1 or 0 on the device: with 0 nothing moves, and the host need not know.
        """
        pairs = zip(self.model.parameters(), student.parameters(), strict=True)
        own, new = map(list, zip(*((t, s) for t, s in pairs if s.requires_grad), strict=True))
        if applied is None or applied.device.type == "cpu":  # there the host knows without waiting, and needs no temporary
            if applied is None or applied:
                get_ema_multi_avg_fn(float(momentum))(own, new, 1)
            return
        step = torch._foreach_sub(new, own)
        torch._foreach_mul_(step, (1 - momentum) * applied)
        torch._foreach_add_(own, step)

    @torch.no_grad()
    def drift(self, student: nn.Module) -> Tensor:
        """|student - teacher| / |student| over all weights, a scalar on the device."""
        own, new = list(self.model.parameters()), list(student.parameters())
        gap = torch.stack(torch._foreach_norm(torch._foreach_sub(new, own))).norm()
        return gap / torch.stack(torch._foreach_norm(new)).norm()
