"""k-nearest neighbours."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from .base import Pool, Task

if TYPE_CHECKING:
    from torch import Tensor

    from ..context import EvaluationContext, TaskResult

KS = (10, 20, 100, 200)
"Neighbours that vote, as DINO reports them (its tables use 20)."


@dataclass(frozen=True, kw_only=True)
class KNN(Task):
    """k-nearest neighbours on frozen features."""

    name = "knn"
    takes = Task.takes.replace("has new weights", "has new weights, pixels none")

    k: tuple[int, ...] = KS
    "neighbours that vote; the model that is kept is of 20, or of the first one given"
    pool: Pool = "mean"
    "what is compared: the mean over the patches or the class token"
    temperature: float = 0.07
    "of the votes"

    def check(self, context: "EvaluationContext") -> None:
        from ..knn import check_k

        if self.k != KS:
            check_k(self.k, len(context.part("train")))

    def run(self, context: "EvaluationContext") -> "TaskResult":
        """At every k. Raises ConfigError when one that was chosen is larger than the number of readable training images."""
        import torch

        from ...config import how_many
        from ..context import ProbedModel, TaskResult
        from ..knn import Knn, check_k

        ks, device = self.k, context.device
        train, labels = context.fitted_on()
        if ks == KS and len(labels) < max(KS):
            ks = tuple(k for k in KS if k <= len(labels)) or (len(labels),)
            context.screen.say(f"note: {how_many(len(labels), 'training image')}: k of {', '.join(map(str, ks))} only")
        check_k(ks, len(labels))
        test = context.features("test")
        near = Knn(
            train.pooled(self.pool).to(device), torch.from_numpy(labels).to(device), len(context.set.classes), max(ks), self.temperature
        )
        predicted: dict[int, list[Tensor]] = {k: [] for k in ks}
        with torch.no_grad(), context.screen.progress("k-NN", len(test.labels)) as tick:
            for i, part in enumerate(test.pooled(self.pool).split(256)):
                for k, votes in near.votes(part.to(device), ks).items():
                    predicted[k].append(votes.argmax(1).cpu())
                tick(min((i + 1) * 256, len(test.labels)))
        hits = {k: context.hits(torch.cat(parts).numpy(), test) for k, parts in predicted.items()}
        kept = near.k = 20 if 20 in ks else ks[0]
        metrics = {f"top1 k={k}": 100 * float(h.mean()) for k, h in hits.items()}
        settings = asdict(replace(self, k=ks))
        return TaskResult(
            {"top1": metrics[f"top1 k={kept}"]} | metrics, hits[kept], ProbedModel(context.backbone, self.pool, near), settings
        )
