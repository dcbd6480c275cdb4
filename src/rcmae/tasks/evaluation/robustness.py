"""Shifted, corrupted and attacked images."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...config import how_many
from ...errors import ConfigError
from .attentive import Attentive
from .base import Task
from .knn import KNN
from .linear import Linear

if TYPE_CHECKING:
    from torch import nn

    from ..context import EvaluationContext, TaskResult

PROBES: dict[str, Task] = {"linear": Linear(), "knn": KNN(), "attentive": Attentive()}


@dataclass(frozen=True, kw_only=True)
class Robustness(Task):
    """Accuracy on corrupted, shifted and attacked images, and whether confidence is right."""

    name = "robustness"
    takes = (
        "A classifier (a fine-tuning run, its export, timm:NAME, a fine-tuned official .pth), or a backbone, on which a probe is fitted."
    )
    takes_classifiers = True

    probe: Literal["linear", "knn", "attentive"] = "linear"
    "what is fitted on a backbone that has no head; a classifier is taken as it is"
    corruptions: bool = True
    "corrupt the test images on the fly: C-style, not ImageNet-C"
    corrupted_images: int | None = 5000
    "test images that are corrupted, each 75 times"
    attacks: bool = True
    "attack the test images by FGSM and PGD"
    eps: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    "sizes of the attacks in 1/255"
    pgd_steps: int = 20
    "gradient steps of PGD"
    restarts: int = 1
    "random starts of PGD"
    attacked_images: int | None = 1000
    "test images that are attacked"
    imagenet_c: Path | None = None
    "the published set: a folder with CORRUPTION/SEVERITY/WNID"
    imagenet_a: Path | None = None
    "a folder with 200 wnid folders"
    imagenet_r: Path | None = None
    "a folder with 200 wnid folders"
    imagenet_sketch: Path | None = None
    "a folder with 1,000 wnid folders"
    real: Path | None = None
    "ImageNet's validation images, to be scored by their reassessed labels (ReaL)"

    def problems(self) -> list[str]:
        sizes = [f"{eps:g}" for eps in self.eps]
        return super().problems() + [f"eps has a size twice: {', '.join(sizes)}"] * (len(set(sizes)) < len(sizes))

    def check(self, context: "EvaluationContext") -> None:
        from ..robustness.study import check

        check(self, self._classes(context), tuple(context.backbone.shape))

    def required_features(self, context: "EvaluationContext") -> Literal["pooled", "tokens"] | None:
        return PROBES[self.probe].required_features(context) if context.classifier is None else None

    def run(self, context: "EvaluationContext") -> "TaskResult":
        """A classifier as it is, or a probe that is fitted first."""
        from ...data.loader import processes
        from ..context import TaskResult
        from ..robustness.sets import Loading
        from ..robustness.study import settings, study

        model, fitted = (context.classifier[0], {}) if context.classifier else self._fitted(context)
        workers = processes(context.set.test, context.options.workers)
        loading = Loading(tuple(context.backbone.shape), context.device, workers=workers)
        context.precision = "fp32"  # of what is recorded: images are judged, and attacked, without autocast
        of = study(model, self._classes(context), context.set.test, self, loading, context.options.seed, context.screen)
        more = {k: v for k, v in of.right.items() if k != "clean"}
        return TaskResult(of.metrics, of.right["clean"], model, settings(self) | fitted, of.details, more)

    def _classes(self, context: "EvaluationContext") -> list[str]:
        """The classes of the logits. Raises ConfigError for a backbone that cannot be asked."""
        if context.backbone.channels != 3:
            raise ConfigError(f"corruptions and published sets are of 3 channels; {context.name} takes {context.backbone.channels}")
        if context.classifier is None:
            return context.set.classes
        model, names = context.classifier
        if not names and model.vit.num_classes != len(context.set.classes):
            raise ConfigError(f"{context.name} has {model.vit.num_classes} classes without names, and the data {len(context.set.classes)}")
        return names or context.set.classes

    def _fitted(self, context: "EvaluationContext") -> tuple["nn.Module", dict[str, Any]]:
        """A probe on the backbone, and what is recorded of it."""
        task = KNN(k=(min(20, len(context.fitted_on()[1])),)) if self.probe == "knn" else PROBES[self.probe]
        found = task.run(context)
        images = how_many(len(context.part("train")), "image")
        context.screen.say(f"fitted: {self.probe} probe, on {images}: {found.metrics['top1']:.1f} % right")
        return found.model, {"probe_settings": found.settings | {"precision": context.precision}}
