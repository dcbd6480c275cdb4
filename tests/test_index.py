"""The kept index of a large set gives the same source, and is not used once the set has changed."""

import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from rcmae.data import files, index, shards
from rcmae.data.sources import open_source
from tests.images import encode, ramp
from tests.mutations import catches


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where indices are kept, of sets of 3 images or more."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "SMALLEST", 3)
    return tmp_path / "cache" / "rcmae" / "index"


def folder(path):
    for name in ("cat/ü.png", "cat/2.png", "dog/3.png", "dog/notes.pdf", "dog/.hidden"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(encode(ramp()))
    (path / "dog" / os.fsdecode(b"\xff.png")).write_bytes(encode(ramp()))
    age(path)
    return str(path)


def tar_file(path):
    folder(path / "images")
    with tarfile.open(path / "images.tar", "w") as tar:
        for name in sorted((path / "images").rglob("*.png")):
            tar.add(name, name.relative_to(path / "images"))
    age(path)
    return str(path / "images.tar")


def age(path) -> None:
    """Make everything look an hour old."""
    for each in (path, *path.rglob("*")):
        os.utime(each, (time.time() - 3600,) * 2)


def change(spec: str) -> None:
    if spec.endswith(".tar"):
        with tarfile.open(spec, "a") as tar:
            tar.add(__file__, "dog/5.png")
    else:
        (Path(spec) / "dog" / "5.png").write_bytes(encode(ramp()))


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@catches(
    "an index is used though the set has changed",
    "rcmae.data.index:_unchanged",
    lambda old: lambda *a: True,
    case="folder",
)
@catches(
    "the cached index has other labels",
    "rcmae.data.index:_strings",
    lambda old: lambda arrays, name: (arrays.update(labels=0 * arrays["labels"]), old(arrays, name))[1],
    case="folder",
)
@pytest.mark.parametrize("make", [folder, tar_file], ids=["folder", "tar"])
def test_the_kept_index_is_the_same_source(make, tmp_path, place, monkeypatch):
    spec = make(tmp_path / "data")
    first = open_source(spec)
    assert len(first) == 4 and len(list(place.iterdir())) == 1

    def listing(*_):
        raise AssertionError("listed again")

    with monkeypatch.context() as patch:
        patch.setattr(files, "_walk", listing)
        patch.setattr(shards, "_samples", listing)
        again = open_source(spec)
    assert type(again) is type(first) and again.fingerprint() == first.fingerprint()
    assert again.summary() == first.summary() and list(again.notes) == list(first.notes)
    assert np.array_equal(again.labels, first.labels) and list(again.classes) == list(first.classes)
    for i in range(4):
        assert again.where(i) == first.where(i) and again.read(i) == first.read(i)
    change(spec)
    assert len(open_source(spec)) == 5
    assert (
        len(open_source(spec)) == 5
    )  # which was changed too recently to be kept, and the old one is not used


def test_without_a_usable_index_the_set_is_listed(tmp_path, place, monkeypatch):
    spec = folder(tmp_path / "data")
    (tmp_path / "data" / "new").mkdir()  # too recent
    open_source(spec)
    assert not place.exists()
    age(tmp_path / "data")
    open_source(spec)
    (file,) = place.iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    assert len(open_source(spec)) == 4  # from a damaged index, which is replaced
    assert len(open_source(spec)) == 4
    file.unlink()
    link = tmp_path / "data" / "cat" / "link.png"
    link.symlink_to(tmp_path / "disk" / "5.png")  # of a disk that is not mounted yet
    os.utime(link.parent, (time.time() - 3600,) * 2)
    assert len(open_source(spec)) == 4 and not list(place.iterdir())
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "5.png").write_bytes(encode(ramp()))
    assert len(open_source(spec)) == 5
    monkeypatch.setenv("XDG_CACHE_HOME", f"{spec}/dog/3.png")  # cannot be written
    assert len(open_source(spec)) == 5
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert len(open_source(spec)) == 5


def test_an_index_is_that_of_one_version_place_and_settings(tmp_path, place, monkeypatch):
    paths = [
        index.Index(kind, spec, *about).path
        for kind, spec, *about in (
            (files.Files, "data"),
            (files.Files, "./data"),  # as which the images are named
            (files.Files, "data", 1),
            (shards.Shards, "data"),
        )
    ]
    changes = (
        lambda: monkeypatch.setattr(index, "__version__", "0"),
        lambda: monkeypatch.setattr(index, "missing_extra", lambda extension: "x" * (extension == ".jxl")),
        lambda: monkeypatch.chdir(tmp_path),
    )
    for change in changes:
        change()
        paths.append(index.Index(files.Files, "data").path)
    assert len(set(paths)) == 7
    assert paths[-1] == index.Index(files.Files, "data").path


def test_another_time_or_size_of_what_was_listed_is_a_change(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"1")
    age(tmp_path)
    stamps = [index.stamp(os.fsencode(tmp_path / name)) for name in ("a", "b")]
    listed, states = index.Strings([each.path for each in stamps]), np.array([each[1:] for each in stamps])
    assert index._unchanged(listed, states)
    for column in (0, 1):
        for row in (0, 1):
            other = states.copy()
            other[row, column] += 1
            assert not index._unchanged(listed, other)
    (tmp_path / "a").unlink()
    with pytest.raises(FileNotFoundError):
        index._unchanged(listed, states)
