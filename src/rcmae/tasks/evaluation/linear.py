"""Linear probing, by either of two protocols."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from .base import Pool, PooledTask, TaskResult

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..context import EvaluationContext


@dataclass(frozen=True, kw_only=True)
class Linear(PooledTask):
    """Linear probing on frozen features."""

    name = "linear"

    protocol: Literal["rates", "mae"] = "rates"
    """rates: SGD at 13 learning rates at once, the best of which is selected on held-out training images;
    mae: BatchNorm and LARS, as in MAE and RC-MAE"""
    batch: int | None = None
    "images per step; default: 1,024 for rates, 16,384 for mae"
    fit_steps: int | None = None
    "rates: steps; default: 100 epochs, but at least 500 and at most DINOv2's 12,500 steps"
    fit_epochs: int = 90
    "mae: epochs (the papers use 50 for ViT-L)"
    fit_lr: float = 0.1
    "mae: learning rate for a batch of 256"
    augment: bool = False
    "mae: new crops and flips in every epoch, as published, instead of features that are computed once"

    def validate(self) -> list[str]:
        problems = super().validate()
        if self.protocol == "mae" and self.batch == 1:
            problems.append("batch must be 2 or more: the mae protocol standardizes within a batch")
        return problems

    def default_feature(self, context: "EvaluationContext") -> tuple[Pool, int]:
        if self.protocol == "mae":
            return "cls", 1
        vit = getattr(context.backbone, "vit", None)
        return context.method.linear_feature(vit.embed_dim) if vit else ("mean", 1)

    def run(self, context: "EvaluationContext") -> TaskResult:
        from ...models.backbone import pooled
        from .. import linear_probe
        from ..context import ProbedModel

        pool, blocks = self.feature(context)
        layer, fit_settings = (self._rates if self.protocol == "rates" else self._mae)(context, pool, blocks)
        test = context.features("test", blocks=blocks)
        predictions = linear_probe.predict(layer, pooled(test, pool).to(context.device))
        correct = context.correct(predictions, test)
        model = ProbedModel(context.network(blocks), pool, layer)
        settings = asdict(self) | {"pool": pool, "blocks": blocks} | fit_settings
        return TaskResult({"top1": 100 * float(correct.mean())}, correct, model, settings)

    def _rates(
        self, context: "EvaluationContext", pool: Pool, blocks: int
    ) -> tuple["nn.Module", dict[str, Any]]:
        from ...models.backbone import pooled
        from .. import linear_probe

        train = context.training_features(blocks=blocks)
        images = len(train.labels)
        batch = min(self.batch or 1024, images)
        steps = self.fit_steps or min(max(500, 100 * (images // batch)), 12_500)
        with context.counting("fitting the linear layer", 2 * steps) as tick:
            fitted = linear_probe.fit_rates(
                pooled(train, pool).to(context.device),
                train.labels,
                len(context.set.classes),
                steps=steps,
                batch=batch,
                seed=context.options.seed,
                tick=tick,
            )
        return fitted.probe, {"batch": batch, "fit_steps": steps} | fitted.record()

    def _mae(
        self, context: "EvaluationContext", pool: Pool, blocks: int
    ) -> tuple["nn.Module", dict[str, Any]]:
        from ...models.backbone import pooled
        from .. import attentive_probe, linear_probe

        size = len(context.part("train"))
        batch = min(self.batch or 16384, size)
        steps = self.fit_epochs * (size // batch)
        batches: Iterable[tuple[Tensor, Tensor]]
        if self.augment:
            batches = (
                (pooled(features, pool), labels)
                for features, labels in context.crops(steps, batch, augment=True, blocks=blocks)
            )
        else:
            train = context.training_features(blocks=blocks)
            batches = attentive_probe.in_memory(
                pooled(train, pool).to(context.device), train.labels, steps, batch, context.options.seed
            )
            batches = context.counted("fitting the linear layer", steps, batches)
        width = pooled(context.features("test", blocks=blocks), pool).shape[1]
        layer = linear_probe.fit_mae(
            batches,
            width,
            len(context.set.classes),
            steps=steps,
            warmup=10 / max(self.fit_epochs, 20),
            batch=batch,
            base_lr=self.fit_lr,
            seed=context.options.seed,
            device=context.device,
        )
        return layer, {"batch": batch, "fit_steps": steps}
