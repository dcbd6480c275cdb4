"""Frozen features of a labelled set, in memory or kept on disk for whoever asks next."""

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
from ..engine.distributed import World
from ..errors import CheckpointError, DataError
from ..models.backbone import Backbone, Features, Pixels
from .score import Centers, in_parts, joined

PART = 8192
"Images whose features are one file of the cache: what an interruption can cost."


@torch.no_grad()
def features(
    backbone: Backbone,
    images: UInt8[Tensor, "n c h w"],
    device: torch.device,
    precision: str = "fp32",
    batch: int = 256,
    tokens: bool = False,
    tick: Callable[[int], None] = lambda done: None,
) -> tuple[Float[np.ndarray, "n d"], Float[Tensor, "n t d"] | None]:
    """The mean over the patch tokens of each image, and if asked all tokens in half precision; `precision` is that of the products.

    `tick` is told how many images are done.
    """
    backbone, means, kept = backbone.to(device).eval(), [], []
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for part in images.split(batch):
            seen = backbone(part.to(device).float() / 255)
            means.append(seen.mean.cpu().numpy())
            if tokens:
                kept.append(seen.tokens.half())
            tick(sum(map(len, means)))
    return np.concatenate(means), torch.cat(kept) if tokens else None


class ExtractedFeatures(NamedTuple):
    """What a backbone makes of a set: of each image the class token, the mean over the patches, and if asked all tokens (float16)."""

    cls: Float[Tensor, "n d"]
    mean: Float[Tensor, "n d"]
    labels: Int[np.ndarray, " n"]
    readable: Bool[np.ndarray, " n"]
    "whether the image could be read; what cannot is a black image here, and counts as wrong where it is scored on"
    tokens: Float[Tensor, "n t d"] | None

    def pooled(self, pool: str) -> Float[Tensor, "n d"]:
        """By name: "mean" or "cls"."""
        return self.mean if pool == "mean" else self.cls


def identity(backbone: Backbone | Pixels) -> str:
    """Sixteen hex digits that name a backbone: its weights, its statistics and how it computes."""
    heads = [block.attn.num_heads for block in backbone.vit.blocks] if isinstance(backbone, Backbone) else backbone.patch
    digest = hashlib.sha256(f"{backbone!r} {tuple(backbone.shape)} {heads}".encode())
    for name, value in sorted([*backbone.state_dict().items(), *backbone.named_buffers()], key=lambda pair: pair[0]):
        digest.update(name.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _whole(file: Path) -> bool:
    """Whether a file is there, undamaged, and of images that could all be read: what could not may have been mended since."""
    try:
        with safe_open(file, "pt") as f:
            return bool(f.get_tensor("readable").all())
    except (FileNotFoundError, SafetensorError):
        return False


@torch.no_grad()
def extract(
    backbone: Backbone | Pixels, part: Subset, *, cache: Path, tokens: bool, device: torch.device, precision: str, world: World,
    workers: int | None = 0, batch: int = 256, tick: Callable[[int], None] = lambda done: None,
    note: Callable[[list[Bad]], None] = lambda bad: None,
) -> ExtractedFeatures:  # fmt: skip
    """Features of a set, from the cache as far as it has them.

    A file holds `PART` images; ranks make files in turn, and an interrupted extraction goes on at the first file that is missing.
    `tick` is told how many images were read, `note` which cannot be read. Raises DataError when none can, and
    CheckpointError when features are not finite.
    """
    shape = tuple(backbone.shape)
    key = hashlib.sha256(json.dumps([identity(backbone), part.fingerprint(), shape, precision, 1]).encode()).hexdigest()[:16]
    folder = cache / key
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{'tokens' if tokens else 'pooled'}-{i:06d}.safetensors" for i in range(-(-len(part) // PART))]
    backbone, centers = backbone.to(device).eval(), Centers(part, shape, backbone.channels)
    for number, file in enumerate(files):
        rows = range(number * PART, min((number + 1) * PART, len(part)))
        if number % world.size == world.rank and not _whole(file):
            found: dict[str, list[Tensor]] = {"cls": [], "mean": []} | ({"tokens": []} if tokens else {})
            readable = []
            parts = batches_of(centers, in_parts(rows, batch), part, workers, device, note)
            for images in joined(parts, batch, lambda done, before=rows.start: tick(before + done)):
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    seen: Features = backbone(images["image"].float() / 255)
                for name, values in found.items():
                    values.append(getattr(seen, name).to(torch.float16 if name == "tokens" else torch.float32).cpu())
                readable.append(images["fine"].cpu())
            whole = {name: torch.cat(values) for name, values in found.items()}
            if odd := [name for name, values in whole.items() if not values.isfinite().all()]:
                why = "tokens above 65,504 do not fit half precision; take knn or linear" if odd == ["tokens"] else "look at its weights"
                raise CheckpointError(f"what this backbone makes of {part.name} is not finite ({', '.join(odd)}): {why}")
            replace_file(file, save(whole | {"readable": torch.cat(readable).to(torch.uint8)}))
        tick(rows.stop)
    world.agree(True)  # all files are there
    parts = [load_file(file) for file in files]
    whole = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}
    readable = whole["readable"].bool().numpy()
    if not readable.any():
        raise DataError(f"none of {how_many(len(part), 'image')} of {part.name} can be read; look with `rcmae check`")
    return ExtractedFeatures(whole["cls"], whole["mean"], part.labels, readable, whole.get("tokens"))
