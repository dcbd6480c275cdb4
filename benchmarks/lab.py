"""Record `rcmae lab linear`: `python -m benchmarks.lab`. Writes results/lab_linear.json, without the
curves."""

from typing import Any

import torch

from benchmarks import ROOT, markdown
from rcmae.engine.run import describe_machine, write_json
from rcmae.lab import linear_experiment
from rcmae.lab.linear_controls import CONTROLS
from rcmae.tasks.interval import level_note

ARMS = {"teacher": "teacher"} | CONTROLS


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


def controls_table(results: dict[str, Any]) -> str:
    """The teacher and its controls in the linear model, with the verdicts."""
    controls = results["controls"]
    rows = [
        [
            *([linear_experiment.NAMES[row["optimizer"]], f"{row['steps']}"] if first else ["", ""]),
            ARMS[row["arm"]] + (f" ({row['beta']:.2f})" if row["beta"] is not None else ""),
            f"{row['rate']:.2g}",
            f"{row['error'][0]:.4f}",
            markdown.signed(row.get("gain")),
        ]
        for row in controls["rows"]
        for first in [row["arm"] == "teacher"]
    ]
    setting = controls["setting"]
    return markdown.table(
        ["optimizer", "steps", "arm", "rate", "error", "teacher's lower by, %"],
        rows,
        f"{setting['seeds']} seeds; mean squared error on fresh inputs without noise above that of the best "
        f"matrix, and paired differences with 95 % t intervals; each arm at its best rate on "
        f"{setting['tuning']} other seeds. {level_note(controls['comparisons'])}",
        markdown.bullets(controls["sentences"]),
        left=(0, 2),
    )


def main() -> None:
    """Run the experiment, write the numbers with their conditions."""
    result = linear_experiment.run_linear()
    machine = describe_machine(torch.device("cpu"), "fp32")
    kept = {k: result[k] for k in ("setting", "table", "controls")}
    write_json(ROOT / "results" / "lab_linear.json", kept | {"machine": machine})
    print(*result["controls"]["sentences"], sep="\n")


if __name__ == "__main__":
    main()
