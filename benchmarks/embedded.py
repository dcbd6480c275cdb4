"""Record a finished run of the main job as results/embedded.json: `python -m benchmarks.embedded RUN`."""

import json
import sys
from pathlib import Path

from rcmae.data.digits import GENERATOR, set_hash
from rcmae.engine.metrics import read_metrics
from rcmae.methods.recipes import parse_recipe


def main(run: Path) -> None:
    """Read the run directory, write the numbers with their conditions."""
    lines = read_metrics(run)
    floor = next(line for line in lines if line["kind"] == "floor")
    probe, last = ([line for line in lines if line["kind"] == kind][-1] for kind in ("probe", "train"))
    machine = json.loads((run / "machine.json").read_text())
    assert last["step"] == machine["steps"], "the run is not finished"
    scores = {"raw pixels": floor["raw_pixels"], "untrained encoder": floor["untrained"]}
    scores |= {who: probe[who] for who in ("student", "teacher")}
    result = {
        "scores": scores, "seed": parse_recipe((run / "recipe.toml").read_text(), "recipe").seed, "steps": machine["steps"],
        "minutes": last["seconds"] / 60, "recipe_hash": machine["recipe_hash"], "generator": GENERATOR, "set_hash": set_hash(),
        "machine": machine,
    }  # fmt: skip
    (Path(__file__).parent.parent / "results" / "embedded.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
