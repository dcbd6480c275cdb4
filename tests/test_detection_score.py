"""Detection scores: COCO's own numbers to the digit by both libraries, errors that name the problem,
pictures."""

import base64
import contextlib
import copy
import io
import json
import sys
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rcmae.data.digits import scene, write_coco
from rcmae.errors import ConfigError, DataError, StorageError
from rcmae.report import detection_figures as pictures
from rcmae.report.pictures import data_uri
from rcmae.tasks.detection import average_precision as ap
from rcmae.tasks.detection.masks import Masks
from tests.mutations import catches

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)  # pycocotools 2.0.11


def encoded(mask: np.ndarray) -> dict:
    code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def ellipse(h: int, w: int, box: list[float]) -> np.ndarray:
    x, y, width, height = box
    v, u = np.mgrid[:h, :w] + 0.5
    return ((u - x - width / 2) / (width / 2)) ** 2 + ((v - y - height / 2) / (height / 2)) ** 2 <= 1


@pytest.fixture(scope="module")
def random_set() -> tuple[dict, list[dict]]:
    """Ellipses of all sizes; crowds, images without objects or detections, gaps in all ids, a class without
    objects, tied scores."""
    draws = np.random.default_rng(0)
    h, w = 150, 200
    truth = {
        "images": [],
        "categories": [{"id": c, "name": f"class {c}"} for c in (9, 2, 5, 7)],
        "annotations": [],
    }
    results = []
    for image in range(30):
        image_id = 10 + 3 * image
        truth["images"].append({"id": image_id, "width": w, "height": h, "file_name": f"{image}.png"})
        for _ in range(0 if image % 7 == 0 else draws.integers(1, 7)):
            size = np.exp(draws.uniform(np.log(6), np.log(130), 2))
            box = [
                float(draws.uniform(0, w - size[0])),
                float(draws.uniform(0, h - size[1])),
                float(size[0]),
                float(size[1]),
            ]
            mask = ellipse(h, w, box)
            if mask.sum() < 9:
                continue
            category = int(draws.choice([2, 5, 9]))
            truth["annotations"].append(
                {
                    "id": 5 + 2 * len(truth["annotations"]),
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": box,
                    "area": int(mask.sum()),
                    "iscrowd": int(draws.random() < 0.15),
                    "segmentation": encoded(mask),
                }
            )
            for _ in range(0 if image % 5 == 0 else draws.integers(0, 4)):
                near = [b + float(draws.normal(0, 0.1) * s) for b, s in zip(box, [*size, *size], strict=True)]
                guess = category if draws.random() < 0.8 else int(draws.choice([2, 5, 7, 9]))
                results.append(
                    {
                        "image_id": image_id,
                        "category_id": guess,
                        "bbox": near,
                        "score": round(float(draws.random()), 1),
                        "segmentation": encoded(ellipse(h, w, near)),
                    }
                )
    assert len(results) > 80 and sum(a["iscrowd"] for a in truth["annotations"]) > 5
    return truth, results


def pycocotools_stats(truth: dict, results: list[dict], kind: str, bounds=None) -> list[float]:
    """COCO statistics by pycocotools as in its demo; masks without boxes."""
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = {"info": {}} | copy.deepcopy(truth)  # required by pycocotools 2.0.10
        gt.createIndex()
        drop = {"bbox": "segmentation", "segm": "bbox"}[kind]
        run = COCOeval(
            gt, gt.loadRes([{k: v for k, v in copy.deepcopy(r).items() if k != drop} for r in results]), kind
        )
        if bounds:
            low, high = bounds
            run.params.areaRng = [[0, 1e10], [0, low], [low, high], [high, 1e10]]
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats.tolist()


def as_results(truth: dict, shift: float = 0.0, score: float = 0.9) -> list[dict]:
    """The objects themselves as detections, shifted by a fraction of their width."""
    sizes = {i["id"]: (i["height"], i["width"]) for i in truth["images"]}
    results = []
    for a in truth["annotations"]:
        if not a.get("iscrowd"):
            x, y, w, h = a["bbox"]
            lengths = a["segmentation"]
            mask = rle.decode(
                rle.frPyObjects(lengths, *sizes[a["image_id"]])
                if isinstance(lengths["counts"], list)
                else lengths
            )
            detection = {
                "bbox": [x + shift * w, y, w, h],
                "score": score,
                "segmentation": encoded(np.roll(mask, round(shift * w), 1)),
            }
            results.append({"image_id": a["image_id"], "category_id": a["category_id"]} | detection)
    return results


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> dict:
    return json.loads(write_coco(tmp_path_factory.mktemp("digits"), "test", 12).read_text())


def numbers(stats: dict) -> np.ndarray:
    assert list(stats) == list(ap.STATS)
    return np.array([-1.0 if v is None else v for v in stats.values()])


@catches(
    "crowds are scored as objects",
    "rcmae.tasks.detection.average_precision:_opened",
    lambda old: (
        lambda api, truth, results, kind: old(
            api, {**truth, "annotations": [{**a, "iscrowd": 0} for a in truth["annotations"]]}, results, kind
        )
    ),
)
@pytest.mark.parametrize("backend", ["faster", "pycocotools"])
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_all_twelve_numbers_are_those_of_pycocotools(random_set, kind, backend, capsys):
    truth, results = random_set
    precision = ap.evaluate(truth, results, kind, backend, areas="coco")
    assert numbers(precision.stats) == pytest.approx(pycocotools_stats(truth, results, kind), abs=1e-9)
    assert (precision.kind, precision.backend, precision.areas, precision.bounds) == (
        kind,
        backend,
        "coco",
        (1024, 9216),
    )
    assert 0.1 < precision.stats["AP"] < 0.9, "a set that is neither trivial nor hopeless"
    scaled = ap.evaluate(truth, results, kind, backend)
    fraction = 200 * 150 / (640 * 480)
    assert scaled.areas == "relative" and scaled.bounds == pytest.approx((1024 * fraction, 9216 * fraction))
    assert numbers(scaled.stats) == pytest.approx(
        pycocotools_stats(truth, results, kind, scaled.bounds), abs=1e-9
    )
    assert scaled.stats["AP_small"] != precision.stats["AP_small"]
    assert "".join(capsys.readouterr()) == ""


@pytest.mark.parametrize("backend", ["faster", "pycocotools"])
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_ground_truth_as_detections_scores_one(random_set, digits, kind, backend):
    for truth in (random_set[0], digits):
        precision = ap.evaluate(truth, as_results(truth), kind, backend)
        stats = {k: v for k, v in precision.stats.items() if k not in ("AR1", "AR10")}
        absent = {k for k, v in stats.items() if v is None}
        assert absent == ({"AP_small", "AR_small"} if truth is digits else set()), "no digit is small"
        assert [v for v in stats.values() if v is not None] == pytest.approx(
            [1.0] * (len(stats) - len(absent))
        )
        assert all(curve == pytest.approx([1.0] * 101) for curve in precision.curves.values())


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_ap_falls_with_the_shift_of_the_boxes(digits, kind):
    values = [
        ap.evaluate(digits, as_results(digits, shift), kind).stats["AP"]
        for shift in (0, 0.05, 0.1, 0.2, 0.3, 0.6)
    ]
    assert all(a > b or a == b == 0 for a, b in pairwise(values)) and values[0] > 0.99 and values[-1] < 0.01


def test_classes_and_curves_agree_with_the_mean(random_set):
    precision = ap.evaluate(*random_set)
    assert list(precision.per_class) == ["class 2", "class 5", "class 7", "class 9"]
    assert precision.per_class["class 7"] is None, "a class without objects"
    annotations = [each for each in random_set[0]["annotations"] if not each.get("iscrowd")]
    assert precision.objects == {
        each["name"]: sum(a["category_id"] == each["id"] for a in annotations)
        for each in random_set[0]["categories"]
    }
    values = [v for v in precision.per_class.values() if v is not None]
    assert np.mean(values) == pytest.approx(precision.stats["AP"]) and len(set(values)) == 3
    for iou, name in (("0.5", "AP50"), ("0.75", "AP75")):
        assert len(precision.curves[iou]) == 101 and np.mean(precision.curves[iou]) == pytest.approx(
            precision.stats[name]
        )
    truth, results = random_set
    alone = ap.evaluate(
        truth
        | {"categories": [{"id": 5, "name": "five"}]}
        | {"annotations": [a for a in truth["annotations"] if a["category_id"] == 5]},
        [r for r in results if r["category_id"] == 5],
    )
    assert alone.per_class == {"five": pytest.approx(precision.per_class["class 5"])}
    assert json.loads(json.dumps(precision._asdict()))["stats"] == precision.stats


def areas_of_boxes(old):
    def opened(api, truth, results, kind):
        gt, dt = old(api, truth, results, kind)
        for n, r in enumerate(results, 1):
            if "bbox" in r:
                dt.anns[n]["area"] = r["bbox"][2] * r["bbox"][3]
        return gt, dt

    return opened


@catches(
    "masks have the area of their boxes", "rcmae.tasks.detection.average_precision:_opened", areas_of_boxes
)
@pytest.mark.parametrize("backend", ["faster", "pycocotools"])
def test_masks_are_judged_by_masks_alone(random_set, backend):
    truth, results = random_set
    bare = [{k: v for k, v in r.items() if k != "bbox"} for r in results]
    wild = [r | {"bbox": [0.0, 0.0, 1.0, 1.0]} for r in results]
    assert (
        ap.evaluate(truth, results, "segm", backend)
        == ap.evaluate(truth, bare, "segm", backend)
        == ap.evaluate(truth, wild, "segm", backend)
    )


@pytest.mark.parametrize("backend", ["faster", "pycocotools"])
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_arguments_are_not_changed(random_set, digits, kind, backend):
    for truth, results in (random_set, (digits, as_results(digits))):
        before = copy.deepcopy((truth, results))
        ap.evaluate(truth, results, kind, backend)
        ap.misses(truth, results, kind)
        assert (truth, results) == before


@pytest.mark.parametrize("backend", ["faster", "pycocotools"])
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_no_detections_and_no_objects(random_set, kind, backend):
    truth, results = random_set
    nothing = ap.evaluate(truth, [], kind, backend)
    assert set(nothing.stats.values()) == {0.0} and nothing.curves["0.5"] == [0.0] * 101
    empty = ap.evaluate(truth | {"annotations": []}, results, kind, backend)
    assert set(empty.stats.values()) == {None} == set(empty.per_class.values()) and empty.curves == {
        "0.5": [],
        "0.75": [],
    }
    assert set(
        ap.evaluate({"images": [], "categories": [], "annotations": []}, [], kind, backend).stats.values()
    ) == {None}
    small = truth | {"annotations": [a for a in truth["annotations"] if a["area"] < 1000]}
    stats = ap.evaluate(small, results, kind, backend, areas="coco").stats
    assert stats["AP_small"] is not None and stats["AP_medium"] is None and stats["AR_large"] is None


def numbered_from_zero(old):
    def opened(*args):
        gt, dt = old(*args)
        for entry in gt.dataset["annotations"]:
            entry["id"] -= 1
        gt.createIndex()
        return gt, dt

    return opened


@catches(
    "annotations are numbered from zero",
    "rcmae.tasks.detection.average_precision:_opened",
    numbered_from_zero,
)
@pytest.mark.parametrize("backend", ["faster", "pycocotools"])
def test_an_annotation_of_id_zero_can_be_matched(backend):
    truth = toy()
    truth["annotations"] = [a | {"id": n} for n, a in enumerate(truth["annotations"])]
    assert ap.evaluate(truth, as_results(truth), backend=backend).stats["AP"] == 1


def enlarged(truth: dict, results: list[dict], factor: int) -> tuple[dict, list[dict]]:
    def shape(e: dict) -> dict:
        mask = encoded(np.kron(rle.decode(e["segmentation"]), np.ones((factor, factor))))
        return e | {"bbox": [factor * x for x in e["bbox"]], "segmentation": mask}

    images = [i | {k: factor * i[k] for k in ("width", "height")} for i in truth["images"]]
    return (
        truth
        | {
            "images": images,
            "annotations": [shape(a) | {"area": factor**2 * a["area"]} for a in truth["annotations"]],
        },
        [shape(r) for r in results],
    )


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_relative_sizes_do_not_depend_on_the_resolution(random_set, kind):
    truth = random_set[0] | {"images": random_set[0]["images"][:12]}
    image_ids = [i["id"] for i in truth["images"]]
    truth["annotations"], results = (
        [e for e in entries if e["image_id"] in image_ids]
        for entries in (truth["annotations"], random_set[1])
    )
    larger = enlarged(truth, results, 4)
    assert (
        ap.evaluate(*larger, kind, areas="relative").stats
        == ap.evaluate(truth, results, kind, areas="relative").stats
    )
    assert (
        ap.evaluate(*larger, kind, areas="coco").stats
        != ap.evaluate(truth, results, kind, areas="coco").stats
    )
    assert ap.evaluate(*larger, kind).areas == "coco", "images of 800 x 600 are as large as those of COCO"


def test_the_size_limits_follow_the_median_image():
    truth = toy()
    truth["images"] = [
        i | {"width": w, "height": w} for i, w in zip(truth["images"], (64, 128, 2000), strict=True)
    ]
    assert ap.evaluate(truth, [], areas="auto").bounds[0] == pytest.approx(1024 * 128 * 128 / (640 * 480))


def toy() -> dict:
    """Three images of 40 x 40: two objects and a crowd; one object; none."""
    boxes = {
        1: [(1, [0, 0, 10, 10], 0), (2, [20, 0, 10, 10], 0), (1, [0, 20, 40, 20], 1)],
        2: [(2, [5, 5, 20, 20], 0)],
    }
    annotations = []
    for image_id, objects in boxes.items():
        for category, box, crowd in objects:
            mask = np.zeros((40, 40), bool)
            mask[box[1] : box[1] + box[3], box[0] : box[0] + box[2]] = True
            annotations.append(
                {
                    "id": 7 + len(annotations),
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": box,
                    "area": int(mask.sum()),
                    "iscrowd": crowd,
                    "segmentation": encoded(mask),
                }
            )
    images = [{"id": i, "width": 40, "height": 40, "file_name": f"{i}.png"} for i in (1, 2, 3)]
    return {
        "images": images,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": annotations,
    }


def guess(image_id: int, category: int, box: list[float], score: float) -> dict:
    mask = np.zeros((40, 40), bool)
    mask[round(box[1]) : round(box[1] + box[3]), round(box[0]) : round(box[0] + box[2])] = True
    return {
        "image_id": image_id,
        "category_id": category,
        "bbox": box,
        "score": score,
        "segmentation": encoded(mask),
    }


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_worst_images_come_first(kind):
    truth = toy()
    results = [
        guess(1, 1, [0, 0, 10, 9], 0.6),  # the cat, with a lower score than the next
        guess(1, 1, [0, 0, 10, 10], 0.8),  # the cat
        guess(1, 1, [30, 30, 8, 8], 0.9),  # in the crowd, not an error
        guess(1, 1, [20, 0, 10, 10], 0.7),  # the dog, taken for a cat
        guess(2, 2, [5, 5, 20, 20], 0.4),  # the dog, with a score below the threshold
        guess(3, 1, [5, 5, 20, 20], 0.95),  # no object there
    ]
    assert ap.misses(truth, results, kind) == [
        ap.Misses(1, [1], [3, 0]),
        ap.Misses(2, [3], []),
        ap.Misses(3, [], [5]),
    ]
    assert (
        ap.misses(truth, results, kind, threshold=0.3)[-1] == ap.Misses(3, [], [5])
        and len(ap.misses(truth, results, kind, 0.3)) == 2
    )
    assert ap.misses(truth, as_results(truth), kind) == []
    assert ap.misses(truth, [], kind) == [ap.Misses(1, [0, 1], []), ap.Misses(2, [3], [])]


def detection_of(seed: int = 0, count: int = 5, size: tuple[int, int] = (40, 60)) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=g) * 20
    return {
        "boxes": torch.cat([corners, corners + 3 + torch.rand(count, 2, generator=g) * 17], 1),
        "labels": torch.randint(1, 4, (count,), generator=g),
        "scores": torch.rand(count, generator=g),
        "masks": torch.rand(count, *size, generator=g) < 0.3,
    }


@pytest.mark.parametrize("count", [0, 1, 5])
def test_results_and_detections_convert_in_both_directions(count):
    detection, ids = detection_of(count=count), [4, 11, 2]
    results = json.loads(json.dumps(ap.results_of(detection, 33, ids)))
    assert [r["category_id"] for r in results] == [ids[label - 1] for label in detection["labels"]]
    assert (
        all(r["image_id"] == 33 for r in results)
        and [r["score"] for r in results] == detection["scores"].tolist()
    )
    for r, box, mask in zip(results, detection["boxes"].double(), detection["masks"], strict=True):
        x, y, w, h = r["bbox"]
        assert [x, y, x + w, y + h] == pytest.approx(box.tolist(), abs=1e-12)
        assert (rle.decode(r["segmentation"]) == mask.numpy()).all()
    back = ap.objects_of(results, {"id": 33, "height": 40, "width": 60}, ids)
    assert len(back["masks"]) == count
    back["masks"] = torch.stack([torch.zeros(40, 60, dtype=torch.bool), *back["masks"]])[1:]
    for name, value in detection.items():
        assert back[name].dtype == value.dtype and torch.allclose(
            back[name].float(), value.float(), atol=1e-5
        ), name


def test_results_and_pictures_decode_one_mask_at_a_time():
    detection, references = detection_of(), []
    alive = lambda: sum(mask() is not None for mask in references)  # noqa: E731

    def make(mask: torch.Tensor) -> torch.Tensor:
        assert alive() <= 1, "at most the previous mask is still referenced"
        decoded = mask.clone()
        references.append(weakref.ref(decoded))
        return decoded

    lazy = detection | {"masks": Masks(detection["masks"], make)}
    assert (
        ap.results_of(lazy, 33, [4, 11, 2]) == ap.results_of(detection, 33, [4, 11, 2])
        and len(references) == 5
    )
    drawn = pictures.draw_objects(photo(), lazy, NAMES, 0.4)
    assert (
        drawn == pictures.draw_objects(photo(), detection, NAMES, 0.4)
        and len(references) == 5 + (detection["scores"] >= 0.4).sum()
    )


def test_objects_of_polygons_and_of_entries_without_masks_or_boxes():
    image = {"id": 3, "height": 20, "width": 30}
    box = {"image_id": 3, "category_id": 5, "bbox": [2, 4, 10, 8]}
    objects = ap.objects_of([box | {"segmentation": [[2, 4, 12, 4, 12, 12, 2, 12]]}, box], image, [1, 5])
    assert (
        objects["boxes"].tolist() == [[2, 4, 12, 12]] * 2
        and objects["labels"].tolist() == [2, 2]
        and "scores" not in objects
    )
    assert objects["masks"][0][4:12, 2:12].all() and [int(mask.sum()) for mask in objects["masks"]] == [80, 0]
    bare = {
        "image_id": 3,
        "category_id": 5,
        "segmentation": encoded(objects["masks"][0].numpy()),
        "score": 0.5,
    }
    assert ap.objects_of([bare], image, [1, 5])["boxes"].tolist() == [[2, 4, 12, 12]]


def test_a_file_of_results_scores_the_same(random_set, tmp_path):
    truth, results = random_set
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    for kind in ("bbox", "segm"):
        assert ap.evaluate(truth, ap.load_results(path, truth), kind) == ap.evaluate(truth, results, kind)


@pytest.mark.parametrize("form", ["polygons", "plain run lengths", "compressed run lengths"])
def test_every_form_of_a_mask_in_a_file_is_read(form, tmp_path):
    box, mask = [4, 3, 20, 10], np.zeros((40, 40), np.uint8, "F")
    mask[3:13, 4:24] = 1
    shape = {
        "polygons": [[4, 3, 24, 3, 24, 13, 4, 13]],
        "plain run lengths": {"size": [40, 40], "counts": [163, *[10, 30] * 19, 10, 667]},
        "compressed run lengths": encoded(mask),
    }[form]
    path = tmp_path / "results.json"
    path.write_text(
        json.dumps([{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.5, "segmentation": shape}])
    )
    [loaded] = ap.load_results(path, toy())
    assert loaded["segmentation"] == encoded(mask)


def test_the_kinds_of_scores_depend_on_the_fields_of_the_results():
    box, mask = {"bbox": [0, 0, 1, 1]}, {"segmentation": encoded(np.ones((2, 2)))}
    nothing = {"bbox": None, "segmentation": None}
    assert ap.kinds_of([]) == ap.kinds_of([box | mask]) == ["bbox", "segm"]
    assert ap.kinds_of([box | mask, nothing | box]) == ap.kinds_of([box]) == ["bbox"]
    assert ap.kinds_of([mask | box, mask]) == ["segm"]
    with pytest.raises(DataError, match="neither boxes nor masks can be scored"):
        ap.kinds_of([mask, box])


TEXT = encoded(np.eye(40))["counts"]


@pytest.mark.parametrize(
    "counts",
    [
        TEXT[:-1],
        TEXT[1:],
        TEXT[:20] + "o" + TEXT[21:],
        "oooooooo",
        "",
        "a word",
        "caf\u00e9",
        TEXT + "\ud800",
        [1600, 1],
        [-1, 1601],
        [1600.0],
        [True] * 1600,
        ["1600"],
        [],
        1600.0,
        None,
        -1,
        {},
    ],
)
def test_damaged_run_lengths_are_reported_before_they_are_decoded(tmp_path, counts):
    assert_refused(
        tmp_path,
        {"segmentation": {"size": [40, 40], "counts": counts}},
        "run lengths that do not fit the image; .* 40 high",
    )


def assert_refused(tmp_path, change, message):
    fine = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}
    path = tmp_path / "results.json"
    path.write_text(
        json.dumps(
            [
                fine | {"segmentation": encoded(np.eye(40))},
                fine | change if isinstance(change, dict) else change,
            ]
        )
    )
    with pytest.raises(DataError, match=rf"^entry 1 of the results .*results.json .*{message}.*$") as e:
        ap.load_results(path, toy())
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "is not an object"),
        ({"image_id": "x"}, "image_id, not 'x'"),
        ({"category_id": True}, "category_id, not True"),
        ({"score": None}, "score, not None"),
        ({"score": float("nan")}, "score, not nan"),
        ({"bbox": [1, 2, 3]}, "four finite numbers"),
        ({"bbox": [0, 0, -1, 2]}, "four finite numbers"),
        ({"bbox": None}, "neither"),
        ({"segmentation": "abc"}, "run lengths"),
        ({"score": 10**400}, "finite number as score"),
        ({"image_id": 99}, "is of image 99"),
        ({"segmentation": []}, "an empty"),
        ({"segmentation": [[]]}, "an empty"),
        ({"segmentation": {}}, "an empty"),
        ({"segmentation": False}, "an empty"),
        ({"segmentation": [1, 2, 3, 4, 5, 6]}, "polygons that are not lists"),
        ({"segmentation": [[0, 0, 9, 0, 9, 1e9]]}, "far outside"),
        ({"segmentation": {"size": [40, 40]}}, "neither polygons nor run lengths"),
        ({"segmentation": 7}, "neither polygons nor run"),
        *(
            (
                {"segmentation": {"size": size, "counts": TEXT}},
                "another size than their image; its image is 40 high and 40 wide",
            )
            for size in ([40], [41, 40], [-40, -40], [40, 40, 1], ["40", "40"], None, 40, {})
        ),
    ],
)
def test_invalid_results_are_named(tmp_path, entry, message):
    assert_refused(tmp_path, entry, message)


def test_results_of_another_set_are_rejected(tmp_path):
    path = tmp_path / "r.json"
    for text, message in (
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "must be a list"),
        (None, "cannot read"),
    ):
        if text:
            path.write_text(text)
        with pytest.raises(DataError, match=message):
            ap.load_results(path if text else tmp_path / "none.json", toy())
    truth, fine = toy(), guess(1, 1, [0, 0, 10, 10], 0.5)
    cases = {
        "of image 99": ("bbox", fine | {"image_id": 99}),
        "of category 9; .* .1, 2": ("bbox", fine | {"category_id": 9}),
        "no segmentation": ("segm", {k: v for k, v in fine.items() if k != "segmentation"}),
        "is .41, 40. high and wide, its image 1 is .40, 40": (
            "segm",
            fine | {"segmentation": encoded(np.zeros((41, 40)))},
        ),
    }
    for message, (kind, entry) in cases.items():
        with pytest.raises(DataError, match=f"result 1 .*{message}"):
            ap.evaluate(truth, [fine, entry], kind)


def test_missing_libraries_are_reported_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert ap.library().name == "faster" and ap.evaluate(toy(), []).backend == "faster"
    monkeypatch.setattr(ap.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'rcmae\[coco\]'"):
        ap.evaluate(toy(), [])


# --- pictures and figures -----------------------------------------------------------------------------------

NAMES = ["cat", "fire hydrant", "dog"]


def photo(h: int = 40, w: int = 60, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (h, w, channels), dtype=np.uint8)


def bare(pixels: np.ndarray, **changes) -> np.ndarray:
    return np.asarray(pictures.draw(pixels, np.zeros((0, 4), np.float32), [], [], **changes))


@pytest.mark.parametrize(
    ("size", "scale", "limits"), [((40, 60), 10, {}), ((600, 900), 1, {}), ((600, 900), 0.4, {"most": 360})]
)
def test_drawing_changes_only_boxes_masks_and_labels(size, scale, limits, monkeypatch):
    spots = {}
    places = pictures.label_places
    monkeypatch.setattr(pictures, "label_places", lambda *args: spots.update(places(*args)) or spots)
    pixels, unit = photo(*size), size[0] / 40
    boxes = np.array([[5, 3, 20, 22], [30, 10, 59, 39.5], [-4, 30, 12, 44]], np.float32) * unit
    masks = np.zeros((3, *size), bool)
    masks[1, round(12 * unit) : round(20 * unit), round(35 * unit) : round(50 * unit)] = True
    colors = [pictures.color_of(k) for k in (1, 2, 3)]
    plain, drawn = (
        bare(pixels, **limits),
        np.asarray(pictures.draw(pixels, boxes, [*NAMES[:2], ""], colors, masks, **limits)),
    )
    assert drawn.shape == (round(size[0] * scale), round(size[1] * scale), 3) == plain.shape
    assert sorted(spots) == [0, 1], "no label without a text"
    allowed = np.zeros(drawn.shape[:2], bool)
    for x0, y0, x1, y1 in spots.values():
        assert 0 <= x0 < x1 < drawn.shape[1] and 0 <= y0 < y1 < drawn.shape[0]
        allowed[y0 : y1 + 1, x0 : x1 + 1] = True
        assert (drawn[y0 : y1 + 1, x0 : x1 + 1] != plain[y0 : y1 + 1, x0 : x1 + 1]).any(2).mean() > 0.95
    for box in boxes * scale:
        x0, y0, x1, y1 = (
            min(max(0, round(float(v))), side) for v, side in zip(box, [*drawn.shape[1::-1]] * 2, strict=True)
        )
        rim = np.zeros_like(allowed)
        rim[max(0, y0 - 2) : y1 + 2, max(0, x0 - 2) : x1 + 2] = True
        rim[y0 + 6 : y1 - 6, x0 + 6 : x1 - 6] = False
        allowed |= rim
    inside = np.asarray(Image.fromarray(masks[1]).resize(drawn.shape[1::-1], Image.Resampling.NEAREST))
    changed = (drawn != plain).any(2)
    assert not changed[~allowed & ~inside].any()
    core = inside & ~allowed
    assert core.sum() > 500 and changed[core].mean() > 0.95
    x0, y0, x1, y1 = np.round(boxes[1] * scale).astype(int)
    assert (drawn[y0 + 20 : y1 - 20, x0] == colors[1]).all() and (
        drawn[y0 + 20 : y1 - 20, x1 - 1] == colors[1]
    ).all()


def test_labels_stay_inside_the_picture_and_do_not_overlap():
    draws, size = np.random.default_rng(0), (640, 480)
    for _ in range(30):
        corners = draws.uniform(-20, 600, (6, 2))
        boxes = [tuple(int(v) for v in (*c, *(c + draws.uniform(5, 200, 2)))) for c in corners]
        spots = list(pictures.label_places(boxes, [(90, 16)] * 6, size).values())
        assert all(
            min(x0, y0) >= 0 and x1 < 640 and y1 < 480 and (x1 - x0, y1 - y0) == (89, 15)
            for x0, y0, x1, y1 in spots
        )
    same = list(pictures.label_places([(100, 100, 300, 300)] * 6, [(90, 16)] * 6, size).values())
    coverage = np.zeros((480, 640), int)
    for x0, y0, x1, y1 in same:
        coverage[y0 : y1 + 1, x0 : x1 + 1] += 1
    assert coverage.max() == 1, "six labels at one box have room"
    assert pictures.label_places([(100, 100, 300, 300)], [(90, 16)], size)[0] == (100, 84, 189, 99), (
        "above the box, left-aligned"
    )
    assert pictures.label_places([(600, 0, 640, 90)], [(90, 16)], size)[0] == (550, 0, 639, 15), (
        "in the corner"
    )


def test_the_most_confident_detection_is_on_top_and_unconfident_ones_are_left_out():
    pixels, box = photo(), torch.tensor([[10.0, 10, 50, 30]] * 3)
    detection = {"boxes": box, "labels": torch.tensor([1, 2, 3]), "scores": torch.tensor([0.6, 0.9, 0.4])}
    drawn = np.asarray(pictures.draw_objects(pixels, detection, NAMES))
    assert tuple(drawn[200, 100]) == pictures.color_of(2)
    two = {k: v[:2] for k, v in detection.items()}
    assert (np.asarray(pictures.draw_objects(pixels, two, NAMES)) == drawn).all()
    assert (np.asarray(pictures.draw_objects(pixels, detection, NAMES, threshold=0.95)) == bare(pixels)).all()
    truth = {k: v for k, v in detection.items() if k != "scores"}
    assert tuple(np.asarray(pictures.draw_objects(pixels, truth, NAMES))[200, 100]) == pictures.color_of(1), (
        "the threshold does not apply to the ground truth"
    )


def test_class_colors_are_distinct_and_contrast_with_black_text():
    colors = [pictures.color_of(k) for k in range(1, 13)]
    assert pictures.color_of(13) == colors[0]
    assert min(np.abs(np.subtract(a, b)).max() for i, a in enumerate(colors) for b in colors[:i]) >= 40

    def light(color):  # relative luminance as in WCAG 2
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in np.array(color) / 255]
        return np.dot([0.2126, 0.7152, 0.0722], linear)

    assert all((light(c) + 0.05) / 0.05 > 4.5 for c in colors), "at least 4.5 : 1, the minimum for text"


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_truth_and_detections_are_shown_side_by_side(channels):
    picture, instances = scene(0, "test", 1, 64)
    pixels = np.concatenate([picture] * 2, 2)[:48, :, :channels]
    boxes = torch.tensor([i.box for i in instances], dtype=torch.float32)
    boxes[:, 2:] += boxes[:, :2]
    labels, masks = (
        torch.tensor([i.label + 1 for i in instances]),
        torch.from_numpy(np.stack([i.mask[:48] for i in instances])),
    )
    truth = {"boxes": boxes, "labels": labels, "masks": masks}
    detections = truth | {"scores": torch.full((len(labels),), 0.75)}
    names = [str(d) for d in range(10)]
    sheet = pictures.side_by_side(pixels, truth, detections, names)
    assert sheet.size == (2 * 384 + 8, 32 + 288)
    pair = [pictures.draw_objects(pixels, objects, names, least=384) for objects in (truth, detections)]
    assert pair[0] != pair[1]
    for k, image in enumerate(pair):
        assert (np.asarray(sheet)[32:, k * 392 : k * 392 + 384, :3] == np.asarray(image)).all()
    assert np.asarray(sheet)[-1, 387, 3] == 0, "the background is transparent"
    uri = data_uri(sheet, "webp", quality=85)
    assert uri.startswith("data:image/webp;base64,") and len(uri) < 100_000
    again = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    assert np.abs(again[32:, :384, :3] - np.asarray(pair[0], float)).mean() < 12


def test_a_picture_is_saved_or_the_reason_is_given(tmp_path):
    target = tmp_path / "b.png"
    pictures.save_picture(photo(), detection_of(), NAMES, target, threshold=0.1)
    expected = pictures.draw_objects(photo(), detection_of(), NAMES, 0.1)
    assert (np.asarray(Image.open(target)) == np.asarray(expected)).all() and expected.size == (600, 400)
    for to, kind in ((tmp_path / "c.txt", ConfigError), (tmp_path / "none" / "c.png", StorageError)):
        with pytest.raises(kind, match=r"^cannot write [^\n]+$"):
            pictures.save_picture(photo(), detection_of(), NAMES, to)


@pytest.mark.usefixtures("drawn")
def test_figures_show_boxes_and_masks(random_set):
    truth, results = random_set
    svg = pictures.curve_figure(
        {part: ap.evaluate(truth, results, kind) for part, kind in (("box", "bbox"), ("mask", "segm"))}
    )
    assert (
        all(f"{what}, IoU {iou}" in svg for what in ("boxes", "masks") for iou in ("0.5", "0.75"))
        and "recall" in svg
    )
    nothing = pictures.curve_figure({"box": ap.evaluate(truth | {"annotations": []}, [])})
    assert "precision" in nothing and "IoU" not in nothing
    svg = pictures.progress_figure(
        [{"step": 10, "box AP": 10.0, "mask AP": None}, {"step": 20, "box AP": 30.0, "mask AP": 20.0}]
    )
    assert "boxes" in svg and "masks" in svg and "AP, %" in svg and ">30<" in svg
    assert "masks" not in pictures.progress_figure(
        [{"step": 10, "box AP": 10.0}, {"step": 20, "box AP": 30.0}]
    )
