"""Images of a source as pixels, and their moments."""

import errno

import numpy as np
from jaxtyping import Float, UInt8

from ..errors import StorageError
from .base import Source
from .decode import BadImage, decode

PIECE = 2**20
"Pixels counted at once, which limits the memory and the time until a signal is handled."


def read_image(source: Source, index: int, channels: int, shape: tuple[int, int] | None = None) -> np.ndarray:
    """Image `index`, uint8 [h, w, channels]. Raises BadImage, also if its (height, width) is not `shape`.

    EXIF orientation is ignored if the stored image already has the shape.
    """
    try:
        raw = source.read(index)
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # not the image's fault
            raise StorageError(
                f"{source.where(index)} cannot be opened: {e.strerror}; raise `ulimit -n` or use fewer "
                "--workers"
            ) from e
        raise BadImage(e.strerror or "cannot be read") from e
    pixels = raw if isinstance(raw, np.ndarray) else decode(raw, channels, shape=shape)
    if shape and pixels.shape[:2] != shape:
        raise BadImage(
            f"is {pixels.shape[1]} x {pixels.shape[0]} pixels, not {shape[1]} x {shape[0]} as its "
            "annotations say"
        )
    return pixels


def moments(pixels: UInt8[np.ndarray, "h w c"]) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"]]:
    """Mean, and mean of the squares, of each channel, for pixels in 0 to 1. Computed from a histogram, which
    is exact and fast."""
    h, w, channels = pixels.shape
    counts = np.zeros((channels, 256), dtype=np.int64)
    step = max(1, PIECE // w)
    for top in range(0, h, step):
        for c in range(channels):
            counts[c] += np.bincount(pixels[top : top + step, :, c].ravel(), minlength=256)
    values = np.arange(256)
    return counts @ values / (255 * h * w), counts @ values**2 / (255**2 * h * w)
