"""Kill a short job at random moments, run it again, and compare: `python -m benchmarks.kill [--kills 30] [--workers 0,2]`.

For each number of loader processes: one uninterrupted run, then kills with SIGKILL at a random time after the start, which
covers start-up, training and saving, each followed by the same command, in runs that are each taken to their end. The
SHA-256 of student, teacher and optimizer must be that of the uninterrupted run, for all numbers of loader processes. Exit
code 0 only if every one is.
"""

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from rcmae.engine.run import describe_machine

FLAGS = "--size 16 --width 32 --depth 2 --heads 2 --decoder-width 16 --decoder-depth 1 --batch-size 16 --probes 0"
FLAGS += " --device cpu --precision fp32"


def command(data: Path, out: Path, workers: int, steps: int) -> list[str]:
    flags = f"{FLAGS} --crop-scale 0.5 1.0 --flip --workers {workers} --threads 1 --steps {steps} --save-every 0.05s"
    return [sys.executable, "-m", "rcmae", "pretrain", "--data", str(data), "--out", str(out), *flags.split()]


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--workers", default="0,2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    pools = [int(w) for w in options.workers.split(",")]
    seen, kills, runs, found_at = set(), 0, 0, []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        noise = np.random.default_rng(0)
        for i in range(200):
            Image.fromarray(noise.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(data / f"{i}.png")
        for workers in pools:
            start = time.monotonic()
            subprocess.run(command(data, Path(folder) / f"whole{workers}", workers, options.steps), check=True, capture_output=True)
            whole = time.monotonic() - start
            seen.add(json.dumps(hashes(Path(folder) / f"whole{workers}")))
            print(f"uninterrupted, {workers} loader processes: {whole:.1f} s, {json.loads(max(seen))['student'][:16]}", flush=True)
            killed = 0
            while killed < options.kills // len(pools):
                out = Path(folder) / f"run{workers}_{runs}"
                runs += 1
                while True:  # one run, killed again and again until it is done
                    with subprocess.Popen(
                        command(data, out, workers, options.steps), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                    ) as process:
                        try:
                            process.wait(chance.uniform(0.05, 0.85) * whole if killed < options.kills // len(pools) else None)
                        except subprocess.TimeoutExpired:
                            process.send_signal(signal.SIGKILL)
                            process.wait()
                            killed += 1
                            saved = sorted(p.name for p in (out / "checkpoints").glob("step_*")) if out.exists() else []
                            found_at.append(int(saved[-1][5:]) if saved else -1)
                            continue
                        text = process.stdout.read().decode()
                    if process.returncode:
                        print(f"failed with {process.returncode}: {text[-500:]}")
                        return 1
                    break
                seen.add(json.dumps(hashes(out)))
                print(f"run {runs}: {killed} kills so far; {'equal' if len(seen) == 1 else 'NOT EQUAL'}", flush=True)
            kills += killed
    equal = len(seen) == 1
    steps = f"newest checkpoint then at step {min(found_at)} to {max(found_at)}; -1: none yet"
    print(f"{kills} kills ({steps}), {runs} runs, {len(seen)} different results")
    for name, value in json.loads(max(seen)).items():
        print(f"{name} {value}")
    if options.out:
        options.out.write_text(
            json.dumps(
                {
                    "kills": kills,
                    "runs": runs,
                    "equal": equal,
                    "steps": options.steps,
                    "workers": pools,
                    "at": found_at,
                    "hashes": json.loads(max(seen)),
                    "machine": describe_machine(torch.device("cpu"), "fp32"),
                },
                indent=1,
            )
            + "\n"
        )
    return int(not equal)


if __name__ == "__main__":
    sys.exit(main())
