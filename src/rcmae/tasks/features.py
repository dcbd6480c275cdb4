"""Frozen features of a labeled set, in memory or cached on disk."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ..config import how_many
from ..data.dataset import Bad
from ..data.loader import batches_of
from ..data.sources import Subset
from ..engine.checkpoint import replace_file
from ..engine.distributed import World, autocast
from ..errors import CheckpointError, DataError
from ..models.backbone import Backbone, Features, Pixels
from .score import Centers, in_parts, rebatched

PART = 8192
"Images per cache file, which is the most work that an interruption can lose."


@torch.no_grad()
def features(
    backbone: Backbone,
    images: UInt8[Tensor, "n c h w"],
    device: torch.device,
    precision: str = "fp32",
    tokens: bool = False,
    tick: Callable[[int], None] = lambda done: None,
) -> tuple[Float[np.ndarray, "n d"], Float[Tensor, "n t d"] | None]:
    """The mean over the patch tokens of each image, and with `tokens` all tokens in half precision. `tick`
    receives the number of images done."""
    backbone, means, all_tokens = backbone.to(device).eval(), [], []
    with autocast(device, precision):
        for part in images.split(256):
            output = backbone(part.to(device).float() / 255)
            means.append(output.mean.cpu().numpy())
            if tokens:
                all_tokens.append(output.tokens.half())
            tick(sum(map(len, means)))
    return np.concatenate(means), torch.cat(all_tokens) if tokens else None


class ExtractedFeatures(NamedTuple):
    """Features of a set: for each image the class token, the mean over the patches, and optionally all tokens
    (float16)."""

    cls: Float[Tensor, "n d"]
    mean: Float[Tensor, "n d"]
    labels: Int[np.ndarray, " n"]
    readable: Bool[np.ndarray, " n"]
    """whether the image could be read; an unreadable one has the features of a black image, and counts as
    wrong in a test set"""
    tokens: Float[Tensor, "n t d"] | None

    @property
    def all_tokens(self) -> Float[Tensor, "n t d"]:
        """The tokens of features that were extracted with them."""
        assert self.tokens is not None
        return self.tokens

    def select(self, mask: Bool[np.ndarray, " n"]) -> "ExtractedFeatures":
        """The images for which `mask` is true."""
        tokens = None if self.tokens is None else self.tokens[mask]
        return ExtractedFeatures(
            self.cls[mask], self.mean[mask], self.labels[mask], self.readable[mask], tokens
        )


def identity(backbone: Backbone | Pixels) -> str:
    """Sixteen hex digits that identify a backbone: its weights, image statistics and architecture."""
    heads = (
        [m.num_heads for block in backbone.vit.blocks for m in block.modules() if hasattr(m, "num_heads")]
        if isinstance(backbone, Backbone)
        else backbone.patch
    )
    digest = hashlib.sha256(f"{backbone!r} {backbone.shape} {heads}".encode())
    for name, value in sorted(
        [*backbone.state_dict().items(), *backbone.named_buffers()], key=lambda pair: pair[0]
    ):
        digest.update(name.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _is_complete(file: Path, rows: range, centers: Centers) -> bool:
    """Whether a file with the features of these images exists and is undamaged, and none of the images that
    could not be read can be read now."""
    try:
        with safe_open(file, "np") as f:
            unreadable = np.flatnonzero(f.get_tensor("readable") == 0)
    except (FileNotFoundError, SafetensorError):
        return False
    return not any(centers[rows[i]]["readable"] for i in unreadable)


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@torch.no_grad()
def extract(
    backbone: Backbone | Pixels,
    part: Subset,
    *,
    cache: Path,
    tokens: bool,
    device: torch.device,
    precision: str,
    world: World,
    workers: int | None = 0,
    batch: int = 256,
    tick: Callable[[int], None] = lambda done: None,
    note: Callable[[list[Bad]], None] = lambda bad: None,
) -> ExtractedFeatures:
    """Features of a set, from the cache as far as possible; `batch` images pass the network at a time.

    A file holds `PART` images. Ranks take turns at the files, and an interrupted extraction resumes at the
    first missing one. `tick` receives the number of images read, `note` the unreadable ones. Raises DataError
    if no image can be read, and CheckpointError if features are not finite.
    """
    shape = backbone.shape
    assert part.labels is not None  # open_labeled refuses images without labels
    key = hashlib.sha256(
        json.dumps(
            [identity(backbone), backbone.blocks, part.fingerprint(), part.bits or 16, shape, precision, 3]
        ).encode()
    ).hexdigest()[:16]
    folder = cache / key
    folder.mkdir(parents=True, exist_ok=True)
    files = [
        folder / f"{'tokens' if tokens else 'pooled'}-{i:06d}.safetensors"
        for i in range(-(-len(part) // PART))
    ]
    backbone, centers = backbone.to(device).eval(), Centers(part, shape, backbone.channels)
    for number, file in enumerate(files):
        rows = range(number * PART, min((number + 1) * PART, len(part)))
        if number % world.size == world.rank and not _is_complete(file, rows, centers):
            batches: list[dict[str, Tensor]] = []
            parts = batches_of(centers, in_parts(rows, batch), part, workers, device, note)
            for images in rebatched(parts, batch, lambda done: tick(rows.start + done)):  # noqa: B023
                with autocast(device, precision):
                    output: Features = backbone(images["image"].float() / 255)
                batches.append({"cls": output.cls.float().cpu(), "mean": output.mean.float().cpu()})
                if tokens:
                    batches[-1]["tokens"] = output.tokens.half().cpu()
                batches[-1]["readable"] = images["readable"].to(torch.uint8).cpu()
            tensors = _joined(batches)
            if infinite := [name for name, values in tensors.items() if not values.isfinite().all()]:
                hint = (
                    "tokens above 65,504 do not fit half precision; use knn or linear"
                    if infinite == ["tokens"]
                    else "check its weights"
                )
                raise CheckpointError(
                    f"this backbone's features of {part.name} are not finite ({', '.join(infinite)}): {hint}"
                )
            replace_file(file, save(tensors))
        tick(rows.stop)
    world.any_rank(True)  # wait until all files are written
    features = _joined([load_file(file) for file in files])
    readable = features["readable"].bool().numpy()
    if not readable.any():
        raise DataError(
            f"none of {how_many(len(part), 'image')} of {part.name} can be read; run `rcmae check`"
        )
    return ExtractedFeatures(features["cls"], features["mean"], part.labels, readable, features.get("tokens"))
