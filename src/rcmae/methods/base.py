"""The contract of a method: all that the loop knows of it."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from torch import Tensor, nn

from ..engine.schedules import Progress
from ..models.backbone import Backbone

# image uint8 [h, w, c] and a generator -> named tensors of one sample (crops, masks); must pickle, for loader workers.
Views = Callable[[np.ndarray, np.random.Generator], dict[str, Tensor]]


class Method(nn.Module):
    """A way of learning without labels. One file a method; the loop calls these and nothing else."""

    student: nn.Module
    "every trained parameter lives here"
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    "mean and deviation of each channel that standardise the pixels, in units of 0 to 1"
    networks: tuple[str, ...] = ("student",)
    "what is probed and exported, the one to use last"

    def views(self) -> Views:
        """What one sample is."""
        raise NotImplementedError

    def forward(self, batch: dict[str, Tensor], t: Progress) -> dict[str, Tensor]:
        """Scalars on the device: "loss" is what is minimised, the rest is logged."""
        raise NotImplementedError

    def before_step(self, t: Progress, applied: Tensor) -> None:
        """Once an optimizer step, after the gradients are there and before the weights move.

        `applied` is a scalar on the device: 1, or 0 if the gradients are not finite and nothing may move.
        """

    def after_step(self, t: Progress, applied: Tensor) -> None:
        """Once an optimizer step, after the weights moved (`applied` 1) or were left alone (0)."""

    def backbone(self, which: Literal["student", "teacher"] = "teacher") -> Backbone:
        """What evaluation loads; a method without a teacher has only the student."""
        raise NotImplementedError

    def state(self, t: Progress) -> dict[str, float | Tensor]:
        """More to log at `t`: numbers, or scalars on the device."""
        return {}

    def references(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """What simple guesses would score on this batch, to read the loss against."""
        return {}

    def snapshot(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and text from which the report draws pictures of a fixed batch; nothing by default."""
        return {}, {}
