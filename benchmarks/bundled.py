"""Record a finished run of `rcmae pretrain` on the bundled set: `python -m benchmarks.bundled RUN`.

Writes results/bundled.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import ROOT, markdown
from rcmae.data.digits import GENERATOR, set_hash
from rcmae.engine.metrics import read_metrics
from rcmae.methods.recipes import parse_recipe
from rcmae.tasks.probe import final_scores, score_table


def table(results: dict[str, Any]) -> str:
    """Accuracy of the last probe beside the baselines."""
    machine = results["machine"]
    names, rows = score_table(results["scores"])
    return markdown.table(
        ["accuracy (%)", *names],
        rows,
        f"Seed {results['seed']}, {results['steps']:,} steps, {results['minutes']:.1f} minutes on "
        f"{machine['threads']} cores ({machine['cpu']}, {machine['precision']}).",
    )


def main(run: Path) -> None:
    """Read the run directory, write the numbers with their conditions."""
    lines = read_metrics(run)
    last = [line for line in lines if line["kind"] == "train"][-1]
    machine = json.loads((run / "machine.json").read_text())
    assert last["step"] == machine["steps"], "the run is not finished"
    results = {
        "scores": final_scores(lines),
        "seed": parse_recipe((run / "recipe.toml").read_text(), "recipe").seed,
        "steps": machine["steps"],
        "minutes": last["seconds"] / 60,
        "recipe_hash": machine["recipe_hash"],
        "generator": GENERATOR,
        "set_hash": set_hash(),
        "machine": machine,
    }
    (ROOT / "results" / "bundled.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results["scores"], indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
