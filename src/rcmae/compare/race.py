"""`rcmae compare race`: which method learns more from the same images on an equal budget?

Every arm is a recipe. A seed gives all of them the same images in the same order and, where shapes agree, the same initial weights. The
budget is a number of images, of FLOPs (counted by `compare.cost`) or a time on this device; an arm makes the steps that fit. On the way
and at the end, linear, attentive and k-NN probes read the frozen backbone, and remember which test images they got right.

Arms are compared within a seed. The interval of a difference is a bootstrap over seeds and over their test images, made wider for few
seeds (see `interval`); one that holds zero says "can't tell".

Every run is a run of `rcmae pretrain` under the output folder, and is never made twice: the same command goes on where it stopped.
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
from jaxtyping import Bool
from safetensors.numpy import load_file

from ..config import Recipe, changed, flags, hint, how_many, parse_time, recipe_hash, shipped_recipes, to_toml, with_settings
from ..data.sources import open_source, recipe_for
from ..engine import signals
from ..engine.checkpoint import replace_file
from ..engine.console import clock
from ..engine.distributed import pick_device
from ..engine.metrics import read_metrics
from ..engine.run import owned, write_json
from ..errors import ConfigError, DataError, Preempted, ProcessError, RcmaeError
from ..methods import METHODS
from ..methods.recipes import digits_recipe, load_recipe, with_method
from ..report.build import template
from ..report.curves import Line, plot, standalone
from ..tasks.interval import interval
from ..tasks.probe import probe_set
from .cost import cost

CONTROLS = {control.name: (name, control) for name, method in METHODS.items() for control in method.controls}
"Arms that methods declare beside themselves: name to method and control."

ARMS = tuple(arm for name, method in METHODS.items() for arm in (*(control.name for control in method.controls), name))
"What races by default."

KINDS = {"linear": "linear probe", "attentive": "attentive probe", "knn": "k-NN"}
"What is probed; the first one, which reads the mean over the patches, is judged."

RACES = {"steps", "epochs", "time", "seed", "data", "probes", "probe_train", "probe_test", "attentive"}
"Settings that are the same for all arms."

MEASURED = 24
"Steps of a run that measures how many images a second an arm makes, with a log line after each third of them."


@dataclass(frozen=True)
class Arm:
    """Something that races: what is trained, which of its networks is judged, and the recipe whose cost it has."""

    name: str
    recipe: Recipe
    network: str
    paid: Recipe


def arms(names: Sequence[str], data: str | None = None, settings: Sequence[str] = ()) -> list[Arm]:
    """Names to arms: a method, or a recipe's name or file; behind commas its own settings: "rcmae, half_life=5%".

    A method stands for its recipe on the bundled set, or on other `data` for its ViT-S recipe; `settings` hold for every arm whose
    method has them.
    The network that a method trains for is judged: its teacher, where it has one. Raises ConfigError.
    """
    parts = [[part.strip() for part in re.split(r",(?![^\[]*\])", name)] for name in names]
    bare = []
    for head, *_ in parts:
        method, control = CONTROLS.get(head, (head, None))
        bare.append((_recipe(method, suited=recipe_for(data or Recipe.data)), control))
    found = []
    for name, (_, *own), (recipe, control) in zip(names, parts, bare, strict=True):
        others = {flag for other, _ in bare for flag in flags(type(other))} - flags(type(recipe)).keys()
        shared = [text for text in settings if text.partition("=")[0].strip() not in others]
        recipe = with_settings(recipe, [*shared, *own], name)
        recipe = replace(recipe, data=data or recipe.data)
        paid = recipe
        if control:
            paid = with_method(recipe, control.pays) if control.pays else recipe
            recipe = changed(recipe, **control.settings)
        found.append(Arm(name, recipe, METHODS[recipe.method].networks[-1], paid))
    names = [arm.name for arm in found]
    problems = [f"{name!r} races twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    given = {text.partition("=")[0].strip() for name in [*settings, *names] for text in name.split(",")}
    problems += [f"{key} is for the race to say, not for an arm" for key in RACES & given]
    problems += [f"{arm.name}: {text}" for arm in found for text in METHODS[arm.recipe.method].problems(arm.recipe)]
    problems += [] if len(names) > 1 else ["a race needs two arms"]
    if len({arm.recipe.data for arm in found}) > 1:
        problems.append("the arms have different data; give --data")
    if problems:
        raise ConfigError("; ".join(problems))
    return found


def _recipe(name: str, suited: str) -> Recipe:
    """A method's recipe of the `suited` kind, or beside `folder` its ViT-S recipe with the batch and the memory of that one."""
    if name not in METHODS:
        known = [*METHODS, *CONTROLS, *shipped_recipes()]
        if name not in known and not Path(name).is_file():
            raise ConfigError(f"there is no method, recipe or recipe file {name!r}{hint(name, known)} (`rcmae list` shows all)")
        return load_recipe(name)
    if suited == "folder":
        folder, recipe = load_recipe("folder"), load_recipe(f"{name}-vits16-in1k")
        memory = {"teacher": folder.teacher} if hasattr(recipe, "teacher") else {}
        return replace(changed(recipe, batch_size=folder.optim.batch_size), **memory)
    return digits_recipe(name)


@dataclass(frozen=True)
class Budget:
    """What every arm may spend: so many "images", "FLOPs" or "seconds"."""

    kind: str
    amount: float

    def __str__(self) -> str:
        return f"{self.amount:g} {self.kind}"


def parse_budget(text: str) -> Budget:
    """'300000 images', '2e13 flops', or a time on this device (4m, 1h). Raises ConfigError."""
    m = re.fullmatch(r"\s*([0-9]+\.?[0-9]*(?:e[0-9]+)?)\s*(images|flops)\s*", text.lower())
    try:
        budget = Budget({"images": "images", "flops": "FLOPs"}[m[2]], float(m[1])) if m else Budget("seconds", parse_time(text))
    except ConfigError as e:
        raise ConfigError(f"{text!r} is no budget; write '300000 images', '2e13 flops' or a time on this device (4m, 1h)") from e
    if not budget.amount:
        raise ConfigError("the budget must be above 0")
    return budget


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """How a race is run."""

    budget: Budget
    seeds: int = 3
    probes: int = 5
    "times that each run is probed"
    probe_train: int = 2000
    probe_test: int = 4000
    device: str = "auto"
    jobs: int = 1
    "runs at a time; they share the cores"


def race(contestants: list[Arm], setting: Setting, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Make the runs that are missing under `out`, and judge. Raises DataError without labels, Preempted when stopped."""
    if setting.budget.kind == "images":  # what other budgets hold must be counted or measured first
        steps_of(contestants, setting, {}, {})
    recipe = contestants[0].recipe
    source = open_source(recipe.data, recipe.images.channels, size=recipe.images.size)
    if probe_set(source, changed(recipe, probes=1, probe_train=setting.probe_train, probe_test=setting.probe_test)) is None:
        raise DataError(f"{recipe.data} has no labels to probe with, or one class: a race needs a folder for each of several classes")
    if (few := max(arm.recipe.optim.batch_size for arm in contestants)) > len(source):
        raise DataError(
            f"{recipe.data} holds {how_many(len(source), 'image')}, fewer than a batch of {few}: give --settings batch_size=..."
        )
    data = source.fingerprint()
    with owned(out), signals.answered():
        costs = {arm.name: cost(arm.paid).flops for arm in contestants}
        steps = plan(contestants, setting, costs, data, out, say)
        # Seed 0 is the one that recipes are tried out on.
        runs = [Run(arm, seed, out, steps[arm.name], setting, data) for seed in range(1, setting.seeds + 1) for arm in contestants]
        weights = [run.steps * run.recipe.optim.batch_size * costs[run.arm.name] for run in runs]
        carry_out(runs, weights, setting, say)
        found = judge(runs, costs, setting)
    return found


class Run:
    """One arm on one seed: a run of `rcmae pretrain`."""

    def __init__(self, arm: Arm, seed: int, out: Path, steps: int, setting: Setting, data: str, flags: Sequence[str] = ()):
        """`data` is the fingerprint of the images: the folder's name holds all that makes a run another one."""
        self.arm, self.seed, self.steps, self.flags = arm, seed, steps, flags
        self.recipe = changed(
            replace(arm.recipe, epochs=None, time=None, steps=steps, seed=seed), probes=0 if flags else setting.probes,
            probe_train=setting.probe_train, probe_test=setting.probe_test, attentive=True,
        )  # fmt: skip
        own = hashlib.sha256(" ".join([recipe_hash(self.recipe), data, *flags]).encode()).hexdigest()[:8]
        self.place = out / f"{re.sub(r'[^a-z0-9]+', '-', arm.name.lower()).strip('-')}-{seed}-{own}"

    @property
    def step(self) -> int:
        """Steps that its record tells of."""
        return max((line["step"] for line in read_metrics(self.place)), default=0)

    @property
    def done(self) -> bool:
        """Whether nothing of it is missing."""
        return (self.place / "finished").exists()

    def start(self, setting: Setting) -> subprocess.Popen:
        """The process that makes it or goes on with it."""
        self.place.mkdir(parents=True, exist_ok=True)
        recipe = self.place / "race.toml"
        replace_file(recipe, to_toml(self.recipe))
        command = [sys.executable, "-m", "rcmae", "pretrain", str(recipe), "--out", str(self.place), "--device", setting.device]
        threads = max(1, torch.get_num_threads() // setting.jobs)
        with (self.place / "log.txt").open("a") as log:
            # A session of its own: Ctrl-C is for the race, which asks each run once to save and end. So does its death.
            follow = {"start_new_session": True, "preexec_fn": _end_with_parent if sys.platform == "linux" else None}
            return subprocess.Popen([*command, *self.flags, "--threads", str(threads)], stdout=log, stderr=log, **follow)

    def ended(self, code: int) -> None:
        """Raises what ended it."""
        if code == 0:
            (self.place / "finished").touch()
            return
        if code < 0:
            raise ProcessError(f"{self.arm.name}, seed {self.seed}: ended by signal {-code} (out of memory?); the same command goes on")
        lines = (self.place / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        text = f"{self.arm.name}, seed {self.seed}: {(lines or ['it said nothing'])[-1].removeprefix('rcmae: ')}"
        kinds = {kind.exit_code: kind for kind in reversed(RcmaeError.__subclasses__())}
        raise kinds.get(code, ProcessError)(f"{text}; see {self.place / 'log.txt'}")


def _end_with_parent() -> None:
    _libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


_libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None


def plan(contestants: list[Arm], setting: Setting, costs: dict[str, float], data: str, out: Path, say: Callable) -> dict[str, int]:
    """Steps of each arm within the budget. A time is turned into steps by the images a second of a short run, made once, as many at a
    time as there will be. Raises ConfigError when they are too few."""
    rates = dict.fromkeys(costs, 0.0)
    if setting.budget.kind == "seconds":
        where = [str(pick_device(setting.device)), str(setting.jobs)]
        flags = ("--no-monitor", "--log-every", str(MEASURED // 3))
        short = {}
        for arm in contestants:  # arms that cost the same are measured once: the same steps, whatever the noise
            plain = dataclasses.replace(arm, name=arm.paid.method, recipe=arm.paid)
            short[arm.name] = Run(plain, 0, out / "measured", MEASURED, setting, " ".join([data, *where]), flags)
        once = list({run.place: run for run in short.values()}.values())
        carry_out(once, [1.0] * len(once), setting, say)
        for name, run in short.items():
            seen = [line["images_per_s"] for line in read_metrics(run.place) if line["kind"] == "train"]
            rates[name] = statistics.median(seen[1:])  # the first one warmed up
            say(f"{name}: {rates[name]:,.0f} images a second")
    return steps_of(contestants, setting, costs, rates)


def steps_of(contestants: list[Arm], setting: Setting, costs: dict[str, float], rates: dict[str, float]) -> dict[str, int]:
    """Steps that the budget holds, of arms with these costs (FLOPs an image) and rates (images a second). Raises ConfigError."""
    steps = {}
    for arm in contestants:
        each = {"images": lambda name: 1.0, "FLOPs": lambda name: 1 / costs[name], "seconds": rates.get}[setting.budget.kind]
        steps[arm.name] = int(each(arm.name) * setting.budget.amount / arm.recipe.optim.batch_size)
    if few := [f"{how_many(count, 'step')} of {name}" for name, count in steps.items() if count < setting.probes]:
        raise ConfigError(f"{setting.budget} are {', '.join(few)}: too few to probe {setting.probes} times")
    return steps


def carry_out(runs: list[Run], weights: list[float], setting: Setting, say: Callable, every: float = 30.0) -> None:
    """Make the runs that are not done, `jobs` at a time; a run that fails or a signal ends all of them, their state saved."""
    waiting = [run for run in runs if not run.done]
    share = {run.place: weight / sum(weights) for run, weight in zip(runs, weights, strict=True)}
    finished = sum(share[run.place] for run in runs if run not in waiting)
    before = finished + sum(share[run.place] * run.step / run.steps for run in waiting)
    began = told = time.monotonic()
    going: dict[Run, subprocess.Popen] = {}
    with signals.held():  # until the runs, which end with this process, have saved
        try:
            with signals.interruptible():
                while waiting or going:
                    while waiting and len(going) < setting.jobs:
                        run = waiting.pop(0)
                        going[run] = run.start(setting)
                    time.sleep(0.2)
                    for run in [run for run, process in going.items() if process.poll() is not None]:
                        run.ended(going.pop(run).returncode)
                        finished += share[run.place]
                        told = 0.0
                    if time.monotonic() - told > every:
                        told = time.monotonic()
                        now = finished + sum(share[run.place] * run.step / run.steps for run in going)
                        left = (told - began) * (1 - now) / (now - before) if now > before else 0.0
                        say(f"{len(runs) - len(waiting) - len(going)} of {len(runs)} runs, {now:.0%}, {clock(left)} left")
        except signals.Interrupted as e:
            raise Preempted(f"stopped by {e}; every run is saved, give the same command again") from e
        finally:
            for process in going.values():
                process.terminate()
            for process in going.values():
                process.wait()


# --- the verdict ------------------------------------------------------------------------------------------------------


def judge(runs: list[Run], costs: dict[str, float], setting: Setting) -> dict[str, Any]:
    """All that the runs tell: curves, accuracies, paired differences with their intervals, and the verdict in words."""
    names = list(dict.fromkeys(run.arm.name for run in runs))
    by_arm = {name: [run for run in runs if run.arm.name == name] for name in names}
    final = {name: {kind: [_hits(run, run.steps, run.arm.network, kind) for run in own] for kind in KINDS} for name, own in by_arm.items()}
    start = {name: {kind: [_hits(run, 0, "untrained", kind) for run in own] for kind in KINDS} for name, own in by_arm.items()}
    rows = []
    for name, own in by_arm.items():
        first = own[0]
        images = first.steps * first.recipe.optim.batch_size
        row = {"arm": name, "steps": first.steps, "batch_size": first.recipe.optim.batch_size, "images": images}
        row |= {"recipe_hash": recipe_hash(first.arm.recipe), "curve": curve(own, costs[name])}
        row |= {part: row["curve"][-1][part] for part in ("flops", "seconds")}
        row |= {"health": [_health(run) for run in own]}
        for kind in KINDS:
            row[kind] = [100 * float(hits.mean()) for hits in final[name][kind]]
            row[f"{kind} untrained"] = [100 * float(hits.mean()) for hits in start[name][kind]]
            row[f"{kind} gain"] = interval(final[name][kind], start[name][kind])
            row[f"{kind} against"] = {other: interval(final[name][kind], final[other][kind]) for other in names if other != name}
        rows.append(row)
    about = dataclasses.asdict(setting) | {"data": runs[0].recipe.data, "budget": str(setting.budget)}
    machine = json.loads((runs[0].place / "machine.json").read_text(encoding="utf-8"))
    return {"about": about, "said": verdict(rows, about), "rows": rows, "machine": machine}


def verdict(rows: list[dict[str, Any]], about: dict[str, Any]) -> list[str]:
    """What the judged probe says in words: of the highest arm, and of every arm against the first one."""
    kind, what = "linear", "linear probe on mean patches"
    mean = {row["arm"]: float(np.mean(row[kind])) for row in rows}
    best, first = max(rows, key=lambda row: mean[row["arm"]]), rows[0]
    words: dict[str, list[str]] = {"is better than": [], "can't be told from": []}
    for other, (gain, low, high) in best[f"{kind} against"].items():
        words["is better than" if low > 0 else "can't be told from"].append(f"{other} ({gain:+.1f} points, {low:+.1f} to {high:+.1f})")
    said = " and ".join(f"{word} {', '.join(of)}" for word, of in words.items() if of)
    text = (
        f"With {about['budget']} for each on {about['data']}, {best['arm']} has the highest {what} ({mean[best['arm']]:.1f} %); it {said}."
    )
    found = [text]
    for row in rows[1:]:
        gain, low, high = row[f"{kind} against"][first["arm"]]
        word = "better" if low > 0 else "worse" if high < 0 else "can't tell"
        found.append(f"{row['arm']} against {first['arm']}: {word} ({gain:+.1f} points, {low:+.1f} to {high:+.1f}).")
    return found


def curve(own: list[Run], flops: float) -> list[dict[str, Any]]:
    """The probes of an arm on the way, each a value a seed, with the images, FLOPs and seconds (the median seed's) they came after.

    A control that pays another method's cost has the work of its own teacher taken off its seconds as it is off its FLOPs.
    """
    points, arm = [], own[0].arm
    share = 1.0 if arm.paid == arm.recipe else flops / cost(arm.recipe).flops
    for step in [0] + [line["step"] for line in read_metrics(own[0].place) if line["kind"] == "probe"]:
        images = step * own[0].recipe.optim.batch_size
        seconds = share * statistics.median(_seconds(run, step) for run in own)
        point = {"step": step, "images": images, "flops": images * flops, "seconds": seconds}
        for kind in KINDS:
            point[kind] = [100 * float(_hits(run, step, arm.network if step else "untrained", kind).mean()) for run in own]
        points.append(point)
    return points


def _hits(run: Run, step: int, network: str, kind: str) -> Bool[np.ndarray, " m"]:
    return load_file(run.place / "probes" / f"{step:08d}.safetensors")[f"{network}/{kind}"].astype(bool)


def _seconds(run: Run, step: int) -> float:
    """Time of its training up to a step, without probes and checkpoints."""
    train = [line for line in read_metrics(run.place) if line["kind"] == "train"]
    steps = np.array([0] + [line["step"] for line in train])
    rates = np.array([line["images_per_s"] for line in train]) / run.recipe.optim.batch_size
    return float(np.interp(step, steps, np.concatenate([[0], np.cumsum(np.diff(steps) / rates)])))


def _health(run: Run) -> dict[str, float]:
    """Is it alive? The last word on the features' rank and spread, and on what the method itself logs beside its loss."""
    last: dict[str, Any] = {}
    for line in read_metrics(run.place):
        if line["kind"] in ("train", "health"):
            last |= line
    own = [key for key in METHODS[run.recipe.method].losses if key != "loss"]
    return {key: last[key] for key in ("rankme", "spread", *own) if key in last}


# --- what one sees ----------------------------------------------------------------------------------------------------

PALETTE = ("ink", "teacher", "student", "both", "good", "gold", "memory1")
LOOKS = {name: (colour, "-") for name, colour in zip(METHODS, PALETTE, strict=False)}
LOOKS |= {name: (LOOKS.get(control.pays or method, ("floor", "-"))[0], "--") for name, (method, control) in CONTROLS.items()}
"Colour and line of what races by default, in the order of METHODS, a control as the method whose cost it has; others take what is left."

AXES = {"images": ("thousand images", 1e-3), "flops": ("teraFLOP", 1e-12), "seconds": ("minutes of training", 1 / 60)}


def write_page(found: dict[str, Any], out: Path) -> Path:
    """Write race.json, the figures as SVGs and race.html; returns the page."""
    names = [row["arm"] for row in found["rows"]]
    spare = itertools.cycle(
        (colour, style) for style in (":", "-.", "-", "--") for colour in ("student", "both", "good", "gold", "teacher")
    )
    looks = {name: LOOKS.get(name) or next(spare) for name in names}
    figures = {f"{kind}-{axis}": _figure(found["rows"], looks, kind, axis) for kind in KINDS for axis in AXES}
    write_json(out / "race.json", found)
    for name, svg in figures.items():
        replace_file(out / f"{name}.svg", standalone(svg))
    page = template("race.html.j2", "rcmae.compare").render(
        title="Which method, at equal cost",
        figures=figures,
        kinds=KINDS,
        axes=AXES,
        notes=[CONTROLS[name][1].note for name in names if name in CONTROLS],
        **found,
    )
    replace_file(out / "race.html", page)
    return out / "race.html"


def _figure(rows: list[dict[str, Any]], looks: dict[str, tuple[str, str]], kind: str, axis: str) -> str:
    label, unit = AXES[axis]
    log = axis == "images"  # equal budgets hold very different numbers of them
    lines = []
    for row in rows:
        colour, style = looks[row["arm"]]
        curve = row["curve"][1:] if log else row["curve"]
        x, y = [unit * point[axis] for point in curve], [point[kind] for point in curve]
        spread = [min(v) for v in y], [max(v) for v in y]
        lines.append(Line(row["arm"], colour, x, [float(np.mean(v)) for v in y], style, spread=spread))
    return plot(lines, ylabel=f"{KINDS[kind]}, % right", xlabel=label, xlog=log, markers=True)
