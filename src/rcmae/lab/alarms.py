"""Alarms for known faults of training with a mean teacher. Each names the cause and the setting to change.

Thresholds were set on healthy runs of the bundled set and of small networks; `benchmarks/alarms.py` shows
that every fault raises its alarm, and that healthy runs raise none.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.schedules import Progress
from ..methods import Method
from ..methods.mean_teacher import LEAST_HALF_LIFE
from .monitor import Monitor

PATIENCE = 3
"Consecutive measurements that must show a fault before its alarm is raised."

LONGEST = 0.1
"""Half-life, as a fraction of the run, above which the earliest students still contribute 2**-10 or more of
the teacher's weights at the end."""

DRAG = -0.1
"""Teacher advantage below which, past two thirds of the run, the teacher holds the student back. In runs of
100 steps, -0.04 was measured at the longest half-life of `adaptive` (a tenth of the run), -0.07 under
`cosine`, and -0.17 at twice that half-life."""

CAUSES = {"teacher-stale", "momentum-one"}
"Faults that can cause `teacher-drag`, which is not raised after one of them."


class Alarm(NamedTuple):
    """A fault in one line that ends with what to do."""

    name: str
    text: str


class Alarms:
    """Checks the diagnostics of a run and raises each alarm once."""

    def __init__(self, method: Method, total: int, steps_per_epoch: int, raised: Iterable[str] = ()):
        """`raised` names the alarms from before a resume, which are not raised again."""
        self.method, self.total, self.steps_per_epoch = method, total, steps_per_epoch
        self.raised = set(raised)
        self.consecutive: dict[str, int] = {}

    def at_start(self, t: Progress, drift: float | None = None) -> list[Alarm]:
        """Alarms before the first step. `drift` is the distance of student and teacher according to the
        checkpoint."""
        if self.method.teacher is None:
            return []
        alarms = []
        # The initial momentum, also in a resumed run, since a schedule may well end at 1.
        first = Progress(0, self.total, self.steps_per_epoch)
        momentum, longest = self.method.momentum_per_step(first), max(LEAST_HALF_LIFE, LONGEST * self.total)
        if momentum >= 1:
            text = "the teacher's momentum is 1 from the start, so it will never learn; give "
            alarms.append(Alarm("momentum-one", text + self.method.shorter_memory))
        elif momentum > 0 and (steps := -1 / math.log2(momentum)) > 1.01 * longest:
            text = (
                f"a half-life of {steps:,.0f} steps is {steps / self.total:.0%} of the run: the earliest "
                f"weights are still in the teacher at the end; give {self.method.shorter_memory}, of "
                f"{longest:,.0f} steps or fewer"
            )
            alarms.append(Alarm("teacher-drag", text))
        if drift is not None:
            now = float(self.method.state(t)["drift"])
            if abs(now - drift) > 0.01 * max(drift, now):
                text = (
                    f"after the resume, the distance of student and teacher is {now:.4f} instead of "
                    f"{drift:.4f}, so this is not the saved teacher; resume from a checkpoint with the "
                    "teacher, or start from scratch with another --out"
                )
                alarms.append(Alarm("teacher-stale", text))
        return self._new(alarms)

    def at_log(self, t: Progress, line: dict[str, float], monitor: Monitor) -> list[Alarm]:
        """Alarms from a log line and from the last comparison in `monitor`."""
        if self.method.teacher is None:
            return []
        alarms = []
        advantage = line.get("teacher_advantage", 0.0)
        if self._persists("drag", advantage < DRAG and t.fraction > 2 / 3 and not self.raised & CAUSES):
            text = (
                f"the teacher's reconstruction error is {-advantage:.0%} higher than the student's after "
                f"{t.fraction:.0%} of the run, so it slows the student down; give "
                f"{self.method.shorter_memory}"
            )
            alarms.append(Alarm("teacher-drag", text))
        if c := monitor.comparison:
            outputs = {
                "predictions": c.prediction[:8],
                "teacher's predictions": c.teacher_prediction[:8],
                "losses": monitor.losses,
            }
            rounded = [name for name, v in outputs.items() if v is not None and _rounded(v)]
            if self._persists("rounded", bool(rounded)):
                text = (
                    f"the {rounded[0]} are rounded to 16 bits, so the gap to the teacher is noise; compute "
                    "the last layer and the losses in float32, or give --precision fp32"
                )
                alarms.append(Alarm("low-precision", text))
        return self._new(alarms)

    def at_health(self, t: Progress, health: dict[str, Any], monitor: Monitor) -> list[Alarm]:
        """The alarm for collapse, from the slow diagnostics."""
        if t.fraction < 0.2 or "rankme" not in health:
            return []
        c = monitor.comparison
        constant = c is not None and _constant(c.prediction, c.target)
        if constant or health["rankme"] < 1.5 or health["spread"] < 1e-3:
            rank = f"features of effective rank {health['rankme']:.1f}"
            symptom = "the same prediction for every image" if constant else rank
            text = f"{symptom} at step {t.step}: collapsed; {self.method.collapse_advice}"
            return self._new([Alarm("collapse", text)])
        return []

    def _new(self, alarms: list[Alarm]) -> list[Alarm]:
        new = [a for a in alarms if a.name not in self.raised]
        self.raised |= {a.name for a in new}
        return new

    def _persists(self, name: str, present: bool) -> bool:
        self.consecutive[name] = self.consecutive.get(name, 0) + 1 if present else 0
        return self.consecutive[name] >= PATIENCE


def raised_before(lines: list[dict[str, Any]], step: int) -> set[str]:
    """Names of the alarms in the records of a run that resumes at `step`.

    `teacher-stale` belongs to one resume, so a later resume that loses the teacher raises it again.
    """
    return {
        a["name"]
        for a in lines
        if a["kind"] == "alarm" and (a["name"] != "teacher-stale" or a["step"] == step)
    }


def _rounded(values: Tensor) -> bool:
    """Whether every value is representable in 16 bits, unless all are equal."""
    return bool(values.std() > 0) and any(
        torch.equal(values, values.to(short).float()) for short in (torch.bfloat16, torch.float16)
    )


def _constant(prediction: Tensor, target: Tensor) -> bool:
    """Whether the prediction does not depend on the image."""
    return len(prediction) > 1 and bool(prediction.var(0).mean() < 1e-6 * target.var(0).mean())
