"""Curves as inline SVG that takes its colours from the page, so that it is readable in light and dark."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# The page's colours on white, and placeholders that matplotlib can draw with; in the SVG they become the page's own colours.
# "both" is what lies between student and teacher; "memory1" to "memory3" are teachers of shorter to longer memory, or anything
# else that has an order.
LIGHT = {
    "student": "#c2410c", "teacher": "#1d62b8", "both": "#7e3f98", "floor": "#7b858f", "ink": "#1c2126", "faint": "#e3e6e9",
    "memory1": "#7fb0ea", "memory2": "#1d62b8", "memory3": "#0a2a5c", "good": "#1a7f4b", "gold": "#b38600",
}  # fmt: skip
COLOURS = {name: f"#{i:02x}{i:02x}{i:02x}" for i, name in enumerate(LIGHT, 1)}


@dataclass(frozen=True)
class Line:
    """A curve: its name ("" keeps it out of the legend), its colour (a key of COLOURS), and its points; those without a value are left out.

    `style`: matplotlib's, "o" for points alone, or "band" for a broad pale line that others should follow. `smooth` draws a running
    mean, and the points themselves pale behind it.
    """

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: str = "-"
    smooth: bool = False
    spread: tuple[Sequence[float], Sequence[float]] | None = None
    "lower and upper edge of a pale area around it"


def plot(
    lines: list[Line], levels: dict[str, float] | None = None, ylabel: str = "", log: bool = False, markers: bool = False,
    xlabel: str = "step", xlog: bool = False, symlog: float | None = None, ticks: dict[int, str] | None = None,
    right: tuple[str, float] | None = None, span: float = 0.0,
) -> str:  # fmt: skip
    """An SVG of some curves, over steps unless said otherwise, with dashed grey reference `levels` named at the right edge.

    `symlog`: both signs on a logarithmic axis that is straight up to this value. `ticks`: words along the x axis, by place.
    `right`: name of a second y axis, and its units in one of the first. `span`: the least that the y axis spans.
    """
    settings = {
        "font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "rcmae",
        "axes.formatter.useoffset": False, "axes.formatter.limits": (-4, 6),
    }  # fmt: skip
    with rc_context(settings):
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        drawn = [line for line in lines if _draw(axes, line, markers, log)]
        for name, value in (levels or {}).items():
            axes.axhline(value, color=COLOURS["floor"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(
                name, (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points",
                ha="right", va="bottom", color=COLOURS["floor"], fontsize=8,
            )  # fmt: skip
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
        if xlabel == "step":
            axes.set_xlim(left=0)
        if ticks:
            small = len("".join(ticks.values())) > 30
            axes.set_xticks(list(ticks), list(ticks.values()), rotation=90 if small else 0, fontsize=7 if small else 8)
        sides = [axes]
        if right:
            label, factor = right
            sides.append(axes.secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor)))
            sides[1].set_ylabel(label, color=COLOURS["ink"])
        axes.set_xlabel(xlabel, color=COLOURS["ink"])
        axes.set_ylabel(ylabel, color=COLOURS["ink"])
        axes.grid(color=COLOURS["faint"], linewidth=0.6)
        for side in sides:
            side.tick_params(colors=COLOURS["ink"], which="both", length=3)
            side.spines[:].set_color(COLOURS["faint"])
        axes.spines[["top", "right"]].set_visible(False)
        names = [line.name for line in drawn if line.name]
        if len(names) > 1:
            # Above the axes: no curve runs through it. Many short names need less height in four columns.
            look = {"frameon": False, "labelcolor": COLOURS["ink"], "fontsize": 8, "handlelength": 1.6, "borderpad": 0.2}
            short = len(names) > 4 and max(map(len, names)) < 15
            axes.legend(**look, loc="lower left", bbox_to_anchor=(0, 1), ncols=4 if short else 2)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return _own_names(svg)


def column(lines: list[dict[str, Any]], key: str) -> list[Any]:
    """One number of every line; None where it is missing."""
    return [line.get(key) for line in lines]


def by_depth(
    groups: dict[str, tuple[str, dict[str, float]]], ylabel: str, levels: dict[str, float] | None = None, log: bool = False
) -> str:
    """An SVG over the blocks of a network, from the input to the output. `groups`: name to (colour, value by block); blocks are
    named "encoder 3", and between encoder and decoder the curve has a gap."""
    blocks = list(next(iter(groups.values()))[1])
    parts = list(dict.fromkeys(block.split()[0] for block in blocks))
    places = {block: i + parts.index(block.split()[0]) for i, block in enumerate(blocks)}
    lines = []
    for name, (colour, values) in groups.items():
        for part in parts:
            own = [block for block in values if block.split()[0] == part]
            lines.append(Line(name if part == parts[0] else "", colour, [places[b] for b in own], [values[b] for b in own]))
    ticks = {place: block.partition(" ")[2].replace("_", " ") for block, place in places.items()}
    return plot(lines, levels, ylabel, log, markers=True, xlabel=", then ".join(parts), ticks=ticks)


def _draw(axes: Axes, line: Line, markers: bool, log: bool) -> bool:
    """Draw a line; says whether it had points."""
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None and (y > 0 or not log)]
    if not points:
        return False
    x, y = zip(*points, strict=True)
    style = {"o": "", "band": "-"}.get(line.style, line.style)
    look = {"color": COLOURS[line.colour], "linestyle": style}
    window = len(y) // 20
    if line.smooth and window > 1:
        axes.plot(x, y, **look, linewidth=0.8, alpha=0.3)
        sums = np.cumsum([0.0, *y])
        first, last = (np.clip(np.arange(len(y)) + k, 0, len(y)) for k in (-window, window + 1))
        y = (sums[last] - sums[first]) / (last - first)
    if line.spread:
        axes.fill_between(line.x, *line.spread, color=COLOURS[line.colour], alpha=0.12, linewidth=0)
    marker = "o" if markers or line.style == "o" else None
    weight = {"linewidth": 5, "alpha": 0.45} if line.style == "band" else {"linewidth": 1.6}
    axes.plot(x, y, **look, **weight, label=line.name or "_", marker=marker, markersize=3.5)
    return True


def _plain(value: float, _: object = None) -> str:
    """A number in few signs."""
    return f"{value:g}".replace("e-0", "e-").replace("-", "\N{MINUS SIGN}")


def _number_log(axis: Axis) -> None:
    """Numbers at powers of ten, and at 2 and 5 between them where few powers of ten are in sight."""
    low, high = axis.get_view_interval()
    few = high / low < 1e3
    axis.set_major_formatter(_plain)
    axis.set_minor_formatter(lambda value, _: _plain(value) if few and f"{value:e}"[0] in "25" else "")


def standalone(svg: str) -> str:
    """An inline SVG as a file of its own, dark on white."""
    for name, colour in LIGHT.items():
        svg = svg.replace(f"var(--{name})", colour)
    return svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg" style="background:#fff"', 1)


_count = 0


def _own_names(svg: str) -> str:
    """Ids that do not clash with those of the other figures on the page."""
    global _count
    _count += 1
    svg = re.sub(r'id="([^"]+)"', rf'id="f{_count}-\1"', svg)
    return re.sub(r'(href="#|url\(#)([^")]+)', rf"\1f{_count}-\2", svg)
