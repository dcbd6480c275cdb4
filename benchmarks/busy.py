"""How fast is a run alone and beside a busy process, by how OpenMP's threads wait? `python -m benchmarks.busy
[--rounds 5] [--steps 40] [--out FILE]`.

Every round trains the bundled recipe once for each policy, alone and beside a process that occupies one core.
OpenMP's threads spin at the end of every parallel region until the others are there; with "passive" they
sleep at once. By default, `rcmae` chooses by the load at its start (`engine.neighbors`).
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import markdown
from rcmae.engine.metrics import read_metrics
from rcmae.engine.run import describe_machine

OPENMP = "spinning (OpenMP's default)"
POLICIES = ("by load (rcmae's default)", OPENMP, "sleeping (passive)")
NEIGHBORS = {"alone": False, "beside one busy process": True}


@contextlib.contextmanager
def busy_process(wanted: bool) -> Iterator[None]:
    """A process that occupies one core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def images_per_s(policy: str, steps: int, folder: Path) -> float:
    """Speed of the second half of a run without probes."""
    # Only the module's main chooses a policy.
    program = ["-c", "import rcmae.cli; rcmae.cli.main()"] if policy == OPENMP else ["-m", "rcmae"]
    command = [sys.executable, *program, "pretrain", "--out", str(folder), "--steps", str(steps)]
    command += ["--probes", "0", "--log-every", str(steps // 2), "--save-every", "1h"]
    unset = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    variables = {k: v for k, v in os.environ.items() if k not in unset}
    if policy == POLICIES[-1]:
        variables["OMP_WAIT_POLICY"] = "passive"
    subprocess.run(command, env=variables, check=True, capture_output=True)
    return [line["images_per_s"] for line in read_metrics(folder) if line["kind"] == "train"][-1]


def table(results: dict[str, Any]) -> str:
    """Median and range for each policy, and the ratio to OpenMP's default in the same round."""
    speeds, rows = results["images_per_s"], []
    for policy in speeds["alone"]:
        row = [policy]
        for neighbor in NEIGHBORS:
            values, default = speeds[neighbor][policy], speeds[neighbor][OPENMP]
            ratio = statistics.median(v / d for v, d in zip(values, default, strict=True))
            row.append(f"{statistics.median(values):.0f} [{min(values):.0f}-{max(values):.0f}], {ratio:.2f}x")
        rows.append(row)
    machine = results["machine"]
    note = f"images/s: median and range of {results['rounds']} interleaved rounds, and the median ratio to"
    note += f" spinning; {machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}."
    return markdown.table(["waiting threads", *NEIGHBORS], rows, note)


def main() -> None:
    """Run all rounds and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    machine = describe_machine(torch.device("cpu"), "auto")
    speeds: dict[str, dict[str, list[float]]] = {n: {p: [] for p in POLICIES} for n in NEIGHBORS}
    results = {"images_per_s": speeds, "rounds": 0, "steps": options.steps, "machine": machine}
    for number in range(1, options.rounds + 1):
        with tempfile.TemporaryDirectory() as temporary:
            for neighbor, wanted in NEIGHBORS.items():
                first = number % len(POLICIES)  # each comes first at times
                for policy in POLICIES[first:] + POLICIES[:first]:
                    with busy_process(wanted):
                        folder = Path(temporary) / f"{neighbor}-{policy[:8]}"
                        speed = images_per_s(policy, options.steps, folder)
                    speeds[neighbor][policy].append(speed)
                    print(f"round {number}, {neighbor}, {policy}: {speed:.0f} images/s", flush=True)
        results["rounds"] = number
        if options.out:
            options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
