"""Does each method with its own bundled recipe learn? `python -m benchmarks.learns [METHOD...]`.

The runs are those of `rcmae compare race`, with the length of each recipe instead of an equal budget. The
same command resumes where it stopped. Writes results/learns.json; given methods, it leaves the rows of the
others as they are.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT, markdown
from rcmae.compare.cost import cost
from rcmae.compare.race import Budget, RaceRun, RaceSettings, arms, carry_out, judge
from rcmae.config import shipped_recipes
from rcmae.data.sources import open_source
from rcmae.engine import signals
from rcmae.engine.run import read_json, write_json
from rcmae.methods import METHODS
from rcmae.tasks.interval import Difference, correction_note, judged

BUNDLED = [name for name in METHODS if f"{name}-bundled" in shipped_recipes()]

PROBES = ("linear", "attentive")


def table(results: dict[str, Any]) -> str:
    """Accuracy above random initialization, and the health of the features."""
    machine, rows = results["machine"], []
    for row in results["rows"]:
        cells = [row["arm"], str(row["steps"])]
        for probe in PROBES:
            cells += [f"{markdown.mean(row[probe]):.1f}", markdown.signed(row[f"{probe} gain"])]
        for key in ("rankme", "entropy", "prototypes_used"):
            values = [health[key] for health in row["health"] if key in health]
            cells.append(f"{markdown.mean(values):.1f}" if values else "")
        rows.append(cells)
    gains = {
        (row["arm"], probe): Difference(*row[f"{probe} gain"]) for row in results["rows"] for probe in PROBES
    }
    texts = dict(zip(gains, judged(gains.values()), strict=True))
    verdicts = []
    for probe in PROBES:
        parts = "; ".join(f"{row['arm']}: {texts[row['arm'], probe]}" for row in results["rows"])
        verdicts.append(f"By the {probe} probe, against the randomly initialized encoder, {parts}.")
    verdicts.append(correction_note(len(gains)))
    conditions = f"{results['seeds']} seeds, 95 % intervals; {_conditions(machine)}"
    for row in results["rows"]:
        differing = row.get("machine", machine)
        if differing["precision"] != machine["precision"]:
            conditions += f"; {row['arm']}: {_conditions(differing)}"
    columns = [text for probe in PROBES for text in (f"{probe} probe", "above random init")]
    return markdown.table(
        ["method", "steps", *columns, "rank of the features", "entropy, nats", "prototypes in use"],
        rows,
        *verdicts,
        f"{conditions}.",
    )


def _conditions(machine: dict[str, Any]) -> str:
    return f"{machine['cpu']}, {machine['precision']}, torch {machine['torch']}"


def main() -> None:
    """Make the missing runs, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(BUNDLED)
    parser.add_argument(
        "methods", nargs="*", default=BUNDLED, metavar="METHOD", help=f"any of {names} [default: all]"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "learns")
    args = parser.parse_args()
    contestants = [arm for arm in arms(BUNDLED) if arm.name in args.methods]
    budget, jobs = Budget("the recipe's length", 0), torch.get_num_threads()
    setting = RaceSettings(budget=budget, seeds=args.seeds, probes=1, jobs=jobs)
    recipe = contestants[0].recipe
    data = open_source(recipe.data, recipe.images.channels, size=recipe.images.size).fingerprint()
    costs = {arm.name: cost(arm.recipe).flops for arm in contestants}
    runs = [
        RaceRun(arm, seed, args.out, arm.recipe.steps or 0, setting, data)
        for seed in range(1, args.seeds + 1)
        for arm in contestants
    ]
    weights = [run.steps * costs[run.arm.name] for run in runs]
    with signals.handled():
        carry_out(runs, weights, setting, lambda text: print(text, flush=True))
    results = judge(runs, costs, setting)
    file = ROOT / "results" / "learns.json"
    before = read_json(file)
    by_name = {row["arm"]: row for row in before.get("rows", [])}
    by_name |= {row["arm"]: row | {"machine": results["machine"]} for row in results["rows"]}
    rows = [by_name[name] for name in BUNDLED if name in by_name]
    machine = before.get("machine", results["machine"])
    write_json(file, {"rows": rows, "machine": machine, "seeds": args.seeds})
    for row in results["rows"]:
        gains = ", ".join(f"{probe} {markdown.signed(row[f'{probe} gain'])}" for probe in PROBES)
        print(f"{row['arm']} {row['steps']} steps, above random init: {gains} {row['health']}")


if __name__ == "__main__":
    main()
