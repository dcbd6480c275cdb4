"""Attention over all tokens, then a linear layer."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from .base import Task

if TYPE_CHECKING:
    from ..context import EvaluationContext, TaskResult

TOKENS_IN_MEMORY = 16 * 2**30
"Bytes of tokens that are kept; above it a probe recomputes them each epoch, as its papers do."


@dataclass(frozen=True, kw_only=True)
class Attentive(Task):
    """Attention over the tokens of a frozen backbone: the number that says most about masked image models."""

    name = "attentive"

    kind: Literal["efficient", "latent"] = "efficient"
    "efficient: several queries, no key projection (Efficient Probing); latent: one query in a full attention layer with an MLP"
    queries: int = 12
    "queries, or heads of the one query; lowered to what divides the width"
    fit_steps: int | None = None
    "steps; default: 40 passes, but not below 500 nor above 50,000"
    batch: int = 1024
    "images a step"

    def required_features(self, context: "EvaluationContext") -> Literal["tokens"] | None:
        return "tokens" if context.token_bytes() <= TOKENS_IN_MEMORY else None

    def run(self, context: "EvaluationContext") -> "TaskResult":
        from ..context import ProbedModel, TaskResult

        size = len(context.part("train"))
        batch = min(self.batch, size)
        steps = self.fit_steps or min(max(500, 40 * (size // batch)), 50_000)
        probe, hits, chose = (self._fit_cached if self.required_features(context) else self._fit_streaming)(context, steps, batch)
        settings = asdict(self) | {"batch": batch, "fit_steps": steps} | chose
        return TaskResult({"top1": 100 * float(hits.mean())}, hits, ProbedModel(context.backbone, "tokens", probe), settings)

    def _fit_cached(self, context: "EvaluationContext", steps: int, batch: int) -> tuple[Any, Any, dict[str, Any]]:
        """On tokens that are computed once. Returns the probe, which test images are right, and what it chose."""
        from .. import attentive_probe, linear_probe

        train, labels = context.fitted_on(tokens=True)
        with context.counting("fitting the attentive probe", steps * (len(attentive_probe.RATES) + 1)) as tick:
            found = attentive_probe.fit_rates(
                self.kind, train.tokens, labels, len(context.set.classes), steps=steps, batch=batch, heads=self.queries,
                seed=context.options.seed, device=context.device, tick=tick,
            )  # fmt: skip
        test = context.features("test", tokens=True)
        hits = context.hits(linear_probe.predict(found.probe, test.tokens.to(context.device)), test)
        return found.probe, hits, {"rate": found.rate, "held_out": {f"{k:g}": v for k, v in found.held_out.items()}}

    def _fit_streaming(self, context: "EvaluationContext", steps: int, batch: int) -> tuple[Any, Any, dict[str, Any]]:
        """On more tokens than TOKENS_IN_MEMORY: recomputed each epoch, from random crops, at one fixed learning rate (no search)."""
        import torch

        from .. import attentive_probe
        from ..context import ProbedModel

        context.screen.say(
            f"note: {context.token_bytes() / 2**30:.0f} GiB of tokens are not kept: features are computed anew in every pass"
        )
        rate = attentive_probe.RATES[len(attentive_probe.RATES) // 2]
        examples = next(context.crops(1, min(512, len(context.part("train"))), augment=False))[0].tokens
        with torch.random.fork_rng():
            torch.manual_seed(context.options.seed)
            heads = attentive_probe.heads_for(examples.shape[2], self.queries)
            probe = attentive_probe.PROBES[self.kind](examples, heads, len(context.set.classes)).to(context.device)
        batches = ((seen.tokens, answers) for seen, answers in context.crops(steps, batch, augment=True))
        probe = attentive_probe.fit(probe, batches, steps, rate)
        return probe, context.score(ProbedModel(context.backbone, "tokens", probe)).right, {"rate": rate}
