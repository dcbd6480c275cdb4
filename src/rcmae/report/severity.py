"""The figure of robustness: accuracy over the severity of corruption."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .curves import Line, plot, standalone

COLOURS = ("student", "teacher", "both", "gold", "good", "memory1", "memory3", "floor")


def by_severity(clean: Mapping[str, float], errors: Mapping[str, Mapping[str, Sequence[float]]], only: str | None = None) -> str:
    """An inline SVG: a curve a model, its accuracy on clean images (severity 0) and at severities 1, 2, ...

    `clean`: accuracy in percent by model. `errors`: by model and corruption, the error in percent by severity (`sets.Corrupted.errors`).
    The mean over the corruptions, or `only` one of them.
    """
    lines = []
    for place, (name, by_corruption) in enumerate(errors.items()):
        chosen = [by_corruption[only]] if only else list(by_corruption.values())
        accuracy = [clean[name], *(100 - np.mean(chosen, 0)).tolist()]
        lines.append(Line(name, COLOURS[place % len(COLOURS)], range(len(accuracy)), accuracy))
    ticks = {0: "clean"} | {s: str(s) for s in range(1, max(len(line.x) for line in lines))}
    label = f"accuracy, %: {only}" if only else "accuracy, %, mean of corruptions"
    return plot(lines, ylabel=label, markers=True, xlabel="severity", ticks=ticks, span=5.0)


def figures(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Of those records of `rcmae evaluate` that hold errors by severity: a figure a kind of corruption, in it a curve a network."""
    found, records = {}, [r for r in records if "errors" in r.get("details", {})]
    for kind in dict.fromkeys(kind for r in records for kind in r["details"]["errors"]):
        own: dict[str, dict[str, Any]] = {}
        for r in records:
            if kind in r["details"]["errors"]:
                own[f"{_name(r)}, {r['hashes'].get('asked', '')[:6]}" if _name(r) in own else _name(r)] = r
        errors = {name: r["details"]["errors"][kind] for name, r in own.items()}
        found[kind] = by_severity({name: r["metrics"]["top1"] for name, r in own.items()}, errors)
    return found


def write_figures(records: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """The same as files of their own."""
    places = {folder / f"severity-{kind.split(',')[0]}.svg": figure for kind, figure in figures(records).items()}
    for place, figure in places.items():
        place.write_text(standalone(figure), encoding="utf-8")
    return list(places)


def _name(record: dict[str, Any]) -> str:
    """The network, of a classifier its run, and what is unusual: the probe, the share of the labels, the seed."""
    network, share, probe, seed = (record["network"], record["labels_percent"], record["settings"]["probe"], record["seed"])
    unusual = [f"{probe} probe"] * (probe != "linear") + [f"{share:g} % of labels"] * (share != 100) + [f"seed {seed}"] * (seed != 0)
    return ", ".join([Path(record["backbone"]).name if network == "classifier" else network, *unusual])
