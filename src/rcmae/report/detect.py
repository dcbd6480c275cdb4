"""`report.html` of a detector: how well it finds, how that came, what it missed."""

import base64
import json
from pathlib import Path
from typing import Any

from ..config import flat, recipe_hash
from ..engine.metrics import read_metrics
from ..tasks.detection.average_precision import Precision
from ..tasks.detection.settings import load_detect
from .build import rate_figures, template
from .curves import Line, column, plot
from .detections import curve_figure, progress_figure

LOSSES = {
    "loss_objectness": "proposals: is it one", "loss_rpn_box_reg": "proposals: where", "loss_classifier": "class", "loss_box_reg": "box",
    "loss_mask": "mask",
}  # fmt: skip
COLOURS = ("floor", "memory1", "student", "teacher", "gold")


def write_report(run: Path) -> Path:
    """Read a run directory of `rcmae detect train` and write its report.html; what is missing is left out."""
    path, temporary = run / "report.html", run / ".tmp_report.html"
    temporary.write_text(render(run), encoding="utf-8")
    temporary.replace(path)
    return path


def render(run: Path) -> str:
    """The page as text."""
    recipe, lines = load_detect(str(run / "recipe.toml")), read_metrics(run)
    machine, scores = (_json(run / name) for name in ("machine.json", "scores.json"))
    train, val, events = ([line for line in lines if line.get("kind") == kind] for kind in ("train", "val", "event"))
    parts = {name: Precision(**scores[name]) for name in ("box", "mask") if name in scores}
    history = [{"step": v["step"], "bbox": _share(v["box AP"]), "segm": _share(v["mask AP"])} for v in val]
    losses = [
        Line(name, colour, column(train, "step"), column(train, key)) for (key, name), colour in zip(LOSSES.items(), COLOURS, strict=True)
    ]
    about = machine.get("about", {})
    return template("detect.html.j2").render(
        title=f"Objects in {about.get('data_name', 'images')}, by {about.get('backbone_name', 'a backbone')}",
        run=run.resolve().name, path=run.as_posix(), step=train[-1]["step"] if train else 0, total=machine.get("steps"),
        recipe=flat(recipe), recipe_hash=recipe_hash(recipe), machine=machine, parts=parts, said=verdict(parts, machine, train),
        curves=curve_figure(list(parts.values())) if parts else None, progress=progress_figure(history) if len(history) > 1 else None,
        losses=plot(losses, ylabel="loss") if train else None, rates=rate_figures(train), pictures=_pictures(run), events=events[-20:],
    )  # fmt: skip


def verdict(parts: dict[str, Precision], machine: dict[str, Any], train: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Sentences that answer: is it done, how well does it find, which class is hardest. Each is (good | note | bad, text)."""
    if not parts:
        at = f"at step {train[-1]['step']:,} of {machine.get('steps', 0):,}" if train else "before its first step"
        return [("note", f"Running or stopped {at}: the same command goes on. The loss of a detector says little: wait for the precision.")]
    box, mask = parts["box"], parts["mask"]
    said = [
        (
            "good",
            f"Finished: box AP {_percent(box.stats['AP'])}, mask AP {_percent(mask.stats['AP'])} on {machine['test_images']:,} images.",
        )
    ]
    found = f"At an overlap of a half, which is what an eye would accept, box AP50 is {_percent(box.stats['AP50'])} and mask AP50 "
    said.append(
        ("note", f"{found}{_percent(mask.stats['AP50'])}; of all objects {_percent(mask.stats['AR100'])} % are found by masks on average.")
    )
    known = {name: ap for name, ap in mask.per_class.items() if ap is not None}
    if len(known) > 1:
        hardest = min(known, key=known.__getitem__)
        said.append(("note", f"The hardest of {len(known)} classes is {hardest} (mask AP {_percent(known[hardest])})."))
    if train and train[-1].get("skipped"):
        said.append(("bad", f"{train[-1]['skipped']} steps were not finite and were skipped; they are listed below."))
    return said


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _share(percent: float | None) -> float | None:
    return None if percent is None else percent / 100


def _pictures(run: Path) -> dict[str, str]:
    files = {name: run / "pictures" / f"{name}.webp" for name in ("examples", "worst")}
    return {name: "data:image/webp;base64," + base64.b64encode(f.read_bytes()).decode() for name, f in files.items() if f.exists()}


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
