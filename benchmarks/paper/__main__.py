"""`python -m benchmarks.paper [NAME ...]`: the paper's tables, the commands that reproduce them on ImageNet,
and their small forms.

    python -m benchmarks.paper                      # print all commands and the paper's numbers; run nothing
    python -m benchmarks.paper convergence --run    # run or resume its small form on the bundled set

Small forms are `rcmae compare race` with probes and, as the paper measures, fine-tuning of its networks;
for resources `rcmae compare cost --measure`. They show whether a claim holds on a small set and network,
which says little about ImageNet. The results go to results/paper_NAME.json and docs/paper.md.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.paper.experiments import EXPERIMENTS, FINE_TUNED, LABELS, METHODS, Experiment
from benchmarks.runs import family, fine_tuned
from rcmae.compare.cost import count_costs
from rcmae.compare.race import RaceSettings, arms, parse_budget, race, write_race_page
from rcmae.config import Recipe
from rcmae.engine.run import write_json
from rcmae.methods import METHODS as ALL_METHODS
from rcmae.methods.recipes import load_recipe
from rcmae.tasks.interval import Correct, difference, percents


def describe(name: str, experiment: Experiment) -> str:
    """The claim, and a command and the paper's numbers for each row."""
    lines = [f"{name}: {experiment.claim}"]
    for row in experiment.rows:
        numbers = ", ".join(f"{column} {value or 'unknown'}" for column, value in row.paper.items())
        lines += [f"  {row.name}    paper: {numbers}", f"    {row.command}"]
    return "\n".join(lines)


def run(name: str, experiment: Experiment, seeds: int, out: Path) -> dict[str, Any]:
    """Run the small form; returns the numbers for results/."""
    if experiment.cost:
        costs = count_costs(
            ["vit_small_patch16"], list(METHODS), precision="fp32", device="cpu", measured_batch=8, log=print
        )
        return {"experiment": name, **costs}
    races: dict[str, Any] = {}
    machine = None
    for small in experiment.races:
        print(f"{name}: {small.name}", flush=True)
        folder = out / name / small.name.replace(",", "").replace(" ", "-")
        budget, jobs = parse_budget(small.budget), torch.get_num_threads()
        results = race(
            arms(small.arms), RaceSettings(budget=budget, seeds=seeds, probes=1, jobs=jobs), folder, print
        )
        page = write_race_page(results, folder)
        print(*results["verdict"], page, sep="\n", flush=True)
        races[small.name] = {part: results[part] for part in ("about", "verdict", "rows")}
        races[small.name][FINE_TUNED] = fine_tune(folder, results["rows"])
        machine = machine or results["machine"]
    return {"experiment": name, "races": races, "machine": machine}


def fine_tune(folder: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fine-tune the judged network of every run of a race on `LABELS` of the labels: accuracies in percent by
    seed, and the difference to the first arm with its verdict."""
    correct: dict[str, Correct] = {}
    for row in rows:
        arm, runs = row["arm"], [folder / name for name in row["runs"]]
        network = ALL_METHODS[load_recipe(str(runs[0] / "recipe.toml")).method].networks[-1]
        correct[arm] = []
        for seed, path in enumerate(runs, 1):
            print(f"fine-tuning {arm}, seed {seed}", flush=True)
            correct[arm].append(fine_tuned(path, network, Recipe.data, LABELS, seed))
    first, *others = correct
    against = family({arm: difference(correct[arm], correct[first]) for arm in others})
    return [{"arm": arm, "accuracy": percents(c)} | against.get(arm, {}) for arm, c in correct.items()]


def main() -> None:
    """Print or run the experiments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--run", action="store_true", help="run the small form")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "paper")
    args = parser.parse_args()
    if unknown := set(args.names) - set(EXPERIMENTS):
        parser.error(f"there is no experiment {sorted(unknown)[0]!r}; choose from {', '.join(EXPERIMENTS)}")
    for name in args.names or EXPERIMENTS:
        experiment = EXPERIMENTS[name]
        print(describe(name, experiment), flush=True)
        if args.run and not experiment.small:
            print(f"  its small form is `{experiment.elsewhere}`", flush=True)
        elif args.run:
            write_json(ROOT / "results" / f"paper_{name}.json", run(name, experiment, args.seeds, args.out))


if __name__ == "__main__":
    main()
