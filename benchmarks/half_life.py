"""Does the teacher help on the bundled set, and with which half-life? `python -m benchmarks.half_life`.

Paired seeds: within a seed every arm has the same initial weights, images, crops and masks. Arms: MAE; MAE
whose weights are averaged for evaluation only (the teacher of a run with gamma 0, which is MAE to the bit);
RC-MAE at five half-lives and `adaptive`. Finished runs under --out are never repeated: the same command
resumes where it stopped. Writes results/half_life.json and docs/img/half_life.png from all complete seeds.
"""

import argparse
import json
import multiprocessing as mp
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks import ROOT, markdown
from benchmarks.runs import pretrain_quietly
from rcmae.config import Probe, changed
from rcmae.data.sources import open_source
from rcmae.engine.metrics import read_metrics
from rcmae.engine.run import write_json
from rcmae.interop.load import load
from rcmae.methods.mean_teacher import DEFAULT_HALF_LIFE
from rcmae.methods.recipes import load_recipe
from rcmae.tasks.interval import Difference, correction_note, judged, over_seeds
from rcmae.tasks.probe import accuracies, probe_set

HALF_LIVES = ("0.15%", "0.5%", "1.5%", "5%", "15%")
NETWORKS: tuple[Literal["student", "teacher"], ...] = ("student", "teacher")
PROBE = Probe(probes=1, probe_train=2000, probe_test=4000)
RUNS: dict[str, dict[str, Any]] = {
    "gamma 0": {"gamma": 0.0, "half_life": "1.5%"},
    **{h: {"half_life": h} for h in HALF_LIVES},
    "adaptive": {"half_life": "adaptive"},
}


def run_path(out: Path, name: str, seed: int) -> Path:
    """The directory of a run."""
    return out / f"{name.replace(' ', '-').rstrip('%')}-{seed}"


def run(out: Path, name: str, seed: int, steps: int) -> None:
    """Make one run on one thread and score it, unless that is done."""
    path = run_path(out, name, seed)
    recipe = changed(load_recipe("bundled"), seed=seed, steps=steps, probes=0, **RUNS[name])
    if not (path / "scores.json").exists():
        pretrain_quietly(recipe, path)
        # Probed once, at the end, in the way a run is probed during training.
        probes = probe_set(open_source(recipe.data, size=recipe.images.size), replace(recipe, probe=PROBE))
        assert probes is not None, "the bundled set has labels"
        precision = json.loads((path / "machine.json").read_text())["precision"]
        scores: dict[str, Any] = {
            network: accuracies(probes.backbone(load(path, network), torch.device("cpu"), precision))
            for network in NETWORKS
        }
        write_json(path / "scores.json", scores)
    print(f"{path.name}: {(path / 'scores.json').read_text()}".replace("\n", ""), flush=True)


def read(out: Path, seeds: int) -> tuple[dict[str, list[dict[str, float]]], list[int], dict[str, Any]]:
    """Scores by arm and seed, the seeds with no run missing, and the runtime."""
    arms: dict[str, list[dict[str, float]]] = {}
    machine: dict[str, Any] = {}
    complete = [
        seed
        for seed in range(seeds)
        if all((run_path(out, name, seed) / "scores.json").exists() for name in RUNS)
    ]
    for seed in complete:
        for name in RUNS:
            path = run_path(out, name, seed)
            machine = json.loads((path / "machine.json").read_text())
            train = [line for line in read_metrics(path) if line["kind"] == "train"]
            tail = train[-len(train) // 20 :]
            facts = {
                "reconstruction": float(np.mean([line["reconstruction"] for line in tail])),
                "half_life": tail[-1]["half_life_steps"],
            }
            for network, scores in json.loads((path / "scores.json").read_text()).items():
                arm = f"RC-MAE {name}, {network}"
                if name == "gamma 0":
                    arm = "MAE" if network == "student" else "MAE, averaged"
                arms.setdefault(arm, []).append(scores | facts)
    return arms, complete, machine


def summary(arms: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A row per arm: accuracy, and its paired difference to MAE and to MAE averaged."""
    rows = []
    for arm, seeds in arms.items():
        row: dict[str, Any] = {"arm": arm}
        row |= {kind: over_seeds([seed[kind] for seed in seeds]) for kind in ("linear", "knn")}
        row |= {key: float(np.mean([seed[key] for seed in seeds])) for key in ("reconstruction", "half_life")}
        row |= {f"against {other}": gain(arms, arm, other) for other in ("MAE", "MAE, averaged")}
        rows.append(row)
    return rows


def gain(arms: dict[str, list[dict[str, float]]], arm: str, other: str) -> Difference:
    """The difference in linear probe accuracy within a seed."""
    return over_seeds([a["linear"] - b["linear"] for a, b in zip(arms[arm], arms[other], strict=True)])


MARGIN = 1.0
"""Points that `adaptive` may be worse than the best fixed half-life, at the lower end of the interval, to
become the default."""


def verdicts(arms: dict[str, list[dict[str, float]]]) -> dict[str, str]:
    """Conclusions that the intervals support."""
    by_mean = sorted(
        (arm for arm in arms if arm.endswith("%, teacher")),
        key=lambda arm: np.mean([seed["linear"] for seed in arms[arm]]),
    )
    worst, best = by_mean[0], by_mean[-1]
    default, adaptive = f"RC-MAE {DEFAULT_HALF_LIFE}, teacher", "RC-MAE adaptive, teacher"
    chosen = ", chosen on these seeds"
    pairs = {
        "default": (default, "MAE", ""),
        "averaging": (default, "MAE, averaged", ""),
        "best": (best, "MAE, averaged", chosen),
        "worst": (worst, "MAE", chosen),
        "adaptive": (adaptive, best, ", the best fixed one on these seeds"),
    }
    gains = [gain(arms, arm, other) for arm, other, _ in pairs.values()]
    texts = {
        name: f"{arm} against {other}{note}: {verdict}"
        for (name, (arm, other, note)), verdict in zip(pairs.items(), judged(gains), strict=True)
    }
    good = gains[-1].low > -MARGIN
    texts["adaptive"] += f"; at most {MARGIN:.0f} point worse" if good else "; off by default"
    return texts


def table(results: dict[str, Any]) -> str:
    """Accuracy by arm, its difference to MAE, and the conclusions."""
    others, machine = ("MAE", "MAE, averaged"), results["machine"]
    rows = [
        [
            row["arm"],
            "" if row["arm"] == "MAE" else f"{row['half_life']:.1f}",
            "{:.1f} [{:.1f}, {:.1f}]".format(*row["linear"]),
            *(markdown.signed(row[f"against {other}"]) for other in others),
        ]
        for row in results["rows"]
    ]
    return markdown.table(
        ["arm", "half-life in steps", "linear probe", *(f"against {other}" for other in others)],
        rows,
        f"{len(results['seeds'])} paired seeds, {results['steps']:,} steps; means with 95 % t intervals, "
        f"differences within a seed. {correction_note(len(results['verdicts']))} {machine['cpu']}, "
        f"{machine['precision']}.",
        verdict(results),
    )


def verdict(results: dict[str, Any]) -> str:
    """The conclusions as a list."""
    return markdown.bullets(f"{text}." for text in results["verdicts"].values())


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the accuracy over the half-life, with lines for MAE, MAE averaged and `adaptive`."""
    figure = Figure(figsize=(7, 3.6), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    by_name = {row["arm"]: row for row in rows}
    for network, color, shift in (("student", "#c2410c", 0.97), ("teacher", "#1d62b8", 1.03)):
        chosen = [by_name[f"RC-MAE {h}, {network}"] for h in HALF_LIVES]
        x = [float(h.rstrip("%")) * shift for h in HALF_LIVES]
        middle, low, high = zip(*(row["linear"][:3] for row in chosen), strict=True)
        spread = [
            [m - a for m, a in zip(middle, low, strict=True)],
            [b - m for m, b in zip(middle, high, strict=True)],
        ]
        axes.errorbar(
            x,
            middle,
            spread,
            color=color,
            marker="o",
            markersize=4,
            capsize=3,
            linewidth=1.4,
            label=f"RC-MAE, {network}",
        )
    for arm, color, style in (
        ("MAE", "#5d6670", "-"),
        ("MAE, averaged", "#5d6670", "--"),
        ("RC-MAE adaptive, teacher", "#1a7f4b", ":"),
    ):
        axes.axhline(
            by_name[arm]["linear"][0],
            color=color,
            linestyle=style,
            linewidth=1.3,
            label=arm.replace("RC-MAE adaptive, teacher", "RC-MAE adaptive"),
        )
    axes.set_xscale("log")
    axes.set_xticks([float(h.rstrip("%")) for h in HALF_LIVES], HALF_LIVES)
    axes.minorticks_off()
    axes.set_xlabel("half-life of the teacher, fraction of the run")
    axes.set_ylabel("linear probe accuracy, %")
    axes.grid(color="#e3e6e9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Make the missing runs, then write and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2, help="concurrent runs, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "half_life")
    args = parser.parse_args()
    jobs = [(args.out, name, seed, args.steps) for seed in range(args.seeds) for name in RUNS]
    with ProcessPoolExecutor(args.jobs, mp.get_context("spawn")) as pool:
        for job in [pool.submit(run, *job) for job in jobs]:
            job.result()
    arms, complete, machine = read(args.out, args.seeds)
    if len(complete) < 2:
        sys.exit(f"only {len(complete)} seeds are complete; run the same command again")
    rows, texts = summary(arms), verdicts(arms)
    results = {
        "rows": rows,
        "verdicts": texts,
        "seeds": complete,
        "steps": args.steps,
        "values": arms,
        "machine": machine,
    }
    write_json(ROOT / "results" / "half_life.json", results)
    draw(rows, ROOT / "docs" / "img" / "half_life.png")
    for row in rows:
        mean, low, high = row["linear"][:3]
        against = row["against MAE"][0]
        print(f"{row['arm']:24} {mean:5.1f} [{low:.1f} to {high:.1f}]  against MAE {against:+.1f}")
    print(*texts.values(), sep="\n")


if __name__ == "__main__":
    main()
