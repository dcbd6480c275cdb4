"""Pictures of detections beside the ground truth, and figures of the precision."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion
from torch import Tensor

from ..errors import ConfigError, StorageError
from ..tasks.detection.average_precision import Precision
from ..tasks.detection.masks import Masks
from .curves import Line, column, plot

Color = tuple[int, ...]
Rectangle = tuple[int, int, int, int]

HEX = "ff5c5c 48a0ff 78dc5a ffbe28 be78ff 28d7cd ff82c8 c8e13c ff9132 e6e6e6 3cbe82 e1b996"
PALETTE: list[Color] = [tuple(bytes.fromhex(color)) for color in HEX.split()]
"""Colors of classes 1, 2, ..., repeated after the last: bright, because photographs are mostly dark, with
neighbors far apart in hue."""


def color_of(label: int) -> Color:
    """The color of class `label`, counted from 1."""
    return PALETTE[(label - 1) % len(PALETTE)]


# --- pictures -----------------------------------------------------------------------------------------------


def draw(
    pixels: UInt8[np.ndarray, "h w c"],
    boxes: Float[np.ndarray, "m 4"],
    texts: Sequence[str],
    colors: Sequence[Color],
    masks: Sequence[Bool[np.ndarray, "h w"]] | Bool[np.ndarray, "m h w"] | None = None,
    least: int = 640,
    most: int | None = None,
) -> Image.Image:
    """An image with boxes (x0 y0 x1 y1 in its pixels), translucent masks, and a label for each box unless its
    text is empty; the first objects are on top.

    If its longer side is below `least`, the image is enlarged without smoothing by an integer factor; above
    `most` it is shrunk. Lines and letters are drawn after that, so that they stay sharp. Of other than 3
    channels the first is shown.
    """
    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).convert("RGB")
    scale = most / max(image.size) if most and max(image.size) > most else max(1, least // max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = np.array(
        image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
    )
    line = max(2, round(max(size) / 400))
    order = range(len(boxes))[::-1]
    if masks is not None:
        for i in order:
            inside = np.asarray(Image.fromarray(masks[i]).resize(size, Image.Resampling.NEAREST))
            canvas[inside] = 0.6 * canvas[inside] + 0.4 * np.array(colors[i])
            canvas[inside & ~binary_erosion(inside, iterations=line)] = colors[i]
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    scaled: list[Rectangle] = [
        (round(x0 * scale), round(y0 * scale), round(x1 * scale), round(y1 * scale))
        for x0, y0, x1, y1 in boxes.tolist()
    ]
    for i in order:
        # A dark outline makes the box visible on any background.
        for grown, width, shade in ((1, line + 2, (0, 0, 0)), (0, line, colors[i])):
            pen.rectangle(_around(scaled[i], grown, size), outline=shade, width=width)
    font = ImageFont.load_default(max(12, max(size) / 45))
    extents = [_extent(font, text) if text else None for text in texts]
    for i, area in label_places(scaled, extents, size).items():
        center = (area[0] + area[2] + 1) / 2, (area[1] + area[3] + 1) / 2
        pen.rectangle(area, fill=colors[i])
        pen.text(center, texts[i], (0, 0, 0), font, anchor="mm")
    return image


def _around(box: Rectangle, grown: int, size: tuple[int, int]) -> Rectangle:
    """A box grown and clipped to the picture, as corners for Pillow, which include the last pixel."""
    x0, y0, x1, y1 = box
    left, top = max(0, min(x0 - grown, size[0] - 1)), max(0, min(y0 - grown, size[1] - 1))
    return left, top, max(left, min(x1 - 1 + grown, size[0] - 1)), max(top, min(y1 - 1 + grown, size[1] - 1))


def _extent(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str) -> tuple[int, int]:
    """Width and height of a label; all have the same height."""
    assert isinstance(font, ImageFont.FreeTypeFont)
    return round(font.getlength(text) + font.size / 2), round(1.25 * font.size)


def label_places(
    boxes: Sequence[Rectangle], extents: Sequence[tuple[int, int] | None], size: tuple[int, int]
) -> dict[int, Rectangle]:
    """The area of each box's label inside the picture, with the least overlap with labels of earlier boxes;
    as corners that include the last pixel.

    Candidates in this order: above the box, below it, inside at its top, all left-aligned, then
    right-aligned.
    """
    areas: dict[int, Rectangle] = {}
    for i, (box, extent) in enumerate(zip(boxes, extents, strict=True)):
        if extent is None:
            continue
        w, h = extent
        x0, y0, x1, y1 = box
        candidates = []
        for x in (x0, x1 - w):
            for y in (y0 - h, y1, y0):
                left, top = max(0, min(x, size[0] - w)), max(0, min(y, size[1] - h))
                candidates.append((left, top, min(left + w, size[0]) - 1, min(top + h, size[1]) - 1))
        areas[i] = min(candidates, key=lambda area: sum(_common(area, other) for other in areas.values()))
    return areas


def _common(a: Rectangle, b: Rectangle) -> int:
    """Pixels that two rectangles share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0]) + 1) * max(0, min(a[3], b[3]) - max(a[1], b[1]) + 1)


def draw_objects(
    pixels: UInt8[np.ndarray, "h w c"],
    objects: Mapping[str, Any],
    names: Sequence[str],
    threshold: float = 0.5,
    least: int = 640,
    most: int | None = None,
) -> Image.Image:
    """Draw detections or the ground truth: boxes "m 4" in the image's pixels, labels "m" (1: the first name),
    optional masks "m h w" and scores "m".

    Objects with a score below `threshold` are left out; the others are labeled "name 0.97", the highest score
    on top.
    """
    keys = ("boxes", "labels", "scores")
    tensors: dict[str, Tensor] = {key: objects[key].detach().cpu() for key in keys if key in objects}
    chosen: Sequence[int] = range(len(tensors["labels"]))
    if "scores" in tensors:
        order = tensors["scores"].argsort(descending=True, stable=True)
        order = order[tensors["scores"][order] >= threshold]
        chosen, tensors = order.tolist(), {key: value[order] for key, value in tensors.items()}
    labels = tensors["labels"].tolist()
    texts = [names[label - 1] for label in labels]
    if "scores" in tensors:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, tensors["scores"].tolist(), strict=True)]
    masks = Masks(chosen, lambda k: objects["masks"][k].cpu().numpy()) if "masks" in objects else None
    colors = [color_of(label) for label in labels]
    return draw(pixels, tensors["boxes"].float().numpy(), texts, colors, masks, least, most)


def save_picture(
    pixels: UInt8[np.ndarray, "h w c"],
    detection: Mapping[str, Any],
    names: Sequence[str],
    target: Path,
    threshold: float = 0.5,
) -> None:
    """Write an image with its detections. Raises ConfigError for an unknown file extension, and
    StorageError."""
    try:
        draw_objects(pixels, detection, names, threshold).save(target)
    except OSError as e:
        raise StorageError(f"cannot write {target}: {e.strerror or e}") from e
    except ValueError as e:
        raise ConfigError(f"cannot write {target}: unknown file extension; use .png or .jpg") from e


SIDE = 384
"Longer side in pixels of each of two pictures side by side."


def side_by_side(
    pixels: UInt8[np.ndarray, "h w c"],
    truth: Mapping[str, Tensor],
    detected: Mapping[str, Tensor],
    names: Sequence[str],
) -> Image.Image:
    """Ground truth and detections of one image, on a transparent background for light and dark pages."""
    pair = [draw_objects(pixels, objects, names, least=SIDE, most=SIDE) for objects in (truth, detected)]
    gap, head, (width, height) = SIDE // 48, SIDE // 12, pair[0].size
    sheet = Image.new("RGBA", (2 * width + gap, head + height))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(SIDE / 22)
    for k, (name, picture) in enumerate(zip(("truth", "detected"), pair, strict=True)):
        pen.text((k * (width + gap), head / 2), name, "#7b858f", font, anchor="lm")
        sheet.paste(picture, (k * (width + gap), head))
    return sheet


# --- figures ------------------------------------------------------------------------------------------------

PARTS = {"box": ("boxes", "ink"), "mask": ("masks", "gold")}
"Names and colors; blue and orange stand for teacher and student elsewhere."


def curve_figure(parts: Mapping[str, Precision]) -> str:
    """An SVG of precision over recall, averaged over classes, of boxes and masks, at IoU 0.5 and (dashed)
    0.75."""
    lines = [
        Line(
            f"{name}, IoU {iou}", color, np.linspace(0, 1, len(y)).tolist(), y, "-" if iou == "0.5" else "--"
        )
        for part, (name, color) in PARTS.items()
        if part in parts
        for iou, y in parts[part].curves.items()
    ]
    return plot(lines, ylabel="precision", xlabel="recall")


def progress_figure(history: Sequence[Mapping[str, float | None]]) -> str:
    """An SVG of the average precision over training. `history`: step, "box AP" and "mask AP" in percent of
    each evaluation."""
    lines = [
        Line(name, color, column(history, "step"), column(history, f"{part} AP"))
        for part, (name, color) in PARTS.items()
    ]
    return plot(lines, ylabel="AP, %", markers=True)
