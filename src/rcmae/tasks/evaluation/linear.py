"""A linear layer, by either of two protocols."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from .base import Pool, Task

if TYPE_CHECKING:
    from torch import nn

    from ..context import EvaluationContext, TaskResult


@dataclass(frozen=True, kw_only=True)
class Linear(Task):
    """A linear layer on frozen features."""

    name = "linear"

    protocol: Literal["rates", "mae"] = "rates"
    "rates: SGD at 13 learning rates at once, chosen on held-out training images; mae: LARS behind BatchNorm, as in MAE and RC-MAE"
    pool: Pool | None = None
    "what it reads; default: mean for rates, cls for mae"
    batch: int | None = None
    "images a step; default: 1,024 for rates, 16,384 for mae"
    fit_steps: int | None = None
    "steps of rates; default: 100 passes, but not below 500 nor above DINOv2's 12,500"
    fit_epochs: int = 90
    "passes of mae (50 for ViT-L there)"
    fit_lr: float = 0.1
    "learning rate of mae for a batch of 256"
    augment: bool = False
    "mae: new crops and flips in every pass, as published, instead of features that are computed once"

    def problems(self) -> list[str]:
        alone = self.protocol == "mae" and self.batch == 1
        return super().problems() + ["batch must be 2 or more: the protocol of mae standardises within a batch"] * alone

    def run(self, context: "EvaluationContext") -> "TaskResult":
        from .. import linear_probe
        from ..context import ProbedModel, TaskResult

        pool: Pool = self.pool or ("mean" if self.protocol == "rates" else "cls")
        layer, chose = (self._rates if self.protocol == "rates" else self._mae)(context, pool)
        test = context.features("test")
        hits = context.hits(linear_probe.predict(layer, test.pooled(pool).to(context.device)), test)
        settings = asdict(self) | {"pool": pool} | chose
        return TaskResult({"top1": 100 * float(hits.mean())}, hits, ProbedModel(context.backbone, pool, layer), settings)

    def _rates(self, context: "EvaluationContext", pool: Pool) -> tuple["nn.Module", dict[str, Any]]:
        from .. import linear_probe

        train, labels = context.fitted_on()
        batch = min(self.batch or 1024, len(labels))
        steps = self.fit_steps or min(max(500, 100 * (len(labels) // batch)), 12_500)
        with context.counting("fitting the linear layer", 2 * steps) as tick:
            found = linear_probe.fit_rates(
                train.pooled(pool).to(context.device), labels, len(context.set.classes), steps=steps, batch=batch,
                seed=context.options.seed, tick=tick,
            )  # fmt: skip
        held_out = {f"{k:g}": v for k, v in found.held_out.items()}
        return found.layer, {"batch": batch, "fit_steps": steps, "rate": found.rate, "held_out": held_out}

    def _mae(self, context: "EvaluationContext", pool: Pool) -> tuple["nn.Module", dict[str, Any]]:
        from .. import attentive_probe, linear_probe

        size = len(context.part("train"))
        batch = min(self.batch or 16384, size)
        steps = self.fit_epochs * (size // batch)
        if self.augment:
            batches = ((getattr(seen, pool), answers) for seen, answers in context.crops(steps, batch, augment=True))
        else:
            train, labels = context.fitted_on()
            batches = attentive_probe.in_memory(train.pooled(pool).to(context.device), labels, steps, batch, context.options.seed)
            batches = context.counted("fitting the linear layer", steps, batches)
        width = context.features("test").pooled(pool).shape[1]
        layer = linear_probe.fit_mae(
            batches, width, len(context.set.classes), steps=steps, warmup=10 / max(self.fit_epochs, 20), batch=batch, base_lr=self.fit_lr,
            seed=context.options.seed, device=context.device,
        )  # fmt: skip
        return layer, {"batch": batch, "fit_steps": steps}
