"""`rcmae evaluate`: what a backbone is worth on a labelled set, in the numbers that papers report.

A task fits something on the training part, on frozen features or end to end, and scores it on the other part. It leaves a JSON file (the
metric, by class, the settings, hashes of backbone and data) and, beside it, which test images were right, for paired comparisons.
"""

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from ..config import how_many
from ..data.labelled import open_labelled
from ..engine import distributed
from ..engine.checkpoint import replace_file
from ..engine.console import Screen
from ..engine.distributed import World
from ..engine.run import describe_machine, plain_failures, read_json, write_json
from ..interop.load import load, load_classifier, tested_on
from ..interop.official import read_pth
from ..models.backbone import Backbone, Pixels
from ..models.classifier import Classifier
from .context import EvaluationContext, TaskResult, place, stem
from .evaluation.base import Evaluation, Task
from .features import identity

ALONE = "backbone"
"What a network is called that is neither a student nor a teacher."


def backbones(name: str, options: Evaluation) -> list[tuple[str, Backbone | Pixels]]:
    """The networks that are asked for, by what they are called. Raises CheckpointError or ConfigError."""
    return [
        (which, Pixels() if name == "pixels" else load(name, "teacher" if which == ALONE else which, options.heads, options.seed))
        for which in networks(name, options.which)
    ]


def contexts(name: str, task: Task, options: Evaluation, world: World, screen: Screen) -> list[EvaluationContext]:
    """The backbone, both networks of a run, or a classifier if the task takes one, before the data. Refuses what cannot be asked of it."""
    device = distributed.pick_device(options.device)
    precision = distributed.pick_precision(options.precision, device)
    whole = load_classifier(name, options.heads) if task.takes_classifiers else None
    found = [("classifier", Backbone(whole[0].vit, *_statistics(whole[0])))] if whole else backbones(name, options)
    first, tested = found[0][1], tested_on(name) if whole else None
    data = open_labelled(options.data, options.val, channels=first.channels, size=first.shape[1], tested=tested)
    screen.say(
        f"{task.name}: {len(data.train):,} training and {how_many(len(data.test), 'test image')} of {how_many(len(data.classes), 'class')}"
    )
    for note in data.notes:
        screen.say(f"note: {note}")
    made = [EvaluationContext(name, which, backbone, data, options, device, world, screen, precision, whole) for which, backbone in found]
    for context in made:
        task.check(context)
    return made


def _statistics(model: Classifier) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(x.flatten().tolist()) for x in (model.mean, model.std))


def networks(name: str, which: str) -> list[str]:
    """The networks that are asked for; `ALONE` for what has no teacher and student."""
    if name == "pixels" or name.startswith(("timm:", "scratch:")):
        return [ALONE]
    path = Path(name)
    if (path / "export").is_dir():
        there = [n for n in ("student", "teacher") if (path / "export" / n).is_dir()]
        if there == ["student"] and which != "student":
            load(name, "teacher")  # says so if a teacher was lost
            return ["student"]
    elif path.suffix not in (".pth", ".pt"):
        return [ALONE]
    elif read_pth(path).teacher is None:
        return ["student"]
    return ["student", "teacher"] if which == "both" else [which]


def evaluate(name: str, task: Task, options: Evaluation = Evaluation()) -> list[dict[str, Any]]:
    """Carry a task out on a backbone, write its files, and return what they say: one record a network.

    Works under `torchrun`: ranks share the work of the backbone, the first one fits and writes. Raises the errors of `rcmae.errors`.
    """
    task.check_settings(name, options)
    device, records = distributed.pick_device(options.device), []
    advice = "try a smaller --batch or --device cpu" if hasattr(task, "batch") else "try --device cpu"
    with distributed.joined(device) as world, plain_failures(device, world, advice), Screen(world.first) as screen:
        found = contexts(name, task, options, world, screen)
        if world.size > 1 and not task.all_ranks:  # all make the features of all, so that none has to wait for the fits of the first
            for context in found:
                if kind := task.required_features(context):
                    for part in ("train", "test"):
                        context.features(part, kind == "tokens")
        for context in found if world.first or task.all_ranks else ():
            began = time.monotonic()
            result = task.run(context)
            if world.first:
                records.append(record(task, context, result, time.monotonic() - began))
            context.extracted.clear()
    return records


def record(task: Task, context: EvaluationContext, found: TaskResult, seconds: float) -> dict[str, Any]:
    """Write a result's JSON and hits, beside those of another question that go by the same name; returns the JSON's content."""
    options, test = context.options, context.set.test
    hashes = {"backbone": identity(context.backbone), "train": context.part("train").fingerprint()[:16], "test": test.fingerprint()[:16]}
    asked = hashlib.sha256(json.dumps([hashes, asdict(task)], default=str).encode()).hexdigest()[:16]
    classes = context.set.classes
    by_class = {classes[i]: 100 * float(found.right[test.labels == i].mean()) for i in np.unique(test.labels)}
    content = {
        "task": task.name, "backbone": context.name, "network": context.which, "metrics": found.metrics, "labels_percent": options.labels,
        "train_images": len(context.part("train")), "test_images": len(test), "classes": len(classes), "settings": found.settings,
        "seed": options.seed, "data": options.data, "val": options.val, "notes": list(context.set.notes),
        "hashes": hashes | {"asked": asked},
        "seconds": round(found.seconds or seconds, 1), "machine": describe_machine(context.device, context.precision),
        "per_class": by_class,
    }  # fmt: skip
    content |= {"details": found.details} if found.details else {}
    folder = place(context.name, options)
    folder.mkdir(parents=True, exist_ok=True)
    name = stem(task.name, context.which, options) + task.variant()
    there = folder / f"{name}.json"
    if there.exists() and not task.resumes and read_json(there).get("hashes", {}).get("asked") != asked:
        name += f"-{asked[:6]}"  # other settings, images or weights: both are kept (fine-tuning refuses them in the same place)
    hits = {"right": found.right} | (found.more or {})
    replace_file(folder / f"{name}.safetensors", save({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in hits.items()}))
    write_json(folder / f"{name}.json", content)
    return content
