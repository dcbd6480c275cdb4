"""Time is one object, and every schedule a pure function of it."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps done, of how many, and how many make an epoch."""

    step: int
    total_steps: int
    steps_per_epoch: int

    @property
    def fraction(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return self.step / self.total_steps

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.step / self.steps_per_epoch


def cosine(start: float, end: float, fraction: float) -> float:
    """Half a cosine from `start` at 0 to `end` at 1."""
    return end + (start - end) * (1 + math.cos(math.pi * fraction)) / 2


def warmup_cosine(peak: float, end: float, warmup: float, t: Progress) -> float:
    """Linear from 0 to `peak` over the share `warmup` of the run, then a cosine to `end`; the value for step `t.step`."""
    if t.fraction < warmup:
        return peak * t.fraction / warmup
    return cosine(peak, end, (t.fraction - warmup) / (1 - warmup))


def share_of_run(share: float) -> str:
    """A length as a share of the run: '0.50% of the run', '3.2 times the run'."""
    return f"{share:.2%} of the run" if share <= 1 else f"{share:,.1f} times the run"


def usual_log_every(total: int) -> int:
    """Steps between log lines: a hundred lines in a short run, in a long one a line every 50 steps."""
    return min(max(1, total // 100), 50)


def spread(total: int, count: int) -> set[int]:
    """`count` steps evenly over the run, the last one at its end."""
    return {round(total * (i + 1) / count) for i in range(count)} - {0}
