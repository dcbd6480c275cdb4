"""The contract of a method: all that the loop knows of it."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.schedules import Progress
from ..models.backbone import Backbone

# image uint8 [h, w, c] and a generator -> named tensors of one sample (crops, masks); must pickle, for loader workers.
Views = Callable[[np.ndarray, np.random.Generator], dict[str, Tensor]]


class Method(nn.Module):
    """A way of learning without labels. One file a method; the loop calls these and nothing else."""

    student: nn.Module
    "every trained parameter lives here"

    def views(self) -> Views:
        """What one sample is."""
        raise NotImplementedError

    def forward(self, batch: dict[str, Tensor], t: Progress) -> dict[str, Tensor]:
        """Scalars on the device: "loss" is what is minimised, the rest is logged."""
        raise NotImplementedError

    def before_step(self, t: Progress) -> None:
        """Once an optimizer step, after the gradients are there and before the weights move."""

    def after_step(self, t: Progress) -> None:
        """Once an APPLIED optimizer step, after the weights moved."""

    def backbone(self, which: Literal["student", "teacher"] = "teacher") -> Backbone:
        """What evaluation loads; a method without a teacher has only the student."""
        raise NotImplementedError

    def state(self, t: Progress) -> dict[str, float | Tensor]:
        """More to log at `t`: numbers, or scalars on the device."""
        return {}

    @torch.no_grad()
    def snapshot(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a picture of a fixed batch needs (see the report); nothing by default."""
        return {}
