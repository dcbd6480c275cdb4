"""`report.html`: a run of pre-training on one page, in one file, for readers who do not know the code."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, Template
from markupsafe import Markup, escape

from ..config import flat, how_many, recipe_hash
from ..data.base import reading
from ..engine.checkpoint import replace_file
from ..engine.metrics import of_kind, read_metrics
from ..engine.run import read_json, write_json
from ..methods import METHODS, Method
from ..methods.diagnostics import Sentence
from ..methods.recipes import parse_recipe
from ..tasks.interval import MARGIN_NOTE, with_margin
from ..tasks.learned import below_start, learned
from ..tasks.probe import KNN_NOTE, final_correct, final_scores, image_count, score_table
from . import pictures, severity
from .curves import Line, column, plot, standalone
from .files import bad_files
from .panels import drawn, health_panel, panel

Lines = list[dict[str, Any]]
"Lines of metrics.jsonl."

IMAGES = 4
"Images with reconstructions."

VISIBLE = 16
"Of 255: differences of student and teacher that are shown."

SNAPSHOTS = 5
"Steps in the strip of reconstructions over time."


def render(run: Path, running: bool) -> str:
    recipe = parse_recipe((run / "recipe.toml").read_text(encoding="utf-8"), "recipe.toml")
    method, lines = METHODS[recipe.method], read_metrics(run)
    machine = read_json(run / "machine.json")
    kinds = ("train", "probe", "event", "health", "alarm", "baseline", "reference")
    train, probes, events, health, alarms, *first = (of_kind(lines, kind) for kind in kinds)
    baseline, reference = (part[0] if part else {} for part in first)
    bad = bad_files(run / "bad_files.jsonl")
    recorded = bool(health) or any("teacher_advantage" in line for line in train)
    means, correct, total = recent(train), final_correct(run, lines), machine.get("steps")
    finished = bool(train) and train[-1]["step"] >= (total or float("inf"))
    judged = judge(method, means, reference)
    weak = method.weak_teacher(means)
    panels = (panel(declared, train, [*train, *health], reference) for declared in method.panels())
    raised = [line | {"text": f"alarm {line['name']}: {line['text']}", "tone": "bad"} for line in alarms]
    return template("page.html.j2").render(
        title=f"{recipe.method} on {recipe.data}",
        **heading(run, recipe, machine, train, bad),
        so_far="" if finished else " so far",
        answer=learned(correct, judged),
        verdict=[
            *alarm_sentences(alarms, recorded, weak),
            state(train, total, running),
            *extension_sentences(machine),
            *judged,
            *below_start(correct),
            *failure_sentences(train, bad),
            *data_sentences(machine, len(bad)),
        ],
        scores=score_table(final_scores(lines), image_count(correct)),
        margin_note=MARGIN_NOTE,
        knn_note=KNN_NOTE,
        learning=drawn(method.figures(), train, reference),
        accuracy=probe_figure(probes, baseline),
        rates=rate_figures(train, events),
        panels=[p for p in panels if p],
        weak=weak,
        health=health_panel(health, method.collapse_advice),
        shots=reconstructions(run),
        strip=strip(run),
        events=sorted([*events[-20:], *raised], key=lambda line: line["step"]),
        export=[name for name in method.networks if (run / "export" / name / "config.json").exists()],
        evaluations=evaluations(run),
        worth=read_json(run / "evaluate" / "worth-it" / "worth-it.json").get("verdict", []),
        detector=detector(run),
        severity=severity_figures(run),
    )


def heading(run: Path, recipe: Any, machine: dict[str, Any], train: Lines, bad: Lines) -> dict[str, Any]:
    """What every page says of its run."""
    return {
        "run": run.resolve().name,
        "path": run.as_posix(),
        "step": train[-1]["step"] if train else 0,
        "total": machine.get("steps"),
        "recipe": flat(recipe),
        "recipe_hash": recipe_hash(recipe),
        "machine": machine,
        "bad": bad,
    }


def template(name: str, package: str = "rcmae.report") -> Template:
    """The template with a file name in `package`; all extend base.html.j2."""
    loader = ChoiceLoader([PackageLoader(package, "."), PackageLoader("rcmae.report", ".")])
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["thousands"] = lambda v: f"{v:,.0f}" if isinstance(v, (int, float)) else "–"
    environment.filters["options"] = _marked
    return environment.get_template(name)


def _marked(text: str) -> Markup:
    """A text with its command-line options as code, and with minus signs."""
    signed = re.sub(r"(?<!\S)-(?=\d)", "\N{MINUS SIGN}", str(escape(text)))
    return Markup(re.sub(r"(?<!\S)--[a-z][a-z-]*", r"<code>\g<0></code>", signed))


def write_page(
    out: Path, name: str, package: str, results: dict[str, Any], figures: dict[str, str], **more: Any
) -> Path:
    """Write results as NAME.json, figures as SVG files, and from a template of `package` NAME.html, whose
    path is returned. Raises StorageError."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", results)
    for figure, svg in figures.items():
        replace_file(out / f"{figure}.svg", standalone(svg))
    page = template(f"{name}.html.j2", package).render(figures=figures, **more, **results)
    replace_file(out / f"{name}.html", page)
    return out / f"{name}.html"


# --- verdict ------------------------------------------------------------------------------------------------


def state(train: Lines, total: int | None, running: bool) -> Sentence:
    """Whether a run is finished, running or stopped, and at which step."""
    step = train[-1]["step"] if train else 0
    if total is not None and step >= total:
        return ("good", f"Finished at step {step:,} of {total:,}.")
    at = f"at step {step:,} of {total or 0:,}" if train else "before its first recorded step"
    if running:
        return ("note", f"Running, {at} when this page was drawn.")
    return ("note", f"Stopped {at}: the same command resumes it.")


def judge(method: type[Method], means: dict[str, float], reference: dict[str, Any]) -> list[Sentence]:
    """Sentences on the loss, by the method."""
    if not means:
        return []
    if method.losses.keys() <= means.keys():
        return method.judge(means, reference)
    return [("bad", "The last losses are not finite.")]


def failure_sentences(train: Lines, bad: Sequence[Any], bad_test: Sequence[Any] = ()) -> list[Sentence]:
    """Skipped steps, and unreadable images of training and of a test."""
    texts = []
    if train and train[-1].get("skipped"):
        steps = how_many(train[-1]["skipped"], "step")
        texts.append(f"Skipped, because loss or gradients were not finite: {steps}, listed below.")
    if bad:
        images = how_many(len(bad), "image")
        texts.append(f"{images} could not be read; others were used instead (listed below).")
    if bad_test:
        images = how_many(len(bad_test), "test image")
        texts.append(f"{images} could not be read: left out of the scores, listed below.")
    return [("bad", text) for text in texts]


def data_sentences(machine: dict[str, Any], unreadable: int) -> list[Sentence]:
    """What was read of the files found, and what was left out, if machine.json says so."""
    if "left_out" not in machine:
        return []
    return [("note", f"Data: {reading(machine['images'], machine['left_out'], unreadable)}.")]


def extension_sentences(machine: dict[str, Any]) -> list[Sentence]:
    """The extensions of a finished run, if machine.json says so."""
    return [
        (
            "note",
            f"Extended at step {start:,} to {stop:,} steps: from there on the learning rate warms up again, "
            f"and schedules are those of a run of {stop:,} steps.",
        )
        for start, stop in machine.get("extended", ())
    ]


def alarm_sentences(alarms: Lines, recorded: bool, weak: str) -> list[Sentence]:
    """The alarms of a run, each with its cause and the setting to change, and why its teacher is `weak`; if
    there is neither, that no fault was detected."""
    if recorded and not alarms and not weak:
        return [("good", "No alarm: the run's diagnostics found no fault of training.")]
    sentences = [
        ("bad", f"Alarm {line['name']} at step {line['step']:,}: {line['text'].rstrip('.')}.")
        for line in alarms
    ]
    return sentences + ([("note", weak)] if weak else [])


def recent(train: Lines) -> dict[str, float]:
    """Means of all finite numbers over the last twentieth of the log lines; empty without lines."""
    if not train:
        return {}
    last = train[-max(1, len(train) // 20) :]
    values = {
        key: [line[key] for line in last if isinstance(line.get(key), (int, float))] for key in last[-1]
    }
    return {key: sum(v) / len(v) for key, v in values.items() if v}


# --- figures ------------------------------------------------------------------------------------------------


def probe_figure(probes: Lines, baseline: dict[str, Any]) -> str | None:
    """Linear probe accuracy over the steps."""
    if not probes or not baseline:
        return None
    x = column(probes, "step")
    raw, random = (baseline[name]["linear"] for name in ("raw_pixels", "random_init"))
    initial = baseline.get("initial_weights")
    start = initial["linear"] if initial else random
    lines = [
        Line(network, network, [0, *x], [start, *(line[network]["linear"] for line in probes)])
        for network in ("student", "teacher")
        if network in probes[-1]
    ]
    levels = {f"raw pixels {raw:.1f}": raw, f"randomly initialized {random:.1f}": random}
    if initial:
        levels[f"initial weights {start:.1f}"] = start
    return plot(lines, levels, "linear probe accuracy, %", markers=True)


def rate_figures(train: Lines, events: Lines, schedule: str = "cosine") -> dict[str, str]:
    """Captions and figures of learning rate, speed and gradient norm. An event may name what shortens the
    waiting for data."""
    if not train:
        return {}
    advice = [f" To shorten it, {line['advice']}." for line in events if "advice" in line]
    waiting = "Fraction of the time spent waiting for data." + "".join(advice[-1:])
    figures = (
        (f"Learning rate: warm-up, then {schedule}.", "learning rate", "lr", 1),
        ("Images per second, without the time for probes and saving.", "images/s", "images_per_s", 1),
        (waiting, "waiting, %", "data_wait", 100),
        ("Norm of the gradient.", "gradient norm", "grad_norm", 1),
    )
    x = column(train, "step")
    svgs = {}
    for caption, label, key, unit in figures:
        y = [None if value is None else unit * value for value in column(train, key)]
        svgs[caption] = plot([Line("", "ink", x, y)], ylabel=label, log=key == "grad_norm")
    return svgs


# --- pictures -----------------------------------------------------------------------------------------------


def _snapshots(run: Path) -> list[Path]:
    return sorted((run / "snapshots").glob("[0-9]*.safetensors"))


def reconstructions(run: Path) -> dict[str, Any] | None:
    """Input, visible patches, student, teacher and their difference, for some images at the last snapshot."""
    paths = _snapshots(run)
    if not paths:
        return None
    s = pictures.read_snapshot(paths[-1])
    rows, shown = [], range(min(IMAGES, len(s.image)))
    drawn = [{network: pictures.picture(s, i, network) for network in s.predictions} for i in shown]
    # Near the end of a run, student and teacher may be the same to the eye.
    visible = any(len(p) == 2 and pictures.difference(*p.values()).max() > VISIBLE for p in drawn)
    for i, predictions in zip(shown, drawn, strict=True):
        row = {"input": s.image[i].transpose(1, 2, 0), "visible": pictures.visible(s, i)} | predictions
        if len(predictions) == 2 and visible:
            row["difference x 4"] = pictures.difference(predictions["student"], predictions["teacher"])
        if s.target == "normalized":
            row["student, true contrast"] = pictures.picture(s, i, "student", true_statistics=True)
        rows.append({name: pictures.as_png(pixels) for name, pixels in row.items()})
    return {"step": s.step, "rows": rows, "normalized": s.target == "normalized", "columns": list(rows[0])}


def strip(run: Path) -> list[dict[str, Any]]:
    """The student's reconstruction of two images over time."""
    paths = _snapshots(run)
    if len(paths) < 2:
        return []
    count = min(SNAPSHOTS, len(paths))
    chosen = [paths[round(k * (len(paths) - 1) / (count - 1))] for k in range(count)]
    shots = [pictures.read_snapshot(path) for path in chosen]
    return [
        {
            "step": s.step,
            "pictures": [
                pictures.as_png(pictures.picture(s, i, "student")) for i in range(min(2, len(s.image)))
            ],
        }
        for s in shots
    ]


# --- files --------------------------------------------------------------------------------------------------


def _evaluated(run: Path, name: str = "*") -> dict[str, dict[str, Any]]:
    """Records of `rcmae evaluate` by path: of the run's networks, and of classifiers fine-tuned from them."""
    folder = run / "evaluate"
    files = sorted([*folder.glob(f"{name}.json"), *folder.glob(f"*/evaluate/{name}.json")])
    return {file.relative_to(folder).with_suffix("").as_posix(): read_json(file) for file in files}


def evaluations(run: Path) -> list[dict[str, Any]]:
    """Results of `rcmae evaluate` in the run directory; the file tells apart seeds and settings."""
    rows = []
    for file, record in _evaluated(run).items():
        if "top1" in record.get("metrics", {}) and record.get("per_class"):
            hardest = min(record["per_class"], key=record["per_class"].__getitem__)
            row = {key: record[key] for key in ("task", "network", "data", "train_images")}
            accuracy, images = record["per_class"][hardest], record.get("images_per_class", {}).get(hardest)
            of = f" % of {how_many(images, 'image')}" if images else ""
            row |= {
                "file": file,
                "top1": with_margin(record["metrics"]["top1"], record.get("test_images", 0)),
                "hardest": f"{hardest} ({accuracy:.1f}{of})",
            }
            rows.append(row)
    return rows


def detector(run: Path) -> dict[str, Any] | None:
    """The scores of a finished `rcmae detect train` in the run directory of its backbone."""
    scores = read_json(run / "detect" / "scores.json")
    return scores if scores.get("box") and scores.get("mask") else None


def severity_figures(run: Path) -> dict[str, str]:
    """Accuracy by severity, for each kind of corruption, of the networks evaluated on the same images."""
    records = [r for r in _evaluated(run, "robustness-*").values() if r.get("details", {}).get("errors")]
    last = records[-1]["hashes"]["test"] if records else ""
    return severity.figures([r for r in records if r["hashes"]["test"] == last])
