"""`rcmae compare race`: which method learns more from the same images on an equal budget?

Every arm is a recipe. Within a seed all arms have the same images in the same order and, where shapes agree,
the same initial weights. The budget is a number of images, of FLOPs (counted by `compare.cost`) or a time on
this device; an arm makes the steps that fit. During and after training, linear, attentive and k-NN probes of
the frozen backbone record which test images they classify correctly.

Arms are compared within a seed, by Student's t over seeds, with the variance of the test images that seeds
share; every arm with the first one, corrected for their number (see `tasks.interval`).

Every run is a run of `rcmae pretrain` under the output folder. Finished runs are never repeated: the same
command resumes where it stopped.
"""

import ctypes
import dataclasses
import hashlib
import itertools
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from safetensors.numpy import load_file

from ..config import (
    Recipe,
    changed,
    check,
    flags,
    hint,
    how_many,
    parse_time,
    recipe_hash,
    replaced,
    shipped_recipes,
    to_toml,
)
from ..data.sources import open_source, recipe_for
from ..engine import signals
from ..engine.checkpoint import replace_file
from ..engine.console import clock
from ..engine.distributed import pick_device
from ..engine.metrics import of_kind, read_metrics
from ..engine.run import run_lock
from ..errors import ConfigError, DataError, Preempted, ProcessError, RcmaeError, refuse
from ..methods import METHODS
from ..methods.distillation import SelfDistillationRecipe
from ..methods.mean_teacher import MeanTeacherRecipe
from ..methods.recipes import digits_recipe, load_recipe, with_method
from ..report.build import write_page
from ..report.curves import Line, plot
from ..tasks.interval import Difference, correction_note, difference, judged, percents
from ..tasks.probe import KINDS, TEST_IMAGE_KEY, probe_set
from .cost import cost
from .settings import RaceOptions

Log = Callable[[str], object]
"Prints a line about the progress."

CONTROLS = {control.name: (name, control) for name, method in METHODS.items() for control in method.controls}
"Controls that methods declare as additional arms: name -> (method, control)."

ARMS = tuple(
    arm for name, method in METHODS.items() for arm in (*(control.name for control in method.controls), name)
)
"The default arms."

SHARED = {"steps", "epochs", "time", "seed", "data", "probes", "probe_train", "probe_test", "attentive"}
"Settings that are the same for all arms."

MEASURED = 24
"Steps of a run that measures the images per second of an arm, with three log lines."


@dataclass(frozen=True)
class Arm:
    name: str
    recipe: Recipe
    network: str
    "the network that is judged"
    cost_recipe: Recipe
    "the recipe whose cost counts: a control may have that of another method"


def arms(names: Sequence[str], data: str | None = None, settings: Sequence[str] = ()) -> list[Arm]:
    """The arms with these names: a method, or a recipe's name or file, perhaps with settings after commas:
    "rcmae, half_life=5%".

    A method stands for its recipe on the bundled set, or on other `data` for its ViT-S recipe; `settings`
    apply to every arm whose method has them. The network that a method is meant to train is judged: its
    teacher, if it has one. Raises ConfigError.
    """
    parts = [[part.strip() for part in re.split(r",(?![^\[]*\])", name)] for name in names]
    bases = []
    for head, *_ in parts:
        method, control = CONTROLS.get(head, (head, None))
        bases.append((_recipe(method, suited=recipe_for(data or Recipe.data)), control))
    contestants = []
    for name, (_, *changes), (recipe, control) in zip(names, parts, bases, strict=True):
        others = {flag for other, _ in bases for flag in flags(type(other))} - flags(type(recipe)).keys()
        common = [text for text in settings if text.partition("=")[0].strip() not in others]
        recipe = check(replaced(recipe, [*common, *changes], name))
        recipe = replace(recipe, data=data or recipe.data)
        cost_recipe = recipe
        if control:
            cost_recipe = with_method(recipe, control.cost_of) if control.cost_of else recipe
            recipe = changed(recipe, **control.settings)
        contestants.append(Arm(name, recipe, METHODS[recipe.method].networks[-1], cost_recipe))
    names = [arm.name for arm in contestants]
    changed_keys = {
        text.partition("=")[0].strip() for name in [*settings, *names] for text in name.split(",")
    }
    problems = [f"{name!r} is given twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    problems += [f"{key} is set by the race, not by an arm" for key in SHARED & changed_keys]
    problems += [
        f"{arm.name}: {text}"
        for arm in contestants
        for text in METHODS[arm.recipe.method].validate(arm.recipe)
    ]
    problems += [] if len(names) > 1 else ["a race needs two arms"]
    if len({arm.recipe.data for arm in contestants}) > 1:
        problems.append("the arms have different data; give --data")
    refuse(problems)
    return contestants


def _recipe(name: str, suited: str) -> Recipe:
    """A method's recipe of the `suited` kind; for "folder" its ViT-S recipe with the batch size and half-life
    of that recipe."""
    if name not in METHODS:
        known = [*METHODS, *CONTROLS, *shipped_recipes()]
        if name not in known and not Path(name).is_file():
            raise ConfigError(
                f"there is no method, recipe or recipe file {name!r}{hint(name, known)} (`rcmae list` shows "
                "all)"
            )
        return load_recipe(name)
    if suited == "folder":
        folder, recipe = load_recipe("folder"), load_recipe(f"{name}-vits16-in1k")
        assert isinstance(folder, MeanTeacherRecipe)
        recipe = changed(recipe, batch_size=folder.optim.batch_size)
        if isinstance(recipe, SelfDistillationRecipe):  # the same rules and initial weights for all arms
            recipe = replace(recipe, faithful=False, drop_path=0.0)
        return replace(recipe, teacher=folder.teacher) if isinstance(recipe, MeanTeacherRecipe) else recipe
    return digits_recipe(name)


@dataclass(frozen=True)
class Budget:
    """What every arm may use: a number of "images", "FLOPs" or "seconds"."""

    kind: str
    amount: float

    def __str__(self) -> str:
        return f"{self.amount:g} {self.kind}"


def parse_budget(text: str) -> Budget:
    """'300000 images', '2e13 flops', or a time on this device (4m, 1h). Raises ConfigError."""
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*(?:e[0-9]+)?)\s*(images|flops)\s*", text.lower())
    try:
        if match:
            budget = Budget({"images": "images", "flops": "FLOPs"}[match[2]], float(match[1]))
        else:
            budget = Budget("seconds", parse_time(text))
    except ConfigError as e:
        raise ConfigError(
            f"{text!r} is no budget; write '300000 images', '2e13 flops' or a time on this device (4m, 1h)"
        ) from e
    if not budget.amount:
        raise ConfigError("the budget must be above 0")
    return budget


# --- runs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RaceSettings(RaceOptions):
    """How a race is run, and the budget of each arm."""

    budget: Budget
    jobs: int = 1


def race(contestants: list[Arm], setting: RaceSettings, out: Path, log: Log) -> dict[str, Any]:
    """Make the missing runs under `out`, and judge. Raises DataError without labels, Preempted when
    stopped."""
    if setting.budget.kind == "images":  # fails early; other budgets must be counted or measured first
        steps_of(contestants, setting, {}, {})
    recipe = contestants[0].recipe
    images = recipe.images
    source = open_source(recipe.data, images.channels, size=images.size, value_range=images.range)
    probed = changed(recipe, probes=1, probe_train=setting.probe_train, probe_test=setting.probe_test)
    if probe_set(source, probed) is None:
        raise DataError(
            f"{recipe.data} has no labels to probe with, or one class: a race needs a folder for each of "
            "several classes"
        )
    if (batch := max(arm.recipe.optim.batch_size for arm in contestants)) > len(source):
        raise DataError(
            f"{recipe.data} has {how_many(len(source), 'image')}, fewer than a batch of {batch}: give "
            "--settings batch_size=..."
        )
    data = source.fingerprint()
    with run_lock(out), signals.handled():
        costs = {arm.name: cost(arm.cost_recipe).flops for arm in contestants}
        steps = plan(contestants, setting, costs, data, out, log)
        # Not seed 0, on which all recipes were tuned; the recipe files name the other seeds of some.
        runs = [
            RaceRun(arm, seed, out, steps[arm.name], setting, data)
            for seed in range(1, setting.seeds + 1)
            for arm in contestants
        ]
        weights = [run.steps * run.recipe.optim.batch_size * costs[run.arm.name] for run in runs]
        carry_out(runs, weights, setting, log)
        return judge(runs, costs, setting)


class RaceRun:
    """One arm on one seed: a run of `rcmae pretrain`."""

    def __init__(
        self,
        arm: Arm,
        seed: int,
        out: Path,
        steps: int,
        setting: RaceSettings,
        data: str,
        flags: Sequence[str] = (),
    ):
        """`data` is the fingerprint of the images. The folder's name contains a hash of all that determines
        the run."""
        self.arm, self.seed, self.steps, self.flags = arm, seed, steps, flags
        self.recipe = changed(
            arm.recipe,
            steps=steps,
            seed=seed,
            probes=0 if flags else setting.probes,
            probe_train=setting.probe_train,
            probe_test=setting.probe_test,
            attentive="every",
        )
        digest = hashlib.sha256(" ".join([recipe_hash(self.recipe), data, *flags]).encode()).hexdigest()[:8]
        self.path = out / f"{re.sub(r'[^a-z0-9]+', '-', arm.name.lower()).strip('-')}-{seed}-{digest}"

    @property
    def step(self) -> int:
        return max((line["step"] for line in read_metrics(self.path)), default=0)

    @property
    def done(self) -> bool:
        return (self.path / "finished").exists()

    def correct(self, step: int, kind: str) -> Bool[np.ndarray, " m"]:
        """Which test images a probe of the judged network classified correctly, at step 0 of the initial
        encoder."""
        network = self.arm.network if step else "random_init"
        return self._probed(step)[f"{network}/{kind}"].astype(bool)

    def test_images(self) -> Int[np.ndarray, " m"]:
        """The numbers of the test images; those of two seeds can be the same."""
        tensors = self._probed(0)
        if TEST_IMAGE_KEY not in tensors:
            raise DataError(
                f"{self.path} was made by an older version, which did not write down its test images; choose "
                "another --out"
            )
        return tensors[TEST_IMAGE_KEY]

    def _probed(self, step: int) -> dict[str, np.ndarray]:
        return load_file(self.path / "probes" / f"{step:08d}.safetensors")

    def start(self, setting: RaceSettings) -> subprocess.Popen[bytes]:
        """Start the process that makes or resumes the run."""
        self.path.mkdir(parents=True, exist_ok=True)
        recipe = self.path / "race.toml"
        replace_file(recipe, to_toml(self.recipe))
        threads = max(1, torch.get_num_threads() // setting.jobs)
        command = [sys.executable, "-m", "rcmae", "pretrain", str(recipe), "--out", str(self.path)]
        command += ["--device", setting.device, *self.flags, "--threads", str(threads)]
        with (self.path / "log.txt").open("a") as log:
            # In a new session, so that Ctrl-C reaches only the race, which then stops each run once. A run
            # also ends when the race dies.
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )

    def ended(self, code: int) -> None:
        """Handle the exit code: mark the run as finished, or raise the error that ended it."""
        if code == 0:
            (self.path / "finished").touch()
            return
        name, log = f"{self.arm.name}, seed {self.seed}", self.path / "log.txt"
        if code < 0:
            raise ProcessError(
                f"{name}: ended by signal {-code} (out of memory?); the same command resumes it"
            )
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        text = lines[-1].removeprefix("rcmae: ") if lines else f"exit code {code} without a message"
        kinds = {kind.exit_code: kind for kind in reversed(RcmaeError.__subclasses__())}
        raise kinds.get(code, ProcessError)(f"{name}: {text}; see {log}")


def _end_with_parent() -> None:
    _libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


_libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None


def plan(
    contestants: list[Arm], setting: RaceSettings, costs: dict[str, float], data: str, out: Path, log: Log
) -> dict[str, int]:
    """Steps of each arm within the budget. A time is converted with the images per second of a short run,
    made once, with as many concurrent runs as in the race. Raises ConfigError if there are too few steps."""
    rates = dict.fromkeys(costs, 0.0)
    if setting.budget.kind == "seconds":
        data = " ".join([data, str(pick_device(setting.device)), str(setting.jobs)])
        flags = ("--no-monitor", "--log-every", str(MEASURED // 3))
        # Arms of equal cost share one run, and so get the same number of steps.
        short = {}
        for arm in contestants:
            plain = replace(arm, name=arm.cost_recipe.method, recipe=arm.cost_recipe)
            short[arm.name] = RaceRun(plain, 0, out / "measured", MEASURED, setting, data, flags)
        runs = list({run.path: run for run in short.values()}.values())
        carry_out(runs, [1.0] * len(runs), setting, log)
        for name, run in short.items():
            lines = of_kind(read_metrics(run.path), "train")[1:]  # without the warm-up
            rates[name] = statistics.median(line["images_per_s"] for line in lines)
            log(f"{name}: {rates[name]:,.0f} images/s")
    return steps_of(contestants, setting, costs, rates)


def steps_of(
    contestants: list[Arm], setting: RaceSettings, costs: dict[str, float], rates: dict[str, float]
) -> dict[str, int]:
    """Steps of each arm within the budget, given costs (FLOPs per image) and rates (images per second).
    Raises ConfigError."""
    steps = {}
    for arm in contestants:
        images = setting.budget.amount
        if setting.budget.kind == "FLOPs":
            images /= costs[arm.name]
        elif setting.budget.kind == "seconds":
            images *= rates[arm.name]
        steps[arm.name] = int(images / arm.recipe.optim.batch_size)
    too_few = [
        f"{how_many(count, 'step')} of {name}" for name, count in steps.items() if count < setting.probes
    ]
    if too_few:
        raise ConfigError(
            f"{setting.budget} are {', '.join(too_few)}: too few to probe {setting.probes} times"
        )
    return steps


def carry_out(runs: list[RaceRun], weights: list[float], setting: RaceSettings, log: Log) -> None:
    """Make the unfinished runs, `jobs` at a time. A failed run or a signal stops all of them, with their
    state saved."""
    waiting = [run for run in runs if not run.done]
    fraction = {run.path: weight / sum(weights) for run, weight in zip(runs, weights, strict=True)}
    finished = sum(fraction[run.path] for run in runs if run not in waiting)
    at_start = finished + sum(fraction[run.path] * run.step / run.steps for run in waiting)
    began = logged = time.monotonic()
    active: dict[RaceRun, subprocess.Popen[bytes]] = {}
    with signals.held():  # until the runs, which end with this process, have saved
        try:
            with signals.interruptible():
                while waiting or active:
                    while waiting and len(active) < setting.jobs:
                        run = waiting.pop(0)
                        active[run] = run.start(setting)
                    time.sleep(0.2)
                    for run in [run for run, process in active.items() if process.poll() is not None]:
                        run.ended(active.pop(run).returncode)
                        finished += fraction[run.path]
                        logged = 0.0
                    if time.monotonic() - logged > 30:
                        logged = time.monotonic()
                        progress = finished + sum(fraction[run.path] * run.step / run.steps for run in active)
                        rate = (progress - at_start) / (logged - began)
                        left = (1 - progress) / rate if rate > 0 else 0.0
                        done = len(runs) - len(waiting) - len(active)
                        log(f"{done} of {len(runs)} runs, {progress:.0%}, {clock(left)} left")
        except signals.Interrupted as e:
            raise Preempted(f"by {e}; every run is saved, run the same command again") from e
        finally:
            for process in active.values():
                process.terminate()
            for process in active.values():
                process.wait()


# --- the verdict --------------------------------------------------------------------------------------------


def judge(runs: list[RaceRun], costs: dict[str, float], setting: RaceSettings) -> dict[str, Any]:
    """Curves, accuracies, paired differences with their intervals, and the verdict in sentences."""
    names = list(dict.fromkeys(run.arm.name for run in runs))
    by_arm = {name: [run for run in runs if run.arm.name == name] for name in names}
    final, start = (
        {
            name: {kind: [run.correct(last * run.steps, kind) for run in seeds] for kind in KINDS}
            for name, seeds in by_arm.items()
        }
        for last in (True, False)
    )
    rows = []
    for name, seeds in by_arm.items():
        first, points, images = seeds[0], curve(seeds, costs[name]), [run.test_images() for run in seeds]
        row: dict[str, Any] = {
            "arm": name,
            "steps": first.steps,
            "batch_size": first.recipe.optim.batch_size,
            "images": first.steps * first.recipe.optim.batch_size,
            "recipe_hash": recipe_hash(first.arm.recipe),
            "curve": points,
            "flops": points[-1]["flops"],
            "seconds": points[-1]["seconds"],
            "health": [_health(run) for run in seeds],
            "runs": [run.path.name for run in seeds],
        }
        for kind in KINDS:
            row[kind], row[f"{kind} random_init"] = percents(final[name][kind]), percents(start[name][kind])
            row[f"{kind} gain"] = difference(final[name][kind], start[name][kind], images)
            row[f"{kind} against"] = {
                other: difference(final[name][kind], final[other][kind], images)
                for other in names
                if other != name
            }
        rows.append(row)
    about = dataclasses.asdict(setting) | {"data": runs[0].recipe.data, "budget": str(setting.budget)}
    machine = json.loads((runs[0].path / "machine.json").read_text(encoding="utf-8"))
    return {"about": about, "verdict": verdict(rows, about), "rows": rows, "machine": machine}


def verdict(rows: list[dict[str, Any]], about: dict[str, Any]) -> list[str]:
    """The result of the linear probe in sentences: the best arm, and every arm against the first one, which
    are the family of comparisons that is corrected for."""
    mean = {row["arm"]: float(np.mean(row["linear"])) for row in rows}
    best, first = max(mean, key=lambda arm: mean[arm]), rows[0]["arm"]
    verdicts = judged(Difference(*row["linear against"][first]) for row in rows[1:])
    return [
        f"With {about['budget']} for each on {about['data']}, {best} has the highest linear probe accuracy "
        f"on mean patches ({mean[best]:.1f} %).",
        *(f"{row['arm']} against {first}: {text}." for row, text in zip(rows[1:], verdicts, strict=True)),
        correction_note(len(verdicts)),
    ]


def curve(runs: list[RaceRun], flops: float) -> list[dict[str, Any]]:
    """The probes of an arm during training, with one value per seed, and the images, FLOPs and seconds (of
    the median seed) before each.

    A control with the cost of another method has the work of its teacher subtracted from its seconds as from
    its FLOPs.
    """
    points, first = [], runs[0]
    arm = first.arm
    fraction = 1.0 if arm.cost_recipe == arm.recipe else flops / cost(arm.recipe).flops
    for step in [0, *(line["step"] for line in of_kind(read_metrics(first.path), "probe"))]:
        images = step * first.recipe.optim.batch_size
        seconds = fraction * statistics.median(_seconds(run, step) for run in runs)
        accuracies = {kind: percents([run.correct(step, kind) for run in runs]) for kind in KINDS}
        points.append(
            {"step": step, "images": images, "flops": images * flops, "seconds": seconds} | accuracies
        )
    return points


def _seconds(run: RaceRun, step: int) -> float:
    """Training time up to a step, without probes and checkpoints."""
    train = of_kind(read_metrics(run.path), "train")
    steps = np.array([0] + [line["step"] for line in train])
    rates = np.array([line["images_per_s"] for line in train]) / run.recipe.optim.batch_size
    return float(np.interp(step, steps, np.concatenate([[0], np.cumsum(np.diff(steps) / rates)])))


def _health(run: RaceRun) -> dict[str, float]:
    """The last rank and spread of the features, and what the method logs besides its loss."""
    last: dict[str, Any] = {}
    for line in of_kind(read_metrics(run.path), "train", "health"):
        last |= line
    logged = [key for key in METHODS[run.recipe.method].losses if key != "loss"]
    return {key: last[key] for key in ("rankme", "spread", *logged) if key in last}


# --- the page -----------------------------------------------------------------------------------------------

PALETTE = ("ink", "teacher", "student", "both", "good", "gold", "memory1")
STYLES = {name: (color, "-") for name, color in zip(METHODS, PALETTE, strict=False)}
STYLES |= {
    name: (STYLES.get(control.cost_of or method, ("baseline", "-"))[0], "--")
    for name, (method, control) in CONTROLS.items()
}
"Color and line style of the default arms; a control has the color of the method whose cost it has."

AXES = {
    "images": ("thousand images", 1e-3),
    "flops": ("teraFLOP", 1e-12),
    "seconds": ("minutes of training", 1 / 60),
}


def write_race_page(results: dict[str, Any], out: Path) -> Path:
    """The page of a race: see `write_page`."""
    names = [row["arm"] for row in results["rows"]]
    colors = ("student", "both", "good", "gold", "teacher")
    spare = itertools.cycle((color, style) for style in (":", "-.", "-", "--") for color in colors)
    styles = {name: STYLES.get(name) or next(spare) for name in names}
    figures = {
        f"{kind}-{axis}": _figure(results["rows"], styles, kind, axis) for kind in KINDS for axis in AXES
    }
    notes = [CONTROLS[name][1].note for name in names if name in CONTROLS]
    about = {"title": "Which method, at equal cost", "kinds": KINDS, "axes": AXES, "notes": notes}
    return write_page(out, "race", "rcmae.compare", results, figures, **about)


def _figure(rows: list[dict[str, Any]], styles: dict[str, tuple[str, str]], kind: str, axis: str) -> str:
    label, unit = AXES[axis]
    log = axis == "images"  # within equal budgets, arms see very different numbers of images
    lines = []
    for row in rows:
        color, style = styles[row["arm"]]
        points = row["curve"][1:] if log else row["curve"]
        x, seeds = [unit * point[axis] for point in points], [point[kind] for point in points]
        spread = [min(values) for values in seeds], [max(values) for values in seeds]
        means = [float(np.mean(values)) for values in seeds]
        lines.append(Line(row["arm"], color, x, means, style, spread=spread))
    return plot(lines, ylabel=f"{KINDS[kind]} accuracy, %", xlabel=label, xlog=log, markers=True)
