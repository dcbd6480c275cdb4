"""Kill a short job at random moments, run it again, and compare: `python -m benchmarks.kill [--kills 30]
[--workers 0,2] [--out FILE]`.

For each number of loader processes one run is not interrupted. Then runs are killed with SIGKILL at random
times after the start, which covers start-up, training and saving, and resumed by the same command until they
are finished. The SHA-256 of student, teacher and optimizer must equal those of the uninterrupted run, for all
numbers of loader processes. Exit code 0 only if all do.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from rcmae.engine.run import describe_machine

FLAGS = (
    "--size 16 --width 32 --depth 2 --heads 2 --decoder-width 16 --decoder-depth 1 --batch-size 16 "
    "--crop-scale 0.5 1.0 --flip --probes 0 --device cpu --precision fp32 --threads 1 --save-every 0.05s"
)


def command(data: Path, out: Path, workers: int, steps: int) -> list[str]:
    flags = f"{FLAGS} --workers {workers} --steps {steps}".split()
    return [sys.executable, "-m", "rcmae", "pretrain", "--data", str(data), "--out", str(out), *flags]


def noise_images(folder: Path) -> Path:
    """200 small images of noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(200):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def last_step(out: Path) -> int:
    """The step of the newest checkpoint; -1 without one."""
    return max((int(path.name[5:]) for path in (out / "checkpoints").glob("step_*")), default=-1)


def hashes(out: Path) -> dict[str, str]:
    """SHA-256 of the tensors of student, teacher and optimizer in the newest checkpoint."""
    folder = sorted((out / "checkpoints").glob("step_*"))[-1]
    digests = {k: hashlib.sha256() for k in ("student", "teacher", "optimizer")}
    for file in ("model", "optimizer"):
        with safe_open(folder / f"{file}.safetensors", "np") as f:
            for name in sorted(f.keys()):
                part = name.split(".")[0] if file == "model" else "optimizer"
                digests[part].update(name.encode() + f.get_tensor(name).tobytes())
    return {k: d.hexdigest() for k, d in digests.items()}


def run_with_kills(argv: list[str], out: Path, delays: Iterator[float]) -> list[int]:
    """Start the command, kill it after each delay and start it again, until it ends; returns the newest
    checkpoint's step at each kill. Without further delays it may finish. Raises SystemExit when it fails."""
    steps: list[int] = []
    while True:
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            try:
                output, _ = process.communicate(timeout=next(delays, None))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                steps.append(last_step(out))
                continue
        if process.returncode:
            raise SystemExit(f"failed with {process.returncode}: {output.decode()[-500:]}")
        return steps


def main() -> int:
    """Run, kill, compare, and print the hashes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--workers", default="0,2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    workers = [int(number) for number in options.workers.split(",")]
    states: set[str] = set()
    checkpoints: list[int] = []
    runs = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = noise_images(folder / "data")
        for number in workers:
            start, out = time.monotonic(), folder / f"uninterrupted{number}"
            subprocess.run(command(data, out, number, options.steps), check=True, capture_output=True)
            duration = time.monotonic() - start
            states.add(json.dumps(hashes(out)))
            student = json.loads(max(states))["student"][:16]
            print(f"uninterrupted, {number} loader processes: {duration:.1f} s, {student}", flush=True)
            kills, wanted = 0, options.kills // len(workers)
            while kills < wanted:
                out = folder / f"run{number}_{runs}"
                runs += 1
                delays = (rng.uniform(0.05, 0.85) * duration for _ in range(wanted - kills))
                steps = run_with_kills(command(data, out, number, options.steps), out, delays)
                kills += len(steps)
                checkpoints += steps
                states.add(json.dumps(hashes(out)))
                verdict = "equal" if len(states) == 1 else "NOT EQUAL"
                print(f"run {runs}: {kills} kills so far; {verdict}", flush=True)
    equal = len(states) == 1
    print(
        f"{len(checkpoints)} kills (newest checkpoint then at step {min(checkpoints)} to {max(checkpoints)}; "
        f"-1: none yet), {runs} runs, {len(states)} different results"
    )
    digests = json.loads(max(states))
    for name, value in digests.items():
        print(f"{name} {value}")
    if options.out:
        results = {
            "kills": len(checkpoints),
            "runs": runs,
            "equal": equal,
            "steps": options.steps,
            "workers": workers,
            "checkpoints": checkpoints,
            "hashes": digests,
            "machine": describe_machine(torch.device("cpu"), "fp32"),
        }
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
