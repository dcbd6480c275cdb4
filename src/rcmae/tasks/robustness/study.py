"""Everything robustness asks of one classifier on one labelled set."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool
from torch import nn

from ...data.sources import Source, Subset
from ...engine.console import Screen
from ..evaluation.robustness import Robustness
from . import metrics, sets
from .adversarial import Attack, fgsm, pgd
from .sets import Loading


class Study(NamedTuple):
    """Numbers for the record, which images were right by test, and the errors by corruption and severity of each set."""

    metrics: dict[str, float]
    details: dict[str, Any]
    right: dict[str, Bool[np.ndarray, "..."]]
    errors: dict[str, metrics.Errors]


def attacks_of(task: Robustness) -> list[Attack]:
    """FGSM and PGD at each size."""
    return [attack for eps in task.eps for attack in (fgsm(eps), pgd(eps, task.pgd_steps, restarts=task.restarts))]


def check(task: Robustness, classes: list[str], shape: tuple[int, int]) -> None:
    """What can be refused before anything is fitted, as sets that are not whole. Raises ConfigError or DataError."""
    if task.imagenet_c:
        sets.check_imagenet_c(task.imagenet_c, classes, shape)
    every = metrics.imagenet_classes()
    for root, own in ((task.imagenet_a, sets.synsets("a")), (task.imagenet_r, sets.synsets("r")), (task.imagenet_sketch, every)):
        if root:
            sets.published(root, classes, own)
    if task.real:
        sets.validation_images(task.real, classes)


def study(model: nn.Module, classes: list[str], test: Source, task: Robustness, loading: Loading, seed: int, screen: Screen) -> Study:
    """The clean images with calibration first; then corruptions, attacks and published sets, as `task` asks. Raises DataError."""
    model, say, loading = model.to(loading.device).eval(), screen.say, replace(loading, progress=screen.progress)
    models, labels = {"model": model}, sets.labels_for(test, classes)
    said = sets.clean(models, test, labels, loading)["model"]
    found = {"top1": 100 * float(said.right.mean()), "ECE": metrics.ece(said.confidence, said.right)}
    right: dict[str, Any] = {"clean": said.right}
    details: dict[str, Any] = {"reliability": [row._asdict() for row in metrics.reliability(said.confidence, said.right) if row.count]}
    errors: dict[str, metrics.Errors] = {}
    if task.corruptions:
        part = _some(test, task.corrupted_images, seed)
        of = sets.corrupted(models, part, sets.labels_for(part, classes), loading, seed, say=say)["model"]
        found[f"mean error, {of.kind}"] = of.mean_error
        errors[of.kind] = of.errors
        right |= {f"{name} (C-style)": hits for name, hits in of.right.items()}
    if task.imagenet_c:
        of = sets.imagenet_c(models, task.imagenet_c, classes, loading, say)["model"]
        found["mean error, ImageNet-C"], errors[of.kind] = of.mean_error, of.errors
        if of.mce is not None:
            found["mCE, ImageNet-C"] = of.mce
        right |= {f"{name} (ImageNet-C)": hits for name, hits in of.right.items()}
    for name, root in (("a", task.imagenet_a), ("r", task.imagenet_r)):
        if root:
            hits = sets.subset(models, root, classes, name, loading)["model"]
            found[f"ImageNet-{name.upper()}"] = 100 * float(hits.among_own.mean())
            found[f"ImageNet-{name.upper()}, among all 1,000 classes"] = 100 * float(hits.among_all.mean())
            right[f"ImageNet-{name.upper()}"] = hits.among_own
    for name, root, run in (("ImageNet-Sketch", task.imagenet_sketch, sets.sketch), ("ReaL", task.real, sets.real_labels)):
        if root:
            right[name] = run(models, root, classes, loading)["model"]
            found[name] = 100 * float(right[name].mean())
    if task.attacks:
        attacks = attacks_of(task)
        of = sets.adversarial(models, test, labels, attacks, loading, task.attacked_images, seed, say)["model"]
        found |= {name if name != "clean" else "clean, of the attacked images": 100 * float(h.mean()) for name, h in of.right.items()}
        right |= {f"attack: {name}": hits for name, hits in of.right.items()}
        details["checks"] = {a: {what: c._asdict() for what, c in checks.items()} for a, checks in of.checks.items()}
    return Study(found, details | {"errors": errors}, right, errors)


def settings(task: Robustness) -> dict[str, Any]:
    """The task as JSON holds it."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(task).items()}


def _some(source: Source, most: int | None, seed: int) -> Source:
    """At most so many images, drawn by the seed."""
    if most is None or most >= len(source):
        return source
    chosen = np.random.Generator(np.random.Philox(key=seed)).permutation(len(source))[:most]
    return Subset(source, np.sort(chosen))
