"""What `rcmae detect` does with names and files."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...config import Workplace, check, recipe_hash, replaced, shipped_recipes
from ...data.dataset import Bad
from ...data.sources import recipe_for
from ...engine import distributed
from ...engine.checkpoint import replace_file
from ...engine.console import Screen
from ...engine.run import describe_machine, plain_failures, write_json
from ...errors import ConfigError, DataError
from ...interop.load import load
from .average_precision import evaluate, kinds_of, library, load_results
from .coco import CocoSet, few, open_coco, open_test
from .files import Loaded, load_detector
from .model import export_pyramid
from .predict import predict
from .settings import Detect, Detection, Scoring, check_detect, check_detection, check_scoring, load_detect
from .train import train
from .windows import check_backbone

PARTS = {"box": "bbox", "mask": "segm"}


def train_detector(name: str, options: Detection, machine: Workplace) -> Path | None:
    """Train on the data that `options` names, from the backbone of that name; the same call goes on.

    Returns the run directory, or None on ranks but the first. Raises the errors of `rcmae.errors`.
    """
    check(machine)
    check_detection(options)
    device = distributed.pick_device(machine.device)
    recipe = options.recipe or (suited if (suited := recipe_for(options.data)) in shipped_recipes("detection") else "vitdet-base")
    settings = settings_of(recipe, options.settings)
    backbone = load(name, options.which, options.heads, settings.seed)
    if options.recipe is None and recipe == "vitdet-base" and backbone.vit.embed_dim >= 1024:
        recipe = "vitdet-large"
        settings = settings_of(recipe, options.settings)
    library()
    check_backbone(backbone.vit, settings)  # before annotations are read, which takes minutes of a large set
    images, test = open_coco(options.data, options.val, channels=backbone.channels)
    if options.images is not None:
        images = few(images, options.images)
    about = {
        "backbone_name": name,
        "network": options.which,
        "data_name": options.data,
        "val_name": options.val,
        "images": options.images,
        "recipe": recipe,
    }
    out = machine.out or place(name, options.which)
    with distributed.joined(device) as world:
        for line in (f"recipe {recipe}", *(f"note: {note}" for note in (*images.notes, *test.notes))):
            Screen(world.first).say(line)
        train(backbone, images, test, settings, replace(machine, out=out), about)
        return out if world.first else None


def settings_of(recipe: str, given: tuple[str, ...]) -> Detect:
    """A recipe with the settings that are `given` as KEY=VALUE; of steps and epochs either replaces the other. Raises ConfigError."""
    settings = load_detect(recipe)
    if any(text.partition("=")[0].strip() in ("steps", "epochs") for text in given):
        settings = replace(settings, steps=None, epochs=None)
    return check_detect(replaced(settings, given, recipe))


def place(name: str, which: str = "teacher") -> Path:
    """The run directory of a detector that is made from a backbone: beside the run the backbone is from, or by its name."""
    path, own = Path(name), "detect" if which == "teacher" else f"detect-{which}"
    if (path / "recipe.toml").exists():
        return path / own
    return Path("runs") / own / (re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "backbone")


def score_detector(checkpoint: Path, options: Scoring) -> dict[str, Any] | None:
    """COCO's twelve numbers of boxes and masks on the test part of the data, written as scores.json beside coco_results.json.

    Of a file of results (`options.results`) what it holds is scored, and scores-FILE.json written alone. Returns what was written, or None
    on ranks but the first. Raises the errors of `rcmae.errors`.
    """
    check_scoring(options)
    device = distributed.pick_device(options.device)
    loaded = load_detector(checkpoint)
    data = options.data or loaded.about.get("val_name") or loaded.about.get("data_name") or Detection.data
    precision = distributed.pick_precision(options.precision, device)
    channels = loaded.model.mean.shape[1]
    test = open_test(data, channels=channels)
    if differ := [f"{k} {v}" for k, v in _classes(test).items() ^ _classes(loaded).items()]:
        some = ", ".join(sorted(differ)[:4])
        raise DataError(f"{test.name} has other categories than {checkpoint} was trained on, as {some}; give --data with the same ones")
    out, advice = options.out or checkpoint / "eval", "try a smaller --batch"
    with distributed.joined(device) as world, plain_failures(device, world, advice), Screen(world.first) as screen:
        for line in test.notes:
            screen.say(f"note: {line}")
        unreadable: list[Bad] = []
        truth = test.truth
        if options.results:
            results = load_results(options.results, truth)
        else:
            with screen.progress(f"detecting in {test.name}", len(range(0, len(test), world.size))) as tick:
                results = predict(
                    loaded.model, test, size=loaded.settings.size, channels=channels, device=device, precision=precision,
                    batch=options.batch, workers=options.workers, world=world, note=unreadable.extend, tick=tick,
                )  # fmt: skip
        unreadable = [bad for part in world.to_first(unreadable) for bad in part]
        if not world.first:
            return None
        for _, where, reason in unreadable:
            screen.say(f"note: {where} cannot be read ({reason}); nothing was found there")
        kinds = kinds_of(results)
        found = {name: evaluate(truth, results, kind, areas=options.areas)._asdict() for name, kind in PARTS.items() if kind in kinds}
        content = {
            "checkpoint": str(checkpoint), "results": options.results and str(options.results), "data": data, "test": test.fingerprint(),
            "test_images": len(test), "unreadable": [where for _, where, _ in unreadable], "preset": loaded.settings.preset,
            "recipe_hash": recipe_hash(loaded.settings), "detector": loaded.about, "machine": describe_machine(device, precision), **found,
        }  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        if options.results:
            write_json(out / f"scores-{options.results.stem}.json", content)
        else:
            replace_file(out / "coco_results.json", json.dumps(results))
            write_json(out / "scores.json", content)
        return content


def _classes(of: CocoSet | Loaded) -> dict[int, str]:
    return dict(zip(of.category_ids, of.classes, strict=True))


def write_program(checkpoint: Path, out: Path) -> Path:
    """Backbone and pyramid of a detector through torch.export."""
    if out.suffix != ".pt2":
        raise ConfigError(f"--out {out}: the name of an exported program ends in .pt2")
    export_pyramid(load_detector(checkpoint).model, out)
    return out


def percent(stats: dict[str, float | None]) -> dict[str, str]:
    """Numbers as papers print them; empty where there is no such object."""
    return {name: "" if value is None else f"{100 * value:.1f}" for name, value in stats.items()}
