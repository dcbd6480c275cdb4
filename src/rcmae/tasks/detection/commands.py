"""The commands of `rcmae detect`."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...config import BaseRuntimeConfig, check, recipe_hash, replaced, shipped_recipes
from ...data.dataset import Bad
from ...data.sources import recipe_for
from ...engine import distributed
from ...engine.checkpoint import replace_file
from ...engine.console import Screen
from ...engine.run import describe_machine, translate_errors, write_json
from ...errors import ConfigError, DataError
from ...interop.load import load
from .average_precision import evaluate, kinds_of, library, load_results
from .coco import CocoSet, open_coco, open_test, sample_images
from .files import Loaded, load_detector
from .model import export_pyramid
from .predict import predict
from .settings import DetectionOptions, DetectionRecipe, ScoringOptions, load_detect
from .train import train
from .windows import check_backbone

PARTS = {"box": "bbox", "mask": "segm"}


def train_detector(name: str, options: DetectionOptions, runtime: BaseRuntimeConfig) -> Path | None:
    """Train a detector on a backbone; the same call resumes an interrupted run.

    Returns the run directory on rank 0, None on other ranks. Raises the errors of `rcmae.errors`.
    """
    check(runtime)
    check(options)
    device = distributed.pick_device(runtime.device)
    recipe = options.recipe or recipe_for(options.data)
    if not options.recipe and recipe not in shipped_recipes("detection"):
        recipe = "vitdet-base"
    settings = settings_of(recipe, options.settings)
    backbone = load(name, options.which, options.heads, settings.seed)
    if options.recipe is None and recipe == "vitdet-base" and backbone.vit.embed_dim >= 1024:
        recipe = "vitdet-large"
        settings = settings_of(recipe, options.settings)
    library()
    check_backbone(backbone.vit, settings)  # before reading annotations, which takes minutes for a large set
    images, test = open_coco(options.data, options.val, channels=backbone.channels)
    if options.images is not None:
        images = sample_images(images, options.images)
    about = {
        "backbone_name": name,
        "network": options.which,
        "data_name": options.data,
        "val_name": options.val,
        "images": options.images,
        "recipe": recipe,
    }
    out = runtime.out or run_folder(name, options.which)
    with distributed.process_group(device) as world:
        for line in (f"recipe {recipe}", *(f"note: {note}" for note in (*images.notes, *test.notes))):
            Screen(world.is_main).say(line)
        train(backbone, images, test, settings, replace(runtime, out=out), about)
        return out if world.is_main else None


def settings_of(recipe: str, given: tuple[str, ...]) -> DetectionRecipe:
    """A recipe with changes as KEY=VALUE; steps and epochs replace each other. Raises ConfigError."""
    settings = load_detect(recipe)
    if any(text.partition("=")[0].strip() in ("steps", "epochs") for text in given):
        settings = replace(settings, steps=None, epochs=None)
    return check(replaced(settings, given, recipe))


def run_folder(name: str, which: str = "teacher") -> Path:
    """The default run directory of a detector: inside the run of its backbone, or in runs/ by the name of the
    backbone."""
    path, folder = Path(name), "detect" if which == "teacher" else f"detect-{which}"
    if (path / "recipe.toml").exists():
        return path / folder
    return Path("runs") / folder / (re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "backbone")


def score_detector(checkpoint: Path, options: ScoringOptions) -> dict[str, Any] | None:
    """Compute COCO's twelve metrics of boxes and masks on the test part of the data, and write scores.json
    and coco_results.json.

    With a file of results (`options.results`), score these and write only scores-FILE.json. Returns the
    content of the scores on rank 0, None on other ranks. Raises the errors of `rcmae.errors`.
    """
    check(options)
    device = distributed.pick_device(options.device)
    loaded = load_detector(checkpoint)
    data = (
        options.data or loaded.about.get("val_name") or loaded.about.get("data_name") or DetectionOptions.data
    )
    precision = distributed.pick_precision(options.precision, device)
    channels = loaded.model.mean.shape[1]
    test = open_test(data, channels=channels)
    if differ := [f"{k} {v}" for k, v in _classes(test).items() ^ _classes(loaded).items()]:
        some = ", ".join(sorted(differ)[:4])
        raise DataError(
            f"{test.name} has other categories than {checkpoint} was trained on, for example {some}; give "
            "--data with the same categories"
        )
    out, advice = options.out or checkpoint / "eval", "try a smaller --batch"
    with (
        distributed.process_group(device) as world,
        translate_errors(device, world, advice),
        Screen(world.is_main) as screen,
    ):
        for line in test.notes:
            screen.say(f"note: {line}")
        unreadable: list[Bad] = []
        truth = test.truth
        if options.results:
            results = load_results(options.results, truth)
        else:
            with screen.progress(f"detecting in {test.name}", len(range(0, len(test), world.size))) as tick:
                results = predict(
                    loaded.model,
                    test,
                    size=loaded.settings.size,
                    channels=channels,
                    device=device,
                    precision=precision,
                    batch=options.batch,
                    workers=options.workers,
                    world=world,
                    note=unreadable.extend,
                    tick=tick,
                )
        unreadable = [bad for part in world.gather(unreadable) for bad in part]
        if not world.is_main:
            return None
        for _, path, reason in unreadable:
            screen.say(f"note: {path} cannot be read ({reason}); it has no detections")
        kinds = kinds_of(results)
        scores = {
            name: evaluate(truth, results, kind, areas=options.areas)._asdict()
            for name, kind in PARTS.items()
            if kind in kinds
        }
        content = {
            "checkpoint": str(checkpoint),
            "results": options.results and str(options.results),
            "data": data,
            "test": test.fingerprint(),
            "test_images": len(test),
            "unreadable": [path for _, path, _ in unreadable],
            "preset": loaded.settings.preset,
            "recipe_hash": recipe_hash(loaded.settings),
            "detector": loaded.about,
            "machine": describe_machine(device, precision),
            **scores,
        }
        out.mkdir(parents=True, exist_ok=True)
        if options.results:
            write_json(out / f"scores-{options.results.stem}.json", content)
        else:
            replace_file(out / "coco_results.json", json.dumps(results))
            write_json(out / "scores.json", content)
        return content


def _classes(data: CocoSet | Loaded) -> dict[int, str]:
    return dict(zip(data.category_ids, data.classes, strict=True))


def write_program(checkpoint: Path, out: Path) -> Path:
    """Export backbone and pyramid of a detector with torch.export."""
    if out.suffix != ".pt2":
        raise ConfigError(f"--out {out}: the name of an exported program ends in .pt2")
    export_pyramid(load_detector(checkpoint).model, out)
    return out


def percent(stats: dict[str, float | None]) -> dict[str, str]:
    """Metrics in percent as papers print them; empty if there are no such objects."""
    return {name: "" if value is None else f"{100 * value:.1f}" for name, value in stats.items()}
