"""`rcmae evaluate`: the quality of a backbone on a labeled set, in the metrics that papers report.

A task fits a model on the training part, on frozen features or end to end, and scores it on the test part. It
writes a JSON file (metrics, accuracy by class, settings, hashes of backbone and data) and a file with which
test images were classified correctly, for paired comparisons.
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
from ..data.labeled import open_labeled
from ..engine import distributed
from ..engine.checkpoint import replace_file
from ..engine.console import Screen
from ..engine.distributed import World
from ..engine.run import describe_machine, read_json, translate_errors, write_json
from ..errors import DataError
from ..interop.load import is_bare, load, load_classifier, tested_fingerprint
from ..interop.weights import read_weights
from ..models.backbone import Backbone, Pixels
from .context import EvaluationContext, results_folder, stem
from .evaluation.base import EvaluationOptions, Task, TaskResult
from .features import identity

SINGLE = "backbone"
"The name of a network that is neither a student nor a teacher."


def backbones(name: str, options: EvaluationOptions) -> list[tuple[str, Backbone | Pixels]]:
    """The requested networks with their names. Raises CheckpointError or ConfigError."""
    if name == "pixels":
        return [(SINGLE, Pixels())]
    return [
        (
            which,
            load(name, "teacher" if which == SINGLE else which, options.heads, options.seed, options.shape),
        )
        for which in networks(name, options.which)
    ]


def contexts(
    name: str, task: Task, options: EvaluationOptions, world: World, screen: Screen
) -> list[EvaluationContext]:
    """One context for each network to evaluate: the backbone, both networks of a run, or a classifier if the
    task takes one. Raises the errors of `task.check`."""
    device = distributed.pick_device(options.device)
    precision = distributed.pick_precision(options.precision, device)
    # Weights are loaded before the data, which may take long to open; a file of them is read once.
    _weights = read_weights(Path(name)) if is_bare(Path(name)) else None
    which = "student" if options.which == "student" else "teacher"
    classifier = (
        load_classifier(name, which, options.heads, options.shape) if task.takes_classifiers else None
    )
    named: list[tuple[str, Backbone | Pixels]]
    if classifier:
        model, _ = classifier
        named, tested = [("classifier", Backbone(model.vit, *model.statistics))], tested_fingerprint(name)
        named[0][1].bits = model.bits
    else:
        named, tested = backbones(name, options), None
    first, given = named[0][1], options
    options = given.with_data(name)
    assert options.data is not None
    try:
        data = open_labeled(
            options.data,
            options.val,
            channels=first.channels,
            size=first.shape[1],
            tested=tested,
            value_range=options.range,
            bits=first.bits,
            max_pixels=options.max_pixels,
            progress=screen.progress,
            world=world,
        )
    except DataError as e:
        if given.data is None:
            raise DataError(f"{e}; these are the images of the run, --data gives others") from e
        raise
    if given.data is None:
        screen.say(f"evaluating on {options.data} by default; --data gives other images")
    for line in data.read:
        screen.say(line)
    screen.say(
        f"{task.name}: {len(data.train):,} training and {how_many(len(data.test), 'test image')} of "
        f"{how_many(len(data.classes), 'class')}"
    )
    for note in data.notes:
        screen.say(f"note: {note}")
    result = [
        EvaluationContext(name, which, backbone, data, options, device, world, screen, precision, classifier)
        for which, backbone in named
    ]
    for context in result:
        task.check(context)
    return result


def networks(name: str, which: str) -> list[str]:
    """The names of the requested networks; `SINGLE` for weights without teacher and student."""
    if name == "pixels" or name.startswith(("timm:", "scratch:")):
        return [SINGLE]
    path = Path(name)
    if (path / "export").is_dir():
        exported = [n for n in ("student", "teacher") if (path / "export" / n).is_dir()]
        if exported == ["student"] and which != "student":
            load(name, "teacher")  # raises an error if the teacher was lost
            return ["student"]
    elif not is_bare(path):
        return [SINGLE]
    elif read_weights(path).teacher is None:
        return [SINGLE if path.suffix == ".safetensors" else "student"]
    return ["student", "teacher"] if which == "both" else [which]


def evaluate(name: str, task: Task, options: EvaluationOptions = EvaluationOptions()) -> list[dict[str, Any]]:
    """Run a task on a backbone, write the result files, and return their records, one per network.

    Works under `torchrun`: ranks share the feature extraction, rank 0 fits and writes. Raises the errors of
    `rcmae.errors`.
    """
    task.check_settings(name, options)
    device, records = distributed.pick_device(options.device), []
    advice = "try a smaller --batch or --device cpu" if hasattr(task, "batch") else "try --device cpu"
    with (
        distributed.process_group(device) as world,
        translate_errors(device, world, advice),
        Screen(world.is_main) as screen,
    ):
        all_contexts = contexts(name, task, options, world, screen)
        if world.size > 1 and not task.all_ranks:
            # All networks come first, so that no rank has to wait while rank 0 fits.
            for context in all_contexts:
                if kind := task.required_features(context):
                    blocks = task.last_blocks(context)
                    context.features("train", kind == "tokens", blocks)
                    context.features("test", kind == "tokens", blocks)
        for context in all_contexts if world.is_main or task.all_ranks else ():
            started = time.monotonic()
            result = task.run(context)
            if world.is_main:
                records.append(record(task, context, result, time.monotonic() - started))
            context.extracted.clear()
    return records


def record(task: Task, context: EvaluationContext, result: TaskResult, seconds: float) -> dict[str, Any]:
    """Write the JSON record of a result and its correct images; returns the record.

    A result of other settings, images or weights that has the same name is kept.
    """
    options, test = context.options, context.set.test
    assert test.labels is not None  # open_labeled refuses images without labels
    hashes = {
        "backbone": identity(context.backbone),
        "train": context.part("train").fingerprint()[:16],
        "test": test.fingerprint()[:16],
    }
    scale = [test.bits] if test.bits and test.bits < 16 else []  # what is white in 16-bit images
    # Defaults that depend on the backbone's method.
    resolved = {key: result.settings[key] for key in ("pool", "blocks") if key in result.settings}
    about = json.dumps([hashes, asdict(task) | resolved, *scale], default=str)
    request = hashlib.sha256(about.encode()).hexdigest()[:16]
    classes = context.set.classes
    per_class = {
        classes[i]: 100 * float(result.correct[test.labels == i].mean()) for i in np.unique(test.labels)
    }
    content = {
        "task": task.name,
        "backbone": context.name,
        "network": context.which,
        "metrics": result.metrics,
        "labels_percent": options.labels,
        "train_images": len(context.part("train")),
        "test_images": len(test),
        "classes": len(classes),
        "settings": result.settings,
        "seed": options.seed,
        "data": options.data,
        "val": options.val,
        "read": list(context.set.read),
        "notes": list(context.set.notes),
        "hashes": hashes | {"request": request},
        "seconds": round(result.seconds or seconds, 1),
        "machine": describe_machine(context.device, context.precision),
        "per_class": per_class,
        "images_per_class": {classes[i]: int(np.sum(test.labels == i)) for i in np.unique(test.labels)},
    }
    content |= {"details": result.details} if result.details else {}
    folder = results_folder(context.name, options)
    folder.mkdir(parents=True, exist_ok=True)
    name = stem(task.name, context.which, options) + task.variant()
    existing = folder / f"{name}.json"
    if (
        existing.exists()
        and not task.resumes
        and read_json(existing).get("hashes", {}).get("request") != request
    ):
        # Other settings, images or weights: keep both. (Fine-tuning refuses them in the same directory.)
        name += f"-{request[:6]}"
    correct = {"correct": result.correct} | (result.correct_by_condition or {})
    replace_file(
        folder / f"{name}.safetensors",
        save({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in correct.items()}),
    )
    write_json(folder / f"{name}.json", content)
    return content
