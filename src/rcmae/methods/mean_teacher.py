"""What all methods with a mean teacher share: when it moves, how far, and what it is worth knowing of it."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..config import Recipe, Rules, Section, parse_half_life, readable
from ..engine.schedules import Progress, cosine
from ..models.backbone import Backbone
from ..models.teacher import Teacher
from .base import Method

MSN_STRETCH = 1.25
"MSN's momentum rises in a straight line that would reach 1 after 1.25 runs (its code)."


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(Section):
    """The mean teacher."""

    schedule: Literal["half-life", "described", "released", "linear"] = "half-life"
    "teacher momentum: constant, from `half_life`; a cosine to 1 (RC-MAE's text, DINO); constant (RC-MAE's code); linear towards 1 (MSN)"
    momentum: float = 0.996
    "where `described` and `linear` start, where `released` stays; `half-life` does not use it"
    half_life: str = "0.5%"
    "how long a student stays half remembered: '0.5%' of the run, '173 steps', '2e6 images', '0.5 epochs' or 'auto'"
    ema_updates: int = 1
    "teacher updates an optimizer step; the official code makes one a micro-batch (ViT-B and L: 2)"

    def rules(self) -> Rules:
        return [
            (0 <= self.momentum <= 1, f"momentum must lie in 0 to 1, not {self.momentum}"),
            (self.ema_updates >= 1, f"ema_updates must be 1 or more, not {self.ema_updates}"),
            readable(parse_half_life, self.half_life),
        ]


@dataclass(frozen=True, kw_only=True)
class MeanTeacherRecipe(Recipe):
    """Of every method with a mean teacher."""

    teacher: TeacherSettings = TeacherSettings()


class MeanTeacher(Method):
    """A method with a teacher, an exponential moving average of the student, that moves after every applied optimizer step."""

    networks = ("student", "teacher")
    recipe: MeanTeacherRecipe
    teacher: Teacher

    def before_step(self, t: Progress, applied: Tensor) -> None:
        # RC-MAE's code moves the teacher after every micro-batch, all but the last towards the student as it was.
        for _ in range(self.recipe.teacher.ema_updates - 1):
            self.teacher.update(self.followed, self.momentum(t), applied)

    def after_step(self, t: Progress, applied: Tensor) -> None:
        self.teacher.update(self.followed, self.momentum(t), applied)

    def momentum(self, t: Progress) -> float | Tensor:
        """Momentum of one teacher update; a scalar on the device where it is steered."""
        r = self.recipe.teacher
        if r.schedule == "released":
            return r.momentum
        if r.schedule == "described":
            return cosine(r.momentum, 1.0, t.fraction)
        if r.schedule == "linear":
            return r.momentum + (1 - r.momentum) * t.fraction / MSN_STRETCH
        return 0.5 ** (1 / (self.half_life(t) * r.ema_updates))

    def momentum_per_step(self, t: Progress) -> float:
        return float(self.momentum(t)) ** self.recipe.teacher.ema_updates

    def half_life(self, t: Progress) -> float | Tensor:
        """The recipe's half-life in optimizer steps."""
        number, unit = parse_half_life(self.recipe.teacher.half_life)
        steps = {"%": t.total_steps / 100, "steps": 1, "images": 1 / self.recipe.optim.batch_size, "epochs": t.steps_per_epoch}
        return number * steps[unit]

    def backbone(self, which: str = "teacher") -> Backbone:
        model = self.followed if which == "student" else self.teacher.model
        return Backbone(model.encoder.vit, *self.statistics)

    def state(self, t: Progress) -> dict[str, float | Tensor]:
        return teacher_clock(self.momentum_per_step(t), t, self.recipe.optim.batch_size) | {"drift": self.teacher.drift(self.followed)}


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
