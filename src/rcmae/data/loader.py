"""Data loading: batches on the device."""

import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..engine.console import Screen
from ..engine.limits import cores
from .base import Source
from .dataset import Bad, collate, in_processes, plain_errors

TRIED, TRIED_SECONDS = 100, 5.0
"Images read to estimate space and time, and the time after which no more are tried."

IMAGES_EACH = 32
"Images for each loader process, which take about as long to read as the process to start."

Key = TypeVar("Key")


def ranks_here() -> int:
    """The number of ranks of the run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def usable_cores() -> int:
    """The cores that this process may use, divided among the ranks of this machine."""
    return max(1, cores() // ranks_here())


def processes(source: Source, workers: int | None) -> int:
    """`workers`, or the default number of loader processes: one for each core but one, but no more than one
    for `IMAGES_EACH` images, and 0 for images in memory.

    There is no other limit: to feed a GPU with large photographs takes a hundred cores.
    """
    if workers is not None:
        return workers
    return 0 if source.in_memory else max(1, min(usable_cores() - 1, len(source) // IMAGES_EACH))


def faster(source: Source, workers: int | None, shrinking: str = "") -> str:
    """What would read the images of `source` faster: more processes if cores are free, otherwise `shrinking`;
    empty if nothing would."""
    usable, busy = usable_cores(), os.getloadavg()[0] / ranks_here()
    if processes(source, workers) < usable - 1 and busy < usable - 1:
        return f"give --workers {usable - 1}"
    return "" if source.in_memory else shrinking


def sample(count: int) -> list[int]:
    """Up to `TRIED` of the indices below `count`, in random order, always the same."""
    return np.random.Generator(np.random.Philox(key=0)).permutation(count)[:TRIED].tolist()


def try_some(keys: Sequence[Key], size: Callable[[Key], int], screen: Screen) -> tuple[float, float]:
    """The mean size of an image in bytes, and the seconds in which one process reads it: `size` reads the
    image of a key. `keys` should be few and random, and are tried for `TRIED_SECONDS`."""
    total, done, began = 0, 0, time.monotonic()
    with screen.progress("trying some images", len(keys)) as tick:
        for key in keys:
            total += size(key)
            tick(done := done + 1)
            if time.monotonic() - began > TRIED_SECONDS:
                break
    return total / done, (time.monotonic() - began) / done


def batches_of(
    dataset: Dataset,
    keys: Iterable[list],
    source: Source,
    workers: int | None,
    device: torch.device,
    note: Callable[[list[Bad]], None],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] = collate,
) -> Generator[dict[str, Any]]:
    """Batches of `dataset` on the device, one for each list of keys. `note` is called with the unreadable
    images.

    Values that are not tensors after `collate` are left unchanged. The default for `workers` depends on the
    `source` and the number of cores.
    """
    workers = processes(source, workers)
    loader = DataLoader(
        dataset,
        batch_sampler=keys,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        prefetch_factor=min(4, max(2, 32 // workers)) if workers else None,
        **in_processes(workers),
    )
    for batch in plain_errors(loader):
        note(batch.pop("bad", []))
        yield {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
