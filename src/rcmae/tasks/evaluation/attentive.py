"""Attention over all tokens, then a linear layer."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from .base import Task, TaskResult

if TYPE_CHECKING:
    from ..context import EvaluationContext

TOKENS_IN_MEMORY = 16 * 2**30
"Bytes of tokens to cache; above this limit they are recomputed in every epoch, as in the papers."


@dataclass(frozen=True, kw_only=True)
class Attentive(Task):
    """Attention over the tokens of a frozen backbone: the most informative probe of masked image models."""

    name = "attentive"

    kind: Literal["efficient", "latent"] = "efficient"
    """efficient: several queries, no key projection (Efficient Probing); latent: one query in a full
    attention layer with an MLP"""
    queries: int = 12
    "number of queries, or of heads of the single query; lowered to a divisor of the width"
    fit_steps: int | None = None
    "steps; default: 40 epochs, but at least 500 and at most 50,000 steps"
    batch: int = 1024
    "images per step"

    def required_features(self, context: "EvaluationContext") -> Literal["tokens"] | None:
        return "tokens" if context.token_bytes() <= TOKENS_IN_MEMORY else None

    def run(self, context: "EvaluationContext") -> TaskResult:
        from ..context import ProbedModel

        size = len(context.part("train"))
        batch = min(self.batch, size)
        steps = self.fit_steps or min(max(500, 40 * (size // batch)), 50_000)
        fit = self._fit_cached if self.required_features(context) else self._fit_streaming
        probe, correct, search = fit(context, steps, batch)
        settings = asdict(self) | {"batch": batch, "fit_steps": steps} | search
        model = ProbedModel(context.backbone, "tokens", probe)
        return TaskResult({"top1": 100 * float(correct.mean())}, correct, model, settings)

    def _fit_cached(
        self, context: "EvaluationContext", steps: int, batch: int
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Fit on tokens that are computed once. Returns the probe, which test images it classifies correctly,
        and the chosen learning rate."""
        from .. import attentive_probe, linear_probe

        train = context.training_features(tokens=True)
        total = steps * (len(attentive_probe.RATES) + 1)
        with context.counting("fitting the attentive probe", total) as tick:
            fitted = attentive_probe.fit_rates(
                self.kind,
                train.all_tokens,
                train.labels,
                len(context.set.classes),
                steps=steps,
                batch=batch,
                heads=self.queries,
                seed=context.options.seed,
                device=context.device,
                tick=tick,
            )
        test = context.features("test", tokens=True)
        predictions = linear_probe.predict(fitted.probe, test.all_tokens.to(context.device))
        return fitted.probe, context.correct(predictions, test), fitted.record()

    def _fit_streaming(
        self, context: "EvaluationContext", steps: int, batch: int
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Fit on more tokens than TOKENS_IN_MEMORY: recomputed in every epoch, from random crops, at a fixed
        learning rate (no search)."""
        from .. import attentive_probe
        from ..context import ProbedModel

        context.screen.say(
            f"note: {context.token_bytes() / 2**30:.0f} GiB of tokens are too many to cache: features are "
            "recomputed in every epoch"
        )
        rate = attentive_probe.RATES[len(attentive_probe.RATES) // 2]
        first, _ = next(context.crops(1, min(512, len(context.part("train"))), augment=False))
        classes, seed = len(context.set.classes), context.options.seed
        probe = attentive_probe.build(self.kind, first.tokens, classes, self.queries, seed)
        batches = (
            (features.tokens, labels) for features, labels in context.crops(steps, batch, augment=True)
        )
        attentive_probe.fit(probe, batches, steps, rate)
        return probe, context.score(ProbedModel(context.backbone, "tokens", probe)).correct, {"rate": rate}
