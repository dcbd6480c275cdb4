"""Attention over all tokens, then a linear layer."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from .base import Task

if TYPE_CHECKING:
    from ..subject import Found, Subject

TOKENS_IN_MEMORY = 16 * 2**30
"Bytes of tokens that are kept; above it a probe computes them anew in every pass, as its papers do."


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

    def reads(self, subject: "Subject") -> Literal["tokens"] | None:
        return "tokens" if subject.token_bytes() <= TOKENS_IN_MEMORY else None

    def run(self, subject: "Subject") -> "Found":
        from ..subject import Found, Probed

        size = len(subject.part("train"))
        batch = min(self.batch, size)
        steps = self.fit_steps or min(max(500, 40 * (size // batch)), 50_000)
        probe, hits, chose = (self._kept if self.reads(subject) else self._anew)(subject, steps, batch)
        settings = asdict(self) | {"batch": batch, "fit_steps": steps} | chose
        return Found({"top1": 100 * float(hits.mean())}, hits, Probed(subject.backbone, "tokens", probe), settings)

    def _kept(self, subject: "Subject", steps: int, batch: int) -> tuple[Any, Any, dict[str, Any]]:
        """Tokens lie in memory. Returns the probe, which test images are right, and what it chose."""
        from .. import attentive, linear

        train, labels = subject.fitted_on(tokens=True)
        with subject.counting("fitting the attentive probe", steps * (len(attentive.RATES) + 1)) as tick:
            found = attentive.fit_rates(
                self.kind, train.tokens, labels, len(subject.set.classes), steps=steps, batch=batch, heads=self.queries,
                seed=subject.how.seed, device=subject.device, tick=tick,
            )  # fmt: skip
        test = subject.features("test", tokens=True)
        hits = subject.hits(linear.predict(found.probe, test.tokens.to(subject.device)), test)
        return found.probe, hits, {"rate": found.rate, "held_out": {f"{k:g}": v for k, v in found.held_out.items()}}

    def _anew(self, subject: "Subject", steps: int, batch: int) -> tuple[Any, Any, dict[str, Any]]:
        """Tokens are computed anew in every pass."""
        import torch

        from .. import attentive
        from ..subject import Probed

        subject.screen.say(
            f"note: {subject.token_bytes() / 2**30:.0f} GiB of tokens are not kept: features are computed anew in every pass"
        )
        rate = attentive.RATES[len(attentive.RATES) // 2]
        examples = next(subject.crops(1, min(512, len(subject.part("train"))), augment=False))[0].tokens
        with torch.random.fork_rng():
            torch.manual_seed(subject.how.seed)
            heads = attentive.heads_for(examples.shape[2], self.queries)
            probe = attentive.PROBES[self.kind](examples, heads, len(subject.set.classes)).to(subject.device)
        batches = ((seen.tokens, answers) for seen, answers in subject.crops(steps, batch, augment=True))
        probe = attentive.fit(probe, batches, steps, rate)
        return probe, subject.score(Probed(subject.backbone, "tokens", probe)).right, {"rate": rate}
