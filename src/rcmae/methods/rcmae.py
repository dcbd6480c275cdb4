"""RC-MAE: reconstruction-consistent masked auto-encoding (Lee et al., ICLR 2023, arXiv 2210.02077).

    L = mean |s - x|^2 + gamma * mean |s - t|^2          over the hidden patches
    teacher <- m * teacher + (1 - m) * student           after every applied optimizer step

t: the reconstruction of the mean teacher from the same visible patches (S, the default) or from its own (D).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NotRequired

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from ..config import Rules, Section
from ..engine.distributed import average
from ..engine.schedules import Progress
from ..models.patches import take
from ..models.teacher import Teacher
from .base import Comparison
from .diagnostics import BlockFigure, Curve, Figure, Numbers, Panel, Sentence, Variant
from .mae import MAE, CropAndMask, MAERecipe
from .mae import Batch as BatchOfMAE
from .mean_teacher import MeanTeacher, MeanTeacherRecipe
from .reconstruction_loss import squared_errors

SHORTER = "shorten --half-life (under another schedule lower --momentum)"
"What helps against a teacher that lags."


@dataclass(frozen=True, kw_only=True)
class RCMAESettings(Section):
    """What RC-MAE adds to MAE."""

    gamma: float = 1.0
    "weight of the consistency with the teacher; 0 is MAE"
    teacher_mask: Literal["same", "different"] = "same"
    "the teacher sees the student's visible patches (the paper's S), or draws its own (D)"

    def rules(self) -> Rules:
        return [(self.gamma >= 0, f"gamma must be 0 or more, not {self.gamma}")]


@dataclass(frozen=True, kw_only=True)
class RCMAERecipe(MAERecipe, MeanTeacherRecipe):
    """What `rcmae` is told."""

    method: str = "rcmae"
    rcmae: RCMAESettings = RCMAESettings()


class Batch(BatchOfMAE):
    """As MAE's."""

    teacher_order: NotRequired[Int[Tensor, "b n"]]
    "D: the first patches are what the teacher sees"


class RCMAE(MeanTeacher, MAE):
    """MAE that also agrees with a slow average of itself."""

    recipe_type = RCMAERecipe
    recipe: RCMAERecipe
    losses: ClassVar[dict[str, str]] = {"loss": "loss", "reconstruction": "rec", "consistency": "cons", "teacher_reconstruction": "teacher"}
    collapse_advice = "lower --base-lr or --gamma, or lengthen --warmup"
    controls: ClassVar[tuple[Variant, ...]] = (
        Variant("mae averaged", {"gamma": 0.0}, "Averaged weights cost what MAE costs: with gamma 0 the student is MAE to the bit.", "mae"),
    )
    memory_text = (
        "The teacher's memory over the run. Steered by --half-life auto, it grows while the teacher is ahead and shrinks while it is "
    )
    memory_text += "behind, between 2 steps and a tenth of the run; otherwise it follows its schedule."

    def __init__(self, recipe: RCMAERecipe, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__(recipe, mean, std)
        self.teacher = Teacher(self.student)
        # Half-life in steps where half_life = "auto"; a buffer, so that checkpoints keep it. 0 until the length of the run is known.
        auto = recipe.teacher.memory[1] == "auto"
        self.register_buffer("adaptive_half_life", torch.zeros(()) if auto else None)
        self.pending_errors: list[Tensor] = []

    def views(self) -> CropAndMask:
        own = ("teacher_order",) if self.recipe.rcmae.teacher_mask == "different" else ()
        return CropAndMask(self.recipe.images, self.patches, ("order", *own))

    @property
    def last_layer(self) -> nn.Linear:
        return self.student.decoder.pred

    def compare(self, batch: Batch) -> Comparison:
        patches, order, gamma = self.normalize_and_patchify(batch["image"]), batch["order"], self.recipe.rcmae.gamma
        target = self.target(take(patches, order[:, self.visible :]))
        # The teacher runs first: nothing of it is kept when the student's activations are.
        if "teacher_order" not in batch:
            guess = self.teacher(patches, order, self.visible)
            return Comparison(self.student(patches, order, self.visible), target, guess, gamma=gamma)
        # D: consistency on the patches hidden from both (the paper leaves open on which; ours is stated).
        teacher_order, (b, n) = batch["teacher_order"], order.shape
        guess = self.teacher(patches, teacher_order, self.visible)
        rank = torch.empty_like(order).scatter_(1, teacher_order, torch.arange(n, device=order.device).expand(b, n))
        place = take(rank.unsqueeze(2), order[:, self.visible :]).squeeze(2) - self.visible  # below 0: the teacher saw it
        guess, counts = take(guess, place.clamp_min(0)), (place >= 0).float()
        return Comparison(self.student(patches, order, self.visible), target, guess, counts, gamma)

    def forward(self, batch: Batch, t: Progress) -> dict[str, Tensor]:
        c = self.compare(batch)
        self.watch(c)
        if c.weight is None:
            losses = squared_errors(c.prediction, c.target, c.guess, c.gamma)
        else:
            reconstruction, consistency = F.mse_loss(c.prediction, c.target), c.mean(c.prediction - c.guess)
            losses = {
                "loss": reconstruction + c.gamma * consistency,
                "reconstruction": reconstruction.detach(),
                "consistency": consistency.detach(),
                "teacher_reconstruction": c.mean(c.guess - c.target),
            }
        if self.adaptive_half_life is not None:
            own = losses["reconstruction"] if c.weight is None else c.mean((c.prediction - c.target).detach())
            self.pending_errors.append(torch.stack([own, losses["teacher_reconstruction"]]))
        return losses

    def after_step(self, t: Progress, applied: Tensor) -> None:
        super().after_step(t, applied)
        if self.adaptive_half_life is not None:
            self.adapt_half_life(t, applied)

    @torch.no_grad()
    def adapt_half_life(self, t: Progress, applied: Tensor) -> None:
        """`half_life = "auto"`: longer while the teacher reconstructs better than the student, shorter while worse.

        An advantage of 1 % or more moves the half-life by ln 2 steps a step, less moves it in proportion: so it grows no faster
        than the run does. Bounds: 2 steps, and a tenth of the run.
        """
        low, high = auto_bounds(t)
        own, theirs = average(torch.stack(self.pending_errors).mean(0))
        self.pending_errors.clear()
        change = (100 * (1 - theirs / own)).clamp(-1, 1) * math.log(2)
        self.adaptive_half_life.copy_((self.half_life(t) + torch.where(applied > 0, change, 0.0)).clamp(low, high))

    def half_life(self, t: Progress) -> float | Tensor:
        return super().half_life(t) if self.adaptive_half_life is None else self.adaptive_half_life.clamp(*auto_bounds(t))

    @torch.no_grad()
    def snapshot(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, facts = super().snapshot(batch)
        return tensors | {"teacher": self.teacher(self.normalize_and_patchify(batch["image"]), batch["order"], self.visible)}, facts

    # --- what a run shows of it -----------------------------------------------------------------------------------------

    @classmethod
    def derived(cls, means: Numbers) -> dict[str, float]:
        ahead = advantage(means)
        return {} if ahead is None else {"teacher_advantage": ahead}

    @classmethod
    def figures(cls) -> tuple[Figure, ...]:
        loss, *_ = super().figures()
        return (loss._replace(curves=(*loss.curves, Curve("teacher_reconstruction", "teacher", "teacher"))),)

    @classmethod
    def judge(cls, means: Numbers, reference: Numbers) -> list[Sentence]:
        sentences, ahead = super().judge(means, reference), advantage(means)
        if ahead is None:
            return sentences
        if abs(ahead) < 0.002:
            text = "Teacher and student reconstruct equally well now, so the teacher neither pulls ahead nor holds back."
            return [*sentences, ("note", text)]
        text = "On the same batches the teacher "
        if ahead < -1:
            text += f"errs {1 - ahead:,.1f} times as much as the student: "
        else:
            text += f"reconstructs {abs(ahead):.1%} {'better' if ahead > 0 else 'worse'} than the student: "
        if ahead > 0:
            return [*sentences, ("good", text + "it is ahead, so agreeing with it adds information.")]
        text += f"it lags, so agreeing with it slows the student down (normal early in a run; if it stays, {SHORTER})."
        return [*sentences, ("note", text)]

    @classmethod
    def panels(cls) -> tuple[Panel, ...]:
        """What the teacher does to the student, before how far it is from it."""
        ahead = "How much less the teacher errs than the student on the same batch. Above 0 it has something to teach; "
        ahead += f"if it stays below 0 past the first third of the run, {SHORTER}."
        pulls = "Where the teacher pulls, against where the images pull: 1 is the same way, 0 across, −1 straight back. "
        pulls += "Below 0 it takes back part of the steps before, as the theory says; above 0 it hurries the student on."
        shrinks = (
            "Length of the gradient with the teacher over its length without. Near 1 the teacher hardly matters; above 1 both push the "
        )
        shrinks += f"same way; if it stays far below 1 the teacher cancels what is learned: {SHORTER}, or lower --gamma."
        leads = "Length of the consistency gradient over that of the reconstruction gradient. Far below 1 the images lead, as they should; "
        leads += "above 1 the teacher does: lower --gamma if the loss stands still."
        where = "Cosine of both gradients by block, at the last look: which part of the network the teacher holds back (below 0)."
        gap = "Gap in output: root mean square of student minus teacher on hidden patches. It follows the learning rate."

        def gradients(key: str, *first: Curve) -> tuple[Curve, ...]:
            last = Curve(f"last_{key}", "gradients, last layer" if first else "last layer", "both", smooth=True)
            return (*first, last, Curve(f"gradient.{key}", last.label.replace("last layer", "whole network"), "both", "o"))

        def share(line: Numbers) -> float | None:
            found = advantage(line)
            return None if found is None else 100 * found

        (teacher,) = super().panels()
        errors = Curve("output_cosine", "errors of the output", "ink", smooth=True)
        figures = (
            Figure(
                "figure-advantage",
                "teacher advantage, %",
                (Curve(share, "", "teacher", smooth=True),),
                ahead,
                (("equal", 0.0),),
                symlog=1.0,
            ),
            Figure("figure-cosine", "cosine", gradients("cosine", errors), pulls, (("", 0.0),)),
            Figure("figure-shrink", "step with / without", gradients("shrink"), shrinks, (("no teacher", 1.0),)),
            *teacher.figures,
        )
        more = (
            Figure("figure-ratio", "gradient ratio", gradients("ratio"), leads, (("equal", 1.0),), log=True),
            BlockFigure("figure-blocks", "cosine", _cosines, where, levels=(("", 0.0),)),
            Figure("figure-gap", "output gap", (Curve(_gap, "", "both"),), gap, log=True),
            *teacher.more,
        )
        return (teacher._replace(figures=figures, more=more, more_title="More on the teacher: gradients and distances"),)


def advantage(line: Numbers) -> float | None:
    """Share by which the teacher errs less than the student."""
    own, theirs = line.get("reconstruction"), line.get("teacher_reconstruction")
    return (own - theirs) / own if own and theirs is not None else None


def _gap(line: Numbers) -> float | None:
    return None if line.get("consistency") is None else line["consistency"] ** 0.5


def _cosines(line: Numbers) -> dict[str, float] | None:
    found = line.get("gradient_by_block")
    return {block: values["cosine"] for block, values in found.items()} if found else None


def auto_bounds(t: Progress) -> tuple[float, float]:
    """Shortest and longest half-life, in steps, that `auto` may take."""
    return 2.0, max(2.0, t.total_steps / 10)
