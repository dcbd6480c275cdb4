"""Data loading: batches on the device."""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .base import Source
from .dataset import Bad, collate, plain_errors, quiet_worker


def processes(source: Source, workers: int | None) -> int:
    """`workers`, or the default number of loader processes: by the number of cores, and 0 for images in
    memory."""
    if workers is not None:
        return workers
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0 if source.in_memory else min(8, max(1, cores - 1))


def batches_of(
    dataset: Dataset,
    keys: Iterable[list],
    source: Source,
    workers: int | None,
    device: torch.device,
    note: Callable[[list[Bad]], None],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] = collate,
) -> Iterator[dict[str, Any]]:
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
        num_workers=workers,
        worker_init_fn=quiet_worker,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
    )
    for batch in plain_errors(loader):
        note(batch.pop("bad", []))
        yield {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
