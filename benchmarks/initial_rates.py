"""Which learning rate and warm-up suit `--init`? `python -m benchmarks.initial_rates RUN`.

RUN is a run of the recipe `small` on pictures, such as those of `benchmarks.pictures`. From its weights, with
the decoder, pre-training continues on other images, the bundled digits at 64 px, for `STEPS` steps at shares
of the recipe's rate and with two warm-ups; and from random weights at the recipe's own. Every finished run is
a line of results/initial_rates.jsonl and is never repeated.
"""

import argparse
import itertools
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import ROOT, markdown
from benchmarks.runs import Results, digits_of, machine, make, pretrain_quietly, probed, unpacked
from rcmae.config import Probe, Recipe, changed
from rcmae.interop.initial import with_network_of
from rcmae.methods.recipes import load_recipe
from rcmae.tasks.interval import difference, percents

RESULTS = Results(ROOT / "results" / "initial_rates.jsonl")

SHARES, WARMUPS, SEEDS, STEPS = (0.1, 0.3, 1.0), (0.05, 0.3), range(1, 4), 500
PROBE = Probe(probes=1, probe_train=2000, probe_test=8000)


class Job(NamedTuple):
    """A run; without a source, from random weights."""

    source: str
    share: float
    warmup: float
    seed: int

    @property
    def path(self) -> Path:
        """The directory of the run."""
        name = "-".join(map(str, ("from" if self.source else "new", *self[1:])))
        return ROOT / "runs" / "initial_rates" / name

    @property
    def recipe(self) -> Recipe:
        """The recipe `small` on other images."""
        recipe = changed(load_recipe("small"), data="bundled:digits", crop_scale=(0.7, 1.0), flip=False)
        rate = self.share * recipe.optim.base_lr
        recipe = changed(recipe, seed=self.seed, steps=STEPS, base_lr=rate, warmup=self.warmup, probes=0)
        if not self.source:
            return recipe
        network = with_network_of(self.source, recipe.network)
        return changed(recipe, **{name: getattr(network, name) for name in vars(network)})


def jobs(source: str) -> list[Job]:
    """Seed by seed."""
    arms = [(source, *arm) for arm in itertools.product(SHARES, WARMUPS)]
    arms.append(("", 1.0, load_recipe("small").optim.warmup))
    return [Job(*arm, seed) for seed in SEEDS for arm in arms]


def run(job: Job) -> None:
    """Train, probe, and append a line to the results."""
    torch.set_num_threads(1)
    pretrain_quietly(job.recipe, job.path, workers=0)
    result: dict[str, Any] = probed(job.path, job.recipe, PROBE, ["teacher"])["teacher linear"]
    if job.source and job.seed == SEEDS[0] and (job.share, job.warmup) == (SHARES[0], WARMUPS[0]):
        start = probed(Path(job.source), job.recipe, PROBE, ["teacher"])["teacher linear"]
        result["before"] = start["accuracy"]
    RESULTS.append(job._asdict() | {"source": bool(job.source)} | machine(job.path) | result)
    shutil.rmtree(job.path)


def table(lines: list[dict[str, Any]]) -> str:
    """Accuracy of each arm, and its difference to the recipe's own rate and warm-up from these weights."""
    arms: dict[tuple[bool, float, float], dict[int, dict[str, Any]]] = {}
    for line in lines:
        arms.setdefault((line["source"], line["share"], line["warmup"]), {})[line["seed"]] = line
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in arms.values())))
    correct = {arm: [unpacked(by_seed[s]) for s in seeds] for arm, by_seed in arms.items()}
    reference = (True, 1.0, load_recipe("small").optim.warmup)
    rows = []
    for arm, of_arm in sorted(correct.items(), reverse=True):
        source, share, warmup = arm
        cells = ["these weights" if source else "random", f"{share:g}", f"{warmup:g}"]
        cells.append(f"{markdown.mean(percents(of_arm)):.1f}")
        images = digits_of(seeds, of_arm)
        gain = arm != reference and len(seeds) > 1
        cells.append(markdown.signed(difference(of_arm, correct[reference], images)) if gain else "")
        rows.append(cells)
    before = next((line["before"] for line in lines if "before" in line), None)
    note = f"{len(seeds)} paired seeds, {STEPS} steps of 128 at 64 px; 95 % intervals, not corrected. "
    note += f"Before these steps the weights reach {before:.1f} %." if before else ""
    head = [
        "start",
        "share of the rate",
        "warm-up",
        "linear probe",
        "against the recipe's own, these weights",
    ]
    return markdown.table(head, rows, f"{note} {lines[0]['cpu']}, {lines[0]['precision']}.")


def main() -> int:
    """Make all missing runs, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    options = parser.parse_args()
    done = {tuple(line[name] for name in Job._fields) for line in RESULTS.lines()}
    missing = [job for job in jobs(options.run) if (bool(job.source), *job[1:]) not in done]
    make(run, missing, options.jobs)
    print(table(RESULTS.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
