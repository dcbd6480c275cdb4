"""Does each method that has a small recipe of its own learn by it? `python -m benchmarks.learns [METHOD...]`.

The same command resumes where it stopped. Runs are those of `rcmae compare race`, at each recipe's own length instead of an equal
budget. Writes results/learns.json; where methods are named, the rows of others stay as they are.
"""

import argparse
from pathlib import Path

import torch

from rcmae.compare.cost import cost
from rcmae.compare.race import Budget, Run, Setting, arms, carry_out, judge
from rcmae.config import shipped_recipes
from rcmae.data.sources import open_source
from rcmae.engine import signals
from rcmae.engine.run import read_json, write_json
from rcmae.methods import METHODS

ROOT = Path(__file__).parent.parent
OWN = [name for name in METHODS if f"{name}-embedded" in shipped_recipes()]


def main() -> None:
    """Make the runs that are missing, and write what they tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=OWN, metavar="METHOD", help=f"of {', '.join(OWN)} [default: all]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "learns")
    args = parser.parse_args()
    contestants = [arm for arm in arms(OWN) if arm.name in args.methods]
    setting = Setting(Budget("recipe's own", 0), args.seeds, probes=1, jobs=torch.get_num_threads())
    recipe = contestants[0].recipe
    data = open_source(recipe.data, recipe.images.channels, size=recipe.images.size).fingerprint()
    costs = {arm.name: cost(arm.recipe).flops for arm in contestants}
    runs = [Run(arm, seed, args.out, arm.recipe.steps or 0, setting, data) for seed in range(1, args.seeds + 1) for arm in contestants]
    with signals.answered():
        carry_out(runs, [run.steps * costs[run.arm.name] for run in runs], setting, lambda text: print(text, flush=True))
    found = judge(runs, costs, setting)
    file = ROOT / "results" / "learns.json"
    made = {row["arm"]: row | {"machine": found["machine"]} for row in found["rows"]}
    before = {row["arm"]: row for row in read_json(file).get("rows", [])}
    rows = [made.get(name) or before[name] for name in OWN if name in made or name in before]
    write_json(file, {"rows": rows, "machine": read_json(file).get("machine", found["machine"]), "seeds": args.seeds})
    for row in found["rows"]:
        print(
            row["arm"],
            f"{row['steps']} steps",
            "linear, above untrained: {:+.1f} [{:+.1f}, {:+.1f}]".format(*row["linear gain"]),
            row["health"],
        )


if __name__ == "__main__":
    main()
