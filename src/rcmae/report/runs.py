"""`rcmae runs`: the runs below some folders, and several runs over one another on one page."""

import io
import json
import os
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image
from safetensors import SafetensorError, safe_open

from ..config import flat
from ..engine.checkpoint import checkpoints, replace_file
from ..engine.metrics import of_kind, read_metrics
from ..engine.run import is_running, read_json
from ..engine.step import DIVERGED
from ..errors import ConfigError, RcmaeError, StorageError, first_line
from ..methods import METHODS
from ..methods.recipes import join_names, parse_recipe
from ..tasks.interval import margin, paired, points
from ..tasks.probe import INITIAL, KINDS, RANDOM, final_correct, final_scores, image_count
from . import curves
from .build import recent, template
from .curves import Line
from .files import kind_of
from .look import short_names

INSIDE = {"checkpoints", "export", "snapshots", "probes", "tensorboard", "wandb"}
"Folders of a run that hold no runs."

STATES = ("finished", "running", "diverged", "stopped", "imported")

SERIES = ("student", "teacher", "good", "both", "gold", "baseline")
"Colors of runs in a figure; further runs have them again with other dashes."

DASHES = ("-", "--", ":")

LOSSES = ("data", "mask_ratio", "target", "target_eps", "patch", "size", "height")
"Settings whose difference makes losses incomparable."

PROBES = ("data", "size", "height", "probe_train", "probe_test")
"Settings whose difference makes accuracies of probes incomparable."


class Listed(NamedTuple):
    """Runs, sorted by path, and folders that are none, with the reason."""

    runs: list[dict[str, Any]]
    left_out: list[tuple[str, str]]


def find_runs(folders: Sequence[Path] = (Path("runs"),)) -> Listed:
    """The runs in and below folders.

    A run is a dict: `run` (its path), `name`, `kind` (pre-training, fine-tuning or detection), `method`,
    `recipe` (its hash), `data`, `model`, `steps` done of `total`, `state` (finished, running, stopped,
    diverged, or imported for a folder of `rcmae import`), `loss` (the last), `linear` (the last linear probe
    of the recommended network: `accuracy` and `margin` in points, `images`, `network`), `seconds` and
    `bytes`. What is unknown is None. Other folders, and damaged runs, are listed with the reason.
    """
    runs: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for folder in folders:
        count = len(runs) + len(left_out)
        if not folder.is_dir():
            left_out[str(folder)] = "is not a folder" if folder.exists() else "does not exist"
            continue
        for path in _candidates(folder, left_out):
            try:
                runs[str(path)] = describe_run(path)
            except (RcmaeError, OSError, ValueError, KeyError, TypeError, AttributeError) as e:
                left_out[str(path)] = f"damaged, or of another program: {first_line(e)}"
        if len(runs) + len(left_out) == count and str(folder) not in runs:
            left_out[str(folder)] = "holds no run"
    return Listed([runs[path] for path in sorted(runs)], sorted(left_out.items()))


def _candidates(folder: Path, left_out: dict[str, str]) -> Iterator[Path]:
    """Folders that hold a recipe.toml; what has the files of a run without it is left out."""

    def unreadable(error: OSError) -> None:
        left_out[str(error.filename)] = f"cannot be read: {error.strerror}"

    for root, names, files in os.walk(folder, onerror=unreadable):
        names[:] = sorted(name for name in names if not name.startswith("."))
        if "recipe.toml" in files:
            names[:] = [name for name in names if name not in INSIDE]
            yield Path(root)
        elif {"metrics.jsonl", "machine.json"} & {*files}:
            left_out[root] = "recipe.toml is missing"


def describe_run(run: Path) -> dict[str, Any]:
    """One run as in `find_runs`. Raises ConfigError if its recipe.toml is not that of a run."""
    recipe = tomllib.loads((run / "recipe.toml").read_text(encoding="utf-8"))
    kind = kind_of(run)
    if kind is None:
        raise ConfigError("recipe.toml is not that of a run")
    lines, machine = read_metrics(run), read_json(run / "machine.json")
    train, events = of_kind(lines, "train"), of_kind(lines, "event")
    saved = [int(path.name.removeprefix("step_")) for path in checkpoints(run / "checkpoints")[:1]]
    steps = max([*(line["step"] for line in train[-1:]), *saved], default=0)
    total = _number(machine.get("steps"))
    method = recipe.get("method")
    if not train and not saved and (run / "weights.safetensors").exists():
        state = "imported"
    elif total is not None and steps >= total:
        state = "finished"
    elif is_running(run):
        state = "running"
    else:
        state = "diverged" if events and events[-1].get("text") == DIVERGED else "stopped"
    last = train[-1] if train else {}
    return {
        "run": str(run),
        "name": run.resolve().name,
        "kind": kind,
        "method": method or kind,
        "recipe": machine.get("recipe_hash"),
        "data": recipe.get("data") or (machine.get("about") or {}).get("data"),
        "model": (recipe.get("network") or {}).get("model"),
        "steps": steps,
        "total": total,
        "state": state,
        "loss": _number(last.get("loss")),
        "linear": _linear(run, lines, method) if kind == "pre-training" else None,
        "seconds": _number(last.get("seconds")),
        "bytes": sum(path.stat().st_size for path in run.rglob("*") if path.is_file()),
    }


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _recommended(method: str | None) -> tuple[str, ...]:
    """The networks of a method, the recommended one first."""
    return tuple(reversed(METHODS[method].networks)) if method in METHODS else ("teacher", "student")


def _linear(run: Path, lines: list[dict[str, Any]], method: str | None) -> dict[str, Any] | None:
    """The last linear probe of the recommended network that was probed."""
    scores = final_scores(lines)
    for network in _recommended(method):
        if "linear" in scores.get(network, {}):
            accuracy, images = scores[network]["linear"], image_count(final_correct(run, lines))
            half = margin(accuracy, images) if images else None
            return {"accuracy": accuracy, "margin": half, "images": images or None, "network": network}
    return None


# --- comparison ---------------------------------------------------------------------------------------------


def compare_runs(
    runs: Sequence[Path], out: Path, axis: Literal["steps", "images"] | None = None
) -> dict[str, Any]:
    """Draw losses and linear probes of runs of pre-training over one another: runs.html and runs.png in the
    folder `out`. Returns the page, the picture, the runs as `find_runs` describes them, with further scores,
    the settings that differ, notes, and what was left out.

    `axis`: steps, or images (steps times batch size); default: images if the batch sizes differ. Each run is
    compared with the first one, on the same test images, with a 95 % interval. Raises ConfigError for fewer
    than two runs, and StorageError.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--compare {out} is a file; name a folder")
    listed, left_out = find_runs(runs)
    chosen = [run for run in listed if run["kind"] == "pre-training" and run["state"] != "imported"]
    left_out += [
        (run["run"], f"is {run['state']} or of {run['kind']}") for run in listed if run not in chosen
    ]
    if len(chosen) < 2:
        raise ConfigError(
            f"--compare needs two runs of pre-training; there is {chosen[0]['run'] if chosen else 'none'} in "
            f"{', '.join(map(str, runs))}"
        )
    order = {str(path): i for i, path in enumerate(runs)}  # the first one given is the reference
    chosen.sort(key=lambda run: order.get(run["run"], len(order)))
    paths = [Path(run["run"]) for run in chosen]
    names = short_names([str(path.resolve()) for path in paths])
    lines = [read_metrics(path) for path in paths]
    settings = [_settings(path) for path in paths]
    batches = [s.get("batch_size", 1) for s in settings]
    axis = axis or ("images" if len({*batches}) > 1 else "steps")
    units = [batch if axis == "images" else 1 for batch in batches]
    train = [of_kind(part, "train") for part in lines]
    both = all(any("reconstruction" in line for line in part) for part in train)
    key = "reconstruction" if both else "loss"
    differing = {
        name: [s.get(name) for s in settings]
        for name in dict.fromkeys(name for s in settings for name in s)
        if len({json.dumps(s.get(name)) for s in settings}) > 1
    }
    figures: dict[str, list[Line]] = {"loss": [], "probe": []}
    for i, (name, method) in enumerate(zip(names, (run["method"] for run in chosen), strict=True)):
        color, style = SERIES[i % len(SERIES)], DASHES[i // len(SERIES) % len(DASHES)]
        x = [units[i] * line["step"] for line in train[i]]
        y = [_number(line.get(key)) for line in train[i]]
        figures["loss"].append(Line(name, color, x, y, style, smooth=True))
        x, y = _probe_curve(lines[i], method)
        figures["probe"].append(Line(name, color, [units[i] * step for step in x], y, style))
    labels = {"loss": f"{key}{' loss' if both else ''}", "probe": "linear probe accuracy, %"}
    options: dict[str, dict[str, Any]] = {
        name: {"ylabel": labels[name], "xlabel": axis, "log": name == "loss", "markers": name == "probe"}
        for name, drawn in figures.items()
        if any(value is not None for line in drawn for value in line.y)
    }
    svgs = {name: curves.plot(figures[name], **how) for name, how in options.items()}
    notes = _notes(chosen, differing, key)
    rows = [
        run
        | {"label": name, "color": line.color, "style": line.style}
        | {"images": run["steps"] * batch, "recent_loss": recent(part).get(key), "scores": _scores(run, log)}
        | {"against_first": _against(paths[0], path, chosen[0], run) if i else None}
        for i, (run, name, line, batch, part, log, path) in enumerate(
            zip(chosen, names, figures["loss"], batches, train, lines, paths, strict=True)
        )
    ]
    page = template("runs.html.j2").render(
        title=f"{len(chosen)} runs",
        rows=rows,
        names=names,
        figures=svgs,
        loss=labels["loss"],
        kinds=[kind for kind in KINDS if any(kind in row["scores"] for row in rows)],
        probes=KINDS,
        settings=differing,
        notes=notes,
        left_out=left_out,
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise StorageError(f"cannot write {out}: {e.strerror}; choose another --compare") from e
    if options:
        replace_file(
            out / "runs.png", _stacked([curves.png(figures[name], **options[name]) for name in options])
        )
    replace_file(out / "runs.html", page)
    return {
        "page": str(out / "runs.html"),
        "picture": str(out / "runs.png") if options else None,
        "runs": [{k: v for k, v in row.items() if k not in ("color", "style")} for row in rows],
        "settings": differing,
        "notes": notes,
        "left_out": left_out,
    }


def _settings(run: Path) -> dict[str, Any]:
    """The settings of a recipe without sections, with those at their defaults too if it is valid."""
    text = (run / "recipe.toml").read_text(encoding="utf-8")
    try:
        return flat(parse_recipe(text, str(run / "recipe.toml")))
    except ConfigError:  # of another version
        tree = tomllib.loads(text)
        return {k: v for k, v in tree.items() if not isinstance(v, dict)} | {
            k: v for part in tree.values() if isinstance(part, dict) for k, v in part.items()
        }


def _probe_curve(lines: list[dict[str, Any]], method: str) -> tuple[list[int], list[float | None]]:
    """Steps and accuracies of the linear probes of the recommended network, from the weights before training
    on."""
    scores = final_scores(lines)
    start = _number(scores.get(INITIAL, scores.get(RANDOM, {})).get("linear"))
    steps: list[int] = [] if start is None else [0]
    values: list[float | None] = [] if start is None else [start]
    for line in of_kind(lines, "probe"):
        network = next((n for n in _recommended(method) if isinstance(line.get(n), dict)), None)
        if network and line["step"]:
            steps.append(line["step"])
            values.append(_number(line[network].get("linear")))
    return steps, values


def _scores(run: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, str]:
    """The last accuracies of the recommended network by probe, with their margins."""
    linear = run["linear"]
    if linear is None:
        return {}
    images, scores = linear["images"], final_scores(lines)[linear["network"]]
    return {
        kind: f"{value:.1f}" + (f" ± {margin(value, images):.1f}" if images else "")
        for kind, value in scores.items()
        if kind in KINDS
    }


def _against(first: Path, other: Path, *records: dict[str, Any]) -> str | None:
    """The difference in linear probe accuracy of two runs with its 95 % interval, in words; None unless they
    were probed on the same test images."""
    results = []
    for path, record in zip((first, other), records, strict=True):
        if record["linear"] is None:
            return None
        step = max(line["step"] for line in of_kind(read_metrics(path), "probe"))
        try:
            with safe_open(path / "probes" / f"{step:08d}.safetensors", "np") as file:
                images = (file.metadata() or {}).get("test")
                results.append(
                    (images, file.get_tensor(f"{record['linear']['network']}/linear").astype(bool))
                )
        except (OSError, SafetensorError):
            return None
    (images, reference), (others, correct) = results
    return points(paired(correct, reference)) if images and images == others else None


def _notes(runs: Sequence[dict[str, Any]], differing: dict[str, list[Any]], key: str) -> list[str]:
    """What makes the runs incomparable."""
    notes = []
    if key == "loss" and len({run["method"] for run in runs}) > 1:
        notes.append(
            "The methods differ, and so do their losses: compare the course of each, not their values"
        )
    elif different := [name for name in LOSSES if name in differing]:
        notes.append(f"Losses are not comparable: the runs differ in {join_names(different)}")
    different = [name for name in PROBES if name in differing]
    if different and any(run["linear"] for run in runs):
        notes.append(f"Accuracies are not comparable: the runs differ in {join_names(different)}")
    if unfinished := [run["name"] for run in runs if run["state"] != "finished"]:
        notes.append(f"Not finished: {', '.join(unfinished)}")
    return notes


def _stacked(files: Sequence[bytes]) -> bytes:
    """PNG files below each other."""
    parts = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    canvas = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), "white")
    for i, part in enumerate(parts):
        canvas.paste(part, (0, sum(p.height for p in parts[:i])))
    out = io.BytesIO()
    canvas.save(out, "png", optimize=True)
    return out.getvalue()
