"""Reconstructions of fixed images, saved several times during a run."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..data.dataset import Images, collate
from ..engine.checkpoint import replace_file
from ..engine.console import Screen
from ..methods import Method

SNAPSHOTS = 6
"Number of snapshots in a run."


def first_batch(images: Images, device: torch.device, screen: Screen) -> dict[str, Tensor]:
    """The method's views of the first 64 images, always the same, with the same masks."""
    count, samples = min(64, len(images.source)), []
    with screen.progress("reading the images for reconstructions", count) as tick:
        for i in range(count):
            samples.append(images[(0, i)])
            tick(i + 1)
    return batch_of(samples, device)


def batch_of(samples: list[dict[str, Any]], device: torch.device) -> dict[str, Tensor]:
    """The samples of a data set as a batch on the device."""
    batch = collate(samples)
    del batch["bad"]
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


@torch.no_grad()
def save_reconstructions(method: Method, batch: dict[str, Tensor], step: int, folder: Path) -> None:
    """Save the method's snapshot of the first 6 images, if it has one, to a file named after the step."""
    tensors, metadata = method.snapshot({k: v[:6] for k, v in batch.items()})
    if tensors:
        folder.mkdir(exist_ok=True)
        tensors = {k: v.cpu().contiguous() for k, v in tensors.items()}
        replace_file(folder / f"{step:08d}.safetensors", save(tensors, metadata | {"step": str(step)}))
