"""Images and sources of every kind; samples are pure functions of seed, epoch and index."""

import contextlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from torch.utils.data import DataLoader

from rcmae.cli import main
from rcmae.config import Images as ImagesConfig
from rcmae.data import audit as audit_module
from rcmae.data import decode as decode_module
from rcmae.data.audit import _unfit, audit, indexed, render, to_json
from rcmae.data.base import Strings, printable
from rcmae.data.dataset import BadFiles, Images, collate, measure_statistics, quiet_worker, read_image
from rcmae.data.decode import BadImage, decode
from rcmae.data.labeled import open_labeled
from rcmae.data.pixels import moments, open_image
from rcmae.data.sampler import BatchSampler, order
from rcmae.data.sources import open_source
from rcmae.data.views import center, clipped_crop_box, crop_box, flip, random_resized_crop, rng
from rcmae.engine.console import Screen
from rcmae.errors import ConfigError, DataError, StorageError
from rcmae.methods.mae import CropAndMask
from rcmae.tasks import context
from rcmae.tasks.probe import probe_set
from tests import images
from tests.conftest import small
from tests.mutations import catches

ODD, BAD = images.odd(), images.bad()
FIVE = images.tiff(np.zeros((8, 8, 5), np.uint8), photometric="minisblack", planarconfig="contig")
VIEW = CropAndMask(ImagesConfig(size=16, crop_scale=(0.3, 1.0)), patches=16)


def fill(root: Path, files: dict[str, bytes]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def good(count: int = 12) -> dict[str, bytes]:
    noise = np.random.default_rng(1)
    return {
        f"{i:02d}.png": images.encode(noise.integers(0, 256, (20, 24, 3), dtype=np.uint8))
        for i in range(count)
    }


# --- decoding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("channels", [1, 3])
def test_odd_images_are_decoded_correctly(name, channels):
    raw, expected = ODD[name]
    pixels = decode(raw, channels)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (*expected.shape, channels)
    assert np.abs(pixels.astype(int) - expected[..., None].astype(int)).max() <= 4


@pytest.mark.parametrize("name", BAD)
def test_unreadable_images_raise_an_error_with_a_reason(name):
    raw, reason = BAD[name]
    with pytest.raises(BadImage, match=f"^({reason})") as e:
        decode(raw)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("planar", [False, True])
def test_multi_band_tiff(dtype, planar):
    bands = np.stack([np.roll(images.ramp(), k, 1) for k in range(8)], 2)
    scale = {np.uint8: 1, np.uint16: 257, np.float32: np.float32(1 / 255)}[dtype]
    values = (bands.astype(np.float64) * scale).astype(dtype)
    raw = images.tiff(
        np.moveaxis(values, 2, 0) if planar else values,
        photometric="minisblack",
        planarconfig="separate" if planar else "contig",
    )
    assert np.abs(decode(raw, 8).astype(int) - bands.astype(int)).max() <= 1
    with pytest.raises(BadImage, match="8 bands, not 5"):
        decode(raw, 5)
    with pytest.raises(BadImage, match="5 channels need a multi-band TIFF"):
        decode(ODD["gray.png"][0], 5)


def test_decoding_a_damaged_tiff_prints_nothing(capfd):
    """Neither libtiff nor tifffile nor numpy writes to stderr what our own error message reports."""
    compressed = bytearray(
        images.encode(
            np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8),
            "TIFF",
            compression="tiff_lzw",
        )
    )
    compressed[len(compressed) // 3] ^= 255
    bands = bytearray(FIVE)
    bands[4:8] = (99999).to_bytes(4, "little")
    for raw, channels in ((compressed, 3), (bands, 5), (images.tiff(np.ones((8, 8), np.complex64)), 3)):
        with pytest.raises(BadImage):
            decode(bytes(raw), channels)
    assert capfd.readouterr() == ("", "")


def test_a_compression_that_tifffile_lacks_is_named(monkeypatch):
    import tifffile

    def lacks(series):
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")  # the message of tifffile

    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", lacks)
    with pytest.raises(BadImage, match=r"its compression needs `pip install 'rcmae\[tiff\]'`"):
        decode(FIVE, 5)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate"])
def test_compressed_bands(compression):
    """As geographic software writes them; only Pillow writes LZW here, with at most four bands."""
    bands = np.stack([np.roll(images.ramp(), k, 1) for k in range(4)], 2)
    file = io.BytesIO()
    Image.fromarray(bands, "CMYK").save(file, "TIFF", compression=compression)
    assert np.array_equal(decode(file.getvalue(), 4), bands)


def test_bands_are_counted_before_they_are_decoded(monkeypatch):
    import tifffile

    monkeypatch.setattr(tifffile.TiffPage, "asarray", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", lambda self: pytest.fail("decoded"))
    for channels in (3, 4):
        with pytest.raises(BadImage, match=f"5 bands, not {channels}"):
            decode(FIVE, channels)


def test_an_image_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(decode_module.Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadImage, match="above the limit"):
        decode(images.huge_png())


def test_any_bytes_give_pixels_or_bad_image():
    """Mutations of valid files never raise another error and never warn."""
    generator = random.Random(0)
    for raw, _ in ODD.values():
        for _ in range(12):
            mutated = bytearray(raw)
            for _ in range(generator.randrange(1, 6)):
                mutated[generator.randrange(len(mutated))] = generator.randrange(256)
            if generator.random() < 0.3:
                mutated = mutated[: generator.randrange(len(mutated))]
            try:
                assert decode(bytes(mutated), 3, pixel_limit=10**6).dtype == np.uint8
            except BadImage:
                pass


def test_without_tifffile_the_extra_is_named(monkeypatch):
    raw = images.tiff(np.zeros((4, 4, 8), np.uint8), photometric="minisblack")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ConfigError, match=r"pip install 'rcmae\[tiff\]'"):
        decode(raw, 8)


# --- views --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [crop_box, clipped_crop_box])
@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**32))
def test_a_crop_lies_inside_its_image(box, h, w, seed):
    top, left, height, width = box(h, w, (0.2, 1.0), (3 / 4, 4 / 3), np.random.default_rng(seed))
    assert 0 <= top <= top + height <= h
    assert 0 <= left <= left + width <= w
    assert height > 0 < width


@catches(
    "probes crop as pre-training does",
    "rcmae.tasks.context:random_resized_crop",
    lambda old: lambda image, shape, scale, rng, box: old(image, shape, (0.2, 1.0), rng),
)
def test_probes_are_fitted_on_crops_of_8_percent_and_more_drawn_once():
    """MAE's linear probing. The image is wide and holds its own coordinates: the drawn height of most crops
    is too large, and is cut to that of the image."""
    image = np.zeros((64, 256, 3), np.uint8)
    image[..., 0], image[..., 1] = 3 * np.arange(64)[:, None], np.arange(256)
    crops = [context._crop(image, rng(0, 0, i), (32, 32), augment=True)["image"] for i in range(400)]
    rows, columns = (
        np.array([32 / 31 * float(crop[k].max() - crop[k].min()) / step for crop in crops])
        for k, step in ((0, 3), (1, 1))
    )
    low, high = np.log(3 / 4), np.log(4 / 3)
    draws = np.random.default_rng(0)
    area, aspect = draws.uniform(0.08, 1, 4000) * 64 * 256, np.exp(draws.uniform(low, high, 4000))
    for sides, expected in (
        (rows, np.minimum(64, np.sqrt(area / aspect))),
        (columns, np.minimum(256, np.sqrt(area * aspect))),
    ):
        quantiles = [0.02, 0.1, 0.25, 0.5, 0.75, 0.9]
        assert np.quantile(sides, quantiles) == pytest.approx(np.quantile(expected, quantiles), rel=0.1)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (3, 3), (40, 30)])
@pytest.mark.parametrize("shape", [(16, 16), (8, 24)])
def test_images_of_any_size_give_views_of_the_requested_shape(size, shape):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert random_resized_crop(image, shape, (0.2, 1.0), rng=rng(0, 0, 0)).shape == (3, *shape)
    assert center(image, shape).shape == (3, *shape)


def test_an_image_of_the_requested_size_is_not_resampled():
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    whole = torch.from_numpy(image).permute(2, 0, 1)
    assert torch.equal(random_resized_crop(image, (16, 16), (1.0, 1.0), rng=rng(0, 0, 0)), whole)
    assert torch.equal(center(image, (16, 16)), whole)


def test_center_crops_the_middle_of_the_image():
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    image[8:56, 8:56] = 255
    # The middle 56 of 64 pixels, of which 48 are white, along both sides.
    assert center(image, (32, 32)).float().mean().item() == pytest.approx(255 * (48 / 56) ** 2, rel=0.01)


@catches("224/256 at every size", "rcmae.data.views:center_share", lambda old: lambda shape: 224 / 256)
@pytest.mark.parametrize(("side", "share"), [(64, 7 / 8), (224, 7 / 8), (225, 1), (384, 1)])
def test_above_224_px_the_evaluation_crop_has_the_whole_shorter_side(side, share):
    """As in MAE's transform of the validation images."""
    image = np.zeros((500, 700, 3), dtype=np.uint8)
    image[..., 0], image[..., 1] = np.arange(500)[:, None] / 2, np.arange(700) / 3
    crop = center(image, (side, side)).float()
    seen = [crop[k].mean(1 - k) * step for k, step in ((0, 2), (1, 3))]
    assert [float(x[-1] - x[0]) for x in seen] == pytest.approx([500 * share * (1 - 1 / side)] * 2, abs=8)
    assert [float(x.mean()) for x in seen] == pytest.approx([250, 350], abs=3), "the middle"


def test_flips_are_fair_and_exact():
    crop = torch.arange(12, dtype=torch.uint8).view(1, 3, 4)
    flipped = [torch.equal(flip(crop, rng(0, 0, i)), crop.flip(2)) for i in range(200)]
    assert 70 < sum(flipped) < 130


def test_every_sample_has_its_own_generator():
    draws = {rng(s, e, i).integers(2**62) for s in range(4) for e in range(4) for i in range(50)}
    assert len(draws) == 800
    assert rng(1, 2, 3).integers(2**62) == rng(1, 2, 3).integers(2**62)


# --- sampler ------------------------------------------------------------------------------------------------


def sampler_from_the_beginning(old):
    def iterate(self):
        self.start, self.stop = 0, self.stop - self.start
        return old(self)

    return iterate


@catches(
    "a resumed sampler starts from the beginning",
    "rcmae.data.sampler:BatchSampler.__iter__",
    sampler_from_the_beginning,
)
@settings(max_examples=60)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 20),
    st.integers(0, 10),
    st.integers(0, 9),
)
def test_ranks_and_micro_batches_partition_each_batch(world, micro, images_each, start, steps, extra):
    batch = world * micro * images_each
    n = 3 * batch + extra
    whole = list(BatchSampler(n, batch, start=start, stop=start + steps, seed=7))
    parts = [
        list(
            BatchSampler(n, batch, rank=r, world=world, micro=micro, start=start, stop=start + steps, seed=7)
        )
        for r in range(world)
    ]
    for k, expected in enumerate(whole):
        assert [key for p in parts for m in p[k * micro : (k + 1) * micro] for key in m] == expected
    tail = list(BatchSampler(n, batch, start=0, stop=start + steps, seed=7))[start:]
    assert tail == whole, "the position is one integer"


def test_an_epoch_shows_each_image_once():
    seen = [key for batch in BatchSampler(40, 8, start=5, stop=10, seed=3) for key in batch]
    assert sorted(seen) == [(1, i) for i in range(40)]
    assert not np.array_equal(order(40, 3, 0), order(40, 3, 1))
    assert not np.array_equal(order(40, 3, 0), order(40, 4, 0))


def test_an_indivisible_batch_size_is_reported_with_valid_values():
    with pytest.raises(
        ConfigError,
        match=r"a batch of 8 does not divide into 2 processes x accumulate 3; --accumulate may be 1, 2, 4$",
    ):
        BatchSampler(99, 8, world=2, micro=3)
    with pytest.raises(ConfigError, match="no --accumulate fits 3 processes"):
        BatchSampler(99, 8, world=3)
    with pytest.raises(DataError, match="no batch of 8 in 7 images"):
        BatchSampler(7, 8)


# --- samples ------------------------------------------------------------------------------------------------


def batches(source, workers: int) -> list[dict]:
    sampler = BatchSampler(len(source), 4, start=1, stop=7, seed=5)
    loader = DataLoader(
        Images(source, VIEW, 5),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=quiet_worker,
        multiprocessing_context="forkserver" if workers else None,
    )
    return list(loader)


def test_samples_do_not_depend_on_workers(tmp_path):
    source = open_source(str(fill(tmp_path, good())))
    for one, two in zip(batches(source, 0), batches(source, 2), strict=True):
        assert one.keys() == two.keys() == {"image", "order", "bad"}
        assert all(torch.equal(one[k], two[k]) for k in ("image", "order"))


@catches(
    "every epoch has the same crops",
    "rcmae.data.dataset:rng",
    lambda old: lambda seed, epoch, index: old(seed, 0, index),
)
def test_epochs_crop_and_mask_again(tmp_path):
    data = Images(open_source(str(fill(tmp_path, good()))), VIEW, 0)
    one, same, other = data[(0, 3)], data[(0, 3)], data[(1, 3)]
    assert torch.equal(one["image"], same["image"])
    assert not torch.equal(one["image"], other["image"])
    assert not torch.equal(one["order"], other["order"])
    assert torch.equal(one["order"].sort().values, torch.arange(16))


def test_each_bad_file_is_named_once_and_changes_no_other_sample(tmp_path):
    files = good() | {name: raw for name, (raw, _) in (ODD | BAD).items()}
    source = open_source(str(fill(tmp_path / "data", files)))
    assert len(source) == len(files)
    clean = {name: i for i in range(len(source)) if (name := Path(source.where(i)).name) not in BAD}
    data = Images(source, VIEW, 0)
    record = BadFiles(tmp_path, len(source), fraction=1.0)
    for epoch in (0, 1):
        samples = [data[(epoch, i)] for i in range(len(source))]
        again = data[(epoch, 0)]
        assert torch.equal(again["image"], samples[0]["image"]), "substitutes are deterministic"
        for name, i in clean.items():
            expected = VIEW(decode(files[name]), rng(0, epoch, i))
            assert torch.equal(samples[i]["image"], expected["image"]), name
        record.note(collate(samples)["bad"])
    record = BadFiles(tmp_path, len(source), fraction=1.0)  # as after resuming
    record.note(collate([data[(2, i)] for i in range(len(source))])["bad"])
    lines = [json.loads(line) for line in (tmp_path / "bad_files.jsonl").read_text().splitlines()]
    assert sorted(Path(line["where"]).name for line in lines) == sorted(BAD)
    for line in lines:
        assert line["reason"].startswith(tuple(BAD[Path(line["where"]).name][1].split("|")))


def test_too_many_bad_files_end_the_run(tmp_path):
    record = BadFiles(tmp_path, 10_000, fraction=0.001)
    record.note([(i, f"{i}.png", "truncated") for i in range(10)])
    with pytest.raises(
        DataError, match=r"11 of 10000 images cannot be read, for example 10.png \(truncated\)"
    ) as e:
        record.note([(10, "10.png", "truncated")])
    assert e.value.exit_code == 3
    with pytest.raises(DataError, match=r"a.png cannot be read \(empty file\)"):
        BadFiles(tmp_path / "..", 100, strict=True).note([(0, "a.png", "empty file")])
    (tmp_path.parent / "bad_files.jsonl").unlink()


def test_bad_files_of_previous_starts_count_towards_the_limit(tmp_path):
    """Recorded bad files still count: repeating the command does not get around the limit."""
    bad = [(i, f"{i}.png", "truncated") for i in range(11)]
    for _ in range(2):
        with pytest.raises(DataError, match="11 of 100 images cannot be read"):
            BadFiles(tmp_path, 100).note(bad)
        with pytest.raises(DataError, match=r"3.png cannot be read \(truncated\)"):
            BadFiles(tmp_path, 100, strict=True).note(bad[3:])
    assert len((tmp_path / "bad_files.jsonl").read_text().splitlines()) == 11


def test_a_bad_file_is_recorded_once_by_all_ranks(tmp_path):
    notes = [], []
    one, two = (BadFiles(tmp_path, 100, say=texts.append) for texts in notes)
    for record in (one, two):
        record.note([(1, "a.png", "truncated")])
        record.note([(2, "b.png", "truncated")])
    assert [json.loads(line)["index"] for line in one.path.read_text().splitlines()] == [1, 2]
    two.note([(3, "c.png", "truncated")])
    BadFiles(tmp_path, 100, say=notes[1].append).note([(4, "d.png", "truncated")])  # as after resuming
    assert notes == (["note: a.png cannot be read (truncated); bad_files.jsonl lists all such images"], [])


@catches(
    "every rank names an unreadable image",
    "rcmae.data.dataset:BadFiles._record",
    lambda old: lambda self, *bad: old(self, *bad) or True,
)
def test_the_first_unreadable_image_is_named_by_the_rank_that_meets_it(tmp_path):
    notes = [], []
    one, two = (BadFiles(tmp_path, 100, say=texts.append) for texts in notes)
    two.note([(1, "a.png", "truncated")])
    one.note([(2, "b.png", "truncated")])
    assert notes == ([], ["note: a.png cannot be read (truncated); bad_files.jsonl lists all such images"])


def forgets_the_limit(old):
    def init(self, *args):
        old(self, *args)
        self.pixel_limit = 10**8

    return init


@catches("parts of a set have another limit", "rcmae.data.base:Subset.__init__", forgets_the_limit)
def test_larger_images_than_the_limit_are_read_if_that_is_raised(tmp_path, capsys):
    """By pre-training, evaluation and check, whose reason names the option."""
    rows = np.zeros((40, 30, 3), np.uint8)
    for kind in "ab":
        fill(tmp_path / "data" / kind, {f"{kind}{i}.png": images.encode(rows + i) for i in range(5)})
    with pytest.raises(BadImage, match="30 x 40 is above the limit of 1,000 pixels, see --max-pixels"):
        open_image(open_source(str(tmp_path / "data"), max_pixels=1000), 0, 3)
    assert open_image(open_source(str(tmp_path / "data"), max_pixels=1200), 0, 3).shape == (40, 30, 3)
    parts = open_labeled(str(tmp_path / "data"), max_pixels=1000)
    for part in (parts.train, parts.test):
        with pytest.raises(BadImage, match="see --max-pixels"):
            open_image(part, 0, 3)
    argv = ["check", str(tmp_path / "data"), "--batch-size", "2", "--max-pixels"]
    assert main([*argv, "1e3"]) == 3
    assert "above the limit of 1,000 pixels, see --max-pixels" in capsys.readouterr().out
    assert main([*argv, "1.2e3"]) == 0


def test_a_failed_write_of_the_bad_files_is_reported_in_one_line(tmp_path):
    (tmp_path / "bad_files.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*bad_files.jsonl: Is a directory"):
        BadFiles(tmp_path, 100).note([(1, "a.png", "truncated")])


def test_a_partially_written_line_is_dropped(tmp_path):
    record = BadFiles(tmp_path, 100)
    record.note([(1, "a.png", "truncated")])
    with record.path.open("a") as f:
        f.write('{"index": 2, "wh')
    record = BadFiles(tmp_path, 100)
    record.note([(1, "a.png", "truncated"), (2, "b.png", "truncated")])
    assert [json.loads(line)["index"] for line in record.path.read_text().splitlines()] == [1, 2]


def test_no_readable_image_is_left(tmp_path):
    source = open_source(str(fill(tmp_path, {f"{i}.png": b"x" for i in range(5)})))
    with pytest.raises(
        DataError, match=r"0.png cannot be read \(not an image\), nor can 20 others; run `rcmae check`"
    ):
        Images(source, VIEW, 0)[(0, 0)]
    with pytest.raises(DataError, match="none of 5 sampled images"):
        measure_statistics(source, 3)


def test_a_missing_file_is_replaced_by_another_image(tmp_path):
    source = open_source(str(fill(tmp_path, good())))
    (tmp_path / "00.png").unlink()
    _, used, bad = Images(source, VIEW, 0).readable(0, lambda i: read_image(source, i, 3))
    assert bad[0][2] == "No such file or directory"
    assert used != 0


def test_statistics_are_those_of_the_data(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (8, 30, 30, 3), dtype=np.uint8)
    source = open_source(str(fill(tmp_path, {f"{i}.png": images.encode(v) for i, v in enumerate(values)})))
    mean, std = measure_statistics(source, 3)
    assert mean == pytest.approx((values / 255).mean((0, 1, 2)).tolist(), rel=1e-9)
    assert std == pytest.approx((values / 255).std((0, 1, 2)).tolist(), rel=1e-9)


# --- sources ------------------------------------------------------------------------------------------------


def test_folders_flat_and_nested_and_with_classes(tmp_path):
    flat = open_source(str(fill(tmp_path / "flat", good(3))))
    assert (len(flat), flat.labels, flat.classes) == (3, None, [])
    files = {f"cats/deep/{k}": v for k, v in good(2).items()} | {f"dogs/{k}": v for k, v in good(3).items()}
    files |= {".ipynb_checkpoints/x.png": b"x", "cats/.hidden.png": b"x", "cats/notes.txt": b"x"}
    classes = open_source(str(fill(tmp_path / "classes", files)))
    assert classes.classes == ["cats", "dogs"]
    assert classes.labels.tolist() == [0, 0, 1, 1, 1]
    assert (classes.left_out, flat.left_out) == ({".txt": 1, "hidden or system files": 2}, {})
    one = open_source(str(fill(tmp_path / "one", {f"a/{k}": v for k, v in good(2).items()})))
    assert one.labels is None, "a single class is not a label"
    mixed = open_source(str(fill(tmp_path / "mixed", files | good(1))))
    assert mixed.labels is None
    parts = open_source(
        str(
            fill(
                tmp_path / "parts", {f"{part}/{k}": v for part in ("train", "val") for k, v in files.items()}
            )
        )
    )
    assert (len(parts), parts.classes) == (5, ["cats", "dogs"]), "train and val are no classes"
    assert parts.left_out["images of the validation part"] == 5


def test_symbolic_links_do_not_duplicate_images(tmp_path):
    """Symbolic links that form loops or repeat do not add images."""
    root = fill(tmp_path / "data", good(10))
    (root / "loop").symlink_to(root)
    (root / "sub").mkdir()
    (root / "sub" / "up").symlink_to(root)
    (root / "again.png").symlink_to(root / "00.png")
    (root / "self.png").symlink_to(root / "self.png")
    (root / "nowhere.png").symlink_to(root / "gone.png")
    source = open_source(str(root))
    assert len(source) == 10
    assert source.left_out == {"duplicate links": 1, "loops of links": 2, "broken links": 2}
    outside = fill(tmp_path / "outside", good(4))
    (root / "more").symlink_to(outside)
    assert len(open_source(str(root))) == 14, "a linked folder is followed, once"


@catches(
    "file names reach the terminal unescaped",
    "rcmae.data.files:printable",
    lambda old: lambda name: name.decode("utf-8", "replace"),
)
def test_unusual_file_names_are_read_and_escaped(tmp_path):
    raw = good(1)["00.png"]
    names = [
        b"new\nline.png",
        b"\xff\xfe.png",
        b"a" * 251 + b".png",
        b"\x1b[31mred.png",
        "ünï.PNG".encode(),
        b"tab\t.png",
    ]
    for name in names:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))).write_bytes(raw)
    source = open_source(str(tmp_path))
    assert len(source) == len(names)
    for i in range(len(source)):
        assert decode(source.read(i)).shape == (20, 24, 3)
        assert source.where(i).isprintable()
    assert printable(b"\x1b[31m\xff\n") == "\\x1b[31m\\xff\\n"


def test_an_unreadable_folder_raises_an_error(tmp_path):
    fill(tmp_path / "data" / "closed", good(2))
    fill(tmp_path / "data", good(2))
    (tmp_path / "data" / "closed").chmod(0)
    code = (
        "import os, sys\nfrom rcmae.data.sources import open_source\nfrom rcmae.errors import DataError\n"
        "os.seteuid(65534) if os.geteuid() == 0 else None\n"
        "try:\n    open_source(sys.argv[1])\nexcept DataError as e:\n    print(e)\n"
    )
    for folder in (tmp_path / "data", tmp_path, *tmp_path.parents[:3]):
        if "pytest" in str(folder):
            folder.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "data")], capture_output=True, text=True, check=False
    )
    (tmp_path / "data" / "closed").chmod(0o755)
    assert done.stdout.startswith("no permission to read "), done.stdout + done.stderr
    assert done.stdout.count("\n") == 1
    assert "closed" in done.stdout


def test_lists(tmp_path):
    fill(tmp_path / "data", good(4))
    (tmp_path / "list.txt").write_text("data/02.png\tdog\n\ndata/00.png\tcat\ndata/01.png\n")
    source = open_source(str(tmp_path / "list.txt"))
    assert [Path(source.where(i)).name for i in range(3)] == ["02.png", "00.png", "01.png"]
    assert source.labels.tolist() == [1, 0, -1]
    assert decode(source.read(0)).shape == (20, 24, 3)
    (tmp_path / "list.txt").write_text("data/02.png\ndata/nope.png\n")
    with pytest.raises(DataError, match=r"list.txt line 2: data/nope.png does not exist"):
        open_source(str(tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_bytes(b"data/02.png\nda\0ta\n")
    with pytest.raises(DataError, match=r"list.txt line 2: da\\x00ta does not exist"):
        open_source(str(tmp_path / "list.txt"))
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfdata/02.png\r\n")  # as Windows writes it
    assert len(open_source(str(tmp_path / "list.txt"))) == 1
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(DataError, match="lists no images"):
        open_source(str(tmp_path / "list.txt"))


def write_shard(path: Path, files: dict[str, bytes], labels: dict[str, int]) -> None:
    fill(
        path.parent / (path.stem + "_files"), files | {f"{k}.cls": str(v).encode() for k, v in labels.items()}
    )
    with tarfile.open(path, "w") as tar:
        for file in sorted((path.parent / (path.stem + "_files")).iterdir()):
            tar.add(file, file.name)


@pytest.mark.parametrize("spec", ["shards", "shards/x-*.tar", "shards/x-{000..001}.tar"])
def test_tar_shards(tmp_path, spec):
    (tmp_path / "shards").mkdir()
    files = good(6)
    for k in (0, 1):
        part = {f"{k}_{n}": raw for n, raw in list(files.items())[3 * k : 3 * k + 3]}
        write_shard(tmp_path / f"x-00{k}.tar", part, {n.removesuffix(".png"): i for i, n in enumerate(part)})
        (tmp_path / f"x-00{k}.tar").rename(tmp_path / "shards" / f"x-00{k}.tar")
    source = open_source(str(tmp_path / spec))
    assert (source.kind, len(source), source.labels.tolist()) == ("tar", 6, [0, 1, 2, 0, 1, 2])
    assert [source.read(i) for i in range(6)] == list(files.values())
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(5) == source.read(5)
    assert source.where(4).endswith("x-001.tar!1_04.png")


@pytest.mark.parametrize("labels", [("cat", "dog"), ("7", "9" * 40), ("3", "20200131")])
def test_labels_of_shards_are_names(tmp_path, labels):
    """Text and numbers of any size; the class index is the position among them."""
    write_shard(tmp_path / "x.tar", good(4), {"00": labels[0], "01": labels[1], "03": labels[0]})
    source = open_source(str(tmp_path / "x.tar"))
    assert sorted(source.classes) == sorted(labels)
    assert [source.classes[i] if i >= 0 else None for i in source.labels] == [
        labels[0],
        labels[1],
        None,
        labels[0],
    ]


def test_a_hub_row_without_an_image_or_a_label(monkeypatch):
    class Table(list):
        """The part of a Hugging Face data set that a source uses."""

        features: ClassVar = {
            "image": type("Image", (), {})(),
            "label": type("ClassLabel", (), {"names": ["cat", "dog"]})(),
        }

        def __getitem__(self, key):
            return [row["label"] for row in self] if key == "label" else super().__getitem__(key)

        def cast_column(self, name, kind):
            return self

    rows = Table(
        [{"image": {"bytes": ODD["gray.png"][0], "path": None}, "label": 1}, {"image": None, "label": None}]
    )
    fake = SimpleNamespace(load_dataset=lambda path, split: rows, Image=lambda decode: None)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    source = open_source("hub:some/set")
    assert source.labels.tolist() == [1, -1]
    assert read_image(source, 0, 3).shape == (24, 32, 3)
    with pytest.raises(BadImage, match="no image in this row"):
        read_image(source, 1, 3)


def test_an_invalid_source_is_reported_in_one_line(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"not a tar at all" * 100)
    (tmp_path / "x.zip").write_text("a")
    fill(tmp_path / "empty" / "sub", {"notes.md": b"x"})
    for spec, message in (
        (tmp_path / "x.tar", "is not a complete tar file"),
        (tmp_path / "x.zip", "is none of these: folder, list"),
        (tmp_path / "empty", "holds no images: read 0 images; left out 1: 1 .md; looked for .jpg"),
        (tmp_path / "none", "does not exist"),
    ):
        with pytest.raises(DataError, match=message) as e:
            open_source(str(spec))
        assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="did you mean bundled:digits"):
        open_source("bundled:digit")
    with pytest.raises(ConfigError, match="--data is empty"):
        open_source("")


def test_without_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'rcmae\[hub\]'"):
        open_source("hub:some/set")


def test_the_fingerprint_depends_on_the_content_and_not_on_the_path(tmp_path):
    one, two = (open_source(str(fill(tmp_path / k, good()))) for k in "ab")
    assert one.fingerprint() == two.fingerprint()
    fill(tmp_path / "b", {"00.png": b"longer or shorter"})
    assert open_source(str(tmp_path / "b")).fingerprint() != one.fingerprint()


def pinned(root: Path) -> dict[str, str]:
    """A folder, a list, shards, and a folder of shards, with fixed bytes that do not depend on an image
    encoder."""
    files = {f"{c}/{i}.png": f"{c}{i}".encode() * (i + 1) for c in ("dog", "cat") for i in (10, 9, 2)}
    fill(root / "folder", files | {"notes.txt": b"x", ".hidden.png": b"x"})
    (root / "list.txt").write_text("".join(f"folder/{name}\t{name[:3]}\n" for name in files))
    (root / "shards").mkdir()
    for k in (1, 0):
        with tarfile.open(root / "shards" / f"x-{k}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, raw in [
                *list(files.items())[3 * k : 3 * k + 3],
                (("dog/10.cls", b"7"), ("cat/2.cls", b"9"))[k],
                ("readme.md", b"x"),
            ]:
                info = tarfile.TarInfo(name.replace("/", "_"))
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    return {name: str(root / name) for name in ("folder", "list.txt", "shards")}


PINNED = {
    "folder": (
        ["cat10", "cat2c", "cat9c", "dog10", "dog2d", "dog9d"],
        [0, 0, 0, 1, 1, 1],
        ["cat", "dog"],
        "3c73a3e39e8cabf7",
    ),
    "list.txt": (
        ["dog10", "dog9d", "dog2d", "cat10", "cat9c", "cat2c"],
        [1, 1, 1, 0, 0, 0],
        ["cat", "dog"],
        "5a3c9d071e4191d1",
    ),
    "shards": (
        ["dog10", "dog9d", "dog2d", "cat10", "cat9c", "cat2c"],
        [0, -1, -1, -1, -1, 1],
        ["7", "9"],
        "ce940e963cf69219",
    ),
}


def test_order_labels_and_fingerprints_never_change(tmp_path):
    """A run resumes only with data of the fingerprint in its checkpoint, so these must never change."""
    for name, spec in pinned(tmp_path).items():
        source = open_source(spec)
        content = (
            [source.read(i).decode()[:5] for i in range(len(source))],
            source.labels.tolist(),
            source.classes,
            source.fingerprint()[:16],
        )
        assert content == PINNED[name], name


def test_strings_are_stored_in_two_arrays():
    names = Strings([b"abc", b"", b"de"])
    assert [names[i] for i in range(len(names))] == [b"abc", b"", b"de"]
    assert len(pickle.dumps(Strings([b"x" * 10] * 1000))) < 30_000


# --- the audit ----------------------------------------------------------------------------------------------


def test_the_audit_finds_unreadable_duplicate_leaked_and_constant_images(tmp_path):
    files = good() | {name: raw for name, (raw, _) in BAD.items()}
    files |= {"copy.png": files["03.png"], "flat.png": images.encode(np.full((20, 24, 3), 77, np.uint8))}
    fill(tmp_path / "train", files)
    fill(
        tmp_path / "val",
        {"leak.png": files["05.png"], "own.png": images.encode(np.eye(20, dtype=np.uint8) * 255)},
    )
    report = audit(*(open_source(str(tmp_path / part)) for part in ("train", "val")), small(size=22))
    assert report.images == len(files)
    assert sorted(Path(w).name for w, _ in report.unreadable) == sorted(BAD)
    assert [sorted(Path(w).name for w in d) for d in report.duplicates] == [["03.png", "copy.png"]]
    assert [(Path(a).name, Path(b).name) for a, b in report.leaks] == [("05.png", "leak.png")]
    assert [Path(w).name for w in report.constant] == ["flat.png"]
    assert (report.widths, report.heights) == ((24, 24, 24), (20, 20, 20))
    assert report.fit
    assert report.shorter_side == 20
    assert report.smaller == 1 and replace(report, crop=(20, 24)).smaller == 0
    text = Console(file=io.StringIO(), width=200)
    text.print(render(report))
    assert "22 x 22 px; 100.0% of the images are smaller" in text.file.getvalue()
    written = json.loads(to_json(report))
    assert written["fit"] is True and written["smaller_than_crop"] == 1 and "sizes" not in written
    bad = open_source(str(fill(tmp_path / "bad", {f"{i}.png": b"x" for i in range(12)})))
    unfit = audit(bad, recipe=small())
    assert not unfit.fit and unfit.smaller == unfit.shorter_side == 0


def test_long_work_shows_its_progress(tmp_path, monkeypatch, capsys):
    for spec in pinned(tmp_path).values():
        fractions: list[float] = []
        count = len(open_source(spec, tick=fractions.append))
        assert (
            len(fractions) >= count
            and sorted(fractions) == fractions
            and 0 <= fractions[0] < fractions[-1] <= 1
        ), spec
    root = str(fill(tmp_path / "train", good(6)))
    ticks: list[int] = []
    measure_statistics(open_source(root), 3, samples=4, tick=ticks.append)
    assert ticks == [0, 1, 2, 3]
    ticks_by_task: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def progress(screen, what, total):
        ticks_by_task[what] = []
        yield ticks_by_task[what].append

    monkeypatch.setattr(Screen, "progress", progress)
    screen = Screen(True)
    audit(indexed(root, small(), screen), indexed(root, small(), screen), small(), screen=screen)
    assert capsys.readouterr().out == 2 * f"{root}: read 6 images\n"
    assert all(
        6 in ticks_by_task[f"{what} {root}"] or ticks_by_task[f"{what} {root}"] == list(range(6))
        for what in ("reading", "comparing")
    )
    assert 50 in ticks_by_task[f"indexing {root}, %"]


def test_moments_of_any_picture_are_those_of_its_pixels():
    for shape in ((1, 1, 1), (5, 7, 3), (3, 400_000, 3), (1100, 1000, 5)):
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        values = pixels.reshape(-1, shape[2]) / 255
        mean, square = moments(pixels)
        np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(square, (values**2).mean(0), rtol=1e-12)


def test_an_invalid_validation_set_is_reported_before_any_image_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(audit_module, "open_image", lambda *args: pytest.fail("read an image"))
    train = str(fill(tmp_path / "train", good(2)))
    assert main(["check", train, "--val", str(tmp_path / "nowhere")]) == 3
    assert "nowhere does not exist" in capsys.readouterr().err


def test_a_tiff_that_needs_a_missing_extra_is_an_unreadable_image(monkeypatch):
    """Without tifffile, one unusual file among many does not end a run."""
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(BadImage, match="tiff"):
        decode(ODD["float64.tif"][0])
    with pytest.raises(BadImage, match="tiff"):
        decode(b"II*\0\0\0\0\0")
    with pytest.raises(ConfigError, match="tifffile is not installed"):
        decode(ODD["16 bit rgb.tif"][0], channels=5)


def test_more_shards_than_open_files(tmp_path):
    """A process may open about 1,024 files; a set may have more shards."""
    (tmp_path / "d").mkdir()
    for i in range(100):
        with tarfile.open(tmp_path / "d" / f"x-{i:04d}.tar", "w") as tar:
            info = tarfile.TarInfo("a.png")
            info.size = len(ODD["gray.png"][0])
            tar.addfile(info, io.BytesIO(ODD["gray.png"][0]))
    code = (
        "import resource, sys\nfrom rcmae.data.sources import "
        "open_source\nresource.setrlimit(resource.RLIMIT_NOFILE, (90, 90))\n"
        "source = open_source(sys.argv[1])\nprint(len({source.read(i) for i in range(100)}), "
        "len(source.opened))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "d")], capture_output=True, text=True, check=False
    )
    assert done.stdout == "1 64\n", done.stderr
    (tmp_path / "d" / "x-0050.tar").unlink()
    with pytest.raises(DataError, match=r"x-0050.tar does not exist \(1 of 100 shards"):
        open_source(str(tmp_path / "d" / "x-{0000..0099}.tar"))


def test_too_few_images_are_unfit_for_training(tmp_path):
    fill(tmp_path, good(3))
    report = audit(open_source(str(tmp_path)))
    assert not report.fit
    assert "fewer than a batch of" in _unfit(report)


def test_probes_are_not_tested_on_images_they_were_fitted_on(tmp_path):
    """The same picture under many names and in two classes: only images that are not in the training set are
    scored."""
    for label in ("a", "b"):
        same = images.encode(images.ramp())
        fill(
            tmp_path / label, {f"{i}.png": same if i < 30 else list(good(40).values())[i] for i in range(40)}
        )
    recipe = small(probes=1, probe_train=40, probe_test=40)
    probes = probe_set(open_source(str(tmp_path)), recipe)
    fitted = {image.numpy().tobytes() for image in probes.train}
    assert len(probes.test) == len(probes.truth) > 0
    assert not fitted & {image.numpy().tobytes() for image in probes.test}
