"""COCO's average precision of boxes and masks, and the images with the most errors."""

import contextlib
import importlib
import importlib.util
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from ...engine.metrics import optional
from ...errors import DataError
from .annotations import is_number, whole
from .masks import Masks, run_length_code

Kind = Literal["bbox", "segm"]
"Boxes or masks, in COCO's terms."

Backend = Literal["auto", "faster", "pycocotools"]

STATS = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR1",
    "AR10",
    "AR100",
    "AR_small",
    "AR_medium",
    "AR_large",
)
"""COCO's twelve metrics in its order: average precision and recall over IoU 0.5 to 0.95, with at most 1, 10
or 100 detections per image, and by size."""

KINDS: dict[str, Kind] = {"box": "bbox", "mask": "segm"}
"The two kinds by their names in files and messages."

BOUNDS = (32.0**2, 96.0**2)
"COCO's areas in pixels between small, medium and large objects, made for its images."

TYPICAL = 640 * 480
"Area of the images that BOUNDS were made for: most of COCO's images have 640 x 480 pixels."

SMALL = TYPICAL / 4
"""Median area of images (320 x 240) below which the bounds are scaled: at 128 x 128, hardly any object is
large by COCO's bounds."""


class Precision(NamedTuple):
    """The result of `evaluate`; its `_asdict()` can be written as JSON. A metric without objects is None (not
    -1, as in COCO)."""

    kind: Kind
    stats: dict[str, float | None]
    "STATS by name, 0 to 1"
    per_class: dict[str, float | None]
    "AP by the category's name"
    curves: dict[str, list[float]]
    """precision at recall 0, 0.01, ... 1 by IoU ("0.5", "0.75"), averaged over the classes with objects;
    empty if there are none"""
    areas: Literal["coco", "relative"]
    "the bounds between small, medium and large: COCO's, or scaled by the images' median area"
    bounds: tuple[float, float]
    "these bounds in pixels"
    backend: Literal["faster", "pycocotools"]
    objects: dict[str, int] | None = None
    "objects by the category's name, without crowds; None in files of earlier versions"


class Misses(NamedTuple):
    """The errors in an image, as indices of the lists passed to `misses`."""

    image_id: int
    missed: list[int]
    "indices of the annotations of undetected objects"
    false: list[int]
    """indices of the results that match no object, or one that is matched by a more confident result; the
    most confident first"""


class Library(NamedTuple):
    """The common interface of both libraries."""

    name: Literal["faster", "pycocotools"]
    coco: Any
    evaluation: Any
    mask: Any


def library(backend: Backend = "auto") -> Library:
    """faster-coco-eval ("faster", with identical results) or pycocotools; "auto": faster-coco-eval if it is
    installed. Raises ConfigError."""
    if backend == "auto":
        backend = "faster" if importlib.util.find_spec("faster_coco_eval") else "pycocotools"
    if backend == "faster":
        core = optional("faster_coco_eval", "coco").core
        return Library(backend, core.coco.COCO, core.faster_eval_api.COCOeval_faster, core.mask)
    optional("pycocotools", "coco")
    coco, evaluation, mask = (
        importlib.import_module(f"pycocotools.{part}") for part in ("coco", "cocoeval", "mask")
    )
    return Library(backend, coco.COCO, evaluation.COCOeval, mask)


# --- results ------------------------------------------------------------------------------------------------


def results_of(
    detection: Mapping[str, Any], image_id: int, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """The detections in an image as COCO results: JSON values, without rounding.

    `detection`: boxes Float "m 4" as x0 y0 x1 y1 in pixels of the original image, labels Int "m", scores
    Float "m", and m masks Bool "h w" of the original size, which are accessed one at a time. Label k is the
    category `category_ids[k - 1]`. Masks are converted to compressed run lengths as text.
    """
    labels, scores, corners = (
        detection["labels"].tolist(),
        detection["scores"].tolist(),
        detection["boxes"].detach().cpu().double(),
    )
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    encode = library().mask.encode
    masks = (encode(np.asfortranarray(mask.cpu().numpy(), np.uint8)) for mask in detection["masks"])
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label - 1],
            "bbox": box,
            "score": score,
            "segmentation": {"size": list(mask["size"]), "counts": mask["counts"].decode("ascii")},
        }
        for label, box, score, mask in zip(labels, boxes.tolist(), scores, masks, strict=True)
    ]


def objects_of(
    entries: Sequence[Mapping[str, Any]], image: Mapping[str, Any], category_ids: Sequence[int]
) -> dict[str, Any]:
    """The reverse of `results_of`, for annotations or results of an `image` of the truth: boxes, labels,
    `Masks`, and scores if all entries have them.

    An entry without a mask gets an empty one, an entry without a box the box of its mask.
    """
    api = library()
    with contextlib.redirect_stdout(io.StringIO()):
        coco = _indexed(
            api, {"images": [image], "categories": []}, [{**e, "id": n} for n, e in enumerate(entries, 1)]
        )
    h, w = image["height"], image["width"]
    rles = [
        coco.annToRLE(e) if "segmentation" in e else api.mask.encode(np.zeros((h, w), np.uint8, "F"))
        for e in coco.anns.values()
    ]
    boxes = torch.tensor(
        [
            e["bbox"] if "bbox" in e else api.mask.toBbox(rle).tolist()
            for e, rle in zip(entries, rles, strict=True)
        ],
        dtype=torch.float32,
    ).reshape(-1, 4)  # [m, 4], also for m = 0
    objects: dict[str, Any] = {
        "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
        "labels": torch.tensor(
            [1 + category_ids.index(e["category_id"]) for e in entries], dtype=torch.int64
        ),
        "masks": Masks(rles, lambda rle: torch.from_numpy(api.mask.decode(rle) > 0)),
    }
    if all("score" in e for e in entries):
        objects["scores"] = torch.tensor([e["score"] for e in entries])
    return objects


def load_results(path: Path, truth: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Load COCO results from a JSON file, with masks as compressed run lengths of the image sizes in `truth`.

    Raises DataError for the first invalid entry: damaged run lengths would hang or crash the libraries.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise DataError(f"cannot read the results {path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"the results {path} are not JSON: {e}") from e
    if not isinstance(entries, list):
        raise DataError(
            f"the results {path} must be a list of detections as COCO's are, not a JSON "
            f"{type(entries).__name__}"
        )
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    for n, entry in enumerate(entries):
        if isinstance(entry, dict):
            entry |= {key: whole(entry.get(key)) for key in ("image_id", "category_id")}
        if fault := _fault(entry, sizes):
            raise DataError(f"entry {n} of the results {path} {fault}")
        if entry.get("segmentation") is not None:
            h, w = sizes[entry["image_id"]]
            try:
                code = run_length_code(entry["segmentation"], h, w)
            except ValueError as e:
                raise DataError(
                    f"entry {n} of the results {path} has {e}; its image is {h} high and {w} wide"
                ) from e
            entry["segmentation"] = {"size": [h, w], "counts": code.decode()}
    return entries


def kinds_of(results: Sequence[Mapping[str, Any]]) -> list[Kind]:
    """The kinds that all results have; both if there are no results. Raises DataError if there is no such
    kind."""
    kinds: list[Kind] = [
        kind for kind in get_args(Kind) if all(r.get(_shape(kind)) is not None for r in results)
    ]
    if not kinds:
        raise DataError(
            "some results have no bbox and others no segmentation, so neither boxes nor masks can be scored"
        )
    return kinds


def _fault(entry: Any, sizes: Mapping[int, tuple[int, int]]) -> str | None:
    """Why an entry is no valid COCO result for images of these sizes, in words; None if it is valid. Run
    lengths are not checked."""
    if not isinstance(entry, dict):
        return "is not an object with image_id, category_id, score and bbox or segmentation"
    for key in ("image_id", "category_id"):
        if type(entry.get(key)) is not int:
            return f"needs an integer as {key}, not {entry.get(key)!r}"
    if entry["image_id"] not in sizes:
        return f"is of image {entry['image_id']}, which is not among the images that the annotations list"
    if not is_number(entry.get("score")):
        return f"needs a finite number as score, not {entry.get('score')!r}"
    box, shape = entry.get("bbox"), entry.get("segmentation")
    if box is None and shape is None:
        return "has neither bbox nor segmentation"
    if box is not None and not (
        isinstance(box, list) and len(box) == 4 and all(map(is_number, box)) and min(box[2:]) >= 0
    ):
        return f"needs a bbox of four finite numbers x, y, width and height, not {box!r}"
    if shape is not None and not (any(shape) if isinstance(shape, list) else shape):
        return "has an empty segmentation; leave it out, or give run lengths without a pixel"
    return None


# --- scores -------------------------------------------------------------------------------------------------


def evaluate(
    truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    kind: Kind = "bbox",
    backend: Backend = "auto",
    areas: Literal["auto", "coco", "relative"] = "auto",
) -> Precision:
    """COCO's average precision of `results` against the annotations `truth`, both in COCO's format; neither
    is modified.

    The size of a mask is its own area: pycocotools uses the box of a detection if there is one, which changes
    AP by size. `areas` sets the bounds between small, medium and large objects: "coco", "relative" (scaled by
    the median area of all images) or "auto" (relative below SMALL). Raises DataError for results that do not
    belong to the truth.
    """
    area = (
        float(np.median([image["width"] * image["height"] for image in truth["images"]]))
        if truth["images"]
        else TYPICAL
    )
    rule = areas if areas != "auto" else "relative" if area < SMALL else "coco"
    low, high = (bound * (area / TYPICAL if rule == "relative" else 1) for bound in BOUNDS)
    api = library(backend)
    with contextlib.redirect_stdout(io.StringIO()):  # both libraries print messages
        run = api.evaluation(*_opened(api, truth, results, kind), kind)
        run.params.areaRng = [[0, 1e10], [0, low], [low, high], [high, 1e10]]
        run.evaluate()
        run.accumulate()
        run.summarize()
    names = {category["id"]: category["name"] for category in truth["categories"]}
    counts = Counter(each["category_id"] for each in truth["annotations"] if not each.get("iscrowd"))
    # [IoU, recall, class] for all sizes and 100 detections; -1 for a class without objects
    precision = run.eval["precision"][..., 0, -1]
    known = precision[0, 0] > -1
    return Precision(
        kind=kind,
        stats={
            name: float(value) if value > -1 else None for name, value in zip(STATS, run.stats, strict=True)
        },
        per_class={
            names[c]: float(precision[..., k].mean()) if known[k] else None
            for k, c in enumerate(run.params.catIds)
        },
        curves={
            iou: precision[k][:, known].mean(1).tolist() if known.any() else []
            for iou, k in (("0.5", 0), ("0.75", 5))
        },
        areas=rule,
        bounds=(low, high),
        backend=api.name,
        objects={name: counts[category] for category, name in names.items()},
    )


def evaluate_all(
    truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    areas: Literal["auto", "coco", "relative"] = "auto",
) -> dict[str, Precision]:
    """`evaluate` for boxes and masks, as far as the results have them; by name."""
    kinds = kinds_of(results)
    return {
        name: evaluate(truth, results, kind, areas=areas) for name, kind in KINDS.items() if kind in kinds
    }


def misses(
    truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    kind: Kind = "bbox",
    threshold: float = 0.5,
    iou: float = 0.5,
) -> list[Misses]:
    """The images with errors, the worst first: by the number of missed objects plus the sum of the scores of
    false detections.

    Only detections with a score of at least `threshold` count. As in COCO, detections are matched in
    descending order of their scores, each with the unmatched object of its class that it overlaps most and at
    least by `iou`. Crowds are never missed, and detections in them are not false.
    """
    api = library()
    with contextlib.redirect_stdout(io.StringIO()):
        gt, dt = _opened(api, truth, results, kind)
    shape, errors = _shape(kind), []
    for image in truth["images"]:
        objects = gt.imgToAnns[image["id"]]
        detections = [d for d in dt.imgToAnns[image["id"]] if d["score"] >= threshold]
        detections.sort(key=lambda d: -d["score"])
        overlaps = api.mask.iou(
            [d[shape] for d in detections], [o[shape] for o in objects], [o["iscrowd"] for o in objects]
        )
        matched, false = set(), []
        for d, overlap in zip(detections, overlaps if objects else [[]] * len(detections), strict=True):
            candidates = [
                (not o["iscrowd"], overlap[k], o["id"])
                for k, o in enumerate(objects)
                if o["category_id"] == d["category_id"]
                and overlap[k] >= iou
                and (o["iscrowd"] or o["id"] not in matched)
            ]
            if candidates:
                matched.add(max(candidates)[2])
            else:
                false.append(d)
        missed = [o["id"] - 1 for o in objects if not o["iscrowd"] and o["id"] not in matched]
        if missed or false:
            cost = len(missed) + sum(d["score"] for d in false)
            errors.append((cost, Misses(image["id"], missed, [d["id"] - 1 for d in false])))
    return [of_image for _, of_image in sorted(errors, key=lambda pair: -pair[0])]


def _shape(kind: Kind) -> str:
    return "bbox" if kind == "bbox" else "segmentation"


def _opened(
    api: Library, truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], kind: Kind
) -> tuple[Any, Any]:
    """Truth and results as COCO objects of the library: copies of the entries that `kind` needs, with masks
    as run lengths.

    Both are numbered from 1 in order, because the libraries count an annotation with id 0 as never detected.
    Raises DataError.
    """
    sizes = {image["id"]: [image["height"], image["width"]] for image in truth["images"]}
    categories, shape = {category["id"] for category in truth["categories"]}, _shape(kind)
    for name, entries in (("annotation", truth["annotations"]), ("result", results)):
        for n, e in enumerate(entries):
            if e["image_id"] not in sizes:
                raise DataError(
                    f"{name} {n} is of image {e['image_id']}, which is not among the images that the "
                    "annotations list"
                )
            if e["category_id"] not in categories:
                raise DataError(
                    f"{name} {n} is of category {e['category_id']}; the annotations list the categories "
                    f"{sorted(categories)}"
                )
            if e.get(shape) is None:
                raise DataError(f"{name} {n} has no {shape}, so {kind} cannot be scored")
    keep = ("image_id", "category_id", shape)
    objects = [
        {key: a[key] for key in (*keep, "area")} | {"id": n, "iscrowd": a.get("iscrowd", 0)}
        for n, a in enumerate(truth["annotations"], 1)
    ]
    detections = [
        {key: r[key] for key in (*keep, "score")} | {"id": n, "iscrowd": 0} for n, r in enumerate(results, 1)
    ]
    gt, dt = (_indexed(api, truth, entries) for entries in (objects, detections))
    if kind == "segm":
        for coco, name in ((gt, "annotation"), (dt, "result")):
            for e in coco.anns.values():
                e[shape] = coco.annToRLE(e)
                size, image_size = list(e[shape]["size"]), sizes[e["image_id"]]
                if size != image_size:
                    raise DataError(
                        f"the mask of {name} {e['id'] - 1} is {size} high and wide, its image "
                        f"{e['image_id']} is {image_size}"
                    )
    for r in detections:
        r["area"] = float(api.mask.area(r[shape])) if kind == "segm" else r["bbox"][2] * r["bbox"][3]
    return gt, dt


def _indexed(api: Library, truth: Mapping[str, Any], entries: list[dict[str, Any]]) -> Any:
    """Entries as the library's COCO object. (Its function for loading results fails on an empty list.)"""
    coco = api.coco()
    coco.dataset = {key: [dict(x) for x in truth[key]] for key in ("images", "categories")} | {
        "annotations": entries
    }
    coco.createIndex()
    return coco
