"""Decoding of image files to 8-bit pixels. Any input gives pixels or BadImage with a short reason."""

import ctypes
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageFile, JpegImagePlugin, UnidentifiedImageError
from PIL.Image import Transpose

from ..errors import RcmaeError
from . import deep
from .base import Source
from .deep import BadImage, check_size

__all__ = [
    "FORMATS",
    "PIXEL_LIMIT",
    "BadImage",
    "Picture",
    "decode",
    "open_image",
    "read_header",
    "sixteen_bits",
]

PIXEL_LIMIT = Source.pixel_limit
"Larger images are rejected before decoding."

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000")
"Formats that Pillow may open; its rarer ones have had decompression bombs."

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"What a TIFF and a BigTIFF begin with."

SPARE = 1.25
"""A JPEG is decoded at a scale that leaves this many times the pixels that a crop needs along each side. Then
crops of sharp photographs differ from those of all pixels by a mean of up to 2.1 of 255 (4.6 without it), and
those of other photographs by 0.3 to 1. It costs 5 % of the speed."""

DICOM = b"DICM"
"What stands at byte 128 of a DICOM file."

TURNS: dict[int, tuple[Transpose | None, bool, bool, bool]] = {
    1: (None, False, False, False),
    2: (Transpose.FLIP_LEFT_RIGHT, False, False, True),
    3: (Transpose.ROTATE_180, False, True, True),
    4: (Transpose.FLIP_TOP_BOTTOM, False, True, False),
    5: (Transpose.TRANSPOSE, True, False, False),
    6: (Transpose.ROTATE_270, True, True, False),
    7: (Transpose.TRANSVERSE, True, True, True),
    8: (Transpose.ROTATE_90, True, False, True),
}
"""EXIF orientation: what turns the stored image upright, whether that exchanges its sides, and whether it
reverses the order of the stored rows and of the stored columns."""


def decode(
    raw: bytes,
    channels: int = 3,
    pixel_limit: int = PIXEL_LIMIT,
    shape: tuple[int, int] | None = None,
    bits: int = 16,
) -> UInt8[np.ndarray, "h w {channels}"]:
    """Pixels of the first frame, rotated by EXIF orientation unless the stored (height, width) is `shape`.

    1 or 3 channels give gray or RGB of any image. Transparent pixels are blended with white. Of unsigned
    16-bit values, 2**bits - 1 becomes 255. Float and 32-bit images are scaled from 0..1 if all values lie in
    it, else from their minimum and maximum. Other numbers of channels need a TIFF with that many bands and
    the [tiff] extra, as do TIFFs that Pillow does not support (float64, BigTIFF, planes of 16 bits). HEIC,
    JPEG XL and DICOM need the extras [heif], [jxl] and [dicom]. Raises BadImage.
    """
    image = open_image(raw, channels, pixel_limit, shape, bits)
    return image if isinstance(image, np.ndarray) else image.pixels()


def open_image(
    raw: bytes,
    channels: int = 3,
    pixel_limit: int = PIXEL_LIMIT,
    shape: tuple[int, int] | None = None,
    bits: int = 16,
) -> "UInt8[np.ndarray, 'h w {channels}'] | Picture":
    """The image of `decode`: a `Picture` of 1 or 3 channels, or the pixels of other bands. Raises
    BadImage."""
    if not raw:
        raise BadImage("empty file")
    with _reasons():
        if channels not in (1, 3):
            values, _, declared = deep.read_tiff(raw, channels, pixel_limit)
            return deep.eight_bits(values, min(bits, declared))
        if raw[128:132] == DICOM:
            return Picture(deep.as_image(deep.read_dicom(raw, pixel_limit, bits)), channels)
        try:
            file = _open(raw)
        except UnidentifiedImageError as e:
            if raw[:4] not in TIFF:
                raise BadImage("not an image") from e
            return Picture(_tiff(raw, channels, pixel_limit, bits), channels)
        check_size(*file.size, pixel_limit)
        if isinstance(file, JpegImagePlugin.JpegImageFile):
            return Picture(file, channels, _orientation(file, shape), raw)
        if file.format == "TIFF" and _beyond_pillow(file, bits):
            return Picture(_tiff(raw, channels, pixel_limit, bits), channels)
        file.load()
        image: Image.Image = file
        if file.mode.startswith(("I", "F")):
            image = _deep_gray(file, bits)
        elif bits < 16 and deep.is_deep_png(raw):  # Pillow has kept the upper 8 bits of its colors
            image = deep.as_image(*deep.read_deep_png(raw, pixel_limit), bits)
        return Picture(image, channels, _orientation(file, shape))


def sixteen_bits(raw: bytes, channels: int = 3, pixel_limit: int = PIXEL_LIMIT) -> np.ndarray | None:
    """The values, without transparency, of an image of unsigned 16-bit samples that does not say which one is
    white (PNG, TIFF, DICOM without a window); None for any other image. Raises BadImage."""
    with _reasons():
        values, alpha, declared = None, "", 16
        if raw[128:132] == DICOM:
            values = deep.undeclared_dicom(raw, pixel_limit)
        elif deep.is_deep_png(raw):
            values, alpha = deep.read_deep_png(raw, pixel_limit)
        elif raw[:4] in TIFF:
            values, alpha, declared = _sixteen_bit_tiff(raw, channels, pixel_limit)
        if values is None or declared < 16 or (values.dtype.kind, values.dtype.itemsize) != ("u", 2):
            return None
        return values[..., :-1] if alpha else values


class Picture:
    """An opened image of 1 or 3 channels, of which crops are requested.

    A JPEG, given by its `raw` bytes too, is decoded no further than a crop needs: at 1/2, 1/4 or 1/8 of its
    size libjpeg takes a fraction of the time.
    """

    def __init__(self, image: Image.Image, channels: int, orientation: int = 1, raw: bytes | None = None):
        self.image, self.channels, self.raw = image, channels, raw
        self.stored = image.height, image.width
        self.turn, self.sideways, *self.reversed = TURNS.get(orientation, TURNS[1])
        self.scale = 1 if raw is None else 0  # `image` has 1/scale of the size; 0: not yet decoded

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height and width of the upright image, and its channels."""
        h, w = reversed(self.stored) if self.sideways else self.stored
        return h, w, self.channels

    def pixels(self, least: int | None = None) -> UInt8[np.ndarray, "h w c"]:
        """All pixels; with `least`, of a JPEG at the smallest scale that has as many along each side. Raises
        BadImage."""
        with _reasons():
            image = self._decoded(self._scale(self.shape, (float(least),) * 2) if least else 1)
            return self._upright(_flat(image, self.channels))

    def crop(self, box: tuple[int, int, int, int], shape: tuple[int, int]) -> UInt8[np.ndarray, "ch cw c"]:
        """The pixels in `box` (top, left, height, width). If they can be decoded at a smaller scale at which
        they are `SPARE` times as many as in `shape` (height, width) along each side, they are resized to that
        shape, bicubic with antialiasing. Raises BadImage."""
        with _reasons():
            image = self._decoded(self._scale(box[2:], (SPARE * shape[0], SPARE * shape[1])))
            top, left, height, width = (length / self.scale for length in self._in_stored(box))
            edges = left, top, left + width, top + height
            if self.scale == 1:
                return self._upright(_flat(image.crop(edges), self.channels))
            size = shape if self.sideways else shape[::-1]
            flat = _flat(image, self.channels)
            return self._upright(flat.resize(size, Image.Resampling.BICUBIC, edges))

    def _scale(self, have: tuple[int, ...], need: tuple[float, float]) -> int:
        """The largest reduction of `have` (height, width) that is at least `need`."""
        scales = () if self.raw is None else (8, 4, 2)
        return next((s for s in scales if have[0] >= s * need[0] and have[1] >= s * need[1]), 1)

    def _decoded(self, scale: int) -> Image.Image:
        """The stored image at 1/scale of its size, or at a larger one if it has been decoded at that."""
        if not 0 < self.scale <= scale:
            assert self.raw is not None
            if self.scale:  # a file can be decoded at one scale only
                self.image = _open(self.raw)
            h, w = self.stored
            self.scale = scale if self.image.draft(None, (w // scale, h // scale)) else 1
            self.image.load()
        return self.image

    def _in_stored(self, box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """A box of the upright image in the stored one."""
        top, left, height, width = box
        if self.sideways:
            top, left, height, width = left, top, width, height
        if self.reversed[0]:
            top = self.stored[0] - top - height
        if self.reversed[1]:
            left = self.stored[1] - left - width
        return top, left, height, width

    def _upright(self, image: Image.Image) -> np.ndarray:
        if self.turn is not None:
            image = image.transpose(self.turn)
        return np.array(image).reshape(image.height, image.width, self.channels)


@contextmanager
def _reasons() -> Iterator[None]:
    """Raise any error of a decoder as BadImage, and silence warnings, as on unusual EXIF and TIFF tags."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (BadImage, RcmaeError, MemoryError):
            raise
        except Exception as e:  # decoders raise all kinds of errors on damaged files
            reason = "truncated" if "truncated" in str(e).lower() else f"damaged ({type(e).__name__})"
            raise BadImage(reason) from e


def _silence_libraries() -> None:
    """Keep libtiff, tifffile and pydicom from writing to stderr about damaged files, which we report
    ourselves."""
    for name in ("tifffile", "pydicom"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    libtiff = ctypes.CDLL(Image.core.__file__)  # the Pillow module that is linked with libtiff
    for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
        if hasattr(libtiff, name):
            getattr(libtiff, name)(None)


_silence_libraries()


def read_header(file: io.BufferedIOBase) -> tuple[int, int, int]:
    """The stored height and width of an image, and its EXIF orientation (1 to 8). Most formats are not
    decoded for it. Raises BadImage."""
    with _reasons():
        raw = file.read(132)
        file.seek(0)
        if raw[128:] == DICOM:
            return *deep.dicom_shape(file), 1
        try:
            image = _open(raw, file)
        except UnidentifiedImageError as e:
            if raw[:4] not in TIFF:
                raise BadImage("not an image") from e
            file.seek(0)
            return *deep.tiff_shape(file), 1
        turned = image.format == "JXL" and not getattr(image, "jpeg", False)
        # Not image.getexif(), which decodes a PNG to its end.
        orientation = 1 if turned else Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        return image.height, image.width, orientation if orientation in TURNS else 1


def _open(raw: bytes, file: io.BufferedIOBase | None = None) -> ImageFile.ImageFile:
    """Read the header, with a plugin if the format needs one. `raw` may be only the start of a `file`. Raises
    BadImage without the plugin."""
    formats: tuple[str, ...] = FORMATS
    brands = raw[8 : min(64, int.from_bytes(raw[:4]))] if raw[4:8] == b"ftyp" else b""
    if b"hei" in brands or b"hev" in brands:
        heif = deep.extra("pillow_heif", "heif", "HEIC")
        heif.options.DECODE_THREADS = 1
        heif.register_heif_opener()
        formats = ("HEIF",)
    elif raw[:2] == b"\xff\x0a" or raw[4:8] == b"JXL ":
        deep.extra("pillow_jxl", "jxl", "JPEG XL").JpegXLImagePlugin.DECODE_THREADS = 0
        formats = ("JXL",)
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours is checked by `check_size`
    source = file or io.BytesIO(raw)
    try:
        # Pillow's stubs ask for IO[bytes], which BufferedIOBase is not by name.
        image = Image.open(source, formats=formats)  # type: ignore[arg-type]
        if image.format == "TIFF" and not _seek_largest(image):
            source.seek(0)
            image = Image.open(source, formats=formats)  # type: ignore[arg-type]
        return image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


PAGES = 16
"Pages of a TIFF among which the largest one is looked for."


def _seek_largest(image: ImageFile.ImageFile) -> bool:
    """Go to the first of the largest pages, since the first page of all may be a thumbnail. False if a later
    one is damaged, which leaves the image unusable."""
    areas = [image.width * image.height]
    try:
        for page in range(1, PAGES):
            image.seek(page)
            areas.append(image.width * image.height)
    except EOFError:
        pass
    except Exception:  # decoders raise all kinds of errors on damaged files
        return False
    image.seek(int(np.argmax(areas)))
    return True


def _orientation(file: ImageFile.ImageFile, shape: tuple[int, int] | None) -> int:
    """The EXIF orientation; 1 if the file has the shape as it is, or if its decoder has turned it."""
    turned = file.format == "JXL" and not getattr(file, "jpeg", False)
    if turned or shape == (file.height, file.width):
        return 1
    return file.getexif().get(ExifTags.Base.Orientation, 1)


def _flat(image: Image.Image, channels: int) -> Image.Image:
    """The image as gray or RGB, on white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":  # Pillow cannot convert it to gray directly
        image = image.convert("RGB")
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)


# --- TIFF, and gray with more than 8 bits -------------------------------------------------------------------

BITS_PER_SAMPLE, PHOTOMETRIC, DESCRIPTION, SAMPLES, PLANAR, SAMPLE_FORMAT = 258, 262, 270, 277, 284, 339
"Tags of TIFF."


def _tag(file: ImageFile.ImageFile, tag: int, default: int) -> int:
    """The value of a TIFF tag, the largest of several; `default` for other formats too."""
    values = getattr(file, "tag_v2", {}).get(tag, default)
    return max(values) if isinstance(values, tuple) else values


def _beyond_pillow(file: ImageFile.ImageFile, bits: int) -> bool:
    """Whether a TIFF needs tifffile: more than four bands, samples that Pillow misreads or reduces to 8 bits
    although fewer than 16 are used, or the channels of an ImageJ stack."""
    deep_colors = _tag(file, SAMPLES, 1) > 1 and _tag(file, BITS_PER_SAMPLE, 1) > 8
    return (
        len(file.getbands()) > 4
        or (file.mode == "L" and _tag(file, SAMPLE_FORMAT, 1) == 2)  # signed, which Pillow reads as unsigned
        or (deep_colors and (_tag(file, PLANAR, 1) == 2 or bits < 16))
        or "channels=" in str(getattr(file, "tag_v2", {}).get(DESCRIPTION, ""))
    )


def _tiff(raw: bytes, channels: int, pixel_limit: int, bits: int) -> Image.Image:
    values, alpha, declared = deep.read_tiff(raw, channels, pixel_limit)
    return deep.as_image(values, alpha, min(bits, declared))


def _sixteen_bit_tiff(raw: bytes, channels: int, pixel_limit: int) -> tuple[np.ndarray | None, str, int]:
    """As `deep.read_tiff`; None without samples of 16 bits. Gray images need no tifffile."""
    try:
        file = _open(raw)
    except UnidentifiedImageError:
        return deep.read_tiff(raw, channels, pixel_limit)
    check_size(*file.size, pixel_limit)
    declared = _tag(file, BITS_PER_SAMPLE, 1)
    if declared < 16:
        return None, "", declared
    if channels in (1, 3) and file.mode.startswith("I;16"):
        return np.asarray(file), "", declared
    return deep.read_tiff(raw, channels, pixel_limit)


def _deep_gray(file: ImageFile.ImageFile, bits: int) -> Image.Image:
    """An image of more than 8 bits as 8-bit gray."""
    values = np.asarray(file)
    if file.mode == "I" and file.format == "TIFF" and _tag(file, SAMPLE_FORMAT, 1) == 1:
        values = values.view(np.uint32)  # unsigned 32-bit samples, which Pillow reads as signed
    if file.mode == "I" and file.format == "PPM":
        values = values.astype(np.uint16)  # 16-bit samples in 32-bit numbers
    declares = file.format not in ("PNG", "TIFF")  # and Pillow scales the values to 16 bits
    gray = deep.eight_bits(values, 16 if declares else min(bits, _tag(file, BITS_PER_SAMPLE, 16)))
    white_is_zero = _tag(file, PHOTOMETRIC, 1) == 0
    return Image.fromarray(255 - gray if white_is_zero else gray)
