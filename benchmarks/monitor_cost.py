"""What the monitor costs: `python -m benchmarks.monitor_cost [--sizes embedded,ti] [--pairs 40] [--out FILE]`.

One real run of the loop a size, of the embedded recipe's length (2,000 steps), in which the monitor is put in and taken out in
alternating blocks of a few steps; a pair of neighbouring blocks gives one ratio of times. A log line comes every 2 steps there, and
its share is that of the 20 steps for which it stands in such a run. The slow instruments come too seldom for that: they are timed by
themselves, on the same run, and counted as often as they come in a run.

Expected, before the first measurement: a log line's instruments cost about 6 ms, 1 % or less of the steps it stands for; full
gradients and health 0.4 %, LiDAR 0.3 % at 1,500 steps: below 2 % in all, and less in longer runs.
Exit code 0 only if every size stays at or below 2 % in runs of 1,000 steps and more, with the larger of the two figures for the log lines.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import rcmae.pretraining as pretraining
from benchmarks.alarms import broken
from rcmae.config import Machine, Recipe
from rcmae.engine.run import describe_machine
from rcmae.errors import Preempted
from rcmae.lab.monitor import LIDAR_EVERY, Monitor, cadence
from rcmae.lab.watch import Watch
from rcmae.methods.recipes import load_recipe
from rcmae.models.autoencoder import AutoencoderNetwork

BOUND = 0.02
MILESTONES = 6
"Pictures of a run."

LOG_EVERY = 2
"Steps between two log lines while it is measured: more often than in any run, so that there is something to measure."

TIMED = 5
"Times that a slow instrument is timed."


def recipe_of(size: str) -> tuple[Recipe, int]:
    """The recipe, and how many images of the embedded set are drawn for it."""
    recipe = load_recipe("embedded")
    recipe = replace(recipe, probe=replace(recipe.probe, probes=0))
    if size == "embedded":
        return recipe, 4096
    network, images = AutoencoderNetwork(model="vit_tiny_patch16"), replace(recipe.images, size=224)
    return replace(recipe, network=network, images=images, optim=replace(recipe.optim, batch_size=64)), 128


class Clock:
    """Sees every step of a run begin: puts the monitor in and out, and ends the run when all blocks are made."""

    def __init__(self, pairs: int, log_every: int):
        self.steps, self.pairs = 2 * log_every, pairs
        self.begins: list[float] = []
        self.line: list[float] = []
        self.slow: dict[str, list[float]] = {}
        self.watch: Watch | None = None

    def on(self, block: int) -> bool:
        """In the order on, off, off, on: what drifts evenly cancels."""
        return block % 4 in (0, 3)

    def around_update(self, old: Any) -> Any:
        def update(run, t):
            self.watch = self.watch or run.watch
            block, within = divmod(len(self.begins) - self.steps, self.steps)  # a block to get warm
            wait(run.device)
            self.begins.append(time.perf_counter())
            if block == 2 * self.pairs:
                signal.raise_signal(signal.SIGTERM)  # the end of the measurement
                run.watch = self.watch
                self.time_slow(run, t)
            elif within == 0:
                run.watch = self.watch if self.on(block) else None
            return old(run, t)

        return update

    def timed(self, old: Any) -> Any:
        """Adds up the time of a part of a log line's instruments."""

        def part(*args, **options):
            start = time.perf_counter()
            result = old(*args, **options)
            self.line.append(time.perf_counter() - start)
            return result

        return part

    def time_slow(self, run: Any, t: Any) -> None:
        self.watch.monitor.features = torch.randn(2048, run.method.student.encoder.width, device=run.device)  # the ring at its fullest
        parts = {
            "gradients and health": lambda: self.watch.alarms.at_health(t, self.watch.monitor.slow(), self.watch.monitor),
            "LiDAR": lambda: self.watch.monitor.lidar(run.fixed),
        }
        for name, part in parts.items():
            for _ in range(TIMED):
                wait(run.device)
                start = time.perf_counter()
                part()
                wait(run.device)
                self.slow.setdefault(name, []).append(time.perf_counter() - start)

    def blocks(self) -> list[float]:
        """Seconds of each block: from the beginning of its first step to that of the next block's, its log lines included."""
        marks = self.begins[self.steps :: self.steps]
        return [b - a for a, b in itertools.pairwise(marks)]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(size: str, pairs: int, machine: Machine) -> dict[str, Any]:
    """One run, until its blocks are made."""
    recipe, images = recipe_of(size)
    total = recipe.steps
    log_every = pretraining.usual_log_every(total)
    clock = Clock(pairs, LOG_EVERY)

    def few(old):
        return lambda self, split="train", count=images, size=32, seed=0: old(self, split, min(count, images), size, seed)

    with (
        broken("rcmae.data.digits:DigitsSource.__init__", few),
        broken("rcmae.pretraining:Pretraining.update", clock.around_update),
        broken("rcmae.lab.monitor:Monitor.due", lambda old: lambda self, step, log_every: False),
        broken("rcmae.lab.monitor:Monitor.look", clock.timed),
        broken("rcmae.lab.monitor:Monitor.read", clock.timed),
        broken("rcmae.lab.alarms:Alarms.at_log", clock.timed),
    ):
        try:
            pretraining.pretrain(recipe, machine)
        except Preempted:
            if not clock.slow:  # a true signal
                raise
    return summary(clock, size, recipe, log_every)


def summary(clock: Clock, size: str, recipe: Recipe, log_every: int) -> dict[str, Any]:
    blocks = clock.blocks()
    pairs = [blocks[k : k + 2] if clock.on(k) else blocks[k : k + 2][::-1] for k in range(0, len(blocks), 2)]
    ratios = [on / off for on, off in pairs]
    step = statistics.median(off for _, off in pairs) / clock.steps
    line = statistics.median(map(sum, zip(*[iter(clock.line)] * 3, strict=False)))  # look, read and at_log
    ratios = [1 + (ratio - 1) * LOG_EVERY / log_every for ratio in ratios]
    shares = {"log lines, paired blocks": statistics.median(ratios) - 1, "log lines, timed": line / (log_every * step)}
    for name, seconds in clock.slow.items():
        shares[name] = statistics.median(seconds) * times(name, recipe.steps, log_every) / (recipe.steps * step)
    slow = sum(shares[name] for name in clock.slow)
    cost = max(shares["log lines, paired blocks"], shares["log lines, timed"]) + slow
    draws = np.random.Generator(np.random.Philox(key=0)).integers(len(ratios), size=(2000, len(ratios)))
    low, high = np.percentile(np.median(np.array(ratios)[draws], 1), [2.5, 97.5]) - 1
    return {
        "size": size, "steps": recipe.steps, "batch": recipe.optim.batch_size, "step_seconds": step, "line_seconds": line,
        "slow_seconds": {k: statistics.median(v) for k, v in clock.slow.items()}, "shares": shares, "interval": [low, high],
        "quartiles": [q - 1 for q in statistics.quantiles(ratios, n=4)], "pairs": len(ratios), "cost": cost,
        "by_length": {n: by_length(n, line, step, clock.slow) for n in (300, 1000, 2000, 20_000)},
    }  # fmt: skip


def times(name: str, total: int, log_every: int) -> int:
    """How often a slow instrument comes in a run, asked of the instrument itself."""
    monitor = SimpleNamespace(total=total, every=cadence(total))
    if name == "LiDAR":
        return sum(Monitor.due(monitor, step, total // MILESTONES, LIDAR_EVERY) for step in pretraining.spread(total, MILESTONES))
    return sum(Monitor.due(monitor, step, log_every) for step in range(1, total + 1) if step % log_every == 0 or step == total)


def by_length(total: int, line: float, step: float, slow: dict[str, list[float]]) -> float:
    """The share of the time in a run of another length, from the timed parts."""
    log_every = pretraining.usual_log_every(total)
    return (line / log_every + sum(statistics.median(v) * times(k, total, log_every) for k, v in slow.items()) / total) / step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="embedded,ti")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    load, rows = os.getloadavg()[0], []
    for size in options.sizes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            machine = Machine(
                out=Path(folder) / "run", device=options.device, threads=options.threads, save_every="1h", workers=0, log_every=LOG_EVERY
            )
            rows.append(row := measure(size, options.pairs if size == "embedded" else max(4, options.pairs // 4), machine))
        print(f"{size}: a step takes {1000 * row['step_seconds']:.0f} ms, a log line's instruments {1000 * row['line_seconds']:.1f} ms")
        for name, share in row["shares"].items():
            print(f"  {name}: {share:.2%} of the time")
        (low, high), (q1, _, q3) = row["interval"], row["quartiles"]
        print(f"  paired blocks: 95 % interval of the median {low:.2%} to {high:.2%}, quartiles {q1:.2%} to {q3:.2%}, {row['pairs']} pairs")
        print(f"  in all, at {row['steps']:,} steps: {row['cost']:.2%} (bound {BOUND:.0%}); " + "from the timed parts, ", end="")
        print(", ".join(f"{n:,} steps {share:.2%}" for n, share in row["by_length"].items()), flush=True)
    if options.out:
        device = pretraining.distributed.pick_device(options.device)
        about = describe_machine(device, pretraining.distributed.pick_precision("auto", device)) | {"load_before": load}
        options.out.write_text(json.dumps({"machine": about, "bound": BOUND, "rows": rows}, indent=1) + "\n")
    return int(any(share > BOUND for row in rows for share in (row["cost"], *(v for n, v in row["by_length"].items() if n >= 1000))))


if __name__ == "__main__":
    sys.exit(main())
