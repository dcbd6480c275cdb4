"""Reconstructions of the same images, kept during a run."""

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from ..data.dataset import Images, collate
from ..engine.checkpoint import replace_file
from ..engine.console import Screen
from ..methods import Method

SNAPSHOTS = 6
"Times that they are kept."


def first_batch(images: Images, device: torch.device, screen: Screen, most: int = 64) -> dict[str, Tensor]:
    """The first images as the method sees them, with their masks: the same whenever one looks."""
    count, samples = min(most, len(images.source)), []
    with screen.progress("reading the images whose reconstructions are kept", count) as tick:
        for i in range(count):
            samples.append(images[(0, i)])
            tick(i + 1)
    batch = collate(samples)
    batch.pop("bad", None)
    return {k: v.to(device) for k, v in batch.items()}


@torch.no_grad()
def save_reconstructions(method: Method, batch: dict[str, Tensor], step: int, folder: Path, count: int = 6) -> None:
    """Write what the method makes of the first images, if it reconstructs, to a file of the step."""
    tensors, facts = method.snapshot({k: v[:count] for k, v in batch.items()})
    if tensors:
        folder.mkdir(exist_ok=True)
        tensors = {k: v.cpu().contiguous() for k, v in tensors.items()}
        replace_file(folder / f"{step:08d}.safetensors", save(tensors, facts | {"step": str(step)}))
