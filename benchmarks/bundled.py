"""Record a finished run of `rcmae pretrain` on the bundled set: `python -m benchmarks.bundled RUN`.

Writes results/bundled.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import ROOT, markdown
from rcmae.data.digits import GENERATOR, set_hash
from rcmae.data.sources import open_source
from rcmae.engine.metrics import read_metrics
from rcmae.interop.load import load
from rcmae.methods.recipes import parse_recipe
from rcmae.tasks.features import features
from rcmae.tasks.probe import accuracies, final_scores, probe_set, score_table

LEADING = 8
"Principal components that are removed to see what they contribute to k-NN."


def table(results: dict[str, Any]) -> str:
    """Accuracy of the last probe beside the baselines."""
    machine = results["machine"]
    names, rows = score_table(results["scores"])
    return markdown.table(
        ["accuracy (%)", *names],
        rows,
        f"Seed {results['seed']}, {results['steps']:,} steps, {results['minutes']:.1f} minutes on "
        f"{machine['threads']} cores ({machine['cpu']}, {machine['precision']}).\n\n"
        "The probes of a run are fitted on 2,000 images, those of `rcmae evaluate` on all. The linear probe "
        "is the main metric. Distances, and so k-NN, depend most on the directions of largest variance: "
        f"{results['leading_variance']:.0%} of the variance of the teacher's features lies in {LEADING} of "
        f"{results['width']} directions, and the mean color of an image can be read from the features "
        f"(R² {results['color_r2']:.3f}). Without these directions k-NN reaches "
        f"{results['knn_without']:.1f} %. We do not know why this is still below raw pixels.",
    )


def leading_directions(run: Path) -> dict[str, float]:
    """What the leading principal components of the teacher's features hold, and k-NN without them."""
    recipe = parse_recipe((run / "recipe.toml").read_text(), "recipe")
    images = probe_set(open_source(recipe.data), recipe)
    assert images is not None  # the bundled set has labels
    backbone, cpu = load(str(run)), torch.device("cpu")
    train, test = (features(backbone, x, cpu, "fp32")[0] for x in (images.train, images.test))  # [n, d]
    mean = train.mean(0)
    _, scale, directions = np.linalg.svd(train - mean, full_matrices=False)
    rest = directions[LEADING:].T  # [d, d - LEADING]
    correct = images.probe_features((train - mean) @ rest, (test - mean) @ rest)
    color, truth = (x.float().mean((2, 3)).numpy() for x in (images.train, images.test))  # [n, channels]
    fitted = np.linalg.lstsq(np.c_[train, np.ones(len(train))], color, rcond=None)[0]
    error = np.c_[test, np.ones(len(test))] @ fitted - truth
    return {
        "width": train.shape[1],
        "leading_variance": float((scale[:LEADING] ** 2).sum() / (scale**2).sum()),
        "color_r2": float(1 - (error**2).sum() / ((truth - truth.mean(0)) ** 2).sum()),
        "knn_without": accuracies(correct)["knn"],
    }


def main(run: Path) -> None:
    """Read the run directory, write the numbers with their conditions."""
    lines = read_metrics(run)
    last = [line for line in lines if line["kind"] == "train"][-1]
    machine = json.loads((run / "machine.json").read_text())
    assert last["step"] == machine["steps"], "the run is not finished"
    results = {
        "scores": final_scores(lines),
        "seed": parse_recipe((run / "recipe.toml").read_text(), "recipe").seed,
        "steps": machine["steps"],
        "minutes": last["seconds"] / 60,
        "recipe_hash": machine["recipe_hash"],
        "generator": GENERATOR,
        "set_hash": set_hash(),
        "machine": machine,
    } | leading_directions(run)
    (ROOT / "results" / "bundled.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results["scores"], indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
