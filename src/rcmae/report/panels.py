"""Figures and panels as a method declares them, and the panel of the features' health, drawn from the record of a run."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ..methods.diagnostics import BlockFigure, Curve, Figure, Numbers, Panel
from .curves import Line, by_depth, plot

SHADES = ("memory1", "memory2", "memory3")
"Colours of what has an order, from the first to the last."


class Shown(NamedTuple):
    """A figure, its id on the page, and the sentence that says how to read it."""

    id: str
    svg: str
    caption: str


def drawn(figures: Iterable[Figure | BlockFigure], lines: list[Numbers], reference: Numbers) -> list[Shown]:
    """Those that have something to show."""
    found = (_over_blocks(f, lines, reference) if isinstance(f, BlockFigure) else _over_steps(f, lines, reference) for f in figures)
    return [figure for figure in found if figure]


def panel(declared: Panel, train: list[Numbers], lines: list[Numbers], reference: Numbers) -> dict[str, Any] | None:
    """A panel's table and figures; None where its first number was never logged."""
    first = declared.rows[0][1]
    own = [line for line in train if line.get(first) is not None]
    if not own:
        return None
    changes = len({line[first] for line in own}) > 1
    chosen = {"at the start": own[0], "halfway": own[len(own) // 2], "now": own[-1]} if changes else {"now": own[-1]}
    rows = {name: [written(line.get(key)) for line in chosen.values()] for name, key, written in declared.rows}
    figures, more = (drawn(part, lines, reference) for part in (declared.figures, declared.more))
    return declared._asdict() | {"columns": list(chosen), "rows": rows, "figures": figures, "more": more}


def value(line: Numbers, key: str | Callable[[Numbers], Any]) -> Any:
    """What a curve shows of a line; None where it is missing."""
    if callable(key):
        return key(line)
    for part in key.split("."):
        line = (line or {}).get(part)
    return line


def apart(levels: dict[str, float]) -> dict[str, float]:
    """Levels that lie on one another share a line and a label."""
    kept: dict[str, float] = {}
    for name, height in sorted(levels.items(), key=lambda x: x[1]):
        twin = next((k for k, v in kept.items() if v and abs(height / v - 1) < 0.04), None)
        kept[f"{twin}, {name}" if twin else name] = kept.pop(twin) if twin else height
    return kept


def _levels(figure: Figure | BlockFigure, reference: Numbers) -> dict[str, float]:
    known = {name: reference.get(level) if isinstance(level, str) else level for name, level in figure.levels}
    return apart({name: v for name, v in known.items() if v is not None and (v > 0 or not figure.log)})


def _over_steps(figure: Figure, lines: list[Numbers], reference: Numbers) -> Shown | None:
    curves = []
    for curve in figure.curves:
        points = [(line["step"], v) for line in lines if (v := value(line, curve.key)) is not None and (v > 0 or not figure.log)]
        if points:
            curves.append(Line(curve.label, curve.color, *zip(*points, strict=True), curve.style, curve.smooth))
    if not curves or (figure.changing and len(set(curves[0].y)) == 1):
        return None
    right = None
    if figure.right:
        name, key, factor = figure.right
        last = next((line for line in reversed(lines) if line.get(key) and value(line, figure.curves[0].key)), None)
        right = last and (name, factor * last[key] / value(last, figure.curves[0].key))
    levels, look = _levels(figure, reference), {"log": figure.log, "symlog": figure.symlog, "span": figure.span}
    return Shown(figure.id, plot(curves, levels, figure.ylabel, markers=figure.markers, right=right, **look), figure.caption)


def _over_blocks(figure: BlockFigure, lines: list[Numbers], reference: Numbers) -> Shown | None:
    found = [(line["step"], v) for line in lines if (v := value(line, figure.key))]
    if not found:
        return None
    if figure.times == 1:
        step, values = found[-1]
        groups, caption = {"": ("both", values)}, f"{figure.caption} Step {step:,}."
    else:
        chosen = dict((found[0], found[len(found) // 2], found[-1]))
        groups = {f"step {step:,}": (shade, v) for shade, (step, v) in zip(SHADES[-len(chosen) :], chosen.items(), strict=True)}
        caption = figure.caption
    return Shown(figure.id, by_depth(groups, figure.ylabel, _levels(figure, reference), figure.log), caption)


MEASURES = {
    "rankme": ("RankMe: directions in use", "1"),
    "lidar": ("LiDAR: directions that tell images apart", "1"),
    "spread": ("spread of the features", "0"),
    "uniformity": ("uniformity on the sphere", "0"),
    "alpha_req": ("alpha-ReQ: fall of the spectrum", "far above 1"),
}
"A health number's name, and its value when all features have become the same."


def health_panel(health: list[Numbers], advice: str) -> dict[str, Any] | None:
    """Numbers on the representation that need no labels, first and now, and over time; `advice` is what helps against collapse."""
    known = {key: values for key in MEASURES if (values := [h[key] for h in health if h.get(key) is not None])}
    if not known:
        return None
    lidar = ", and how many tell images apart whatever is masked (LiDAR)" if "lidar" in known else ""
    ranks = f"How many directions the features use (RankMe){lidar}. Rising or level is healthy; falling towards 1 is collapse: {advice}."
    spread = "How far the features of different images lie apart, over their length. At 0 every image looks the same to the network; then "
    even = "How evenly the features fill the sphere: lower is more even, 0 is collapse."
    fall = "How fast the directions fall in size. About 1 is said to be good; far above it few are left, far below it there is noise."
    both, student = (Curve("rankme", "RankMe", "student"), Curve("lidar", "LiDAR", "ink")), "student"
    main = (
        Figure("figure-rank", "effective rank", both, ranks, (("collapse", 1.0),), markers=True),
        Figure("figure-spread", "spread", (Curve("spread", "", student),), f"{spread}{advice}.", (("collapse", 0.0),), markers=True),
    )
    more = (
        Figure("figure-uniformity", "uniformity", (Curve("uniformity", "", student),), even, (("collapse", 0.0),), markers=True),
        Figure("figure-alpha", "alpha-ReQ", (Curve("alpha_req", "", student),), fall, (("said to be good", 1.0),), markers=True),
    )
    table = [(MEASURES[key][0], *(f"{v:.2f}".replace("-", "−") for v in (of[0], of[-1])), MEASURES[key][1]) for key, of in known.items()]
    return {"table": table, "figures": drawn(main, health, {}), "more": drawn(more, health, {})}
