"""Decoding of image files to 8-bit pixels. Any input gives pixels or BadImage with a short reason."""

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
"Larger images are rejected before decoding: 100 megapixels, 300 MB as RGB."

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF")
"Formats that Pillow may open; its rarer ones have had decompression bombs."


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason in a few words."""


def decode(
    raw: bytes, channels: int = 3, pixel_limit: int = PIXEL_LIMIT, shape: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "h w {channels}"]:
    """Pixels of the first frame, rotated by EXIF orientation unless the stored (height, width) is `shape`.

    1 or 3 channels give gray or RGB of any image. Transparent pixels are blended with white. 16-bit values
    are divided by 257. Float and 32-bit images are scaled from 0..1 if all values lie in it, else from their
    minimum and maximum. Other numbers of channels need a TIFF with that many bands and the [tiff] extra, as
    do TIFFs that Pillow does not support (float64, BigTIFF). Raises BadImage.
    """
    if not raw:
        raise BadImage("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on Pillow's pixel limit and unusual EXIF and TIFF tags
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
        except Exception as e:  # decoders raise all kinds of errors on damaged files
            reason = "truncated" if "truncated" in str(e).lower() else f"damaged ({type(e).__name__})"
            raise BadImage(reason) from e


def _silence_tiff_libraries() -> None:
    """Keep libtiff and tifffile from writing to stderr about damaged files, which we report ourselves."""
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    libtiff = ctypes.CDLL(Image.core.__file__)  # the Pillow module that is linked with libtiff
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        if hasattr(libtiff, name):
            getattr(libtiff, name)(None)


_silence_tiff_libraries()


def _pillow(raw: bytes, channels: int, pixel_limit: int, shape: tuple[int, int] | None) -> np.ndarray:
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        file = Image.open(io.BytesIO(raw), formats=FORMATS)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    _check_size(*file.size, pixel_limit)
    file_format, tags = file.format, dict(getattr(file, "tag_v2", {}))
    # Signed 8-bit samples, which Pillow reads as unsigned.
    signed = file.mode == "L" and tags.get(339, (1,))[0] == 2
    if file_format == "TIFF" and (len(file.getbands()) > 4 or signed):
        return _bands(raw, channels, pixel_limit)
    file.load()
    image: Image.Image = file
    if shape != (image.height, image.width):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        gray = _deep_gray(image, file_format, tags)  # [h, w]
        return np.repeat(gray[..., None], channels, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":  # Pillow cannot convert it to gray directly
        image = image.convert("RGB")
    pixels = np.array(image.convert("RGB" if channels == 3 else "L"))
    return pixels.reshape(image.height, image.width, channels)


def _deep_gray(image: Image.Image, file_format: str | None, tags: dict[int, Any]) -> np.ndarray:
    """Gray images with more than 8 bits as uint8 [h, w]; `tags` are the TIFF tags."""
    values = np.asarray(image)
    if image.mode == "I" and file_format == "TIFF" and tags.get(339, (1,))[0] == 1:
        values = values.view(np.uint32)  # unsigned 32-bit samples, which Pillow reads as signed
    if image.mode == "I" and file_format == "PPM":
        values = values.astype(np.uint16)  # 16-bit samples in 32-bit numbers
    gray = _eight_bits(values)
    return 255 - gray if tags.get(262) == 0 else gray  # a TIFF in which 0 is white


def _bands(raw: bytes, channels: int, pixel_limit: int) -> np.ndarray:
    if raw[:2] not in (b"II", b"MM"):
        raise BadImage(f"{channels} channels need a multi-band TIFF")
    try:
        tifffile = optional("tifffile", "tiff")
    except ConfigError as e:
        if channels in (1, 3):  # a single unusual file must not end the run
            raise BadImage("this TIFF needs the [tiff] extra") from e
        raise
    try:
        with tifffile.TiffFile(io.BytesIO(raw)) as file:
            # Gray and RGB images are the first page; other bands may be separate pages.
            image = file.pages[0] if channels in (1, 3) else file.series[0]
            axes = dict(zip(image.axes, image.shape, strict=True))
            height, width = axes.get("Y", 0), axes.get("X", 0)
            _check_size(width, height, pixel_limit)
            _check_bands(math.prod(image.shape) // (height * width), channels)
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
        raise BadImage(f"a TIFF of shape {pixels.shape} is not an image")
    if pixels.shape[:2] != (height, width):
        pixels = np.moveaxis(pixels, 0, 2)  # [c, h, w] -> [h, w, c]
    values = _eight_bits(pixels)
    if (values.shape[2], channels) == (1, 3):
        values = np.repeat(values, 3, axis=2)
    if (values.shape[2], channels) == (3, 1):
        values = np.asarray(Image.fromarray(values).convert("L"))[..., None]
    return np.ascontiguousarray(values)


def _check_size(width: int, height: int, limit: int) -> None:
    if width * height == 0:
        raise BadImage("no pixels")
    if width * height > limit:
        raise BadImage(f"{width} x {height} is above the limit of {limit:,} pixels")


def _check_bands(bands: int, channels: int) -> None:
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
