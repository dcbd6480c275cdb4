"""All robustness measurements of a classifier on a labeled set."""

from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool
from torch import nn

from ...data.sources import Source, Subset
from ...engine.console import Screen
from ..evaluation.robustness import Robustness
from . import metrics, sets
from .adversarial import Model, fgsm, pgd
from .sets import Loading


def check(task: Robustness, classes: list[str], shape: tuple[int, int]) -> None:
    """Raise ConfigError or DataError, before anything is fitted, for problems such as incomplete sets."""
    if task.imagenet_c:
        sets.check_imagenet_c(task.imagenet_c, classes, shape)
    for root, folders in (
        (task.imagenet_a, sets.synsets("a")),
        (task.imagenet_r, sets.synsets("r")),
        (task.imagenet_sketch, metrics.imagenet_classes()),
    ):
        if root:
            sets.published(root, classes, folders)
    if task.real:
        sets.validation_images(task.real, classes)


def measure_robustness(
    model: nn.Module,
    classes: list[str],
    test: Source,
    task: Robustness,
    loading: Loading,
    seed: int,
    screen: Screen,
) -> tuple[dict[str, float], dict[str, Any], dict[str, Bool[np.ndarray, "..."]]]:
    """Measure accuracy and calibration on the clean images, then corruptions, attacks and published sets as
    configured in `task`. Returns metrics and details for the record, and which images were classified
    correctly in each condition. Raises DataError."""
    models: dict[str, Model] = {"model": model.to(loading.device).eval()}
    say, loading = screen.say, replace(loading, progress=screen.progress)
    labels = sets.labels_for(test, classes)
    clean = sets.clean(models, test, labels, loading)["model"]
    scores = {"top1": 100 * float(clean.correct.mean()), "ECE": metrics.ece(clean.confidence, clean.correct)}
    correct: dict[str, Any] = {"clean": clean.correct}
    bins = metrics.reliability(clean.confidence, clean.correct)
    details: dict[str, Any] = {"reliability": [row._asdict() for row in bins if row.count]}
    by_set: list[sets.Corrupted] = []
    if task.corruptions:
        part = _sample(test, task.corrupted_images, seed)
        part_labels = sets.labels_for(part, classes)
        by_set.append(sets.corrupted(models, part, part_labels, loading, seed, say=say)["model"])
    if task.imagenet_c:
        by_set.append(sets.imagenet_c(models, task.imagenet_c, classes, loading, say)["model"])
    for corrupted in by_set:
        scores[f"mean error, {corrupted.kind}"] = corrupted.mean_error
        if corrupted.mce is not None:
            scores[f"mCE, {corrupted.kind}"] = corrupted.mce
        kind = corrupted.kind.partition(",")[0]
        correct |= {f"{name} ({kind})": c for name, c in corrupted.correct.items()}
    for name, root in (("ImageNet-A", task.imagenet_a), ("ImageNet-R", task.imagenet_r)):
        if root:
            result = sets.subset(models, root, classes, name[-1].lower(), loading)["model"]
            scores[name] = 100 * float(result.among_200.mean())
            scores[f"{name}, among all 1,000 classes"] = 100 * float(result.among_all.mean())
            correct[name] = result.among_200
    for name, root, run in (
        ("ImageNet-Sketch", task.imagenet_sketch, sets.sketch),
        ("ReaL", task.real, sets.real_labels),
    ):
        if root:
            correct[name] = run(models, root, classes, loading)["model"]
            scores[name] = 100 * float(correct[name].mean())
    if task.attacks:
        limit = task.attacked_images
        attacks = [
            attack
            for eps in task.eps
            for attack in (fgsm(eps), pgd(eps, task.pgd_steps, restarts=task.restarts))
        ]
        attacked = sets.adversarial(models, test, labels, attacks, loading, limit, seed, say)["model"]
        scores |= {
            name if name != "clean" else "clean, of the attacked images": 100 * float(c.mean())
            for name, c in attacked.correct.items()
        }
        correct |= {f"attack: {name}": c for name, c in attacked.correct.items()}
        details["checks"] = {
            attack: {name: check._asdict() for name, check in checks.items()}
            for attack, checks in attacked.checks.items()
        }
    details["errors"] = {corrupted.kind: corrupted.errors for corrupted in by_set}
    return scores, details, correct


def _sample(source: Source, limit: int | None, seed: int) -> Source:
    """At most `limit` images, drawn with the seed."""
    if limit is None or limit >= len(source):
        return source
    chosen = np.random.Generator(np.random.Philox(key=seed)).permutation(len(source))[:limit]
    return Subset(source, np.sort(chosen))
