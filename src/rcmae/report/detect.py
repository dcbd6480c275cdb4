"""`report.html` of a detector: how well it finds, how that came, what it missed. And pictures of what it finds on any image."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config import flat, recipe_hash
from ..data.decode import BadImage, decode
from ..engine import distributed
from ..engine.distributed import World
from ..engine.metrics import read_metrics
from ..engine.run import plain_failures, read_json
from ..errors import ConfigError, DataError
from ..tasks.detection.average_precision import Precision
from ..tasks.detection.examples import read_examples
from ..tasks.detection.files import load_detector
from ..tasks.detection.settings import load_detect
from ..tasks.detection.views import fit
from .build import failure_sentences, rate_figures, template
from .curves import Line, column, plot
from .detections import curve_figure, embedded, progress_figure, save_picture, side_by_side
from .files import bad_files

LOSSES = {
    "loss_objectness": "proposals: is it one", "loss_rpn_box_reg": "proposals: where", "loss_classifier": "class", "loss_box_reg": "box",
    "loss_mask": "mask",
}  # fmt: skip
COLOURS = ("floor", "memory1", "student", "teacher", "gold")


def render(run: Path) -> str:
    """The page as text."""
    recipe, lines = load_detect(str(run / "recipe.toml")), read_metrics(run)
    machine, scores = (read_json(run / name) for name in ("machine.json", "scores.json"))
    train, val, events = ([line for line in lines if line.get("kind") == kind] for kind in ("train", "val", "event"))
    parts = {name: Precision(**scores[name]) for name in ("box", "mask") if name in scores}
    losses = [
        Line(name, colour, column(train, "step"), column(train, key)) for (key, name), colour in zip(LOSSES.items(), COLOURS, strict=True)
    ]
    about = machine.get("about", {})
    bad, bad_test = (bad_files(run / name) for name in ("bad_files.jsonl", "bad_test_files.jsonl"))
    said = verdict(scores, parts, train, machine.get("steps")) + failure_sentences(train, bad, bad_test)
    return template("detect.html.j2").render(
        title=f"Objects in {about.get('data_name', 'images')}, by {about.get('backbone_name', 'a backbone')}",
        run=run.resolve().name, path=run.as_posix(), step=train[-1]["step"] if train else 0, total=machine.get("steps"),
        recipe=flat(recipe), recipe_hash=recipe_hash(recipe), machine=machine, parts=parts, said=said,
        curves=curve_figure(parts) if parts else None, progress=progress_figure(val) if len(val) > 1 else None,
        losses=plot(losses, ylabel="loss") if train else None, rates=rate_figures(train, recipe.schedule), pictures=_pictures(run),
        events=events[-20:], bad=bad, bad_test=bad_test,
    )  # fmt: skip


def verdict(scores: dict[str, Any], parts: dict[str, Precision], train: list[dict[str, Any]], total: int | None) -> list[tuple[str, str]]:
    """Sentences that answer: is it done, how well does it find, which class is hardest.

    Each is (good | note | bad, text).
    """
    if not parts:
        at = f"at step {train[-1]['step']:,} of {total or 0:,}" if train else "before a step was recorded"
        text = f"Running or stopped {at}: the same command goes on. The loss of a detector says little: wait for the precision."
        said = [("note", text)]
    else:
        box, mask = (parts[name].stats for name in ("box", "mask"))
        text = f"Finished: box AP {_percent(box['AP'])}, mask AP {_percent(mask['AP'])} on {scores['test_images']:,} test images."
        said = [("good", text)]
        text = f"At an overlap of a half, which is what an eye would accept, box AP50 is {_percent(box['AP50'])} and mask AP50 "
        text += f"{_percent(mask['AP50'])}; of all objects {_percent(mask['AR100'])} % are found by masks on average."
        said.append(("note", text))
        known = {name: ap for name, ap in parts["mask"].per_class.items() if ap is not None}
        if len(known) > 1:
            hardest = min(known, key=known.__getitem__)
            said.append(("note", f"The hardest of {len(known)} classes is {hardest} (mask AP {_percent(known[hardest])})."))
    return said


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _pictures(run: Path) -> dict[str, list[str]]:
    """A picture an example: one beside another on a desk, one below another on a telephone."""
    file = run / "examples.safetensors"
    if not file.exists():
        return {}
    classes, examples = read_examples(file)
    return {name: [embedded(side_by_side(*example, classes)) for example in kept] for name, kept in examples.items()}


def show_detections(checkpoint: Path, images: Sequence[Path], out: Path, threshold: float = 0.5, device: str = "auto") -> Iterator[Path]:
    """Write pictures with boxes, masks, classes and scores of at least `threshold`, each told when it is written.

    Raises the errors of `rcmae.errors`; DataError for images that cannot be read when all others are done.
    """
    if not 0 <= threshold <= 1:
        raise ConfigError(f"threshold must lie in 0 to 1, not {threshold:g}")
    where = distributed.pick_device(device)
    loaded = load_detector(checkpoint)
    names = [f"{image.stem}.png" for image in images]
    if double := {name for name in names if names.count(name) > 1}:
        names = [f"{number:03d}-{name}" if name in double else name for number, name in enumerate(names)]
    out.mkdir(parents=True, exist_ok=True)
    bad = []
    for image, name in zip(images, names, strict=True):
        try:
            pixels = decode(image.read_bytes(), loaded.model.mean.shape[1])
        except (OSError, BadImage) as e:
            bad.append(f"{image}: {getattr(e, 'strerror', None) or e}")
            continue
        with plain_failures(where, World(), "try --device cpu"):
            [found] = loaded.model.to(where).detect([fit(pixels, loaded.settings.size).to(where)], [pixels.shape[:2]])
        save_picture(pixels, found, loaded.classes, out / name, threshold)
        yield out / name
    if bad:
        raise DataError(f"cannot read the image {'; '.join(bad)}")
