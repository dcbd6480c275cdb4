"""Pictures of reconstructions, which contain nothing that the model did not predict or see."""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image
from safetensors import safe_open


@dataclass(frozen=True)
class Snapshot:
    """Reconstructions of k fixed images at one step. Predictions are in the space of the target; `visible`
    and `hidden` are indices of patches."""

    step: int
    patch: int
    target: str
    eps: float
    mean: Float[np.ndarray, " c"]
    std: Float[np.ndarray, " c"]
    image: UInt8[np.ndarray, "k c h w"]
    visible: Int[np.ndarray, "k v"]
    hidden: Int[np.ndarray, "k m"]
    predictions: dict[str, Float[np.ndarray, "k m p"]]


def read_snapshot(path: Path) -> Snapshot:
    """Read a file of a run's snapshots/."""
    with safe_open(path, "np") as f:
        return snapshot_of({k: f.get_tensor(k) for k in f.keys()}, f.metadata())  # noqa: SIM118 - not a dict


def snapshot_of(data: dict[str, np.ndarray], meta: dict[str, str]) -> Snapshot:
    """The tensors and the text of `Method.snapshot` and the step."""
    return Snapshot(
        step=int(meta["step"]),
        patch=int(meta["patch"]),
        target=meta["target"],
        eps=float(meta["target_eps"]),
        mean=np.array(json.loads(meta["mean"])),
        std=np.array(json.loads(meta["std"])),
        image=data["image"],
        visible=data["visible"],
        hidden=data["hidden"],
        predictions={k: data[k] for k in ("student", "teacher") if k in data},
    )


def cut(pixels: np.ndarray, patch: int) -> np.ndarray:
    """An image [h, w, c] as patches [n, p], values in the order (row, column, channel)."""
    h, w, c = pixels.shape
    return (
        pixels.reshape(h // patch, patch, w // patch, patch, c)
        .transpose(0, 2, 1, 3, 4)
        .reshape(-1, patch * patch * c)
    )


def join(patches: np.ndarray, h: int, w: int, patch: int) -> np.ndarray:
    """The inverse of `cut`."""
    return (
        patches.reshape(h // patch, w // patch, patch, patch, -1).transpose(0, 2, 1, 3, 4).reshape(h, w, -1)
    )


def visible(s: Snapshot, i: int) -> UInt8[np.ndarray, "h w c"]:
    """The visible patches of image i on gray."""
    pixels = s.image[i].transpose(1, 2, 0)
    patches = np.full_like(cut(pixels, s.patch), 128)
    patches[s.visible[i]] = cut(pixels, s.patch)[s.visible[i]]
    return join(patches, pixels.shape[0], pixels.shape[1], s.patch)


def picture(s: Snapshot, i: int, network: str, true_statistics: bool = False) -> UInt8[np.ndarray, "h w c"]:
    """Image i with its hidden patches as the `network` ("student" or "teacher") reconstructs them.

    A normalized target has no mean and no contrast. They are interpolated from the visible patches, with more
    weight on nearer ones; with `true_statistics` they are those of the hidden patches, which the model did
    not predict. The caption of such a picture must say so.
    """
    pixels = s.image[i].transpose(1, 2, 0)
    h, w, c = pixels.shape
    patches = cut((pixels / 255 - s.mean) / s.std, s.patch)
    prediction = s.predictions[network][i].astype(np.float64)
    if s.target == "normalized":
        if true_statistics:
            mean, var = _statistics(patches[s.hidden[i]])
        else:
            columns = w // s.patch
            a, b = (np.stack(np.divmod(ids, columns), 1) for ids in (s.hidden[i], s.visible[i]))  # positions
            weight = 1 / ((a[:, None] - b[None]) ** 2).sum(2) ** 2  # [m, v]
            weight /= weight.sum(1, keepdims=True)
            mean, var = (weight @ x for x in _statistics(patches[s.visible[i]]))  # [m, 1]
        prediction = prediction * np.sqrt(var + s.eps) + mean
    patches[s.hidden[i]] = prediction
    out = join(patches, h, w, s.patch) * s.std + s.mean
    reconstruction = (255 * out.clip(0, 1) + 0.5).astype(np.uint8)
    shown = np.isin(np.arange(len(patches)), s.visible[i])[:, None].repeat(s.patch**2 * c, 1)  # [n, p]
    return np.where(join(shown, h, w, s.patch), pixels, reconstruction)


def _statistics(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return patches.mean(1, keepdims=True), patches.var(1, ddof=1, keepdims=True)


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean of |a - b| over the channels, times 4, as gray on black [h, w, 1]."""
    gap = np.abs(a.astype(int) - b.astype(int)).mean(2, keepdims=True)
    return (4 * gap).clip(0, 255).astype(np.uint8)


def as_png(pixels: np.ndarray) -> str:
    """Pixels as a PNG in a data URI."""
    return data_uri(enlarged(pixels), "png", optimize=True)


def enlarged(pixels: np.ndarray, side: int = 256) -> Image.Image:
    """A picture of pixels [h, w, c]. Small images are enlarged to about `side` pixels without smoothing; of
    other than 1 or 3 channels the first is shown."""
    if pixels.shape[2] not in (1, 3):
        pixels = pixels[..., :1]
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    factor = max(1, round(side / max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    """A picture as a data URI in a format of Pillow: png, or webp, a sixth of the size for photographs."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
