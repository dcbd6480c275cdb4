"""Options of `rcmae lab gradients`. This module does not import torch, so that --help is quick."""

from dataclasses import dataclass

from ..config import Rules, Section


@dataclass(frozen=True, kw_only=True)
class GradientSettings(Section):
    """Settings of the study."""

    batches: int = 24
    "Number of steps to measure."
    batch_size: int | None = None
    "Images per batch [default: the recipe's, at most 128]."
    settle: int | None = None
    "Steps before measuring, at the same learning rate [default: three half-lives of the teacher, 10 to 100]."
    lr: float | None = None
    "Learning rate of all steps [default: half the recipe's peak for this batch size]."
    device: str = "auto"
    "auto, cpu, cuda, cuda:1 or mps."

    def rules(self) -> Rules:
        size = self.batch_size
        return [
            (self.batches >= 2, f"an interval needs 2 batches or more, not {self.batches}"),
            *self.each("must be above 0", "lr"),
            *self.each("must be 0 or more", "settle"),
            (size is None or size >= 2, f"a batch needs 2 images or more, not {size}"),
        ]
