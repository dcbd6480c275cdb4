"""Pictures of what a detector found beside what is there, and figures of its precision."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import ConfigError, StorageError
from ..tasks.detection.average_precision import Precision
from ..tasks.detection.masks import Masks
from .curves import Line, column, plot

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]

PALETTE: tuple[Colour, ...] = (
    (255, 92, 92), (72, 160, 255), (120, 220, 90), (255, 190, 40), (190, 120, 255), (40, 215, 205),
    (255, 130, 200), (200, 225, 60), (255, 145, 50), (230, 230, 230), (60, 190, 130), (225, 185, 150),
)  # fmt: skip
"Colours of classes 1, 2, ... and again from the first: bright, as photographs are mostly dark, and neighbours far apart in hue."


def colour_of(label: int) -> Colour:
    """The colour of class `label`, counted from 1; always the same."""
    return PALETTE[(label - 1) % len(PALETTE)]


# --- one picture ------------------------------------------------------------------------------------------------------


def draw(
    pixels: UInt8[np.ndarray, "h w c"], boxes: Float[np.ndarray, "m 4"], texts: Sequence[str], colours: Sequence[Colour],
    masks: Sequence[Bool[np.ndarray, "h w"]] | Bool[np.ndarray, "m h w"] | None = None, least: int = 640, most: int | None = None,
) -> Image.Image:  # fmt: skip
    """An image with boxes (x0 y0 x1 y1 in its pixels), translucent masks, and a label at each box; the first lie on top.

    Enlarged without smoothing by a whole factor if its longer side is below `least`, or shrunk to `most`: lines and letters are drawn
    after that, so that they stay sharp. A text "" has no label. Of other than 3 channels the first is shown.
    """
    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).convert("RGB")
    scale = most / max(image.size) if most and max(image.size) > most else max(1, least // max(image.size))
    size = tuple(max(1, round(side * scale)) for side in image.size)
    canvas = np.array(image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS))
    line = max(2, round(max(size) / 400))
    order = range(len(boxes))[::-1]
    for i in order if masks is not None else ():
        inside = np.asarray(Image.fromarray(masks[i]).resize(size, Image.Resampling.NEAREST))
        canvas[inside] = 0.6 * canvas[inside] + 0.4 * np.array(colours[i])
        canvas[inside & ~_shrunk(inside, line)] = colours[i]
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    places = [tuple(round(x * scale) for x in box) for box in boxes.tolist()]
    for i in order:
        for grown, width, shade in ((1, line + 2, (0, 0, 0)), (0, line, colours[i])):  # a dark rim: seen on any ground
            pen.rectangle(_around(places[i], grown, size), outline=shade, width=width)
    font = ImageFont.load_default(max(12, max(size) / 45))
    for i, spot in label_places(places, [_extent(font, text) if text else None for text in texts], size).items():
        pen.rectangle(spot, fill=colours[i])
        pen.text(((spot[0] + spot[2] + 1) / 2, (spot[1] + spot[3] + 1) / 2), texts[i], (0, 0, 0), font, anchor="mm")
    return image


def _shrunk(mask: Bool[np.ndarray, "h w"], by: int) -> Bool[np.ndarray, "h w"]:
    """A mask without its outermost `by` pixels."""
    for _ in range(by):
        wide = np.pad(mask, 1)
        mask = mask & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return mask


def _around(box: Rectangle, grown: int, size: tuple[int, int]) -> Rectangle:
    """A box grown and cut to the picture, as the corners that Pillow paints: the last pixel is in."""
    x0, y0, x1, y1 = box
    left, top = max(0, min(x0 - grown, size[0] - 1)), max(0, min(y0 - grown, size[1] - 1))
    return left, top, max(left, min(x1 - 1 + grown, size[0] - 1)), max(top, min(y1 - 1 + grown, size[1] - 1))


def _extent(font: ImageFont.FreeTypeFont, text: str) -> tuple[int, int]:
    """Width and height of a label; the height is that of any text."""
    return round(font.getlength(text) + font.size / 2), round(1.25 * font.size)


def label_places(boxes: Sequence[Rectangle], extents: Sequence[tuple[int, int] | None], size: tuple[int, int]) -> dict[int, Rectangle]:
    """Where the label of each box goes, as corners with the last pixel in: in the picture, and where it covers others least.

    Tried in this order: above the box, below it, inside at its top, all flush left, then flush right. The first boxes choose first.
    """
    taken: dict[int, Rectangle] = {}
    for i, (box, extent) in enumerate(zip(boxes, extents, strict=True)):
        if extent is None:
            continue
        w, h = extent
        x0, y0, x1, y1 = box
        spots = []
        for x in (x0, x1 - w):
            for y in (y0 - h, y1, y0):
                left, top = (max(0, min(at, side - long)) for at, side, long in ((x, size[0], w), (y, size[1], h)))
                spots.append((left, top, min(left + w, size[0]) - 1, min(top + h, size[1]) - 1))
        taken[i] = min(spots, key=lambda spot: sum(_common(spot, other) for other in taken.values()))
    return taken


def _common(a: Rectangle, b: Rectangle) -> int:
    """Pixels that two rectangles share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0]) + 1) * max(0, min(a[3], b[3]) - max(a[1], b[1]) + 1)


def draw_objects(
    pixels: UInt8[np.ndarray, "h w c"], objects: Mapping[str, Any], names: Sequence[str], threshold: float = 0.5,
    least: int = 640, most: int | None = None,
) -> Image.Image:  # fmt: skip
    """A detection or the truth: boxes "m 4" in the image's pixels, labels "m" (1: the first name), perhaps m masks "h w" and scores "m".

    Of what has scores, that which scores at least `threshold`, the most certain on top and labelled "name 0.97".
    """
    found = {name: objects[name].detach().cpu() for name in ("boxes", "labels", "scores") if name in objects}
    chosen = range(len(found["labels"]))
    if "scores" in found:
        order = found["scores"].argsort(descending=True, stable=True)
        order = order[found["scores"][order] >= threshold]
        chosen, found = order.tolist(), {name: value[order] for name, value in found.items()}
    labels = found["labels"].tolist()
    texts = [names[label - 1] for label in labels]
    if "scores" in found:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, found["scores"].tolist(), strict=True)]
    masks = Masks(chosen, lambda k: objects["masks"][k].cpu().numpy()) if "masks" in objects else None
    return draw(pixels, found["boxes"].float().numpy(), texts, [colour_of(label) for label in labels], masks, least, most)


def save_picture(
    pixels: UInt8[np.ndarray, "h w c"], detection: Mapping[str, Any], names: Sequence[str], target: Path, threshold: float = 0.5
) -> None:
    """Write an image with what was detected on it. Raises ConfigError (the target's ending) and StorageError."""
    try:
        draw_objects(pixels, detection, names, threshold).save(target)
    except OSError as e:
        raise StorageError(f"cannot write {target}: {e.strerror or e}") from e
    except ValueError as e:
        raise ConfigError(f"cannot write {target}: its ending names no kind of picture; use .png or .jpg") from e


SIDE = 384
"Pixels of the longer side of a picture beside another."


def side_by_side(
    pixels: UInt8[np.ndarray, "h w c"], truth: Mapping[str, Tensor], found: Mapping[str, Tensor], names: Sequence[str]
) -> Image.Image:
    """What is there and what was found on one image, on a transparent ground that suits a light and a dark page."""
    pair = [draw_objects(pixels, objects, names, least=SIDE, most=SIDE) for objects in (truth, found)]
    gap, head, (width, height) = SIDE // 48, SIDE // 12, pair[0].size
    sheet = Image.new("RGBA", (2 * width + gap, head + height))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(SIDE / 22)
    for k, (name, picture) in enumerate(zip(("truth", "detected"), pair, strict=True)):
        pen.text((k * (width + gap), head / 2), name, "#7b858f", font, anchor="lm")
        sheet.paste(picture, (k * (width + gap), head))
    return sheet


def embedded(image: Image.Image) -> str:
    """A picture inside a URI, as WebP: a photograph takes a sixth of what it takes as PNG."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


# --- figures ----------------------------------------------------------------------------------------------------------

PARTS = {"box": ("boxes", "ink"), "mask": ("masks", "gold")}
"Name and colour of what is compared; blue and orange are taken by teacher and student."


def curve_figure(parts: Mapping[str, Precision]) -> str:
    """An SVG of precision over recall, the mean of the classes: of boxes and masks, at IoU 0.5 and (dashed) 0.75."""
    lines = [
        Line(f"{name}, IoU {iou}", colour, np.linspace(0, 1, len(curve)), curve, "-" if iou == "0.5" else "--")
        for part, (name, colour) in PARTS.items()
        if part in parts
        for iou, curve in parts[part].curves.items()
    ]
    return plot(lines, ylabel="precision", xlabel="recall")


def progress_figure(history: Sequence[Mapping[str, float | None]]) -> str:
    """An SVG of the average precision over training. `history`: of each scoring its step, and "box AP" and "mask AP" in percent."""
    rows = list(history)
    lines = [Line(name, colour, column(rows, "step"), column(rows, f"{part} AP")) for part, (name, colour) in PARTS.items()]
    return plot(lines, ylabel="AP, %", markers=True)
