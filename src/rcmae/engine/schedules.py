"""Schedules: pure functions of the progress of a run."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The progress of a run: optimizer steps done, in total, and per epoch."""

    step: int
    total_steps: int
    steps_per_epoch: int

    @property
    def fraction(self) -> float:
        """The completed fraction of the run, 0 to 1."""
        return self.step / self.total_steps

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.step / self.steps_per_epoch


def cosine(start: float, end: float, fraction: float) -> float:
    """Half a cosine from `start` at fraction 0 to `end` at fraction 1."""
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2


def warmup_cosine(
    peak: float, end: float, warmup: float, t: Progress, start: float = 0.0, length: float = 1.0
) -> float:
    """Linear from `start` to `peak` over the fraction `warmup` of the run, then a cosine that reaches `end`
    after `length` runs."""
    if t.fraction < warmup:
        return start + (peak - start) * t.fraction / warmup
    return cosine(peak, end, (t.fraction - warmup) / (length - warmup))


def ramp(length: float, step: int) -> float:
    """A linear rise from 0 to 1 over `length` steps."""
    return min(1.0, step / length) if length else 1.0


def fraction_of_run(fraction: float) -> str:
    """A length as a fraction of the run: '0.50% of the run', '3.2 times the run'."""
    return f"{fraction:.2%} of the run" if fraction <= 1 else f"{fraction:,.1f} times the run"


def default_log_every(total: int) -> int:
    """Steps between log lines: a hundredth of the run, at most 50."""
    return min(max(1, total // 100), 50)


def spread(total: int, count: int) -> set[int]:
    """`count` evenly spaced steps, the last one at the end of the run."""
    return {round(total * (i + 1) / count) for i in range(count)} - {0}
