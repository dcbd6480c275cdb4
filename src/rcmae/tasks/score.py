"""Center views of test images, and the scores of a classifier on them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..data.dataset import Bad
from ..data.decode import BadImage
from ..data.loader import batches_of
from ..data.pixels import open_image
from ..data.sources import Source
from ..data.views import center
from ..engine import distributed
from ..engine.distributed import World

READ = 8
"Images that are read between two progress updates."


class Scored(NamedTuple):
    """For each test image: whether it was classified correctly, and the probability of the predicted class (0
    for an unreadable image)."""

    correct: Bool[np.ndarray, " m"]
    confidence: Float[np.ndarray, " m"]


class Centers(Dataset):
    """The center view of image `i`. An unreadable image is not substituted: it is black, and "readable" is
    false."""

    def __init__(self, source: Source, shape: tuple[int, int], channels: int):
        self.source, self.shape, self.channels = source, shape, channels

    def __getitem__(self, i: int) -> dict[str, Any]:
        bad: list[Bad] = []
        try:
            image = center(open_image(self.source, i, self.channels), self.shape)
        except BadImage as e:
            image = torch.zeros(self.channels, *self.shape, dtype=torch.uint8)
            bad.append((i, self.source.where(i), str(e)))
        return {"image": image, "index": i, "readable": not bad, "bad": bad}


def in_parts(rows: Sequence[int], batch: int) -> list[list[int]]:
    """Split batches of `batch` images into parts of at most `READ`, so that progress moves within a batch."""
    batches = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    return [list(b[i : i + READ]) for b in batches for i in range(0, len(b), READ)]


def rebatched(
    parts: Iterable[dict[str, Any]], batch: int, tick: Callable[[int], None]
) -> Iterator[dict[str, Tensor]]:
    """The reverse of `in_parts`: join the parts of each batch. `tick` receives the number of images read."""

    def joined() -> dict[str, Tensor]:
        return {k: torch.cat([p[k] for p in pending]) for k in ("image", "index", "readable")}

    pending: list[dict[str, Any]] = []
    done = count = 0
    for part in parts:
        pending.append(part)
        done, count = done + len(part["readable"]), count + len(part["readable"])
        tick(done)
        if count == batch:
            yield joined()
            pending, count = [], 0
    if pending:
        yield joined()


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
    """Score a model, which takes pixels in 0 to 1, on labeled images. Each rank scores a part of them.

    Unreadable images count as wrong and are passed to `note`; `tick` receives the number of images that this
    rank has read.
    """
    training = model.training
    model.to(device).eval()
    n = len(test)
    labels = torch.from_numpy(test.labels).to(device)
    scores = torch.zeros(2, n, device=device)  # correct, confidence
    rows = range(world.rank, n, world.size)
    dataset = Centers(test, shape, channels)
    parts = batches_of(dataset, in_parts(rows, batch), test, workers, device, note)
    for part in rebatched(parts, batch, tick):
        with distributed.autocast(device, precision):
            best = model(part["image"].float() / 255).softmax(1).max(1)
        readable = part["readable"].float()
        scores[0, part["index"]] = (best.indices == labels[part["index"]]).float() * readable
        scores[1, part["index"]] = best.values * readable
    model.train(training)
    if world.size > 1:  # not in a world of one: rank 0 may call this without the others
        scores = distributed.average(scores) * world.size
    correct, confidence = scores.cpu().numpy()
    return Scored(correct > 0.5, confidence)
