"""Does pre-training on unlabelled scenes help to detect and to segment? `python -m benchmarks.detection`.

Four backbones, two numbers of labelled scenes, three paired seeds, one budget. Within a seed all backbones have the same initial weights
(and so have the detectors' heads), images, crops and labels. MAE is the student of RC-MAE with gamma 0, to the bit. What is there already
is never made twice: the same command goes on where it stopped. `--longer` then trains the best backbone on all scenes. Each run has one
core. Writes results/detection.json. Every number is of embedded scenes, and none of COCO.
"""

import argparse
import contextlib
import io
import json
import multiprocessing as mp
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks.evaluation import PRETRAINED, ROOT, pretrained
from rcmae.config import Workplace, changed, recipe_hash
from rcmae.engine.console import clock
from rcmae.engine.distributed import pick_precision
from rcmae.engine.metrics import read_metrics
from rcmae.engine.run import describe_machine, write_json
from rcmae.interop.load import load, scratch
from rcmae.methods.recipes import load_recipe
from rcmae.tasks.detection.coco import CocoSet, few, open_coco
from rcmae.tasks.detection.settings import Detect, load_detect
from rcmae.tasks.detection.train import train

BACKBONES = {"untrained": None, "MAE": ("mae", "student"), "RC-MAE, student": ("rcmae", "student"), "RC-MAE, teacher": ("rcmae", "teacher")}
PRETRAINING = 600
"Steps on unlabelled scenes."
STEPS = 800
"Of a detector of the table. All of it takes less than two hours of two cores so, even of cores that multiply bf16 no faster than fp32."
COUNTS = (64, 1024)
"Labelled scenes."
NUMBERS = {"box AP": ("box", "AP"), "box AP50": ("box", "AP50"), "mask AP": ("mask", "AP"), "mask AP50": ("mask", "AP50")}
LONGER = 3.0
"Times the steps of a run of the table."
OVERFIT = 1000
"Steps in which four scenes are learned by heart."


def place(out: Path, name: str, count: int, seed: int) -> Path:
    return out / "detectors" / f"{name.replace(', ', '-').replace(' ', '-')}-{count}-{seed}"


@cache
def labelled() -> tuple[CocoSet, CocoSet]:
    """Scenes to train and to test on. Drawing all of them takes most of a minute, once in each process."""
    return open_coco("embedded:scenes")


def there(where: Path, settings: Detect) -> bool:
    """Is this run finished? Raises when what is there was made with other settings."""
    if not (where / "scores.json").exists():
        return False
    if json.loads((where / "scores.json").read_bytes())["recipe_hash"] != recipe_hash(settings):
        raise SystemExit(f"{where} was made with other settings; remove it")
    return True


def run(out: Path, name: str, count: int, seed: int, steps: int = STEPS) -> str:
    """One detector; returns how long it took. A finished one is not touched."""
    began, where = time.monotonic(), place(out, name, count, seed)
    settings = replace(load_detect("embedded"), seed=seed, steps=steps)
    if there(where, settings):
        return f"{where.name}: there"
    torch.set_num_threads(1)
    source, runs = BACKBONES[name], out / "pretrain"
    backbone = load(runs / f"{source[0]}-{seed}", source[1]) if source else scratch(str(runs / f"rcmae-{seed}"), seed=seed)
    images, test = labelled()
    machine = Workplace(out=where, device="cpu", workers=0, threads=1)
    with contextlib.redirect_stdout(io.StringIO()):
        train(backbone, few(images, count, seed), test, settings, machine, {"backbone_name": name})
    return f"{where.name}: {clock(time.monotonic() - began)}"


def scores(where: Path) -> dict[str, float]:
    """The four numbers of a finished run, in percent."""
    found = json.loads((where / "scores.json").read_bytes())
    return {name: 100 * found[part]["stats"][key] for name, (part, key) in NUMBERS.items()}


def seconds(where: Path) -> float:
    """What a run took, over all its resumes."""
    return [line for line in read_metrics(where) if line["kind"] == "train"][-1]["seconds"]


def overfit(out: Path) -> dict[str, Any]:
    """Four scenes learned by heart, from new weights: are boxes and masks as good as they can be?"""
    where = out / "overfit"
    torch.set_num_threads(1)
    four = few(labelled()[0], 4, seed=1)
    settings = replace(load_detect("embedded"), steps=OVERFIT, batch_size=4, jitter=(1.0, 1.0), drop_path=0.0, layer_decay=1.0)
    if not there(where, settings):
        backbone = scratch(str(out / "pretrain" / "rcmae-1"), seed=1)
        with contextlib.redirect_stdout(io.StringIO()):
            train(backbone, four, four, settings, Workplace(out=where, device="cpu", workers=0, threads=1), {"backbone_name": "untrained"})
    return {"scenes": 4, "steps": OVERFIT, "seconds": seconds(where), **scores(where)}


def longer(out: Path, name: str) -> dict[str, Any]:
    """One backbone trained for long, on all scenes."""
    count, steps = len(labelled()[0]), round(LONGER * STEPS)
    (out / "longer").mkdir(parents=True, exist_ok=True)
    if not (out / "longer" / "pretrain").exists():
        (out / "longer" / "pretrain").symlink_to((out / "pretrain").resolve())
    run(out / "longer", name, count, 1, steps)
    where = place(out / "longer", name, count, 1)
    return {"backbone": name, "scenes": count, "steps": steps, "seconds": seconds(where), **scores(where)}


def paired(own: list[float], other: list[float]) -> list[float]:
    """Mean difference over paired seeds and the 95 % interval of Student's t; test images are the same throughout, and not resampled."""
    gaps = np.subtract(own, other)
    half = float(stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps)))
    return [float(gaps.mean()), float(gaps.mean()) - half, float(gaps.mean()) + half]


def judge(out: Path, seeds: list[int]) -> list[dict[str, Any]]:
    """By number of scenes and backbone: every seed, and differences to the untrained backbone and to MAE."""
    rows = []
    for count in COUNTS:
        of = {name: [scores(place(out, name, count, seed)) for seed in seeds] for name in BACKBONES}
        for name in of:
            row: dict[str, Any] = {"backbone": name, "scenes": count}
            for number in NUMBERS:
                values = {who: [one[number] for one in of[who]] for who in {name, "untrained", "MAE"}}
                row[number] = {"seeds": values[name]}
                row[number] |= {f"against {who}": paired(values[name], values[who]) for who in ("untrained", "MAE") if who != name}
            rows.append(row)
    return rows


def main() -> None:
    """Make what is missing, and write what it tells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--longer", action="store_true", help="also train the best backbone for long")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "detection")
    args = parser.parse_args()
    seeds, began = list(range(1, args.seeds + 1)), time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(args.jobs, mp.get_context("spawn")) as pool:
        runs = [(args.out, name, seed, "scenes", PRETRAINING) for seed in seeds for name in PRETRAINED]
        for where in pool.map(pretrained, *zip(*runs, strict=True)):
            print(f"{where.name}: pre-trained, {clock(time.monotonic() - began)}", flush=True)
        units = [(args.out, name, count, seed) for seed in seeds for count in COUNTS for name in BACKBONES]
        for number, text in enumerate(pool.map(run, *zip(*units, strict=True)), 1):
            print(f"{number} of {len(units)}: {text}, {clock(time.monotonic() - began)}", flush=True)
        rows = judge(args.out, seeds)
        best = max((row for row in rows if row["scenes"] == max(COUNTS)), key=lambda row: np.mean(row["mask AP"]["seeds"]))["backbone"]
        last = {"overfit": pool.submit(overfit, args.out)}
        if args.longer:
            last["longer"] = pool.submit(longer, args.out, best)
        last = {name: made.result() for name, made in last.items()}
    settings, (_, test) = replace(load_detect("embedded"), steps=STEPS), labelled()
    parts = [args.out / "pretrain" / f"{name}-{seed}" for seed in seeds for name in PRETRAINED]
    parts += [place(args.out, name, count, seed) for _, name, count, seed in units]
    found: dict[str, Any] = {
        "rows": rows, "seeds": seeds, "preset": settings.preset, "steps": settings.steps, "batch_size": settings.batch_size,
        "pretraining_steps": PRETRAINING, "test_scenes": len(test), "core_minutes": sum(map(seconds, parts)) / 60,
        "recipe_hash": {"detection": recipe_hash(settings)}
        | {name: recipe_hash(changed(load_recipe("scenes"), steps=PRETRAINING, **own)) for name, own in PRETRAINED.items()},
    }  # fmt: skip
    found |= last
    found["machine"] = describe_machine(torch.device("cpu"), pick_precision("auto", torch.device("cpu")))
    write_json(ROOT / "results" / "detection.json", found)
    for row in rows:
        cells = "  ".join(f"{name} {np.mean(row[name]['seeds']):.1f}" for name in NUMBERS)
        print(f"embedded scenes, {row['scenes']:5} labelled  {row['backbone']:16} {cells}")
    for name in ("overfit", "longer"):
        if name in found:
            print(name, found[name])


if __name__ == "__main__":
    main()
