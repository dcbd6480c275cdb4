"""The commands of `rcmae detect`."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...config import BaseRuntimeConfig, check, recipe_hash, replaced, shipped_recipes
from ...data.sampler import check_parts
from ...data.sources import recipe_for
from ...engine import distributed
from ...engine.checkpoint import replace_file
from ...engine.console import Screen
from ...engine.run import check_same_recipe, describe_machine, translate_errors, write_json
from ...errors import ConfigError
from ...interop.load import load
from ...models.blueprint import architecture_of, blueprint
from .average_precision import evaluate_all, library, load_results
from .coco import open_coco, open_test, sample_images
from .files import load_detector
from .model import export_pyramid
from .predict import Predictions, images_scored, predict
from .settings import DetectionOptions, DetectionRecipe, ScoringOptions, load_detect
from .train import check_ranks, train
from .windows import check_backbone


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
    backbone = load(name, options.which, options.heads, settings.seed, options.shape)
    if options.recipe is None and recipe == "vitdet-base" and backbone.vit.embed_dim >= 1024:
        recipe = "vitdet-large"
        settings = settings_of(recipe, options.settings)
    library()
    # All that can be refused before reading annotations, which takes minutes for a large set.
    check_backbone(backbone.vit, settings)
    blueprint(backbone.vit, architecture_of(backbone.vit))
    out = runtime.out or run_folder(name, options.which)
    with distributed.process_group(device) as world:
        screen = Screen(world.is_main)
        check_ranks(settings, world, device)
        check_parts(settings.batch_size, world.size, runtime.accumulate)
        check_same_recipe(out, settings, load_detect, ("batch_size",))  # lowered for few images
        data, test = open_coco(
            options.data,
            options.val,
            channels=backbone.channels,
            value_range=options.range,
            bits=backbone.bits,
            max_pixels=options.max_pixels,
            progress=screen.progress,
            world=world,
        )
        if options.train_images is not None:
            data = sample_images(data, options.train_images)
        about = {
            "backbone_name": name,
            "network": options.which,
            "data_name": options.data,
            "val_name": options.val,
            "upright": data.upright,
            "bits": data.bits,
            "recipe": recipe,
        }
        screen.say(f"recipe {recipe}, trained on {data.name}, tested on {test.name}")
        for note in (*data.notes, *(f"test part: {note}" for note in test.notes)):
            screen.say(f"note: {note}")
        train(backbone, data, test, settings, replace(runtime, out=out), about)
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
    out, advice = options.out or checkpoint / "eval", "try a smaller --batch"
    with (
        distributed.process_group(device) as world,
        translate_errors(device, world, advice),
        Screen(world.is_main) as screen,
    ):
        test = open_test(
            data,
            channels=channels,
            categories=dict(zip(loaded.category_ids, loaded.classes, strict=True)),
            upright=loaded.about.get("upright"),
            value_range=options.range,
            bits=loaded.about.get("bits"),
            max_pixels=options.max_pixels,
            progress=screen.progress,
            world=world,
        )
        for line in test.notes:
            screen.say(f"note: {line}")
        if options.results:
            predictions = Predictions(load_results(options.results, test.truth), [])
        else:
            with screen.progress(f"detecting in {test.name}", len(range(0, len(test), world.size))) as tick:
                predictions = predict(
                    loaded.model,
                    test,
                    size=loaded.settings.size,
                    channels=channels,
                    device=device,
                    precision=precision,
                    batch=options.batch,
                    workers=options.workers,
                    world=world,
                    tick=tick,
                )
        if not world.is_main:
            return None
        results, unreadable = predictions
        if unreadable:
            shown = ", ".join(f"{path} ({reason})" for _, path, reason in unreadable[:3])
            screen.say(f"note: scored are {images_scored(len(test), len(unreadable))}, for example {shown}")
        scores = evaluate_all(predictions.readable(test).truth, results, options.areas)
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
            **{name: precision._asdict() for name, precision in scores.items()},
        }
        out.mkdir(parents=True, exist_ok=True)
        if options.results:
            write_json(out / f"scores-{options.results.stem}.json", content)
        else:
            replace_file(out / "coco_results.json", json.dumps(results))
            write_json(out / "scores.json", content)
        return content


def write_program(checkpoint: Path, out: Path) -> Path:
    """Export backbone and pyramid of a detector with torch.export."""
    if out.suffix != ".pt2":
        raise ConfigError(f"--out {out}: the name of an exported program ends in .pt2")
    export_pyramid(load_detector(checkpoint).model, out)
    return out


def percent(stats: dict[str, float | None]) -> dict[str, str]:
    """Metrics in percent as papers print them; empty if there are no such objects."""
    return {name: "" if value is None else f"{100 * value:.1f}" for name, value in stats.items()}
