"""Every good, odd and bad kind of image that people have, as bytes; `python -m tests.images FOLDER` writes them all."""

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
    """Grey rising from 0 at the left to 255 at the right, uint8 [h, w]."""
    return np.tile(np.linspace(0, 255, w).round().astype(np.uint8), (h, 1))


def tiff(values: np.ndarray, **options) -> bytes:
    import tifffile

    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def huge_png(side: int = 30_000) -> bytes:
    """A PNG whose header says side x side, in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def odd() -> dict[str, tuple[bytes, np.ndarray]]:
    """Name -> (bytes, the grey values [h, w] it must show, to within 4)."""
    grey = ramp()
    rgb = np.stack([grey] * 3, 2)
    rotated = Image.fromarray(rgb)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter to the right
    palette = Image.fromarray(rgb).quantize(256)
    see_through = np.concatenate([rgb, np.full((24, 32, 1), 255, np.uint8)], 2)
    see_through[:12, :, 3] = 0
    white_above = grey.copy()
    white_above[:12] = 255
    frames = [Image.fromarray(rgb), Image.fromarray(255 - rgb)]
    return {
        "grey.png": (encode(grey), grey),
        "rgb.jpg": (encode(rgb, "JPEG", quality=95), grey),
        "rgb.webp": (encode(rgb, "WEBP", lossless=True), grey),
        "rgb.bmp": (encode(rgb, "BMP"), grey),
        "rgb.tif": (encode(rgb, "TIFF"), grey),
        "cmyk.jpg": (encode(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=95), grey),
        "palette.png": (encode(palette), grey),
        "one bit.png": (encode(Image.fromarray(grey > 127)), np.where(grey > 127, 255, 0)),
        "rgba.png": (encode(see_through), white_above),
        "grey alpha.png": (encode(Image.fromarray(see_through, "RGBA").convert("LA")), white_above),
        "exif.jpg": (encode(rotated, "JPEG", quality=95, exif=exif), np.rot90(grey, -1)),
        "16 bit.png": (encode(grey.astype(np.uint16) * 257), grey),
        "16 bit.tif": (encode(grey.astype(np.uint16) * 257, "TIFF"), grey),
        "16 bit rgb.tif": (tiff(rgb.astype(np.uint16) * 257, photometric="rgb"), grey),
        "32 bit.tif": (encode(grey.astype(np.int32) * 257, "TIFF"), grey),
        "16 bit big endian.tif": (tiff(grey.astype(">u2") * 257, byteorder=">"), grey),
        "16 bit dark.tif": (encode(grey.astype(np.uint16) * 64, "TIFF"), grey // 4),
        "16 bit dark big endian.tif": (tiff(grey.astype(">u2") * 64, byteorder=">"), grey // 4),
        "16 bit dark.pgm": (encode(grey.astype(np.uint16), "PPM"), np.zeros_like(grey)),
        "16 bit white is 0.tif": (tiff(65535 - grey.astype(np.uint16) * 257, photometric="miniswhite"), grey),
        "32 bit small.tif": (encode(grey.astype(np.int32) * 4, "TIFF"), grey),
        "32 bit unsigned.tif": (tiff(grey.astype(np.uint32) * (2**32 // 256)), grey),
        "8 bit signed.tif": (tiff((grey.astype(np.int16) - 128).astype(np.int8)), grey),
        "lab.tif": (encode(Image.fromarray(rgb).convert("LAB"), "TIFF"), grey),
        "float64.tif": (tiff(grey / 255), grey),
        "float64 pages.tif": (tiff(np.stack([grey, 255 - grey]) / 255, photometric="minisblack"), grey),
        "float 0 to 1.tif": (encode((grey / 255).astype(np.float32), "TIFF"), grey),
        "float any.tif": (encode((grey * 10.0 - 700).astype(np.float32), "TIFF"), grey),
        "animated.gif": (encode(frames[0].quantize(256), "GIF", save_all=True, append_images=[frames[1].quantize(256)]), grey),
        "wide.png": (encode(ramp(1, 5000)), ramp(1, 5000)),
        "tall.png": (encode(ramp(5000, 1)), ramp(5000, 1)),
    }


def bad() -> dict[str, tuple[bytes, str]]:
    """Name -> (bytes, what the reason says)."""
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
    print(f"{len(plain)} plain, {len(odd())} odd and {len(bad())} bad images, and a link to the folder itself, in {folder}")
