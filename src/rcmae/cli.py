"""The command line. Each command parses its options, calls one function and prints the result.

torch is imported inside the commands, so that --help is fast (except for `pretrain`, whose flags depend on
the method).
"""

import contextlib
import os
import re
import select
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from importlib import import_module
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from cyclopts import (
    App,
    CycloptsError,
    Group,
    Parameter,
    Token,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)
from cyclopts.config import Dict
from rich.console import Console
from rich.table import Column, Table

from . import __version__
from .compare.settings import RaceOptions
from .config import (
    BaseRuntimeConfig,
    Recipe,
    RuntimeConfig,
    changed,
    check,
    flags,
    flat,
    how_many,
    readable_size,
    reset_by,
    sections,
    shipped_recipes,
)
from .engine import signals
from .engine.console import Screen, clock
from .errors import ConfigError, Preempted, RcmaeError, SettingsError, first_line
from .lab.settings import GradientSettings
from .tasks.detection.settings import DetectionOptions, ScoringOptions
from .tasks.evaluation import TASKS
from .tasks.evaluation.base import EvaluationOptions, Pool, ReadingOptions, Task
from .tasks.evaluation.finetune import FineTune
from .tasks.evaluation.worth import Worth


def _default(value: Any) -> str:
    """A default in the help, as one would type it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(_default, value))
    if isinstance(value, float):
        return f"{value / 1e6:g}e6" if value >= 1e6 else f"{value:g}"
    return str(value)


app = App(
    name="rcmae",
    version=__version__,
    help="Self-supervised pre-training of Vision Transformers with RC-MAE.",
    help_epilogue="Exit codes: 0 success, 1 unexpected error (or verify found a difference), 2 usage or "
    "recipe, 3 data, 4 checkpoint, 5 diverged or stopped by an alarm, 6 storage, 7 lost process, 8 out of "
    "memory, 75 stopped and saved (run the same command again), 130 Ctrl-C and 143 SIGTERM before anything "
    "was saved. --debug shows the traceback of an error.",
)


def _integer(kind: type, tokens: Sequence[Token]) -> int:
    """Refuse 1.5, which cyclopts would round to 2."""
    value = tokens[0].value
    if not value.lstrip("+-").isdecimal():
        raise ValueError(f"{value!r} is not an integer")
    return int(value)


Integer = Annotated[int, Parameter(converter=_integer)]
Pixels = Annotated[float, Parameter(show_default=_default)]
Device = Annotated[str, Parameter(help="auto, cpu, cuda, cuda:1 or mps.")]
Json = Annotated[Path | None, Parameter(help="Also write the results to this file.")]
Detector = Annotated[Path, Parameter(help="A run of `rcmae detect train`, or its export/detector.")]
Many = Parameter(consume_multiple=True, negative_iterable=())
Flat = Parameter(name="*", negative_iterable=())


def _flat(title: str, position: int, text: str = "") -> Parameter:
    """`Flat`, under a heading in the help."""
    return Parameter.combine(Flat, Parameter(group=Group(title, help=text, sort_key=position)))


def _as_flags(section: type, how: Parameter = Flat, values: dict[str, Any] | None = None) -> None:
    """Make the fields of a section flags without the section's name: `--size`, not `--images.size`. Help
    shows `values`, if given, instead of the defaults of the class."""
    how(section)
    for field in fields(section):
        kind: Any = field.type
        if field.type in (int, int | None):
            kind = Integer if field.type is int else Integer | None
        elif get_origin(field.type) is tuple and Ellipsis in get_args(field.type):
            kind = Annotated[field.type, Many]
        if not is_dataclass(field.type) and field.default is not MISSING:
            value = field.default if values is None else values.get(field.name)
            shown = False if value in (None, (), "") else _default(value)
            kind = Annotated[kind, Parameter(show_default=shown)]
        if kind is not field.type:
            section.__annotations__[field.name] = kind


for options in (
    BaseRuntimeConfig,
    RuntimeConfig,
    ReadingOptions,
    EvaluationOptions,
    *TASKS.values(),
    Worth,
    DetectionOptions,
    ScoringOptions,
    GradientSettings,
    RaceOptions,
):
    _as_flags(options)


def _summary(cls: type) -> str:
    """The first paragraph of the docstring, as one line."""
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split())


def _pretrain(loaded: Recipe, loaded_name: str | None = None) -> Callable[..., None]:
    """The command `pretrain` with the flags of a recipe's method and the recipe's values as defaults;
    `loaded_name` is the name it was loaded by."""
    cls, values = type(loaded), flat(loaded)

    def pretrain(
        recipe_name: Annotated[str | None, Parameter(name="RECIPE")] = None,
        /,
        *,
        recipe: Annotated[cls, _flat("Recipe", 1)] = cls(),  # type: ignore
        runtime: Annotated[RuntimeConfig, _flat("Runtime", 99)] = RuntimeConfig(),
    ) -> None:
        """Pre-train a Vision Transformer; a run that is already in --out resumes.

        Parameters
        ----------
        recipe_name
            Name of a recipe (`rcmae list`) or path of a TOML file [default: bundled]. Options override its
            settings.
        """
        from .pretraining import pretrain as run

        # The flags have been parsed with the defaults of another recipe if the name does not come first.
        if recipe_name != loaded_name:
            raise ConfigError(f"write the recipe first: rcmae pretrain {recipe_name} --...")
        bundled = recipe_name is None and loaded.data == Recipe.data
        if bundled and runtime.out and not runtime.out.exists() and _first_rank():
            print(f"no run in {runtime.out} and no recipe: this is a new run of the recipe bundled")
        run(recipe, runtime)

    for i, (name, section) in enumerate(sections(cls).items(), 2):
        _as_flags(section, _flat(name, i, _summary(section)), values)
    _as_flags(cls, values=values)
    return pretrain


app.command(_pretrain(Recipe()), name="pretrain")


@app.command(name="check")
def check_data(
    path: str,
    /,
    *,
    val: str | None = None,
    recipe: str | None = None,
    channels: Integer | None = None,
    batch_size: Integer | None = None,
    max_corrupt_fraction: float = RuntimeConfig().max_corrupt_fraction,
    max_pixels: Pixels = RuntimeConfig().max_pixels,
    json: Json = None,
) -> int:
    """Audit a data set before training: counts, sizes, unreadable files, duplicates, statistics; and the
    command to train on it on this machine, with its time, memory and disk.

    Parameters
    ----------
    path
        The images: a folder, or another source listed by `rcmae list`.
    val
        A validation set, to search for images that are in both.
    recipe
        The recipe to plan for [default: by the images and this machine].
    channels
        Channels of an image [default: the recipe's].
    batch_size
        Images per step [default: the recipe's].
    max_corrupt_fraction
        The fraction of unreadable images that a run would accept.
    max_pixels
        Images of more pixels count as unreadable.
    """
    from .data import audit
    from .data.sources import recipe_for
    from .methods.recipes import load_recipe
    from .planning import lines, plan, suggested

    _check_json(json)
    name = recipe or recipe_for(path)
    given = {k: v for k, v in {"batch_size": batch_size, "channels": channels}.items() if v is not None}
    chosen = check(changed(load_recipe(name), **given))
    runtime = check(RuntimeConfig(max_corrupt_fraction=max_corrupt_fraction, max_pixels=max_pixels))
    screen = Screen(True)
    images = audit.indexed(path, chosen, screen, max_pixels)
    other = audit.indexed(val, chosen, screen, max_pixels) if val else None
    result = audit.audit(images, other, chosen, max_corrupt_fraction, screen)
    if recipe is None and name == "folder":
        name, settings = suggested(result.shorter_side)
        chosen = check(changed(load_recipe(name), **settings, **given))
        result = replace(result, batch=chosen.optim.batch_size, crop=chosen.images.shape)
    _console().print(audit.render(result))
    if json:
        json.write_text(audit.to_json(result), encoding="utf-8")
    if not result.fit:
        return 3
    planned = plan(name, changed(chosen, data=path), images, screen, runtime)
    screen.say("\n".join(lines(planned)))
    if json:
        json.write_text(audit.to_json(result, plan=asdict(planned)), encoding="utf-8")
    return 0


@app.command(name="pack")
def pack_data(
    data: str,
    out: Path,
    /,
    *,
    size: Integer | None = None,
    original: bool = False,
    channels: Integer = 3,
    workers: Integer | None = None,
    max_pixels: Pixels = RuntimeConfig().max_pixels,
) -> None:
    """Pack images into tar shards, reduced once, so that training reads them faster; the same command
    continues after an interruption.

    Parameters
    ----------
    data
        The images: a folder, or another source listed by `rcmae list`. Labels and parts are kept.
    out
        The folder to write, for --data.
    size
        Shorter side in pixels [default: 256]; smaller images are not enlarged.
    original
        Keep the bytes of the images instead.
    channels
        Channels of an image, for --original.
    workers
        Processes [default: one for each core].
    max_pixels
        Images of more pixels count as unreadable.
    """
    from .data.pack import MANIFEST, pack

    if original and size is not None:
        raise ConfigError("--original keeps the size of the images: leave --size out, or --original")
    check(RuntimeConfig(max_pixels=max_pixels))
    side = None if original else 256 if size is None else size
    result = pack(data, out, side, channels, workers, Screen(True), max_pixels)
    if result.unreadable:
        count, first = how_many(len(result.unreadable), "unreadable image"), result.unreadable[0]
        print(f"left out {count}, such as {first['where']} ({first['reason']}): {out / MANIFEST} lists all")
    print(
        f"packed {how_many(result.images, 'image')} into {how_many(result.shards, 'shard')} of "
        f"{readable_size(result.size)}: --data {shlex.quote(str(out))}"
    )


@app.command
def report(run: Path, /) -> None:
    """Write the report of a run, RUN/report.html, again.

    Parameters
    ----------
    run
        A run directory of `rcmae pretrain` or `rcmae detect train`.
    """
    _load_libraries()
    print(_draw(run))


@app.command
def embed(
    backbone: str,
    /,
    *,
    data: str,
    out: Path,
    which: Literal["teacher", "student"] = "teacher",
    pool: Pool | None = None,
    size: Integer | None = None,
    height: Integer | None = None,
    heads: Integer | None = None,
    batch_size: Integer = 256,
    device: Device = "auto",
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    workers: Integer | None = None,
    feature_cache: Path | None = None,
    reading: Annotated[ReadingOptions, Flat] = ReadingOptions(),
) -> None:
    """Write the features of every image of a set to a file, with file names, labels and classes.

    Parameters
    ----------
    backbone
        A run directory, an exported folder, a .safetensors, an official .pth, timm:NAME; scratch:ANY OF THESE
        is the same network, randomly initialized.
    data
        The images: a folder, or another source listed by `rcmae list`.
    out
        The file to write, which is replaced if it exists: .parquet (needs the [parquet] extra) or .npz.
    which
        Which network of a run or an official checkpoint.
    pool
        The feature of an image: the mean over the patches, the class token, or both one after the other
        [default: that of the method that trained the backbone, mean if it is not known].
    size
        Side of the images in pixels (width, if height is given) [default: the network's]. For another one the
        positions are resampled.
    height
        Height of images that are not square.
    heads
        Attention heads, for weights that come without a configuration.
    batch_size
        Images that pass the network at a time.
    precision
        Precision of the backbone's matrix products.
    workers
        Loader processes [default: chosen by the data and the number of cores].
    feature_cache
        Where to keep features, so that the command continues after an interruption [default: ~/.cache/rcmae].
    """
    from .tasks.embed import embed as run

    result = run(
        backbone,
        data,
        out,
        which=which,
        pool=pool,
        size=size,
        height=height,
        heads=heads,
        batch_size=batch_size,
        device=device,
        precision=precision,
        workers=workers,
        reading=reading,
        cache=feature_cache,
    )
    if _first_rank():
        unreadable = len(result["unreadable"])
        left_out = f"; left out {how_many(unreadable, 'unreadable image')}" if unreadable else ""
        print(
            f"wrote {out}: {how_many(result['images'], 'image')} x {how_many(result['dimensions'], 'value')} "
            f"({result['network']}, {result['pool']}){left_out}"
        )


@app.command
def look(
    backbone: str,
    /,
    *images: Path,
    out: Path,
    data: str | None = None,
    which: Literal["teacher", "student"] = "teacher",
    pool: Pool | None = None,
    ratios: Annotated[tuple[float, ...], Many] = (0.5, 0.75, 0.9),
    device: Device = "auto",
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    workers: Integer | None = None,
    feature_cache: Path | None = None,
    reading: Annotated[ReadingOptions, Flat] = ReadingOptions(),
) -> None:
    """Draw what a backbone sees in images: reconstructions, patch features, attention, nearest neighbors.

    Parameters
    ----------
    backbone
        A run directory, an exported folder, a .safetensors, an official .pth, timm:NAME.
    images
        Image files, or folders, of which the first 8 images are taken.
    out
        Output folder for look.html and its pictures.
    data
        Also show the nearest neighbors of each image among these images: a folder, or another source listed
        by `rcmae list`.
    which
        Which network of a run or an official checkpoint.
    pool
        The feature that neighbors are found by: the mean over the patches, the class token, or both [default:
        that of the method that trained the backbone].
    ratios
        Fractions of hidden patches in reconstructions.
    precision
        Precision of the features of --data.
    workers
        Loader processes for --data [default: chosen by the data and the number of cores].
    feature_cache
        Where to keep the features of --data [default: ~/.cache/rcmae].
    """
    from .report.look import look as run

    result = run(
        backbone,
        images,
        out,
        data=data,
        which=which,
        pool=pool,
        ratios=ratios,
        device=device,
        precision=precision,
        workers=workers,
        reading=reading,
        cache=feature_cache,
    )
    files = how_many(len(result["files"]), "picture")
    print(f"{files} of {how_many(len(result['images']), 'image')}. Open {result['page']}")


@app.command
def runs(
    *folders: Path,
    compare: Path | None = None,
    axis: Literal["steps", "images"] | None = None,
    json: bool = False,
) -> None:
    """List runs: state, steps, loss, linear probe, time and size; with --compare, draw them over one another.

    Parameters
    ----------
    folders
        Run directories, or folders with runs below them [default: runs].
    compare
        Draw losses and linear probes of the runs into this folder: runs.html and runs.png.
    axis
        Horizontal axis of --compare [default: images if the batch sizes differ, else steps].
    json
        Print a line of JSON for each run instead of a table.
    """
    _load_libraries()

    from .report.runs import compare_runs, find_runs

    folders = folders or (Path("runs"),)
    if axis and not compare:
        raise ConfigError("--axis needs --compare FOLDER")
    listed = find_runs(folders)
    reasons = [f"{path}: {reason}" for path, reason in listed.left_out]
    if not listed.runs:
        raise ConfigError(
            f"there is no run ({'; '.join(reasons)}); give a run directory, or a folder above it"
        )
    for reason in reasons:
        print(f"note: {reason}", file=sys.stderr)
    if json:
        print(*map(dumps, listed.runs), sep="\n")
    else:
        _print_runs(listed.runs)
    if compare:
        page = compare_runs(folders, compare, axis)["page"]
        print(f"Open {page}", file=sys.stderr if json else sys.stdout)


def _print_runs(listed: Sequence[dict[str, Any]]) -> None:
    rows = []
    for run in listed:
        steps = f"{run['steps']:,}" + ("" if run["total"] is None else f" of {run['total']:,}")
        linear = run["linear"]
        probe = "" if linear is None else f"{linear['accuracy']:.1f}"
        probe += f" ± {linear['margin']:.1f}" if linear and linear["margin"] is not None else ""
        loss = "" if run["loss"] is None else f"{run['loss']:.4f}"
        time = "" if run["seconds"] is None else clock(run["seconds"])
        size = readable_size(run["bytes"])
        rows.append(
            [run["run"], run["method"], run["recipe"] or "", steps, run["state"], loss, probe, time, size]
        )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("run", "method", "recipe", "steps", "state", "loss", "linear probe, %", "time", "size"):
        right = name not in ("run", "method", "recipe", "state")
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = _console()
    wide = console.options.update(max_width=10_000)
    console.width = max(console.width, console.measure(table, options=wide).maximum)  # one line for each run
    console.print(table)


@app.command(name="import")
def import_network(
    source: Path,
    /,
    *,
    out: Path | None = None,
    heads: Integer | None = None,
    decoder_heads: Integer | None = None,
    size: Integer | None = None,
    height: Integer | None = None,
) -> None:
    """Convert a checkpoint of MAE or RC-MAE, official (.pth) or of transformers, to a folder that rcmae and
    timm can load, without executing pickled code.

    Parameters
    ----------
    source
        The .pth file, or a folder of transformers (ViTMAE or ViT).
    out
        The folder to write [default: the name of the file without .pth, or NAME-imported of a folder].
    heads
        Attention heads of the encoder, if its width is not that of a named model.
    decoder_heads
        Attention heads of the decoder, likewise.
    size
        Side of the images in pixels (width, if height is given) [default: that of a square].
    height
        Height of images that are not square.
    """
    from .interop.imports import import_weights

    if height is not None and size is None:
        raise ConfigError("give --height and --size together")
    shape = None if size is None else (height or size, size)
    folder = out or (Path(f"{source.name}-imported") if source.is_dir() else source.with_suffix(""))
    for line in import_weights(source, folder, heads, decoder_heads, shape):
        print(line)


@app.command(name="export")
def export_network(
    source: str,
    /,
    *,
    to: Literal["timm", "hf", "torch-export", "onnx", "official"],
    out: Path,
    network: Literal["teacher", "student"] | None = None,
    decoder: bool = False,
    push: str | None = None,
    heads: Integer | None = None,
    decoder_heads: Integer | None = None,
    size: Integer | None = None,
    height: Integer | None = None,
) -> None:
    """Write a network in the format of another library, with a model card, as a new folder.

    Parameters
    ----------
    source
        A run directory, also of fine-tuning; a folder of rcmae, timm or transformers; a .safetensors; an
        official .pth; or timm:NAME.
    to
        timm; hf (transformers); torch-export and onnx, programs that take pixels in 0 to 1; official, the
        names of the MAE and RC-MAE code.
    out
        The folder to write.
    network
        Which network of a run [default: the teacher if there is one; official has both].
    decoder
        With --to hf: encoder and decoder, as ViTMAEForPreTraining.
    push
        Also upload the folder to this repository of the Hugging Face hub, OWNER/NAME.
    heads
        Attention heads of bare weights, if their width is not that of a named model.
    decoder_heads
        Attention heads of the decoder, likewise.
    size
        Side of the images of bare weights in pixels (width, if height is given) [default: that of a square].
    height
        Height of images that are not square.
    """
    from .interop.export import export
    from .interop.hub import push as upload

    if height is not None and size is None:
        raise ConfigError("give --height and --size together")
    shape = None if size is None else (height or size, size)
    with Screen(True, stderr=True).progress(f"exporting {source}", 1):
        folder = export(source, to, out, network, decoder, heads, decoder_heads, shape)
    print(f"wrote {folder}; its README.md says how to load it")
    if push:
        print(f"pushed to {upload(folder, push)}")


lab = App(name="lab", help="The paper's analysis of the mean teacher, on a linear model and on a real run.")
app.command(lab)


@lab.command(name="linear")
def lab_linear(*, out: Path = Path("runs/lab-linear"), seeds: Integer = 3) -> None:
    """Run the paper's linear experiment and write a page that explains the effect of the teacher.

    Parameters
    ----------
    out
        Output folder for linear.html, its figures and linear.json.
    seeds
        Runs per setting, each with different inputs.
    """
    from .lab.linear_experiment import RELATIONS, LinearSettings, run_linear, write_linear_page

    if seeds < 1:
        raise ConfigError(f"seeds must be 1 or more, not {seeds}")
    _check_folder(out)
    result = run_linear(LinearSettings(seeds=seeds), Screen(True).progress)

    def cell(row: dict) -> str:
        return f"{row['previous']:.3f}" + ("" if row["reference"] is None else f" ({row['reference']:.3f})")

    groups = (result["table"][i : i + len(RELATIONS)] for i in range(0, len(result["table"]), len(RELATIONS)))
    _print_table(
        "Cosine of the consistency gradient with the previous step (reference values in parentheses)",
        ["optimizer", "alpha", *RELATIONS],
        [[rows[0]["optimizer"], str(rows[0]["alpha"]), *map(cell, rows)] for rows in groups],
    )
    for name, descent in result["descent"].items():
        _console().print(
            f"{name}: stable below a learning rate of {descent['limit']:.2f}; without noise, "
            f"{descent['steps']:,} steps reduce the error in a slow direction to 1 %"
        )
    for text in result["controls"]["sentences"]:
        _console().print(text)
    print(f"Open {write_linear_page(result, out)}")


@lab.command(name="gradients")
def lab_gradients(
    *runs: str, setting: Annotated[GradientSettings, Flat] = GradientSettings(), out: Path | None = None
) -> None:
    """Measure on real networks which past updates the teacher reverts, and whether more on the images that
    caused them than on others. Runs are continued in memory from their checkpoints nearest to 25, 50 and
    75 %; `rcmae pretrain --keep 99 --probes 4` keeps these.

    Parameters
    ----------
    runs
        Run directories that differ in the seed only, or the name of a recipe for a new network. From three
        runs on, one run is one value in the statistics.
    out
        Output folder for gradients.html, its figures and gradients.json [default: RUN/lab, or
        runs/lab-gradients].
    """
    from .lab.gradients import run_gradients, write_gradients_page

    if not runs:
        raise ConfigError("give a run directory, or several")
    single = len(runs) == 1 and Path(runs[0]).is_dir()
    out = out or (Path(runs[0]) / "lab" if single else Path("runs/lab-gradients"))
    _check_folder(out)
    result = run_gradients(runs, setting, _console().print)

    def cell(interval: Sequence[float]) -> str:
        return "{:.3f} [{:.3f}, {:.3f}]".format(*interval)

    keys = ("same", "other", "contrast")
    _print_table(
        "Cosine with which the consistency gradient reverts (above 0) what is past",
        ["", "same batch", "other images", "difference"],
        [[line["what"], *(cell(line[key]) for key in keys)] for line in result["targets"]],
    )
    for _, text in result["findings"]:
        _console().print(text)
    print(f"Open {write_gradients_page(result, out)}")


@app.command
def verify(
    method: str,
    /,
    *,
    recipe: str | None = None,
    data: str | None = None,
    steps: Integer = 5,
    batch_size: Integer = 32,
    device: Device = "auto",
    json: Json = None,
) -> int:
    """Verify on this machine that training gives the same result with micro-batches, after kill and resume,
    with two processes, and compiled.

    Parameters
    ----------
    method
        Name of a method (`rcmae list`).
    recipe
        Name of a recipe or path of a TOML file [default: the method's recipe for the bundled set]. Its
        length, batch size and warm-up are replaced.
    data
        Other images than the recipe's.
    steps
        Steps per run.
    batch_size
        Images per step, divided into 4 micro-batches.
    """
    from .lab.verify import to_json
    from .lab.verify import verify as run
    from .methods.recipes import digits_recipe, load_recipe, with_method

    _check_json(json)
    chosen = with_method(load_recipe(recipe), method) if recipe else digits_recipe(method)
    chosen = replace(chosen, data=data or chosen.data)
    rows = run(chosen, steps=steps, batch_size=batch_size, device=device, report=_console().print)
    parts = list(dict.fromkeys(part for row in rows for part in row.differences))
    table = []
    for row in rows:
        verdict = "yes" if row.holds and row.differences else "not run" if row.holds else "NO"
        cells = (f"{row.differences[p]:.1e}" if p in row.differences else "" for p in parts)
        table.append([row.name, verdict, *cells])
    columns = [f"{method}, {how_many(steps, 'step')} in fp32", "", *parts]
    _print_table("Largest relative difference", columns, table)
    for row in rows:
        if row.note:
            print(f"{row.name}: {row.note}")
    if json:
        json.write_text(to_json(rows, chosen, device), encoding="utf-8")
    return 0 if all(row.holds for row in rows) else 1


compare = App(name="compare", help="Compare methods.")
app.command(compare)


@compare.command(name="cost")
def compare_cost(
    *,
    models: Annotated[tuple[str, ...], Many] = ("vit_small_patch16", "vit_base_patch16"),
    methods: Annotated[tuple[str, ...], Many] = (),
    batch_size: Integer = 128,
    precision: Literal["bf16", "fp32"] = "bf16",
    measure: bool = False,
    measured_batch: Integer = 16,
    device: str = "auto",
    fit: float | None = None,
    out: Path = Path("runs/compare-cost"),
) -> None:
    """Count the cost of a training step of each method: FLOPs, activations saved for the backward pass, peak
    memory.

    Parameters
    ----------
    models
        Named models (`rcmae list`) or timm:NAME.
    methods
        Methods; ratios are relative to the first one [default: all].
    batch_size
        Batch size for the peak memory.
    precision
        Precision of matrix products.
    measure
        Also measure memory and images/s of real steps on the device.
    measured_batch
        Batch size of the measured steps.
    device
        auto, cpu, cuda or cuda:1.
    fit
        Also print the largest batch size whose peak memory is at most this many GiB.
    out
        Output folder for cost.html and cost.json.
    """
    from .compare.cost import count_costs, write_cost_page
    from .engine.distributed import pick_device
    from .methods import METHODS
    from .methods.recipes import recipe_type

    _check_folder(out)
    if fit is not None and fit <= 0:
        raise ConfigError(f"fit must be above 0, not {fit}")
    if min(batch_size, measured_batch) < 2:
        raise SettingsError("batch_size and measured_batch must be 2 or more: some methods compare images")
    for name in methods:
        recipe_type(name, "--methods")
    measured_on = str(pick_device(device)) if measure else None
    result = count_costs(
        models,
        methods or tuple(METHODS),
        batch=batch_size,
        precision=precision,
        device=measured_on,
        measured_batch=measured_batch,
        fit=fit,
        log=_console().print,
    )
    for model in models:
        rows = [r for r in result["rows"] if r["model"] == model]
        columns = ["", "GFLOP", "x", "saved MB", "x", "state GiB", "peak GiB"]
        cells = [
            [
                r["name"],
                f"{r['flops'] / 1e9:.1f}",
                f"{r['flops_ratio']:.2f}",
                f"{r['saved'] / 1e6:.1f}",
                f"{r['saved_ratio']:.2f}",
                f"{r['state'] / 2**30:.2f}",
                f"{r['peak'] / 2**30:.1f}",
                *([str(r["fits"])] if fit else []),
            ]
            for r in rows
        ]
        _print_table(
            f"{model}, {precision}: FLOPs and saved activations per image; memory at batch {batch_size}",
            [*columns, *([f"batch in {fit:g} GiB"] if fit else [])],
            cells,
        )
        if measured_on:
            cells = [
                [
                    r["name"],
                    f"{r['predicted_peak'] / 2**30:.2f}",
                    f"{r['measured_peak'] / 2**30:.2f}",
                    f"{r['measured_peak'] / r['predicted_peak']:.2f}",
                    f"{r['images_per_second']:.1f}",
                ]
                for r in rows
            ]
            title = f"{model}, {precision}, {measured_batch} images on {measured_on}"
            _print_table(title, ["", "predicted GiB", "measured GiB", "ratio", "images/s"], cells)
    print(f"Open {write_cost_page(result, out)}")


@compare.command(name="race")
def compare_race(
    *arms: str,
    budget: str = "4m",
    data: str | None = None,
    settings: Annotated[tuple[str, ...], Many] = (),
    options: Annotated[RaceOptions, Flat] = RaceOptions(),
    out: Path = Path("runs/compare-race"),
) -> None:
    """Compare what methods learn from the same images within an equal budget. The same command resumes.

    Parameters
    ----------
    arms
        Methods, recipes or recipe files to compare, each optionally with settings after commas, such as
        "rcmae, half_life=5%". "mae averaged" is MAE with an average of its weights for evaluation [default:
        all methods and "mae averaged"].
    budget
        Budget of each run: a time on this device (4m, 1h), '2e13 flops' or '300000 images'.
    data
        Labeled images: a folder of classes, or another source with labels [default: the recipes'].
    settings
        Settings of all arms whose method has them: --settings model=vit_tiny_patch16 batch_size=64.
    out
        Output folder for race.html, its figures, race.json and the runs.
    """
    from .compare.race import ARMS, KINDS, RaceSettings, parse_budget, race, write_race_page
    from .compare.race import arms as parse_arms
    from .engine.distributed import pick_device
    from .engine.limits import cores

    _check_folder(out)
    check(options)
    jobs = options.jobs or (cores() if pick_device(options.device).type == "cpu" else 1)
    setting = RaceSettings(**vars(options) | {"budget": parse_budget(budget), "jobs": jobs})
    result = race(parse_arms(arms or ARMS, data, settings), setting, out, _console().print)
    first = result["rows"][0]["arm"]
    name, against = (Column(head, no_wrap=True) for head in ("accuracy, %", f"linear against {first}"))
    rows = [
        [
            row["arm"],
            f"{row['images']:,}",
            *(f"{sum(row[kind]) / len(row[kind]):.1f}" for kind in KINDS),
            _interval(row["linear against"][first]) if first in row["linear against"] else "",
        ]
        for row in result["rows"]
    ]
    _print_table(f"After {setting.budget} each", [name, "images", *KINDS, against], rows)
    _console().print(*result["verdict"], sep="\n")
    print(f"Open {write_race_page(result, out)}")


evaluate = App(name="evaluate", help="Evaluate a backbone on labeled images by the protocols of the papers.")
app.command(evaluate)


def _command_of(kind: type[Task]) -> Callable[..., None]:
    """The command of an evaluation task, with the task's options and those of every task."""

    def command(
        backbone: Annotated[str, Parameter(help=kind.takes)],
        /,
        *,
        task: Annotated[kind, Flat] = kind(),
        options: Annotated[EvaluationOptions, Flat] = EvaluationOptions(),
    ) -> None:
        _evaluate(backbone, task, options)

    command.__doc__ = kind.__doc__
    return command


for name, kind in TASKS.items():
    evaluate.command(_command_of(kind), name=name)


@dataclass(frozen=True, kw_only=True)
class WorthItOptions(EvaluationOptions):
    """The options of worth-it. It has its own fractions and seeds, so help hides those."""

    labels: Annotated[float, Parameter(show=False)] = 100.0
    seed: Annotated[Integer, Parameter(show=False)] = 0


@evaluate.command(name="worth-it")
def evaluate_worth_it(
    backbone: str,
    /,
    *,
    task: Annotated[Worth, Flat] = Worth(),
    tuning: Annotated[FineTune, Flat] = FineTune(),
    options: Annotated[WorthItOptions, Flat] = WorthItOptions(),
) -> None:
    """Compare fine-tuning from a backbone and from scratch at several fractions of the labels, with
    confidence intervals and a verdict.

    Parameters
    ----------
    backbone
        A run directory, an exported folder, a .safetensors, an official .pth, or timm:NAME; scratch:BACKBONE
        is the same network, randomly initialized.
    """
    _check_folder(options.out)
    if any(getattr(options, name) != getattr(WorthItOptions, name) for name in ("labels", "seed")):
        raise ConfigError("worth-it compares at --percents and over --seeds; leave out --labels and --seed")
    task.check_settings(backbone, tuning, options)
    _load_libraries()

    from .tasks.context import results_folder
    from .tasks.worth import worth_it

    result = worth_it(backbone, task, tuning, options, _console().print)
    if not result["rows"]:  # not the first rank
        return
    rows = [
        [
            row["arm"],
            f"{row['percent']:g} %",
            f"{sum(row['seeds']) / len(row['seeds']):.1f}",
            " ".join(f"{value:.1f}" for value in row["seeds"]),
            _interval(row["gain"]) if "gain" in row else "",
        ]
        for row in result["rows"]
    ]
    _print_table(None, ["accuracy, %", "labels", "mean", "seeds", "against scratch"], rows)
    _console().print(*result["verdict"], sep="\n")
    _report_of_backbone(results_folder(backbone, options))


def _evaluate(backbone: str, task: Task, options: EvaluationOptions) -> None:
    _check_folder(options.out)
    task.check_settings(backbone, options)
    _load_libraries()

    from .report.severity import write_figures
    from .tasks.context import results_folder
    from .tasks.evaluate import evaluate
    from .tasks.interval import MARGIN_NOTE, with_margin

    records = evaluate(backbone, task, options)
    if not records:  # not the first rank
        return
    images = records[0]["test_images"]

    def cell(name: str, metrics: dict[str, float]) -> str:
        if name not in metrics:
            return ""
        return with_margin(metrics[name], images) if name.startswith("top1") else f"{metrics[name]:.2f}"

    _print_table(
        f"{records[0]['task']}, %, {how_many(images, 'test image')}",
        ["", *(record["network"] for record in records)],
        [
            [name, *(cell(name, record["metrics"]) for record in records)]
            for name in dict.fromkeys(name for record in records for name in record["metrics"])
        ],
    )
    _console().print(MARGIN_NOTE)
    folder = results_folder(backbone, options)
    for file in write_figures(records, folder):
        print(f"Open {file}")
    _report_of_backbone(folder)
    print(f"wrote {folder}")


def _report_of_backbone(results: Path) -> None:
    """If the folder of results is within a pre-training run, update the report of that run."""
    from .report.files import kind_of

    folders = results, *results.parents
    if run := next((folder for folder in folders if kind_of(folder) == "pre-training"), None):
        print(f"Open {_draw(run)}")


def _draw(run: Path) -> Path:
    from .report import write_report

    with Screen(True, stderr=True).progress(f"drawing the report of {run}", 1):
        return write_report(run)


detect = App(
    name="detect", help="Object detection: Mask R-CNN on a backbone, boxes and masks in COCO format."
)
app.command(detect)


@detect.command(name="train")
def detect_train(
    backbone: str,
    /,
    *,
    options: Annotated[DetectionOptions, Flat] = DetectionOptions(),
    runtime: Annotated[BaseRuntimeConfig, Flat] = BaseRuntimeConfig(),
) -> None:
    """Train a detector on a backbone; a run that is already in --out resumes.

    Parameters
    ----------
    backbone
        A run directory, an exported folder, a .safetensors, an official .pth, timm:NAME, or scratch:BACKBONE
        for a randomly initialized one.
    """
    from .tasks.detection.commands import train_detector

    _check_folder(runtime.out)
    run = train_detector(backbone, options, runtime)
    if run is None:  # not the first rank
        return
    print(f"Open {_draw(run)}")
    _report_of_backbone(run.parent)


@detect.command(name="eval")
def detect_eval(
    checkpoint: Detector, /, *, options: Annotated[ScoringOptions, Flat] = ScoringOptions()
) -> None:
    """Evaluate a detector: COCO's average precision of boxes and masks, by class and size."""
    from .tasks.detection.commands import percent, score_detector
    from .tasks.detection.predict import images_scored

    _check_folder(options.out)
    result = score_detector(checkpoint, options)
    if result is None:  # not the first rank
        return
    parts = [part for part in ("box", "mask") if part in result]
    images = images_scored(result["test_images"], len(result["unreadable"]))
    title = f"{result['data']}, {images}, {result['preset']}"
    for key, heading in (("stats", "%"), ("per_class", "AP of class, %")):
        columns = [percent(result[part][key]) for part in parts]
        rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
        _print_table(title if key == "stats" else None, [heading, *parts], rows)
    rule = result[parts[0]]["areas"]
    bounds = " and ".join(f"{bound:,.0f}" for bound in result[parts[0]]["bounds"])
    print(
        f"small, medium, large: bounds at {bounds} px of area, "
        f"{'as in COCO' if rule == 'coco' else 'scaled to these images'}"
    )
    print(f"wrote {options.out or checkpoint / 'eval'}")


@detect.command(name="show")
def detect_show(
    checkpoint: Detector,
    /,
    *images: Path,
    out: Path | None = None,
    threshold: float = 0.5,
    device: Device = "auto",
    reading: Annotated[ReadingOptions, Flat] = ReadingOptions(),
) -> None:
    """Draw boxes, masks, classes and scores on images.

    Parameters
    ----------
    images
        Image files.
    out
        Output folder; default: show/ in the run.
    threshold
        Lowest score of an object that is drawn, 0 to 1.
    """
    from .report.detection_page import show_detections
    from .tasks.detection.files import run_of

    if not images:
        raise ConfigError("no images given: rcmae detect show CHECKPOINT IMAGE...")
    out = out or run_of(checkpoint) / "show"
    _check_folder(out)
    for path, scores in show_detections(checkpoint, images, out, threshold, device, reading):
        if above := sum(score >= threshold for score in scores):
            print(f"Open {path}: {how_many(above, 'object')}")
        else:
            best = f"the best score is {scores[0]:.2f}" if scores else "nothing was detected"
            print(f"Open {path}: no object with a score of {threshold:g} or more; {best}")


@detect.command(name="export")
def detect_export(checkpoint: Detector, /, *, out: Path = Path("pyramid.pt2")) -> None:
    """Export the backbone and feature pyramid of a detector with torch.export, loadable without rcmae.

    Parameters
    ----------
    out
        The .pt2 file to write.
    """
    from .tasks.detection.commands import write_program

    print(f"wrote {write_program(checkpoint, out)}")


@app.command(name="list")
def list_all() -> None:
    """List data sources, methods, models and recipes."""
    from .data.sources import SOURCES
    from .methods import METHODS
    from .methods.recipes import parse_recipe
    from .models.autoencoder import SIZES

    kinds = [[kind.form, _summary(kind), "yes" if kind.has_objects else ""] for kind in reversed(SOURCES)]
    _print_table("Data", ["--data", "", "objects"], kinds)
    recipes = []
    for name, file in shipped_recipes().items():
        text = file.read_text(encoding="utf-8")
        recipes.append([name, parse_recipe(text, name).method, text.splitlines()[0].lstrip("# ")])
    _print_table("Recipes", ["recipe", "method", "description"], recipes)
    for task, what, command in (
        ("finetune", "fine-tuning", "evaluate finetune"),
        ("detection", "detection", "detect train"),
    ):
        files = shipped_recipes(task).items()
        recipes = [[k, file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")] for k, file in files]
        _print_table(f"Recipes of {what} (rcmae {command} --recipe)", ["recipe", "description"], recipes)
    models = [
        [name, str(s.patch), *("{} x {}, {}".format(*part) for part in (s.encoder, s.decoder))]
        for name, s in SIZES.items()
    ]
    models.append(["timm:NAME", "", "any plain timm VisionTransformer", "256 x 4, 8"])
    _print_table("Models (width x depth, heads)", ["model", "patch", "encoder", "decoder"], models)
    _print_table("Methods", ["method", ""], [[name, _summary(method)] for name, method in METHODS.items()])


SLOW = {
    "pretrain",
    "check",
    "pack",
    "embed",
    "look",
    "import",
    "export",
    "lab",
    "verify",
    "compare",
    "evaluate",
    "detect",
}
"Commands that load LIBRARIES, which takes seconds."

ELSEWHERE = {
    "train": "use `rcmae pretrain`, `rcmae evaluate finetune` or `rcmae detect train`",
    "eval": "use `rcmae evaluate`, or `rcmae detect eval` for a detector",
    "plan": "`rcmae check DATA` plans a run on these images",
    "resume": "`rcmae pretrain --out RUN` resumes a run",
}
"What to do instead of commands that do not exist."

LIBRARIES = ("torch", "torchvision", "timm", "sklearn.linear_model", "matplotlib.figure")


def main(argv: Sequence[str] | None = None, program: bool = False) -> int:
    """Run one command. Expected failures print one line on stderr and return the documented exit code.

    With `program`, this process runs nothing else, so a signal may end it without waiting for loader
    processes.
    """
    with signals.handled():
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        except (signals.Interrupted, Preempted) as e:
            saved = isinstance(e, Preempted)
            text = str(e) if saved else f"by {e}; nothing that was saved is lost, run the same command again"
            code = _fail(text, e.exit_code, "stopped")
            if program and signals.received():
                signals.end_at_once(code)
            return code


def _run(argv: list[str]) -> int:
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    slow = bool(argv) and argv[0] in SLOW and not {"--help", "-h"} & set(argv)
    if slow and _first_rank():  # print something before loading the libraries
        print(f"rcmae {' '.join(argv)}", flush=True)
    try:
        if argv[:1] == ["pretrain"]:
            # Its flags depend on the methods in the package. Other commands check their flags before loading.
            _load_libraries()
            app.config = _prepare_pretrain(argv)
        else:
            app.config = ()
        command, bound, _ = app.parse_args(argv, exit_on_error=False, print_error=False)
        shows_help = isinstance(getattr(command, "__self__", None), App)
        if slow and argv[0] != "evaluate" and not shows_help:  # `evaluate` checks its settings first
            _load_libraries()
        result = command(*bound.args, **bound.kwargs)
        sys.stdout.flush()
    except CycloptsError as e:
        return _fail(_usage(e), 2)
    except Preempted:
        raise
    except RcmaeError as e:
        if debug:
            traceback.print_exc()
        return _fail(_as_typed(str(e), argv) if isinstance(e, SettingsError) else str(e), e.exit_code)
    except MemoryError:
        return _fail("the host ran out of memory; try a smaller batch or fewer --workers", 8)
    except SystemExit as e:
        if not isinstance(e.__context__, BrokenPipeError):  # which rich turns into SystemExit
            raise
        return _closed_pipe()
    except OSError as e:
        signals.raise_if_received()  # a library may have turned Interrupted into another error
        if isinstance(e, BrokenPipeError) and _output_closed():  # not a pipe between processes
            return _closed_pipe()
        if debug:
            raise
        return _fail(f"{e.filename or 'a file'} cannot be used: {e.strerror or first_line(e)}", 6)
    except Exception as e:
        signals.raise_if_received()
        if debug:
            raise
        with contextlib.suppress(OSError):
            Path("rcmae-error.log").write_text(traceback.format_exc(), encoding="utf-8")
        return _fail(f"unexpected {type(e).__name__}: {first_line(e)}; see rcmae-error.log", 1)
    return result if isinstance(result, int) else 0


def _usage(e: CycloptsError) -> str:
    """cyclopts' message, with the place of a command that is elsewhere, or the options that have all words of
    an unknown one."""
    text = " ".join(str(e).split())
    if isinstance(e, UnknownCommandError) and e.app is app and e.unused_tokens:
        word = e.unused_tokens[0]
        places = [f"`rcmae {group} {word}`" for group in app if word in app[group]]
        if advice := ELSEWHERE.get(word) or (places and f"use {' or '.join(places)}"):
            return f"there is no command {word!r}: {advice}"
    if isinstance(e, UnusedCliTokensError) and e.unused_tokens:
        word = str(e.unused_tokens[0])
        of_data = (e.command_chain or ("",))[0] in ("pretrain", "evaluate", "compare", "detect")
        return f"{word!r} belongs to no option" + (f"; give --data {shlex.quote(word)}" if of_data else "")
    if isinstance(e, UnknownOptionError):
        words = set((e.token.keyword or e.token.value).partition("=")[0].removeprefix("--").split("-"))
        names = [name for each in e.argument_collection for name in each.names[:1]]
        if similar := [name for name in names if words <= {*name.removeprefix("--").split("-")}]:
            return f"{text.partition(' Did you mean')[0]} Did you mean {' or '.join(similar[:4])}?"
    return text


def _output_closed() -> bool:
    """Whether the other end of this program's output is closed."""
    poll = select.poll()
    with contextlib.suppress(OSError):  # an output without a descriptor
        poll.register(sys.stdout.fileno(), 0)  # 0: errors only
    return bool(poll.poll(0))


def _closed_pipe() -> int:
    """The exit code of a program whose output nobody reads any more, as after `| head`; without a message."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
    return 128 + signal.SIGPIPE


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _load_libraries() -> None:
    """Import the LIBRARIES: 5 seconds, or a minute for the first time after an installation."""
    if all(name in sys.modules for name in LIBRARIES):
        return
    with Screen(_first_rank(), stderr=True).progress(
        "loading PyTorch and other libraries", len(LIBRARIES)
    ) as tick:
        for done, name in enumerate(LIBRARIES, 1):
            with signals.postponed():
                import_module(name)
            tick(done)


def _prepare_pretrain(argv: list[str]) -> tuple[Dict, ...]:
    """Give `pretrain` the flags of the method in the command line, with the values of the recipe as defaults.

    The recipe is the named one, or that of the run in --out. cyclopts builds the recipe of the run from these
    defaults and the flags. Raises ConfigError for a flag of another method.
    """
    from .engine.checkpoint import checkpoints
    from .interop.initial import with_network_of
    from .methods import METHODS
    from .methods.recipes import join_names, load_recipe, with_method

    values = {}
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word.startswith("--"):
            key, equals, value = word.removeprefix("--").partition("=")
            values[key.replace("-", "_")] = value if equals else following
    if values.get("out") == "":
        raise ConfigError("--out is empty; name a folder")
    words = [a for a in argv[1:] if a not in ("--help", "-h")]
    recipe_name = next((a for a in words[:1] if not a.startswith("-")), None)
    recorded = Path(values.get("out", "")) / "recipe.toml"
    resumes = (
        recipe_name is None
        and "out" in values
        and recorded.exists()
        and checkpoints(recorded.parent / "checkpoints")
    )
    recipe = load_recipe(str(recorded) if resumes else recipe_name or "bundled")
    recipe = with_method(recipe, values.get("method", recipe.method))
    if (init := values.get("init")) and init != recipe.network.init:
        recipe = replace(recipe, network=with_network_of(init, recipe.network))
    for key in values.keys() - flags(type(recipe)).keys() - flags(RuntimeConfig).keys():
        owners = [
            other for other, method in METHODS.items() if key.removeprefix("no_") in flags(method.recipe_type)
        ]
        if owners and recipe.method not in owners:
            raise ConfigError(
                f"--{key.replace('_', '-')} is a setting of {join_names(owners)}; this run's method is "
                f"{recipe.method}"
            )
    if "momentum" in values and values.get("schedule", flat(recipe).get("schedule")) == "half-life":
        raise ConfigError(
            "--momentum has no effect under schedule half-life: give --half-life, or another --schedule too"
        )
    del app["pretrain"]
    app.command(_pretrain(recipe, recipe_name), name="pretrain")
    defaults = {k: v for k, v in flat(recipe).items() if k not in reset_by(recipe, values)}
    return (Dict({"pretrain": defaults}, source=f"recipe {recipe_name or 'bundled'}"),)


def _check_folder(out: Path | None) -> None:
    """Raises ConfigError if --out is a file, before any work."""
    if out and out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; name a folder")


def _check_json(json: Path | None) -> None:
    """Raises ConfigError if --json cannot be written, before any work."""
    if json and (json.is_dir() or not json.parent.is_dir()):
        problem = "is a folder" if json.is_dir() else f"cannot be written: there is no folder {json.parent}"
        raise ConfigError(f"--json {json} {problem}")


def _as_typed(text: str, argv: list[str]) -> str:
    """Replace the names of settings in an error message by the flags of the command.

    Names are words with an underscore, or the first word of a problem. Names in a path or in key=value are
    left unchanged.
    """
    arguments = app.parse_commands(argv)[1][-1].assemble_argument_collection()
    known = {
        name.removeprefix("--").replace("-", "_"): name
        for each in arguments
        for name in each.names
        if name.startswith("--")
    }
    names = r"(?<![\w./'-])[a-z]+(?:_[a-z]+)+(?![\w./='-])|(?:^|(?<=; ))[a-z]+(?= (?:must|is|are|has|-?\d))"
    return re.sub(names, lambda match: known.get(match[0], match[0]), text)


def _fail(message: str, code: int, label: str = "error") -> int:
    print(f"rcmae: {label}: {' '.join(message.split())}", file=sys.stderr)
    return code


def _console() -> Console:
    return Console(highlight=False, markup=False)


def _print_table(title: str | None, columns: Sequence[str | Column], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def _interval(values: Sequence[float]) -> str:
    """A mean and its interval."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*values)
