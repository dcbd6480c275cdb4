"""Record a finished run on the set of `benchmarks.clipart`, with its `worth-it`: `python -m
benchmarks.own_pictures RUN`.

Writes results/own_pictures.json.
"""

import sys
from pathlib import Path
from typing import Any

from benchmarks import ROOT, markdown
from rcmae.engine.metrics import of_kind, read_metrics
from rcmae.engine.run import read_json, write_json
from rcmae.methods.recipes import parse_recipe
from rcmae.tasks.learned import learned
from rcmae.tasks.probe import final_correct, final_scores, image_count, score_table


def table(results: dict[str, Any]) -> str:
    """Accuracy of the last probe beside the baselines, and the verdict of `worth-it`."""
    machine = results["machine"]
    note = (
        f"{results['steps']:,} steps of {results['batch']} ({results['epochs']:.0f} epochs of "
        f"{machine['images']:,} pictures), {results['minutes']:.0f} minutes with the probes on "
        f"{machine['cores']} cores ({machine['cpu']}, {machine['precision']}), seed {results['seed']}. "
        f"Learned: {results['answer']}"
    )
    verdict = "".join(f"\n- {line}" for line in results["verdict"])
    paragraphs = (
        [note, f"`rcmae evaluate worth-it`, {results['seeds']} seeds:\n{verdict}"] if verdict else [note]
    )
    return markdown.table(["accuracy (%)", *results["probes"]], results["rows"], "\n\n".join(paragraphs))


def main() -> None:
    """Write the results and print the table."""
    run = Path(sys.argv[1])
    recipe = parse_recipe((run / "recipe.toml").read_text(), "recipe")
    lines = read_metrics(run)
    last, correct = of_kind(lines, "train")[-1], final_correct(run, lines)
    names, rows = score_table(final_scores(lines), image_count(correct))
    worth = read_json(run / "evaluate" / "worth-it" / "worth-it.json")
    results = {
        "steps": last["step"],
        "batch": recipe.optim.batch_size,
        "epochs": last["epoch"],
        "minutes": last["seconds"] / 60,
        "seed": recipe.seed,
        "probes": names,
        "rows": rows,
        "answer": "{0}. {2}".format(*learned(correct, ())),
        "verdict": worth.get("verdict", []),
        "seeds": worth.get("seeds"),
        "worth": worth.get("rows", []),
        "machine": read_json(run / "machine.json"),
    }
    write_json(ROOT / "results" / "own_pictures.json", results)
    print(table(results))


if __name__ == "__main__":
    main()
