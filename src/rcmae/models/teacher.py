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
        self.ahead: list[Network] = []
        "a copy for `look_ahead`, once it has been needed; in a list, so that it is not part of the state"
        self.is_ahead = False

    def train(self, mode: bool = True) -> "Teacher[Network]":
        return super().train(False)  # always in evaluation mode

    def forward(self, *args: Any) -> Any:
        with torch.no_grad():
            return (self.ahead[0] if self.is_ahead else self.model)(*args)

    @torch.no_grad()
    def look_ahead(self, student: nn.Module, momentum: float | Tensor) -> None:
        """Until the next `update`, `forward` is that of a copy which is one more update ahead; a step that is
        interrupted or skipped leaves no trace in the teacher itself."""
        if not self.ahead:
            self.ahead.append(copy.deepcopy(self.model))
            for module, original in zip(self.ahead[0].modules(), self.model.modules(), strict=True):
                if original._compiled_call_impl is not None:  # which a copy loses
                    module.compile()
        weights: list[Tensor] = list(self.ahead[0].parameters())
        if not self.is_ahead:
            torch._foreach_copy_(weights, list(self.model.parameters()))
        self.is_ahead = True
        _average(self.ahead[0], student, momentum, torch.ones((), device=weights[0].device))

    def update(self, student: nn.Module, momentum: float | Tensor, applied: Tensor) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student.

        `applied` is 1 or 0 on the device; 0 leaves the teacher as it is, without a synchronization.
        """
        self.is_ahead = False
        _average(self.model, student, momentum, applied)

    @torch.no_grad()
    def drift(self, student: nn.Module) -> Tensor:
        """|student - teacher| / |student| over all weights, a scalar on the device."""
        teacher: list[Tensor] = list(self.model.parameters())
        weights: list[Tensor] = list(student.parameters())
        gap = torch.stack(torch._foreach_norm(torch._foreach_sub(weights, teacher))).norm()
        return gap / torch.stack(torch._foreach_norm(weights)).norm()


@torch.no_grad()
def _average(model: nn.Module, student: nn.Module, momentum: float | Tensor, applied: Tensor) -> None:
    """One update of all trained parameters, in fused calls."""
    pairs = zip(model.parameters(), student.parameters(), strict=True)
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
