"""Images of a source as pixels, and their moments."""

import errno
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, UInt8

from ..config import how_many
from ..engine.console import ShowProgress, no_progress
from ..engine.distributed import World
from ..errors import StorageError
from . import decode
from .base import Source
from .decode import BadImage
from .views import Opened

DEPTHS = (8, 10, 12, 14, 16)
"Bits that the values of cameras and scanners have."

PROBED, MEASURED = 32, 200
"Images read to find whether there are 16-bit ones, and to find the bits that these use."

PIECE = 2**20
"Pixels counted at once, which limits the memory and the time until a signal is handled."


def read_raw(source: Source, index: int) -> bytes | np.ndarray:
    """As `source.read`. Raises BadImage, or StorageError if the system lacks files or memory."""
    try:
        return source.read(index)
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # not the image's fault
            raise StorageError(
                f"{source.where(index)} cannot be opened: {e.strerror}; raise `ulimit -n` or use fewer "
                "--workers"
            ) from e
        raise BadImage(e.strerror or "cannot be read") from e


def open_image(source: Source, index: int, channels: int, shape: tuple[int, int] | None = None) -> Opened:
    """Image `index`, which a crop decodes no further than it needs. Raises BadImage, also if its (height,
    width) is not `shape`.

    EXIF orientation is ignored if the stored image already has the shape.
    """
    raw = read_raw(source, index)
    if isinstance(raw, np.ndarray):
        image: Opened = raw
    else:
        image = decode.open_image(raw, channels, source.pixel_limit, shape, source.bits or 16)
    if shape and image.shape[:2] != shape:
        raise BadImage(
            f"is {image.shape[1]} x {image.shape[0]} pixels, not {shape[1]} x {shape[0]} as its "
            "annotations say"
        )
    return image


def read_image(
    source: Source, index: int, channels: int, shape: tuple[int, int] | None = None, least: int | None = None
) -> UInt8[np.ndarray, "h w {channels}"]:
    """All pixels of `open_image`; with `least`, of a JPEG at the smallest scale that has as many along each
    side."""
    image = open_image(source, index, channels, shape)
    return image if isinstance(image, np.ndarray) else image.pixels(least)


def measure_bits(
    sources: Sequence[Source],
    channels: int,
    trained: int | None = None,
    progress: ShowProgress = no_progress,
    world: World = World(),
) -> None:
    """Set `bits` of the parts of a set to the smallest of `DEPTHS` that holds the unsigned 16-bit values of a
    fixed random sample, and add a note if they use fewer than 16. Images with larger values are then
    unreadable.

    `trained` are the bits of the images that a network was trained on: they are set instead, unless they do
    not hold the values. Rank 0 reads the sample.
    """
    name, total, measured = sources[0].name, len(sources) * MEASURED, (0, 0)
    with progress(f"measuring the range of 16-bit images in {name}", total) as tick:
        if world.is_main:
            measured = max(
                _largest_value(source, channels, lambda done: tick(before + done))  # noqa: B023
                for before, source in zip(range(0, total, MEASURED), sources, strict=True)
            )
        largest, count = world.broadcast(measured)
    used = next(bits for bits in DEPTHS if largest < 2**bits) if largest else None
    bits = max(used or 0, trained or 0) or None
    for source in sources:
        source.bits = bits
    if not used or not bits or used == bits == 16:
        return
    text = (
        f"the 16-bit images of {name} use {how_many(used, 'bit')} (values up to {largest:,} in "
        f"{how_many(count, 'image')})"
    )
    if trained and trained < used:
        text += f", more than the {trained} of the images that the network was trained on"
    text += f": {2**bits - 1:,} is white"
    if trained and trained > used:
        text += ", as in the images that the network was trained on"
    text += "; with --range dtype, 65,535 is" if bits < 16 else ""
    sources[0].notes = (*sources[0].notes, text)


def _largest_value(source: Source, channels: int, tick: Callable[[int], None]) -> tuple[int, int]:
    """The largest unsigned 16-bit value in a sample, 0 without any, and the number of images that have them.
    `tick` is called with the number of images read."""
    chosen = np.random.Generator(np.random.Philox(key=1)).permutation(len(source))[:MEASURED].tolist()
    largest = count = 0
    for number, i in enumerate(chosen):
        tick(number)
        if source.in_memory or largest >= 2 ** DEPTHS[-2] or (number == PROBED and not count):
            break
        if source.where(i).lower().endswith((".jpg", ".jpeg")):  # which cannot have 16 bits
            continue
        try:
            raw = source.read(i)
            values = (
                None
                if isinstance(raw, np.ndarray)
                else decode.sixteen_bits(raw, channels, source.pixel_limit)
            )
        except (OSError, BadImage):
            continue  # reported when it is used
        if values is not None:
            largest, count = max(largest, int(values.max())), count + 1
    return largest, count


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
