"""k-nearest neighbors."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from .base import PooledTask, Task, TaskResult

if TYPE_CHECKING:
    from torch import Tensor

    from ..context import EvaluationContext

KS = (10, 20, 100, 200)
"The values of k that DINO reports (its tables use 20)."


@dataclass(frozen=True, kw_only=True)
class KNN(PooledTask):
    """k-nearest neighbors on frozen features."""

    name = "knn"
    takes = Task.takes.replace("randomly initialized", "randomly initialized; pixels has no network")

    k: tuple[int, ...] = KS
    "numbers of neighbors; the main result is that of 20 neighbors, or of the first number given"
    temperature: float = 0.07
    "temperature of the votes"

    def check(self, context: "EvaluationContext") -> None:
        from ..nearest_neighbors import check_k

        super().check(context)
        if self.k != KS:
            check_k(self.k, len(context.part("train")))

    def run(self, context: "EvaluationContext") -> TaskResult:
        """Score every k. Raises ConfigError if a k that the user chose exceeds the number of readable
        training images."""
        import torch

        from ...config import how_many
        from ...models.backbone import pooled
        from ..context import ProbedModel
        from ..nearest_neighbors import NearestNeighbors, check_k

        ks, device = self.k, context.device
        pool, blocks = self.feature(context)
        train = context.training_features(blocks=blocks)
        images = len(train.labels)
        if ks == KS and images < max(KS):
            ks = tuple(k for k in KS if k <= images) or (images,)
            context.screen.say(
                f"note: {how_many(images, 'training image')}: k of {', '.join(map(str, ks))} only"
            )
        check_k(ks, images)
        test = context.features("test", blocks=blocks)
        knn = NearestNeighbors(
            pooled(train, pool).to(device),
            torch.from_numpy(train.labels).to(device),
            len(context.set.classes),
            max(ks),
            self.temperature,
        )
        predictions: dict[int, list[Tensor]] = {k: [] for k in ks}
        with torch.no_grad(), context.screen.progress("k-NN", len(test.labels)) as tick:
            for i, part in enumerate(pooled(test, pool).split(256)):
                for k, votes in knn.votes(part.to(device), ks).items():
                    predictions[k].append(votes.argmax(1).cpu())
                tick(min((i + 1) * 256, len(test.labels)))
        correct = {k: context.correct(torch.cat(parts).numpy(), test) for k, parts in predictions.items()}
        main_k = knn.k = 20 if 20 in ks else ks[0]
        metrics = {f"top1 k={k}": 100 * float(c.mean()) for k, c in correct.items()}
        settings = asdict(replace(self, k=ks, pool=pool, blocks=blocks))
        return TaskResult(
            {"top1": metrics[f"top1 k={main_k}"]} | metrics,
            correct[main_k],
            ProbedModel(context.network(blocks), pool, knn),
            settings,
        )
