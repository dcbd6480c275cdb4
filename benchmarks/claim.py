"""Does RC-MAE learn better, or faster, than MAE on the bundled digits? `python -m benchmarks.claim`.

docs/rcmae-answered.md has the plan, which was committed before the first confirming run. Every finished run
is a line of results/claim.jsonl and is never repeated; an unfinished one resumes from runs/claim.

1. Rates: every arm at each of the first `RATES` on two of `TUNING_SEEDS`, at 1,000 steps, and then at those
   that are close to its best one on all of them. An arm whose best rate is the lowest or the highest one so
   far is also trained at the next one, if there is one.
2. Confirmation: every arm at its best rate on `SEEDS`, at 2,000 steps.
3. Speed: MAE at its best rate and the other lengths of `LENGTHS`, each with its own schedule.

At the end, and with --analyze before, the analysis of all complete seeds is written to results/claim.json and
docs/img/claim.png.
"""

import argparse
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from benchmarks import ROOT, markdown
from benchmarks.runs import (
    NOT_PLANNED,
    Rates,
    Results,
    digits_of,
    family,
    fine_tuned,
    gain_cell,
    machine,
    make,
    packed,
    pretrain_quietly,
    probed,
    unpacked,
)
from rcmae.config import Probe, Recipe, changed
from rcmae.engine.run import write_json
from rcmae.errors import DivergedError
from rcmae.methods.recipes import load_recipe, with_method
from rcmae.tasks.interval import Correct, Difference, correction_note, difference

RESULTS = Results(ROOT / "results" / "claim.jsonl")

MAE = "MAE"

ARMS: dict[str, dict[str, Any]] = {
    MAE: {"gamma": 0.0, "half_life": "10 steps"},
    **{f"RC-MAE {n}": {"half_life": f"{n} steps"} for n in (1, 3, 10, 30)},
}
"""Changes to the bundled recipe. The student of the first one is MAE, bit for bit, and its teacher is MAE
averaged for evaluation; of the others the teacher is evaluated."""

BATCH_SIZE = 64

TUNING_SEEDS, TUNING_STEPS = range(4), 1000
RATES = Rates((6e-3, 12e-3, 24e-3), (1.5e-3, 3e-3, 6e-3, 12e-3, 24e-3, 48e-3), len(TUNING_SEEDS), screening=2)

SEEDS, STEPS = range(11, 27), 2000
LENGTHS = (1000, 1414, 2000, 2828)

PROBE = Probe(probes=1, probe_train=2000, probe_test=16_000)
LABELS = 1.0
"Percent of the training labels in fine-tuning."
FINE_TUNING = ("steps=100",)


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
        if self.arm != MAE:
            return ("teacher",)
        return ("student", "teacher") if self.tuned and self.steps == STEPS else ("student",)

    @property
    def recipe(self) -> Recipe:
        """That of the run: plain MAE, which costs less, where the average is not evaluated."""
        of_run: dict[str, Any] = {"seed": self.seed, "steps": self.steps, "base_lr": self.rate}
        recipe = changed(load_recipe("bundled"), **of_run, batch_size=BATCH_SIZE, probes=0)
        return changed(recipe, **ARMS[self.arm]) if "teacher" in self.networks else with_method(recipe, "mae")

    @property
    def path(self) -> Path:
        """The directory of the run."""
        return ROOT / "runs" / "claim" / f"{self.arm.replace(' ', '-')}-{self.rate}-{self.seed}-{self.steps}"


def run(job: Job) -> None:
    """Train, evaluate, and append a line to the results."""
    torch.set_num_threads(1)
    diverged = ""
    try:
        pretrain_quietly(job.recipe, job.path, workers=0)
    except DivergedError as e:
        diverged = str(e)
    result = job._asdict() | machine(job.path) | {"diverged": diverged}
    result |= probed(job.path, job.recipe, PROBE, job.networks)
    for network in job.networks if job.tuned else ():
        correct = fine_tuned(job.path, network, "bundled:digits", LABELS, job.seed, FINE_TUNING)
        result[f"{network} fine-tuned"] = packed(correct)
    RESULTS.append(result)
    shutil.rmtree(job.path)


def accuracies(arm: str) -> dict[float, list[float]]:
    """Of the linear probe in the first phase, by rate: of MAE's student, otherwise of the teacher."""
    network = "student" if arm == MAE else "teacher"
    by_rate: dict[float, list[float]] = {}
    for line in sorted(RESULTS.lines(), key=lambda line: line["seed"]):
        if line["arm"] == arm and not line["tuned"]:
            by_rate.setdefault(line["rate"], []).append(line[f"{network} linear"]["accuracy"])
    return by_rate


def tuning() -> Iterator[Job]:
    """The runs of the first phase that the rules request so far."""
    requested = [(arm, rate, n) for arm in ARMS for rate, n in RATES.requested(accuracies(arm)).items()]
    for seed in TUNING_SEEDS:
        yield from (Job(arm, rate, seed, TUNING_STEPS, False) for arm, rate, n in requested if seed < n)


def confirmation() -> Iterator[Job]:
    """The runs of the second and third phase, seed by seed."""
    rates = {arm: RATES.best(accuracies(arm)) for arm in ARMS}
    for seed in SEEDS:
        yield from (Job(arm, rate, seed, STEPS, True) for arm, rate in rates.items())
        yield from (Job(MAE, rates[MAE], seed, steps, True) for steps in LENGTHS if steps != STEPS)


# --- analysis -----------------------------------------------------------------------------------------------

AVERAGED = "MAE, averaged"

NETWORKS = {MAE: (MAE, "student"), AVERAGED: (MAE, "teacher")} | {
    arm: (arm, "teacher") for arm in ARMS if arm != MAE
}
"What is compared: an arm and the network that is evaluated."

HALF_LIVES = [arm for arm in ARMS if arm != MAE]

ENDPOINTS = {"fine-tuned": f"fine-tuning on {LABELS:g} % of the labels", "linear": "linear probe"}

SPEEDS = np.geomspace(LENGTHS[0], LENGTHS[-1], 31) / STEPS
"Those that are tested: MAE has runs between the lengths of the first and the last one."

Runs = dict[tuple[str, int], dict[str, Any]]
"The lines of a seed by arm and steps."


def complete() -> dict[int, Runs]:
    """The runs of confirmation and speed, by seed, of the seeds that have all of them in one precision.

    Raises ValueError for an arm with several rates."""
    needed = {(arm, STEPS) for arm in ARMS} | {(MAE, steps) for steps in LENGTHS}
    seeds: dict[int, Runs] = {}
    rates: dict[str, float] = {}
    for line in RESULTS.lines():
        if line["tuned"]:
            seeds.setdefault(line["seed"], {})[line["arm"], line["steps"]] = line
            if rates.setdefault(line["arm"], line["rate"]) != line["rate"]:
                raise ValueError(f"{line['arm']} has runs at {rates[line['arm']]} and {line['rate']}")
    return {
        seed: runs
        for seed, runs in sorted(seeds.items())
        if runs.keys() >= needed and len({run["precision"] for run in runs.values()}) == 1
    }


def results_of(seeds: dict[int, Runs], name: str, endpoint: str, steps: int = STEPS) -> Correct:
    """Which test images an arm classifies correctly, for each seed."""
    arm, network = NETWORKS[name]
    return [unpacked(runs[arm, steps][f"{network} {endpoint}"]) for runs in seeds.values()]


def subjects(seeds: Iterable[int], endpoint: str, correct: Correct) -> list[Int[np.ndarray, " m"]]:
    """The handwritten digit in each test image: the samples, since images of one are alike. All seeds are
    fine-tuned and tested on the same images; for the linear probe each generates its own."""
    return digits_of(seeds if endpoint == "linear" else [0] * len(correct), correct)


def compared(seeds: dict[int, Runs], endpoint: str, other: str) -> dict[str, Any]:
    """The half-lives, one family, against another arm: differences and verdicts."""
    first = results_of(seeds, other, endpoint)
    images = subjects(seeds, endpoint, first)
    return family({arm: difference(results_of(seeds, arm, endpoint), first, images) for arm in HALF_LIVES})


def mae_after(seeds: dict[int, Runs], endpoint: str, steps: float) -> list[Float[np.ndarray, " m"]]:
    """The results of MAE after so many steps for each seed, linear over the logarithm of the steps between
    those of two runs."""
    x, place = np.log(LENGTHS), np.log(steps)
    k = int(np.clip(np.searchsorted(x, place) - 1, 0, len(x) - 2))
    weight = (place - x[k]) / (x[k + 1] - x[k])
    before, after = (results_of(seeds, MAE, endpoint, each) for each in LENGTHS[k : k + 2])
    return [(1 - weight) * a + weight * b for a, b in zip(before, after, strict=True)]


def speed(seeds: dict[int, Runs], name: str, endpoint: str) -> dict[str, Any]:
    """How many times as fast as MAE an arm learns: the speed x at which MAE after x times the steps is equal,
    and the interval of those whose difference is not shown. None beyond `SPEEDS`."""
    correct = results_of(seeds, name, endpoint)
    images = subjects(seeds, endpoint, correct)
    gaps = [difference(correct, mae_after(seeds, endpoint, x * STEPS), images) for x in SPEEDS]
    better, worse = (np.array([d.low > 0 for d in gaps]), np.array([d.high < 0 for d in gaps]))
    # Too slow: the first ones, where the arm is better than MAE. Too fast: the last ones, where it is worse.
    slow, fast = int(np.cumprod(better).sum()), int(np.cumprod(worse[::-1]).sum())
    means = np.array([d.mean for d in gaps])
    crossings = np.flatnonzero(means[:-1] * means[1:] <= 0)
    nearest = crossings[abs(np.log(SPEEDS[crossings])).argmin()] if len(crossings) else None
    low = float(SPEEDS[slow - 1]) if slow else None
    high = float(SPEEDS[-fast]) if fast else None
    return {
        "low": low,
        "speed": None if nearest is None else float(SPEEDS[nearest]),
        "high": high,
        "verdict": speed_verdict(low, high),
    }


def speed_verdict(low: float | None, high: float | None) -> str:
    """What the interval of a speed shows beyond the comparison at equal steps."""
    words = ["equivalent"] if low and high and low >= 0.9 and high <= 1.1 else []
    return ", ".join([*words, *(["a factor of two is refuted"] if high else [])]) or "inconclusive"


def accuracy(seeds: dict[int, Runs], endpoint: str, correct: Correct) -> Difference:
    """The mean accuracy in percent, with its interval over seeds and test images."""
    return difference(correct, [np.zeros_like(c) for c in correct], subjects(seeds, endpoint, correct))


def analysis() -> dict[str, Any]:
    """All numbers of the page. Without two complete seeds there are none."""
    seeds = complete()
    about: dict[str, Any] = {"seeds": [*seeds]}
    if len(seeds) < 2:
        return about
    lines = [line for runs in seeds.values() for line in runs.values()]
    about["machines"] = sorted({f"{line['cpu']}, {line['precision']}" for line in lines})
    about["rates"] = {
        name: sorted({line["rate"] for line in lines if line["arm"] == NETWORKS[name][0]})
        for name in NETWORKS
    }
    for endpoint in ENDPOINTS:
        about[endpoint] = {
            "accuracy": {n: accuracy(seeds, endpoint, results_of(seeds, n, endpoint)) for n in NETWORKS},
            "curve": {s: accuracy(seeds, endpoint, results_of(seeds, MAE, endpoint, s)) for s in LENGTHS},
            "against": {other: compared(seeds, endpoint, other) for other in (MAE, AVERAGED)},
            "speed": {name: speed(seeds, name, endpoint) for name in NETWORKS if name != MAE},
        }
    return about


def answer(results: dict[str, Any]) -> str:
    """The answer to the claim, by the primary family."""
    words = {
        arm: result["verdict"].split()[0] for arm, result in results["fine-tuned"]["against"][MAE].items()
    }
    if better := [arm for arm, word in words.items() if word == "better"]:
        return f"Confirmed on this set: better than MAE is {', '.join(better)}."
    if set(words.values()) <= {"worse", "equivalent"}:
        return "Refuted on this set: every half-life is worse than MAE or equivalent to it."
    return "Inconclusive on this set: no half-life is shown to be better than MAE, nor all to be no better."


def table(results: dict[str, Any]) -> str:
    """The results section of the page: without verdicts until all seeds are complete."""
    count = f"{len(results['seeds'])} of {len(SEEDS)} seeds are complete"
    if len(results["seeds"]) < 2:
        return f"{count}, too few for any result."
    planned = len(results["seeds"]) == len(SEEDS)
    parts = [
        f"{count}. {'; '.join(results['machines'])}. Means with 95 % intervals; accuracy in percent, "
        "differences in points.",
        answer(results) if planned else NOT_PLANNED,
    ]
    for endpoint, title in ENDPOINTS.items():
        part, others = results[endpoint], (MAE, AVERAGED)
        rows = [
            [
                name,
                " ".join(f"{1000 * rate:g}e-3" for rate in results["rates"][name]),
                "{:.1f} [{:.1f}, {:.1f}]".format(*part["accuracy"][name]),
                *(gain_cell(part["against"][other].get(name), planned) for other in others),
            ]
            for name in NETWORKS
        ]
        head = ["arm", "rate", title, *(f"against {other}" for other in others)]
        parts.append(markdown.table(head, rows, left=(0, 3, 4)))
    if planned:
        parts.append(f"Each column of verdicts is a family. {correction_note(len(HALF_LIVES))}")
    rows = [
        [name, *(_speed_cell(results[endpoint]["speed"][name], planned) for endpoint in ENDPOINTS)]
        for name in NETWORKS
        if name != MAE
    ]
    note = (
        f"Speeds below {SPEEDS[0]:.2f} and above {SPEEDS[-1]:.2f} are not distinguished: MAE has runs of "
        f"{LENGTHS[0]:,} to {LENGTHS[-1]:,} steps. Not corrected for the number of half-lives."
    )
    parts += [
        markdown.table(
            ["times as fast as MAE", *(f"by {title}" for title in ENDPOINTS.values())],
            rows,
            note,
            left=(0, 1, 2),
        ),
        f"![Accuracy after fine-tuning against steps: MAE, and RC-MAE at {STEPS:,} steps](img/claim.png)",
    ]
    return "\n\n".join(parts)


def _speed_cell(result: dict[str, Any], planned: bool) -> str:
    low, middle, high = (result[key] for key in ("low", "speed", "high"))
    ends = [
        f"below {SPEEDS[0]:.2f}" if low is None else f"{low:.2f}",
        f"above {SPEEDS[-1]:.2f}" if high is None else f"{high:.2f}",
    ]
    text = f"{'' if middle is None else f'{middle:.2f} '}[{', '.join(ends)}]"
    return f"{text}: {result['verdict']}" if planned else text


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw MAE's accuracy over the steps, with the other arms at `STEPS`, which are spread a little."""
    figure = Figure(figsize=(4, 3.4), layout="constrained", dpi=200)  # readable at a width of 400 pixels
    axes, part = figure.add_subplot(), results["fine-tuned"]

    def points(x: Any, intervals: Any, **style: Any) -> None:
        middle, low, high = np.array([interval[:3] for interval in intervals]).T
        axes.errorbar(x, middle, [middle - low, high - middle], capsize=3, markersize=5, **style)

    points(LENGTHS, [*part["curve"].values()], color="#5d6670", marker="o", linewidth=1.4, label=MAE)
    colors = ("#1a7f4b", "#8fb8e8", "#5590d6", "#1d62b8", "#0b3a75")
    shown = [name for name in NETWORKS if name != MAE]
    for place, (name, color) in enumerate(zip(shown, colors, strict=True)):
        x = STEPS * 1.05 ** (place - 2 + (place >= 2))  # MAE is in the middle
        points(
            [x],
            [part["accuracy"][name]],
            color=color,
            marker="s" if name == AVERAGED else "D",
            linestyle="",
            label=name,
        )
    axes.set_xscale("log")
    axes.set_xticks(LENGTHS, [f"{steps:,}" for steps in LENGTHS])
    axes.minorticks_off()
    axes.set_xlabel("steps")
    axes.set_ylabel("accuracy, %, after fine-tuning on 1 %")
    axes.grid(color="#e3e6e9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def analyze() -> None:
    """Write the analysis, print it, and draw the figure."""
    results = analysis()
    write_json(ROOT / "results" / "claim.json", results)
    print(table(results))
    if "fine-tuned" in results:
        draw(results, ROOT / "docs" / "img" / "claim.png")


def main() -> int:
    """Make all missing runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--analyze", action="store_true", help="make no runs")
    options = parser.parse_args()
    if not options.analyze:
        while jobs := RESULTS.missing(tuning()):
            make(run, jobs, options.jobs)
        make(run, RESULTS.missing(confirmation()), options.jobs)
    analyze()
    return 0


if __name__ == "__main__":
    sys.exit(main())
