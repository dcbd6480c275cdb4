"""Every command gets SIGINT and SIGTERM after 0.5, 2, 5, 10 and 20 seconds: seconds until it answers on the screen, and until it ends.

    python -m benchmarks.signals PHOTOGRAPHS [--only WORD]      # writes results/signals.json

PHOTOGRAPHS holds train/ and val/ with a folder a class; without it, 40 photographs of 12 megapixels are made. Also measured: the first
line of each command, and its longest silence in the 45 seconds before another SIGTERM. Where a bound is missed the exit code is 1.
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
from typing import Any

import numpy as np
import torch
from PIL import Image

from rcmae.engine.run import describe_machine, write_json

ROOT = Path(__file__).parent.parent
DELAYS = (0.5, 2.0, 5.0, 10.0, 20.0)
ALONE = 45.0
"Seconds that a command is watched for its silence."
BOUNDS = {"answer": 1.0, "end": 5.0}
"Seconds."
TINY = "scratch:timm:vit_tiny_patch16_224"

COMMANDS = {
    "pretrain": "pretrain folder --data {photos}/train --batch-size 16 --steps 1000 --out {out}",
    "pretrain --time": "pretrain folder --data {photos}/train --batch-size 16 --time 1h --out {out}",
    "check": "check {photos}/train --val {photos}/val --batch-size 16",
    "evaluate knn": f"evaluate knn {TINY} --data {{photos}} --out {{out}} --cache {{out}}/cache",
    "evaluate linear": f"evaluate linear {TINY} --data {{photos}} --out {{out}} --cache {{out}}/cache",
    "evaluate attentive": f"evaluate attentive {TINY} --data {{photos}} --out {{out}} --cache {{out}}/cache",
    "evaluate finetune": f"evaluate finetune {TINY} --data {{photos}} --out {{out}} --cache {{out}}/cache",
    "evaluate robustness": f"evaluate robustness {TINY} --data {{photos}} --out {{out}} --cache {{out}}/cache",
    "evaluate worth-it": f"evaluate worth-it {TINY} --data {{photos}} --percents 100 --out {{out}} --cache {{out}}/cache",
    "lab linear": "lab linear --out {out}",
    "lab gradients": "lab gradients embedded --out {out}",
    "verify": "verify rcmae",
    "compare cost": "compare cost --out {out}",
    "compare race": "compare race mae rcmae --data {photos}/train --settings batch_size=16 model=vit_tiny_patch16 --budget 1h --out {out}",
    "detect train": f"detect train {TINY} --recipe embedded --out {{out}}",
}


def photographs(folder: Path) -> Path:
    """40 pictures of 4,000 x 3,000 pixels, 30 to train and 10 to test on, in two classes."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:3000, 0:4000]
    for i in range(40):
        place = folder / ("train" if i < 30 else "val") / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        waves = [128 + 100 * np.sin(rows / rng.uniform(20, 400) + columns / rng.uniform(20, 400)) for _ in range(3)]
        noise = rng.normal(0, 12, (3000, 4000, 1))
        Image.fromarray((np.stack(waves, 2) + noise).clip(0, 255).astype(np.uint8)).save(place / f"{i:03d}.jpg", quality=90)
    return folder


def run(command: str, photos: Path, delay: float, number: int) -> dict[str, Any]:
    """Start a command, send it a signal after `delay` seconds, and tell what it did."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-m", "rcmae", *command.format(photos=photos, out=Path(folder) / "out").split()]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        start = time.monotonic()
        with subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder, env=environment, preexec_fn=_deaf_no_more
        ) as process:
            lines: list[tuple[float, str]] = []

            def read() -> None:
                lines.extend((time.monotonic() - start, line.decode(errors="replace").strip()) for line in process.stdout)

            reader = threading.Thread(target=read)
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
        answers = [at - sent for at, text in lines if " received: stopping" in text]
        return {
            "first_line": lines[0][0] if lines else None, "silence": max(b - a for a, b in itertools.pairwise(times)),
            "ended_before": ended, "answer": answers[0] if answers else None, "end": None if ended else end, "code": process.returncode,
            "last": lines[-1][1] if lines else "",
        }  # fmt: skip


def _deaf_no_more() -> None:
    """Whoever started this benchmark in the background made its children ignore SIGINT until they ask for it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> int:
    """Measure, print a line a command and signal, write results/signals.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", type=Path, nargs="?")
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=1, help="commands at a time")
    args = parser.parse_args()
    rows, missed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        photos = (args.photographs or photographs(Path(folder))).resolve()
        asked = [(signal.SIGTERM, ALONE), *itertools.product((signal.SIGINT, signal.SIGTERM), DELAYS)]
        cases = [(name, number, delay) for name in COMMANDS if args.only in name for number, delay in asked]
        with ThreadPoolExecutor(args.jobs) as pool:
            for (name, number, delay), found in zip(cases, pool.map(lambda c: run(COMMANDS[c[0]], photos, c[2], c[1]), cases), strict=True):
                rows.append({"command": name, "signal": number.name, "delay": delay} | found)
                if delay == ALONE:
                    print(f"{name}: first line after {found['first_line']:.1f} s, longest silence {found['silence']:.1f} s", flush=True)
                if found["ended_before"]:
                    print(f"  {number.name} {delay:>4} s: had ended with {found['code']}", flush=True)
                    continue
                late = found["answer"] is None or any(found[key] > bound for key, bound in BOUNDS.items())
                missed += late
                answer = "none" if found["answer"] is None else f"{found['answer']:.2f} s"
                text = f"  {number.name} {delay:>4} s: answer {answer}, end {found['end']:.2f} s, code {found['code']}"
                print(text + ("  MISSED: " + json.dumps(found["last"]) if late else ""), flush=True)
    if not args.only:
        about = {
            "bounds": BOUNDS,
            "machine": describe_machine(torch.device("cpu"), "fp32"),
            "missed": missed,
            "jobs": args.jobs,
            "rows": rows,
        }
        write_json(ROOT / "results" / "signals.json", about)
    print(f"{missed} of {sum(not r['ended_before'] for r in rows)} missed a bound")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
