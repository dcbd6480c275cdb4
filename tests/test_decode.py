"""Decoding no more than a crop needs; formats of the extras; images whose 16-bit values use fewer bits."""

import io
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from rcmae.config import Images as ImagesConfig
from rcmae.data.augment import LocalCrops, MultiCrop
from rcmae.data.dataset import STATISTICS_SIDE, Images, measure_statistics
from rcmae.data.decode import BadImage, Picture, decode, open_image, read_header, sixteen_bits
from rcmae.data.labeled import open_labeled
from rcmae.data.pixels import measure_bits
from rcmae.data.sources import open_source
from rcmae.data.views import center, crop_box, random_resized_crop, rng
from rcmae.engine.distributed import World
from rcmae.methods.mae import CropAndMask
from tests import images
from tests.mutations import catches

H, W = 859, 1283
"No multiples of 8, so that a scaled image is a fraction of a pixel larger than the original."

SHAPE = (96, 72)


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    return images.photograph(H, W)


def jpeg(pixels: np.ndarray, orientation: int = 1, **options) -> bytes:
    return images.encode(pixels, "JPEG", **{"quality": 92, "exif": oriented(orientation)} | options)


def distance(one: torch.Tensor, two: torch.Tensor) -> float:
    """Mean absolute difference of 8-bit values."""
    return (one.float() - two.float()).abs().mean().item()


# --- the crop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "key", "box", "next_draw"),
    [
        ((375, 500), (0, 0, 0), (55, 47, 186, 211), 233626403616873771),
        ((1440, 1920), (7, 3, 12345), (26, 138, 1340, 1709), 22664950794225271),
        ((3000, 4000), (1, 2, 3), (519, 1344, 2350, 2494), 1294860786478108030),
        ((50, 3000), (0, 1, 2), (0, 1466, 50, 67), 2198070174442044856),
    ],
)
def test_the_crop_of_a_sample_is_the_one_of_version_0_1(size, key, box, next_draw):
    """A pure function of (seed, epoch, index) and the size of the image: recorded numbers."""
    draws = rng(*key)
    assert crop_box(*size, (0.2, 1.0), (3 / 4, 4 / 3), draws) == box
    assert draws.integers(2**62) == next_draw


def rounded_box(old):
    def crop(self, box, shape):
        step = self._scale(box[2:], shape)
        return old(self, tuple(step * round(length / step) for length in box), shape)

    return crop


@catches("a crop is rounded to the pixels of the scaled image", "rcmae.data.decode:Picture.crop", rounded_box)
@catches(
    "a crop of a turned photograph is taken from the stored one",
    "rcmae.data.decode:Picture._in_stored",
    lambda old: lambda self, box: box,
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_crop_is_close_to_that_of_all_pixels(photograph, orientation):
    """In any orientation, with the same random numbers, below 2 of 255 on average, at 1/8, 1/4 and 1/2."""
    raw = jpeg(photograph, orientation)
    whole = decode(raw)
    assert whole.shape[:2] == ((W, H) if orientation > 4 else (H, W))
    scales = set()
    for index, shape in enumerate([(48, 36), (48, 36), SHAPE, SHAPE, SHAPE, (200, 150), (200, 150)]):
        picture = open_image(raw)
        assert picture.shape == whole.shape
        draws, same_draws = rng(0, 0, index), rng(0, 0, index)
        crop = random_resized_crop(picture, shape, (0.2, 1.0), draws)
        expected = random_resized_crop(whole, shape, (0.2, 1.0), same_draws)
        assert crop.shape == expected.shape == (3, *shape)
        assert draws.integers(2**62) == same_draws.integers(2**62)
        assert distance(crop, expected) < 2
        scales.add(picture.scale)
    assert {2, 4, 8} <= scales


@pytest.mark.parametrize(
    "options", [{"subsampling": "4:4:4"}, {"subsampling": "4:2:0", "progressive": True}, {"quality": 50}]
)
def test_the_evaluation_crop_is_close_to_that_of_all_pixels(photograph, options):
    raw = jpeg(photograph, **options)
    picture = open_image(raw)
    assert distance(center(picture, SHAPE), center(decode(raw), SHAPE)) < 2
    assert picture.scale == 4


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_modes_of_jpeg_are_close_too(photograph, mode, channels):
    raw = images.encode(Image.fromarray(photograph).convert(mode), "JPEG", quality=92)
    crop = center(open_image(raw, channels), SHAPE)
    assert crop.shape == (channels, *SHAPE)
    assert distance(crop, center(decode(raw, channels), SHAPE)) < 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_crop_that_needs_all_pixels_has_them(form, orientation):
    """Bit for bit as if the image had been decoded first, for any format but large JPEGs."""
    pixels = images.photograph(150, 171)
    raw = images.encode(pixels, form, exif=oriented(orientation))
    for index in range(3):
        crop = random_resized_crop(open_image(raw), (96, 96), (0.2, 1.0), rng(0, 0, index))
        assert torch.equal(crop, random_resized_crop(decode(raw), (96, 96), (0.2, 1.0), rng(0, 0, index)))
    whole = decode(raw)
    assert torch.equal(center(open_image(raw), whole.shape[:2]), torch.from_numpy(whole).permute(2, 0, 1))


@pytest.mark.parametrize("name", images.odd())
def test_a_crop_of_an_odd_image_is_that_of_its_pixels(name):
    raw, _ = images.odd()[name]
    for channels in (1, 3):
        crop = random_resized_crop(open_image(raw, channels), (16, 16), (0.2, 1.0), rng(0, 0, 0))
        assert torch.equal(
            crop, random_resized_crop(decode(raw, channels), (16, 16), (0.2, 1.0), rng(0, 0, 0))
        )


def coarse_stays(old):
    return lambda self, scale: old(self, self.scale or scale)


@catches(
    "a small crop is taken from an image decoded for a large one",
    "rcmae.data.decode:Picture._decoded",
    coarse_stays,
)
def test_a_crop_that_needs_more_pixels_decodes_again(photograph):
    raw = jpeg(photograph)
    picture = open_image(raw)
    picture.crop((0, 0, H, W), (48, 36))
    assert picture.scale == 8
    for box, scale in (((100, 200, 250, 200), 2), ((300, 400, 96, 72), 1)):
        assert np.array_equal(picture.crop(box, SHAPE), open_image(raw).crop(box, SHAPE))
        assert picture.scale == scale
    picture.crop((0, 0, H, W), (48, 36))
    assert picture.scale == 1, "what is decoded is used again"


def test_all_crops_of_a_multi_crop_are_close(photograph):
    """A later crop may need a larger scale than the first."""
    raw = jpeg(photograph)
    plain = {"jitter": (0.0, 0.0, 0.0, 0.0), "gray": 0.0, "solarize": 0.0}
    crops = LocalCrops(local_crops=4, local_size=64, local_scale=(0.01, 0.05), **plain)
    view = MultiCrop(ImagesConfig(size=64, crop_scale=(0.5, 1.0)), crops)
    picture = open_image(raw)
    ours, full = view(picture, rng(0, 0, 0)), view(decode(raw), rng(0, 0, 0))
    for name in ("image", "local"):
        for crop, expected in zip(ours[name], full[name], strict=True):
            assert distance(crop, expected) < 2
    assert picture.scale == 1


def test_a_large_jpeg_is_not_decoded_in_full(photograph, monkeypatch):
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self.size) or load(self))
    view = CropAndMask(ImagesConfig(size=96, crop_scale=(0.6, 1.0)), patches=36)
    view(open_image(jpeg(photograph)), rng(0, 0, 1))
    assert set(decoded) == {(-(-W // 4), -(-H // 4))}


@pytest.mark.parametrize("fraction", [0.3, 0.9])
def test_a_cut_jpeg_is_bad_at_any_scale(photograph, fraction):
    raw = jpeg(photograph)
    picture = open_image(raw[: int(fraction * len(raw))])
    with pytest.raises(BadImage, match="^truncated"):
        picture.crop((0, 0, H, W), (48, 36))


def test_an_image_that_fails_when_it_is_cropped_is_substituted(tmp_path, photograph):
    """Its header is fine, so that it fails only in the view; the substitute has a generator of its own."""
    for name, pixels in (("a", photograph), ("b", photograph[:, ::-1])):
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(pixels))
    cut = tmp_path / "a.jpg"
    cut.write_bytes(cut.read_bytes()[:20_000])
    view = CropAndMask(ImagesConfig(size=32), patches=4)
    source = open_source(str(tmp_path))
    sample = Images(source, view, seed=0)[(3, 0)]
    assert [Path(where).name for _, where, _ in sample["bad"]] == ["a.jpg"] * len(sample["bad"]) != []
    expected = view(open_image((tmp_path / "b.jpg").read_bytes()), rng(0, 3, 0))
    assert all(torch.equal(sample[name], expected[name]) for name in expected)


def test_statistics_do_not_need_all_pixels(tmp_path, photograph):
    (tmp_path / "large.jpg").write_bytes(jpeg(photograph))
    picture = open_image(jpeg(photograph))
    small = picture.pixels(STATISTICS_SIDE)
    assert picture.scale == 2
    assert min(small.shape[:2]) >= STATISTICS_SIDE
    mean, std = measure_statistics(open_source(str(tmp_path)), 3)
    whole = decode(jpeg(photograph)) / 255
    assert mean == pytest.approx(whole.mean((0, 1)), abs=0.002)
    assert std == pytest.approx(whole.std((0, 1)), rel=0.02)


# --- formats ------------------------------------------------------------------------------------------------


def test_jpeg_2000():
    assert np.array_equal(decode(images.encode(images.ramp(), "JPEG2000"), 1)[..., 0], images.ramp())


@pytest.mark.parametrize("form", ["JPEG", "MPO"])
def test_a_jpeg_with_several_images_is_its_first(form, photograph):
    frames = {"save_all": True, "append_images": [Image.fromarray(255 - photograph)]} if form == "MPO" else {}
    raw = images.encode(photograph, form, quality=92, **frames)
    assert distance(center(open_image(raw), SHAPE), center(photograph, SHAPE)) < 2


def heic(**options) -> bytes:
    pytest.importorskip("pillow_heif").register_heif_opener()
    return images.encode(np.stack([images.ramp()] * 3, 2), "HEIF", quality=95, **options)


def test_heic():
    pixels = decode(heic()).astype(int)
    assert np.abs(pixels - images.ramp()[..., None]).max() <= 4
    turned = decode(heic(exif=oriented(6).tobytes())).astype(int)
    assert np.abs(turned - np.rot90(images.ramp(), -1)[..., None]).max() <= 4, "turned once, not twice"


def test_jpeg_xl(tmp_path):
    pytest.importorskip("pillow_jxl")
    ramp = np.stack([images.ramp()] * 3, 2)
    raw = images.encode(ramp, "JXL", lossless=True, exif=oriented(6).tobytes())
    assert np.array_equal(decode(raw), ramp), "the orientation of a JPEG XL is in its pixels"
    (tmp_path / "a.jpg").write_bytes(jpeg(ramp, 6, quality=95))
    raw = images.encode(Image.open(tmp_path / "a.jpg"), "JXL", lossless_jpeg=True)
    assert np.abs(decode(raw).astype(int) - np.rot90(ramp, -1)).max() <= 4


@pytest.mark.parametrize(
    ("start", "module", "extra"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "pillow_heif", "heif"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "pillow_jxl", "jxl"),
        (b"\xff\x0a", "pillow_jxl", "jxl"),
        (bytes(128) + b"DICM", "pydicom", "dicom"),
    ],
)
def test_a_format_whose_module_is_missing_names_the_extra(monkeypatch, start, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BadImage, match=rf"needs `pip install 'rcmae\[{extra}\]'`$"):
        decode(start + bytes(200))


@pytest.mark.parametrize("start", [b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", b"\xff\x0a", bytes(128) + b"DICM"])
def test_damaged_files_of_the_extras_are_bad(start):
    pytest.importorskip("pillow_heif"), pytest.importorskip("pillow_jxl"), pytest.importorskip("pydicom")
    with pytest.raises(BadImage):
        decode(start + bytes(200))


# --- DICOM --------------------------------------------------------------------------------------------------

STORED = (images.ramp().astype(int) * 4095 // 255).astype(np.uint16)
"The ramp in 12 bits."

HOUNSFIELD = (STORED.astype(np.int16) - 1024).astype(np.int16)

DICOMS = {
    "12 of 16 bits": ((STORED, 12), images.ramp()),
    "0 is white": ((4095 - STORED, 12, "MONOCHROME1"), images.ramp()),
    "16 bits": ((images.ramp().astype(np.uint16) * 257, 16), images.ramp()),
    "8 bits": ((images.ramp(), 8), images.ramp()),
    "RGB": ((np.stack([images.ramp()] * 3, 2), 8, "RGB"), images.ramp()),
    "CT without a window": ((HOUNSFIELD, 16), images.ramp(), {"Modality": "CT"}),
    "CT stored with an offset": (
        (STORED, 16),
        images.ramp(),
        {"Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": -1024},
    ),
    "a window": (
        (HOUNSFIELD, 16),
        np.clip(2 * images.ramp().astype(int) - 127, 0, 255),
        {"WindowCenter": 1024, "WindowWidth": 2048, "RescaleSlope": 1, "RescaleIntercept": 0},
    ),
    "the first of two windows": (
        (STORED, 12),
        images.ramp(),
        {"WindowCenter": [2048, 100], "WindowWidth": [4096, 50]},
    ),
    "a window wider than the values": (
        (STORED // 2, 12),
        images.ramp() // 2,
        {"WindowCenter": 2048, "WindowWidth": 4096},
    ),
}


@catches(
    "the rescale slope of DICOM is ignored",
    "pydicom.pixels:apply_modality_lut",
    lambda old: lambda values, file: values,
    case="CT stored with an offset",
)
@pytest.mark.parametrize("name", DICOMS)
def test_dicom_looks_as_in_a_viewer(name):
    pytest.importorskip("pydicom")
    stored, expected, *tags = DICOMS[name]
    raw = images.dicom(*stored, **(tags[0] if tags else {}))
    for channels in (1, 3):
        pixels = decode(raw, channels)
        assert pixels.shape == (*expected.shape, channels)
        assert np.abs(pixels.astype(int) - expected[..., None].astype(int)).max() <= 2


def test_dicom_that_is_no_single_image_is_refused_in_words():
    pytest.importorskip("pydicom")
    with pytest.raises(BadImage, match="2 frames in a DICOM file; write each frame to a file of its own"):
        decode(images.dicom(np.stack([STORED, STORED]), 12, NumberOfFrames=2))
    with pytest.raises(BadImage, match="30000 x 30000 is above the limit"):
        decode(images.dicom(STORED, 12, Rows=30_000, Columns=30_000))


# --- fewer than 16 bits -------------------------------------------------------------------------------------

RAMP_12 = images.ramp().astype(np.uint16) * 16
RGB_12 = np.stack([RAMP_12] * 3, 2)


def png_16(values: np.ndarray) -> bytes:
    """A PNG of 16-bit samples [h, w, c], which Pillow does not write in color."""
    h, w, c = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return images.png(w, h, 16, {1: 0, 2: 4, 3: 2, 4: 6}[c], rows)


TWELVE = {
    "gray.png": png_16(RAMP_12[..., None]),
    "rgb.png": png_16(RGB_12),
    "alpha.png": png_16(np.dstack([RGB_12, np.full_like(RAMP_12, 65535)])),
    "gray.tif": images.tiff(RAMP_12),
    "big endian.tif": images.tiff(RAMP_12.astype(">u2"), byteorder=">"),
    "rgb.tif": images.tiff(RGB_12, photometric="rgb"),
    "planes.tif": images.tiff(np.moveaxis(RGB_12, 2, 0).copy(), photometric="rgb", planarconfig="separate"),
    "white is 0.tif": images.tiff(4095 - RAMP_12, photometric="miniswhite"),
}


@pytest.mark.parametrize("name", TWELVE)
@pytest.mark.parametrize("channels", [1, 3])
def test_values_of_12_bits_use_all_levels(name, channels):
    pixels = decode(TWELVE[name], channels, bits=12)
    assert np.abs(pixels.astype(int) - images.ramp()[..., None]).max() <= 1
    assert decode(TWELVE[name], channels).max() in ((16, 15) if "white" not in name else (255,))
    assert sixteen_bits(TWELVE[name], channels).max() == (4095 if "white" in name else 4080)


def test_formats_that_declare_their_range_keep_it():
    pgm = b"P5\n32 24\n4095\n" + STORED.astype(">u2").tobytes()
    for raw in (pgm, images.tiff(RAMP_12, bitspersample=12), images.encode(images.ramp())):
        assert sixteen_bits(raw) is None
        for bits in (12, 16):
            assert np.abs(decode(raw, 1, bits=bits)[..., 0].astype(int) - images.ramp()).max() <= 1


def test_the_bits_of_a_set_are_measured_once_and_said(tmp_path):
    """The meaning of a value is the same in all images: a dark one stays dark."""
    for i in range(8):
        values = RAMP_12 if i else RAMP_12 // 8
        (tmp_path / f"{i}.tif").write_bytes(images.tiff(values))
    source = open_source(str(tmp_path))
    assert source.bits == 12
    assert source.notes == (
        f"the 16-bit images of {tmp_path} use 12 bits (values up to 4,080 in 8 images): 4,095 is white; with "
        "--range dtype, 65,535 is",
    )
    data = Images(source, lambda image, draws: {"image": center(image, (24, 32))}, 0)
    assert [data[(0, i)]["image"].max() for i in (0, 1)] == [32, 254]
    full = open_source(str(tmp_path), value_range="dtype")
    assert (full.bits, full.notes) == (16, ())


def test_a_value_above_the_bits_of_the_set_is_named():
    with pytest.raises(BadImage, match="a value of 4,080, but the set uses 10 bits; give --range dtype"):
        decode(TWELVE["gray.tif"], bits=10)


def test_images_that_use_16_bits_or_have_8_are_left_alone(tmp_path):
    for bits, raw in ((16, png_16(RAMP_12[..., None] * 16)), (None, images.encode(images.ramp()))):
        (tmp_path / str(bits)).mkdir()
        (tmp_path / str(bits) / "a.png").write_bytes(raw)
        source = open_source(str(tmp_path / str(bits)))
        assert (source.bits, source.notes) == (bits, ())


@pytest.mark.parametrize(
    ("trained", "bits", "text"),
    [
        (None, 12, ": 4,095 is white; with --range dtype"),
        (12, 12, ": 4,095 is white; with --range dtype"),
        (14, 14, ": 16,383 is white, as in the images that the network was trained on; with --range dtype"),
        (16, 16, ": 65,535 is white, as in the images that the network was trained on"),
        (10, 12, ", more than the 10 of the images that the network was trained on: 4,095 is white; with"),
    ],
)
def test_a_set_has_the_bits_of_the_images_that_a_network_was_trained_on(tmp_path, trained, bits, text):
    """Unless its values need more."""
    (tmp_path / "a.tif").write_bytes(images.tiff(RAMP_12))
    source = open_source(str(tmp_path), value_range="dtype")
    shown: list[tuple[str, int]] = []

    @contextmanager
    def progress(what, total):
        yield lambda done: shown.append((what, total))

    measure_bits([source], 3, trained, progress)
    assert source.bits == bits and len(source.notes) == 1
    use = f"the 16-bit images of {tmp_path} use 12 bits (values up to 4,080 in 1 image)"
    assert source.notes[0].startswith(use + text)
    assert shown == [(f"measuring the range of 16-bit images in {tmp_path}", 200)]


def test_one_rank_measures_the_bits(tmp_path):
    (tmp_path / "a.tif").write_bytes(images.tiff(RAMP_12))

    class Second(World):
        def broadcast(self, value):
            assert value == (0, 0)
            return 1000, 7

    source = open_source(str(tmp_path), value_range="dtype")
    measure_bits([source], 3, world=Second(1, 2))
    assert source.bits == 10 and "values up to 1,000 in 7 images" in source.notes[0]


@catches(
    "each part of a set has a range of its own",
    "rcmae.data.labeled:measure_bits",
    lambda old: lambda sources, *options: [old([source], *options) for source in sources],
)
def test_both_parts_of_a_labeled_set_have_the_same_range(tmp_path):
    for part, divisor in (("train", 1), ("val", 8)):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(5):
                (tmp_path / part / name / f"{i}.tif").write_bytes(images.tiff(RAMP_12 // divisor))
    data = open_labeled(str(tmp_path))
    assert data.train.bits == data.test.bits == 12
    assert sum("use 12 bits" in note for note in data.notes) == 1
    assert isinstance(open_image(data.test.read(0)), Picture)


PHOTOGRAPH = images.photograph(30, 50)
HEADERS = {
    "jpg": lambda: images.encode(PHOTOGRAPH, "JPEG", exif=oriented(6)),
    "png": lambda: images.encode(PHOTOGRAPH, "PNG"),
    "heic": lambda: images.encode(PHOTOGRAPH, "HEIF"),
    "jxl": lambda: images.encode(PHOTOGRAPH, "JXL"),
    "dcm": lambda: images.dicom(PHOTOGRAPH[..., 0].astype(np.uint16), 8),
    "tif": lambda: images.tiff(np.stack([PHOTOGRAPH[..., 0]] * 5), photometric="minisblack"),
    "planar.tif": lambda: images.tiff(
        np.moveaxis(PHOTOGRAPH.astype(np.float32), 2, 0), photometric="rgb", planarconfig="separate"
    ),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_the_header_of_every_format_is_read(kind):
    if kind in ("heic", "jxl"):
        module = pytest.importorskip("pillow_heif" if kind == "heic" else "pillow_jxl")
        getattr(module, "register_heif_opener", lambda: None)()
    assert read_header(io.BytesIO(HEADERS[kind]())) == (30, 50, 6 if kind == "jpg" else 1)


def test_the_header_of_a_text_is_refused():
    with pytest.raises(BadImage, match="not an image"):
        read_header(io.BytesIO(b"text"))


def test_many_bands_of_fewer_bits(tmp_path):
    bands = np.stack([np.roll(RAMP_12, k, 1) for k in range(5)], 2)
    (tmp_path / "a.tif").write_bytes(images.tiff(bands, photometric="minisblack", planarconfig="contig"))
    source = open_source(str(tmp_path), channels=5)
    assert source.bits == 12
    assert np.abs(decode(source.read(0), 5, bits=12)[..., 0].astype(int) - images.ramp()).max() <= 1


@catches("the first page is read", "rcmae.data.decode:_seek_largest", lambda old: lambda image: None)
def test_of_a_tiff_with_a_thumbnail_first_the_picture_is_read():
    large = Image.fromarray(images.photograph(48, 64))
    pages = [large.resize((8, 6)), large, Image.new("RGB", (64, 48))]

    def saved(first: Image.Image, *others: Image.Image) -> bytes:
        file = io.BytesIO()
        first.save(file, "TIFF", save_all=True, append_images=others)
        return file.getvalue()

    assert (decode(saved(*pages)) == np.asarray(large)).all(), "the first of the largest pages"
    assert read_header(io.BytesIO(saved(*pages)))[:2] == (48, 64)
    raw = saved(large, pages[0])
    assert (decode(raw) == np.asarray(large)).all()
    assert (decode(raw[:-30]) == np.asarray(large)).all(), "a later page is cut off"
    later = int.from_bytes(raw[4:8], "little")  # of the first page; its end holds the place of the next
    place = later + 2 + 12 * int.from_bytes(raw[later : later + 2], "little")
    damaged = raw[:place] + (8).to_bytes(4, "little") + raw[place + 4 :]
    assert (decode(damaged) == np.asarray(large)).all(), "a later page lies in the pixels"
