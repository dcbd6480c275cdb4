"""Draw the pictures of docs/report.md from a run: `python -m benchmarks.report_figures RUN`.

The figures are those of the run's report; the sheet shows one row for each image: its visible patches, the
student's reconstruction at the first, middle and last snapshot, and with the true contrast.
"""

import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.reconstructions import GAP, GRAY, SIDE
from rcmae.report import build, pictures
from rcmae.report.curves import standalone

OUT = Path(__file__).parent.parent / "docs" / "img"
FIGURES = ("loss", "advantage", "rank")
IMAGES = 3


def figures(run: Path) -> dict[str, str]:
    """The figures of the report that the page shows, each as the content of a file."""
    page = build.render(run, running=False)
    found_by_name = {
        name: re.search(rf'<figure id="figure-{name}">(<svg.*?</svg>)', page, re.S) for name in FIGURES
    }
    return {name: standalone(match[1]) for name, match in found_by_name.items() if match}


def sheet(run: Path) -> Image.Image:
    """The reconstructions of a few images over time, with the step above each column."""
    paths = sorted((run / "snapshots").glob("[0-9]*.safetensors"))
    first, middle, last = (pictures.read_snapshot(paths[i]) for i in (0, len(paths) // 2, -1))
    rows: list[dict[str, np.ndarray]] = []
    for i in range(IMAGES):
        row = {"input": last.image[i].transpose(1, 2, 0), "visible": pictures.visible(last, i)}
        row |= {f"step {s.step:,}": pictures.picture(s, i, "student") for s in (first, middle, last)}
        rows.append(row | {"true contrast": pictures.picture(last, i, "student", true_statistics=True)})
    step, head = SIDE + GAP, 28
    canvas = Image.new("RGBA", (len(rows[0]) * step - GAP, head + len(rows) * step - GAP))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(18)
    for x, name in enumerate(rows[0]):
        pen.text((x * step + SIDE // 2, head // 2), name, GRAY, font, anchor="mm")
    for y, row in enumerate(rows):
        for x, pixels in enumerate(row.values()):
            picture = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            canvas.paste(picture, (x * step, head + y * step))
    return canvas


if __name__ == "__main__":
    for name, svg in figures(Path(sys.argv[1])).items():
        (OUT / f"report-{name}.svg").write_text(svg, encoding="utf-8")
    sheet(Path(sys.argv[1])).save(OUT / "report-pictures.png", optimize=True)
