"""COCO's average precision of boxes and of masks, and the images in which a detector errs most."""

import contextlib
import importlib
import importlib.util
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from ...engine.metrics import optional
from ...errors import DataError
from .coco import is_number, run_length_code
from .masks import Masks

Kind = Literal["bbox", "segm"]
"What is compared: boxes or masks."

Backend = Literal["auto", "faster", "pycocotools"]

STATS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")
"COCO's twelve numbers in its own order: precision and recall over IoU 0.5 to 0.95; of 1, 10 or 100 detections an image; by size."

BOUNDS = (32.0**2, 96.0**2)
"Areas in pixels between small, medium and large objects: COCO's, made for its images."

TYPICAL = 640 * 480
"Area of the images that BOUNDS were made for: most of COCO's are 640 x 480."

SMALL = TYPICAL / 4
"Median area of images (320 x 240) below which the bounds scale with it: at 128 x 128 hardly an object is large by COCO's."


class Precision(NamedTuple):
    """What `evaluate` found; JSON can hold its `_asdict()`. None, and never COCO's -1, stands where there is no object to find."""

    kind: Kind
    stats: dict[str, float | None]
    "STATS by name, 0 to 1"
    per_class: dict[str, float | None]
    "AP by the category's name"
    curves: dict[str, list[float]]
    'precision at recall 0, 0.01, ... 1 by IoU ("0.5", "0.75"), the mean over the classes that have objects; empty without any'
    areas: Literal["coco", "relative"]
    "whose bounds between small, medium and large: COCO's own, or those scaled by the images' median area"
    bounds: tuple[float, float]
    "these bounds in pixels"
    backend: Literal["faster", "pycocotools"]


class Misses(NamedTuple):
    """The errors in one image, as places in the lists that were given."""

    image_id: int
    missed: list[int]
    "of truth's annotations: objects that no detection found"
    false: list[int]
    "of the results: detections that are of no object, or of one that a more certain detection had found; the most certain first"


class Library(NamedTuple):
    """The three parts that both libraries have."""

    name: str
    coco: Any
    evaluation: Any
    mask: Any


def library(backend: Backend = "auto") -> Library:
    """faster-coco-eval ("faster"; the same numbers sooner) or pycocotools; "auto": the first that is installed. Raises ConfigError."""
    if backend == "auto":
        backend = "faster" if importlib.util.find_spec("faster_coco_eval") else "pycocotools"
    if backend == "faster":
        core = optional("faster_coco_eval", "coco").core
        return Library(backend, core.coco.COCO, core.faster_eval_api.COCOeval_faster, core.mask)
    optional("pycocotools", "coco")
    coco, evaluation, mask = (importlib.import_module(f"pycocotools.{part}") for part in ("coco", "cocoeval", "mask"))
    return Library(backend, coco.COCO, evaluation.COCOeval, mask)


# --- results ----------------------------------------------------------------------------------------------------------


def results_of(detection: Mapping[str, Any], image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """The detections of one image as COCO results: plain values that JSON holds, none of them rounded.

    `detection`: boxes Float "m 4" as x0 y0 x1 y1 in pixels of the original image, labels Int "m", scores Float "m", and m masks Bool "H W"
    at the original size, which are looked at one after the other. Label k is the category `category_ids[k - 1]`. A mask becomes
    compressed run lengths as text.
    """
    labels, scores, corners = detection["labels"].tolist(), detection["scores"].tolist(), detection["boxes"].detach().cpu().double()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    encode = library().mask.encode
    masks = (encode(np.asfortranarray(mask.cpu().numpy(), np.uint8)) for mask in detection["masks"])
    return [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score,
         "segmentation": {"size": list(mask["size"]), "counts": mask["counts"].decode("ascii")}}
        for label, box, score, mask in zip(labels, boxes.tolist(), scores, masks, strict=True)
    ]  # fmt: skip


def objects_of(entries: Sequence[Mapping[str, Any]], image: Mapping[str, Any], category_ids: Sequence[int]) -> dict[str, Any]:
    """The way back, of the annotations or the results of one `image` of the truth: boxes, labels, scores where there are, and `Masks`.

    An entry without a mask has an empty one, an entry without a box its mask's.
    """
    api = library()
    with contextlib.redirect_stdout(io.StringIO()):
        coco = _indexed(api, {"images": [image], "categories": []}, [{**e, "id": n} for n, e in enumerate(entries, 1)])
    h, w = image["height"], image["width"]
    rles = [coco.annToRLE(e) if "segmentation" in e else api.mask.encode(np.zeros((h, w), np.uint8, "F")) for e in coco.anns.values()]
    found = [e["bbox"] if "bbox" in e else api.mask.toBbox(rle).tolist() for e, rle in zip(entries, rles, strict=True)]
    boxes = torch.tensor(found, dtype=torch.float32).reshape(-1, 4)
    objects: dict[str, Any] = {
        "boxes": torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
        "labels": torch.tensor([1 + category_ids.index(e["category_id"]) for e in entries], dtype=torch.int64),
        "masks": Masks(rles, lambda rle: torch.from_numpy(api.mask.decode(rle) > 0)),
    }
    return objects | ({"scores": torch.tensor([e["score"] for e in entries])} if all("score" in e for e in entries) else {})


def load_results(path: Path, truth: Mapping[str, Any]) -> list[dict[str, Any]]:
    """COCO results from a JSON file, with masks as compressed run lengths of the size that the image has in `truth`.

    Raises DataError that names the first entry that is no result: damaged run lengths would hang or crash the libraries.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise DataError(f"cannot read the results {path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"the results {path} are not JSON: {e}") from e
    if not isinstance(entries, list):
        raise DataError(f"the results {path} must be a list of detections as COCO's are, not a JSON {type(entries).__name__}")
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    for n, entry in enumerate(entries):
        if fault := _fault(entry, sizes):
            raise DataError(f"entry {n} of the results {path} {fault}")
        if entry.get("segmentation") is not None:
            h, w = sizes[entry["image_id"]]
            try:
                code = run_length_code(entry["segmentation"], h, w)
            except ValueError as e:
                raise DataError(f"entry {n} of the results {path} has {e}; its image is {h} high and {w} wide") from e
            entry["segmentation"] = {"size": [h, w], "counts": code.decode()}
    return entries


def kinds_of(results: Sequence[Mapping[str, Any]]) -> list[Kind]:
    """On what they can be scored: of no results both, else what each of them has. Raises DataError when that is nothing."""
    found: list[Kind] = [kind for kind in get_args(Kind) if all(r.get(_shape(kind)) is not None for r in results)]
    if not found:
        raise DataError("some results have no bbox and others no segmentation, so neither boxes nor masks can be scored")
    return found


def _fault(entry: Any, sizes: Mapping[int, tuple[int, int]]) -> str | None:
    """What makes it no COCO result for images of these sizes, in words, but for its mask; None if it is one."""
    if not isinstance(entry, dict):
        return "is not an object with image_id, category_id, score and bbox or segmentation"
    for key in ("image_id", "category_id"):
        if type(entry.get(key)) is not int:
            return f"needs a whole number as {key}, not {entry.get(key)!r}"
    if entry["image_id"] not in sizes:
        return f"is of image {entry['image_id']}, which is not among the images that the annotations list"
    if not is_number(entry.get("score")):
        return f"needs a finite number as score, not {entry.get('score')!r}"
    box, shape = entry.get("bbox"), entry.get("segmentation")
    if box is None and shape is None:
        return "has neither bbox nor segmentation"
    if box is not None and not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box)) and min(box[2:]) >= 0):
        return f"needs a bbox of four finite numbers x, y, width and height, not {box!r}"
    if shape is not None and not (any(shape) if isinstance(shape, list) else shape):
        return "has an empty segmentation; leave it out, or give run lengths without a pixel"
    return None


# --- scores -----------------------------------------------------------------------------------------------------------


def evaluate(
    truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], kind: Kind = "bbox", backend: Backend = "auto",
    areas: Literal["auto", "coco", "relative"] = "auto",
) -> Precision:  # fmt: skip
    """COCO's average precision of `results` against the annotations `truth`, both as COCO has them; neither is changed.

    Masks are judged by masks alone: pycocotools takes a detection's size from its box if it has one, which moves AP by size.
    `areas`: bounds between small, medium and large objects: "coco", "relative" (scaled by the median area of the images, one
    scale for the whole set) or "auto" (relative below SMALL). Raises DataError for results that do not belong to the truth.
    """
    area = float(np.median([image["width"] * image["height"] for image in truth["images"]])) if truth["images"] else TYPICAL
    rule = areas if areas != "auto" else "relative" if area < SMALL else "coco"
    low, high = (bound * (area / TYPICAL if rule == "relative" else 1) for bound in BOUNDS)
    api = library(backend)
    with contextlib.redirect_stdout(io.StringIO()):  # both libraries tell what they do
        run = api.evaluation(*_opened(api, truth, results, kind), kind)
        run.params.areaRng = [[0, 1e10], [0, low], [low, high], [high, 1e10]]
        run.evaluate()
        run.accumulate()
        run.summarize()
    names = {category["id"]: category["name"] for category in truth["categories"]}
    precision = run.eval["precision"][..., 0, -1]  # IoU, recall, class; of all sizes and 100 detections; -1 for a class without objects
    known = precision[0, 0] > -1
    return Precision(
        kind=kind,
        stats={name: float(value) if value > -1 else None for name, value in zip(STATS, run.stats, strict=True)},
        per_class={names[c]: float(precision[..., k].mean()) if known[k] else None for k, c in enumerate(run.params.catIds)},
        curves={iou: precision[k][:, known].mean(1).tolist() if known.any() else [] for iou, k in (("0.5", 0), ("0.75", 5))},
        areas=rule, bounds=(low, high), backend=api.name,
    )  # fmt: skip


def misses(
    truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], kind: Kind = "bbox", threshold: float = 0.5, iou: float = 0.5
) -> list[Misses]:
    """The images with errors, the worst first: by the number of missed objects and the summed scores of false detections.

    Only detections of at least `threshold` count. As in COCO, the most certain choose first; each finds the object of its class, not
    found before, that it overlaps most and at least by `iou`; a crowd is never missed, and what lies in it is not false.
    """
    api = library()
    with contextlib.redirect_stdout(io.StringIO()):
        found, given = _opened(api, truth, results, kind)
    shape, worst = _shape(kind), []
    for image in truth["images"]:
        objects = found.imgToAnns[image["id"]]
        certain = sorted((d for d in given.imgToAnns[image["id"]] if d["score"] >= threshold), key=lambda d: -d["score"])
        overlaps = api.mask.iou([d[shape] for d in certain], [o[shape] for o in objects], [o["iscrowd"] for o in objects])
        seen, false = set(), []
        for d, overlap in zip(certain, overlaps if objects else [[]] * len(certain), strict=True):
            own = [
                (not o["iscrowd"], overlap[k], o["id"])
                for k, o in enumerate(objects)
                if o["category_id"] == d["category_id"] and overlap[k] >= iou and (o["iscrowd"] or o["id"] not in seen)
            ]
            if own:
                seen.add(max(own)[2])
            else:
                false.append(d)
        missed = [o["id"] - 1 for o in objects if not o["iscrowd"] and o["id"] not in seen]
        if missed or false:
            cost = len(missed) + sum(d["score"] for d in false)
            worst.append((cost, Misses(image["id"], missed, [d["id"] - 1 for d in false])))
    return [errors for _, errors in sorted(worst, key=lambda pair: -pair[0])]


def _shape(kind: Kind) -> str:
    return "bbox" if kind == "bbox" else "segmentation"


def _opened(api: Library, truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], kind: Kind) -> tuple[Any, Any]:
    """Truth and results as objects of the library, copied with only what `kind` needs, and with masks as run lengths.

    Both are numbered from 1 by their place: an annotation of id 0 would count as never found. Raises DataError.
    """
    sizes = {image["id"]: [image["height"], image["width"]] for image in truth["images"]}
    categories, shape = {category["id"] for category in truth["categories"]}, _shape(kind)
    for name, entries in (("annotation", truth["annotations"]), ("result", results)):
        for n, e in enumerate(entries):
            if e["image_id"] not in sizes:
                raise DataError(f"{name} {n} is of image {e['image_id']}, which is not among the images that the annotations list")
            if e["category_id"] not in categories:
                raise DataError(f"{name} {n} is of category {e['category_id']}; the annotations list the categories {sorted(categories)}")
            if e.get(shape) is None:
                raise DataError(f"{name} {n} has no {shape}, so {kind} cannot be scored")
    keep = ("image_id", "category_id", shape)
    objects = [
        {key: a[key] for key in (*keep, "area")} | {"id": n, "iscrowd": a.get("iscrowd", 0)} for n, a in enumerate(truth["annotations"], 1)
    ]
    found = [{key: r[key] for key in (*keep, "score")} | {"id": n, "iscrowd": 0} for n, r in enumerate(results, 1)]
    gt, dt = (_indexed(api, truth, entries) for entries in (objects, found))
    if kind == "segm":
        for coco, name in ((gt, "annotation"), (dt, "result")):
            for e in coco.anns.values():
                e[shape] = coco.annToRLE(e)
                size, own = list(e[shape]["size"]), sizes[e["image_id"]]
                if size != own:
                    raise DataError(f"the mask of {name} {e['id'] - 1} is {size} high and wide, its image {e['image_id']} is {own}")
    for r in found:
        r["area"] = float(api.mask.area(r[shape])) if kind == "segm" else r["bbox"][2] * r["bbox"][3]
    return gt, dt


def _indexed(api: Library, truth: Mapping[str, Any], entries: list[dict[str, Any]]) -> Any:
    """Entries as the library's COCO object. Its own way of loading results fails on an empty list."""
    coco = api.coco()
    coco.dataset = {key: [dict(x) for x in truth[key]] for key in ("images", "categories")} | {"annotations": entries}
    coco.createIndex()
    return coco
