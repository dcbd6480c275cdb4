"""The monitor and the alarms of a training run, on rank 0."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..engine.schedules import Progress
from ..methods import Method
from .alarms import Alarm, Alarms, raised_before
from .monitor import LIDAR_EVERY, Monitor


class Recorder:
    """The diagnostics of a run, which do not change its results."""

    def __init__(self, method: Method, t: Progress, log_every: int, lines: list[dict[str, Any]]):
        """`lines` are the records of the run up to `t`; their alarms are not raised again."""
        self.monitor, self.log_every = Monitor(method, t.total_steps), log_every
        self.alarms = Alarms(method, t.total_steps, t.steps_per_epoch, raised_before(lines, t.step))

    def log(
        self, t: Progress, line: dict[str, float], write: Callable[..., None]
    ) -> tuple[dict[str, float], list[Alarm]]:
        """Further values for the log line of the step after `monitor.start`, and alarms. The slow diagnostics
        are written by write(kind, **values) too, when they are due."""
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
        due = enough and self.monitor.due(step, since, LIDAR_EVERY)
        return self.monitor.lidar(batch) if due else None
