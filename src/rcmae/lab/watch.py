"""What a run records of itself while it trains, and what it warns of: the monitor and the alarms, on rank 0."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..engine.schedules import Progress
from ..methods import Method
from .alarms import Alarm, Alarms, called_before
from .monitor import Monitor

Write = Callable[..., None]
"""write(kind, **values): a line of metrics.jsonl."""


class Watch:
    """The instruments of one run. Nothing here changes what is computed."""

    def __init__(self, method: Method, total: int, steps_per_epoch: int, log_every: int, lines: list[dict[str, Any]], step: int):
        """`lines` are the run's records so far, up to `step`: an alarm that they hold is not called again."""
        self.monitor, self.log_every = Monitor(method, total), log_every
        self.alarms = Alarms(method, total, steps_per_epoch, called_before(lines, step))

    def at_start(self, t: Progress, drift: float | None) -> list[Alarm]:
        """What can be warned of before the first step; `drift` is what the checkpoint says of the distance to the teacher."""
        return self.alarms.at_start(t, drift)

    def before_update(self, t: Progress) -> None:
        """Call before a step that will be logged."""
        self.monitor.look(t)

    def log(self, t: Progress, line: dict[str, float], write: Write) -> tuple[dict[str, float], list[Alarm]]:
        """What that step adds to its log line, and what is to be warned of; now and then health and both gradients are written too."""
        more = self.monitor.read(line)
        warnings = self.alarms.at_log(t, line | more, self.monitor)
        if self.monitor.due(t.step, self.log_every) and (found := self.monitor.slow()):
            write("health", **found)
            warnings += self.alarms.at_health(t, found, self.monitor)
        return more, warnings

    def lidar(self, batch: dict[str, Tensor], step: int, since: int) -> float | None:
        """LiDAR on a fixed batch of at least two images, unless it was measured a short while ago: `since` steps before the milestone."""
        several = all(len(values) > 1 for values in batch.values())
        return self.monitor.lidar(batch) if several and self.monitor.due_lidar(step, since) else None
