"""Curves as inline SVG with the colors of the page, readable in light and dark mode."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# The page's colors in light mode. "both" is for quantities between student and teacher, "memory1" to
# "memory3" for teachers from shorter to longer half-life, or anything else with an order.
LIGHT = {
    "student": "#c2410c",
    "teacher": "#1d62b8",
    "both": "#7e3f98",
    "baseline": "#7b858f",
    "ink": "#1c2126",
    "faint": "#e3e6e9",
    "memory1": "#7fb0ea",
    "memory2": "#1d62b8",
    "memory3": "#0a2a5c",
    "good": "#1a7f4b",
    "gold": "#b38600",
}
SMALL = 9.5
"Size of the smallest text in points: 11 px where a figure of WIDTH is as wide as a phone."

WIDTH, HEIGHT = 4.2, 2.75
"Size of a figure in inches; an inch is added for turned labels below the axis."

DPI = 200
"Resolution of PNG files: a figure of WIDTH is 840 px wide."

# Placeholders for matplotlib, replaced in the SVG by variables of the page.
COLORS = {name: f"#{i:02x}{i:02x}{i:02x}" for i, name in enumerate(LIGHT, 1)}

SETTINGS: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "rcmae",
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 6),
}


@dataclass(frozen=True)
class Line:
    """A curve: its name ("" keeps it out of the legend), its color (a key of COLORS), and its points; those
    without a value are left out. `style` and `smooth` are those of `methods.diagnostics.Curve`."""

    name: str
    color: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: str = "-"
    smooth: bool = False
    spread: tuple[Sequence[float], Sequence[float]] | None = None
    "lower and upper bound of a pale area around the curve"


def plot(
    lines: list[Line],
    levels: dict[str, float] | None = None,
    ylabel: str = "",
    log: bool = False,
    **options: Any,
) -> str:
    """An SVG of curves in the colors of the page; the arguments are those of `draw`."""
    file = io.StringIO()
    with rc_context(SETTINGS):
        figure = draw(COLORS, lines, levels, ylabel, log, **options)
        figure.savefig(
            file,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return _unique_ids(svg)


def png(lines: list[Line], **options: Any) -> bytes:
    """A PNG of curves in the colors of light mode; the options are those of `draw`."""
    file = io.BytesIO()
    with rc_context(SETTINGS):
        figure = draw(LIGHT, lines, **options)
        figure.savefig(file, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def draw(
    colors: Mapping[str, str],
    lines: list[Line],
    levels: dict[str, float] | None = None,
    ylabel: str = "",
    log: bool = False,
    markers: bool = False,
    xlabel: str = "step",
    xlog: bool = False,
    symlog: float | None = None,
    ticks: dict[int, str] | None = None,
    right: tuple[str, float] | None = None,
    span: float = 0.0,
) -> Figure:
    """Curves, over steps by default, with dashed gray reference `levels` labeled at the right edge. A linear
    y axis of values of 0 or more does not start below 0. To be called and saved within SETTINGS.

    `colors` are COLORS or LIGHT. `symlog` and `span` are those of `methods.diagnostics.Figure`. `ticks`:
    labels by position on the x axis. `right`: name of a second y axis, and its units per unit of the first.
    """
    turned = len("".join((ticks or {}).values())) > 24
    figure = Figure(figsize=(WIDTH, HEIGHT + turned), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    drawn = [line for line in lines if _draw(axes, line, markers, log, colors)]
    for value in (levels or {}).values():
        axes.axhline(value, color=colors["baseline"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.margins(y=0.1)  # for its label
    if log and drawn:
        axes.set_yscale("log")
        _number_log(axes.yaxis)
    if xlog and drawn:
        axes.set_xscale("log")
        _number_log(axes.xaxis)
    if symlog:
        axes.set_yscale("symlog", linthresh=symlog)
        axes.yaxis.set_major_formatter(_plain)
    low, high = axes.get_ylim()
    if high - low < span:
        axes.set_ylim((low + high - span) / 2, (low + high + span) / 2)
    if not (log or symlog) and axes.get_ylim()[0] < 0 <= axes.dataLim.y0:
        axes.set_ylim(bottom=0)
    if xlabel == "step":
        axes.set_xlim(left=0)
    if ticks:
        labels = _thinned(list(ticks.values()))
        axes.set_xticks(list(ticks), labels, rotation=90 * turned, fontsize=SMALL)
    sides: list[Any] = [axes]
    if right:
        label, factor = right
        scale: Any = (lambda y: y * factor, lambda y: y / factor)
        sides.append(axes.secondary_yaxis("right", functions=scale))
        sides[1].set_ylabel(label, color=colors["ink"])
    axes.set_xlabel(xlabel, color=colors["ink"])
    axes.set_ylabel(ylabel, color=colors["ink"])
    axes.grid(color=colors["faint"], linewidth=0.6)
    for side in sides:
        side.tick_params(colors=colors["ink"], which="both", length=3)
        side.spines[:].set_color(colors["faint"])
    axes.spines[["top", "right"]].set_visible(False)
    names = [line.name for line in drawn if line.name]
    if len(names) > 1:
        # Above the axes, where it hides no curve; many short names need less height in three columns.
        longest = max(map(len, names))
        figure.legend(
            loc="outside upper left",
            ncols=1 if longest > 24 else 3 if len(names) > 4 and longest < 15 else 2,
            frameon=False,
            labelcolor=colors["ink"],
            fontsize=SMALL,
            handlelength=1.4,
            columnspacing=1.2,
            borderpad=0.2,
        )
    _label(figure, axes, levels or {}, colors)
    return figure


def column(lines: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    """A value of every line; None if it is missing."""
    return [line.get(key) for line in lines]


def by_depth(
    groups: dict[str, tuple[str, dict[str, float]]],
    ylabel: str,
    levels: dict[str, float] | None = None,
    log: bool = False,
) -> str:
    """An SVG over the blocks of a network, from the input to the output, with a gap between encoder and
    decoder. `groups`: name -> (color, value by block); blocks have names such as "encoder 3"."""
    blocks = list(next(iter(groups.values()))[1])
    parts = list(dict.fromkeys(block.split()[0] for block in blocks))
    positions = {block: i + parts.index(block.split()[0]) for i, block in enumerate(blocks)}
    lines = []
    for name, (color, values) in groups.items():
        for part in parts:
            chosen = [block for block in values if block.split()[0] == part]
            label = name if part == parts[0] else ""
            x, y = [positions[block] for block in chosen], [values[block] for block in chosen]
            lines.append(Line(label, color, x, y))
    ticks = {x: block.partition(" ")[2].replace("_", " ") for block, x in positions.items()}
    return plot(lines, levels, ylabel, log, markers=True, xlabel=", then ".join(parts), ticks=ticks)


def _draw(axes: Axes, line: Line, markers: bool, log: bool, colors: Mapping[str, str]) -> bool:
    """Draw a line; returns whether it has points."""
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None and (y > 0 or not log)]
    if not points:
        return False
    x, y = zip(*points, strict=True)
    style = {"o": "", "band": "-"}.get(line.style, line.style)
    look: dict[str, Any] = {"color": colors[line.color], "linestyle": style}
    window = len(y) // 20
    if line.smooth and window > 1:
        axes.plot(x, y, **look, linewidth=0.8, alpha=0.3)
        sums = np.cumsum([0.0, *y])
        first, last = (np.clip(np.arange(len(y)) + k, 0, len(y)) for k in (-window, window + 1))
        y = (sums[last] - sums[first]) / (last - first)
    if line.spread:
        axes.fill_between(line.x, *line.spread, color=colors[line.color], alpha=0.12, linewidth=0)
    marker = "o" if markers or line.style == "o" else None
    weight: dict[str, Any] = {"linewidth": 5, "alpha": 0.45} if line.style == "band" else {"linewidth": 1.6}
    axes.plot(x, y, **look, **weight, label=line.name or "_", marker=marker, markersize=3.5)
    return True


def _label(figure: Figure, axes: Axes, levels: Mapping[str, float], colors: Mapping[str, str]) -> None:
    """Label horizontal lines at the right edge, each above its line; of labels that would overlap, the lowest
    is below its line if there is room, and the others are moved up, in the order of their lines."""
    levels = {name: value for name, value in sorted(levels.items(), key=lambda x: x[1]) if name}
    if len(levels) > 1:
        figure.draw_without_rendering()  # the layout, which decides the distances
    to_points, line_height, gap = 72 / figure.dpi, 1.2 * SMALL, 2.0
    bottom = axes.bbox.y0
    lines = [to_points * (axes.transData.transform((0, v))[1] - bottom) for v in levels.values()]
    heights: list[float] = []
    for i, line in enumerate(lines):
        lowest = heights[-1] + line_height if heights else 0.0
        above, below = line + gap, line - gap - line_height
        crowded = i + 1 < len(lines) and lines[i + 1] + gap < above + line_height
        heights.append(below if crowded and below >= lowest else max(above, lowest))
    for name, line, height in zip(levels, lines, heights, strict=True):
        axes.annotate(
            name,
            (1, levels[name]),
            xycoords=("axes fraction", "data"),
            xytext=(-2, height - line),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=colors["baseline"],
            fontsize=SMALL,
            in_layout=False,
        )


def _thinned(labels: list[str]) -> list[str]:
    """Labels of ticks where some of the numbers are left out if there is no room for all."""
    every = math.ceil(len(labels) * 1.2 * SMALL / (72 * WIDTH - 50))
    return ["" if label.isdigit() and int(label) % every else label for label in labels]


def _plain(value: float, _: object = None) -> str:
    """A number, written briefly."""
    return f"{value:g}".replace("e-0", "e-").replace("-", "\N{MINUS SIGN}")


def _number_log(axis: Axis) -> None:
    """Label powers of ten, and also 2 and 5 times them if the axis spans less than three decades."""
    low, high = axis.get_view_interval()
    short = high / low < 1e3
    axis.set_major_formatter(_plain)
    axis.set_minor_formatter(lambda value, _: _plain(value) if short and f"{value:e}"[0] in "25" else "")


def standalone(svg: str) -> str:
    """An inline SVG as the content of a file, in the colors of light mode."""
    for name, color in LIGHT.items():
        svg = svg.replace(f"var(--{name})", color)
    return svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg" style="background:#fff"', 1)


_count = 0


def _unique_ids(svg: str) -> str:
    """Make the ids differ from those of the other figures on the page."""
    global _count
    _count += 1
    svg = re.sub(r'id="([^"]+)"', rf'id="f{_count}-\1"', svg)
    return re.sub(r'(href="#|url\(#)([^")]+)', rf"\1f{_count}-\2", svg)
