"""How fast do commands react to SIGINT and SIGTERM, sent after 0.5, 2, 5, 10 and 20 seconds? Measures the
seconds until a command responds on the screen, and until it ends.

    python -m benchmarks.signals [PHOTOGRAPHS] [--only WORD]      # writes results/signals.json

PHOTOGRAPHS contains train/ and val/ with a folder for each class; by default, 40 photographs of 12 megapixels
are generated. Also measured: the time to the first line of each command, and its longest silence in 45
seconds. Exit code 1 if a bound is exceeded.
"""

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image

from benchmarks import ROOT
from rcmae.engine.run import describe_machine, write_json

DELAYS = (0.5, 2.0, 5.0, 10.0, 20.0)
OBSERVED = 45.0
"Seconds over which the longest silence of a command is measured."
BOUNDS = {"response": 1.0, "end": 5.0}
"In seconds."
TINY = "scratch:timm:vit_tiny_patch16_224"

LABELED = "--data {photos} --out {out} --feature-cache {out}/cache"

COMMANDS = {
    "pretrain": "pretrain folder --data {photos}/train --batch-size 16 --steps 1000 --out {out}",
    "pretrain --time": "pretrain folder --data {photos}/train --batch-size 16 --time 1h --out {out}",
    "check": "check {photos}/train --val {photos}/val --batch-size 16",
    "evaluate knn": f"evaluate knn {TINY} {LABELED}",
    "evaluate linear": f"evaluate linear {TINY} {LABELED}",
    "evaluate attentive": f"evaluate attentive {TINY} {LABELED}",
    "evaluate finetune": f"evaluate finetune {TINY} {LABELED}",
    "evaluate robustness": f"evaluate robustness {TINY} {LABELED}",
    "evaluate worth-it": f"evaluate worth-it {TINY} --percents 100 {LABELED}",
    "lab linear": "lab linear --out {out}",
    "lab gradients": "lab gradients bundled --out {out}",
    "verify": "verify rcmae",
    "compare cost": "compare cost --out {out}",
    "compare race": "compare race mae rcmae --data {photos}/train --budget 1h --out {out} "
    "--settings batch_size=16 model=vit_tiny_patch16",
    "detect train": f"detect train {TINY} --recipe bundled --out {{out}}",
}


def photographs(folder: Path) -> Path:
    """Generate 40 pictures of 4,000 x 3,000 pixels, 30 for training and 10 for testing, in two classes."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:3000, 0:4000]
    for i in range(40):
        directory = folder / ("train" if i < 30 else "val") / "ab"[i % 2]
        directory.mkdir(parents=True, exist_ok=True)
        waves = [
            128 + 100 * np.sin(rows / rng.uniform(20, 400) + columns / rng.uniform(20, 400)) for _ in range(3)
        ]
        noise = rng.normal(0, 12, (3000, 4000, 1))
        Image.fromarray((np.stack(waves, 2) + noise).clip(0, 255).astype(np.uint8)).save(
            directory / f"{i:03d}.jpg", quality=90
        )
    return folder


def run(command: str, photos: Path, delay: float, number: int) -> dict[str, Any]:
    """Start a command, send it a signal after `delay` seconds, and measure how it reacts."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [
            sys.executable,
            "-m",
            "rcmae",
            *command.format(photos=photos, out=Path(folder) / "out").split(),
        ]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        start = time.monotonic()
        with subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            preexec_fn=_restore_sigint,
        ) as process:
            lines: list[tuple[float, str]] = []

            def read(output: IO[bytes]) -> None:
                lines.extend(
                    (time.monotonic() - start, line.decode(errors="replace").strip()) for line in output
                )

            assert process.stdout is not None
            reader = threading.Thread(target=read, args=(process.stdout,))
            reader.start()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(delay)
            ended, sent = process.poll() is not None, time.monotonic() - start
            if not ended:
                process.send_signal(number)
            process.wait()
            end = time.monotonic() - start - sent
            reader.join(10)
        times = [0.0, *(at for at, _ in lines if at < sent), sent]
        responses = [at - sent for at, text in lines if " received: stopping" in text]
        return {
            "first_line": lines[0][0] if lines else None,
            "silence": max(b - a for a, b in itertools.pairwise(times)),
            "ended_before": ended,
            "response": responses[0] if responses else None,
            "end": None if ended else end,
            "code": process.returncode,
            "last": lines[-1][1] if lines else "",
        }


def _restore_sigint() -> None:
    """A shell that runs this benchmark in the background makes its children ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> int:
    """Measure, print a line for each command and signal, write results/signals.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photographs", type=Path, nargs="?")
    parser.add_argument("--only", default="", help="only commands whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="concurrent commands")
    args = parser.parse_args()
    rows, missed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        photos = (args.photographs or photographs(Path(folder))).resolve()
        sent = [(signal.SIGTERM, OBSERVED), *itertools.product((signal.SIGINT, signal.SIGTERM), DELAYS)]
        cases = [(name, number, delay) for name in COMMANDS if args.only in name for number, delay in sent]
        with ThreadPoolExecutor(args.jobs) as pool:
            results = pool.map(lambda case: run(COMMANDS[case[0]], photos, case[2], case[1]), cases)
            for (name, number, delay), row in zip(cases, results, strict=True):
                rows.append({"command": name, "signal": number.name, "delay": delay} | row)
                if delay == OBSERVED:
                    first = f"first line after {row['first_line']:.1f} s"
                    print(f"{name}: {first}, longest silence {row['silence']:.1f} s", flush=True)
                if row["ended_before"]:
                    print(f"  {number.name} {delay:>4} s: ended before, code {row['code']}", flush=True)
                    continue
                late = row["response"] is None or any(row[key] > bound for key, bound in BOUNDS.items())
                missed += late
                response = "none" if row["response"] is None else f"{row['response']:.2f} s"
                print(
                    f"  {number.name} {delay:>4} s: response {response}, end {row['end']:.2f} s, code "
                    f"{row['code']}" + f"  MISSED: {json.dumps(row['last'])}" * late,
                    flush=True,
                )
    if not args.only:
        content = {
            "bounds": BOUNDS,
            "machine": describe_machine(torch.device("cpu"), "fp32"),
            "missed": missed,
            "jobs": args.jobs,
            "rows": rows,
        }
        write_json(ROOT / "results" / "signals.json", content)
    print(f"{missed} of {sum(not row['ended_before'] for row in rows)} exceeded a bound")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
