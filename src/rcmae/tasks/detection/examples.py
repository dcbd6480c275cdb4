"""Example images for the report of a run: the first test images and the worst ones, with ground truth and
predictions."""

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
"Numbers of example images: the first of the set, and those with most errors in their masks."

SIDE = 768
"Maximum length in pixels of the longer side of an example."


class Example(NamedTuple):
    """An image with its ground truth (boxes, labels, `Masks`) and predictions (also scores), in its
    pixels."""

    pixels: UInt8[np.ndarray, "h w c"]
    truth: dict[str, Any]
    predictions: dict[str, Any]


def write_examples(file: Path, data: CocoSet, results: Sequence[dict[str, Any]], channels: int) -> None:
    """Write images of `data` with their annotations and results. Raises StorageError."""
    truth, index = data.truth, {data.image_id(i): i for i in range(len(data))}
    selected = {
        "first": list(range(min(FIRST, len(data)))),
        "worst": [index[m.image_id] for m in misses(truth, results, "segm")[:WORST]],
    }
    pixels: dict[str, np.ndarray] = {}
    about: dict[str, Any] = {"classes": data.classes, "category_ids": data.category_ids}
    for name, indices in selected.items():
        about[name] = []
        for i in indices:
            try:
                image = data.pixels(i, channels)
            except BadImage:
                continue
            image = fit(image, SIDE).permute(1, 2, 0).numpy() if max(image.shape) > SIDE else image
            pixels[f"{name}/{len(about[name])}"] = np.array(image, order="C")
            key, (h, w) = data.image_id(i), data.size(i)
            entry: dict[str, Any] = {"image": {"id": key, "height": h, "width": w}}
            for kind, objects in (("truth", truth["annotations"]), ("predictions", results)):
                entry[kind] = [o for o in objects if o["image_id"] == key]
            about[name].append(entry)
    replace_file(file, save(pixels, {"about": json.dumps(about)}))


def read_examples(file: Path) -> tuple[list[str], dict[str, list[Example]]]:
    """The class names and the examples from `write_examples`: "first" and "worst"."""
    with safe_open(file, "np") as f:
        about = json.loads(f.metadata()["about"])
        by_kind: dict[str, list[Example]] = {"first": [], "worst": []}
        for name, examples in by_kind.items():
            for k, entry in enumerate(about[name]):
                pixels = f.get_tensor(f"{name}/{k}")
                truth, predictions = (
                    _resized_to(
                        pixels, objects_of(entry[kind], entry["image"], about["category_ids"]), entry["image"]
                    )
                    for kind in ("truth", "predictions")
                )
                examples.append(Example(pixels, truth, predictions))
    return about["classes"], by_kind


def _resized_to(
    pixels: UInt8[np.ndarray, "h w c"], objects: dict[str, Any], image: dict[str, int]
) -> dict[str, Any]:
    """The objects of `image`, resized to the stored pixels."""
    (h, w), (height, width) = pixels.shape[:2], (image["height"], image["width"])
    rows, columns = nearest(height, h), nearest(width, w)
    boxes = objects["boxes"] * torch.tensor([w / width, h / height] * 2)
    return objects | {"boxes": boxes, "masks": Masks(objects["masks"], lambda mask: mask[rows][:, columns])}
