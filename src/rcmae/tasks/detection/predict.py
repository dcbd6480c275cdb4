"""What a detector finds on the images of a set, as COCO results."""

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


class Whole(Dataset):
    """Image `i` as a detector sees it after training. One that cannot be read has no substitute: "image" is None."""

    def __init__(self, images: CocoSet, size: int, channels: int):
        self.images, self.size, self.channels = images, size, channels

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            image = fit(self.images.pixels(i, self.channels), self.size)
            return {"index": i, "image": image, "original": self.images.size(i), "bad": []}
        except BadImage as e:
            return {"index": i, "image": None, "original": None, "bad": [(i, self.images.where(i), str(e))]}


def listed(samples: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Samples of different shapes side by side; of those that cannot be read only "bad" is left."""
    readable = [s for s in samples if s["image"] is not None]
    return {key: [s[key] for s in readable] for key in ("index", "image", "original")} | {"bad": [b for s in samples for b in s["bad"]]}


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
    """COCO results of all images, in their order, on the first rank, and elsewhere none; each rank looks at a part of them.

    Nothing is found on images that cannot be read: they are told to `note`. `tick` is told how many images of this rank are done.
    """
    training = model.training
    model.to(device).eval()
    own = range(world.rank, len(images), world.size)
    keys = [list(own[i : i + batch]) for i in range(0, len(own), batch)]
    found: dict[int, list[dict[str, Any]]] = {}
    for number, part in enumerate(batches_of(Whole(images, size, channels), keys, images, workers, device, note, listed), 1):
        if part["image"]:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                detections = model.detect([image.to(device) for image in part["image"]], part["original"])
            for i, one in zip(part["index"], detections, strict=True):
                found[i] = results_of(one, images.image_id(i), images.category_ids)
        tick(min(number * batch, len(own)))
    model.train(training)
    everywhere = {i: results for part in world.to_first(found) for i, results in part.items()}
    return [result for i in sorted(everywhere) for result in everywhere[i]]
