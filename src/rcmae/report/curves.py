"""Curves as inline SVG that takes its colours from the page, so that it is readable in light and dark."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Placeholders that matplotlib can draw with; in the SVG they become the page's own colours.
COLOURS = {"student": "#010101", "teacher": "#020202", "floor": "#030303", "ink": "#040404", "faint": "#050505"}


@dataclass(frozen=True)
class Line:
    """A curve: its name, its colour (a key of COLOURS), and its points; points without a value are left out."""

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: str = "-"


def plot(
    lines: list[Line], levels: dict[str, float] | None = None, ylabel: str = "", log: bool = False, markers: bool = False,
    xlabel: str = "step", xlog: bool = False,
) -> str:  # fmt: skip
    """An SVG of some curves, over steps unless said otherwise, with dashed grey reference `levels` named at the right edge."""
    settings = {"font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "rcmae"}
    with rc_context(settings):
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        drawn = False
        for line in lines:
            points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None and (y > 0 or not log)]
            if points:
                drawn = True
                dots = markers or line.style == "o"
                axes.plot(
                    *zip(*points, strict=True), color=COLOURS[line.colour], label=line.name, linewidth=1.6,
                    linestyle="" if line.style == "o" else line.style, marker="o" if dots else None, markersize=3.5,
                )  # fmt: skip
        for name, value in (levels or {}).items():
            axes.axhline(value, color=COLOURS["floor"], linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                name, (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points",
                ha="right", va="bottom", color=COLOURS["floor"], fontsize=8,
            )  # fmt: skip
        if log and drawn:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        if xlog:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(xlabel, color=COLOURS["ink"])
        axes.set_ylabel(ylabel, color=COLOURS["ink"])
        axes.tick_params(colors=COLOURS["ink"], which="both", length=3)
        axes.grid(color=COLOURS["faint"], linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(COLOURS["faint"])
        if len(lines) > 1 and drawn:
            axes.legend(frameon=False, labelcolor=COLOURS["ink"], fontsize=8, loc="best", handlelength=1.6)
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


def standalone(svg: str) -> str:
    """An inline SVG as a file of its own, dark on white."""
    light = {"student": "#c2410c", "teacher": "#1d62b8", "floor": "#7b858f", "ink": "#1c2126", "faint": "#e3e6e9"}
    for name, colour in light.items():
        svg = svg.replace(f"var(--{name})", colour)
    return svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg" style="background:#fff"', 1)


_count = 0


def _own_names(svg: str) -> str:
    """Ids that do not clash with those of the other figures on the page."""
    global _count
    _count += 1
    svg = re.sub(r'id="([^"]+)"', rf'id="f{_count}-\1"', svg)
    return re.sub(r'(href="#|url\(#)([^")]+)', rf"\1f{_count}-\2", svg)
