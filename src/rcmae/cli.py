"""The commands: each parses, calls one function, prints. torch is imported inside them, so that --help is quick (but that of
`pretrain`, which shows the settings of its method)."""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from cyclopts import App, CycloptsError, Group, Parameter, Token
from cyclopts.config import Dict

from . import __version__
from .config import Machine, Recipe, Workplace, check, flags, flat, how_many, replaced_by, sections, shipped_recipes
from .engine import signals
from .engine.console import Screen
from .errors import ConfigError, Preempted, RcmaeError, first_line
from .tasks.detection.settings import Detection, Scoring
from .tasks.evaluation import TASKS
from .tasks.evaluation.base import Evaluation, Task, Which
from .tasks.evaluation.finetune import Finetune
from .tasks.evaluation.worth import Worth

app = App(
    name="rcmae",
    version=__version__,
    help="Self-supervised pre-training of Vision Transformers with RC-MAE.",
    help_epilogue="Exit codes: 0 done, 1 unexpected (or verify found a difference), 2 usage or recipe, 3 data, 4 checkpoint, "
    "5 diverged or an alarm, 6 storage, 7 lost process, 8 memory, 75 stopped and saved (run the same command again), "
    "130 Ctrl-C and 143 SIGTERM before anything was saved. "
    "--debug shows the traceback of an error.",
)


def _whole(kind: type, tokens: Sequence[Token]) -> int:
    """cyclopts rounds 1.5 to 2; we refuse it."""
    value = tokens[0].value
    if not value.lstrip("+-").isdecimal():
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


Whole = Annotated[int, Parameter(converter=_whole)]
Many = Parameter(consume_multiple=True, negative_iterable=())
Flat = Parameter(name="*", negative_iterable=())


def _as_flags(section: type, how: Parameter = Flat, values: dict[str, Any] | None = None) -> None:
    """`--size`, not `--images.size`. Help shows the `values`, where they are given, instead of the defaults of the class."""
    how(section)
    for field in fields(section):
        kind: Any = field.type
        if field.type in (int, int | None):
            kind = Whole if field.type is int else Whole | None
        elif get_origin(field.type) is tuple and Ellipsis in get_args(field.type):
            kind = Annotated[field.type, Many]
        if values is not None and not is_dataclass(field.type):
            value = values.get(field.name)
            text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            kind = Annotated[kind, Parameter(show_default=False if value is None else text)]
        if kind is not field.type:
            section.__annotations__[field.name] = kind


for options in (Workplace, Machine, Evaluation, *TASKS.values(), Worth, Detection, Scoring):
    _as_flags(options)


def _pretrain(loaded: Recipe, loaded_name: str | None = None) -> Callable[..., None]:
    """The command `pretrain` with the flags of a recipe's method, and its values as their defaults; `loaded_name` is how it was named."""
    cls, values = type(loaded), flat(loaded)

    def pretrain(
        recipe_name: Annotated[str | None, Parameter(name="RECIPE")] = None, /, *,
        recipe: Annotated[cls, Parameter(name="*", negative_iterable=(), group=Group("Recipe", sort_key=1))] = cls(),  # type: ignore
        machine: Annotated[Machine, Parameter(name="*", negative_iterable=(), group=Group("Machine", sort_key=99))] = Machine(),
    ) -> None:  # fmt: skip
        """Pre-train a Vision Transformer; a run that is already in --out goes on.

        Parameters
        ----------
        recipe_name
            A recipe's name (`rcmae list`) or the path of a TOML file [default: embedded]. What it sets can be replaced by options.
        """
        from .pretraining import pretrain as run

        if recipe_name != loaded_name:  # cyclopts has already parsed the flags against another recipe's defaults: the name must come first
            raise ConfigError(f"write the recipe first: rcmae pretrain {recipe_name} --...")
        run(recipe, machine)

    for i, (name, section) in enumerate(sections(cls).items(), 2):
        title = Group(name, help=(section.__doc__ or "").splitlines()[0], sort_key=i)
        _as_flags(section, Parameter(name="*", negative_iterable=(), group=title), values)
    _as_flags(cls, values=values)
    return pretrain


app.command(_pretrain(Recipe()), name="pretrain")


@app.command(name="check")
def check_data(
    path: str, /, *, val: str | None = None, recipe: str | None = None, channels: Whole | None = None,
    batch_size: Whole | None = None, bad_share: float = Machine().bad_share, json: Path | None = None,
) -> int:  # fmt: skip
    """Audit a data folder before any training: counts, sizes, unreadable files, duplicates, statistics, speed.

    Parameters
    ----------
    path
        The images: a folder, or another source that `rcmae list` shows.
    val
        A validation set, to look for images that are in both.
    recipe
        The recipe to plan for [default: the one that suits the data].
    channels
        Bands of an image [default: the recipe's].
    batch_size
        Images a step [default: the recipe's].
    bad_share
        The share of unreadable images that the run would be allowed.
    json
        Also write the findings to this file.
    """
    from .data.audit import audit, render, to_json
    from .data.sources import recipe_for
    from .methods.recipes import load_recipe

    _check_place(json)
    chosen = load_recipe(recipe or recipe_for(path))
    if batch_size is not None:
        chosen = replace(chosen, optim=replace(chosen.optim, batch_size=batch_size))
    if channels is not None:
        chosen = replace(chosen, images=replace(chosen.images, channels=channels))
    check(chosen)
    check(Machine(bad_share=bad_share))
    found = audit(path, val=val, recipe=chosen, bad_share=bad_share, screen=Screen(True))
    _console().print(render(found))
    if json:
        json.write_text(to_json(found), encoding="utf-8")
    return 0 if found.fit else 3


@app.command
def report(run: Path, /) -> None:
    """Write RUN/report.html anew.

    Parameters
    ----------
    run
        A run directory, of pre-training or of `rcmae detect train`.
    """
    print(_draw(run))


@app.command(name="import")
def import_official(file: Path, /, *, out: Path | None = None, heads: Whole | None = None, decoder_heads: Whole | None = None) -> None:
    """Turn an official MAE or RC-MAE checkpoint (.pth) into a folder that rcmae and timm load. No code in it is run.

    Parameters
    ----------
    file
        The .pth file.
    out
        The folder to write [default: the file's name without .pth].
    heads
        Attention heads of the encoder, where the widths are of no named size.
    decoder_heads
        Attention heads of the decoder, likewise.
    """
    from .interop.official import import_pth

    if (heads is None) != (decoder_heads is None):
        raise ConfigError("give --heads and --decoder-heads together")
    pair = None if heads is None or decoder_heads is None else (heads, decoder_heads)
    for line in import_pth(file, out or file.with_suffix(""), pair):
        print(line)


lab = App(name="lab", help="The mean teacher under the microscope: the paper's analysis, on a linear model and on a real run.")
app.command(lab)


@lab.command(name="linear")
def lab_linear(*, out: Path = Path("runs/lab-linear"), seeds: Whole = 3) -> None:
    """Run the paper's linear experiment and write a page that explains what the teacher does there.

    Parameters
    ----------
    out
        Where linear.html, its figures and linear.json go.
    seeds
        Runs a setting, each with its own inputs.
    """
    from rich.table import Table

    from .lab.linear import Setting, study, write_page

    if seeds < 1:
        raise ConfigError(f"seeds must be 1 or more, not {seeds}")
    _check_folder(out)
    found = study(Setting(seeds=seeds))
    relations = ("same", "different", "orthogonal")

    def cell(row: dict) -> str:
        return f"{row['previous']:.3f}" + ("" if row["reference"] is None else f" ({row['reference']:.3f})")

    title = "Cosine of the consistency gradient with the step before (reference values in brackets)"
    table = Table("optimizer", "alpha", *relations, title=title, title_justify="left")
    for i in range(0, len(found["table"]), len(relations)):
        rows = found["table"][i : i + len(relations)]
        table.add_row(rows[0]["optimizer"], str(rows[0]["alpha"]), *(cell(row) for row in rows))
    _console().print(table)
    for name, d in found["descent"].items():
        _console().print(f"{name}: stable below {d['limit']:.2f}; {d['steps']:,} steps to 1 % of a slow direction, without noise")
    print(f"Open {write_page(found, out)}")


@lab.command(name="gradients")
def lab_gradients(
    run: str, /, *, batches: Whole = 24, batch_size: Whole | None = None, settle: Whole | None = None, lr: float | None = None,
    device: str = "auto", out: Path | None = None,
) -> None:  # fmt: skip
    """Ask a real network what its teacher takes back: consistency gradients on the same batch, new masks, new crops, other images.

    Parameters
    ----------
    run
        A run directory, or a recipe's name for a new network.
    batches
        Steps that are looked at.
    batch_size
        Images a batch [default: the recipe's, at most 128].
    settle
        Steps before, at the same learning rate [default: three half-lives of the teacher, from 10 to 100].
    lr
        Learning rate of these steps [default: half the recipe's peak for this batch].
    device
        auto, cpu, cuda, cuda:1 or mps.
    out
        Where gradients.html, its figures and gradients.json go [default: RUN/lab, or runs/lab-gradients].
    """
    from rich.table import Table

    from .lab.gradients import Setting, study, write_page

    out = out or (Path(run) / "lab" if Path(run).is_dir() else Path("runs/lab-gradients"))
    _check_folder(out)
    setting = Setting(batches=batches, batch_size=batch_size, settle=settle, lr=lr, device=device)
    found = study(run, setting, _console().print)
    table = Table("after a step on batch B", "similarity", "cosine with the step", "with AdamW's moment", "ratio", title_justify="left")
    for line in found["summary"]:
        cells = ("{:.3f} [{:.3f}, {:.3f}]".format(*line[key]) for key in ("similarity", "previous", "moment", "ratio"))
        table.add_row(f"{line['condition']}: {line['what']}", *cells)
    _console().print(table)
    for _, text in found["said"]:
        _console().print(text)
    print(f"Open {write_page(found, out)}")


@app.command
def verify(
    method: str, /, *, recipe: str | None = None, data: str | None = None, steps: Whole = 5, batch_size: Whole = 32,
    device: str = "auto", json: Path | None = None,
) -> int:  # fmt: skip
    """Is training the same however it is carried out here? Micro-batches, kill and resume, two processes, compiled; a yes or no each.

    Parameters
    ----------
    method
        A method's name (`rcmae list`).
    recipe
        Your recipe: a name or the path of a TOML file [default: the method's on the embedded set]. It is taken as it is but for its
        length, batch and warm-up.
    data
        Other images than the recipe's.
    steps
        Steps that each run makes.
    batch_size
        Images a step; it is cut into 4.
    device
        auto, cpu, cuda, cuda:1 or mps.
    json
        Also write the numbers to this file.
    """
    from rich.table import Table

    from .lab.verify import to_json
    from .lab.verify import verify as run
    from .methods.recipes import digits_recipe, load_recipe, with_method

    _check_place(json)
    chosen = with_method(load_recipe(recipe), method) if recipe else digits_recipe(method)
    chosen = replace(chosen, data=data or chosen.data)
    rows = run(chosen, steps=steps, batch_size=batch_size, device=device, say=_console().print)
    parts = list(dict.fromkeys(part for row in rows for part in row.differences))
    table = Table(f"{method}, {how_many(steps, 'step')} in fp32", "", *parts, title="Largest difference, relative", title_justify="left")
    for row in rows:
        word = "yes" if row.holds and row.differences else "not run" if row.holds else "NO"
        table.add_row(row.name, word, *(f"{row.differences[p]:.1e}" if p in row.differences else "" for p in parts))
    _console().print(table)
    for row in rows:
        if row.note:
            print(f"{row.name}: {row.note}")
    if json:
        json.write_text(to_json(rows, chosen, device), encoding="utf-8")
    return 0 if all(row.holds for row in rows) else 1


compare = App(name="compare", help="Methods side by side.")
app.command(compare)


@compare.command(name="cost")
def compare_cost(
    *, models: Annotated[tuple[str, ...], Many] = ("vit_small_patch16", "vit_base_patch16"),
    methods: Annotated[tuple[str, ...], Many] = (),
    batch_size: Whole = 128, precision: Literal["bf16", "fp32"] = "bf16", measure: bool = False, measured_batch: Whole = 16,
    device: str = "auto", fit: float | None = None, out: Path = Path("runs/compare-cost"),
) -> None:  # fmt: skip
    """Count what a training step of each method costs: FLOPs, bytes kept for the backward pass, memory at its worst.

    Parameters
    ----------
    models
        Named sizes (`rcmae list`) or timm:NAME.
    methods
        Methods; ratios are to the first one [default: all].
    batch_size
        Batch size for the highest memory of a step.
    precision
        Of the matrix products.
    measure
        Also make real steps on this device: memory, and images a second.
    measured_batch
        Images a step there.
    device
        auto, cpu, cuda or cuda:1.
    fit
        Tell the largest batch whose step stays within so many GiB.
    out
        Where cost.html and cost.json go.
    """
    from rich.table import Table

    from .compare.cost import study, write_page
    from .engine.distributed import pick_device
    from .methods import METHODS
    from .methods.recipes import recipe_type

    _check_folder(out)
    if fit is not None and fit <= 0:
        raise ConfigError(f"fit must be above 0, not {fit}")
    if min(batch_size, measured_batch) < 2:
        raise ConfigError("batch_size and measured_batch must be 2 or more: some methods compare images")
    for name in methods:
        recipe_type(name, "--methods")
    where = str(pick_device(device)) if measure else None
    found = study(
        models, methods or tuple(METHODS), batch=batch_size, precision=precision, device=where, measured_batch=measured_batch, fit=fit,
        say=_console().print,
    )  # fmt: skip
    for model in models:
        rows = [r for r in found["rows"] if r["model"] == model]
        heads = ["", "GFLOP", "x", "kept MB", "x", "static", f"peak at {batch_size}", *([f"fits {fit:g} GiB"] if fit else [])]
        table = Table(*heads, title=f"{model}, {precision}: an image, and GiB a step", title_justify="left")
        for r in rows:
            cells = [f"{r['flops'] / 1e9:.1f}", f"{r['flops_ratio']:.2f}", f"{r['saved'] / 1e6:.1f}", f"{r['saved_ratio']:.2f}"]
            cells += [f"{r['static'] / 2**30:.2f}", f"{r['peak'] / 2**30:.1f}", *([str(r["fits"])] if fit else [])]
            table.add_row(r["name"], *cells)
        _console().print(table)
        if where:
            heads = ["", "predicted GiB", "measured GiB", "ratio", "images/s"]
            table = Table(*heads, title=f"{model}, {precision}, {measured_batch} images on {where}", title_justify="left")
            for r in rows:
                predicted, measured = r["predicted_there"] / 2**30, r["measured_peak"] / 2**30
                table.add_row(
                    r["name"], f"{predicted:.2f}", f"{measured:.2f}", f"{measured / predicted:.2f}", f"{r['images_per_second']:.1f}"
                )
            _console().print(table)
    print(f"Open {write_page(found, out)}")


@compare.command(name="race")
def compare_race(
    *arms: str, budget: str = "4m", data: str | None = None, settings: Annotated[tuple[str, ...], Many] = (), seeds: Whole = 3,
    probes: Whole = 5, probe_train: Whole = 2000, probe_test: Whole = 4000, jobs: Whole | None = None, device: str = "auto",
    out: Path = Path("runs/compare-race"),
) -> None:  # fmt: skip
    """Which method learns more from these images on an equal budget? The same command goes on where it stopped.

    Parameters
    ----------
    arms
        What races: methods, recipes or recipe files, each with its own settings behind commas, as in "rcmae, half_life=5%".
        "mae averaged" is MAE whose weights are averaged for evaluation only [default: all methods, and it].
    budget
        What each may spend: a time on this device (4m, 1h), '2e13 flops' or '300000 images'.
    data
        Labelled images: a folder of classes, or whatever pretrain takes [default: the recipes'].
    settings
        Settings of every arm whose method has them: --settings model=vit_tiny_patch16 batch_size=64.
    seeds
        Runs an arm; arms are compared within a seed.
    probes
        Times that a run is probed.
    probe_train
        Labelled images that the probes are fitted on.
    probe_test
        Labelled images that they are scored on.
    jobs
        Runs at a time, which share the cores [default: a run a core on a CPU, else one].
    device
        auto, cpu, cuda, cuda:1 or mps.
    out
        Where race.html, its figures, race.json and the runs go.
    """
    import os

    from rich.table import Table

    from .compare.race import ARMS, KINDS, Setting, parse_budget, race, write_page
    from .compare.race import arms as contestants
    from .engine.distributed import pick_device

    _check_folder(out)
    counts = {"seeds": (seeds, 2), "probes": (probes, 1), "probe_train": (probe_train, 1), "probe_test": (probe_test, 1), "jobs": (jobs, 1)}
    if problems := [
        f"{name} must be {least} or more, not {value}" for name, (value, least) in counts.items() if value is not None and value < least
    ]:
        raise ConfigError("; ".join(problems))
    jobs = jobs or ((os.cpu_count() or 1) if pick_device(device).type == "cpu" else 1)
    setting = Setting(parse_budget(budget), seeds, probes, probe_train, probe_test, device, jobs)
    found = race(contestants(arms or ARMS, data, settings), setting, out, _console().print)
    first = found["rows"][0]["arm"]
    table = Table("% right", "images", *KINDS, f"linear against {first}", title=f"After {setting.budget} each", title_justify="left")
    table.columns[0].no_wrap = table.columns[-1].no_wrap = True
    for row in found["rows"]:
        against = row["linear against"].get(first)
        cells = [f"{row['images']:,}", *(f"{sum(row[kind]) / len(row[kind]):.1f}" for kind in KINDS)]
        table.add_row(row["arm"], *cells, "{:+.1f} [{:+.1f}, {:+.1f}]".format(*against) if against else "")
    _console().print(table)
    for text in found["said"]:
        _console().print(text)
    print(f"Open {write_page(found, out)}")


evaluate = App(name="evaluate", help="What a backbone is worth on labelled images, in the numbers that papers report.")
app.command(evaluate)


def _command_of(kind: type[Task]) -> Callable[..., None]:
    """The command of an evaluation task: its options are the task's fields and what every task is told."""

    def command(
        backbone: Annotated[str, Parameter(help=kind.takes)], /, *, task: Annotated[kind, Flat] = kind(),
        options: Annotated[Evaluation, Flat] = Evaluation(),
    ) -> None:  # fmt: skip
        _evaluate(backbone, task, options)

    command.__doc__ = kind.__doc__
    return command


for name, kind in TASKS.items():
    evaluate.command(_command_of(kind), name=name)


@dataclass(frozen=True, kw_only=True)
class Compared(Evaluation):
    """What worth-it is told. It takes every network, and shares and seeds of its own, so help does not offer these."""

    which: Annotated[Which, Parameter(show=False)] = "both"
    labels: Annotated[float, Parameter(show=False)] = 100.0
    seed: Annotated[Whole, Parameter(show=False)] = 0


@evaluate.command(name="worth-it")
def evaluate_worth_it(
    backbone: str, /, *, task: Annotated[Worth, Flat] = Worth(), tuning: Annotated[Finetune, Flat] = Finetune(),
    options: Annotated[Compared, Flat] = Compared(),
) -> None:  # fmt: skip
    """Did pre-training pay? Fine-tuning from it and from scratch, at several shares of the labels, with intervals and a plain verdict.

    Parameters
    ----------
    backbone
        A run directory, an exported folder, a .safetensors, an official .pth, timm:NAME; scratch:ANY OF THESE has new weights.
    """
    if options.out:
        _check_folder(options.out)
    if any(getattr(options, name) != getattr(Compared, name) for name in ("which", "labels", "seed")):
        raise ConfigError("worth-it compares all networks, at --percents and over --seeds; leave out --which, --labels and --seed")
    task.check_settings(backbone, tuning, options)
    _load_libraries()

    from rich.table import Table

    from .tasks.context import place
    from .tasks.worth import worth_it

    found = worth_it(backbone, task, tuning, options, _console().print)
    if not found["rows"]:  # not the first rank
        return
    table = Table("% right", "labels", "mean", "seeds", "against scratch", title_justify="left")
    for row in found["rows"]:
        gain = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*row["gain"]) if "gain" in row else ""
        seeds = " ".join(f"{value:.1f}" for value in row["seeds"])
        table.add_row(row["arm"], f"{row['percent']:g} %", f"{sum(row['seeds']) / len(row['seeds']):.1f}", seeds, gain)
    _console().print(table)
    for text in found["said"]:
        _console().print(text)
    _report_of_backbone(place(backbone, options))


def _evaluate(backbone: str, task: Task, options: Evaluation) -> None:
    if options.out:
        _check_folder(options.out)
    task.check_settings(backbone, options)
    _load_libraries()

    from rich.table import Table

    from .report.severity import write_figures
    from .tasks.context import place
    from .tasks.evaluate import evaluate

    records = evaluate(backbone, task, options)
    if not records:  # not the first rank
        return
    title = f"{records[0]['task']}, %, {how_many(records[0]['test_images'], 'test image')}"
    table = Table("", *(record["network"] for record in records), title=title, title_justify="left")
    for name in dict.fromkeys(name for record in records for name in record["metrics"]):
        table.add_row(name, *(f"{record['metrics'][name]:.2f}" if name in record["metrics"] else "" for record in records))
    _console().print(table)
    where = place(backbone, options)
    for file in write_figures(records, where):
        print(f"Open {file}")
    _report_of_backbone(where)
    print(f"wrote {where}")


def _report_of_backbone(place: Path) -> None:
    """Results that lie in a run of pre-training, however deep, are told by its report."""
    from .report.files import kind_of

    if run := next((folder for folder in (place, *place.parents) if kind_of(folder) == "pre-training"), None):
        print(f"Open {_draw(run)}")


def _draw(run: Path) -> Path:
    from .report import write_report

    with Screen(True).progress(f"drawing the report of {run}", 1):
        return write_report(run)


detect = App(name="detect", help="Objects: Mask R-CNN on a backbone, boxes and masks in COCO's layout.")
app.command(detect)


@detect.command(name="train")
def detect_train(
    backbone: str, /, *, options: Annotated[Detection, Flat] = Detection(), machine: Annotated[Workplace, Flat] = Workplace()
) -> None:
    """Train a detector on a backbone; a run that is already in --out goes on.

    Parameters
    ----------
    backbone
        A run directory, an exported folder, a .safetensors, an official .pth, timm:NAME, or scratch:BACKBONE for new weights.
    """
    from .tasks.detection.commands import train_detector

    if machine.out:
        _check_folder(machine.out)
    run = train_detector(backbone, options, machine)
    if run is None:  # not the first rank
        return
    print(f"Open {_draw(run)}")
    _report_of_backbone(run.parent)


@detect.command(name="eval")
def detect_eval(checkpoint: Path, /, *, options: Annotated[Scoring, Flat] = Scoring()) -> None:
    """COCO's average precision of boxes and masks, by class and size.

    Parameters
    ----------
    checkpoint
        A run of `rcmae detect train`, or its export/detector.
    """
    from rich.table import Table

    from .tasks.detection.commands import percent, score_detector

    if options.out:
        _check_folder(options.out)
    found = score_detector(checkpoint, options)
    if found is None:  # not the first rank
        return
    parts = [part for part in ("box", "mask") if part in found]
    title = f"{found['data']}, {how_many(found['test_images'], 'image')}, {found['preset']}"
    for key, kind in (("stats", "%"), ("per_class", "AP of class, %")):
        cells = [percent(found[part][key]) for part in parts]
        table = Table(kind, *parts, title=title if key == "stats" else None, title_justify="left")
        for name in cells[0]:
            table.add_row(name, *(cell[name] for cell in cells))
        _console().print(table)
    rule = found[parts[0]]["areas"]
    bounds = " and ".join(f"{bound:,.0f}" for bound in found[parts[0]]["bounds"])
    print(f"small, medium, large: below and above {bounds} px of area, {'as COCO' if rule == 'coco' else 'scaled to these images'}")
    print(f"wrote {options.out or checkpoint / 'eval'}")


@detect.command(name="show")
def detect_show(
    checkpoint: Path, /, *images: Path, out: Path = Path("runs/detect-show"), threshold: float = 0.5, device: str = "auto"
) -> None:
    """Pictures with boxes, masks, classes and scores.

    Parameters
    ----------
    checkpoint
        A run of `rcmae detect train`, or its export/detector.
    images
        Image files.
    out
        The folder that the pictures go to.
    threshold
        Objects of a lower score are left out.
    device
        auto, cpu, cuda, cuda:1 or mps.
    """
    from .report.detect import show_detections

    if not images:
        raise ConfigError("name the images: rcmae detect show CHECKPOINT IMAGE...")
    _check_folder(out)
    for written in show_detections(checkpoint, images, out, threshold, device):
        print(f"Open {written}")


@detect.command(name="export")
def detect_export(checkpoint: Path, /, *, out: Path = Path("pyramid.pt2")) -> None:
    """Backbone and pyramid of a detector as a program that torch alone runs (torch.export.load).

    Parameters
    ----------
    checkpoint
        A run of `rcmae detect train`, or its export/detector.
    out
        The .pt2 file to write.
    """
    from .tasks.detection.commands import write_program

    print(f"wrote {write_program(checkpoint, out)}")


@app.command(name="list")
def list_all() -> None:
    """Show data, methods, models and recipes."""
    from rich.table import Table

    from .data.sources import SOURCES
    from .methods import METHODS
    from .methods.recipes import parse_recipe
    from .models.autoencoder import SIZES

    table = Table("--data", "", "objects", title="Data", title_justify="left")
    for kind in reversed(SOURCES):
        table.add_row(kind.form, (kind.__doc__ or "").splitlines()[0], "yes" if kind.has_objects else "")
    _console().print(table)
    table = Table("recipe", "method", "what for", title="Recipes", title_justify="left")
    for name, file in shipped_recipes().items():
        text = file.read_text(encoding="utf-8")
        table.add_row(name, parse_recipe(text, name).method, text.splitlines()[0].lstrip("# "))
    _console().print(table)
    table = Table("recipe", "what for", title="Recipes of fine-tuning (rcmae evaluate finetune --recipe)", title_justify="left")
    for name, file in shipped_recipes("finetune").items():
        table.add_row(name, file.read_text(encoding="utf-8").splitlines()[0].lstrip("# "))
    _console().print(table)
    table = Table("recipe", "what for", title="Recipes of detection (rcmae detect train --recipe)", title_justify="left")
    for name, file in shipped_recipes("detection").items():
        table.add_row(name, file.read_text(encoding="utf-8").splitlines()[0].lstrip("# "))
    _console().print(table)
    table = Table("model", "patch", "encoder", "decoder", title="Models (width x depth, heads)", title_justify="left")
    for name, s in SIZES.items():
        table.add_row(name, str(s.patch), *("{} x {}, {}".format(*part) for part in (s.encoder, s.decoder)))
    table.add_row("timm:NAME", "", "any plain timm VisionTransformer", "256 x 4, 8")
    _console().print(table)
    table = Table("method", "", title="Methods", title_justify="left")
    for name, method in METHODS.items():
        table.add_row(name, (method.__doc__ or "").splitlines()[0])
    _console().print(table)


WAITS = {"pretrain", "check", "import", "report", "lab", "verify", "compare", "evaluate", "detect"}
"Commands that load these libraries, which takes seconds, and then work on something."

LIBRARIES = ("torch", "torchvision", "timm", "sklearn.linear_model", "matplotlib.figure")


def main(argv: Sequence[str] | None = None, program: bool = False) -> int:
    """Run one command. Every expected failure is one line on stderr and its documented exit code.

    `program` says that this process is there for nothing else, so that a signal ends it without waiting for loader processes.
    """
    with signals.answered():
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        except (signals.Interrupted, Preempted) as e:
            saved = isinstance(e, Preempted)
            text = str(e) if saved else f"stopped by {e}; nothing that was saved is lost: run the same command again"
            code = _fail(text, e.exit_code, "stopped")
            if program and signals.asked():
                signals.end_at_once(code)
            return code


def _run(argv: list[str]) -> int:
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    waits = bool(argv) and argv[0] in WAITS and not {"--help", "-h"} & set(argv)
    if waits and _first_rank():
        print(f"rcmae {' '.join(argv)}", flush=True)  # the first line within a second, whatever is loaded after it
    try:
        if argv[:1] == ["pretrain"]:
            _load_libraries()  # its options depend on what they hold; the others refuse a wrong option without waiting for them
            app.config = _prepare_pretrain(argv)
        else:
            app.config = ()
        command, bound, _ = app.parse_args(argv, exit_on_error=False, print_error=False)
        if waits and argv[0] != "evaluate":  # which looks at the values of its options first
            _load_libraries()
        result = command(*bound.args, **bound.kwargs)
    except CycloptsError as e:
        return _fail(" ".join(str(e).split()), 2)
    except Preempted:
        raise
    except RcmaeError as e:
        if debug:
            traceback.print_exc()
        return _fail(_as_typed(str(e), argv) if isinstance(e, ConfigError) else str(e), e.exit_code)
    except MemoryError:
        return _fail("the host ran out of memory; try a smaller batch or fewer --workers", 8)
    except OSError as e:
        signals.raise_if_asked()  # raised within a library, it can come out as something else
        if debug:
            raise
        return _fail(f"{e.filename or 'a file'} cannot be used: {e.strerror or first_line(e)}", 6)
    except Exception as e:
        signals.raise_if_asked()
        if debug:
            raise
        with contextlib.suppress(OSError):
            Path("rcmae-error.log").write_text(traceback.format_exc(), encoding="utf-8")
        return _fail(f"unexpected {type(e).__name__}: {first_line(e)}; see rcmae-error.log", 1)
    return result if isinstance(result, int) else 0


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _load_libraries() -> None:
    """It takes 5 seconds, the first time after an installation a minute."""
    if all(name in sys.modules for name in LIBRARIES):
        return
    with Screen(_first_rank()).progress("loading PyTorch and other libraries", len(LIBRARIES)) as tick:
        for done, name in enumerate(LIBRARIES, 1):
            import_module(name)
            tick(done)


def _prepare_pretrain(argv: list[str]) -> tuple[Dict, ...]:
    """Give `pretrain` the flags of the method that it is called for, and the values of the recipe as their defaults.

    The recipe is the one that is named, or that of the run in --out. It is only a source of defaults: cyclopts builds the one that runs
    from these values and the flags. Raises ConfigError for a flag that another method has.
    """
    from .engine.checkpoint import checkpoints
    from .methods import METHODS
    from .methods.recipes import load_recipe, spoken, with_method

    given = {}
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word.startswith("--"):
            key, equals, value = word.removeprefix("--").partition("=")
            given[key.replace("-", "_")] = value if equals else following
    if given.get("out") == "":
        raise ConfigError("--out is empty; name a folder")
    words = [a for a in argv[1:] if a not in ("--help", "-h")]
    recipe_name = next((a for a in words[:1] if not a.startswith("-")), None)
    begun = Path(given.get("out", "")) / "recipe.toml"
    resumes = recipe_name is None and "out" in given and begun.exists() and checkpoints(begun.parent / "checkpoints")
    recipe = load_recipe(str(begun) if resumes else recipe_name or "embedded")
    recipe = with_method(recipe, given.get("method", recipe.method))
    for key in given.keys() - flags(type(recipe)).keys() - flags(Machine).keys():
        owners = [other for other, method in METHODS.items() if key.removeprefix("no_") in flags(method.recipe_type)]
        if owners and recipe.method not in owners:
            raise ConfigError(f"--{key.replace('_', '-')} is a setting of {spoken(owners)}; this run's method is {recipe.method}")
    del app["pretrain"]
    app.command(_pretrain(recipe, recipe_name), name="pretrain")
    values = {k: v for k, v in flat(recipe).items() if k not in replaced_by(recipe, given)}
    return (Dict({"pretrain": values}, source=f"recipe {recipe_name or 'embedded'}"),)


def _check_folder(out: Path) -> None:
    """Said before the work, not after it."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a folder")


def _check_place(json: Path | None) -> None:
    """Likewise."""
    if json and (json.is_dir() or not json.parent.is_dir()):
        raise ConfigError(f"--json {json}: " + ("that is a folder" if json.is_dir() else f"there is no folder {json.parent}"))


def _as_typed(text: str, argv: list[str]) -> str:
    """What is said of settings, whose names are those of a recipe file, with the flags of the command that was called.

    A name is one with an underscore, or the word that a problem begins with. Others stay as they are: what stands in a recipe's file, or
    behind --settings.
    """
    arguments = app.parse_commands(argv)[1][-1].assemble_argument_collection()
    known = {name.removeprefix("--").replace("-", "_"): name for each in arguments for name in each.names if name.startswith("--")}
    names = r"(?<![\w./'-])[a-z]+(?:_[a-z]+)+(?![\w./='-])|(?:^|(?<=; ))[a-z]+(?= (?:must|is|are|has|-?\d))"
    return re.sub(names, lambda found: known.get(found[0], found[0]), text)


def _fail(message: str, code: int, word: str = "error") -> int:
    print(f"rcmae: {word}: {' '.join(message.split())}", file=sys.stderr)
    return code


def _console():
    from rich.console import Console

    return Console(highlight=False)
