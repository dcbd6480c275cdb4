"""What all methods with a mean teacher share: when it moves, how far, and what it is worth knowing of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..config import Recipe, Rules, Section, parse_half_life, readable
from ..engine.schedules import Progress, cosine, share_of_run
from ..models.backbone import Backbone
from ..models.teacher import Teacher
from .base import Method
from .diagnostics import BlockFigure, Curve, Figure, Panel

MSN_STRETCH = 1.25
"MSN's momentum rises in a straight line that would reach 1 after 1.25 runs (its code)."


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(Section):
    """The mean teacher."""

    replaces: ClassVar[Mapping[str, tuple[str, ...]]] = {"schedule": ("half_life",)}
    "a recipe's half-life does not go over to another schedule"
    schedule: Literal["half-life", "cosine", "constant", "linear"] = "half-life"
    """how momentum changes over the run: constant, set by half_life; cosine to 1 (RC-MAE's paper, DINO); constant, set by momentum
    (RC-MAE's code); linear towards 1 (MSN)"""
    momentum: float = 0.996
    "where `cosine` and `linear` start, where `constant` stays; `half-life` does not use it"
    half_life: str | None = None
    """how long a student stays half remembered, under the schedule `half-life` alone: '0.5%' of the run (the default), '173 steps',
    '2e6 images', '0.5 epochs' or 'auto'"""
    ema_updates: int = 1
    "teacher updates an optimizer step; the official code makes one a micro-batch (ViT-B and L: 2)"

    def rules(self) -> Rules:
        return [
            (0 <= self.momentum <= 1, f"momentum must lie in 0 to 1, not {self.momentum}"),
            (self.ema_updates >= 1, f"ema_updates must be 1 or more, not {self.ema_updates}"),
            readable(parse_half_life, self.half_life),
            (
                self.half_life is None or self.schedule == "half-life",
                f"half_life has no effect under schedule {self.schedule}: leave it out, or give schedule half-life",
            ),
        ]

    @property
    def memory(self) -> tuple[float, str]:
        """The half-life as a number and its unit: see `parse_half_life`."""
        return parse_half_life("0.5%" if self.half_life is None else self.half_life)


@dataclass(frozen=True, kw_only=True)
class MeanTeacherRecipe(Recipe):
    """Of every method with a mean teacher."""

    teacher: TeacherSettings = TeacherSettings()


class MeanTeacher(Method):
    """A method with a teacher, an exponential moving average of the student, that moves after every applied optimizer step."""

    networks = ("student", "teacher")
    memory_text = "The teacher's memory over the run: it follows its schedule."
    "what the report says under the half-life"
    recipe: MeanTeacherRecipe
    teacher: Teacher  # not None here

    def before_step(self, t: Progress, applied: Tensor) -> None:
        # RC-MAE's code moves the teacher after every micro-batch, all but the last towards the student as it was.
        for _ in range(self.recipe.teacher.ema_updates - 1):
            self.teacher.update(self.ema_source, self.momentum(t), applied)

    def after_step(self, t: Progress, applied: Tensor) -> None:
        self.teacher.update(self.ema_source, self.momentum(t), applied)

    def momentum(self, t: Progress) -> float | Tensor:
        """Momentum of one teacher update; a scalar on the device where it is steered."""
        r = self.recipe.teacher
        if r.schedule == "constant":
            return r.momentum
        if r.schedule == "cosine":
            return cosine(r.momentum, 1.0, t.fraction)
        if r.schedule == "linear":
            return r.momentum + (1 - r.momentum) * t.fraction / MSN_STRETCH
        return 0.5 ** (1 / (self.half_life(t) * r.ema_updates))

    def momentum_per_step(self, t: Progress) -> float:
        return float(self.momentum(t)) ** self.recipe.teacher.ema_updates

    def half_life(self, t: Progress) -> float | Tensor:
        """The recipe's half-life in optimizer steps."""
        number, unit = self.recipe.teacher.memory
        steps = {"%": t.total_steps / 100, "steps": 1, "images": 1 / self.recipe.optim.batch_size, "epochs": t.steps_per_epoch}
        return number * steps[unit]

    @property
    def shorter(self) -> str:
        """What gives the teacher a shorter memory, under the schedule of the run."""
        return "a shorter --half-life" if self.recipe.teacher.schedule == "half-life" else "a lower --momentum"

    @property
    def longer(self) -> str:
        """What gives it a longer one."""
        return "a longer --half-life" if self.recipe.teacher.schedule == "half-life" else "a higher --momentum"

    def backbone(self, which: str = "teacher") -> Backbone:
        model = self.ema_source if which == "student" else self.teacher.model
        return Backbone(model.encoder.vit, *self.statistics)

    def state(self, t: Progress) -> dict[str, float | Tensor]:
        return teacher_clock(self.momentum_per_step(t), t, self.recipe.optim.batch_size) | {"drift": self.teacher.drift(self.ema_source)}

    @classmethod
    def panels(cls) -> tuple[Panel, ...]:
        """The clock of the teacher in all units, whether it keeps to it, and how far it is from the student."""
        text = "The teacher is a slow average of past students, and the student is asked to agree with it. Its half-life says how long a "
        text += "student stays half remembered, and means the same at every batch size and length."
        rows = (
            ("momentum an optimizer step", "momentum", lambda v: f"{v:.5f}"),
            ("half-life in steps", "half_life_steps", _number),
            ("half-life in images", "half_life_images", _number),
            ("half-life in epochs", "half_life_epochs", _number),
            ("half-life as a share of the run", "half_life_share", lambda v: "never" if v is None else share_of_run(v)),
        )
        kept = "What the teacher kept of itself in a step, measured on its weights, against what the recipe says. The thin line belongs "
        kept += "inside the broad one: above it the teacher stands still, below it moves too often, for example once a micro-batch."
        apart = (
            "Distance of student and teacher in each block, as a share of its weights: it falls with the learning rate. A block far above "
        )
        apart += "its neighbors still changes fast; one without a point does not learn."
        both = Curve("expected_momentum", "expected", "teacher", "band"), Curve("measured_momentum", "measured", "ink")
        figures = (
            Figure("figure-momentum", "momentum a step", both, kept, span=0.01),
            Figure(
                "figure-half-life", "half-life, steps", (Curve("half_life_steps", "", "teacher"),), cls.memory_text, changing=True,
                right=("% of the run", "half_life_share", 100.0),
            ),
            BlockFigure("figure-distance", "distance", "distance", apart, times=3, log=True),
        )  # fmt: skip
        drift = "Gap in weights: |student − teacher| / |student|. A sudden rise means a learning rate that is too high."
        more = (Figure("figure-drift", "weight gap", (Curve("drift", "", "both"),), drift, log=True),)
        return (Panel("teacher", "The mean teacher", text, rows, figures, more, "More on the teacher: distance in weights"),)


def _number(value: float | None) -> str:
    return "never forgets" if value is None else f"{value:.3f}" if value < 1 else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def teacher_clock(momentum: float, t: Progress, batch_size: int) -> dict[str, float]:
    """Momentum an optimizer step in all its units: half-life in steps, images, epochs and share of the run."""
    steps = float("inf") if momentum >= 1 else 0.0 if momentum <= 0 else -1 / math.log2(momentum)
    return {
        "momentum": momentum,
        "half_life_steps": steps,
        "half_life_images": steps * batch_size,
        "half_life_epochs": steps / t.steps_per_epoch,
        "half_life_share": steps / t.total_steps,
    }
