"""What is read of people's files, as which classes and parts, and what is reported of the rest."""

import io
import json
import os
import sys
import tarfile
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rcmae.cli import main
from rcmae.config import RuntimeConfig
from rcmae.data.base import DECODERS, EXTENSIONS, OPTIONAL, reading
from rcmae.data.labeled import open_labeled
from rcmae.data.layout import _divided, divide, part_of
from rcmae.data.sources import open_source, parts_of
from rcmae.errors import DataError
from rcmae.pretraining import pretrain
from tests import images
from tests.conftest import small
from tests.mutations import catches


def picture(seed: int) -> bytes:
    return images.encode(np.random.default_rng(seed).integers(0, 256, (18, 20, 3), dtype=np.uint8))


def fill(root: Path, *names: str, content: bytes = b"") -> Path:
    """Files below a root; images, unless they have content. Each is another one."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content or picture(seed))
    return root


def numbered(folder: str, count: int, extension: str = "png") -> list[str]:
    return [f"{folder}/{i}.{extension}" for i in range(count)]


def classes(root: Path, names: str = "ab", count: int = 5) -> Path:
    return fill(root, *(file for name in names for file in numbered(name, count)))


def shard(path: Path, *members: tuple[str, bytes | str]) -> Path:
    """A tar file of members; a text content is that of a label, "-> NAME" a symbolic link, "= NAME" a hard
    link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str) and content.startswith(("-> ", "= ")):
                arrow, info.linkname = content.split(" ", 1)
                info.type = tarfile.SYMTYPE if arrow == "->" else tarfile.LNKTYPE
                content = b""
            raw = content.encode() if isinstance(content, str) else content
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


def samples(count: int = 4, names: str = "xy") -> list[tuple[str, bytes | str]]:
    return [
        each for i in range(count) for each in ((f"{i}.png", picture(i)), (f"{i}.cls", names[i % len(names)]))
    ]


def read_images(spec: Path | str) -> dict[str, list[str]]:
    """The names of the images that are read, without their folders, by class ("" without a label)."""
    source = open_source(str(spec))
    labels = [-1] * len(source) if source.labels is None else source.labels
    result: dict[str, list[str]] = {}
    for i, label in enumerate(labels):
        name = source.where(i).replace("!", "/").rsplit("/", 1)[-1]
        result.setdefault(source.classes[label] if label >= 0 else "", []).append(name)
    return result


# --- parts of a set -----------------------------------------------------------------------------------------

PARTS = [
    ("train", "val"),
    ("Training", "Testing"),
    ("TRAIN", "Test"),
    ("train2017", "val2017"),
    ("train_images", "validation-images"),
    ("Train Set", "valid"),
    ("seg_train", "seg_test"),
    ("TrainData", "DevData"),
    ("trainval", "testset"),
    ("imagenet1k-train", "imagenet1k-validation"),
]


@pytest.mark.parametrize(
    "layout", ["folders", "folders in a folder", "shards", "folders of shards", "pattern"]
)
@pytest.mark.parametrize("pair", PARTS, ids="-".join)
def test_parts_are_recognized_by_their_names(tmp_path, pair, layout):
    train, test = pair
    spec = tmp_path / "set"
    inside = spec / "data" if layout == "folders in a folder" else spec
    for name, count in ((train, 8), (test, 6)):
        if "shards" in layout or layout == "pattern":
            file = f"{name}/00000.tar" if layout == "folders of shards" else f"{name}-00000.tar"
            shard(spec / file, *samples(count))
        else:
            classes(inside / name, "xy", count // 2)
    if layout == "pattern":
        spec = spec / "*.tar"
    labeled = open_labeled(str(spec))
    assert (len(labeled.train), len(labeled.test), labeled.classes) == (8, 6, ["x", "y"])
    source = open_source(str(spec))
    assert (len(source), source.classes) == (8, ["x", "y"]), "pre-training does not see images for testing"
    assert len(source.left_out) == 1 and " part" in source.summary()


@pytest.mark.parametrize(
    "name", ["latest", "contest", "device", "valley", "trained", "retrain", "invalid", "testament", "t-rain"]
)
def test_other_words_denote_no_part(name):
    assert part_of(name) == ""


@catches("validation images are trained on", "rcmae.data.layout:TESTING", lambda old: {})
def test_the_other_folders_of_a_divided_set_are_read_without_labels(tmp_path):
    """STL-10's unlabeled/ changes nothing for evaluation, and is what pre-training is for."""
    classes(tmp_path / "train"), classes(tmp_path / "test", count=3)
    before = open_labeled(str(tmp_path))
    fill(tmp_path, *numbered("unlabeled", 4), *numbered("extra/a", 3))
    after = open_labeled(str(tmp_path))
    assert before.train.fingerprint() == after.train.fingerprint() and before.classes == after.classes
    assert before.test.fingerprint() == after.test.fingerprint()
    source = open_source(str(tmp_path))
    assert source.labels.tolist().count(-1) == 7 and len(source) == 17
    assert source.summary() == (
        f"{tmp_path}: read 17 images, 10 of them of 2 classes (a, b); left out 6: 6 images of the test part"
    )


def test_a_class_may_be_called_like_a_part(tmp_path):
    names = ["bus", "cup", "pan", "test tube", "train"]
    source = open_source(str(fill(tmp_path, *(file for name in names for file in numbered(name, 5)))))
    assert source.classes == names
    assert source.notes == ("taken for classes, not for parts of a set: test tube, train",)
    assert len(open_labeled(str(tmp_path)).train) == 20


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ([*numbered("val/a", 2), *numbered("test/a", 2)], "the folders test, val are called after parts"),
        (
            [*numbered("train_clean", 2), *numbered("test_noisy", 2), *numbered("new", 2)],
            "the folders new, test_noisy, train_clean are called after parts",
        ),
        (
            [f"{site}/{name}/0.png" for site in ("north", "south") for name in ("cat", "dog")],
            r"the folders north, south all have the same subfolders \(cat, dog\)",
        ),
        ([*numbered("cat", 2), *numbered("dog", 2), "cover.png"], "1 image beside the folders cat, dog"),
    ],
)
def test_folders_that_are_no_classes_are_refused_for_a_reason(tmp_path, files, why):
    source = open_source(str(fill(tmp_path, *files)))
    assert len(source) == len(files) and source.labels is None
    with pytest.raises(DataError, match=f"has no labels: {why}"):
        open_labeled(str(tmp_path))
    assert source.notes[0].startswith("no labels are used: ")


def test_a_class_may_have_one_subfolder_of_a_common_name(tmp_path):
    """As in Tiny ImageNet, with images/ in each class."""
    fill(tmp_path, *numbered("n01/images", 3), *numbered("n02/images", 3))
    assert list(read_images(tmp_path)) == ["n01", "n02"]


def test_folders_without_images_are_no_parts_and_no_classes(tmp_path):
    """As in sets for detection, with images/train and labels/train."""
    classes(tmp_path / "images" / "train"), classes(tmp_path / "images" / "val", count=2)
    fill(tmp_path, "labels/train/a/0.txt", "labels/val/a/0.txt", "train/readme.txt", content=b"x")
    labeled = open_labeled(str(tmp_path))
    assert (len(labeled.train), len(labeled.test), labeled.classes) == (10, 4, ["a", "b"])
    assert open_source(str(tmp_path)).left_out == {".txt": 3, "images of the validation part": 4}


class Table:
    """A Hugging Face data set, as far as a source uses it before it reads images."""

    def __init__(self, **features):
        self.features = features

    def __getitem__(self, column):
        return [0, 1]

    def cast_column(self, name, kind):
        return self

    def __len__(self):
        return 0


def column(kind: str, **attributes) -> object:
    return type(kind, (), attributes)()


def test_splits_and_labels_of_the_hub(monkeypatch):
    """The same names of parts; of several label columns the first is used, and that is reported."""
    label = column("ClassLabel", names=["x", "y"])
    tables = {
        "two": Table(img=column("Image"), fine=label, coarse=label),
        "multi": Table(img=column("Image"), tags=column("List", feature=label)),
    }
    fake = SimpleNamespace(
        load_dataset=lambda path, split: tables[path],
        get_dataset_split_names=lambda path: ["Test", "dev", "training"],
        Image=lambda decode: None,
    )
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert parts_of("hub:two") == ("hub:two:training", "hub:two:dev")
    assert open_source("hub:two").notes == ("labels are the column fine of hub:two, not coarse",)
    assert open_source("hub:multi").why_unlabeled.startswith("an image has several labels (column tags")


def test_what_cannot_be_evaluated_says_what_to_do(tmp_path):
    several = fill(
        tmp_path / "several", *numbered("train2014/a", 1), *numbered("train2017/a", 1), "val/a/0.png"
    )
    with pytest.raises(DataError, match=r"several folders for a part \(train2014, train2017, val\); choose"):
        open_labeled(str(several))
    classes(tmp_path / "kaggle" / "train"), fill(tmp_path / "kaggle", *numbered("test", 3))
    with pytest.raises(DataError, match=r"test has no labels.*split those of --data .*kaggle/train"):
        open_labeled(str(tmp_path / "kaggle"))


def test_a_divided_set_given_as_val_is_tested_on_its_test_part(tmp_path):
    classes(tmp_path / "a"), classes(tmp_path / "b" / "train"), classes(tmp_path / "b" / "val", count=2)
    assert len(open_labeled(str(tmp_path / "a"), str(tmp_path / "b")).test) == 4


def test_a_tar_file_with_folders_is_like_a_folder(tmp_path):
    names = [f"./set/{part}/{c}/{i}.png" for part in ("train", "val") for c in "ab" for i in range(5)]
    spec = str(shard(tmp_path / "set.tar", *((name, picture(i)) for i, name in enumerate(names))))
    source = open_source(spec)
    assert (len(source), source.classes) == (10, ["a", "b"])
    assert "left out 10: 10 images of the validation part" in source.summary()
    both = open_labeled(spec, f"{spec}:val")
    assert (len(both.train), len(both.test)) == (10, 10)
    with pytest.raises(DataError, match="holds no images in 1 tar file"):
        open_source(f"{spec}:test")


# --- files that are no images -------------------------------------------------------------------------------


def test_every_file_is_read_or_counted(tmp_path):
    fill(tmp_path, "a.png", "b.JPG", "c.jfif", "d.jpe", "deep/e.tiff")
    fill(tmp_path, "notes.txt", "deep/x.json", "deep/y.json", "README", "weights.2023-01", content=b"x")
    fill(
        tmp_path, "._a.png", ".DS_Store", "Thumbs.db", "@eaDir/a.png", "__MACOSX/deep/._e.tiff", content=b"x"
    )
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    source = open_source(str(tmp_path))
    assert len(source) == 5
    assert source.left_out == {
        "hidden or system files": 5,  # a folder counts as one
        ".json": 2,
        ".txt": 1,
        "files without an extension": 1,
        "files of other kinds": 1,
        "broken links": 1,
    }


def test_companions_in_tar_files_are_no_images(tmp_path):
    companions = [(f"{folder}._{i}.{kind}", b"\0\5\x16\7") for i in range(4) for kind in ("png", "cls")
                  for folder in ("", "__MACOSX/")]  # fmt: skip
    spec = shard(tmp_path / "x.tar", *companions, *samples(), ("notes.md", "x"), (".DS_Store", "x"))
    fill(tmp_path, "._x.tar", "x.parquet", content=b"x")
    assert read_images(tmp_path) == {"x": ["0.png", "2.png"], "y": ["1.png", "3.png"]}
    assert open_source(str(tmp_path)).left_out == {"hidden or system files": 18, ".md": 1, ".parquet": 1}
    assert open_source(str(spec)).left_out == {"hidden or system files": 17, ".md": 1}


@pytest.mark.parametrize("extension", OPTIONAL)
def test_images_that_need_an_extra(tmp_path, monkeypatch, extension):
    """They are left out with the advice, or read once the extra is there."""
    extra, module = OPTIONAL[extension], DECODERS[OPTIONAL[extension]]
    fill(tmp_path, *numbered("cat", 2), *numbered("dog", 1), *numbered("owl", 2, extension[1:].upper()))
    monkeypatch.setitem(sys.modules, module, None)
    source = open_source(str(tmp_path))
    assert source.left_out == {f"{extension} (install the [{extra}] extra)": 2}
    assert source.classes == ["cat", "dog"]
    assert source.notes == ("no image of owl can be read without the extra",)
    (tmp_path / "list.txt").write_text(f"cat/0.png\nowl/0{extension.upper()}\n")
    assert open_source(str(tmp_path / "list.txt")).left_out == {
        f"{extension} (install the [{extra}] extra)": 1
    }
    fake = type(sys)(module)
    fake.__spec__ = __spec__
    monkeypatch.setitem(sys.modules, module, fake)
    assert open_source(str(tmp_path)).classes == ["cat", "dog", "owl"]


def test_a_folder_of_nothing_but_images_without_their_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, DECODERS["heif"], None)
    with pytest.raises(
        DataError, match=r"holds no images: .* left out 3: 3 .heic \(install the \[heif\] extra\)"
    ):
        open_source(str(fill(tmp_path, *numbered("phone", 3, "heic"))))


def test_the_line_of_what_was_read():
    left_out = {"duplicate links": 30, ".heic (install the [heif] extra)": 152, "broken links": 1}
    assert reading(3820, left_out, 8) == (
        "read 3,812 images; left out 191: 152 .heic (install the [heif] extra), 30 duplicate links, "
        "1 broken link, 8 unreadable"
    )
    assert reading(1, {}) == "read 1 image"
    many = reading(9, {f".x{i}": 20 - i for i in range(12)}, 1)
    assert many.endswith("14 .x6, 55 others, 1 unreadable") and "left out 175: " in many
    assert {".jfif", ".jpe", ".jp2", ".jpeg", ".tif", ".heic"} <= {*EXTENSIONS}


# --- links, brackets, Unicode -------------------------------------------------------------------------------


def test_links_balance_classes_but_add_nothing_without_labels(tmp_path):
    labeled = classes(tmp_path / "labeled", "ab", 2)
    for i in range(3):
        (labeled / "b" / f"again{i}.png").symlink_to("0.png")
    (labeled / "b" / "shared.png").hardlink_to(labeled / "a" / "0.png")
    (labeled / "c").symlink_to("a")
    source = open_source(str(labeled))
    assert {k: len(v) for k, v in read_images(labeled).items()} == {"a": 2, "b": 6, "c": 2}
    assert source.left_out == {} and source.notes[0].startswith("6 labeled images linked to other images")
    flat = fill(tmp_path / "flat", "0.png", "1.png")
    (flat / "again.png").symlink_to("0.png")
    (flat / "hard.png").hardlink_to(flat / "1.png")
    assert read_images(flat) == {"": ["0.png", "1.png"]}
    assert open_source(str(flat)).summary().endswith("read 2 images; left out 2: 2 duplicate links")


def test_files_without_numbers_of_the_file_system_are_no_links(tmp_path, monkeypatch):
    """Some network file systems give all files the same number."""
    names = [*numbered("deep/a", 2), *numbered("deep/b", 2), "0.png"]
    fill(tmp_path, *names)
    entries = os.scandir

    class Entry:
        def __init__(self, entry):
            self.entry, self.name, self.path = entry, entry.name, entry.path
            self.is_dir, self.is_file, self.is_symlink = entry.is_dir, entry.is_file, entry.is_symlink

        def stat(self):
            status = self.entry.stat()
            return os.stat_result([status.st_mode, 0, 0, 1, *status[4:]])

    class Listing(list):
        __enter__, __exit__ = (lambda self: self), (lambda self, *error: None)

    monkeypatch.setattr("os.scandir", lambda path: Listing(map(Entry, entries(path))))
    source = open_source(str(tmp_path))
    assert (len(source), source.left_out) == (5, {})
    shards = [shard(tmp_path / "tars" / f"{folder}/0.tar", *samples()) for folder in "ab"]
    assert len(open_source(str(tmp_path / "tars"))) == 4 * len(shards)


def test_a_link_that_comes_before_its_file(tmp_path):
    fill(tmp_path, "z.png", "deep/0.png")
    (tmp_path / "a.png").symlink_to("z.png")
    (tmp_path / "b").symlink_to("deep")
    assert open_source(str(tmp_path)).left_out == {"duplicate links": 2}


def test_a_set_of_many_parts_is_arranged_in_linear_time():
    """A thousand folders took a minute."""
    looked_through = 0

    class Tops(list):
        def __iter__(self):
            nonlocal looked_through
            looked_through += 1
            return super().__iter__()

    tops = [f"{part}_{k}" for k in range(50) for part in ("train", "val") for _ in range(4)]
    names = [f"{top}/{'ab'[i % 2]}/{i}.png".encode() for i, top in enumerate(tops)]
    layout = _divided(names, Tops(tops), divide({top: ["a", "b"] for top in tops}))
    assert layout.parts.count("train") == 200 and set(layout.labels) == {b"a", b"b"}
    assert looked_through < 5


def test_only_loops_of_folders_are_dropped(tmp_path):
    root, outside = classes(tmp_path / "root"), classes(tmp_path / "outside", "c")
    (root / "a" / "loop").symlink_to(root)
    (root / "c").symlink_to(outside / "c")
    (outside / "c" / "back").symlink_to(outside)
    assert {k: len(v) for k, v in read_images(root).items()} == {"a": 5, "b": 5, "c": 5}
    assert open_source(str(root)).left_out == {"loops of links": 2}


def test_a_link_to_itself_is_no_folder(tmp_path):
    for name in ("a.png", "train", "val"):
        (tmp_path / name).symlink_to(tmp_path / name)
    with pytest.raises(DataError, match="holds no images: read 0 images; left out 3: 3 broken links"):
        open_source(str(tmp_path))
    assert parts_of(str(tmp_path)) is None


def test_links_in_tar_files(tmp_path):
    spec = shard(
        tmp_path / "x.tar",
        ("first/later.png", "-> ../b/0.png"),
        ("a/0.png", picture(0)),
        ("b/0.png", picture(1)),
        ("b/hard.png", "= a/0.png"),
        ("b/chain.png", "-> hard.png"),
        ("b/gone.png", "-> nowhere.png"),
        ("b/self.png", "-> self.png"),
    )
    source = open_source(str(spec))
    content = {source.where(i).rsplit("!", 1)[1]: source.read(i) for i in range(len(source))}
    assert content == {
        "first/later.png": picture(1),
        "a/0.png": picture(0),
        "b/0.png": picture(1),
        "b/hard.png": picture(0),
        "b/chain.png": picture(0),
    }
    assert source.left_out == {"broken links": 2} and source.classes == ["a", "b", "first"]
    flat = shard(tmp_path / "flat.tar", ("0.png", picture(0)), ("1.png", "= 0.png"))
    assert open_source(str(flat)).left_out == {"duplicate links": 1}


@pytest.mark.parametrize("spec", ["", "/x-*.tar", "/x-{000..001}.tar", "/x-000.tar", "/x-00[01].tar"])
def test_brackets_in_the_name_of_a_folder(tmp_path, spec):
    folder = tmp_path / "set [v2] {a}"
    for i in range(2):
        shard(folder / f"x-00{i}.tar", *samples())
    assert len(open_source(f"{folder}{spec}")) == (4 if spec == "/x-000.tar" else 8)


def test_unicode_forms_of_a_class_are_joined(tmp_path):
    composed, split = (unicodedata.normalize(form, "pâté") for form in ("NFC", "NFD"))
    assert composed != split
    fill(tmp_path, *numbered(f"train/{composed}", 2), *numbered(f"train/{split}", 2), *numbered("train/b", 2))
    fill(tmp_path, *numbered(f"val/{split}", 2), *numbered("val/b", 2))
    labeled = open_labeled(str(tmp_path))
    assert labeled.classes == ["b", composed]
    assert (labeled.train.labels.tolist(), labeled.test.labels.tolist()) == ([0, 0, 1, 1, 1, 1], [0, 0, 1, 1])


# --- samples of shards --------------------------------------------------------------------------------------


@catches(
    "the alphabetically first image of a sample is read",
    "rcmae.data.shards:_rank",
    lambda old: lambda suffix: (suffix.count(b"."), 0, 0, suffix),
)
def test_a_sample_is_one_image_with_its_label(tmp_path):
    """Whatever stands beside it, and in any order."""
    for members in (
        ["0.cls", "0.depth.png", "0.png", "0.seg.png"],
        ["0.seg.png", "0.jpg", "0.png", "0.cls"],
        ["d.x/0.left.png", "d.x/0.json", "d.x/0.right.PNG", "d.x/0.txt"],
        ["0.depth.png", "0.cls", "0.rgb.jpg", "0.image.png"],
        ["0.cls", "0.mask.png", "0.img.png", "0.bmp", "0.jpg"],
        ["0.bmp", "0.cls", "0.gif", "0.png"],
    ):
        content = {"cls": "x", "json": '{"Label": "x", "caption": "y"}', "txt": "a text"}
        other = [("z/1.png", picture(9)), ("z/1.cls", "y")]
        sample = [(name, content.get(name.rsplit(".", 1)[1], picture(i))) for i, name in enumerate(members)]
        spec = shard(tmp_path / "x.tar", *sample, *other)
        names = {name.rsplit("/")[-1] for name in members}
        best = next(n for n in ("0.jpg", "0.png", "0.rgb.jpg", "0.left.png") if n in names)
        assert read_images(spec) == {"x": [best], "y": ["1.png"]}, members
        source, kinds = open_source(str(spec)), ("png", "jpg", "bmp", "gif")
        suffixes = sorted(n[2:].lower() for n in names if n.lower().endswith(kinds))
        suffixes.remove(best[2:])
        assert source.left_out["further images of a sample"] == len(suffixes)
        assert f"one is read: .{best[2:]}, not .{', .'.join(suffixes)}" in source.notes[0]


@pytest.mark.parametrize(
    ("names", "left_out"),
    [
        (["img.001.png", "img.002.png", "img.003.png"], 0),
        (["Mr.Smith.png", "Mr.Jones.png", "a/Mr.Jones.png", "x.png"], 0),
        (["0.png", "0.seg.png", "1.png", "1.seg.png"], 2),
        (["cam/0.left.png", "cam/0.right.png"], 0),
        (["0.depth.png", "0.rgb.png"], 1),
        (["img.1.png", "img.2.png", "img.txt"], 1),
        (["img.1.png", "img.2.png", "README.txt"], 0),
    ],
)
def test_names_with_dots_in_a_tar_file_of_nothing_but_images(tmp_path, names, left_out):
    """Without files of another kind beside the images, only those beside a usual name are left out."""
    source = open_source(
        str(shard(tmp_path / "x.tar", *((name, picture(i)) for i, name in enumerate(names))))
    )
    assert source.left_out.get("further images of a sample", 0) == left_out
    assert len(source) == sum(name.endswith("png") for name in names) - left_out


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ('{"label": 3}', "3"),
        ('{"cls": "cat", "label": 3}', "cat"),
        ('{"TARGET": "cat"}', "cat"),
        ('{"class": ["cat"]}', "cat"),
        ('{"category_id": 17, "bbox": [1, 2]}', "17"),
        ('{"caption": "a cat", "class_of_1998": 1}', ""),
        ('{"label": null}', ""),
        ('{"label": ', ""),
        ('["label"]', ""),
    ],
)
def test_labels_in_json(tmp_path, text, label):
    members = [
        ("0.png", picture(0)),
        ("0.json", text),
        *samples(2)[2:],
        ("2.png", picture(2)),
        ("2.cls", "z"),
    ]
    assert read_images(shard(tmp_path / "x.tar", *members))[label] == ["0.png"]


def test_labels_without_images_and_damaged_ones_are_counted(tmp_path):
    spec = shard(tmp_path / "x.tar", *samples(), ("9.cls", "x"), ("0.json", '{"label": '))
    assert open_source(str(spec)).left_out == {"labels without an image": 1, "damaged .json": 1}


# --- labels -------------------------------------------------------------------------------------------------


def test_too_few_images_for_a_split_are_named(tmp_path):
    classes(tmp_path / "all", "abc", 3)
    with pytest.raises(DataError, match=r"too few images of each class .*: a has 3, b has 3, c has 3; add"):
        open_labeled(str(tmp_path / "all"))
    classes(tmp_path / "some", "ab", 5), classes(tmp_path / "some", "c", 4)
    assert any("not tested: c has 4" in note for note in open_labeled(str(tmp_path / "some")).notes)


PLAIN = {"": ["b c/2.png"], "3": ["a/0.png"], "dog": ["a/1.png"]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "{0}\n{1}\n{2}"),
        ("list.txt", "{0}\tcat\r\n{1}\tdog\r\n{2}\tcat\r\n"),
        ("list.txt", "{0} cat\n{1}   dog\n{2} cat"),
        ("list.txt", "{0},cat\n{1},dog\n{2},cat"),
        ("list.txt", "image label\n{0} cat\n{1} dog\n"),
        ("list.csv", "image,label\n{0},cat\n{1},dog\n{2},cat\n"),
        ("list.csv", "Filename,Class\n{0},cat\n{1},dog\n{2},cat\n"),
        ("list.csv", "label;image\ncat;{0}\ndog;{1}\ncat;{2}\n"),
        ("list.csv", '{0},"cat"\n"{1}",dog\n{2},cat\n'),
        ("list.csv", ",image_path,width,label\n0,{0},3,cat\n1,{1},4,dog\n2,{2},5,cat\n"),
        ("list.csv", "id,species\n{0},cat\n{1},dog\n{2},cat\n"),
        ("list.csv", "image,class_id,class_name\n{0},0,cat\n{1},1,dog\n{2},0,cat\n"),
        ("list.csv", "filename,cat,dog\n{0},1,0\n{1},0,1\n{2},1,0\n"),
        ("list.tsv", "label\tpath\ncat\t{0}\ndog\t{1}\ncat\t{2}\n"),
        ("list.csv", "image\n{0}\n{1}\n{2}\n"),
    ],
)
def test_lists_as_tools_write_them(tmp_path, name, text):
    files = ["a/0.png", "b c/1.png", "b c/2.png"]
    fill(tmp_path, *files)
    if " label\n" in text:
        files[1] = "a/1.png"  # in a table with spaces, paths have none
        fill(tmp_path, files[1])
    (tmp_path / name).write_text(text.format(*files))
    result = read_images(tmp_path / name)
    count = text.count("{")
    labels = {"cat": ["0.png", "2.png"][: count - 1], "dog": ["1.png"]}
    if "cat" not in text:
        labels = {"": ["0.png", "1.png", "2.png"]}
    elif "species" in text or "class_id" in text:
        assert len(open_source(str(tmp_path / name)).classes) == 2
    if "class_id" in text:
        labels = {"0": labels["cat"], "1": labels["dog"]}
    assert result == labels


MULTI = [
    ("list.txt", "a/0.png cat\na/1.png dog\na/0.png dog\n", "a/0.png"),
    ("list.txt", "a/0.png 0 3\na/1.png 1\n", "a/0.png"),
    ("list.txt", "a/0.png\tcat\tdog\na/1.png\tcat\n", "a/0.png"),
    ("list.csv", "image,label\na/1.png,cat\na/0.png,cat|dog\n", "a/0.png"),
    ("list.csv", "image,label\na/1.png,cat\na/0.png,\"['cat', 'dog']\"\n", "a/0.png"),
    ("list.csv", "image,cat,dog,owl\na/1.png,1,0,0\na/0.png,1,0,1\n", "a/0.png"),
    ("list.csv", "image,label,Label\na/0.png,cat,tame\na/1.png,cat,wild\na/2.png,dog,tame\n", "a/0.png"),
    ("list.csv", 'image,label\na/1.png,cat\na/0.png,"cat,dog"\n', "a/0.png"),
    ("list.csv", 'image,label\na/0.png,"cat,dog"\na/1.png,"dog,owl"\n', "a/0.png"),
    ("x.tar", '{"label": "x\\ny"}', "0.png"),
    ("x.tar", '{"labels": [1, 2]}', "0.png"),
    ("x.tar", '{"label": ["cat", "dog"]}', "0.png"),
]


@catches("several labels are one class", "rcmae.data.lists:several_labels", lambda old: lambda *args: "", "1")
@pytest.mark.parametrize("number", range(len(MULTI)))
def test_several_labels_of_an_image_are_refused_by_name(tmp_path, number):
    """As labels: pre-training, which needs none, reads the images."""
    name, text, image = MULTI[number]
    fill(tmp_path, *numbered("a", 3))
    if name == "x.tar":
        shard(tmp_path / name, ("0.png", picture(0)), ("0.json", text), *samples(2)[2:])
    else:
        (tmp_path / name).write_text(text)
    source = open_source(str(tmp_path / name))
    assert len(source) >= 2 and source.labels is None
    assert f"{image} has several labels" in source.notes[-1]
    with pytest.raises(DataError, match=f"has no labels: {image} has several labels .*multi-label"):
        open_labeled(str(tmp_path / name))


@catches(
    "a name with a comma is several labels",
    "rcmae.data.layout:_joined",
    lambda old: lambda labels: {label for label in labels if b"," in label},
)
def test_names_of_classes_may_contain_commas(tmp_path):
    """Whether given in quotation marks or in the file of a sample."""
    names = ["Paris,France", "Lyon,France", "crane", "crane, whooping"]
    fill(tmp_path, *numbered("a", 4))
    lines = [f'a/{i}.png,"{name}"\n' for i, name in enumerate(names)]
    (tmp_path / "list.csv").write_text("image,label\n" + "".join(lines))
    members = [
        member for i, name in enumerate(names) for member in ((f"{i}.png", picture(i)), (f"{i}.cls", name))
    ]
    for spec in (tmp_path / "list.csv", shard(tmp_path / "x.tar", *members)):
        assert list(read_images(spec)) == names


def test_of_several_label_columns_one_is_used_and_named(tmp_path):
    fill(tmp_path, *numbered("a", 3))
    rows = "\na/0.png,tame,cat\na/1.png,wild,cat\na/2.png,tame,dog\n"
    for header, used, unused in (
        ("image,category,label", "label", "category"),
        ("image,Class,cls", "cls", "Class"),
        ("image,class,category", "class", "category"),
    ):
        (tmp_path / "list.csv").write_text(header + rows)
        source = open_source(str(tmp_path / "list.csv"))
        assert source.notes == (f"labels are the column {used}, not {unused}",)
        assert source.classes == (["tame", "wild"] if used == "class" else ["cat", "dog"])


def test_lists_that_cannot_be_read_say_why(tmp_path):
    fill(tmp_path, "a/0.png", "a/1.png")
    for name, text, message in (
        ("list.csv", "image,label\na/0.png,cat\na/9.png,dog\n", "list.csv line 3: a/9.png does not exist"),
        ("list.csv", "a/9.png,cat\na/0.png,dog\n", "list.csv line 1: a/9.png"),
        ("list.csv", "image,label\na/0.png,cat\na/1.png\n", "line 3 has fewer columns than the first line"),
        ("list.csv", 'image,label\na/0.png,"cat\na/1.png,dog\n', "quotation mark"),
        ("list.csv", "image,label\n", "lists no images"),
        ("list.txt", "a/0.png cat\na/9.png cat\n", "list.txt line 2: a/9.png cat does not exist"),
        ("list.txt", "a\n", "line 1: a does not exist"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=message):
            open_source(str(tmp_path / name))
    (tmp_path / "list.csv").write_text("image,width,height\na/0.png,3,4\na/1.png,3,4\n")
    with pytest.raises(DataError, match="no labels: no column of the table is called label or class"):
        open_labeled(str(tmp_path / "list.csv"))
    (tmp_path / "list.txt").write_text("a/0.png\na/1.png\na/0.png\n")
    assert open_source(str(tmp_path / "list.txt")).notes == ("repeated lines of images, all kept: 1",)


# --- what commands say --------------------------------------------------------------------------------------


def test_check_says_once_what_was_read(tmp_path, capsys):
    fill(tmp_path / "d", *numbered("a", 10), *numbered("b", 10), "notes.txt")
    fill(tmp_path / "d", "b/broken.png", content=b"x")
    assert (
        main(["check", str(tmp_path / "d"), "--batch-size", "8", "--json", str(tmp_path / "found.json")]) == 0
    )
    out = capsys.readouterr().out.replace("\n", "")
    assert out.count("read 21 images of 2 classes (a, b); left out 1: 1 .txt") == 1
    assert "read 20 images; left out 2: 1 .txt, 1 unreadable" in out
    assert json.loads((tmp_path / "found.json").read_text())["left_out"] == {".txt": 1}


def test_a_run_says_and_records_what_was_read(tmp_path, capsys):
    fill(tmp_path / "d", *numbered("a", 20), "x.json")
    fill(tmp_path / "d", "a/broken.png", "a/text.png", content=b"x")
    pretrain(small(data=str(tmp_path / "d")), RuntimeConfig(out=tmp_path / "run", device="cpu", workers=0))
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'd'}: read 22 images; left out 1: 1 .json\n")
    assert out.count("cannot be read (not an image); bad_files.jsonl lists all such images") == 1
    assert f"2 images could not be read: {tmp_path / 'run' / 'bad_files.jsonl'}\n" in out
    assert json.loads((tmp_path / "run" / "machine.json").read_text())["left_out"] == {".json": 1}
    assert (
        "Data: read 20 images; left out 3: 1 .json, 2 unreadable."
        in (tmp_path / "run" / "report.html").read_text()
    )


def test_an_evaluation_says_and_records_what_was_read(tmp_path, capsys):
    classes(tmp_path / "d" / "train", count=6), classes(tmp_path / "d" / "val", count=2)
    fill(tmp_path / "d" / "val", "a/notes.txt", content=b"x")
    out = tmp_path / "out"
    where = ["--device", "cpu", "--out", str(out), "--feature-cache", str(tmp_path / "cache")]
    assert main(["evaluate", "knn", "pixels", "--data", str(tmp_path / "d"), "--k", "2", *where]) == 0
    lines = [
        f"{tmp_path}/d/train: read 12 images of 2 classes (a, b)",
        f"{tmp_path}/d/val: read 4 images of 2 classes (a, b); left out 1: 1 .txt",
    ]
    assert "\n".join(lines) in capsys.readouterr().out
    assert json.loads(next(out.glob("*.json")).read_text())["read"] == lines
