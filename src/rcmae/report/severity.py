"""Accuracy over the severity of corruptions, as figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .curves import Line, plot, standalone

COLORS = ("student", "teacher", "both", "gold", "good", "memory1", "memory3", "baseline")


def by_severity(clean: Mapping[str, float], errors: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """An inline SVG with one curve per model: its accuracy on clean images (severity 0) and at severities 1,
    2, ..., as the mean over the corruptions.

    `clean`: accuracy in percent by model. `errors`: error in percent by model, corruption and severity
    (`sets.Corrupted.errors`).
    """
    lines = []
    for index, (name, by_corruption) in enumerate(errors.items()):
        accuracy = [clean[name], *(100 - np.mean(list(by_corruption.values()), 0)).tolist()]
        lines.append(Line(name, COLORS[index % len(COLORS)], range(len(accuracy)), accuracy))
    ticks = {0: "clean"} | {s: str(s) for s in range(1, max(len(line.x) for line in lines))}
    label = "accuracy, %, mean of corruptions"
    return plot(lines, ylabel=label, markers=True, xlabel="severity", ticks=ticks, span=5.0)


def figures(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A figure for each kind of corruption with a curve for each network, from the records of `rcmae
    evaluate` that contain errors by severity."""
    svgs, records = {}, [r for r in records if "errors" in r.get("details", {})]
    for kind in dict.fromkeys(kind for r in records for kind in r["details"]["errors"]):
        by_name: dict[str, dict[str, Any]] = {}
        for r in records:
            if kind in r["details"]["errors"]:
                name = _name(r)
                by_name[f"{name}, {r['hashes'].get('request', '')[:6]}" if name in by_name else name] = r
        errors = {name: r["details"]["errors"][kind] for name, r in by_name.items()}
        svgs[kind] = by_severity({name: r["metrics"]["top1"] for name, r in by_name.items()}, errors)
    return svgs


def write_figures(records: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    svgs = {folder / f"severity-{kind.split(',')[0]}.svg": svg for kind, svg in figures(records).items()}
    for path, svg in svgs.items():
        path.write_text(standalone(svg), encoding="utf-8")
    return list(svgs)


def _name(record: dict[str, Any]) -> str:
    """The network, or the run of a classifier, with the probe, fraction of labels and seed unless default."""
    network, fraction, seed = (record[key] for key in ("network", "labels_percent", "seed"))
    probe = record["settings"]["probe"]
    unusual = (
        [f"{probe} probe"] * (probe != "linear")
        + [f"{fraction:g} % of labels"] * (fraction != 100)
        + [f"seed {seed}"] * (seed != 0)
    )
    return ", ".join([Path(record["backbone"]).name if network == "classifier" else network, *unusual])
