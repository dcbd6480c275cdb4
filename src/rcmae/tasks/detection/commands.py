"""What `rcmae detect` does with names and files."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...config import Workplace, replaced
from ...data.dataset import Bad
from ...engine import distributed
from ...engine.checkpoint import replace_file
from ...engine.console import Screen
from ...engine.run import describe_machine, plain_failures, write_json
from ...errors import ConfigError, DataError
from ...interop.load import load
from .average_precision import Precision, evaluate, load_results
from .coco import SCENES, few, open_coco, open_test
from .files import load_detector
from .model import export_pyramid
from .predict import predict
from .settings import Scoring, Training, check_detect, load_detect
from .train import Detected, train

PARTS = {"box": "bbox", "mask": "segm"}


def train_detector(name: str, how: Training, machine: Workplace, say: Callable[[str], None] = print) -> Detected:
    """Train on the data that `how` names, from the backbone of that name; the same call goes on. Raises the errors of `rcmae.errors`."""
    recipe = how.recipe or ("embedded" if how.data == SCENES else "vitdet-base")
    settings = load_detect(recipe)
    if any(text.partition("=")[0].strip() in ("steps", "epochs") for text in how.settings):
        settings = replace(settings, steps=None, epochs=None)
    settings = check_detect(replaced(settings, how.settings, recipe))
    backbone = load(name, how.which, how.heads, settings.seed)
    images, test = open_coco(how.data, how.val)
    for note in [*images.notes, *test.notes]:
        say(f"note: {note}")
    if how.images is not None:
        images = few(images, how.images)
    about = {"backbone_name": name, "network": how.which, "data_name": how.data, "val_name": how.val, "recipe": recipe}
    return train(backbone, images, test, settings, replace(machine, out=machine.out or place(name)), about)


def place(name: str) -> Path:
    """The run directory of a detector that is made from a backbone: beside the run the backbone is from, or by its name."""
    path = Path(name)
    if (path / "recipe.toml").exists():
        return path / "detect"
    return Path("runs") / "detect" / (re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "backbone")


def score_detector(checkpoint: Path, how: Scoring, say: Callable[[str], None] = print) -> dict[str, Any] | None:
    """COCO's twelve numbers of boxes and masks on the test part of the data, written as scores.json beside coco_results.json.

    Returns what it wrote, or None on ranks but the first. Raises the errors of `rcmae.errors`.
    """
    loaded = load_detector(checkpoint)
    device = distributed.pick_device(how.device)
    precision = distributed.pick_precision(how.precision, device)
    test = open_test(how.data)
    if test.category_ids != loaded.category_ids:
        raise DataError(f"{test.name} has other categories than {checkpoint} was trained on: {len(test.classes)}, {len(loaded.classes)}")
    with distributed.joined(device) as world, plain_failures(device, world), Screen(world.first) as screen:
        for line in test.notes:
            screen.say(f"note: {line}")
        if how.results:
            results = load_results(how.results, test.truth)
        else:

            def note(bad: list[Bad]) -> None:
                for _, where, reason in bad:
                    screen.say(f"note: {where} cannot be read ({reason}); nothing was found there")

            with screen.progress(f"detecting in {test.name}", len(test)) as tick:
                results = predict(
                    loaded.model, test, size=loaded.settings.size, channels=loaded.model.mean.shape[1], device=device,
                    precision=precision, batch=how.batch, workers=how.workers, world=world, note=note, tick=tick,
                )  # fmt: skip
        if not world.first:
            return None
        found = {name: evaluate(test.truth, results, kind, areas=how.areas)._asdict() for name, kind in PARTS.items()}
        facts = {"data": how.data, "test": test.fingerprint(), "test_images": len(test), "preset": loaded.settings.preset}
        content = facts | {"machine": describe_machine(device, precision)} | found
        out = how.out or checkpoint / "eval"
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / "coco_results.json", json.dumps(results))
        write_json(out / "scores.json", content)
        return content


def write_program(checkpoint: Path, out: Path) -> Path:
    """Backbone and pyramid of a detector through torch.export."""
    if out.suffix != ".pt2":
        raise ConfigError(f"--out {out}: the name of an exported program ends in .pt2")
    with torch.no_grad():
        export_pyramid(load_detector(checkpoint).model, out)
    return out


def percent(precision: Precision | dict[str, Any]) -> dict[str, str]:
    """The twelve numbers as papers print them; empty where there is no such object."""
    stats = precision["stats"] if isinstance(precision, dict) else precision.stats
    return {name: "" if value is None else f"{100 * value:.1f}" for name, value in stats.items()}
