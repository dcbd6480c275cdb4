"""`report.html` of a detector: precision, training, and its errors. Also pictures of its detections on any
image."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from safetensors import SafetensorError
from torch import Tensor

from ..config import check, how_many
from ..data.decode import BadImage, decode
from ..engine import distributed
from ..engine.distributed import World
from ..engine.metrics import of_kind, read_metrics
from ..engine.run import read_json, translate_errors
from ..errors import CheckpointError, ConfigError, DataError
from ..methods.diagnostics import Sentence
from ..tasks.detection.average_precision import Precision
from ..tasks.detection.examples import read_examples
from ..tasks.detection.files import load_detector
from ..tasks.detection.predict import images_scored
from ..tasks.detection.settings import load_detect
from ..tasks.detection.views import fit
from ..tasks.evaluation.base import ReadingOptions
from .build import failure_sentences, heading, rate_figures, state, template
from .curves import Line, column, plot
from .detection_figures import curve_figure, progress_figure, save_picture, side_by_side
from .files import bad_files
from .pictures import data_uri

LOSSES = {
    "loss_objectness": "proposals: objectness",
    "loss_rpn_box_reg": "proposals: box",
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
}
UNSCORED: Sentence = (
    "note",
    "The loss of a detector tells little about its precision, which is measured at the end.",
)
COLORS = ("baseline", "memory1", "student", "teacher", "gold")


def render(run: Path, running: bool) -> str:
    recipe, lines = load_detect(str(run / "recipe.toml")), read_metrics(run)
    machine, scores = (read_json(run / name) for name in ("machine.json", "scores.json"))
    train, val, events = (of_kind(lines, kind) for kind in ("train", "val", "event"))
    parts: dict[str, Precision] = {
        name: Precision(**scores[name]) for name in ("box", "mask") if name in scores
    }
    losses = [
        Line(name, color, column(train, "step"), column(train, key))
        for (key, name), color in zip(LOSSES.items(), COLORS, strict=True)
    ]
    about = machine.get("about", {})
    bad, bad_test = (bad_files(run / name) for name in ("bad_files.jsonl", "bad_test_files.jsonl"))
    sentences = verdict(scores, parts) or [state(train, machine.get("steps"), running), UNSCORED]
    sentences += failure_sentences(train, bad, bad_test)
    return template("detect.html.j2").render(
        title=f"Object detection in {about.get('data_name', 'images')}, with "
        f"{about.get('backbone_name', 'a backbone')}",
        **heading(run, recipe, machine, train, bad),
        parts=parts,
        verdict=sentences,
        curves=curve_figure(parts) if parts else None,
        progress=progress_figure(val) if len(val) > 1 else None,
        losses=plot(losses, ylabel="loss") if train else None,
        rates=rate_figures(train, events, recipe.schedule),
        pictures=_pictures(run),
        events=events[-20:],
        bad_test=bad_test,
    )


def verdict(scores: dict[str, Any], parts: dict[str, Precision]) -> list[Sentence]:
    """Sentences about the precision and the hardest class of a finished run; empty for another one."""
    if not parts:
        return []
    box, mask = (parts[name].stats for name in ("box", "mask"))
    text = (
        f"Finished: box AP {_percent(box['AP'])}, mask AP {_percent(mask['AP'])} on "
        f"{images_scored(scores['test_images'], len(scores.get('unreadable', [])))}."
    )
    sentences = [("good", text)]
    text = (
        f"At an overlap (IoU) of 0.5, box AP50 is {_percent(box['AP50'])} and mask AP50 "
        f"{_percent(mask['AP50'])}; of all objects {_percent(mask['AR100'])} % are found by masks on average."
    )
    sentences.append(("note", text))
    known = {name: ap for name, ap in parts["mask"].per_class.items() if ap is not None}
    if len(known) > 1:
        hardest = min(known, key=known.__getitem__)
        count = (parts["mask"].objects or {}).get(hardest)
        of = f" on {how_many(count, 'object')}" if count else ""
        text = f"The hardest of {len(known)} classes is {hardest} (mask AP {_percent(known[hardest])}{of})."
        sentences.append(("note", text))
    return sentences


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _pictures(run: Path) -> dict[str, list[str]]:
    """A picture for each example, by kind. Raises CheckpointError for examples that cannot be read."""
    file = run / "examples.safetensors"
    if not file.exists():
        return {}
    try:
        classes, examples = read_examples(file)
    except (LookupError, TypeError, ValueError, SafetensorError) as e:
        raise CheckpointError(
            f"{file} is of an earlier version or damaged; the same `rcmae detect train` writes it again, and "
            "without it the page has no pictures"
        ) from e
    return {
        kind: [data_uri(side_by_side(*example, classes), "webp", quality=85) for example in chosen]
        for kind, chosen in examples.items()
    }


class Shown(NamedTuple):
    """A picture of `show_detections`, and the scores of all detections in descending order."""

    path: Path
    scores: list[float]


def show_detections(
    checkpoint: Path,
    images: Sequence[Path],
    out: Path,
    threshold: float = 0.5,
    device: str = "auto",
    reading: ReadingOptions = ReadingOptions(),
) -> Iterator[Shown]:
    """Write pictures with boxes, masks, classes and scores of at least `threshold`, one after the other.

    Raises the errors of `rcmae.errors`; DataError for unreadable images after all others are written.
    """
    if not 0 <= threshold <= 1:
        raise ConfigError(f"threshold must lie in 0 to 1, not {threshold:g}")
    check(reading)
    target = distributed.pick_device(device)
    loaded = load_detector(checkpoint)
    names = [f"{image.stem}.png" for image in images]
    if repeated := {name for name in names if names.count(name) > 1}:
        names = [f"{number:03d}-{name}" if name in repeated else name for number, name in enumerate(names)]
    out.mkdir(parents=True, exist_ok=True)
    channels = cast(Tensor, loaded.model.mean).shape[1]
    bits = loaded.about.get("bits") if reading.range == "data" else None
    bad = []
    for image, name in zip(images, names, strict=True):
        try:
            pixels = decode(image.read_bytes(), channels, int(reading.max_pixels), bits=bits or 16)
        except (OSError, BadImage) as e:
            bad.append(f"{image}: {getattr(e, 'strerror', None) or e}")
            continue
        with translate_errors(target, World(), "try --device cpu"):
            model = loaded.model.to(target)
            [detected] = model.detect([fit(pixels, loaded.settings.size).to(target)], [pixels.shape[:2]])
        save_picture(pixels, detected, loaded.classes, out / name, threshold)
        yield Shown(out / name, detected["scores"].tolist())
    if bad:
        raise DataError(f"cannot read the image {'; '.join(bad)}")
