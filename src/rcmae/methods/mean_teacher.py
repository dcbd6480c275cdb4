"""What all methods with a mean teacher share: its updates, its momentum schedule, and its diagnostics."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..config import Recipe, Rules, Section, parse_half_life, readable
from ..engine.schedules import Progress, cosine, fraction_of_run
from ..models.backbone import Backbone
from ..models.encoder import Encoder
from ..models.teacher import Teacher
from .base import Method
from .diagnostics import BlockFigure, Curve, Figure, Panel

MSN_STRETCH = 1.25
"In MSN's code, the momentum rises on a line that would reach 1 after 1.25 times the run."


LEAST_HALF_LIFE = 5.0
"The shortest default half-life in steps."

SHORT_HALF_LIFE = 4.9
"Half-life in steps below which the teacher is nearly the student, and the run nearly one without a teacher."

DEFAULT_HALF_LIFE = "0.5%"
"Published momenta are for runs of half a million steps; a half-life relative to the run fits any length."


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(Section):
    """The mean teacher."""

    resets: ClassVar[Mapping[str, tuple[str, ...]]] = {"schedule": ("half_life",)}
    "changing the schedule resets the half-life of a recipe"
    schedule: Literal["half-life", "cosine", "constant", "linear"] = "half-life"
    """schedule of the momentum: half-life: constant, set by half_life; cosine: to 1 (RC-MAE's paper, DINO);
    constant: set by momentum (RC-MAE's code); linear: towards 1 (MSN)"""
    momentum: float = 0.996
    "initial value for `cosine` and `linear`, the value for `constant`; not used by `half-life`"
    half_life: str | None = None
    """time in which a student's weight in the teacher halves, for schedule `half-life` only: '0.5%' of the
    run, '173 steps', '2e6 images', '0.5 epochs' or 'adaptive'; default: 0.5% of the run, but at least five
    steps"""
    ema_updates: int = 1
    "teacher updates per optimizer step; the official code makes one per micro-batch (ViT-B and L: 2)"

    def rules(self) -> Rules:
        return [
            *self.each("must lie in 0 to 1", "momentum"),
            *self.each("must be 1 or more", "ema_updates"),
            readable(parse_half_life, self.half_life),
            (
                self.half_life is None or self.schedule == "half-life",
                f"half_life has no effect under schedule {self.schedule}: leave it out, or set the schedule "
                "to half-life",
            ),
        ]

    @property
    def memory(self) -> tuple[float, str]:
        """The half-life as a number and a unit: see `parse_half_life`."""
        return parse_half_life(DEFAULT_HALF_LIFE if self.half_life is None else self.half_life)


@dataclass(frozen=True, kw_only=True)
class MeanTeacherRecipe(Recipe):
    """The recipe of every method with a mean teacher."""

    teacher: TeacherSettings = TeacherSettings()


def latent_rules(recipe: MeanTeacherRecipe, encoder: Encoder) -> Rules:
    """Rules of methods that compare features, of the class token too, instead of reconstructing pixels."""
    return [
        (
            encoder.vit.has_class_token,
            f"{recipe.method} reads the class token, which {recipe.network.model} does not have",
        ),
        (
            recipe.teacher.memory[1] != "adaptive",
            "half_life adaptive needs a reconstruction loss: give a length",
        ),
    ]


class MeanTeacher(Method):
    """A method with a teacher, an exponential moving average of the student, that is updated after every
    applied optimizer step."""

    networks = ("student", "teacher")
    memory_text = "The teacher's half-life over the run: it follows its schedule."
    "caption of the half-life in the report"
    recipe: MeanTeacherRecipe
    teacher: Teacher[Any]  # never None

    def before_step(self, t: Progress, applied: Tensor) -> None:
        # RC-MAE's code updates the teacher after every micro-batch: all but the last update use the student
        # before the step.
        for _ in range(self.recipe.teacher.ema_updates - 1):
            self.teacher.update(self.ema_source, self.momentum(t), applied)

    def after_step(self, t: Progress, applied: Tensor) -> None:
        self.teacher.update(self.ema_source, self.momentum(t), applied)

    def momentum(self, t: Progress) -> float | Tensor:
        """Momentum of one teacher update; a scalar on the device if it is adaptive."""
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
        steps = {
            "%": t.total_steps / 100,
            "steps": 1,
            "images": 1 / self.recipe.optim.batch_size,
            "epochs": t.steps_per_epoch,
        }
        length = number * steps[unit]
        return max(length, LEAST_HALF_LIFE) if self.recipe.teacher.half_life is None else length

    @property
    def shorter_memory(self) -> str:
        half_life = self.recipe.teacher.schedule == "half-life"
        return "a shorter --half-life" if half_life else "a lower --momentum"

    @property
    def longer_memory(self) -> str:
        half_life = self.recipe.teacher.schedule == "half-life"
        return "a longer --half-life" if half_life else "a higher --momentum"

    def backbone(self, which: str = "teacher") -> Backbone:
        model = self.ema_source if which == "student" else self.teacher.model
        return Backbone(model.encoder.vit, *self.statistics)

    def state(self, t: Progress) -> dict[str, float | Tensor]:
        units = half_life_units(self.momentum_per_step(t), t, self.recipe.optim.batch_size)
        return units | {"drift": self.teacher.drift(self.ema_source)}

    @classmethod
    def panels(cls) -> tuple[Panel, ...]:
        text = (
            "The teacher is an exponential moving average of past students, and a target for the student. "
            "Its half-life, the time in which a student's weight in the average halves, means the same at "
            "every batch size and length of the run."
        )
        rows = (
            ("momentum per step", "momentum", lambda v: f"{v:.5f}"),
            ("half-life in steps", "half_life_steps", _number),
            ("half-life in images", "half_life_images", _number),
            ("half-life in epochs", "half_life_epochs", _number),
            ("half-life", "half_life_fraction", lambda v: "never" if v is None else fraction_of_run(v)),
        )
        momentum = (
            "The teacher's momentum per step, measured on its weights, and that of the recipe. The thin line "
            "should lie inside the broad one: above it the teacher does not move, below it moves too often, "
            "for example once per micro-batch."
        )
        distance = (
            "Distance of student and teacher in each block, relative to the norm of its weights. It falls "
            "with the learning rate. A block far above its neighbors still changes fast; one without a point "
            "is not trained."
        )
        both = (
            Curve("expected_momentum", "expected", "teacher", "band"),
            Curve("measured_momentum", "measured", "ink"),
        )
        figures = (
            Figure("figure-momentum", "momentum per step", both, momentum, span=0.01),
            Figure(
                "figure-half-life",
                "half-life, steps",
                (Curve("half_life_steps", "", "teacher"),),
                cls.memory_text,
                changing=True,
                right=("% of the run", "half_life_fraction", 100.0),
            ),
            BlockFigure("figure-distance", "distance", "distance", distance, times=3, log=True),
        )
        drift = (
            "Weight gap: |student − teacher| / |student|. A sudden rise means that the learning rate is "
            "too high."
        )
        more = (Figure("figure-drift", "weight gap", (Curve("drift", "", "both"),), drift, log=True),)
        title = "More on the teacher: distance in weights"
        return (Panel("teacher", "The mean teacher", text, rows, figures, more, title),)


def _number(value: float | None) -> str:
    if value is None:
        return "infinite"
    return f"{value:.3f}" if value < 1 else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def half_life_units(momentum: float, t: Progress, batch_size: int) -> dict[str, float]:
    """The momentum per optimizer step, and its half-life in steps, images, epochs and as a fraction of the
    run."""
    steps = float("inf") if momentum >= 1 else 0.0 if momentum <= 0 else -1 / math.log2(momentum)
    return {
        "momentum": momentum,
        "half_life_steps": steps,
        "half_life_images": steps * batch_size,
        "half_life_epochs": steps / t.steps_per_epoch,
        "half_life_fraction": steps / t.total_steps,
    }
