"""Six backbones, four tasks, three shares of the labels; clean, corrupted and attacked images: `python -m benchmarks.evaluation`.

Within a seed all backbones have the same initial weights, images, labels and tasks. MAE is the student of RC-MAE with gamma 0, to the bit,
and its teacher is MAE whose weights are averaged for evaluation only. What is there already is never made twice: the same command goes on
where it stopped, run by run. Writes results/evaluation.json. Two cores: about two hours.
"""

import argparse
import contextlib
import io
import json
import multiprocessing as mp
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from rcmae.config import Machine, changed, recipe_hash
from rcmae.data.labelled import open_labelled
from rcmae.data.sources import Subset
from rcmae.engine.console import Screen, clock
from rcmae.engine.distributed import World, pick_precision
from rcmae.engine.run import describe_machine, write_json
from rcmae.interop.load import load, scratch
from rcmae.methods.recipes import load_recipe
from rcmae.models.backbone import Features, Pixels
from rcmae.pretraining import pretrain
from rcmae.tasks.context import EvaluationContext
from rcmae.tasks.evaluation import KNN, Attentive, Finetune, Linear
from rcmae.tasks.evaluation.base import Evaluation
from rcmae.tasks.interval import interval
from rcmae.tasks.robustness import sets
from rcmae.tasks.robustness.adversarial import fgsm, pgd

ROOT = Path(__file__).parent.parent
PRETRAINED = {"mae": {"gamma": 0.0}, "rcmae": {}}
BACKBONES = {
    "raw pixels": None, "untrained": None, "MAE": ("mae", "student"), "MAE, averaged": ("mae", "teacher"),
    "RC-MAE, student": ("rcmae", "student"), "RC-MAE, teacher": ("rcmae", "teacher"),
}  # fmt: skip
PERCENTS = (1, 10, 100)
STEPS = {1: 80, 10: 150, 100: 250}
"Steps of fine-tuning by percent of the labels."
EPS, PGD_STEPS = 0.5, 10
CORRUPTED, ATTACKED = 300, 200
"Images that are corrupted (75 times each) and attacked: others for each seed."
MEASURES = ("clean", "corrupted", "FGSM", "PGD")
TASKS = ("knn", "linear", "attentive", "finetune")


class Once(nn.Module):
    """A backbone that is asked for the same images by several probes and looks at them once."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone, self.shape, self.channels = backbone, backbone.shape, backbone.channels
        self.images: Tensor | None = None

    def forward(self, images: Tensor) -> Features:
        if images.requires_grad:
            return self.backbone(images)
        if images is not self.images:
            self.images, self.seen = images, self.backbone(images)
        return self.seen


def pretrained(out: Path, name: str, seed: int, recipe_name: str = "embedded", steps: int | None = None) -> Path:
    """The run of a method and a seed, on one thread; `steps` other than the recipe's."""
    place, recipe = out / "pretrain" / f"{name}-{seed}", load_recipe(recipe_name)
    recipe = changed(recipe, seed=seed, probes=0, steps=steps or recipe.steps, **PRETRAINED[name])
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain(recipe, Machine(out=place, device="cpu", threads=1, monitor=False))
    return place


def file_of(out: Path, name: str, seed: int) -> Path:
    """Where it stands which test images were right, by task, percent and measure."""
    return out / "units" / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.safetensors"


def unit(out: Path, seed: int, name: str) -> str:
    """All tasks on one backbone of one seed; returns how long it took."""
    file = file_of(out, name, seed)
    if file.exists():
        return f"{file.stem}: there"
    began = time.monotonic()
    torch.set_num_threads(1)
    run = out / "pretrain"
    source = BACKBONES[name]
    if source:
        backbone: Any = load(run / f"{source[0]}-{seed}", source[1])
    else:
        backbone = Pixels() if name == "raw pixels" else scratch(str(run / f"rcmae-{seed}"), seed=seed)
    data = open_labelled("embedded:digits")
    device, found = torch.device("cpu"), {}
    draws = np.random.Generator(np.random.Philox(key=seed)).permutation(len(data.test))
    some, few = Subset(data.test, draws[:CORRUPTED]), Subset(data.test, draws[:ATTACKED])
    loading = sets.Loading(tuple(backbone.shape), device)
    with contextlib.redirect_stdout(io.StringIO()), Screen(False) as screen:
        models = {}
        for percent in PERCENTS:
            place = out / "tuned" / f"{file.stem}"
            options = Evaluation(labels=percent, seed=seed, device="cpu", cache=out / "cache", out=place)
            context = EvaluationContext(name, "backbone", backbone, data, options, device, World(), screen, pick_precision("auto", device))
            tuning = Finetune(settings=(f"steps={STEPS[percent]}", "warmup_epochs=0.1"))
            tasks = [KNN(k=(20,)), Linear(), Attentive(fit_steps=250, batch=256, queries=4), tuning]
            for kind, task in zip(TASKS, tasks if name != "raw pixels" else tasks[:3], strict=False):
                result = task.run(context)
                found[f"{kind}/{percent}/clean"] = result.right
                models[f"{kind}/{percent}"] = result.model.to(device).eval().requires_grad_(False)
        once = Once(backbone.eval().requires_grad_(False))
        for model in models.values():
            if hasattr(model, "backbone"):
                model.backbone = once
        for key, of in sets.corrupted(models, some, some.labels, loading, seed).items():
            found[f"{key}/corrupted"] = np.stack(list(of.right.values())).reshape(-1)
        attacks = [fgsm(EPS), pgd(EPS, PGD_STEPS)]
        checked = sets.CHECKED if seed == 1 else 0
        failed = []
        for key, of in sets.adversarial(models, few, few.labels, attacks, loading, seed=seed, checked=checked).items():
            found |= {f"{key}/{measure}": of.right[attack.name] for measure, attack in zip(("FGSM", "PGD"), attacks, strict=True)}
            failed += [f"{key}: {what} ({c.saw})" for checks in of.checks.values() for what, c in checks.items() if not c.holds]
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    metadata = {"failed checks": json.dumps(failed), "seconds": f"{time.monotonic() - began:.0f}"}
    save_file({k: np.ascontiguousarray(v).astype(np.uint8) for k, v in found.items()}, temporary, metadata)
    temporary.replace(file)
    return f"{file.stem}: {clock(time.monotonic() - began)}"


def judge(out: Path, seeds: list[int]) -> dict[str, Any]:
    """Means over the seeds, and paired differences to MAE with intervals."""
    hits = {name: [load_file(file_of(out, name, seed)) for seed in seeds] for name in BACKBONES}
    rows = []
    for name, of in hits.items():
        for task in TASKS:
            for percent in PERCENTS:
                row: dict[str, Any] = {"backbone": name, "task": task, "percent": percent}
                for measure in MEASURES:
                    key = f"{task}/{percent}/{measure}"
                    if key not in of[0]:
                        continue
                    own = [h[key].astype(bool) for h in of]
                    row[measure] = {"seeds": [100 * float(h.mean()) for h in own]}
                    for other in {"MAE", "MAE, averaged"} - {name}:
                        if key in hits[other][0]:
                            row[measure][f"against {other}"] = interval(own, [h[key].astype(bool) for h in hits[other]])
                if len(row) > 3:
                    rows.append(row)
    failed = []
    for seed in seeds:
        for name in BACKBONES:
            with safe_open(file_of(out, name, seed), "np") as f:
                failed += [f"{name}, seed {seed}, {text}" for text in json.loads(f.metadata()["failed checks"])]
    return {
        "failed_checks": failed,
        "rows": rows,
        "seeds": seeds,
        "eps": EPS,
        "pgd_steps": PGD_STEPS,
        "corrupted": CORRUPTED,
        "attacked": ATTACKED,
        "steps": STEPS,
    }


def main() -> None:
    """Make what is missing, and write what it tells."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "evaluation")
    args = parser.parse_args()
    seeds, began = list(range(1, args.seeds + 1)), time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(args.jobs, mp.get_context("spawn")) as pool:
        runs = [(args.out, name, seed) for seed in seeds for name in PRETRAINED]
        for run in pool.map(pretrained, *zip(*runs, strict=True)):
            print(f"{run.name}: pre-trained, {clock(time.monotonic() - began)}", flush=True)
        units = [(args.out, seed, name) for seed in seeds for name in BACKBONES]
        for number, text in enumerate(pool.map(unit, *zip(*units, strict=True)), 1):
            print(f"{number} of {len(units)}: {text}, {clock(time.monotonic() - began)}", flush=True)
    found = judge(args.out, seeds)
    found["machine"] = describe_machine(torch.device("cpu"), pick_precision("auto", torch.device("cpu")))
    found["recipe_hash"] = {name: recipe_hash(changed(load_recipe("embedded"), **own)) for name, own in PRETRAINED.items()}
    write_json(ROOT / "results" / "evaluation.json", found)
    for row in found["rows"]:
        cells = "  ".join(f"{m} {np.mean(row[m]['seeds']):.1f}" for m in MEASURES if m in row)
        print(f"{row['backbone']:16} {row['task']:9} {row['percent']:3} %  {cells}")


if __name__ == "__main__":
    main()
