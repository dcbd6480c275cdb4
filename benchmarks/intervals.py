"""How often do intervals over seeds contain the true difference, and how wide are they? `python -m
benchmarks.intervals`.

Simulates comparisons by the model of `rcmae.tasks.interval`, for the intervals of Student's t with and
without the variance of shared test images, and for the bootstrap that was used before. Takes about two
minutes; writes results/intervals.json.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks import ROOT, markdown
from rcmae.engine.run import describe_machine, write_json
from rcmae.tasks.interval import Correct, difference, over_seeds, percents

SEEDS, IMAGES = (3, 6, 16), 300
SEED_EFFECTS, IMAGE_EFFECTS = (0.0, 0.05), (0.0, 0.4)
"""Standard deviations, where that of the noise of a prediction is 1: of what a seed does to an arm (0.05: 1.4
points of accuracy, 2 of a difference), and of what an image does to an arm on every seed."""

RULES = ("t and shared images", "plain t", "bootstrap, stretched")


def simulated(
    rng: np.random.Generator, seeds: int, images: int, seed_effect: float, image_effect: float, races: int
) -> tuple[float, Iterator[tuple[Correct, Correct]]]:
    """The true difference in points, and the results of two arms in each of the simulated races.

    An arm is correct where a sum of independent normal terms is positive: the difficulty of the image and the
    effects of the image and of the seed on this arm, and the noise of a prediction, with a variance of 1.
    """
    shift = 0.1
    deviation = (2 + seed_effect**2 + image_effect**2) ** 0.5
    true = 100 * float(stats.norm.cdf(shift / deviation) - 0.5)

    def race() -> tuple[Correct, Correct]:
        score = rng.standard_normal((2, seeds, images), np.float32)
        score += rng.standard_normal(images, np.float32)
        score += image_effect * rng.standard_normal((2, 1, images), np.float32)
        score += seed_effect * rng.standard_normal((2, seeds, 1), np.float32)
        score[0] += shift
        first, second = score > 0
        return list(first), list(second)

    return true, (race() for _ in range(races))


def bootstrap(correct: Correct, others: Correct, draws: int = 1000) -> list[float]:
    """The interval that was used before: a bootstrap over the seeds and, within each, the test images, and
    stretched by the factor that follows from Student's t and the unbiased standard deviation."""
    rng = np.random.Generator(np.random.Philox(key=0))
    differences = [a.astype(np.int8) - b.astype(np.int8) for a, b in zip(correct, others, strict=True)]
    n, images = len(differences), np.array([len(d) for d in differences])
    fractions = np.stack([[(d == v).mean() for v in (-1, 0, 1)] for d in differences])
    seeds = rng.integers(n, size=(draws, n))
    drawn = rng.multinomial(images[seeds], fractions[seeds])
    means = ((drawn[..., 2] - drawn[..., 0]) / images[seeds]).mean(1)
    mean = float((fractions[:, 2] - fractions[:, 0]).mean())
    factor = float(stats.t.ppf(0.975, n - 1) / stats.norm.ppf(0.975) * np.sqrt(n / (n - 1)))
    low, high = (mean + factor * (float(q) - mean) for q in np.percentile(means, [2.5, 97.5]))
    return [100 * mean, 100 * low, 100 * high]


def measure(seeds: int, seed_effect: float, image_effect: float, races: int) -> dict[str, Any]:
    """Coverage and mean width, in points, of each rule; the bootstrap on a tenth of the races."""
    rng = np.random.Generator(np.random.Philox(key=seeds))
    true, results = simulated(rng, seeds, IMAGES, seed_effect, image_effect, races)
    intervals: dict[str, list[tuple[float, float]]] = {rule: [] for rule in RULES}
    for number, (correct, others) in enumerate(results):
        gains = np.subtract(percents(correct), percents(others))
        results_by_rule = {RULES[0]: difference(correct, others), RULES[1]: over_seeds(gains)}
        for rule, interval in results_by_rule.items():
            intervals[rule].append(interval[1:3])
        if number % 10 == 0:
            _, low, high = bootstrap(correct, others)
            intervals[RULES[2]].append((low, high))
    row: dict[str, Any] = {"seeds": seeds, "seed_effect": seed_effect, "image_effect": image_effect}
    for rule, pairs in intervals.items():
        low, high = np.array(pairs).T
        covered = (low <= true) & (true <= high)
        row[rule] = {
            "coverage": float(covered.mean()),
            "width": float((high - low).mean()),
            "races": len(pairs),
        }
    return row


def table(results: dict[str, Any]) -> str:
    """Coverage and mean width by the number of seeds and the effects."""
    rows = [
        [
            str(row["seeds"]),
            "yes" if row["seed_effect"] else "no",
            "yes" if row["image_effect"] else "no",
            *(f"{row[rule]['coverage']:.3f} ({row[rule]['width']:.1f})" for rule in RULES),
        ]
        for row in results["rows"]
    ]
    races = results["rows"][0]
    return markdown.table(
        ["seeds", "effects of seeds", "effects of images", *RULES],
        rows,
        f"Coverage of 95 % intervals, and their mean width in points; {races[RULES[0]]['races']:,} simulated "
        f"comparisons in a row, {races[RULES[2]]['races']:,} for the bootstrap; {IMAGES} test images.",
    )


def main() -> None:
    """Simulate, print and write the results."""
    rows = []
    for seeds, seed_effect, image_effect in itertools.product(SEEDS, SEED_EFFECTS, IMAGE_EFFECTS):
        rows.append(measure(seeds, seed_effect, image_effect, 5000))
        print(rows[-1], flush=True)
    results = {"rows": rows, "machine": describe_machine(torch.device("cpu"), "fp32")}
    write_json(ROOT / "results" / "intervals.json", results)
    print(table(results))


if __name__ == "__main__":
    main()
