"""`rcmae look`: what a network sees in images, as PNG files and on one page that needs no network access."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..config import check, flat, how_many
from ..data.dataset import Bad
from ..data.files import Files
from ..data.pixels import measure_bits
from ..data.sources import Source, open_source
from ..data.views import rng
from ..engine import distributed
from ..engine.checkpoint import replace_file
from ..engine.console import Screen
from ..engine.distributed import World
from ..engine.run import translate_errors
from ..errors import CheckpointError, ConfigError, DataError, RcmaeError, StorageError
from ..interop.load import is_bare, load, load_method
from ..methods import METHODS
from ..methods.base import Method
from ..methods.recipes import join_names
from ..models.backbone import Backbone, pooled
from ..tasks.embed import check_pool, embed_source, opened, report_unreadable
from ..tasks.evaluate import networks
from ..tasks.evaluation.base import Pool, ReadingOptions, run_of_backbone
from ..tasks.nearest_neighbors import nearest
from ..tasks.score import Centers
from . import pictures
from .build import template

RATIOS = (0.5, 0.75, 0.9)
"Fractions of hidden patches."

FIRST = 8
"Images of a folder that are shown."

NEIGHBORS = 6

CELL, GAP, TEXT, TITLE = 200, 20, 17, 26
"Sides of a picture and of a gap in a PNG, and the sizes of its text, in pixels."

PAPER, INK, SOFT, EDGE = "#ffffff", "#1c2126", "#5d6670", "#c9ced3"


class Cell(NamedTuple):
    """A picture [h, w, c] with the text below it, of one or more lines, and a description for those who
    cannot see it."""

    pixels: UInt8[np.ndarray, "h w c"]
    caption: str
    alt: str


@dataclass(frozen=True)
class Sheet:
    """Rows of pictures: a PNG file, and a part of the page."""

    name: str
    "of the file, without .png"
    title: str
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Part:
    """A section of the page."""

    id: str
    title: str
    text: str
    sheets: list[Sheet]


class Shown(NamedTuple):
    """The k readable images: their names, and what the network sees."""

    names: list[str]
    paths: list[str]
    pixels: UInt8[Tensor, "k c h w"]
    unreadable: list[Bad]


def look(
    backbone: str,
    images: Sequence[Path],
    out: Path,
    *,
    data: str | None = None,
    which: Literal["teacher", "student"] = "teacher",
    pool: Pool | None = None,
    ratios: Sequence[float] = RATIOS,
    device: str = "auto",
    precision: str = "auto",
    workers: int | None = None,
    reading: ReadingOptions = ReadingOptions(),
    cache: Path | None = None,
    screen: Screen | None = None,
) -> dict[str, Any]:
    """Draw what a backbone sees in images: PNG files and look.html in the folder `out`.

    - Reconstructions with `ratios` of the patches hidden, by student and teacher, of a run or of a folder
      that `rcmae import` has written; other backbones have no decoder.
    - The first three principal components of the patch features of all images together, as colors.
    - The attention of the class token, if there is one.
    - With `data`, the images of that source that are nearest to each image, by the cosine of the `pool`
      feature (default: that of the backbone's method).

    `images` are files, or folders, of which the first 8 images are taken. `backbone`, `which` and `pool` are
    those of `rcmae.embed`. Returns the page, the PNG files, the images, those that could not be read, notes
    on what was left out, the fractions of variance of the three components, and for each image its neighbors
    with their similarities. Raises the errors of `rcmae.errors`.
    """
    if not images:
        raise ConfigError("no images given: rcmae look BACKBONE IMAGE... --out FOLDER")
    if bad := [ratio for ratio in ratios if not 0 < ratio < 1]:
        raise ConfigError(f"ratios must lie between 0 and 1, not {', '.join(f'{r:g}' for r in bad)}")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a folder")
    check(reading)
    target, screen = distributed.pick_device(device), screen or Screen(True)
    with translate_errors(target, World(), "try fewer images or --device cpu"):
        network = load(backbone, which).to(target)
        chosen: Pool = pool or METHODS.get(network.method, Method).pool
        check_pool(chosen, network, backbone)
        shown, notes = _read(images, network, reading, screen)
        neighbors: list[dict[str, Any]] = []
        neighbor_part = None
        if data is not None:
            source = opened(data, network, reading, screen, World())
            options: dict[str, Any] = {"precision": precision, "workers": workers, "cache": cache}
            neighbors, neighbor_part = _neighbors(network, chosen, shown, source, target, screen, options)
        with torch.no_grad(), screen.progress("drawing", 1):
            features, explained = _features(network, shown, target)
            try:
                reconstruction = _reconstructions(backbone, network, shown, ratios, target)
            except RcmaeError as e:
                reconstruction = None
                notes.append(f"no reconstructions: {e}")
        if not reconstruction:
            screen.say(f"note: {notes[-1]}")
        parts = [part for part in (reconstruction, features, neighbor_part) if part]
        files = _write(out, parts)
    height, width = network.shape
    page = template("look.html.j2").render(
        title=f"What {Path(backbone).name} sees",
        backbone=backbone,
        network=networks(backbone, which)[0],
        method=network.method,
        shape=f"{height} x {width}",
        images=how_many(len(shown.names), "image"),
        notes=notes,
        unreadable=shown.unreadable,
        parts=parts,
        uri=lambda cell: pictures.data_uri(pictures.enlarged(cell.pixels), "webp", quality=90),
    )
    replace_file(out / "look.html", page)
    return {
        "page": str(out / "look.html"),
        "files": [str(file) for file in files],
        "images": shown.names,
        "unreadable": [{"where": where, "reason": reason} for _, where, reason in shown.unreadable],
        "notes": notes,
        "explained": explained,
        "neighbors": neighbors,
    }


def _read(
    images: Sequence[Path], network: Backbone, reading: ReadingOptions, screen: Screen
) -> tuple[Shown, list[str]]:
    """The center views of the images, and notes on images that are not shown. Raises DataError if an image
    does not exist or none can be read."""
    paths, notes = [], []
    for path in images:
        if path.is_dir():
            folder = open_source(str(path), network.channels, value_range="dtype")
            first = [os.fsdecode(folder.where(i)) for i in range(min(FIRST, len(folder)))]
            if len(folder) > FIRST:
                notes.append(f"the first {FIRST} of {how_many(len(folder), 'image')} in {path} are shown")
            paths += first
        elif path.exists():
            paths.append(str(path))
        else:
            raise DataError(f"the image {path} does not exist")
    sizes = [Path(path).stat().st_size for path in paths]
    name = str(images[0]) + (f" and {len(images) - 1} more" if len(images) > 1 else "")
    source = Files(name, Path(), [os.fsencode(Path(p).absolute()) for p in paths], sizes, [b""] * len(paths))
    source.pixel_limit, source.bits = int(reading.max_pixels), 16
    if reading.range == "data":
        measure_bits([source], network.channels, network.bits)
    notes += source.notes
    for note in notes:
        screen.say(f"note: {note}")
    centers = Centers(source, network.shape, network.channels)
    with screen.progress("reading the images", len(paths)) as tick:
        views = []
        for i in range(len(paths)):
            views.append(centers[i])
            tick(i + 1)
    unreadable = [(i, paths[i], reason) for view in views for i, _, reason in view["bad"]]
    report_unreadable(unreadable, screen.say)
    readable = [i for i, view in enumerate(views) if view["readable"]]
    if not readable:
        raise DataError(f"none of {how_many(len(paths), 'image')} can be read")
    pixels = torch.stack([views[i]["image"] for i in readable])
    chosen = [paths[i] for i in readable]
    return Shown(short_names(chosen), chosen, pixels, unreadable), notes


def short_names(paths: Sequence[str]) -> list[str]:
    """The file names of paths, with as much of their folders as tells them apart."""
    names = [Path(path).name for path in paths]
    depth = 1
    while any(count > 1 for count in Counter(names).values()) and depth < 20:
        depth += 1
        repeated = {name for name, count in Counter(names).items() if count > 1}
        names = [
            "/".join(Path(path).parts[-depth:]) if name in repeated else name
            for name, path in zip(names, paths, strict=True)
        ]
    return names


# --- parts --------------------------------------------------------------------------------------------------


def _reconstructions(
    backbone: str, network: Backbone, shown: Shown, ratios: Sequence[float], device: torch.device
) -> Part:
    """Raises CheckpointError for a network without a decoder of pixels."""
    path = Path(backbone)
    run = None
    if not (is_bare(path) or backbone.startswith("scratch:")):
        run = run_of_backbone(str(path.parent if path.is_file() else path))
    method = load_method(run, network.statistics).to(device) if run else None
    if not (method and method.reconstructs()):
        names = join_names([name for name, known in METHODS.items() if known.reconstructs()])
        raise CheckpointError(
            f"{backbone} has no decoder of pixels; runs of {names} have one, and so have folders that "
            "`rcmae import` makes from an official .pth"
        )
    views, k = method.views(), len(shown.names)
    # The same order for every ratio: what is visible at a higher one is visible at a lower one too.
    orders = [views(shown.pixels[i].permute(1, 2, 0).numpy(), rng(0, 0, i)) for i in range(k)]
    batch = {name: torch.stack([o[name] for o in orders]).to(device) for name in orders[0]}
    batch["image"] = shown.pixels.to(device)
    rows: list[list[list[Cell]]] = [[] for _ in range(k)]
    for ratio in ratios:
        tensors, facts = method.snapshot(batch, ratio)
        s = pictures.snapshot_of({n: t.cpu().numpy() for n, t in tensors.items()}, facts | {"step": "0"})
        for i, name in enumerate(shown.names):
            hidden = f"{100 * ratio:g} % hidden"
            alt = f"{name} with {ratio:.0%} of its patches hidden"
            row = [_input(shown, i), Cell(pictures.visible(s, i), hidden, alt)]
            row += [
                Cell(
                    pictures.picture(s, i, which), which, f"{name}, {hidden}, as the {which} reconstructs it"
                )
                for which in s.predictions
            ]
            rows[i].append(row)
    text = "Visible patches are pasted over the reconstruction. "
    text += (
        "The network predicts each hidden patch except its brightness and contrast; here both come from "
        "nearby visible patches."
        if s.target == "normalized"
        else "Hidden patches are shown as the network predicts them."
    )
    if trained := flat(method.recipe).get("mask_ratio"):
        text += f" It was trained with {100 * trained:g} % of the patches hidden."
    sheets = [Sheet(f"reconstruction-{i + 1:02d}", name, rows[i]) for i, name in enumerate(shown.names)]
    return Part("reconstructions", "Reconstructions", text, sheets)


def _input(shown: Shown, i: int, caption: str = "input") -> Cell:
    return Cell(shown.pixels[i].permute(1, 2, 0).numpy(), caption, f"{shown.names[i]} as the network sees it")


def _features(network: Backbone, shown: Shown, device: torch.device) -> tuple[Part, list[float]]:
    """Principal components and attention, and the fractions of the variance of the components."""
    images = shown.pixels.to(device).float() / 255
    colors, explained = component_colors(network(images).patches.cpu())
    rows = []
    for i, name in enumerate(shown.names):
        alt = f"The patches of {name}, colored by the first three principal components of their features"
        rows.append([_input(shown, i, name), Cell(_patched(colors[i], network.shape), "components", alt)])
    shares = ", ".join(f"{100 * share:.0f} %" for share in explained)
    text = (
        "Components: the first three principal components of the patch features of all these images "
        f"together, as red, green and blue; they hold {shares} of the variance. Patches of the same color "
        "have similar features, also in different images."
    )
    if network.has_class_attention:
        attention = network.class_attention(images).cpu().numpy()  # [k, gh, gw]
        for i, name in enumerate(shown.names):
            low, high = attention[i].min(), attention[i].max()
            gray = (255 * (attention[i] - low) / max(high - low, 1e-12)).round().astype(np.uint8)
            alt = f"The attention of the class token to the patches of {name}"
            rows[i].append(Cell(_patched(gray[..., None], network.shape), "attention", alt))
        text += (
            " Attention: how much the class token takes from each patch in the last block, mean over the "
            "heads; black is the least and white the most within an image."
        )
        if METHODS.get(network.method, Method).pool == "mean" and network.method:
            text += f" {network.method} does not train the class token, so its attention may show little."
    sheet = Sheet("features", "Patch features", rows)
    return Part("features", "Patch features", text, [sheet]), explained


def component_colors(
    patches: Float[Tensor, "k d gh gw"],
) -> tuple[UInt8[np.ndarray, "k gh gw 3"], list[float]]:
    """The first three principal components of all patches together as colors, and the fractions of the
    variance that they hold. A component runs from its 1st to its 99th percentile, and its sign is that in
    which its largest loading is positive."""
    k, d, gh, gw = patches.shape
    x = patches.permute(0, 2, 3, 1).reshape(-1, d).double()
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x)  # ascending
    vectors, values = vectors.flip(1)[:, :3], values.flip(0).clamp_min(0)
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    scores = (x @ vectors).numpy()  # [k gh gw, 3]
    low, high = np.percentile(scores, [1, 99], axis=0)
    scaled = ((scores - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    explained = (values[:3] / values.sum().clamp_min(1e-12)).tolist()
    return (255 * scaled).round().astype(np.uint8).reshape(k, gh, gw, -1), explained


def _patched(values: UInt8[np.ndarray, "gh gw c"], shape: tuple[int, int]) -> UInt8[np.ndarray, "h w c"]:
    """Values of patches as pixels of an image of `shape`."""
    return values.repeat(shape[0] // values.shape[0], 0).repeat(shape[1] // values.shape[1], 1)


def _neighbors(
    network: Backbone,
    pool: Pool,
    shown: Shown,
    source: Source,
    device: torch.device,
    screen: Screen,
    options: dict[str, Any],
) -> tuple[list[dict[str, Any]], Part]:
    """The most similar images of a source, without the image itself, as plain data and as pictures."""
    others = embed_source(network, source, pool, device=str(device), screen=screen, **options)
    with torch.no_grad():
        queries = pooled(network(shown.pixels.to(device).float() / 255), pool).cpu().float()
    keys = torch.from_numpy(others.features)
    queries, keys = (torch.nn.functional.normalize(x, dim=1) for x in (queries, keys))
    ranked = nearest(queries, keys, min(NEIGHBORS + 1, len(keys)))
    centers = Centers(source, network.shape, network.channels)
    records: list[dict[str, Any]] = []
    rows: list[list[Cell]] = []
    for i, (name, path) in enumerate(zip(shown.names, shown.paths, strict=True)):
        records.append({"image": path, "neighbors": []})
        rows.append([_input(shown, i, name)])
        for j in ranked[i].tolist():
            index = int(others.rows[j])
            where, similarity = source.where(index), float(queries[i] @ keys[j])
            if _same(path, where) or len(rows[i]) > NEIGHBORS:
                continue
            records[i]["neighbors"].append({"name": where, "similarity": similarity})
            caption = f"{similarity:.3f}\n{Path(where).name}"
            pixels = centers[index]["image"].permute(1, 2, 0).numpy()
            alt = f"Neighbor {len(rows[i])} of {name}: {Path(where).name}, similarity {similarity:.3f}"
            rows[i].append(Cell(pixels, caption, alt))
    text = (
        f"The most similar of {how_many(len(keys), 'image')} of {source.name}, by the cosine of the features "
        f"({pool}), the number above each name; an image itself is left out. Cosines tell the order; how "
        "large they are depends on the method and says little."
    )
    return records, Part(
        "neighbors", "Nearest neighbors", text, [Sheet("neighbors", "Nearest neighbors", rows)]
    )


def _same(path: str, other: str) -> bool:
    return Path(other).is_file() and os.path.samefile(path, other)  # noqa: PTH121


# --- files --------------------------------------------------------------------------------------------------


def _write(out: Path, parts: Sequence[Part]) -> list[Path]:
    """Write the sheets as PNG files. Raises StorageError."""
    files = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for sheet in (sheet for part in parts for sheet in part.sheets):
            files.append(out / f"{sheet.name}.png")
            draw_sheet(sheet).save(files[-1], optimize=True)
    except OSError as e:
        raise StorageError(f"cannot write {out}: {e.strerror or e}; choose another --out") from e
    return files


def draw_sheet(sheet: Sheet) -> Image.Image:
    """A picture of a sheet, with its title, equal gaps, and captions whose lines are shortened to the width
    of their picture. Short rows stand side by side."""
    rows = sheet.rows
    if len(rows) > 3 and len(rows[0]) <= 3:
        rows = [[cell for row in rows[i : i + 2] for cell in row] for i in range(0, len(rows), 2)]
    title, font = (ImageFont.truetype(_font(), size) for size in (TITLE, TEXT))
    first = pictures.enlarged(rows[0][0].pixels, CELL)
    scale = CELL / first.width
    height = round(first.height * scale)
    across, lines = max(map(len, rows)), max(c.caption.count("\n") + 1 for row in rows for c in row)
    line = lines * (TEXT + 5) + 5
    width = across * (CELL + GAP) + GAP
    top = GAP + TITLE + GAP
    canvas = Image.new("RGB", (width, top + len(rows) * (height + line + GAP)), PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((GAP, GAP), shortened(sheet.title, width - 2 * GAP, title.getlength), INK, title)
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            left, upper = GAP + x * (CELL + GAP), top + y * (height + line + GAP)
            picture = pictures.enlarged(cell.pixels, CELL).convert("RGB")
            smooth = picture.width > CELL
            how = Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST
            canvas.paste(picture.resize((CELL, height), how), (left, upper))
            pen.rectangle((left, upper, left + CELL - 1, upper + height - 1), outline=EDGE)
            text = "\n".join(shortened(t, CELL, font.getlength) for t in cell.caption.split("\n"))
            pen.text((left, upper + height + 5), text, SOFT, font, spacing=5)
    return canvas


def _font() -> str:
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def shortened(text: str, width: float, measure: Callable[[str], float]) -> str:
    """A text that fits a width; of one that is too long, the middle is left out."""
    if measure(text) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        tail = kept // 2
        short = f"{text[: kept - tail]}…{text[len(text) - tail :]}"
        if measure(short) <= width:
            return short
    return "…"
