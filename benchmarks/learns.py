"""Does each method of self-distillation learn, by its own small recipe? `python -m benchmarks.learns`.

The same command goes on where it stopped. Runs are those of `rcmae compare race`, at each recipe's own length instead of an equal
budget. Writes results/learns.json.
"""

import argparse
from pathlib import Path

import torch

from rcmae.compare.cost import cost
from rcmae.compare.race import Budget, Run, Setting, arms, carry_out, judge
from rcmae.data.sources import open_source
from rcmae.engine import signals
from rcmae.engine.run import write_json

ROOT = Path(__file__).parent.parent
METHODS = ("dino", "ibot", "msn", "mocov3")


def main() -> None:
    """Make the runs that are missing, and write what they tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "learns")
    args = parser.parse_args()
    contestants = arms(METHODS)
    setting = Setting(Budget("recipe's own", 0), args.seeds, probes=1, jobs=torch.get_num_threads())
    recipe = contestants[0].recipe
    data = open_source(recipe.data, recipe.images.channels, size=recipe.images.size).fingerprint()
    costs = {arm.name: cost(arm.recipe).flops for arm in contestants}
    runs = [Run(arm, seed, args.out, arm.recipe.steps or 0, setting, data) for seed in range(1, args.seeds + 1) for arm in contestants]
    with signals.answered():
        carry_out(runs, [run.steps * costs[run.arm.name] for run in runs], setting, lambda text: print(text, flush=True))
    found = judge(runs, costs, setting)
    write_json(ROOT / "results" / "learns.json", {part: found[part] for part in ("rows", "machine")} | {"seeds": args.seeds})
    for row in found["rows"]:
        print(
            row["arm"],
            f"{row['steps']} steps",
            "linear, above untrained: {:+.1f} [{:+.1f}, {:+.1f}]".format(*row["linear gain"]),
            row["health"],
        )


if __name__ == "__main__":
    main()
