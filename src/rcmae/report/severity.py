"""The figure of robustness: accuracy over the severity of corruption."""

from collections.abc import Mapping, Sequence

import numpy as np

from .curves import Line, plot

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
