"""`python -m benchmarks.paper [NAME ...]`: what the paper's tables say, how to repeat them on ImageNet, and their small forms here.

    python -m benchmarks.paper                        # all commands, with the paper's numbers; nothing is run
    python -m benchmarks.paper convergence --run      # its small form on the embedded set; the same command goes on where it stopped

Small forms are `rcmae compare race` (of resources: `rcmae compare cost --measure`). They show whether a claim holds on a small set and a
small network, which says little about ImageNet. What came of them goes to results/paper_NAME.json and docs/paper.md.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.paper.experiments import COMPARED, EXPERIMENTS, Experiment
from rcmae.compare.cost import study
from rcmae.compare.race import Setting, arms, parse_budget, race, write_page
from rcmae.engine.run import write_json

ROOT = Path(__file__).parents[2]


def describe(name: str, experiment: Experiment) -> str:
    """The claim, and a command and the paper's numbers for each row."""
    lines = [f"{name}: {experiment.claim}"]
    for row in experiment.rows:
        numbers = ", ".join(f"{what} {'not known' if number is None else number}" for what, number in row.paper.items())
        lines += [f"  {row.name}    the paper's: {numbers}", f"    {row.command}"]
    return "\n".join(lines)


def run(name: str, experiment: Experiment, seeds: int, out: Path) -> dict:
    """The small form; numbers that results/ keeps."""
    if experiment.cost:
        return study(["vit_small_patch16"], COMPARED, precision="fp32", device="cpu", measured_batch=8, say=print)
    found = {}
    for small in experiment.races:
        print(f"{name}: {small.name}", flush=True)
        place = out / name / small.name.replace(",", "").replace(" ", "-")
        setting = Setting(parse_budget(small.budget), seeds=seeds, probes=1, jobs=torch.get_num_threads())
        found[small.name] = race(arms(small.arms), setting, place, print)
        print(*found[small.name]["said"], f"{write_page(found[small.name], place)}", sep="\n", flush=True)
    machine = next(iter(found.values()))["machine"]
    return {"races": {k: {part: v[part] for part in ("about", "said", "rows")} for k, v in found.items()}, "machine": machine}


def main() -> None:
    """Tell, or run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--run", action="store_true", help="run the small form")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "paper")
    args = parser.parse_args()
    if unknown := set(args.names) - set(EXPERIMENTS):
        parser.error(f"there is no experiment {sorted(unknown)[0]!r}; known are {', '.join(EXPERIMENTS)}")
    for name in args.names or EXPERIMENTS:
        print(describe(name, EXPERIMENTS[name]), flush=True)
        if args.run and not EXPERIMENTS[name].small:
            print(f"  its small form is `{EXPERIMENTS[name].elsewhere}`", flush=True)
        elif args.run:
            write_json(ROOT / "results" / f"paper_{name}.json", run(name, EXPERIMENTS[name], args.seeds, args.out))


if __name__ == "__main__":
    main()
