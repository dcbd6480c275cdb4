"""What a run leaves for the pictures of its report: some test images and the worst, with what is there and what was found."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from safetensors import safe_open
from safetensors.numpy import save
from torch import Tensor

from ...data.decode import BadImage
from ...engine.checkpoint import replace_file
from .average_precision import misses, objects_of
from .coco import CocoSet

FIRST, WORST = 6, 6
"Test images that are kept: the first of the set, and those with most errors in their masks."


class Example(NamedTuple):
    """An image, what is there (boxes, labels, masks), and what was found (scores too)."""

    pixels: UInt8[np.ndarray, "h w c"]
    truth: dict[str, Tensor]
    found: dict[str, Tensor]


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
                pixels[f"{name}/{len(about[name])}"] = np.array(data.pixels(i, channels), order="C")
            except BadImage:
                continue
            key, (h, w) = data.image_id(i), data.size(i)
            truth_here, found = ([e for e in entries if e["image_id"] == key] for entries in (truth["annotations"], results))
            about[name].append({"image": {"id": key, "height": h, "width": w}, "truth": truth_here, "found": found})
    replace_file(file, save(pixels, {"about": json.dumps(about)}))


def read_examples(file: Path) -> tuple[list[str], dict[str, list[Example]]]:
    """Names of the classes, and the examples that `write_examples` kept: "first" and "worst"."""
    with safe_open(file, "np") as f:
        about = json.loads(f.metadata()["about"])
        ids = about["category_ids"]
        found = {
            name: [
                Example(f.get_tensor(f"{name}/{k}"), *(objects_of(kept[part], kept["image"], ids) for part in ("truth", "found")))
                for k, kept in enumerate(about[name])
            ]
            for name in ("first", "worst")
        }
    return about["classes"], found
