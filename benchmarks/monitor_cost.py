"""The cost of the monitor: `python -m benchmarks.monitor_cost [--sizes bundled,ti] [--pairs 40] [--out
FILE]`.

For each size one real training run of the bundled recipe's length (2,000 steps), with the monitor turned on
and off in alternating blocks of a few steps; each pair of neighboring blocks gives one ratio of times. Log
lines come every 2 steps in this run; the cost is scaled to the usual interval of 20 steps. The slow
diagnostics are too rare for this: they are timed separately, in the same run, and weighted by how often they
occur.

Expected before the first measurement: a log line's diagnostics cost about 6 ms, 1 % or less of the steps
between two lines; full gradients and health 0.4 %, LiDAR 0.3 % at 1,500 steps: below 2 % in total, and less
in longer runs. Exit code 0 only if the cost is at most 2 % for every size in runs of 1,000 steps and more,
with the larger of the two estimates for log lines.
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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from benchmarks import markdown
from benchmarks.alarms import patched
from rcmae.config import Recipe, RuntimeConfig
from rcmae.engine.distributed import pick_device, pick_precision
from rcmae.engine.run import describe_machine
from rcmae.engine.schedules import Progress, default_log_every, spread
from rcmae.errors import Preempted
from rcmae.lab.monitor import LIDAR_EVERY, Monitor, cadence
from rcmae.lab.recorder import Recorder
from rcmae.methods.recipes import load_recipe
from rcmae.models.autoencoder import AutoencoderNetwork
from rcmae.pretraining import pretrain

BOUND = 0.02
MILESTONES = 6
"Snapshots per run."

LOG_EVERY = 2
"Steps between two log lines during the measurement: far more lines than usual, to make the cost visible."

TIMED = 5
"Repetitions of a slow diagnostic."


def recipe_of(size: str) -> tuple[Recipe, int]:
    """The recipe, and the number of bundled images to draw for it."""
    recipe = load_recipe("bundled")
    recipe = replace(recipe, probe=replace(recipe.probe, probes=0))
    if size == "bundled":
        return recipe, 4096
    network, images = AutoencoderNetwork(model="vit_tiny_patch16"), replace(recipe.images, size=224)
    return replace(recipe, network=network, images=images, optim=replace(recipe.optim, batch_size=64)), 128


class Clock:
    """Records when each step begins, turns the monitor on and off, and ends the run after all blocks."""

    def __init__(self, pairs: int, log_every: int):
        self.steps, self.pairs = 2 * log_every, pairs
        self.begins: list[float] = []
        self.line: list[float] = []
        self.slow: dict[str, list[float]] = {}
        self.recorder: Recorder | None = None

    def on(self, block: int) -> bool:
        """Whether the monitor is on: in the order on, off, off, on, so that a linear drift cancels."""
        return block % 4 in (0, 3)

    def around_update(self, old: Any) -> Any:
        def update(run, t):
            self.recorder = self.recorder or run.recorder
            block, within = divmod(len(self.begins) - self.steps, self.steps)  # the first block warms up
            wait(run.device)
            self.begins.append(time.perf_counter())
            if block == 2 * self.pairs:
                signal.raise_signal(signal.SIGTERM)  # the end of the measurement
                run.recorder = self.recorder
                self.time_slow(run, t)
            elif within == 0:
                run.recorder = self.recorder if self.on(block) else None
            return old(run, t)

        return update

    def timed(self, old: Any) -> Any:
        """Record the time of a part of a log line's diagnostics."""

        def part(*args, **options):
            start = time.perf_counter()
            result = old(*args, **options)
            self.line.append(time.perf_counter() - start)
            return result

        return part

    def time_slow(self, run: Any, t: Progress) -> None:
        """Time the slow diagnostics, with the buffer of features full."""
        assert self.recorder is not None
        monitor, alarms = self.recorder.monitor, self.recorder.alarms
        monitor.features = torch.randn(2048, run.method.student.encoder.width, device=run.device)
        diagnostics: dict[str, Callable[[], object]] = {
            "gradients and health": lambda: alarms.at_health(t, monitor.slow(), monitor),
            "LiDAR": lambda: monitor.lidar(run.fixed),
        }
        for name, diagnose in diagnostics.items():
            for _ in range(TIMED):
                wait(run.device)
                start = time.perf_counter()
                diagnose()
                wait(run.device)
                self.slow.setdefault(name, []).append(time.perf_counter() - start)

    def blocks(self) -> list[float]:
        """Seconds of each block: from its first step to that of the next block, with its log lines."""
        marks = self.begins[self.steps :: self.steps]
        return [b - a for a, b in itertools.pairwise(marks)]


def wait(device: torch.device) -> None:
    """Wait for the device to finish its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(size: str, pairs: int, runtime: RuntimeConfig) -> dict[str, Any]:
    """Train until all blocks are measured."""
    recipe, images = recipe_of(size)
    total = recipe.steps
    assert total is not None
    clock = Clock(pairs, LOG_EVERY)

    def fewer_images(old: Any) -> Any:
        def init(self, split="train", count=images, size=32, seed=0):
            old(self, split, min(count, images), size, seed)

        return init

    with (
        patched("rcmae.data.digits:DigitsSource.__init__", fewer_images),
        patched("rcmae.pretraining:Pretraining.update", clock.around_update),
        patched("rcmae.lab.monitor:Monitor.due", lambda old: lambda self, step, log_every: False),
        patched("rcmae.lab.monitor:Monitor.start", clock.timed),
        patched("rcmae.lab.monitor:Monitor.finish", clock.timed),
        patched("rcmae.lab.alarms:Alarms.at_log", clock.timed),
    ):
        try:
            pretrain(recipe, runtime)
        except Preempted:
            if not clock.slow:  # a real signal, not the one that ends the measurement
                raise
    facts = {"size": size, "steps": total, "batch": recipe.optim.batch_size}
    return facts | summary(clock, total, default_log_every(total))


def summary(clock: Clock, total: int, log_every: int) -> dict[str, Any]:
    """Times, and the monitor's fraction of a run of `total` steps."""
    blocks = clock.blocks()
    pairs = [blocks[k : k + 2] if clock.on(k) else blocks[k : k + 2][::-1] for k in range(0, len(blocks), 2)]
    step = statistics.median(off for _, off in pairs) / clock.steps
    line = statistics.median(map(sum, zip(*[iter(clock.line)] * 3, strict=False)))  # three patched functions
    ratios = [1 + (on / off - 1) * LOG_EVERY / log_every for on, off in pairs]
    slow = {
        name: statistics.median(seconds) * occurrences(name, total, log_every) / (total * step)
        for name, seconds in clock.slow.items()
    }
    paired, timed = statistics.median(ratios) - 1, line / (log_every * step)
    draws = np.random.Generator(np.random.Philox(key=0)).integers(len(ratios), size=(2000, len(ratios)))
    low, high = np.percentile(np.median(np.array(ratios)[draws], 1), [2.5, 97.5]) - 1
    return {
        "step_seconds": step,
        "line_seconds": line,
        "slow_seconds": {name: statistics.median(seconds) for name, seconds in clock.slow.items()},
        "fractions": {"log lines, paired blocks": paired, "log lines, timed": timed, **slow},
        "interval": [low, high],
        "quartiles": [q - 1 for q in statistics.quantiles(ratios, n=4)],
        "pairs": len(ratios),
        "cost": max(paired, timed) + sum(slow.values()),
        "by_length": {n: by_length(n, line, step, clock.slow) for n in (300, 1000, 2000, 20_000)},
    }


def occurrences(name: str, total: int, log_every: int) -> int:
    """How often a slow diagnostic occurs in a run, by the monitor's own rule."""
    monitor = cast(Monitor, SimpleNamespace(total=total, every=cadence(total)))
    if name == "LiDAR":
        milestones = spread(total, MILESTONES)
        return sum(Monitor.due(monitor, step, total // MILESTONES, LIDAR_EVERY) for step in milestones)
    return sum(
        Monitor.due(monitor, step, log_every)
        for step in range(1, total + 1)
        if step % log_every == 0 or step == total
    )


def by_length(total: int, line: float, step: float, slow: dict[str, list[float]]) -> float:
    """The monitor's fraction of the time in a run of another length, from the timed parts."""
    log_every = default_log_every(total)
    seconds = sum(statistics.median(v) * occurrences(k, total, log_every) for k, v in slow.items())
    return (line / log_every + seconds / total) / step


def table(results: dict[str, Any]) -> str:
    """The monitor's fraction of the time, by part and by length of the run."""
    rows, lengths = [], list(results["rows"][0]["by_length"])
    for row in results["rows"]:
        parts, (low, high) = row["fractions"], row["interval"]
        fractions = [parts["gradients and health"], parts["LiDAR"], row["cost"]]
        fractions += [row["by_length"][n] for n in lengths]
        lines = f"{parts['log lines, paired blocks']:.1%} [{low:.1%}, {high:.1%}]"
        step = f"{1000 * row['step_seconds']:.0f} ms"
        rows.append([row["size"], step, lines, *(f"{fraction:.1%}" for fraction in fractions)])
    head = ["model", "time per step", "log lines", "gradients and health", "LiDAR", "total"]
    return markdown.table(
        [*head, *(f"{int(n):,} steps" for n in lengths)],
        rows,
        f"A run of {results['rows'][0]['steps']:,} steps; log lines: paired blocks with and without the "
        "monitor in one run, with a 95 % interval; other lengths: from the timed parts.",
    )


def main() -> int:
    """Measure, print and write all sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="bundled,ti")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    load, rows = os.getloadavg()[0], []
    for size in options.sizes.split(","):
        pairs = options.pairs if size == "bundled" else max(4, options.pairs // 4)
        with tempfile.TemporaryDirectory() as folder:
            runtime = RuntimeConfig(
                out=Path(folder) / "run",
                device=options.device,
                threads=options.threads,
                save_every="1h",
                workers=0,
                log_every=LOG_EVERY,
            )
            row = measure(size, pairs, runtime)
        rows.append(row)
        print(
            f"{size}: a step takes {1000 * row['step_seconds']:.0f} ms, a log line's diagnostics "
            f"{1000 * row['line_seconds']:.1f} ms"
        )
        for name, fraction in row["fractions"].items():
            print(f"  {name}: {fraction:.2%} of the time")
        (low, high), (q1, _, q3) = row["interval"], row["quartiles"]
        print(
            f"  paired blocks: 95 % interval of the median {low:.2%} to {high:.2%}, quartiles {q1:.2%} to "
            f"{q3:.2%}, {row['pairs']} pairs"
        )
        lengths = ", ".join(f"{n:,} steps {fraction:.2%}" for n, fraction in row["by_length"].items())
        print(
            f"  total at {row['steps']:,} steps: {row['cost']:.2%} (bound {BOUND:.0%}); from the timed "
            f"parts, {lengths}",
            flush=True,
        )
    if options.out:
        device = pick_device(options.device)
        machine = describe_machine(device, pick_precision("auto", device)) | {"load_before": load}
        results = {"machine": machine, "bound": BOUND, "rows": rows}
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    fractions = [row["cost"] for row in rows]
    fractions += [fraction for row in rows for n, fraction in row["by_length"].items() if n >= 1000]
    return int(max(fractions) > BOUND)


if __name__ == "__main__":
    sys.exit(main())
