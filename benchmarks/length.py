"""How long should a run on a small set of real pictures be? `python -m benchmarks.length --pictures FOLDER`.

FOLDER is the set of `benchmarks.clipart`. Of its pictures 2,000 fit and 1,000
test the linear probe; runs of the recipe `small` are trained on 500 or 2,000 others, which are the same for
every length. Finished runs under --out are not repeated. Endpoint: accuracy of the linear probe on the
teacher, beside that of the randomly initialized encoder on the same test images, with a paired interval (over
images; one seed). Writes results/length.json from all finished runs.
"""

import argparse
import json
import multiprocessing as mp
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import ROOT, markdown
from benchmarks.runs import pretrain_quietly
from rcmae.config import changed
from rcmae.data.base import Subset
from rcmae.data.sources import open_source
from rcmae.engine.console import no_progress
from rcmae.engine.run import describe_machine, write_json
from rcmae.interop.load import load
from rcmae.methods.recipes import load_recipe
from rcmae.tasks.interval import paired
from rcmae.tasks.probe import ProbeSet, read_images

IMAGES = (500, 2000)
SAMPLES = (50_000, 100_000, 200_000, 400_000)
FITTED, TESTED = 2000, 1000
CPU = torch.device("cpu")
FP32 = "fp32"


def divided(pictures: Path) -> tuple[Any, list[np.ndarray]]:
    """The set, and the indices for fitting and testing the probe and for training."""
    source = open_source(str(pictures))
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(source))
    return source, np.split(order, [FITTED, FITTED + TESTED])


def probes(pictures: Path) -> ProbeSet:
    """The held-out images, at the size of the recipe."""
    source, (fit, test, _) = divided(pictures)
    recipe = load_recipe("small")
    (x, y, _), (z, truth, _) = (
        read_images(Subset(source, part), np.arange(len(part)), recipe, no_progress) for part in (fit, test)
    )
    return ProbeSet(x, y, z, truth)


def run(out: Path, pictures: Path, images: int, samples: int) -> None:
    """Make one run on one thread and score it, unless that is done."""
    path = out / f"{images}-{samples}"
    if (path / "scores.json").exists():
        return
    recipe = changed(load_recipe("small"), data=str(out / f"{images}.txt"), probes=0)
    recipe = changed(recipe, steps=samples // recipe.optim.batch_size)
    pretrain_quietly(recipe, path, workers=0, cache="ram")
    correct = probes(pictures).backbone(load(str(path)), CPU, FP32)["linear"]
    write_json(path / "scores.json", {"linear": correct.astype(int).tolist()})
    print(f"{path.name}: {100 * correct.mean():.1f} %", flush=True)


def row(name: str, images: int | None, samples: int | None, correct: np.ndarray, start: np.ndarray) -> Any:
    """Accuracy, and the gain over the randomly initialized encoder with its 95 % interval, in points."""
    return {
        "name": name,
        "images": images,
        "samples": samples,
        "accuracy": 100 * float(correct.mean()),
        "gain": paired(correct.astype(bool), start.astype(bool)),
    }


def table(results: dict[str, Any]) -> str:
    """Accuracy and gain by number of images and length."""
    rows = [
        [
            line["name"],
            f"{line['samples']:,}" if line["samples"] else "",
            f"{line['samples'] / line['images']:,.0f}" if line["samples"] else "",
            f"{line['accuracy']:.1f}",
            markdown.signed(line["gain"]),
        ]
        for line in results["rows"]
    ]
    columns = ["trained on", "images seen", "epochs", "linear probe, %", "against random initialization"]
    note = f"Recipe `small`, seed 0; the probe is fitted on {FITTED:,} other pictures and tested on "
    note += f"{TESTED:,}; intervals over the test images. {results['machine']['cpu']}."
    return markdown.table(columns, rows, note)


def main() -> None:
    """Make the missing runs, print and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/length"))
    parser.add_argument("--longest", type=int, default=SAMPLES[-1], help="no runs of more samples")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    source, (_, _, rest) = divided(options.pictures)
    for images in IMAGES:
        files = (str(options.pictures.parent / source.where(int(i))) for i in rest[:images])
        (options.out / f"{images}.txt").write_text("\n".join(files) + "\n", encoding="utf-8")
    lengths = [samples for samples in SAMPLES if samples <= options.longest]
    jobs = [(options.out, options.pictures, images, samples) for samples in lengths for images in IMAGES]
    with ProcessPoolExecutor(options.jobs, mp.get_context("spawn")) as pool:
        for job in [pool.submit(run, *job) for job in jobs]:
            job.result()
    held_out = probes(options.pictures)
    paths = {(images, samples): out / f"{images}-{samples}" for out, _, images, samples in jobs}
    network = load(f"scratch:{next(iter(paths.values()))}")
    start, pixels = (
        scores["linear"] for scores in (held_out.backbone(network, CPU, FP32), held_out.pixels())
    )
    rows = [
        row("random initialization", None, None, start, start),
        row("raw pixels", None, None, pixels, start),
    ]
    for (images, samples), path in paths.items():
        correct = np.array(json.loads((path / "scores.json").read_text())["linear"])
        rows.append(row(f"{images:,} pictures", images, samples, correct, start))
    results = {"rows": rows, "machine": describe_machine(CPU, FP32)}
    print(table(results))
    write_json(ROOT / "results" / "length.json", results)


if __name__ == "__main__":
    main()
