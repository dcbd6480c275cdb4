"""Record what the laboratory finds: `python -m benchmarks.lab RUN`.

Writes results/lab_linear.json (`rcmae lab linear`) and results/lab_gradients.json (`rcmae lab gradients RUN`), without their curves.
"""

import sys
from pathlib import Path

import torch

from benchmarks.tables import ROOT
from rcmae.engine.run import describe_machine, write_json
from rcmae.lab import gradients, linear


def main(run: str) -> None:
    """Ask both, write the numbers with their conditions."""
    machine = describe_machine(torch.device("cpu"), "fp32")
    found = linear.study()
    write_json(ROOT / "results" / "lab_linear.json", {k: found[k] for k in ("setting", "table")} | {"machine": machine})
    found = gradients.study(run, gradients.Setting(device="cpu"), print)
    write_json(ROOT / "results" / "lab_gradients.json", {k: found[k] for k in ("about", "summary", "said")} | {"machine": machine})
    gradients.write_page(found, Path(run) / "lab")
    print(*(text for _, text in found["said"]), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1])
