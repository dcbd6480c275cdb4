"""Options of `rcmae lab gradients`. This module does not import torch, so that --help is quick."""

from dataclasses import dataclass

from ..config import Rules, Section


@dataclass(frozen=True, kw_only=True)
class GradientSettings(Section):
    """Settings of the study."""

    blocks: int = 6
    "Measured blocks of steps at each checkpoint."
    batch_size: int | None = None
    "Images per batch [default: the recipe's]. Another one changes the learning rate in proportion."
    settle: int | None = None
    """Steps before measuring [default: 0 where a run continues at its rate, otherwise three half-lives of the
    teacher, 10 to 100]."""
    lr: float | None = None
    """Learning rate of all steps, from the newest checkpoint [default: the run's schedule; if no checkpoint
    has enough steps left, half of the peak]."""
    device: str = "auto"
    "auto, cpu, cuda, cuda:1 or mps."

    def rules(self) -> Rules:
        size = self.batch_size
        return [
            (self.blocks >= 2, f"an interval needs 2 blocks or more, not {self.blocks}"),
            *self.each("must be above 0", "lr"),
            *self.each("must be 0 or more", "settle"),
            (size is None or size >= 2, f"a batch needs 2 images or more, not {size}"),
        ]
