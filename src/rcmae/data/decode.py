"""Encoded bytes to 8-bit pixels. Whatever the bytes are, the answer is pixels or BadImage with a short reason."""

import ctypes
import io
import logging
import math
import warnings
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import ConfigError, RcmaeError, optional

PIXEL_LIMIT = 100_000_000
"Pixels above which an image is refused before it is decoded: a hundred megapixels, 300 MB as RGB."

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF")
"What Pillow may open; its rarer formats have been a source of bombs."


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason in a few words."""


def decode(
    raw: bytes, channels: int = 3, pixel_limit: int = PIXEL_LIMIT, shape: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "h w {channels}"]:
    """Pixels of the first frame, turned as EXIF says, but not where they are stored with the (height, width) `shape`.

    1 or 3 channels: grey or RGB of any image; transparency is laid on white; 16-bit values are divided by 257; float and
    32-bit images are scaled from 0..1 if they lie in it, else from their own minimum and maximum. Other numbers of channels
    need a TIFF with that many bands (the [tiff] extra), as do TIFFs that Pillow does not read (float64, BigTIFF). Raises BadImage.
    """
    if not raw:
        raise BadImage("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own limit, odd EXIF and TIFF tags: we refuse by our own rules
        try:
            if channels not in (1, 3):
                return _bands(raw, channels, pixel_limit)
            return _pillow(raw, channels, pixel_limit, shape)
        except (BadImage, RcmaeError, MemoryError):
            raise
        except UnidentifiedImageError as e:
            if raw[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                return _bands(raw, channels, pixel_limit)
            raise BadImage("not an image") from e
        except Exception as e:  # decoders of foreign bytes fail in every way there is
            reason = "truncated" if "truncated" in str(e).lower() else f"damaged ({type(e).__name__})"
            raise BadImage(reason) from e


def _hush() -> None:
    """libtiff and tifffile write what they think of a damaged file to stderr; we name it ourselves, once."""
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    libtiff = ctypes.CDLL(Image.core.__file__)  # found through the Pillow module that is linked with it
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        if hasattr(libtiff, name):
            getattr(libtiff, name)(None)


_hush()


def _pillow(raw: bytes, channels: int, pixel_limit: int, shape: tuple[int, int] | None) -> np.ndarray:
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    _refuse_huge(*image.size, pixel_limit)
    form, tags = image.format, dict(getattr(image, "tag_v2", {}))
    signed = image.mode == "L" and tags.get(339, (1,))[0] == 2  # 8-bit samples from -128, which Pillow takes for unsigned ones
    if form == "TIFF" and (len(image.getbands()) > 4 or signed):
        return _bands(raw, channels, pixel_limit)
    image.load()
    if shape != (image.height, image.width):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        return np.repeat(_deep_grey(image, form, tags)[..., None], channels, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":  # Pillow has no way from it to grey
        image = image.convert("RGB")
    return np.array(image.convert("RGB" if channels == 3 else "L")).reshape(image.height, image.width, channels)


def _deep_grey(image: Image.Image, form: str | None, tags: dict[int, Any]) -> np.ndarray:
    """Grey of more than 8 bits, uint8 [h, w], by the file's format and its TIFF tags."""
    values = np.asarray(image)
    if (
        image.mode == "I" and form == "TIFF" and tags.get(339, (1,))[0] == 1
    ):  # unsigned 32-bit samples, which Pillow hands out as signed ones
        values = values.view(np.uint32)
    if image.mode == "I" and form == "PPM":  # 16-bit samples in 32-bit numbers
        values = values.astype(np.uint16)
    grey = _eight_bits(values)
    return 255 - grey if tags.get(262) == 0 else grey  # a TIFF in which 0 is white


def _bands(raw: bytes, channels: int, pixel_limit: int) -> np.ndarray:
    if raw[:2] not in (b"II", b"MM"):
        raise BadImage(f"{channels} channels need a multi-band TIFF")
    try:
        tifffile = optional("tifffile", "tiff")
    except ConfigError as e:
        if channels in (1, 3):  # one odd file among many is no reason to end a run
            raise BadImage("this TIFF needs the [tiff] extra") from e
        raise
    try:
        with tifffile.TiffFile(io.BytesIO(raw)) as file:
            # Grey and RGB are the first page, as everywhere; other bands may be pages themselves.
            image = file.pages[0] if channels in (1, 3) else file.series[0]
            axes = dict(zip(image.axes, image.shape, strict=True))
            height, width = axes.get("Y", 0), axes.get("X", 0)
            _refuse_huge(width, height, pixel_limit)
            _refuse_other_bands(math.prod(image.shape) // (height * width), channels)
            pixels = image.asarray()
    except (BadImage, MemoryError):
        raise
    except Exception as e:
        if "imagecodecs" in str(e):
            raise BadImage("its compression needs `pip install 'rcmae[tiff]'`") from e
        raise BadImage(f"damaged TIFF ({type(e).__name__})") from e
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3:
        raise BadImage(f"a TIFF of shape {pixels.shape} is no image")
    if pixels.shape[:2] != (height, width):
        pixels = np.moveaxis(pixels, 0, 2)
    values = _eight_bits(pixels)
    if (values.shape[2], channels) == (1, 3):
        values = np.repeat(values, 3, axis=2)
    if (values.shape[2], channels) == (3, 1):
        values = np.asarray(Image.fromarray(values).convert("L"))[..., None]
    return np.ascontiguousarray(values)


def _refuse_huge(width: int, height: int, limit: int) -> None:
    if width * height == 0:
        raise BadImage("no pixels")
    if width * height > limit:
        raise BadImage(f"{width} x {height} is above the limit of {limit:,} pixels")


def _refuse_other_bands(bands: int, channels: int) -> None:
    if bands not in ((1, 3) if channels in (1, 3) else (channels,)):
        raise BadImage(f"{bands} bands, not {channels}")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    values = values.astype(values.dtype.newbyteorder("="))
    if np.iscomplexobj(values):
        raise BadImage("complex values")
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint16:
        return (values.astype(np.float32) / 257).round().astype(np.uint8)
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise BadImage("no finite values")
    low, high = (0.0, 1.0) if finite.min() >= 0 and finite.max() <= 1 else (finite.min(), finite.max())
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-12)
    return (255 * scaled.clip(0, 1)).round().astype(np.uint8)
