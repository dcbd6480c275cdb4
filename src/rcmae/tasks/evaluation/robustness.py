"""Robustness to distribution shift, corruptions and adversarial attacks."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...config import how_many
from ...errors import ConfigError
from .attentive import Attentive
from .base import Task, TaskResult
from .knn import KNN
from .linear import Linear

if TYPE_CHECKING:
    from torch import nn

    from ..context import EvaluationContext

PROBES: dict[str, Task] = {"linear": Linear(), "knn": KNN(), "attentive": Attentive()}


@dataclass(frozen=True, kw_only=True)
class Robustness(Task):
    """Accuracy on corrupted, shifted and adversarial images, and calibration."""

    name = "robustness"
    takes = (
        "A classifier (a fine-tuning run, its export, timm:NAME, a fine-tuned official .pth), or a backbone "
        "to fit a probe on."
    )
    takes_classifiers = True

    probe: Literal["linear", "knn", "attentive"] = "linear"
    "the probe to fit on a backbone without a head; a classifier is evaluated as it is"
    corruptions: bool = True
    "corrupt the test images on the fly: in the style of ImageNet-C, but not the published set"
    corrupted_images: int | None = 5000
    "number of test images to corrupt, each 75 times"
    attacks: bool = True
    "attack the test images with FGSM and PGD"
    eps: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    "perturbation sizes in units of 1/255"
    pgd_steps: int = 20
    "gradient steps of PGD"
    restarts: int = 1
    "random restarts of PGD"
    attacked_images: int | None = 1000
    "number of test images to attack"
    imagenet_c: Path | None = None
    "the published set: a folder with subfolders CORRUPTION/SEVERITY/WNID"
    imagenet_a: Path | None = None
    "a folder with 200 wnid folders"
    imagenet_r: Path | None = None
    "a folder with 200 wnid folders"
    imagenet_sketch: Path | None = None
    "a folder with 1,000 wnid folders"
    real: Path | None = None
    "ImageNet's validation images, to score on the reassessed labels (ReaL)"

    def validate(self) -> list[str]:
        problems, sizes = super().validate(), [f"{eps:g}" for eps in self.eps]
        if len(set(sizes)) < len(sizes):
            problems.append(f"eps has a size twice: {', '.join(sizes)}")
        return problems

    def check(self, context: "EvaluationContext") -> None:
        from ..robustness.study import check

        check(self, self._classes(context), context.backbone.shape)

    def required_features(self, context: "EvaluationContext") -> Literal["pooled", "tokens"] | None:
        return PROBES[self.probe].required_features(context) if context.classifier is None else None

    def last_blocks(self, context: "EvaluationContext") -> int:
        return PROBES[self.probe].last_blocks(context)

    def run(self, context: "EvaluationContext") -> TaskResult:
        """Evaluate the classifier as it is, or fit a probe first."""
        from ...data.loader import processes
        from ..robustness.sets import Loading
        from ..robustness.study import measure_robustness

        settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        model: nn.Module
        model, probe_settings = (
            (context.classifier[0], {}) if context.classifier else self._fit_probe(context)
        )
        test, seed, screen = context.set.test, context.options.seed, context.screen
        workers = processes(test, context.options.workers)
        loading = Loading(context.backbone.shape, context.device, workers=workers, bits=test.bits or 16)
        context.precision = "fp32"  # for the record: classification and attacks run without autocast
        metrics, details, correct = measure_robustness(
            model, self._classes(context), test, self, loading, seed, screen
        )
        clean = correct.pop("clean")
        return TaskResult(metrics, clean, model, settings | probe_settings, details, correct)

    def _classes(self, context: "EvaluationContext") -> list[str]:
        """The class of each logit. Raises ConfigError for a backbone that cannot be evaluated."""
        if context.backbone.channels != 3:
            raise ConfigError(
                f"corruptions and published sets have 3 channels; {context.name} takes "
                f"{context.backbone.channels}"
            )
        if context.classifier is None:
            return context.set.classes
        model, names = context.classifier
        if not names and model.vit.num_classes != len(context.set.classes):
            raise ConfigError(
                f"{context.name} has {model.vit.num_classes} classes without names, but the data has "
                f"{len(context.set.classes)}"
            )
        return names or context.set.classes

    def _fit_probe(self, context: "EvaluationContext") -> tuple["nn.Module", dict[str, Any]]:
        """A probe on the backbone, and the settings of its fit for the record."""
        task = PROBES[self.probe]
        if self.probe == "knn":
            task = KNN(k=(min(20, len(context.training_features().labels)),))
        result = task.run(context)
        images = how_many(len(context.part("train")), "image")
        context.screen.say(
            f"fitted the {self.probe} probe on {images}: {result.metrics['top1']:.1f} % accuracy"
        )
        return result.model, {"probe_settings": result.settings | {"precision": context.precision}}
