"""Six backbones, four tasks, three fractions of the labels; clean, corrupted and attacked images: `python -m
benchmarks.evaluation`.

Within a seed all backbones have the same initial weights, images, labels and tasks. MAE is the student of
RC-MAE with gamma 0, to the bit, and its teacher is MAE whose weights are averaged for evaluation only.
Finished parts are never repeated: the same command resumes where it stopped. Writes results/evaluation.json.
Takes about two hours on two cores.
"""

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing as mp
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from benchmarks import ROOT, markdown
from rcmae.config import RuntimeConfig, changed, recipe_hash
from rcmae.data.digits import TEST_IMAGES, glyphs_of
from rcmae.data.labeled import open_labeled
from rcmae.data.sources import Subset
from rcmae.engine.console import Screen, clock
from rcmae.engine.distributed import World, pick_precision
from rcmae.engine.limits import cores
from rcmae.engine.run import describe_machine, write_json
from rcmae.interop.load import load, scratch
from rcmae.methods.recipes import load_recipe
from rcmae.models.backbone import Features, Pixels
from rcmae.pretraining import pretrain
from rcmae.tasks.context import EvaluationContext
from rcmae.tasks.evaluation import KNN, Attentive, FineTune, Linear
from rcmae.tasks.evaluation.base import EvaluationOptions
from rcmae.tasks.interval import Difference, Verdict, correction_note, difference, judged
from rcmae.tasks.robustness import sets
from rcmae.tasks.robustness.adversarial import fgsm, pgd

PRETRAINED: dict[str, dict[str, Any]] = {"mae": {"gamma": 0.0}, "rcmae": {}}
BACKBONES: dict[str, tuple[str, Literal["student", "teacher"]] | None] = {
    "raw pixels": None,
    "random init": None,
    "MAE": ("mae", "student"),
    "MAE, averaged": ("mae", "teacher"),
    "RC-MAE, student": ("rcmae", "student"),
    "RC-MAE, teacher": ("rcmae", "teacher"),
}
PERCENTS = (1, 10, 100)
STEPS = {1: 80, 10: 150, 100: 250}
"Fine-tuning steps by percent of the labels."
EPS, PGD_STEPS = 0.5, 10
CORRUPTED, ATTACKED = 300, 200
"Images that are corrupted (75 times each) and attacked, drawn by seed."
MEASURES = ("clean", "corrupted", "FGSM", "PGD")
WORDS = ("better", "worse", "equivalent", "inconclusive")
TASKS = {"knn": "k-NN", "linear": "linear probe", "attentive": "attentive probe", "finetune": "fine-tuning"}


class Cached(nn.Module):
    """A backbone that remembers the features of its last images, for several probes of the same ones."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone, self.shape, self.channels = backbone, backbone.shape, backbone.channels
        self.images: Tensor | None = None

    def forward(self, images: Tensor) -> Features:
        if images.requires_grad:
            return self.backbone(images)
        if images is not self.images:
            self.images, self.features = images, self.backbone(images)
        return self.features


def pretrained(
    out: Path, name: str, seed: int, recipe_name: str = "bundled", steps: int | None = None
) -> Path:
    """Pre-train a method with a seed on one thread, for `steps` or those of the recipe; returns the run."""
    run, recipe = out / "pretrain" / f"{name}-{seed}", load_recipe(recipe_name)
    recipe = changed(recipe, seed=seed, probes=0, steps=steps or recipe.steps, **PRETRAINED[name])
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain(recipe, RuntimeConfig(out=run, device="cpu", threads=1, monitor=False))
    return run


def correct_file(out: Path, name: str, seed: int) -> Path:
    """The file of which test images were classified correctly, by task, percent and measure."""
    return out / "units" / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.safetensors"


def evaluate(out: Path, seed: int, name: str) -> str:
    """Run all tasks on one backbone of one seed; returns its name and the time it took."""
    file = correct_file(out, name, seed)
    if file.exists():
        return f"{file.stem}: finished before"
    began = time.monotonic()
    torch.set_num_threads(1)
    device, runs, source = torch.device("cpu"), out / "pretrain", BACKBONES[name]
    if source:
        backbone: Any = load(runs / f"{source[0]}-{seed}", source[1])
    else:
        backbone = Pixels() if name == "raw pixels" else scratch(str(runs / f"rcmae-{seed}"), seed=seed)
    data = open_labeled("bundled:digits")
    assert len(data.test) == TEST_IMAGES
    draws = shuffled(seed)
    corrupted, attacked = Subset(data.test, draws[:CORRUPTED]), Subset(data.test, draws[:ATTACKED])
    assert corrupted.labels is not None and attacked.labels is not None
    loading = sets.Loading(tuple(backbone.shape), device)
    correct: dict[str, np.ndarray] = {}
    with contextlib.redirect_stdout(io.StringIO()), Screen(False) as screen:
        models: dict[str, Callable[[Tensor], Tensor]] = {}
        cached = Cached(backbone.eval().requires_grad_(False))
        for percent in PERCENTS:
            options = EvaluationOptions(
                labels=percent,
                seed=seed,
                device="cpu",
                feature_cache=out / "cache",
                out=out / "tuned" / file.stem,
            )
            precision = pick_precision("auto", device)
            context = EvaluationContext(
                name, "backbone", backbone, data, options, device, World(), screen, precision
            )
            tuning = FineTune(settings=(f"steps={STEPS[percent]}", "warmup_epochs=0.1"))
            tasks = [KNN(k=(20,)), Linear(), Attentive(fit_steps=250, batch=256, queries=4), tuning]
            for kind, task in zip(TASKS, tasks if name != "raw pixels" else tasks[:3], strict=False):
                result = task.run(context)
                correct[f"{kind}/{percent}/clean"] = result.correct
                models[f"{kind}/{percent}"] = result.model.to(device).eval().requires_grad_(False)
        for model in models.values():
            if hasattr(model, "backbone"):
                model.backbone = cached
        for key, by_kind in sets.corrupted(models, corrupted, corrupted.labels, loading, seed).items():
            correct[f"{key}/corrupted"] = np.stack(list(by_kind.correct.values())).reshape(-1)
        attacks = [fgsm(EPS), pgd(EPS, PGD_STEPS)]
        checked, failed = sets.CHECKED if seed == 1 else 0, []
        for key, by_attack in sets.adversarial(
            models, attacked, attacked.labels, attacks, loading, seed=seed, checked=checked
        ).items():
            for measure, attack in zip(("FGSM", "PGD"), attacks, strict=True):
                correct[f"{key}/{measure}"] = by_attack.correct[attack.name]
            failed += [
                f"{key}: {text} ({check.numbers})"
                for checks in by_attack.checks.values()
                for text, check in checks.items()
                if not check.holds
            ]
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    metadata = {"failed checks": json.dumps(failed), "seconds": f"{time.monotonic() - began:.0f}"}
    save_file({k: np.ascontiguousarray(v).astype(np.uint8) for k, v in correct.items()}, temporary, metadata)
    temporary.replace(file)
    return f"{file.stem}: {clock(time.monotonic() - began)}"


@cache
def shuffled(seed: int) -> Int[np.ndarray, " m"]:
    """The test images in an order of a seed, which begins with those that are corrupted and attacked."""
    return np.random.Generator(np.random.Philox(key=seed)).permutation(TEST_IMAGES)


def test_images(seed: int, measure: str) -> Int[np.ndarray, " m"]:
    """The handwritten digit in the test image of each result of a measure: for corruptions, all images once
    for each of 75."""
    digits = glyphs_of(0, "test", TEST_IMAGES)
    if measure == "clean":
        return digits
    some = shuffled(seed)[: CORRUPTED if measure == "corrupted" else ATTACKED]
    return digits[np.tile(some, 75) if measure == "corrupted" else some]


def judge(out: Path, seeds: list[int]) -> dict[str, Any]:
    """Accuracies by seed, and paired differences to MAE with intervals."""
    by_backbone = {name: [load_file(correct_file(out, name, seed)) for seed in seeds] for name in BACKBONES}
    rows = []
    for name, by_seed in by_backbone.items():
        for task, percent in itertools.product(TASKS, PERCENTS):
            row: dict[str, Any] = {"backbone": name, "task": task, "percent": percent}
            for measure in MEASURES:
                key = f"{task}/{percent}/{measure}"
                if key not in by_seed[0]:
                    continue
                correct = [arrays[key].astype(bool) for arrays in by_seed]
                row[measure] = {"seeds": [100 * float(array.mean()) for array in correct]}
                for other in {"MAE", "MAE, averaged"} - {name}:
                    if key in by_backbone[other][0]:
                        others = [arrays[key].astype(bool) for arrays in by_backbone[other]]
                        images = [test_images(seed, measure) for seed in seeds]
                        row[measure][f"against {other}"] = difference(correct, others, images)
            if len(row) > 3:
                rows.append(row)
    failed = []
    for seed in seeds:
        for name in BACKBONES:
            with safe_open(correct_file(out, name, seed), "np") as f:
                texts = json.loads(f.metadata()["failed checks"])
            failed += [f"{name}, seed {seed}, {text}" for text in texts]
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


def table(results: dict[str, Any]) -> str:
    """Accuracy by task, labels and backbone, on clean, corrupted and attacked images."""
    eps, machine = results["eps"], results["machine"]
    attacks = [f"FGSM {eps:g}/255", f"PGD-{results['pgd_steps']} {eps:g}/255"]
    rows = [
        [
            TASKS[task],
            f"{percent} %",
            row["backbone"],
            *(f"{markdown.mean(row[measure]['seeds']):.1f}" for measure in MEASURES),
            markdown.signed(row["corrupted"].get("against MAE")),
        ]
        for task, percent in itertools.product(TASKS, PERCENTS)
        for row in results["rows"]
        if (row["task"], row["percent"]) == (task, percent)
    ]
    failed = len(results["failed_checks"])
    gains = [Difference(*row["clean"]["against MAE"]) for row in results["rows"] if row["backbone"] != "MAE"]
    given = "" if any(gain.images for gain in gains) else ", over seeds, with the test images as given"
    return markdown.table(
        ["task", "labels", "backbone", "clean", "corrupted", *attacks, "corrupted, against MAE"],
        rows,
        f"Accuracy in percent, means of {len(results['seeds'])} paired seeds; corrupted: mean of 15 "
        f"corruptions at 5 severities (not ImageNet-C) of {results['corrupted']} images per seed; attacks: "
        f"{results['attacked']} images per seed. 95 % intervals in brackets{given}. "
        + f"{failed} sanity checks of attacks failed (listed in results/evaluation.json). " * (failed > 0)
        + f"{machine['cpu']}, {machine['precision']}, torch {machine['torch']}.",
        left=(0, 2),
    )


FAMILIES = {"all labels": (100,), "1 and 10 % of the labels": (1, 10)}
"The families of comparisons, by the percentages of the labels that are in them."


def compared(
    results: dict[str, Any], other: str, labels: str
) -> dict[tuple[str, int, str], tuple[Difference, Verdict]]:
    """The differences of RC-MAE's teacher to another network, and their verdicts, in a family of `FAMILIES`,
    by task, percentage and images."""
    family = {
        (row["task"], row["percent"], measure): Difference(*row[measure][f"against {other}"])
        for row in results["rows"]
        if row["backbone"] == "RC-MAE, teacher" and row["percent"] in FAMILIES[labels]
        for measure in MEASURES
    }
    return dict(zip(family, zip(family.values(), judged(family.values()), strict=True), strict=True))


def verdict(results: dict[str, Any]) -> str:
    """Whether RC-MAE is better and more robust than MAE on the bundled set."""
    lines = []
    for other in ("MAE", "MAE, averaged"):
        for labels, percents in FAMILIES.items():
            family = compared(results, other, labels)
            words = [verdict.word for _, verdict in family.values()]
            counts = ", ".join(f"{word} in {words.count(word)}" for word in WORDS)
            lines.append(
                f"- RC-MAE's teacher against {other}, {labels}, {len(family)} comparisons (task, images), "
                f"corrected for their number: {counts}."
            )
            for (task, percent, measure), (gain, verdict) in family.items():
                fraction = "" if percents == (100,) else f" at {percent} %"
                if gain.low > 0 or gain.high < 0:
                    lines.append(f"    - {TASKS[task]}{fraction}, {measure}: {verdict}.")
    lines.append("\nListed are those whose own 95 % interval excludes zero. " + correction_note(len(family)))
    return "\n".join(lines)


def main() -> None:
    """Make the missing runs, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=cores())
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "evaluation")
    args = parser.parse_args()
    seeds, began = list(range(1, args.seeds + 1)), time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(args.jobs, mp.get_context("spawn")) as pool:
        runs = [(args.out, name, seed) for seed in seeds for name in PRETRAINED]
        for run in pool.map(pretrained, *zip(*runs, strict=True)):
            print(f"{run.name}: pre-trained, {clock(time.monotonic() - began)}", flush=True)
        units = [(args.out, seed, name) for seed in seeds for name in BACKBONES]
        for number, text in enumerate(pool.map(evaluate, *zip(*units, strict=True)), 1):
            print(f"{number} of {len(units)}: {text}, {clock(time.monotonic() - began)}", flush=True)
    results = judge(args.out, seeds)
    results["machine"] = describe_machine(torch.device("cpu"), pick_precision("auto", torch.device("cpu")))
    results["recipe_hash"] = {
        name: recipe_hash(changed(load_recipe("bundled"), **settings))
        for name, settings in PRETRAINED.items()
    }
    write_json(ROOT / "results" / "evaluation.json", results)
    for row in results["rows"]:
        cells = "  ".join(f"{m} {np.mean(row[m]['seeds']):.1f}" for m in MEASURES if m in row)
        print(f"{row['backbone']:16} {row['task']:9} {row['percent']:3} %  {cells}")


if __name__ == "__main__":
    main()
