"""Does pre-training pay on real pictures, and the teacher? `python -m benchmarks.pictures --data FOLDER`.

docs/rcmae-answered.md has the plan. FOLDER has a folder of pictures for each class, such as that of
`benchmarks.clipart`; a fifth of each class is held out. MAE and RC-MAE, by the recipe `small`, are
pre-trained on the others; then the networks, and a randomly initialized one, are fine-tuned on a part of the
labels. Every finished evaluation is a line of results/pictures.jsonl and is never repeated; what is
unfinished resumes from runs/pictures, which has the pre-trained networks and, shrunk, the pictures.

At the end, and with --analyze before, the analysis of all complete seeds is written to results/pictures.json.
"""

import argparse
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import ROOT, markdown
from benchmarks.runs import (
    NOT_PLANNED,
    RANDOM,
    Results,
    family,
    fine_tuned,
    gain_cell,
    linear,
    machine,
    make,
    packed,
    pretrain_quietly,
    unpacked,
)
from rcmae.config import Recipe, changed
from rcmae.data.pack import pack
from rcmae.data.sources import open_source
from rcmae.engine.console import Screen, no_progress
from rcmae.engine.run import write_json
from rcmae.methods.recipes import load_recipe, with_method
from rcmae.tasks.interval import Correct, correction_note, difference, over_seeds, percents
from rcmae.tasks.probe import ProbeSet, read_images

RESULTS = Results(ROOT / "results" / "pictures.jsonl")

ARMS = {
    "random initialization": ("mae", RANDOM),
    "MAE": ("mae", "student"),
    "RC-MAE, student": ("rcmae", "student"),
    "RC-MAE, teacher": ("rcmae", "teacher"),
}
"The method of the run, and the network that is evaluated."

START, MAE, *RCMAE = ARMS

SEEDS, STEPS = range(1, 6), 2300
LABELS = (10.0, 100.0)
"Percentages of the labels for fine-tuning."
SIDE = 128
"Pixels to which the shorter side of a picture is shrunk, once."

LINEAR = "linear probe"
TASKS = {f"fine-tuning on {labels:g} % of the labels": labels for labels in LABELS} | {LINEAR: 100.0}


class Job(NamedTuple):
    """An evaluation."""

    pictures: str
    "identifies them"
    task: str
    arm: str
    seed: int
    steps: int
    "of pre-training"

    @property
    def method(self) -> str:
        """The method of the run."""
        return ARMS[self.arm][0]

    @property
    def run(self) -> Path:
        """The directory of the pre-training run."""
        return folder_of(self.pictures) / f"{self.method}-{self.seed}-{self.steps}"


def folder_of(pictures: str) -> Path:
    """Where the runs are, and the shrunk pictures in data/."""
    return ROOT / "runs" / "pictures" / pictures


def divide(data: str) -> str:
    """Hold out a random fifth of each class, the same one for all seeds, and shrink all pictures into the
    parts train/ and val/. Returns what identifies the pictures."""
    source = open_source(data)
    if source.labels is None:
        sys.exit(f"{data} has no classes; give a folder that has a folder of pictures for each class")
    pictures = source.fingerprint()[:8]
    folder = folder_of(pictures) / "data"
    rng, held_out = np.random.Generator(np.random.Philox(key=0)), np.zeros(len(source), dtype=bool)
    for label in range(len(source.classes)):
        of_class = rng.permutation(np.flatnonzero(source.labels == label))
        held_out[of_class[: len(of_class) // 5]] = True
    folder.mkdir(parents=True, exist_ok=True)
    parent = Path(data).resolve().parent
    for name, part in (("train", ~held_out), ("val", held_out)):
        chosen = np.flatnonzero(part & (source.labels >= 0))
        lines = (f"{parent / source.where(int(i))}\t{source.classes[source.labels[i]]}\n" for i in chosen)
        (folder / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
        pack(str(folder / f"{name}.txt"), folder / name, SIDE, screen=Screen(True))
    return pictures


def recipe(job: Job) -> Recipe:
    """The recipe of the pre-training run."""
    result, data = with_method(load_recipe("small"), job.method), folder_of(job.pictures) / "data" / "train"
    return changed(result, data=str(data), seed=job.seed, steps=job.steps, probes=0)


def pretrain(job: Job) -> None:
    """Make or resume the run that an evaluation needs; one that has finished is left as it is."""
    torch.set_num_threads(1)
    pretrain_quietly(recipe(job), job.run, workers=0)


@functools.cache
def probes(pictures: str) -> ProbeSet:
    """All pictures, as the linear probe reads them."""
    parts: list[Any] = []
    for name in ("train", "val"):
        source = open_source(str(folder_of(pictures) / "data" / name))
        parts += read_images(source, np.arange(len(source)), load_recipe("small"), no_progress)[:2]
    return ProbeSet(*parts)


def evaluate(job: Job) -> None:
    """Fit and test, and append a line to the results."""
    torch.set_num_threads(1)
    network = ARMS[job.arm][1]
    if job.task == LINEAR:
        result = linear(job.run, probes(job.pictures), [network], job.seed)[f"{network} linear"]
    else:
        data = str(folder_of(job.pictures) / "data")
        result = packed(fine_tuned(job.run, network, data, TASKS[job.task], job.seed))
    RESULTS.append(job._asdict() | machine(job.run) | result)


def jobs(pictures: str, steps: int, seed: int) -> Iterator[Job]:
    """All evaluations of a seed."""
    for task in TASKS:
        yield from (Job(pictures, task, arm, seed, steps) for arm in ARMS)


# --- analysis -----------------------------------------------------------------------------------------------

Runs = dict[tuple[str, str], dict[str, Any]]
"The lines of a seed by task and arm."


def complete(pictures: str, steps: int) -> dict[int, Runs]:
    """The evaluations of the seeds that have all of them, on one kind of processor and in one precision."""
    seeds: dict[int, Runs] = {}
    for line in RESULTS.lines():
        if (line["pictures"], line["steps"]) == (pictures, steps):
            seeds.setdefault(line["seed"], {})[line["task"], line["arm"]] = line
    return {
        seed: runs
        for seed, runs in sorted(seeds.items())
        if len(runs) == len(TASKS) * len(ARMS)
        and len({(run["cpu"], run["precision"]) for run in runs.values()}) == 1
    }


def analysis(pictures: str, steps: int) -> dict[str, Any]:
    """All numbers of the page. Without two complete seeds there are none."""
    seeds = complete(pictures, steps)
    about: dict[str, Any] = {"seeds": [*seeds], "steps": steps}
    if len(seeds) < 2:
        return about
    lines = [line for runs in seeds.values() for line in runs.values()]
    about["machines"] = sorted({f"{line['cpu']}, {line['precision']}" for line in lines})
    about["images"] = lines[0]["images"]

    def correct(task: str, arm: str) -> Correct:
        return [unpacked(runs[task, arm]) for runs in seeds.values()]

    def gains(tasks: list[str], arms: list[str], other: str) -> dict[str, Any]:
        return family(
            {
                f"{task}: {arm}": difference(correct(task, arm), correct(task, other))
                for task in tasks
                for arm in arms
            }
        )

    tuned = [task for task in TASKS if task != LINEAR]
    about["accuracy"] = {
        task: {arm: over_seeds(percents(correct(task, arm))) for arm in ARMS} for task in TASKS
    }
    about["assay"] = gains([LINEAR], [MAE], START)
    about["against"] = {
        START: gains(tuned, [MAE, *RCMAE], START) | gains([LINEAR], RCMAE, START),
        MAE: gains(tuned, RCMAE, MAE) | gains([LINEAR], RCMAE, MAE),
    }
    return about


def table(results: dict[str, Any]) -> str:
    """The results section of the page."""
    count = f"{len(results['seeds'])} of {len(SEEDS)} seeds are complete"
    if len(results["seeds"]) < 2:
        return f"{count}, too few for any result."
    planned = len(results["seeds"]) == len(SEEDS)
    (assay,) = results["assay"].values()
    parts = [
        f"{count}, {results['steps']:,} steps of pre-training; {'; '.join(results['machines'])}. Accuracy in "
        f"percent on {results['images']:,} held-out pictures: means with 95 % intervals over seeds; "
        "differences in points. MAE against random initialization in the linear probe: "
        f"{gain_cell(assay, planned)}."
    ]
    if not planned:
        parts.append(NOT_PLANNED)
    elif not assay["verdict"].startswith("better"):
        parts.append("So this set cannot rank backbones, and nothing below is a verdict on them.")
    for task in TASKS:
        rows = [
            [
                arm,
                "{:.1f} [{:.1f}, {:.1f}]".format(*results["accuracy"][task][arm]),
                *(
                    gain_cell(results["against"][other].get(f"{task}: {arm}"), planned)
                    for other in (START, MAE)
                ),
            ]
            for arm in ARMS
        ]
        head = [task, "accuracy", f"against {START}", f"against {MAE}"]
        parts.append(markdown.table(head, rows, left=(0, 2, 3)))
    parts.append(
        "The comparisons with each of the two are a family for fine-tuning and one for the linear probe. "
        f"{correction_note(None)}"
    )
    return "\n\n".join(parts)


def main() -> int:
    """Make all that is missing, and analyze."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="a folder that has a folder of pictures for each class")
    parser.add_argument("--steps", type=int, default=STEPS, help="of pre-training")
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--analyze", action="store_true", help="make no runs")
    options = parser.parse_args()
    pictures = divide(options.data)
    for seed in () if options.analyze else SEEDS[: options.seeds]:
        missing = RESULTS.missing(jobs(pictures, options.steps, seed))
        runs = {job.run: job for job in missing}
        make(pretrain, [*runs.values()], options.jobs)
        make(evaluate, missing, options.jobs)
    results = analysis(pictures, options.steps)
    write_json(ROOT / "results" / "pictures.json", results)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
