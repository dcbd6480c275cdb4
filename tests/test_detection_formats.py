"""COCO sets as tools and sites write them: their folders, names, ids, categories, and EXIF orientations."""

import json
import re
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from rcmae.data import decode
from rcmae.engine.distributed import World
from rcmae.errors import DataError
from rcmae.tasks.detection.coco import CocoSet, open_coco, open_test
from rcmae.tasks.detection.layouts import part_of
from rcmae.tasks.detection.orientation import Fit, decide, read_headers
from tests.images import dicom, encode
from tests.mutations import catches

H, W, SIDE = 40, 56, 12
BACK = {  # how an upright image is turned or mirrored to be stored with an orientation
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def photo(
    path: Path, seed: int, orientation: int = 1, size: tuple[int, int] = (H, W)
) -> dict[str, np.ndarray]:
    """Write a gray image with a red square; returns its mask on the upright image and on the stored one."""
    draws = np.random.default_rng(seed)
    y, x = draws.integers(0, size[0] - SIDE - 4), draws.integers(0, size[1] - SIDE - 4)
    pixels = np.full((*size, 3), 60, np.uint8)
    pixels[y : y + SIDE, x : x + SIDE] = (230, 30, 30)
    upright = Image.fromarray(pixels)
    stored = upright.transpose(BACK[orientation]) if BACK[orientation] is not None else upright
    tags = Image.Exif()
    tags[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    stored.save(path, exif=tags, quality=95, subsampling=0)
    assert np.array_equal(ImageOps.exif_transpose(Image.open(path)), pixels) or path.suffix == ".jpg"
    return {"upright": np.asarray(upright)[..., 0] > 145, "stored": np.asarray(stored)[..., 0] > 145}


def entries(masks: list[np.ndarray], names: list[str]) -> dict:
    """A file of COCO's format with one object in each image."""
    images, annotations = [], []
    for k, (mask, name) in enumerate(zip(masks, names, strict=True), 1):
        images.append({"id": k, "file_name": name, "height": mask.shape[0], "width": mask.shape[1]})
        y, x = (int(np.flatnonzero(mask.any(axis))[0]) for axis in (1, 0))
        polygon = [x, y, x + SIDE, y, x + SIDE, y + SIDE, x, y + SIDE]
        box = {"bbox": [x, y, SIDE, SIDE], "segmentation": [polygon]}
        annotations.append({"id": k, "image_id": k, "category_id": 1 + k % 2, "iscrowd": 0, **box})
    categories = [{"id": 1, "name": "disc"}, {"id": 2, "name": "square"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def part(
    folder: Path, json_file: str, images: str, written: str = "{}", count: int = 3, seed: int = 0
) -> dict:
    """Write a part: images into a folder, and their names in the form `written` into a JSON file."""
    names = [f"{seed}{k}.png" for k in range(count)]
    masks = [photo(folder / images / name, seed + k)["upright"] for k, name in enumerate(names)]
    content = entries(masks, [written.format(name) for name in names])
    return save(folder / json_file, content)


def save(file: Path, content: dict) -> dict:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return content


def overlap(data: CocoSet) -> float:
    """The least intersection over union of the mask and the red pixels of an image."""
    overlaps = []
    for i in range(len(data)):
        pixels, [mask] = data.pixels(i).astype(int), data.objects(i).masks
        red = pixels[..., 0] - pixels[..., 1] > 80
        overlaps.append((red & mask).sum() / (red | mask).sum())
    return min(overlaps)


# --- layouts ------------------------------------------------------------------------------------------------

LAYOUTS = {
    "COCO": (
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_val2017.json", "val2017"),
    ),
    "Roboflow": (("train/_annotations.coco.json", "train"), ("valid/_annotations.coco.json", "valid")),
    "CVAT with subsets": (
        ("annotations/instances_Train.json", "images/Train"),
        ("annotations/instances_Validation.json", "images/Validation"),
    ),
    "CVAT": (
        ("train/annotations/instances_default.json", "train/images"),
        ("test/annotations/instances_default.json", "test/images"),
    ),
    "Label Studio": (("train/result.json", "train/images"), ("val/result.json", "val/images")),
    "FiftyOne": (("Training/labels.json", "Training/data"), ("dev/labels.json", "dev/data")),
    "files beside images": (("coco_train.json", "images"), ("coco_test-dev.JSON", "images")),
    "folders by the part": (
        ("annotations/train_coco.json", "train2014"),
        ("annotations/val_coco.json", "images/val"),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_of_tools_and_sites_are_opened_from_their_root(tmp_path, layout):
    for seed, (json_file, images) in zip((10, 20), LAYOUTS[layout], strict=True):
        part(tmp_path, json_file, images, seed=seed)
    train, test = open_coco(str(tmp_path))
    assert overlap(train) == overlap(test) == 1
    assert train.where(0).endswith("100.png") and test.where(0).endswith("200.png")
    assert open_test(str(tmp_path)).fingerprint() == test.fingerprint()


@pytest.mark.parametrize(
    "name", ["images\\{}", "../../data/upload/7/{}", "C:\\users\\me\\images\\{}", "/data/upload/{}"]
)
def test_names_of_image_files_lead_to_them_by_their_end(tmp_path, name):
    part(tmp_path / "a", "result.json", "images", name)
    part(tmp_path / "b", "result.json", "images", seed=20)
    train, _ = open_coco(str(tmp_path / "a"), str(tmp_path / "b"))
    assert overlap(train) == 1
    notes = [note for note in train.notes if "found by the end of their names: 3 (" in note]
    assert len(notes) == (not name.startswith("images")), "nothing is left out of images\\a.png"


def test_a_name_never_leads_out_of_the_folder_nor_two_names_to_one_file(tmp_path):
    content = part(tmp_path / "set", "result.json", "images")
    part(tmp_path / "val", "result.json", "images")
    photo(tmp_path / "secret.png", 0)
    content["images"][0]["file_name"] = "../secret.png"
    save(tmp_path / "set" / "result.json", content)
    with pytest.raises(
        DataError, match=r"image files that are not in .*set \(\., images\): 1 \(\.\./secret.png\)"
    ):
        open_coco(str(tmp_path / "set"), str(tmp_path / "val"))
    content["images"][0]["file_name"], content["images"][1]["file_name"] = "left/00.png", "right/00.png"
    save(tmp_path / "set" / "result.json", content)
    with pytest.raises(
        DataError, match=r"different names of one image file: 1 \(left/00.png = right/00.png\)"
    ):
        open_coco(str(tmp_path / "set"), str(tmp_path / "val"))


def test_a_part_that_is_not_used_is_named_and_can_be_scored(tmp_path):
    for name, seed in (("train", 10), ("valid", 20), ("test", 30)):
        part(tmp_path, f"{name}/_annotations.coco.json", name, seed=seed)
    test = open_coco(str(tmp_path))[1]
    [note] = test.notes
    assert note.startswith("parts that are not used (`rcmae detect eval RUN --data` scores them): 1 (")
    file = re.search(r": 1 \((.*)\)$", note)[1]
    assert open_test(file).where(0).endswith("300.png") and open_test(str(tmp_path / "test")).where(
        0
    ).endswith("300.png")


def test_advice_leads_to_a_set_that_opens(tmp_path):
    """Each message is followed as it stands."""
    one, other, mixed = (str(tmp_path / name) for name in ("one", "other", "mixed"))
    part(Path(one), "annotations/instances_default.json", "images")
    part(Path(other), "labels.json", "data", seed=20)
    both = "give the part to train on with --data and the other with --val, as folders or JSON files"
    with pytest.raises(
        DataError, match=re.escape("no JSON file named train (annotations/instances_default.json); " + both)
    ):
        open_coco(one)
    assert len(open_coco(one, other)) == 2
    with pytest.raises(
        DataError, match="instances_default.json is only one part; give the other .* with --val"
    ):
        open_coco(one + "/annotations/instances_default.json")
    assert len(open_coco(one + "/annotations/instances_default.json", other)) == 2

    for name, seed in (("a", 30), ("b", 40)):
        part(Path(mixed), f"annotations/{name}.json", "images", seed=seed)
    with pytest.raises(
        DataError,
        match=re.escape(f"no JSON file named train (annotations/a.json, annotations/b.json); {both}"),
    ):
        open_coco(mixed)
    assert len(open_coco(mixed + "/annotations/a.json", mixed + "/annotations/b.json")) == 2
    with pytest.raises(
        DataError, match=r"no JSON file named val or test .*; give --data a folder or JSON file of this part"
    ):
        open_test(mixed)
    assert len(open_test(mixed + "/annotations/a.json")) == 3
    part(Path(mixed), "annotations/train.json", "images", seed=50)
    with pytest.raises(
        DataError, match=r"no JSON file named val or test .*; give it with --val, a folder or JSON file"
    ):
        open_coco(mixed)
    assert len(open_coco(mixed, mixed + "/annotations/a.json")) == 2
    part(Path(mixed), "annotations/train2.json", "images", seed=60)
    with pytest.raises(
        DataError,
        match=re.escape(
            f"several JSON files named train (annotations/train.json, annotations/train2.json); {both}"
        ),
    ):
        open_coco(mixed, other)
    assert len(open_coco(mixed + "/annotations/train2.json", other)) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=re.escape(f"empty has no JSON file named train (none); {both}")):
        open_coco(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("instances_TRAIN2017", "train"),
        ("Training", "train"),
        ("trainset", "train"),
        ("train_val", "train"),
        ("valid", "val"),
        ("my-validation.v2", "val"),
        ("dev", "val"),
        ("test-dev2017", "test"),
        ("Testing", "test"),
        *((name, None) for name in ("latest", "interval", "terrain", "trainer", "default", "")),
    ],
)
def test_parts_are_words_of_a_name(name, expected):
    assert part_of(name) == expected


# --- EXIF orientation ---------------------------------------------------------------------------------------


def turned(root: Path, how: str, kinds: list[tuple[int, tuple[int, int]]], suffix: str = ".png") -> str:
    """A set of images with these orientations and upright sizes, annotated upright or as stored."""
    for part_name in ("train", "val"):
        names = [f"{part_name}{k}{suffix}" for k in range(len(kinds))]
        masks = [
            photo(root / "images" / n, k, *kind)[how]
            for k, (n, kind) in enumerate(zip(names, kinds, strict=True))
        ]
        save(root / "annotations" / f"instances_{part_name}.json", entries(masks, names))
    return str(root)


@catches(
    "images whose size does not tell are always read upright",
    "rcmae.tasks.detection.coco:decide",
    lambda old: lambda fits, default: (True, old(fits, default)[1]),
    "stored-.png",
)
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("how", ["upright", "stored"])
def test_masks_lie_on_their_objects_whatever_exif_says(tmp_path, how, suffix):
    """The orientation is the same for all images of a set; those that it makes higher than wide tell it."""
    square = [(orientation, (H, H)) for orientation in range(1, 9)]
    kinds = [(orientation, (H, W)) for orientation in range(1, 9)] + square
    for part_set in open_coco(turned(tmp_path, how, kinds, suffix)):
        assert overlap(part_set) > 0.9
    [note] = open_coco(str(tmp_path))[0].notes
    words = {"upright": "upright", "stored": "as stored"}[how]
    assert note == (
        f"EXIF turns or mirrors 28 images; they are read {words}, as the height and width of 8 of them are "
        "annotated"
    )


def test_without_a_size_that_tells_images_are_read_as_the_training_was_or_upright(tmp_path):
    upright = turned(tmp_path / "upright", "upright", [(3, (H, W)), (6, (H, H))])
    train, test = open_coco(upright)
    assert overlap(train) == overlap(test) == 1
    assert train.notes == [
        "EXIF turns or mirrors 4 images; no height and width tells how they are annotated, so they are read "
        "upright; if masks lie beside objects, remove the EXIF tag"
    ]
    stored = turned(tmp_path / "stored", "stored", [(3, (H, W)), (6, (H, H))])
    assert overlap(open_test(stored)) < 0.5, "it cannot be known"
    for file in (tmp_path / "stored" / "images").iterdir():  # the advice
        Image.fromarray(np.asarray(Image.open(file))).save(file)
    assert overlap(open_test(stored)) == 1
    again = open_test(turned(tmp_path / "again", "stored", [(3, (H, W)), (6, (H, H))]), upright=False)
    assert overlap(again) == 1 and again.upright is False
    assert again.notes[0].endswith("so they are read as stored, as in training")


def test_sizes_that_disagree_are_counted(tmp_path):
    assert decide(Counter[Fit](upright=3, stored=2, either=4, plain=9)) == (
        True,
        [
            "EXIF turns or mirrors 9 images; by height and width, 3 are annotated and read upright and 2 as "
            "stored; the 4 others are read upright"
        ],
    )
    assert decide(Counter[Fit](plain=9), default=False) == (None, [])
    one, two = (turned(tmp_path / how, how, [(6, (H, W)), (8, (H, W))]) for how in ("upright", "stored"))
    for data in open_coco(one + "/annotations/instances_train.json", two + "/annotations/instances_val.json"):
        assert overlap(data) == 1, "each is read as its size tells"


def test_what_turns_the_annotations_is_part_of_the_fingerprint(tmp_path):
    data = turned(tmp_path, "upright", [(3, (H, W))])
    assert open_test(data, upright=True).fingerprint() != open_test(data, upright=False).fingerprint()


@pytest.mark.parametrize("orientation", [1, 3])
def test_height_and_width_are_exchanged_only_where_exif_does_so(tmp_path, orientation):
    root = Path(turned(tmp_path, "upright", [(1, (H, W))] * 11 + [(orientation, (H, W))]))
    file = root / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["images"][11] |= {"height": W, "width": H}
    save(file, content)
    with pytest.raises(
        DataError,
        match=r"instances_val.json: images with height and width exchanged, though EXIF does not turn them: "
        r"1 \(val11.png\); fix this first$",
    ):
        open_coco(str(root))


@pytest.mark.parametrize("kind", [".heic", ".dcm"])
def test_the_sizes_of_images_that_need_an_extra_are_compared(tmp_path, kind):
    pixels = np.full((H, W, 3), 60, np.uint8)
    pixels[4 : 4 + SIDE, 9 : 9 + SIDE] = (230, 30, 30)
    if kind == ".heic":
        pytest.importorskip("pillow_heif").register_heif_opener()
        raw = encode(pixels, "HEIF", quality=100)
    else:
        pytest.importorskip("pydicom")
        raw = dicom(pixels, 8, "RGB")
    content = entries([pixels[..., 0] > 145], [f"0{kind}"])
    (tmp_path / f"0{kind}").write_bytes(raw)
    save(tmp_path / "a.json", content)
    data = open_test(str(tmp_path / "a.json"))
    assert overlap(data) > 0.8 and data.notes == []
    content["images"][0] |= {"height": W, "width": H}
    save(tmp_path / "a.json", content)
    with pytest.raises(DataError, match="height and width exchanged, though EXIF does not turn them: 1"):
        open_test(str(tmp_path / "a.json"))


def test_the_images_of_a_part_are_looked_up_in_its_folder_first(tmp_path):
    """Other images of the same names may be in the folder above, or in images/."""
    for folder, name in (("images", "train"), ("val2017", "val")):
        content = part(tmp_path, f"annotations/instances_{name}.json", folder, seed=20 + len(name))
        for k, image in enumerate(content["images"]):
            Path(tmp_path / folder / image["file_name"]).rename(tmp_path / folder / f"{k}.png")
            image["file_name"] = f"{k}.png"
        save(tmp_path / "annotations" / f"instances_{name}.json", content)
    for k in range(3):
        photo(tmp_path / f"{k}.png", 99)
    _, test = open_coco(str(tmp_path))
    assert [test.where(i) for i in range(3)] == [str(tmp_path / "val2017" / f"{k}.png") for k in range(3)]
    assert overlap(test) == 1


def test_reading_a_set_shows_progress_and_ranks_share_the_headers(tmp_path, monkeypatch):
    data = turned(tmp_path, "upright", [(6, (H, W))] * 5)
    shown: list[tuple[str, int, int]] = []

    @contextmanager
    def progress(what, total):
        yield lambda done: shown.append((what.split(str(tmp_path))[0].strip(), done, total))

    open_coco(data, progress=progress)
    headers = [(done, total) for what, done, total in shown if what == "reading the headers of the images of"]
    assert headers == [(done, 5) for done in range(1, 6)] * 2
    assert ("checking the objects of", 4, 5) in shown

    paths, opened = sorted((tmp_path / "images").iterdir()), []
    read = decode.read_header
    monkeypatch.setattr(decode, "read_header", lambda file: (opened.append(file.name), read(file))[1])
    whole = read_headers(paths, lambda done: None)
    assert len(opened) == 10 and None not in whole
    opened.clear()

    class Second(World):
        def gather(self, value):
            assert value == whole[1::2]
            return []

        def broadcast(self, value):
            return [whole[::2], whole[1::2]]

    assert read_headers(paths, lambda done: None, Second(1, 2)) == whole and len(opened) == 5


# --- ids and categories -------------------------------------------------------------------------------------


def changed(tmp_path: Path, change, val=lambda content: None) -> str:
    """A set whose parts are changed."""
    for name, edit, seed in (("train", change, 10), ("val", val, 20)):
        content = part(tmp_path, f"annotations/instances_{name}.json", "images", seed=seed)
        edit(content)
        save(tmp_path / "annotations" / f"instances_{name}.json", content)
    return str(tmp_path)


@pytest.mark.parametrize("form", [str, float, lambda k: f"{k}.0"])
def test_ids_may_be_text_or_floats_if_they_are_whole(tmp_path, form):
    def rewrite(content):
        for key, lists in (("id", content.values()), ("image_id", [content["annotations"]])):
            for entry in [e for each in lists for e in each]:
                entry[key] = form(entry[key])

    train, test = open_coco(changed(tmp_path, rewrite))
    assert (train.category_ids, train.image_id(0)) == (test.category_ids, 1) and overlap(train) == 1
    assert train.notes[0].startswith("ids given as text or float, read as integers: 11 (")
    assert test.notes == []


@pytest.mark.parametrize("value", ["u1", "1.5", 1.5, True, None, float("nan"), " 1", "１"])
def test_ids_that_are_not_whole_are_refused(tmp_path, value):
    with pytest.raises(DataError, match=r"ids of annotations that are not whole numbers: 1 \("):
        open_coco(changed(tmp_path, lambda content: content["annotations"][0].update(id=value)))


def with_root(name: str, used: bool = False):
    def edit(content):
        content["categories"] = [{"id": 0, "name": name, "supercategory": "none"}] + [
            c | {"supercategory": name} for c in content["categories"]
        ]
        if used:
            content["annotations"][0]["category_id"] = 0

    return edit


@pytest.mark.parametrize("name", ["things", "disc"])
def test_a_root_category_without_objects_is_no_class(tmp_path, name):
    data = changed(tmp_path, with_root(name), with_root(name))
    for part in open_coco(data):
        assert (part.category_ids, part.classes) == ([1, 2], ["disc", "square"])
        assert f"categories without objects that only group others, left out: 1 ({name})" in part.notes


def test_a_root_category_with_objects_in_either_part_is_a_class(tmp_path):
    data = changed(tmp_path, with_root("things", used=True), with_root("things"))
    train, test = open_coco(data)
    assert train.classes == test.classes == ["things", "disc", "square"]
    alone = open_test(data, categories=dict(zip(train.category_ids, train.classes, strict=True)))
    assert alone.category_ids == [0, 1, 2], "as the detector"


def test_categories_that_no_other_one_names_stay(tmp_path):
    def unused(content):
        content["categories"] += [
            {"id": 7, "name": "person", "supercategory": "person"},
            {"id": 8, "name": "x"},
        ]

    train, _ = open_coco(changed(tmp_path, unused, unused))
    assert train.classes == ["disc", "square", "person", "x"]


def test_a_test_part_may_list_fewer_categories_but_no_others(tmp_path):
    def fewer(content):
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 2]
        content["categories"] = content["categories"][1:]

    data = changed(tmp_path, lambda content: None, fewer)
    train, test = open_coco(data)
    assert train.classes == test.classes == ["disc", "square"] and test.object_labels.tolist() == [2, 2]
    assert test.notes[-1] == f"categories that only {train.name} lists: 1 (1: disc)"
    alone = open_test(data, categories={1: "disc", 2: "square"})
    assert (
        alone.classes == test.classes
        and alone.notes[-1] == "categories that only the detector lists: 1 (1: disc)"
    )
    with pytest.raises(
        DataError, match=r"categories that are not those of .*train.json: 1 \(1: disc, not listed\)"
    ):
        open_coco(changed(tmp_path / "reverse", fewer))
    with pytest.raises(
        DataError, match=r"categories that are not those of the detector: 1 \(2: square, not disc\)"
    ):
        open_test(data, categories={2: "disc", 1: "square"})
