"""Does the teacher help on the embedded set, and how long should it remember? `python -m benchmarks.half_life`.

Paired seeds: within a seed every arm has the same initial weights, images, crops and masks. Arms: MAE; MAE whose weights are
averaged for evaluation only (the teacher of a run with gamma 0, which is MAE to the bit); RC-MAE at five half-lives and `auto`.
Runs lie under --out and are never made twice: the same command goes on where it stopped. Writes results/half_life.json and
docs/img/half_life.png from all seeds that are complete.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from rcmae.engine.metrics import read_metrics
from rcmae.engine.run import write_json

ROOT = Path(__file__).parent.parent
HALF_LIVES = ("0.15%", "0.5%", "1.5%", "5%", "15%")
RUNS = {"gamma 0": ["--gamma", "0"], **{h: ["--half-life", h] for h in HALF_LIVES}, "auto": ["--half-life", "auto"]}


def run(out: Path, name: str, seed: int, steps: int) -> None:
    """One run on one thread; a finished one is left alone."""
    place = out / f"{name.replace(' ', '-').rstrip('%')}-{seed}"
    command = [sys.executable, "-m", "rcmae", "pretrain", "embedded", "--steps", str(steps), "--seed", str(seed), *RUNS[name]]
    command += ["--probes", "2", "--probe-train", "4000", "--probe-test", "4000", "--threads", "1", "--out", str(place)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, cwd=ROOT)
    print(f"{place.name}: {'done' if done.returncode == 0 else done.stderr.strip()}", flush=True)


def read(out: Path, seeds: int, steps: int) -> tuple[dict[str, list[dict]], list[int], dict]:
    """Scores by arm and seed, of the seeds all of whose runs are finished."""
    arms: dict[str, list[dict]] = {}
    whole, machine = [], {}
    for seed in range(seeds):
        found = {}
        for name in RUNS:
            place = out / f"{name.replace(' ', '-').rstrip('%')}-{seed}"
            lines = read_metrics(place)
            machine = json.loads((place / "machine.json").read_text()) if (place / "machine.json").exists() else machine
            train = [line for line in lines if line["kind"] == "train"]
            if not train or train[-1]["step"] < steps:
                break
            probe = [line for line in lines if line["kind"] == "probe"][-1]
            tail = train[-len(train) // 20 :]
            facts = {"reconstruction": float(np.mean([line["reconstruction"] for line in tail])), "half_life": tail[-1]["half_life_steps"]}
            floor = next(line for line in lines if line["kind"] == "floor")["untrained"]["linear"]
            for who in ("student", "teacher"):
                arm = ("MAE" if who == "student" else "MAE, averaged") if name == "gamma 0" else f"RC-MAE {name}, {who}"
                found[arm] = {k: probe[who][k] for k in ("linear", "knn")} | facts | {"untrained": floor}
        else:
            whole.append(seed)
            for arm, facts in found.items():
                arms.setdefault(arm, []).append(facts)
    return arms, whole, machine


def interval(values: list[float]) -> list[float]:
    """Mean and 95 % t interval."""
    mean = float(np.mean(values))
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else float("nan")
    return [mean, mean - half, mean + half]


def summary(arms: dict[str, list[dict]]) -> list[dict]:
    """A row an arm: accuracy, and its paired difference to MAE and to MAE averaged."""
    rows = []
    for arm, found in arms.items():
        row = {"arm": arm, "linear": interval([f["linear"] for f in found]), "knn": interval([f["knn"] for f in found])}
        row["reconstruction"] = float(np.mean([f["reconstruction"] for f in found]))
        row["half_life"] = float(np.mean([f["half_life"] for f in found]))
        for other in ("MAE", "MAE, averaged"):
            row[f"against {other}"] = interval([f["linear"] - g["linear"] for f, g in zip(found, arms[other], strict=True)])
        rows.append(row)
    return rows


def verdicts(arms: dict[str, list[dict]]) -> dict[str, str]:
    """The sentences that the numbers support; "no difference" where an interval holds zero."""
    teachers = {a: f for a, f in arms.items() if a.endswith("teacher")}
    fixed = {a: f for a, f in teachers.items() if "auto" not in a}
    best = max(fixed, key=lambda a: np.mean([f["linear"] for f in fixed[a]]))
    said = {"best": best}
    pairs = {"against MAE": (best, "MAE"), "against averaging": (best, "MAE, averaged"), "auto": ("RC-MAE auto, teacher", best)}
    for name, (one, other) in pairs.items():
        mean, low, high = interval([a["linear"] - b["linear"] for a, b in zip(arms[one], arms[other], strict=True)])
        word = "no difference that this can tell" if low <= 0 <= high else "better" if mean > 0 else "worse"
        said[name] = f"{one} against {other}: {word} ({mean:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f})"
    return said


def draw(rows: list[dict], path: Path) -> None:
    """Accuracy of the teacher over the half-life, with MAE and MAE averaged as bands."""
    figure = Figure(figsize=(7, 3.6), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    by_name = {row["arm"]: row for row in rows}
    for who, colour, shift in (("student", "#c2410c", 0.97), ("teacher", "#1d62b8", 1.03)):
        chosen = [by_name[f"RC-MAE {h}, {who}"] for h in HALF_LIVES]
        x = [float(h.rstrip("%")) * shift for h in HALF_LIVES]
        middle, low, high = zip(*(row["linear"] for row in chosen), strict=True)
        spread = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
        axes.errorbar(x, middle, spread, color=colour, marker="o", markersize=4, capsize=3, linewidth=1.4, label=f"RC-MAE, {who}")
    for arm, colour, style in (("MAE", "#5d6670", "-"), ("MAE, averaged", "#5d6670", "--"), ("RC-MAE auto, teacher", "#1a7f4b", ":")):
        axes.axhline(
            by_name[arm]["linear"][0],
            color=colour,
            linestyle=style,
            linewidth=1.3,
            label=arm.replace("RC-MAE auto, teacher", "RC-MAE auto"),
        )
    axes.set_xscale("log")
    axes.set_xticks([float(h.rstrip("%")) for h in HALF_LIVES], HALF_LIVES)
    axes.minorticks_off()
    axes.set_xlabel("half-life of the teacher, share of the run")
    axes.set_ylabel("linear probe, % right")
    axes.grid(color="#e3e6e9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Make the runs that are missing, then write and print what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "half_life")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: run(args.out, *job, args.steps), [(name, seed) for seed in range(args.seeds) for name in RUNS]))
    arms, whole, machine = read(args.out, args.seeds, args.steps)
    if len(whole) < 2:
        sys.exit(f"only {len(whole)} seeds are complete; run the same command again")
    rows, said = summary(arms), verdicts(arms)
    facts = {"rows": rows, "verdicts": said, "seeds": whole, "steps": args.steps, "values": arms, "machine": machine}
    write_json(ROOT / "results" / "half_life.json", facts)
    draw(rows, ROOT / "docs" / "img" / "half_life.png")
    for row in rows:
        (mean, low, high), gain = row["linear"], row["against MAE"][0]
        print(f"{row['arm']:24} {mean:5.1f} [{low:.1f} to {high:.1f}]  against MAE {gain:+.1f}")
    print(*said.values(), sep="\n")


if __name__ == "__main__":
    main()
