"""The monitor and the alarms of a training run, on rank 0."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..engine.schedules import Progress
from ..methods import Method
from .alarms import Alarm, Alarms, raised_before
from .monitor import Monitor

Write = Callable[..., None]
"""write(kind, **values) appends a line to metrics.jsonl."""


class Recorder:
    """The diagnostics of a run, which do not change its results."""

    def __init__(
        self,
        method: Method,
        total: int,
        steps_per_epoch: int,
        log_every: int,
        lines: list[dict[str, Any]],
        step: int,
    ):
        """`lines` are the records of the run up to `step`; their alarms are not raised again."""
        self.monitor, self.log_every = Monitor(method, total), log_every
        self.alarms = Alarms(method, total, steps_per_epoch, raised_before(lines, step))

    def at_start(self, t: Progress, drift: float | None) -> list[Alarm]:
        """Alarms before the first step; see `Alarms.at_start`."""
        return self.alarms.at_start(t, drift)

    def before_update(self, t: Progress) -> None:
        """Call before a step that will be logged."""
        self.monitor.start(t)

    def log(self, t: Progress, line: dict[str, float], write: Write) -> tuple[dict[str, float], list[Alarm]]:
        """Further values for the log line of that step, and alarms. The slow diagnostics are written too,
        when they are due."""
        more = self.monitor.finish(line)
        alarms = self.alarms.at_log(t, line | more, self.monitor)
        if self.monitor.due(t.step, self.log_every) and (metrics := self.monitor.slow()):
            write("health", **metrics)
            alarms += self.alarms.at_health(t, metrics, self.monitor)
        return more, alarms

    def lidar(self, batch: dict[str, Tensor], step: int, since: int) -> float | None:
        """LiDAR on a fixed batch of two or more images, if it is due; the previous milestone was `since`
        steps ago."""
        enough = all(len(values) > 1 for values in batch.values())
        return self.monitor.lidar(batch) if enough and self.monitor.due_lidar(step, since) else None
