"""`report.html`: the whole run on one page, in one file, for somebody who did not write the code."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, Template
from markupsafe import Markup, escape

from ..config import flat, how_many, recipe_hash
from ..engine.metrics import read_metrics
from ..engine.run import read_json
from ..methods import METHODS, Method
from ..methods.recipes import parse_recipe
from . import pictures, severity
from .curves import Line, column, plot
from .files import bad_files
from .panels import apart, drawn, health_panel, panel

IMAGES = 4
"Images whose reconstructions are shown."

CHAPTERS = 5
"Points in time of the strip."


def render(run: Path) -> str:
    """The page as text."""
    recipe = parse_recipe((run / "recipe.toml").read_text(encoding="utf-8"), "recipe.toml")
    method, lines = METHODS[recipe.method], read_metrics(run)
    machine = read_json(run / "machine.json")
    by_kind = {kind: [line for line in lines if line.get("kind") == kind] for kind in ("train", "probe", "event", "health", "alarm")}
    floor = next((line for line in lines if line.get("kind") == "floor"), None)
    reference = next((line for line in lines if line.get("kind") == "reference"), None)
    bad = bad_files(run / "bad_files.jsonl")
    train, probes, health, alarms = (by_kind[kind] for kind in ("train", "probe", "health", "alarm"))
    watched, seen = bool(health) or any("teacher_advantage" in line for line in train), [*train, *health]
    panels = (panel(declared, train, seen, reference or {}) for declared in method.panels())
    told = [line | {"text": f"alarm {line['name']}: {line['text']}", "tone": "bad"} for line in alarms]
    total = machine.get("steps")
    return template("page.html.j2").render(
        title=f"{recipe.method} on {recipe.data}",
        run=run.resolve().name, path=run.as_posix(), step=train[-1]["step"] if train else 0, total=total,
        verdict=alarm_sentences(alarms, watched) + verdict(method, train, probes, floor, reference, bad, total),
        table=score_table(floor, probes), learning=drawn(method.figures(), train, reference or {}), accuracy=probe_figure(probes, floor),
        rates=rate_figures(train), panels=[p for p in panels if p], health=health_panel(health, method.collapse_advice),
        shots=reconstructions(run), strip=strip(run),
        recipe=flat(recipe), recipe_hash=recipe_hash(recipe), machine=machine, bad=bad,
        events=sorted(by_kind["event"][-20:] + told, key=lambda line: line["step"]), export=exports(run),
        evaluations=evaluations(run), worth=worth(run), detector=detector(run), severity=severity_figures(run),
        labelled=floor is not None, reference=reference,
    )  # fmt: skip


def template(name: str, room: str = "rcmae.report") -> Template:
    """A page's template by file name, in the package `room`; all extend base.html.j2."""
    loader = ChoiceLoader([PackageLoader(room, "."), PackageLoader("rcmae.report", ".")])
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["thousands"] = lambda v: f"{v:,.0f}" if isinstance(v, (int, float)) else "–"
    environment.filters["options"] = lambda text: Markup(re.sub(r"(?<!\S)--[a-z][a-z-]*", r"<code>\g<0></code>", str(escape(text))))
    return environment.get_template(name)


# --- in words ---------------------------------------------------------------------------------------------------------


def verdict(
    method: type[Method], train: list[dict], probes: list[dict], floor: dict | None, reference: dict | None, bad: list, total: int | None
) -> list[tuple[str, str]]:
    """Sentences that answer: is it done, is the loss normal (the method's own), does it learn, was anything wrong.

    Each is (good | note | bad, text).
    """
    if not train:
        return [("note", "The run has not made a step that was recorded yet.")]
    last, sentences = train[-1], []
    done = total is not None and last["step"] >= total
    sentences.append(
        ("good" if done else "note", f"{'Finished' if done else 'Running or stopped'} at step {last['step']:,} of {total or 0:,}.")
    )
    means = recent(train)
    sentences += (
        method.judge(means, reference or {}) if method.losses.keys() <= means.keys() else [("bad", "The last losses are not finite.")]
    )
    if floor and probes:
        best = "teacher" if "teacher" in probes[-1] else "student"
        score, raw, untrained = probes[-1][best]["linear"], floor["raw_pixels"]["linear"], floor["untrained"]["linear"]
        gain = score - max(raw, untrained)
        text = f"A linear probe on the {best}'s features is right on {score:.1f} %: {score - untrained:+.1f} points against the untrained "
        text += f"encoder ({untrained:.1f} %), {score - raw:+.1f} against raw pixels ({raw:.1f} %). "
        sentences.append(("good" if gain > 2 else "note", text + ("It learns." if gain > 2 else "Not yet better than its floors.")))
    elif not floor:
        sentences.append(
            (
                "note",
                "The images have no labels (or probes are off), so accuracy could not be watched; the loss is all there is to see.",
            )
        )
    return sentences + failure_sentences(train, bad)


def failure_sentences(train: list[dict], bad: Sequence, bad_test: Sequence = ()) -> list[tuple[str, str]]:
    """What went wrong: steps that were skipped, and images that could not be read, of training and of a test."""
    sentences = []
    if train and train[-1].get("skipped"):
        sentences.append(("bad", f"Skipped, as they were not finite: {how_many(train[-1]['skipped'], 'step')}, listed below."))
    if bad:
        sentences.append(("bad", f"{how_many(len(bad), 'image')} could not be read, and others were taken instead; named below."))
    if bad_test:
        text = f"{how_many(len(bad_test), 'test image')} could not be read: all objects there count as missed; named below."
        sentences.append(("bad", text))
    return sentences


def alarm_sentences(alarms: list[dict], watched: bool) -> list[tuple[str, str]]:
    """What the instruments called, each with its cause and the setting to change; or that they were silent."""
    if not alarms:
        return [("good", "No alarm: the run's instruments found no fault of training.")] if watched else []
    return [("bad", f"Alarm {line['name']} at step {line['step']:,}: {line['text'].rstrip('.')}.") for line in alarms]


def recent(train: list[dict]) -> dict[str, float]:
    """Means over the last twentieth of the log lines of every number that was finite there."""
    last = train[-max(1, len(train) // 20) :]
    values = {key: [line[key] for line in last if isinstance(line.get(key), (int, float))] for key in last[-1]}
    return {key: sum(v) / len(v) for key, v in values.items() if v}


# --- figures ----------------------------------------------------------------------------------------------------------


def probe_figure(probes: list[dict], floor: dict | None) -> str | None:
    if not probes or not floor:
        return None
    x = column(probes, "step")
    start = floor["untrained"]["linear"]
    lines = [
        Line(who, who, [0, *x], [start, *(line[who]["linear"] for line in probes)]) for who in ("student", "teacher") if who in probes[-1]
    ]
    levels = {"raw pixels": floor["raw_pixels"]["linear"], "untrained encoder": start}
    return plot(lines, apart(levels), "linear probe, % right", markers=True)


def rate_figures(train: list[dict], schedule: str = "cosine") -> dict[str, str]:
    if not train:
        return {}
    x = column(train, "step")
    return {
        f"Learning rate: warm-up, then {schedule}.": plot([Line("learning rate", "ink", x, column(train, "lr"))], ylabel="learning rate"),
        "Images a second while training (probes and saving not counted).": plot(
            [Line("speed", "ink", x, column(train, "images_per_s"))], ylabel="images/s"
        ),
        "Share of the time that waits for data. Above a tenth, more --workers help.": plot(
            [Line("waiting", "ink", x, [None if v is None else 100 * v for v in column(train, "data_wait")])], ylabel="waiting, %"
        ),
        "Norm of the gradient.": plot([Line("norm", "ink", x, column(train, "grad_norm"))], ylabel="gradient norm", log=True),
    }


def score_table(floor: dict | None, probes: list[dict]) -> list[tuple[str, float, float]]:
    """(name, linear, k-NN) of floors, student and teacher at the last probe."""
    if not floor:
        return []
    rows = {"raw pixels": floor["raw_pixels"], "untrained encoder": floor["untrained"]}
    if probes:
        rows |= {who: probes[-1][who] for who in ("student", "teacher") if who in probes[-1]}
    return [(name, s["linear"], s["knn"]) for name, s in rows.items()]


# --- pictures ---------------------------------------------------------------------------------------------------------


def _snapshots(run: Path) -> list[Path]:
    return sorted((run / "snapshots").glob("[0-9]*.safetensors"))


def reconstructions(run: Path) -> dict[str, Any] | None:
    """Input, what was seen, student, teacher and their difference, for some images at the last snapshot."""
    paths = _snapshots(run)
    if not paths:
        return None
    s = pictures.read_snapshot(paths[-1])
    rows = []
    for i in range(min(IMAGES, len(s.image))):
        made = {who: pictures.picture(s, i, who) for who in s.predictions}
        row = {"input": s.image[i].transpose(1, 2, 0), "seen": pictures.seen(s, i)} | made
        if len(made) == 2:
            row["difference x 4"] = pictures.difference(made["student"], made["teacher"])
        if s.target == "normalised":
            row["student, true contrast"] = pictures.picture(s, i, "student", true_statistics=True)
        rows.append({name: pictures.data_uri(pixels) for name, pixels in row.items()})
    return {"step": s.step, "rows": rows, "normalised": s.target == "normalised", "columns": list(rows[0])}


def strip(run: Path) -> list[dict[str, Any]]:
    """The student's picture of two images over time."""
    paths = _snapshots(run)
    if len(paths) < 2:
        return []
    chosen = [paths[round(k * (len(paths) - 1) / (min(CHAPTERS, len(paths)) - 1))] for k in range(min(CHAPTERS, len(paths)))]
    shots = [pictures.read_snapshot(p) for p in chosen]
    return [
        {"step": s.step, "pictures": [pictures.data_uri(pictures.picture(s, i, "student")) for i in range(min(2, len(s.image)))]}
        for s in shots
    ]


# --- files ------------------------------------------------------------------------------------------------------------


def _evaluated(run: Path, name: str = "*") -> dict[str, dict[str, Any]]:
    """Records of `rcmae evaluate`, by place: of the run's networks, and of classifiers that were fine-tuned from them."""
    folder = run / "evaluate"
    files = sorted([*folder.glob(f"{name}.json"), *folder.glob(f"*/evaluate/{name}.json")])
    return {file.relative_to(folder).with_suffix("").as_posix(): read_json(file) for file in files}


def evaluations(run: Path) -> list[dict[str, Any]]:
    """What `rcmae evaluate` left in the run directory, by task and network; the file tells apart what differs in seed or settings."""
    found = []
    for file, content in _evaluated(run).items():
        if "top1" in content.get("metrics", {}) and content.get("per_class"):
            hardest = min(content["per_class"], key=content["per_class"].__getitem__)
            own = {key: content[key] for key in ("task", "network", "data", "train_images")}
            found.append(
                own | {"file": file, "top1": content["metrics"]["top1"], "hardest": hardest, "hardest_right": content["per_class"][hardest]}
            )
    return found


def worth(run: Path) -> list[str]:
    """What `rcmae evaluate worth-it` says, a sentence for each backbone and share of the labels."""
    return read_json(run / "evaluate" / "worth-it" / "worth-it.json").get("said", [])


def detector(run: Path) -> dict[str, Any] | None:
    """What `rcmae detect train` left in the run directory of its backbone: its scores, if it has ended."""
    found = read_json(run / "detect" / "scores.json")
    return found if found.get("box") and found.get("mask") else None


def severity_figures(run: Path) -> dict[str, str]:
    """Accuracy by severity of the networks whose robustness was evaluated on the same images, by kind of corruption."""
    records = [r for r in _evaluated(run, "robustness-*").values() if r.get("details", {}).get("errors")]
    last = records[-1]["hashes"]["test"] if records else ""
    return severity.figures([r for r in records if r["hashes"]["test"] == last])


def exports(run: Path) -> list[str]:
    """Networks that can be loaded, the one to use last."""
    return [who for who in ("student", "teacher") if (run / "export" / who / "config.json").exists()]
