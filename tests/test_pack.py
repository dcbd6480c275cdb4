"""Packing keeps labels, parts and pixels, continues after a kill, and counts what it leaves out."""

import io
import multiprocessing
import os
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcmae.cli import main
from rcmae.data import pack as packing
from rcmae.data.pack import pack
from rcmae.data.pixels import read_image
from rcmae.data.shards import MANIFEST, UNFINISHED
from rcmae.data.sources import open_source, parts_of
from rcmae.data.views import shrink
from rcmae.errors import ConfigError, DataError, StorageError
from tests.images import encode, photograph, tiff
from tests.mutations import catches

FIVE = tiff(np.zeros((8, 8, 5), np.uint8), photometric="minisblack", planarconfig="contig")


@pytest.fixture
def data(tmp_path):
    """Parts with class folders, an unlabeled folder, and images of several kinds."""
    large = photograph(150, 200)
    transparent = np.dstack([large, np.full(large.shape[:2], 128, np.uint8)])
    files = {
        "train/a cat/1.x.jpg": encode(large, "JPEG", quality=95),
        "train/a cat/1.y.jpg": encode(large[:, ::-1], "JPEG", quality=95),
        "train/a cat/gray.jpg": encode(large[..., 0], "JPEG", quality=95),
        "train/dog/alpha.png": encode(transparent),
        "train/dog/small.bmp": encode(large[:50, :50], "BMP"),
        "train/dog/cut.jpg": encode(large, "JPEG")[:2000],
        "train/dog/deep.tif": tiff(large.astype(np.uint16) * 16, photometric="rgb"),
        "val/dog/1.webp": encode(large, "WEBP"),
        "val/a cat/2.png": encode(large),
        "unlabeled/3.jpg": encode(large[::-1], "JPEG", quality=95),
    }
    for name, content in files.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(tmp_path / "data")


@catches("packed images lose their labels", "rcmae.data.pack:_label", lambda old: lambda source, index: b"")
@catches("packed images are nearly black", "rcmae.data.pack:shrink", lambda old: lambda *a: old(*a) // 8)
def test_labels_parts_and_pixels_are_kept(data, tmp_path):
    out = tmp_path / "out"
    result = pack(data, out, 64, workers=0)
    assert [bad["where"] for bad in result.unreadable] == [f"{data}/train/dog/cut.jpg"]
    assert result.images == 9
    assert parts_of(str(out)) == (f"{out}:train", f"{out}:val")
    for before, after in ((data, str(out)), (parts_of(data)[1], f"{out}:val")):
        before, after = open_source(before), open_source(after)
        kept = [i for i in range(len(before)) if "cut.jpg" not in before.where(i)]
        assert list(after.classes) == list(before.classes) == ["a cat", "dog"]
        assert after.labels.tolist() == before.labels[kept].tolist()
        for j, i in enumerate(kept):
            expected, actual = shrink(read_image(before, i, 3), 64), read_image(after, j, 3)
            if "deep" in before.where(i):
                actual = shrink(actual, 64)
            assert actual.shape == expected.shape
            lossy = after.where(j).endswith(".jpg")
            assert np.abs(actual.astype(int) - expected).mean() < (3 if lossy else 0.01), before.where(i)
    train = open_source(str(out))
    assert dict(train.left_out) == {"shards of the validation part": 1}
    with tarfile.open(out / "train-000000.tar") as tar:
        members = {m.name.split("-", 1)[1]: tar.extractfile(m).read() for m in tar}
    for name in ("dog_small.bmp", "dog_deep.tif"):  # not larger, and more than 8 bits: as they are
        assert members[f"train_{name}"] == (Path(data) / "train" / name.replace("_", "/")).read_bytes()
    assert Image.open(io.BytesIO(members["train_a_cat_gray.jpg"])).mode == "L"


def test_the_originals_are_kept_bit_for_bit(data, tmp_path):
    (Path(data) / "train/dog/bands.tif").write_bytes(FIVE)
    out = tmp_path / "out"
    result = pack(data, out, None, workers=0)
    before, after = open_source(data), open_source(str(out))
    bad = {entry["where"] for entry in result.unreadable}
    assert {Path(where).name for where in bad} == {"cut.jpg", "bands.tif"}
    kept = [i for i in range(len(before)) if before.where(i) not in bad]
    assert [after.read(j) for j in range(len(after))] == [before.read(i) for i in kept]


def killed_in(name: str, count: int, *arguments) -> None:
    """Call `pack` in a process that is killed in the given call of a function of its module."""
    calls, whole = [], getattr(packing, name)

    def deadly(*a):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*a)

    def run() -> None:
        setattr(packing, name, deadly)
        pack(*arguments, workers=0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@catches("finished shards are packed again", "rcmae.data.pack:_verified", lambda old: lambda *a: {})
@catches(
    "damaged shards are kept", "rcmae.data.pack:_verified", lambda old: lambda out, finished, screen: finished
)
def test_a_killed_pack_continues(data, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "SHARD_IMAGES", 2)
    whole, out = tmp_path / "whole", tmp_path / "out"
    pack(data, whole, 64, workers=2)
    killed_in("_add", 5, data, out, 64)
    times = {path: path.stat().st_mtime_ns for path in out.glob("[!.]*.tar")}
    assert len(times) == 2 and list(out.glob(".*.tar"))
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / packing.UNFINISHED).write_text("{}\n")  # stopped before its first shard
    with pytest.raises(DataError, match="begun is not completely packed"):
        open_source(str(begun))
    with pytest.raises(DataError, match="not completely packed; run the same `rcmae pack` again"):
        open_source(str(out))
    pack(data, out, 64, workers=0)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    damaged, kept = sorted(out.glob("*.tar"))[:2]
    content = bytearray(damaged.read_bytes())
    content[700] ^= 1
    damaged.write_bytes(content)
    pack(data, out, 64, workers=0)
    assert damaged.read_bytes() == (whole / damaged.name).read_bytes()
    assert kept.stat().st_mtime_ns == times[kept] and not (out / UNFINISHED).exists()
    killed_in("_sha256", 2, data, out, 64)  # which only verifies
    assert (out / UNFINISHED).exists() and len(open_source(str(out))) == len(open_source(str(whole)))


def test_a_pack_that_is_killed_twice_keeps_its_numbering(data, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "SHARD_IMAGES", 2)
    whole, out = tmp_path / "whole", tmp_path / "out"
    pack(data, whole, 64, workers=0)
    killed_in("_add", 5, data, out, 64)
    with (out / UNFINISHED).open("a") as journal:
        journal.write('{"name": "train-00')  # a line that the kill has cut
    monkeypatch.setattr(packing, "SHARD_IMAGES", 3)
    killed_in("_append", 1, data, out, 64)
    pack(data, out, 64, workers=0)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


def test_what_does_not_fit_is_refused_and_leaves_nothing(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    pack(data, out, 64, workers=0)
    manifest = (out / MANIFEST).read_bytes()
    for changes, message in (
        ({"size": 32}, r"holds a pack of other size \(64, now 32\)"),
        ({"out": tmp_path}, "not empty and holds no pack"),
        ({"out": Path(data) / "packed"}, "is within"),
        ({"channels": 5}, "give --original"),
        ({"size": 0}, "size must be 1 or more"),
        ({"workers": -1}, "workers must be 0 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            pack(**{"data": data, "out": out, "size": 64, "workers": 0} | changes)
    (Path(data) / "train/dog/more.png").write_bytes(encode(photograph(80, 80)))
    with pytest.raises(ConfigError, match="other images or labels"):
        pack(data, out, 64, workers=0)
    assert (out / MANIFEST).read_bytes() == manifest and not (out / UNFINISHED).exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(StorageError, match=r"needs about \d+ kB, and 0 kB are free"):
        pack(data, tmp_path / "full", 64, workers=0)
    assert not (tmp_path / "full").exists()


@pytest.mark.parametrize("name", ["dog;cat", " dog", "dog,cat", "cat,pets"])
def test_classes_that_shards_cannot_hold_are_refused(name, data, tmp_path):
    shutil.copytree(f"{data}/train/dog", f"{data}/train/pets,cat")  # one class, unless "pets" is another one
    pack(data, tmp_path / "out", 64, workers=0)
    assert "pets,cat" in open_source(str(tmp_path / "out")).classes
    part = "val" if name == "dog,cat" else "train"
    shutil.copytree(f"{data}/train/dog", f"{data}/{part}/{name}")
    with pytest.raises(DataError, match=f"'{name}' would be read as another one or as several labels"):
        pack(data, tmp_path / "full", 64, workers=0)
    assert not (tmp_path / "full").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [(MANIFEST, "{"), (MANIFEST, "[]"), (MANIFEST, '{"name": "app"}'), (UNFINISHED, "{\n")],
)
def test_a_manifest_that_is_not_that_of_a_pack_is_refused(file, content, data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_text(content)
    with pytest.raises(ConfigError, match=rf"{file} is damaged or not that of a pack; name a new folder"):
        pack(data, tmp_path / "out", 64, workers=0)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [file]
    assert (tmp_path / "out" / file).read_text() == content


def test_a_failure_is_shown_though_the_folder_cannot_be_removed(data, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    unlink = Path.unlink  # NFS keeps an open file that is removed, under another name
    monkeypatch.setattr(Path, "unlink", lambda path: (path.with_name(".nfs01").touch(), unlink(path)))
    with pytest.raises(StorageError, match="are free"):
        pack(data, tmp_path / "out", 64, workers=0)


def test_the_command_counts_what_is_unreadable(data, tmp_path, capsys):
    assert main(["pack", data, str(tmp_path / "out"), "--size", "64", "--workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "packing 10 images into" in printed and "packed 9 images into 2 shards of" in printed
    assert "left out 1 unreadable image, such as" in printed
    assert "cut.jpg (truncated)" in printed, printed
    limited = ["pack", data, str(tmp_path / "limited"), "--workers", "0", "--max-pixels", "29e3"]
    assert main(limited) == 0 and "left out 9 unreadable images" in capsys.readouterr().out
    assert main(["pack", data, str(tmp_path / "other"), "--original", "--size", "64"]) == 2
    assert "leave --size out" in capsys.readouterr().err and not (tmp_path / "other").exists()
