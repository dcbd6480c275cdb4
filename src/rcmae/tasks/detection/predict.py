"""Detections on the images of a set, as COCO results."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset

from ...data.dataset import Bad
from ...data.decode import BadImage
from ...data.loader import batches_of
from ...engine.distributed import World
from .average_precision import results_of
from .coco import CocoSet
from .model import Detector
from .views import fit


class EvaluationImages(Dataset):
    """Image `i` in the evaluation view. An unreadable image is not substituted: "image" is None."""

    def __init__(self, images: CocoSet, size: int, channels: int):
        self.images, self.size, self.channels = images, size, channels

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            image = fit(self.images.pixels(i, self.channels), self.size)
            return {"index": i, "image": image, "original": self.images.size(i), "bad": []}
        except BadImage as e:
            return {"index": i, "image": None, "original": None, "bad": [(i, self.images.where(i), str(e))]}


def listed(samples: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Collate samples of different shapes as lists; unreadable ones appear only under "bad"."""
    readable = [s for s in samples if s["image"] is not None]
    return {key: [s[key] for s in readable] for key in ("index", "image", "original")} | {
        "bad": [b for s in samples for b in s["bad"]]
    }


@torch.no_grad()
def predict(
    model: Detector,
    images: CocoSet,
    *,
    size: int,
    channels: int,
    device: torch.device,
    precision: str = "fp32",
    batch: int = 8,
    workers: int | None = 0,
    world: World = World(),
    note: Callable[[list[Bad]], None] = lambda bad: None,
    tick: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """COCO results of all images in their order on rank 0, an empty list on other ranks. Each rank processes
    a part of the images.

    Unreadable images have no results and are passed to `note`. `tick` receives the number of images that this
    rank has processed.
    """
    training = model.training
    model.to(device).eval()
    rows = range(world.rank, len(images), world.size)
    keys = [list(rows[i : i + batch]) for i in range(0, len(rows), batch)]
    results: dict[int, list[dict[str, Any]]] = {}
    dataset = EvaluationImages(images, size, channels)
    for number, part in enumerate(batches_of(dataset, keys, images, workers, device, note, listed), 1):
        if part["image"]:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                detections = model.detect([image.to(device) for image in part["image"]], part["original"])
            for i, detection in zip(part["index"], detections, strict=True):
                results[i] = results_of(detection, images.image_id(i), images.category_ids)
        tick(min(number * batch, len(rows)))
    model.train(training)
    all_ranks = {i: by_image for part in world.gather(results) for i, by_image in part.items()}
    return [result for i in sorted(all_ranks) for result in all_ranks[i]]
