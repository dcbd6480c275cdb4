"""Detections in the images of a set, as COCO results."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from ...config import how_many
from ...data.dataset import Bad
from ...data.decode import BadImage
from ...data.loader import batches_of
from ...engine.distributed import World
from ...errors import DataError
from .average_precision import results_of
from .coco import CocoSet
from .model import Detector
from .views import fit


class EvaluationImages(Dataset):
    """Image `i` in the evaluation view. An unreadable image is not substituted: "image" is None."""

    def __init__(self, data: CocoSet, size: int, channels: int):
        self.data, self.size, self.channels = data, size, channels

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            image = fit(self.data.pixels(i, self.channels), self.size)
            return {"index": i, "image": image, "original": self.data.size(i), "bad": []}
        except BadImage as e:
            return {"index": i, "image": None, "original": None, "bad": [(i, self.data.where(i), str(e))]}


def listed(samples: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Collate samples of different shapes as lists; unreadable ones appear only under "bad"."""
    readable = [s for s in samples if s["image"] is not None]
    return {key: [s[key] for s in readable] for key in ("index", "image", "original")} | {
        "bad": [b for s in samples for b in s["bad"]]
    }


class Predictions(NamedTuple):
    """What `predict` returns on rank 0; nothing is detected on the other ranks."""

    results: list[dict[str, Any]]
    "COCO results in the order of the images"
    unreadable: list[Bad]

    def readable(self, data: CocoSet) -> CocoSet:
        """The images to score: those of `data` that could be read. Raises DataError if they have no
        object."""
        bad = {i for i, _, _ in self.unreadable}
        rest = data.take([i for i in range(len(data)) if i not in bad])
        if not rest.counts().any():
            raise DataError(
                f"{images_scored(len(data), len(bad))}, and no object is left to score in {data.name}"
            )
        return rest


def images_scored(images: int, unreadable: int) -> str:
    """The number of test images in words.

    >>> images_scored(100, 0), images_scored(100, 2)
    ('100 test images', '98 of 100 test images (2 could not be read)')
    """
    total = how_many(images, "test image")
    return f"{images - unreadable:,} of {total} ({unreadable:,} could not be read)" if unreadable else total


@torch.no_grad()
def predict(
    model: Detector,
    data: CocoSet,
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
) -> Predictions:
    """Detect objects in all images; each rank processes a part of them.

    Unreadable images are also passed to `note`. `tick` receives the number of images that this rank has
    processed.
    """
    training = model.training
    model.to(device).eval()
    rows = range(world.rank, len(data), world.size)
    keys = [list(rows[i : i + batch]) for i in range(0, len(rows), batch)]
    results: dict[int, list[dict[str, Any]]] = {}
    unreadable: list[Bad] = []

    def record(bad: list[Bad]) -> None:
        unreadable.extend(bad)
        note(bad)

    dataset = EvaluationImages(data, size, channels)
    for number, part in enumerate(batches_of(dataset, keys, data, workers, device, record, listed), 1):
        if part["image"]:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                detections = model.detect([image.to(device) for image in part["image"]], part["original"])
            for i, detection in zip(part["index"], detections, strict=True):
                results[i] = results_of(detection, data.image_id(i), data.category_ids)
        tick(min(number * batch, len(rows)))
    model.train(training)
    all_ranks = {i: by_image for part in world.gather(results) for i, by_image in part.items()}
    return Predictions(
        [result for i in sorted(all_ranks) for result in all_ranks[i]],
        sorted(bad for part in world.gather(unreadable) for bad in part),
    )
