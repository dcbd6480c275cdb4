"""Images beyond Pillow: TIFF through tifffile, DICOM, samples of more than 8 bits."""

import functools
import io
import math
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8, UInt16
from PIL import Image
from torchvision.io import ImageReadMode, decode_png

from ..errors import ConfigError, optional

ALPHA = {1: "premultiplied", 2: "plain"}
"TIFF's values of ExtraSamples that mean transparency."


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason in a few words."""


def check_size(width: int, height: int, limit: int) -> None:
    """Raises BadImage without pixels, or with more than `limit`."""
    if width * height == 0:
        raise BadImage("no pixels")
    if width * height > limit:
        raise BadImage(f"{width} x {height} is above the limit of {limit:,} pixels, see --max-pixels")


def extra(module: str, name: str, what: str) -> Any:
    """A module of an extra. Raises BadImage without it, since a single unusual file must not end a run."""
    try:
        return optional(module, name)
    except ConfigError as e:
        raise BadImage(f"{what} needs `pip install 'rcmae[{name}]'`") from e


# --- more than 8 bits ---------------------------------------------------------------------------------------


def eight_bits(values: np.ndarray, bits: int = 16) -> UInt8[np.ndarray, "..."]:
    """Any samples as 8 bits. Unsigned 16-bit ones use `bits` of them: 2**bits - 1 becomes 255. 32-bit and
    float ones are scaled from 0..1 if all lie in it, else from their minimum and maximum."""
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if np.iscomplexobj(values):
        raise BadImage("complex values")
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint16:
        check_bits(values, bits)
        return _table(bits)[values]
    values = values.astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise BadImage("no finite values")
    low, high = (0.0, 1.0) if finite.min() >= 0 and finite.max() <= 1 else (finite.min(), finite.max())
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-12)
    return (255 * scaled.clip(0, 1)).round().astype(np.uint8)


def check_bits(values: np.ndarray, bits: int) -> None:
    """Raises BadImage for values that need more bits than those of the set."""
    if bits < 16 and (largest := int(values.max(initial=0))) >= 2**bits:
        raise BadImage(f"a value of {largest:,}, but the set uses {bits} bits; give --range dtype")


@functools.cache
def _table(bits: int) -> UInt8[np.ndarray, "65536"]:
    """The 8-bit value of every 16-bit one: a look-up needs no copy of the image as floats."""
    return (np.arange(2**16) * (255 / (2**bits - 1))).clip(max=255).round().astype(np.uint8)


def as_image(values: np.ndarray, alpha: str = "", bits: int = 16) -> Image.Image:
    """Samples [h, w, c] as an 8-bit image of gray or RGB. `alpha` says what the last of 2 or 4 channels is,
    as in `ALPHA`."""
    if not alpha:
        return Image.fromarray(eight_bits(values[..., 0] if values.shape[2] == 1 else values, bits))
    colors, opacity = eight_bits(values[..., :-1], bits), eight_bits(values[..., -1:])
    pixels = np.concatenate([np.broadcast_to(colors, (*colors.shape[:2], 3)), opacity], axis=2)
    mode = "RGBa" if alpha == "premultiplied" else "RGBA"
    return Image.frombytes(mode, pixels.shape[1::-1], pixels.tobytes()).convert("RGBA")


def is_deep_png(raw: bytes) -> bool:
    """Whether this is a PNG of 16-bit samples."""
    return raw[:8] == b"\x89PNG\r\n\x1a\n" and raw[24:25] == b"\x10"


def read_deep_png(raw: bytes, pixel_limit: int) -> tuple[UInt16[np.ndarray, "h w c"], str]:
    """The samples of a PNG of 16-bit samples, and what the last channel is, as in `ALPHA`."""
    check_size(int.from_bytes(raw[16:20]), int.from_bytes(raw[20:24]), pixel_limit)
    encoded = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    values = decode_png(encoded, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    return values, "" if values.shape[2] in (1, 3) else "plain"


# --- TIFF ---------------------------------------------------------------------------------------------------


def read_tiff(raw: bytes, channels: int, pixel_limit: int) -> tuple[np.ndarray, str, int]:
    """The samples [h, w, c] of a TIFF, what the last channel is if it is not a color, as in `ALPHA`, and the
    number of bits of a sample.

    With 1 or 3 channels, the first page as gray or RGB, or the channels of an ImageJ stack that has no other
    axes; otherwise that many bands, which may be separate pages. Raises BadImage; ConfigError if the bands
    cannot be read without the [tiff] extra.
    """
    colors = channels in (1, 3)
    if raw[:2] not in (b"II", b"MM"):
        raise BadImage(f"{channels} channels need a multi-band TIFF")
    # A single unusual image must not end the run, but of a set of bands no image can be read.
    tifffile = extra("tifffile", "tiff", "this TIFF") if colors else optional("tifffile", "tiff")
    try:
        with tifffile.TiffFile(io.BytesIO(raw)) as file:
            page = file.pages[0]
            image = page if colors and file.series[0].axes != "CYX" else file.series[0]
            axes = dict(zip(image.axes, image.shape, strict=True))
            height, width = axes.get("Y", 0), axes.get("X", 0)
            check_size(width, height, pixel_limit)
            bands, alpha = math.prod(image.shape) // (height * width), ""
            if colors and page.extrasamples:
                is_rgb = page.photometric == tifffile.PHOTOMETRIC.RGB
                if bands == (4 if is_rgb else 2):
                    alpha = ALPHA.get(page.extrasamples[0], "")
                if is_rgb and not alpha:
                    bands = 3  # other ones, such as infrared, stand behind the colors
            _check_bands(bands, (bands,) if alpha else (1, 3) if colors else (channels,), channels)
            values = image.asarray()
    except (BadImage, MemoryError):
        raise
    except Exception as e:
        if "imagecodecs" in str(e):
            raise BadImage("its compression needs `pip install 'rcmae[tiff]'`") from e
        raise BadImage(f"damaged TIFF ({type(e).__name__})") from e
    if len(axes) == 3:
        at = [*axes]
        values = np.moveaxis(values, (at.index("Y"), at.index("X")), (0, 1))
    elif len(axes) == 2:
        values = values[..., None]
    else:
        raise BadImage(f"a TIFF of shape {values.shape} is not an image")
    return values[..., :bands], alpha, page.bitspersample


def tiff_shape(file: io.BufferedIOBase) -> tuple[int, int]:
    """Height and width of the first page of a TIFF."""
    page: Any = extra("tifffile", "tiff", "this TIFF").TiffFile(file).pages[0]
    return page.imagelength, page.imagewidth


def _check_bands(bands: int, allowed: tuple[int, ...], channels: int) -> None:
    if bands not in allowed:
        raise BadImage(f"{bands} bands, not {channels}")


# --- DICOM --------------------------------------------------------------------------------------------------

HOUNSFIELD = (-1024.0, 3071.0)
"Black and white of CT images without a window: the range of scanners with 12 bits."


def _open_dicom(raw: bytes, pixel_limit: int) -> tuple[Any, np.ndarray]:
    """The data set of a DICOM file, and the stored values [h, w] of its frame, or RGB [h, w, 3]. Raises
    BadImage, also for several frames."""
    pydicom = extra("pydicom", "dicom", "DICOM")
    file = pydicom.dcmread(io.BytesIO(raw))
    if (frames := int(file.get("NumberOfFrames") or 1)) > 1:
        raise BadImage(f"{frames} frames in a DICOM file; write each frame to a file of its own")
    if "PixelData" not in file:
        raise BadImage("a DICOM file without pixels")
    check_size(file.Columns, file.Rows, pixel_limit)
    try:
        return file, file.pixel_array  # RGB of all kinds of colors but palettes
    except RuntimeError as e:
        install = "; install the [dicom] extra" if "missing dependencies" in str(e) else ""
        raise BadImage(f"its compression is not supported{install}") from e


def dicom_shape(file: io.BufferedIOBase) -> tuple[int, int]:
    """Height and width of a DICOM file."""
    header = extra("pydicom", "dicom", "DICOM").dcmread(file, stop_before_pixels=True)
    return header.Rows, header.Columns


def _declares_range(file: Any) -> bool:
    """Whether a DICOM file says which values are black and white."""
    return any(file.get(tag) for tag in ("WindowWidth", "VOILUTSequence", "ModalityLUTSequence"))


def undeclared_dicom(raw: bytes, pixel_limit: int) -> np.ndarray | None:
    """The stored values of a DICOM file that does not say which are black and white; None of others and of
    CT."""
    file, values = _open_dicom(raw, pixel_limit)
    return None if values.ndim == 3 or file.get("Modality") == "CT" or _declares_range(file) else values


def read_dicom(raw: bytes, pixel_limit: int, bits: int) -> UInt8[np.ndarray, "h w c"]:
    """The frame of a DICOM file, with 1 or 3 channels, as a viewer shows it: gray values through the rescale
    slope and the (first) window or look-up table, inverted where 0 is white (MONOCHROME1).

    Without a window, CT is shown in the range `HOUNSFIELD`, and other modalities in that of the bits stored,
    of which unsigned values use `bits`. Raises BadImage.
    """
    file, values = _open_dicom(raw, pixel_limit)
    from pydicom import pixels

    kind, stored = file.PhotometricInterpretation, int(file.BitsStored)
    if kind == "PALETTE COLOR":
        return eight_bits(pixels.apply_color_lut(values, file))
    if values.ndim == 3:
        return eight_bits(values, stored)
    shown = pixels.apply_voi_lut(pixels.apply_modality_lut(values, file), file)
    if table := file.get("VOILUTSequence") or file.get("ModalityLUTSequence"):
        low, high = 0.0, 2.0 ** table[0].LUTDescriptor[2] - 1
    elif file.get("Modality") == "CT" and not _declares_range(file):
        low, high = HOUNSFIELD
    elif file.PixelRepresentation or _declares_range(file):
        low, high = _rescaled(file, -(2 ** (stored - 1)) if file.PixelRepresentation else 0, stored)
    else:
        check_bits(values, bits)
        low, high = _rescaled(file, 0, min(bits, stored))
    gray = (255 * ((shown - low) / (high - low)).clip(0, 1)).round().astype(np.uint8)
    return (255 - gray if kind == "MONOCHROME1" else gray)[..., None]


def _rescaled(file: Any, first: int, bits: int) -> tuple[float, float]:
    """The smallest and the largest rescaled value of stored ones from `first` that have `bits`."""
    slope, intercept = float(file.get("RescaleSlope", 1)), float(file.get("RescaleIntercept", 0))
    low, high = sorted(slope * value + intercept for value in (first, first + 2**bits - 1))
    return low, high
