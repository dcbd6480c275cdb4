"""Named faults of a mean teacher, found by looking at a run. Each names its cause and the setting to change.

Thresholds were set on healthy runs of the embedded set and of small networks; `benchmarks/alarms.py` shows each alarm fired by
its fault and none on healthy runs.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engine.schedules import Progress
from ..methods import Method

PATIENCE = 3
"Looks in a row that must agree before a measured fault is called one."

LONGEST = 0.1
"Half-life, as a share of the run, above which what the teacher learned first is still in it at the end: 2**-10 and more of the weights."

DRAG = -0.1
"""Teacher advantage below which, past two thirds of the run, the teacher holds the student back. There, in runs of 100 steps, -0.04 was
measured at the longest half-life of `auto` (a tenth of the run), -0.07 under `cosine`, -0.17 at twice that half-life."""

CAUSES = {"teacher-still", "teacher-moves-twice", "teacher-stale", "momentum-one", "buffer-missed", "teacher-training", "schedule-stuck"}
"Faults that can make a teacher drag: once one is named, its consequence is not called too."


class Alarm(NamedTuple):
    """What is wrong, in one line that ends with what to do."""

    name: str
    text: str


class Alarms:
    """Collects what the instruments say of one run and calls each fault once."""

    def __init__(self, method: Method, total: int, steps_per_epoch: int, called: Iterable[str] = ()):
        """`called` names the alarms that were called before a resume: they are not called again."""
        self.method, self.total, self.steps_per_epoch = method, total, steps_per_epoch
        self.teacher = method.teacher
        self.called = set(called)
        self.rows: dict[str, int] = {}
        self.first_buffers = _buffers(method.ema_source), _buffers(self.teacher.model) if self.teacher is not None else {}

    def at_start(self, t: Progress, drift: float | None = None) -> list[Alarm]:
        """What can be said before a step is made. `drift` is the distance to the teacher that the checkpoint recorded."""
        if self.teacher is None:
            return []
        found = []
        # The first momentum, also in a resumed run: what a schedule grows to is no fault.
        kept, longest = self._momentum(0), max(2.0, LONGEST * self.total)
        if kept >= 1:
            text = "the teacher's momentum is 1 from the start: it will never learn; "
            found.append(Alarm("momentum-one", f"{text}give {self.method.shorter}"))
        elif kept > 0 and (steps := -1 / math.log2(kept)) > 1.01 * longest:
            text = (
                f"a half-life of {steps:,.0f} steps is {steps / self.total:.0%} of the run: what the teacher learned first is still in it "
            )
            text += f"at the end; give {self.method.shorter}, for {longest:,.0f} steps or less"
            found.append(Alarm("teacher-drag", text))
        if self._repeats():
            text = "the momentum schedule starts again every epoch and never reaches its end; count steps over the whole run, not the epoch"
            found.append(Alarm("schedule-stuck", text))
        if drift is not None:
            now = float(self.method.state(t)["drift"])
            if abs(now - drift) > 0.01 * max(drift, now):
                text = f"after the resume the teacher is {now:.4f} from the student, was {drift:.4f}: it is not the one that was saved; "
                advice = "go on from a checkpoint that holds the teacher, or start anew with another --out"
                found.append(Alarm("teacher-stale", text + advice))
        return self._new(found)

    def at_log(self, t: Progress, line: dict[str, float], monitor: Any) -> list[Alarm]:
        """What a log line shows; `monitor` holds what the last step compared."""
        if self.teacher is None:
            return []
        found = []
        kept, expected = line.get("measured_momentum"), line.get("expected_momentum")
        if kept is not None and expected is not None and 0 < expected < 1:
            updates = math.log(min(max(kept, 1e-12), 1.0)) / math.log(expected)
            if self._lasts("still", updates < 0.01):
                text = f"the teacher never moves, though its momentum is {expected:.4f}; call its update after every optimizer step"
                found.append(Alarm("teacher-still", text))
            if self._lasts("twice", updates > 1.5):
                text = f"the teacher moves {updates:.1f} times a step (momentum {expected:.4f}, measured {kept:.4f}): once a micro-batch? "
                found.append(Alarm("teacher-moves-twice", text + "move it after the optimizer's step only, or give --ema-updates"))
        if any(m.training for m in self.teacher.model.modules()):
            text = "the teacher is in training mode: dropout and batch statistics disturb its targets; call teacher.eval()"
            found.append(Alarm("teacher-training", text))
        if missed := self._missed_buffer():
            found.append(
                Alarm("buffer-missed", f"the student's buffer {missed} changes and the teacher's does not; average or copy buffers too")
            )
        advantage = line.get("teacher_advantage", 0.0)
        if self._lasts("drag", advantage < DRAG and t.fraction > 2 / 3 and not self.called & CAUSES):
            text = f"the teacher reconstructs {-advantage:.0%} worse than the student after {t.fraction:.0%} of the run: it is drag; "
            found.append(Alarm("teacher-drag", f"{text}give {self.method.shorter}"))
        if monitor.seen:
            looked = {"predictions": monitor.seen[0].prediction[:8], "teacher's predictions": monitor.seen[0].guess[:8]}
            rounded = [name for name, v in (looked | {"losses": monitor.losses}).items() if v is not None and _rounded(v)]
            if self._lasts("rounded", bool(rounded)):
                text = f"the {rounded[0]} are rounded to 16 bits, so the gap to the teacher is noise; "
                found.append(Alarm("low-precision", text + "compute the last layer and the losses in float32, or give --precision fp32"))
        return self._new(found)

    def at_health(self, t: Progress, health: dict[str, Any], monitor: Any) -> list[Alarm]:
        """What the slow instruments show: has everything become the same?"""
        if t.fraction < 0.2 or "rankme" not in health:
            return []
        constant = monitor.seen and _constant(monitor.seen[0].prediction, monitor.seen[0].target)
        if constant or health["rankme"] < 1.5 or health["spread"] < 1e-3:
            what = "the same prediction for every image" if constant else f"features of effective rank {health['rankme']:.1f}"
            return self._new([Alarm("collapse", f"{what} at step {t.step}: collapsed; {self.method.collapse_advice}")])
        return []

    def _new(self, found: list[Alarm]) -> list[Alarm]:
        new = [a for a in found if a.name not in self.called]
        self.called |= {a.name for a in new}
        return new

    def _lasts(self, name: str, now: bool) -> bool:
        self.rows[name] = self.rows.get(name, 0) + 1 if now else 0
        return self.rows[name] >= PATIENCE

    def _repeats(self) -> bool:
        """A schedule that moves within an epoch and is back at its start with every new one."""
        epoch, epochs = self.steps_per_epoch, self.total // self.steps_per_epoch
        if epochs < 2 or epoch < 2:
            return False
        starts = {self._momentum(k * epoch) for k in range(min(epochs, 8))} | {self._momentum((epochs - 1) * epoch)}
        return len(starts) == 1 and self._momentum(epoch - 1) not in starts

    def _momentum(self, step: int) -> float:
        return float(self.method.momentum_per_step(Progress(step, self.total, self.steps_per_epoch)))

    def _missed_buffer(self) -> str | None:
        own, other = _buffers(self.method.ema_source), _buffers(self.teacher.model)
        for name in own.keys() & other.keys():
            if not torch.equal(own[name], self.first_buffers[0][name]) and torch.equal(other[name], self.first_buffers[1][name]):
                return name
        return None


def called_before(lines: list[dict[str, Any]], step: int) -> set[str]:
    """Names of the alarms among a run's records, when it goes on at `step`.

    A stale teacher is an alarm of one resume: a later resume that loses the teacher calls it again.
    """
    return {a["name"] for a in lines if a["kind"] == "alarm" and (a["name"] != "teacher-stale" or a["step"] == step)}


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: b.detach().clone() for name, b in module.named_buffers() if b.is_floating_point()}


def _rounded(values: Tensor) -> bool:
    """Every value is one that 16 bits hold; all of them being equal proves nothing."""
    return bool(values.std() > 0) and any(torch.equal(values, values.to(short).float()) for short in (torch.bfloat16, torch.float16))


def _constant(prediction: Tensor, target: Tensor) -> bool:
    """The prediction does not depend on the image."""
    return len(prediction) > 1 and bool(prediction.var(0).mean() < 1e-6 * target.var(0).mean())
