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


def table(results: dict[str, Any]) -> str:
    """Accuracy of the last probe beside the baselines."""
    machine = results["machine"]
    return markdown.table(
        ["accuracy (%) on mean-pooled patches", "linear probe", "k-NN"],
        [[name, f"{s['linear']:.1f}", f"{s['knn']:.1f}"] for name, s in results["scores"].items()],
        f"Seed {results['seed']}, {results['steps']:,} steps, {results['minutes']:.1f} minutes on "
        f"{machine['threads']} cores ({machine['cpu']}, {machine['precision']}).",
    )


def main(run: Path) -> None:
    """Read the run directory, write the numbers with their conditions."""
    lines = read_metrics(run)
    baseline = next(line for line in lines if line["kind"] == "baseline")
    probe, last = ([line for line in lines if line["kind"] == kind][-1] for kind in ("probe", "train"))
    machine = json.loads((run / "machine.json").read_text())
    assert last["step"] == machine["steps"], "the run is not finished"
    scores = {"raw pixels": baseline["raw_pixels"], "randomly initialized encoder": baseline["random_init"]}
    scores |= {network: probe[network] for network in ("student", "teacher")}
    results = {
        "scores": scores,
        "seed": parse_recipe((run / "recipe.toml").read_text(), "recipe").seed,
        "steps": machine["steps"],
        "minutes": last["seconds"] / 60,
        "recipe_hash": machine["recipe_hash"],
        "generator": GENERATOR,
        "set_hash": set_hash(),
        "machine": machine,
    }
    (ROOT / "results" / "bundled.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
