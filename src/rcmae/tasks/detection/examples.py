"""What a run leaves for the pictures of its report: some test images and the worst, with what is there and what was found."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from safetensors import safe_open
from safetensors.numpy import save

from ...data.decode import BadImage
from ...engine.checkpoint import replace_file
from .average_precision import misses, objects_of
from .coco import CocoSet
from .masks import Masks
from .views import fit, nearest

FIRST, WORST = 6, 6
"Test images that are kept: the first of the set, and those with most errors in their masks."

SIDE = 768
"Pixels of the longer side of a kept image, at most."


class Example(NamedTuple):
    """An image, what is there (boxes, labels, `Masks`), and what was found (scores too), in its pixels."""

    pixels: UInt8[np.ndarray, "h w c"]
    truth: dict[str, Any]
    found: dict[str, Any]


def write_examples(file: Path, data: CocoSet, results: Sequence[dict[str, Any]], channels: int) -> None:
    """Keep images of `data` with their annotations and results. Raises StorageError."""
    truth, places = data.truth, {data.image_id(i): i for i in range(len(data))}
    kept = {"first": list(range(min(FIRST, len(data)))), "worst": [places[m.image_id] for m in misses(truth, results, "segm")[:WORST]]}
    pixels: dict[str, np.ndarray] = {}
    about: dict[str, Any] = {"classes": data.classes, "category_ids": data.category_ids}
    for name, chosen in kept.items():
        about[name] = []
        for i in chosen:
            try:
                image = data.pixels(i, channels)
            except BadImage:
                continue
            image = fit(image, SIDE).permute(1, 2, 0).numpy() if max(image.shape) > SIDE else image
            pixels[f"{name}/{len(about[name])}"] = np.array(image, order="C")
            key, (h, w) = data.image_id(i), data.size(i)
            truth_here, found = ([e for e in entries if e["image_id"] == key] for entries in (truth["annotations"], results))
            about[name].append({"image": {"id": key, "height": h, "width": w}, "truth": truth_here, "found": found})
    replace_file(file, save(pixels, {"about": json.dumps(about)}))


def read_examples(file: Path) -> tuple[list[str], dict[str, list[Example]]]:
    """Names of the classes, and the examples that `write_examples` kept: "first" and "worst"."""
    with safe_open(file, "np") as f:
        about = json.loads(f.metadata()["about"])
        found: dict[str, list[Example]] = {"first": [], "worst": []}
        for name, examples in found.items():
            for k, kept in enumerate(about[name]):
                pixels = f.get_tensor(f"{name}/{k}")
                parts = (objects_of(kept[part], kept["image"], about["category_ids"]) for part in ("truth", "found"))
                examples.append(Example(pixels, *(_as_large_as(pixels, objects, kept["image"]) for objects in parts)))
    return about["classes"], found


def _as_large_as(pixels: UInt8[np.ndarray, "h w c"], objects: dict[str, Any], image: dict[str, int]) -> dict[str, Any]:
    """Objects of an image that was kept smaller than it is."""
    (h, w), (height, width) = pixels.shape[:2], (image["height"], image["width"])
    rows, columns = nearest(height, h), nearest(width, w)
    boxes = objects["boxes"] * torch.tensor([w / width, h / height] * 2)
    return objects | {"boxes": boxes, "masks": Masks(objects["masks"], lambda mask: mask[rows][:, columns])}
