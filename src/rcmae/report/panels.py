"""Figures and panels that a method declares, and the panel of the features' health, drawn from the log of a
run."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ..methods.diagnostics import BlockFigure, Curve, Figure, Numbers, Panel
from .curves import Line, by_depth, plot

SHADES = ("memory1", "memory2", "memory3")
"Colors of an ordered series, from the first to the last."


class Shown(NamedTuple):
    """A figure, its id on the page, and a sentence on how to read it."""

    id: str
    svg: str
    caption: str


def drawn(
    figures: Iterable[Figure | BlockFigure], lines: Sequence[Numbers], reference: Numbers
) -> list[Shown]:
    """Draw the figures that have data."""
    shown = (
        _over_blocks(f, lines, reference) if isinstance(f, BlockFigure) else _over_steps(f, lines, reference)
        for f in figures
    )
    return [figure for figure in shown if figure]


def panel(
    declared: Panel, train: Sequence[Numbers], lines: Sequence[Numbers], reference: Numbers
) -> dict[str, Any] | None:
    """A panel's table and figures; None if its first number was never logged."""
    first = declared.rows[0][1]
    logged = [line for line in train if line.get(first) is not None]
    if not logged:
        return None
    chosen = {"now": logged[-1]}
    if len({line[first] for line in logged}) > 1:
        chosen = {"at the start": logged[0], "halfway": logged[len(logged) // 2]} | chosen
    rows = {
        name: [formatted(line.get(key)) for line in chosen.values()] for name, key, formatted in declared.rows
    }
    figures, more = (drawn(part, lines, reference) for part in (declared.figures, declared.more))
    return declared._asdict() | {"columns": list(chosen), "rows": rows, "figures": figures, "more": more}


def value(line: Numbers, key: str | Callable[[Numbers], Any]) -> Any:
    """The value of a line that a curve shows; None if it is missing."""
    if callable(key):
        return key(line)
    content: Any = line
    for part in key.split("."):
        content = (content or {}).get(part)
    return content


def _levels(figure: Figure | BlockFigure, reference: Numbers) -> dict[str, float]:
    known = {name: reference.get(level) if isinstance(level, str) else level for name, level in figure.levels}
    return {name: v for name, v in known.items() if v is not None and (v > 0 or not figure.log)}


def _over_steps(figure: Figure, lines: Sequence[Numbers], reference: Numbers) -> Shown | None:
    curves = []
    for curve in figure.curves:
        points = [
            (line["step"], v)
            for line in lines
            if (v := value(line, curve.key)) is not None and (v > 0 or not figure.log)
        ]
        if points:
            x, y = zip(*points, strict=True)
            curves.append(Line(curve.label, curve.color, x, y, curve.style, curve.smooth))
    if not curves or (figure.changing and len(set(curves[0].y)) == 1):
        return None
    right = None
    if figure.right:
        name, key, factor = figure.right
        both = ((line.get(key), value(line, figure.curves[0].key)) for line in reversed(lines))
        right = next(((name, factor * b / a) for b, a in both if b and a), None)
    svg = plot(
        curves,
        _levels(figure, reference),
        figure.ylabel,
        log=figure.log,
        markers=figure.markers,
        symlog=figure.symlog,
        right=right,
        span=figure.span,
    )
    return Shown(figure.id, svg, figure.caption)


def _over_blocks(figure: BlockFigure, lines: Sequence[Numbers], reference: Numbers) -> Shown | None:
    points = [(line["step"], v) for line in lines if (v := value(line, figure.key))]
    if not points:
        return None
    if figure.times == 1:
        step, values = points[-1]
        groups, caption = {"": ("both", values)}, f"{figure.caption} Step {step:,}."
    else:
        chosen = dict((points[0], points[len(points) // 2], points[-1]))
        groups = {
            f"step {step:,}": (shade, v)
            for shade, (step, v) in zip(SHADES[-len(chosen) :], chosen.items(), strict=True)
        }
        caption = figure.caption
    return Shown(figure.id, by_depth(groups, figure.ylabel, _levels(figure, reference), figure.log), caption)


MEASURES = {
    "rankme": ("RankMe: directions in use", "1"),
    "lidar": ("LiDAR: directions that distinguish images", "1"),
    "spread": ("spread of the features", "0"),
    "uniformity": ("uniformity on the sphere", "0"),
    "alpha_req": ("alpha-ReQ: decay of the spectrum", "far above 1"),
}
"Names of the health metrics, and their values when all features are equal."


def health_panel(health: Sequence[Numbers], advice: str) -> dict[str, Any] | None:
    """Metrics of the features without labels: first and latest values, and curves. `advice`: what to change
    against collapse."""
    known = {
        key: values for key in MEASURES if (values := [h[key] for h in health if h.get(key) is not None])
    }
    if not known:
        return None
    lidar = ", and how many distinguish images under any mask (LiDAR)" if "lidar" in known else ""
    ranks = (
        f"How many directions the features use (RankMe){lidar}. Rising or constant is healthy; falling "
        f"towards 1 is collapse: {advice}."
    )
    spread = (
        "Distance between the features of different images, relative to their length. At 0 all images "
        "have the same features; then "
    )
    even = "How evenly the features cover the sphere: lower is more even, 0 is collapse."
    fall = (
        "Decay of the spectrum. About 1 is considered good; far above it few directions are left, far below "
        "it there is noise."
    )

    def figure(name: str, label: str, caption: str, level: tuple[str, float], *curves: Curve) -> Figure:
        return Figure(f"figure-{name}", label, curves, caption, (level,), markers=True)

    rank, distinct = Curve("rankme", "RankMe", "student"), Curve("lidar", "LiDAR", "ink")
    one, evenness, decay = (Curve(key, "", "student") for key in ("spread", "uniformity", "alpha_req"))
    main = (
        figure("rank", "effective rank", ranks, ("collapse", 1.0), rank, distinct),
        figure("spread", "spread", f"{spread}{advice}.", ("collapse", 0.0), one),
    )
    more = (
        figure("uniformity", "uniformity", even, ("collapse", 0.0), evenness),
        figure("alpha", "alpha-ReQ", fall, ("considered good", 1.0), decay),
    )
    table = []
    for key, values in known.items():
        name, collapsed = MEASURES[key]
        first, last = (f"{v:.2f}".replace("-", "\N{MINUS SIGN}") for v in (values[0], values[-1]))
        table.append((name, first, last, collapsed))
    return {"table": table, "figures": drawn(main, health, {}), "more": drawn(more, health, {})}
