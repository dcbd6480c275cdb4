"""RC-MAE: reconstruction-consistent masked auto-encoding (Lee et al., ICLR 2023, arXiv 2210.02077).

    L = mean |s - x|^2 + gamma * mean |s - t|^2          over the hidden patches
    teacher <- m * teacher + (1 - m) * student           after every applied optimizer step

t: the mean teacher's reconstruction from the same visible patches (S, the default) or from others (D).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Rules, Section
from ..engine.distributed import average
from ..engine.schedules import Progress
from ..models.autoencoder import Autoencoder
from ..models.backbone import Channels
from ..models.patches import gather_tokens
from ..models.teacher import Teacher
from .base import Comparison
from .diagnostics import BlockFigure, Curve, Figure, Numbers, Panel, Sentence, Variant
from .mae import MAE, Batch, CropAndMask, MAERecipe
from .mean_teacher import SHORT_HALF_LIFE, MeanTeacher, MeanTeacherRecipe
from .reconstruction_loss import squared_errors

SHORTER = "shorten --half-life (under another schedule lower --momentum)"
"The advice for a teacher that lags behind the student."


@dataclass(frozen=True, kw_only=True)
class RCMAESettings(Section):
    """What RC-MAE adds to MAE."""

    gamma: float = 1.0
    "weight of the consistency loss; with 0 the student is that of MAE"
    teacher_mask: Literal["same", "different"] = "same"
    "the teacher sees the student's visible patches (the paper's S), or those of a different mask (D)"

    def rules(self) -> Rules:
        return self.each("must be 0 or more", "gamma")


@dataclass(frozen=True, kw_only=True)
class RCMAERecipe(MAERecipe, MeanTeacherRecipe):
    """The recipe of `rcmae`."""

    method: str = "rcmae"
    rcmae: RCMAESettings = RCMAESettings()


class RCMAE(MeanTeacher, MAE):
    """MAE with a consistency loss between the student and an exponential moving average of it."""

    recipe_type = RCMAERecipe
    recipe: RCMAERecipe
    teacher: Teacher[Autoencoder]
    adaptive_half_life: Tensor | None
    losses: ClassVar[dict[str, str]] = {
        "loss": "loss",
        "reconstruction": "rec",
        "consistency": "cons",
        "teacher_reconstruction": "teacher",
    }
    collapse_advice = "lower --base-lr or --gamma, or lengthen --warmup"
    controls: ClassVar[tuple[Variant, ...]] = (
        Variant(
            "mae averaged",
            {"gamma": 0.0},
            "Averaged weights cost as much as MAE: with gamma 0 the student is bit-identical to MAE's.",
            "mae",
        ),
    )
    memory_text = (
        "The teacher's half-life over the run. With --half-life adaptive it grows while the teacher is ahead "
        "and shrinks while it is behind, between 2 steps and a tenth of the run; otherwise it follows its "
        "schedule."
    )

    def __init__(self, recipe: RCMAERecipe, mean: Channels, std: Channels):
        super().__init__(recipe, mean, std)
        self.teacher = Teacher(self.student)
        # In steps, for half_life = "adaptive"; a buffer, so that checkpoints contain it. It starts at 0 and
        # `half_life` clamps it, since the length of the run is not known here.
        adaptive = recipe.teacher.memory[1] == "adaptive"
        self.register_buffer("adaptive_half_life", torch.zeros(()) if adaptive else None)
        self.pending_errors: list[Tensor] = []

    def views(self) -> CropAndMask:
        different = self.recipe.rcmae.teacher_mask == "different"
        orders = ("order", "teacher_order") if different else ("order",)
        return CropAndMask(self.recipe.images, self.patches, orders)

    @property
    def last_layer(self) -> nn.Linear:
        return self.student.decoder.pred

    def compare(self, batch: Batch) -> Comparison:
        patches, order = self.normalize_and_patchify(batch["image"]), batch["order"]
        gamma, hidden = self.recipe.rcmae.gamma, order[:, self.visible :]
        target = self.target(gather_tokens(patches, hidden))  # [b, m, p]
        # The teacher runs first, so that its activations are freed before the student saves its own.
        teacher_order, weight = batch.get("teacher_order", order), None
        teacher = self.teacher(patches, teacher_order, self.visible)
        if teacher_order is not order:
            # D: consistency on the patches hidden from both; the paper does not specify the patches. A patch
            # hidden from the student has an index among those hidden from the teacher, below 0 if it saw it.
            index = teacher_order.argsort(1).gather(1, hidden) - self.visible  # [b, m]
            teacher, weight = gather_tokens(teacher, index.clamp_min(0)), (index >= 0).float()
        return Comparison(self.student(patches, order, self.visible), target, teacher, weight, gamma)

    def forward(self, batch: Batch, t: Progress) -> dict[str, Tensor]:
        c = self.compare(batch)
        self.record_comparison(c)
        if c.weight is None:
            losses = squared_errors(c.prediction, c.target, c.teacher_prediction, c.gamma)
            student_error = losses["reconstruction"]
        else:
            reconstruction = F.mse_loss(c.prediction, c.target)
            consistency = c.mean_square(c.prediction - c.teacher_prediction)
            losses = {
                "loss": reconstruction + c.gamma * consistency,
                "reconstruction": reconstruction.detach(),
                "consistency": consistency.detach(),
                "teacher_reconstruction": c.mean_square(c.teacher_prediction - c.target),
            }
            student_error = c.mean_square((c.prediction - c.target).detach())  # on the teacher's patches
        if self.adaptive_half_life is not None:
            self.pending_errors.append(torch.stack([student_error, losses["teacher_reconstruction"]]))
        return losses

    @classmethod
    def accumulation_caveat(cls, recipe: RCMAERecipe) -> str:
        moves = recipe.teacher.ema_updates > 1
        return "the later ones see a teacher that has moved, as in RC-MAE's code" if moves else ""

    def after_micro_batch(self, t: Progress, part: int, parts: int) -> None:
        # The updates of a step are evenly spaced among its micro-batches; in the official code each follows
        # one. `before_step` makes them, unless the step is skipped.
        updates = self.recipe.teacher.ema_updates
        for _ in range(updates * part // parts - updates * (part - 1) // parts):
            self.teacher.look_ahead(self.ema_source, self.momentum(t))

    def after_step(self, t: Progress, applied: Tensor) -> None:
        super().after_step(t, applied)
        if self.adaptive_half_life is not None:
            self.adapt_half_life(self.adaptive_half_life, t, applied)

    @torch.no_grad()
    def adapt_half_life(self, half_life: Tensor, t: Progress, applied: Tensor) -> None:
        """`half_life = "adaptive"`: lengthen `half_life` while the teacher reconstructs better than the
        student, and shorten it while it reconstructs worse.

        An advantage of 1 % or more changes it by ln 2 steps per step, a smaller one in proportion, so that it
        grows no faster than the run. It stays between 2 steps and a tenth of the run.
        """
        student, teacher = average(torch.stack(self.pending_errors).mean(0))
        self.pending_errors.clear()
        change = (100 * (1 - teacher / student)).clamp(-1, 1) * math.log(2)
        half_life.copy_(
            (self.half_life(t) + torch.where(applied > 0, change, 0.0)).clamp(*adaptive_bounds(t))
        )

    def half_life(self, t: Progress) -> float | Tensor:
        if self.adaptive_half_life is None:
            return super().half_life(t)
        return self.adaptive_half_life.clamp(*adaptive_bounds(t))

    @torch.no_grad()
    def snapshot(
        self, batch: Batch, mask_ratio: float | None = None
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, facts = super().snapshot(batch, mask_ratio)
        patches, visible = self.normalize_and_patchify(batch["image"]), tensors["visible"].shape[1]
        return tensors | {"teacher": self.teacher(patches, batch["order"], visible)}, facts

    # --- diagnostics ----------------------------------------------------------------------------------------

    @classmethod
    def derived(cls, means: Numbers) -> dict[str, float]:
        value = advantage(means)
        return {} if value is None else {"teacher_advantage": value}

    @classmethod
    def figures(cls) -> tuple[Figure, ...]:
        loss, *_ = super().figures()
        return (loss._replace(curves=(*loss.curves, Curve("teacher_reconstruction", "teacher", "teacher"))),)

    @classmethod
    def judge(cls, means: Numbers, reference: Numbers) -> list[Sentence]:
        sentences, ahead = super().judge(means, reference), advantage(means)
        if ahead is None or cls.weak_teacher(means):
            return sentences
        if abs(ahead) < 0.002:
            text = "Teacher and student reconstruct equally well: the teacher neither helps nor slows down."
            return [*sentences, ("note", text)]
        text = "On the same batches, the teacher's reconstruction error is "
        if ahead < -1:
            text += f"{1 - ahead:,.1f} times the student's: "
        else:
            text += f"{abs(ahead):.1%} {'lower' if ahead > 0 else 'higher'} than the student's: "
        if ahead > 0:
            return [*sentences, ("good", text + "it is ahead, so consistency with it adds information.")]
        text += (
            "it lags, so consistency with it slows the student down (normal early in a run; if it stays, "
            f"{SHORTER})."
        )
        return [*sentences, ("note", text)]

    @classmethod
    def weak_teacher(cls, means: Numbers) -> str:
        half_life = means.get("half_life_steps", math.inf)
        if half_life > SHORT_HALF_LIFE:
            return ""
        return (
            f"The teacher's half-life is {half_life:.2g} steps: it is nearly the student, and the run is "
            "close to plain MAE. Lengthen --half-life (under another schedule raise --momentum)."
        )

    @classmethod
    def panels(cls) -> tuple[Panel, ...]:
        ahead = (
            "By how much the teacher's reconstruction error is lower than the student's on the same batch. "
            "Above 0 the teacher has something to teach; if it stays below 0 past the first third of a run, "
            f"{SHORTER}."
        )
        cosine = (
            "Cosine of the consistency gradient and the reconstruction gradient. Below 0 the teacher reverts "
            "part of the previous steps, as the theory predicts; above 0 it accelerates the student."
        )
        shrink = (
            "Norm of the gradient with the consistency loss over its norm without. Near 1 the teacher hardly "
            "matters; above 1 both gradients agree; if it stays far below 1, the teacher cancels what is "
            f"learned: {SHORTER}, or lower --gamma."
        )
        ratio = (
            "Norm of the consistency gradient over that of the reconstruction gradient. Far below 1 the "
            "reconstruction dominates, as it should; above 1 the teacher does: lower --gamma if the loss "
            "stagnates."
        )
        by_block = (
            "Cosine of the two gradients by block, at the last measurement: below 0 the teacher holds the "
            "block back."
        )
        gap = "Output gap: RMS of student − teacher on hidden patches. It follows the learning rate."

        def gradients(key: str, *first: Curve) -> tuple[Curve, ...]:
            prefix = "gradients, " if first else ""
            last = Curve(f"last_{key}", f"{prefix}last layer", "both", smooth=True)
            return (*first, last, Curve(f"gradient.{key}", f"{prefix}whole network", "both", "o"))

        def percentage(line: Numbers) -> float | None:
            value = advantage(line)
            return None if value is None else 100 * value

        (teacher,) = super().panels()
        errors = Curve("output_cosine", "errors of the output", "ink", smooth=True)
        advantages = (Curve(percentage, "", "teacher", smooth=True),)
        equal, unity = (("equal", 0.0),), (("equal", 1.0),)
        figures = (
            Figure("figure-advantage", "teacher advantage, %", advantages, ahead, equal, symlog=1.0),
            Figure("figure-cosine", "cosine", gradients("cosine", errors), cosine, (("", 0.0),)),
            Figure(
                "figure-shrink", "step with / without", gradients("shrink"), shrink, (("no teacher", 1.0),)
            ),
            *teacher.figures,
        )
        more = (
            Figure("figure-ratio", "gradient ratio", gradients("ratio"), ratio, unity, log=True),
            BlockFigure("figure-blocks", "cosine", _cosines, by_block, levels=(("", 0.0),)),
            Figure("figure-gap", "output gap", (Curve(_gap, "", "both"),), gap, log=True),
            *teacher.more,
        )
        title = "More on the teacher: gradients and distances"
        return (teacher._replace(figures=figures, more=more, more_title=title),)


def advantage(line: Numbers) -> float | None:
    """By which fraction the teacher's reconstruction error is lower than the student's."""
    student, teacher = line.get("reconstruction"), line.get("teacher_reconstruction")
    return (student - teacher) / student if student and teacher is not None else None


def _gap(line: Numbers) -> float | None:
    return None if line.get("consistency") is None else line["consistency"] ** 0.5


def _cosines(line: Numbers) -> dict[str, float] | None:
    blocks = line.get("gradient_by_block")
    return {block: values["cosine"] for block, values in blocks.items()} if blocks else None


def adaptive_bounds(t: Progress) -> tuple[float, float]:
    """Shortest and longest adaptive half-life in steps."""
    return 2.0, max(2.0, t.total_steps / 10)
