"""Data of detection: one reader for all variants of the COCO format, all problems reported before training,
and views that move image and masks together."""

import json
import pickle
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as api

from rcmae.cli import main
from rcmae.config import check
from rcmae.data.audit import audit
from rcmae.data.dataset import BadFiles
from rcmae.data.decode import BadImage
from rcmae.data.digits import ScenesSource, run_lengths, scene, write_coco
from rcmae.data.sources import open_source
from rcmae.errors import ConfigError, DataError
from rcmae.interop.timm_export import export
from rcmae.tasks.detection import annotations, masks
from rcmae.tasks.detection.coco import CocoSet, Objects, open_coco, open_test, sample_images
from rcmae.tasks.detection.masks import Masks, mask_api
from rcmae.tasks.detection.views import MIN_PIXELS, Detections, Jitter, detection_batches, fit
from tests.conftest import small
from tests.images import encode
from tests.mutations import catches
from tests.test_detection_train import backbone

H, W = 24, 32
TRIANGLE = [4.0, 3.0, 20.0, 5.0, 9.5, 17.0]
BAND = [1.0, 20.0, 30.0, 20.0, 30.0, 23.0, 1.0, 23.0]


def block(top: int, left: int, h: int, w: int, shape: tuple[int, int] = (H, W)) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[top : top + h, left : left + w] = True
    return mask


def annotation(key: int, image: int, category: int = 5, **changes) -> dict:
    return {
        "id": key,
        "image_id": image,
        "category_id": category,
        "bbox": [4, 3, 16, 14],
        "segmentation": [TRIANGLE],
    } | changes


def layout(images: int = 3) -> dict:
    """Images 10, 20, 30 ...: the first with three objects and a crowd, the second with one object, the others
    without."""
    crowd = {"size": [H, W], "counts": run_lengths(block(0, 0, 6, 7))}
    packed = {
        "size": [H, W],
        "counts": api.encode(np.asfortranarray(block(2, 5, 9, 11)).astype(np.uint8))["counts"].decode(),
    }
    return {
        "images": [
            {"id": 10 * i, "file_name": f"{i}.png", "height": H, "width": W} for i in range(1, images + 1)
        ],
        "categories": [{"id": 90, "name": "zebra"}, {"id": 5, "name": "ant"}, {"id": 7, "name": "bee"}],
        "annotations": [
            annotation(101, 10, 90, segmentation=[TRIANGLE, BAND], bbox=[1, 3, 29, 20], area=7.5),
            annotation(102, 20, 7),
            annotation(103, 10, 5, segmentation=packed, bbox=[5, 2, 11, 9]),
            annotation(104, 10, 7, segmentation=crowd, bbox=[0, 0, 7, 6], iscrowd=1),
            annotation(
                105,
                10,
                7,
                segmentation={"size": [H, W], "counts": run_lengths(block(1, 1, 4, 3))},
                bbox=[1, 1, 3, 4],
            ),
        ],
    }


def write(root: Path, train: dict | None = None, val: dict | None = None) -> Path:
    """A folder in COCO's layout; each image has one gray level, 40 times its number."""
    for split, content in (("train2017", train or layout()), ("val2017", val or layout())):
        (root / split).mkdir(parents=True, exist_ok=True)
        (root / "annotations").mkdir(exist_ok=True)
        for k in range(len(layout()["images"])):
            (root / split / f"{k + 1}.png").write_bytes(encode(np.full((H, W, 3), 40 * (k + 1), np.uint8)))
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> CocoSet:
    return open_coco(str(write(tmp_path_factory.mktemp("coco"))))[0]


# --- reading ------------------------------------------------------------------------------------------------


def test_every_mask_format_decodes_as_by_pycocotools(tmp_path):
    train, _ = open_coco(str(write(tmp_path)))
    expected = {}
    for a in layout()["annotations"]:
        s = a["segmentation"]
        code = s if isinstance(s, dict) and isinstance(s["counts"], str) else api.frPyObjects(s, H, W)
        expected[a["id"]] = api.decode(api.merge(code) if isinstance(code, list) else code).astype(bool)
    first = train.objects(0)
    assert [m.sum() > 0 for m in first.masks] == [True] * 3
    for mask, key in zip(first.masks, (101, 103, 105), strict=True):
        assert np.array_equal(mask, expected[key])
    assert np.array_equal(train.objects(1).masks[0], expected[102])
    for a in train.truth["annotations"]:
        assert np.array_equal(api.decode(a["segmentation"]), expected[a["id"]])


def test_category_ids_with_gaps_map_to_consecutive_labels(train):
    assert (train.category_ids, train.classes) == ([5, 7, 90], ["ant", "bee", "zebra"])
    assert train.objects(0).labels.tolist() == [3, 1, 2]
    assert [train.image_id(i) for i in range(len(train))] == [10, 20, 30]
    for i, images in enumerate(train.truth["images"]):
        ids = [
            a["category_id"]
            for a in train.truth["annotations"]
            if a["image_id"] == images["id"] and not a["iscrowd"]
        ]
        assert [train.category_ids[k - 1] for k in train.objects(i).labels] == ids


def test_crowds_are_scored_but_not_trained_on_and_empty_images_stay(train):
    assert [a["id"] for a in train.truth["annotations"] if a["iscrowd"]] == [104]
    assert len(train.truth["annotations"]) == 5
    assert not any((m == block(0, 0, 6, 7)).all() for m in train.objects(0).masks)
    empty = train.objects(2)
    assert (empty.labels.shape, len(empty.masks)) == ((0,), 0)
    assert train.notes == [
        "crowds, left out of training: 1 (104)",
        "images without an object to train on: 1 (30)",
    ]


def test_the_truth_keeps_areas_and_boxes_as_they_are_written(train):
    by_id = {a["id"]: a for a in train.truth["annotations"]}
    assert (by_id[101]["area"], by_id[101]["bbox"]) == (7.5, [1, 3, 29, 20])
    assert by_id[105]["area"] == 12, "the area of the mask, where the file has none"


def test_it_can_be_pickled_and_its_fingerprint_is_of_the_annotations(train, tmp_path):
    again = pickle.loads(pickle.dumps(train))
    assert again.fingerprint() == train.fingerprint()
    assert np.array_equal(again.objects(0).masks, train.objects(0).masks)
    assert open_coco(str(write(tmp_path / "same")))[0].fingerprint() == train.fingerprint()
    for key, change in (
        ("bbox", [1, 1, 3, 3.5]),
        ("category_id", 90),
        ("iscrowd", 1),
        ("segmentation", [[1, 1, 4, 1, 4, 4, 1, 4]]),
    ):
        other = layout()
        other["annotations"][4][key] = change
        assert open_coco(str(write(tmp_path / key, other)))[0].fingerprint() != train.fingerprint(), key
    assert train.where(1).endswith("train2017/2.png")


@pytest.mark.parametrize("folder", ["", "train2017", "images/train2017", "images"])
def test_images_are_found_in_the_usual_folders(tmp_path, folder):
    root = write(tmp_path)
    (root / folder).mkdir(parents=True, exist_ok=True)
    for file in (root / "train2017").glob("*.png"):
        file.rename(root / folder / file.name)
    dataset = open_coco(str(root))[0]
    assert (dataset.pixels(1) == 80).all()


def test_the_instances_are_chosen_among_cocos_files(tmp_path):
    root = write(tmp_path)
    for kind in ("captions", "person_keypoints", "panoptic"):
        for split in ("train2017", "val2017"):
            (root / "annotations" / f"{kind}_{split}.json").write_text("{}")
    assert len(open_coco(str(root))[0]) == 3
    (root / "annotations" / "instances_train2014.json").write_text("{}")
    with pytest.raises(
        DataError,
        match=r"several JSON files named train \(annotations/instances_train2014.json, "
        r"annotations/instances_train2017.json\); give the part to train on with --data",
    ):
        open_coco(str(root))
    file = str(root / "annotations" / "instances_train2017.json")
    assert len(open_coco(file, str(root))[0]) == 3
    with pytest.raises(DataError, match="is only one part; give the other file or folder with --val"):
        open_coco(file)
    (root / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(DataError, match="several JSON files named val or test .annotations/captions_val2017"):
        open_coco(file, str(root))


def test_a_folder_with_a_single_annotation_file_is_one_split(tmp_path):
    for part in ("one", "two"):
        folder = tmp_path / part
        folder.mkdir()
        (folder / "_annotations.coco.json").write_text(json.dumps(layout()))
        for k in range(3):
            (folder / f"{k + 1}.png").write_bytes(encode(np.zeros((H, W, 3), np.uint8)))
    assert [len(part) for part in open_coco(str(tmp_path / "one"), str(tmp_path / "two"))] == [3, 3]
    with pytest.raises(DataError, match=r"no JSON file named train \(_annotations.coco.json\)"):
        open_coco(str(tmp_path / "one"))


# --- invalid annotations ------------------------------------------------------------------------------------


def changes_of(part, k, **changes):
    return lambda content: content[part][k].update(changes)


INVALID = {
    "annotations of images that are not listed: 1 (101)": changes_of("annotations", 0, image_id=11),
    "annotations of images that are not listed: 1 (102)": changes_of("annotations", 1, image_id=[10]),
    "annotations of categories that are not listed: 1 (102)": changes_of("annotations", 1, category_id=6),
    "ids of images that repeat: 1 (10)": changes_of("images", 1, id=10),
    "ids of categories that repeat: 1 (5)": changes_of("categories", 2, id=5),
    "names of categories that repeat: 1 (ant)": changes_of("categories", 2, name="ant"),
    "ids of annotations that repeat: 1 (101)": changes_of("annotations", 2, id=101),
    "ids of annotations that are not whole numbers: 1 (a)": changes_of("annotations", 2, id="a"),
    "boxes without area: 1 (102)": changes_of("annotations", 1, bbox=[4, 3, 0, 14]),
    "boxes that are not 4 finite numbers: 1 (102)": changes_of(
        "annotations", 1, bbox=[4, 3, float("nan"), 14]
    ),
    "boxes that are not 4 finite numbers: 1 (103)": changes_of("annotations", 2, bbox=[4, 3, 5]),
    "boxes outside their image: 1 (102)": changes_of("annotations", 1, bbox=[W, 3, 4, 4]),
    "masks of another size than their image: 1 (105)": changes_of(
        "annotations", 4, segmentation={"size": [W, H], "counts": [H * W]}
    ),
    "run lengths that do not fit the image: 1 (105)": changes_of(
        "annotations", 4, segmentation={"size": [H, W], "counts": [H * W - 1]}
    ),
    "run lengths that do not fit the image: 1 (103)": changes_of(
        "annotations", 2, segmentation={"size": [H, W], "counts": "00"}
    ),
    "run lengths that do not fit the image: 1 (101)": changes_of(
        "annotations", 0, segmentation={"size": [H, W], "counts": "oooooooo"}
    ),
    "annotations without segmentation: masks cannot be learned from boxes alone: 1 (102)": changes_of(
        "annotations", 1, segmentation=[]
    ),
    "annotations without segmentation: masks cannot be learned from boxes alone: 1 (101)": lambda f: f[
        "annotations"
    ][0].pop("segmentation"),
    "segmentations that are neither polygons nor run lengths: 1 (102)": changes_of(
        "annotations", 1, segmentation="mask.png"
    ),
    "polygons that are not lists of x and y, as in [[x1, y1, x2, y2, ...]]: 1 (102)": changes_of(
        "annotations", 1, segmentation=[[1, 2, 3, 4, 5]]
    ),
    "polygons that are not lists of x and y, as in [[x1, y1, x2, y2, ...]]: 1 (101)": changes_of(
        "annotations", 0, segmentation=TRIANGLE
    ),
    "polygons that are not lists of x and y, as in [[x1, y1, x2, y2, ...]]: 1 (103)": changes_of(
        "annotations", 2, segmentation=[[1, 2, 3, 4, 5, float("inf")]]
    ),
    "polygons far outside their image: 1 (102)": changes_of(
        "annotations", 1, segmentation=[[1, 2, 3, 4, 5, 1e9]]
    ),
    "masks without a pixel (coordinates must be in pixels): 1 (102)": changes_of(
        "annotations", 1, segmentation=[[0.1, 0.1, 0.2, 0.1, 0.2, 0.2]]
    ),
    "areas that are not between 0 and 1e10: 1 (101)": changes_of("annotations", 0, area=float("nan")),
    "areas that are not between 0 and 1e10: 1 (102)": changes_of("annotations", 1, area=2e10),
    "iscrowd other than 0 and 1: 1 (102)": changes_of("annotations", 1, iscrowd="0"),
    "images with an invalid height or width: 1 (20)": changes_of("images", 1, height=0),
    "images of more than 100,000,000 pixels, see --max-pixels: 1 (10)": changes_of(
        "images", 0, height=10**6, width=10**6
    ),
    "run lengths written as Python bytes (write counts.decode(), not str(counts)): 1 (103)": changes_of(
        "annotations", 2, segmentation={"size": [H, W], "counts": "b'00'"}
    ),
    "segmentations that are neither polygons nor run lengths: 1 (103)": changes_of(
        "annotations", 2, segmentation=[{"size": [H, W], "counts": [H * W]}]
    ),
    "(train2017, .): 1 (2)": changes_of("images", 1, file_name=2),
    "(train2017, .): 1 (4.png)": changes_of("images", 1, file_name="4.png"),
    "(train2017, .): 1 (a\\x00b)": changes_of("images", 1, file_name="a\0b"),
    "entries of 'annotations' without 'bbox': 1 (number 1)": lambda f: f["annotations"][1].pop("bbox"),
    "no list 'categories'": lambda f: f.pop("categories"),
    "'images' is empty": lambda f: f["images"].clear(),
    "'annotations' is empty": lambda f: f["annotations"].clear(),
    "no object to train on or to score, only crowds: 5 (101, 102, 103, ...)": lambda f: [
        a.update(iscrowd=1) for a in f["annotations"]
    ],
}


@pytest.mark.parametrize("message", INVALID)
def test_invalid_annotations_are_named_and_counted_before_training(tmp_path, message):
    content = layout()
    INVALID[message](content)
    with pytest.raises(DataError, match=re.escape(message)) as e:
        open_coco(str(write(tmp_path, content)))
    assert "instances_train2017.json: " in str(e.value) and "\n" not in str(e.value)


def test_problems_of_both_splits_are_reported_in_one_message(tmp_path):
    one, two = layout(), layout()
    chosen = [message for message in INVALID if "(101" in message or "(102)" in message]
    for message in chosen[:2]:
        INVALID[message](one)
    two["annotations"] += [annotation(200 + k, 99) for k in range(5)]
    two["categories"][0]["name"] = "horse"
    two["annotations"][2]["bbox"] = None
    with pytest.raises(DataError) as e:
        open_coco(str(write(tmp_path, one, two)))
    for message in (
        "train2017.json: annotations of images that are not listed: 2 (101, 102)",
        "val2017.json: boxes that are not 4 finite numbers: 1 (103); annotations of images that are not "
        "listed: 5 (200, 201, 202, ...)",
        f"categories that are not those of {tmp_path}/annotations/instances_train2017.json: 1 (90: horse, "
        "not zebra)",
    ):
        assert message in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\xff", "[" * 100_000])
def test_json_of_another_kind_is_reported_in_one_line(tmp_path, text):
    root = write(tmp_path)
    (root / "annotations" / "instances_val2017.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"instances_val2017.json(: no list 'images'| is not JSON)") as e:
        open_coco(str(root))
    assert "\n" not in str(e.value)


def test_invalid_detection_data_is_reported_in_one_line(tmp_path):
    for spec, message in (
        (str(tmp_path), "has no JSON file named train"),
        (str(tmp_path / "none"), "cannot be read: No such file"),
    ):
        with pytest.raises(DataError, match=message):
            open_coco(spec)
    for spec, message in (
        ("", "--data is empty"),
        ("bundled:scene", "did you mean bundled:scenes"),
        ("bundled:x", "has no objects"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_coco(spec)


@catches(
    "--range is ignored",
    "rcmae.tasks.detection.coco:_set_range",
    lambda old: lambda sets, value_range, *more: old(sets, "data", *more),
)
def test_range_and_the_limit_of_pixels_are_those_that_are_given(tmp_path, capsys):
    root = write(tmp_path / "set")
    for file in root.rglob("*.png"):
        Image.fromarray(np.full((H, W), 4000, np.uint16)).save(file)
    for value_range, bits, white in (("data", 12, 4095), ("dtype", 16, 65535)):
        for part in open_coco(str(root), value_range=value_range, max_pixels=5000):
            assert part.bits == bits and part.take([0]).pixel_limit == 5000
            assert part.pixels(0).max() == round(255 * 4000 / white)
    assert open_test(str(root), value_range="dtype").bits == 16
    with pytest.raises(DataError, match=f"images of more than {H * W - 1} pixels, see --max-pixels: 3"):
        open_test(str(root), max_pixels=H * W - 1)
    export(backbone(), tmp_path / "backbone", {})
    arguments = ["detect", "train", str(tmp_path / "backbone"), "--data", str(root), "--recipe", "bundled"]
    assert main([*arguments, "--out", str(tmp_path / "run"), "--max-pixels", "9"]) == 3
    assert "images of more than 9 pixels, see --max-pixels" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_few_boxes_without_area_are_noted_and_left_out_of_training(tmp_path):
    content = layout()
    content["annotations"] += [
        annotation(1000 + k, 10, segmentation=[BAND], bbox=[1, 20, 29, 3]) for k in range(1000)
    ]
    content["annotations"][500]["bbox"] = [4, 3, 5.5, 0]
    content["annotations"][600]["segmentation"] = [[3, 4, 5, 6]]
    content["annotations"][700]["bbox"] = [-2, 20, 36, 4]
    key = [content["annotations"][k]["id"] for k in (500, 600, 700)]
    train = open_coco(str(write(tmp_path, content)))[0]
    assert f"boxes without area, left out of training: 1 ({key[0]})" in train.notes
    assert f"masks without a pixel, left out of training: 1 ({key[1]})" in train.notes
    assert f"boxes that stick out of their image: 1 ({key[2]})" in train.notes
    objects = train.objects(0)
    assert len(objects.labels) == 3 + 1000 - 2 and len(train.truth["annotations"]) == 1005, (
        "left out of training but not of the ground truth"
    )


def test_boxes_that_do_not_match_their_masks_are_noted_or_rejected(tmp_path):
    """As in a file whose boxes are x0 y0 x1 y1, or those of another object; crowds do not count, and small
    boxes may be rounded."""
    content = layout()
    content["annotations"] += [
        annotation(1000 + k, 10, segmentation=[BAND], bbox=[1, 20, 29, 3]) for k in range(96)
    ]
    tiny = annotation(
        2000,
        10,
        segmentation={"size": [H, W], "counts": run_lengths(block(6, 6, 1, 1))},
        bbox=[5.4, 5.4, 1.2, 1.2],
    )
    content["annotations"].append(tiny)
    content["annotations"][3]["bbox"] = [20, 10, 5, 5]
    assert not any("around" in note for note in open_coco(str(write(tmp_path / "none", content)))[0].notes)
    for a in content["annotations"][40:50]:
        a["bbox"] = [1, 20, 30, 23]
    assert (
        "boxes that are not around their masks: 10 (1035, 1036, 1037, ...)"
        in open_coco(str(write(tmp_path / "few", content)))[0].notes
    )
    content["annotations"][50]["bbox"] = [1, 2, 29, 3]
    with pytest.raises(
        DataError,
        match=r"not around their masks \(a box must be x, y, width and height; run lengths go down the "
        r"columns\): 11 \(1035",
    ):
        open_coco(str(write(tmp_path / "many", content)))


def test_without_pycocotools_the_extra_is_named(tmp_path, monkeypatch):
    root = write(tmp_path)
    mask_api.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "pycocotools.mask", None)
    with pytest.raises(ConfigError, match=r"pip install 'rcmae\[coco\]'"):
        open_coco(str(root))


def test_run_lengths_are_read_as_they_are_written():
    draws = np.random.default_rng(0)
    for _ in range(200):
        shape = draws.integers(1, 200, 2)
        mask = np.kron(draws.random((3, 3)) < 0.5, np.ones(-(-shape // 3)))[: shape[0], : shape[1]] != (
            draws.random(shape) < draws.choice([0, 0.02])
        )
        text = api.encode(np.asfortranarray(mask).astype(np.uint8))["counts"].decode()
        assert masks._runs(text) == run_lengths(mask)


# --- scenes and parts ---------------------------------------------------------------------------------------


def test_objects_of_bundled_scenes_match_the_drawn_instances():
    train, test = open_coco("bundled:scenes", train_images=6, test_images=3, size=96)
    assert (len(train), len(test), train.in_memory, train.classes) == (
        6,
        3,
        True,
        [str(d) for d in range(10)],
    )
    for part, split in ((train, "train"), (test, "test")):
        for index in range(len(part)):
            image, instances = scene(0, split, index, 96)
            objects = part.objects(index)
            assert np.array_equal(part.pixels(index), image)
            assert objects.labels.tolist() == [i.label + 1 for i in instances]
            boxes = [a["bbox"] for a in part.truth["annotations"] if a["image_id"] == part.image_id(index)]
            assert boxes == [list(i.box) for i in instances]
            assert np.array_equal(objects.masks, np.stack([i.mask for i in instances]))


def test_scenes_written_to_disk_are_read_back_unchanged(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        write_coco(tmp_path, split, count, 64)
    drawn = open_coco("bundled:scenes", train_images=3, test_images=2, size=64)
    for one, two in zip(open_coco(str(tmp_path)), drawn, strict=True):
        assert one.truth == two.truth
        assert all(np.array_equal(one.pixels(i), two.pixels(i)) for i in range(len(one)))


def test_scenes_are_a_source_of_images_without_labels():
    source = open_source("bundled:scenes", size=48)
    assert (len(source), source.labels, source.classes, source.kind) == (4096, None, (), "bundled")
    assert np.array_equal(source.read(4095), scene(0, "train", 4095, 48)[0])
    assert source.read(7) is not source.read(8) and np.array_equal(source.read(7), source.read(7))
    prints = {
        ScenesSource(split, count, size, seed).fingerprint()
        for split, count, size, seed in [
            ("train", 4, 48, 0),
            ("test", 4, 48, 0),
            ("train", 5, 48, 0),
            ("train", 4, 32, 0),
            ("train", 4, 48, 1),
        ]
    }
    assert len(prints) == 5
    with pytest.raises(ConfigError, match="did you mean bundled:scenes"):
        open_source("bundled:scene")
    with pytest.raises(ConfigError, match="has 3 channels"):
        open_source("bundled:scenes", channels=1)


def test_scenes_can_be_audited(monkeypatch):
    monkeypatch.setattr(ScenesSource.__init__, "__defaults__", ("train", 16, 128, 0))
    report = audit(open_source("bundled:scenes", size=32), recipe=check(small(size=32)))
    assert (report.images, report.widths, report.classes) == (16, (32, 32, 32), {}) and report.fit


def test_a_smaller_subset_lies_within_a_larger_one(train):
    full = open_coco("bundled:scenes", train_images=12, test_images=1, size=32)[0]
    parts = [sample_images(full, k, seed=1) for k in (1, 4, 12)]
    ids = [[part.image_id(i) for i in range(len(part))] for part in parts]
    assert ids[0] == ids[1][:1] and ids[1] == ids[2][:4]
    assert sorted(ids[2]) == list(range(1, 13)) != ids[2]
    assert ids[2] != [sample_images(full, 12, seed=2).image_id(i) for i in range(12)]
    for part in parts:
        assert [i["id"] for i in part.truth["images"]] == [part.image_id(i) for i in range(len(part))]
        for i in range(len(part)):
            position = part.image_id(i) - 1
            assert np.array_equal(part.objects(i).masks, full.objects(position).masks)
            assert np.array_equal(part.pixels(i), full.pixels(position)) and part.where(i) == full.where(
                position
            )
    assert len({part.fingerprint() for part in parts}) == 3
    assert np.array_equal(
        sample_images(parts[1], 4, 9).objects(0).masks,
        full.objects(sample_images(parts[1], 4, 9).image_id(0) - 1).masks,
    )
    for count in (0, 13):
        with pytest.raises(DataError, match=f"has 12 images, so a subset cannot have {count} of them"):
            sample_images(full, count)
    empty = next(
        seed
        for seed in range(99)
        if np.random.Generator(np.random.Philox(key=seed, counter=[0, 6, 0, 0])).permutation(3)[0] == 2
    )
    with pytest.raises(DataError, match="no object in the 1 image sampled from .*; use more"):
        sample_images(train, 1, empty)


# --- views --------------------------------------------------------------------------------------------------

GRAY = (0.5, 0.5, 0.5)


def picture(h: int, w: int, n: int, seed: int = 0) -> tuple[np.ndarray, Objects]:
    """A gray image with n blocks, each with a mask."""
    draws = np.random.default_rng(seed)
    image, masks = np.full((h, w, 3), 128, np.uint8), np.zeros((n, h, w), bool)
    for k in range(n):
        top, left = draws.integers(h), draws.integers(w)
        masks[k] = block(top, left, draws.integers(1, h + 1), draws.integers(1, w + 1), (h, w))
    return image, Objects(np.arange(1, n + 1), masks)


def box_around(mask: np.ndarray) -> list[int]:
    points = [(x, y) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    xs, ys = zip(*points, strict=True)
    return [min(xs), min(ys), max(xs) + 1, max(ys) + 1]


def test_boxes_are_those_of_the_cropped_masks():
    jitter = Jitter(40, (0.3, 3.0), True, 100, GRAY)
    fewer = 0
    for seed in range(20):
        image, objects = picture(30, 50, 6, seed)
        view = jitter(image, objects, np.random.default_rng(seed))
        assert view["image"].shape == (3, 40, 40) and view["image"].dtype == torch.uint8
        assert view["masks"].shape == (len(view["labels"]), 40, 40) and view["masks"].dtype == torch.bool
        assert view["boxes"].dtype == torch.float32 and view["labels"].dtype == torch.int64
        assert view["boxes"].tolist() == [box_around(m.numpy()) for m in view["masks"]]
        assert all(m.sum() >= MIN_PIXELS for m in view["masks"])
        fewer += len(view["labels"]) < 6
    assert fewer, "some objects were cropped away"


@catches(
    "masks are one pixel off",
    "rcmae.tasks.detection.views:nearest",
    lambda old: lambda side, resized_side: (old(side, resized_side) + 1).clip(max=side - 1),
)
def test_image_and_masks_are_transformed_together():
    """Each mask has a color in the image; after any jitter, the color is where the mask is, except for
    blurred edges."""
    for seed in range(24):
        side = 30 + seed
        masks = np.stack([block(3, 4, 12, 9, (48, side)), block(20, side // 2, 20, 9, (48, side))])
        image = np.zeros((48, side, 3), np.uint8)
        image[masks[0]], image[masks[1]] = (255, 0, 0), (0, 255, 0)
        view = Jitter(64, (0.5, 2.5), True, 100, GRAY)(
            image, Objects(np.array([1, 2]), masks), np.random.default_rng(seed)
        )
        for label, mask in zip(view["labels"], view["masks"], strict=True):
            shown = (view["image"][label - 1] > 127) & (
                view["image"][2] == 0
            )  # the rest of the square is gray
            edge = 2 * (
                mask.any(0).sum() + mask.any(1).sum()
            )  # what a shift by a pixel both ways would change
            assert (shown != mask).sum() <= 0.6 * edge, (seed, label)


def test_a_view_is_a_function_of_the_generator():
    image, objects = picture(30, 50, 9)
    image[:] = np.random.default_rng(0).integers(0, 256, image.shape)
    jitter = Jitter(32, (0.5, 2.0), True, 4, GRAY)
    one, two, other = (jitter(image, objects, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["image"], other["image"])


class Fixed:
    """A generator that flips, and otherwise draws the lowest value."""

    random = staticmethod(lambda: 0.0)
    uniform = staticmethod(lambda low, high: low)
    integers = staticmethod(lambda high: 0)
    permutation = staticmethod(np.arange)


def test_jitter_at_scale_one_is_the_identity_and_two_flips_cancel():
    image, objects = picture(32, 32, 5)
    image[:] = np.random.default_rng(0).integers(0, 256, image.shape)
    identity = Jitter(32, (1.0, 1.0), False, 100, GRAY)(image, objects, np.random.default_rng(0))
    visible = objects.masks.sum((1, 2)) >= MIN_PIXELS
    assert np.array_equal(identity["image"].permute(1, 2, 0), image)
    assert (
        np.array_equal(identity["masks"], objects.masks[visible])
        and identity["labels"].tolist() == objects.labels[visible].tolist()
    )
    flip = Jitter(32, (1.0, 1.0), True, 100, GRAY)
    once = flip(image, objects, Fixed())
    assert np.array_equal(once["image"].permute(1, 2, 0), image[:, ::-1])
    assert np.array_equal(once["masks"], objects.masks[visible][:, :, ::-1])
    turned = Objects(once["labels"].numpy(), once["masks"].numpy())
    twice = flip(once["image"].permute(1, 2, 0).numpy(), turned, Fixed())
    assert all(torch.equal(twice[k], identity[k]) for k in identity)
    drawn = {
        bool(np.array_equal(flip(image, objects, np.random.default_rng(s))["masks"], identity["masks"]))
        for s in range(12)
    }
    assert drawn == {True, False}


def test_scales_stay_in_range_and_padding_has_the_mean_color():
    lengths = []
    image = np.zeros((20, 40, 3), np.uint8)
    for seed in range(60):
        view = Jitter(50, (0.2, 0.9), True, 1, (0.2, 0.4, 1.0))(
            image, picture(20, 40, 0)[1], np.random.default_rng(seed)
        )["image"]
        inside = (view == 0).all(0)
        h, w = int(inside.any(1).sum()), int(inside.any(0).sum())
        assert inside[:h, :w].all() and abs(w / h - 2) < 0.25
        assert (view[:, ~inside] == torch.tensor([51, 102, 255])[:, None]).all()
        lengths.append(w)
    assert 10 <= min(lengths) < 15 and 40 < max(lengths) <= 45


def test_crops_reach_every_side():
    """At twice the size, some crops contain each of the four corners of an image, and none contains all."""
    masks = np.stack([block(t, x, 4, 4, (32, 32)) for t in (0, 28) for x in (0, 28)])
    objects = Objects(np.arange(1, 5), masks)
    labels_seen = [
        Jitter(32, (2.0, 2.0), False, 9, GRAY)(
            np.zeros((32, 32, 3), np.uint8), objects, np.random.default_rng(s)
        )["labels"].tolist()
        for s in range(99)
    ]
    assert {label for labels in labels_seen for label in labels} == {1, 2, 3, 4}
    assert max(map(len, labels_seen)) == 1


def test_a_random_subset_of_many_objects_is_kept():
    image = np.zeros((32, 32, 3), np.uint8)
    objects = Objects(np.arange(1, 9), np.stack([block(4 * k, 0, 4, 32, (32, 32)) for k in range(8)]))
    kept = [
        Jitter(32, (1.0, 1.0), False, 3, GRAY)(image, objects, np.random.default_rng(s))["labels"].tolist()
        for s in range(60)
    ]
    assert all(len(k) == 3 and k == sorted(k) for k in kept)
    assert np.bincount(np.ravel(kept), minlength=9)[1:].min() > 8
    hidden = Objects(objects.labels, objects.masks & (np.arange(8) > 4)[:, None, None])
    assert Jitter(32, (1.0, 1.0), False, 3, GRAY)(image, hidden, np.random.default_rng(0))[
        "labels"
    ].tolist() == [6, 7, 8], "invisible objects do not replace visible ones"


def test_masks_are_decoded_one_at_a_time_and_only_if_kept():
    decoded, alive, most_alive = 0, 0, 0

    def make(k: int) -> np.ndarray:
        nonlocal decoded, alive, most_alive
        decoded, alive = decoded + 1, alive + 1
        most_alive = max(most_alive, alive)
        mask = block(k, 0, 4, 32, (32, 32))
        weakref.finalize(mask, released)
        return mask

    def released() -> None:
        nonlocal alive
        alive -= 1

    objects = Objects(np.arange(1, 21), Masks(range(20), make))
    view = Jitter(32, (1.0, 1.0), True, 6, GRAY)(
        np.zeros((32, 32, 3), np.uint8), objects, np.random.default_rng(0)
    )
    assert (len(view["masks"]), decoded, most_alive) == (6, 6, 1)


@pytest.mark.parametrize("shape", [(1, 2000), (2000, 1), (1, 1), (3, 5), (700, 64)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_any_shape_are_handled(shape, channels):
    for seed in range(6):
        masks = np.ones((seed % 3, *shape), bool)
        objects = Objects(np.arange(1, len(masks) + 1), masks)
        image = np.zeros((*shape, channels), np.uint8)
        view = Jitter(48, (0.1, 2.0), True, 100, (0.5,) * channels)(
            image, objects, np.random.default_rng(seed)
        )
        assert view["image"].shape == (channels, 48, 48) and view["boxes"].shape == (len(view["labels"]), 4)
        assert max(fit(image, 48).shape[1:]) == 48 and min(fit(image, 48).shape) >= 1


def test_evaluation_sees_the_whole_image():
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    assert fit(image, 40).shape == (3, 30, 40)
    assert fit(image, 10).float().std() < 0.2 * image.std(), "antialiased: each pixel averages many"
    assert np.array_equal(fit(image, 80).permute(1, 2, 0), image)


# --- samples and batches ------------------------------------------------------------------------------------


def exif(image: np.ndarray, orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return encode(image, exif=tags)


def test_an_image_is_read_as_it_is_annotated(tmp_path):
    """EXIF orientation 6 turns by 90 degrees: applied only if the turned image, not the stored one, has the
    annotated size."""
    root = write(tmp_path)
    image = np.zeros((H, W, 3), np.uint8)
    image[0] = 255
    (root / "train2017" / "1.png").write_bytes(exif(image, 6))
    (root / "train2017" / "2.png").write_bytes(exif(np.rot90(image), 6))
    (root / "train2017" / "3.png").write_bytes(encode(image[:-1]))
    train = open_coco(str(root))[0]
    assert np.array_equal(train.pixels(0), image) and np.array_equal(train.pixels(1), image)
    with pytest.raises(BadImage, match="is 32 x 23 pixels, not 32 x 24 as its annotations say"):
        train.pixels(2)


def test_images_of_wrong_size_are_noted_or_rejected_before_training(tmp_path, monkeypatch):
    root = write(tmp_path)
    for k in (1, 2):
        (root / "train2017" / f"{k}.png").write_bytes(encode(np.zeros((H - k, W, 3), np.uint8)))
    message = "images of another size than annotated: 2 (1.png, 2.png)"
    assert message in open_coco(str(root))[0].notes
    monkeypatch.setattr(annotations, "WRONG_SIZE_COUNT", 1)
    with pytest.raises(DataError, match=re.escape(message)):
        open_coco(str(root))


def test_a_file_shared_by_two_images_is_noted(tmp_path):
    content = layout()
    content["images"][1]["file_name"] = "1.png"
    assert "image files of several images: 1 (1.png)" in open_coco(str(write(tmp_path, content)))[0].notes


def test_a_substitute_brings_its_own_objects(tmp_path):
    root = write(tmp_path)
    (root / "train2017" / "1.png").write_bytes(b"no image")
    (root / "train2017" / "3.png").write_bytes(encode(np.zeros((H, W - 1, 3), np.uint8)))
    data = Detections(open_coco(str(root))[0], Jitter(32, (1.0, 1.0), False, 100, GRAY), seed=0)
    for i in range(3):
        sample = data[0, i]
        assert (sample["image"][:, :H] == 80).all(), "the only valid image"
        assert sample["labels"].tolist() == [2]
        assert (i in [bad[0] for bad in sample["bad"]]) == (i != 1)
    bad_files = BadFiles(tmp_path, 3)
    next(iter(detection_batches(data, [[(0, 0), (0, 2)]], 0, torch.device("cpu"), bad_files.note)))
    named = {
        json.loads(line)["index"]: json.loads(line)["reason"]
        for line in bad_files.path.read_text().splitlines()
    }
    assert named == {0: "not an image", 2: "is 31 x 24 pixels, not 32 x 24 as its annotations say"}


@pytest.mark.parametrize("size", [40, 43])
def test_batches_are_the_same_for_every_number_of_workers(train, size):
    data = Detections(train, Jitter(size, (0.3, 2.0), True, 2, GRAY), seed=3)
    keys = [[(0, 0), (0, 1), (0, 2)], [(1, 2), (1, 2)], [(1, 0), (2, 0)]]
    alone, two = (
        [*detection_batches(data, keys, workers, torch.device("cpu"), lambda bad: None)] for workers in (0, 2)
    )
    for batch, other, chosen in zip(alone, two, keys, strict=True):
        assert set(batch) == {"image", "targets"} and torch.equal(batch["image"], other["image"])
        for key, target, same in zip(chosen, batch["targets"], other["targets"], strict=True):
            sample = data[key]
            assert set(target) == {"boxes", "labels", "masks"}
            assert all(torch.equal(target[k], sample[k]) and torch.equal(target[k], same[k]) for k in target)
    assert [len(t["labels"]) for t in alone[1]["targets"]] == [0, 0]
    assert not torch.equal(alone[0]["image"][0], alone[2]["image"][0])
