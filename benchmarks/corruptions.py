"""Milliseconds of one core to corrupt an image, at 32 and 224 px: `python -m benchmarks.corruptions [--out
FILE]`.

Medians of processor time, which excludes other processes, averaged over the five severities. Exit code 0
only if the 15 corruptions take at most 0.5 ms on average at 32 px.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks import markdown
from rcmae.engine.run import describe_machine
from rcmae.tasks.robustness.corruptions import CORRUPTIONS, STANDARD, corrupt

BOUND = 0.5
"Milliseconds at 32 px."

REPEATS = {32: 9, 224: 3}
"Repetitions by side."


def milliseconds(image: np.ndarray, name: str, severity: int, repeats: int) -> float:
    """The median over the draws of several images, after one to warm up."""
    times = []
    for index in range(repeats + 1):
        start = time.process_time()
        corrupt(image, name, severity, 0, index)
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times[1:])


def table(results: dict[str, Any]) -> str:
    """Milliseconds per image of each corruption."""
    means, machine = results["mean"], results["machine"]
    rows = [
        [row["name"] + ("" if row["standard"] else " (extra)"), f"{row['32']:.2f}", f"{row['224']:.1f}"]
        for row in results["rows"]
    ]
    rows.append(["mean of the 15", f"{means['32']:.2f}", f"{means['224']:.1f}"])
    hours = 15 * 5 * 50_000 * means["224"] / 3.6e6
    return markdown.table(
        ["milliseconds per image", "32 px", "224 px"],
        rows,
        f"One core ({machine['cpu']}), processor time, mean of the five severities. ImageNet's 50,000 "
        f"validation images under all 15: {hours:.1f} hours of one core, without reading the files.",
    )


def main() -> int:
    """Measure and print all corruptions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    photo = Image.fromarray(load_sample_images().images[0]).crop((100, 0, 500, 400))
    rows = []
    for name in CORRUPTIONS:
        times = {}
        for side, repeats in REPEATS.items():
            image = np.asarray(photo.resize((side, side)))
            times[str(side)] = statistics.mean(
                milliseconds(image, name, severity, repeats) for severity in range(1, 6)
            )
        rows.append({"name": name, "standard": name in STANDARD, **times})
        print(f"{name:18}" + "".join(f"{t:9.2f} ms at {side} px" for side, t in times.items()), flush=True)
    standard: list[dict[str, Any]] = [row for row in rows if row["standard"]]
    means = {str(side): statistics.mean(row[str(side)] for row in standard) for side in REPEATS}
    print("mean of the 15    " + "".join(f"{mean:9.2f} ms at {side} px" for side, mean in means.items()))
    if options.out:
        machine = describe_machine(torch.device("cpu"), "fp64")
        results = {"machine": machine, "bound": BOUND, "mean": means, "rows": rows}
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(means["32"] > BOUND)


if __name__ == "__main__":
    sys.exit(main())
