"""Record `rcmae lab linear` and `rcmae lab gradients RUN`: `python -m benchmarks.lab RUN`.

Writes results/lab_linear.json and results/lab_gradients.json, without the curves.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import ROOT, markdown
from rcmae.engine.run import describe_machine, write_json
from rcmae.lab import gradients, linear_experiment


def linear_table(results: dict[str, Any]) -> str:
    """Similarity to previous gradients in the linear model, beside reference values."""
    rows, cases, setting = [], results["table"], results["setting"]
    for first, *others in (cases[i : i + 3] for i in range(0, len(cases), 3)):
        cells = [
            f"{case['previous']:.3f}"
            + (f" ({case['reference']:.3f})" if case["reference"] is not None else "")
            for case in (first, *others)
        ]
        rows.append([first["optimizer"], str(first["alpha"]), *cells])
    return markdown.table(
        ["optimizer", "alpha", "same input", "other input", "nothing in common"],
        rows,
        f"Medians of {setting['seeds']} seeds, {setting['width']} values, rank {setting['rank']}, "
        f"{setting['visible_fraction']:.0%} visible; reference values, where known, in parentheses.",
    )


def gradients_table(results: dict[str, Any]) -> str:
    """Cosines of gradients with earlier steps, and the conclusions."""
    rows, about = [], results["about"]
    for row in results["summary"]:
        quantities = [row[key] for key in ("similarity", "previous", "moment", "ratio")]
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*interval) for interval in quantities]
        rows.append([f"{row['condition']}: {row['what']}", *cells])
    head = ["after a step on batch B", "similarity of features", "cosine with that step"]
    return markdown.table(
        [*head, "with AdamW's moment", "ratio"],
        rows,
        f"Step {about['step']:,}; {about['batches']} steps of {about['batch_size']} images after "
        f"{about['settle']} to settle, learning rate {about['lr']:.2g}, half-life {about['half_life']:.1f} "
        "steps; means with 95 % bootstrap intervals.",
        markdown.bullets(text for _, text in results["findings"]),
    )


def main(run: str) -> None:
    """Run both experiments, write the numbers with their conditions."""
    machine = describe_machine(torch.device("cpu"), "fp32")
    linear = linear_experiment.run_linear()
    write_json(
        ROOT / "results" / "lab_linear.json",
        {k: linear[k] for k in ("setting", "table")} | {"machine": machine},
    )
    results = gradients.run_gradients(run, gradients.GradientSettings(device="cpu"), print)
    write_json(
        ROOT / "results" / "lab_gradients.json",
        {k: results[k] for k in ("about", "summary", "findings")} | {"machine": machine},
    )
    gradients.write_gradients_page(results, Path(run) / "lab")
    print(*(text for _, text in results["findings"]), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1])
