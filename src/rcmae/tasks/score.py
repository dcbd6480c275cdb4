"""Test images as evaluation sees them, and what a model makes of them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data.dataset import Bad, read_image
from ..data.decode import BadImage
from ..data.loader import batches_of
from ..data.sources import Source
from ..data.views import center
from ..engine import distributed
from ..engine.distributed import World

READ = 8
"Images that are read between two reports of progress."


class Scored(NamedTuple):
    """Of each test image: was it right, and how probable did the network hold its answer (0 to 1; 0 for an unreadable image)?"""

    right: Bool[np.ndarray, " m"]
    confidence: Float[np.ndarray, " m"]


class Centers(Dataset):
    """Image `i` as evaluation sees it. One that cannot be read has no substitute: it is black, and "fine" is false."""

    def __init__(self, source: Source, shape: tuple[int, int], channels: int):
        self.source, self.shape, self.channels = source, shape, channels

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            return {"image": center(read_image(self.source, i, self.channels), self.shape), "index": i, "fine": True, "bad": []}
        except BadImage as e:
            black = torch.zeros(self.channels, *self.shape, dtype=torch.uint8)
            return {"image": black, "index": i, "fine": False, "bad": [(i, self.source.where(i), str(e))]}


def in_parts(rows: Sequence[int], batch: int) -> list[list[int]]:
    """What a loader reads at a time of batches of `batch` images: parts of at most `READ`, none of two batches."""
    batches = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    return [list(b[i : i + READ]) for b in batches for i in range(0, len(b), READ)]


def joined(parts: Iterable[dict[str, Any]], batch: int, tick: Callable[[int], None]) -> Iterator[dict[str, Tensor]]:
    """The batches, put together again; `tick` is told how many images were read. A photograph takes a tenth of a second and more."""
    waiting: list[dict[str, Any]] = []
    done = count = 0
    for part in parts:
        waiting.append(part)
        done, count = done + len(part["fine"]), count + len(part["fine"])
        tick(done)
        if count == batch:
            yield {k: torch.cat([p[k] for p in waiting]) for k in ("image", "index", "fine")}
            waiting, count = [], 0
    if waiting:
        yield {k: torch.cat([p[k] for p in waiting]) for k in ("image", "index", "fine")}


@torch.no_grad()
def score(
    model: nn.Module,
    test: Source,
    *,
    shape: tuple[int, int],
    channels: int,
    device: torch.device,
    precision: str = "fp32",
    batch: int = 256,
    workers: int | None = 0,
    world: World = World(),
    note: Callable[[list[Bad]], None] = lambda bad: None,
    tick: Callable[[int], None] = lambda done: None,
) -> Scored:
    """What a model of pixels in 0 to 1 makes of labelled images, each rank of a part of them.

    Unreadable images are wrong and told to `note`; `tick` is told how many images of this rank were read.
    """
    training = model.training
    model.to(device).eval()
    n = len(test)
    labels = torch.from_numpy(test.labels).to(device)
    found = torch.zeros(2, n, device=device)
    own = range(world.rank, n, world.size)
    dataset = Centers(test, shape, channels)
    for part in joined(batches_of(dataset, in_parts(own, batch), test, workers, device, note), batch, tick):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            best = model(part["image"].float() / 255).softmax(1).max(1)
        fine = part["fine"].float()
        found[0, part["index"]] = (best.indices == labels[part["index"]]).float() * fine
        found[1, part["index"]] = best.values * fine
    model.train(training)
    found = distributed.average(found) * world.size if world.size > 1 else found  # the first rank may be on its own
    right, confidence = found.cpu().numpy()
    return Scored(right > 0.5, confidence)
