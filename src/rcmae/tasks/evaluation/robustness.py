"""Shifted, corrupted and attacked images."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...errors import ConfigError
from .attentive import Attentive
from .base import Task
from .knn import KNN
from .linear import Linear

if TYPE_CHECKING:
    from torch import nn

    from ..subject import Found, Subject

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

    def check(self, subject: "Subject") -> None:
        from ..robustness.study import check

        check(self, self._classes(subject), tuple(subject.backbone.shape))

    def reads(self, subject: "Subject") -> Literal["pooled", "tokens"] | None:
        return PROBES[self.probe].reads(subject) if subject.classifier is None else None

    def run(self, subject: "Subject") -> "Found":
        """A classifier as it is, or a probe that is fitted first."""
        from ...data.loader import processes
        from ..robustness.sets import Loading
        from ..robustness.study import settings, study
        from ..subject import Found

        model, fitted = (subject.classifier[0], {}) if subject.classifier else self._fitted(subject)
        workers = processes(subject.set.test, subject.how.workers)
        loading = Loading(tuple(subject.backbone.shape), subject.device, workers=workers)
        subject.precision = "fp32"  # of what is recorded: images are judged, and attacked, without autocast
        of = study(model, self._classes(subject), subject.set.test, self, loading, subject.how.seed, subject.screen)
        more = {k: v for k, v in of.right.items() if k != "clean"}
        return Found(of.metrics, of.right["clean"], model, settings(self) | fitted, of.details, more)

    def _classes(self, subject: "Subject") -> list[str]:
        """The classes of the logits. Raises ConfigError for a backbone that cannot be asked."""
        if subject.backbone.channels != 3:
            raise ConfigError(f"corruptions and published sets are of 3 channels; {subject.name} takes {subject.backbone.channels}")
        if subject.classifier is None:
            return subject.set.classes
        model, names = subject.classifier
        if not names and model.vit.num_classes != len(subject.set.classes):
            raise ConfigError(f"{subject.name} has {model.vit.num_classes} classes without names, and the data {len(subject.set.classes)}")
        return names or subject.set.classes

    def _fitted(self, subject: "Subject") -> tuple["nn.Module", dict[str, Any]]:
        """A probe on the backbone, and what is recorded of it."""
        task = KNN(k=(min(20, len(subject.fitted_on()[1])),)) if self.probe == "knn" else PROBES[self.probe]
        found = task.run(subject)
        subject.screen.say(f"fitted: {self.probe} probe, on {len(subject.part('train')):,} images: {found.metrics['top1']:.1f} % right")
        return found.model, {"probe_settings": found.settings | {"precision": subject.precision}}
