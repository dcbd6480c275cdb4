"""Does RC-MAE learn better, or faster, than MAE on the bundled digits? `python -m benchmarks.claim`.

docs/rcmae-answered.md has the plan, which was committed before the first confirming run. Every finished run
is a line of results/claim.jsonl and is never repeated; an unfinished one resumes from runs/claim.

1. Rates: every arm at every rate of `RATES` on `TUNING_SEEDS`, at 1,000 steps. An arm whose best rate is the
   lowest or the highest one so far is also trained at the next one of `FURTHER`, if there is one.
2. Confirmation: every arm at its best rate on `SEEDS`, at 2,000 steps.
3. Speed: MAE at its best rate and the other lengths of `LENGTHS`, each with its own schedule.
"""

import argparse
import base64
import contextlib
import fcntl
import io
import json
import multiprocessing as mp
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from safetensors.numpy import load_file

from benchmarks import ROOT
from benchmarks.runs import pretrain_quietly
from rcmae.config import Probe, changed
from rcmae.data.sources import open_source
from rcmae.engine.run import read_json
from rcmae.interop.load import load
from rcmae.methods.recipes import load_recipe
from rcmae.tasks.evaluate import evaluate
from rcmae.tasks.evaluation.base import EvaluationOptions
from rcmae.tasks.evaluation.finetune import FineTune
from rcmae.tasks.probe import probe_set

RESULTS = ROOT / "results" / "claim.jsonl"

MAE = "MAE"

ARMS: dict[str, dict[str, Any]] = {
    MAE: {"gamma": 0.0, "half_life": "10 steps"},
    **{f"RC-MAE {n}": {"half_life": f"{n} steps"} for n in (1, 3, 10, 30)},
}
"""Changes to the bundled recipe. The student of the first one is MAE, bit for bit, and its teacher is MAE
averaged for evaluation; of the others the teacher is evaluated."""

RATES = (3e-3, 6e-3, 12e-3, 24e-3)
FURTHER = (1.5e-3, *RATES, 48e-3)
TUNING_SEEDS, TUNING_STEPS = range(4), 1000

SEEDS, STEPS = range(11, 27), 2000
LENGTHS = (1000, 1414, 2000, 2828)

PROBE = Probe(probes=1, probe_train=2000, probe_test=16_000)
LABELS = 1.0
"Percent of the training labels in fine-tuning."


class Job(NamedTuple):
    """A run, and whether its networks are fine-tuned."""

    arm: str
    rate: float
    seed: int
    steps: int
    tuned: bool

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that are evaluated."""
        return ("student", "teacher") if self.arm == MAE else ("teacher",)

    @property
    def path(self) -> Path:
        """The directory of the run."""
        return ROOT / "runs" / "claim" / f"{self.arm.replace(' ', '-')}-{self.rate}-{self.seed}-{self.steps}"


def lines() -> list[dict[str, Any]]:
    """All finished runs."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def run(job: Job) -> None:
    """Train, evaluate, and append a line to the results."""
    torch.set_num_threads(1)
    recipe = changed(load_recipe("bundled"), seed=job.seed, steps=job.steps, base_lr=job.rate, probes=0)
    recipe = changed(recipe, **ARMS[job.arm])
    pretrain_quietly(recipe, job.path, workers=0)
    probes = probe_set(open_source(recipe.data, size=recipe.images.size), replace(recipe, probe=PROBE))
    assert probes is not None, "the bundled set has labels"
    machine = read_json(job.path / "machine.json")
    result = job._asdict() | {"cpu": machine["cpu"], "precision": machine["precision"]}
    for network in job.networks:
        backbone = load(job.path, network)  # type: ignore[arg-type]  # one of the two names
        correct = probes.backbone(backbone, torch.device("cpu"), machine["precision"])
        result[f"{network} linear"] = packed(correct["linear"])
        if job.tuned:
            result[f"{network} fine-tuned"] = packed(fine_tuned(job, network))
    append(result)
    shutil.rmtree(job.path)


def fine_tuned(job: Job, network: str) -> Bool[np.ndarray, " m"]:
    """Which test images are classified correctly after fine-tuning on `LABELS` of the labels."""
    options = EvaluationOptions(
        data="bundled:digits",
        labels=LABELS,
        seed=job.seed,
        which=network,  # type: ignore[arg-type]  # one of the two names
        device="cpu",
        workers=0,
        out=job.path / "finetune",
    )
    with contextlib.redirect_stdout(io.StringIO()):
        evaluate(str(job.path), FineTune(), options)
    (file,) = (job.path / "finetune").glob(f"finetune-{network}-*.safetensors")
    return load_file(file)["correct"].astype(bool)


def packed(correct: Bool[np.ndarray, " m"]) -> dict[str, Any]:
    """The accuracy in percent, and the bits of the images, which the analysis of shared images needs."""
    bits = base64.b64encode(np.packbits(correct).tobytes()).decode()
    return {"accuracy": 100 * float(correct.mean()), "images": len(correct), "correct": bits}


def append(result: dict[str, Any]) -> None:
    """Add a line, one process at a time."""
    with RESULTS.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result), flush=True)


def accuracy(line: dict[str, Any], endpoint: str = "linear") -> float:
    """The accuracy of the network that stands for the arm: MAE's student, otherwise the teacher."""
    return float(line[f"{'student' if line['arm'] == MAE else 'teacher'} {endpoint}"]["accuracy"])


def best_rate(arm: str) -> tuple[float, tuple[float, ...]]:
    """The rate with the highest mean accuracy of the linear probe among those with all seeds of the first
    phase, and all of these."""
    means = {}
    for rate in FURTHER:
        done = [line for line in lines() if (line["arm"], line["rate"], line["tuned"]) == (arm, rate, False)]
        if len(done) == len(TUNING_SEEDS):
            means[rate] = np.mean([accuracy(line) for line in done])
    return max(means, key=lambda rate: means[rate]), tuple(means)


def tuning() -> Iterator[Job]:
    """The runs of the first phase that the rules request so far."""
    done = {(line["arm"], line["rate"]) for line in lines() if not line["tuned"]}
    for seed in TUNING_SEEDS:
        for arm in ARMS:
            for rate in RATES:
                yield Job(arm, rate, seed, TUNING_STEPS, False)
    for arm in ARMS:
        if not done >= {(arm, rate) for rate in RATES}:
            continue
        best, tried = best_rate(arm)
        place = FURTHER.index(best)
        for further in FURTHER[max(0, place - 1) : place + 2]:
            if further not in tried:
                yield from (Job(arm, further, seed, TUNING_STEPS, False) for seed in TUNING_SEEDS)


def confirmation() -> Iterator[Job]:
    """The runs of the second and third phase, seed by seed."""
    rates = {arm: best_rate(arm)[0] for arm in ARMS}
    for seed in SEEDS:
        yield from (Job(arm, rate, seed, STEPS, True) for arm, rate in rates.items())
        yield from (Job(MAE, rates[MAE], seed, steps, True) for steps in LENGTHS if steps != STEPS)


def missing(jobs: Iterator[Job]) -> list[Job]:
    """Those without a line."""
    keys = ("arm", "rate", "seed", "steps", "tuned")
    done = {tuple(line[key] for key in keys) for line in lines()}
    return [job for job in jobs if tuple(job) not in done]


def make(jobs: list[Job], processes: int) -> None:
    """Make the runs, so many at once. The first error ends it."""
    with ProcessPoolExecutor(processes, mp.get_context("spawn")) as pool:
        for job in [pool.submit(run, job) for job in jobs]:
            job.result()


def main() -> int:
    """Make all missing runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    options = parser.parse_args()
    while jobs := missing(tuning()):
        make(jobs, options.jobs)
    make(missing(confirmation()), options.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
