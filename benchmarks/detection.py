"""Does pre-training on unlabeled scenes help detection and segmentation? `python -m benchmarks.detection`.

Four backbones, two numbers of labeled scenes, three paired seeds, one budget. Within a seed all backbones
have the same initial weights (and so have the detectors' heads), images, crops and labels. MAE is the student
of RC-MAE with gamma 0, to the bit. Finished runs are never repeated: the same command resumes where it
stopped. `--longer` then trains the best backbone on all scenes. Each run uses one core. Writes
results/detection.json. All numbers are of bundled scenes, not of COCO.
"""

import argparse
import contextlib
import io
import json
import multiprocessing as mp
import os
import time
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks import ROOT, markdown
from benchmarks.evaluation import PRETRAINED, pretrained
from rcmae.config import BaseRuntimeConfig, changed, recipe_hash
from rcmae.engine.console import clock
from rcmae.engine.distributed import pick_precision
from rcmae.engine.limits import cores
from rcmae.engine.metrics import read_metrics
from rcmae.engine.run import describe_machine, write_json
from rcmae.interop.load import load, scratch
from rcmae.methods.recipes import load_recipe
from rcmae.tasks.detection.coco import CocoSet, open_coco, sample_images
from rcmae.tasks.detection.settings import DetectionRecipe, load_detect
from rcmae.tasks.detection.train import train
from rcmae.tasks.interval import Difference, correction_note, judged, over_seeds

BACKBONES: dict[str, tuple[str, Literal["student", "teacher"]] | None] = {
    "random init": None,
    "MAE": ("mae", "student"),
    "RC-MAE, student": ("rcmae", "student"),
    "RC-MAE, teacher": ("rcmae", "teacher"),
}
PRETRAINING = 600
"Steps on unlabeled scenes."
STEPS = 800
"""Steps of a detector in the table. With these all of it takes less than two hours on two cores, even where
bf16 is no faster than fp32."""
COUNTS = (64, 1024)
"Labeled scenes."
NUMBERS = {
    "box AP": ("box", "AP"),
    "box AP50": ("box", "AP50"),
    "mask AP": ("mask", "AP"),
    "mask AP50": ("mask", "AP50"),
}
LONGER = 3.0
"Steps of the longer run, as a multiple of STEPS."
OVERFIT = 1000
"Steps of overfitting four scenes."


def run_path(out: Path, name: str, count: int, seed: int) -> Path:
    """The directory of a detector."""
    return out / "detectors" / f"{name.replace(', ', '-').replace(' ', '-')}-{count}-{seed}"


@cache
def labeled() -> tuple[CocoSet, CocoSet]:
    """Training and test scenes. Drawing them takes most of a minute, once per process."""
    return open_coco("bundled:scenes")


def finished(path: Path, settings: DetectionRecipe) -> bool:
    """Whether this run is finished. Raises SystemExit when it has other settings."""
    if not (path / "scores.json").exists():
        return False
    if json.loads((path / "scores.json").read_bytes())["recipe_hash"] != recipe_hash(settings):
        raise SystemExit(f"{path} has other settings; remove it")
    return True


def run(out: Path, name: str, count: int, seed: int, steps: int = STEPS) -> str:
    """Train a detector unless it is finished; returns its name and the time it took."""
    began, path = time.monotonic(), run_path(out, name, count, seed)
    settings = replace(load_detect("bundled"), seed=seed, steps=steps)
    if finished(path, settings):
        return f"{path.name}: finished before"
    torch.set_num_threads(1)
    source, runs = BACKBONES[name], out / "pretrain"
    backbone = (
        load(runs / f"{source[0]}-{seed}", source[1])
        if source
        else scratch(str(runs / f"rcmae-{seed}"), seed=seed)
    )
    images, test = labeled()
    runtime = BaseRuntimeConfig(out=path, device="cpu", workers=0, threads=1)
    with contextlib.redirect_stdout(io.StringIO()):
        train(backbone, sample_images(images, count, seed), test, settings, runtime, {"backbone_name": name})
    return f"{path.name}: {clock(time.monotonic() - began)}"


def scores(path: Path) -> dict[str, float]:
    """The four numbers of a finished run, in percent."""
    parts = json.loads((path / "scores.json").read_bytes())
    return {name: 100 * parts[part]["stats"][key] for name, (part, key) in NUMBERS.items()}


def seconds(path: Path) -> float:
    """Training time of a run, over all its resumes."""
    return float([line for line in read_metrics(path) if line["kind"] == "train"][-1]["seconds"])


def overfit(out: Path) -> dict[str, Any]:
    """Overfit four scenes from random initialization: boxes and masks should become nearly perfect."""
    path = out / "overfit"
    torch.set_num_threads(1)
    scenes = sample_images(labeled()[0], 4, seed=1)
    settings = replace(
        load_detect("bundled"), steps=OVERFIT, batch_size=4, jitter=(1.0, 1.0), drop_path=0.0, layer_decay=1.0
    )
    if not finished(path, settings):
        backbone = scratch(str(out / "pretrain" / "rcmae-1"), seed=1)
        runtime = BaseRuntimeConfig(out=path, device="cpu", workers=0, threads=1)
        with contextlib.redirect_stdout(io.StringIO()):
            train(backbone, scenes, scenes, settings, runtime, {"backbone_name": "random init"})
    return {"scenes": 4, "steps": OVERFIT, "seconds": seconds(path), **scores(path)}


def longer(out: Path, name: str) -> dict[str, Any]:
    """Train one backbone for longer, on all scenes."""
    count, steps, folder = len(labeled()[0]), round(LONGER * STEPS), out / "longer"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "pretrain").exists():
        (folder / "pretrain").symlink_to((out / "pretrain").resolve())
    run(folder, name, count, 1, steps)
    path = run_path(folder, name, count, 1)
    return {"backbone": name, "scenes": count, "steps": steps, "seconds": seconds(path), **scores(path)}


def judge(out: Path, seeds: list[int]) -> list[dict[str, Any]]:
    """By number of scenes and backbone: all seeds, and differences to the randomly initialized backbone and
    to MAE."""
    rows = []
    for count in COUNTS:
        by_name = {name: [scores(run_path(out, name, count, seed)) for seed in seeds] for name in BACKBONES}
        for name in BACKBONES:
            row: dict[str, Any] = {"backbone": name, "scenes": count}
            for number in NUMBERS:
                values = {other: [seed[number] for seed in by_name[other]] for other in BACKBONES}
                row[number] = {"seeds": values[name]} | {
                    f"against {other}": over_seeds(np.subtract(values[name], values[other]))
                    for other in ("random init", "MAE")
                    if other != name
                }
            rows.append(row)
    return rows


def table(results: dict[str, Any]) -> str:
    """Average precision on bundled scenes by number of labeled scenes and backbone."""
    machine, others = results["machine"], ("random init", "MAE")
    rows = [
        [
            f"{row['scenes']:,}",
            row["backbone"],
            *(f"{markdown.mean(row[number]['seeds']):.1f}" for number in NUMBERS),
            *(markdown.signed(row["mask AP"].get(f"against {other}")) for other in others),
        ]
        for row in results["rows"]
    ]
    four = results["overfit"]
    notes = [
        f"Bundled scenes, in percent: means of {len(results['seeds'])} paired seeds, "
        f"{results['test_scenes']} test scenes, {results['steps']:,} steps of {results['batch_size']} scenes "
        f"after {results['pretraining_steps']:,} of pre-training, {results['core_minutes']:.0f} core minutes "
        "in total. 95 % intervals over seeds (Student's t, test scenes as given) in brackets. "
        f"{machine['cpu']}, {machine['precision']}, torch {machine['torch']}.",
        f"Four scenes overfitted from random initialization in {four['steps']:,} steps: box AP "
        f"{four['box AP']:.1f}, mask AP {four['mask AP']:.1f}.",
    ]
    if run := results.get("longer"):
        precisions = ", ".join(f"{number} {run[number]:.1f}" for number in NUMBERS)
        notes.append(
            f"One longer run ({run['backbone']}, {run['scenes']:,} labeled scenes, {run['steps']:,} steps, "
            f"{run['seconds'] / 60:.0f} minutes on one core): {precisions}."
        )
    head = ["labeled scenes", "backbone", *NUMBERS, *(f"mask AP, against {other}" for other in others)]
    return markdown.table(head, rows, *notes, left=(1,))


def verdict(results: dict[str, Any]) -> str:
    """Whether pre-training helps detection; and RC-MAE more than MAE, where MAE is shown to help, since other
    experiments cannot rank pre-trained networks."""
    assay = _judged(results, "MAE", "random init")
    ranking = {place for place, (better, _) in assay.items() if better}
    texts = [text for _, text in assay.values()]
    if ranking:
        compared = _judged(results, "RC-MAE, teacher", "MAE", ranking)
        texts += [text for _, text in compared.values()]
        return f"{markdown.bullets(texts)}\n\nEach pair of arms is a family. {correction_note(None)}"
    withdrawn = (
        "MAE is nowhere shown to be better than random initialization, so this experiment cannot rank "
        "pre-trained networks, and says nothing about RC-MAE. The numbers of all arms are in the table."
    )
    return f"{markdown.bullets(texts)}\n\n{withdrawn} {correction_note(len(assay))}"


def _judged(
    results: dict[str, Any], name: str, other: str, places: Collection[tuple[int, str]] | None = None
) -> dict[tuple[int, str], tuple[bool, str]]:
    """A family of comparisons, by number of labeled scenes and kind of AP: whether the first arm is better,
    and the verdict."""
    family = {
        (row["scenes"], number): Difference(*row[number][f"against {other}"])
        for row in results["rows"]
        if row["backbone"] == name
        for number in ("box AP", "mask AP")
        if places is None or (row["scenes"], number) in places
    }
    return {
        (scenes, number): (
            verdict.word == "better",
            f"{name} against {other}, {scenes:,} labeled scenes, {number}: {verdict}.",
        )
        for (scenes, number), verdict in zip(family, judged(family.values()), strict=True)
    }


def main() -> None:
    """Make the missing runs, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=cores())
    parser.add_argument("--longer", action="store_true", help="also train the best backbone on all scenes")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "detection")
    args = parser.parse_args()
    seeds, began = list(range(1, args.seeds + 1)), time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(args.jobs, mp.get_context("spawn")) as pool:
        runs = [(args.out, name, seed, "scenes", PRETRAINING) for seed in seeds for name in PRETRAINED]
        for path in pool.map(pretrained, *zip(*runs, strict=True)):
            print(f"{path.name}: pre-trained, {clock(time.monotonic() - began)}", flush=True)
        units = [(args.out, name, count, seed) for seed in seeds for count in COUNTS for name in BACKBONES]
        for number, text in enumerate(pool.map(run, *zip(*units, strict=True)), 1):
            print(f"{number} of {len(units)}: {text}, {clock(time.monotonic() - began)}", flush=True)
        rows = judge(args.out, seeds)
        best = max(
            (row for row in rows if row["scenes"] == max(COUNTS)),
            key=lambda row: np.mean(row["mask AP"]["seeds"]),
        )["backbone"]
        extra = {"overfit": pool.submit(overfit, args.out)}
        if args.longer:
            extra["longer"] = pool.submit(longer, args.out, best)
    settings, (_, test) = replace(load_detect("bundled"), steps=STEPS), labeled()
    parts = [args.out / "pretrain" / f"{name}-{seed}" for seed in seeds for name in PRETRAINED]
    parts += [run_path(args.out, name, count, seed) for _, name, count, seed in units]
    results: dict[str, Any] = {
        "rows": rows,
        "seeds": seeds,
        "preset": settings.preset,
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "pretraining_steps": PRETRAINING,
        "test_scenes": len(test),
        "core_minutes": sum(map(seconds, parts)) / 60,
        "recipe_hash": {"detection": recipe_hash(settings)}
        | {
            name: recipe_hash(changed(load_recipe("scenes"), steps=PRETRAINING, **changes))
            for name, changes in PRETRAINED.items()
        },
    }
    results |= {name: future.result() for name, future in extra.items()}
    results["machine"] = describe_machine(torch.device("cpu"), pick_precision("auto", torch.device("cpu")))
    write_json(ROOT / "results" / "detection.json", results)
    for row in rows:
        cells = "  ".join(f"{name} {np.mean(row[name]['seeds']):.1f}" for name in NUMBERS)
        print(f"bundled scenes, {row['scenes']:5} labeled  {row['backbone']:16} {cells}")
    for name in ("overfit", "longer"):
        if name in results:
            print(name, results[name])


if __name__ == "__main__":
    main()
