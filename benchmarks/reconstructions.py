"""Draw the picture of README from the last snapshot of a run: `python -m benchmarks.reconstructions RUN`.

The background is transparent and the labels are gray, which reads on light and dark pages.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rcmae.report import pictures

OUT = Path(__file__).parent.parent / "docs" / "img" / "reconstructions.png"
SIDE, GAP, MARGIN = 128, 8, 96
GRAY = (128, 134, 142, 255)


def draw(run: Path) -> Image.Image:
    """Input, masked input, student and teacher as rows; the images as columns."""
    snapshot = pictures.read_snapshot(max((run / "snapshots").glob("[0-9]*.safetensors")))
    images = range(len(snapshot.image))
    rows: dict[str, list[np.ndarray]] = {
        "input": [snapshot.image[i].transpose(1, 2, 0) for i in images],
        "masked": [pictures.visible(snapshot, i) for i in images],
    }
    rows |= {name: [pictures.picture(snapshot, i, name) for i in images] for name in snapshot.predictions}
    step = SIDE + GAP
    sheet = Image.new("RGBA", (MARGIN + len(images) * step - GAP, len(rows) * step - GAP))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(20)
    for y, (name, row) in enumerate(rows.items()):
        pen.text((MARGIN - 12, y * step + SIDE // 2), name, GRAY, font, anchor="rm")
        for x, pixels in enumerate(row):
            picture = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(picture, (MARGIN + x * step, y * step))
    return sheet


if __name__ == "__main__":
    draw(Path(sys.argv[1])).save(OUT, optimize=True)
