"""Regular, unusual and unreadable images, as bytes; `python -m tests.images FOLDER` writes them."""

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def encode(image: Image.Image | np.ndarray, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, form, **options)
    return file.getvalue()


def ramp(h: int = 24, w: int = 32) -> np.ndarray:
    """Gray rising from 0 at the left to 255 at the right, uint8 [h, w]."""
    return np.tile(np.linspace(0, 255, w).round().astype(np.uint8), (h, 1))


def tiff(values: np.ndarray, **options) -> bytes:
    import tifffile

    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def photograph(h: int, w: int) -> np.ndarray:
    """A photograph, enlarged if needed, with the noise of a sensor, uint8 [h, w, 3]."""
    from sklearn.datasets import load_sample_images

    image = Image.fromarray(load_sample_images().images[0]).resize((w, h), Image.Resampling.LANCZOS)
    noise = np.random.default_rng(0).normal(0, 3, (h, w, 1))
    return (np.asarray(image) + noise).clip(0, 255).round().astype(np.uint8)


def dicom(values: np.ndarray, bits: int, interpretation: str = "MONOCHROME2", **tags) -> bytes:
    """A DICOM file of stored values [h, w], [f, h, w] or RGB [h, w, 3], of which `bits` are used."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = (
        SecondaryCaptureImageStorage,
        generate_uid(),
    )
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    colors = values.shape[-1] == 3
    data.Rows, data.Columns = values.shape[:2] if colors else values.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 3 if colors else 1, interpretation
    data.BitsAllocated, data.BitsStored, data.HighBit = 8 * values.dtype.itemsize, bits, bits - 1
    data.PixelRepresentation, data.PlanarConfiguration = int(values.dtype.kind == "i"), 0
    data.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    file = io.BytesIO()
    data.save_as(file)
    return file.getvalue()


def png(width: int, height: int, bits: int, color_type: int, rows: bytes) -> bytes:
    """A PNG of any header and rows, each with its leading filter byte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def huge_png(side: int = 30_000) -> bytes:
    """A PNG whose header says side x side, in a few hundred bytes."""
    return png(side, side, 8, 2, bytes(1000))


def planes(pixels: np.ndarray) -> np.ndarray:
    """8-bit pixels [h, w, c] as 16-bit planes [c, h, w]."""
    return np.moveaxis(pixels.astype(np.uint16) * 257, 2, 0).copy()


def odd() -> dict[str, tuple[bytes, np.ndarray]]:
    """Name -> (bytes, the expected gray values [h, w], within 4)."""
    gray = ramp()
    rgb = np.stack([gray] * 3, 2)
    rotated = Image.fromarray(rgb)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    palette = Image.fromarray(rgb).quantize(256)
    see_through = np.concatenate([rgb, np.full((24, 32, 1), 255, np.uint8)], 2)
    see_through[:12, :, 3] = 0
    white_above = gray.copy()
    white_above[:12] = 255
    frames = [Image.fromarray(rgb), Image.fromarray(255 - rgb)]
    return {
        "gray.png": (encode(gray), gray),
        "rgb.jpg": (encode(rgb, "JPEG", quality=95), gray),
        "rgb.webp": (encode(rgb, "WEBP", lossless=True), gray),
        "rgb.bmp": (encode(rgb, "BMP"), gray),
        "rgb.tif": (encode(rgb, "TIFF"), gray),
        "cmyk.jpg": (encode(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=95), gray),
        "palette.png": (encode(palette), gray),
        "one bit.png": (encode(Image.fromarray(gray > 127)), np.where(gray > 127, 255, 0)),
        "rgba.png": (encode(see_through), white_above),
        "gray alpha.png": (encode(Image.fromarray(see_through, "RGBA").convert("LA")), white_above),
        "exif.jpg": (encode(rotated, "JPEG", quality=95, exif=exif), np.rot90(gray, -1)),
        "16 bit.png": (encode(gray.astype(np.uint16) * 257), gray),
        "16 bit.tif": (encode(gray.astype(np.uint16) * 257, "TIFF"), gray),
        "16 bit rgb.tif": (tiff(rgb.astype(np.uint16) * 257, photometric="rgb"), gray),
        "16 bit planes.tif": (tiff(planes(rgb), photometric="rgb", planarconfig="separate"), gray),
        "16 bit planes big endian.tif": (
            tiff(planes(rgb), photometric="rgb", planarconfig="separate", byteorder=">"),
            gray,
        ),
        "16 bit tiled planes.tif": (
            tiff(planes(rgb), photometric="rgb", planarconfig="separate", tile=(16, 16)),
            gray,
        ),
        "16 bit planes alpha.tif": (
            tiff(
                planes(see_through), photometric="rgb", planarconfig="separate", extrasamples=["unassalpha"]
            ),
            white_above,
        ),
        "16 bit planes of any bands.tif": (
            tiff(planes(rgb), photometric="minisblack", planarconfig="separate", extrasamples=[0, 0]),
            gray,
        ),
        "16 bit gray alpha.tif": (
            tiff(
                np.moveaxis(planes(see_through[..., 2:]), 0, 2).copy(),
                photometric="minisblack",
                planarconfig="contig",
                extrasamples=["unassalpha"],
            ),
            white_above,
        ),
        "8 bit planes infrared.tif": (
            tiff(
                np.concatenate([np.moveaxis(rgb, 2, 0), 255 - gray[None]]),
                photometric="rgb",
                planarconfig="separate",
                extrasamples=[0],
            ),
            gray,
        ),
        "12 bit.tif": (tiff(gray.astype(np.uint16) * 16, bitspersample=12), gray),
        "imagej channels.tif": (tiff(np.stack([gray] * 3), imagej=True, metadata={"axes": "CYX"}), gray),
        "32 bit.tif": (encode(gray.astype(np.int32) * 257, "TIFF"), gray),
        "16 bit big endian.tif": (tiff(gray.astype(">u2") * 257, byteorder=">"), gray),
        "16 bit dark.tif": (encode(gray.astype(np.uint16) * 64, "TIFF"), gray // 4),
        "16 bit dark big endian.tif": (tiff(gray.astype(">u2") * 64, byteorder=">"), gray // 4),
        "16 bit dark.pgm": (encode(gray.astype(np.uint16), "PPM"), np.zeros_like(gray)),
        "16 bit white is 0.tif": (tiff(65535 - gray.astype(np.uint16) * 257, photometric="miniswhite"), gray),
        "32 bit small.tif": (encode(gray.astype(np.int32) * 4, "TIFF"), gray),
        "32 bit unsigned.tif": (tiff(gray.astype(np.uint32) * (2**32 // 256)), gray),
        "8 bit signed.tif": (tiff((gray.astype(np.int16) - 128).astype(np.int8)), gray),
        "lab.tif": (encode(Image.fromarray(rgb).convert("LAB"), "TIFF"), gray),
        "float64.tif": (tiff(gray / 255), gray),
        "float64 pages.tif": (tiff(np.stack([gray, 255 - gray]) / 255, photometric="minisblack"), gray),
        "float 0 to 1.tif": (encode((gray / 255).astype(np.float32), "TIFF"), gray),
        "float any.tif": (encode((gray * 10.0 - 700).astype(np.float32), "TIFF"), gray),
        "animated.gif": (
            encode(frames[0].quantize(256), "GIF", save_all=True, append_images=[frames[1].quantize(256)]),
            gray,
        ),
        "wide.png": (encode(ramp(1, 5000)), ramp(1, 5000)),
        "tall.png": (encode(ramp(5000, 1)), ramp(5000, 1)),
    }


def bad() -> dict[str, tuple[bytes, str]]:
    """Name -> (bytes, a part of the error message)."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole, jpeg = encode(noise), encode(noise, "JPEG")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    return {
        "empty.png": (b"", "empty file"),
        "text.jpg": (b"hello, I am a text file", "not an image"),
        "page.jpg": (b"<!doctype html><html><body>404</body></html>", "not an image"),
        "cut.png": (whole[: len(whole) // 2], "truncated|damaged"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "header only.png": (whole[:40], "not an image|truncated|damaged"),
        "flipped.png": (bytes(flipped), "damaged|truncated"),
        "huge.png": (huge_png(), "30000 x 30000 is above the limit of 100,000,000 pixels"),
        "script.eps.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
        "nan.tif": (tiff(np.full((8, 8), np.nan, np.float32)), "no finite values"),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0)
    plain = {f"{i:02d}.png": encode(noise.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for i in range(40)}
    for name, content in (plain | {k: raw for k, (raw, _) in (odd() | bad()).items()}).items():
        (folder / name).write_bytes(content)
    (folder / "loop").symlink_to(folder)
    print(
        f"{len(plain)} plain, {len(odd())} odd and {len(bad())} bad images, and a link to the folder itself, "
        f"in {folder}"
    )
