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

from ..data.labelled import open_labelled
from ..engine import distributed
from ..engine.checkpoint import replace_file
from ..engine.console import Screen
from ..engine.distributed import World
from ..engine.run import describe_machine, plain_failures, read_json, write_json
from ..errors import ConfigError
from ..interop.load import load, load_classifier, tested_on
from ..interop.official import read_pth
from ..models.backbone import Backbone, Pixels
from ..models.classifier import Classifier
from .evaluation.base import Evaluation, Task, check_evaluation
from .features import identity
from .subject import Found, Subject, place, stem

ALONE = "backbone"
"What a network is called that is neither a student nor a teacher."


def backbones(name: str, how: Evaluation) -> list[tuple[str, Backbone | Pixels]]:
    """The networks that are asked for, by what they are called. Raises CheckpointError or ConfigError."""
    return [
        (which, Pixels() if name == "pixels" else load(name, "teacher" if which == ALONE else which, how.heads, how.seed))
        for which in networks(name, how.which)
    ]


def subjects(name: str, task: Task, how: Evaluation, world: World, screen: Screen) -> list[Subject]:
    """The backbone, both networks of a run, or a classifier if the task takes one, before the data. Refuses what cannot be asked of it."""
    device = distributed.pick_device(how.device)
    precision = distributed.pick_precision(how.precision, device)
    whole = load_classifier(name, how.heads) if task.takes_classifiers else None
    found = [("classifier", Backbone(whole[0].vit, *_statistics(whole[0])))] if whole else backbones(name, how)
    first, tested = found[0][1], tested_on(name) if whole else None
    data = open_labelled(how.data, how.val, channels=first.channels, size=first.shape[1], tested=tested)
    screen.say(f"{task.name}: {len(data.train):,} training and {len(data.test):,} test images of {len(data.classes)} classes")
    for note in data.notes:
        screen.say(f"note: {note}")
    made = [Subject(name, which, backbone, data, how, device, world, screen, precision, whole) for which, backbone in found]
    for subject in made:
        task.check(subject)
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


def evaluate(name: str, task: Task, how: Evaluation = Evaluation()) -> list[dict[str, Any]]:
    """Carry a task out on a backbone, write its files, and return what they say: one record a network.

    Works under `torchrun`: ranks share the work of the backbone, the first one fits and writes. Raises the errors of `rcmae.errors`.
    """
    if wrong := task.problems():
        raise ConfigError("; ".join(wrong))
    check_evaluation(how)
    device, records = distributed.pick_device(how.device), []
    advice = "try a smaller --batch or --device cpu" if hasattr(task, "batch") else "try --device cpu"
    with distributed.joined(device) as world, plain_failures(device, world, advice), Screen(world.first) as screen:
        found = subjects(name, task, how, world, screen)
        if world.size > 1 and not task.all_ranks:  # all make the features of all, so that none has to wait for the fits of the first
            for subject in found:
                if kind := task.reads(subject):
                    for part in ("train", "test"):
                        subject.features(part, kind == "tokens")
        for subject in found if world.first or task.all_ranks else ():
            began = time.monotonic()
            result = task.run(subject)
            if world.first:
                records.append(record(task, subject, result, time.monotonic() - began))
            subject.seen.clear()
    return records


def record(task: Task, subject: Subject, found: Found, seconds: float) -> dict[str, Any]:
    """Write a result's JSON and hits, beside those of another question that go by the same name; returns the JSON's content."""
    how, test = subject.how, subject.set.test
    hashes = {"backbone": identity(subject.backbone), "train": subject.part("train").fingerprint()[:16], "test": test.fingerprint()[:16]}
    asked = hashlib.sha256(json.dumps([hashes, asdict(task)], default=str).encode()).hexdigest()[:16]
    classes = subject.set.classes
    by_class = {classes[i]: 100 * float(found.right[test.labels == i].mean()) for i in np.unique(test.labels)}
    content = {
        "task": task.name, "backbone": subject.name, "network": subject.which, "metrics": found.metrics, "labels_percent": how.labels,
        "train_images": len(subject.part("train")), "test_images": len(test), "classes": len(classes), "settings": found.settings,
        "seed": how.seed, "data": how.data, "val": how.val, "notes": list(subject.set.notes),
        "hashes": hashes | {"asked": asked},
        "seconds": round(found.seconds or seconds, 1), "machine": describe_machine(subject.device, subject.precision),
        "per_class": by_class,
    }  # fmt: skip
    content |= {"details": found.details} if found.details else {}
    folder = place(subject.name, how)
    folder.mkdir(parents=True, exist_ok=True)
    name = stem(task.name, subject.which, how) + task.variant()
    there = folder / f"{name}.json"
    if there.exists() and not task.resumes and read_json(there).get("hashes", {}).get("asked") != asked:
        name += f"-{asked[:6]}"  # other settings, images or weights: both are kept (fine-tuning refuses them in the same place)
    hits = {"right": found.right} | (found.more or {})
    replace_file(folder / f"{name}.safetensors", save({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in hits.items()}))
    write_json(folder / f"{name}.json", content)
    return content
