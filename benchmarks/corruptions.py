"""What corrupting an image costs: `python -m benchmarks.corruptions [--out FILE]`, milliseconds of one core at 32 and 224 px.

Medians of processor time, in which other work on the machine does not count; means over the five severities.
Exit code 0 only if the 15 corruptions take at most 0.5 ms on average at 32 px.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from rcmae.engine.run import describe_machine
from rcmae.tasks.robustness.corruptions import CORRUPTIONS, STANDARD, corrupt

BOUND = 0.5
"Milliseconds at 32 px."

REPEATS = {32: 9, 224: 3}
"By side, how often each is timed."


def milliseconds(image: np.ndarray, name: str, severity: int, repeats: int) -> float:
    """The median over some images' draws, after one to get warm."""
    times = []
    for index in range(repeats + 1):
        start = time.process_time()
        corrupt(image, name, severity, 0, index)
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    photo = Image.fromarray(load_sample_images().images[0]).crop((100, 0, 500, 400))
    rows = []
    for name in CORRUPTIONS:
        row = {"name": name, "standard": name in STANDARD}
        for side, repeats in REPEATS.items():
            image = np.asarray(photo.resize((side, side)))
            row[str(side)] = statistics.mean(milliseconds(image, name, severity, repeats) for severity in range(1, 6))
        rows.append(row)
        print(f"{name:18}" + "".join(f"{row[str(side)]:9.2f} ms at {side} px" for side in REPEATS), flush=True)
    means = {str(side): statistics.mean(row[str(side)] for row in rows if row["standard"]) for side in REPEATS}
    print("mean of the 15    " + "".join(f"{means[str(side)]:9.2f} ms at {side} px" for side in REPEATS))
    if options.out:
        machine = describe_machine(torch.device("cpu"), "fp64")
        options.out.write_text(json.dumps({"machine": machine, "bound": BOUND, "mean": means, "rows": rows}, indent=1) + "\n")
    return int(means["32"] > BOUND)


if __name__ == "__main__":
    sys.exit(main())
